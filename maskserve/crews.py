"""A reduction in processes of this machine: each makes the state of a shard, and this one the answer of all.

The shards are those of `reduce --shard`, so the bits are those of one process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from maskserve.answers import Answer
from maskserve.cgroup import cpus
from maskserve.errors import InputChangedError, ParameterError
from maskserve.executors import Limits as Bounds
from maskserve.payload.files import SpooledPayload, failing
from maskserve.payload.format import Limits, Payload
from maskserve.payload.header import shown
from maskserve.places import state_of
from maskserve.processes import Processes
from maskserve.shards import Shard
from maskserve.temporary import room_for

if TYPE_CHECKING:
    from maskserve.states import State

HELD_SHARE = 4
"""The part of a worker's memory up to which its state is sent, and held by its parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A shard of a request, as a worker is told of it: in words and paths, never in cells."""

    verb: str
    words: Mapping[str, Any]
    paths: tuple[str, ...]
    along: str | None
    shard: Shard
    limits: Limits
    memory: int
    file: str
    """A path of an empty file without a name, which whoever made it has open: for a state that is too large to be sent."""

    def __str__(self) -> str:
        return f"shard {self.shard}"


Lifted: TypeAlias = bytes | None
"""A state, or None where the file of its share has it."""


def lift(share: Share) -> Lifted:
    """The state of a shard, in a worker; one that is large goes by way of a file."""
    from functools import partial

    with lifting(share) as state:
        if state.n_bytes <= share.memory // HELD_SHARE:
            return state.to_bytes()
        with room_for(state.n_bytes):
            in_its_file(share, partial(state.write, memory=share.memory))
        return None


@contextmanager
def lifting(share: Share) -> Iterator[State]:
    """The state of a shard, while what it is read from is open."""
    from functools import partial

    from maskserve import requests, states
    from maskserve.joining import question
    from maskserve.opening import open_any

    request = requests.build(share.verb, share.words)
    read = partial(open_any, limits=share.limits)
    with question(request, share.paths, read, requests.parse_along(share.along)) as asked:
        yield states.lift(request, asked.payload, asked.others, share.shard, share.memory)


def in_its_file(share: Share, write: Callable[[int, str], int]) -> None:
    """Has `write(descriptor, name)` fill the file of a share, which is empty again where a worker died that wrote it."""
    with failing("a temporary file cannot be written"):
        descriptor = os.open(share.file, os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC)
    try:
        write(descriptor, "a temporary file")
    finally:
        os.close(descriptor)


def opened(state: Lifted, file: IO[bytes]) -> Payload:
    """A state that a worker made, open."""
    from maskserve.partials import LIMITS
    from maskserve.payload.format import BytesPayload

    return SpooledPayload(file.fileno(), LIMITS) if state is None else BytesPayload(state, LIMITS)


def checked(workers: int) -> int:
    if workers < 0:
        raise ParameterError(
            f"workers is {workers}; give a number of processes, or 0 for one a CPU", parameter="workers"
        )
    return workers


def states_of(paths: Sequence[str]) -> list[object]:
    """What tells a file from the one that it was before."""
    try:
        return [state_of(path) for path in paths]
    except OSError as error:
        raise InputChangedError(f"{shown(str(error.filename))} is no longer there: {error.strerror}") from None


def refuse_changed(paths: Sequence[str], before: list[object]) -> None:
    """Raise where a file is not what it was: each process has read one version of it, but perhaps not the same one."""
    if states_of(paths) != before:
        raise InputChangedError("a file changed while processes read it; run again once it is written")


def reduce(
    verb: str, words: Mapping[str, Any], paths: Sequence[str], along: str | None, *, workers: int, limits: Limits, memory: int,
    tell: Callable[[str], None],
) -> Answer:  # fmt: skip
    """The answer of a reduction, its shards in `workers` processes (0: one a CPU); `tell` hears of those that die."""
    from maskserve import states

    n, before = checked(workers) or cpus(), states_of(paths)
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(n)]
        shares = [
            Share(
                verb=verb, words=dict(words), paths=tuple(paths), along=along, shard=Shard(i, n), limits=limits,
                memory=memory // n, file=f"/proc/{os.getpid()}/fd/{file.fileno()}",
            )
            for i, file in enumerate(files)
        ]  # fmt: skip
        found = []
        outcomes = stack.enter_context(
            closing(Processes(workers=n, tell=tell).run(lift, shares, Bounds(in_order=True)))
        )
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
            read = states.read(opened(outcome.result, files[outcome.index]))
            found.append((f"shard {outcome.task.shard}", read))
    refuse_changed(paths, before)
    return states.merge(found).answer(memory)
