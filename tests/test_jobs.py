"""Jobs: a request that is answered later has the answer that it would have had at once, and whoever asked decides over it."""

from __future__ import annotations

import asyncio
import errno
import gc
import gzip
import json
import logging
import os
import re
import socket
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as metrics
from starlette.datastructures import Headers

from maskserve import requests
from maskserve.ops.parameters import REQUIRED
from maskserve_api.errors import RangeError
from maskserve_api.jobs import ranges
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.headers import prefers_async
from maskserve_api.jobs.quota import ROW_BYTES
from maskserve_api.jobs.waiting import Waiting
from maskserve_api.keys import Keys
from maskserve_api.server import default_folder
from tests.http_service import (
    JSON,
    SAFETENSORS,
    Running,
    check_problem,
    jobs_in,
    lane_blocked,
    payload,
    running,
    wait_until,
)

QUESTION = payload(data=np.array([[1, 1e9, 3], [4, 5, 6]], np.float32), mask=np.array([[1, 0, 1], [1, 1, 1]], bool))
LARGE = payload(data=np.arange(1 << 16, dtype=np.float32).reshape(256, 256))
"""More than the store keeps: its body and its softmax are files."""
FIELDS = {
    "id", "status", "verb", "request", "progress", "created", "started", "ended", "expires", "result", "problem",
}  # fmt: skip
MEAN = "/v1/reduce?op=mean&dim=0"


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture(name="service")
def service_fixture(folder: Path) -> Iterator[Running]:
    with running(jobs=jobs_in(folder)) as it:
        yield it


def submitted(service: Running, path: str = MEAN, body: bytes = QUESTION, **headers: str) -> str:
    """The path of a job that was taken."""
    response = service.post(path, body, prefer="respond-async", **headers)
    assert response.status_code == 202, response.text
    location: str = response.headers["location"]
    return location


def ended(service: Running, path: str) -> dict[str, Any]:
    """The job, once it has ended."""
    told: dict[str, Any] = service.http.get(f"{path}?wait=30").json()
    assert told["ended"], told
    return told


def jobs_of(service: Running) -> Jobs:
    assert service.service.jobs is not None
    return service.service.jobs


# -- the way of a job -------------------------------------------------------------------------------------------------


def test_a_job_says_on_which_device_it_is_computed(service: Running) -> None:
    accepted = service.post(f"{MEAN}&device=cpu", QUESTION, prefer="respond-async").json()
    assert accepted["request"] == {"op": "mean", "dim": [0], "device": "cpu"}
    assert ended(service, accepted["links"]["self"])["request"] == accepted["request"]


def test_a_job_is_told_of_from_its_202_to_its_result(service: Running) -> None:
    response = service.post(MEAN, QUESTION, prefer="respond-async")
    assert response.status_code == 202
    accepted = response.json()
    assert accepted.keys() == {"id", "status", "verb", "request", "created", "links"}
    assert (accepted["status"], accepted["verb"], accepted["request"]) == (
        "queued",
        "reduce",
        {"op": "mean", "dim": [0]},
    )
    assert accepted["links"] == {"self": f"/v1/jobs/{accepted['id']}", "result": f"/v1/jobs/{accepted['id']}/result"}
    assert response.headers["location"] == accepted["links"]["self"]
    assert (response.headers["retry-after"], response.headers["preference-applied"]) == ("1", "respond-async")
    told = ended(service, accepted["links"]["self"])
    assert told.keys() == FIELDS
    assert (told["id"], told["status"], told["problem"]) == (accepted["id"], "succeeded", None)
    assert told["progress"] == {"done": 1, "total": 1, "unit": "blocks"}
    times = [datetime.fromisoformat(told[name]) for name in ("created", "started", "ended", "expires")]
    assert times == sorted(times)
    assert abs((times[0] - datetime.now(UTC)).total_seconds()) < 60
    result = service.http.get(accepted["links"]["result"])
    assert told["result"] == {
        "bytes": len(result.content), "sha256": sha256(result.content).hexdigest(), "content_type": SAFETENSORS,
    }  # fmt: skip
    assert result.headers["etag"] == f'"{told["result"]["sha256"]}"'


