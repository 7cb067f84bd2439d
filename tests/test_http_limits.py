"""The HTTP road under bad luck and bad will: broken bodies, slow clients, a full queue, a shutdown."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from maskserve.errors import SettingsError
from maskserve_api import work
from maskserve_api.body import Memory
from maskserve_api.server import serve
from maskserve_api.turns import Cancelled
from tests.http_service import FIELDS, JSON, Running, check_problem, lane_blocked, payload, running, wait_until

QUESTION = payload(data=np.ones(3, np.float32))
LARGE = payload(data=np.ones(1 << 18, np.float32))
"""More than is computed outside the lane."""


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(queue=2, max_body=32 << 20) as it:
        yield it


def head(service: Running, *lines: str, path: str = "/v1/reduce?op=sum") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {service.netloc}", *lines, "", ""]).encode()


def alive(service: Running) -> bool:
    return service.post("/v1/reduce?op=sum", QUESTION).status_code == 200


# -- bodies -------------------------------------------------------------------------------------------------------


def test_a_body_shorter_than_declared_is_never_computed(service: Running) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head(service, f"Content-Length: {len(QUESTION) + 1}") + QUESTION)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert alive(service)
    assert service.service.memory.held_bytes == 0


def test_what_follows_a_body_is_not_part_of_it(service: Running) -> None:
    told = service.raw(head(service, f"Content-Length: {len(QUESTION)}") + QUESTION + b"more\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200 ")
    assert told.count(b"HTTP/1.1 400 ") == 1
    assert alive(service)


@pytest.mark.parametrize("lines", [("Content-Length: 5", "Transfer-Encoding: chunked")])
def test_two_ways_to_say_the_length_are_refused(service: Running, lines: tuple[str, ...]) -> None:
    told = service.raw(head(service, *lines) + b"0\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 400 ")
    assert b"bad_framing" in told
    assert b"connection: close" in told.lower()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/reduce HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/reduce HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/reduce HTTP/1.1\r\nHost: a\r\nContent-Length: 1e3\r\n\r\n",
        b"POST /v1/reduce HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ],
    ids=["garbage", "no host", "two hosts", "long header", "long path", "negative", "not a number", "two lengths"],
)
def test_what_is_no_http_gets_a_problem_and_a_closed_connection(service: Running, request_bytes: bytes) -> None:
    told = service.raw(request_bytes)
    assert told.startswith(b"HTTP/1.1 431 " if len(request_bytes) > 16384 else b"HTTP/1.1 400 ")
    assert b"application/problem+json" in told
    assert alive(service)


def test_a_chunk_that_is_none_ends_the_connection_and_nothing_else(service: Running) -> None:
    service.raw(head(service, "Transfer-Encoding: chunked") + b"5\r\nabcde\r\nZZ\r\n")
    assert alive(service)
    assert service.service.memory.held_bytes == 0


def test_a_body_too_large_is_refused_before_it_is_asked_for(service: Running) -> None:
    told = service.raw(head(service, "Content-Length: 10000000000", "Expect: 100-continue"))
    assert told.startswith(b"HTTP/1.1 413 ")


def test_who_sends_on_after_a_refusal_still_hears_it(service: Running) -> None:
    check_problem(service.post("/v1/reduce?op=sum", bytes(64 << 20)), 413, "too_large")


@pytest.mark.parametrize("cell", [b"1", b"[]", b"{}", b'{"a":1}', b'""'])
@pytest.mark.parametrize("path", ["/v1/reduce?op=sum", "/v2/models/reduce/infer"])
def test_json_that_would_stop_all_others_while_it_is_parsed_is_refused(
    service: Running, path: str, cell: bytes
) -> None:
    body = b'{"inputs": [' + (b"," + cell) * ((15 << 20) // (len(cell) + 1)) + b"]}"
    told = service.post(path, gzip.compress(body, 1), content_type=JSON, content_encoding="gzip")
    problem = check_problem(told, 413, "too_large")
    assert "safetensors" in problem["detail"]


def test_json_of_many_numbers_is_read() -> None:
    with running(max_body=16 << 20) as service:
        body = b'{"data": [0' + b",0.25" * ((1 << 21) - 16) + b"]}"
        told = service.post("/v1/reduce?op=sum", body, content_type=JSON)
        assert json.loads(told.content) == {"data": ((1 << 21) - 16) / 4}


def test_a_body_that_never_comes_is_given_up(service: Running) -> None:
    start = time.monotonic()
    told = service.raw(head(service, "Content-Length: 100000", "X-Request-Timeout: 0.3") + b"abc")
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"body_timeout" in told
    assert time.monotonic() - start < 5


def test_bodies_in_flight_are_bounded_together() -> None:
    with running(max_body=1 << 20) as service:
        service.service.memory.limit_bytes = 1 << 20
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head(service, f"Content-Length: {1 << 20}") + bytes(900_000))
            wait_until(lambda: service.service.memory.held_bytes >= 900_000)
            check_problem(service.post("/v1/reduce?op=sum", bytes(900_000)), 503, "busy")
        wait_until(lambda: service.service.memory.held_bytes == 0)
        assert alive(service)


def test_a_request_whose_headers_never_end_is_closed() -> None:
    with running(server={"header_timeout": 0.3}) as service:
        for sent in (b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Half: "):
            assert service.raw(sent) == b""
        answer = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert service.raw(answer + b"GET /li").startswith(b"HTTP/1.1 200 ")


# -- the lane -----------------------------------------------------------------------------------------------------


def test_small_work_does_not_wait_for_the_lane(service: Running) -> None:
    with lane_blocked(service):
        assert alive(service)


def test_work_that_waits_beyond_its_deadline_is_a_504(service: Running) -> None:
    with lane_blocked(service):
        check_problem(service.post("/v1/reduce?op=sum", LARGE, x_request_timeout="0.3"), 504, "deadline_exceeded")
    wait_until(lambda: service.service.lanes.cpu.n_pending == 0)


async def held_up(service: Running, n: int) -> list[int]:
    """The statuses of `n` requests that find the lane blocked; those that got in are answered once it is free."""
    async with httpx.AsyncClient(base_url=f"http://{service.netloc}", timeout=30) as client:

        async def ask() -> httpx.Response:
            return await client.post("/v1/reduce?op=sum", content=LARGE)

        with lane_blocked(service):
            tasks = [asyncio.ensure_future(ask()) for _ in range(n)]
            while sum(task.done() for task in tasks) < n - service.service.lanes.cpu.limit:
                await asyncio.sleep(0.01)
        responses = await asyncio.gather(*tasks)
    for response in responses:
        if response.status_code != 200:
            check_problem(response, 503, "busy")
    return sorted(response.status_code for response in responses)


def test_a_full_queue_is_a_503(service: Running) -> None:
    assert asyncio.run(held_up(service, 4)) == [200, 200, 503, 503]


def test_who_goes_away_is_not_computed_for(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    lane, computed = service.service.lanes.cpu, threading.Event()
    monkeypatch.setattr("maskserve_api.work.Work.reply", lambda self: computed.set())
    with lane_blocked(service):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head(service, f"Content-Length: {len(LARGE)}") + LARGE)
            wait_until(lambda: lane.n_pending == 1)
        wait_until(lambda: lane.n_pending == 0)
    assert service.service.memory.held_bytes == 0
    lane.submit(lambda: None).future.result(10)  # the queue is worked off
    assert not computed.is_set()


def test_a_client_that_takes_no_answer_is_left() -> None:
    with running(max_body=64 << 20, request_timeout=1.0) as service:
        question = payload(data=np.ones(8 << 20, np.int8))
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head(service, f"Content-Length: {len(question)}", path="/v1/scan?op=cumsum&dim=0"))
            connection.sendall(question)
            wait_until(lambda: service.service.memory.held_bytes > 0)
            wait_until(lambda: service.service.memory.held_bytes == 0)
        assert alive(service)


def test_a_thread_that_outlives_its_deadline_is_counted_until_it_ends_and_no_longer(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, decoding, release = service.service.memory, threading.Event(), threading.Event()
    decode = work.decode

    def slowly(*given: Any) -> Any:
        decoding.set()
        release.wait(30)
        return decode(*given)

    monkeypatch.setattr(work, "decode", slowly)
    try:
        check_problem(
            service.post("/v1/scan?op=cumsum&dim=0", LARGE, x_request_timeout="0.3"), 504, "deadline_exceeded"
        )
        assert decoding.is_set()
        assert memory.held_bytes == len(LARGE)
        assert service.service.lanes.cpu.n_pending == 1
    finally:
        release.set()
    wait_until(lambda: memory.held_bytes == service.service.lanes.cpu.n_pending == 0)
    monkeypatch.undo()
    service.service.lanes.cpu.submit(lambda: None).future.result(10)  # the thread that was given up has had its turn
    assert memory.held_bytes == 0
    assert alive(service)


def test_a_claim_that_has_ended_takes_no_more() -> None:
    memory = Memory(100)
    with memory.claim() as claim:
        claim.add(10)
        thread = claim.held()
        thread.__enter__()
    assert memory.held_bytes == 10
    with pytest.raises(Cancelled):
        claim.add_answer(90)
    thread.__exit__(None, None, None)
    assert memory.held_bytes == 0
    with pytest.raises(Cancelled), claim.held():
        pass
    assert memory.held_bytes == 0


# -- the process --------------------------------------------------------------------------------------------------

SERVE = """
import sys
from maskserve_api import work
from maskserve_api.body import Memory
from maskserve_api.server import serve
from maskserve_api.turns import Cancelled
sys.exit(serve(host=sys.argv[1], port=int(sys.argv[2]), max_body=1 << 22, request_timeout=20.0, grace=1.0))
"""


@contextmanager
def process(host: str = "127.0.0.1") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and the line it printed when ready."""
    path = os.pathsep.join([".", "cli", "api", os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, host, "0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": path},
    ) as child:
        try:
            assert child.stderr is not None
            yield child, child.stderr.readline()
        finally:
            child.kill()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_how_to_use_it_and_ends_with_0(sent: signal.Signals) -> None:
    with process() as (child, line):
        assert line.startswith("maskserve listens on http://127.0.0.1:")
        command = line.strip().partition("try: ")[2]
        told = subprocess.run(command, shell=True, capture_output=True, check=True, timeout=30)  # as a user would
        assert told.stdout.startswith(b'{"data": ')
        child.send_signal(sent)
        assert child.wait(20) == 0
        assert child.stderr is not None
        assert [json.loads(event)["status"] for event in child.stderr] == [200]


