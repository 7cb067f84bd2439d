"""The HTTP road: what comes back is what the engine gives, and what is wrong is told as a problem."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from maskserve import answers, requests
from maskserve.payload.format import BytesPayload
from maskserve.payload.json import decode
from maskserve_api import work
from tests.http_service import JSON, MAX_BODY, SAFETENSORS, Running, check_problem, payload, running
from tests.payload_cases import CASES, VALID, Case, container, entry

DATA = np.arange(12, dtype=np.float32).reshape(3, 4)
MASK = DATA % 5 != 1
QUESTION = payload(data=np.where(MASK, DATA, 777), mask=MASK)
LARGE = payload(
    x=np.random.default_rng(7).normal(size=(256, 1024)).astype(np.float32),
    x__mask=np.random.default_rng(8).random((256, 1024)) < 0.7,
)
BIG = np.iinfo(np.int64).max


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


# -- answers ------------------------------------------------------------------------------------------------------

ASKED = [
    ("reduce", {"op": "mean", "dim": "0"}),
    ("reduce", {"op": "max", "keepdim": "true"}),
    ("softmax", {"op": "softmax", "dim": "-1"}),
    ("scan", {"op": "cumsum", "dim": "1"}),
]


@pytest.mark.parametrize(("verb", "words"), ASKED)
@pytest.mark.parametrize("question", [QUESTION, LARGE], ids=["small", "large"])
def test_safetensors_come_back_as_the_bytes_that_the_engine_gives(
    service: Running, verb: str, words: dict[str, str], question: bytes
) -> None:
    response = service.http.post(f"/v1/{verb}", params=words, content=question)
    expected = answers.run(requests.build(verb, words), BytesPayload(question)).to_bytes()
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == SAFETENSORS
    assert int(response.headers["content-length"]) == len(expected)
    assert response.content == expected


@pytest.mark.parametrize(
    ("verb", "query", "question", "answer"),
    [
        ("reduce", "op=mean&dim=1", {"data": [[1, 2, None]]}, {"data": [1.5]}),
        ("reduce", "op=sum&dim=0", {"data": [[1, None], [2, None]]}, {"data": [3, None]}),
        ("scan", "op=cumsum&dim=0", {"data": [1, None, 2]}, {"data": [1, None, 3]}),
        ("softmax", "op=softmax&dim=0", {"data": [0, None, 0]}, {"data": [0.5, None, 0.5]}),
        ("reduce", "op=count", {"a": [1, None], "b": [True]}, {"a": 1, "b": 1}),
    ],
)
def test_a_plain_json_question_gets_a_plain_json_answer(
    service: Running, verb: str, query: str, question: object, answer: object
) -> None:
    response = service.post(f"/v1/{verb}?{query}", json.dumps(question), content_type=JSON)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == JSON
    assert response.json() == answer


def test_the_answer_comes_in_the_form_that_is_asked_for(service: Running) -> None:
    there = service.post("/v1/reduce?op=sum&dim=1", '{"data": [[1, null, 2]]}', content_type=JSON, accept=SAFETENSORS)
    request = requests.build("reduce", {"op": "sum", "dim": "1"})
    assert there.content == answers.run(request, decode(b'{"data": [[1, null, 2]]}')).to_bytes()
    back = service.post("/v1/reduce?op=sum&dim=1", QUESTION, accept=JSON)
    assert back.json()["data"] == {"dtype": "F32", "shape": [3], "values": [5.0, 16.0, 27.0]}


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", SAFETENSORS),
        ("application/*", SAFETENSORS),
        ("application/json", JSON),
        ("APPLICATION/JSON; charset=utf-8", JSON),
        ("text/html, application/json;q=0.1", JSON),
        ("application/json;q=0.2, application/vnd.safetensors;q=0.3", SAFETENSORS),
        ("application/vnd.safetensors;q=0, */*", JSON),
    ],
)
def test_accept_is_read_as_rfc_9110_says(service: Running, accept: str, form: str) -> None:
    assert service.post("/v1/reduce?op=sum", QUESTION, accept=accept).headers["content-type"] == form


@pytest.mark.parametrize("kind", ["", "application/octet-stream", "application/x-www-form-urlencoded", SAFETENSORS])
def test_safetensors_come_under_any_content_type_but_json(service: Running, kind: str) -> None:
    assert service.post("/v1/reduce?op=sum", QUESTION, content_type=kind).status_code == 200


def test_dims_may_be_repeated_or_joined_by_commas(service: Running) -> None:
    answers = {service.post(f"/v1/reduce?op=sum&{dims}", QUESTION).content for dims in ("dim=0&dim=1", "dim=0,1")}
    assert len(answers) == 1


def test_a_chunked_body_is_read_like_any_other(service: Running) -> None:
    pieces = (QUESTION[at : at + 7] for at in range(0, len(QUESTION), 7))
    whole = service.post("/v1/reduce?op=sum", QUESTION)
    assert service.post("/v1/reduce?op=sum", pieces).content == whole.content


def test_a_reply_tells_its_id_and_its_times(service: Running) -> None:
    kept = service.post("/v1/reduce?op=sum", QUESTION, x_request_id="a-1.B_2")
    assert kept.headers["x-request-id"] == "a-1.B_2"
    made = service.post("/v1/reduce?op=sum", LARGE, x_request_id='"><script>')
    assert len(made.headers["x-request-id"]) == 32
    stages = [part.partition(";dur=") for part in made.headers["server-timing"].split(", ")]
    assert [name for name, _, _ in stages] == ["read", "queue", "decode", "compute", "encode"]
    assert all(float(ms) >= 0 for _, _, ms in stages)
    assert "server" not in made.headers


async def many(url: str, n: int) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        posts = (client.post("/v1/reduce?op=sum", content=payload(data=np.full(3, i))) for i in range(n))
        return await asyncio.gather(*posts)


def test_a_hundred_requests_at_once_each_get_their_own_answer(service: Running) -> None:
    responses = asyncio.run(many(f"http://{service.netloc}", 100))
    request = requests.build("reduce", {"op": "sum"})
    for i, response in enumerate(responses):
        assert response.content == answers.run(request, BytesPayload(payload(data=np.full(3, i)))).to_bytes()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("question", [QUESTION, LARGE], ids=["small", "expects-100-continue"])
def test_curl_sends_a_file_and_saves_the_answer(service: Running, tmp_path, question: bytes) -> None:
    (tmp_path / "rain.safetensors").write_bytes(question)
    url = f"http://localhost:{service.port}/v1/reduce?op=mean&dim=0"
    command = ["curl", "-sS", "-4", "--data-binary", "@rain.safetensors", url, "-o", "mean.safetensors"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=30)
    expected = answers.run(requests.build("reduce", {"op": "mean", "dim": "0"}), BytesPayload(question)).to_bytes()
    assert (tmp_path / "mean.safetensors").read_bytes() == expected


# -- errors -------------------------------------------------------------------------------------------------------

NAN = payload(data=np.array([1, np.nan], np.float32))
ALL_MASKED = payload(data=np.ones(2, np.float32), mask=np.zeros(2, bool))
LENGTHS = payload(data=np.ones((2, 3), np.float32), data__lengths=np.array([9, 1]))
F4 = container({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2))


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code", "parameter"),
    [
        ("reduce?op=maen", QUESTION, {}, 422, "unknown_op", "op"),
        ("reduce", QUESTION, {}, 422, "unknown_op", "op"),
        ("reduce?op=softmax", QUESTION, {}, 422, "unknown_op", "op"),
        ("reduce?op=sum&nope=1", QUESTION, {}, 422, "bad_parameter", "nope"),
        ("reduce?op=sum&keepdim=1&keepdim=0", QUESTION, {}, 422, "bad_parameter", "keepdim"),
        ("reduce?op=sum&min_count=-1", QUESTION, {}, 422, "bad_parameter", "min_count"),
        ("reduce?" + "&".join(f"a{i}=1" for i in range(300)), QUESTION, {}, 422, "bad_parameter", None),
        ("scan?op=cumsum", QUESTION, {}, 422, "bad_parameter", "dim"),
        ("reduce?op=sum", QUESTION, {"x_request_timeout": "soon"}, 422, "bad_parameter", "X-Request-Timeout"),
        ("reduce?op=sum&dim=7", QUESTION, {}, 422, "dim_out_of_range", "dim"),
        ("reduce?op=sum&dim=time", QUESTION, {}, 422, "dim_out_of_range", "dim"),
        ("reduce?op=sum&dtype=bool", QUESTION, {}, 422, "dtype_not_accepted", "dtype"),
        ("reduce?op=sum&tensor=rain", QUESTION, {}, 422, "unknown_tensor", "tensor"),
        ("reduce?op=sum&device=cuda:99", QUESTION, {}, 422, "device_unavailable", "device"),
        ("reduce?op=sum&backend=abacus", QUESTION, {}, 422, "backend_cannot_serve", "backend"),
        ("reduce?op=sum", LENGTHS, {}, 422, "bad_mask", "data.lengths"),
        ("reduce?op=sum", payload(x=np.ones(2), mask=np.ones(3, bool)), {}, 422, "mask_shape", "mask"),
        ("reduce?op=sum", payload(x=np.ones(2), mask=np.ones(2)), {}, 422, "mask_dtype", "mask"),
        ("reduce?op=sum&empty=raise", ALL_MASKED, {}, 422, "empty_slice", "empty"),
        ("reduce?op=sum&nan=raise", NAN, {}, 422, "nan_found", None),
        ("reduce?op=sum", payload(data=np.array([BIG, BIG])), {}, 422, "integer_overflow", "dtype"),
        ("reduce?op=sum", b"no payload at all", {}, 400, "malformed_payload", None),
        ("reduce?op=sum", b"", {}, 400, "malformed_payload", None),
        ("reduce?op=sum", b'{"data": [1, 2', {"content_type": JSON}, 400, "malformed_payload", None),
        ("reduce?op=sum", bytes(MAX_BODY + 1), {}, 413, "too_large", "Content-Length"),
        ("reduce?op=sum", (bytes(1 << 20) for _ in range(5)), {}, 413, "too_large", "Content-Length"),
        ("reduce?op=sum", F4, {}, 422, "not_computable", "x"),
        ("reduce?op=sum", payload(x__mask=np.ones(2, bool)), {}, 422, "orphan_mask", "x.mask"),
        (
            "reduce?op=sum",
            payload(x=np.ones(8), mask=np.ones(8, bool), x__mask=np.ones(8, bool)),
            {}, 422, "ambiguous_mask", "x",
        ),
        ("reduce?op=sum", QUESTION, {"host": "evil.example"}, 403, "host_not_allowed", "Host"),
        ("reduce?op=sum", QUESTION, {"origin": "http://evil.example"}, 403, "cross_site", "Origin"),
        ("reduce?op=sum", QUESTION, {"origin": "null"}, 403, "cross_site", "Origin"),
        ("reduce?op=sum", QUESTION, {"sec_fetch_site": "same-site"}, 403, "cross_site", "Origin"),
        ("nothing", b"", {}, 404, "unknown_path", None),
        ("reduce/?op=sum", QUESTION, {}, 404, "unknown_path", None),
        ("ops", b"", {}, 405, "method_not_allowed", None),
        ("reduce?op=sum", QUESTION, {"accept": "text/html"}, 406, "not_acceptable", "Accept"),
        ("reduce?op=sum", QUESTION, {"accept": "application/json;q=0"}, 406, "not_acceptable", "Accept"),
        ("reduce?op=sum", QUESTION, {"content_encoding": "br"}, 415, "unsupported_media_type", "Content-Encoding"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "-",
)  # fmt: skip
def test_what_is_wrong_is_told_as_a_problem_and_the_next_request_works(
    service: Running, path: str, body, headers: dict[str, str], status: int, code: str, parameter: str | None
) -> None:
    told = check_problem(service.post(f"/v1/{path}", body, **headers), status, code)
    assert told["parameter"] == parameter
    assert service.post("/v1/reduce?op=sum", QUESTION).status_code == 200


def test_json_under_a_form_type_is_told_which_type_to_send(service: Running) -> None:
    response = service.post("/v1/reduce?op=sum", '\n {"data": [1]}', content_type="application/x-www-form-urlencoded")
    assert "send Content-Type: application/json" in check_problem(response, 400, "malformed_payload")["detail"]


def test_a_long_or_strange_word_is_told_shortly(service: Running) -> None:
    for word in ("a" * 7000, "%00%1b[31m" * 300, "%F0%9F%92%A9" * 900, "%ff" * 2000):
        check_problem(service.post(f"/v1/reduce?op={word}", QUESTION), 422, "unknown_op")
        check_problem(service.post(f"/v1/reduce?op=sum&{word}=1", QUESTION), 422, "bad_parameter")
        check_problem(service.post(f"/v1/reduce?op=sum&dtype={word}", QUESTION), 422, "bad_parameter")


@pytest.mark.parametrize("failure", [ValueError("secret /etc/shadow"), AssertionError("secret"), KeyError("secret")])
def test_what_nobody_foresaw_is_a_500_that_says_nothing_of_its_insides(
    service: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(work.answers, "run", fail)
    for question in (QUESTION, LARGE):
        response = service.post("/v1/reduce?op=sum", question)
        told = check_problem(response, 500, "internal")
        assert "secret" not in response.text
        assert told["request_id"] in caplog.text
    monkeypatch.undo()
    assert service.post("/v1/reduce?op=sum", QUESTION).status_code == 200


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] data")])
def test_memory_that_is_not_there_is_a_503(
    service: Running, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(work.answers, "run", fail)
    check_problem(service.post("/v1/reduce?op=sum", QUESTION), 503, "out_of_memory")


def test_an_answer_too_large_for_json_is_refused_as_json_alone(service: Running) -> None:
    question = payload(data=np.ones((1900, 1900), np.int8))  # as a running sum, 8 bytes and a mask a cell
    assert service.post("/v1/scan?op=cumsum&dim=0", question).status_code == 200
    check_problem(service.post("/v1/scan?op=cumsum&dim=0", question, accept=JSON), 406, "not_acceptable")


def test_an_answer_whose_text_is_too_long_for_json_is_refused_as_json_alone(service: Running) -> None:
    question = payload(data=np.full((1900, 1900), 100, np.int8))  # "100, " a cell, for two bytes with its mask
    assert service.post("/v1/fill?op=value&value=0", question).status_code == 200
    problem = check_problem(service.post("/v1/fill?op=value&value=0", question, accept=JSON), 406, "not_acceptable")
    assert "bytes of JSON" in problem["detail"]


def test_an_answer_out_of_all_proportion_is_refused_before_it_is_made(service: Running) -> None:
    question = container({"x": entry("F32", [1 << 40, 0], 0, 0)})
    check_problem(service.post("/v1/reduce?op=sum&dim=1", question), 413, "too_large")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_hostile_payload_gets_a_small_problem_and_the_next_request_works(service: Running, case: Case) -> None:
    source = case.source()
    if source.total > MAX_BODY:
        head = f"POST /v1/reduce?op=count HTTP/1.1\r\nHost: localhost\r\nContent-Length: {source.total}\r\n\r\n"
        assert b" 413 " in service.raw(head.encode()).partition(b"\r\n")[0]
    else:
        response = service.post("/v1/reduce?op=count", source.read(0, source.total))
        if response.status_code != 200:
            assert response.status_code in (400, 413, 422), response.text
            check_problem(response, response.status_code, response.json()["code"])
        assert case.must is None or response.status_code != 200
    assert service.post("/v1/reduce?op=count", VALID).status_code == 200
