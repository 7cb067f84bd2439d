"""The native sums and counts have the bits of their definition, computed here cell by cell in plain numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from maskserve import dtypes
from maskserve.backends.cpu import CpuBackend
from maskserve.dtypes import DType
from maskserve.ops import OPS
from maskserve.plan import plan
from tests.instruction_sets import assert_same_bits_by_every_set

ROOT = Path(__file__).parent.parent
SERVED = sorted(dtypes.FLOATING | dtypes.INTEGRAL, key=lambda dtype: dtype.name)
SIZES = (0, 1, 2, 3, 15, 63, 64, 65, 127, 4095, 4096, 4097, 3 * 4096 + 1, 5 * 4096)
DOWN = 2.0**-128
Parts = dict[str, np.ndarray]

every_dtype = pytest.mark.parametrize("dtype", SERVED, ids=repr)


# -- the definition: a state is a small tuple of Python numbers, cells are absorbed one at a time ------------------


def two_sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    s = a[0] + b[0]
    bb = s - a[0]
    return s, (a[1] + b[1]) + ((a[0] - (s - bb)) + (b[0] - bb))


def halved(cells: list, leaf: int, zero, absorb):
    """Cell i absorbs cell i + h, for h = leaf/2 ... 1; `cells` is padded to the leaf with `zero`."""
    cells = cells + [zero] * (leaf - len(cells))
    h = leaf // 2
    while h:
        cells = [absorb(cells[i], cells[i + h]) for i in range(h)]
        h //= 2
    return cells[0]


def plain_leaf(cells: np.ndarray, leaf: int) -> tuple[float]:
    return (halved([float(c) for c in cells], leaf, 0.0, lambda a, b: a + b) + 0.0,)


def twofold_leaf(cells: np.ndarray, leaf: int) -> tuple[float, float, int]:
    hi, lo = halved([(float(c), 0.0) for c in cells], leaf, (0.0, 0.0), two_sum)
    if np.isfinite(hi) and np.isfinite(lo):
        return hi + 0.0, lo + 0.0, 0
    hi, lo = halved([(float(c) * DOWN, 0.0) for c in cells], leaf, (0.0, 0.0), two_sum)
    return hi + 0.0, (lo + 0.0 if np.isfinite(hi) else 0.0), 128


def twofold_join(a: tuple, b: tuple, least: int = 0) -> tuple[float, float, int]:
    exponent = max(a[2], b[2], least)
    a, b = (tuple(x * (DOWN if side[2] < exponent else 1.0) for x in side[:2]) for side in (a, b))
    hi, lo = two_sum(a, b)
    if exponent == 0 and not (np.isfinite(hi) and np.isfinite(lo)):
        return twofold_join((*a, 0), (*b, 0), least=128)
    return hi, (lo if np.isfinite(hi) else 0.0), exponent


def tree(states: list, join):
    """Neighbours in pairs, level by level; an odd last one passes up."""
    while len(states) > 1:
        pairs = [join(states[i], states[i + 1]) for i in range(0, len(states) - 1, 2)]
        states = pairs + states[len(pairs) * 2 :]
    return states[0]


def defined_slice(cells: np.ndarray, dtype: DType, leaf: int) -> tuple:
    """The parts beside the count of one slice, masked cells being 0 already."""
    if dtype.is_integral:
        total = sum(int(c) for c in cells)
        return total >> 32, total & 0xFFFFFFFF
    leaf_of, join = (twofold_leaf, twofold_join) if dtype is dtypes.f64 else (plain_leaf, lambda a, b: (a[0] + b[0],))
    states = [leaf_of(cells[i : i + leaf], leaf) for i in range(0, len(cells), leaf)]
    return tree(states, join) if states else ((0.0, 0.0, 0) if dtype is dtypes.f64 else (0.0,))


def part_names(dtype: DType) -> tuple[str, ...]:
    if dtype.is_integral:
        return "high", "low"
    return ("total", "low", "exponent") if dtype is dtypes.f64 else ("total",)


def wide(data: torch.Tensor) -> np.ndarray:
    """float32, float16 and bfloat16 as float64, others as they are."""
    return (data.double() if data.is_floating_point() else data).numpy()


def defined(data: torch.Tensor, mask: torch.Tensor | None, leaf: int) -> Parts:
    cells = wide(data)
    valid = np.ones(cells.shape, bool) if mask is None else mask.numpy()
    cells = np.where(valid, cells, np.zeros((), cells.dtype))
    dtype = dtype_of(data)
    outer, _, inner = cells.shape
    with np.errstate(all="ignore"):
        rows = [defined_slice(cells[o, :, i], dtype, leaf) for o in range(outer) for i in range(inner)]
    parts = {name: np.array([row[k] for row in rows]).reshape(outer, inner) for k, name in enumerate(part_names(dtype))}
    return {"count": valid.sum(1), **parts}


# -- samples ---------------------------------------------------------------------------------------------------------


def dtype_of(data: torch.Tensor) -> DType:
    return dtypes.BY_TORCH[str(data.dtype).removeprefix("torch.")]


def junk(dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        return torch.tensor([float("nan"), float("inf"), -float("inf"), limits.max, limits.min, limits.tiny]).to(dtype)
    if dtype is torch.bool:
        return torch.tensor([True])
    limits = torch.iinfo(dtype)
    return torch.tensor([limits.min, limits.max], dtype=dtype)


def sample(dtype: DType, shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of many magnitudes, subnormals and both zeros among them, junk under the mask; and the mask."""
    rng = np.random.default_rng(seed)
    kind = getattr(torch, dtype.torch)
    mask = torch.from_numpy(rng.random(shape) < 0.7)
    if dtype.is_float:
        data = torch.from_numpy(rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 12, shape)).to(kind)
        data[torch.from_numpy(rng.random(shape) < 0.05)] = -0.0
    elif kind is torch.bool:
        data = torch.from_numpy(rng.random(shape) < 0.5)
    else:
        limits = torch.iinfo(kind)
        data = torch.from_numpy(rng.integers(limits.min, limits.max, shape, dtype=np.int64, endpoint=True)).to(kind)
    hidden = junk(kind)
    data[~mask] = hidden[torch.from_numpy(rng.integers(0, len(hidden), int((~mask).sum())))]
    return data, mask


