"""Norms as scaled sums of powers: nothing overflows or vanishes on the way (Blue, ACM TOMS 4, 1978)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts, counted, halve, select
from maskserve.backends.reference.products import scaled
from maskserve.backends.reference.reductions import root
from maskserve.dtypes import f64
from maskserve.plan import Plan

CELLS = 2


class Powers:
    """(count, total, exponent, ord): the sum of (|cell| / 2**exponent)**ord; for inf and -inf the largest, the smallest."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        ord = float(plan.params["ord"])
        count = counted(data, mask, CELLS)
        parts = {"count": count, "ord": torch.full_like(count, ord, dtype=torch.float64)}
        if not data.shape[CELLS]:
            return parts | {"total": nothing(parts["ord"]), "exponent": torch.zeros_like(count)}
        size = select(data.double().abs(), mask, math.inf if ord < 0 else 0)
        if math.isinf(ord):
            total = size.amax(CELLS) if ord > 0 else size.amin(CELLS)
            return parts | {"total": total, "exponent": torch.zeros_like(count)}
        if ord == 0:
            return parts | {"total": (size != 0).double().sum(CELLS), "exponent": torch.zeros_like(count)}
        exponent = torch.zeros_like(count)
        if plan.dtype is f64 or ord not in (1, 2):  # float32's squares fit float64
            reach = size.amax(CELLS) if ord > 0 else size.amin(CELLS)
            exponent = torch.where(reach.isfinite(), torch.frexp(reach).exponent, 0).long()
            size = scaled(size, -exponent.unsqueeze(CELLS))
        return parts | {"total": halve(power(size, ord)), "exponent": exponent}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        ord = a["ord"]
        # a side without cells has no scale of its own
        a_exponent = torch.where(a["count"] == 0, b["exponent"], a["exponent"])
        b_exponent = torch.where(b["count"] == 0, a["exponent"], b["exponent"])
        larger, smaller = torch.maximum(a_exponent, b_exponent), torch.minimum(a_exponent, b_exponent)
        exponent = torch.where(ord > 0, larger, smaller)
        total = rescaled(a["total"], a_exponent - exponent, ord) + rescaled(b["total"], b_exponent - exponent, ord)
        total = torch.where(ord == math.inf, torch.maximum(a["total"], b["total"]), total)
        total = torch.where(ord == -math.inf, torch.minimum(a["total"], b["total"]), total)
        return {"count": a["count"] + b["count"], "ord": ord, "total": total, "exponent": exponent}


def nothing(ord: Tensor) -> Tensor:
    """The total of no cells."""
    return torch.where(ord == -math.inf, math.inf, 0.0)


def power(size: Tensor, ord: float) -> Tensor:
    if ord == 2:
        return size.square()
    return size.clone() if ord == 1 else size.pow(ord)


def rescaled(total: Tensor, shift: Tensor, ord: Tensor) -> Tensor:
    """total * 2**(shift * ord); a shift of 0 changes nothing, not even an infinite total."""
    wanted = torch.where(shift == 0, 0.0, shift * torch.where(ord.isfinite(), ord, 0.0))
    whole = wanted.floor()
    scale = torch.where(wanted == whole, 1.0, torch.exp2(wanted - whole))
    return scaled(total * scale, whole.long())


def finalize_norm(plan: Plan, parts: Parts) -> Tensor:
    ord = float(plan.params["ord"])
    total = parts["total"]
    if ord == 0 or math.isinf(ord):
        return total
    norm = root(total) if ord == 2 else total if ord == 1 else total.pow(1 / ord)
    return scaled(norm, parts["exponent"])


def apply_normalize(plan: Plan, data: Tensor, mask: Tensor | None, parts: Parts) -> Tensor:
    """cell / max(norm, eps)."""
    norm = finalize_norm(plan, parts).clamp(min=plan.params["eps"]).unsqueeze(1)
    return data.double() / norm
