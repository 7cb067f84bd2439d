"""How old things are, without trust in the wall clock: it jumps, and a result must neither end early nor live for ever."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
RUNNING = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Runs on while the machine sleeps, and never back; other systems than Linux have the next best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The age of a spool, and what the clocks said then."""

    age_s: float
    running_s: float
    boot_id: str
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def boot_id() -> str:
    """What this boot of the system is called; empty where it has no name."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Clock:
    """The age of a spool, in seconds: it goes on from the last mark, and never back.

    In the same boot by the clock that nobody sets. Across boots only the wall clock tells how long it was: it is
    believed unless it went back.
    """

    def __init__(self, last: Mark | None) -> None:
        self._boot_id, self._since_s = boot_id(), time.clock_gettime(RUNNING)
        self._age_s = 0.0
        if last is not None:
            is_same_boot = last.boot_id == self._boot_id != ""
            gone_s = self._since_s - last.running_s if is_same_boot else time.time() - last.wall_s
            self._age_s = last.age_s + max(0.0, gone_s)

    def age_s(self) -> float:
        return self._age_s + time.clock_gettime(RUNNING) - self._since_s

    def mark(self) -> Mark:
        return Mark(
            age_s=self.age_s(), running_s=time.clock_gettime(RUNNING), boot_id=self._boot_id, wall_s=time.time()
        )
