"""Vector-Jacobian products of the sliced rows: (plan, slices, g) -> the gradient by data, broadcastable to plan.shape.

They are made of torch operations that torch can differentiate again and run under torch.func.vmap. What they leave at
hidden cells, and in slices whose result is masked, means nothing; it is finite wherever a sum over the slice meets it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskserve.plan import Plan

RUN = 4096
"""torch cuts the sum of one long slice by threads, and those of several slices between them."""


class Slices(NamedTuple):
    """What a gradient is computed from."""

    data: Tensor
    """Of shape plan.shape, hidden cells 0, floating or complex."""
    mask: Tensor | None
    """Which cells count, of shape plan.shape; None: all."""
    out: Tensor
    """The op's result with the reduced dims kept at size 1, hidden cells 0; several results a slice stand along a first dim."""
    indices: Tensor | None = None
    """Of a row that picks: the place of each result within its slice, shaped like `out`."""
    weights: Tensor | None = None
    """What each cell counts for, of shape plan.shape, 0 where masked."""


# -- what the formulas share --------------------------------------------------------------------------------------


def along(plan: Plan, cells: Tensor) -> Tensor:
    """The sums of slices, with the reduced dims kept at size 1; the same bits from any number of threads."""
    if cells.numel() <= RUN or any(size > 1 for dim, size in enumerate(cells.shape) if dim not in plan.dims):
        return cells.sum(plan.dims, keepdim=True)
    parts = cells.flatten()
    while parts.numel() > RUN:
        whole = parts.numel() // RUN * RUN
        rest = parts[whole:].sum(0, keepdim=True)
        parts = torch.cat([parts[:whole].unflatten(0, (-1, RUN)).sum(1), rest])
    return parts.sum().reshape((1,) * len(plan.shape))


def dim_of(plan: Plan) -> int:
    """The one dim of a scan; torch takes 0 for that of a 0-d tensor."""
    return plan.dims[0] if plan.dims else 0


def flattened(plan: Plan, cells: Tensor) -> Tensor:
    """Kept dims first, then all reduced ones as a last dim."""
    if not plan.shape:
        return cells.reshape(1)
    kept = [dim for dim in range(len(plan.shape)) if dim not in plan.dims]
    return cells.permute(*kept, *plan.dims).flatten(len(kept))


