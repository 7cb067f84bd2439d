"""A question of the Open Inference Protocol v2: JSON, then the bytes of those tensors whose cells are not in it.

Where https://github.com/kserve/open-inference-protocol is silent, Triton's extension
for binary tensors speaks. What is read is a payload like any other, so that all that follows is the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from maskserve import requests
from maskserve.dtypes import f32
from maskserve.errors import ParameterError, PayloadError, TooLargeError
from maskserve.payload.format import Buffer, Limits, Output
from maskserve.payload.header import is_encodable, shown
from maskserve.payload.held import HeldPayload
from maskserve.payload.json import document
from maskserve.payload.variables import DATA
from maskserve.requests import Request
from maskserve_api import coding
from maskserve_api.coding import Coding
from maskserve_api.errors import NotOfferedError
from maskserve_api.v2_tensors import Json, names_of, objects, parameters_of, refuse_shared_memory, tensors

LENGTH = "Inference-Header-Content-Length"
ID_CHARACTERS = 256
TIMEOUT, IS_BINARY = "timeout", "binary_data_output"
RESERVED = frozenset({TIMEOUT, IS_BINARY, "sequence_id", "sequence_start", "sequence_end", "priority", "headers"})
RESERVED_PREFIX = "triton_"
PARAMETER_CHARACTERS = 1 << 13
"""All parameters together: a query, which is read before a body is, has room for about as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a request says outside its body: the words of its query, how long its JSON is, how its reply is packed."""

    verb: str
    words: Mapping[str, Any]
    declared: int | None
    coding: Coding | None

    @property
    def cells_at(self) -> int:
        """Where the bytes of tensors begin."""
        return self.declared or 0

    def json_bytes(self, body: Buffer) -> int:
        """The bytes of `body` that are JSON: all where nothing was declared."""
        n_bytes = len(body) if self.declared is None else self.declared
        if n_bytes > len(body):
            raise PayloadError(f"{LENGTH} is {n_bytes}; the body has {len(body)} bytes", parameter=LENGTH)
        return n_bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that is asked for, as bytes or as JSON."""

    name: str
    is_binary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the JSON asks for; `wanted` is empty where all outputs are, then as bytes where `is_binary` says so."""

    request: Request
    id: str | None
    wanted: tuple[Wanted, ...]
    is_binary: bool
    timeout_s: float
    coding: Coding | None

    @property
    def writes_json(self) -> bool:
        """Whether cells of the answer stand in its JSON."""
        return not all(output.is_binary for output in self.wanted) if self.wanted else not self.is_binary


class V2Payload(HeldPayload):
    """The tensors of a request, and what it asks for."""

    def __init__(self, outputs: Iterable[Output], asked: Asked, *, has_nulls: bool) -> None:
        super().__init__(outputs, {}, format="V2", has_nulls=has_nulls)
        self.asked = asked


def head(verb: str, words: Mapping[str, Any], headers: Headers) -> Head:
    declared = headers.getlist(LENGTH)
    if len(declared) > 1 or not all(text.isascii() and text.isdigit() and len(text) <= 15 for text in declared):
        raise PayloadError(f"{LENGTH} must be given once, as a number of bytes", parameter=LENGTH)
    return Head(
        verb=verb, words=words, declared=int(declared[0]) if declared else None, coding=coding.of_reply(headers)
    )


def decode(body: Buffer, head: Head, limits: Limits) -> V2Payload:
    n_bytes = head.json_bytes(body)
    binary = memoryview(body).cast("B")[n_bytes:]
    if head.declared == 0:
        return raw(binary, head)
    if n_bytes > limits.json_bytes:  # before the copy below
        raise TooLargeError(
            f"the JSON has {n_bytes} bytes; at most {limits.json_bytes} are read: send large tensors as binary data"
        )
    root = document(bytes(memoryview(body)[:n_bytes]), "the request", limits, constants=True)
    if not isinstance(root, dict):
        raise PayloadError("the request must be a JSON object with a list of inputs")
    inputs = objects(root, "inputs", limits)
    if not inputs:
        raise PayloadError("the request must have inputs, a list of at least one tensor", parameter="inputs")
    outputs = tensors(inputs, binary)
    return V2Payload(outputs, asked(root, head, limits), has_nulls=len(outputs) > len(inputs))


def raw(binary: memoryview, head: Head) -> V2Payload:
    """The request whose body is nothing but one tensor: of one dim, in the dtype that the model's metadata names."""
    n_cells, rest = divmod(binary.nbytes, f32.n_bytes)
    if rest:
        raise PayloadError(f"a raw body is FP32 cells of {f32.n_bytes} bytes each; {binary.nbytes} bytes are no such")
    asked = Asked(
        request=requests.build(head.verb, head.words),
        id=None,
        wanted=(),
        is_binary=True,
        timeout_s=math.inf,
        coding=head.coding,
    )
    return V2Payload([Output(DATA, f32, (n_cells,), binary)], asked, has_nulls=False)