def test_a_half_sent_body_keeps_no_process_beyond_its_grace() -> None:
    with process() as (child, line):
        port = int(line.partition("127.0.0.1:")[2].partition(";")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/reduce?op=sum HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nabc"
            )
            time.sleep(0.3)
            child.send_signal(signal.SIGTERM)
            told = b"".join(iter(lambda: connection.recv(65536), b""))
            assert told.startswith(b"HTTP/1.1 503 ")
            assert b"draining" in told
        assert child.wait(20) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_waits_for_nobody_and_is_no_clean_end(sent: signal.Signals) -> None:
    with process() as (child, line):
        port = int(line.partition("127.0.0.1:")[2].partition(";")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"POST /v1/reduce?op=sum HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc")
            time.sleep(0.3)
            child.send_signal(sent)
            time.sleep(0.2)
            assert child.poll() is None
            child.send_signal(sent)
            assert child.wait(20) == 128 + sent


def test_a_draining_service_is_not_ready_and_takes_no_work() -> None:
    with running() as service:
        service.service.draining = True
        check_problem(service.http.get("/readyz"), 503, "draining")
        check_problem(service.post("/v1/reduce?op=sum", QUESTION), 503, "draining")
        assert service.http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    ("host", "says"),
    [("0.0.0.0", "--allow-anonymous"), ("no such host", "not an address"), ("192.0.2.1", "--allow-anonymous")],
)
def test_an_address_that_must_not_or_cannot_be_bound_is_a_setting_at_fault(host: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        serve(host=host, port=0, max_body=1, request_timeout=1.0, grace=1.0)
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_one_clear_line(service: Running) -> None:
    with pytest.raises(SettingsError, match=f"127.0.0.1:{service.port} cannot be listened on: address already in use"):
        serve(host="127.0.0.1", port=service.port, max_body=1, request_timeout=1.0, grace=1.0)


def test_health_is_told_to_any_host(service: Running) -> None:
    for path in ("/livez", "/readyz"):
        assert service.http.get(path, headers={"host": "10.1.2.3:8000"}).status_code == 200
    check_problem(service.http.get("/v1/ops", headers={"host": "10.1.2.3:8000"}), 403, "host_not_allowed")


def test_a_link_from_elsewhere_may_be_followed_and_a_fetch_may_not(service: Running) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert service.http.get("/docs", headers=link).status_code == 200
    fetch = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}
    assert check_problem(service.http.get("/docs", headers=fetch), 403, "cross_site").keys() == FIELDS
    own = {"sec-fetch-site": "same-origin", "origin": f"http://{service.netloc}"}
    assert service.http.get("/docs", headers=own).status_code == 200
