"""Samples for comparisons with other people's code, slice by slice: cells with many ties, junk under the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import maskserve as ms

inf, nan = math.inf, math.nan
f16, f32, f64 = torch.float16, torch.float32, torch.float64

Array = np.ndarray[Any, Any]
SHAPES = ((40, 7), (7, 40), (200, 3))
DTYPES = (f64, f32, f16, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
WIDE = (torch.uint64,)
"""The range of cells that int64 cannot hold is refused."""
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUNDING = {f32: 2e-7, f16: 1e-3}


def t(values: Any, dtype: torch.dtype = f64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[ms.MaskedTensor, Array, Array]:
    """(tensor with junk under its mask, cells with many ties, mask): a row and a column fully masked, ints at their ends."""
    generator = np.random.default_rng(seed)
    cells = torch.from_numpy(generator.integers(0, 9, shape)).to(dtype)
    mask = torch.from_numpy(generator.random(shape) < 0.7)
    mask[0], mask[:, 0] = False, False
    under = torch.from_numpy(generator.integers(0, 120, shape))
    junk = torch.full(shape, nan).to(dtype) if dtype.is_floating_point else under.to(dtype)
    at = cells.numpy() if dtype is not torch.uint64 else cells.numpy() + np.uint64(2**63 - 4)
    own = torch.from_numpy(np.where(mask.numpy(), at, junk.numpy()))
    return ms.masked_tensor(own, mask), at, mask.numpy()


def lanes(cells: Array, mask: Array, dim: int) -> Iterator[tuple[tuple[Any, ...], Array, Array]]:
    """(index of a slice, its valid cells, where they stand)."""
    for i in range(cells.shape[1 - dim]):
        at = (slice(None), i) if dim == 0 else (i, slice(None))
        yield at, cells[at][mask[at]], np.flatnonzero(mask[at])


def every_sample(dtype: torch.dtype) -> Iterator[tuple[ms.MaskedTensor, Array, Array, int]]:
    for seed, shape in enumerate(SHAPES):
        for dim in (0, 1):
            yield (*drawn(shape, dtype, seed), dim)


def of(result: ms.MaskedTensor, at: Any) -> Any:
    return result.tolist()[at[0] if isinstance(at[1], slice) else at[1]]


def lane(result: ms.MaskedTensor, at: tuple[Any, ...]) -> list[Any]:
    """One slice of a result of the data's shape, None where masked."""
    cells = np.array(result.tolist(), dtype=object)[at]
    assert isinstance(cells, np.ndarray)
    return list(cells)


def parts(result: Any) -> tuple[Any, ...]:
    """A result alone, or its values and indices."""
    return tuple(result) if isinstance(result, tuple) else (result,)
