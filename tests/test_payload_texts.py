"""Cells as texts: those that Python and numpy write, however they come about."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maskserve.dtypes import DType, boolean, f16, f32, f64
from maskserve.payload.format import Output
from maskserve.payload.texts import PIECE_CELLS, numbers_of, texts_of

N = 2 * PIECE_CELLS + 3


def cells_of(dtype: DType) -> np.ndarray:
    """Every bit pattern is as likely as another; then ordinary numbers, borders of what is written plainly, and no numbers."""
    chance = np.random.default_rng(7)
    wild = chance.integers(0, 256, N * dtype.n_bytes, np.uint8).view(dtype.torch)
    tame = chance.normal(size=N) * 10.0 ** chance.integers(-6, 9, N)
    borders = [1e-5, 1e-4, 1.1e-4, 123456.0, 999999.0, 1e6, 2.0**24, 9e15, 1e16, -0.0, math.nan, math.inf, -math.inf]
    with np.errstate(all="ignore"):
        return np.concatenate([wild, tame.astype(dtype.torch), np.array(borders).astype(dtype.torch)])


def expected(cell: np.floating) -> str:
    return str(cell) if np.isfinite(cell) else {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}[str(cell)]


@pytest.mark.parametrize("dtype", [f64, f32, f16], ids=lambda dtype: dtype.name)
def test_floats_are_the_shortest_texts_and_masked_cells_null(dtype: DType) -> None:
    cells = cells_of(dtype)
    valid = np.random.default_rng(8).random(len(cells)) > 0.3
    mask = Output("mask", boolean, cells.shape, valid.tobytes())
    whole = [expected(cell) for cell in cells]
    assert list(texts_of(dtype, cells.shape, cells.tobytes(), None)) == whole
    masked = [text if is_valid else "null" for text, is_valid in zip(whole, valid, strict=True)]
    assert list(texts_of(dtype, cells.shape, cells.tobytes(), mask)) == masked
    finite = [str(cell) if np.isfinite(cell) else "null" for cell in cells]
    assert list(numbers_of(dtype, cells.tobytes())) == finite


def test_no_cells_give_no_text() -> None:
    assert list(texts_of(f32, (0, 3), b"", None)) == []