def simple_requests() -> list[str]:
    """A request for each op that needs no word but dim."""
    found = []
    for verb in ("reduce", "softmax", "scan", "fill", "grad"):
        for row in requests.rows(verb):
            needed = {p.name for p in row.requestable if p.default is REQUIRED}
            if needed <= {"dim"}:
                found.append(f"/v1/{verb}?op={row.name}" + ("&dim=0" if needed else ""))
    return found


@pytest.mark.parametrize("form", [SAFETENSORS, JSON])
def test_the_result_of_each_op_is_what_the_synchronous_answer_is(service: Running, form: str) -> None:
    paths = simple_requests()
    assert len(paths) > 40
    at_once = {path: service.post(path, QUESTION, accept=form) for path in paths}
    taken = {path: service.post(path, QUESTION, accept=form, prefer="respond-async") for path in paths}
    for path, answer in at_once.items():
        if taken[path].status_code != 202:  # what the plan refuses is refused at once
            assert (taken[path].status_code, taken[path].json()["code"]) == (answer.status_code, answer.json()["code"])
            continue
        location = taken[path].headers["location"]
        told = ended(service, location)
        result = service.http.get(f"{location}/result")
        assert result.status_code == answer.status_code, path
        assert result.headers["content-type"] == answer.headers["content-type"]
        if answer.status_code == 200:
            assert (told["status"], result.content) == ("succeeded", answer.content), path
        else:
            assert (told["status"], told["problem"]["code"]) == ("failed", answer.json()["code"])


def test_large_bodies_and_results_are_files_and_small_ones_are_none(service: Running, folder: Path) -> None:
    with lane_blocked(service):
        large, small = submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE), submitted(service)
        assert [path.name for path in (folder / "bodies").iterdir()] == [large.rpartition("/")[2]]
    for path in (large, small):
        ended(service, path)
    assert [path.name for path in (folder / "results").iterdir()] == [large.rpartition("/")[2]]
    assert list((folder / "bodies").iterdir()) == []
    answer = service.post("/v1/softmax?op=softmax&dim=0", LARGE)
    assert service.http.get(f"{large}/result").content == answer.content
    assert service.http.delete(large).status_code == 204
    assert list((folder / "results").iterdir()) == []


def test_what_does_not_fit_into_memory_is_streamed_with_the_same_bits_and_its_progress_is_true(folder: Path) -> None:
    body = payload(data=np.random.default_rng(1).normal(size=(1 << 12, 1 << 12)).astype(np.float32))
    with running(jobs=jobs_in(folder, memory=1, max_body=80 << 20), max_body=80 << 20) as service:
        path = submitted(service, "/v1/softmax?op=softmax&dim=1", body)
        seen = []
        while (told := service.http.get(f"{path}?wait=0.05").json())["ended"] is None:
            seen.append(told["progress"])
        seen.append(told["progress"])
        assert told["status"] == "succeeded", told
        expected = service.post("/v1/softmax?op=softmax&dim=1", body).content
        assert service.http.get(f"{path}/result").content == expected
    totals, done = {p["total"] for p in seen}, [p["done"] for p in seen]
    assert totals == {len(body) // (1 << 20)}
    assert done == sorted(done)
    assert done[-1] == seen[-1]["total"]
    assert any(0 < n < done[-1] for n in done[:-1]), done


def test_forms_codings_and_chunks_are_those_of_a_synchronous_request(service: Running) -> None:
    text = b'{"data": [[1, 2, null], [4, 5, 6]]}'
    for body, headers in (
        (text, {"content_type": JSON}),
        (text, {"content_type": JSON, "accept": SAFETENSORS}),
        (gzip.compress(LARGE), {"content_encoding": "gzip", "accept": JSON}),
        (gzip.compress(QUESTION), {"content_encoding": "gzip"}),
    ):
        answer = service.post(MEAN, body, **headers)
        path = submitted(service, MEAN, body, **headers)
        ended(service, path)
        result = service.http.get(f"{path}/result")
        assert (result.content, result.headers["content-type"]) == (answer.content, answer.headers["content-type"])
    chunked = service.http.post(MEAN, content=iter([LARGE[:99], LARGE[99:]]), headers={"prefer": "respond-async"})
    assert ended(service, chunked.headers["location"])["status"] == "succeeded"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/reduce?op=maen", QUESTION, 422, "unknown_op"),
        ("/v1/reduce?op=mean&dim=7", QUESTION, 422, "dim_out_of_range"),
        (MEAN, b"", 400, "malformed_payload"),
        (MEAN, b"no payload", 400, "malformed_payload"),
        (MEAN, b'{"data": [1]}' * 9000, 400, "malformed_payload"),
        (MEAN, LARGE[:-1], 400, "malformed_payload"),
    ],
)
def test_what_can_be_refused_is_refused_at_once_and_leaves_nothing(
    service: Running, folder: Path, path: str, body: bytes, status: int, code: str
) -> None:
    assert service.post(path, body).status_code == status
    check_problem(service.post(path, body, prefer="respond-async"), status, code)
    assert service.http.get("/v1/jobs").json() == {"jobs": [], "next": None}
    assert list((folder / "bodies").iterdir()) == []
    assert (jobs_of(service).quota.n_bytes, jobs_of(service).quota.n_open.total()) == (0, 0)


