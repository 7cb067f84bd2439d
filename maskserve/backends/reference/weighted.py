"""Weighted sums and moments: each valid cell counts for its weight; a cell whose weight is masked is masked."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.merges import two_sum
from maskserve.backends.reference.cells import Parts, counted, halve, halve_pairs, select
from maskserve.backends.reference.products import two_product
from maskserve.backends.reference.reductions import SCALE, as_double, merge_pairs, root
from maskserve.dtypes import f64
from maskserve.errors import DataError
from maskserve.plan import Plan

CELLS = 2


class WeightedTotal:
    """(count, weight + weight_low, (total + low) * 2**exponent): the sums of the weights and of weight * cell as pairs."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor) -> Parts:
        cells, own = select(as_double(plan, data), mask), select(weights.double(), mask)
        weight, weight_low = pair_sum(own, pairs=True)
        parts = {"count": counted(data, mask, CELLS), "weight": weight, "weight_low": weight_low}
        return parts | sum_of_products(cells, own, pairs=plan.result is f64)

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        weight, error = two_sum(a["weight"], b["weight"])
        low = torch.where(weight.isfinite(), (a["weight_low"] + b["weight_low"]) + error, 0.0)
        return {"count": a["count"] + b["count"], "weight": weight, "weight_low": low} | merge_pairs(a, b)


def sum_of_products(a: Tensor, b: Tensor, *, pairs: bool) -> Parts:
    """The sum of a * b as (total + low) * 2**exponent; with `pairs` no product is rounded (Ogita, Rump & Oishi's Dot2)."""
    total, low = pair_of_products(a, b, pairs=pairs)
    exponent = torch.zeros_like(total, dtype=torch.int64)
    overflowed = ~total.isfinite()
    if overflowed.any():
        half = 2.0 ** -(SCALE // 2)
        scaled_total, scaled_low = pair_of_products(a * half, b * half, pairs=pairs)
        total = torch.where(overflowed, scaled_total, total)
        low = torch.where(overflowed, scaled_low, low)
        exponent = torch.where(overflowed, SCALE, exponent)
    return {"total": total, "low": low, "exponent": exponent}


def pair_of_products(a: Tensor, b: Tensor, *, pairs: bool) -> tuple[Tensor, Tensor]:
    product, error = two_product(a, b) if pairs else (a * b, None)
    total, low = pair_sum(product, pairs=pairs)
    return total, low if error is None else torch.where(total.isfinite(), low + halve(error), 0.0)


def pair_sum(cells: Tensor, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """The sum along the cells as a pair; without `pairs` its low part is 0."""
    if not pairs:
        total = halve(cells.clone())
        return total, torch.zeros_like(total)
    high, low = halve_pairs(cells.clone())
    return high, torch.where(high.isfinite(), low, 0.0)


def finalize_sum(plan: Plan, parts: Parts) -> Tensor:
    return torch.ldexp(parts["total"] + parts["low"], parts["exponent"])


def finalize_mean(plan: Plan, parts: Parts) -> Tensor:
    weight = nonzero(parts["weight"] + parts["weight_low"])
    return torch.ldexp((parts["total"] + parts["low"]) / weight, parts["exponent"])


def nonzero(weight: Tensor) -> Tensor:
    """The weight, or 1 where it is 0 and the result is masked."""
    return torch.where(weight == 0, 1.0, weight)


class WeightedMoments:
    """(count, weight, mean + low, m2), joined by West's update (CACM 22, 1979); the pair as in Moments."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor) -> Parts:
        own = select(weights.double(), mask)
        if (own < 0).any():
            raise DataError(f"{plan.row.name}: a weight is negative; a variance needs weights of at least 0")
        pairs = plan.result is f64
        cells = select(as_double(plan, data), mask)
        weight = settled_sum(own, pairs=pairs)
        mean = settled_sum(cells * own, pairs=pairs) / nonzero(weight)
        deviation = select(cells - mean.unsqueeze(CELLS), mask)
        error = settled_sum(deviation * own, pairs=pairs)
        low = error / nonzero(weight)
        m2 = (settled_sum(deviation.square_().mul_(own), pairs=pairs) - error * low).clamp(min=0)
        return {"count": counted(data, mask, CELLS), "weight": weight, "mean": mean, "low": low, "m2": m2}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        weight = a["weight"] + b["weight"]
        share = b["weight"] / nonzero(weight)
        delta = (b["mean"] - a["mean"]) + (b["low"] - a["low"])
        mean, low = two_sum(a["mean"], a["low"] + delta * share)
        both = {
            "weight": weight,
            "mean": mean,
            "low": torch.where(mean.isfinite(), low, 0.0),
            "m2": (a["m2"] + b["m2"]) + delta * delta * share * a["weight"],
        }
        for side, other in ((b, a), (a, b)):  # what weighs nothing changes nothing
            empty = (side["weight"] == 0) & ~side["mean"].isnan()  # 0 * NaN and 0 * inf are NaN wherever they stand
            both = {name: torch.where(empty, other[name], part) for name, part in both.items()}
        return {"count": a["count"] + b["count"]} | both


def settled_sum(cells: Tensor, *, pairs: bool) -> Tensor:
    """The sum along the cells, rounded once where it is summed in pairs."""
    high, low = pair_sum(cells, pairs=pairs)
    return high + low


def finalize_var(plan: Plan, parts: Parts) -> Tensor:
    return parts["m2"] / nonzero(parts["weight"])


def finalize_std(plan: Plan, parts: Parts) -> Tensor:
    return root(finalize_var(plan, parts))
