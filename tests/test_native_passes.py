"""The native kernels beside the sums: the reference's bits, or within ulps where there is an exp or a log."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from maskserve import OPS, dtypes, engine, execution
from maskserve.backends import choose, cpu
from maskserve.backends.cpu import CpuBackend
from maskserve.backends.reference import kernel
from maskserve.dtypes import DType
from maskserve.errors import IntegerOverflowError
from maskserve.ops import passes
from maskserve.ops.rows import Pass, Reach, Reduction, Row, Scan
from tests.instruction_sets import assert_same_bits_by_every_set
from tests.samples import NATIVE, PRODUCTS, SLICED, assert_same_bits, bits, plan_of, ulps
from tests.test_native_sum import layouts, sample

ROOT = Path(__file__).parent.parent
SERVED = sorted(dtypes.FLOATING | dtypes.INTEGRAL, key=lambda dtype: dtype.name)
SHAPES = (
    (3, 1, 1), (300, 3, 1), (290, 7, 3), (99, 64, 1), (40, 65, 3), (5, 513, 1), (2, 1500, 1), (2, 4095, 1),
    (3, 4097, 1), (2, 12289, 1), (2, 130, 2), (3, 70, 17), (2, 131, 256), (1, 65, 300), (1, 4200, 3),
)  # fmt: skip
INEXACT = {
    row.name for row in NATIVE if any(word in row.name for word in ("softm", "logsumexp", "logcumsumexp", "std"))
}
"""exp and log are each back end's own; torch's square root is not always the nearest."""

NORMS = [{"ord": ord} for ord in (1, 3, 0.5, 0, -1, -2, math.inf, -math.inf)]
VARIED = [
    *((OPS[name], params) for name in ("norm", "normalize") for params in NORMS),
    *((OPS["standardize"], {"correction": correction}) for correction in (0, 3)),
]
"""Rows whose parameters choose another kernel, or another end."""
FINISHED = [row for row in NATIVE if isinstance(row, Reduction) and row.passes and not row.picks]
FINISHED_PAIRS = [(row, dtype) for row in FINISHED for dtype in SERVED if dtype in row.accepts]
every_dtype = pytest.mark.parametrize("dtype", SERVED, ids=repr)
every_row = pytest.mark.parametrize("row", NATIVE, ids=lambda row: row.name)
ACCEPTED = [(row, dtype) for row in NATIVE for dtype in SERVED if dtype in row.accepts]
every_row_of_every_dtype = pytest.mark.parametrize(
    ("row", "dtype"), ACCEPTED, ids=[f"{row.name}-{dtype}" for row, dtype in ACCEPTED]
)


def both(row: Row, data: Tensor, mask: Tensor | None, **params: Any) -> tuple[Any, Any]:
    """What cpu gives, and the reference."""
    plan = plan_of(row, data, **params)
    assert choose(plan).backend.name == "cpu"
    with execution.using(backend="reference"):
        expected = engine.run(plan, data, mask)
    return engine.run(plan, data, mask), expected


def tame(row: Row, data: Tensor, mask: Tensor) -> Tensor:
    """Valid cells small enough that no result overflows; the junk stays."""
    if row.name in PRODUCTS and data.is_floating_point():
        near_one = torch.exp(data.double().nan_to_num(0.0).clamp(-3, 3) * 0.003)
        return torch.where(mask, torch.where(data < 0, -near_one, near_one).to(data.dtype), data)
    if row.name in PRODUCTS and data.dtype is not torch.bool:
        return torch.where(mask, data.sign(), data)
    if data.dtype is torch.float16:
        return torch.where(mask, data / 512, data)
    if data.is_floating_point() or data.dtype is torch.bool:
        return data
    return torch.where(mask, data % 100, data)


def assert_agree(row: Row, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], said: object) -> None:
    assert_same_bits((got[1],), (expected[1],), said)
    if row.name == "median":  # of -0 and +0 either may be the middle one
        got, expected = (got[0] + 0.0, got[1]), (expected[0] + 0.0, expected[1])
    if row.name not in INEXACT or not got[0].is_floating_point():
        assert_same_bits(got, expected, said)
        return
    assert got[0].dtype == expected[0].dtype
    most = 1 if got[0].dtype is not torch.float64 else 4
    if row.name == "logcumsumexp" and got[0].dtype is torch.float64:  # the reference adds up its rounding
        torch.testing.assert_close(*(values[0] for values in (got, expected)), rtol=1e-12, atol=1e-12, equal_nan=True)
        return
    if row.name in ("log_softmax", "logcumsumexp"):  # a result close to 0 loses what it loses in both
        spread = float(expected[0].double().abs().nan_to_num(0, 0, 0).max()) if got[0].numel() else 0.0
        differ = (got[0].double() - expected[0].double()).abs().nan_to_num(0, 0, 0)
        assert not differ.numel() or float(differ.max()) <= torch.finfo(got[0].dtype).eps * max(spread, 1.0), said
        return
    assert ulps(*(values[0][expected[1]] for values in (got, expected)), got[0].dtype) <= most, said


@every_row_of_every_dtype
def test_every_row_is_the_references(row: Row, dtype: DType) -> None:
    for shape in SHAPES:
        data, mask = sample(dtype, shape, seed=shape[1])
        data = tame(row, data, mask)
        assert_agree(row, *both(row, data, mask, dim=1), (shape, "masked"))
        plain = torch.where(mask, data, torch.ones((), dtype=data.dtype))
        assert_agree(row, *both(row, plain, None, dim=1), (shape, "no mask"))


@every_dtype
@pytest.mark.parametrize(("row", "params"), VARIED, ids=[f"{row.name}-{params}" for row, params in VARIED])
def test_every_parameter_is_the_references(row: Row, params: dict[str, Any], dtype: DType) -> None:
    if dtype is dtypes.f16 and "ord" in params:
        params = params | {"dtype": dtypes.f32}
    for shape in SHAPES:
        data, mask = sample(dtype, shape, seed=shape[1] + 1)
        data = tame(row, data, mask)
        for cells, valid in ((data, mask), (torch.where(mask, data, torch.ones((), dtype=data.dtype)), None)):
            got, expected = both(row, cells, valid, dim=1, **params)
            assert_same_bits((got[1],), (expected[1],), shape)
            if params.get("ord") == 3:  # a cube root is each back end's own
                most = 2 if got[0].dtype is torch.float64 else 1
                assert ulps(got[0], expected[0], got[0].dtype) <= most, shape
            else:
                assert_same_bits(got, expected, shape)


NORM_CASES: list[list[float]] = [
    [1e200, 1e200], [1e-200, 1e-200], [5e-324] * 3, [2.0**-1040, 3 * 2.0**-1042], [1.7e308, -1.7e308], [1e300, 1e-300],
    [math.inf, 1.0], [-math.inf, math.nan], [0.0, -0.0], [0.0, 5.0], [math.nan, 0.0],
]  # fmt: skip


@pytest.mark.parametrize("cells", NORM_CASES, ids=str)
@pytest.mark.parametrize("ord", [2, *(params["ord"] for params in NORMS)])
def test_norms_of_special_cells_are_the_references(ord: float, cells: list[float]) -> None:
    """Also across leaves whose scales differ."""
    few = torch.tensor([cells], dtype=torch.float64)
    far = torch.cat([few.repeat(1, 2000), torch.ones(1, 5000, dtype=torch.float64), few.flip(1).repeat(1, 3000)], 1)
    for data, mask in itertools.product((few, far, far * 2.0**-100), (None, True)):
        valid = None if mask is None else (torch.arange(data.shape[1]) % 3 != 1).expand(data.shape)
        for row in (OPS["norm"], OPS["normalize"]):
            got, expected = both(row, data, valid, dim=1, ord=ord)
            assert_same_bits((got[1],), (expected[1],))
            assert ulps(got[0], expected[0], torch.float64) <= (2 if ord == 3 else 0), row.name


PRODUCT_CASES: list[list[float]] = [
    [1e200, 1e200, 1e-200, 1e-200], [5e-324, 1e300, 3.0], [0.0, 3.0], [-0.0, 3.0], [math.inf, 0.0], [math.inf, -2.0],
    [math.nan, 1.0], [1 + 2.0**-52, 1 - 2.0**-53], [1 / 3] * 3, [-1e308, 1e308], [2.0**-1074, 2.0**-1074],
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:prod. a finite result overflows")
@pytest.mark.parametrize("cells", PRODUCT_CASES, ids=str)
@pytest.mark.parametrize("repeats", [1, 40, 3000])
def test_products_of_special_cells_are_the_references(cells: list[float], repeats: int) -> None:
    data = torch.tensor([cells], dtype=torch.float64).repeat(2, repeats)
    for kind, mask in itertools.product((torch.float64, torch.float32), (None, torch.arange(data.shape[1]) % 5 != 1)):
        valid = None if mask is None else mask.expand(data.shape)
        got, expected = both(OPS["prod"], data.to(kind), valid, dim=1)
        assert_same_bits(got, expected, kind)


def test_integer_products_are_exact_or_an_error() -> None:
    for cells in ([2**31, 2**31], [-(2**31), 2**32], [3037000499, 3037000499], [7, -3, 11], [2**62, 2, 0]):
        got, expected = both(OPS["prod"], torch.tensor([cells, cells]), None, dim=1)
        assert_same_bits(got, expected, cells)
        assert got[0][0].item() == math.prod(cells)
    for cells in ([2**31, 2**32], [2**62, 4], [3037000500, 3037000500], [-(2**62), 3]):
        data = torch.tensor([cells, [1, 1]])
        with pytest.raises(IntegerOverflowError):
            engine.run(plan_of(OPS["prod"], data, dim=1), data, None)
        one = torch.tensor([[True, False], [True, True]])
        assert engine.run(plan_of(OPS["prod"], data, dim=1), data, one)[0].tolist() == [cells[0], 1]


@pytest.mark.parametrize("dtype", [d for d in SERVED if d.is_integral and d is not dtypes.boolean], ids=repr)
def test_ranges_of_integers_fit_or_are_an_error(dtype: DType) -> None:
    kind = getattr(torch, dtype.torch)
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    half = torch.tensor([[high, max(low, 0)], [high, high]], dtype=kind)
    assert engine.run(plan_of(OPS["ptp"], half, dim=1), half, None)[0].tolist() == [high - max(low, 0), 0]
    if low < 0:
        whole = torch.tensor([[low, high]], dtype=kind)
        with pytest.raises(IntegerOverflowError):
            engine.run(plan_of(OPS["ptp"], whole, dim=1), whole, None)
        one = torch.tensor([[True, False]])
        assert engine.run(plan_of(OPS["ptp"], whole, dim=1), whole, one)[0].tolist() == [0]


@pytest.mark.parametrize("n", [1, 3, 16, 17, 64, 65, 5000])
@pytest.mark.parametrize("inner", [1, 3, 70])
def test_ends_are_found_wherever_they_stand(n: int, inner: int) -> None:
    data = torch.arange(2 * n * inner).view(2, n, inner)
    for place in {0, n // 2, n - 1, min(n - 1, 8)}:
        mask = torch.zeros(data.shape, dtype=torch.bool)
        mask[:, place] = True
        mask[0, place, 0] = False
        for row, other in itertools.product((OPS["first"], OPS["last"]), (mask, ~mask)):
            for valid in layouts(other).values():
                got, expected = both(row, data, valid, dim=1)
                assert_same_bits(got, expected, (row.name, place))


def test_an_unusual_norm_is_the_references() -> None:
    assert choose(plan_of(OPS["norm"], torch.ones(3), ord=2.5)).backend.name == "reference"


@every_row_of_every_dtype
def test_strides_and_addresses_change_no_bit(row: Row, dtype: DType) -> None:
    for shape in ((3, 130, 17), (17, 70, 1), (2, 3, 5), (5, 4100, 1), (1, 65, 300)):
        data, mask = sample(dtype, shape, seed=5)
        data = tame(row, data, mask)
        plan = plan_of(row, data, dim=1)
        expected = engine.run(plan, data, mask)
        masks = layouts(mask)
        for name, strided in layouts(data).items():
            for mask_name in {name, "dense", "every second"}:
                assert_same_bits(engine.run(plan, strided, masks[mask_name]), expected, (shape, name, mask_name))
        data = torch.where(mask, data, torch.ones((), dtype=data.dtype))
        for small in (mask[:1], mask[:, :1], mask[:, :, :1]):
            expected = engine.run(plan, data, small.expand(shape).contiguous())
            assert_same_bits(engine.run(plan, data, small), expected, (shape, "broadcast", small.shape))


@every_row
def test_a_large_tensor_in_blocks_has_the_bits_of_a_small_one(row: Row) -> None:
    data, mask = sample(dtypes.f32, (900, 33, 5), seed=6)
    whole = engine.run(plan_of(row, data, dim=1), data, mask)
    pieces = [engine.run(plan_of(row, d, dim=1), d, m) for d, m in zip(data.split(7), mask.split(7), strict=True)]
    labels = plan_of(row, data, dim=1).labels
    joined = tuple(torch.cat(part, 0 if labels is None else 1) for part in zip(*pieces, strict=True))
    assert_same_bits(whole, joined, row.name)


@pytest.mark.parametrize("name", ["sum", "var", "norm", "prod", "logsumexp"])
def test_blocks_of_a_wide_tensor_change_no_bit(name: str) -> None:
    """More columns than are read at a time, more rows than a block of them has."""
    data, mask = sample(dtypes.f32, (1, 1300, 4500), seed=7)
    data = tame(OPS[name], data, mask)
    plan = plan_of(OPS[name], data, dim=1)
    expected = engine.run(plan, data, mask)
    split = zip(data.split(70, 2), mask.split(70, 2), strict=True)
    pieces = [engine.run(plan_of(OPS[name], d, dim=1), d, m) for d, m in split]
    assert_same_bits(expected, tuple(torch.cat(part, 1) for part in zip(*pieces, strict=True)), name)


FLOATS = [dtype for dtype in SERVED if dtype.is_float]
EXTREMES = [OPS[name] for name in ("amax", "amin", "argmax", "argmin")]


@pytest.mark.parametrize("dtype", FLOATS, ids=repr)
@pytest.mark.parametrize("row", EXTREMES, ids=lambda row: row.name)
def test_extremes_of_special_cells(row: Row, dtype: DType) -> None:
    """NaN wins and the first one is the index; +0 is larger than -0; a valid -inf is found among masked cells."""
    kind = getattr(torch, dtype.torch)
    special = ((math.nan, 5.0), (0.0, -0.0), (-0.0, 0.0), (-math.inf, 0.0), (math.inf, 0.0))
    for n, inner, (cell, others) in itertools.product((1, 3, 64, 65, 5000), (1, 3, 70), special):
        for places in ((0,), (n - 1,), (n // 3, n // 2)):
            data = torch.full((2, n, inner), others, dtype=kind)
            mask = torch.ones(data.shape, dtype=torch.bool)
            data[:, list(places)] = torch.tensor(cell, dtype=kind)
            got, expected = both(row, data, mask, dim=1)
            assert_same_bits(got, expected, (n, inner, cell, places))
            mask[:] = False
            mask[:, list(places)] = True
            data[~mask] = math.inf if cell < 0 else -math.inf
            got, expected = both(row, data, mask, dim=1)
            assert_same_bits(got, expected, (n, inner, cell, places, "only"))


def test_a_nan_is_canonical_whatever_its_payload() -> None:
    for bit_pattern in (0x7F800001, -1, -0x3FFFFF):
        data = torch.tensor([1, bit_pattern, 2], dtype=torch.int32).view(torch.float32)
        for row in EXTREMES[:2]:
            values, _ = engine.run(plan_of(row, data), data, None)
            assert values.view(torch.int32).item() == 0x7FC00000


@pytest.mark.parametrize("dtype", [d for d in SERVED if d.is_integral], ids=repr)
def test_extreme_integers_are_data(dtype: DType) -> None:
    kind = getattr(torch, dtype.torch)
    limits = (False, True) if kind is torch.bool else (torch.iinfo(kind).min, torch.iinfo(kind).max)
    for row in EXTREMES:
        for limit in limits:
            data = torch.full((70, 9), limit, dtype=kind)
            mask = torch.arange(9).expand(70, 9) > 4
            got, expected = both(row, data, mask, dim=1)
            assert_same_bits(got, expected, (row.name, limit))


@pytest.mark.parametrize("n", [3, 64, 4097])
def test_moments_of_i64_keep_the_low_bits(n: int) -> None:
    for high in (2**62, -(2**62), 2**53 + 1):
        data = torch.arange(n).repeat(2, 1) % 7 + high
        got, expected = both(OPS["var"], data, None, dim=1)
        assert_same_bits(got, expected, high)
        assert float(got[0][0]) < 10


@pytest.mark.parametrize("cells", [[1.7e308, 1.7e308, 1.6e308], [1e308] * 70, [math.inf, 1.0], [math.nan, 1.0], [-0.0]])
def test_f64_means_survive_sums_that_overflow(cells: list[float]) -> None:
    data = torch.tensor([cells], dtype=torch.float64)
    for row in (OPS["mean"], OPS["sum"], OPS["var"]):
        got, expected = both(row, data, None, dim=1, **({"correction": 0} if row.name == "var" else {}))
        assert_same_bits(got, expected, row.name)


# -- cells that are taken from elsewhere -----------------------------------------------------------------------------


def is_native(row: Row) -> bool:
    """Whether the cpu back end serves it on float32."""
    data = torch.zeros(2, 3)
    params = {"dim": 1} if "dim" in {p.name for p in row.parameters} else {}
    return CpuBackend().why_not(plan_of(row, data, **params)) is None


TAKEN = [row for row in SLICED if isinstance(row, Scan) and (row.picks or row.reach is Reach.OWN) and is_native(row)]


@pytest.mark.parametrize("dtype", [*SERVED, dtypes.u64], ids=repr)
@pytest.mark.parametrize("row", TAKEN, ids=lambda row: row.name)
def test_taken_cells_and_their_places_are_the_references(row: Scan, dtype: DType) -> None:
    for shape in SHAPES:
        assert_taken_are_the_references(row, dtype, shape)


def assert_taken_are_the_references(row: Scan, dtype: DType, shape: tuple[int, int, int]) -> None:
    data, mask = sample(dtypes.i64 if dtype is dtypes.u64 else dtype, shape, seed=shape[1])
    plain = torch.where(mask, data, torch.ones((), dtype=data.dtype))
    data, plain = (cells.view(getattr(torch, dtype.torch)) for cells in (data, plain))
    names = {p.name for p in row.parameters}
    for params in ({"limit": None}, {"limit": 0}, {"limit": 2}, {"value": 0}, {"value": 1}):
        if not params.keys() <= names and params != {"limit": None}:
            continue
        planned = plan_of(
            row, data, **({"dim": 1} if "dim" in names else {}), **{k: v for k, v in params.items() if k in names}
        )
        assert choose(planned).backend.name == "cpu"
        for cells, own in ((data, mask), (plain, None), (plain, mask[:1].expand(shape)), (plain, mask[:, :1])):
            of = engine.run_with_indices if row.picks else engine.run
            with execution.using(backend="reference"):
                expected = of(planned, cells, own)
            assert_same_bits(of(planned, cells, own), expected, (shape, params))
            assert_same_bits(engine.run(planned, cells, own), expected[:2], (shape, params))


@pytest.mark.parametrize("name", ["cummax", "cummin"])
@pytest.mark.parametrize("dtype", [dtype for dtype in SERVED if dtype.is_float], ids=repr)
def test_running_extremes_of_special_cells(name: str, dtype: DType) -> None:
    """NaN stays, -0 and +0 are equal and the last one counts; a valid -inf is found among masked cells."""
    row = OPS[name]
    cells = torch.tensor([-math.inf, -0.0, 0.0, -0.0, math.inf, -1.0, -math.inf, math.nan, 5.0, math.nan])
    generator = torch.Generator().manual_seed(21)
    for n in (7, 40, 3000):
        data = cells[torch.randint(9 if n > 7 else 7, (5, n, 3), generator=generator)].to(getattr(torch, dtype.torch))
        mask = torch.rand(data.shape, generator=generator) < 0.6
        for given in (data, data.transpose(1, 2).contiguous().transpose(1, 2), data[:, :, :1]):
            planned, own = plan_of(row, given, dim=1), mask[:, :, : given.shape[2]]
            with execution.using(backend="reference"):
                expected = engine.run_with_indices(planned, given, own)
            assert_same_bits(engine.run_with_indices(planned, given, own), expected, n)


@pytest.mark.parametrize("row", [row for row in SLICED if row.picks], ids=lambda row: row.name)
def test_a_slice_that_a_kernel_refuses_is_the_references(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    data, mask = sample(dtypes.f32, (3, 40, 2), seed=22)
    planned = plan_of(row, data, dim=1)
    expected = engine.run_with_indices(planned, data, mask)
    monkeypatch.setattr("maskserve.backends.cpu.CpuBackend.fill", lambda *_: "refused")
    monkeypatch.setattr("maskserve.backends.cpu.CpuBackend.run", lambda *_: None)
    assert_same_bits(engine.run_with_indices(planned, data, mask), expected, row.name)


# -- running products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3000, 1), (5, 600, 3), (2, 1100, 40), (300, 7, 1), (1, 9000, 1)], ids=str)
@pytest.mark.parametrize("dtype", [dtypes.f64, dtypes.f32], ids=repr)
def test_running_products_leave_no_range_on_the_way(dtype: DType, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(23)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    rising = torch.where(torch.arange(shape[1]).view(1, -1, 1) < shape[1] // 2, 2.5, 0.4)
    special = torch.where(torch.rand(shape, generator=generator) < 0.001, 0.0, wide)
    special = torch.where(torch.rand(shape, generator=generator) < 0.001, math.inf, special)
    for cells in (wide, wide * rising * 1.8, wide * rising.flip(1) * 1.8, 2.0 ** (wide * 300), special):
        data = cells.to(getattr(torch, dtype.torch))
        for own in (mask, None):
            got, expected = both(OPS["cumprod"], data, own, dim=1, dtype=dtypes.f64)
            assert_same_bits(got, expected, shape)
    factors = (wide * rising * 1.8)[0, :, 0].tolist()
    values, _ = engine.run(plan_of(OPS["cumprod"], wide, dim=1), wide * rising * 1.8, None)
    product = mpmath.mpf(1)
    with mpmath.workprec(200):
        for factor, value in zip(factors, values[0, :, 0].tolist(), strict=True):
            product *= factor
            if mpmath.mpf("1e-290") < abs(product) < mpmath.mpf("1e308"):
                assert ulps_of(value, product) <= 2


@pytest.mark.parametrize("n", [3, 20, 700])
def test_running_products_of_integers_are_exact_or_an_error(n: int) -> None:
    data = torch.ones((4, n, 3), dtype=torch.int64)
    data[:, :2] = torch.tensor([2**62, -2]).view(1, 2, 1)
    assert_same_bits(*both(OPS["cumprod"], data, None, dim=1), n)
    data[2, -1, 1] = -1
    with pytest.raises(IntegerOverflowError):
        engine.run(plan_of(OPS["cumprod"], data, dim=1), data, None)
    mask = data > -1
    assert_same_bits(*both(OPS["cumprod"], data, mask, dim=1), n)


# -- exp and log ---------------------------------------------------------------------------------------------------


def ulps_of(value: float, exact: Any) -> float:
    """Distance from the exact value in units in the last place of a double."""
    return float(abs(mpmath.mpf(value) - exact) / mpmath.mpf(math.ulp(float(exact))))


def test_softmax_of_f64_is_within_two_ulps_down_to_subnormals() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([
        -torch.rand(400, generator=generator, dtype=torch.float64),
        -torch.rand(300, generator=generator, dtype=torch.float64) * 40,
        -torch.rand(300, generator=generator, dtype=torch.float64) * 745,
        torch.tensor([-745.0, -708.5, -1e-300, -5e-324, -0.5 * math.log(2), -math.log(2)], dtype=torch.float64),
    ])  # fmt: skip
    data = torch.stack([x, torch.zeros_like(x)], 1)
    values, _ = engine.run(plan_of(OPS["softmax"], data, dim=1), data, None)
    with mpmath.workprec(200):
        for cell, value in zip(x.tolist(), values[:, 0].tolist(), strict=True):
            raised = mpmath.exp(mpmath.mpf(cell))
            assert ulps_of(value, raised / (1 + raised)) <= 2, cell


def test_logsumexp_of_f64_is_within_two_ulps() -> None:
    generator = torch.Generator().manual_seed(2)
    data = torch.randn((300, 5), generator=generator, dtype=torch.float64) * 8 + 30
    values, _ = engine.run(plan_of(OPS["logsumexp"], data, dim=1), data, None)
    with mpmath.workprec(200):
        for cells, value in zip(data.tolist(), values.tolist(), strict=True):
            assert ulps_of(value, mpmath.log(sum(mpmath.exp(mpmath.mpf(c)) for c in cells))) <= 2, cells


@pytest.mark.parametrize("inner", [1, 3, 9])
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "far", "huge", "i64"])
def test_running_logsumexp_is_within_two_ulps(kind: str, inner: int) -> None:
    n = 5000
    generator = torch.Generator().manual_seed(24)
    data = torch.randn((1, n, inner), generator=generator, dtype=torch.float64)
    at = torch.arange(n, dtype=torch.float64).view(1, -1, 1)
    data = {
        "random": data * 8 + 30,
        "rising": data + at * 0.3,
        "falling": 5000 - at * 0.3 + data,
        "far": data * 400 + 9,
        "huge": 1e15 + (data * 8).round() / 8,
        "i64": (data * 8).long() + 90,
    }[kind]
    mask = torch.rand(data.shape, generator=generator) < 0.7
    values, _ = engine.run(plan_of(OPS["logcumsumexp"], data, dim=1), data, mask)
    near, _ = engine.run(plan_of(OPS["logcumsumexp"], data, dim=1, dtype=dtypes.f32), data, mask)
    with mpmath.workprec(160):
        total = mpmath.mpf(0)
        for at_row in range(n):
            if not mask[0, at_row, 0]:
                continue
            total += mpmath.exp(mpmath.mpf(data[0, at_row, 0].item()))
            if at_row % 50 < 3 and abs(exact := mpmath.log(total)) > 0.5:
                assert ulps_of(values[0, at_row, 0].item(), exact) <= 2, (kind, at_row)
                assert near[0, at_row, 0] == pytest.approx(float(exact), rel=2.0**-23)


def test_special_cells_of_a_running_logsumexp_are_torchs() -> None:
    inf, nan = math.inf, math.nan
    for cells in ([-inf, -inf, 1, 2], [-inf, inf, 1, -inf], [1, inf, 2000, -5], [3, nan, inf], [inf, nan, 1],
                  [-1e308, 1e308, 1.7e308, -1.7e308], [1e308, -1e308], [-0.0], [0.0, -inf], [2000, 3000, inf, 4000]):  # fmt: skip
        for dtype in (torch.float64, torch.float32):
            wide = torch.tensor(cells, dtype=torch.float64).view(1, -1, 1)
            data = torch.where(wide.isinf() | (dtype is torch.float64), wide, wide.clamp(-3e38, 3e38)).to(dtype)
            for given in (data, data.expand(1, -1, 9).contiguous(), torch.cat([data] * 40, 1)):
                values, _ = engine.run(plan_of(OPS["logcumsumexp"], given, dim=1), given, None)
                torch.testing.assert_close(values, torch.logcumsumexp(given, 1), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("row", [OPS["softmax"], OPS["log_softmax"]], ids=lambda row: row.name)
@pytest.mark.parametrize("shape", [(50, 33), (2, 9000)], ids=str)
def test_f32_normalizations_are_within_one_ulp_of_f64(row: Row, shape: tuple[int, int]) -> None:
    data = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 4
    values, _ = engine.run(plan_of(row, data, dim=1), data, None)
    exact = getattr(torch, row.name)(data.double(), 1)
    assert ulps(values, exact, torch.float32) <= 1


@pytest.mark.parametrize("cells", [[math.inf, 1], [-math.inf, -math.inf], [math.nan, 1], [-math.inf, 3], [800, -800]])
def test_special_cells_are_torchs(cells: list[float]) -> None:
    data = torch.tensor([cells], dtype=torch.float64)
    for name in ("softmax", "log_softmax", "logsumexp"):
        got, expected = both(OPS[name], data, None, dim=1)
        assert_agree(OPS[name], got, expected, name)
        assert torch.equal(got[0].isnan(), getattr(torch, name)(data, 1).isnan())


@pytest.mark.parametrize(
    "shape", [(5, 3, 1), (150, 64, 1), (40, 64, 3), (1, 700, 3), (1, 9000, 1), (2, 200, 70)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax", "softmin"])
def test_special_cells_spoil_no_other_slice_wherever_they_lie(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Largest cells are found with NaN passed over, and inf hides it: each has to come out as in the reference."""
    generator = torch.Generator().manual_seed(31)
    data = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.8
    lanes = data.transpose(1, 2).reshape(-1, shape[1])
    for k, cells in enumerate(
        ([math.inf, 1], [math.nan, 1], [math.inf, math.nan], [-math.nan, -math.inf], [20000, -20000])
    ):
        lanes[2 * k % len(lanes), [k % shape[1], -1 - k % shape[1]]] = torch.tensor(cells, dtype=dtype)
    lanes[-1] = -math.inf
    special = lanes.view(shape[0], shape[2], shape[1]).transpose(1, 2)
    for cells in (data, special.contiguous()):
        for valid in (None, mask, torch.zeros_like(mask)):
            got, expected = both(OPS[name], cells, valid, dim=1)
            assert_agree(OPS[name], got, expected, name)
            for strided in layouts(cells).values():
                again = engine.run(plan_of(OPS[name], strided, dim=1), strided, valid)
                assert_same_bits(again, got, name)


