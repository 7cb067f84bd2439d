"""`python -m benchmarks.inprocess`: what a small request costs without sockets, and where the time goes.

A connection's protocol is given the bytes of a request and a transport that keeps what is written: the same code runs
as behind a port, less the system calls, and one thread's own clock counts, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.report import number, table
from benchmarks.service import OURS, READ, with_peers
from benchmarks.soak import question
from maskserve_api import logs
from maskserve_api.server import Server

SIZES = {"100 B": 8, "1 kB": 160, "10 kB": 2000}
ROUNDS = 7
PROFILED = 100


class Wire(asyncio.Transport):
    """A transport to nowhere: it keeps the last reply."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.reply = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.reply += data

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...


async def ask(protocol: Any, wire: Wire, request: bytes) -> bytes:
    """The reply to one request."""
    wire.reply = b""
    protocol.data_received(request)
    task = next(iter(protocol.tasks))
    await asyncio.wait((task,))
    return wire.reply


def connect(server: Server) -> tuple[Any, Wire]:
    if not server.config.loaded:
        server.config.load()
    wire = Wire()
    factory: Any = server.config.http_protocol_class
    protocol = factory(config=server.config, server_state=server.server_state, app_state={})
    protocol.connection_made(wire)
    return protocol, wire


def request_of(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def seconds_each(server: Server, path: str, body: bytes, n: int) -> float:
    """Seconds of this thread for one request, of `n`."""
    protocol, wire = connect(server)
    request = request_of(path, body)
    start = time.thread_time()
    for _ in range(n):
        reply = await ask(protocol, wire, request)
    took = time.thread_time() - start
    assert reply.startswith(b"HTTP/1.1 200 "), reply[:2000]
    protocol.connection_lost(None)
    return took / n


@contextmanager
def profiled() -> Iterator[None]:
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    yield
    profile.disable()
    pstats.Stats(profile).sort_stats("cumtime").print_stats(PROFILED)


async def measured(server: Server, label: str, n: int, path: str) -> list[str]:
    body = question(SIZES[label])
    await seconds_each(server, path, body, 100)
    await seconds_each(server, READ, body, 100)
    rounds = [[await seconds_each(server, where, body, n) * 1e6 for where in (path, READ)] for _ in range(ROUNDS)]
    own, peer = (min(column) for column in zip(*rounds, strict=True))  # what disturbs only adds
    return [label, f"{own:.0f}", f"{peer:.0f}", number(peer / own)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inprocess", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="this size alone (repeatable)")
    parser.add_argument("--path", default=OURS, help="what is asked for")
    parser.add_argument("--requests", type=int, default=500, help="in each of the rounds")
    parser.add_argument("--log", default="json", choices=("json", "text", "off"))
    parser.add_argument("--profile", action="store_true", help="where the time of the first size goes")
    given = parser.parse_args(arguments)
    logs.configure(given.log)
    server = Server(with_peers(), "127.0.0.1", grace=1.0)
    sizes = given.size or tuple(SIZES)
    if given.profile:
        with profiled():
            asyncio.run(seconds_each(server, given.path, question(SIZES[sizes[0]]), 2000))
        return 0
    lines = [asyncio.run(measured(server, label, given.requests, given.path)) for label in sizes]
    print(table(["body", "us", "reading alone", "share"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
