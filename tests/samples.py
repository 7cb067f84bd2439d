"""Samples for the laws: cells of every dtype, with junk under every mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskserve import OPS, dtypes, engine
from maskserve.backends.cpu import CpuBackend
from maskserve.backends.reference.cells import BITS
from maskserve.dtypes import DType
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Elementwise, Loss, Move, Normalization, Reduction, Row, Scan
from maskserve.plan import Plan, plan

SIZES = (1, 2, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 1)
"""Slices within, at and beyond a leaf, of 64 and of 4,096 cells."""

REDUCTIONS = [row for row in OPS.values() if isinstance(row, Reduction)]
MERGEABLE = [row for row in REDUCTIONS if row.passes and not row.picks]
SLICED = [row for row in OPS.values() if isinstance(row, Reduction | Normalization | Scan)]
ELEMENTWISE = [row for row in OPS.values() if isinstance(row, Elementwise)]
MOVES = [row for row in OPS.values() if isinstance(row, Move)]

NEEDED = {Type.NUMBERS: (0.25, 0.7), Type.CELL: 1, Type.COUNT: 1}
"""A value for each parameter that has no default, dims apart."""
PRODUCTS = ("prod", "cumprod")


def needed(row: Row) -> dict[str, Any]:
    """The parameters without which a row does not run."""
    return {p.name: NEEDED[p.type] for p in row.parameters if p.default is REQUIRED and p.type in NEEDED}


@dataclass(frozen=True)
class Masked:
    """Data and mask; `seed` is in the repr, so that a failure names it."""

    seed: int
    data: Tensor
    mask: Tensor

    def __repr__(self) -> str:
        return f"seed {self.seed}: {self.data.dtype} {tuple(self.data.shape)}, {int(self.mask.sum())} valid"


def torch_dtype(dtype: DType) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.torch)
    return found


def cells(dtype: DType, shape: tuple[int, ...], seed: int, share: float = 0.7, *, row: Row | None = None) -> Masked:
    """Random cells, a `share` of them valid; small enough that no sum of them overflows its dtype, nor the row's product."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    if row is not None and row.name in PRODUCTS:
        wide = (wide * 0.003).exp() if dtype.is_float else wide.sign()
    mask = torch.rand(shape, generator=generator) < share
    if dtype is dtypes.boolean:
        return Masked(seed, wide > 0, mask)
    if dtype.kind is dtypes.Kind.UINT:
        wide = wide.abs()
    if dtype in dtypes.COMPLEX:
        return Masked(seed, torch.complex(wide, wide.flip(0)).to(torch_dtype(dtype)), mask)
    return Masked(seed, wide.to(torch_dtype(dtype)), mask)


def junk(dtype: DType) -> list[Any]:
    """What may lie under a mask: NaN, infinities, the dtype's extremes."""
    if dtype is dtypes.boolean:
        return [False, True]
    if dtype in dtypes.COMPLEX:
        return [complex(math.nan, math.inf), complex(-math.inf, 0.0), complex(0.0, math.nan)]
    if dtype.is_float:
        info = torch.finfo(torch_dtype(dtype))
        return [math.nan, math.inf, -math.inf, info.max, info.min, -0.0]
    whole = torch.iinfo(torch_dtype(dtype))
    return [whole.min, whole.max, 0]


def poisoned(sample: Masked) -> Iterator[Tensor]:
    """The data with each kind of junk under the mask."""
    name = str(sample.data.dtype).removeprefix("torch.")
    for poison in junk(dtypes.BY_TORCH[name]):
        if sample.data.is_complex():
            yield torch.where(sample.mask, sample.data, torch.tensor(poison, dtype=sample.data.dtype))
            continue
        exact = torch.uint64 if sample.data.dtype is torch.uint64 else torch.int64
        filler = torch.tensor(poison, dtype=exact if type(poison) is int else torch.float64).to(sample.data.dtype)
        yield torch.where(sample.mask, as_bits(sample.data), as_bits(filler)).view(sample.data.dtype)


def with_junk(sample: Masked) -> Masked:
    """The sample with one kind of junk under its mask."""
    kinds = list(poisoned(sample))
    return Masked(sample.seed, kinds[sample.seed % len(kinds)], sample.mask)


def as_bits(data: Tensor) -> Tensor:
    """The cells as signed integers: torch moves no others of every dtype."""
    return data.view(BITS[data.element_size()])


def plan_of(row: Row, data: Tensor, **params: Any) -> Plan:
    """The plan of a sliced row on the CPU."""
    assert isinstance(row, Reduction | Normalization | Scan)
    dtype = dtypes.BY_TORCH[str(data.dtype).removeprefix("torch.")]
    return plan(row, tuple((needed(row) | params).items()), tuple(data.shape), dtype, "cpu")


def run(row: Row, data: Tensor, mask: Tensor | None = None, **params: Any) -> tuple[Tensor, Tensor]:
    """(values, mask) of a sliced row."""
    return engine.run(plan_of(row, data, **params), data, mask)


def bits(*tensors: Tensor) -> list[bytes]:
    return [t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], said: object = "") -> None:
    assert [t.shape for t in got] == [t.shape for t in expected], said
    assert bits(*got) == bits(*expected), f"{said}: {got} is not {expected}"


def ulps(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest distance in units in the last place of `dtype` at the expected value; NaN equals NaN."""
    a, b = got.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    step = torch.maximum(
        2.0 ** torch.floor(torch.log2(b.abs().clamp(min=tiny))) * eps, torch.tensor(tiny * eps).double()
    )
    return float(torch.where(same, 0.0, (a - b).abs() / step).max()) if a.numel() else 0.0


def served(row: Row) -> bool:
    """Whether the native kernels compute the row."""
    data = torch.zeros(2, 3)
    return "dim" in {p.name for p in row.parameters} and CpuBackend().why_not(plan_of(row, data, dim=1)) is None


NATIVE = [row for row in SLICED if served(row)]


class Forged:
    """What is unpickled as this call, which no tensor of ours wrote."""

    def __init__(self, call: Any, *parts: Any) -> None:
        self.call, self.parts = call, parts

    def __reduce__(self) -> Any:
        return self.call, self.parts


def beside_input(row: Loss, shape: tuple[int, ...]) -> list[Tensor]:
    """The other operands of a loss whose input has this shape, its classes along dim 1: cells from 0 to 1, or classes."""
    if len(row.operands) == 2 and row.samples:
        return [torch.randint(0, shape[1], shape[:1] + shape[2:])]
    others = [torch.rand(shape) for _ in row.operands[1:]]
    return [*others[:-1], torch.ones(shape[:-1])] if row.samples and row.operands[-1] == "target" else others
