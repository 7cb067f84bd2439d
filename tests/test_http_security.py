"""Who may use the service, and what keeps it from those who may not, or who mean it no good."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from maskserve.errors import SettingsError
from maskserve.settings import BY_NAME
from maskserve_api import edge, server
from maskserve_api.body import Memory
from maskserve_api.keys import Keys
from maskserve_api.lanes import Lanes
from maskserve_api.metrics import Metrics
from maskserve_api.problems import MAX_BYTES
from tests.command_line import (
    COMMAND,
    ROOT,
    Maskserve,
    environment,
    folder_fixture,
    maskserve_fixture,
)
from tests.http_service import JSON, Running, check_problem, payload, running, wait_until

__all__ = ["folder_fixture", "maskserve_fixture"]

ALICE, BOB = "a" * 16, "B0b-!~:" + "b" * 32
QUESTION = b'{"data": [1, 2, null]}'
LARGE = payload(data=np.ones(1 << 17, np.float32))
"""More than is computed outside the lane."""


def keys_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


@pytest.fixture(name="locked", scope="module")
def locked_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service that asks for a key."""
    path = keys_file(tmp_path_factory.mktemp("keys"), f"# who\nalice:{ALICE}\n\n  bob:{BOB}\r\n")
    with running(keys=Keys(path)) as it:
        yield it


def ask(service: Running, **headers: str) -> httpx.Response:
    return service.post("/v1/reduce?op=sum", QUESTION, content_type=JSON, **headers)


def head(service: Running, *lines: str, method: str = "POST", path: str = "/v1/reduce?op=sum") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {service.netloc}", *lines, "", ""]).encode()


def received(connection: socket.socket, end: bytes) -> bytes:
    """What comes until `end`, or until nothing comes."""
    told = b""
    while not told.endswith(end) and (part := connection.recv(65536)):
        told += part
    return told


# -- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", [ALICE, BOB])
def test_a_known_key_is_let_in(locked: Running, scheme: str, key: str) -> None:
    assert ask(locked, authorization=f"{scheme} {key}").json() == {"data": 3}
    assert ask(locked, x_api_key=key).json() == {"data": 3}


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": ALICE},
     {"authorization": f"Basic {ALICE}"}, {"authorization": f"Bearer {ALICE[:-1]}"}, {"x_api_key": ""},
     {"authorization": f"Bearer {ALICE}{BOB}"}, {"authorization": "Bearer alice"}, {"x_api_key": f"alice:{ALICE}"},
     {"authorization": "Bearer \xe4\xff" + "x" * 9000}, {"authorization": "Bearer no", "x_api_key": ALICE}],
)  # fmt: skip
def test_without_a_known_key_there_is_a_401(locked: Running, headers: dict[str, str]) -> None:
    for path in ("/v1/reduce?op=sum", "/v1/ops", "/docs", "/docs/errors", "/openapi.json", "/nowhere", "//livez", "/"):
        given = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
        response = locked.http.request("POST" if "?" in path else "GET", path, headers=given)  # type: ignore[arg-type]  # bytes are right
        told = check_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == 'Bearer realm="maskserve"'
        assert ALICE not in str(told)


