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
        assert ms.norm(torch.cat([torch.zeros(5000, dtype=f64), small]), ord).item() == pytest.approx(expected, rel=1e-15)
    assert ms.norm(torch.cat([t([1e-300]), torch.full((9000,), 1e300, dtype=f64)]), -2).item() == pytest.approx(1e-300)
    assert ms.norm(t([1e300, 1e-300]), 0.01).item() == pytest.approx(1e300 * (1 + 1e-6) ** 100)
    assert ms.norm(torch.full((4097,), 1e-300, dtype=f64), 0.01).item() == pytest.approx(4097.0**50 * 1e-300 * 4097.0**50)


@pytest.mark.parametrize(("ord", "expected"), [(2, inf), (1, inf), (0.5, inf), (-1, 1), (-2, 1), (inf, inf), (-inf, 1), (0, 2)])
def test_a_norm_of_an_infinite_cell(ord: float, expected: float) -> None:
    assert ms.norm(t([inf, 1.0]), ord).item() == expected
    assert ms.norm(torch.cat([t([inf, 1.0]), torch.full((9000,), inf, dtype=f64)]), ord).item() in (expected, 9002)
