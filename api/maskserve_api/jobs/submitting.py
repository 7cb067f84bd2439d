"""A request that is answered later: all that can be refused is refused now, and the 202 comes once it is on disk."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeAlias

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from maskserve import answers
from maskserve.errors import InputError, OutputError
from maskserve.payload.format import Limits
from maskserve.requests import Request, spelled
from maskserve_api.body import Claim, Memory, pieces
from maskserve_api.coding import Coding
from maskserve_api.errors import BodyTimeoutError, BusyError, IdempotencyError, ServiceError
from maskserve_api.fetching import Source
from maskserve_api.forms import Form
from maskserve_api.jobs.computing import opened
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.headers import ASYNC, IDEMPOTENCY, idempotency_key
from maskserve_api.jobs.incoming import INLINE_BYTES, Arrived, Incoming
from maskserve_api.jobs.job import BLOCK_BYTES, Job, Status, accepted
from maskserve_api.jobs.quota import Place
from maskserve_api.jobs.spool import failure
from maskserve_api.record import KEY, Record, record_of
from maskserve_api.work import SMALL_BYTES

Read: TypeAlias = Callable[[Incoming, Place | None], Awaitable[Arrived]]
BYTES_A_SECOND = 1_000_000
"""A body has as long as a request has, and a second for each so many bytes that came: a large one needs more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A checked request, whose body has not been read yet."""

    jobs: Jobs
    memory: Memory
    limits: Limits
    request: Request
    query: bytes
    question: Form
    answer: Form
    coding: Coding | None
    n_bytes: int | None
    """The body's length, where it was declared."""
    timeout_s: float
    source: Source | None = None
    """The object that is read in place of a body, now: what the job computes on is what there was when it was taken."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the 202; or raises, and nothing is kept."""
        headers, owner = Headers(scope=scope), str(scope.get(KEY) or "")
        self.jobs.refuse_fault()
        key = idempotency_key(headers)
        known = None if key is None else self.jobs.store.by_idempotency(owner, key)
        with self.memory.claim() as claim:
            read = partial(self._arrived, receive, claim)
            job: Job | None
            if known is None:
                job, asked = await self._taken(owner, key, record_of(scope), read)
            else:  # who asks again takes no place, and the body is read only to be compared
                asked = asked_sha256(self, await read(Incoming(None), None))
                job = self.jobs.store.by_seq(known.seq)
        if job is None:
            raise BusyError("the job of this Idempotency-Key was forgotten while its request was sent again; try again")
        if job.asked_sha256 != asked:
            raise IdempotencyError(
                "this Idempotency-Key was used before, for another request: take a new key for each request",
                parameter=IDEMPOTENCY,
            )
        await response(job)(scope, receive, send)

    async def _taken(self, owner: str, key: str | None, record: Record, read: Read) -> tuple[Job, str]:
        """The job on disk, a new one or the one that its key has had, and what tells this request from another."""
        id, stages = self.jobs.new_id(), record.stages
        incoming, is_kept = Incoming(lambda: self.jobs.file_of_body(id)), False
        with self._place(owner) as place:
            try:
                with stages.stage("read"):
                    arrived = await read(incoming, place)
                with stages.stage("check"):
                    n_blocks = await self._n_blocks(arrived)
                    asked = asked_sha256(self, arrived)
                job = self._job(id, owner, key, asked, n_blocks, arrived, record.request_id)
                with stages.stage("store"):
                    is_kept = True  # from here on the row may be on disk, also where nobody waits for it any longer
                    kept = await self._kept(job, arrived, place)
                is_kept = kept.id == id
            except ServiceError:
                is_kept = False
                raise
            finally:
                if not is_kept:
                    incoming.discard()
        return kept, asked

    def _place(self, owner: str) -> AbstractContextManager[Place]:
        return self.jobs.quota.place(owner, self.n_bytes or 0 if self.coding is None else 0)

    async def _arrived(self, receive: Receive, claim: Claim, incoming: Incoming, place: Place | None) -> Arrived:
        start_s = asyncio.get_running_loop().time() + self.timeout_s
        body: AsyncGenerator[bytes | memoryview, None]
        if self.source is None:
            body = pieces(receive, self.n_bytes, self.jobs.options.max_body, self.coding)
        else:
            body = self.source.pieces(claim)
        try:
            async with asyncio.timeout_at(start_s) as bound:
                async for piece in body:
                    if incoming.n_bytes < INLINE_BYTES:
                        claim.add(len(piece))
                    if place is not None:
                        place.add(len(piece))
                    await incoming.add(piece)
                    bound.reschedule(start_s + incoming.n_bytes / BYTES_A_SECOND)
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body was not there after {self.timeout_s:g} s and a second for each {BYTES_A_SECOND} bytes; send it faster"
            ) from None
        finally:
            await body.aclose()
        return await incoming.arrived()

    async def _n_blocks(self, arrived: Arrived) -> int:
        """What the job will read, in blocks, planned from the body's header; raises what the plan has against it."""

        def planned() -> int:
            body = arrived.data if arrived.file is None else arrived.file.temp
            assert body is not None, "a body is bytes or a file"
            try:
                with opened(body, arrived.n_bytes, self.question, self.limits) as payload:
                    n_bytes = answers.bytes_to_read(self.request, payload, memory=self.jobs.job_memory)
            except (OutputError, InputError) as error:
                raise failure(error) from error
            return max(1, -(-n_bytes // BLOCK_BYTES))

        if arrived.n_bytes <= SMALL_BYTES[self.question]:
            return planned()
        return await asyncio.to_thread(planned)  # no turn of the lane: to submit a job waits for nobody

    def _job(
        self, id: str, owner: str, key: str | None, asked: str, n_blocks: int, arrived: Arrived, request_id: str
    ) -> Job:
        said = self.request.canonical() | running_words(self.request)
        return Job(
            seq=0, id=id, owner=owner, idempotency=key, asked_sha256=asked, verb=said.pop("verb"), query=self.query,
            question=self.question, answer=self.answer, request=json.dumps(said), op=self.request.row.name,
            request_id=request_id, status=Status.QUEUED, attempts=0, created_s=time.time(), started_s=None, ended_s=None,
            ended_age_s=None, body_bytes=arrived.n_bytes, is_inline=arrived.file is None, n_blocks=n_blocks, n_done=0,
            result_bytes=None, result_sha256=None, result_type=None, problem=None,
        )  # fmt: skip

    async def _kept(self, job: Job, arrived: Arrived, place: Place | None) -> Job:
        """The job on disk: its body before the row that names it."""
        if arrived.file is not None:
            try:
                await asyncio.to_thread(arrived.file.publish)
            except OutputError as error:
                raise failure(error) from error
        return await asyncio.shield(self.jobs.submit(job, arrived, place))


def asked_sha256(submission: Submission, arrived: Arrived) -> str:
    """What tells one request from another: verb, parameters, forms and body."""
    request = submission.request
    said = [request.canonical(), running_words(request), submission.question, submission.answer, arrived.sha256]
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def running_words(request: Request) -> dict[str, Any]:
    """How the request is run, as data: its device and its back end, where it says them."""
    return {name: spelled(value) for name, value in sorted(request.running.items())}


def response(job: Job) -> JSONResponse:
    headers = {"location": job.path, "retry-after": "1", "preference-applied": ASYNC}
    return JSONResponse(accepted(job), status_code=202, headers=headers)
