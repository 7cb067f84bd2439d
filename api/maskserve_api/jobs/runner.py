"""Computes what waits, so many at once, in the lanes of all requests; records each end, however long a bad disk refuses it."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from maskserve.errors import DeviceLostError, InputError, OutputError
from maskserve.execution import using
from maskserve_api.errors import BusyError, NoSpaceError, ServiceError, SpoolError
from maskserve_api.jobs import store
from maskserve_api.jobs.computing import Made, made, on_disk, opened
from maskserve_api.jobs.job import BLOCK_BYTES, Job, Result, Status
from maskserve_api.jobs.spool import File, failure, remove
from maskserve_api.lane import Task
from maskserve_api.lanes import Lanes
from maskserve_api.logs import traced
from maskserve_api.problems import problem, status_of, translated
from maskserve_api.query import request_of
from maskserve_api.turns import Cancelled

if TYPE_CHECKING:
    from maskserve_api.jobs.desk import Jobs

log = logging.getLogger("maskserve.api")
SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
RETRY_S = 1.0
"""After a disk has refused."""
END_S = 1.0
"""What a stopped job gets to reach its next block when the service ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ends."""

    status: Status
    result: Result | None = None
    problem: str | None = None


class Doing:
    """A job that runs: how far it is, and what ends it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.task: Task[Made] | None = None
        self.is_stopped = False
        self._n_bytes = 0
        self._lock = Lock()

    def tick(self, n_bytes: int) -> None:
        with self._lock:  # several threads read
            self._n_bytes += n_bytes

    @property
    def n_done(self) -> int:
        """The blocks that are done: the last of them is when the result is there."""
        return min(self._n_bytes // BLOCK_BYTES, self.job.n_blocks - 1)

    def stop(self) -> None:
        self.is_stopped = True
        if self.task is not None:
            self.task.cancel()


class Runner:
    """Runs jobs in the loop in which it is made."""

    def __init__(self, jobs: Jobs, lanes: Lanes) -> None:
        self.jobs, self.lanes = jobs, lanes
        self.doing: dict[int, Doing] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    def more(self) -> None:
        """Starts what may start."""
        while len(self._tasks) < self.jobs.options.n_running and not self._stopping.is_set():
            taken = self.jobs.waiting.take()
            if taken is None:
                return
            task = asyncio.ensure_future(self._run(*taken))
            self._tasks.add(task)
            task.add_done_callback(partial(self._left, taken[0]))

    def _left(self, owner: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.jobs.waiting.done(owner)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job could not be run: %s", traced(error) if isinstance(error, Exception) else error)
        self.more()

    def n_done(self, seq: int) -> int:
        doing = self.doing.get(seq)
        return 0 if doing is None else doing.n_done

    def cancel(self, seq: int) -> None:
        """Has a job, whose end is on disk, leave the lane at its next block."""
        doing = self.doing.get(seq)
        if doing is not None:
            doing.stop()

    def stop(self) -> None:
        self._stopping.set()
        for doing in self.doing.values():
            doing.stop()

    async def ended(self) -> None:
        """Returns once what ran is recorded; what did not reach its next block in time is queued all the same."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_S)
        left = [*self.doing]
        for task in self._tasks:
            task.cancel()
        for seq in left:
            await self._recorded(store.put_back(seq, counts=False))

    async def _run(self, owner: str, seq: int) -> None:
        try:
            waiting = self.jobs.store.by_seq(seq)
            if waiting is None or waiting.status is not Status.QUEUED:
                return  # it was cancelled while it waited
            if not await self.jobs.written(store.begin(seq, time.time())):
                return
        except ServiceError as error:
            log.warning("jobs: %s", error)
            await self._pause()
            self.jobs.waiting.put_back(owner, seq)
            return
        self.jobs.note_start()
        job = self.jobs.store.by_seq(seq)
        if job is None or job.status is not Status.RUNNING:
            return  # it was cancelled a moment ago
        self.doing[seq] = doing = Doing(job)
        try:
            await self._done(doing)
        finally:
            self.doing.pop(seq, None)

    async def _done(self, doing: Doing) -> None:
        """Has the job computed, and its end recorded."""
        job = doing.job
        try:
            outcome = await self._outcome(doing)
        except (Cancelled, BusyError):
            if await self._recorded(store.put_back(job.seq, counts=False)):
                self.jobs.note_return()
                if not self._stopping.is_set():  # the system had no thread for it
                    await self._pause()
                    self.jobs.waiting.put_back(job.owner, job.seq)
            return
        except DeviceLostError as lost:
            await self._left_for_a_new_process(job, lost)
            return
        n_done = job.n_blocks if outcome.status is Status.SUCCEEDED else doing.n_done
        ended = await self._ended(job, outcome, n_done)
        if not ended and outcome.result is not None:
            self.jobs.quota.n_bytes -= outcome.result.n_bytes
            if outcome.result.data is None:
                remove(self.jobs.spool.result(job.id))

    async def _left_for_a_new_process(self, job: Job, lost: DeviceLostError) -> None:
        """A job that needs a device that this process has no more waits for the next start.

        One that ran when the device was lost stays as the death of the process would leave it: that attempt counts.
        """
        log.warning("job %s waits for the next start: %s", job.id, lost)
        if lost.__cause__ is None and await self._recorded(store.put_back(job.seq, counts=False)):
            self.jobs.note_return()

    async def _outcome(self, doing: Doing) -> Outcome:
        job = doing.job
        try:
            found = await self._in_lane(doing)
            return Outcome(status=Status.SUCCEEDED, result=await self._published(job, found))
        except (Cancelled, BusyError, DeviceLostError):
            raise
        except Exception as error:  # whatever it is, it is this job's end alone
            if is_short(error):
                raise BusyError("the system has no file or memory to spare; try again") from error
            return failed(job, error)

    async def _in_lane(self, doing: Doing) -> Made:
        """What the lane computes; Cancelled where the job was stopped."""
        job, jobs = doing.job, self.jobs
        body = jobs.store.body(job.seq) if job.is_inline else jobs.spool.body(job.id)
        memory, limits = jobs.job_memory, jobs.limits
        lane, request = self.lanes.placed(request_of(job.verb, job.query))

        def work() -> Made:
            with opened(body, job.body_bytes, job.question, limits) as payload, using(tick=doing.tick):
                return made(request, payload, job.answer, limits, memory=memory, make=self._file(job))

        if doing.is_stopped:
            raise Cancelled
        doing.task = task = lane.submit(work)
        future: Future[Made] = task.future
        done = asyncio.wrap_future(future)
        try:
            await asyncio.wait([done])
            if done.cancelled():
                raise Cancelled
            return done.result()
        finally:
            doing.task = None
            del task, future, done  # an error holds this frame: in a cycle, what it held would wait for the collector

    async def _published(self, job: Job, found: Made) -> Result:
        """The result on disk, counted."""
        try:
            self.jobs.quota.add(found.n_bytes)
        except NoSpaceError:
            if found.file is not None:
                found.file.discard()
            raise NoSpaceError(
                f"the result has {found.n_bytes} bytes, and with it the jobs of all keys would keep more than "
                f"{self.jobs.quota.most_bytes}: forget some (DELETE), then submit this one again, with a new Idempotency-Key"
            ) from None
        try:
            return await asyncio.to_thread(on_disk, found, self._file(job))
        except BaseException:
            self.jobs.quota.n_bytes -= found.n_bytes
            raise

    def _file(self, job: Job) -> partial[File]:
        return partial(File, self.jobs.spool.result(job.id))

    async def _ended(self, job: Job, outcome: Outcome, n_done: int) -> bool:
        """Whether the end was recorded, though a bad disk may put it off; not where the job was cancelled meanwhile."""
        while True:
            try:
                ended = await self.jobs.end(
                    job, outcome.status, n_done=n_done, result=outcome.result, problem=outcome.problem
                )
                return ended is not None
            except ServiceError as error:
                log.warning("job %s has ended, and that cannot be recorded: %s", job.id, error)
                if self._stopping.is_set():
                    return True  # the next start finds its result, or computes it again
                await self._pause()

    async def _recorded(self, change: store.Change[bool]) -> bool:
        try:
            return await self.jobs.written(change)
        except ServiceError as error:
            log.warning("jobs: %s", error)
            return False

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(RETRY_S):
                await self._stopping.wait()
        except TimeoutError:
            return


def failed(job: Job, error: Exception) -> Outcome:
    """How a job ends that `error` has ended; the log has the reason where it is the service's own."""
    known = failure(error) if isinstance(error, OutputError | InputError) else translated(error)
    if status_of(type(known)) == 500 or isinstance(known, SpoolError):
        log.error("job %s failed: %s", job.id, traced(error))
    _, _, body = problem(known, job.request_id)
    return Outcome(status=Status.FAILED, problem=body.decode())


def is_short(error: BaseException | None) -> bool:
    """Whether the system lacked what it may have again in a moment."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in SHORT:
            return True
        error = error.__cause__ or error.__context__
    return False
