"""Samples for the laws: cells of every dtype, with junk under every mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskserve import OPS, dtypes, engine
from maskserve.dtypes import DType
from maskserve.ops.rows import Elementwise, Normalization, Reduction, Row, Scan
from maskserve.plan import Plan, plan

SIZES = (1, 2, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 1)
"""Slices within, at and beyond a leaf, of 64 and of 4,096 cells."""

REDUCTIONS = [row for row in OPS.values() if isinstance(row, Reduction)]
MERGEABLE = [row for row in REDUCTIONS if row.passes]
SLICED = [row for row in OPS.values() if isinstance(row, Reduction | Normalization | Scan)]
ELEMENTWISE = [row for row in OPS.values() if isinstance(row, Elementwise)]


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


def cells(dtype: DType, shape: tuple[int, ...], seed: int, share: float = 0.7) -> Masked:
    """Random cells, a `share` of them valid; small enough that no sum of them overflows its dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    mask = torch.rand(shape, generator=generator) < share
    if dtype is dtypes.boolean:
        return Masked(seed, wide > 0, mask)
    if dtype is dtypes.u8:
        wide = wide.abs()
    return Masked(seed, wide.to(torch_dtype(dtype)), mask)


def junk(dtype: DType) -> list[Any]:
    """What may lie under a mask: NaN, infinities, the dtype's extremes."""
    if dtype is dtypes.boolean:
        return [False, True]
    if dtype.is_float:
        info = torch.finfo(torch_dtype(dtype))
        return [math.nan, math.inf, -math.inf, info.max, info.min, -0.0]
    whole = torch.iinfo(torch_dtype(dtype))
    return [whole.min, whole.max, 0]


def poisoned(sample: Masked) -> Iterator[Tensor]:
    """The data with each kind of junk under the mask."""
    name = str(sample.data.dtype).removeprefix("torch.")
    for poison in junk(dtypes.BY_TORCH[name]):
        data = sample.data.clone()
        data[~sample.mask] = poison
        yield data


def plan_of(row: Row, data: Tensor, **params: Any) -> Plan:
    """The plan of a sliced row on the CPU."""
    assert isinstance(row, Reduction | Normalization | Scan)
    dtype = dtypes.BY_TORCH[str(data.dtype).removeprefix("torch.")]
    return plan(row, tuple(params.items()), tuple(data.shape), dtype, "cpu")


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
