"""POST /v1/{verb} and /v2/models/{verb}/infer: the road of a request from its headers to the last byte of its answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from maskserve.errors import ParameterError
from maskserve.health import health
from maskserve.payload.format import Buffer, Limits
from maskserve.stores.addresses import Address
from maskserve_api import coding, fetching, forms, v2_question
from maskserve_api.body import Claim, Memory, declared_bytes, read_body
from maskserve_api.errors import BodyTimeoutError, DrainingError
from maskserve_api.forms import Form
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.headers import prefers_async
from maskserve_api.jobs.submitting import Submission
from maskserve_api.lanes import Lanes
from maskserve_api.query import request_of, words_of
from maskserve_api.record import record_of
from maskserve_api.work import Reply, Stages, Work

T = TypeVar("T")
SEND_BYTES = 1 << 18
"""The server copies each piece once on its way to the socket: pieces bound what that takes."""


@dataclass(slots=True, kw_only=True)
class Service:
    """What all requests share."""

    max_body: int
    request_timeout_s: float
    lanes: Lanes
    memory: Memory
    limits: Limits
    stores: tuple[str, ...] = ()
    """Prefixes of stores that requests may name instead of a body."""
    jobs: Jobs | None = None
    """Where requests may be answered later."""
    draining: bool = False

    def refuse_unready(self) -> None:
        """Raises why requests are not to be sent here, where that is so."""
        if self.draining:
            raise DrainingError("the service is shutting down")
        health().refuse_lost()
        if self.jobs is not None:
            self.jobs.refuse_fault()


@dataclass(frozen=True, slots=True)
class Verb:
    """The ASGI application of one verb."""

    name: str
    service: Service
    form: Form | None = None
    """The form that the path says; where it says none, headers do."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, record = Headers(scope=scope), record_of(scope)
        record.verb = self.name
        if self.service.draining:
            raise DrainingError("the service is shutting down; another replica, or a later try, may serve")
        question = self.form or forms.of_question(headers)
        answer = self.form or forms.of_answer(headers, question)
        body_coding = coding.of_body(headers)
        jobs = self.service.jobs if self.form is None and prefers_async(headers) else None
        n_bytes = declared_bytes(headers, self.service.max_body if jobs is None else jobs.options.max_body)
        source, query = fetching.split(scope["query_string"]) if self.form is None else (None, scope["query_string"])
        address = None
        if source is not None:
            address = fetching.allowed(source, self.service.stores, n_bytes, is_coded=body_coding is not None)
        head, request = None, None
        if question is Form.V2:
            head = v2_question.head(self.name, words_of(self.name, query), headers)
        else:
            request = request_of(self.name, query)
            record.op = request.row.name
        timeout_s = timeout_of(headers, self.service.request_timeout_s)
        if jobs is not None and request is not None:
            found = None
            if address is not None:
                found = await self.begun(address, jobs.options.max_body, timeout_s)
                question, n_bytes = found.form, found.version.n_bytes
                answer = forms.of_answer(headers, question)
            submission = Submission(
                jobs=jobs,
                memory=self.service.memory,
                limits=self.service.limits,
                request=request,
                query=query,
                question=question,
                answer=answer,
                coding=body_coding,
                n_bytes=n_bytes,
                timeout_s=timeout_s,
                source=found,
            )
            await submission(scope, receive, send)
            return
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        stages = record.stages
        with self.service.memory.claim() as claim:
            with stages.stage("read"):
                try:
                    async with asyncio.timeout_at(deadline_s):
                        cells_at = head.cells_at if head else 0
                        body = await read_body(receive, n_bytes, self.service.max_body, claim, body_coding, cells_at)
                        if address is not None:
                            found = await fetching.begun(address, self.service.max_body, claim)
                            body, question = await found.body(claim), found.form
                            answer = forms.of_answer(headers, question)
                except TimeoutError:
                    raise late(timeout_s, self.service.request_timeout_s) from None
            work = Work(
                request=request,
                body=body,
                question=question,
                answer=answer,
                stages=stages,
                head=head,
                limits=self.service.limits,
                admit=claim.add_answer,
            )
            reply = await self.replied(work, claim, receive, deadline_s)
            record.op, record.cells = work.asked().row.name, reply.cells
            await sent(reply, stages, self.service.request_timeout_s, send)

    async def begun(self, address: Address, max_body: int, timeout_s: float) -> fetching.Source:
        """The object that a job will read, which is told of now where it cannot be."""
        with self.service.memory.claim() as claim:
            try:
                async with asyncio.timeout(timeout_s):
                    return await fetching.begun(address, max_body, claim)
            except TimeoutError:
                raise late(timeout_s, self.service.request_timeout_s) from None

    async def replied(self, work: Work, claim: Claim, receive: Receive, deadline_s: float) -> Reply:
        """The reply, computed here where that is cheaper than a hop to the CPU's lane; another device may let one wait."""
        lanes = self.service.lanes
        is_small = work.decoded_small()
        if not (is_small or work.is_told()):
            await lanes.cpu.run(held(claim, work.payload), receive, deadline_s)
        lane, work.request = lanes.placed(work.asked())
        if is_small and lane is lanes.cpu:
            return work.small_reply()
        deadline_s = min(deadline_s, asyncio.get_running_loop().time() + work.timeout_s())
        submitted = time.perf_counter()

        def in_lane() -> Reply:
            work.stages.seconds["queue"] = time.perf_counter() - submitted
            return work.reply()

        return await lane.run(held(claim, in_lane), receive, deadline_s)


