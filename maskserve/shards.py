"""Which part of the work is ours, where a scheduler starts the same command N times. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from maskserve.errors import ParameterError, SettingsError

T = TypeVar("T")
AUTO = "auto"
INDEX_VARIABLES: Mapping[str, str | None] = {
    "JOB_COMPLETION_INDEX": None,
    "SLURM_ARRAY_TASK_ID": "SLURM_ARRAY_TASK_MIN",
    "AWS_BATCH_JOB_ARRAY_INDEX": None,
}
"""Where Kubernetes Indexed Jobs, Slurm arrays and AWS Batch arrays say which task this is; the other counts from there."""
_SPELLED = re.compile(r"(auto|[0-9]{1,9})/([0-9]{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `n`, from 0."""

    index: int
    n: int

    def __str__(self) -> str:
        return f"{self.index}/{self.n}"

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Every n-th of the items.

        >>> Shard(1, 3).of("abcdefg")
        'be'
        """
        return items[self.index :: self.n]


WHOLE = Shard(0, 1)


def parse_shard(word: str, environment: Mapping[str, str] | None = None) -> Shard:
    """The shard that i/N says, or auto/N and the scheduler's variable.

    >>> parse_shard("0/4"), parse_shard("auto/4", {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1"})
    (Shard(index=0, n=4), Shard(index=2, n=4))
    """
    spelled = _SPELLED.fullmatch(word.strip())
    if spelled is None:
        raise ParameterError(
            f"--shard {word[:40]!r}: give i/N, such as 0/4 for the first of four, or auto/N", parameter="shard"
        )
    n = int(spelled[2])
    if n < 1:
        raise ParameterError(f"--shard {word}: N is how many shards there are, 1 or more", parameter="shard")
    if spelled[1] == AUTO:
        return _from_scheduler(n, os.environ if environment is None else environment)
    index = int(spelled[1])
    if index >= n:
        raise ParameterError(f"--shard {word}: shards of {n} are 0/{n} to {n - 1}/{n}", parameter="shard")
    return Shard(index, n)


def _from_scheduler(n: int, environment: Mapping[str, str]) -> Shard:
    for name, first in INDEX_VARIABLES.items():
        if name in environment:
            start = _whole(first, environment[first]) if first is not None and first in environment else 0
            index = _whole(name, environment[name]) - start
            if not 0 <= index < n:
                counted = f" from {first} {start}" if start else ""
                raise SettingsError(
                    f"--shard auto/{n}: {name} is {environment[name]}{counted}, and shards are 0 to {n - 1}; start {n} tasks",
                    parameter="shard",
                )
            return Shard(index, n)
    raise SettingsError(
        f"--shard auto/{n}: none of {', '.join(INDEX_VARIABLES)} is set; give i/{n} where no scheduler counts",
        parameter="shard",
    )


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise SettingsError(f"{name} is {text[:40]!r}; it must be a whole number", parameter="shard")
    return int(text)
