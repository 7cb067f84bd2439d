"""Slices that are normalized by their states: what a kernel gives that sees them whole, cut into blocks in any way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from maskserve import OPS, dtypes, engine, execution
from maskserve.dtypes import DType
from maskserve.ops.rows import Normalization
from tests.samples import assert_same_bits, bits, plan_of, ulps
from tests.test_native_passes import NORMS, SERVED, both, tame
from tests.test_native_special_cells import ulps_of
from tests.test_native_sum import layouts, sample

LONG = 64
SHAPES = (
    (3, LONG + 1, 1),
    (2, 4097, 1),
    (1, 9000, 1),
    (70, 65, 1),
    (3, 130, 17),
    (2, 131, 256),
    (1, 200, 300),
    (1, 4200, 3),
)
"""Slices beyond LONG: of one leaf and of several, side by side and one after the other."""
EXACT = [
    *((OPS["normalize"], {"ord": ord}) for ord in (2, *(norm["ord"] for norm in NORMS if norm["ord"] != 3))),
    *((OPS["standardize"], {"correction": correction}) for correction in (0, 1, 3)),
]
"""Rows of + - * / and square roots, whose bits are the reference's."""
WITH_EXP = [OPS[name] for name in ("softmax", "log_softmax", "softmin")]
NORMALIZATIONS = [row for row in OPS.values() if isinstance(row, Normalization)]
BLOCKS: tuple[dict[str, int], ...] = (
    {"block_cells": 100, "threads": 1},
    {"block_cells": 5000, "threads": 3},
    {"block_cells": 1 << 22, "threads": 2},
)

MOST_ULPS = {torch.float64: 6}
"""Of rows with exp; 1 where results are rounded to less. Each level of the tree of states raises and rounds once more."""

EVERY_SHAPE = (dtypes.f32, dtypes.f64)
CASES = [
    pytest.param(dtype, shape, id=f"{dtype}-{shape}")
    for dtype in SERVED
    for shape in (SHAPES if dtype in EVERY_SHAPE else SHAPES[::3])
]
every_case = pytest.mark.parametrize(("dtype", "shape"), CASES)
every_normalization = pytest.mark.parametrize("row", NORMALIZATIONS, ids=lambda row: row.name)
every_row_with_exp = pytest.mark.parametrize("row", WITH_EXP, ids=lambda row: row.name)


@pytest.fixture(autouse=True)
def short_long_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long slices, and tensors that are cut into blocks, at sizes that tests can have many of."""
    monkeypatch.setattr(engine, "LONG", LONG)
    monkeypatch.setattr(engine, "SMALL", LONG)
    monkeypatch.setattr(execution, "SMALL", LONG)


def whole(row: Normalization, data: Tensor, mask: Tensor | None, **params: Any) -> tuple[Tensor, Tensor]:
    """By a kernel that sees whole slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LONG", data.shape[1])
        return engine.run(plan_of(row, data, dim=1, **params), data, mask)


def by_state(row: Normalization, data: Tensor, mask: Tensor | None, **params: Any) -> tuple[Tensor, Tensor]:
    """By states, the same whatever the blocks are."""
    assert data.shape[1] > engine.LONG
    plan = plan_of(row, data, dim=1, **params)
    result = engine.run(plan, data, mask)
    for how in BLOCKS:
        with execution.using(block_cells=how["block_cells"], threads=how["threads"]):
            assert_same_bits(engine.run(plan, data, mask), result, how)
    return result


def masks(mask: Tensor, dtype: DType) -> list[Tensor | None]:
    """No mask, one of each cell, those that are broadcast along one dim or more, and one of nothing.

    f32 and f64 meet every kind; each other dtype meets the first two, and two of the rest in turn.
    """
    kinds = [mask[:1], mask[:, :1], mask[:, :, :1], mask[:1, :, :1], mask[:, :1, :1], torch.zeros_like(mask)]
    at = 2 * SERVED.index(dtype)
    return [None, mask, *(kinds if dtype in EVERY_SHAPE else (kinds[at % 6], kinds[(at + 1) % 6]))]


