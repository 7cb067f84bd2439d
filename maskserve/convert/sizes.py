"""How much memory a file may ask for: what its author declares is compared with it before any of it is spent."""

from __future__ import annotations

import os

from maskserve.errors import TooLargeError
from maskserve.payload.header import LARGEST_BYTES

SHARE = 2  # one part in so many of the free memory: a computation makes copies
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
MEMINFO = "/proc/meminfo"


def readable_bytes() -> int:
    """The most that a file's cells may take: half of the free memory, or of the cgroup's limit if that is less."""
    return min(available_bytes(), *map(cgroup_bytes, CGROUP_LIMITS)) // SHARE


def available_bytes() -> int:
    try:
        with open(MEMINFO) as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_bytes(path: str) -> int:
    """The limit that a cgroup's file states; LARGEST_BYTES where there is none."""
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):  # "max"
        return LARGEST_BYTES


def refuse_beyond(n_bytes: int, most: int, what: str) -> None:
    """Raise where `what` would take more than `most` bytes of memory."""
    if n_bytes > most:
        raise TooLargeError(
            f"{what} would take {n_bytes} bytes of memory; at most {most} are read here, half of what is free"
        )
