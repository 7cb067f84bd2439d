"""Tensors as safetensors bytes: sizes known first, the same content always the same bytes. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from maskserve.dtypes import DType
from maskserve.errors import NotComputableError, ShapeError
from maskserve.payload.header import (
    KNOWN_BYTES,
    METADATA,
    Buffer,
    Shape,
    check_metadata,
    check_name,
    check_shape,
    shown,
)

KNOWN_TENSORS = 8  # up to which a header is remembered; the size of its metadata and of each name is bounded too
DATA_ALIGNMENT = 8  # as the safetensors library: 64 would gain nothing, since the tensors that follow are packed


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write: its little-endian bytes in row-major order, whole or in pieces made when they are due."""

    name: str
    dtype: DType
    shape: Shape
    chunks: Buffer | Iterable[Buffer]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.n_bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """A payload ready to be sent once: its exact size, known before the first of its `chunks` is made."""

    n_bytes: int
    chunks: Iterator[memoryview]


def encode(outputs: Iterable[Output], metadata: Mapping[str, str]) -> Encoded:
    """The payload of `outputs`, by width of dtype (widest first), then name: the same content gives the same bytes."""
    ordered = in_order(outputs)
    header = encode_header(ordered, metadata)
    sizes = [output.n_bytes for output in ordered]
    for output, n_bytes in zip(ordered, sizes, strict=True):
        if isinstance(output.chunks, Buffer):
            _check_size(output, memoryview(output.chunks).nbytes, n_bytes)
    data = (_chunks(output, n_bytes) for output, n_bytes in zip(ordered, sizes, strict=True))
    chunks = chain([memoryview(header)], chain.from_iterable(data))
    return Encoded(len(header) + sum(sizes), chunks)


def in_order(outputs: Iterable[Output]) -> list[Output]:
    """The outputs as a payload has them: by width of dtype, widest first, then name."""
    return sorted(outputs, key=lambda output: (-output.dtype.n_bytes, output.name))


def places(outputs: Iterable[Output], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header of the payload of `outputs`, where in it the bytes of each begin by name, and the size of all."""
    ordered = in_order(outputs)
    header = encode_header(ordered, metadata)
    starts, at = {}, len(header)
    for output in ordered:
        starts[output.name] = at
        at += output.n_bytes
    return header, starts, at


def encode_header(ordered: Iterable[Output], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of `ordered`, padded so that the data starts at a multiple of 8."""
    said, tensors = tuple(metadata.items()), tuple([(o.name, o.dtype, o.shape) for o in ordered])
    is_short = len(tensors) <= KNOWN_TENSORS and sum(len(key) + len(text) for key, text in said) <= KNOWN_BYTES
    return (_known if is_short else _written)(said, tensors)


def _written(said: tuple[tuple[str, str], ...], tensors: tuple[tuple[str, DType, Shape], ...]) -> bytes:
    root: dict[str, object] = {}
    if said:
        root[METADATA] = dict(sorted(check_metadata(dict(said)).items()))
    at = 0
    for name, dtype, shape in tensors:
        check_name(name)
        if name == METADATA:
            raise NotComputableError(f"no tensor is called {METADATA}: safetensors has its metadata there; rename it")
        if name in root:
            raise NotComputableError(
                f"two tensors would be written as {shown(name)}; rename one", parameter=shown(name)
            )
        end = at + check_shape(name, dtype, shape)
        root[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(root, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


_known = lru_cache(maxsize=256)(_written)


def to_bytes(outputs: Iterable[Output], metadata: Mapping[str, str]) -> bytes:
    """The payload of `outputs` in one piece."""
    return b"".join(encode(outputs, metadata).chunks)


def _chunks(output: Output, n_bytes: int) -> Iterator[memoryview]:
    """The bytes of `output`, counted: what is written must fit the header that was already sent."""
    written = 0
    for chunk in [output.chunks] if isinstance(output.chunks, Buffer) else output.chunks:
        view = memoryview(chunk)
        written += view.nbytes
        if written > n_bytes:
            _check_size(output, written, n_bytes)
        if view.nbytes:
            yield view.cast("B")
    _check_size(output, written, n_bytes)


def _check_size(output: Output, given: int, expected: int) -> None:
    if given != expected:
        raise ShapeError(
            f"{shown(output.name)} has {given} bytes to write; {output.dtype.code} of shape "
            f"{shown(str(output.shape))} takes {expected}",
            parameter=shown(output.name),
        )
