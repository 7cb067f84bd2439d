"""Scans: the running state inside each leaf, plus the exclusive prefix of the leaves before it.

Both run one cell after the other, so that a value depends on its logical index alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select, two_sum, widened
from maskserve.backends.reference.overflow import check_fits
from maskserve.backends.reference.reductions import LIMB, SCALE, carried
from maskserve.dtypes import f64, i64
from maskserve.plan import Plan

Scanned = tuple[Tensor, Tensor | None]
"""(values, mask): what is valid after it; None: every cell."""


class CumulativeSum:
    """The running sum of the valid cells: (outer, n, inner) -> the same shape, float64 or int64."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        if plan.dtype.is_integral:
            return running_integer(plan, data, mask), mask
        if plan.dtype is f64:
            return running_pair(widened(data, mask), plan.leaf), mask
        return in_leaves(widened(data, mask), plan.leaf, running), mask


def running_integer(plan: Plan, data: Tensor, mask: Tensor | None) -> Tensor:
    cells = select(data, mask)
    if plan.dtype is i64:
        limbs = carried((cells >> 32).cumsum(1), (cells & LIMB).cumsum(1))
    else:
        total = cells.cumsum(1, dtype=torch.int64)
        limbs = carried(torch.zeros_like(total), total)
    if plan.result.is_float:
        return limbs["high"].double() * 2.0**32 + limbs["low"].double()
    return check_fits(plan, limbs["high"], limbs["low"])


def in_leaves(cells: Tensor, leaf: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run` over (outer, leaves, leaf, inner), the last leaf filled up with zeros."""
    n = cells.shape[1]
    if n <= leaf:
        return run(cells.unsqueeze(1)).squeeze(1)
    padded = torch.nn.functional.pad(cells, (0, 0, 0, -n % leaf))
    leaves: Tensor = padded.unflatten(1, (-1, leaf))
    return run(leaves).flatten(1, 2)[:, :n]


def running(cells: Tensor) -> Tensor:
    """The running sum of (outer, leaves, leaf, inner) in plain float64."""
    inside = cells.cumsum(2)
    return inside + exclusive(inside[:, :, -1].cumsum(1), 1).unsqueeze(2)


def exclusive(inclusive: Tensor, dim: int) -> Tensor:
    """Each prefix without its own cell: 0, s[0], s[1], ..."""
    zero = torch.zeros_like(inclusive.narrow(dim, 0, 1))
    return torch.cat([zero, inclusive.narrow(dim, 0, inclusive.shape[dim] - 1)], dim)


def running_pair(cells: Tensor, leaf: int) -> Tensor:
    """The running sum of float64 with the rounding errors summed alongside and added last (Sum2 as a scan).

    Where it overflows on the way it is computed again at 2**-128, so that 1.7e308 + 1.7e308 - 1.7e308 comes out right.
    """
    sums = in_leaves(cells, leaf, compensated)
    lost = ~sums.isfinite()
    if lost.any():
        factor = torch.tensor(SCALE, device=cells.device)
        scaled = torch.ldexp(in_leaves(torch.ldexp(cells, -factor), leaf, compensated), factor)
        plain = in_leaves(cells, leaf, running)  # inf and NaN cells: no error term is information
        sums = torch.where(lost, torch.where(scaled.isnan(), plain, scaled), sums)
    return sums


def compensated(cells: Tensor) -> Tensor:
    inside, inside_error = with_error(cells, 2)
    before, before_error = with_error(inside[:, :, -1], 1)
    prefix = exclusive(before, 1).unsqueeze(2)
    prefix_error = exclusive(before_error + inside_error[:, :, -1].cumsum(1), 1).unsqueeze(2)
    total, error = two_sum(prefix, inside)
    return total + (error + (prefix_error + inside_error))


def with_error(cells: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The running sum along `dim`, and the running sum of its rounding errors."""
    sums = cells.cumsum(dim)
    _, error = two_sum(exclusive(sums, dim), cells)
    return sums, error.cumsum(dim)


class LogCumulativeSumOfExponentials:
    """The log of the running sum of exponentials of the valid cells, in float64; masked ones add nothing."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        return torch.logcumsumexp(select(data.double(), mask, -torch.inf), 1), mask