def leaf_of(inner: int) -> int:
    return 4096 if inner == 1 else 64


class Asked(SimpleNamespace):
    """As much of a plan as a lift reads."""

    __hash__ = object.__hash__


def lift(name: str, data: torch.Tensor, mask: torch.Tensor | None, leaf: int) -> Parts:
    passes = [SimpleNamespace(name=name)]
    dtype = dtype_of(data)
    plan = Asked(row=None, passes=passes, dtype=dtype, result=dtype, flipped=False, device="cpu", leaf=leaf, params={})
    return {part: tensor.numpy() for part, tensor in CpuBackend().lift(plan, data, mask).items()}


def assert_defined(data: torch.Tensor, mask: torch.Tensor | None, leaf: int | None = None, note: str = "") -> None:
    leaf = leaf or leaf_of(data.shape[2])
    got, wanted = lift("total", data, mask, leaf), defined(data, mask, leaf)
    assert list(got) == list(wanted), note
    for name, part in wanted.items():
        assert_same_bits(got[name], part, f"{note} {name} {dtype_of(data)} {tuple(data.shape)} {data.stride()}")
    assert_same_bits(lift("count", data, mask, leaf)["count"], wanted["count"], f"{note} count")


def assert_same_bits(got: np.ndarray, wanted: np.ndarray, note: str) -> None:
    """Equal bit for bit, every NaN being one NaN."""
    assert got.shape == wanted.shape, note
    if wanted.dtype == np.float64:
        got, wanted = (np.where(np.isnan(x), np.nan, x).view(np.int64) for x in (got, wanted))
    assert np.array_equal(got, wanted), note


# -- tests -----------------------------------------------------------------------------------------------------------


def test_the_extension_is_built() -> None:
    from maskserve.backends import _native

    assert _native.isa() in ("baseline", "avx2", "avx512")


