"""Products as a mantissa and a binary exponent: nothing overflows or vanishes on the way (Knuth, TAOCP 2, 4.2).

The mantissa is an unevaluated pair for float64 cells. Integers keep their product modulo 2**64 beside it: where the
true product fits int64 the two agree, and the mantissa's size and sign say whether it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts, counted, halvings, select
from maskserve.backends.reference.scans import Scanned
from maskserve.dtypes import f64
from maskserve.errors import IntegerOverflowError
from maskserve.plan import Plan

CELLS = 2
SPLITTER = 134217729.0  # 2**27 + 1: halves a float64's digits (Dekker, Numerische Mathematik 18, 1971)
PLAIN_LEVELS = 9
PLAIN_CELLS = 512
"""Mantissas of at least 1/2 multiply this many levels deep, 512 of them, before one is near float64's end."""


class Product:
    """(count, high, low, exponent[, wrapped]) of the valid cells."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        count = {"count": counted(data, mask, CELLS)}
        cells = select(data, mask, 1)
        parts = mantissas(cells.double(), pairs=plan.dtype is f64)
        if plan.dtype.is_integral:
            parts["wrapped"] = cells.to(torch.int64).prod(CELLS)
        return count | parts

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        parts = {"count": a["count"] + b["count"]} | times(a, b)
        if "wrapped" in a:
            parts["wrapped"] = a["wrapped"] * b["wrapped"]
        return parts


def mantissas(cells: Tensor, *, pairs: bool, dim: int = CELLS) -> Parts:
    """The product along `dim` as (high + low) * 2**exponent, by halving."""
    if not cells.shape[dim]:
        one = cells.new_ones(cells.sum(dim).shape)
        return {"high": one * 0.5, "low": one * 0, "exponent": one.to(torch.int64)}
    high, exponent = torch.frexp(cells)
    total = exponent.sum(dim, dtype=torch.int64)
    low = torch.zeros_like(high) if pairs else None
    for level, (h, k) in enumerate(halvings(cells.shape[dim]), 1):
        absorbed, other = high.narrow(dim, 0, k), high.narrow(dim, h, k)
        if low is None:
            absorbed.mul_(other)
        else:
            product, error = times_pair(absorbed, low.narrow(dim, 0, k), other, low.narrow(dim, h, k))
            absorbed.copy_(product)
            low.narrow(dim, 0, k).copy_(error)
        high, low = high.narrow(dim, 0, h), None if low is None else low.narrow(dim, 0, h)
        if level % PLAIN_LEVELS == 0:
            high, low, shifts = normal(high, low)
            total = total + shifts.sum(dim, dtype=torch.int64)
    high, low, shifts = normal(high.select(dim, 0), None if low is None else low.select(dim, 0))
    return settled({"high": high, "low": torch.zeros_like(high) if low is None else low, "exponent": total + shifts})


def normal(high: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The pair with its mantissa in [1/2, 1), and the exponent that was taken out."""
    mantissa, shift = torch.frexp(high)
    return mantissa, None if low is None else torch.where(mantissa.isfinite(), scaled(low, -shift), 0.0), shift.long()


def times(a: Parts, b: Parts) -> Parts:
    """The product of two states, in normal form."""
    product, error = times_pair(a["high"], a["low"], b["high"], b["low"])
    high, low, shift = normal(product, error)
    assert low is not None
    return settled({"high": high, "low": low, "exponent": a["exponent"] + b["exponent"] + shift})


def settled(parts: Parts) -> Parts:
    """Exponent 0 where the mantissa is 0, inf or NaN and has none: equal products are equal bits."""
    plain = (parts["high"] == 0) | ~parts["high"].isfinite()
    return parts | {"exponent": torch.where(plain, 0, parts["exponent"])}


