"""Cells and masks of a payload as numpy arrays, in slices: what `info`, `head`, `validate` and `convert` look at. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from maskserve.dtypes import DType, boolean
from maskserve.errors import MaskDtypeError, MaskError, PayloadError
from maskserve.payload.cells import CODE_TYPE, NAN_CODE, decoded
from maskserve.payload.format import Buffer, Payload
from maskserve.payload.header import Shape, TensorInfo, shown
from maskserve.payload.variables import MaskKind, MaskSource, Variable

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BLOCK_CELLS = 1 << 20


@dataclass(slots=True, kw_only=True)
class Counts:
    """What the cells of a variable are; NaN and inf are counted among the valid ones."""

    valid: int = 0
    masked: int = 0
    nan: int = 0
    inf: int = 0


def stored(buffer: Buffer, dtype: DType) -> Array:
    """The cells of `buffer` as they are stored; a float that numpy lacks stays a code until `numbers` widens it."""
    import numpy as np

    return np.frombuffer(buffer, CODE_TYPE[dtype.n_bytes] if dtype in NAN_CODE else dtype.torch)


def numbers(cells: Array, dtype: DType) -> Array:
    """`cells` as numbers that numpy computes with."""
    return decoded(cells, dtype) if dtype in NAN_CODE else cells


def blocks(payload: Payload, variable: Variable) -> Iterator[tuple[Array, Array | None]]:
    """(cells, valid) of a variable in row-major order, flat and a slice at a time; valid is None where all are.

    Of a sparse variable they are the stored ones.
    """
    info = variable.info if variable.stored is None else variable.stored.values
    valid = None if variable.mask is None else validity(payload, info, variable.mask)
    for start in range(0, info.n_cells, BLOCK_CELLS):
        n = min(BLOCK_CELLS, info.n_cells - start)
        yield cells_at(payload, info, start, n), None if valid is None else valid(start, n)


def cells_at(payload: Payload, info: TensorInfo, start: int, n: int) -> Array:
    """`n` cells from the flat index `start` on; those of a BOOL tensor are bytes 0 and 1."""
    width = info.dtype.n_bytes
    buffer = payload.read_range(info.name, start * width, n * width)
    if info.dtype is boolean:
        refuse_other_bytes(info, buffer)
    return stored(buffer, info.dtype)


Validity: TypeAlias = "Callable[[int, int], Array]"


def validity(payload: Payload, of: TensorInfo, mask: MaskSource) -> Validity:
    """Which of `n` cells from a flat index on are valid, as a function of both."""
    match mask.kind:
        case MaskKind.LENGTHS:
            return _spread(_from_lengths(payload, of, mask.info), of.shape, inverted=False)
        case MaskKind.BITMASK:
            return _bits(payload, of, mask)
        case MaskKind.BOOL if mask.info.shape == of.shape:
            return lambda start, n: _checked(payload, mask.info, start, n) != (mask.means == "missing")
        case MaskKind.BOOL:
            whole = _checked(payload, mask.info, 0, mask.info.n_cells).reshape(mask.info.shape)
            return _spread(whole, of.shape, inverted=mask.means == "missing")


def _checked(payload: Payload, info: TensorInfo, start: int, n: int) -> Array:
    import numpy as np

    buffer = payload.read_range(info.name, start, n)
    refuse_other_bytes(info, buffer)
    return np.frombuffer(buffer, np.bool_)


def _spread(whole: Array, shape: Shape, *, inverted: bool) -> Validity:
    import numpy as np

    cells = np.broadcast_to(whole, shape).flat  # a flat index into the view: the mask is never made full size
    return lambda start, n: np.asarray(cells[start : start + n]) != inverted


def _from_lengths(payload: Payload, of: TensorInfo, info: TensorInfo) -> Array:
    """(B,) lengths of a (B, T, D) tensor -> (B, T, 1)."""
    import numpy as np

    _check_lengths(payload, of, info)
    lengths = stored(payload.read(info.name), info.dtype).reshape(info.shape)
    dim = lengths.ndim
    n = of.shape[dim]
    valid = np.arange(n) < lengths[..., None]
    return valid.reshape(*valid.shape, *(1 for _ in of.shape[dim + 1 :]))


def _bits(payload: Payload, of: TensorInfo, mask: MaskSource) -> Validity:
    import numpy as np

    n_row, row_bytes = of.shape[-1], mask.info.shape[-1]

    def valid(start: int, n: int) -> Array:
        first, last = start // n_row, -(-(start + n) // n_row)
        packed = payload.read_range(mask.info.name, first * row_bytes, (last - first) * row_bytes)
        bytes_of = np.frombuffer(packed, np.uint8).reshape(last - first, row_bytes)
        rows = np.unpackbits(bytes_of, axis=-1, count=n_row, bitorder="little").reshape(-1)
        chosen: Array = rows[start - first * n_row :][:n].view(np.bool_)
        return ~chosen if mask.means == "missing" else chosen

    return valid


def counted(payload: Payload, variable: Variable, tick: Callable[[int], None]) -> Counts:
    """How many cells are valid, masked, NaN and infinite; `tick` hears of each slice's bytes."""
    import numpy as np

    counts = Counts()
    for cells, valid in blocks(payload, variable):
        n_valid = cells.size if valid is None else int(np.count_nonzero(valid))
        counts.valid += n_valid
        counts.masked += cells.size - n_valid
        if variable.info.dtype.is_float:
            values = numbers(cells if valid is None else cells[valid], variable.info.dtype)
            counts.nan += int(np.count_nonzero(np.isnan(values)))
            counts.inf += int(np.count_nonzero(np.isinf(values)))
        tick(cells.nbytes)
    if variable.stored is not None:
        counts.masked += variable.info.n_cells - variable.stored.values.n_cells
    return counts


def check(payload: Payload, variable: Variable) -> None:
    """Raise where a byte of the variable or of its mask is not what its dtype says; floats and bits may be anything."""
    if variable.stored is not None:
        from maskserve.payload.tensors import load_sparse  # torch, which no other check needs

        load_sparse(payload, variable)
    elif variable.info.dtype is boolean:
        _check_bools(payload, variable.info)
    if variable.mask is not None and variable.mask.kind is MaskKind.BOOL:
        _check_bools(payload, variable.mask.info)
    if variable.mask is not None and variable.mask.kind is MaskKind.LENGTHS:
        _check_lengths(payload, variable.info, variable.mask.info)


def _check_bools(payload: Payload, info: TensorInfo) -> None:
    for start in range(0, info.n_bytes, BLOCK_CELLS):
        refuse_other_bytes(info, payload.read_range(info.name, start, min(BLOCK_CELLS, info.n_bytes - start)))


def refuse_other_bytes(info: TensorInfo, buffer: Buffer) -> None:
    """Raise where bools are more than 0 and 1; translate looks at a byte in a nanosecond, without numpy."""
    if bytes(buffer).translate(None, b"\0\1"):
        kind = PayloadError if info.dtype is boolean else MaskDtypeError
        raise kind(f"{shown(info.name)} holds bytes other than 0 and 1; write it as bool", parameter=shown(info.name))


def _check_lengths(payload: Payload, of: TensorInfo, info: TensorInfo) -> None:
    lengths = payload.read(info.name).cast("B").cast("q" if info.dtype.n_bytes == 8 else "i")
    n = of.shape[len(info.shape)]
    if len(lengths) and not 0 <= min(lengths) <= max(lengths) <= n:
        raise MaskError(
            f"{shown(info.name)} holds a length outside 0 to {n}, the size of that dim of {shown(of.name)}",
            parameter=shown(info.name),
        )