def restored(plan: Plan, cells: Tensor) -> Tensor:
    """The dims of `flattened` cells where they were."""
    if not plan.shape:
        return cells.reshape(())
    order = [dim for dim in range(len(plan.shape)) if dim not in plan.dims] + list(plan.dims)
    return cells.reshape([plan.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


def wide(cells: Tensor) -> Tensor:
    """In float64, or complex128."""
    return cells.to(torch.complex128 if cells.is_complex() else torch.float64)


def counting(slices: Slices) -> Tensor:
    """Which cells count."""
    return torch.ones_like(slices.data, dtype=torch.bool) if slices.mask is None else slices.mask


def shown(slices: Slices, cells: Tensor) -> Tensor:
    """`cells` with hidden ones 0."""
    return cells if slices.mask is None else torch.where(slices.mask, cells, 0.0)


def count(plan: Plan, slices: Slices) -> Tensor:
    """How many cells of each slice count, at least 1."""
    if slices.mask is None:
        return torch.full((), max(plan.n_reduced, 1), device=slices.data.device)
    return along(plan, slices.mask).clamp(min=1)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0, in every derivative too."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def root(squares: Tensor) -> Tensor:
    """The square root; its derivative at 0 is 0."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def squared(cells: Tensor) -> Tensor:
    """|cell|^2, real."""
    return (cells * cells.conj()).real if cells.is_complex() else cells.square()


def inner(g: Tensor, cells: Tensor) -> Tensor:
    """What the result grows by with a real factor of `cells`, where it grows by g with them: torch's convention."""
    return (g * cells.conj()).real if cells.is_complex() else g * cells


# -- sums and spreads ---------------------------------------------------------------------------------------------


def total(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """Of sum, and of fill: each cell counts for itself."""
    return g


def mean(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    return g / count(plan, slices)


def weighted_total(plan: Plan, slices: Slices, g: Tensor) -> tuple[Tensor, Tensor]:
    assert slices.weights is not None
    return g * slices.weights, inner(g, slices.data)


def weighted_mean(plan: Plan, slices: Slices, g: Tensor) -> tuple[Tensor, Tensor]:
    """A mean grows with a weight by how far the cell is from it."""
    weight = weight_of(plan, slices)
    divisor = nonzero(along(plan, weight))
    return g * weight / divisor, inner(g, centred(plan, slices, weight)) / divisor


class Spread(NamedTuple):
    """The weight of each cell (1 where there are none), cells less their mean, divisor and variance, in float64."""

    weight: Tensor
    centred: Tensor
    divisor: Tensor
    variance: Tensor


def spread(plan: Plan, slices: Slices) -> Spread:
    weight = weight_of(plan, slices)
    deviation = centred(plan, slices, weight)
    divisor = along(plan, weight) - plan.params["correction"]
    if slices.weights is None:
        divisor = torch.where(divisor > 0, divisor, 1.0)  # the result is masked there
    divisor = nonzero(divisor)
    return Spread(weight, deviation, divisor, along(plan, weight * squared(deviation)) / divisor)


def weight_of(plan: Plan, slices: Slices) -> Tensor:
    """What each cell counts for, in float64 and of shape plan.shape."""
    if slices.weights is not None:
        return slices.weights.double()
    return counting(slices).double()


def nonzero(weight: Tensor) -> Tensor:
    """The weight, or 1 where it is 0 and the result is masked."""
    return torch.where(weight == 0, 1.0, weight)


def centred(plan: Plan, slices: Slices, weight: Tensor) -> Tensor:
    """Cells less the mean of their slice, hidden ones 0.

    Centred twice, so that 1e9 + small values keep the small digits; the first shift changes no derivative.
    """
    data, divisor = wide(slices.data), nonzero(along(plan, weight))
    first = shown(slices, data - (along(plan, weight * data) / divisor).detach())
    return shown(slices, first - along(plan, weight * first) / divisor)


def var(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    about = spread(plan, slices)
    return 2 * g * about.weight * about.centred / about.divisor


def weighted_var(plan: Plan, slices: Slices, g: Tensor) -> tuple[Tensor, Tensor]:
    about = spread(plan, slices)
    return var(plan, slices, g), g * (squared(about.centred) - about.variance) / about.divisor


def std(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """0 where the cells are equal: of the subgradients there, the one that moves nothing; torch's is NaN."""
    about = spread(plan, slices)
    return ratio(g * about.weight * about.centred / about.divisor, root(about.variance))


def weighted_std(plan: Plan, slices: Slices, g: Tensor) -> tuple[Tensor, Tensor]:
    about = spread(plan, slices)
    excess = (squared(about.centred) - about.variance) / about.divisor
    return std(plan, slices, g), ratio(g * excess / 2, root(about.variance))


def standardize(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """What is left of g without its mean and its part along the result; NaN, as the result, where cells are equal."""
    about, g = spread(plan, slices), g.double()
    enough = along(plan, about.weight) > plan.params["correction"]
    size = torch.where(enough, about.variance, 1.0).sqrt()
    scaled = about.centred / size
    return (g - along(plan, g) / count(plan, slices) - scaled * along(plan, g * scaled) / about.divisor) / size


# -- extremes and ends --------------------------------------------------------------------------------------------


def extreme(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """Of amax and amin: cells that equal the result share g evenly, NaN being one with NaN."""
    return shared(plan, slices, slices.out, g)


def shared(plan: Plan, slices: Slices, found: Tensor, g: Tensor) -> Tensor:
    """g in equal parts to the cells that equal what was found."""
    same = counting(slices) & ((slices.data == found) | (slices.data.isnan() & found.isnan()))
    return torch.where(same, g / along(plan, same).clamp(min=1), 0.0)


def extent(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """Of ptp: that of the largest cell less that of the smallest."""
    if not slices.data.numel():
        return g.expand(plan.shape)
    counts, data = counting(slices), slices.data
    low = torch.where(counts, data, torch.inf).amin(plan.dims, keepdim=True)
    high = torch.where(counts, data, -torch.inf).amax(plan.dims, keepdim=True)
    return shared(plan, slices, high, g) - shared(plan, slices, low, g)


# -- exponentials -------------------------------------------------------------------------------------------------


def logsumexp(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The softmax of the slice; 0 where every cell is -inf. Beside a cell that is inf finite ones have 0, as in torch.

    The result is but a shift that keeps exponentials in range: it cancels, with what its rounding cost.
    """
    shift = slices.out.detach()
    nothing = (shift.real if shift.is_complex() else shift) == -torch.inf
    counts = counting(slices) & ~nothing
    raised = torch.where(counts, torch.where(counts, slices.data - shift, 0.0).exp(), 0.0)
    total = torch.where(shift.isinf(), 1.0, along(plan, raised))
    return g * ratio(raised, total).conj()


def softmax(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    return slices.out * (g - along(plan, g * slices.out))


def softmin(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    return -softmax(plan, slices, g)


def log_softmax(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    return g - slices.out.exp() * along(plan, g)


# -- running sums -------------------------------------------------------------------------------------------------


def cumsum(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The sum from each cell on."""
    dim = dim_of(plan)
    return g.flip(dim).cumsum(dim).flip(dim) if g.ndim else g
