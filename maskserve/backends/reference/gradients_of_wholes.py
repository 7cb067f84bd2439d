"""Gradients of functions of a whole tensor: (params, data, mask, out, g) -> the gradient by data."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskserve.backends.reference.wholes import Params


class Pairs(NamedTuple):
    """Rows of observations (k, n), centred, and sums over the columns that a pair of rows has in common (k, k).

    `means` and `squares` are those of the first row of a pair.
    """

    cells: Tensor
    there: Tensor
    n: Tensor
    means: Tensor
    products: Tensor
    squares: Tensor


def pairs_of(data: Tensor, mask: Tensor | None) -> Pairs:
    """The pairs in float64, each row less its own mean: a shift that changes no derivative. NaN and inf count as 0."""
    cells = torch.atleast_2d(data.double())
    valid = torch.ones_like(cells, dtype=torch.bool) if mask is None else torch.atleast_2d(mask.expand(data.shape))
    there, finite = valid.double(), valid & cells.isfinite()
    cells = torch.where(finite, cells, 0.0)
    mean = cells.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    cells = torch.where(finite, cells - mean.detach(), 0.0)
    n, sums = there @ there.T, cells @ there.T
    means = sums / n.clamp(min=1)
    return Pairs(
        cells=cells, there=there, n=n, means=means,
        products=cells @ cells.T - sums * means.T, squares=cells.square() @ there.T - sums * means,
    )  # fmt: skip


def cov(params: Params, data: Tensor, mask: Tensor | None, out: Tensor, g: Tensor) -> Tensor:
    """A covariance grows with a cell by how far the other cell of the pair is from its mean."""
    pairs = pairs_of(data, mask)
    divisor = pairs.n - params["correction"]
    share = both_ways(out, g) / torch.where(divisor > 0, divisor, 1.0)
    return crosswise(pairs, share).reshape(data.shape)


def corrcoef(params: Params, data: Tensor, mask: Tensor | None, out: Tensor, g: Tensor) -> Tensor:
    """As a covariance of rows of size 1, less what would only change their sizes; the diagonal is 1 whatever the cells are."""
    unit = unit_of(data, mask)
    pairs = pairs_of(data.double() / unit, mask)
    size = pairs.squares.clamp(min=0) * pairs.squares.T.clamp(min=0)
    some = size > 0
    share = both_ways(out, g) * ~torch.eye(len(size), dtype=torch.bool, device=size.device)
    share = share / torch.where(some, size, 1.0).sqrt()
    own = share * pairs.products / torch.where(some, pairs.squares, 1.0)
    resized = pairs.cells * (own @ pairs.there) - (own * pairs.means) @ pairs.there
    return (crosswise(pairs, share) - resized).reshape(data.shape) / unit


def unit_of(data: Tensor, mask: Tensor | None) -> Tensor:
    """A size for each row that keeps squares of its cells in range; correlations do not change with it."""
    wide = data.detach().double()
    seen = wide.isfinite() if mask is None else wide.isfinite() & mask
    if not data.numel():
        return wide.new_ones(())
    reach = torch.where(seen, wide.abs(), 0.0).amax(-1, keepdim=True) if data.ndim else wide.abs()
    return torch.where(reach > 0, reach, 1.0)


def both_ways(out: Tensor, g: Tensor) -> Tensor:
    """g of a pair and of the pair turned round, (k, k); NaN where the result is and any of g reached it."""
    g, spoiled = torch.atleast_2d(g.double()), torch.atleast_2d(out).isnan()
    both = g + g.T
    return torch.where(spoiled & (both != 0), torch.nan, both)


def crosswise(pairs: Pairs, share: Tensor) -> Tensor:
    """(k, n): the shares of the other rows' deviations from their means."""
    return pairs.there * (share @ pairs.cells - (share * pairs.means.T) @ pairs.there)