def asked(root: Json, head: Head, limits: Limits) -> Asked:
    parameters = parameters_of(root)
    is_binary = flag(parameters, IS_BINARY, False)
    name = root.get("id")
    if name is not None and not (isinstance(name, str) and len(name) <= ID_CHARACTERS):
        raise PayloadError(f"id must be a string of at most {ID_CHARACTERS} characters", parameter="id")
    wanted = objects(root, "outputs", limits)
    return Asked(
        request=requests.build(head.verb, words_of(parameters, head.words)),
        id=name,
        wanted=tuple(Wanted(*pair) for pair in zip(names_of(wanted), are_binary(wanted, is_binary), strict=True)),
        is_binary=is_binary,
        timeout_s=timeout_of(parameters.get(TIMEOUT)),
        coding=head.coding,
    )


def are_binary(wanted: list[Json], is_binary: bool) -> Iterable[bool]:
    """Whether each output goes as bytes: as its own parameter says, or else as the request's."""
    for entry in wanted:
        parameters = parameters_of(entry)
        refuse_shared_memory(parameters)
        if parameters.get("classification"):
            raise NotOfferedError(
                "classification is not offered: ask for the output itself", parameter="classification"
            )
        yield flag(parameters, "binary_data", is_binary)


def words_of(parameters: Json, query: Mapping[str, Any]) -> dict[str, Any]:
    """The words for a request, spelled as a query spells them: so they mean the same as in one."""
    said = {
        name: [spelled(name, item) for item in value] if isinstance(value, list) else spelled(name, value)
        for name, value in parameters.items()
        if value is not None and name not in RESERVED and not name.startswith(RESERVED_PREFIX)
    }
    if len(repr(said)) > PARAMETER_CHARACTERS:
        raise ParameterError(f"parameters must have at most {PARAMETER_CHARACTERS} characters", parameter="parameters")
    for name in said:
        if not is_encodable(name):
            raise PayloadError("a parameter's name holds a lone surrogate", parameter="parameters")
        if name in query:
            raise ParameterError(f"{shown(name, 64)} stands in the query and in the body", parameter=shown(name, 64))
    return {**query, **said}


def spelled(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ParameterError(
            f"{shown(name, 64)} must be a string, a number, true or false, or a list of them", parameter=shown(name, 64)
        )
    text = str(value)
    if not is_encodable(text):
        raise PayloadError(f"{shown(name, 64)} holds a lone surrogate", parameter=shown(name, 64))
    return text


def timeout_of(microseconds: object) -> float:
    """Seconds; 0 says nothing, as in Triton."""
    if microseconds is None or microseconds == 0:
        return math.inf
    if type(microseconds) is not int or microseconds < 0:
        raise ParameterError(f"{TIMEOUT} must be a whole number of microseconds", parameter=TIMEOUT)
    return min(microseconds, 10**15) / 1e6


def flag(parameters: Json, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be true or false", parameter=name)
    return value
