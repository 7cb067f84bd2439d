"""States of native kernels are merged and finished as the reference does it."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from maskserve import OPS, dtypes, engine, execution
from maskserve.backends import cpu
from maskserve.backends.reference import kernel
from maskserve.dtypes import DType
from maskserve.ops import passes
from maskserve.ops.rows import Pass, Reduction, Row
from tests.instruction_sets import assert_same_bits_by_every_set
from tests.samples import NATIVE, assert_same_bits, bits, plan_of
from tests.test_native_passes import ACCEPTED, FINISHED_PAIRS, NORMS, SERVED, assert_agree, both, every_dtype, tame
from tests.test_native_sum import sample


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
    drawn = cache(sample)  # drawing takes longer than all kernels
    for step in sorted(cpu.MERGES, key=lambda step: step.name):
        sides = (states_of(step, dtypes.f64, 999, seed) for seed in (1, 2))
        print("merged", step.name, [part.hex() for part in bits(*merged(step, dtypes.f64, *sides).values())])
    for row, dtype in ACCEPTED:
        for shape in ((99, 3, 1), (40, 64, 1), (2, 4100, 1), (3, 131, 3), (2, 131, 70)):
            data, mask = drawn(dtype, shape, seed=3)
            values, valid = engine.run(plan_of(row, tame(row, data, mask), dim=1), tame(row, data, mask), mask)
            print(row.name, dtype, shape, [part.hex() for part in bits(values, valid)])


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits_by_every_set("tests.test_native_states")
