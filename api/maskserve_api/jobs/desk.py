"""The jobs of a service: taken in, told of, cancelled and forgotten. What the routes call, and what outlives the process."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from maskserve.errors import OutputError, SettingsError, WorkerLostError
from maskserve.payload.format import Limits
from maskserve.payload.header import shown
from maskserve.settings import LEAST_MEMORY
from maskserve_api import logs
from maskserve_api.errors import ServiceError, SpoolError
from maskserve_api.jobs import store
from maskserve_api.jobs.clock import Clock
from maskserve_api.jobs.incoming import Arrived
from maskserve_api.jobs.job import ENDED, OPEN, Job, Result, Status, told
from maskserve_api.jobs.quota import ROW_BYTES, Place, Quota
from maskserve_api.jobs.runner import Runner
from maskserve_api.jobs.spool import File, Spool, digest, remove
from maskserve_api.jobs.store import Change, Store
from maskserve_api.jobs.waiting import Waiting
from maskserve_api.lanes import Lanes
from maskserve_api.problems import problem
from maskserve_api.table import Json

T = TypeVar("T")
log = logging.getLogger("maskserve.api")
TIME_DIGITS, SECRET_BYTES = 12, 10
"""Of an id: the milliseconds at which it was made, and what cannot be guessed."""
MOST_ATTEMPTS = 3
"""Attempts that may end with the process's death: a job that kills its service must not do so for ever."""
MARK_S = 30.0
"""How often the age of the spool is noted."""
LOOK_S = 1.0
"""How often what is old is looked for."""
MOST_EXPIRED = 500
"""Jobs that expire in one transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an operator says of jobs; sizes in bytes, times in seconds."""

    folder: str
    result_ttl_s: float
    n_running: int
    """At once; with 0 jobs are taken, and none begins."""
    max_body: int
    per_key: int
    most: int
    most_bytes: int
    memory: int
    """What all running jobs may hold of their data at once."""


