"""Products, norms, quantiles and weighted moments beside exact arithmetic: Python's fractions and mpmath."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve.errors import IntegerOverflowError

inf, nan = math.inf, math.nan
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

ORDS = (2, 1, 0.5, 3, 1.5, -1, -2, -0.5, 100, 2000, -2000)
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


def t(values: Any, dtype: torch.dtype = f64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=f64)


def hidden(data: Tensor) -> ms.MaskedTensor:
    """The cells with a masked one of junk behind each of the first hundred."""
    n = min(100, len(data))
    junk = torch.full((n,), nan, dtype=data.dtype)
    mask = torch.ones(2 * n, dtype=torch.bool)
    mask[1::2] = False
    tail = torch.ones(len(data) - n, dtype=torch.bool)
    return ms.masked_tensor(torch.cat([torch.stack([data[:n], junk], 1).view(-1), data[n:]]), torch.cat([mask, tail]))


def off(got: float, exact: Any, dtype: torch.dtype = f64) -> float:
    """How far a result is from the exact one, in ulps of its dtype there; an exact one beyond the range wants inf."""
    if isinstance(exact, Fraction):
        exact = mpmath.mpf(exact.numerator) / exact.denominator
    if exact == 0:
        return 0.0 if got == 0 else inf
    if abs(exact) > torch.finfo(dtype).max:
        return 0.0 if math.isinf(got) else inf
    info = torch.finfo(dtype)
    step = max(2.0 ** math.floor(mpmath.log(abs(exact), 2)), info.tiny) * info.eps
    return float(abs(mpmath.mpf(got) - exact) / step)


def norm_of(cells: Sequence[float], ord: float) -> Any:
    if ord < 0 and 0 in cells:
        return mpmath.mpf(0)
    order = mpmath.mpf(ord)
    return mpmath.fsum(abs(mpmath.mpf(c)) ** order for c in cells) ** (1 / order)


@pytest.mark.parametrize("ord", ORDS)
def test_norms_of_float64_are_within_two_ulps_of_exact(ord: float) -> None:
    with mpmath.workdps(40):
        for n, power in ((1, 0), (3, 300), (64, -300), (4500, 290), (4500, 0)):
            data = normal(n, n) * 10.0**power
            assert off(ms.norm(hidden(data), ord).item(), norm_of(data.tolist(), ord)) <= (4 if ord == -0.5 else 2), n


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
def test_norms_of_narrow_floats_are_within_an_ulp_of_exact(ord: float, dtype: torch.dtype) -> None:
    with mpmath.workdps(40):
        for n, power in ((1, 0), (3, 3), (64, -3), (1000, 0)):
            data = (normal(n, n) * 10.0**power).to(dtype)
            expected = norm_of(data.tolist(), ord)
            if expected < torch.finfo(dtype).max:
                assert off(ms.norm(hidden(data), ord).item(), expected, dtype) <= 1, n


def test_cells_of_very_different_sizes_meet_in_one_norm() -> None:
    small = torch.full((9000,), 1e-200, dtype=f64)
    for ord in (2, 1, 3, 0.5):
        expected = 1e-200 * 9000 ** (1 / ord)
        assert ms.norm(torch.cat([torch.zeros(5000, dtype=f64), small]), ord).item() == pytest.approx(
            expected, rel=1e-15
        )
    assert ms.norm(torch.cat([t([1e-300]), torch.full((9000,), 1e300, dtype=f64)]), -2).item() == pytest.approx(1e-300)
    assert ms.norm(t([1e300, 1e-300]), 0.01).item() == pytest.approx(1e300 * (1 + 1e-6) ** 100)
    assert ms.norm(torch.full((4097,), 1e-300, dtype=f64), 0.01).item() == pytest.approx(
        4097.0**50 * 1e-300 * 4097.0**50
    )


@pytest.mark.parametrize(
    ("ord", "expected"), [(2, inf), (1, inf), (0.5, inf), (-1, 1), (-2, 1), (inf, inf), (-inf, 1), (0, 2)]
)
def test_a_norm_of_an_infinite_cell(ord: float, expected: float) -> None:
    assert ms.norm(t([inf, 1.0]), ord).item() == expected
    assert ms.norm(torch.cat([t([inf, 1.0]), torch.full((9000,), inf, dtype=f64)]), ord).item() in (expected, 9002)


@given(st.lists(FINITE, min_size=2, max_size=40), st.floats(0, 1), st.booleans())
def test_quantiles_of_float64_are_within_two_ulps_of_exact(values: list[float], q: float, midpoint: bool) -> None:
    """The place q * (count - 1) is a float64; what lies between two cells is exact from there on."""
    ordered = [Fraction(v) for v in sorted(values)]
    place = q * (len(values) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    share = Fraction(0.5) if midpoint else Fraction(place) - math.floor(place)
    expected = below + share * (above - below)
    got = ms.quantile(hidden(t(values)), q, interpolation="midpoint" if midpoint else "linear").item()
    if abs(expected) > 1e-290:  # the share of a subnormal gap has fewer digits
        assert abs(Fraction(got) - expected) <= 2 * Fraction(math.ulp(float(expected)))


def test_quantiles_between_infinite_cells() -> None:
    for q in (0.2, 0.5, 0.8):
        assert ms.quantile(t([-inf, 1.0]), q).item() == -inf
        assert ms.quantile(t([1.0, inf]), q).item() == inf
        assert math.isnan(ms.quantile(t([-inf, inf]), q).item())
        assert ms.quantile(t([inf, inf]), q).item() == inf
        assert ms.quantile(t([-1.7e308, 1.7e308]), q).item() == pytest.approx((2 * q - 1) * 1.7e308)
    assert ms.quantile(t([1, 2**53, 2**53 + 2], torch.int64), 1.0).item() == 2**53 + 2
    assert ms.quantile(t([-inf, 1.0]), 1.0).item() == 1.0


def product_of(cells: Sequence[float]) -> Any:
    return mpmath.fprod(mpmath.mpf(c) for c in cells)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 3, 64, 1000, 4097, 9001])
def test_products_of_float64_are_within_an_ulp_of_exact(n: int, spread: float, inner: int) -> None:
    cells = (normal(n, n) * spread).exp() * normal(n, n + 1).sign()
    cells[n // 2] *= (
        (cells[: n // 2].abs().log().sum() + cells[n // 2 :].abs().log().sum()).neg().clamp(-600, 600).exp()
    )
    with mpmath.workdps(60):
        expected = product_of(cells.tolist())
        for got in ms.prod(cells.unsqueeze(1).repeat(1, inner), 0).tolist():
            assert off(got, expected) <= 1 if float(abs(expected)) > 1e-290 else abs(got) < 1e-280
        assert off(ms.prod(hidden(cells)).item(), expected) <= 1 or float(abs(expected)) < 1e-290


@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
def test_products_of_narrow_floats_are_within_an_ulp_of_exact(dtype: torch.dtype) -> None:
    for n in (2, 10, 65, 5000):
        cells = (normal(n, n) * (3 / n**0.5)).exp().to(dtype)
        with mpmath.workdps(40):
            expected = product_of(cells.tolist())
        assert off(ms.prod(hidden(cells)).item(), expected, dtype) <= 1
        running = ms.cumprod(cells, 0).get_data()
        for i in (0, n // 2, n - 1):
            assert off(running[i].item(), product_of(cells[: i + 1].tolist()), dtype) <= 1


@given(st.lists(FINITE, min_size=1, max_size=60))
def test_running_products_of_float64_are_within_two_ulps_of_exact(values: list[float]) -> None:
    got, exact = ms.cumprod(hidden(t(values)), 0), Fraction(1)
    own = got.get_data()[got.get_mask()].tolist()
    for value, mine in zip(values, own, strict=True):
        exact *= Fraction(value)
        if exact == 0 or abs(exact) < Fraction(1e-290):
            assert abs(mine) <= 1e-289
        elif abs(exact) > Fraction(1.797e308):
            assert abs(mine) >= 1.797e308
        else:
            assert abs(Fraction(mine) - exact) <= 2 * Fraction(math.ulp(float(exact)))


@pytest.mark.parametrize("dtype", [torch.float64, f32, f16, bf16], ids=str)
@pytest.mark.parametrize("n", [3, 5000])
def test_a_product_stays_infinite_behind_an_infinite_cell(dtype: torch.dtype, n: int) -> None:
    cells = torch.ones(n, dtype=dtype)
    cells[:3] = torch.tensor([1.3, -math.inf, 2.7], dtype=dtype)
    running = ms.cumprod(hidden(cells), 0)
    assert torch.equal(running.get_data()[running.get_mask()], torch.cumprod(cells, 0))
    for shaped, dim in ((cells.expand(3, n), 1), (cells.expand(3, n).mT.contiguous(), 0)):
        assert torch.equal(ms.cumprod(shaped, dim).get_data(), torch.cumprod(shaped, dim))
        assert torch.equal(ms.prod(shaped, dim).get_data(), torch.prod(shaped, dim))


EDGES = [2**63 - 1, -(2**63), 2**62, -(2**62), 2**32, -(2**31), 3037000499, 3037000500, 7, 73, 127, 337, 92737, 649657]
WHOLE = st.one_of(st.sampled_from([*EDGES, 0, 1, -1, 2, -2]), st.integers(-(2**63), 2**63 - 1), st.integers(-10, 10))


def fits(exact: int) -> bool:
    return -(2**63) <= exact < 2**63


@given(st.lists(WHOLE, min_size=1, max_size=12))
def test_integer_products_are_exact_or_an_error(values: list[int]) -> None:
    data = t(values, torch.int64)
    for masked in (
        data,
        ms.masked_tensor(torch.cat([data, t([5], torch.int64)]), t([True] * len(values) + [False], torch.bool)),
    ):
        if fits(math.prod(values)):
            assert ms.prod(masked).item() == math.prod(values)
        else:
            with pytest.raises(IntegerOverflowError, match="dtype=f64"):
                ms.prod(masked)
    running = [math.prod(values[: i + 1]) for i in range(len(values))]
    if all(map(fits, running)):
        assert ms.cumprod(data, 0).tolist() == running
    else:
        with pytest.raises(IntegerOverflowError):
            ms.cumprod(data, 0)
    assert ms.prod(data, dtype=f64).item() == pytest.approx(float(math.prod(values)), rel=1e-15)


BORDER = [
    ([2**62, 2], None), ([-(2**62), 2], -(2**63)), ([7, 7, 73, 127, 337, 92737, 649657], 2**63 - 1),
    ([2**32, 2**31], None), ([2**32, -(2**31)], -(2**63)), ([-1, -(2**63)], None), ([2**62, 2, 0], 0), ([2**62, 2, 2, 0], 0),
    ([2**32, 2**32], None), ([2**32, 2**32, 0], 0), ([2**62, 4], None), ([3037000500, 3037000500], None),
]  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), BORDER, ids=[str(v) for v, _ in BORDER])
def test_integer_products_at_the_border(values: list[int], expected: int | None) -> None:
    for data in (t(values, torch.int64), torch.cat([t(values, torch.int64), torch.ones(9000, dtype=torch.int64)])):
        for shaped in (data, data.unsqueeze(1)):
            if expected is None:
                with pytest.raises(IntegerOverflowError):
                    ms.prod(shaped, 0)
            else:
                assert ms.prod(shaped, 0).get_data().view(-1).tolist() == [expected]
    running = [math.prod(values[: i + 1]) for i in range(len(values))]
    if all(map(fits, running)):
        assert ms.cumprod(t(values, torch.int64), 0).tolist() == running
    else:
        with pytest.raises(IntegerOverflowError):
            ms.cumprod(t(values, torch.int64), 0)
