"""The h11 protocol of uvicorn with what a middleware comes too late for: how headers, chunks and connections may come."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer  # h11 has no other place to see a line before it is read
from uvicorn.protocols.http.h11_impl import H11Protocol

from maskserve.errors import MaskserveError, TooLargeError
from maskserve_api.edge import LINGER_S, log
from maskserve_api.errors import HeadersTooLargeError, ProtocolError
from maskserve_api.problems import problem

MAX_HEADER_BYTES = 16384
FREE_CHUNKS = 4096
MIN_CHUNK_BYTES = 256
"""What a chunk must hold on average beyond the free ones: each costs the loop 5 µs, however small it is."""
BARE_LF = re.compile(rb"(?<!\r)\n")
FOLD = re.compile(rb"\r\n[ \t]")
LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:([^\r]*)", re.IGNORECASE)

FAULTS: dict[int, Callable[[], MaskserveError]] = {
    413: lambda: TooLargeError(f"the body comes in too many chunks: send at least {MIN_CHUNK_BYTES} bytes in each"),
    431: lambda: HeadersTooLargeError(f"the headers have more than {MAX_HEADER_BYTES} bytes, the most that are read"),
}


@dataclass(slots=True, kw_only=True)
class Connections:
    """What the connections of a server share: their bounds, and which of them have no request, the longest first."""

    most: int
    header_timeout_s: float
    idle: dict[Protocol, None] = field(default_factory=dict)
    closing: dict[asyncio.Transport, float] = field(default_factory=dict)

    def make_room(self, n_open: int) -> None:
        """Closes the connection that has been idle the longest where there are more than `most`."""
        if n_open > self.most and self.idle:
            next(iter(self.idle)).close()

    def drop_stuck(self, transports: Iterable[asyncio.Transport], now_s: float, after_s: float) -> None:
        """Ends connections that were closed `after_s` ago: close waits for ever until the client takes the last bytes."""
        self.closing = {t: self.closing.get(t, now_s) for t in transports if t.is_closing()}
        for transport, since_s in self.closing.items():
            if now_s - since_s > after_s:
                transport.abort()


class Lines(ReceiveBuffer):
    """h11's buffer, whose lines are checked before they are read: those of headers, of trailers and of chunks."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        check_head(bytes(self))
        return super().maybe_extract_lines()

    def maybe_extract_next_line(self) -> bytearray | None:
        line = super().maybe_extract_next_line()
        if line is not None and b"\r" in line[:-2]:
            raise h11.RemoteProtocolError("a CR in the line of a chunk's size")
        return line


class Connection(h11.Connection):
    """h11 with less patience: headers end in CR LF, and chunks are not tiny; `fault` is what it ended with."""

    _receive_buffer: Lines

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)
        self._receive_buffer = Lines()
        self.fault: h11.RemoteProtocolError | None = None
        self.n_chunks = self.n_chunked_bytes = 0

    def next_event(self) -> Any:
        try:
            if self.their_state is h11.IDLE and self.trailing_data[0].startswith(b"\r\n"):
                self._receive_buffer.maybe_extract_at_most(2)  # an empty line before a request: RFC 9112, 2.2
            event = super().next_event()
            if isinstance(event, h11.Request):
                if not event.http_version.startswith(b"1."):
                    raise h11.RemoteProtocolError("another version of HTTP")
                self.n_chunks = self.n_chunked_bytes = 0
            elif isinstance(event, h11.Data):
                self.count(event)
            return event
        except h11.RemoteProtocolError as fault:
            self.fault = fault
            raise

    def count(self, event: h11.Data) -> None:
        self.n_chunks += event.chunk_start
        self.n_chunked_bytes += len(event.data)
        if self.n_chunks > FREE_CHUNKS + self.n_chunked_bytes // MIN_CHUNK_BYTES:
            raise h11.RemoteProtocolError("too many chunks", error_status_hint=413)


def check_head(received: bytes) -> None:
    """Refuses long headers or trailers, also where they are complete, and what h11 reads as not all do.

    A bare LF ends a line, a line that begins with a space goes on, and the same length may be said twice.
    """
    if received.startswith(b"\r\n"):  # no trailers, and perhaps another request
        return
    head, _, _ = received.partition(b"\r\n\r\n")
    if len(head) > MAX_HEADER_BYTES:
        raise h11.RemoteProtocolError("too many bytes", error_status_hint=431)
    if BARE_LF.search(head):
        raise h11.RemoteProtocolError("a line ends in LF alone")
    if FOLD.search(head) or b",".join(LENGTH.findall(head)).count(b","):
        raise h11.RemoteProtocolError("a folded line, or two lengths")


class Protocol(H11Protocol):
    """Closes a connection whose next request is not complete in its headers in time, or that is silent."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: Connection = Connection()
        self.bounds = connections
        self.headers_deadline: asyncio.TimerHandle | None = None
        self.is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn types it
        super().connection_made(transport)
        self.await_headers()
        self.bounds.make_room(len(self.connections))

    def data_received(self, data: bytes) -> None:
        if not self.is_refused:
            super().data_received(data)
            self.await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_without_request() and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.bounds.idle[self] = None  # and uvicorn's own clock, that of keep-alive, runs
        else:
            self.await_headers()

    def is_without_request(self) -> bool:
        """Whether a request is due: none has begun, or the rest of one is read for nothing."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def await_headers(self) -> None:
        """Runs the clock while a request is due."""
        if not self.is_without_request():
            self.stop_waiting()
        elif self.headers_deadline is None and not self.transport.is_closing():
            self.headers_deadline = self.loop.call_later(self.bounds.header_timeout_s, self.close)
            self.bounds.idle.setdefault(self)

    def stop_waiting(self) -> None:
        self.bounds.idle.pop(self, None)
        if self.headers_deadline is not None:
            self.headers_deadline.cancel()
            self.headers_deadline = None

    def close(self) -> None:
        self.stop_waiting()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets a problem, unless an answer is under way."""
        log.info("not HTTP, or headers too large")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            hint = self.conn.fault.error_status_hint if self.conn.fault else 400
            error = FAULTS.get(hint, lambda: ProtocolError("the request is not HTTP/1.1 as RFC 9112 has it"))()
            status, headers, body = problem(error, "")
            headers.append((b"connection", b"close"))
            reason = HTTPStatus(status).phrase.encode()
            response = h11.Response(status_code=status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # whoever works on this request has nobody left to tell
            self.cycle.message_event.set()
        self.is_refused = True
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.close)  # closed at once, it would be reset and take the problem with it
