"""A reduction in processes of this machine: each makes the state of a shard, and this one the answer of all.

The shards are those of `reduce --shard`, so the bits are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskserve.answers import Answer
from maskserve.cgroup import cpus
from maskserve.errors import ParameterError
from maskserve.executors import Limits as Bounds
from maskserve.executors import Processes
from maskserve.payload.format import Limits
from maskserve.shards import Shard


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


def lift(share: Share) -> bytes:
    """The state of a shard, in a worker."""
    from functools import partial

    from maskserve import requests, states
    from maskserve.joining import question
    from maskserve.opening import open_any

    request = requests.build(share.verb, share.words)
    read = partial(open_any, limits=share.limits)
    with question(request, share.paths, read, requests.parse_along(share.along)) as asked:
        return states.lift(request, asked.payload, asked.others, share.shard, share.memory).to_bytes()


def reduce(
    verb: str, words: Mapping[str, Any], paths: Sequence[str], along: str | None, *, workers: int, limits: Limits, memory: int,
    tell: Callable[[str], None],
) -> Answer:  # fmt: skip
    """The answer of a reduction, its shards in `workers` processes (0: one a CPU); `tell` hears of those that die."""
    from maskserve import states

    if workers < 0:
        raise ParameterError(
            f"workers is {workers}; give a number of processes, or 0 for one a CPU", parameter="workers"
        )
    n = workers or cpus()
    shares = [
        Share(
            verb=verb, words=dict(words), paths=tuple(paths), along=along, shard=Shard(i, n), limits=limits, memory=memory // n
        )
        for i in range(n)
    ]  # fmt: skip
    found = []
    for outcome in Processes(workers=n, tell=tell).run(lift, shares, Bounds(in_order=True)):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.result is not None
        found.append((f"shard {outcome.task.shard}", states.from_bytes(outcome.result)))
    return states.merge(found).answer(memory)
