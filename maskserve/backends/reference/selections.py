"""Reductions that need each slice whole: (outer, n, inner) -> (values, count), values in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.cells import counted, select
from maskserve.dtypes import i64
from maskserve.plan import Plan


def median(plan: Plan, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The middle valid cell of each slice, or the mean of the two middle ones; NaN where a valid cell is."""
    count = counted(data, mask, 1)
    if data.shape[1] == 0:
        return count.double(), count
    if plan.dtype is i64:
        lower, upper = by_sorting(data, mask, count)
    else:
        lower, upper = by_selection(data, mask, count)
    middle = (lower + upper) * 0.5
    overflowed = middle.isinf() & lower.isfinite()
    middle = torch.where(overflowed, lower * 0.5 + upper * 0.5, middle)
    if data.is_floating_point():
        nan = data.isnan() if mask is None else data.isnan() & mask
        middle = torch.where(nan.any(1), torch.nan, middle)
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


def by_sorting(data: Tensor, mask: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """The two middle cells of int64 data, which float64 would round."""
    ordered = select(data, mask, torch.iinfo(torch.int64).max).sort(1).values
    last = (count - 1).clamp(min=0)
    lower = ordered.gather(1, (last // 2).unsqueeze(1)).squeeze(1)
    upper = ordered.gather(1, ((last + 1) // 2).unsqueeze(1)).squeeze(1)
    return lower.double(), upper.double()
