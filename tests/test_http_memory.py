"""What a real process takes of memory: for a large request its body and its answer, and nothing once they are gone."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest

from maskserve_api.problems import MAX_BYTES
from tests.http_service import check_problem, payload, wait_until
from tests.payload_cases import CASES, VALID
from tests.test_http_security import process
from tests.test_v2 import asking, entry, first, words_for

MIB = 1 << 20
CONSTANT = 16 * MIB
"""What a first large request may take besides: threads, kernels, buffers of sockets."""
MEGABYTES = int(os.environ.get("MEGABYTES", "64"))
PIECE = 1 << 20
COUNT = "/v1/reduce?op=count"

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")


def held(pid: int, what: str = "VmRSS") -> int:
    """The bytes that a process has in memory; VmHWM: the most that it had."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def forget_peak(pid: int) -> None:
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system resets no peak: {error.strerror}")


@contextmanager
def connected(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client


@needs_proc
def test_hostile_payloads_get_small_problems_and_leave_nothing_in_the_process() -> None:
    with process() as (child, port), connected(port) as http:
        assert http.post(COUNT, content=VALID).status_code == 200
        before = held(child.pid)
        for case in CASES:
            source = case.source()
            pieces = (source.read(at, PIECE) for at in range(0, source.total, PIECE))
            told = http.post(COUNT, content=pieces, headers={"content-length": str(source.total)})
            assert len(told.content) <= MAX_BYTES, case.id
            if told.status_code != 200:
                assert 400 <= told.status_code < 500, case.id
                check_problem(told, told.status_code, told.json()["code"])
            assert case.must is None or told.status_code != 200, case.id
            assert http.post(COUNT, content=VALID).status_code == 200, case.id
        wait_until(lambda: held(child.pid) - before < 64 * MIB)


VERBS = ("reduce", "softmax", "fill")


def few_and(n_rows: int, verb: str) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """A path, a body and headers by each door: of a few rows first, so that threads and kernels are there."""
    words = words_for(first(verb))
    for n in (100, n_rows):
        cells = np.ones((n, 1000), np.float32)
        mask = cells > 0
        yield f"/v1/{verb}?{urlencode(words)}", payload(x=cells, x__mask=mask), {}
        inputs = [
            entry(name, [n, 1000], code, parameters={"binary_data_size": part.nbytes})
            for name, code, part in (("x", "FP32", cells), ("x.mask", "BOOL", mask))
        ]
        text = json.dumps(asking(inputs, words | {"binary_data_output": True})).encode()
        text += b" " * ((1 - len(text)) % 8)  # so that the cells begin at an odd place of the body
        length = {"Inference-Header-Content-Length": str(len(text))}
        yield f"/v2/models/{verb}/infer", b"".join((text, cells.data, mask.data)), length


def answered(port: int, path: str, body: bytes, headers: dict[str, str]) -> int:
    """The bytes of the answer, of which a piece at a time is held here."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return sum(map(len, iter(lambda: response.read(PIECE), b"")))


@needs_proc
def test_a_request_takes_its_body_and_its_answer_and_then_nothing() -> None:
    """No part of a body or of an answer is held twice, by either protocol."""
    with process("--max-body", "300MiB") as (child, port):
        for path, body, headers in (each for verb in VERBS for each in few_and(MEGABYTES * 200, verb)):
            before = held(child.pid)
            forget_peak(child.pid)
            n_bytes = answered(port, path, body, headers)
            most = before + 1.1 * len(body) + n_bytes + CONSTANT
            assert held(child.pid, "VmHWM") <= most, (path, len(body), n_bytes)
            wait_until(lambda: held(child.pid) <= before + CONSTANT)  # noqa: B023  # called before the next


def ask_in_all_sizes(port: int) -> None:
    for n_rows in (20_000, 1_000_000, 100_000, 400_000) * 2:
        cells = np.ones((n_rows, 4), np.float32)
        for verb in VERBS[:2]:
            words = words_for(first(verb))
            answered(port, f"/v1/{verb}?{urlencode(words)}", payload(x=cells, x__mask=cells > 0), {})


@needs_proc
def test_many_threads_leave_little_more_than_one() -> None:
    """Each thread of the lane allocates; without a bound, each keeps the most that it held: 300 MiB here."""
    with process() as (child, port):
        ask_in_all_sizes(port)
        before = held(child.pid)
        clients = [threading.Thread(target=ask_in_all_sizes, args=(port,)) for _ in range(12)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        wait_until(lambda: held(child.pid) - before < 128 * MIB)
