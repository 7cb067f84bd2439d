"""Ranges of files as memory: what lies in the page cache is computed on where it lies, without a copy.

A file that shrinks meanwhile ends no process: what is gone reads as 0, and whoever asked for the range is told.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from maskserve.backends.cpu import missing, native


class Range:
    """A range that is mapped until nothing refers to it; then `spoil` is called where not all bytes were the file's."""

    def __init__(self, address: int, guard: int, n_bytes: int, spoil: Callable[[], None]) -> None:
        self._given, self._spoil, self._unmap = (address, guard, n_bytes), spoil, native().unmap_range

    def __del__(self) -> None:
        if not self._unmap(*self._given):
            self._spoil()


def mapped_range(descriptor: int, offset: int, n_bytes: int, spoil: Callable[[], None]) -> memoryview | None:
    """A range of a file as memory that must not be written to; None where it is to be read.

    It stays while anything refers to it. `spoil` may be called then: nothing counts that was made of the bytes.
    """
    address, guard = (0, -1) if missing() is not None else native().map_range(descriptor, offset, n_bytes)
    if not address:
        return None
    cells = (ctypes.c_ubyte * n_bytes).from_address(address)
    cells.owner = Range(address, guard, n_bytes, spoil)  # type: ignore[attr-defined]  # ctypes arrays take attributes
    return memoryview(cells).cast("B")
