"""The meaning of each reduction pass: lift a leaf, merge two states, finalize one.

lift takes data and mask as (outer, leaves, n, inner) and gives parts of shape (outer, leaves, inner); finalize gives
values of the parts' shape, at least as wide as the result's dtype. Every cell under the mask is junk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from maskserve.backends import merges
from maskserve.backends.merges import two_sum
from maskserve.backends.reference.cells import Parts, counted, halve, halve_pairs, select, widened
from maskserve.backends.reference.overflow import check_fits
from maskserve.dtypes import f64, i64
from maskserve.plan import Plan

CELLS = 2  # the dim of (outer, leaves, n, inner) that a lift reduces
LIMB = 0xFFFF_FFFF
SCALE = 128
"""The binary exponent by which a float64 sum that overflows on the way is computed again."""


class Count:
    """(count): how many cells are valid."""

    exact = True

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        return {"count": counted(data, mask, CELLS)}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        return {"count": a["count"] + b["count"]}


class Total:
    """The sum of the valid cells: exact limbs for integers, a scaled pair for float64, one float64 for the rest."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        count = {"count": counted(data, mask, CELLS)}
        if plan.dtype.is_integral:
            return count | lift_limbs(data, mask, wide=plan.dtype is i64)
        if plan.dtype is f64:
            return count | lift_pair(data, mask)
        return count | {"total": halve(widened(data, mask))}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        count = {"count": a["count"] + b["count"]}
        if "high" in a:
            return count | carried(a["high"] + b["high"], a["low"] + b["low"])
        if "exponent" in a:
            return count | merge_pairs(a, b)
        return count | {"total": a["total"] + b["total"]}


def lift_limbs(data: Tensor, mask: Tensor | None, *, wide: bool) -> Parts:
    """The exact integer sum as high * 2**32 + low, 0 <= low < 2**32."""
    cells = select(data, mask)
    if not wide:  # at most 32 bits a cell: no sum of fewer than 2**31 cells leaves int64
        total = cells.sum(CELLS, dtype=torch.int64)
        return carried(torch.zeros_like(total), total)
    return carried((cells >> 32).sum(CELLS), (cells & LIMB).sum(CELLS))


def carried(high: Tensor, low: Tensor) -> Parts:
    """Limbs in normal form: one integer, one pair of bits."""
    high, low = merges.carried(high, low)
    return {"high": high, "low": low}


def lift_pair(data: Tensor, mask: Tensor | None) -> Parts:
    """The float64 sum of a leaf as (total + low) * 2**exponent."""
    cells = widened(data, mask)
    total, low = halve_pairs(cells.clone())
    exponent = torch.zeros_like(total, dtype=torch.int64)
    overflowed = ~(total.isfinite() & low.isfinite())
    if overflowed.any():
        scaled_total, scaled_low = halve_pairs(torch.ldexp(cells, torch.tensor(-SCALE, device=cells.device)))
        total = torch.where(overflowed, scaled_total, total)
        low = torch.where(overflowed, scaled_low, low)
        exponent = torch.where(overflowed, SCALE, exponent)
    return finite_low(total, low, exponent)


def merge_pairs(a: Parts, b: Parts) -> Parts:
    exponent = torch.maximum(a["exponent"], b["exponent"])
    total, low = add_pairs(a, b, exponent)
    overflowed = ~(total.isfinite() & low.isfinite()) & (exponent == 0)
    if overflowed.any():
        exponent = torch.where(overflowed, SCALE, exponent)
        scaled_total, scaled_low = add_pairs(a, b, exponent)
        total = torch.where(overflowed, scaled_total, total)
        low = torch.where(overflowed, scaled_low, low)
    return finite_low(total, low, exponent)


