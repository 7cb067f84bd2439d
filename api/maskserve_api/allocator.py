"""What glibc keeps of freed memory, bounded: by default each of 8 arenas a core may keep up to 64 MiB for good."""

from __future__ import annotations

import ctypes
import os

ARENAS = 2
"""Shared by all threads; beyond, each further thread of the lane keeps the most that it ever held."""
MAPPED_BYTES = 1 << 20
"""Larger blocks are maps of their own, which the system has back at once; the default climbs to 32 MiB by what is freed.
With 4 MiB the holes between blocks grew for minutes under load; smaller blocks are used again, for mapping takes time."""
KEPT_BYTES = 8 << 20
"""What may stay free at the end of an arena."""
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""malloc.h's numbers of the options."""
CHOSEN = ("MALLOC_", "GLIBC_TUNABLES")


def bound_arenas() -> None:
    """Sets the bounds, where malloc is glibc's and the environment has not chosen others."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(CHOSEN) for name in os.environ):
        return
    for option, value in ((ARENA_MAX, ARENAS), (MMAP_THRESHOLD, MAPPED_BYTES), (TRIM_THRESHOLD, KEPT_BYTES)):
        mallopt(option, value)
