"""A body becomes a reply: decode, compute, encode. Runs on either side of the lane and knows no sockets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from maskserve import answers, requests
from maskserve.answers import Answer
from maskserve.errors import NotComputableError, PayloadError, TooLargeError
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED
from maskserve.ops.rows import Row
from maskserve.payload import json
from maskserve.payload.format import Buffer, BytesPayload, Limits, Payload
from maskserve.requests import Request
from maskserve_api import v2_answer, v2_question
from maskserve_api.coding import compressed
from maskserve_api.errors import NotAcceptableError
from maskserve_api.forms import Form, bounded, written
from maskserve_api.v2_question import Head, V2Payload

AnyPayload: TypeAlias = BytesPayload | V2Payload
GZIP_MAGIC = b"\x1f\x8b"
START_BYTES = 64
"""By which a body is told."""
EXAMPLE = b'{"data": [1, 2, null]}'
SMALL_BYTES = {Form.SAFETENSORS: 1 << 15, Form.JSON: 1 << 11, Form.V2: 1 << 15}
"""Bodies computed where they are read: the slowest op takes 1 ms for them, the median one 0.4 ms, both of which the
loop can bear, and gradients 1 to 2 ms; a hop to the lane and back takes 0.1 to 0.2 ms (2 cores, reference back end, one
tensor)."""
SMALL_TENSORS = 4


@dataclass(slots=True)
class Stages:
    """Seconds by stage, in order: what Server-Timing tells."""

    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        return Stage(self.seconds, name)

    def header(self) -> str:
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in self.seconds.items())


class Stage:
    """Adds the seconds of its block; no generator, which takes three times as long."""

    __slots__ = ("name", "seconds", "start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer: its pieces, and their size together; how many of its cells are valid and masked."""

    n_bytes: int
    chunks: Sequence[Buffer]
    media_type: str
    headers: Sequence[tuple[bytes, bytes]] = ()
    cells: tuple[int, int] = (0, 0)


@dataclass(slots=True, kw_only=True)
class Work:
    """One request with its body; whoever calls `reply` computes it."""

    request: Request | None
    """None where the body tells it: in V2."""
    body: Buffer
    question: Form
    answer: Form
    stages: Stages
    admit: Callable[[int], None] | None = None
    """Hears how many bytes the answer will have, and may refuse."""
    head: Head | None = None
    """What the headers of V2 say."""
    limits: Limits = field(default_factory=bounded)
    _payload: AnyPayload | None = None

    def decoded_small(self) -> bool:
        """Decodes what may be small, and says whether it takes less than a thread hop is worth: see SMALL_BYTES."""
        if len(self.body) > SMALL_BYTES[self.question] or not self.is_told():
            return False
        payload = self.payload()
        writes_json = isinstance(payload, V2Payload) and payload.asked.writes_json
        return len(payload.header.tensors) <= SMALL_TENSORS and not (
            writes_json and len(self.body) > SMALL_BYTES[Form.JSON]
        )

    def is_told(self) -> bool:
        """Whether the request is known, or is after reading no more than a short JSON."""
        return self.head is None or self.head.json_bytes(self.body) <= SMALL_BYTES[Form.JSON]

    def asked(self) -> Request:
        if self.request is None:
            payload = self.payload()
            assert isinstance(payload, V2Payload)
            self.request = payload.asked.request
        return self.request

    def timeout_s(self) -> float:
        """The seconds that the body grants; without end where it says nothing of them."""
        payload = None if self.head is None else self.payload()
        return payload.asked.timeout_s if isinstance(payload, V2Payload) else math.inf

    def payload(self) -> AnyPayload:
        if self._payload is None:
            with self.stages.stage("decode"):
                self._payload = decode(self.body, self.question, self.head, self.limits)
        return self._payload

    def small_reply(self) -> Reply:
        """The reply on one of torch's threads: on busy cores, waiting for the others takes 30 ms where 1 will do."""
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.reply()
        finally:
            torch.set_num_threads(n_threads)

    def reply(self) -> Reply:
        """Everything that can fail has been done when it returns."""
        payload = self.payload()
        with self.stages.stage("compute"):
            computed = answers.run(self.asked(), payload, admit=self.admit)
        with self.stages.stage("encode"):
            if self.answer is not Form.SAFETENSORS:
                computed = computed.spread_out()
            return replace(ENCODERS[self.answer](computed, payload, self.limits), cells=cells_of(computed))


def cells_of(computed: Answer) -> tuple[int, int]:
    """How many cells are valid, and how many masked."""
    masks = [result.mask for result in computed.held if result.mask is not None and not result.is_coordinate]
    n_valid = sum(int(np.count_nonzero(mask.numpy(force=True))) for mask in masks)  # torch takes 50 times as long
    return n_valid, sum(mask.numel() for mask in masks) - n_valid