@every_dtype
@pytest.mark.parametrize("n", SIZES)
def test_every_size_has_the_defined_bits(dtype: DType, n: int) -> None:
    wide_shapes = ((1, 1), (2, 1), (17, 1), (1, 2), (3, 3), (2, 17), (17, 2)) if n < 4000 else ((1, 1), (3, 1), (2, 3))
    for outer, inner in wide_shapes:
        data, mask = sample(dtype, (outer, n, inner), seed=n)
        assert_defined(data, mask, note="masked")
        assert_defined(torch.where(mask, data, torch.zeros((), dtype=data.dtype)), None, note="no mask")


@every_dtype
@pytest.mark.parametrize("n", [3, 65, 130])
@pytest.mark.parametrize("inner", [63, 64, 256, 300])
def test_many_columns_have_the_defined_bits(dtype: DType, n: int, inner: int) -> None:
    assert_defined(*sample(dtype, (2, n, inner), seed=inner))


@every_dtype
def test_many_short_rows_have_the_defined_bits(dtype: DType) -> None:
    for outer, n, inner in ((300, 3, 1), (290, 8, 1), (99, 64, 1), (99, 21, 1), (200, 3, 3), (40, 64, 3)):
        assert_defined(*sample(dtype, (outer, n, inner), seed=outer))


