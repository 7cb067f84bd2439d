"""Which bytes of a result are asked for: Range, If-Range and If-None-Match (RFC 9110, 13 and 14)."""

from __future__ import annotations

import re

from starlette.datastructures import Headers

from maskserve_api.errors import RangeError

ONE = re.compile(r"\s*bytes\s*=\s*([0-9]*)\s*-\s*([0-9]*)\s*", re.IGNORECASE)
MOST_DIGITS = 20
"""Python refuses to read numbers of thousands."""
TAG = re.compile(r'(?:W/)?"[^"]*"')


def etag(sha256: str) -> str:
    return f'"{sha256}"'


def is_known(headers: Headers, tag: str) -> bool:
    """Whether the client has these bytes already."""
    said = ",".join(headers.getlist("if-none-match"))
    return said.strip() == "*" or tag in {found.removeprefix("W/") for found in TAG.findall(said)}


def part(headers: Headers, n_bytes: int, tag: str) -> range | None:
    """The bytes that are asked for; None for all of them. RangeError where there are none such.

    One range is served, the kind that resumes a download; several get the whole, as RFC 9110 allows. What is not
    understood is ignored, as it says one must.
    """
    said = headers.getlist("range")
    found = ONE.fullmatch(said[0]) if len(said) == 1 else None
    if found is None or not is_current(headers, tag):
        return None
    first, last = found.groups()
    if not first and not last:
        return None
    if first and last and number(last) < number(first):
        return None
    start = number(first) if first else max(0, n_bytes - number(last))
    stop = min(number(last) + 1, n_bytes) if first and last else n_bytes
    if start >= n_bytes or start >= stop:
        error = RangeError(f"the result has {n_bytes} bytes, and none of the range", parameter="Range")
        error.n_bytes = n_bytes
        raise error
    return range(start, stop)


def number(digits: str) -> int:
    """The number; one that is larger than any file is as good as the next."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) < MOST_DIGITS else 10**MOST_DIGITS


def is_current(headers: Headers, tag: str) -> bool:
    """Whether the range is of these bytes: If-Range names them, or is not there."""
    said = headers.get("if-range")
    return said is None or said.strip() == tag
