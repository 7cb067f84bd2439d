"""Requests that name an object instead of sending a body: those that whoever runs the service allows, and no other."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from maskserve.errors import MissingExtraError, SettingsError
from maskserve.settings import load
from maskserve_api import fetching
from maskserve_api.app import create_app
from tests.http_service import JSON, SAFETENSORS, Running, check_problem, jobs_in, payload, running
from tests.store_server import Fault, Stored, running_fixture, stored_fixture  # noqa: F401


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(stores=["s3://bucket/rain/", "s3://bucket/one.safetensors"]) as served:
        yield served


CELLS = np.arange(300_000, dtype="f4").reshape(300, 1000)
QUESTION = payload(x=CELLS, x__mask=CELLS % 7 != 0)


def asked(verb: str, source: str, more: str = "") -> str:
    return f"/v1/{verb}?{more}&source={quote(source, safe='')}"


@pytest.mark.parametrize(
    ("verb", "words"),
    [("reduce", "op=mean&dim=0"), ("softmax", "dim=0"), ("scan", "op=cumsum&dim=0"), ("fill", "op=value&value=1"),
     ("mask", "equal=5"), ("grad", "op=sum"), ("eval", "expr=x*2")],
)  # fmt: skip
def test_each_verb_gives_the_bytes_that_the_object_as_a_body_gives(
    stored: Stored, service: Running, verb: str, words: str
) -> None:
    stored.put("rain/x.safetensors", QUESTION)
    answer = service.post(asked(verb, "s3://bucket/rain/x.safetensors", words))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == SAFETENSORS
    assert answer.content == service.post(f"/v1/{verb}?{words}", QUESTION).content


def test_an_object_of_json_is_answered_as_json_and_accept_is_heard(stored: Stored, service: Running) -> None:
    stored.put("rain/q.json", b'{"data": [1, 2, null]}')
    answer = service.post(asked("reduce", "s3://bucket/rain/q.json", "op=sum"))
    assert (answer.headers["content-type"], answer.json()["data"]) == (JSON, 3)
    stored.put("one.safetensors", payload(x=np.ones(4)))
    answer = service.post(asked("reduce", "s3://bucket/one.safetensors", "op=sum"), accept=JSON)
    assert answer.json()["x"]["values"] == [4.0]


@pytest.mark.parametrize(
    "source",
    ["s3://bucket/other/x", "s3://bucket/rain", "s3://bucket/rainy/x", "s3://bucket/RAIN/x", "s3://BUCKET/rain/x",
     "S3://bucket/rain/x", "s3://bucket2/rain/x", "s3://bucket/one.safetensors.bak", "s3://bucket/one.safetensors/x",
     "https://bucket/rain/x", "http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:8000/x", "https://[::1]/x",
     "s3://bucket/rain/", "gs://bucket/rain/x", "s3://bucket/%72ain/x", "s3://bucket/ra\u0131n/x", "s3://bucket/r\u200bain/x"],
)  # fmt: skip
def test_what_is_not_below_an_allowed_prefix_is_refused_before_anything_is_fetched(
    stored: Stored, service: Running, source: str
) -> None:
    response = service.post(asked("reduce", source, "op=sum"))
    assert response.status_code in (403, 422), response.text
    assert stored.proxy.log == []


@pytest.mark.parametrize(
    "source",
    ["", "rain/x", "file:///etc/passwd", "s3://bucket/rain/../secret", "s3://bucket/rain/./x", "s3://bucket/rain//x",
     "s3://bucket/rain\\x", "s3://user:pw@bucket/rain/x", "s3://bucket:80/rain/x", "s3://bucket/rain/a\nb", "s3://bucket/rain/a\0"],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_no_source(stored: Stored, service: Running, source: str) -> None:
    check_problem(service.post(asked("reduce", source, "op=sum")), 422, "bad_parameter")
    assert stored.proxy.log == []


def test_what_is_spelled_with_percents_in_a_key_is_another_key(stored: Stored, service: Running) -> None:
    stored.put("secret", QUESTION)
    response = service.post(asked("reduce", "s3://bucket/rain/%2e%2e/secret", "op=sum"))
    check_problem(response, 404, "source_not_found")


def test_without_prefixes_no_store_is_read(stored: Stored) -> None:
    with running() as service:
        told = check_problem(service.post(asked("reduce", "s3://bucket/rain/x", "op=sum")), 403, "source_not_allowed")
        assert "--stores" in told["detail"]
    assert stored.proxy.log == []


def test_what_keeps_a_store_from_being_read_is_told_at_the_start(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtraError, match="maskserve\\[store\\]"):
        create_app(stores=["s3://bucket/rain/"])


def test_the_openapi_document_names_source_where_stores_are_read(stored: Stored, service: Running) -> None:
    operation = service.http.get("/openapi.json").json()["paths"]["/v1/reduce"]["post"]
    assert "source" in [parameter["name"] for parameter in operation["parameters"]]
    assert not operation["requestBody"]["required"]
    assert "404" in operation["responses"]


def test_a_source_comes_alone_and_once(stored: Stored, service: Running) -> None:
    path = asked("reduce", "s3://bucket/rain/x", "op=sum")
    check_problem(service.post(path, QUESTION), 422, "bad_parameter")
    check_problem(service.post(path, iter([QUESTION])), 422, "bad_parameter")
    check_problem(service.post(f"{path}&source=s3://bucket/rain/y"), 422, "bad_parameter")
    assert stored.proxy.log == []


def test_a_source_that_is_no_address_is_told_what_one_is(stored: Stored, service: Running) -> None:
    for source in ("", "rain/x", "ftp://bucket/x"):
        told = check_problem(service.post(asked("reduce", source, "op=sum")), 422, "bad_parameter")
        assert told["parameter"] == "source"
        assert "source" in told["detail"]
    told = check_problem(service.post(asked("reduce", "", "op=sum")), 422, "bad_parameter")
    assert "s3://BUCKET/KEY" in told["detail"]
    assert "https" not in told["detail"]


def test_a_source_is_not_packed_and_not_empty(stored: Stored, service: Running) -> None:
    path = asked("reduce", stored.put("rain/x.safetensors", QUESTION), "op=sum")
    told = check_problem(service.post(path, content_encoding="gzip"), 422, "bad_parameter")
    assert "Content-Encoding" in told["detail"]
    empty = asked("reduce", stored.put("rain/empty", b""), "op=sum")
    told = check_problem(service.post(empty), 400, "malformed_payload")
    assert "s3://bucket/rain/empty is empty" in told["detail"]


def test_large_objects_that_are_slow_to_come_hold_up_no_small_one(stored: Stored) -> None:
    large = payload(x=np.zeros((60, 100_000), dtype="f4"))
    path = asked("reduce", stored.put("rain/large.safetensors", large), "op=sum")
    small = asked("reduce", stored.put("rain/small.safetensors", payload(x=np.ones(4))), "op=sum")
    stored.proxy.faults = [Fault("late", ends="large.safetensors", after=2, times=-1, seconds=0.7)]
    with running(stores=["s3://bucket/rain/"], max_body=32 << 20) as service, ThreadPoolExecutor(2) as pool:
        assert service.post(small).status_code == 200
        first = [pool.submit(service.post, path) for _ in range(2)]
        deadline_s = time.monotonic() + 3
        while len(stored.proxy.requests("GET", "large.safetensors")) < 2 + 2 * fetching.AT_ONCE:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        start_s = time.monotonic()
        assert service.post(small).status_code == 200
        assert time.monotonic() - start_s < 0.5
        assert len(stored.proxy.requests("GET", "large.safetensors")) == 2 + 2 * fetching.AT_ONCE
        stored.proxy.faults = []
        assert [answer.result().status_code for answer in first] == [200, 200]


def test_an_object_larger_than_a_body_may_be_is_refused_by_its_first_answer(stored: Stored) -> None:
    stored.put("rain/large", bytes(1 << 21))
    with running(stores=["s3://bucket/rain/"], max_body=1 << 20) as service:
        check_problem(service.post(asked("reduce", "s3://bucket/rain/large", "op=sum")), 413, "too_large")
        assert len(stored.proxy.log) == 1
        assert service.service.memory.held_bytes == 0


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [("403", 403, "source_not_allowed"), ("404", 404, "source_not_found"), ("500", 503, "store_unavailable"),
     ("503", 503, "store_unavailable"), ("truncated", 503, "store_unavailable"), ("retagged", 503, "store_unavailable")],
)  # fmt: skip
def test_a_store_that_fails_is_a_clear_problem_and_the_next_request_works(
    stored: Stored, service: Running, kind: str, status: int, code: str
) -> None:
    stored.put("rain/x.safetensors", QUESTION)
    path = asked("reduce", "s3://bucket/rain/x.safetensors", "op=sum")
    stored.proxy.faults = [Fault(kind, times=-1, after=kind == "retagged")]
    check_problem(service.post(path), status, code)
    stored.proxy.faults = []
    assert service.post(path).status_code == 200
    assert service.service.memory.held_bytes == 0


def test_a_slow_store_ends_at_the_requests_deadline(stored: Stored, service: Running) -> None:
    stored.put("rain/x.safetensors", QUESTION)
    stored.proxy.delay_s = 1.5
    response = service.post(asked("reduce", "s3://bucket/rain/x.safetensors", "op=sum"), x_request_timeout="0.5")
    assert response.status_code in (408, 504)


def test_an_object_is_answered_later_where_that_is_preferred_as_it_was_when_it_was_asked_for(
    stored: Stored, tmp_path: Path
) -> None:
    large = payload(x=np.arange(1_500_000, dtype="f4"))
    stored.put("rain/x.safetensors", large)
    stored.put("rain/q.json", b'{"data": [1, 2, null]}')
    later = {"prefer": "respond-async"}
    with running(stores=["s3://bucket/rain/"], jobs=jobs_in(tmp_path), max_body=8 << 20) as service:
        for name, body, kind in (("x.safetensors", large, SAFETENSORS), ("q.json", b'{"data": [1, 2, null]}', JSON)):
            answer = service.post(asked("reduce", f"s3://bucket/rain/{name}", "op=sum"), **later)
            assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
            stored.put(f"rain/{name}", b"another one")
            job = service.http.get(f"{answer.headers['location']}?wait=20").json()
            assert job["status"] == "succeeded", job
            result = service.http.get(f"{answer.headers['location']}/result")
            expected = service.http.post("/v1/reduce?op=sum", content=body, headers={"content-type": kind})
            assert (result.headers["content-type"], result.content) == (kind, expected.content)
        gone = service.post(asked("reduce", "s3://bucket/rain/gone", "op=sum"), **later)
        check_problem(gone, 404, "source_not_found")
        assert len(service.http.get("/v1/jobs").json()["jobs"]) == 2
        assert service.service.memory.held_bytes == 0


@pytest.mark.parametrize("given", ["rain/", "https://host/x/", "s3://bucket/a/../b/", "s3://u@b/", "ftp://b/"])
def test_only_prefixes_of_stores_can_be_allowed(given: str) -> None:
    with pytest.raises(SettingsError, match="prefixes of stores"):
        load({"serve_stores": given}, environment={})
