"""/v1/jobs: the jobs of a key, each with its result. To any other key they are not there."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Collection
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from maskserve.errors import ParameterError, nearest
from maskserve_api.errors import (
    Disconnected,
    JobCancelledError,
    JobExpiredError,
    JobNotFinishedError,
    SpoolError,
    UnknownJobError,
)
from maskserve_api.jobs import ranges
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.job import Job, Status
from maskserve_api.jobs.spool import open_file
from maskserve_api.problems import CONTENT_TYPE
from maskserve_api.record import KEY, record_of
from maskserve_api.verbs import SEND_BYTES, Service

WAIT = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
ID = re.compile(r"[0-9a-f]{32}")
MOST_WAIT_S = 60.0
PAGE, MOST_PAGE = 100, 1000
NEW_KEY = "with a new Idempotency-Key if it had one"
CHANGED = "the result cannot be read: it is not as it was left"
STATUS, LIMIT, AFTER, WAITED = "status", "limit", "after", "wait"


def add_routes(app: FastAPI, service: Service, jobs: Jobs) -> None:
    app.add_route("/v1/jobs", Listing(jobs), methods=["GET", "HEAD"])  # type: ignore[arg-type]  # ASGI endpoints
    app.add_route("/v1/jobs/{id}", One(jobs), methods=["GET", "HEAD", "DELETE"])  # type: ignore[arg-type]
    app.add_route("/v1/jobs/{id}/result", ResultOf(jobs, service), methods=["GET", "HEAD"])  # type: ignore[arg-type]


class Listing:
    """GET /v1/jobs"""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner, words = owner_of(scope), words_of(scope, (STATUS, LIMIT, AFTER))
        n = page_size(words.get(LIMIT))
        found = self.jobs.store.page(owner, statuses(words.get(STATUS)), n + 1, place(words.get(AFTER)))
        told = [self.jobs.told(job) for job in found[:n]]
        following = told[-1]["id"] if len(found) > n else None
        await JSONResponse({"jobs": told, "next": following})(scope, receive, send)


class One:
    """GET and DELETE /v1/jobs/{id}"""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_delete = scope["method"] == "DELETE"
        words = words_of(scope, () if is_delete else (WAITED,))
        job = job_of(self.jobs, scope)
        if is_delete:
            response = await self.deleted(job)
        else:
            response = JSONResponse(self.jobs.told(await self.waited(job, wait_of(words.get(WAITED)), receive)))
        await response(scope, receive, send)

    async def deleted(self, job: Job) -> Response:
        self.jobs.refuse_fault()
        ended = await self.jobs.cancel(job) if job.is_open else None
        if ended is not None:
            return JSONResponse(self.jobs.told(ended), status_code=202)
        if not await self.jobs.forget(job):
            raise unknown()
        return Response(status_code=204)

    async def waited(self, job: Job, wait_s: float, receive: Receive) -> Job:
        """The job once it has ended, or as it is after `wait_s` seconds; no thread waits for it."""
        if not job.is_open or not wait_s:
            return job
        change, gone = self.jobs.change_of(job.seq), asyncio.ensure_future(disconnected(receive))
        try:
            now = self.jobs.store.by_seq(job.seq)  # it may have ended before the change was waited for
            if now is not None and now.is_open:
                await asyncio.wait([change, gone], timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise Disconnected
        finally:
            change.cancel()
            gone.cancel()
        found = self.jobs.store.by_seq(job.seq)
        if found is None:
            raise unknown()
        return found


class ResultOf:
    """GET /v1/jobs/{id}/result"""

    def __init__(self, jobs: Jobs, service: Service) -> None:
        self.jobs, self.service = jobs, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        words_of(scope, ())
        job = job_of(self.jobs, scope)
        refuse_without_result(job)
        if job.status is Status.FAILED:
            await failed(job, record_of(scope).request_id)(scope, receive, send)
            return
        headers = Headers(scope=scope)
        assert job.result_bytes is not None
        assert job.result_sha256 is not None
        assert job.result_type is not None
        tag = ranges.etag(job.result_sha256)
        given = {"etag": tag, "accept-ranges": "bytes"}
        if ranges.is_known(headers, tag):
            await Response(status_code=304, headers=given)(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        # a range is of GET alone: RFC 9110, 14.2
        part = None if is_head else ranges.part(headers, job.result_bytes, tag)
        wanted = range(job.result_bytes) if part is None else part
        given |= {"content-type": job.result_type, "content-length": str(len(wanted))}
        if part is not None:
            given["content-range"] = f"bytes {part.start}-{part.stop - 1}/{job.result_bytes}"
        raw = [(name.encode(), value.encode()) for name, value in given.items()]
        source = Source(self.jobs, job)
        try:
            await send({"type": "http.response.start", "status": 200 if part is None else 206, "headers": raw})
            await self.sent(source, range(0) if is_head else wanted, send)
        finally:
            source.close()

    async def sent(self, source: Source, wanted: range, send: Send) -> None:
        """Sends these bytes; who takes none for as long as a request may take is left."""
        async for piece in source.pieces(wanted):
            async with asyncio.timeout(self.service.request_timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Source:
    """The bytes of a result, from the store or from a file, which stays readable though the job is forgotten meanwhile.

    SpoolError where they are not as many as the job's row says.
    """

    def __init__(self, jobs: Jobs, job: Job) -> None:
        self.data = jobs.store.result(job.seq)
        self.fd = -1
        if self.data is None:
            try:
                self.fd = open_file(jobs.spool.result(job.id))
            except OSError as error:
                raise SpoolError(CHANGED) from error
        if self.n_bytes != job.result_bytes:
            self.close()
            raise SpoolError(CHANGED)

    @property
    def n_bytes(self) -> int:
        return os.fstat(self.fd).st_size if self.data is None else len(self.data)

    async def pieces(self, wanted: range) -> AsyncIterator[bytes]:
        for start in range(wanted.start, wanted.stop, SEND_BYTES):
            stop = min(start + SEND_BYTES, wanted.stop)
            if self.data is not None:
                yield self.data[start:stop]
                continue
            piece = await asyncio.to_thread(os.pread, self.fd, stop - start, start)
            if len(piece) < stop - start:
                raise SpoolError("the result cannot be read: its file ends early")
            yield piece

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


# -- what is asked for ------------------------------------------------------------------------------------------------


def owner_of(scope: Scope) -> str:
    return str(scope.get(KEY) or "")


def job_of(jobs: Jobs, scope: Scope) -> Job:
    job = jobs.find(owner_of(scope), scope["path_params"]["id"])
    if job is None:
        raise unknown()
    return job


def unknown() -> UnknownJobError:
    return UnknownJobError(
        "there is no such job of yours: it was forgotten, or never was; GET /v1/jobs lists those that are"
    )


def words_of(scope: Scope, known: Collection[str]) -> dict[str, str]:
    """The parameters of the query, each once."""
    words: dict[str, str] = {}
    for name, value in Request(scope).query_params.multi_items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ParameterError(
                f"this path has no parameter {name[:64]!r}; {takes}{nearest(name[:64], known)}",
                parameter=name[:64],
                allowed=known,
            )
        if name in words:
            raise ParameterError(f"the query gives {name} twice; give it once", parameter=name)
        words[name] = value
    return words


def statuses(word: str | None) -> tuple[Status, ...]:
    if word is None or word == "":
        return tuple(Status)
    if word not in tuple(Status):
        raise ParameterError(
            f"status must be one of {', '.join(Status)}", parameter=STATUS, allowed=[status.value for status in Status]
        )
    return (Status(word),)


def page_size(word: str | None) -> int:
    if word is None:
        return PAGE
    n = int(word) if word.isascii() and word.isdecimal() and len(word) <= 6 else 0
    if not 0 < n <= MOST_PAGE:
        raise ParameterError(f"limit must be a whole number from 1 to {MOST_PAGE}", parameter=LIMIT)
    return n


def place(word: str | None) -> str:
    """The id that a page begins behind; the job itself may have been forgotten meanwhile."""
    if word is not None and not ID.fullmatch(word):
        raise ParameterError(
            "after must be the id of a job: give the `next` of an answer, or leave it out", parameter=AFTER
        )
    return word or ""


def wait_of(word: str | None) -> float:
    if word is None:
        return 0.0
    if not WAIT.fullmatch(word):
        raise ParameterError(
            f"wait must be a number of seconds, such as 30; at most {MOST_WAIT_S:g} are waited", parameter=WAITED
        )
    return min(float(word), MOST_WAIT_S)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def refuse_without_result(job: Job) -> None:
    if job.is_open:
        raise JobNotFinishedError(f"the job is {job.status}: ask again, or wait for it by GET {job.path}?wait=30")
    if job.status is Status.CANCELLED:
        raise JobCancelledError(f"the job was cancelled, so there is no result; submit it again, {NEW_KEY}")
    if job.status is Status.EXPIRED:
        raise JobExpiredError(
            f"the result was kept as long as results are, and is gone; submit the job again, {NEW_KEY}"
        )


def failed(job: Job, request_id: str) -> Response:
    """The problem that a job ended with, as the synchronous answer would have had it."""
    assert job.problem is not None
    told: dict[str, Any] = json.loads(job.problem) | {"request_id": request_id}
    text = json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(text, status_code=told["status"], headers={"content-type": CONTENT_TYPE})
