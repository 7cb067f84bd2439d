"""A store that speaks S3 (moto, over HTTP), and a proxy before it that does to its answers what networks and stores do."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
import obstore
import pytest
from obstore.store import S3Store
from safetensors.numpy import save_file

from maskserve.stores import calls, client

BUCKET = "bucket"
CODES = {
    "500": "InternalError", "501": "NotImplemented", "503": "SlowDown", "403": "AccessDenied", "404": "NoSuchKey",
    "409": "ConditionalRequestConflict", "416": "InvalidRange",
}  # fmt: skip
"""What a store says beside a status."""
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(slots=True)
class Fault:
    """What happens to requests of a method for keys that end so, as many times as it says, after some that pass."""

    kind: str
    method: str = "GET"
    ends: str = ""
    times: int = 1
    after: int = 0
    seconds: float = 0.0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not path.endswith(self.ends) or self.times == 0:
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a store; `faults` say which go wrong, and `log` what came."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what is tested."""

    def struck(self, method: str, path: str) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def requests(self, method: str, ends: str = "") -> list[dict[str, str]]:
        """The headers of the requests that came."""
        return [headers for m, path, headers in self.log if m == method and path.partition("?")[0].endswith(ends)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        """Nothing is said."""

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.log.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        fault = self.server.struck(self.command, unquote(self.path.partition("?")[0]))
        kind = fault.kind if fault else ""
        time.sleep(self.server.delay_s + (fault.seconds if fault and kind == "late" else 0))
        if kind in CODES:
            self.refuse(int(kind))
            return
        if kind == "reset":
            self.reset()
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "keep-alive")}
        if kind == "whole":
            headers = {k: v for k, v in headers.items() if k.lower() != "range"}
        if kind in ("retagged", "deaf"):
            headers = {k: v for k, v in headers.items() if k.lower() != "if-match"}
        if kind == "elsewhere":
            asked = next(value for name, value in headers.items() if name.lower() == "range")
            headers = {k: v for k, v in headers.items() if k.lower() != "range"}
            headers["Range"] = "bytes=1-" + asked.rpartition("-")[2]
        status, told, answer = self.asked(headers, body)
        if kind == "lost":
            self.reset()
            return
        self.answer(status, self.changed(kind, told), answer, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815 - names of the standard library

    def asked(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=30)
        try:
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            told = {k: v for k, v in answer.getheaders() if k.lower() not in HOP}
            told["Content-Length"] = answer.getheader("Content-Length") or "0"
            found = answer.read()
            if self.command != "HEAD":
                told["Content-Length"] = str(len(found))
            return answer.status, told, found
        finally:
            connection.close()

    def changed(self, kind: str, told: dict[str, str]) -> dict[str, str]:
        names = {k.lower(): k for k in told}
        if kind == "retagged":
            return {**told, names["etag"]: '"0123456789abcdef0123456789abcdef"'}
        if kind == "untagged":
            return {k: v for k, v in told.items() if k.lower() != "etag"}
        return told

    def answer(self, status: int, told: dict[str, str], body: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        self.send_response_only(status)
        if kind == "short":  # all of what it announces comes, and that is too little
            body = body[: len(body) // 2]
            told = {**told, "Content-Length": str(len(body))}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "truncated":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.reset(gently=True)
            return
        if kind == "stalled":
            assert fault is not None
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(fault.seconds)
            self.close_connection = True
            return
        if kind == "dripping":
            for i in range(0, len(body), 4096):
                self.wfile.write(body[i : i + 4096])
                time.sleep(0.001)
            return
        self.wfile.write(body)

    def refuse(self, status: int) -> None:
        body = f"<Error><Code>{CODES[str(status)]}</Code><Message>no</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def reset(self, *, gently: bool = False) -> None:
        if not gently:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR) if gently else self.connection.close()


@dataclass(slots=True)
class Stored:
    """The store as tests see it: what lies in it, past the proxy that those who are tested go through."""

    proxy: Proxy
    direct: S3Store
    environment: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, data: bytes) -> str:
        """The address of a new object."""
        obstore.put(self.direct, key, data, use_multipart=False)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self.direct, key).bytes())

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(one["path"] for one in obstore.list(self.direct, prefix or None).collect())

    def clear(self) -> None:
        for key in self.keys():
            obstore.delete(self.direct, key)
        self.proxy.faults.clear()
        self.proxy.log.clear()
        self.proxy.delay_s = 0.0

    def n_uploads(self) -> int:
        """Uploads in parts that were begun and neither ended nor given up."""
        host, port = self.proxy.upstream
        connection = http.client.HTTPConnection(host, port)
        connection.request("GET", f"/{BUCKET}?uploads")
        text = connection.getresponse().read().decode()
        connection.close()
        return text.count("<UploadId>")


@contextmanager
def store() -> Iterator[Stored]:
    """A store with an empty bucket and a proxy, as long as it is entered; what finds it there is in `environment`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy((host, port))
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    environment = {**keys, "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true"}
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().read() is not None
    connection.close()
    direct = S3Store(
        BUCKET, endpoint=f"http://{host}:{port}", access_key_id="test", secret_access_key="test", region="us-east-1",
        client_options={"allow_http": True},
    )  # fmt: skip
    try:
        yield Stored(proxy=proxy, direct=direct, environment=environment)
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def environment_with(extra: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **extra}


# -- fixtures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="running_store")
def running_fixture() -> Iterator[Stored]:
    with store() as stored:
        yield stored


@pytest.fixture(name="stored")
def stored_fixture(running_store: Stored, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """An empty bucket, which this process's environment leads to; waits between tries are short."""
    for name, value in running_store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(calls, "FIRST_WAIT_S", 0.001)
    client._client.cache_clear()
    running_store.clear()
    return running_store


SIZE = 700_001
"""Cells of the large sample: some parts of ahead, and a rest."""


@pytest.fixture(name="large", scope="session")
def large_fixture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """7 MB of cells, their mask and a coordinate."""
    random = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("large") / "rain.safetensors"
    cells, mask = random.standard_normal(SIZE * 2).astype("f4"), random.random(SIZE * 2) < 0.7
    save_file({"rain": cells.reshape(2, SIZE), "rain.mask": mask.reshape(2, SIZE)}, path)
    return path.read_bytes()
