"""The h11 protocol of uvicorn with what a middleware comes too late for: a deadline on receiving headers."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from maskserve_api.edge import log
from maskserve_api.errors import ProtocolError
from maskserve_api.problems import problem

HEADERS_S = 10.0
MAX_HEADER_BYTES = 16384


class Protocol(H11Protocol):
    """Closes a connection whose next request is not complete in its headers after HEADERS_S, or that is silent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headers_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn types it
        super().connection_made(transport)
        self.await_headers()

    def data_received(self, data: bytes) -> None:
        # h11 checks its limit only where headers are incomplete, and one read may bring 256 KiB of complete ones
        while len(data) > MAX_HEADER_BYTES and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            super().data_received(data[:MAX_HEADER_BYTES])
            data = data[MAX_HEADER_BYTES:]
        if not self.transport.is_closing():
            super().data_received(data)
        self.await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.await_headers()

    def await_headers(self) -> None:
        """Runs the clock while a request is due: none has begun, or the rest of one is read for nothing."""
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self.stop_waiting()
        elif self.headers_deadline is None and not self.transport.is_closing():
            self.headers_deadline = self.loop.call_later(HEADERS_S, self.transport.close)

    def stop_waiting(self) -> None:
        if self.headers_deadline is not None:
            self.headers_deadline.cancel()
            self.headers_deadline = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets a problem, unless an answer is under way."""
        log.info("not HTTP, or headers too large")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status, headers, body = problem(
                ProtocolError("the request is not HTTP/1.1, or its headers are too large"), ""
            )
            headers.append((b"connection", b"close"))
            response = h11.Response(status_code=status, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
