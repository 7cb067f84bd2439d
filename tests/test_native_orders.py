"""Native selection and order: the reference's bits for every parameter, whatever cells repeat, and for slices of any length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import maskserve as ms
from maskserve import OPS, dtypes, engine, execution
from maskserve.backends import choose
from maskserve.dtypes import DType
from maskserve.errors import ParameterError
from maskserve.ops.rows import Row
from tests.instruction_sets import assert_same_bits_by_every_set
from tests.samples import assert_same_bits, bits, junk, plan_of
from tests.test_native_passes import SERVED, both
from tests.test_native_sum import sample

METHODS = ("average", "min", "max", "dense", "ordinal")
INTERPOLATIONS = ("linear", "lower", "higher", "midpoint", "nearest")
SHARES: tuple[Any, ...] = (0.3, 1, (0.0, 0.25, 0.77, 1.0))
ORDERS: list[tuple[Row, dict[str, Any]]] = [
    *((OPS["quantile"], {"q": q, "interpolation": how}) for q in SHARES for how in INTERPOLATIONS),
    *((OPS["rank"], {"method": method}) for method in METHODS),
    *((OPS[name], {"descending": descending}) for name in ("sort", "argsort") for descending in (False, True)),
    *((OPS["topk"], {"k": k, "largest": largest}) for k in (1, 3, 40) for largest in (False, True)),
    *((OPS[name], {}) for name in ("median", "mode", "count_distinct")),
]
every_order = pytest.mark.parametrize(
    ("row", "params"), ORDERS, ids=[" ".join([row.name, *map(str, params.values())]) for row, params in ORDERS]
)
LONG = [(row, params) for row, params in ORDERS if row.name in ("median", "quantile")][2::3]


def settled(row: Row, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of -0 and +0 either may be the middle one."""
    return (given[0] + 0.0, given[1]) if row.name == "median" else given


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_topk_of_a_tensor_without_dims_gives_its_cell(backend: str) -> None:
    """As in torch for k = 0 too: a result without dims has one cell. More than one was written beyond the result."""
    with execution.using(backend=backend):
        for k in (0, 1):
            values, indices = ms.topk(ms.masked_tensor(torch.tensor(5.0)), k)
            assert (values.item(), indices.item()) == (5.0, 0)
            values, indices = ms.topk(ms.masked_tensor(torch.tensor(5.0), torch.tensor(False)), k)
            assert (values.tolist(), indices.tolist()) == (None, None)
        for k in (2, 100_000):
            with pytest.raises(ParameterError, match="give at most 1"):
                ms.topk(ms.masked_tensor(torch.tensor(5.0)), k)


def assert_agree(row: Row, params: dict[str, Any], data: Tensor, mask: Tensor | None, said: object) -> None:
    size = data.shape[1]
    got, expected = both(row, data, mask, dim=1, **(params | ({"k": min(params["k"], size)} if "k" in params else {})))
    assert_same_bits(settled(row, got), settled(row, expected), (row.name, params, said))


