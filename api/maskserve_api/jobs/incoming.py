"""The body of a job as it comes: hashed, in memory while it is small, then in a file of the spool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from maskserve.errors import OutputError
from maskserve_api.jobs.spool import File, failure

INLINE_BYTES = 1 << 16
"""Bodies and results up to here stand in the store, where one fsync serves them and their row."""
WRITTEN_BYTES = 1 << 18
"""What is written to a file at once: to ask a thread for less costs more than the writing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A whole body: its bytes, or where it is a file None."""

    n_bytes: int
    sha256: str
    data: bytes | None
    file: File | None


class Incoming:
    """Takes the pieces of a body. `make` gives the file that a large one goes to; without it a large one is hashed alone."""

    def __init__(self, make: Callable[[], File] | None) -> None:
        self._make, self._sha = make, sha256()
        self._held = bytearray()
        self._file: File | None = None
        self.n_bytes = 0

    async def add(self, piece: bytes | memoryview) -> None:
        self._sha.update(piece)
        self.n_bytes += len(piece)
        if self._make is None:
            return
        self._held += piece
        if self.n_bytes > INLINE_BYTES and len(self._held) >= (WRITTEN_BYTES if self._file else INLINE_BYTES):
            await self._write()

    async def arrived(self) -> Arrived:
        """The body, now that it is whole; its file is not on disk yet."""
        if self._file is not None and self._held:
            await self._write()
        data = None if self._file is not None else bytes(self._held)
        return Arrived(n_bytes=self.n_bytes, sha256=self._sha.hexdigest(), data=data, file=self._file)

    def discard(self) -> None:
        if self._file is not None:
            self._file.discard()

    async def _write(self) -> None:
        assert self._make is not None
        held, self._held = self._held, bytearray()
        try:
            if self._file is None:
                self._file = self._make()
            await to_its_end(partial(self._file.write, [held]))
        except OutputError as error:
            raise failure(error) from error


async def to_its_end(work: Callable[[], None]) -> None:
    """Has a thread do it, and waits for that also where the request is given up: its file must not be closed under it."""
    done = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait([done])
        raise
