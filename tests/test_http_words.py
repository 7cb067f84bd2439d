"""Whatever a client writes where a number, a flag or a name is due: a problem in our own words, never a 500."""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator

import pytest

from maskserve import requests
from maskserve.errors import MaskserveError
from maskserve.loading import device_of
from maskserve.payload.format import to_bytes
from tests.http_service import JSON, Running, check_problem, running

CELLS = b'{"data": [[1, 2, null]]}'
FOREIGN = re.compile("input should|unable to|set_int_max_str_digits|literal for int|torch|--[a-z]")
ODD = [
    "1" * 400,
    "9" * 5000,
    "-" + "1" * 400,
    "1" * 400 + ".5",
    "1e400",
    "nan",
    "abc",
    "",
    "--5",
    "-+5",
    "[0,1]",
    "\u0663",
]


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


def every_parameter() -> Iterator[tuple[str, str, str]]:
    """A verb, an op and a parameter, for each type of parameter and verb."""
    for verb in ("reduce", "softmax", "scan", "fill", "mask"):
        seen = set()
        for row in requests.rows(verb):
            for p in (*row.requestable, *requests.COMMON, *requests.RUNNING):
                if (p.type, p.name) not in seen:
                    seen.add((p.type, p.name))
                    yield verb, row.name, p.name


@pytest.mark.parametrize("given", ODD, ids=lambda text: f"{text[:6]}_{len(text)}")
def test_no_text_for_a_parameter_is_a_fault_of_the_service(service: Running, given: str) -> None:
    for verb, op, name in every_parameter():
        response = service.http.post(
            f"/v1/{verb}", params={"op": op, name: given}, content=CELLS, headers={"content-type": JSON}
        )
        assert response.status_code in (200, 400, 422), (verb, op, name, response.text)
        assert response.status_code == 200 or not FOREIGN.search(response.json()["detail"]), (verb, name, response.text)


@pytest.mark.parametrize(
    "given", [10**400, -(10**400), 10**5000, [10**400], 2.5, True, {}], ids=lambda given: type(given).__name__
)
def test_no_value_for_a_parameter_is_more_than_refused(given: object) -> None:
    said = []
    for verb, op, name in every_parameter():
        try:
            requests.build(verb, {"op": op, name: given})
        except MaskserveError as error:
            said.append(error.message)
    assert [message for message in said if FOREIGN.search(message)] == []


@pytest.mark.parametrize("name", ["fill_value", "correction", "dim", "min_count"])
def test_a_number_beyond_all_dtypes_in_v2_is_refused(service: Running, name: str) -> None:
    body = {
        "inputs": [{"name": "data", "shape": [2], "datatype": "FP32", "data": [1, 2]}],
        "parameters": {"op": "var", name: 10**400},
    }
    told = check_problem(service.post("/v2/models/reduce/infer", json.dumps(body).encode()), 422, "bad_parameter")
    assert told["parameter"] == name


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("keepdim=maybe", "sum: keepdim: give true or false, not 'maybe'"),
        ("keepdim=", "sum: keepdim: give true or false, not ''"),
        ("min_count=abc", "sum: min_count: give a whole number, 0 or more, of at most 64 bits, not 'abc'"),
        ("dim=[0,1]", "sum: dim: give a dim's number or name, or several with commas: 0,1"),
        ("dim=5", "data: sum: dim 5 is out of range for a tensor with 2 dims; give -2 to 1"),
        ("nan=maybe", "sum: nan: give propagate, omit or raise, not 'maybe'"),
    ],
)
def test_a_refusal_says_what_was_given_and_what_may_be(service: Running, query: str, says: str) -> None:
    response = service.post(f"/v1/reduce?op=sum&{query}", CELLS, content_type=JSON)
    assert response.status_code == 422
    assert response.json()["detail"] == says


def test_a_bare_flag_means_true_as_on_the_command_line(service: Running) -> None:
    response = service.post("/v1/reduce?op=sum&dim=1&keepdim", CELLS, content_type=JSON)
    assert response.json()["data"] == [[3]]


@pytest.mark.parametrize(
    "word", ["cuda:128", "cuda:256", "cuda:99999", "cuda:" + "9" * 400, "cuda:-1", "cuda:01", "cpu:0"]
)
def test_a_device_is_one_that_is_there(service: Running, word: str) -> None:
    response = service.post(f"/v1/reduce?op=sum&device={word}", CELLS, content_type=JSON)
    assert check_problem(response, 422, "device_unavailable")["parameter"] == "device"
    with pytest.raises(MaskserveError):
        device_of(word)