def test_a_body_that_breaks_off_leaves_nothing(service: Running, folder: Path) -> None:
    head = f"POST {MEAN} HTTP/1.1\r\nHost: {service.netloc}\r\nPrefer: respond-async\r\nContent-Length: 900000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head.encode() + LARGE[:200_000])
        wait_until(lambda: len(list((folder / "bodies").iterdir())) == 1)
    wait_until(lambda: list((folder / "bodies").iterdir()) == [])
    assert jobs_of(service).quota.n_bytes == service.service.memory.held_bytes == 0


def test_a_jobs_body_may_be_larger_than_a_requests_and_is_bounded_by_itself(folder: Path) -> None:
    with running(jobs=jobs_in(folder, max_body=300_000), max_body=100_000) as service:
        check_problem(service.post(MEAN, LARGE), 413, "too_large")
        assert ended(service, submitted(service, MEAN, LARGE))["status"] == "succeeded"
        check_problem(service.post(MEAN, LARGE * 2, prefer="respond-async"), 413, "too_large")


def test_a_job_that_fails_tells_its_problem(service: Running) -> None:
    body = payload(data=np.full(4, 2**62, np.int64))
    answer = service.post("/v1/reduce?op=sum", body)
    path = submitted(service, "/v1/reduce?op=sum", body)
    told = ended(service, path)
    assert (told["status"], told["result"], told["problem"]["code"]) == ("failed", None, answer.json()["code"])
    problem = check_problem(service.http.get(f"{path}/result"), answer.status_code, answer.json()["code"])
    assert problem["detail"] == answer.json()["detail"]


