"""The ledger in a store: objects cannot be appended to, so the newest one is written again, at most every second or so.

A store has no locks either. Two runs of one job at once do work twice and no harm: each has objects of its own, outputs are
whole, and the same whoever writes them. Imports no torch.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Iterable, Iterator

from maskserve.batch.ledger import SYNC_S, Entry, Failure, for_shard, new_run, parsed, shard_name, text_of
from maskserve.errors import OutputError
from maskserve.shards import Shard
from maskserve.stores import listing, objects, writing
from maskserve.stores.addresses import parse
from maskserve.stores.calls import at_once
from maskserve.stores.client import client_of

FULL_BYTES = 1 << 20
"""An object of this size is not written again; the next lines go to the next one."""
_PART = re.compile(r"part-((\d+)of(\d+)-(\d{8}T\d{6}\.\d{6}Z))-(\d{6})\.jsonl")


class StoredPart:
    """This run's part of the ledger: numbered objects, and errors.jsonl."""

    def __init__(self, folder: str, shard: Shard) -> None:
        self._folder, self._shard = folder, shard
        self.run = ""
        self._done, self._failed = bytearray(), bytearray()
        self._number = 0
        self._is_noted = True
        self._written_s = 0.0
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._error: Exception | None = None

    def __enter__(self) -> StoredPart:
        while True:
            self.run = new_run(self._shard)
            if self._is_begun():
                break
        writing.put(self._errors_path, memoryview(b""), "replace")
        self._written_s = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            try:
                self._write()
            except Exception:
                if exc[0] is None:  # what went wrong first is what must be heard
                    raise

    def _is_begun(self) -> bool:
        """Whether this run's first object is made; a store that cannot refuse one that stands has our word for its new name."""
        try:
            return writing.put(self._path, memoryview(b""), "skip")
        except OutputError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return writing.put(self._path, memoryview(b""), "replace")

    @property
    def _path(self) -> str:
        return f"{self._folder}/part-{self.run}-{self._number:06d}.jsonl"

    @property
    def _errors_path(self) -> str:
        return f"{self._folder}/{for_shard('errors.jsonl', self._shard)}"

    def add(self, done: Iterable[Entry]) -> None:
        """Notes outputs that are in the store; what is noted is there a second later, or when the next one is."""
        with self._lock:
            self._done += text_of(done)
            self._is_noted = False
        self._soon()

    def add_failures(self, failed: Iterable[Failure]) -> None:
        with self._lock:
            self._failed += text_of(failed)
            self._is_noted = False
        self._soon()

    def _soon(self) -> None:
        """Writes now, or once the last time is a second ago: another block may take long to end."""
        if self._error is not None:
            raise self._error
        with self._lock:
            left_s = self._written_s + SYNC_S - time.monotonic()
            if left_s <= 0:
                self._write()
            elif self._timer is None:
                self._timer = threading.Timer(left_s, self._later)
                self._timer.daemon = True
                self._timer.start()

    def _later(self) -> None:
        with self._lock:
            self._timer = None
            try:
                self._write()
            except Exception as error:  # for whoever notes something next
                self._error = error

    def _write(self) -> None:
        if self._is_noted:
            return
        writing.put(self._path, memoryview(bytes(self._done)), "replace")
        writing.put(self._errors_path, memoryview(bytes(self._failed)), "replace")
        if len(self._done) > FULL_BYTES:
            self._number += 1
            self._done.clear()
        self._is_noted, self._written_s = True, time.monotonic()


def parts(folder: str) -> Iterator[tuple[str, re.Match[str]]]:
    """The objects of the ledger, each with what its name says."""
    for path in listing.below(folder):
        matched = _PART.fullmatch(path.rpartition("/")[2])
        if matched is not None and path == f"{folder}/{matched[0]}":
            yield path, matched


def entries(folder: str) -> dict[str, Entry]:
    """The newest entry of each input, of every part."""
    ordered = [path for path, _ in sorted(parts(folder), key=lambda part: (part[1][4], part[1][5]))]
    found: dict[str, Entry] = {}
    for text in at_once(objects.read_object, ordered):
        for line in text.splitlines(keepends=True):
            entry = parsed(line)
            if entry is not None:
                found[entry.uri] = entry
    return found


def forget(folder: str, shard: Shard) -> None:
    """Removes what this shard noted before, and what was noted of other divisions into shards."""
    ours = [
        path for path, name in parts(folder) if name[1].startswith(f"{shard_name(shard)}-") or name[3] != str(shard.n)
    ]
    at_once(deleted, ours)


def deleted(path: str) -> None:
    address = parse(path)
    client_of(address).delete(address)
