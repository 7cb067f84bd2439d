"""Scans: the running state inside each leaf, plus the exclusive prefix of the leaves before it.

Both run one cell after the other, so that a value depends on its logical index alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskserve.backends.merges import two_sum
from maskserve.backends.reference.cells import select, widened
from maskserve.backends.reference.overflow import check_fits
from maskserve.backends.reference.reductions import LIMB, SCALE, carried
from maskserve.dtypes import f64, i64
from maskserve.plan import Plan

Scanned = tuple[Tensor, Tensor | None]
"""(values, mask): what is valid after it; None: every cell."""
Carry = tuple[Tensor, ...]
"""What a part of a slice leaves to the next one, each of shape (outer, 1, inner)."""
Run = Callable[[Tensor, Carry | None], tuple[Tensor, Carry]]


class CumulativeSum:
    """The running sum of the valid cells: (outer, n, inner) -> the same shape, float64 or int64."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        return CumulativeSum.scan_on(plan, data, mask, None, goes_on=False)[0]

    @staticmethod
    def scan_on(
        plan: Plan, data: Tensor, mask: Tensor | None, carry: Carry | None, *, goes_on: bool = True
    ) -> tuple[Scanned, Carry]:
        """The same of a part of a slice that begins at a leaf, after what came before; and what the next part has to know."""
        if plan.dtype.is_integral:
            values, last = running_integer(plan, data, mask, carry)
        elif plan.dtype is f64:
            values, last = running_pair(widened(data, mask), plan.leaf, carry, goes_on=goes_on)
        else:
            values, last = in_leaves(widened(data, mask), plan.leaf, running, carry)
        return (values, mask), last


def running_integer(plan: Plan, data: Tensor, mask: Tensor | None, carry: Carry | None) -> tuple[Tensor, Carry]:
    cells = select(data, mask)
    if plan.dtype is i64:
        high, low = (cells >> 32).cumsum(1), (cells & LIMB).cumsum(1)
    else:
        low = cells.cumsum(1, dtype=torch.int64)
        high = torch.zeros_like(low)
    before = (0, 0) if carry is None else carry
    limbs = carried(high + before[0], low + before[1])
    last = (limbs["high"][:, -1:], limbs["low"][:, -1:])
    if plan.result.is_float:
        return limbs["high"].double() * 2.0**32 + limbs["low"].double(), last
    return check_fits(plan, limbs["high"], limbs["low"]), last


def in_leaves(cells: Tensor, leaf: int, run: Run, carry: Carry | None) -> tuple[Tensor, Carry]:
    """`run` over (outer, leaves, leaf, inner), the last leaf filled up with zeros; a carry has the shape (outer, 1, inner)."""
    n = cells.shape[1]
    if n <= leaf:
        values, carry = run(cells.unsqueeze(1), carry)
        return values.squeeze(1), carry
    padded = torch.nn.functional.pad(cells, (0, 0, 0, -n % leaf))
    leaves: Tensor = padded.unflatten(1, (-1, leaf))
    values, carry = run(leaves, carry)
    return values.flatten(1, 2)[:, :n], carry


def running(cells: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
    """The running sum of (outer, leaves, leaf, inner) in plain float64."""
    inside = cells.cumsum(2)
    before, last = chained(inside[:, :, -1], None if carry is None else carry[0])
    return inside + before.unsqueeze(2), (last,)


def chained(cells: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is summed before each cell along dim 1, from `carry` on; and the sum of all."""
    begin = torch.zeros_like(cells[:, :1]) if carry is None else carry
    sums = torch.cat([begin, cells], 1).cumsum(1)
    return sums[:, :-1], sums[:, -1:]


def running_pair(cells: Tensor, leaf: int, carry: Carry | None, *, goes_on: bool) -> tuple[Tensor, Carry]:
    """The running sum of float64 with the rounding errors summed alongside and added last (Sum2 as a scan).

    Where it overflows on the way it is computed again at 2**-128, so that 1.7e308 + 1.7e308 - 1.7e308 comes out right; a carry
    has what each of the three ways has to know.
    """
    given = (None, None, None) if carry is None else (carry[:3], carry[3:6], carry[6:])
    sums, first = in_leaves(cells, leaf, compensated, given[0])
    factor = torch.tensor(SCALE, device=cells.device)
    lost = ~sums.isfinite()
    if not goes_on and not lost.any():
        return sums, first
    scaled, second = in_leaves(torch.ldexp(cells, -factor), leaf, compensated, given[1])
    plain, third = in_leaves(cells, leaf, running, given[2])  # inf and NaN cells: no error term is information
    scaled = torch.ldexp(scaled, factor)
    return torch.where(lost, torch.where(scaled.isnan(), plain, scaled), sums), (*first, *second, *third)


def compensated(cells: Tensor, carry: Carry | None) -> tuple[Tensor, Carry]:
    inside, inside_error = with_error(cells, 2)
    given = (None, None, None) if carry is None else carry
    totals = inside[:, :, -1]
    before, last = chained(totals, given[0])
    _, error = two_sum(before, totals)
    before_error, last_error = chained(error, given[1])
    leaf_errors, last_errors = chained(inside_error[:, :, -1], given[2])
    total, error = two_sum(before.unsqueeze(2), inside)
    values = total + (error + ((before_error + leaf_errors).unsqueeze(2) + inside_error))
    return values, (last, last_error, last_errors)


def with_error(cells: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The running sum along `dim`, and the running sum of its rounding errors."""
    sums = cells.cumsum(dim)
    before = torch.cat([torch.zeros_like(sums.narrow(dim, 0, 1)), sums.narrow(dim, 0, sums.shape[dim] - 1)], dim)
    _, error = two_sum(before, cells)
    return sums, error.cumsum(dim)


class LogCumulativeSumOfExponentials:
    """The log of the running sum of exponentials of the valid cells, in float64; masked ones add nothing."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        return torch.logcumsumexp(select(data.double(), mask, -torch.inf), 1), mask