def decode(body: Buffer, form: Form, head: Head | None, limits: Limits) -> AnyPayload:
    if head is not None:
        return v2_question.decode(body, head, limits)
    if not len(body):
        example = EXAMPLE.decode() if form is Form.JSON else "a file of safetensors"
        raise PayloadError(f"the body is empty: send a payload, such as {example}")
    if form is Form.JSON:
        refuse_large_json(len(body), limits)  # before the copy below
    try:
        return json.decode(bytes(body), limits) if form is Form.JSON else BytesPayload(body, limits)
    except PayloadError as error:
        refuse_misnamed(bytes(body[:START_BYTES]), form, error)
        raise


def refuse_large_json(n_bytes: int, limits: Limits) -> None:
    if n_bytes > limits.json_bytes:
        raise TooLargeError(
            f"the JSON has {n_bytes} bytes; at most {limits.json_bytes} are read: send large tensors as safetensors"
        )


def refuse_misnamed(start: bytes, form: Form, error: PayloadError) -> None:
    """Raises, because of `error`, where a body that begins so is not what its headers call it."""
    said = misnamed(start, form)
    if said is not None:
        looks, header, instead = said
        raise PayloadError(f"the body looks like {looks}: send {instead}", parameter=header) from error


def misnamed(start: bytes, form: Form) -> tuple[str, str, str] | None:
    """What a body looks like that is not what its headers say, which header is at fault, and what to send instead."""
    if start.startswith(GZIP_MAGIC):
        return "a gzip stream", "Content-Encoding", "Content-Encoding: gzip"
    if form is Form.JSON and start[8:9] == b"{":
        return "safetensors", "Content-Type", f"Content-Type: {Form.SAFETENSORS}"
    if form is not Form.JSON and start.lstrip()[:1] in (b"{", b"["):
        return "JSON", "Content-Type", f"Content-Type: {Form.JSON}"
    return None


def as_safetensors(computed: Answer, payload: Payload, limits: Limits) -> Reply:
    encoded = computed.encoded()
    return Reply(encoded.n_bytes, list(encoded.chunks), Form.SAFETENSORS)


def refuse_large_answer(n_bytes: int, limits: Limits) -> None:
    """Raises where an answer of so many bytes cannot be JSON."""
    if n_bytes > limits.json_bytes:
        raise NotAcceptableError(
            f"the answer has {n_bytes} bytes; as JSON at most {limits.json_bytes} are written: "
            f"ask for {Form.SAFETENSORS}",
            parameter="Accept",
            allowed=[Form.SAFETENSORS],
        )


def as_json(computed: Answer, payload: Payload, limits: Limits) -> Reply:
    """A plain question gets a plain answer; all others get one that names dtypes."""
    outputs = computed.outputs()
    n_bytes = computed.encoded().n_bytes
    refuse_large_answer(n_bytes, limits)
    form: Literal["plain", "explicit"] = payload.form if isinstance(payload, json.JsonPayload) else "explicit"
    try:
        pieces = json.encode(outputs, computed.metadata, form)
        chunks = list(written(pieces, limits.json_bytes, "Accept", f"ask for {Form.SAFETENSORS}", [Form.SAFETENSORS]))
    except NotComputableError as error:
        raise NotAcceptableError(error.message, parameter="Accept", allowed=[Form.SAFETENSORS]) from error
    return Reply(sum(map(len, chunks)), chunks, Form.JSON)


def as_v2(computed: Answer, payload: Payload, limits: Limits) -> Reply:
    """JSON and the bytes behind it, compressed where the client takes nothing else."""
    assert isinstance(payload, V2Payload)
    text, data = v2_answer.encode(computed.outputs(), payload.asked, limits.json_bytes)
    headers = [(b"vary", b"accept-encoding")]
    if data:
        headers.append((v2_question.LENGTH.lower().encode(), str(len(text)).encode()))
    chunks: list[Buffer] = [text, *data]
    if packing := payload.asked.coding:
        headers.append((b"content-encoding", packing.encode()))
        chunks = list(compressed(chunks, packing))
    return Reply(sum(memoryview(chunk).nbytes for chunk in chunks), chunks, Form.V2 if data else Form.JSON, headers)


ENCODERS: dict[Form, Callable[[Answer, Payload, Limits], Reply]] = {
    Form.SAFETENSORS: as_safetensors,
    Form.JSON: as_json,
    Form.V2: as_v2,
}


def example_row() -> Row:
    """A row that needs no parameter, to show and to rehearse with."""
    return next(row for row in OPS.values() if row.verb and not any(p.default is REQUIRED for p in row.requestable))


def rehearse() -> None:
    """Computes one answer, so that who says to be ready has proof; raises where it fails."""
    row = example_row()
    assert row.verb is not None
    words: dict[str, Any] = {"op": row.name}
    stages = Stages()
    Work(
        request=requests.build(row.verb, words), body=EXAMPLE, question=Form.JSON, answer=Form.JSON, stages=stages
    ).reply()
