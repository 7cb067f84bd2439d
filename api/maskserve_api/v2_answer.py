"""An answer of the Open Inference Protocol v2: JSON that lists the outputs, then the bytes of those asked for as such."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from maskserve.dtypes import DType
from maskserve.errors import UnknownTensorError, nearest
from maskserve.payload.format import Buffer, Output
from maskserve.payload.header import shown
from maskserve.payload.json import CELLS_PER_CHUNK
from maskserve.payload.texts import numbers_of
from maskserve_api.errors import NotAcceptableError
from maskserve_api.forms import written
from maskserve_api.table import Json
from maskserve_api.v2_question import Asked
from maskserve_api.v2_tensors import BINARY_ONLY, DTYPES

CODES: Mapping[DType, str] = {dtype: code for code, dtype in DTYPES.items()}
VERSION = "1"
"""The one version of each model."""


def encode(outputs: Sequence[Output], asked: Asked, most_bytes: int) -> tuple[bytes, list[Buffer]]:
    """The JSON, of at most `most_bytes`, and what follows it."""
    chosen = choose(outputs, asked)
    refuse_large([output for output, is_binary in chosen if not is_binary], most_bytes)
    data = [output.chunks for output, is_binary in chosen if is_binary and isinstance(output.chunks, Buffer)]
    return b"".join(written(text(chosen, asked), most_bytes, "outputs", "ask for them with binary_data")), data


def text(chosen: Sequence[tuple[Output, bool]], asked: Asked) -> Iterator[bytes]:
    """The JSON in pieces."""
    root = {"model_name": asked.request.verb, "model_version": VERSION}
    if asked.id is not None:
        root["id"] = asked.id
    opening = f'{json.dumps(root)[:-1]}, "outputs": ['
    for output, is_binary in chosen:
        assert isinstance(output.chunks, Buffer)
        fields: Json = {"name": output.name, "datatype": code_of(output), "shape": list(output.shape)}
        if is_binary:
            fields["parameters"] = {"binary_data_size": memoryview(output.chunks).nbytes}
            yield f"{opening}{json.dumps(fields)}".encode()
        else:
            yield f'{opening}{json.dumps(fields)[:-1]}, "data": ['.encode()
            yield from values(output.name, output.dtype, output.chunks)
            yield b"]}"
        opening = ", "
    yield b"]}" if chosen else f"{opening}]}}".encode()


def choose(outputs: Sequence[Output], asked: Asked) -> list[tuple[Output, bool]]:
    """The outputs that are wanted, in that order, each with whether it goes as bytes."""
    if not asked.wanted:
        return [(output, asked.is_binary) for output in outputs]
    by_name = {output.name: output for output in outputs}
    for wanted in asked.wanted:
        if wanted.name not in by_name:
            known = [shown(name) for name in by_name]
            raise UnknownTensorError(
                f"there is no output {shown(wanted.name)}; the answer has {', '.join(known[:8])}"
                f"{', …' if len(known) > 8 else ''}{nearest(wanted.name, known)}",
                parameter="outputs",
                allowed=known,
            )
    return [(by_name[wanted.name], wanted.is_binary) for wanted in asked.wanted]


def refuse_large(outputs: Sequence[Output], most_bytes: int) -> None:
    n_bytes = sum(math.prod(output.shape) * output.dtype.n_bytes for output in outputs)
    if n_bytes > most_bytes:
        raise NotAcceptableError(
            f"the outputs have {n_bytes} bytes; as JSON at most {most_bytes} are written: "
            "ask for them with binary_data",
            parameter="outputs",
        )


def code_of(output: Output) -> str:
    code = CODES.get(output.dtype)
    if code is None:
        raise NotAcceptableError(
            f"{shown(output.name)} is {output.dtype.code}, which V2 has no name for: send the request to /v1",
            parameter=shown(output.name),
        )
    return code


def values(name: str, dtype: DType, data: Buffer) -> Iterator[bytes]:
    """The cells as JSON in pieces, those under a mask as they are, and null for what JSON has no number for."""
    if dtype in BINARY_ONLY:
        raise NotAcceptableError(
            f"{shown(name)} is {CODES[dtype]}, which JSON does not hold: ask for it with binary_data",
            parameter=shown(name),
        )
    texts, opening = numbers_of(dtype, data), ""
    while piece := list(islice(texts, CELLS_PER_CHUNK)):
        yield f"{opening}{', '.join(piece)}".encode()
        opening = ", "
