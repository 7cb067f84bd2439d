"""Functions of a whole tensor: (data, mask, params) -> one (values, mask) for each output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select
from maskserve.backends.reference.products import scaled
from maskserve.errors import DataError, ParameterError, ShapeError
from maskserve.masks import intersection
from maskserve.room import check_room

Params = Mapping[str, Any]
Outputs = tuple[tuple[Tensor, Tensor | None], ...]
BLOCK = 1 << 16
"""Cells of a histogram that are placed at once: they and what is made of them stay in the cache."""


def histogram(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """Counts (bins,) in int64 and edges (bins + 1,) in float64; a bin has its lower edge, the last one both."""
    cells = valid_cells(data, mask)
    edges = edges_of(cells, params)
    hist = torch.zeros(len(edges) - 1, dtype=torch.int64, device=data.device)
    for block in cells.split(max(BLOCK, len(hist))):
        wide = block.double()  # a comparison of narrow cells and an edge would round the edge
        within = (wide >= edges[0]).logical_and_(wide <= edges[-1])
        wide = wide if within.all() else wide[within]
        even = not isinstance(params["bins"], tuple)
        bins = even_bins(wide, edges) if even else torch.bucketize(wide, edges[1:-1], right=True)
        hist += torch.bincount(bins, minlength=len(hist))
    if params["density"]:
        total = hist.sum()
        density = hist.double() / (total.clamp(min=1) * edges.diff())
        return ((density, (total > 0).expand(density.shape)), (edges, None))
    return (hist, None), (edges, None)


def even_bins(cells: Tensor, edges: Tensor) -> Tensor:
    """The bins of cells within edges of equal distance: by division, then by the edges themselves, as numpy does it."""
    low, high, last = edges[0], edges[-1], len(edges) - 2
    if not torch.isfinite(high - low) or (high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs()):
        return torch.bucketize(cells, edges[1:-1], right=True)  # a quotient could be off by more than one
    bins = (cells - low).mul_((last + 1) / (high - low)).to(torch.int32).clamp_(0, last)
    ends = edges.clone()
    ends[-1] = torch.inf  # the last bin has both its edges
    bins -= (cells < ends.take(bins.long())).view(torch.uint8)
    bins += (cells >= ends[1:].take(bins.long())).view(torch.uint8)
    return bins


def edges_of(cells: Tensor, params: Params) -> Tensor:
    """The edges that were given, or of bins of equal width over the range."""
    bins, limits = params["bins"], params["range"]
    if isinstance(bins, tuple):
        edges = torch.tensor(bins, dtype=torch.float64, device=cells.device)
        if len(bins) < 2 or not edges.isfinite().all() or (edges.diff() <= 0).any():
            raise ParameterError(
                "histogram: edges are at least two finite numbers, each larger than the last", parameter="bins"
            )
        return edges
    if not isinstance(bins, int) or not 1 <= bins <= 1 << 24:
        raise ParameterError(
            f"histogram: bins is {bins}; it must be a whole number from 1 to {1 << 24}", parameter="bins"
        )
    if limits is None:
        limits = extent(cells)
    low, high = (float(limit) for limit in limits)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ParameterError(f"histogram: range is {limits}; both ends must be finite", parameter="range")
    if low == high:  # numpy's rule
        low, high = low - 0.5, high + 0.5
    edges = (
        torch.linspace(low / 2, high / 2, bins + 1, dtype=torch.float64, device=cells.device) * 2
    )  # high - low may overflow
    edges[0], edges[-1] = low, high
    return edges


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


def histc(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """Counts (bins,) in the cells' dtype, by torch's own function."""
    cells, bins = valid_cells(data, mask), params["bins"]
    if bins < 1 or params["min"] > params["max"]:
        raise ParameterError("histc: bins must be at least 1, and min at most max", parameter="bins")
    if params["min"] == params["max"] and not bool(cells.isfinite().all()):
        raise DataError("histc: a valid cell is not finite, and so the range is not: give min and max")
    check_room("histc", bins, "give fewer bins", "bins")
    wide = cells.float() if cells.itemsize < 4 else cells
    return ((torch.histc(wide, bins, params["min"], params["max"]).to(data.dtype), None),)


def bincount(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """Counts (largest cell + 1,) in int64."""
    cells = valid_cells(data, mask)
    if bool((cells < 0).any()):
        raise DataError("bincount: a valid cell is below 0; unique with return_counts=True counts any values")
    length = max(params["minlength"], int(cells.max()) + 1 if cells.numel() else 0)
    check_room("bincount", length, "unique with return_counts=True counts the values that there are")
    return ((torch.bincount(cells, minlength=length), None),)


def valid_cells(data: Tensor, mask: Tensor | None) -> Tensor:
    """The valid cells in a row."""
    return data.reshape(-1) if mask is None else data.masked_select(mask)


def cov(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """(k, k) covariances of the k rows, or () of one row; masked where no more pairs than `correction` are valid."""
    sums = pairwise(data.double(), mask)
    divisor = sums.n - params["correction"]
    values = sums.products / torch.where(divisor > 0, divisor, 1.0)
    return ((shaped(data, values), shaped(data, (sums.n > 0) & (divisor > 0))),)


def corrcoef(data: Tensor, mask: Tensor | None, params: Params) -> Outputs:
    """(k, k) correlation coefficients of the k rows; masked where fewer than two pairs are valid, NaN of equal cells."""
    wide = data.double()
    if data.numel() and data.ndim:
        reach = select(wide, intersection([mask, wide.isfinite()])).abs().amax(-1, keepdim=True)
        wide = scaled(wide, -torch.frexp(reach).exponent.long())  # squares of cells near 1 neither overflow nor vanish
    sums = pairwise(wide, mask)
    root = sums.squares.sqrt()
    values = (sums.products / (root * root.T)).clamp(-1, 1)
    own = values.diagonal()
    own.copy_(torch.where(own.isnan(), own, 1.0))
    return ((shaped(data, values), shaped(data, sums.n > 1)),)


@dataclass(frozen=True, slots=True, eq=False)
class PairSums:
    """Of each pair of rows over the columns where both are valid: how many, and the sums of centred products and squares.

    `squares` are those of the first row of a pair.
    """

    n: Tensor
    products: Tensor
    squares: Tensor


LOST = 1e3
"""How far the square of a mean may exceed the variance about it before a pair is centred anew."""
PAIR_CELLS = 1 << 22
"""Cells of the pairs that are centred at once."""


def pairwise(data: Tensor, mask: Tensor | None) -> PairSums:
    """Rows are centred at their own means; a pair whose mean over its columns is far from them is centred anew."""
    if data.ndim > 2:
        raise ShapeError(
            f"cov and corrcoef take rows of observations, a tensor of 1 or 2 dims; this one has {data.ndim}"
        )
    cells = torch.atleast_2d(data)
    finite = cells.isfinite()
    valid = None if mask is None else torch.atleast_2d(mask.expand(data.shape))
    whole = bool(finite.all())
    cells = select(cells, valid if whole else intersection([valid, finite]))
    sums = of_whole_rows(cells) if valid is None else of_masked_rows(cells, valid)
    if not whole:
        there = torch.ones_like(cells) if valid is None else valid.double()
        bad = ~finite if valid is None else valid & ~finite
        touched = bad.double() @ there.T > 0  # row i has a NaN or inf where row j is valid
        sums.squares[touched] = torch.nan
        sums.products[touched | touched.T] = torch.nan
    return sums


def of_whole_rows(cells: Tensor) -> PairSums:
    k, columns = cells.shape
    centred = cells - mean_of(cells, None)
    sums = centred.sum(1, keepdim=True)
    products = centred @ centred.T - sums * sums.T / max(columns, 1)
    squares = products.diagonal().clamp(min=0).unsqueeze(1).repeat(1, k)
    return PairSums(torch.full_like(products, columns), products, squares)


def of_masked_rows(cells: Tensor, valid: Tensor) -> PairSums:
    there = valid.double()
    centred = select(cells - mean_of(cells, valid), valid)
    n = there @ there.T
    count = n.clamp(min=1)
    sums = centred @ there.T  # of row i over the columns where row j is valid
    squares = centred.square() @ there.T
    means = sums.square() / count
    squares = (squares - means).clamp(min=0)
    products = centred @ centred.T - sums * sums.T / count
    lost = means > LOST * squares
    for i, j in zip(*[at.split(max(1, PAIR_CELLS // max(cells.shape[1], 1))) for at in triangle(lost)], strict=True):
        both = valid[i] & valid[j]
        x, y = (select(cells[at] - mean_of(select(cells[at], both), both), both) for at in (i, j))
        products[i, j] = products[j, i] = (x * y).sum(1)
        squares[i, j], squares[j, i] = x.square().sum(1), y.square().sum(1)
    return PairSums(n, products, squares)


def triangle(lost: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs i <= j of which either side is lost."""
    i, j = (lost | lost.T).triu().nonzero(as_tuple=True)
    return i, j


def mean_of(cells: Tensor, valid: Tensor | None) -> Tensor:
    """(k, 1) means of rows, masked cells 0; that of equal cells is exactly their value."""
    if not cells.shape[1]:
        return cells.new_zeros(len(cells), 1)
    n = cells.shape[1] if valid is None else valid.sum(1, keepdim=True).clamp(min=1)
    low, high = (
        select(cells, valid, torch.inf).amin(1, keepdim=True),
        select(cells, valid, -torch.inf).amax(1, keepdim=True),
    )
    mean = cells.sum(1, keepdim=True) / n
    return torch.where(low <= high, torch.minimum(torch.maximum(mean, low), high), 0.0)


def shaped(data: Tensor, matrix: Tensor) -> Tensor:
    return matrix if data.ndim == 2 else matrix.reshape(())
