"""Cells that are taken from elsewhere, and running products, by native kernels: the reference's bits."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from maskserve import OPS, dtypes, engine, execution
from maskserve.backends import choose
from maskserve.backends.cpu import CpuBackend
from maskserve.dtypes import DType
from maskserve.errors import IntegerOverflowError
from maskserve.ops.rows import Reach, Row, Scan
from tests.samples import SLICED, assert_same_bits, plan_of
from tests.test_native_passes import SERVED, SHAPES, both
from tests.test_native_special_cells import ulps_of
from tests.test_native_sum import sample


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
