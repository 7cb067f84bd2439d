"""What is remembered of a question: how it is to be computed, never its cells, and only of short ones."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from maskserve import answers
from maskserve.errors import MaskDtypeError, PayloadError
from maskserve.payload.format import BytesPayload
from maskserve.payload.header import KNOWN_BYTES
from maskserve.requests import build
from maskserve_api.query import request_of
from tests.http_service import payload

X, MASK = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([[1, 0, 1], [0, 0, 1]], bool)


def question(scale: float = 1, mask: np.ndarray = MASK, **tensors: np.ndarray) -> BytesPayload:
    return BytesPayload(bytearray(payload(x=X * np.float32(scale), x__mask=mask, **tensors)))


def test_a_header_that_is_known_is_read_once_and_answers_come_from_the_cells() -> None:
    request = request_of("reduce", b"op=sum&dim=1")
    assert request is request_of("reduce", b"op=sum&dim=1")
    for scale, mask in ((1, MASK), (2, ~MASK), (1, MASK)):
        asked = question(scale, mask)
        assert asked.header is question().header
        result = answers.run(request, asked).results[0]
        assert result.data.tolist() == np.where(mask, X * scale, 0).sum(1).tolist()


def test_the_same_header_before_other_bytes_is_malformed_each_time() -> None:
    whole = payload(x=X, x__mask=MASK)
    BytesPayload(whole)
    for cut in (whole[:-1], whole + b"\0", whole[:-1]):
        with pytest.raises(PayloadError):
            BytesPayload(cut)


def test_a_byte_that_is_no_bool_is_found_wherever_it_stands() -> None:
    request = build("reduce", {"op": "sum"})
    for at in range(MASK.size):
        cells = MASK.astype(np.uint8)
        cells.flat[at] = 2
        with pytest.raises(MaskDtypeError):
            answers.run(request, question(mask=cells))


def test_requests_that_look_alike_are_told_apart() -> None:
    asked = question()
    answered = [answers.run(build("reduce", {"op": "sum", "dim": dim}), asked) for dim in ("0", "1", "0,1")]
    assert [a.results[0].data.shape for a in answered] == [(3,), (2,), ()]


def test_no_question_is_kept_with_what_is_remembered() -> None:
    request = build("reduce", {"op": "mean", "dim": "1", "weights": "w"})
    asked = question(w=np.ones((2, 3), np.float32))
    answers.run(request, asked)
    gone = weakref.ref(asked)
    del asked
    gc.collect()
    assert gone() is None


def test_what_is_remembered_is_bounded() -> None:
    asked = question()
    for dim in ["0", "1"] * answers.REMEMBERED:
        answers.run(build("reduce", {"op": "sum", "dim": dim}), asked)
    assert len(asked.header.memo) <= answers.REMEMBERED
    long = payload({"note": "x" * KNOWN_BYTES}, x=X)
    assert BytesPayload(long).header is not BytesPayload(long).header
    long_query = b"op=sum&dim=" + b"0," * 300 + b"0"
    with pytest.raises(Exception, match="dim"):
        answers.run(request_of("reduce", long_query), asked)
