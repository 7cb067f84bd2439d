"""Numbers that other libraries get wrong. Ids are those of the project's table of numeric cases."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve.errors import IntegerOverflowError, MaskDtypeError
from tests.samples import ulps

inf, nan = math.inf, math.nan
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def t(values: Any, dtype: torch.dtype = f64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


EXACT = [
    ("N01", "mean", torch.ones(100_000, dtype=f16), 1.0),
    ("N03", "sum", torch.cat([torch.full((2000,), 40.0), torch.full((2000,), -40.0)]).to(f16), 0.0),
    ("N08", "var", t([4.0, 7, 13, 16]) + 1e9, 30.0),
    ("N10", "std", t([1e20, -1e20], f32), float(np.float32(math.sqrt(2) * 1e20))),
    ("N15", "mean", t([3e38, 3e38], f32), float(np.float32(3e38))),
    ("N16", "mean", t([1.7e308, 1.7e308]), 1.7e308),
    ("N17", "sum", t([1e16, 1, -1e16]), 1.0),
    ("N18", "sum", t([1e8, 1, -1e8], f32), 1.0),
    ("N19", "sum", t([1e308, 1e308, -1e308]), 1e308),
    ("N27 sum", "sum", t([200, 100], torch.uint8), 300),
    ("N27 mean", "mean", t([200, 100], torch.uint8), 150.0),
    ("N27 var", "var", t([200, 100], torch.uint8), 5000.0),
    ("N28 sum", "sum", t([True, False, True], torch.bool), 2),
    ("N28 mean", "mean", t([True, False, True], torch.bool), 2 / 3),
    ("N28 amax", "amax", t([True, False, True], torch.bool), True),
    ("P03", "logsumexp", t([1, 1], torch.int64), 1 + math.log(2)),
    ("P04 a", "logsumexp", t([-inf, -inf]), -inf),
    ("P04 b", "logsumexp", t([inf, 1]), inf),
    ("P04 c", "logsumexp", t([inf, -inf]), inf),
    ("P04 d", "logsumexp", t([1000, 1000], f32), float(np.float32(1000 + math.log(2)))),
    ("P12 amax", "amax", t([1, nan, 3]), nan),
    ("P12 argmax", "argmax", t([1, nan, 3]), 1),
    ("P12 median", "median", t([1, 2, 3, 5]), 2.5),
    ("P14", "var", t([inf, 1]), nan),
    ("P15", "sum", t([1.4e-45] * 4, f32), float(np.float32(5.6e-45))),
    ("median of NaN", "median", t([1, nan, 3, 5]), nan),
    ("median of i64", "median", t([2**62 + 2, 2**62 + 4], torch.int64), float(2**62 + 3)),
    ("var of i64", "var", t([2**60 + 1, 2**60 + 2, 2**60 + 3], torch.int64), 1.0),
    ("std of f16", "std", t([6e4, 1, 6e4, 1], f16), 34656.0),
    ("sum of inf", "sum", t([inf, 1.0]), inf),
    ("sum of infs", "sum", t([inf, -inf]), nan),
    ("mean of f64 inf", "mean", t([inf, 1.0]), inf),
    ("any of NaN", "any", t([nan, 0.0]), True),
    ("N11", "norm", t([1e20, 1e20], f32), float(np.float32(math.sqrt(2) * float(np.float32(1e20))))),
    ("N12", "norm", t([1e-30, 1e-30], f32), float(np.float32(math.sqrt(2) * float(np.float32(1e-30))))),
    ("N13", "norm", t([1e200, 1e200]), math.hypot(1e200, 1e200)),
    ("N14", "norm", t([300] * 4, f16), 600.0),
    ("N20", "prod", t([2.0**700, 2.0**700, 2.0**-700, 2.0**-700]), 1.0),
    ("N20 decimal", "prod", t([1e200, 1e200, 1e-200, 1e-200]), float((Fraction(1e200) * Fraction(1e-200)) ** 2)),
    ("N20 turned", "prod", t([1e-200, 1e-200, 1e200, 1e200]), float((Fraction(1e200) * Fraction(1e-200)) ** 2)),
    ("N27 norm", "norm", t([200, 100], torch.uint8), math.hypot(200, 100)),
    ("N27 std", "std", t([200, 100], torch.uint8), math.sqrt(5000)),
    ("N27 prod", "prod", t([200, 100], torch.uint8), 20_000),
    ("N28 var", "var", t([True, False], torch.bool), 0.5),
    ("N28 argmax", "argmax", t([False, True, True], torch.bool), 1),
    ("N28 prod", "prod", t([True, False, True], torch.bool), 0),
    ("N28 norm", "norm", t([True, False, True], torch.bool), math.sqrt(2)),
    ("N28 mode", "mode", t([True, False, True], torch.bool), True),
    ("N29 amax", "amax", t([1, 2**64 - 1], torch.uint64), 2**64 - 1),
    ("N29 amin", "amin", t([2**63, 2**64 - 1], torch.uint64), 2**63),
    ("N29 mean", "mean", t([2**63, 2**63 + 2**12], torch.uint64), float(2**63 + 2**11)),
    ("N29 sum", "sum", t([2**62, 2**62 - 1], torch.uint64), 2**63 - 1),
    ("N29 median", "median", t([2**63 + 2**12, 2**63], torch.uint64), float(2**63 + 2**11)),
    ("P03 log of sums", "logsumexp", t([True, True], torch.bool), 1 + math.log(2)),
]


@pytest.mark.parametrize(("op", "data", "expected"), [case[1:] for case in EXACT], ids=[case[0] for case in EXACT])
def test_exact_cases(op: str, data: Tensor, expected: float) -> None:
    """Each also with a masked cell of junk in front and behind, which moves every cell and must change nothing."""
    worst = nan if data.is_floating_point() else 1 if data.dtype is torch.bool else torch.iinfo(data.dtype).max
    junk = torch.full((1,), worst, dtype=data.dtype)
    surrounded = ms.masked_tensor(
        torch.cat([junk, data, junk]),
        torch.cat([t([False], torch.bool), torch.ones(len(data)).bool(), t([False], torch.bool)]),
    )
    moved = 1 if op.startswith("arg") else 0
    for tensor, offset in ((ms.masked_tensor(data), 0), (surrounded, moved)):
        got = getattr(ms, op)(tensor, dim=0)
        got = got.values if isinstance(got, tuple) else got
        assert got.get_mask().item()
        assert got.get_data().item() == pytest.approx(expected + offset, rel=0, abs=0, nan_ok=True)


def test_p02_the_mean_of_2999_half_precision_thirties() -> None:
    mask = torch.ones(2999, dtype=torch.bool)
    mask[7] = False
    assert ms.mean(torch.full((2999,), 30.0, dtype=f16), mask=mask).item() == 30.0


def test_n02_a_sum_that_overflows_its_dtype_is_inf_with_one_warning_that_names_dtype() -> None:
    with pytest.warns(RuntimeWarning, match="dtype=f64") as caught:
        assert ms.sum(torch.ones(100_000, dtype=f16)).item() == inf
    assert len(caught) == 1
    assert ms.sum(torch.ones(100_000, dtype=f16), dtype=f32).item() == 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ms.sum(t([inf, 1], f16)).item() == inf


def test_n04_a_bfloat16_sum_is_rounded_once() -> None:
    assert ms.sum(torch.ones(257, dtype=bf16)).item() in (256.0, 258.0)
    assert ms.sum(torch.ones(257, dtype=bf16), dtype=f32).item() == 257.0


def test_a_half_precision_result_is_rounded_once_and_not_by_way_of_float32() -> None:
    """2049 is a tie in f16; the 2**-30 beyond it decides, and float32 would have dropped it."""
    data = t([2049.0, 2.0**-24], f16)
    assert data.tolist() == [2048.0, 2.0**-24]
    data = t([2048.0, 1.0, 2.0**-24], f16)
    assert ms.sum(data).item() == 2050.0
    assert ms.sum(data.to(bf16)).item() in (2048.0, 2064.0)


@given(st.lists(st.floats(-65000, 65000), min_size=1, max_size=50), st.sampled_from([f16, bf16]))
def test_one_rounding_is_numpys_or_exact(values: list[float], dtype: torch.dtype) -> None:
    from maskserve.backends.reference.cells import rounded

    wide = t(values)
    got = rounded(wide, dtype)
    if dtype is f16:
        assert got.numpy().tobytes() == wide.numpy().astype(np.float16).tobytes()
        return
    for value, result in zip(values, got.double().tolist(), strict=True):
        near = t([result], bf16)
        ups = [float(torch.nextafter(near, t([side], bf16))) for side in (inf, -inf)]
        assert all(
            abs(Fraction(value) - Fraction(result)) <= abs(Fraction(value) - Fraction(up))
            for up in ups
            if math.isfinite(up)
        )


def test_n06_and_n07_variances_of_data_far_from_zero() -> None:
    generator = np.random.default_rng(0)
    for dtype, centre, n in ((np.float16, 100, 5000), (np.float32, 1e4, 100_000)):
        data = generator.normal(centre, 1, n).astype(dtype)
        exact = np.var(data.astype(np.longdouble), ddof=1)
        got = ms.var(torch.from_numpy(data))
        assert ulps(got.get_data(), torch.tensor(float(exact)), got.dtype) <= 1


def test_n09_std_of_half_precision_300s() -> None:
    assert ms.std(t([300, -300, 300, -300], f16), correction=0).item() == 300.0


def test_n22_an_integer_sum_that_does_not_fit_is_an_error_and_one_that_only_passes_beyond_is_not() -> None:
    biggest = 2**63 - 1
    with pytest.raises(IntegerOverflowError, match="dtype=f64"):
        ms.sum(t([biggest, 1], torch.int64))
    assert ms.sum(t([biggest, 1, -1], torch.int64)).item() == biggest
    assert ms.sum(t([biggest, 1], torch.int64), dtype=f64).item() == 2.0**63
    with pytest.raises(IntegerOverflowError):
        ms.cumsum(t([biggest, 1, -1], torch.int64), 0)
    with pytest.raises(IntegerOverflowError, match="i8"):
        ms.sum(t([100, 100], torch.int8), dtype="i8")


def test_n23_an_integer_product_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(IntegerOverflowError, match="dtype=f64"):
        ms.prod(t([2**62, 4], torch.int64))
    assert ms.prod(t([2**62, 4], torch.int64), dtype=f64).item() == 2.0**64
    assert ms.prod(t([2**62, 4, 0], torch.int64)).item() == 0
    with pytest.raises(IntegerOverflowError):
        ms.cumprod(t([2**62, 4, 0], torch.int64), 0)


def test_n27_a_softmax_of_bytes_is_a_float() -> None:
    got = ms.softmax(t([200, 100, 200], torch.uint8), 0)
    assert got.dtype == f64
    assert got.tolist() == torch.softmax(t([200, 100, 200]), 0).tolist()
    assert ms.softmin(t([0, 255], torch.uint8), 0).tolist() == torch.softmax(t([0, -255]), 0).tolist()


def test_n29_a_sum_of_uint64_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(IntegerOverflowError, match="dtype=f64"):
        ms.sum(t([2**63, 2**63], torch.uint64))
    assert ms.sum(t([2**63, 2**63], torch.uint64), dtype=f64).item() == 2.0**64


@pytest.mark.parametrize(
    ("dtype", "at"),
    [(f16, 4097), (f16, 70_001), (bf16, 259), (torch.int8, 300), (f32, 16_777_217)],
    ids=["f16", "f16 beyond 65504", "bf16", "int8", "f32 beyond 2**24"],
)
def test_n30_an_index_is_exact_whatever_the_datas_dtype(dtype: torch.dtype, at: int) -> None:
    data = torch.zeros(at + 3, dtype=dtype)
    data[at] = 1
    got = ms.argmax(data)
    assert (got.dtype, got.item()) == (torch.int64, at)
    assert ms.argmin(-data).item() == at


def test_n31_all_masked_gives_count_0_and_everything_else_masked() -> None:
    for dtype in (f32, torch.int64, torch.bool):
        m = ms.masked_tensor(torch.ones(4, dtype=dtype), torch.zeros(4, dtype=torch.bool))
        assert ms.count(m).item() == 0
        for op in ("sum", "mean", "var", "amax", "argmax", "any", "all", "median", "logsumexp"):
            got = getattr(ms, op)(m, 0)
            assert not got.get_mask().item()
            assert not got.get_data().item()


def test_n33_a_correction_of_n_or_more_is_masked() -> None:
    assert ms.var(t([1.0])).tolist() is None
    assert ms.var(t([1.0, 2.0]), correction=2).tolist() is None
    assert ms.var(t([1.0]), correction=0).item() == 0.0


def test_p05_p06_softmax_of_only_minus_inf_is_nan_and_a_thousand_sum_to_one() -> None:
    assert ms.softmax(t([-inf, -inf]), 0).get_data().isnan().all()
    assert ms.softmax(t([-inf, 1.0]), 0).tolist() == [0.0, 1.0]
    assert ms.softmax(t([nan, 1.0]), 0).get_data().isnan().all()
    for dtype in (f16, bf16, f32):
        data = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
        total = ms.softmax(data, 0).get_data().double().sum().item()
        assert abs(total - 1) <= 1000 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("op", ["amax", "amin"])
@pytest.mark.parametrize("zeros", [[-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0], [0.0, 0.0]])
def test_p13_signed_zeros_do_not_depend_on_their_order(op: str, zeros: list[float]) -> None:
    want = max if op == "amax" else min
    expected = want(math.copysign(1, z) for z in zeros)
    for padding in (0, 5000):
        got = getattr(ms, op)(torch.cat([t(zeros), torch.full((padding,), zeros[0], dtype=f64)])).item()
        assert math.copysign(1, got) == expected
    assert math.copysign(1, ms.sum(t([-0.0, -0.0])).item()) == 1


@pytest.mark.slow
def test_p16_column_means_of_33_million_ones() -> None:
    got = ms.mean(torch.ones(2**25, 2), 0)
    assert got.tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_p17_a_float32_mean_of_equal_cells_is_that_value() -> None:
    value = torch.tensor(0.1)
    assert ms.mean(value.expand(20_000_000)).item() == value.item()
    assert ms.mean(value.expand(100_000_000)).item() == value.item()


@pytest.mark.slow
def test_p18_a_median_of_twenty_million_cells() -> None:
    data = torch.arange(20_000_001, dtype=f32)
    assert ms.median(data).item() == 10_000_000.0


@pytest.mark.slow
def test_p18_quantiles_of_twenty_million_cells() -> None:
    cells = torch.arange(20_000_000, dtype=torch.int32).flip(0)
    assert ms.quantile(cells, (0.0, 0.25, 1.0)).tolist() == [0.0, 19_999_999 / 4, 19_999_999.0]
    assert ms.quantile(cells.float(), 0.5, interpolation="lower").item() == 9_999_999.0


def test_p19_a_mask_that_is_not_bool_is_refused() -> None:
    for dtype in (torch.uint8, f32, torch.int64):
        with pytest.raises(MaskDtypeError, match=r"\.bool\(\)"):
            ms.mean(torch.ones(2), mask=torch.ones(2, dtype=dtype))


def test_cumsum_keeps_what_float64_would_lose_on_the_way() -> None:
    assert ms.cumsum(t([1e16, 1, -1e16]), 0).tolist()[-1] == 1.0
    assert ms.cumsum(t([1.7e308, 1.7e308, -1.7e308]), 0).tolist() == [1.7e308, inf, 1.7e308]
    assert ms.cumsum(t([100] * 4, torch.int8), 0).tolist() == [100, 200, 300, 400]
    assert ms.cumsum(t([1.0, nan, 2.0]), 0).get_data()[0] == 1.0


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.lists(FINITE, min_size=1, max_size=300))
def test_a_float64_sum_and_mean_are_within_an_ulp_of_exact_for_moderate_condition(values: list[float]) -> None:
    exact = sum(map(Fraction, values))
    size = sum(abs(Fraction(v)) for v in values)
    if exact == 0 or size / abs(exact) > 10**10 or not abs(exact) < Fraction(1.7e308):
        return
    if float(abs(exact)) < 1e-290:
        return
    total = float(exact)
    assert abs(Fraction(ms.sum(t(values)).item()) - exact) <= Fraction(math.ulp(total))
    mean = exact / len(values)
    assert abs(Fraction(ms.mean(t(values)).item()) - mean) <= 2 * Fraction(math.ulp(float(mean)))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=300), st.floats(-1e9, 1e9))
def test_a_float64_variance_is_within_four_ulps_of_exact(values: list[float], centre: float) -> None:
    data = t(values) + centre
    cells = [Fraction(v) for v in data.tolist()]
    mean = sum(cells) / len(cells)
    exact = sum((c - mean) ** 2 for c in cells) / (len(cells) - 1)
    if exact < Fraction(1e-280):
        return
    got = ms.var(data).item()
    assert abs(Fraction(got) - exact) <= 4 * Fraction(math.ulp(float(exact)))
    assert abs(
        ms.std(data).item() - float(mpmath.sqrt(mpmath.mpf(exact.numerator) / exact.denominator))
    ) <= 4 * math.ulp(float(exact) ** 0.5)


@given(st.lists(st.floats(-700, 700, width=32), min_size=1, max_size=200), st.sampled_from([f32, f64]))
def test_logsumexp_and_softmax_are_within_their_ulps_of_exact(values: list[float], dtype: torch.dtype) -> None:
    with mpmath.workdps(60):
        powers = [mpmath.exp(v) for v in values]
        total = mpmath.fsum(powers)
        exact = float(mpmath.log(total))
        shares = [float(p / total) for p in powers]
    allowed = 1 if dtype is f32 else 2
    data = t(values, dtype)
    if abs(exact) > 1e-3:
        assert ulps(ms.logsumexp(data, 0).get_data(), t(exact), dtype) <= allowed
    assert ulps(ms.softmax(data, 0).get_data(), t(shares), dtype) <= allowed


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=100))
def test_integer_sums_are_exact_or_an_error(values: list[int]) -> None:
    data = torch.tensor(values, dtype=torch.int64)
    exact = sum(values)
    if -(2**63) <= exact < 2**63:
        assert ms.sum(data).item() == exact
    else:
        with pytest.raises(IntegerOverflowError):
            ms.sum(data)
    mean = Fraction(exact, len(values))
    assert abs(Fraction(ms.mean(data).item()) - mean) <= Fraction(math.ulp(float(mean)))
