"""What the control group of this process grants: CPUs and memory, of cgroup v2 and v1; a container sees the host's otherwise.

Imports no torch. A limit of a group holds for the groups below it, so every group from ours up to the root is asked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache

ROOT = "/"
MOUNT = "sys/fs/cgroup"
UNLIMITED = 1 << 60
"""v1 says "no limit" as a number near 2**63, in whole pages."""
MEMORY_SHARE = 2
"""One part in so many of the limit is what a job may hold by default: torch and the page cache want some too."""


def cpus() -> int:
    """The CPUs that this process may use: those it may run on, or its group's quota in whole CPUs, rounded up."""
    return max(1, min(len(os.sched_getaffinity(0)), _quota(ROOT)))


def memory_limit() -> int:
    """The bytes that this process may use: its group's limit, or the machine's memory."""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), limit_bytes(ROOT))


def default_memory() -> int:
    """What `--memory` is where nobody says: half of what this process may use."""
    return memory_limit() // MEMORY_SHARE


def quota_cpus(root: str) -> int:
    """The quota of the groups under `root`, rounded up; UNLIMITED without one.

    Rounded up, since half a CPU too many is only waited for, and half a CPU too few is never used.
    """
    pairs = [_read(f"{folder}/cpu.max").split() for folder in _folders(root, "")]
    for folder in _folders(root, "cpu"):
        pairs.append([_read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us")])
    shares = [int(p[0]) / int(p[1]) for p in pairs if len(p) == 2 and p[0].isdecimal() and p[1].isdecimal()]
    return min((math.ceil(share) for share in shares if share > 0), default=UNLIMITED)


_quota = cache(quota_cpus)  # asked before each request, and a quota hardly ever changes under a running process


def limit_bytes(root: str) -> int:
    """The memory limit of the groups under `root`; UNLIMITED without one."""
    said = [_read(f"{folder}/memory.max") for folder in _folders(root, "")]
    said += [_read(f"{folder}/memory.limit_in_bytes") for folder in _folders(root, "memory")]
    return min([UNLIMITED, *(int(text) for text in said if text.isdecimal() and int(text) > 0)])


def _folders(root: str, controller: str) -> Iterator[str]:
    """The folders of our group and of those above it; those of v2 where `controller` is empty.

    A container that sees only its own group has it at the mount itself, whatever path /proc says.
    """
    mounts = {controller} if controller else {"", "unified"}
    for line in _read(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if controller not in names.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in sorted({*mounts, names} if controller else mounts):
            for n in range(len(parts), -1, -1):
                yield os.path.join(root, MOUNT, mount, *parts[:n])


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
