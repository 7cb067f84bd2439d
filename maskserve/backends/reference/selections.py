"""Reductions that need each slice whole: (outer, n, inner) -> (values, count), values in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.merges import two_sum
from maskserve.backends.reference.cells import counted, has_nan, select
from maskserve.backends.reference.orders import cells_in_order, in_order, run_starts, runs, valid_first
from maskserve.backends.reference.products import two_product
from maskserve.backends.reference.reductions import as_double
from maskserve.dtypes import i64
from maskserve.plan import Plan


def median(plan: Plan, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The middle valid cell of each slice, or the mean of the two middle ones; NaN where a valid cell is."""
    count = counted(data, mask, 1)
    if data.shape[1] == 0:
        return count.double(), count
    if plan.dtype is i64:
        lower, upper = by_sorting(plan, data, mask, count)
    else:
        lower, upper = by_selection(data, mask, count)
    middle = (lower + upper) * 0.5
    overflowed = middle.isinf() & lower.isfinite()
    middle = torch.where(overflowed, lower * 0.5 + upper * 0.5, middle)
    if data.is_floating_point():
        middle = torch.where(has_nan(data, mask, 1).squeeze(1), torch.nan, middle)
    return middle, count


def by_selection(data: Tensor, mask: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """The two middle cells without sorting: nanmedian gives the lower one, one comparison the upper."""
    single = torch.float32 if data.dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float64
    cells = select(data.to(single), mask, torch.nan)
    lower = cells.nanmedian(1).values
    beyond = cells > lower.unsqueeze(1)
    n_lower = count - beyond.sum(1)
    above = select(cells, beyond, torch.inf).amin(1)
    upper = torch.where((count % 2 == 0) & (n_lower == count // 2), above, lower)
    return lower.double(), upper.double()


def by_sorting(plan: Plan, data: Tensor, mask: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """The two middle cells of int64 data, which float64 would round."""
    ordered = select(data, mask, torch.iinfo(torch.int64).max).sort(1).values
    last = (count - 1).clamp(min=0)
    lower = ordered.gather(1, (last // 2).unsqueeze(1)).squeeze(1)
    upper = ordered.gather(1, ((last + 1) // 2).unsqueeze(1)).squeeze(1)
    return as_double(plan, lower), as_double(plan, upper)


def quantile(plan: Plan, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(one a q, outer, inner): the cells at q * (count - 1), interpolated; NaN where a valid cell is."""
    count = counted(data, mask, 1)
    q = plan.params["q"]
    shares = torch.tensor(q if isinstance(q, tuple) else (q,), dtype=torch.float64, device=data.device).view(-1, 1, 1)
    if not data.shape[1]:
        return torch.zeros((shares.shape[0], *count.shape), dtype=torch.float64, device=data.device), count
    ordered = cells_in_order(data, mask)
    wanted = shares * (count - 1).clamp(min=0)
    values = interpolated(plan, ordered, wanted, plan.params["interpolation"])
    if data.is_floating_point():
        values = torch.where(has_nan(data, mask, 1).squeeze(1), torch.nan, values)
    return values, count


def interpolated(plan: Plan, ordered: Tensor, wanted: Tensor, how: str) -> Tensor:
    """The cells at fractional places (m, outer, inner) of sorted slices (outer, n, inner), in float64."""

    def at(places: Tensor) -> Tensor:
        return as_double(plan, ordered.gather(1, places.long().movedim(0, 1))).movedim(1, 0)

    if how == "nearest":
        return at(wanted.round())
    if how in ("lower", "higher"):
        return at(wanted.floor() if how == "lower" else wanted.ceil())
    lower, upper = at(wanted.floor()), at(wanted.ceil())
    share = torch.full_like(wanted, 0.5) if how == "midpoint" else wanted - wanted.floor()
    return torch.where((lower == upper) | (share == 0), lower, between(lower, upper, share))


def between(lower: Tensor, upper: Tensor, share: Tensor) -> Tensor:
    """lower + share * (upper - lower), rounded once or twice; an infinite end wins, at a quarter the size nothing overflows."""
    lower, upper = lower * 0.25, upper * 0.25
    gap, gap_error = two_sum(upper, -lower)
    step, step_error = two_product(share, gap)
    total, error = two_sum(lower, step)
    found = total + (error + (step_error + share * gap_error))
    return torch.where(gap.isinf(), lower + upper, found) * 4


def mode(plan: Plan, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The place of the first of the most frequent valid cells, the smallest where several are; NaN equals NaN."""
    count = counted(data, mask, 1)
    if not data.shape[1]:
        return torch.zeros_like(count), count
    ordered, places = in_order(data, mask)
    starts = run_starts(ordered)
    at = torch.arange(data.shape[1], device=data.device).view(1, -1, 1)
    lengths = torch.where(valid_first(data, mask), at - starts + 1, 0)
    best = lengths.argmax(1, keepdim=True)  # the first longest run is that of the smallest value
    return places.gather(1, starts.gather(1, best)).squeeze(1), count


def count_distinct(plan: Plan, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many runs of equal cells the sorted valid cells make."""
    count = counted(data, mask, 1)
    if not data.shape[1]:
        return torch.zeros_like(count), count
    ordered = cells_in_order(data, mask)
    return (runs(ordered) & valid_first(data, mask)).sum(1), count