def test_health_and_metrics_need_no_key(locked: Running) -> None:
    assert [locked.http.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
    assert locked.http.get("/metrics").status_code != 401


@pytest.mark.parametrize("target", ["/v1/ops?x=/livez", "/livez/../v1/ops", "/v1/ops#/livez", "/v1/ops;/livez"])
@pytest.mark.parametrize("host", ["localhost/livez?x=", "localhost#/livez", "localhost"])
def test_no_host_and_no_path_is_taken_for_health(locked: Running, target: str, host: str) -> None:
    told = locked.raw(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.1 40[0134] ", told)


def test_a_key_is_asked_for_before_the_body_is(locked: Running) -> None:
    told = locked.raw(head(locked, "Content-Length: 1000", "Expect: 100-continue", "Connection: close"))
    assert told.startswith(b"HTTP/1.1 401 ")
    assert locked.service.memory.held_bytes == 0


def test_the_name_of_the_key_is_there_for_logs_and_the_key_is_not(tmp_path: Path) -> None:
    seen = []

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        seen.append(scope[edge.KEY])

    keys = Keys(keys_file(tmp_path, f"alice:{ALICE}\nbob:{BOB}"))
    metrics = Metrics(Lanes(1), Memory(1))
    scope = {"type": "http", "path": "/x", "method": "GET", "http_version": "1.1"}
    for key in (BOB, ALICE):
        given = {**scope, "headers": [(b"authorization", f"Bearer {key}".encode())]}
        with suppress(StopIteration):
            edge.Edge(app, None, keys, metrics)(given, None, None).send(None)  # type: ignore[arg-type]  # nothing is received
    assert seen == ["bob", "alice"]
    assert ALICE not in str(vars(keys))


FAULTS = {
    "": "has no key; a line is name:key",
    "# nothing\n\n": "has no key; a line is name:key",
    f"# fine\nalice {ALICE}": "line 2: there is no colon; a line is name:key",
    f":{ALICE}": "line 1: a name is 1 to 64 letters",
    f"al ice:{ALICE}": "line 1: a name is 1 to 64 letters",
    "alice:" + "k" * 15: "line 1: a key is 16 to 256 printable ASCII",
    f"alice:{ALICE} x": "line 1: a key is 16 to 256 printable ASCII",
    f"alice:{ALICE}\xe4": "line 1: a key is 16 to 256 printable ASCII",
    f"alice:{ALICE}\nalice:{BOB}": "line 2: the name alice is there twice",
    f"alice:{ALICE}\n\nbob:{ALICE}": "line 3: this key is there twice",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_file_of_keys_at_fault_stops_the_start_with_78_and_one_line(
    maskserve: Maskserve, tmp_path: Path, text: str
) -> None:
    path = keys_file(tmp_path, text)
    ran = maskserve("serve", "--port", "0", "--keys-file", path)
    assert ran.code == 78
    assert ran.err.startswith(f"maskserve: {path}")
    assert FAULTS[text] in ran.err
    assert ran.err.count("\n") == 1
    assert ALICE not in ran.err


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601])
def test_a_file_of_keys_that_others_may_open_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = keys_file(tmp_path, f"alice:{ALICE}", mode)
    with pytest.raises(
        SettingsError, match=re.escape(f"{path} is open to all users (mode {mode:o}): chmod 600 {path}")
    ):
        Keys(path)


def test_a_file_of_keys_that_is_none_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, "\0"):
        with pytest.raises(SettingsError, match="cannot be read"):
            Keys(str(path))
    with pytest.raises(SettingsError, match="has more than 1048576 bytes"):
        Keys(keys_file(tmp_path, "#" * (1 << 20) + "\n"))
    Keys(keys_file(tmp_path, f"alice:{ALICE}", 0o440))  # as a Secret of Kubernetes with an fsGroup


@pytest.mark.parametrize("argv", [(), ("--allowed-host", "a.example")])
def test_a_public_address_needs_keys_or_a_word_that_it_does_not(maskserve: Maskserve, argv: tuple[str, ...]) -> None:
    ran = maskserve("serve", "--port", "0", "--host", "0.0.0.0", *argv)
    assert (ran.code, ran.err.count("\n")) == (78, 1)
    assert "give --keys-file FILE, --allow-anonymous to let everyone in, or --host 127.0.0.1" in ran.err


def test_a_public_address_is_told_to_want_a_proxy(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.Server, "run", lambda *_, **__: None)
    ran = maskserve("serve", "--port", "0", "--host", "0.0.0.0", "--allow-anonymous")
    assert (ran.code, ran.err) == (
        0, "maskserve: 0.0.0.0 is served without TLS: put a proxy that terminates TLS in front (docs/security.md)\n",
    )  # fmt: skip
    assert maskserve("serve", "--port", "0").err == ""


