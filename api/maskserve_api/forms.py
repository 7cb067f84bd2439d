"""In which form a payload comes and goes: what Content-Type and Accept say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from enum import StrEnum

from starlette.datastructures import Headers

from maskserve.execution import in_turn
from maskserve.payload.header import DEFAULT_LIMITS, Limits
from maskserve_api.errors import NotAcceptableError


class Form(StrEnum):
    """A form of payload; the value is its media type."""

    SAFETENSORS = "application/vnd.safetensors"
    JSON = "application/json"
    V2 = "application/octet-stream"


BYTES_PER_VALUE = 8


def bounded(limits: Limits = DEFAULT_LIMITS) -> Limits:
    """The limits of a request: Python's parser lets no other thread run until it ends, by default after some 0.2 s."""
    return replace(limits, json_values=limits.json_bytes // BYTES_PER_VALUE)


NEGOTIATED = (Form.SAFETENSORS, Form.JSON)
"""The forms that headers choose between; that of V2 is chosen by its paths."""


def of_question(headers: Headers) -> Form:
    """JSON where the Content-Type says so, else safetensors: curl sends bytes under a form type."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return Form.JSON if kind in (Form.JSON, "text/json") or kind.endswith("+json") else Form.SAFETENSORS


def of_answer(headers: Headers, question: Form) -> Form:
    """The form that Accept prefers; the question's where it does not say."""
    ranges = dict(media_ranges(headers.getlist("accept")))
    if not ranges:
        return question
    best: Form = max((question, *NEGOTIATED), key=lambda form: quality(form, ranges))  # the first of equals wins
    if quality(best, ranges) <= 0:
        raise NotAcceptableError(
            f"an answer is {' or '.join(NEGOTIATED)}; Accept asks for neither", parameter="Accept", allowed=NEGOTIATED
        )
    return best


def quality(form: Form, ranges: dict[str, float]) -> float:
    """How much a form is wanted: the most specific range decides (RFC 9110, 12.5.1)."""
    kind, _, _ = form.partition("/")
    return next((ranges[name] for name in (form, f"{kind}/*", "*/*") if name in ranges), 0.0)


def media_ranges(lines: Iterable[str]) -> Iterable[tuple[str, float]]:
    """The (media range, quality) pairs of Accept; a quality that is no number is 0.

    >>> list(media_ranges(["application/json;q=0.5, */*"]))
    [('application/json', 0.5), ('*/*', 1.0)]
    """
    for part in (part for line in lines for part in line.split(",")):
        name, *parameters = (word.strip().lower() for word in part.split(";"))
        if not name:
            continue
        q = next((word.removeprefix("q=") for word in parameters if word.startswith("q=")), "1")
        whole, _, rest = q.partition(".")
        yield name, float(q) if whole.isdecimal() and (rest == "" or rest.isdecimal()) and q.isascii() else 0.0


def written(
    pieces: Iterable[bytes], most_bytes: int, parameter: str, instead: str, allowed: Iterable[str] = ()
) -> Iterator[bytes]:
    """The pieces of a JSON answer, each after a checkpoint, until they have more bytes than JSON may have."""
    n_bytes = 0
    for piece in in_turn(pieces):
        n_bytes += len(piece)
        if n_bytes > most_bytes:
            raise NotAcceptableError(
                f"the answer has more than {most_bytes} bytes of JSON, the most that are written: {instead}",
                parameter=parameter,
                allowed=allowed,
            )
        yield piece
