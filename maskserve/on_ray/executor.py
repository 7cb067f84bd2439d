"""Tasks as Ray Core tasks: what runs where is Ray's affair, what is in flight, tried again or given up is ours.

Ray's own retries are off (max_retries=0): it would run a task again that kills its worker, and could not split it.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from maskserve.errors import ClusterError, SettingsError
from maskserve.executors import AHEAD, POLL_S, Job, Limits, Outcome, Queue
from maskserve.on_ray.cluster import Cluster, strangers
from maskserve.on_ray.entry import entry
from maskserve.processes import pickled

T = TypeVar("T")
R = TypeVar("R")
PROCESS_BYTES = 256 << 20
"""What a worker takes beside what its task holds: Python, torch and their buffers."""
LEAST_STEP = 64 << 20
"""Memory is asked for in powers of two of this: Ray keeps a queue for each amount."""
HANGS_TIMES = 10
"""How many times as long as the longest task before it none may end until somebody is told."""
SOME = 3
"""Tasks that a message names."""
CANCEL_S = 10.0
"""How long tasks that are cancelled may take to be gone."""


class LostObjectsError(Exception):
    """Objects that a task was given are no longer there; `which` of them, by their places, as far as Ray says."""

    def __init__(self, which: frozenset[int]) -> None:
        super().__init__(f"objects {sorted(which)} were lost with their node")
        self.which = which


@dataclass(frozen=True, slots=True, kw_only=True)
class Stays:
    """A result that stays in the cluster's object store."""

    ref: Any
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Tasks on a cluster. A task whose worker or node dies is run again, as by Processes, with its words.

    `objects` are what a task is given of earlier results; with `stays`, results stay on the cluster and outcomes have a Stays.
    """

    cluster: Cluster
    retries: int = 2
    split: Callable[[Any], list[Any]] = lambda task: [task]
    tell: Callable[[str], None] = lambda line: None
    objects: Callable[[Any], Sequence[Any]] = lambda task: ()
    stays: bool = False

    def run(
        self, function: Callable[..., R], tasks: Iterable[T], limits: Limits | None = None
    ) -> Generator[Outcome[T, R], None, None]:
        queue = Queue(tasks, limits or Limits(), self.cluster.workers)
        return queue.arranged(Crew(self, pickled(function), queue).outcomes())

    @cached_property
    def remote(self) -> Any:
        """What Ray calls, by value: a node may lack the module."""
        import maskserve.on_ray.entry as module

        ray = self.cluster.ray
        ray.cloudpickle.register_pickle_by_value(module)
        return ray.remote(max_retries=0, num_returns=2)(entry)

    @cached_property
    def wanted(self) -> dict[str, Any]:
        """What every worker must be like."""
        from maskserve.on_ray.worker import versions

        return {
            "threads": self.cluster.threads, "strangers": strangers(), "versions": versions(), "folder": os.getcwd(),
            "stays": self.stays,
        }  # fmt: skip


@dataclass(slots=True, eq=False)
class Flight(Generic[T]):
    """A task on the cluster."""

    job: Job[T]
    value: Any
    objects: tuple[Any, ...] = ()
    begun_s: float = field(default_factory=time.monotonic)


class Crew(Generic[T]):
    """The tasks of one run that are on the cluster."""

    def __init__(self, executor: Ray, function: bytes, queue: Queue[T]) -> None:
        self._executor, self._cluster, self._queue = executor, executor.cluster, queue
        self._ray = executor.cluster.ray
        self._function = function
        self._flights: dict[Any, Flight[T]] = {}
        self._remotes: dict[int, Any] = {}
        self._most = self._cluster.workers * (AHEAD if self._cluster.is_wide else 1)
        self._heard_s = time.monotonic()
        self._longest_s = 0.0
        self._has_run = self._is_told = self._is_still = False

    def outcomes(self) -> Generator[Outcome[T, Any], None, None]:
        """An outcome for each task of the queue; at the end none is left on the cluster."""
        try:
            while True:
                self._hand_out()
                if not self._flights and self._queue.is_empty:
                    return
                for head in self._ended():
                    yield from self._heard(head, self._flights.pop(head))
                self._check_heard()
                if self._queue.stop.is_over:
                    return
        finally:
            self._cancel()

    def _hand_out(self) -> None:
        while len(self._flights) < self._most and (job := self._queue.take()) is not None:
            objects = tuple(self._executor.objects(job.task))
            message = pickle.dumps(job.task, pickle.HIGHEST_PROTOCOL)
            remote = self._remote(self._asked_memory(job))
            head, value = remote(self._executor.wanted, self._function, message, *objects)
            self._flights[head] = Flight(job, value, objects)

    def _remote(self, memory: int) -> Any:
        """What hands Ray a task that takes so much memory; made once, since that takes as long as handing over."""
        if memory not in self._remotes:
            resources = {"num_cpus": 1, "num_gpus": self._cluster.gpus, "memory": memory}
            self._remotes[memory] = self._executor.remote.options(name="maskserve", **resources).remote
        return self._remotes[memory]

    def _asked_memory(self, job: Job[T]) -> int:
        """What the task is said to hold, in steps; what is more than any node has gets a node alone."""
        steps = max(1, -(-(job.n_bytes + PROCESS_BYTES) // LEAST_STEP))
        return min(LEAST_STEP << (steps - 1).bit_length(), self._cluster.largest_memory)

    def _ended(self) -> list[Any]:
        """The tasks that have ended, once one has, or after a moment."""
        heads = list(self._flights)
        if not heads or not self._ray.wait(heads, num_returns=1, timeout=POLL_S)[0]:
            return []
        ended: list[Any] = self._ray.wait(heads, num_returns=len(heads), timeout=0)[0]
        return ended

    def _heard(self, head: Any, flight: Flight[T]) -> Iterator[Outcome[T, Any]]:
        """How a task ended: with an answer, or with its worker."""
        job = flight.job
        try:
            word, value, lines = self._ray.get(head)
        except self._ray.exceptions.RayError as error:
            yield from self._buried(flight, error)
            return
        self._heard_s, self._has_run, self._is_still = time.monotonic(), True, False
        self._longest_s = max(self._longest_s, self._heard_s - flight.begun_s)
        for line in lines:
            self._executor.tell(line.removeprefix("maskserve: "))
        if word == "unfit":
            raise SettingsError(value)
        if word == "broken":
            raise value
        self._queue.end(job)
        if word == "result" and self._executor.stays:
            value = Stays(ref=flight.value, n_bytes=value)
        said = {"result": value} if word == "result" else {"error": value}
        yield Outcome(index=job.index, task=job.task, attempts=job.deaths + 1, **said)

    def _buried(self, flight: Flight[T], error: Exception) -> Iterator[Outcome[T, Any]]:
        """A task that was lost, dealt with as Processes does."""
        job = flight.job
        lost = self._lost_objects(flight, error)
        if lost:
            self._queue.end(job)
            yield Outcome(index=job.index, task=job.task, error=LostObjectsError(lost), attempts=job.deaths + 1)
            return
        if type(error).__name__ == "LocalRayletDiedError":
            raise ClusterError(
                f"this command's node of {self._cluster.where} is lost: its raylet was killed, or found no memory; start the "
                "command again"
            )
        how = died_how(error)
        if how is None:
            self._queue.end(job)
            yield Outcome(index=job.index, task=job.task, error=translated(error), attempts=job.deaths + 1)
            return
        self._executor.tell(f"a worker {how} while it ran {job.task!s:.200}; another one takes its place")
        failed = self._queue.died(job, how, self._executor.split(job.task), self._executor.retries)
        if failed is not None:
            yield failed

    def _lost_objects(self, flight: Flight[T], error: Exception) -> frozenset[int]:
        """The places of the objects that the task was given and that are gone."""
        if not flight.objects or not isinstance(error, self._ray.exceptions.ObjectLostError):
            return frozenset()
        named = getattr(error, "object_ref_hex", None)
        return frozenset(i for i, ref in enumerate(flight.objects) if ref.hex() == named)

    def _check_heard(self) -> None:
        """Raises where no task has ended for long and no node could run one; says, once, where nodes are busy with other work."""
        waited_s = time.monotonic() - self._heard_s
        if not self._flights or waited_s < self._cluster.timeout_s:
            return
        if self._has_run:
            self._tell_still(waited_s)
            return
        self._heard_s = time.monotonic()
        has, asked = self._ray.cluster_resources(), {"CPU": 1, "GPU": self._cluster.gpus}
        for name, n in asked.items():
            if has.get(name, 0) < n:
                raise ClusterError(
                    f"{self._cluster.where} has had no node with a {name} for {waited_s:.0f} s, and each task takes {n}; "
                    "add one, or leave --device out"
                )
        if self._is_told:
            return
        self._is_told = True
        self._executor.tell(f"{self._cluster.where} has run no task for {waited_s:.0f} s: is it busy? waiting for room")

    def _tell_still(self, waited_s: float) -> None:
        """Says, once, where no task has ended for much longer than any took: Ray shows a worker that hangs as running."""
        if self._is_still or waited_s < HANGS_TIMES * self._longest_s:
            return
        self._is_still = True
        some = ", ".join(f"{flight.job.task!s:.60}" for flight in [*self._flights.values()][:SOME])
        more = ", ..." if len(self._flights) > SOME else ""
        self._executor.tell(
            f"no task has ended for {waited_s:.0f} s, where the longest one took {self._longest_s:.0f} s: does a worker hang? "
            f"On the cluster are {some}{more}; killing that worker has its task run elsewhere"
        )

    def _cancel(self) -> None:
        """Ends what still runs, and waits until it is gone: what it has written is swept after that."""
        for head in self._flights:
            self._ray.cancel(head, force=True)
        heads = list(self._flights)
        if heads:
            self._ray.wait(heads, num_returns=len(heads), timeout=CANCEL_S)
        self._flights.clear()


def died_how(error: Exception) -> str | None:
    """How a worker ended, in words; None where it did not."""
    return {
        "WorkerCrashedError": "died",
        "NodeDiedError": "was lost with its node",
        "OutOfMemoryError": "was ended by Ray, since its node was short of memory (out of memory?)",
        "ObjectLostError": "was lost with its answer",
        "ObjectFetchTimedOutError": "was lost with its answer",
        "ReferenceCountingAssertionError": "was lost with its answer",
        "OwnerDiedError": "was lost with its answer",
        "ObjectReconstructionFailedError": "was lost with its answer",
        "ObjectReconstructionFailedMaxAttemptsExceededError": "was lost with its answer",
    }.get(type(error).__name__)


def translated(error: Exception) -> Exception:
    """What went wrong between here and a worker, in words of ours."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return cause
    return ClusterError(f"Ray cannot run it: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
