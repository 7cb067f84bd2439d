"""Where tasks run: in this thread, in threads, in processes. A cluster is one more class with the same `run`.

    run(function, tasks) -> Outcomes, as tasks end

`function` takes one task. For processes it is picklable and importable, and what it remembers lives as long as its
worker; a worker that dies costs the task that it ran a retry, never the job. Tasks are taken from their iterator when
there is room for them, by number and by bytes. Imports no torch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from maskserve.cgroup import UNLIMITED, cpus, default_memory
from maskserve.errors import WorkerLostError

LOCAL, RAY = ENGINES = ("local", "ray")
"""Who runs the tasks of a command: this machine, or a Ray cluster."""
T = TypeVar("T")
R = TypeVar("R")
POLL_S = 0.1
"""How soon a request to stop is seen."""
AHEAD = 2
"""Tasks in flight a worker: the one that runs, and one that waits for it to end."""
WINDOW = 8
"""Tasks a worker that may be done or in flight beyond the first that is not, where outcomes keep the order of tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T, R]):
    """How a task ended: with a result, or with an error. `index` counts tasks as they were taken, from 0."""

    index: int
    task: T
    result: R | None = None
    error: Exception | None = None
    attempts: int = 1


class Stop:
    """A request to take no more tasks; once `deadline_s` has passed, what still runs is dropped. `outer` stops this one too."""

    def __init__(self, outer: Stop | None = None) -> None:
        self._outer = outer
        self._is_asked = False
        self._deadline_s = math.inf

    def ask(self, *, grace_s: float) -> None:
        """Safe in a signal handler and in any thread."""
        self._deadline_s = min(self._deadline_s, time.monotonic() + grace_s)
        self._is_asked = True

    @property
    def is_asked(self) -> bool:
        return self._is_asked or (self._outer is not None and self._outer.is_asked)

    @property
    def deadline_s(self) -> float:
        return min(self._deadline_s, math.inf if self._outer is None else self._outer.deadline_s)

    @property
    def is_over(self) -> bool:
        return self.is_asked and time.monotonic() >= self.deadline_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is in flight at most: `memory` bytes as `weigh` counts them (a heavier task runs alone); and when to stop."""

    memory: int = field(default_factory=default_memory)
    weigh: Callable[[Any], int] = lambda task: 0
    stop: Stop = field(default_factory=Stop)
    in_order: bool = False
    """Outcomes come in the order of the tasks; then few tasks run ahead of the slowest."""


class Executor(Protocol):
    """What runs tasks."""

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], limits: Limits | None = None
    ) -> Generator[Outcome[T, R], None, None]:
        """An outcome for each task as it ends. Closing the iterator ends what still runs."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Job(Generic[T]):
    """A task on its way."""

    index: int
    task: T
    n_bytes: int
    deaths: int = 0


