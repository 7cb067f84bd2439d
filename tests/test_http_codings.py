"""Compressed bodies: read like plain ones, bounded by what they expand to."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest

from tests.http_service import JSON, MAX_BODY, Running, check_problem, payload, running, wait_until

SMALL = payload(data=np.arange(12, dtype=np.float32).reshape(3, 4))
LARGE = payload(data=np.random.default_rng(1).integers(0, 9, (300, 300)))
CODINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
SUM = "/v1/reduce?op=sum"

every_coding = pytest.mark.parametrize("coding", CODINGS)


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


def post(service: Running, body: object, coding: str, **headers: str) -> httpx.Response:
    return service.post(SUM, body, content_encoding=coding, **headers)


def check_refused(service: Running, response: httpx.Response, status: int, code: str) -> None:
    assert check_problem(response, status, code)["parameter"] == "Content-Encoding"
    wait_until(lambda: service.service.memory.held_bytes == 0)
    assert service.post(SUM, SMALL).status_code == 200


@every_coding
@pytest.mark.parametrize("question", [SMALL, LARGE], ids=["small", "large"])
def test_a_compressed_body_is_read_like_a_plain_one(service: Running, coding: str, question: bytes) -> None:
    plain = service.post(SUM, question)
    assert plain.status_code == 200
    packed = CODINGS[coding](question)
    assert post(service, packed, coding).content == plain.content
    assert post(service, packed, coding.upper()).content == plain.content


@every_coding
def test_chunks_of_a_compressed_body_may_end_anywhere(service: Running, coding: str) -> None:
    packed = CODINGS[coding](SMALL)
    pieces = (packed[at : at + 1] for at in range(len(packed)))
    assert post(service, pieces, coding).content == service.post(SUM, SMALL).content


@every_coding
def test_json_may_be_compressed(service: Running, coding: str) -> None:
    packed = CODINGS[coding](b'{"data": [1, null, 2]}')
    assert post(service, packed, coding, content_type=JSON).json() == {"data": 3}


@every_coding
@pytest.mark.parametrize(
    "broken",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:20],
        lambda packed: b"",
        lambda packed: packed + b"more",
        lambda packed: packed + packed,
        lambda packed: packed[:30] + b"\xff\xff\xff\xff" + packed[34:],
        lambda packed: SMALL,
    ],
    ids=["cut", "cut early", "empty", "longer", "twice", "changed", "not compressed"],
)
def test_a_stream_that_is_broken_is_refused(service: Running, coding: str, broken: Callable[[bytes], bytes]) -> None:
    check_refused(service, post(service, broken(CODINGS[coding](LARGE)), coding), 400, "malformed_payload")


@every_coding
def test_a_body_that_expands_beyond_the_limit_is_refused(service: Running, coding: str) -> None:
    bomb = CODINGS[coding](bytes(MAX_BODY + 1))
    assert len(bomb) < MAX_BODY // 100
    check_refused(service, post(service, bomb, coding), 413, "too_large")
    exact = CODINGS[coding](bytes(MAX_BODY))
    check_problem(post(service, exact, coding), 400, "malformed_payload")  # read whole: it is no payload


def test_what_expands_is_charged_to_the_memory_of_all() -> None:
    with running() as service:
        service.service.memory.limit_bytes = MAX_BODY // 2
        check_problem(post(service, gzip.compress(bytes(MAX_BODY)), "gzip"), 503, "busy")
        wait_until(lambda: service.service.memory.held_bytes == 0)
        assert service.post(SUM, SMALL).status_code == 200


@pytest.mark.parametrize("word", ["br", "zstd", "gzip, gzip", "deflate,gzip", "x" * 5000])
def test_any_other_coding_is_a_415(service: Running, word: str) -> None:
    told = check_problem(post(service, gzip.compress(SMALL), word), 415, "unsupported_media_type")
    assert told["allowed"] == ["gzip", "deflate"]


@pytest.mark.parametrize("word", ["identity", "", "Identity, gzip"])
def test_identity_says_nothing(service: Running, word: str) -> None:
    body = gzip.compress(SMALL) if "gzip" in word else SMALL
    assert post(service, body, word).status_code == 200


def test_replies_of_v1_are_not_compressed(service: Running) -> None:
    response = service.post(SUM, SMALL, accept_encoding="gzip")
    assert "content-encoding" not in response.headers