def test_a_job_that_fails_holds_nothing_until_the_collector_comes(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that stands in a cycle would keep the cells of its body."""
    alive: list[weakref.ref[Kept]] = []

    def made(*given: object, **named: object) -> None:
        kept = Kept()
        alive.append(weakref.ref(kept))
        raise ValueError("as nobody foresaw")

    monkeypatch.setattr("maskserve_api.jobs.runner.made", made)
    gc.disable()
    try:
        assert ended(service, submitted(service))["problem"]["code"] == "internal"
        wait_until(lambda: alive[0]() is None, timeout_s=5)
    finally:
        gc.enable()


class Kept:
    """Something that can be seen to go."""


# -- Prefer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "is_async"),
    [
        (["respond-async"], True),
        (["Respond-Async"], True),
        (["respond-async, wait=10"], True),
        (["wait=10 , respond-async; foo=bar"], True),
        (["return=minimal", "respond-async"], True),
        (['foo="a, b"; x="respond-async", respond-async=""'], True),
        ([], False),
        ([""], False),
        (["respond-sync"], False),
        (["respond-async=no"], False),
        (['foo="respond-async, respond-async"'], False),
        (["foo; respond-async"], False),
        (["foo=respond-async"], False),
        (['"' * 5000], False),
        (['foo="a, respond-async'], False),
        (['foo="a\\'], False),
    ],
)
def test_prefer_is_read_as_rfc_7240_has_it(lines: list[str], is_async: bool) -> None:
    assert prefers_async(Headers(raw=[(b"prefer", line.encode()) for line in lines])) is is_async


def test_a_long_preference_is_read_in_no_time() -> None:
    """A quote that never ends, and thousands that might."""
    given = Headers(raw=[(b"prefer", b'"' + rb"\"" * 400_000)])
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(prefers_async, given).result(20) is False


def test_v2_knows_no_jobs(service: Running) -> None:
    question = {
        "inputs": [{"name": "data", "datatype": "FP32", "shape": [2], "data": [1, 2]}],
        "parameters": {"op": "sum"},
    }
    response = service.http.post("/v2/models/reduce/infer", json=question, headers={"prefer": "respond-async"})
    assert response.status_code == 200


# -- the same request again -------------------------------------------------------------------------------------------


def test_a_hundred_submissions_of_one_key_are_one_job_done_once(service: Running, folder: Path) -> None:
    def submit(_: int) -> str:
        with httpx.Client(base_url=f"http://{service.netloc}", timeout=30) as http:
            headers = {"prefer": "respond-async", "idempotency-key": "one"}
            response = http.post("/v1/softmax?op=softmax&dim=0", content=LARGE, headers=headers)
            assert response.status_code == 202, response.text
            return str(response.json()["id"])

    with ThreadPoolExecutor(20) as threads:
        ids = set(threads.map(submit, range(100)))
    assert len(ids) == 1
    (id,) = ids
    assert ended(service, f"/v1/jobs/{id}")["status"] == "succeeded"
    assert [job["id"] for job in service.http.get("/v1/jobs").json()["jobs"]] == [id]
    assert jobs_of(service).n_started == 1
    assert [path.name for path in (folder / "results").iterdir()] == [id]
    assert list((folder / "bodies").iterdir()) == []
    assert jobs_of(service).quota.n_open.total() == 0


def test_a_key_stands_for_one_request_though_it_is_spelled_otherwise(service: Running) -> None:
    def again(path: str, body: bytes, **headers: str) -> httpx.Response:
        return service.post(path, body, prefer="respond-async", idempotency_key="k", **headers)

    first = again(MEAN, QUESTION).json()["id"]
    assert again("/v1/reduce?dim=%30&op=mean&keepdim=false", QUESTION).json()["id"] == first
    assert again(MEAN, gzip.compress(QUESTION), content_encoding="gzip").json()["id"] == first
    ended(service, f"/v1/jobs/{first}")
    assert again(MEAN, QUESTION).json()["status"] == "succeeded"
    for path, body, headers in (
        ("/v1/reduce?op=mean&dim=1", QUESTION, {}),
        ("/v1/scan?op=cumsum&dim=0", QUESTION, {}),
        (MEAN, LARGE, {}),
        (MEAN, QUESTION, {"accept": JSON}),
    ):
        check_problem(again(path, body, **headers), 422, "idempotency_mismatch")
    assert service.http.delete(f"/v1/jobs/{first}").status_code == 204
    assert again(MEAN, QUESTION).json()["id"] != first


@pytest.mark.parametrize("key", ["", "x" * 129, "a\tb", "caf\xe9"])
def test_a_key_is_1_to_128_printable_characters(service: Running, key: str) -> None:
    raw = [(b"Prefer", b"respond-async"), (b"Idempotency-Key", key.encode("latin-1"))]
    told = check_problem(service.http.post(MEAN, content=QUESTION, headers=raw), 422, "bad_parameter")
    assert told["parameter"] == "Idempotency-Key"


def test_a_key_without_a_job_says_nothing(service: Running) -> None:
    for body in (QUESTION, LARGE):
        assert service.post(MEAN, body, idempotency_key="k").status_code == 200


# -- whose job it is --------------------------------------------------------------------------------------------------


def test_a_job_of_one_key_is_not_there_for_another(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice:" + "a" * 20 + "\nbob:" + "b" * 20 + "\n")
    file.chmod(0o600)
    with running(jobs=jobs_in(folder), keys=Keys(str(file))) as service:
        alice, bob = ({"authorization": f"Bearer {c * 20}"} for c in "ab")
        one = submitted(service, idempotency_key="same", **alice)
        other = submitted(service, idempotency_key="same", **bob)
        assert one != other
        for path in (one, f"{one}/result", f"{one}?wait=1"):
            check_problem(service.http.get(path, headers=bob), 404, "unknown_job")
        check_problem(service.http.delete(one, headers=bob), 404, "unknown_job")
        assert [job["id"] for job in service.http.get("/v1/jobs", headers=bob).json()["jobs"]] == [other[-32:]]
        assert len(service.http.get("/v1/jobs", params={"after": one[-32:]}, headers=bob).json()["jobs"]) == 1
        assert service.http.get(f"{one}?wait=30", headers=alice).json()["status"] == "succeeded"
        assert service.http.get(f"{one}/result").status_code == 401


def test_keys_take_turns_those_with_fewest_running_first() -> None:
    waiting = Waiting()
    for seq in range(4):
        waiting.add("a", seq)
    waiting.add("b", 10)
    waiting.add("c", 20)
    assert [waiting.take() for _ in range(4)] == [("a", 0), ("b", 10), ("c", 20), ("a", 1)]
    waiting.add("b", 11)
    assert waiting.take() == ("b", 11)
    waiting.done("b")
    waiting.put_back("b", 11)
    assert [waiting.take() for _ in range(4)] == [("b", 11), ("a", 2), ("a", 3), None]


# -- cancelling, forgetting, expiring ---------------------------------------------------------------------------------


def test_a_job_that_waits_is_cancelled_at_once(service: Running, folder: Path) -> None:
    with lane_blocked(service):
        for _ in range(2):
            submitted(service)
        path = submitted(service, MEAN, LARGE)
        check_problem(service.http.get(f"{path}/result"), 409, "job_not_finished")
        response = service.http.delete(path)
        assert (response.status_code, response.json()["status"]) == (202, "cancelled")
        assert list((folder / "bodies").iterdir()) == []
    check_problem(service.http.get(f"{path}/result"), 410, "job_cancelled")
    assert service.http.get(path).json()["started"] is None
    assert service.http.delete(path).status_code == 204
    check_problem(service.http.get(path), 404, "unknown_job")
    check_problem(service.http.delete(path), 404, "unknown_job")


def test_a_job_that_runs_is_cancelled_within_a_block(folder: Path) -> None:
    cells = np.random.default_rng(0).normal(size=(4096, 2048)).astype(np.float32)
    with running(jobs=jobs_in(folder)) as service:
        runner = jobs_of(service).runner
        assert runner is not None
        path = submitted(service, "/v1/scan?op=rank&dim=1", payload(data=cells))
        wait_until(lambda: service.http.get(path).json()["status"] == "running")
        start_s = time.monotonic()
        assert service.http.delete(path).json()["status"] == "cancelled"
        wait_until(lambda: not runner.doing)
        assert time.monotonic() - start_s < 2, "a block takes milliseconds"
        assert service.service.lanes.cpu.turns.holder is None
        assert ended(service, submitted(service))["status"] == "succeeded"
        check_problem(service.http.get(f"{path}/result"), 410, "job_cancelled")
        assert list((folder / "results").iterdir()) == list((folder / "bodies").iterdir()) == []


def test_a_job_that_lacks_a_descriptor_waits_for_one(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = os.open, [0]

    def short(path: object, flags: int, *given: object, **words: object) -> int:
        if str(path).find("bodies") >= 0 and not flags & os.O_CREAT and failed[0] < 2:
            failed[0] += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *given, **words)  # type: ignore[arg-type]

    with lane_blocked(service):
        path = submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE)
        monkeypatch.setattr(os, "open", short)
    assert ended(service, path)["status"] == "succeeded"
    assert failed[0] == 2


@pytest.mark.parametrize(("call", "number"), [("fsync", errno.EIO), ("replace", errno.EROFS), ("write", errno.ENOSPC)])
def test_a_disk_that_refuses_a_result_fails_that_job_and_leaves_nothing(
    service: Running, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    with lane_blocked(service):
        path = submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE)

        def fail(*given: object) -> int:
            raise OSError(number, "as a disk does")

        monkeypatch.setattr(f"maskserve_api.jobs.spool.os.{call}", fail)
    told = ended(service, path)
    monkeypatch.undo()
    code = "no_space" if number == errno.ENOSPC else "spool_failed"
    assert (told["status"], told["problem"]["code"]) == ("failed", code)
    assert str(folder) not in json.dumps(told)
    assert list((folder / "results").iterdir()) == list((folder / "bodies").iterdir()) == []
    assert jobs_of(service).quota.n_bytes == ROW_BYTES
    assert ended(service, submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE))["status"] == "succeeded"


def test_a_result_expires_and_is_forgotten_after_as_long_again(folder: Path) -> None:
    with running(jobs=jobs_in(folder, result_ttl_s=2.0)) as service:
        path = submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE)
        told = ended(service, path)
        expires = datetime.fromisoformat(told["expires"]) - datetime.fromisoformat(told["ended"])
        assert 1.5 < expires.total_seconds() < 2.5
        assert service.http.get(f"{path}/result").status_code == 200
        wait_until(lambda: service.http.get(path).json()["status"] == "expired")
        check_problem(service.http.get(f"{path}/result"), 410, "job_expired")
        assert service.http.get(path).json()["result"] is None
        assert list((folder / "results").iterdir()) == []
        wait_until(lambda: service.http.get(path).status_code == 404)
        wait_until(lambda: jobs_of(service).quota.n_bytes == 0)  # counted a moment after the row has gone


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_key_has_so_many_jobs_and_all_keys_together_have_a_bound(folder: Path) -> None:
    with running(jobs=jobs_in(folder, per_key=2, most=100)) as service, lane_blocked(service):
        paths = [submitted(service, idempotency_key=f"{i}") for i in range(2)]
        told = service.post(MEAN, QUESTION, prefer="respond-async")
        check_problem(told, 429, "too_many_jobs")
        assert int(told.headers["retry-after"]) > 0
        again = service.post(MEAN, QUESTION, prefer="respond-async", idempotency_key="0")
        assert (again.status_code, again.headers["location"]) == (202, paths[0])
        assert service.http.delete(paths[0]).status_code == 202
        assert submitted(service)
        jobs_of(service).quota.most = 2
        jobs_of(service).quota.per_key = 9
        check_problem(service.post(MEAN, QUESTION, prefer="respond-async"), 503, "busy")


def test_the_bytes_that_jobs_keep_are_bounded(folder: Path) -> None:
    with running(jobs=jobs_in(folder, most_bytes=len(LARGE) + 6 * ROW_BYTES)) as service:
        path = submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE)
        told = ended(service, path)  # its result is larger, since it has a mask
        assert (told["status"], told["problem"]["code"]) == ("failed", "no_space")
        assert list((folder / "results").iterdir()) == []
        with lane_blocked(service):
            waiting = submitted(service, MEAN, LARGE)
            refused = service.post(MEAN, LARGE, prefer="respond-async")
            check_problem(refused, 507, "no_space")
            assert int(refused.headers["retry-after"]) > 0
            check_problem(
                service.post(MEAN, gzip.compress(LARGE), prefer="respond-async", content_encoding="gzip"),
                507,
                "no_space",
            )
        assert ended(service, waiting)["status"] == "succeeded"
        for gone in (path, waiting):
            assert service.http.delete(gone).status_code == 204
        assert jobs_of(service).quota.n_bytes == 0


def test_a_job_that_ends_while_it_is_deleted_gives_all_its_bytes_back(service: Running) -> None:
    """Whoever looked it up a moment before saw it running."""
    jobs = jobs_of(service)
    with lane_blocked(service):
        path = submitted(service, "/v1/softmax?op=softmax&dim=0", LARGE)
        before = jobs.find("", path.rpartition("/")[2])
    assert before is not None
    ended(service, path)
    assert asyncio.run(jobs.cancel(before)) is None
    assert [asyncio.run(jobs.forget(before)) for _ in range(2)] == [True, False]
    assert jobs.quota.n_bytes == 0
    assert all(n == 0 for n in jobs.n_by_status.values())


def test_a_body_that_was_only_promised_takes_no_room(folder: Path) -> None:
    with running(jobs=jobs_in(folder, most_bytes=2 * len(LARGE))) as service:
        head = f"POST {MEAN} HTTP/1.1\r\nHost: {service.netloc}\r\nPrefer: respond-async\r\n"
        promise = f"{head}Content-Length: {len(LARGE)}\r\n\r\nx"
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(("127.0.0.1", service.port))).sendall(promise.encode())
            wait_until(lambda: jobs_of(service).quota.n_open[""] == 3)
            assert ended(service, submitted(service, MEAN, LARGE))["status"] == "succeeded"


def test_a_request_whose_job_was_forgotten_while_it_was_sent_again_is_no_job(service: Running) -> None:
    path = submitted(service, idempotency_key="again")
    ended(service, path)
    head = (
        f"POST {MEAN} HTTP/1.1\r\nHost: {service.netloc}\r\nPrefer: respond-async\r\nIdempotency-Key: again\r\n"
        f"Content-Length: {len(QUESTION)}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head.encode() + QUESTION[:50])
        wait_until(lambda: service.service.memory.held_bytes == 50)
        assert service.http.delete(path).status_code == 204
        connection.sendall(QUESTION[50:])
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 503 "), answer


# -- asking -----------------------------------------------------------------------------------------------------------


def test_who_waits_is_told_of_the_end_or_of_how_far_it_is(service: Running) -> None:
    with lane_blocked(service):
        path = submitted(service)
        start_s = time.monotonic()
        assert service.http.get(f"{path}?wait=0.3").json()["status"] in ("queued", "running")
        assert 0.25 < time.monotonic() - start_s < 5
        with ThreadPoolExecutor(1) as thread:
            waiter = thread.submit(lambda: httpx.get(f"http://{service.netloc}{path}?wait=30", timeout=40).json())
            wait_until(lambda: bool(jobs_of(service)._changes))
            assert service.http.delete(path).status_code == 202
            assert waiter.result(10)["status"] == "cancelled"
    for bad in ("x", "-1", "nan", "1e3"):
        assert check_problem(service.http.get(f"{path}?wait={bad}"), 422, "bad_parameter")["parameter"] == "wait"


def test_who_goes_away_waits_no_longer(service: Running) -> None:
    with lane_blocked(service):
        path = submitted(service)
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(f"GET {path}?wait=60 HTTP/1.1\r\nHost: {service.netloc}\r\n\r\n".encode())
            wait_until(lambda: len(jobs_of(service)._changes) == 1)
        wait_until(lambda: not jobs_of(service)._changes)


def test_jobs_are_listed_page_by_page_in_their_order_though_those_seen_are_forgotten(service: Running) -> None:
    paths = [submitted(service) for _ in range(5)]
    for path in paths:
        ended(service, path)
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = service.http.get("/v1/jobs", params={"limit": "2"} | after).json()
        assert all(job.keys() == FIELDS for job in page["jobs"])
        seen += [job["id"] for job in page["jobs"]]
        for job in page["jobs"]:
            assert service.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert [f"/v1/jobs/{id}" for id in seen] == paths
    assert service.http.get("/v1/jobs").json() == {"jobs": [], "next": None}
    paths = [submitted(service) for _ in range(5)]
    for path in paths:
        ended(service, path)
    assert len(service.http.get("/v1/jobs?status=succeeded").json()["jobs"]) == 5
    assert service.http.get("/v1/jobs?status=queued").json()["jobs"] == []


def test_a_service_without_jobs_says_so() -> None:
    with running() as service:
        for path in ("/v1/jobs", "/v1/jobs/0", "/v1/jobs/0/result"):
            told = check_problem(service.http.get(path), 404, "unknown_path")
            assert "--jobs" in told["detail"]
        assert service.post(MEAN, QUESTION, prefer="respond-async").status_code == 200


def test_a_job_that_is_posted_to_the_list_is_told_where_to_go(service: Running) -> None:
    assert "/v1/{verb} with Prefer" in check_problem(service.http.post("/v1/jobs"), 405, "method_not_allowed")["detail"]


@pytest.mark.parametrize(
    ("path", "parameter"),
    [("/v1/jobs?state=queued", "state"), ("/v1/jobs?status=done", "status"), ("/v1/jobs?limit=0", "limit"),
     ("/v1/jobs?limit=1001", "limit"), ("/v1/jobs?limit=1&limit=2", "limit"), ("/v1/jobs?after=x", "after"),
     ("{}?watch=3", "watch"), ("{}/result?wait=3", "wait")],
)  # fmt: skip
def test_what_is_asked_for_must_be_known(service: Running, path: str, parameter: str) -> None:
    told = check_problem(service.http.get(path.format(submitted(service))), 422, "bad_parameter")
    assert told["parameter"] == parameter


def test_other_methods_are_refused(service: Running) -> None:
    path = submitted(service)
    for method, at in (
        ("PUT", path),
        ("POST", path),
        ("POST", "/v1/jobs"),
        ("DELETE", f"{path}/result"),
        ("DELETE", "/v1/jobs"),
    ):
        response = service.http.request(method, at)
        check_problem(response, 405, "method_not_allowed")
        assert "GET" in response.headers["allow"]


# -- the bytes of a result --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [QUESTION, LARGE], ids=["in the store", "a file"])
def test_a_result_comes_in_parts_and_not_where_it_is_known(service: Running, body: bytes) -> None:
    path = submitted(service, "/v1/softmax?op=softmax&dim=0", body)
    told = ended(service, path)
    whole = service.http.get(f"{path}/result")
    n, tag = len(whole.content), whole.headers["etag"]
    assert (whole.headers["accept-ranges"], whole.headers["content-length"]) == ("bytes", str(n))
    head = service.http.head(f"{path}/result")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(n))

    def get(**headers: str) -> httpx.Response:
        return service.http.get(f"{path}/result", headers={k.replace("_", "-"): v for k, v in headers.items()})

    for said, first, last in (
        ("0-9", 0, 9),
        ("5-", 5, n - 1),
        ("-7", n - 7, n - 1),
        (f"3-{n * 9}", 3, n - 1),
        (f"-{n * 9}", 0, n - 1),
        (f"3-{10**25}", 3, n - 1),
        (f"{'0' * 30}3-{'9' * 5000}", 3, n - 1),
        (f"-{10**25}", 0, n - 1),
    ):
        part = get(range=f"bytes={said}")
        assert part.status_code == 206
        assert part.content == whole.content[first : last + 1]
        assert part.headers["content-range"] == f"bytes {first}-{last}/{n}"
    assert get(range="bytes=0-9", if_range=tag).status_code == 206
    for ignored in ({"range": "bytes=0-9", "if_range": '"other"'}, {"range": "bytes=0-1,5-6"}, {"range": "lines=1-2"},
                    {"range": "bytes=9-3"}, {"range": "bytes=-"}, {"if_none_match": '"other"'}):  # fmt: skip
        assert get(**ignored).content == whole.content
    for said in (f"{n}-", "-0", f"{n * 9}-{n * 10}", f"{10**25}-"):
        refused = get(range=f"bytes={said}")
        check_problem(refused, 416, "range_not_satisfiable")
        assert refused.headers["content-range"] == f"bytes */{n}"
    head = service.http.head(f"{path}/result", headers={"range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(n))
    assert "content-range" not in head.headers
    for known in (tag, f'"x", {tag}', f"W/{tag}", "*"):
        response = get(if_none_match=known, range="bytes=0-9")
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
    assert told["result"]["bytes"] == n


def test_an_empty_range_of_an_empty_result_is_refused() -> None:
    with pytest.raises(RangeError):
        ranges.part(Headers({"range": "bytes=0-"}), 0, '"x"')


# -- what operators see -----------------------------------------------------------------------------------------------


def test_metrics_and_the_log_tell_of_jobs_and_never_of_cells(
    service: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "maskserve")
    path = submitted(service)
    ended(service, path)
    failing = submitted(service, "/v1/reduce?op=sum", payload(data=np.full(4, 2**62, np.int64)))
    ended(service, failing)
    samples = {
        (s.name, s.labels.get("status")): s.value
        for family in metrics(service.http.get("/metrics").text)
        for s in family.samples
    }
    assert samples["maskserve_jobs", "succeeded"] == samples["maskserve_jobs", "failed"] == 1
    assert samples["maskserve_jobs", "queued"] == samples["maskserve_jobs", "running"] == 0
    assert samples["maskserve_jobs_started_total", None] == 2
    assert samples["maskserve_jobs_ended_total", "succeeded"] == samples["maskserve_jobs_ended_total", "failed"] == 1
    assert samples["maskserve_jobs_kept_bytes", None] > 2 * ROW_BYTES
    events = [record for record in caplog.records if record.msg == "job"]
    assert [(event.job, event.status, event.op, event.code) for event in events] == [  # type: ignore[attr-defined]
        (path[-32:], "succeeded", "mean", None), (failing[-32:], "failed", "sum", "integer_overflow"),
    ]  # fmt: skip
    assert all(str(2**62) not in json.dumps(event.__dict__, default=str) for event in events)


def test_a_service_that_drains_takes_no_job_and_tells_of_those_that_are_there(service: Running) -> None:
    path = submitted(service)
    ended(service, path)
    service.service.draining = True
    check_problem(service.post(MEAN, QUESTION, prefer="respond-async"), 503, "draining")
    assert service.http.get(f"{path}/result").status_code == 200


def test_where_jobs_live_without_a_word_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_folder() == "/state/maskserve/jobs"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder() == "/home/someone/.local/state/maskserve/jobs"


def test_ids_are_not_to_be_guessed(service: Running) -> None:
    ids = {submitted(service)[-32:] for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)
    assert asyncio.iscoroutinefunction(jobs_of(service).written)
