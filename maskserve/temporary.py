"""Files without a name below TMPDIR, for what does not fit into memory: nothing is left of them, however a process ends."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from maskserve.errors import OutputError
from maskserve.payload.header import shown
from maskserve.room import megabytes

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """Turns a lack of room for a temporary file of so many bytes into an error that says where it was to be."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in FULL:
            raise
        error = OutputError(
            f"{megabytes(n_bytes)} MB do not fit into a temporary file in {shown(tempfile.gettempdir())}: "
            f"{os.strerror(cause.errno)}; set TMPDIR to a folder that has room"
        )
        error.errno = cause.errno
        raise error from cause
