"""A reduction on a Ray cluster: tasks make the states of shards, and join them where they lie, up the tree of order.md.

States stay in the cluster's object store. This process gets what is left at the top of the tree, and makes the answer of it.
"""

from __future__ import annotations

import mmap
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from maskserve.answers import Answer
from maskserve.cgroup import UNLIMITED, default_memory
from maskserve.crews import HELD_SHARE, Share, refuse_changed, states_of
from maskserve.errors import WorkerLostError
from maskserve.executors import Limits as Bounds
from maskserve.executors import Outcome
from maskserve.on_ray.cluster import AUTO, Cluster, Joining, fixed, joined
from maskserve.on_ray.executor import LostObjectsError, Ray, Stays
from maskserve.payload.format import BytesPayload, Limits
from maskserve.shards import WHOLE, Shard

if TYPE_CHECKING:
    from maskserve.states import State

SHARDS_A_WORKER = 4
"""At least, so that workers end at about the same time, and a death costs little."""
SHARD_BYTES = 16 << 30
MOST_SHARDS = 1 << 14
MOST_FAN_IN, LEAST_FAN_IN = 16, 2
STORE_SHARE = 4
"""The part of a node's object store that the states that a task joins, and their sum, may take."""
MOST_LOSSES = 10
"""How often the state of a shard may be lost with its node; a loss is no fault of the shard."""
Bytes: TypeAlias = Any
"""A state as an array of bytes, which Ray keeps in shared memory and hands out without a copy."""


@dataclass(frozen=True, slots=True)
class Lift:
    """The task that makes the state of a shard."""

    shard: int

    def __str__(self) -> str:
        return f"shard {self.shard}"


@dataclass(frozen=True, slots=True)
class Join:
    """The task that makes one state of several, the children of a place in the tree of tasks."""

    level: int
    place: int

    def __str__(self) -> str:
        return f"a merge of states, {self.place} of level {self.level}"


Task: TypeAlias = Lift | Join
At: TypeAlias = tuple[int, int]
"""(level, place)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What runs in a worker."""

    whole: Share
    """The reduction as one shard, of which each task takes a part."""
    n: int

    @property
    def memory(self) -> int:
        return self.whole.memory

    def prepare(self) -> None:
        import maskserve.states  # noqa: F401  # torch, so that a worker is ready once it can compute

    def __call__(self, task: Task, *objects: Bytes) -> Bytes:
        return joined_states(objects, self.memory) if isinstance(task, Join) else self.lifted(task)

    def lifted(self, task: Lift) -> Bytes:
        from maskserve.crews import lifting

        with lifting(replace(self.whole, shard=Shard(task.shard, self.n))) as state:
            return packed(state, self.memory)


def joined_states(objects: Sequence[Bytes], memory: int) -> Bytes:
    from maskserve import states

    return packed(states.merge([(f"state {i}", opened(state)) for i, state in enumerate(objects)]), memory)


def opened(state: Bytes) -> State:
    """A state where it lies in the object store; it is read when it is due."""
    from maskserve import states
    from maskserve.partials import LIMITS

    return states.read(BytesPayload(memoryview(state), LIMITS))


def packed(state: State, memory: int) -> Bytes:
    """The bytes of a state; a large one is made in a file without a name, and read from there by Ray."""
    import numpy as np

    if state.n_bytes <= memory // HELD_SHARE:
        return np.frombuffer(state.to_bytes(), np.uint8)
    with tempfile.TemporaryFile() as file:
        state.write(file.fileno(), "a state", memory)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


@dataclass(frozen=True, slots=True)
class Piece:
    """A state on the cluster."""

    ref: Any
    n_bytes: int


