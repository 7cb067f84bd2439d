"""What the headers of a submission say: Prefer (RFC 7240) and Idempotency-Key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from starlette.datastructures import Headers

from maskserve.errors import ParameterError

IDEMPOTENCY = "Idempotency-Key"
ELEMENT = re.compile(r'(?:"(?:[^"\\]|\\.)*(?:"|\\?$)|[^,"])+')
"""What stands between two commas, of which a quoted text may hold some; one without an end goes on to the end."""
KEY = re.compile(r"[ -~]{1,128}")
ASYNC = "respond-async"


def prefers_async(headers: Headers) -> bool:
    """Whether the client would rather be answered later."""
    lines = headers.getlist("prefer")
    return bool(lines) and ASYNC in preferences(lines)


def preferences(lines: Iterable[str]) -> dict[str, str]:
    """Each preference with its value, of which the first counts; parameters are nobody's here.

    >>> preferences(['foo="a, respond-async"; x, wait=10', "Respond-Async"])
    {'foo': '"a, respond-async"', 'wait': '10', 'respond-async': ''}
    """
    found: dict[str, str] = {}
    for name, value in pairs(lines):
        found.setdefault(name, value)
    return {name: value for name, value in found.items() if name != ASYNC or value in ("", '""')}


def pairs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        for element in ELEMENT.findall(line):
            name, _, rest = element.partition("=") if is_valued(element) else (element.partition(";")[0], "", "")
            value = ELEMENT.match(rest)
            yield name.strip().lower(), without_parameters(value[0]) if value else ""


def is_valued(element: str) -> bool:
    """Whether an element says a value of its name, and not of a parameter's."""
    return "=" in element.partition(";")[0]


def without_parameters(text: str) -> str:
    quoted = re.match(r'\s*("(?:[^"\\]|\\.)*")', text)
    return quoted[1] if quoted else text.partition(";")[0].strip()


def idempotency_key(headers: Headers) -> str | None:
    """The Idempotency-Key, checked; None where there is none."""
    given = headers.getlist(IDEMPOTENCY)
    if not given:
        return None
    if len(given) > 1 or not KEY.fullmatch(given[0]):
        raise ParameterError(
            f"{IDEMPOTENCY} must be 1 to 128 printable ASCII characters, once; a UUID will do", parameter=IDEMPOTENCY
        )
    return given[0]