class Queue(Generic[T]):
    """The tasks that wait, handed out while there is room."""

    def __init__(self, tasks: Iterable[T], limits: Limits, workers: int) -> None:
        self._tasks = enumerate(tasks)
        self._limits = limits
        self._back: deque[Job[T]] = deque()
        self._next: Job[T] | None = None
        self._window = WINDOW * workers if limits.in_order else UNLIMITED
        self._bytes = self._in_flight = 0
        self.yielded = 0

    @property
    def stop(self) -> Stop:
        return self._limits.stop

    def take(self, most_bytes: int = UNLIMITED) -> Job[T] | None:
        """The next task of at most this size that there is room for; None if there is none, or none now."""
        job = None if self.stop.is_asked else self._peek()
        if job is None or job.n_bytes > most_bytes or job.index >= self.yielded + self._window:
            return None
        if self._in_flight and self._bytes + job.n_bytes > self._limits.memory:
            return None
        if self._back:
            self._back.popleft()
        else:
            self._next = None
        self._bytes += job.n_bytes
        self._in_flight += 1
        return job

    def _peek(self) -> Job[T] | None:
        if self._back:
            return self._back[0]
        if self._next is None:
            for index, task in self._tasks:
                self._next = Job(index=index, task=task, n_bytes=self._limits.weigh(task))
                break
        return self._next

    def end(self, job: Job[T]) -> None:
        """A task that was taken is no longer in flight."""
        self._bytes -= job.n_bytes
        self._in_flight -= 1

    def give_back(self, job: Job[T]) -> None:
        """A task that was taken waits again, before those that were never taken."""
        self.end(job)
        self._back.append(job)

    def split(self, job: Job[T], parts: Iterable[T]) -> None:
        """The parts of a task that was taken wait in its place."""
        self.end(job)
        self._back += (Job(index=job.index, task=part, n_bytes=self._limits.weigh(part)) for part in parts)

    def died(self, job: Job[T], how: str, parts: Sequence[T], retries: int) -> Outcome[T, Any] | None:
        """A task whose worker died: it waits again, in its parts if it has some; what has died too often has failed."""
        job.deaths += 1
        if len(parts) > 1:
            self.split(job, parts)
        elif job.deaths <= retries:
            self.give_back(job)
        else:
            self.end(job)
            error = WorkerLostError(
                f"{job.deaths} worker{'s' if job.deaths > 1 else ''} died on it, the last one {how}; "
                "it may need more memory than there is, or crash a library"
            )
            return Outcome(index=job.index, task=job.task, error=error, attempts=job.deaths)
        return None

    @property
    def is_empty(self) -> bool:
        """Whether no task is left that will be handed out."""
        return self.stop.is_asked or self._peek() is None

    def arranged(self, outcomes: Generator[Outcome[T, R], None, None]) -> Generator[Outcome[T, R], None, None]:
        """The outcomes as they come, or in the order of the tasks."""
        return self._in_order(outcomes) if self._limits.in_order else outcomes

    def _in_order(self, outcomes: Generator[Outcome[T, R], None, None]) -> Generator[Outcome[T, R], None, None]:
        held: dict[int, Outcome[T, R]] = {}
        with closing(outcomes):
            for outcome in outcomes:
                held[outcome.index] = outcome
                while self.yielded in held:
                    ready = held.pop(self.yielded)
                    self.yielded += 1
                    yield ready


def outcome_of(function: Callable[[T], R], job: Job[T]) -> Outcome[T, R]:
    """The task, run here."""
    attempts = job.deaths + 1
    try:
        return Outcome(index=job.index, task=job.task, result=function(job.task), attempts=attempts)
    except Exception as error:
        return Outcome(index=job.index, task=job.task, error=error, attempts=attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serial:
    """One task after the other, in this thread."""

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], limits: Limits | None = None
    ) -> Generator[Outcome[T, R], None, None]:
        queue = Queue(tasks, limits or Limits(), 1)
        while (job := queue.take()) is not None:
            outcome = outcome_of(function, job)
            queue.end(job)
            queue.yielded += 1
            yield outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """Tasks in threads of this process; 0 workers are the CPUs that the cgroup grants."""

    workers: int = 0

    def run(
        self, function: Callable[[T], R], tasks: Iterable[T], limits: Limits | None = None
    ) -> Generator[Outcome[T, R], None, None]:
        workers = self.workers or cpus()
        queue = Queue(tasks, limits or Limits(), workers)
        return queue.arranged(self._outcomes(function, queue, workers))

    def _outcomes(
        self, function: Callable[[T], R], queue: Queue[T], workers: int
    ) -> Generator[Outcome[T, R], None, None]:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="maskserve-task")
        running: dict[Future[Outcome[T, R]], Job[T]] = {}
        try:
            while True:
                while len(running) < AHEAD * workers and (job := queue.take()) is not None:
                    running[pool.submit(outcome_of, function, job)] = job
                if not running or queue.stop.is_over:
                    return
                for future in wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED).done:
                    queue.end(running.pop(future))
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