def add_pairs(a: Parts, b: Parts, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """(a + b) / 2**exponent as a pair."""
    a_total, a_low = (scaled_to(a[part], a["exponent"], exponent) for part in ("total", "low"))
    b_total, b_low = (scaled_to(b[part], b["exponent"], exponent) for part in ("total", "low"))
    pair: tuple[Tensor, Tensor] = merges.added_pairs(a_total, a_low, b_total, b_low)
    return pair


def scaled_to(part: Tensor, exponent: Tensor, wanted: Tensor) -> Tensor:
    """The part of a state in units of 2**wanted; multiplied as float64, whatever torch's default dtype is."""
    return torch.where(exponent < wanted, part * 2.0**-SCALE, part)


def finite_low(total: Tensor, low: Tensor, exponent: Tensor) -> Parts:
    """A pair whose low part is dropped where the total is inf or NaN: inf - inf in the error terms is no information."""
    return {"total": total, "low": torch.where(total.isfinite(), low, 0.0), "exponent": exponent}


class Moments:
    """(count, mean + low, m2): the mean as an unevaluated pair, and the squared deviations from it.

    Two passes inside a leaf, Chan, Golub & LeVeque's update between leaves (The American Statistician 37, 1983). The
    pair keeps the digits of 1e9 + small values, which a rounded mean would lose in the update.
    """

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        count = counted(data, mask, CELLS)
        n = count.clamp(min=1)
        if plan.dtype is i64:
            mean, deviation = integer_deviation(data, mask, n)
        else:
            cells = widened(data, mask)
            mean = leaf_mean(cells.clone(), n, pairs=plan.dtype is f64)
            deviation = select(cells - mean.unsqueeze(CELLS), mask)
        error = halve(deviation.clone())
        low = error / n
        m2 = (halve(deviation.square_()) - error * low).clamp_(min=0)
        return {"count": count, "mean": mean, "low": low, "m2": m2}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        count = a["count"] + b["count"]
        weight = b["count"].double() / count.clamp(min=1)
        delta = (b["mean"] - a["mean"]) + (b["low"] - a["low"])
        mean, low, shift = merges.shifted_mean(a["mean"], a["low"], delta, weight)
        both = {
            "count": count,
            "mean": mean,
            "low": torch.where(mean.isfinite(), low, 0.0),
            "m2": (a["m2"] + b["m2"]) + delta * shift * a["count"],
        }
        return nonempty(a, nonempty(b, both, a), b)


def nonempty(side: Parts, otherwise: Parts, other: Parts) -> Parts:
    """`other` where `side` has no valid cell, else `otherwise`: an empty side is chosen away, never multiplied by 0."""
    empty = side["count"] == 0
    if not empty.any():  # as mostly, and then four selections are saved
        return otherwise
    return {name: torch.where(empty, other[name], part) for name, part in otherwise.items()}


def leaf_mean(cells: Tensor, n: Tensor, *, pairs: bool) -> Tensor:
    if not pairs:
        return halve(cells) / n
    parts = lift_pair(cells, None)
    return torch.ldexp((parts["total"] + parts["low"]) / n, parts["exponent"])


def integer_deviation(data: Tensor, mask: Tensor | None, n: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviations from it) of int64 cells, exact where float64 cells would have lost the low bits."""
    limbs = lift_limbs(data, mask, wide=True)
    mean = integer_total(limbs) / n
    whole = mean.clamp(-(2.0**63), 2.0**63 - 1024).to(torch.int64).unsqueeze(CELLS)
    high = ((data >> 32) - (whole >> 32)).double() * 2.0**32
    low = ((data & LIMB) - (whole & LIMB)).double()
    return whole.squeeze(CELLS).double(), select(high + low, mask)


class Extreme:
    """(count, best): the largest or smallest valid cell; NaN wins, +0 is larger than -0."""

    exact = True
    sign = 1

    @classmethod
    def lift(cls, plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        count = counted(data, mask, CELLS)
        worst = cls.worst(data.dtype)
        if data.shape[CELLS] == 0:
            return {"count": count, "best": torch.full(count.shape, worst, dtype=data.dtype, device=data.device)}
        cells = select(data, mask, worst)
        best = cells.amax(CELLS) if cls.sign > 0 else cells.amin(CELLS)
        if data.is_floating_point():
            best = cls.signed_zeros(best, cells)
        return {"count": count, "best": best}

    @classmethod
    def signed_zeros(cls, best: Tensor, cells: Tensor) -> Tensor:
        """A zero result with the sign that IEEE 754-2019 maximum and minimum give; torch's depends on the order."""
        zero = best == 0
        if not zero.any():
            return best
        wanted = (cells == 0) & (cells.signbit() if cls.sign < 0 else ~cells.signbit())
        found = wanted.any(CELLS)
        negative = found if cls.sign < 0 else ~found
        return torch.where(zero, torch.where(negative, -0.0, 0.0).to(best.dtype), best)

    @classmethod
    def merge(cls, a: Parts, b: Parts) -> Parts:
        x, y = a["best"], b["best"]
        best = torch.maximum(x, y) if cls.sign > 0 else torch.minimum(x, y)
        if x.is_floating_point():
            sum_of_zeros = x + y if cls.sign > 0 else -((-x) + (-y))  # +0 + -0 is +0
            best = torch.where((x == 0) & (y == 0), sum_of_zeros, best)
        return {"count": a["count"] + b["count"], "best": best}

    @classmethod
    def worst(cls, dtype: torch.dtype) -> float | int:
        """What a masked cell becomes: it is chosen only where no cell is valid, and count says so."""
        if dtype is torch.bool:
            return cls.sign < 0
        if dtype.is_floating_point:
            return -math.inf * cls.sign
        return torch.iinfo(dtype).min if cls.sign > 0 else torch.iinfo(dtype).max


class Largest(Extreme):
    """(count, best) of amax."""


class Smallest(Extreme):
    """(count, best) of amin."""

    sign = -1


class FirstExtreme(Extreme):
    """(count, best, at): also the index of the first such valid cell; the first NaN, where there is one."""

    @classmethod
    def lift(cls, plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        parts = super().lift(plan, data, mask)
        best = parts["best"].unsqueeze(CELLS)
        hit = data == best
        if data.is_floating_point():
            hit |= data.isnan() & best.isnan()
        if mask is not None:
            hit &= mask
        if data.shape[CELLS] == 0:
            return parts | {"at": torch.zeros_like(parts["count"])}
        return parts | {"at": hit.view(torch.uint8).argmax(CELLS)}

    @classmethod
    def merge(cls, a: Parts, b: Parts) -> Parts:
        x, y = a["best"], b["best"]
        better = (y > x if cls.sign > 0 else y < x) | ((y != y) & (x == x))
        take = (b["count"] > 0) & ((a["count"] == 0) | better)
        return {
            "count": a["count"] + b["count"],
            "best": torch.where(take, y, x),
            "at": torch.where(take, b["at"], a["at"]),
        }

    @staticmethod
    def shift(parts: Parts, offset: Tensor | int) -> Parts:
        """The parts with their index moved by `offset` cells: a leaf counts from 0, a slice from its own start."""
        return parts | {"at": parts["at"] + offset}


class FirstLargest(FirstExtreme):
    """(count, best, at) of argmax."""


class FirstSmallest(FirstExtreme):
    """(count, best, at) of argmin."""

    sign = -1


class Truths:
    """(count, trues): how many valid cells are nonzero; NaN is, as in torch."""

    exact = True

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        true = data != (torch.iinfo(torch.int64).min if plan.flipped else 0)
        if mask is not None:
            true &= mask
        return {"count": counted(data, mask, CELLS), "trues": true.sum(CELLS, dtype=torch.int64)}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        return {name: a[name] + b[name] for name in a}


class Exponentials:
    """(count, max, total): the sum of exp(cell - max) over the valid cells."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        count = counted(data, mask, CELLS)
        if data.shape[CELLS] == 0:
            nothing = count.double()
            return {"count": count, "max": nothing - math.inf, "total": nothing}
        cells = select(data.double(), mask, -math.inf)
        top = cells.amax(CELLS)
        raised = exponential(cells, finite(top).unsqueeze(CELLS), precise=plan.dtype is f64)
        return {"count": count, "max": top, "total": halve(raised)}

    @staticmethod
    def merge(a: Parts, b: Parts, exp: Callable[[Tensor], Tensor] = torch.exp) -> Parts:
        top = torch.maximum(a["max"], b["max"])
        base = finite(top)
        total = a["total"] * exp(a["max"] - base) + b["total"] * exp(b["max"] - base)
        return {"count": a["count"] + b["count"], "max": top, "total": total}


def finite(top: Tensor) -> Tensor:
    """`top`, or 0 where it is inf or NaN and cannot be subtracted."""
    return torch.where(top.isfinite(), top, 0.0)


def exponential(cells: Tensor, top: Tensor, *, precise: bool) -> Tensor:
    """exp(cells - top); with `precise` the rounding error of the difference is made good: exp(d + e) = exp(d) + exp(d) e."""
    if not precise:
        return torch.exp(cells - top)
    difference, error = two_sum(cells, -top)
    raised = torch.exp(difference)
    return torch.where(difference.isfinite(), raised + raised * error, raised)


# -- finalize: values; where they count is decided by `count` alone, and for no valid cell they are the identity ------


def unflipped_limbs(plan: Plan, parts: Parts) -> Parts:
    """The limbs of the cells as they are: 2**63 more for each that is seen with its sign bit flipped."""
    return parts | {"high": parts["high"] + (parts["count"] << 31)} if plan.flipped else parts


def as_double(plan: Plan, cells: Tensor) -> Tensor:
    """Cells, as kernels see them, in float64."""
    if not plan.flipped:
        return cells.double()
    bits = cells ^ torch.iinfo(torch.int64).min  # as unsigned: the upper and the lower half by themselves
    return ((bits >> 32) & LIMB).double() * 2.0**32 + (bits & LIMB).double()


def finalize_sum(plan: Plan, parts: Parts) -> Tensor:
    if "high" not in parts:
        return float_total(parts)
    limbs = unflipped_limbs(plan, parts)
    if plan.result.is_float:
        return integer_total(limbs)
    return check_fits(plan, limbs["high"], limbs["low"])


def finalize_mean(plan: Plan, parts: Parts) -> Tensor:
    n = parts["count"].clamp(min=1)
    if "high" in parts:
        return integer_total(unflipped_limbs(plan, parts)) / n
    if "exponent" in parts:  # divide before scaling: the mean of two 1.7e308 is 1.7e308
        return torch.ldexp((parts["total"] + parts["low"]) / n, parts["exponent"])
    return parts["total"] / n


def integer_total(parts: Parts) -> Tensor:
    """The exact sum, rounded once to float64."""
    return parts["high"].double() * 2.0**32 + parts["low"].double()


def float_total(parts: Parts) -> Tensor:
    if "exponent" in parts:
        return torch.ldexp(parts["total"] + parts["low"], parts["exponent"])
    return parts["total"]


def finalize_var(plan: Plan, parts: Parts) -> Tensor:
    divisor = parts["count"].double() - plan.params["correction"]
    return parts["m2"] / torch.where(divisor > 0, divisor, 1.0)


def finalize_std(plan: Plan, parts: Parts) -> Tensor:
    return root(finalize_var(plan, parts))


def root(squares: Tensor) -> Tensor:
    """The correctly rounded square root."""
    if squares.device.type != "cpu":
        return squares.sqrt()
    return torch.from_numpy(np.sqrt(squares.numpy()))  # torch's, vectorised, is an ulp off for some float64


def finalize_best(plan: Plan, parts: Parts) -> Tensor:
    if plan.flipped:
        return (parts["best"] ^ torch.iinfo(torch.int64).min).view(torch.uint64)
    return parts["best"]


def finalize_at(plan: Plan, parts: Parts) -> Tensor:
    return parts["at"]


def finalize_count(plan: Plan, parts: Parts) -> Tensor:
    return parts["count"]


def finalize_any(plan: Plan, parts: Parts) -> Tensor:
    return parts["trues"] > 0


def finalize_all(plan: Plan, parts: Parts) -> Tensor:
    return parts["trues"] == parts["count"]


def finalize_logsumexp(plan: Plan, parts: Parts) -> Tensor:
    top = parts["max"]
    return torch.where(top.isfinite(), top + torch.log(parts["total"]), top)
