"""Functions of a whole tensor: (data, mask, params) -> one (values, mask) for each output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select
from maskserve.errors import DataError, ParameterError, ShapeError

Params = Mapping[str, Any]
Outputs = tuple[tuple[Tensor, Tensor | None], ...]


def histogram(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """Counts (bins,) in int64 and edges (bins + 1,) in float64; a bin has its lower edge, the last one both."""
    cells = valid_cells(data, mask)
    edges = edges_of(cells, params)
    bins = torch.bucketize(cells.double(), edges[1:-1], right=True)
    within = (cells >= edges[0]) & (cells <= edges[-1])
    hist = torch.bincount(bins[within], minlength=len(edges) - 1)
    if params["density"]:
        total = hist.sum()
        density = hist.double() / (total.clamp(min=1) * edges.diff())
        return ((density, (total > 0).expand(density.shape)), (edges, None))
    return (hist, None), (edges, None)


def edges_of(cells: Tensor, params: Params) -> Tensor:
    """The edges that were given, or of bins of equal width over the range."""
    bins, limits = params["bins"], params["range"]
    if isinstance(bins, tuple):
        edges = torch.tensor(bins, dtype=torch.float64, device=cells.device)
        if len(bins) < 2 or not edges.isfinite().all() or (edges.diff() <= 0).any():
            raise ParameterError("histogram: edges are at least two finite numbers, each larger than the last", parameter="bins")
        return edges
    if not isinstance(bins, int) or not 1 <= bins <= 1 << 24:
        raise ParameterError(f"histogram: bins is {bins}; it must be a whole number from 1 to {1 << 24}", parameter="bins")
    if limits is None:
        limits = extent(cells)
    low, high = (float(limit) for limit in limits)
    if low == high:  # numpy's rule
        low, high = low - 0.5, high + 0.5
    return torch.linspace(low, high, bins + 1, dtype=torch.float64, device=cells.device)


def extent(cells: Tensor) -> tuple[float, float]:
    if not cells.numel():
        return 0.0, 1.0
    low, high = float(cells.min()), float(cells.max())
    if not (-torch.inf < low <= high < torch.inf):
        raise DataError("histogram: a valid cell is NaN or infinite; give a range, or nan=omit")
    return low, high


def unique(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """The values (k,), where each cell's stands (data's shape) and how often each occurs (k,)."""
    flat = (data.view(torch.int64) ^ torch.iinfo(torch.int64).min if data.dtype is torch.uint64 else data).reshape(-1)
    own = None if mask is None else mask.expand(data.shape).reshape(-1)
    cells = flat if own is None else flat[own]
    values, inverse, counts = torch.unique(cells, return_inverse=True, return_counts=True)
    if values.is_floating_point() and (nan := values.isnan()).any():  # torch tells every NaN from every other
        first = int(nan.nonzero()[0])
        inverse, counts = inverse.clamp(max=first), torch.cat([counts[:first], counts[first:].sum().view(1)])
        values = values[: first + 1]
    places = torch.zeros(flat.shape, dtype=torch.int64, device=data.device)
    places[slice(None) if own is None else own] = inverse
    if data.dtype is torch.uint64:
        values = (values ^ torch.iinfo(torch.int64).min).view(torch.uint64)
    return (values, None), (places.view(data.shape), own if own is None else own.view(data.shape)), (counts, None)


def valid_cells(data: Tensor, mask: Tensor | None) -> Tensor:
    """The valid cells in a row."""
    return data.reshape(-1) if mask is None else data[mask.expand(data.shape)]


def cov(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """(k, k) covariances of the k rows, or () of one row; masked where no more pairs than `correction` are valid."""
    sums = pairwise(data, mask)
    divisor = sums.n - params["correction"]
    values = sums.products / torch.where(divisor > 0, divisor, 1.0)
    return (shaped(data, values), shaped(data, (sums.n > 0) & (divisor > 0))),


def corrcoef(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """(k, k) correlation coefficients of the k rows; masked where fewer than two pairs are valid."""
    sums = pairwise(data, mask)
    values = (sums.products / (sums.squares * sums.squares.T).sqrt()).clamp(-1, 1)
    return (shaped(data, values), shaped(data, sums.n > 1)),


class PairSums:
    """Of each pair of rows over the columns where both are valid: how many, and the sums of centred products and squares."""

    def __init__(self, n: Tensor, products: Tensor, squares: Tensor) -> None:
        self.n, self.products, self.squares = n, products, squares


def pairwise(data: Tensor, mask: Tensor | None) -> PairSums:
    """Rows are centred at their own mean first, so that little cancels in what follows."""
    if data.ndim > 2:
        raise ShapeError(f"cov and corrcoef take rows of observations, a tensor of 1 or 2 dims; this one has {data.ndim}")
    cells = torch.atleast_2d(data.double())
    valid = torch.ones_like(cells, dtype=torch.bool) if mask is None else torch.atleast_2d(mask.expand(data.shape))
    there = valid.double()
    if not bool(select(cells, valid).isfinite().all()):
        return pair_by_pair(cells, valid)
    own_mean = select(cells, valid).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    centred = select(cells - own_mean, valid)
    n = there @ there.T
    count = n.clamp(min=1)
    sums = centred @ there.T  # of row i over the columns where row j is valid
    products = centred @ centred.T - sums * sums.T / count
    squares = centred.square() @ there.T - sums.square() / count
    return PairSums(n, products, squares.clamp(min=0))


def pair_by_pair(cells: Tensor, valid: Tensor) -> PairSums:
    """Where a valid cell is NaN or infinite: a product with 0 would carry it into pairs that it is no part of."""
    rows = len(cells)
    n, products, squares = (torch.zeros(rows, rows, dtype=torch.float64, device=cells.device) for _ in range(3))
    for i in range(rows):
        for j in range(rows):
            both = valid[i] & valid[j]
            n[i, j] = both.sum()
            x, y = (row[both] - row[both].mean() if n[i, j] else row[both] for row in (cells[i], cells[j]))
            products[i, j], squares[i, j] = (x * y).sum(), x.square().sum()
    return PairSums(n, products, squares)


def shaped(data: Tensor, matrix: Tensor) -> Tensor:
    return matrix if data.ndim == 2 else matrix.reshape(())
