"""What the tests of executors run: functions that a worker can import, some of which end it."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from maskserve.errors import DeviceLostError, OutputError


def square(number: int) -> int:
    return number * number


def late_squares(number: int) -> int:
    """The square; the first tasks take longest."""
    time.sleep(0.2 / (1 + number))
    return number * number


def refuse_odd(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number


def full_disk(name: str) -> None:
    error = OutputError(f"{name} is full", parameter=name)
    error.errno = errno.ENOSPC
    raise error


def crash(number: int) -> int:
    """The number; 3 has every worker that runs it die of a wild pointer."""
    if number == 3:
        ctypes.string_at(1)
    return number


def whole(numbers: tuple[int, ...]) -> list[int]:
    return [crash(number) for number in numbers]


def parts(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(number,) for number in numbers]


def pid(_: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def threads(_: int) -> str:
    return os.environ["MASKSERVE_THREADS"]


def wait_long(_: int) -> None:
    time.sleep(600)


def no_torch(_: int) -> bool:
    import sys

    return "torch" not in sys.modules


@dataclass(frozen=True)
class KilledOnce:
    """Its worker is killed, once for each number, as the system kills what takes too much memory."""

    folder: str

    def __call__(self, number: int) -> int:
        mark = Path(self.folder, str(number))
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number


@dataclass(frozen=True)
class Overlap:
    """How many tasks ran at once, as marks in a folder say."""

    folder: str

    def __call__(self, number: int) -> int:
        mark = Path(self.folder, str(number))
        mark.touch()
        time.sleep(0.05)
        n_running = len(list(Path(self.folder).iterdir()))
        mark.unlink()
        return n_running


class NeverReady:
    """A function whose worker dies before its first task."""

    def prepare(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, number: int) -> int:
        return number


def on_a_device(task: tuple[str, bool]) -> int:
    """The worker's number; the first worker that has a task loses its device, and of the worst one all do."""
    path, is_worst = task
    if is_worst or not os.path.exists(path):
        Path(path).touch()
        raise DeviceLostError("cuda:0 was lost")
    return os.getpid()


def number_on_a_device(task: tuple[str, bool]) -> int:
    """The worker's number among its fellows, once another has lost its device on the task."""
    on_a_device(task)
    return int(os.environ["MASKSERVE_WORKER"])