# -- finish: the back end's own, and the engine's, which is its meaning --------------------------------------------


@pytest.mark.parametrize(("row", "dtype"), FINISHED_PAIRS, ids=[f"{row.name}-{dtype}" for row, dtype in FINISHED_PAIRS])
def test_states_are_finished_as_the_engine_does(row: Reduction, dtype: DType) -> None:
    data, mask = sample(dtype, (40, 9, 3), seed=11)
    data, mask[:4] = tame(row, data, mask), False
    names = {p.name for p in row.parameters}
    for params in (
        {},
        {"min_count": 5},
        {"keepdim": True},
        {"correction": 3},
        {"dtype": dtypes.bf16},
        {"dtype": dtypes.f64},
    ):
        if not set(params) <= names or ("dtype" in params and row.name == "sum" and dtype is dtypes.boolean):
            continue
        plan = plan_of(row, data, dim=1, **params)
        state = engine.state(plan, data, mask)
        with execution.using(backend="reference"):
            expected = engine.finish(plan, state)
        assert_agree(row, engine.finish(plan, state), expected, params)


def test_a_finite_result_that_becomes_inf_is_warned_of() -> None:
    data = torch.full((3, 4), 6e4, dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="overflows"):
        values, _ = engine.run(plan_of(OPS["sum"], data, dim=1), data, None)
    assert values.isinf().all()


