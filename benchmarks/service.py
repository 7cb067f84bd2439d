"""`python -m benchmarks.service`: requests a second and their times, beside endpoints that read a body and send a reply.

Markdown; `--write` puts it into docs/performance.md. The peers are routes of the same application in the same process, so
the ratios are what decoding, computing and encoding cost; all take turns, since a machine is not as fast at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from operator import truediv
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.report import PAGE, cpu, number, rewrite, table
from benchmarks.soak import question

HOST = "127.0.0.1"
OURS, READ, HELD = "/v1/reduce?op=mean&dim=0", "/read", "/held"
SIZES = {"100 B": 8, "100 kB": 20_000, "64 MB": 12_800_000}
"""Cells of float32 with a mask: 5 bytes each."""
CLIENTS = (1, 16, 256)
MOST_BYTES = 2 << 30
"""What all clients may send at once: more is left out."""
SECONDS, ROUNDS = 6.0, 3
HEAD = (
    "body",
    "clients",
    "requests/s",
    "x slower than dropping it",
    "x slower than holding it",
    "p50 ms",
    "dropped",
    "p99 ms",
    "dropped",
    "bodies in memory",
)
LENGTH = re.compile(rb"content-length: ([0-9]+)")


def with_peers() -> FastAPI:
    """The service with two routes more, that reply with 100 bytes: READ drops what it reads, HELD has it as one `bytes`."""
    from maskserve_api.app import create_app

    async def read(request: Request) -> Response:
        async for _ in request.stream():
            pass
        return Response(bytes(100))

    async def held(request: Request) -> Response:
        await request.body()
        return Response(bytes(100))

    app = create_app(max_body=MOST_BYTES, request_timeout=600)
    app.add_route(READ, read, methods=["POST"])
    app.add_route(HELD, held, methods=["POST"])
    return app


def serve(listener: socket.socket) -> None:
    from maskserve_api.server import Server

    Server(with_peers(), HOST, grace=1.0).run(sockets=[listener])


@contextmanager
def service() -> Iterator[tuple[int, str]]:
    """The process's id and its URL."""
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        child = multiprocessing.get_context("spawn").Process(target=serve, args=(listener,), daemon=True)
        child.start()
        assert child.pid is not None
        try:
            yield child.pid, f"http://{HOST}:{listener.getsockname()[1]}"
        finally:
            child.terminate()
            child.join()


async def asked(base: str, path: str, body: bytes, n_clients: int, seconds: float) -> list[float]:
    """The seconds of each request that `n_clients` made in that time; at least one of each client."""
    where = urlsplit(base)
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        # bare streams: with 256 connections httpx's pool takes 60 requests a second, whoever answers them
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        while True:
            start = time.perf_counter()
            writer.write(head)
            writer.write(body)
            told = await reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(told)
            if not told.startswith(b"HTTP/1.1 200 ") or length is None:
                raise RuntimeError(f"{path} answered {told[:32]!r}")
            await reader.readexactly(int(length[1]))
            took.append(time.perf_counter() - start)
            if time.perf_counter() > end:
                break
        writer.close()

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return took


def load(base: str, path: str, body: bytes, n_clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second, and the time of each, sorted."""
    start = time.perf_counter()
    took = asyncio.run(asked(base, path, body, n_clients, seconds))
    return len(took) / (time.perf_counter() - start), sorted(took)


def percentile(sorted_s: Sequence[float], q: float) -> float:
    return sorted_s[max(0, math.ceil(q * len(sorted_s)) - 1)]


def memory_bytes(pid: int, field: str) -> int:
    """VmRSS, or VmHWM: the most there was since it was last reset."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) << 10


def line(pid: int, base: str, label: str, n_clients: int, seconds: float) -> list[str]:
    body = question(SIZES[label])
    load(base, OURS, body, 1, 0)
    rates: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    held_bytes = 0
    for path in (READ, HELD, OURS) * ROUNDS:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
        before = memory_bytes(pid, "VmRSS")
        rate, seconds_each = load(base, path, body, n_clients, seconds / ROUNDS)
        rates.setdefault(path, []).append(rate)
        took.setdefault(path, []).extend(seconds_each)
        if path == OURS:
            held_bytes = max(held_bytes, memory_bytes(pid, "VmHWM") - before)
    ratios = [number(median(map(truediv, rates[path], rates[OURS]))) for path in (READ, HELD)]
    times = [f"{percentile(sorted(took[path]), q) * 1000:.2f}" for q in (0.5, 0.99) for path in (OURS, READ)]
    rate = median(rates[OURS])
    return [label, str(n_clients), f"{rate:.0f}", *ratios, *times, number(held_bytes / n_clients / len(body))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each figure")
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="this size alone (repeatable)")
    parser.add_argument("--write", action="store_true", help="rewrite the figures of docs/performance.md")
    given = parser.parse_args(arguments)
    with service() as (pid, base):
        lines = [
            line(pid, base, label, n_clients, given.seconds)
            for label in given.size or SIZES
            for n_clients in CLIENTS
            if n_clients * 5 * SIZES[label] <= MOST_BYTES
        ]
    text = f"`python -m benchmarks.service`, {date.today().isoformat()}, {cpu()}:\n\n{table(HEAD, lines)}"
    print(text)
    if given.write:
        PAGE.write_text(rewrite(PAGE.read_text(), text, "service"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
