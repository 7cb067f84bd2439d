"""A job: what was asked, how far it is, and how it ended; and what clients are told of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from maskserve.payload.header import shown
from maskserve_api.forms import Form
from maskserve_api.table import Json

NAME_LENGTH = 128
BLOCK_BYTES = 1 << 20
"""Of what a job reads: progress is counted in these."""


class Status(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


OPEN = (Status.QUEUED, Status.RUNNING)
ENDED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of the store. Times ending in `_s` are seconds of the wall clock, except the age at the end, the spool's own."""

    seq: int
    id: str
    owner: str
    """The name of the key that it was submitted with; empty where the service asks for none."""
    idempotency: str | None
    asked_sha256: str
    verb: str
    query: bytes
    question: Form
    answer: Form
    request: str
    """The request as clients are told of it, in JSON."""
    op: str
    request_id: str
    status: Status
    attempts: int
    created_s: float
    started_s: float | None
    ended_s: float | None
    ended_age_s: float | None
    body_bytes: int
    is_inline: bool
    """Whether the body stands in the store; else it is a file."""
    n_blocks: int
    n_done: int
    result_bytes: int | None
    result_sha256: str | None
    result_type: str | None
    problem: str | None
    """The problem that a failed job ended with, in JSON."""

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def event(self) -> dict[str, Any]:
        """The fields of the log's line about its end: no cell and no query."""
        began_s = self.created_s if self.started_s is None else self.started_s
        return {
            "job": self.id,
            "request_id": self.request_id,
            "verb": self.verb,
            "op": self.op,
            "status": self.status,
            "code": None if self.problem is None else json.loads(self.problem)["code"],
            "attempts": self.attempts,
            "bytes_in": self.body_bytes,
            "bytes_out": self.result_bytes or 0,
            "seconds": round(max(0.0, (self.ended_s or began_s) - began_s), 6),
            "key": shown(self.owner, NAME_LENGTH) if self.owner else None,
        }

    @property
    def path(self) -> str:
        return f"/v1/jobs/{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a job gave; `data` is None where it is a file."""

    n_bytes: int
    sha256: str
    media_type: str
    data: bytes | None = None


def accepted(job: Job) -> Json:
    """What who submits a job is told."""
    return {
        "id": job.id,
        "status": job.status,
        "verb": job.verb,
        "request": json.loads(job.request),
        "created": when(job.created_s),
        "links": {"self": job.path, "result": f"{job.path}/result"},
    }


def told(job: Job, *, n_done: int, expires_s: float | None) -> Json:
    """What who asks for a job is told; `expires_s` is when, by the wall clock, it will be gone."""
    result = {"bytes": job.result_bytes, "sha256": job.result_sha256, "content_type": job.result_type}
    problem: Any = None if job.problem is None else json.loads(job.problem)
    return {
        "id": job.id,
        "status": job.status,
        "verb": job.verb,
        "request": json.loads(job.request),
        "progress": {"done": n_done, "total": job.n_blocks, "unit": "blocks"},
        "created": when(job.created_s),
        "started": when(job.started_s),
        "ended": when(job.ended_s),
        "expires": when(expires_s),
        "result": result if job.status is Status.SUCCEEDED else None,
        "problem": problem,
    }


def when(seconds: float | None) -> str | None:
    """A time as RFC 3339 has it.

    >>> when(0), when(None)
    ('1970-01-01T00:00:00.000Z', None)
    """
    if seconds is None:
        return None
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.removesuffix("+00:00") + "Z"
