"""The native kernels beside the sums: the reference's bits, or within ulps where there is an exp or a log."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskserve import OPS, dtypes, engine, execution
from maskserve.backends import choose
from maskserve.dtypes import DType
from maskserve.errors import IntegerOverflowError
from maskserve.ops.rows import Reduction, Row
from tests.samples import NATIVE, PRODUCTS, assert_same_bits, plan_of, ulps
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
