"""Runs of a file read in one native call, with the interpreter free meanwhile."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from maskserve.backends.cpu import missing, native

AT_END = -1


def read_runs(descriptor: int, offsets: Sequence[int], view: memoryview) -> OSError | None:
    """Fills `view` with as many bytes from each of `offsets` on; what went wrong, without an errno where the file ended."""
    n = view.nbytes // len(offsets)
    if missing() is not None:
        return one_by_one(descriptor, offsets, view, n)
    code: int = native().read_runs(descriptor, offsets, n, np.frombuffer(view, np.uint8).ctypes.data)
    if code == 0:
        return None
    return OSError() if code == AT_END else OSError(code, os.strerror(code))


def one_by_one(descriptor: int, offsets: Sequence[int], view: memoryview, n: int) -> OSError | None:
    """The same where the extension was not built."""
    for i, offset in enumerate(offsets):
        rest = view[i * n : (i + 1) * n]
        while rest.nbytes:
            try:
                read = os.preadv(descriptor, [rest], offset)
            except OSError as error:
                return error
            if read == 0:
                return OSError()
            rest, offset = rest[read:], offset + read
    return None
