"""Integer results that do not fit are errors; they never wrap."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.errors import IntegerOverflowError
from maskserve.plan import Plan

_HALF = 2**31


def check_fits(plan: Plan, high: Tensor, low: Tensor) -> Tensor:
    """high * 2**32 + low as int64, or an IntegerOverflowError where that is outside the result's dtype."""
    within = (high >= -_HALF) & (high < _HALF)
    value = (high << 32) + low
    info = torch.iinfo(getattr(torch, plan.result.torch))
    within &= (value >= info.min) & (value <= info.max)
    if not within.all():
        raise IntegerOverflowError(
            f"{plan.row.name}: a true result does not fit {plan.result.name}; give dtype=f64, or divide the data first",
            parameter="dtype",
        )
    return value