def test_one_warning_tells_of_all_blocks_that_overflow() -> None:
    data = torch.full((60, 65), 60, dtype=torch.int64)
    with execution.using(threads=4, block_cells=100), pytest.warns(RuntimeWarning, match="overflows f16") as said:
        engine.run(plan_of(OPS["cumprod"], data, dim=1, dtype=dtypes.f16), data, None)
    assert len(said) == 1


@pytest.mark.parametrize("name", ["median", "quantile"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_masked_result_overflows_nothing(name: str, backend: str) -> None:
    """Neither one of too few cells nor what lies under the mask."""
    data = torch.tensor([[1e30, 1e30], [3.0, 4.0]])
    params = {"dim": 1, "min_count": 2, "dtype": dtypes.f16, **({"q": 0.5} if name == "quantile" else {})}
    with execution.using(backend=backend):
        for mask in (torch.tensor([[True, False], [True, True]]), torch.tensor([[False, False], [True, True]])):
            values, valid = engine.run(plan_of(OPS[name], data, **params), data, mask)
            assert (values.tolist(), valid.tolist()) == ([0.0, 3.5], [False, True])


OMITS = [row for row in NATIVE if any(parameter.name == "nan" for parameter in row.parameters)]


@pytest.mark.parametrize("row", OMITS, ids=lambda row: row.name)
def test_whole_cells_without_a_mask_have_no_nan_to_omit(row: Row) -> None:
    """What memory happened to hold is not a mask."""
    for dtype in SERVED:
        data = torch.ones(5, 7, dtype=getattr(torch, dtype.torch))
        if dtype in row.accepts:
            wait = [torch.zeros(35, dtype=torch.bool) for _ in range(50)]
            del wait  # the next result lies where 0 was written
            assert_agree(row, *both(row, data, None, dim=1, nan="omit"), (row.name, dtype))


@every_dtype
def test_the_state_of_no_cells_has_the_dtypes_of_its_pass(dtype: DType) -> None:
    data = torch.ones(0, 3, dtype=getattr(torch, dtype.torch))
    for row in NATIVE:
        if not isinstance(row, Reduction) or not row.passes or dtype not in row.accepts:
            continue
        for params in NORMS if row.name == "norm" else [{}]:
            asked = plan_of(row, data, dim=0, **params)
            parts = engine.identity(asked, 3)
            declared = {part.name: getattr(torch, part.dtype.torch) for part in asked.passes[0].parts(asked.dtype)}
            assert {name: part.dtype for name, part in parts.items()} == declared, (row.name, params)


@pytest.mark.parametrize("ord", [2, *(params["ord"] for params in NORMS)])
def test_the_norm_of_no_cells_is_the_references(ord: float) -> None:
    data = torch.ones(0, 3, dtype=torch.float64)
    assert_same_bits(*both(OPS["norm"], data, None, dim=(0, 1), ord=ord, min_count=0), said=ord)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_results_are_rounded_once(kind: torch.dtype) -> None:
    """Doubles between, at and beside the middles of neighbours, subnormal ones too."""
    generator = torch.Generator().manual_seed(4)
    cells = torch.randn(4000, generator=generator).to(kind).double() * 2.0 ** torch.randint(-30, 12, (4000,)).double()
    near = cells * (1 + torch.finfo(kind).eps / 2)
    data = torch.cat([near, near.nextafter(cells), near.nextafter(2 * near), cells * torch.finfo(kind).tiny * 2.0**12])
    name = dtypes.BY_TORCH[str(kind)[6:]]
    got, expected = both(OPS["sum"], data[:, None], None, dim=1, dtype=name)
    assert_same_bits(got, expected, kind)
    got, expected = both(OPS["cumsum"], data[:, None], None, dim=1, dtype=name)
    assert_same_bits(got, expected, kind)


# -- states --------------------------------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e308, 5e-324)


def moments_of(n: int, seed: int) -> dict[str, Tensor]:
    """States of variances: some of no cells, some far apart, some not finite."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(0, 4, (n,), generator=generator) * torch.randint(0, 9, (n,), generator=generator) ** 5
    parts = {name: torch.randn(n, generator=generator, dtype=torch.float64) for name in ("mean", "low", "m2")}
    parts["mean"] *= 10.0 ** torch.randint(-9, 9, (n,), generator=generator)
    for part in parts.values():
        places = torch.randint(0, n, (n // 9,), generator=generator)
        part[places] = torch.tensor(SPECIAL, dtype=torch.float64)[places % len(SPECIAL)]
    return {"count": count, **{name: torch.where(count > 0, part, 0.0) for name, part in parts.items()}}


def bests_of(step: Pass, dtype: DType, n: int, seed: int) -> dict[str, Tensor]:
    """States of extremes: some of no cells, many alike, zeros of both signs, NaN and what is largest."""
    generator, cells = torch.Generator().manual_seed(seed), getattr(torch, dtype.torch)
    count = torch.randint(0, 3, (n,), generator=generator)
    best = torch.randint(-2 if cells.is_signed else 0, 2, (n,), generator=generator).to(cells)
    if dtype.is_float:
        signs = torch.rand(n, generator=generator) < 0.5
        special = torch.tensor(SPECIAL[:5], dtype=torch.float64)[torch.randint(0, 5, (n,), generator=generator)]
        best = torch.where(signs, special.to(cells), best)
    elif dtype is not dtypes.boolean:
        ends = torch.tensor([torch.iinfo(cells).min, torch.iinfo(cells).max], dtype=cells)
        best = torch.where(torch.rand(n, generator=generator) < 0.3, ends[count % 2], best)
    best = torch.where(count > 0, best, torch.tensor(kernel(step.reference).worst(cells), dtype=cells))
    at = {"at": torch.randint(0, 99, (n,), generator=generator)} if len(step.parts(dtype)) == 3 else {}
    return {"count": count, "best": best} | at


def merged(step: Pass, dtype: DType, *sides: dict[str, Tensor]) -> dict[str, Tensor]:
    merge = cpu.merge_kernel(step.name, dtype.name)
    assert merge is not None
    return merge(*sides)


def states_of(step: Pass, dtype: DType, n: int, seed: int) -> dict[str, Tensor]:
    return moments_of(n, seed) if step is passes.MOMENTS else bests_of(step, dtype, n, seed)


def dense(part: Tensor) -> Tensor:
    """The part with strides of its own: those of one cell may be any, and then torch views no bytes of it."""
    return part.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("step", sorted(cpu.MERGES, key=lambda step: step.name), ids=lambda step: step.name)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_states_are_merged_to_the_bits_of_the_reference(step: Pass, layout: str) -> None:
    apart = 2 if layout == "strided" else 1
    kinds = [dtypes.f64] if step is passes.MOMENTS else [dtypes.BY_NAME[name] for name in cpu.native().DTYPES]
    for (seed, dtype), shape in itertools.product(enumerate(kinds * 3), ((1,), (255,), (256,), (3, 257), (0, 2))):
        n = math.prod(shape)
        sides = [states_of(step, dtype, apart * max(n, 1), 2 * seed + i) for i in range(2)]
        sides = [{name: part[: apart * n : apart].view(shape) for name, part in side.items()} for side in sides]
        if layout == "strided":
            assert n <= 1 or not sides[0]["count"].is_contiguous()
        sides[1] = dict(reversed(sides[1].items()))  # as a file has them
        made = (merged(step, dtype, *sides), kernel(step.reference).merge(*sides))
        got, expected = ({name: dense(part) for name, part in one.items()} for one in made)
        assert list(got) == list(expected)
        for name, part in expected.items():
            assert got[name].shape == part.shape
            if part.is_floating_point():  # a NaN's payload is canonical once a state is finished
                assert torch.equal(got[name].isnan(), part.isnan())
                got[name], part = got[name].nan_to_num(nan=7.0), part.nan_to_num(nan=7.0)
            assert_same_bits((got[name],), (part,), (seed, dtype, name))


# -- instruction sets ----------------------------------------------------------------------------------------------


def print_bits() -> None:
    """The bits of every row on a few samples, for a process to compare with another's."""
    from maskserve.backends import _native

    print(_native.isa())
    for step in sorted(cpu.MERGES, key=lambda step: step.name):
        sides = (states_of(step, dtypes.f64, 999, seed) for seed in (1, 2))
        print("merged", step.name, [part.hex() for part in bits(*merged(step, dtypes.f64, *sides).values())])
    for row, dtype in ACCEPTED:
        for shape in ((99, 3, 1), (40, 64, 1), (2, 4100, 1), (3, 131, 3), (2, 131, 70)):
            data, mask = sample(dtype, shape, seed=3)
            values, valid = engine.run(plan_of(row, tame(row, data, mask), dim=1), tame(row, data, mask), mask)
            print(row.name, dtype, shape, [part.hex() for part in bits(values, valid)])


def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits_by_every_set("tests.test_native_passes")
