"""What the tests of clusters run: functions that a worker can import, some of which wait, or leave large results."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from maskserve.batch.ledger import Part
from maskserve.batch.run import Plan, Runner
from maskserve.batch.work import Block, Report, Work
from maskserve.on_ray.reduction import Bytes, Lift, Steps, Task

WAIT_S = 60


def until(look: Callable[[], Any]) -> Any:
    """What `look` finds, once it finds something."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        if found := look():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_S} s in vain")


def mark(folder: str, number: int) -> None:
    """Says in a folder that this worker, of this node, runs a task."""
    Path(folder, f"{number}-{os.getpid()}-{os.getppid()}").touch()


def marks(folder: Path) -> dict[int, tuple[int, int]]:
    """(worker, raylet) of each task that has said so."""
    found = [[int(word) for word in path.name.split("-")] for path in folder.glob("*-*-*")]
    return {number: (worker, raylet) for number, worker, raylet in found}


@dataclass(frozen=True)
class Held:
    """Squares that wait, each at its own mark, until a file called go is there."""

    folder: str

    def __call__(self, number: int) -> int:
        mark(self.folder, number)
        until(Path(self.folder, "go").exists)
        return number * number


@dataclass(frozen=True)
class HeldFrom:
    """Squares; those of a number and more wait until a file called go is there."""

    folder: str
    first: int

    def __call__(self, number: int) -> int:
        if number >= self.first:
            until(Path(self.folder, "go").exists)
        return number * number


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldSteps(Steps):
    """The steps of a reduction; some shards wait so."""

    folder: str
    waiting: tuple[int, ...]

    def __call__(self, task: Task, *objects: Bytes) -> Bytes:
        if isinstance(task, Lift) and task.shard in self.waiting:
            mark(self.folder, task.shard)
            until(Path(self.folder, "go").exists)
        return Steps.__call__(self, task, *objects)


def large(number: int) -> Any:
    """What is too large to travel with an answer; on one node after the other."""
    time.sleep(0.3)
    return np.full(1 << 20, number, np.uint8)


def total(_: int, *objects: Any) -> int:
    return sum(int(found.sum()) for found in objects)


def place(_: int) -> tuple[str, str, list[str]]:
    """The folder and the threads of a worker, and where it looks for modules."""
    return os.getcwd(), os.environ["OMP_NUM_THREADS"], sys.path


def complain(number: int) -> int:
    print(f"maskserve: warning: {number} is odd", file=sys.stderr)
    return number


@dataclass(slots=True, kw_only=True)
class PoisonedWork(Work):
    """The work of a job in which the input called f00003 kills every worker that opens it."""

    def __call__(self, block: Block) -> Report:
        if any("f00003" in item.uri for item in block.items):
            os.kill(os.getpid(), signal.SIGKILL)
        return Work.__call__(self, block)


class PoisonedRunner(Runner):
    def function(self, plan: Plan, part: Part) -> Work:
        made = Runner.function(self, plan, part)
        return PoisonedWork(**{f.name: getattr(made, f.name) for f in fields(made) if f.init})
