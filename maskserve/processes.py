"""Processes that run tasks, and what happens when one of them dies. Each talks to its parent through a socket of its own."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from maskserve.cgroup import UNLIMITED, cpus
from maskserve.errors import ParameterError, WorkerLostError
from maskserve.executors import AHEAD, POLL_S, Job, Limits, Outcome, Queue
from maskserve.worker import LOST

log = logging.getLogger("maskserve")
T = TypeVar("T")
R = TypeVar("R")
START_DEATHS = 3
"""Workers in a row that may die before they are ready: then none will ever be."""
SMALL_MESSAGE = 1 << 15
"""Tasks up to here are sent while the worker is busy; a larger one could fill the socket while its answer waits."""
AHEAD_BYTES = 8 << 20
"""Tasks up to this weight are given to a busy worker; a heavier one waits for whoever is free first."""
HEALTH_S = 1.0
STOPPED_CHECKS = 30
"""Seconds that a worker may be stopped (SIGSTOP) before it is ended."""
PROGRAM = "import sys; sys.path[:] = {path!r}; from maskserve.worker import main; main({fd}, {parent}, {is_tied})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Tasks in processes of their own; 0 workers are the CPUs that the cgroup grants, and share them as threads.

    A task whose worker dies is run again, `retries` times at most, and then has a WorkerLostError. `split` gives the parts
    of a task that are run by themselves instead, once, so that only one of them is at fault. `tell` hears, a line
    each, of workers that die.
    """

    workers: int = 0
    retries: int = 2
    split: Callable[[Any], list[Any]] = lambda task: [task]
    tell: Callable[[str], None] = log.warning

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], limits: Limits | None = None
    ) -> Generator[Outcome[T, R], None, None]:
        workers = self.workers or cpus()
        queue = Queue(tasks, limits or Limits(), workers)
        crew = Crew(function, queue, workers=workers, retries=self.retries, split=self.split, tell=self.tell)
        return queue.arranged(crew.outcomes())


