"""A request's body, from the socket into one buffer: bounded before it is read, and counted while it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from itertools import chain
from threading import Lock

import numpy as np
from starlette.datastructures import Headers
from starlette.types import Receive

from maskserve.errors import TooLargeError
from maskserve.payload.format import Buffer
from maskserve_api.coding import Coding, Stream
from maskserve_api.errors import BusyError, Disconnected, FramingError
from maskserve_api.turns import Cancelled

ALIGNMENT = 64
"""Of cells in memory, in bytes: a cache line."""


class Memory:
    """The bytes of all requests in flight and of their answers, bounded.

    Bodies are charged as they come, so that a promise alone blocks nobody; answers before they are computed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.lock = Lock()

    @contextmanager
    def claim(self) -> Iterator[Claim]:
        """What a request holds: counted until the claim has ended and no thread computes for it any more."""
        claim = Claim(self)
        with claim.held():
            yield claim


class Claim:
    """What one request holds. Ended, it takes no more: who gave it up may not hear of what a thread still computes."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.n_bytes = 0
        self.n_holders = 0
        self.is_ended = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """The first to hold it ends it, the last to let go gives its bytes back: a thread that computes outlives a deadline."""
        with self.memory.lock:
            self._refuse_ended()
            is_first = self.n_holders == 0
            self.n_holders += 1
        try:
            yield
        finally:
            with self.memory.lock:
                self.is_ended |= is_first
                self.n_holders -= 1
                if self.n_holders == 0:
                    self.memory.held_bytes -= self.n_bytes
                    self.n_bytes = 0

    def add(self, n_bytes: int) -> None:
        """Bytes of the body."""
        self._hold(n_bytes, may_exceed=False)

    def add_answer(self, n_bytes: int) -> None:
        """Bytes of the answer, which may have nine times the body's: alone, it would wait for nobody."""
        self._hold(n_bytes, may_exceed=True)

    def _hold(self, n_bytes: int, *, may_exceed: bool) -> None:
        with self.memory.lock:
            self._refuse_ended()
            held_bytes = self.memory.held_bytes
            is_alone = held_bytes == self.n_bytes
            if held_bytes + n_bytes > self.memory.limit_bytes and not (is_alone and may_exceed):
                raise BusyError("the service holds as many bytes of requests as it may; try again")
            self.memory.held_bytes += n_bytes
            self.n_bytes += n_bytes

    def _refuse_ended(self) -> None:
        if self.is_ended:
            raise Cancelled


def declared_bytes(headers: Headers, max_body: int) -> int | None:
    """The Content-Length, checked; None where the body is chunked."""
    declared = headers.get("content-length")
    if "transfer-encoding" in headers:
        return None
    n_bytes = int(declared or 0)
    if n_bytes > max_body:
        raise too_large(max_body)
    return n_bytes


def too_large(max_body: int) -> TooLargeError:
    return TooLargeError(
        f"the body has more than {max_body} bytes, the most that are read; who runs the service sets --max-body, and "
        "--jobs-max-body for jobs",
        parameter="Content-Length",
    )


async def read_body(
    receive: Receive,
    n_bytes: int | None,
    max_body: int,
    claim: Claim,
    coding: Coding | None = None,
    cells_at: int = 0,
) -> Buffer:
    """The whole body: exactly `n_bytes`, or at most `max_body` where nothing was declared or it is compressed.

    From `cells_at` on it holds cells, to which the first kind gives an aligned address: others are copied when computed on.
    """
    if coding is not None:
        return await read_coded(receive, coding, max_body, claim)
    if n_bytes is None:
        return await read_chunked(receive, max_body, claim)
    return await read_exactly(receive, aligned(n_bytes, cells_at), claim)


def aligned(n_bytes: int, cells_at: int) -> memoryview:
    """New memory of which the byte at `cells_at` has an address that suits each dtype."""
    # a bytearray would be written with zeros first: 0.1 s of the loop and all of its memory, for a promised 256 MiB
    room = np.empty(n_bytes + ALIGNMENT - 1, np.uint8)
    start = -(room.ctypes.data + cells_at) % ALIGNMENT
    return room.data[start : start + n_bytes]


async def read_exactly(receive: Receive, body: memoryview, claim: Claim) -> Buffer:
    """Fills `body`, which is as long as the body was declared to be."""
    n_bytes, at, more = len(body), 0, True
    while more:
        chunk, more = await next_chunk(receive)
        if at + len(chunk) > n_bytes:
            raise longer(n_bytes)
        claim.add(len(chunk))
        body[at : at + len(chunk)] = chunk
        at += len(chunk)
    if at < n_bytes:
        raise shorter(at, n_bytes)
    return body


async def read_chunked(receive: Receive, max_body: int, claim: Claim) -> Buffer:
    body = bytearray()
    async for chunk in pieces(receive, None, max_body, None):
        claim.add(len(chunk))
        body += chunk
    return body


async def read_coded(receive: Receive, coding: Coding, max_body: int, claim: Claim) -> Buffer:
    body = bytearray()
    async for piece in pieces(receive, None, max_body, coding):
        claim.add(len(piece))
        body += piece
    return body


async def pieces(
    receive: Receive, n_bytes: int | None, max_body: int, coding: Coding | None
) -> AsyncGenerator[bytes, None]:
    """A body as it comes, expanded where it is compressed.

    It has `n_bytes`, or at most `max_body` where that is None or a coding is said.
    """
    if coding is not None:
        async for piece in expanded(receive, coding, max_body):
            yield piece
        return
    at, more, most = 0, True, max_body if n_bytes is None else n_bytes
    while more:
        chunk, more = await next_chunk(receive)
        at += len(chunk)
        if at > most:
            raise too_large(max_body) if n_bytes is None else longer(n_bytes)
        yield chunk
    if n_bytes is not None and at < n_bytes:
        raise shorter(at, n_bytes)


async def expanded(receive: Receive, coding: Coding, max_body: int) -> AsyncGenerator[bytes, None]:
    """What a compressed body expands to; between two pieces of it others get their turn."""
    at, stream, more = 0, Stream(coding), True
    while more:
        chunk, more = await next_chunk(receive)
        for piece in chain(stream.pieces(chunk), () if more else stream.end()):
            at += len(piece)
            if at > max_body:
                raise TooLargeError(
                    f"the body expands to more than {max_body} bytes, the most that are read",
                    parameter="Content-Encoding",
                )
            yield piece
            await asyncio.sleep(0)


def longer(n_bytes: int) -> FramingError:
    return FramingError(f"the body has more bytes than its Content-Length, {n_bytes}")


def shorter(at: int, n_bytes: int) -> FramingError:
    return FramingError(f"the body has {at} bytes; its Content-Length is {n_bytes}")


async def next_chunk(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message.get("body", b""), message.get("more_body", False)
