"""Files of which few are open at a time: a million of them need no more descriptors than a hundred. Imports no torch."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

from maskserve.errors import InputChangedError
from maskserve.payload.files import FilePayload, Payload, Spoil, SpooledPayload, _Ranges, file_state
from maskserve.payload.header import shown

OPEN = 128


class Shelf:
    """Payloads of files by path; the one used longest ago is closed, once nobody reads it any more."""

    def __init__(self, open_payload: Callable[[str], Payload], most: int = OPEN) -> None:
        self._open_payload, self._most = open_payload, most
        self._opened: OrderedDict[str, FilePayload] = OrderedDict()
        self._lock = Lock()

    def payload(self, path: str) -> Payload:
        """The payload at `path`; what is in memory, or was a stream, cannot be opened again, and stays as it is."""
        found = self._open_payload(path)
        if not isinstance(found, FilePayload) or isinstance(found, SpooledPayload):
            return found
        self._keep(path, found)
        return Shelved(self, path, found)

    def opened(self, path: str) -> FilePayload:
        with self._lock:
            found = self._opened.get(path)
            if found is not None:
                self._opened.move_to_end(path)
                return found
        again = self._open_payload(path)
        if not isinstance(again, FilePayload):
            raise changed(path)
        self._keep(path, again)
        return again

    def _keep(self, path: str, payload: FilePayload) -> None:
        with self._lock:
            self._opened[path] = payload
            while len(self._opened) > self._most:
                self._opened.popitem(last=False)  # closes itself with its last reader


class Shelved(_Ranges):
    """A file's payload that is opened again where it has to be."""

    def __init__(self, shelf: Shelf, path: str, payload: FilePayload) -> None:
        self.header, self.n_bytes, self.state = payload.header, payload.n_bytes, payload.state
        self.title = payload.title
        self._shelf, self._path = shelf, path

    def _file(self) -> FilePayload:
        payload = self._shelf.opened(self._path)
        if payload.state != self.state:
            raise changed(self._path)
        return payload

    def mapped(self, name: str, start_byte: int, n_bytes: int, spoil: Spoil) -> memoryview | None:
        return self._file().mapped(name, start_byte, n_bytes, spoil)

    def _range(self, offset: int, n: int) -> memoryview:
        return self._file()._range(offset, n)

    def _fill(self, offset: int, view: memoryview) -> None:
        self._file()._fill(offset, view)

    def _fill_runs(self, offsets: Sequence[int], view: memoryview) -> None:
        self._file()._fill_runs(offsets, view)

    def refuse_changed(self) -> None:
        try:
            state = file_state(os.stat(self._path))
        except OSError:
            raise changed(self._path) from None
        if state != self.state:
            raise changed(self._path)


def changed(path: str) -> InputChangedError:
    return InputChangedError(f"{shown(path)} changed while it was read; run again once it is written")