def layouts(cells: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same cells at other strides and addresses."""
    outer, n, inner = cells.shape
    padded = torch.zeros((outer, n + 3, inner + 2), dtype=cells.dtype)
    padded[:, :n, :inner] = cells
    every_second = torch.zeros((outer, 2 * n, 2 * inner), dtype=cells.dtype)
    every_second[:, ::2, ::2] = cells
    return {
        "dense": cells.contiguous(),
        "padded": padded[:, :n, :inner],
        "every second": every_second[:, ::2, ::2],
        "transposed": cells.transpose(1, 2).contiguous().transpose(1, 2),
        "outermost last": cells.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "unaligned": unaligned(cells),
    }


def unaligned(cells: torch.Tensor) -> torch.Tensor:
    """The same cells, one byte beyond an aligned address."""
    if cells.dtype is torch.bool:
        return torch.cat([torch.zeros(1, dtype=torch.bool), cells.flatten()])[1:].view(cells.shape)
    n_bytes = cells.numel() * cells.element_size()
    room = torch.zeros(n_bytes + 1, dtype=torch.uint8)
    room[1:] = cells.contiguous().flatten().view(torch.uint8)
    return torch.frombuffer(room.numpy().data, dtype=cells.dtype, offset=1).view(cells.shape)


@every_dtype
@pytest.mark.parametrize("shape", [(3, 130, 17), (17, 70, 1), (2, 3, 5), (5, 4100, 1), (1, 65, 300)], ids=str)
def test_strides_and_addresses_change_no_bit(dtype: DType, shape: tuple[int, int, int]) -> None:
    data, mask = sample(dtype, shape, seed=5)
    leaf = leaf_of(shape[2])
    wanted = defined(data, mask, leaf)
    masks = layouts(mask)
    for name, strided in layouts(data).items():
        for mask_name in {name, "dense", "every second"}:
            for part, values in lift("total", strided, masks[mask_name], leaf).items():
                assert_same_bits(values, wanted[part], f"{name} data, {mask_name} mask, {part}")
    for name, strided in masks.items():
        assert_same_bits(lift("count", data, strided, leaf)["count"], wanted["count"], f"count, {name}")


@every_dtype
@pytest.mark.parametrize("shape", [(3, 70, 5), (3, 70, 300), (4, 5000, 1), (5, 3, 1), (40, 3, 1), (5, 3, 4)], ids=str)
def test_a_broadcast_mask_is_the_mask_it_stands_for(dtype: DType, shape: tuple[int, int, int]) -> None:
    data, mask = sample(dtype, shape, seed=6)
    data[mask] = data.new_ones(())
    for dims in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        kept = tuple(1 if dim in dims else size for dim, size in enumerate(shape))
        small = torch.from_numpy(np.random.default_rng(7).random(kept) < 0.6)
        plain = torch.where(small, torch.ones((), dtype=data.dtype), data)
        assert_defined(plain, small.expand(shape), note=f"broadcast over {dims}")


@pytest.mark.parametrize(
    ("cells", "total"),
    [
        ([1e16, 1.0, -1e16], 1.0),
        ([1.7e308, 1.7e308, -1.7e308], 1.7e308),
        ([-1.7e308, -1.7e308, 1.7e308, 1.7e308], 0.0),
        ([float("inf"), 1.0], float("inf")),
        ([float("inf"), -float("inf")], float("nan")),
        ([float("nan"), 1.0], float("nan")),
        ([-0.0, -0.0], 0.0),
        ([5e-324, -5e-324, 5e-324], 5e-324),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [1, 64, 4096], ids=["in one leaf", "over short leaves", "over leaves"])
def test_f64_sums_are_carried_beyond_an_f64(cells: list[float], total: float, spread: int) -> None:
    data = torch.zeros((1, len(cells) * spread, 1), dtype=torch.float64)
    data[0, ::spread, 0] = torch.tensor(cells, dtype=torch.float64)
    assert_defined(data, None, leaf=64 if spread == 64 else 4096)
    parts = lift("total", data, None, 64 if spread == 64 else 4096)
    with np.errstate(all="ignore"):
        value = float(np.ldexp(parts["total"] + parts["low"], parts["exponent"].astype(np.int32))[0, 0])
    assert value == total or (np.isnan(value) and np.isnan(total))
    assert_defined(data.expand(1, -1, 3), None, leaf=64)
    assert_defined(data.expand(1, -1, 3).contiguous(), None, leaf=64)


def test_one_overflowing_column_leaves_its_neighbours_alone() -> None:
    data, mask = sample(dtypes.f64, (1, 5 * 64, 19), seed=8)
    data[0, ::3, 4], data[0, 5, 7], data[0, 70, 11] = 1.7e308, float("inf"), float("nan")
    data[0, 64:128, 13], data[0, 128:192, 13] = 1e307, -1e307
    mask[0, :, 13] = True
    assert_defined(data, mask)


@pytest.mark.parametrize("n", [1, 64, 4097])
def test_i64_sums_are_exact_beyond_an_i64(n: int) -> None:
    limits = torch.iinfo(torch.int64)
    for value in (limits.min, limits.max, -1):
        assert_defined(torch.full((2, n, 3), value), None)
        assert_defined(torch.full((2, n, 1), value), None)


def test_inputs_are_not_written_to() -> None:
    data, mask = sample(dtypes.f32, (3, 200, 5), seed=9)
    before = data.clone().view(torch.int32), mask.clone()
    lift("total", data, mask, 64)
    assert torch.equal(data.view(torch.int32), before[0])
    assert torch.equal(mask, before[1])


def test_no_results_are_no_work() -> None:
    for shape in ((0, 5, 3), (2, 5, 0), (0, 0, 0)):
        assert lift("total", torch.ones(shape), torch.ones(shape, dtype=torch.bool), 64)["total"].size == 0


def print_bits() -> None:
    """Every part of a few samples, for a process to compare with another's."""
    from maskserve.backends import _native

    print(_native.isa())
    for dtype in SERVED:
        for shape in ((2, 3 * 4096 + 1, 1), (40, 64, 1), (99, 3, 1), (3, 131, 3), (2, 131, 70), (2, 131, 300)):
            for name, part in lift("total", *sample(dtype, shape, seed=3), leaf_of(shape[2])).items():
                print(dtype, shape, name, part.tobytes().hex())


def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits_by_every_set("tests.test_native_sum")


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    program = "import sys; sys.path.insert(0, '.'); from maskserve.backends import cpu; print(cpu.missing())"
    ran = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "MASKSERVE_ISA": "sse9"}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "sse9" in ran.stdout
    assert "baseline" in ran.stdout


def test_the_back_end_states_its_limits() -> None:
    def why_not(op: str, dtype: DType, device: str = "cpu", **params: Any) -> str | None:
        return CpuBackend().why_not(plan(OPS[op], tuple(params.items()), (2, 3), dtype, device))

    assert why_not("sum", dtypes.f32) is None
    assert "cuda:0" in str(why_not("sum", dtypes.f32, "cuda:0"))
    assert "u64" in str(why_not("sum", dtypes.u64))
    assert "norm with this ord" in str(why_not("norm", dtypes.f32, ord=2.5))
    assert "weights of u16" in str(why_not("sum", dtypes.f32, weights=dtypes.u16))