@pytest.mark.filterwarnings("ignore:normalize. a finite result overflows")
@every_case
@pytest.mark.parametrize(("row", "params"), EXACT, ids=[f"{row.name}-{params}" for row, params in EXACT])
def test_rows_without_exp_have_the_bits_of_the_reference_and_of_whole_slices(
    row: Normalization, params: dict[str, Any], dtype: DType, shape: tuple[int, int, int]
) -> None:
    data, mask = sample(dtype, shape, seed=shape[1])
    data = tame(row, data, mask)
    for own in masks(mask, dtype):
        got, expected = both(row, data, own, dim=1, **params)
        assert_same_bits(got, expected, None if own is None else own.shape)
        assert_same_bits(got, whole(row, data, own, **params), None if own is None else own.shape)


@pytest.mark.filterwarnings("ignore:log_softmax. a finite result overflows")
@every_case
@every_row_with_exp
def test_rows_with_exp_are_what_whole_slices_give(
    row: Normalization, dtype: DType, shape: tuple[int, int, int]
) -> None:
    data, mask = sample(dtype, shape, seed=shape[1] + 1)
    for own in masks(mask, dtype):
        got, expected = by_state(row, data, own), whole(row, data, own)
        assert_same_bits((got[1],), (expected[1],))
        kind = got[0].dtype
        if row.name == "log_softmax":  # a result close to 0 loses what its logarithm loses
            spread = expected[0].double().abs().nan_to_num(0, 0, 0).max().clamp(min=1)
            difference = (got[0].double() - expected[0].double()).nan_to_num(0, 0, 0).abs().max()
            assert float(difference / spread) <= torch.finfo(kind).eps * 2
        else:
            assert ulps(*(values[0].nan_to_num(-1) for values in (got, expected)), kind) <= MOST_ULPS.get(kind, 1)


