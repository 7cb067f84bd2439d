"""Weighted sums, means and variances beside numpy.ma, statsmodels, xarray and exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve import execution
from maskserve.errors import DataError, DtypeError, ParameterError, ShapeError
from tests.instruction_sets import assert_same_bits_by_every_set
from tests.samples import assert_same_bits, bits, ulps

inf, nan = math.inf, math.nan
f32, f64 = torch.float32, torch.float64
SHAPE = (6, 70, 5)
EVERY_DIM = [None, 0, 1, 2, (2, 0), (-1, 1)]
OPS = [("sum", {}), ("mean", {}), ("var", {"correction": 0}), ("std", {"correction": 0})]
every_op = pytest.mark.parametrize(("op", "words"), OPS, ids=[op for op, _ in OPS])


def t(values: Any, dtype: torch.dtype = f64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype = f64) -> tuple[Tensor, Tensor, Tensor]:
    """Cells far from zero, a mask with a fully masked first slab, and weights that are 0 where a cell in six is."""
    generator = torch.Generator().manual_seed(seed)
    data = (torch.randn(shape, generator=generator, dtype=f64) * 3 + 20).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0] = False
    weights = torch.rand(shape, generator=generator, dtype=f64).to(dtype)
    return data, mask, weights * (torch.rand(shape, generator=generator) > 0.16)


def junk(data: Tensor, mask: Tensor) -> ms.MaskedTensor:
    return ms.masked_tensor(torch.where(mask, data, nan), mask)


@every_op
@pytest.mark.parametrize("dim", EVERY_DIM)
@pytest.mark.parametrize("weights_shape", [SHAPE, (70, 1), (6, 1, 1), (5,)], ids=str)
def test_agrees_with_xarray(op: str, words: dict[str, Any], dim: Any, weights_shape: tuple[int, ...]) -> None:
    data, mask, _ = drawn(0, SHAPE)
    _, _, weights = drawn(1, weights_shape)
    names = ["a", "b", "c"]
    theirs = xarray.DataArray(data.numpy(), dims=names).where(mask.numpy())
    theirs = theirs.weighted(xarray.DataArray(weights.expand(SHAPE).numpy(), dims=names))
    along = names if dim is None else [names[d] for d in (dim if isinstance(dim, tuple) else (dim,))]
    got = getattr(ms, op)(junk(data, mask), dim, weights=weights, **words)
    expected = torch.from_numpy(np.atleast_1d(getattr(theirs, op)(along).to_numpy()))
    valid = got.get_mask().reshape(expected.shape)
    assert torch.equal(valid, torch.from_numpy(np.atleast_1d((theirs.sum_of_weights(along).fillna(0) != 0).to_numpy())))
    mine = got.get_data().reshape(expected.shape)
    torch.testing.assert_close(mine[valid], expected[valid], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_means_agree_with_numpy_ma(dim: int | None) -> None:
    data, mask, weights = drawn(2, SHAPE)
    theirs = np.ma.average(np.ma.MaskedArray(data.numpy(), ~mask.numpy()), dim, weights=weights.numpy())
    got = ms.mean(junk(data, mask), dim, weights=weights)
    np.testing.assert_array_equal(~got.get_mask().numpy(), np.ma.getmaskarray(theirs))
    expected = np.ma.filled(theirs, 0) if dim is not None else theirs
    np.testing.assert_allclose(got.get_data().numpy(), expected, rtol=1e-13)


def test_moments_agree_with_statsmodels() -> None:
    stats = pytest.importorskip("statsmodels.stats.weightstats", reason="statsmodels is not needed to run maskserve")
    data, mask, weights = drawn(3, (5000,))
    mask = torch.rand(5000, generator=torch.Generator().manual_seed(4)) < 0.7
    theirs = stats.DescrStatsW(data[mask].numpy(), weights[mask].numpy(), ddof=0)
    for op, words in OPS:
        got = getattr(ms, op)(junk(data, mask), weights=weights, **words).item()
        np.testing.assert_allclose(got, getattr(theirs, op), rtol=1e-12)


def exact(cells: list[float], weights: list[float]) -> dict[str, Fraction]:
    total = sum(map(Fraction, weights), Fraction())
    products = sum((Fraction(c) * Fraction(w) for c, w in zip(cells, weights, strict=True)), Fraction())
    mean = products / total
    squares = sum((Fraction(w) * (Fraction(c) - mean) ** 2 for c, w in zip(cells, weights, strict=True)), Fraction())
    return {"sum": products, "mean": mean, "var": squares / total}


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("centre", [0.0, 1e4, 1e9])
@pytest.mark.parametrize("n", [3, 65, 4097, 9000])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(f64, {"sum": 2, "mean": 2, "var": 4}), (f32, {"sum": 1, "mean": 1, "var": 1})]
)
def test_moments_are_within_their_ulps_of_exact(
    dtype: torch.dtype, allowed: dict[str, int], n: int, centre: float, inner: int
) -> None:
    generator = torch.Generator().manual_seed(n)
    data = (torch.randn(n, generator=generator, dtype=f64) + centre).to(dtype)
    weights = torch.rand(n, generator=generator, dtype=f64).to(dtype)
    expected = exact(data.tolist(), weights.tolist())
    columns = [x.unsqueeze(1).repeat(1, inner) for x in (data, weights)]
    for op, words in OPS[:3]:
        got = getattr(ms, op)(columns[0], 0, weights=columns[1], **words).get_data()
        assert ulps(got, t([float(expected[op])] * inner), dtype) <= allowed[op], op


CELLS = st.floats(-1e12, 1e12)


@given(st.lists(st.tuples(CELLS, st.just(0.0) | st.floats(1e-6, 1e6)), min_size=1, max_size=200), st.floats(-1e9, 1e9))
def test_random_moments_are_within_their_ulps_of_exact(pairs: list[tuple[float, float]], centre: float) -> None:
    data, weights = t([c for c, _ in pairs]) + centre, t([w for _, w in pairs])
    if not weights.sum() > 1e-250:
        return
    expected = exact(data.tolist(), weights.tolist())
    size = sum(abs(Fraction(c) * Fraction(w)) for c, w in zip(data.tolist(), weights.tolist(), strict=True))
    for op, words, allowed in (("sum", {}, 2), ("mean", {}, 2), ("var", {"correction": 0}, 4)):
        reach = float(abs(expected[op]))
        if reach < 1e-250 or (op != "var" and size / abs(expected["sum"]) > 10**10):
            continue
        got = getattr(ms, op)(data, weights=weights, **words)
        assert abs(Fraction(got.item()) - expected[op]) <= allowed * Fraction(math.ulp(reach)), op


@pytest.mark.parametrize("kind", [f64, f32, torch.bfloat16, torch.int8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("weights_kind", [f64, f32, torch.int16], ids=str)
def test_native_weights_have_the_references_bits(kind: torch.dtype, weights_kind: torch.dtype) -> None:
    """Whatever the strides of data, mask and weights are."""
    for shape in ((300, 3, 1), (40, 65, 3), (2, 4097, 1), (2, 131, 256), (1, 4200, 3)):
        data, mask, weights = drawn(shape[1], shape)
        data = junk(data, mask).get_data().nan_to_num(7).to(kind)
        for shared in (weights, weights[:1, :, :1], weights[:1], weights.transpose(0, 2).contiguous().transpose(0, 2)):
            for (op, words), x in itertools.product(OPS, (data, ms.masked_tensor(data, mask))):
                arguments = {"weights": (shared * 9).to(weights_kind), **words}
                with execution.using(backend="reference"):
                    expected = getattr(ms, op)(x, 1, **arguments)
                with execution.using(backend="cpu"):
                    got = getattr(ms, op)(x, 1, **arguments)
                assert_same_bits(*((y.get_data(), y.get_mask()) for y in (got, expected)), (op, shape))


def print_bits() -> None:
    """The bits of weighted rows, for a process to compare with another's."""
    from maskserve.backends import _native

    print(_native.isa())
    for shape, kind, (op, words) in itertools.product(((99, 3, 1), (2, 4100, 1), (2, 131, 70)), (f64, f32), OPS):
        data, mask, weights = drawn(5, shape, kind)
        result = getattr(ms, op)(ms.masked_tensor(data, mask), 1, weights=weights, **words)
        print(op, kind, shape, [part.hex() for part in bits(result.get_data(), result.get_mask())])


