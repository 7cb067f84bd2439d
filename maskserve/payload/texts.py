"""The bytes of cells as the texts that JSON holds, floats as the shortest that reads back alike. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from maskserve.dtypes import DType, boolean, f32, f64
from maskserve.payload.cells import CODE_TYPE, EXACT_IN_DOUBLE, NAN_CODE, codes_of, decoded
from maskserve.payload.header import Shape

if TYPE_CHECKING:
    from maskserve.payload.cells import Array
    from maskserve.payload.format import Output

PIECE_CELLS = 4096
PLAIN_FROM = 1.1e-4
PLAIN_TO = {f32: 9.9e5, f64: 9e15}
"""Between these sizes orjson writes a float as Python does, and ten times as fast; beyond, exponents look different."""


def texts_of(dtype: DType, shape: Shape, data: Any, mask: Output | None) -> Iterator[str]:
    """The cells in row-major order as JSON: masked ones as null, floats as the shortest text that reads back alike."""
    import numpy as np

    cells = np.frombuffer(data, CODE_TYPE[dtype.n_bytes] if dtype in NAN_CODE else dtype.torch)
    if mask is None:
        return _texts(dtype, cells, None, spelled)
    valid = np.frombuffer(mask.chunks, np.bool_).reshape(mask.shape)  # type: ignore[arg-type]  # one buffer by now
    return _texts(dtype, cells, np.broadcast_to(valid, shape).reshape(-1), spelled)


def numbers_of(dtype: DType, data: Any) -> Iterator[str]:
    """The cells as JSON's numbers, of any size; what is none is null."""
    import numpy as np

    cells = np.frombuffer(data, dtype.torch)
    if dtype.is_float or dtype is boolean:
        return _texts(dtype, cells, None, lambda _: "null")
    pieces = (cells[start : start + PIECE_CELLS].tolist() for start in range(0, len(cells), PIECE_CELLS))
    return map(str, chain.from_iterable(pieces))


def _texts(dtype: DType, cells: Array, valid: Array | None, other: Callable[[float], str]) -> Iterator[str]:
    """The texts of `cells`; those that are not finite by `other`."""
    import numpy as np

    write = _writer(dtype, cells, other)
    for start in range(0, len(cells), PIECE_CELLS):
        span = slice(start, start + PIECE_CELLS)
        if valid is None:
            yield from write(cells[span])
            continue
        texts = write(np.where(valid[span], cells[span], cells.dtype.type(0)))
        for at in np.flatnonzero(~valid[span]):
            texts[at] = "null"
        yield from texts


def _writer(dtype: DType, cells: Array, other: Callable[[float], str]) -> Callable[[Array], list[str]]:
    """What writes a piece of `cells`."""
    import numpy as np

    if dtype is boolean:
        return lambda piece: ["true" if cell else "false" for cell in piece.tolist()]
    if not dtype.is_float:
        return lambda piece: [
            str(cell) if -EXACT_IN_DOUBLE <= cell <= EXACT_IN_DOUBLE else f'"{cell}"' for cell in piece.tolist()
        ]
    if dtype in NAN_CODE:
        codes = _shortest(np.unique(cells), dtype)
        return lambda piece: [codes.get(code, "0.0") for code in piece.tolist()]  # 0 stands for a masked cell

    def spell(cell: Any) -> str:
        if not math.isfinite(cell):
            return other(float(cell))
        return repr(float(cell)) if dtype is f64 else str(cell)

    if dtype in PLAIN_TO:
        return lambda piece: _floats(piece, PLAIN_TO[dtype], spell)
    return lambda piece: list(map(spell, piece))


def _floats(cells: Array, plain_to: float, spell: Callable[[Any], str]) -> list[str]:
    import numpy as np
    import orjson

    size = np.abs(cells)
    is_plain = (size < plain_to) & ((size >= PLAIN_FROM) | (size == 0))
    texts = orjson.dumps(cells, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
    for at in np.flatnonzero(~is_plain):
        texts[at] = spell(cells[at])
    return texts


def _shortest(codes: Array, dtype: DType) -> dict[int, str]:
    """For each code the text with the fewest digits whose nearest value in `dtype` is that code's."""
    import numpy as np

    values = decoded(codes, dtype)
    texts = {int(code): spelled(float(value)) for code, value in zip(codes, values, strict=True)}
    left = np.isfinite(values)
    for digits in range(1, 10):  # bf16 needs 4, fp8 fewer
        near = np.array([float(f"{value:.{digits}g}") for value in values[left]], np.float64)
        back, lost = codes_of(near, dtype)
        same = (back == codes[left]) & ~lost
        texts.update({int(c): repr(float(v)) for c, v in zip(codes[left][same], near[same], strict=True)})
        left[np.flatnonzero(left)[same]] = False
    return texts


def spelled(value: float) -> str:
    return '"NaN"' if math.isnan(value) else '"Infinity"' if value > 0 else '"-Infinity"'
