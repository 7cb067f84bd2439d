"""Gradients of rows that choose cells: what reached a result goes to the cells that it was taken from."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.gradients import Slices, counting, extreme, flattened, restored
from maskserve.plan import Plan


def picked(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The picked cell takes g; one that was picked several times, their sum."""
    assert slices.indices is not None
    return restored(plan, placed(plan, slices, flattened(plan, slices.indices), flattened(plan, g)))


def extreme_or_picked(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """Of max and min, as in torch: the picked cell takes g where a dim is given; of all cells tied ones share it."""
    return extreme(plan, slices, g) if plan.params["dim"] is None else picked(plan, slices, g)


def placed(plan: Plan, slices: Slices, places: Tensor, g: Tensor) -> Tensor:
    """g added up at its places of the flattened slices."""
    nothing = torch.zeros_like(flattened(plan, slices.data), dtype=g.dtype)
    return nothing.scatter_add(-1, places, g) if nothing.numel() else nothing


def first(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    nth = flattened(plan, counting(slices)).cumsum(-1)
    return torch.where(restored(plan, nth == 1) & counting(slices), g, 0.0)


def last(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    nth = flattened(plan, counting(slices)).cumsum(-1)
    return torch.where(restored(plan, nth == nth[..., -1:]) & counting(slices), g, 0.0)


def median(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The middle cell, or half to each of the two."""
    return to_ranks(plan, slices, flattened(plan, g), flattened(plan, slices.out), (0.5,), "midpoint")


def quantile(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The two cells that each result lies between, by how near it is to them."""
    q, out = plan.params["q"], slices.out
    if not isinstance(q, tuple):
        q, g, out = (q,), g.unsqueeze(0), out.unsqueeze(0)
    g, out = (torch.cat([flattened(plan, one) for one in several.unbind(0)], -1) for several in (g, out))
    return to_ranks(plan, slices, g, out, q, plan.params["interpolation"])


def to_ranks(plan: Plan, slices: Slices, g: Tensor, out: Tensor, q: tuple[float, ...], how: str) -> Tensor:
    """g (..., a result each q) to the cells at rank q * (count - 1); where the result is NaN, evenly to the NaN cells."""
    if not plan.n_reduced:
        return torch.zeros_like(slices.data)
    cells, mask = flattened(plan, slices.data), flattened(plan, counting(slices))
    order = torch.where(mask, cells.detach(), torch.nan).sort(dim=-1, stable=True).indices
    n = mask.sum(-1, keepdim=True)
    wanted = torch.tensor(q, dtype=torch.float64, device=g.device) * (n - 1).clamp(min=0)
    low, high, share = between(wanted, how)
    spoiled = out.isnan()
    known = torch.where(spoiled, 0.0, g)
    below = placed(plan, slices, order.gather(-1, low), known * (1 - share))
    above = placed(plan, slices, order.gather(-1, high), known * share)
    nans = cells.isnan() & mask
    unknown = torch.where(spoiled, g, 0.0).sum(-1, keepdim=True) / nans.sum(-1, keepdim=True).clamp(min=1)
    return restored(plan, below + above + torch.where(nans, unknown, 0.0))


def between(wanted: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks below and above what is wanted, and the share of the one above."""
    low, high = wanted.floor(), wanted.ceil()
    match how:
        case "nearest":
            low = high = wanted.round()
        case "lower":
            high = low
        case "higher":
            low = high
    share = torch.full_like(wanted, 0.5) if how == "midpoint" else wanted - low
    return low.long(), high.long(), share