@pytest.mark.parametrize(
    "accept",
    ["text/plain;version=x", "application/openmetrics-text; version=abc", "application/openmetrics-text;version=1..0"],
)
def test_metrics_are_written_for_whoever_spells_a_version(service: Running, accept: str) -> None:
    response = service.http.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("path", "body", "headers", "says"),
    [
        ("/v1/reduce?op=softmax", CELLS, {}, "softmax is an op of the verb softmax, not of reduce"),
        ("/v1/nope", CELLS, {}, "there is no such path"),
        ("/v1/sofmax", CELLS, {}, "did you mean /v1/softmax?"),
        ("/ready", CELLS, {}, "did you mean /readyz?"),
        ("/v1/reduce?op=sum", b"", {}, 'such as {"data": [1, 2, null]}'),
        ("/v1/reduce?op=sum", b'{"data": [1], "mask": [1]}', {}, "write true and false"),
        (
            "/v1/reduce?op=sum",
            gzip.compress(CELLS, mtime=0),
            {"content-type": "x/y"},
            "gzip stream: send Content-Encoding: gzip",
        ),
        ("/v1/reduce?op=sum", gzip.compress(CELLS, mtime=0), {}, "gzip stream: send Content-Encoding: gzip"),
        (
            "/v1/reduce?op=sum",
            to_bytes([], {}),
            {},
            "looks like safetensors: send Content-Type: application/vnd.safetensors",
        ),
        ("/v1/reduce?op=sum", CELLS, {"content-type": "x/y"}, "looks like JSON: send Content-Type: application/json"),
        ("/v1/reduce?op=sum", b"", {"content-type": "x/y"}, "such as a file of safetensors"),
        ("/v1/reduce?op=sum", zlib.compress(CELLS)[2:-4], {"content-encoding": "deflate"}, "zlib's format, RFC 1950"),
        ("/v1/reduce?op=sum", CELLS, {"host": "evil.example"}, "--allowed-host"),
        ("/v1/reduce?op=sum", CELLS, {"origin": "http://evil.example"}, "--allowed-host"),
    ],
)
def test_a_refusal_says_what_to_do(
    service: Running, path: str, body: bytes, headers: dict[str, str], says: str
) -> None:
    response = service.http.post(path, content=body, headers={"content-type": JSON} | headers)
    assert 400 <= response.status_code < 500
    assert says in response.json()["detail"]


def test_what_a_row_refuses_names_the_parameter(service: Running) -> None:
    told = check_problem(service.post("/v1/reduce?op=quantile&q=2", CELLS, content_type=JSON), 422, "bad_parameter")
    assert told["parameter"] == "q"


def test_who_set_too_short_a_limit_is_told_that_it_was_his(service: Running) -> None:
    start = f"POST /v1/reduce?op=sum HTTP/1.1\r\nHost: {service.netloc}\r\nX-Request-Timeout: 0.1\r\nContent-Length: 9\r\n\r\n"
    told = service.raw(start.encode())
    assert b"HTTP/1.1 408 " in told
    assert b"give X-Request-Timeout more, up to 20, or send it faster" in told


@pytest.mark.parametrize(("n_bytes", "status"), [(251, 200), (252, 413), (256, 413)])
def test_a_name_leaves_room_for_that_of_its_mask(service: Running, n_bytes: int, status: int) -> None:
    response = service.post("/v1/reduce?op=sum", json.dumps({"x" * n_bytes: [1, None]}).encode(), content_type=JSON)
    assert response.status_code == status
    if status == 413:
        told = check_problem(response, 413, "too_large")
        assert f"a tensor's name has {n_bytes} bytes; at most 251 " in told["detail"]


def test_no_value_of_a_parameter_reaches_the_log(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for text in ("1" * 309, "2." + "5" * 300, "3.141592653589"):
            service.post(f"/v1/reduce?op=norm&ord={text}", CELLS, content_type=JSON)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("maskserve")]
    assert lines
    assert not [line for line in lines if "11111" in line or "55555" in line or "3.1415" in line]


def test_the_openapi_document_knows_that_no_time_is_no_timeout(service: Running) -> None:
    operation = service.http.get("/openapi.json").json()["paths"]["/v1/reduce"]["post"]
    header = next(p for p in operation["parameters"] if p["name"] == "X-Request-Timeout")
    assert header["schema"]["exclusiveMinimum"] == 0