class Jobs:
    """The jobs of one folder, from its opening to `close`; SettingsError where it cannot be used."""

    def __init__(self, options: Options, limits: Limits) -> None:
        self.options, self.limits = options, limits
        self.spool = Spool(options.folder)
        try:
            self.store = Store(self.spool.store_path)
        except BaseException:
            self.spool.close()
            raise
        self.quota = Quota(per_key=options.per_key, most=options.most, most_bytes=options.most_bytes)
        self.waiting = Waiting()
        self.n_by_status: Counter[Status] = Counter()
        self.n_ended: Counter[Status] = Counter()
        self.n_started = 0
        self.is_stopping = False
        self._changes: dict[int, set[asyncio.Future[None]]] = {}
        self._marked_s = 0.0
        self._keeper: asyncio.Task[None] | None = None
        self.runner: Runner | None = None
        self.n_adopted = self.n_lost = 0
        try:
            self.store.refuse_edited()
            self.clock = Clock(self.store.mark())
            self._last_ms = int(self.store.last_id()[:TIME_DIGITS] or "0", 16)
            self._recover()
        except BaseException as error:
            self.store.close()
            self.spool.close()
            if isinstance(error, ServiceError | ValueError | TypeError | KeyError | OSError):
                raise self._unusable(error) from error
            raise

    def _unusable(self, error: Exception) -> SettingsError:
        """What was found at the start, as who starts the service is told of it."""
        path, reason = self.spool.store_path, "it is not as maskserve has left it"
        if isinstance(error, ServiceError):
            reason = error.message.partition(";")[0]  # what follows is for clients
        elif isinstance(error, OSError):
            path, reason = error.filename or self.spool.folder, error.strerror or reason
        return SettingsError(
            f"{shown(path)} cannot be taken up: {reason}; put it right, or give another --jobs-folder",
            parameter="serve_jobs_folder",
        )

    @property
    def job_memory(self) -> int:
        """What each running job may hold."""
        return max(LEAST_MEMORY, self.options.memory // max(1, self.options.n_running))

    def new_id(self) -> str:
        """An id that nobody guesses; one that comes later is larger, however the clock is set."""
        self._last_ms = max(self._last_ms + 1, time.time_ns() // 10**6)
        return f"{self._last_ms:0{TIME_DIGITS}x}{secrets.token_hex(SECRET_BYTES)}"

    # -- the life of the service ----------------------------------------------------------------------------------

    def _recover(self) -> None:
        """What a process that died has left is put in order: nothing that was acknowledged is lost, no end comes twice."""
        for done in [self.store.write(self._taken_up(job)) for job in self.store.of_status(Status.RUNNING)]:
            if isinstance(ended := done.result(), Job):
                self.n_ended[ended.status] += 1
                logs.tell_job(ended)
        expired, _ = self.store.write(store.expire(self.clock.mark(), self.options.result_ttl_s, MOST_EXPIRED)).result()
        for job in expired:
            remove(self.spool.result(job.id))
        queued = self.store.of_status(Status.QUEUED)
        self.spool.sweep({job.id for job in queued if not job.is_inline}, self.store.files())
        for job in queued:
            self.waiting.add(job.owner, job.seq)
        for owner, status, n, n_bytes in self.store.numbers():
            self.n_by_status[status] += n
            self.quota.n_bytes += n_bytes + n * ROW_BYTES
            if status in OPEN:
                self.quota.n_open[owner] += n

    def _taken_up(self, job: Job) -> Change[object]:
        """What becomes of a job that ran when the process died: its result counts where it was published."""
        with suppress(OutputError):
            n_bytes, sha = digest(self.spool.result(job.id))
            self.n_adopted += 1
            result = Result(n_bytes=n_bytes, sha256=sha, media_type=job.answer)
            return self._end_of(job, Status.SUCCEEDED, n_done=job.n_blocks, result=result)
        if job.attempts < MOST_ATTEMPTS:
            return store.put_back(job.seq, counts=True)
        self.n_lost += 1
        died = WorkerLostError(
            f"the service died {job.attempts} times while it computed this job, and tries it no more"
        )
        _, _, text = problem(died, job.request_id)
        return self._end_of(job, Status.FAILED, n_done=0, problem=text.decode())

    def summary(self) -> str:
        """Where jobs live, and what came back."""
        n_queued = self.n_by_status[Status.QUEUED]
        n_kept = self.n_by_status.total() - n_queued - self.n_by_status[Status.EXPIRED]
        adopted = f" ({self.n_adopted} had ended unnoticed)" if self.n_adopted else ""
        return f"jobs live in {shown(self.spool.folder)}: {n_queued} came back to be done, {n_kept} are kept{adopted}"

    def start(self, lanes: Lanes) -> None:
        """Runs what waits; called in the loop that serves."""
        self.runner = Runner(self, lanes)
        self.runner.more()
        self._keeper = asyncio.ensure_future(self._keep())

    def stop(self) -> None:
        """Starts no more, and has what runs end at its next block, to be queued for the next start; who waits is told."""
        self.is_stopping = True
        if self.runner is not None:
            self.runner.stop()
        for seq in [*self._changes]:
            self._tell(seq)

    async def close(self) -> None:
        """All that is known is on disk, and the folder is free for another process."""
        self.stop()
        if self._keeper is not None:
            self._keeper.cancel()
        if self.runner is not None:
            await self.runner.ended()
        with suppress(ServiceError):  # a disk that is full has been told of
            await self.written(store.expire(self.clock.mark(), self.options.result_ttl_s, 0))
        await asyncio.to_thread(self.store.close)
        self.spool.close()

    async def _keep(self) -> None:
        """Notes how old the spool is, and lets go of what is too old; tries again what a bad disk has refused."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self.store.fault is not None or self._is_due():
                    await self._expire()
            except ServiceError as error:
                log.warning("jobs: %s", error)

    def _is_due(self) -> bool:
        """Whether something is too old, or the age of the spool was noted a while ago."""
        age_s, kept_s = self.clock.age_s(), self.options.result_ttl_s
        ended_s, expired_s = self.store.oldest()
        is_old = ended_s is not None and age_s - ended_s >= kept_s
        is_older = expired_s is not None and age_s - expired_s >= 2 * kept_s
        return is_old or is_older or age_s - self._marked_s >= MARK_S

    async def _expire(self) -> None:
        self._marked_s = self.clock.age_s()
        expired, gone = await self.written(store.expire(self.clock.mark(), self.options.result_ttl_s, MOST_EXPIRED))
        for job in expired:
            remove(self.spool.result(job.id))
            self.quota.lost(job, row=False)
            self._count(job.status, Status.EXPIRED)
        for job in gone:
            self.quota.lost(job, row=True)
            self._count(job.status, None)

    # -- what the routes ask --------------------------------------------------------------------------------------

    async def written(self, change: Change[T]) -> T:
        future: Future[T] = self.store.write(change)
        return await asyncio.wrap_future(future)

    def file_of_body(self, id: str) -> File:
        return File(self.spool.body(id))

    async def submit(self, job: Job, arrived: Arrived, place: Place | None) -> Job:
        """The job, once it is on disk: it now, or the one that its idempotency key has had before, where it is none of ours."""
        kept, is_new = await self.written(store.insert(job, arrived.data))
        if is_new and place is not None:
            place.keep()
            self._count(None, Status.QUEUED)
            self.waiting.add(kept.owner, kept.seq)
            if self.runner is not None:
                self.runner.more()
        return kept

    def find(self, owner: str, id: str) -> Job | None:
        return self.store.job(owner, id)

    def told(self, job: Job) -> Json:
        n_done = job.n_done
        if self.runner is not None and job.status is Status.RUNNING:
            n_done = self.runner.n_done(job.seq)
        expires_s = None
        if job.status in ENDED and job.ended_age_s is not None:
            expires_s = time.time() + job.ended_age_s + self.options.result_ttl_s - self.clock.age_s()
        return told(job, n_done=n_done, expires_s=expires_s)

    async def cancel(self, job: Job) -> Job | None:
        """The job, cancelled for good; None where it had ended before. What computes it ends at its next block."""
        n_done = self.runner.n_done(job.seq) if self.runner is not None else 0
        ended = await self.written(self._end_of(job, Status.CANCELLED, n_done=n_done))
        if ended is not None:
            self.note_end(job, ended)
            if self.runner is not None:
                self.runner.cancel(job.seq)
        return ended

    async def forget(self, job: Job) -> bool:
        """Whether a job that has ended was there, and is no more."""
        gone = await self.written(store.forget(job.seq))
        if gone is None:
            return False
        remove(self.spool.result(gone.id))
        self.quota.lost(gone, row=True)  # as it stood: it may have ended since it was looked up
        self._count(gone.status, None)
        return True

    def fault(self) -> str | None:
        """Why no job can be taken, where the disk is at fault and not merely full."""
        return self.spool.fault() or self.store.fault

    def refuse_fault(self) -> None:
        reason = self.fault()
        if reason is not None:
            raise SpoolError(f"{reason}; try again later")

    # -- ends, and who waits for them -----------------------------------------------------------------------------

    def _end_of(
        self, job: Job, status: Status, *, n_done: int, result: Result | None = None, problem: str | None = None
    ) -> Change[Job | None]:
        return store.end(
            job, status, now_s=time.time(), age_s=self.clock.age_s(), n_done=n_done, result=result, problem=problem
        )

    async def end(
        self, job: Job, status: Status, *, n_done: int, result: Result | None = None, problem: str | None = None
    ) -> Job | None:
        """The job, ended; None where it was cancelled before."""
        ended = await self.written(self._end_of(job, status, n_done=n_done, result=result, problem=problem))
        if ended is not None:
            self.note_end(job, ended)
        return ended

    def note_start(self) -> None:
        self.n_started += 1
        self._count(Status.QUEUED, Status.RUNNING)

    def note_return(self) -> None:
        """A job that ran is queued again."""
        self._count(Status.RUNNING, Status.QUEUED)

    def note_end(self, before: Job, ended: Job) -> None:
        """Once the end of a job is on disk, whoever brought it about."""
        if not before.is_inline:
            remove(self.spool.body(before.id))
        self.quota.ended(ended)
        was_running = ended.started_s is not None
        self._count(Status.RUNNING if was_running else Status.QUEUED, ended.status)
        self.n_ended[ended.status] += 1
        logs.tell_job(ended)
        self._tell(ended.seq)

    def _count(self, before: Status | None, after: Status | None) -> None:
        if before is not None:
            self.n_by_status[before] -= 1
        if after is not None:
            self.n_by_status[after] += 1

    def _tell(self, seq: int) -> None:
        for waiter in self._changes.pop(seq, ()):
            if not waiter.done():
                waiter.set_result(None)

    def change_of(self, seq: int) -> asyncio.Future[None]:
        """Done when the job has ended, or the service is about to."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._changes.setdefault(seq, set())
        waiters.add(waiter)
        waiter.add_done_callback(lambda done: self._left(seq, done))
        if self.is_stopping:
            waiter.set_result(None)
        return waiter

    def _left(self, seq: int, waiter: asyncio.Future[None]) -> None:
        waiters = self._changes.get(seq)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._changes[seq]