def times_pair(a: Tensor, a_low: Tensor, b: Tensor, b_low: Tensor) -> tuple[Tensor, Tensor]:
    """(a + a_low) * (b + b_low) as a pair; mantissas are too small to overflow."""
    product, error = two_product(a, b)
    error = error + (a * b_low + a_low * b)
    total = product + error
    rest = error - (total - product)
    finite = product.isfinite()
    return torch.where(finite, total, product), torch.where(finite, rest, 0.0)


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(p, e) with p = fl(a * b) and p + e = a * b (Dekker); e is 0 where a half of a or b overflows."""
    product = a * b
    a_top, b_top = top_half(a), top_half(b)
    a_rest, b_rest = a - a_top, b - b_top
    error = ((a_top * b_top - product) + a_top * b_rest + a_rest * b_top) + a_rest * b_rest
    return product, torch.where(error.isfinite(), error, 0.0)


def top_half(x: Tensor) -> Tensor:
    spread = SPLITTER * x
    return spread - (spread - x)


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2**exponent, rounded once; torch.ldexp overflows at exponents whose power alone does."""
    exponent = exponent.clamp(-2200, 2200)  # beyond which nothing finite is left, and 2**third is
    third = exponent // 3
    two = torch.full((), 2.0, dtype=torch.float64, device=x.device)
    return ((x * two ** (exponent - 2 * third)) * two**third) * two**third


def value(parts: Parts) -> Tensor:
    """The product in float64."""
    return scaled(parts["high"] + parts["low"], parts["exponent"])


def finalize_prod(plan: Plan, parts: Parts) -> Tensor:
    if plan.result.is_float:
        return value(parts)
    return fitting(plan, parts["wrapped"], value(parts))


def fitting(plan: Plan, wrapped: Tensor, estimate: Tensor) -> Tensor:
    """The wrapped integer where it is the true one, or an IntegerOverflowError.

    Beside 2**63 the estimate cannot tell, and the sign can: what wraps there changes it.
    """
    info = torch.iinfo(getattr(torch, plan.result.torch))
    fits = (estimate.abs() < 2.0**63 * (1 + 1e-9)) & (torch.sign(wrapped) == torch.sign(estimate))
    fits &= (wrapped >= info.min) & (wrapped <= info.max)
    if not fits.all():
        raise IntegerOverflowError(
            f"{plan.row.name}: a true result does not fit {plan.result.name}; give dtype=f64, or divide the data first",
            parameter="dtype",
        )
    return wrapped


class CumulativeProduct:
    """The running product of the valid cells: (outer, n, inner) -> the same shape, float64 or int64."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        cells = select(data, mask, 1)
        if plan.dtype.is_integral and plan.result.is_integral:
            estimate = select(torch.cumprod(cells.double(), 1), mask)
            return fitting(plan, select(torch.cumprod(cells.to(torch.int64), 1), mask), estimate), mask
        return running(cells.double(), pairs=plan.dtype is f64), mask


def running(cells: Tensor, *, pairs: bool) -> Tensor:
    """The running product: multiplications one after the other in float64, their exponents apart: none leaves its range.

    Taking powers of two out of a product in between changes no digit of it. In `pairs` the relative errors of the steps
    are summed beside it (Ogita & Oishi's product as a scan).
    """
    mantissa, exponent = normal_cells(cells)
    high, before = torch.ones_like(cells[:, :1]), torch.zeros_like(cells[:, :1])
    total = before.long()
    pieces = []
    for start in range(0, cells.shape[1], PLAIN_CELLS):
        factors = mantissa[:, start : start + PLAIN_CELLS]
        products = torch.cat([high, factors], 1).cumprod(1)
        exponents = total + exponent[:, start : start + PLAIN_CELLS].cumsum(1)
        made = products[:, 1:]
        if pairs:
            _, error = two_product(products[:, :-1], factors)
            steps = torch.where(made == 0, 0.0, error / made)
            relative = torch.cat([before, steps], 1).cumsum(1)[:, 1:]
            before = relative[:, -1:]
            made = torch.where(relative.isfinite() & made.isfinite(), made + made * relative, made)
        pieces.append(scaled(made, exponents))
        high, shift = normal_cells(products[:, -1:])
        total = exponents[:, -1:] + shift
    return torch.cat(pieces, 1) if pieces else cells


def normal_cells(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissas in [1/2, 1) and exponents; 0, inf and NaN are their own mantissas."""
    mantissa, exponent = torch.frexp(cells)
    plain = (cells == 0) | ~cells.isfinite()
    return torch.where(plain, cells, mantissa), torch.where(plain, 0, exponent).long()
