"""The second half of each normalization: apply(block, state) -> block, in float64. Cells under the mask are junk."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts
from maskserve.backends.reference.reductions import CELLS, exponential, finalize_std
from maskserve.dtypes import f64
from maskserve.plan import Plan

DIM = CELLS - 1  # blocks are (outer, n, inner); there is no dim of leaves


def apply_softmax(plan: Plan, data: Tensor, mask: Tensor | None, parts: Parts) -> Tensor:
    """exp(cell - max) / total; a slice whose max is NaN or infinite is NaN, as torch's is."""
    raised = exponential(data.double(), top(parts), precise=plan.dtype is f64)
    return raised.div_(parts["total"].unsqueeze(DIM))


def apply_log_softmax(plan: Plan, data: Tensor, mask: Tensor | None, parts: Parts) -> Tensor:
    """cell - max - log(total)."""
    return (data.double() - top(parts)).sub_(torch.log(parts["total"]).unsqueeze(DIM))


def top(parts: Parts) -> Tensor:
    """The max to subtract; NaN where it is infinite, so that the slice becomes NaN."""
    return torch.where(parts["max"].isfinite(), parts["max"], torch.nan).unsqueeze(DIM)


def apply_standardize(plan: Plan, data: Tensor, mask: Tensor | None, parts: Parts) -> Tensor:
    """(cell - mean) / standard deviation."""
    centred = (data.double() - parts["mean"].unsqueeze(DIM)) - parts["low"].unsqueeze(DIM)
    return centred / finalize_std(plan, parts).unsqueeze(DIM)
