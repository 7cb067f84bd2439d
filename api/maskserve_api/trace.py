"""W3C Trace Context: the trace that a request is part of, continued where it came with one."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
STATE_BYTES = 512
STATE_MEMBERS = 32


@dataclass(frozen=True, slots=True)
class Trace:
    """Where this request stands: its trace, its own span, and what the callers' tools keep with them."""

    trace_id: str
    span_id: str
    flags: str
    state: str = ""

    def headers(self) -> list[tuple[bytes, bytes]]:
        sent = [(b"traceparent", f"00-{self.trace_id}-{self.span_id}-{self.flags}".encode())]
        return [*sent, (b"tracestate", self.state.encode())] if self.state else sent


def trace_of(headers: Headers) -> Trace:
    """The trace that traceparent names, with a span of our own; a new trace where it names none."""
    span_id = secrets.token_hex(8)
    parents = headers.getlist("traceparent")
    found = TRACEPARENT.fullmatch(parents[0]) if len(parents) == 1 else None
    if found is None or not is_valid(*found.groups()):
        return Trace(secrets.token_hex(16), span_id, "00")
    return Trace(found[2], span_id, found[4], state_of(headers))


def is_valid(edition: str, trace_id: str, parent_id: str, flags: str, rest: str | None) -> bool:
    """Whether the fields may be: ff is no version, zeros are no id, and version 00 has four fields."""
    return edition != "ff" and bool(trace_id.strip("0") and parent_id.strip("0")) and (edition != "00" or rest is None)


def state_of(headers: Headers) -> str:
    """tracestate as it came, shortened by whole members from the right to what has to be passed on."""
    members = [word.strip() for line in headers.getlist("tracestate") for word in line.split(",")]
    kept = [word for word in members if word and word.isascii() and word.isprintable()][:STATE_MEMBERS]
    while len(state := ",".join(kept)) > STATE_BYTES:
        kept.pop()
    return state