@pytest.mark.parametrize("kind", [torch.float64, torch.int32], ids=str)
@every_row_with_exp
def test_rows_with_exp_are_within_four_ulps_of_exact_values(row: Normalization, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    data = (torch.randn((2, 150, 2), generator=generator, dtype=torch.float64) * 20).to(kind)
    mask = torch.rand((2, 150, 2), generator=generator) < 0.7
    values, valid = by_state(row, data, mask)
    assert torch.equal(valid, mask)
    assert not values[~mask].any()
    with mpmath.workprec(200):
        for o, c in itertools.product(range(2), range(2)):
            kept = mask[o, :, c]
            cells = [mpmath.mpf(cell) * (-1 if row.negates else 1) for cell in data[o, kept, c].tolist()]
            total = mpmath.fsum(mpmath.exp(cell) for cell in cells)
            for cell, value in zip(cells, values[o, kept, c].tolist(), strict=True):
                if row.name != "log_softmax":
                    assert ulps_of(value, mpmath.exp(cell) / total) <= 4
                else:  # a result close to 0 loses what its logarithm loses
                    exact = cell - mpmath.log(total)
                    assert abs(value - exact) <= 2 * math.ulp(max(abs(value), 1.0))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_row_with_exp
def test_short_dtypes_are_rounded_from_exact_values(row: Normalization, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    data = (torch.randn((2, 9000, 1), generator=generator).abs() * 4).to(kind)
    mask = torch.rand((2, 9000, 1), generator=generator) < 0.7
    values, valid = by_state(row, data, mask)
    of: Callable[[Tensor, int], Tensor] = torch.log_softmax if row.name == "log_softmax" else torch.softmax
    wide = (-data.double() if row.negates else data.double()).masked_fill(~mask, -math.inf)
    assert torch.equal(valid, mask)
    assert ulps(values[mask], of(wide, 1)[mask], kind) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@every_normalization
def test_strides_and_addresses_change_no_bit(row: Normalization, dtype: torch.dtype) -> None:
    for shape in ((3, 130, 17), (70, 66, 1), (2, 4100, 1), (1, 65, 300)):
        data, mask = sample(dtypes.BY_TORCH[str(dtype)[6:]], shape, seed=5)
        data = tame(row, data, mask)
        expected = by_state(row, data, mask)
        for name, strided in layouts(data).items():
            for lay, own in layouts(mask).items():
                got = engine.run(plan_of(row, strided, dim=1), strided, own)
                assert_same_bits(got, expected, (name, lay, shape))


@pytest.mark.parametrize("inner", [1, pytest.param(3, marks=pytest.mark.slow), 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_normalization
def test_special_cells_spoil_their_own_slice_and_no_other(row: Normalization, dtype: torch.dtype, inner: int) -> None:
    generator = torch.Generator().manual_seed(31)
    lanes = torch.randn((12 * inner, 300), generator=generator).to(dtype)
    mask = torch.rand(lanes.shape, generator=generator) < 0.8
    specials = ([math.inf, 1], [math.nan, 1], [math.inf, math.nan], [-math.inf, 3], [20000, -20000])
    for k, cells in enumerate(specials):
        lanes[2 * k, [7 * k, -1 - 7 * k]] = torch.tensor(cells, dtype=dtype)
    lanes[-1] = -math.inf
    mask[3], mask[5], mask[5, 17] = False, False, True
    data, own = (of.view(12, inner, 300).transpose(1, 2).contiguous() for of in (lanes, mask))
    for valid in (None, own):
        got, expected = by_state(row, data, valid), whole(row, data, valid)
        assert_same_bits((got[1], got[0].isnan()), (expected[1], expected[0].isnan()))
        got, expected = ((values.nan_to_num(7), of) for values, of in (got, expected))
        assert ulps(got[0], expected[0], dtype) <= MOST_ULPS.get(dtype, 1)
        assert not got[0][~got[1]].any()
        if row.passes[0].exact_bits:
            assert_same_bits(got, expected)


@every_normalization
def test_a_slice_without_enough_cells_is_masked_beside_others(row: Normalization) -> None:
    data = torch.randn((4, 100, 3), generator=torch.Generator().manual_seed(6))
    mask = torch.rand((4, 100, 3), generator=torch.Generator().manual_seed(7)) < 0.5
    mask[1, :, 2] = False
    mask[2, :, 0], mask[2, 99, 0] = False, True
    values, valid = by_state(row, data, mask)
    needs = row.needs(plan_of(row, data, dim=1).params) if row.needs else 0
    assert torch.equal(valid, mask & (mask.sum(1, keepdim=True) > needs))
    assert not valid[1, :, 2].any()
    assert bool(valid[2, 99, 0]) is (row.name != "standardize")
    assert not values[~valid].any()


@every_normalization
@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_that_is_omitted_is_masked(row: Normalization, masked: bool) -> None:
    data = torch.randn((3, 5000, 1), generator=torch.Generator().manual_seed(8))
    data[0, ::7], data[1] = math.nan, math.nan
    mask = torch.rand((3, 5000, 1), generator=torch.Generator().manual_seed(9)) < 0.9
    numbers = mask & ~data.isnan() if masked else ~data.isnan()
    got = by_state(row, data, mask if masked else None, nan="omit")
    assert_same_bits(got, by_state(row, data, numbers))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_warning_tells_of_all_blocks_that_overflow(backend: str) -> None:
    data = torch.full((2, 9000, 1), 6e4, dtype=torch.float16)
    data[:, 5] = 1e-3
    plan = plan_of(OPS["normalize"], data, dim=1, ord=-math.inf)
    how = execution.using(threads=3, block_cells=4096, backend=backend)
    with how, pytest.warns(RuntimeWarning, match="overflows f16") as said:
        values, _ = engine.run(plan, data, None)
    assert values.isinf().sum() == 2 * 8999
    assert (len(said) == 1) is (backend == "cpu")  # the reference tells of each block


@every_normalization
@pytest.mark.parametrize("shape", [(0, 100, 3), (3, 100, 0), (2, 0, 5)], ids=str)
def test_a_tensor_of_no_cells_stays_one(row: Normalization, shape: tuple[int, int, int]) -> None:
    for backend in ("cpu", "reference"):
        with execution.using(backend=backend):
            data = torch.ones(shape)
            values, valid = engine.run(plan_of(row, data, dim=1), data, data > 0)
            assert (values.shape, valid.shape, values.dtype) == (data.shape, data.shape, torch.float32)


def test_what_is_given_is_not_written_to() -> None:
    for row in NORMALIZATIONS:
        data, mask = sample(dtypes.f32, (2, 5000, 1), seed=10)
        before = bits(data, mask)
        by_state(row, data, mask)
        assert bits(data, mask) == before, row.name