def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits_by_every_set("tests.test_weights")


def test_products_neither_round_nor_overflow_on_the_way() -> None:
    assert ms.sum(t([3e7 + 1, -3e7]), weights=t([3e8, 3e8 + 1 / 3])).item() == float(
        Fraction(3e7 + 1) * Fraction(3e8) - Fraction(3e7) * Fraction(3e8 + 1 / 3)
    )
    assert ms.sum(t([1e16, 1, -1e16]), weights=t([1.0, 1, 1])).item() == 1
    assert ms.mean(t([1.7e308] * 2), weights=t([1.0, 1])).item() == 1.7e308
    assert ms.mean(t([1e300] * 2), weights=t([1e20, 1e20])).item() == 1e300
    assert ms.mean(torch.full((9000,), 1.7e308, dtype=f64), weights=torch.ones(9000)).item() == pytest.approx(1.7e308)


WHOLE = [torch.bool, torch.int8, torch.int64, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, f32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("weights", WHOLE + FLOATS, ids=str)
@pytest.mark.parametrize("dtype", WHOLE + FLOATS, ids=str)
def test_cells_and_weights_of_every_kind_meet(dtype: torch.dtype, weights: torch.dtype) -> None:
    data, counts = t([1, 0, 1, 1], torch.int64), t([1, 1, 0, 1], torch.int64)
    own = counts.to(f32 if weights.is_floating_point else torch.int64).to(weights)
    cells = data.to(f32 if dtype.is_floating_point else torch.int64).to(dtype)
    for op, words in OPS[:3]:
        got = getattr(ms, op)(cells, weights=own, **words)
        wide = f32 if dtype in FLOATS[3:] else dtype if dtype.is_floating_point else f64
        assert got.dtype == wide
        assert ulps(got.get_data(), t({"sum": 2.0, "mean": 2 / 3, "var": 2 / 9}[op]).to(wide), wide) <= 1


def test_complex_cells_are_weighted_by_parts() -> None:
    data, weights = t([1 + 2j, 3 - 1j, 5j], torch.complex128), t([0.5, 2, 1])
    mean = (data * weights).sum() / weights.sum()
    assert ms.mean(data, weights=weights).item() == pytest.approx(mean.item())
    spread = ((data - mean).abs() ** 2 * weights).sum() / weights.sum()
    assert ms.var(data, weights=weights, correction=0).item() == pytest.approx(spread.item())


@pytest.mark.parametrize("op", ["sum", "mean", "var"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_weighted_whole_numbers_give_no_whole_numbers(op: str, dtype: torch.dtype) -> None:
    x = ms.masked_tensor(torch.full((4, 300), 2, dtype=torch.int32))
    with pytest.raises(DtypeError, match=f"{op} of i32 cannot give .*: give one of f64, f32"):
        getattr(ms, op)(x, dim=1, weights=torch.ones(4, 300), dtype=dtype)


def test_a_masked_weight_masks_its_cell_and_weights_that_sum_to_zero_mask_the_result() -> None:
    masked = ms.masked_tensor(t([1.0, nan, 5]), t([True, False, True], torch.bool))
    assert ms.mean(t([1.0, 2, 3]), weights=masked).item() == pytest.approx(16 / 6)
    for op, words in OPS:
        function = getattr(ms, op)
        for weights in ([0.0, 0.0], [1.0, -1.0] if op in ("sum", "mean") else [0.0, 0.0]):
            assert function(t([1.0, 2]), weights=t(weights), **words).tolist() is None
            assert function(t([1.0, 2]), weights=t(weights), empty=7, **words).item() == 7
        assert function(t([1.0, 2]), weights=t([1.0, 1]), min_count=3, **words).tolist() is None
    assert ms.mean(t([nan, 2.0]), weights=t([1.0, 1])).get_data().isnan()
    assert ms.mean(t([nan, 2.0]), weights=t([1.0, 1]), nan="omit").item() == 2


def test_what_cannot_be_weighted_says_so() -> None:
    data = t([1.0, 2])
    with pytest.raises(ParameterError, match="correction=0"):
        ms.var(data, weights=data)
    with pytest.raises(DataError, match="negative"):
        ms.var(data, weights=-data, correction=0)
    with pytest.raises(ShapeError, match="broadcast"):
        ms.mean(data, weights=t([1.0, 2, 3]))
    with pytest.raises(DtypeError, match="real"):
        ms.mean(data, weights=data.to(torch.complex64))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("op", ["sum", "mean", "var", "std"])
def test_no_cells_have_no_weighted_result(op: str, shape: tuple[int, ...]) -> None:
    words = {"correction": 0} if op in ("var", "std") else {}
    result = getattr(ms, op)(torch.empty(shape), weights=torch.empty(shape), **words)
    assert result.get_mask().tolist() is False
