"""A real service for tests: uvicorn on a free port, in a thread, with its Service at hand; and raw sockets to it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np

from maskserve.dtypes import BY_TORCH
from maskserve.payload.format import Output, to_bytes
from maskserve_api.app import create_app
from maskserve_api.forms import bounded
from maskserve_api.jobs.desk import Jobs, Options
from maskserve_api.server import Server
from maskserve_api.verbs import Service

MAX_BODY = 1 << 22
SAFETENSORS, JSON, BINARY = "application/vnd.safetensors", "application/json", "application/octet-stream"
FIELDS = {"type", "title", "status", "code", "detail", "error", "parameter", "allowed", "request_id"}


@dataclass(frozen=True, slots=True)
class Running:
    """A service that answers on `port`."""

    port: int
    service: Service
    http: httpx.Client
    open_connections: Callable[[], int]

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.port}"

    def post(self, path: str, body: Any = b"", **headers: str) -> httpx.Response:
        """A POST, with header names spelled as keywords."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(path, content=body, headers=given)

    def raw(self, request: bytes, *, timeout_s: float = 10) -> bytes:
        """All that comes back for these bytes until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(request)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)


@contextmanager
def running(*, server: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> Iterator[Running]:
    """A service of an application with these `options`, on a server with those."""
    app = create_app(**{"max_body": MAX_BODY, "request_timeout": 20.0} | options)
    listener = socket.create_server(("127.0.0.1", 0))
    served = Server(app, "127.0.0.1", grace=1.0, **server)
    thread = threading.Thread(target=served.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: served.started)
    port = listener.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield Running(port, app.state.service, http, lambda: len(served.server_state.connections))
    finally:
        served.should_exit = True
        thread.join()


def jobs_in(folder: Path, **changes: Any) -> Jobs:
    """The jobs of a folder, under mild limits."""
    options = {
        "result_ttl_s": 3600.0, "n_running": 2, "max_body": 64 << 20, "per_key": 1000, "most": 2000, "most_bytes": 1 << 30,
        "memory": 256 << 20,
    }  # fmt: skip
    return Jobs(Options(folder=str(folder), **(options | changes)), bounded())


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def payload(metadata: dict[str, str] | None = None, **tensors: Any) -> bytes:
    """Tensors by name, where "__" spells the dot: payload(x=..., x__mask=...)."""
    outputs = []
    for name, cells in tensors.items():
        array = np.ascontiguousarray(cells)
        dtype = BY_TORCH[str(array.dtype)]
        outputs.append(Output(name.replace("__", "."), dtype, array.shape, array.tobytes()))
    return to_bytes(outputs, metadata or {})


def check_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem in `response`, in the shape that all have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) <= 8192
    told: dict[str, Any] = json.loads(response.content)
    assert told.keys() == FIELDS
    assert told["code"] == code
    assert told["type"] == f"/docs/errors#{code}"
    assert told["status"] == status
    assert told["error"] == told["detail"] != ""
    assert told["request_id"] == response.headers["x-request-id"]
    if status == 503:
        assert int(response.headers["retry-after"]) > 0
    return told


@contextmanager
def lane_blocked(service: Running) -> Iterator[None]:
    """One request has the lane's turn until the block ends."""
    release, started = threading.Event(), threading.Event()

    def occupy() -> None:
        started.set()
        release.wait(30)

    service.service.lanes.cpu.submit(occupy)
    assert started.wait(10)
    try:
        yield
    finally:
        release.set()
