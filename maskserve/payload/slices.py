"""Cells and masks of a payload as numpy arrays, in slices: what `info`, `head`, `validate` and `convert` look at. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
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
FEW_BYTES = 1 << 22
"""Masks and side inputs up to this size are read once, and not again for each window."""
FEW_ROWS = 4
"""Rows that are looked at one by one: of more, the ends that were not asked for are few beside the rest."""
MOST_AROUND = 4
"""How many times the cells asked for may be read around them."""


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
    """Which of `n` cells from a flat index on are valid, as a function of both; what is small is read once, the rest there."""
    match mask.kind:
        case MaskKind.LENGTHS:
            dim = len(mask.info.shape)
            rows = _once(partial(_lengths, payload, of, mask.info), mask.info)
            own = (*of.shape[: dim + 1], *(1 for _ in of.shape[dim + 1 :]))
            return partial(_spread, partial(_prefixes, rows, of.shape[dim]), own, of.shape)
        case MaskKind.BITMASK:
            return _bits(payload, of, mask)
        case MaskKind.BOOL if mask.info.shape == of.shape:
            return partial(_bools, payload, mask)
        case MaskKind.BOOL:
            return partial(_spread, _once(partial(_bools, payload, mask), mask.info), mask.info.shape, of.shape)


def _once(read: Validity, info: TensorInfo) -> Validity:
    """What reads the cells of a tensor, or has them where they are few."""
    if info.n_bytes > FEW_BYTES:
        return read
    whole = read(0, info.n_cells)
    return lambda start, n: whole[start : start + n]


def _bools(payload: Payload, mask: MaskSource, start: int, n: int) -> Array:
    import numpy as np

    buffer = payload.read_range(mask.info.name, start, n)
    refuse_other_bytes(mask.info, buffer)
    valid: Array = np.frombuffer(buffer, np.bool_)
    return ~valid if mask.means == "missing" else valid


def _lengths(payload: Payload, of: TensorInfo, info: TensorInfo, start: int, n: int) -> Array:
    """`n` lengths from a flat index on, none of them beyond the dim that they count along."""
    width, size = info.dtype.n_bytes, of.shape[len(info.shape)]
    lengths = stored(payload.read_range(info.name, start * width, n * width), info.dtype)
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= size:
        raise MaskError(
            f"{shown(info.name)} holds a length outside 0 to {size}, the size of dim {len(info.shape)} of {shown(of.name)}",
            parameter=shown(info.name),
        )
    return lengths


def _prefixes(rows: Validity, size: int, start: int, n: int) -> Array:
    """`n` cells of rows of which the first ones are valid, as many as `rows` says of each."""
    import numpy as np

    first, last = start // size, -(-(start + n) // size)
    lengths = rows(first, last - first)
    if last - first > FEW_ROWS:
        whole: Array = np.arange(size) < lengths[:, None]
        return whole.reshape(-1)[start - first * size :][:n]
    valid = np.zeros(n, np.bool_)
    for row, length in enumerate(lengths.tolist(), first):
        begin = row * size - start  # before 0 where the row began earlier
        valid[max(begin, 0) : max(begin + length, 0)] = True
    return valid


def _spread(core: Validity, own: Shape, shape: Shape, start: int, n: int) -> Array:
    """`n` cells of a mask of shape `own`, broadcast to `shape`; `core` gives the mask's own cells."""
    import numpy as np

    if not n:
        return np.empty(0, np.bool_)
    split = len(shape)
    while split and own[split - 1] == 1:
        split -= 1
    together = prod(shape[split:])
    first, last = start // together, -(-(start + n) // together)
    units = _units(core, own[:split], shape[:split], first, last - first)
    if together == 1:
        return units
    if last - first > FEW_ROWS:
        return np.broadcast_to(units[:, None], (last - first, together)).reshape(-1)[start - first * together :][:n]
    counts = np.full(last - first, together)
    counts[0] -= start - first * together
    counts[-1] -= last * together - (start + n)
    return np.repeat(units, counts)


def _units(core: Validity, own: Shape, shape: Shape, start: int, n: int) -> Array:
    """As `_spread`, of dims of which the last is not broadcast."""
    import numpy as np

    period = prod(own)
    split = next((dim for dim, size in enumerate(own) if size > 1), len(own))
    if own[split:] == shape[split:]:  # the same over and over: a map that is masked alike at all times
        at = start % period
        if at + n <= period:
            return core(at, n)
        if n > period:
            return np.tile(core(0, period), -(-(at + n) // period))[at : at + n]
        return np.concatenate([core(at, period - at), core(0, at + n - period)])
    index = _index(own, shape, np.arange(start, start + n))
    low, high = int(index.min()), int(index.max())
    if high - low < max(MOST_AROUND * n, FEW_BYTES):
        found: Array = core(low, high - low + 1)[index - low]
        return found
    half = n // 2  # they lie around a place where the mask begins anew: the halves lie closer together
    return np.concatenate([_units(core, own, shape, start, half), _units(core, own, shape, start + half, n - half)])


def _index(own: Shape, shape: Shape, places: Array) -> Array:
    """Where in a tensor of shape `own` the cells stand that its broadcast to `shape` has at flat places."""
    import numpy as np

    index, rest, stride = np.zeros_like(places), prod(shape), prod(own)
    for size, mine in zip(shape, own, strict=True):
        rest //= size
        stride //= mine
        if mine > 1:
            index += places // rest % size * stride
    return index


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
        lengths = variable.mask.info
        for start in range(0, lengths.n_cells, BLOCK_CELLS):
            _lengths(payload, variable.info, lengths, start, min(BLOCK_CELLS, lengths.n_cells - start))


def _check_bools(payload: Payload, info: TensorInfo) -> None:
    for start in range(0, info.n_bytes, BLOCK_CELLS):
        refuse_other_bytes(info, payload.read_range(info.name, start, min(BLOCK_CELLS, info.n_bytes - start)))


def refuse_other_bytes(info: TensorInfo, buffer: Buffer) -> None:
    """Raise where bools are more than 0 and 1; translate looks at a byte in a nanosecond, without numpy."""
    if bytes(buffer).translate(None, b"\0\1"):
        kind = PayloadError if info.dtype is boolean else MaskDtypeError
        raise kind(f"{shown(info.name)} holds bytes other than 0 and 1; write it as bool", parameter=shown(info.name))
