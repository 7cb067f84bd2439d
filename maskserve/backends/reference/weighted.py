"""Weighted sums and moments: each valid cell counts for its weight; a cell whose weight is masked is masked."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts, counted, halve_pairs, select, two_sum
from maskserve.backends.reference.reductions import as_double, root
from maskserve.errors import DataError
from maskserve.plan import Plan

CELLS = 2


class WeightedTotal:
    """(count, weight + weight_low, total + low): the sums of the weights and of weight * cell, each an unevaluated pair."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor) -> Parts:
        weight, weight_low = halve_pairs(select(weights.double(), mask).clone())
        total, low = halve_pairs(select(as_double(plan, data) * weights, mask).clone())
        return finite_lows(
            {"count": counted(data, mask, CELLS), "weight": weight, "weight_low": weight_low, "total": total, "low": low}
        )

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        parts = {"count": a["count"] + b["count"]}
        for high, low in (("weight", "weight_low"), ("total", "low")):
            parts[high], error = two_sum(a[high], b[high])
            parts[low] = (a[low] + b[low]) + error
        return finite_lows(parts)


def finite_lows(parts: Parts) -> Parts:
    """The low parts dropped where the high ones are inf or NaN."""
    return parts | {
        low: torch.where(parts[high].isfinite(), parts[low], 0.0)
        for high, low in (("weight", "weight_low"), ("total", "low"))
    }


def finalize_sum(plan: Plan, parts: Parts) -> Tensor:
    return parts["total"] + parts["low"]


def finalize_mean(plan: Plan, parts: Parts) -> Tensor:
    return finalize_sum(plan, parts) / nonzero(parts["weight"] + parts["weight_low"])


def nonzero(weight: Tensor) -> Tensor:
    """The weight, or 1 where it is 0 and the result is masked."""
    return torch.where(weight == 0, 1.0, weight)


class WeightedMoments:
    """(count, weight, mean, m2), joined by West's update (CACM 22, 1979)."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor) -> Parts:
        own = select(weights.double(), mask)
        if (own < 0).any():
            raise DataError(f"{plan.row.name}: a weight is negative; a variance needs weights of at least 0")
        cells = select(as_double(plan, data), mask)
        weight = pair_sum(own)
        mean = pair_sum(select(cells * own, mask)) / nonzero(weight)
        deviation = select(cells - mean.unsqueeze(CELLS), mask)
        error = pair_sum(deviation * own)
        low = error / nonzero(weight)
        m2 = (pair_sum(deviation.square() * own) - error * low).clamp(min=0)
        return {"count": counted(data, mask, CELLS), "weight": weight, "mean": mean + low, "m2": m2}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        weight = a["weight"] + b["weight"]
        share = b["weight"] / nonzero(weight)
        delta = b["mean"] - a["mean"]
        both = {
            "count": a["count"] + b["count"],
            "weight": weight,
            "mean": a["mean"] + delta * share,
            "m2": (a["m2"] + b["m2"]) + delta * delta * share * a["weight"],
        }
        for side, other in ((b, a), (a, b)):  # what weighs nothing changes nothing
            empty = side["weight"] == 0
            both |= {name: torch.where(empty, other[name], both[name]) for name in ("weight", "mean", "m2")}
        return both


def pair_sum(cells: Tensor) -> Tensor:
    high, low = halve_pairs(cells.clone())
    return torch.where(high.isfinite(), high + low, high)


def finalize_var(plan: Plan, parts: Parts) -> Tensor:
    return parts["m2"] / nonzero(parts["weight"])


def finalize_std(plan: Plan, parts: Parts) -> Tensor:
    return root(finalize_var(plan, parts))