class Worker(Generic[T]):
    """One process, its `number` among those that live, the tasks that it has, oldest first, and the socket to it."""

    def __init__(self, function: bytes, threads: int, number: int) -> None:
        self.number = number
        ours, theirs = socket.socketpair()
        with theirs:
            words = PROGRAM.format(
                path=sys.path,
                fd=theirs.fileno(),
                parent=os.getpid(),
                is_tied=threading.current_thread() is threading.main_thread(),
            )
            self.process = subprocess.Popen(
                # -I: a file called random.py in the current folder would otherwise be the library's
                [sys.executable, "-I", "-c", words],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2 if sys.stderr is not None else subprocess.DEVNULL,
                env={
                    **os.environ,
                    "MASKSERVE_THREADS": str(threads),
                    "OMP_NUM_THREADS": str(threads),
                    "MASKSERVE_WORKER": str(number),
                },
            )
        self.connection = Connection(ours.detach())
        self.jobs: deque[Job[T]] = deque()
        self.is_ready = False
        self.n_stopped = 0
        with suppress(OSError):  # it died at once: found where its answer is read
            self.connection.send_bytes(function)

    def send(self, job: Job[T], message: bytes) -> None:
        self.jobs.append(job)
        with suppress(OSError):
            self.connection.send_bytes(message)

    def end(self, *, at_once: bool) -> None:
        """The process has ended; what it still ran is lost if `at_once`."""
        if at_once:
            self.process.kill()
        self.connection.close()  # its end of file tells a worker to go
        try:
            self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def is_stopped(self) -> bool:
        """Whether the process is held by a signal, as /proc says."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as file:
                return file.read().rpartition(") ")[2][:1] == "T"
        except OSError:
            return False


class Crew(Generic[T]):
    """The workers of one run."""

    def __init__(
        self,
        function: Callable[[T], Any],
        queue: Queue[T],
        *,
        workers: int,
        retries: int,
        split: Callable[[T], list[T]],
        tell: Callable[[str], None],
    ) -> None:
        self._function = pickled(function)
        self._queue, self._most, self._retries, self._split, self._tell = queue, workers, retries, split, tell
        self._workers: list[Worker[T]] = []
        self._dead_starts = 0
        self._checked_s = time.monotonic()

    def outcomes(self) -> Generator[Outcome[T, Any], None, None]:
        """An outcome for each task of the queue; at the end no worker is left."""
        is_done = False
        try:
            while True:
                self._hand_out()
                busy = [worker for worker in self._workers if worker.jobs]
                if not busy and self._queue.is_empty:
                    break
                for connection in wait([w.connection for w in self._workers], timeout=POLL_S):
                    yield from self._heard(next(w for w in self._workers if w.connection is connection))
                self._check_health()
                if self._queue.stop.is_over:
                    return
            is_done = True
        finally:
            for worker in self._workers:
                if not is_done:
                    worker.process.kill()
            for worker in self._workers:
                worker.end(at_once=not is_done)

    def _hand_out(self) -> None:
        """A task to each worker that has none, to new workers while there are tasks for them, then one to each ahead."""
        for worker in [w for w in self._workers if not w.jobs]:
            if not self._give(worker, self._queue.take()):
                return
        while len(self._workers) < self._most and (job := self._queue.take()) is not None:
            taken = {worker.number for worker in self._workers}
            number = next(n for n in range(self._most) if n not in taken)  # that of the dead one whose place it takes
            worker = Worker(self._function, max(1, cpus() // self._most), number)
            self._workers.append(worker)
            self._give(worker, job)
        for worker in [w for w in self._workers if w.is_ready and len(w.jobs) < AHEAD]:
            if not self._give(worker, self._queue.take(AHEAD_BYTES)):
                return

    def _give(self, worker: Worker[T], job: Job[T] | None) -> bool:
        """Whether there was a task to give."""
        if job is None:
            return False
        message = pickle.dumps(job.task, pickle.HIGHEST_PROTOCOL)
        if worker.jobs and len(message) > SMALL_MESSAGE:
            self._queue.give_back(job)
            return False
        worker.send(job, message)
        return True

    def _heard(self, worker: Worker[T]) -> Iterator[Outcome[T, Any]]:
        """What a worker says: that it is ready, that it cannot be, or how its oldest task ended. Or nothing: it died."""
        try:
            word, value = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._buried(worker)
            return
        if word == "broken":
            raise value
        if word == LOST:
            yield from self._buried(worker, how=f"lost its device ({value})")
            return
        if word == "ready":
            worker.is_ready, self._dead_starts = True, 0
            return
        job = worker.jobs.popleft()
        self._queue.end(job)
        self._give(
            worker, self._queue.take(AHEAD_BYTES if worker.jobs else UNLIMITED)
        )  # before its outcome is dealt with
        said = {"result": value} if word == "result" else {"error": value}
        yield Outcome(index=job.index, task=job.task, attempts=job.deaths + 1, **said)

    def _buried(self, worker: Worker[T], how: str = "") -> Iterator[Outcome[T, Any]]:
        """A dead worker's tasks, dealt with: only the oldest was run, and can be at fault."""
        worker.end(at_once=True)
        self._workers.remove(worker)
        how = how or died_how(worker.process.returncode)
        running = worker.jobs.popleft() if worker.jobs and worker.is_ready else None
        for job in reversed(worker.jobs):
            self._queue.give_back(job)
        if not worker.is_ready:
            self._dead_starts += 1
            self._tell(f"worker {worker.process.pid} {how} before it was ready")
            if self._dead_starts >= START_DEATHS:
                raise WorkerLostError(f"workers cannot start: {START_DEATHS} in a row died, the last one {how}")
        if running is None:
            return
        self._tell(f"worker {worker.process.pid} {how} while it ran {running.task!s:.200}; another one takes its place")
        failed = self._queue.died(running, how, self._split(running.task), self._retries)
        if failed is not None:
            yield failed

    def _check_health(self) -> None:
        """Ends workers that stay stopped; a worker that merely takes long is left alone."""
        if time.monotonic() - self._checked_s < HEALTH_S:
            return
        self._checked_s = time.monotonic()
        for worker in self._workers:
            worker.n_stopped = worker.n_stopped + 1 if worker.is_stopped() else 0
            if worker.n_stopped >= STOPPED_CHECKS:
                self._tell(f"worker {worker.process.pid} has been stopped for {STOPPED_CHECKS} s and is ended")
                worker.process.kill()


def pickled(function: Callable[..., Any]) -> bytes:
    """What a worker makes the function of; it must be able to import it."""
    homes = {getattr(function, "__module__", ""), type(function).__module__}
    if "__main__" in homes:
        raise ParameterError("a worker imports its function, and this one is in __main__; put it into a module")
    try:
        return pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as cause:
        raise ParameterError(f"a worker cannot import this function: {cause}; put it into a module") from cause


def died_how(returncode: int) -> str:
    """How a process ended, in words; the system's own killer uses SIGKILL too."""
    if returncode >= 0:
        return f"ended with exit {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
