"""Norms as scaled sums of powers: nothing overflows or vanishes on the way (Blue, ACM TOMS 4, 1978)."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from maskserve.backends.merges import two_sum
from maskserve.backends.reference.cells import Parts, counted, halve, halve_pairs, select
from maskserve.backends.reference.reductions import root
from maskserve.dtypes import f64
from maskserve.plan import Plan

CELLS = 2
STEP = 64
"""Scales are powers of 2**64 up to order 8, so that most states that meet have the same one and lose nothing."""


class Powers:
    """(count, total + low, scale, ord): the sum of (|cell| / scale)**ord; for inf and -inf the largest, the smallest."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        ord = float(plan.params["ord"])
        count = counted(data, mask, CELLS)
        one = torch.ones_like(count, dtype=torch.float64)
        parts = {"count": count, "ord": one * ord, "low": one * 0, "scale": one}
        if not data.shape[CELLS]:
            return parts | {"total": nothing(parts["ord"])}
        size = select(data.double().abs(), mask, math.inf if ord < 0 else 0)
        if math.isinf(ord):
            return parts | {"total": size.amax(CELLS) if ord > 0 else size.amin(CELLS)}
        if ord == 0:
            return parts | {"total": (size != 0).double().sum(CELLS)}
        # the powers of float32's and the integers' cells fit float64 up to order 6, and every root does
        if abs(ord) > 6 or (plan.dtype is f64 and abs(ord) > 0.5):
            parts["scale"] = scale_of(size.amax(CELLS) if ord > 0 else size.amin(CELLS), ord)
            size = size / parts["scale"].unsqueeze(CELLS)
        if plan.dtype is not f64:
            return parts | {"total": halve(power(size, ord))}
        total, low = halve_pairs(power(size, ord))
        return parts | {"total": total, "low": torch.where(total.isfinite(), low, 0.0)}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        ord = a["ord"]
        a_scale, b_scale = (torch.where(scaleless(x), y["scale"], x["scale"]) for x, y in ((a, b), (b, a)))
        scale = torch.where(ord > 0, torch.maximum(a_scale, b_scale), torch.minimum(a_scale, b_scale))
        a_share, b_share = share(a_scale, scale, ord), share(b_scale, scale, ord)
        total, error = two_sum(a["total"] * a_share, b["total"] * b_share)
        low = a["low"] * a_share + b["low"] * b_share + error
        total = torch.where(ord == math.inf, torch.maximum(a["total"], b["total"]), total)
        total = torch.where(ord == -math.inf, torch.minimum(a["total"], b["total"]), total)
        low = torch.where(total.isfinite() & ord.isfinite(), low, 0.0)
        return {"count": a["count"] + b["count"], "ord": ord, "total": total, "low": low, "scale": scale}


def nothing(ord: Tensor) -> Tensor:
    """The total of no cells."""
    return torch.where(ord == -math.inf, math.inf, torch.zeros_like(ord))


def scale_of(reach: Tensor, ord: float) -> Tensor:
    """A scale next to the cell that counts most: a power of two, or from order 8 on, where no power of two is near, itself."""
    if abs(ord) > 8:
        scale = reach
    else:
        step = (torch.frexp(reach).exponent - 1).clamp(min=-1000).div(STEP, rounding_mode="floor") * STEP
        scale = torch.ldexp(torch.ones_like(reach), step)
    return torch.where(reach.isfinite() & (reach != 0), scale, 1.0)


def scaleless(parts: Parts) -> Tensor:
    """Where a state takes the other's scale: it is 0, infinite or NaN on any."""
    return (parts["total"] == 0) | ~parts["total"].isfinite()


def share(own: Tensor, scale: Tensor, ord: Tensor) -> Tensor:
    """What a total counts for on another scale; exactly 1 on its own."""
    return torch.where(own == scale, 1.0, (own / scale).pow(ord))


def power(size: Tensor, ord: float) -> Tensor:
    """size**ord in fresh memory, the common orders rounded as little as can be."""
    match ord:
        case 2:
            return size.square()
        case 1:
            return size.clone()
        case 3:
            return size.square().mul_(size)
        case 0.5:
            return root(size)
        case -1:
            return size.reciprocal()
        case -2:
            return size.square().reciprocal_()
    return size.pow(ord)


def finalize_norm(plan: Plan, parts: Parts) -> Tensor:
    ord = float(plan.params["ord"])
    if ord == 0 or math.isinf(ord):
        return parts["total"]
    return inverse_power(parts["total"], parts["low"], ord) * parts["scale"]


def inverse_power(total: Tensor, low: Tensor, ord: float) -> Tensor:
    """(total + low)**(1 / ord)."""
    if ord in (1, -1):
        return (total + low) ** ord
    if ord in (2, -2):
        plain = root(total)
        size = torch.where(plain > 0, plain + low / (2 * plain), plain)
        return torch.where(plain.isfinite(), size, plain) ** (ord / 2)
    plain = total.pow(1 / ord)
    if ord == 0.5:
        return torch.where(total.isfinite(), total * total + 2 * total * low, total)
    if abs(ord) < 1:
        rest = float(1 / Fraction(ord) - Fraction(1 / ord))  # of 1 / ord, which float64 rounds
        return torch.where(plain.isfinite() & (plain > 0), plain * (1 + rest * total.log()), plain)
    # one step of Newton's method makes good what rounding 1 / ord lost
    better = plain - plain * ((plain.pow(ord) - total) - low) / (ord * total)
    return torch.where((total > 0) & better.isfinite(), better, plain)


def apply_normalize(plan: Plan, data: Tensor, mask: Tensor | None, parts: Parts) -> Tensor:
    """cell / max(norm, eps)."""
    norm = finalize_norm(plan, parts).clamp(min=plan.params["eps"]).unsqueeze(1)
    return data.double() / norm