def test_keys_and_no_keys_are_not_both_given(maskserve: Maskserve, tmp_path: Path) -> None:
    ran = maskserve("serve", "--allow-anonymous", "--keys-file", keys_file(tmp_path, f"alice:{ALICE}"))
    assert (ran.code, ran.err) == (78, "maskserve: --keys-file and --allow-anonymous exclude each other: give one\n")


# -- hosts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil", "[::2]", "a:b:80"])
def test_a_local_service_answers_to_its_own_names_only(service: Running, host: str) -> None:
    check_problem(service.http.get("/docs", headers={"host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"])
def test_a_local_service_answers_to_each_of_its_names(service: Running, host: str) -> None:
    assert service.http.get("/docs", headers={"host": host}).status_code == 200


def test_the_names_that_are_given_are_served_and_no_others() -> None:
    with running(allowed_hosts={"a.example", "[::1]"}) as service:
        for host, status in {"A.example:80": 200, "[::1]": 200, "localhost": 403}.items():
            assert service.http.get("/v1/ops", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "given", "allowed"),
    [
        ("127.0.0.1", (), {"localhost", "127.0.0.1", "[::1]"}),
        ("127.0.0.2", ("a.example",), {"localhost", "127.0.0.1", "[::1]", "127.0.0.2", "a.example"}),
        ("0.0.0.0", ("a.example",), {"a.example"}),
        ("0.0.0.0", (), None),
    ],
)
def test_hosts_are_checked_on_loopback_and_where_they_are_given(
    monkeypatch: pytest.MonkeyPatch, host: str, given: tuple[str, ...], allowed: set[str] | None
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(server, "create_app", lambda **words: seen.append(words["allowed_hosts"]))
    monkeypatch.setattr(server, "bound", lambda *_: socket.socket())
    monkeypatch.setattr(server, "rehearse", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        server.serve(
            host=host, port=0, max_body=1, request_timeout=1.0, grace=1.0, allow_anonymous=host == "0.0.0.0",
            allowed_host=given,
        )  # fmt: skip
    assert seen == [allowed]


def test_a_probe_by_pod_ip_is_answered(locked: Running) -> None:
    for path in ("/livez", "/readyz"):
        told = locked.raw(f"GET {path} HTTP/1.1\r\nHost: 10.1.2.3:8000\r\nConnection: close\r\n\r\n".encode())
        assert told.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "headers", [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
)
def test_a_page_of_another_site_is_refused_and_gets_no_cors(service: Running, headers: dict[str, str]) -> None:
    for method in ("POST", "OPTIONS"):
        response = service.http.request(method, "/v1/reduce?op=sum", headers=headers)
        check_problem(response, 403, "cross_site")
        assert not [name for name in response.headers if name.startswith("access-control")]


# -- how a request may come ---------------------------------------------------------------------------------------

LATER = "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLED = {
    "two lengths": ("POST /v1/reduce HTTP/1.1", "Content-Length: 5", "Content-Length: 6"),
    "a length twice": ("POST /v1/reduce HTTP/1.1", "Content-Length: 0", "content-length:0"),
    "a length twice in a line": ("POST /v1/reduce HTTP/1.1", "Content-Length: 0, 0"),
    "a folded line": ("GET /livez HTTP/1.1", "X: a", " b"),
    "another version": ("GET /livez HTTP/2.0",),
    "length and chunks": ("POST /v1/reduce HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"),
    "length and chunks, to health": ("GET /livez HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunks of 1.0": ("POST /v1/reduce HTTP/1.0", "Connection: keep-alive", "Transfer-Encoding: chunked"),
    "a coding before chunks": ("POST /v1/reduce HTTP/1.1", "Transfer-Encoding: gzip, chunked"),
    "chunks and none": ("POST /v1/reduce HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    "hidden chunks": ("POST /v1/reduce HTTP/1.1", "Transfer-Encoding: \x0bchunked"),
    "a space before the colon": ("POST /v1/reduce HTTP/1.1", "Transfer-Encoding : chunked"),
    "LF in headers": ("GET /livez HTTP/1.1", "X: a\nY: b"),
    "LF after the first line": ("GET /livez HTTP/1.1\nX: a",),
    "CR in headers": ("GET /livez HTTP/1.1", "X: a\rY: b"),
    "a length of thousands of digits": ("POST /v1/reduce HTTP/1.1", f"Content-Length: {'9' * 5000}"),
}


@pytest.mark.parametrize("lines", SMUGGLED.values(), ids=SMUGGLED)
def test_what_could_be_read_in_two_ways_is_refused_and_what_follows_is_not_read(
    service: Running, lines: tuple[str, ...]
) -> None:
    text = "\r\n".join([lines[0], "Host: localhost", *lines[1:], "", ""])
    told = service.raw((text + "0\r\n\r\n" + LATER).encode())
    assert told.startswith(b"HTTP/1.1 400 ")
    assert b'{"status":"alive"}' not in told
    assert b"connection: close" in told.lower()


@pytest.mark.parametrize(
    "chunks", ["2;e\r\r\n{}\r\n0\r\n\r\n", "2\r\n{}\r\n0;e;\rx\r\n\r\n", "0\r\nX: a\r\n b\r\n\r\n"]
)
def test_chunks_and_trailers_that_could_be_read_in_two_ways_are_refused(service: Running, chunks: str) -> None:
    start = head(service, "Transfer-Encoding: chunked", "Content-Type: application/json")
    told = service.raw(start + chunks.encode() + LATER.encode())
    assert b"HTTP/1.1 400 " in told
    assert b'{"status":"alive"}' not in told


def test_trailers_are_bounded_and_those_within_are_read(service: Running) -> None:
    start = head(service, "Transfer-Encoding: chunked", "Content-Type: application/json", path="/v1/reduce?op=sum")
    start += b'd\r\n{"data": [1]}\r\n0;ext=1\r\nX: y\r\n'
    fine = LATER.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode()
    told = service.raw(start + b"\r\n" + fine)
    assert re.findall(rb"HTTP/1.1 (\d+) ", told) == [b"200", b"200"]
    told = service.raw(start + b"Y: " + b"y" * 20_000 + b"\r\n\r\n" + fine)
    assert b"HTTP/1.1 431 " in told
    assert b'{"status":"alive"}' not in told


def test_an_empty_line_before_a_request_is_passed_over(service: Running) -> None:
    last = LATER.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    told = service.raw(f"\r\n{LATER}\r\n{last}".encode())
    assert told.count(b'{"status":"alive"}') == 2


def test_a_bare_lf_is_refused_in_a_pipelined_request_too_and_is_fine_in_a_body(service: Running) -> None:
    first = head(service, "Content-Length: 2", "Content-Type: application/json", path="/v1/nothing") + b"\n\n"
    told = service.raw(first + b"GET /livez HTTP/1.1\nHost: localhost\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+) ", told)[:2] == [b"404", b"400"]


@pytest.mark.parametrize(
    "more",
    [b"X: " + b"x" * 16384 + b"\r\n", b"X: y\r\n" * 129, b"X: y\r\n" * 100_000, b"X: " + b"x" * 5_000_000 + b"\r\n"],
    ids=["16 KiB", "129", "100000", "5 MB"],
)
def test_headers_beyond_their_bounds_are_a_431(service: Running, more: bytes) -> None:
    request = head(service, "Connection: close")[:-2] + more + b"\r\n"
    told = service.raw(request, timeout_s=30)
    assert told.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b"headers_too_large" in told


@pytest.mark.parametrize("path", ["/v1/reduce?op=sum", "/livez"])
def test_half_a_million_chunks_of_a_byte_are_refused_after_a_few(service: Running, path: str) -> None:
    before = service.service.memory.held_bytes
    told = service.raw(head(service, "Transfer-Encoding: chunked", path=path) + b"1\r\na\r\n" * 500_000, timeout_s=30)
    assert b"HTTP/1.1 413 " in told or path == "/livez"
    wait_until(lambda: service.service.memory.held_bytes == before)


def test_chunks_of_a_kilobyte_are_read_however_many(service: Running) -> None:
    body = payload(data=np.ones(1 << 19, np.float32))
    response = service.post("/v1/reduce?op=sum", (body[at : at + 300] for at in range(0, len(body), 300)))
    assert response.status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", head.__name__.encode(), b"GET / HTTP/1.1\r\nX: "])
def test_headers_that_do_not_end_are_closed_at_their_deadline_however_they_drip(sent: bytes) -> None:
    with (
        running(server={"header_timeout": 0.5}) as service,
        socket.create_connection(("127.0.0.1", service.port)) as one,
    ):
        one.settimeout(20)
        one.sendall(sent)
        with suppress(OSError):  # a byte every 50 ms puts nothing off
            for _ in range(400):
                one.settimeout(0.05)
                with suppress(TimeoutError):
                    assert one.recv(1) == b""
                    return
                one.sendall(b"a")
            pytest.fail("the connection is still open")


def test_an_idle_connection_lives_as_long_as_keep_alive_says_and_no_shorter() -> None:
    with running(server={"header_timeout": 0.2, "keep_alive": 30.0}) as service, ExitStack() as stack:
        one = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
        for _ in range(2):
            one.settimeout(20)
            one.sendall(LATER.encode())
            assert b'{"status":"alive"}' in received(one, b"}")
            one.settimeout(0.6)
            with pytest.raises(TimeoutError):
                one.recv(1)
    with running(server={"keep_alive": 0.2}) as service:
        assert service.raw(LATER.encode()).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_drips_is_given_up_at_the_deadline() -> None:
    with running(request_timeout=0.5) as service, socket.create_connection(("127.0.0.1", service.port)) as one:
        one.sendall(head(service, "Content-Length: 100000"))
        one.settimeout(0.05)
        told = b""
        for _ in range(400):
            with suppress(TimeoutError):
                if told := one.recv(65536):
                    break
            one.sendall(b"a")
        assert told.startswith(b"HTTP/1.1 408 ")


def test_a_body_of_another_length_than_it_says_is_refused(service: Running) -> None:
    short = head(service, "Content-Length: 24", "Connection: close", "X-Request-Timeout: 0.5") + QUESTION
    assert service.raw(short).startswith(b"HTTP/1.1 408 ")
    told = service.raw(head(service, "Content-Length: 21") + QUESTION + b"\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+) ", told)[0] == b"400"


ODD = [("OPTIONS", "/v1/reduce", 405), ("TRACE", "/v1/reduce", 405), ("HEAD", "/v1/reduce", 405),
       ("CONNECT", "example.org:443", 404), ("OPTIONS", "*", 404), ("GET", "http://evil.example/v1/ops", 404),
       ("PRI", "/", 405), ("GET", "/%00%ff%0d%0a", 404), ("DELETE", "/livez", 405)]  # fmt: skip


@pytest.mark.parametrize(("method", "target", "status"), ODD)
def test_odd_methods_and_targets_are_refused_one_by_one(
    service: Running, method: str, target: str, status: int
) -> None:
    upgrade = head(service, "Upgrade: websocket", "Connection: upgrade", method=method, path=target)
    told = service.raw(upgrade + head(service, "Connection: close", method="GET", path="/livez"))
    assert re.findall(rb"HTTP/1.1 (\d+) ", told) == [str(status).encode(), b"200"]


def test_a_range_is_not_read(service: Running) -> None:
    whole = ask(service).content
    ranges = "bytes=" + ",".join(f"{n}-" for n in range(2000))
    response = ask(service, range=ranges)
    assert (response.status_code, response.content) == (200, whole)


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/docs/../../etc/passwd", "/docs/%2e%2e%2fetc", "/v1/ops/..%2f.."]
)
def test_no_path_leads_to_a_file(service: Running, path: str) -> None:
    assert service.raw(head(service, "Connection: close", method="GET", path=path)).startswith(b"HTTP/1.1 404 ")


def test_the_service_connects_to_nothing() -> None:
    """No module of the service has what opens a connection."""
    text = "".join(path.read_text() for path in (ROOT / "api").rglob("*.py"))
    assert not re.search(
        r"\b(httpx|requests\.(get|post)|urllib\.request|aiohttp|create_connection|open_connection)\b", text
    )


# -- connections --------------------------------------------------------------------------------------------------


def test_where_all_connections_are_taken_the_longest_idle_one_makes_room() -> None:
    with running(server={"most_connections": 3}) as service, ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", service.port))) for _ in range(3)]
        wait_until(lambda: service.post("/v1/reduce?op=sum", QUESTION, content_type=JSON).status_code == 200)
        idle[0].settimeout(20)
        assert idle[0].recv(1) == b""


def test_who_takes_no_answer_keeps_no_connection() -> None:
    question = payload(data=np.ones(1 << 20, np.int8))  # the answer has 8 MiB, more than the system holds for a socket
    with running(request_timeout=1.0) as service, ExitStack() as stack:
        for _ in range(2):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            one.sendall(head(service, f"Content-Length: {len(question)}", path="/v1/scan?op=cumsum&dim=0") + question)
        wait_until(lambda: service.open_connections() == 2)
        wait_until(lambda: service.open_connections() == 0)


@contextmanager
def process(*argv: str, soft_files: int | None = None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A real `maskserve serve`, once it listens, and its port."""
    limit = f"ulimit -Sn {soft_files} && " if soft_files else ""
    command = ["bash", "-c", f'{limit}exec "$@"', "serve", *COMMAND, "serve", "--port", "0", "--log", "off", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            found = re.match(r"maskserve listens on http://127.0.0.1:(\d+);", line)
            assert found, line + child.stderr.read()
            yield child, int(found[1])
        finally:
            child.kill()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_command_of_the_first_line_works_where_only_one_name_is_served() -> None:
    argv = ["--host", "0.0.0.0", "--port", "0", "--allow-anonymous", "--allowed-host", "a.example", "--log", "off"]
    with subprocess.Popen([*COMMAND, "serve", *argv], stderr=subprocess.PIPE, text=True, env=environment()) as child:
        try:
            assert child.stderr is not None
            command = next(line.partition("; try: ")[2] for line in child.stderr if "; try: " in line)
            assert "-H 'Host: a.example'" in command
            answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
            assert json.loads(answer.stdout) == {"data": 3}
        finally:
            child.kill()


def request(port: int, body: bytes, *lines: str) -> bytes:
    head = ("POST /v1/reduce?op=sum HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}", *lines)
    return "\r\n".join([*head, "", ""]).encode() + body


def status(connection: socket.socket) -> int:
    """The status of the answer; 0 where the connection was refused or reset."""
    with suppress(OSError):
        if found := re.match(rb"HTTP/1.1 (\d+) ", connection.recv(65536)):
            return int(found[1])
    return 0


N_IDLE = 2000


def test_two_thousand_idle_connections_keep_nobody_out() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = N_IDLE + 256
    if 0 <= hard < wanted:
        pytest.skip(f"this system allows {hard} open files; the test needs {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with process("--header-timeout", "120", soft_files=256) as (_, port), ExitStack() as stack:
        for _ in range(N_IDLE):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            for _ in range(3):
                response = http.post("/v1/reduce?op=sum", content=QUESTION, headers={"content-type": JSON})
                assert response.json() == {"data": 3}


# -- the end ------------------------------------------------------------------------------------------------------


def test_a_drain_answers_what_was_sent_before_it_and_refuses_the_rest(tmp_path: Path) -> None:
    path = keys_file(tmp_path, f"alice:{ALICE}")
    small = (QUESTION, f"Content-Type: {JSON}", f"Authorization: Bearer {ALICE}")
    with process("--keys-file", path, "--drain-delay", "2", "--grace", "20") as (child, port), ExitStack() as stack:

        def connection() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))

        kept, running_work = connection(), connection()
        kept.sendall(request(port, *small))
        assert status(kept) == 200
        running_work.sendall(request(port, LARGE, f"Authorization: Bearer {ALICE}"))
        os.kill(child.pid, signal.SIGSTOP)  # so that it has accepted and read nothing of these when the signal comes
        waiting = [connection() for _ in range(100)]
        for each in waiting:
            each.sendall(request(port, *small))
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGCONT)
        assert [status(each) for each in (*waiting, running_work)] == [200] * 101
        base = f"http://127.0.0.1:{port}"
        wait_until(lambda: status_of_get(f"{base}/readyz") != 200)
        late = connection_or_none(port)
        if late is not None:
            stack.enter_context(late).sendall(request(port, *small))
            assert status(late) in (0, 503)
        assert child.wait(40) == 0
        assert child.stderr is not None
        assert child.stderr.read() == ""
        assert connection_or_none(port) is None


def status_of_get(url: str) -> int:
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=30).status_code
    return 0


def connection_or_none(port: int) -> socket.socket | None:
    with suppress(OSError):
        return socket.create_connection(("127.0.0.1", port), timeout=30)
    return None


def test_keys_are_read_again_at_sighup_and_a_half_sent_body_holds_up_no_end(tmp_path: Path) -> None:
    path = keys_file(tmp_path, f"alice:{ALICE}")
    with process("--keys-file", path, "--grace", "1", "--drain-delay", "0.5") as (child, port):
        base = f"http://127.0.0.1:{port}"

        def lets_in(key: str) -> bool:
            return httpx.get(f"{base}/v1/ops", headers={"x-api-key": key}, timeout=30).status_code == 200

        assert lets_in(ALICE)
        keys_file(tmp_path, f"bob:{BOB}")
        child.send_signal(signal.SIGHUP)
        wait_until(lambda: lets_in(BOB))
        assert not lets_in(ALICE)
        assert child.stderr is not None
        assert child.stderr.readline() == "maskserve: the keys were read again, 1 in all\n"
        keys_file(tmp_path, "nonsense")
        child.send_signal(signal.SIGHUP)
        line = child.stderr.readline()
        assert f"the keys stay as they were: {path}, line 1: there is no colon; a line is name:key" in line
        assert lets_in(BOB)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as half:
            half.sendall(request(port, LARGE, f"Authorization: Bearer {BOB}")[:-1])
            wait_until(lambda: status_of_get(f"{base}/livez") == 200)  # what came before has begun
            child.send_signal(signal.SIGTERM)
            assert status(half) == 503
        assert child.wait(40) == 0


def test_the_limits_of_payloads_are_those_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSERVE_JSON_BYTES", "1000")
    monkeypatch.setenv("MASKSERVE_MAX_TENSORS", "2")
    monkeypatch.setenv("MASKSERVE_HEADER_BYTES", "150")
    two = {name: np.ones(3, np.float32) for name in "ab"}
    v2 = b'{"inputs": [{"name": "data", "shape": [3], "datatype": "FP32", "data": [1, 2, 3]}]}' + b" " * 1000
    with process() as (_, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        for path, body, kind, status in (
            ("/v1/reduce?op=sum", b'{"data": [1, 2, 3]}', JSON, 200),
            ("/v1/reduce?op=sum", b'{"data": [' + b"1," * 200 + b"1]}", JSON, 413),  # too many values
            ("/v1/reduce?op=sum", b'{"data": [1, 2, 3]}' + b" " * 1000, JSON, 413),
            ("/v1/reduce?op=sum", payload(**two), "", 200),
            ("/v1/reduce?op=sum", payload(c=np.ones(1, np.float32), **two), "", 413),
            ("/v1/reduce?op=sum", payload(**{"c" * 99: np.ones(1, np.float32)}), "", 413),
            ("/v2/models/reduce/infer?op=sum", v2, JSON, 413),
        ):
            response = http.post(path, content=body, headers={"content-type": kind} if kind else {})
            assert response.status_code == status, (body, response.text)
        asked = {"accept": "application/json"}
        many = http.post("/v1/scan?op=cumsum&dim=0", content=payload(data=np.ones(400, np.float32)), headers=asked)
        check_problem(many, 406, "not_acceptable")


# -- logs ---------------------------------------------------------------------------------------------------------


def test_nothing_a_client_sends_reaches_a_log_unescaped_or_unbounded(
    service: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "\r\nFAKE \x1b[31m\u2028" + "x" * 100_000

    def fail(*_: object) -> None:
        raise RuntimeError(evil)

    monkeypatch.setattr("maskserve_api.work.Work.decoded_small", fail)
    caplog.set_level(logging.DEBUG)
    response = ask(service, x_request_id="a b")
    told = check_problem(response, 500, "internal")
    assert "FAKE" not in str(told)
    assert len(response.content) <= MAX_BYTES
    service.raw(b"\x1b[31mFAKE\r\n\r\n")
    service.http.get("/%0d%0aFAKE%1b[31m", headers={"referer": "x" * 9000, "user-agent": "\x1b[31m"})
    ours = [record for record in caplog.records if record.name.startswith(("maskserve", "uvicorn"))]
    assert ours
    for record in ours:
        message = logging.Formatter().format(record)
        assert not set("\r\x1b\u2028") & set(message)
        assert not re.search(r"^FAKE", message, re.MULTILINE)
        assert len(message) < 20_000


def test_a_reply_that_breaks_off_is_one_warning_with_its_request_and_no_other_line() -> None:
    question = payload(data=np.ones(1 << 20, np.int8))  # the answer has 8 MiB, more than the system holds for a socket
    lines = (f"Content-Length: {len(question)}", "X-Request-Id: mine")
    with process("--request-timeout", "1", "--grace", "1") as (child, port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            text = "\r\n".join(["POST /v1/scan?op=cumsum&dim=0 HTTP/1.1", "Host: localhost", *lines, "", ""])
            connection.sendall(text.encode() + question)
            assert child.stderr is not None
            assert "request mine: the reply broke off: TimeoutError" in child.stderr.readline()
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
        assert child.stderr.read() == ""


# -- what docs/security.md says -----------------------------------------------------------------------------------


@pytest.fixture(name="page")
def page_fixture() -> str:
    return (ROOT / "docs" / "security.md").read_text()


def test_the_page_has_a_row_for_each_attack(page: str) -> None:
    assert re.findall(r"^\| (H\d\d) \|", page, re.MULTILINE) == [f"H{n:02}" for n in range(1, 42)]


def test_each_test_that_the_page_names_is_there(page: str) -> None:
    named = re.findall(r"`(test_\w+)`", page)
    there = {
        name
        for file in ROOT.glob("tests/test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 20
    assert set(named) <= there


def test_each_setting_that_the_page_names_is_there(page: str) -> None:
    flags = set(re.findall(r"`--([a-z-]+)`", page))
    assert {f"serve_{flag.replace('-', '_')}" for flag in flags} <= set(BY_NAME)
