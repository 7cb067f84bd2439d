"""What one request did: filled in on its way, and read once, by the metrics and the log, when its reply has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from maskserve.payload.header import shown
from maskserve_api.trace import Trace
from maskserve_api.work import Stages

RECORD, KEY = "maskserve.record", "maskserve.key"
"""Where a scope has the Record, and the name of the key that the request was let in with."""
OTHER = "other"
"""Stands for what the op table does not have, so that no client can make up new time series."""
GONE = 499
"""The client went away before a status was sent (the number is nginx's)."""
NAME_LENGTH = 128


@dataclass(slots=True)
class Record:
    """Verb and op are words of the op table, or OTHER; never what a client wrote."""

    request_id: str
    trace: Trace
    verb: str = OTHER
    op: str = OTHER
    status: int = GONE
    code: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    cells: tuple[int, int] = (0, 0)
    """The valid and the masked cells of the answer."""
    stages: Stages = field(default_factory=Stages)
    began_s: float = field(default_factory=time.perf_counter)

    def seconds(self) -> dict[str, float]:
        """By stage, and in all; a copy, for the lane may still write where nobody waits any longer."""
        return {**self.stages.seconds, "total": time.perf_counter() - self.began_s}

    def event(self, scope: Scope, seconds: dict[str, float]) -> dict[str, Any]:
        """The fields of the log's line: no cell, no query, and no name longer than NAME_LENGTH."""
        return {
            "request_id": self.request_id,
            "trace_id": self.trace.trace_id,
            "span_id": self.trace.span_id,
            "method": shown(scope["method"], NAME_LENGTH),
            "path": shown(scope["path"], NAME_LENGTH),
            "verb": self.verb,
            "op": self.op,
            "status": self.status,
            "code": self.code,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "ms": {stage: round(s * 1000, 3) for stage, s in seconds.items()},
            "key": shown(scope[KEY], NAME_LENGTH) if scope.get(KEY) else None,
        }


def record_of(scope: Scope) -> Record:
    """The Record of the request, which the outermost layer has put there."""
    record = scope[RECORD]
    assert isinstance(record, Record)
    return record