def repeated(dtype: DType, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Few values, again and again: both zeros, infinities and limits among the valid cells and the masked ones, no NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = [0, 1, 2, 5, *(v for v in junk(dtype) if v == v)]
    kinds = torch.tensor(values, dtype=torch.float64 if dtype.is_float else torch.int64).to(getattr(torch, dtype.torch))
    mask = torch.rand(shape, generator=generator) < 0.7
    return kinds[torch.randint(len(values), shape, generator=generator)], mask


def in_accepted(rows: list[tuple[Row, dict[str, Any]]], dtype: DType) -> Iterator[tuple[Row, dict[str, Any]]]:
    return ((row, params) for row, params in rows if dtype in row.accepts)


@pytest.mark.parametrize("dtype", SERVED, ids=repr)
@pytest.mark.parametrize(
    "shape", [(60, 3, 1), (9, 40, 1), (5, 96, 3), (5, 97, 3), (3, 700, 1), (2, 9000, 1), (2, 70, 300)], ids=str
)
def test_every_parameter_of_every_order_is_the_references(dtype: DType, shape: tuple[int, int, int]) -> None:
    for row, params in in_accepted(ORDERS, dtype):
        for name, (data, mask) in {
            "spread": sample(dtype, shape, seed=7),
            "repeated": repeated(dtype, shape, 8),
        }.items():
            assert_agree(row, params, data, mask, name)
            assert_agree(row, params, torch.where(mask, data, torch.ones_like(data)), None, (name, "no mask"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_smallest_integer_in_the_last_place_is_not_taken_for_a_masked_cell(backend: str) -> None:
    for limit, largest in ((-(2**31), True), (2**31 - 1, False)):
        data = torch.tensor([[7, 9, limit]], dtype=torch.int32)
        with execution.using(backend=backend):
            values, _ = engine.run(plan_of(OPS["topk"], data, dim=1, largest=largest), data, data == limit)
        assert values.item() == limit


@pytest.mark.parametrize("dtype", [d for d in SERVED if d.is_float], ids=repr)
@pytest.mark.parametrize("n", [3, 70, 900])
@every_order
def test_nan_infinities_and_empty_slices(row: Row, params: dict[str, Any], n: int, dtype: DType) -> None:
    data, mask = repeated(dtype, (12, n, 2), 9)
    data[0], data[1, 0], data[2, -1], mask[3], mask[4] = math.nan, math.nan, -math.nan, False, False
    mask[4, n // 2], data[5], data[6], data[7] = True, -math.inf, math.inf, -0.0
    data[8, ::2], data[8, 1::2] = -0.0, 0.0
    assert_agree(row, params, data, mask, n)
    assert_agree(row, params, data, None, n)


def long_slices(n: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(10)
    spread = torch.randn(n, generator=generator)
    mask = torch.rand(n, generator=generator) < 0.7
    yield "spread", spread, mask
    yield "spread, no mask", spread, None
    yield "in order", spread.sort().values, mask
    yield "constant", torch.full((n,), 2.5), mask
    yield "two values", (spread > 0).float(), mask
    yield "mostly zero", torch.where(spread > 1.5, spread, 0.0), mask
    yield "one far away", torch.where(torch.arange(n) == n - 1, 1e30, -spread.abs()), None
    yield "a NaN", torch.where(torch.arange(n) == n // 2, math.nan, spread), None
    yield "NaN under the mask", torch.where(mask, spread, math.nan), mask
    yield "few valid", spread, torch.arange(n) % 10007 == 5
    yield "one valid", spread, torch.arange(n) == n - 3
    yield "none valid", spread, torch.zeros(n, dtype=torch.bool)
    yield "bytes", (spread * 20).to(torch.int8), mask
    yield "halves", spread.half(), mask
    yield "doubles", spread.double() * 1e300, mask
    yield "large integers", (spread * 100).long() + 2**62, mask
    yield "every integer", torch.arange(n), mask


@pytest.mark.parametrize(("row", "params"), LONG, ids=[str(params) for _, params in LONG])
def test_long_slices_are_searched_block_by_block(row: Row, params: dict[str, Any]) -> None:
    for name, data, mask in long_slices(70_001):
        expected = None
        for threads, block_cells in ((1, 1 << 13), (3, 1 << 15), (2, None)):
            with execution.using(threads=threads, block_cells=block_cells):
                line = None if mask is None else mask[None]
                assert_agree(row, params, data[None], line, (name, threads, block_cells))
                plan = plan_of(row, data, dim=0, **params)
                found = engine.run(plan, data, mask)
            assert_same_bits(found, found if expected is None else expected, name)
            expected = found


def test_long_slices_side_by_side_and_apart() -> None:
    data, mask = sample(dtypes.f32, (2, 9000, 11), seed=11)
    with execution.using(block_cells=1 << 13):
        for row, params in LONG[:3]:
            assert_agree(row, params, data, mask, "side by side")
            moved = data.permute(0, 2, 1).contiguous().permute(0, 2, 1)
            assert_agree(row, params, moved, mask[:, :, :1].expand(mask.shape), "one after the other")
            apart = plan_of(row, data, dim=(0, 2), **params)
            got = engine.run(apart, data, mask)
            with execution.using(backend="reference"):
                assert_same_bits(settled(row, got), settled(row, engine.run(apart, data, mask)), "apart")


def test_nan_policies_hold_in_a_search() -> None:
    data = torch.randn(70_001, generator=torch.Generator().manual_seed(12))
    data[::3] = math.nan
    for row, params in LONG[:3]:
        with execution.using(block_cells=1 << 13):
            assert_agree(row, params | {"nan": "omit"}, data[None], None, "omit")


@every_order
def test_the_cpu_back_end_serves_every_order(row: Row, params: dict[str, Any]) -> None:
    for dtype in SERVED:
        if dtype in row.accepts:
            assert (
                choose(
                    plan_of(row, torch.zeros(50, 50, dtype=getattr(torch, dtype.torch)), dim=1, **params)
                ).backend.name
                == "cpu"
            )


def print_bits() -> None:
    """The bits of every order on a few samples, for a process to compare with another's."""
    from maskserve.backends import _native

    print(_native.isa())
    drawn = cache(sample)  # drawing takes longer than all kernels
    for dtype in SERVED:
        for row, params in in_accepted(ORDERS, dtype):
            for shape in ((99, 40, 1), (2, 4100, 1), (3, 131, 3)):
                data, mask = drawn(dtype, shape, seed=3)
                found = engine.run(plan_of(row, data, dim=1, **params), data, mask)
                print(row.name, params, dtype, shape, [part.hex() for part in bits(*found)])
    for name, data, mask in long_slices(70_001):
        with execution.using(block_cells=1 << 13):
            for row, params in LONG:
                found = engine.run(plan_of(row, data, dim=0, **params), data, mask)
                print(name, row.name, params, [part.hex() for part in bits(*found)])


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits_by_every_set("tests.test_native_orders")