class Tree:
    """The tasks of a reduction, as what they need is there. An iterator that has none now may have one later.

    Level 0 are shards; a place of a level joins up to `fan_in` places of the one below. Which states meet in which task
    changes no bit: they join as siblings of the index (docs/order.md).
    """

    def __init__(self, n: int, *, memory: int, store: int) -> None:
        self.n, self._memory, self._store = n, memory, store
        self._joins: deque[Join] = deque()
        self._lifts = deque(map(Lift, range(n)))
        self._losses = [0] * n
        self._held: dict[At, Piece] = {}
        self._taken: dict[Join, dict[At, Piece]] = {}
        self.fan_in = 0
        self.top: dict[At, Piece] = {}
        """What the answer is made of, once all is there."""

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        waiting: deque[Any] = self._joins or self._lifts
        if not waiting:
            raise StopIteration
        task: Task = waiting.popleft()
        return task

    def objects(self, task: Task) -> list[Any]:
        """The states that a task joins."""
        return [piece.ref for piece in self._taken[task].values()] if isinstance(task, Join) else []

    def add(self, outcome: Outcome[Task, Any]) -> None:
        """What a task made, or why it did not."""
        task = outcome.task
        if isinstance(outcome.error, LostObjectsError):
            assert isinstance(task, Join)
            pieces = self._taken.pop(task)
            self.again(pieces, {at for i, at in enumerate(pieces) if i in outcome.error.which})
            return
        if outcome.error is not None:
            raise outcome.error
        stays = outcome.result
        assert isinstance(stays, Stays)
        level, place = (task.level, task.place) if isinstance(task, Join) else (0, task.shard)
        if isinstance(task, Join):
            del self._taken[task]
        self.fan_in = self.fan_in or fan_in(stays.n_bytes, self._store)
        self._held[level, place] = Piece(stays.ref, stays.n_bytes)
        self._grown(level, place)

    def size(self, level: int) -> int:
        """How many places a level has."""
        width: int = self.fan_in**level
        return -(-self.n // width)

    def _grown(self, level: int, place: int) -> None:
        """Joins the children of a place once all are there; those of the root stay so where this process can hold them."""
        if self.size(level) == 1:
            self.top = {(level, place): self._held.pop((level, place))}
            return
        parent = place // self.fan_in
        first = parent * self.fan_in
        children = [(level, i) for i in range(first, min(first + self.fan_in, self.size(level)))]
        if not all(child in self._held for child in children):
            return
        pieces = {child: self._held.pop(child) for child in children}
        if self.size(level + 1) == 1 and sum(piece.n_bytes for piece in pieces.values()) <= self._memory // HELD_SHARE:
            self.top = pieces
            return
        join = Join(level + 1, parent)
        self._taken[join] = pieces
        self._joins.append(join)

    def again(self, pieces: Mapping[At, Piece], lost: Collection[At]) -> None:
        """States were lost: those that are left are held again, and the shards of the others are made anew."""
        for (level, place), piece in pieces.items():
            if (level, place) not in lost:
                self._held[level, place] = piece
                continue
            width = self.fan_in**level
            for shard in range(place * width, min((place + 1) * width, self.n)):
                self._losses[shard] += 1
                if self._losses[shard] > MOST_LOSSES:
                    raise WorkerLostError(f"the state of shard {shard} was lost {MOST_LOSSES} times with its node")
                self._lifts.append(Lift(shard))


def fan_in(n_bytes: int, store: int) -> int:
    """How many states of this size a task joins.

    >>> fan_in(1000, 1 << 30), fan_in(60 << 20, 1 << 30), fan_in(1 << 30, 1 << 30)
    (16, 3, 2)
    """
    return max(LEAST_FAN_IN, min(MOST_FAN_IN, store // STORE_SHARE // max(n_bytes, 1) - 1))


def n_shards(workers: int, n_bytes: int) -> int:
    """A power of two, so that shards of a power of two of leaves are whole subtrees, and states small.

    >>> n_shards(2, 10**6), n_shards(3, 10**6), n_shards(2, 10**12), n_shards(10_000, 10**12)
    (8, 16, 64, 16384)
    """
    least = max(SHARDS_A_WORKER * workers, -(-n_bytes // SHARD_BYTES))
    return min(1 << (least - 1).bit_length(), MOST_SHARDS)


@contextmanager
def reduced(
    verb: str, words: Mapping[str, Any], paths: Sequence[str], along: str | None, *, joining: Joining, workers: int,
    limits: Limits, memory: int, n_bytes: int, tell: Callable[[str], None],
) -> Iterator[Answer]:  # fmt: skip
    """The answer of a reduction by a Ray cluster, which stays until the answer is written: a large one is read there meanwhile.

    `memory` is what all tasks together, and this process, hold; 0: half of what there is. `n_bytes` is what is read.
    """
    device, before = fixed(str(words.get("device", AUTO))), states_of(paths)
    with joined(joining, workers=workers, device=device, tell=tell) as cluster:
        whole = Share(
            verb=verb, words={**words, "device": device}, paths=tuple(paths), along=along, shard=WHOLE, limits=limits,
            memory=cluster.share(memory or cluster.memory), file="",
        )  # fmt: skip
        steps = Steps(whole=whole, n=n_shards(cluster.workers, n_bytes))
        own = memory or default_memory()
        found = top(cluster, steps, Tree(steps.n, memory=own, store=cluster.smallest_store), tell)
        refuse_changed(paths, before)
        yield answer_of(found, own)


def answer_of(found: Sequence[Bytes], memory: int) -> Answer:
    from maskserve import states

    return states.merge([(f"state {i}", opened(state)) for i, state in enumerate(found)]).answer(memory)


def top(cluster: Cluster, steps: Steps, tree: Tree, tell: Callable[[str], None]) -> list[Bytes]:
    """The states at the top of the tree, here."""
    executor = Ray(cluster=cluster, tell=tell, objects=tree.objects, stays=True)
    bounds = Bounds(memory=UNLIMITED, weigh=lambda task: steps.memory)
    while True:
        with closing(executor.run(steps, tree, bounds)) as outcomes:
            for outcome in outcomes:
                tree.add(outcome)
        found, lost = fetched(cluster, tree.top)
        if not lost:
            return found
        tell(f"{len(lost)} states were lost with their node; their shards are made again")
        tree.again(tree.top, lost)


def fetched(cluster: Cluster, pieces: Mapping[At, Piece]) -> tuple[list[Bytes], set[At]]:
    """The states, and which of them are lost."""
    found, lost = [], set()
    for at, piece in pieces.items():
        try:
            found.append(cluster.ray.get(piece.ref))
        except cluster.ray.exceptions.ObjectLostError:
            lost.add(at)
    return found, lost