def held(claim: Claim, work: Callable[[], T]) -> Callable[[], T]:
    """`work`, whose memory is counted until it ends, though its client is gone."""

    def working() -> T:
        with claim.held():
            return work()

    return working


def timeout_of(headers: Headers, most_s: float) -> float:
    """What X-Request-Timeout asks for, in seconds, and never more than the service grants."""
    asked = headers.get("x-request-timeout")
    if asked is None:
        return most_s
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", asked) or float(asked) == 0:
        raise ParameterError(
            "X-Request-Timeout must be seconds above 0 as digits, such as 30 or 0.5", parameter="X-Request-Timeout"
        )
    return min(float(asked), most_s)


def late(timeout_s: float, most_s: float) -> BodyTimeoutError:
    """That a body took too long, and whose limit that was."""
    more = f"give X-Request-Timeout more, up to {most_s:g}, or " if timeout_s < most_s else ""
    return BodyTimeoutError(f"the body was not there after {timeout_s:g} s; {more}send it faster")


async def sent(reply: Reply, stages: Stages, timeout_s: float, send: Send) -> None:
    """Sends a complete reply; who takes no byte for `timeout_s` is left."""
    headers = [
        (b"content-type", reply.media_type.encode()),
        (b"content-length", str(reply.n_bytes).encode()),
        (b"server-timing", stages.header().encode()),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    left = reply.n_bytes
    with stages.stage("send"):
        for piece in pieces(reply.chunks):
            left -= len(piece)
            async with asyncio.timeout(timeout_s):
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})


def pieces(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """The bytes of `chunks` in pieces of at most SEND_BYTES; small ones are joined, since each costs a write.

    >>> list(pieces([b"ab", b"c"]))
    [b'abc']
    """
    small: list[Buffer] = []
    n_bytes = 0
    for chunk in chunks:
        view = memoryview(chunk)
        if n_bytes + view.nbytes > SEND_BYTES and small:
            yield b"".join(small)
            small, n_bytes = [], 0
        if view.nbytes <= SEND_BYTES:
            small.append(view)
            n_bytes += view.nbytes
        else:
            yield from (view[start : start + SEND_BYTES] for start in range(0, view.nbytes, SEND_BYTES))
    if small:
        yield b"".join(small)
