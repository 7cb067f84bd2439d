"""Cells as JSON spells them, to the bytes of a dtype; texts.py goes the other way. Imports no torch.

The floats that numpy lacks (bf16, fp8) go through a table of their values: the codes of positive floats are in order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from maskserve.dtypes import DType, bf16, boolean, f8_e4m3, f8_e5m2, f16, f32, f64
from maskserve.errors import PayloadError
from maskserve.payload.header import Shape, shown

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

EXACT_IN_DOUBLE = 2**53
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class Cells:
    """The bytes of a tensor and, where a cell is masked, of its mask; a masked cell is 0."""

    dtype: DType
    shape: Shape
    data: bytes
    valid: bytes | None


def cells_of(name: str, values: Sequence[object], dtype: DType, shape: Shape) -> Cells:
    """`values`, as JSON spells them, in `dtype`; one that the dtype cannot hold is an error, not another value."""
    import numpy as np

    valid = None
    if any(value is None for value in values):
        valid = np.array([value is not None for value in values], np.bool_).tobytes()
    if dtype is boolean:
        return Cells(dtype, shape, bytes(_bool(name, value) for value in values), valid)
    if dtype.is_float:
        wide = np.array([_float(name, value) for value in values], np.float64)
        return Cells(dtype, shape, _rounded(name, wide, dtype), valid)
    return Cells(dtype, shape, _ints(name, values, dtype), valid)


def _bool(name: str, value: object) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    return _fail(name, "is BOOL and must hold true, false or null")


def _float(name: str, value: object) -> float:
    if value is None:
        return 0.0
    if isinstance(value, str):
        return NOT_FINITE[value] if value in NOT_FINITE else float(_whole(name, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(name, "must hold numbers or null")
    try:
        wide = float(value)
    except OverflowError:
        wide = math.inf
    if math.isinf(wide):
        _fail(name, 'holds a number beyond F64; infinity is the string "Infinity"')
    return wide


def _ints(name: str, values: Sequence[object], dtype: DType) -> bytes:
    import numpy as np

    whole = [_int(name, value) for value in values]
    bounds = np.iinfo(dtype.torch)
    if whole and not bounds.min <= min(whole) <= max(whole) <= bounds.max:
        _fail(name, f"holds a number outside {dtype.code}, {bounds.min} to {bounds.max}; F64 may hold it")
    return np.array(whole, dtype.torch).tobytes()


def _int(name: str, value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, str):
        return _whole(name, value)
    if type(value) is not int:
        _fail(name, "holds whole numbers only: write no fraction, exponent, true or false")
    return value


def _whole(name: str, text: str) -> int:
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= 20 and int(digits) >= EXACT_IN_DOUBLE:
        return int(text)
    return _fail(
        name,
        f"holds the string {shown(text, 40)}: only NaN, Infinity, -Infinity and whole numbers beyond 2^53 are strings",
    )


def _rounded(name: str, wide: Array, dtype: DType) -> bytes:
    """`wide` rounded once to `dtype`, to the nearest, ties to even; what rounds to infinity does not fit."""
    import numpy as np

    if dtype in (f64, f32, f16):
        with np.errstate(over="ignore", under="ignore"):
            cells = wide.astype(dtype.torch)
        lost: Array = np.isinf(cells) & ~np.isinf(wide)
    else:
        cells, lost = codes_of(wide, dtype)
    if lost.any():
        _fail(name, f"holds a number beyond {dtype.code}")
    return cells.tobytes()


def codes_of(wide: Array, dtype: DType) -> tuple[Array, Array]:
    """The nearest code of each value, and where there is none."""
    import numpy as np

    table = _positive(dtype)
    size = np.abs(wide)
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    below = above - 1
    up, down = table[above] - size, size - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    over = size - (table[-1] + (table[-1] - table[-2]) / 2)
    lost = np.isfinite(wide) & ((over > 0) | ((over == 0) & (len(table) % 2 == 0)))  # a tie goes to the even code
    code = np.where(np.isinf(wide), len(table), code)
    if dtype is f8_e4m3:
        lost |= np.isinf(wide)  # it has no infinity
    code |= np.signbit(wide).astype(np.int64) << (dtype.n_bytes * 8 - 1)
    code = np.where(np.isnan(wide), NAN_CODE[dtype], code)
    return code.astype(CODE_TYPE[dtype.n_bytes]), lost


NAN_CODE = {bf16: 0x7FC0, f8_e5m2: 0x7E, f8_e4m3: 0x7F}
CODE_TYPE = {1: "<u1", 2: "<u2"}
_N_FINITE = {bf16: 0x7F80, f8_e5m2: 0x7C, f8_e4m3: 0x7F}


@functools.cache
def _positive(dtype: DType) -> Array:
    """The finite values from 0 up, by code, in float64."""
    import numpy as np

    return decoded(np.arange(_N_FINITE[dtype]), dtype)


def decoded(codes: Array, dtype: DType) -> Array:
    import numpy as np

    if dtype is bf16:
        return (codes.astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype is f8_e5m2:
        return (codes.astype("<u2") << 8).view("<f2").astype(np.float64)
    codes = codes.astype(np.int64)  # in uint8, exponent - 7 would wrap
    exponent, fraction = (codes >> 3) & 15, (codes & 7) / 8.0
    size = np.where(exponent == 0, np.ldexp(fraction, -6), np.ldexp(1 + fraction, exponent - 7))
    size = np.where(codes & 127 == 127, np.nan, size)
    return np.where(codes & 128, -size, size)


def _fail(name: str, what: str) -> NoReturn:
    raise PayloadError(f"tensor {shown(name)} {what}", parameter=shown(name))
