"""A reduction in processes of this machine: each makes the state of a shard, and this one the answer of all.

The shards are those of `reduce --shard`, so the bits are those of one process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from maskserve.answers import Answer
from maskserve.cgroup import cpus
from maskserve.errors import InputChangedError, ParameterError
from maskserve.executors import Limits as Bounds
from maskserve.payload.files import FilePayload, failing, file_state, temp_name
from maskserve.payload.format import Limits, Payload
from maskserve.payload.header import shown
from maskserve.processes import Processes
from maskserve.shards import Shard

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
    folder: str
    """The name of a folder beside others of the system's for temporary files: there once a state is too large to be sent."""

    def __str__(self) -> str:
        return f"shard {self.shard}"


Lifted: TypeAlias = bytes | str
"""A state, or the path of the file that has it."""


def lift(share: Share) -> Lifted:
    """The state of a shard, in a worker; one that is large goes by way of a file."""
    from functools import partial

    with lifting(share) as state:
        if state.n_bytes <= share.memory // HELD_SHARE:
            return state.to_bytes()
        return in_a_file(share, partial(state.write, memory=share.memory))


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


def in_a_file(share: Share, write: Callable[[int, str], int]) -> str:
    """The path of a new file of the crew's folder, written by `write(descriptor, name)`."""
    folder = os.path.join(tempfile.gettempdir(), share.folder)
    path = os.path.join(folder, str(share.shard.index))
    with failing(f"{shown(path)} cannot be written"):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        write(descriptor, path)
    finally:
        os.close(descriptor)
    return path


def opened(state: Lifted) -> Payload:
    """A state that a worker made, open; its file, if it has one, needs no name any more."""
    from maskserve.partials import LIMITS
    from maskserve.payload.format import BytesPayload

    if isinstance(state, bytes):
        return BytesPayload(state, LIMITS)
    payload = FilePayload(state, LIMITS)
    os.unlink(state)
    return payload


def checked(workers: int) -> int:
    if workers < 0:
        raise ParameterError(
            f"workers is {workers}; give a number of processes, or 0 for one a CPU", parameter="workers"
        )
    return workers


def states_of(paths: Sequence[str]) -> list[object]:
    """What tells a file from the one that it was before."""
    try:
        return [file_state(os.stat(path)) for path in paths]
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

    n, folder, before = checked(workers) or cpus(), temp_name(), states_of(paths)
    shares = [
        Share(
            verb=verb, words=dict(words), paths=tuple(paths), along=along, shard=Shard(i, n), limits=limits, memory=memory // n,
            folder=folder,
        )
        for i in range(n)
    ]  # fmt: skip
    found = []
    try:
        with closing(Processes(workers=n, tell=tell).run(lift, shares, Bounds(in_order=True))) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    raise outcome.error
                assert outcome.result is not None
                found.append((f"shard {outcome.task.shard}", states.read(opened(outcome.result))))
        refuse_changed(paths, before)
    finally:
        shutil.rmtree(os.path.join(tempfile.gettempdir(), folder), ignore_errors=True)
    return states.merge(found).answer(memory)
