"""Ranges of files as memory: what lies in the page cache is computed on where it lies, in half the time of a copy.

A file that shrinks meanwhile ends no process: what is gone reads as 0, and the range says so when it is given back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from maskserve.backends.cpu import missing, native


class SpoiltRangeError(Exception):
    """Bytes of a mapped range were gone, or could not be read."""


@contextmanager
def mapped_range(descriptor: int, offset: int, n_bytes: int) -> Iterator[memoryview | None]:
    """A range of a file as memory that must not be written to, nor looked at later; None where it is to be read.

    Raises SpoiltRangeError at the end where not all bytes were the file's: then nothing counts that was made of them.
    """
    address, guard = (0, -1) if missing() is not None else native().map_range(descriptor, offset, n_bytes)
    if not address:
        yield None
        return
    is_whole = False
    try:
        yield memoryview((ctypes.c_ubyte * n_bytes).from_address(address)).cast("B")
    finally:
        is_whole = native().unmap_range(address, guard, n_bytes)
    if not is_whole:
        raise SpoiltRangeError
