"""Many small files made at once: each whole and on disk before it has its name, with one wait for the disk for all of them.

An fsync for each of 64 small files takes 10 ms on an SSD, one syncfs for all of them 1 ms. Imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from maskserve.errors import OutputError
from maskserve.payload.drafts import create
from maskserve.payload.files import (
    StrPath,
    _because,
    _reason,
    _stands,
    _sync_folder,
    failing,
    kind_of,
    temp_name,
)
from maskserve.payload.header import shown
from maskserve.payload.writing import Encoded

SMALL = 1 << 16
FEW = 4
"""Files up to which an fsync of each is as quick."""
SLOW_S = 0.02
"""Seconds a file beyond which syncfs is given up: others write much to the same file system, and it waits for them too."""
LOCAL = frozenset({0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630})
"""ext4, xfs, btrfs, tmpfs and overlayfs: there syncfs means all that fsync means. Over a network it need not."""
KERNEL = (5, 8)
"""The first Linux whose syncfs says that a write failed."""


@dataclass(slots=True)
class Staged:
    """A file that is written under a temporary name, still open."""

    fd: int
    temp: str
    target: str
    name: str
    sha256: str


class Group:
    """Files to appear together; those that are not committed are gone in the end."""

    def __init__(self) -> None:
        self._staged: list[Staged] = []
        self._may_syncfs = True

    def __len__(self) -> int:
        return len(self._staged)

    def write(self, path: StrPath, encoded: Encoded) -> Staged:
        """The payload under a temporary name; commit() puts it at `path`, over a regular file that may stand there."""
        digest = hashlib.sha256()

        def make(staged: Staged) -> None:
            for chunk in _joined(encoded):
                digest.update(chunk)
                _write_all(staged.fd, chunk, staged.name)
            staged.sha256 = digest.hexdigest()

        return self._stage(path, make)

    def write_by(self, path: StrPath, make: Callable[[int], int]) -> Staged:
        """The same of what `make` writes to a file in any order; it is read again for its sha256."""

        def made(staged: Staged) -> None:
            make(staged.fd)
            with open(staged.temp, "rb") as file:
                staged.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

        return self._stage(path, made)

    def _stage(self, path: StrPath, make: Callable[[Staged], None]) -> Staged:
        name = shown(os.fspath(path))
        with failing(f"{name} cannot be written"):
            target = _target(os.fspath(path), name)
            temp = os.path.join(os.path.dirname(target), temp_name())
            staged = Staged(create(temp), temp, target, name, "")
        try:
            make(staged)
        except BaseException:
            _forget(staged)
            raise
        self._staged.append(staged)
        return staged

    def commit(self) -> dict[str, OutputError]:
        """Every file on disk and at its path; what failed, by the temporary name, changed nothing."""
        staged, self._staged = self._staged, []
        errors: dict[str, OutputError] = {}
        try:
            self._sync(staged, errors)
            for one in staged:
                if one.temp not in errors:
                    try:
                        os.replace(one.temp, one.target)
                    except OSError as cause:
                        message = f"{one.name} cannot be written: {_reason(cause)}"
                        errors[one.temp] = _because(OutputError, message, cause)
            self._sync_folders([one for one in staged if one.temp not in errors], errors)
        finally:
            for one in staged:
                _forget(one, is_there=one.temp in errors)
        return errors

    def abandon(self) -> None:
        """Nothing of what was written is left."""
        while self._staged:
            _forget(self._staged.pop())

    def _sync(self, staged: list[Staged], errors: dict[str, OutputError]) -> None:
        is_many = len(staged) > FEW and self._may_syncfs
        if is_many and _has_syncfs(os.path.dirname(staged[0].target)) and self._syncfs(staged):
            return
        for one in staged:
            try:
                with failing(f"{one.name} cannot be written"):
                    os.fsync(one.fd)
            except OutputError as error:
                errors[one.temp] = error

    def _syncfs(self, staged: list[Staged]) -> bool:
        """Whether all is on disk; where it is not, the fsync of each file says which."""
        start_s = time.monotonic()
        devices = {os.fstat(one.fd).st_dev: one.fd for one in staged}
        is_done = all(_libc().syncfs(fd) == 0 for fd in devices.values())
        self._may_syncfs = time.monotonic() - start_s < SLOW_S * len(staged)
        return is_done

    @staticmethod
    def _sync_folders(staged: list[Staged], errors: dict[str, OutputError]) -> None:
        for folder in {os.path.dirname(one.target) for one in staged}:
            try:
                with failing(f"{shown(folder)} cannot be written"):
                    _sync_folder(folder)
            except OutputError as error:
                errors.update((one.temp, error) for one in staged if os.path.dirname(one.target) == folder)


def _forget(staged: Staged, *, is_there: bool = True) -> None:
    with suppress(OSError):
        os.close(staged.fd)
    if is_there:
        with suppress(OSError):
            os.unlink(staged.temp)


def _joined(encoded: Encoded) -> Iterable[memoryview]:
    """The pieces, or all of a small payload in one: each write costs as much as copying 50 kB."""
    return [memoryview(b"".join(encoded.chunks))] if encoded.n_bytes <= SMALL else encoded.chunks


def _write_all(fd: int, data: memoryview, name: str) -> None:
    try:
        while data.nbytes:
            data = data[os.write(fd, data) :]
    except OSError as cause:
        raise _because(OutputError, f"{name} cannot be written: {_reason(cause)}", cause) from cause


def _target(path: str, name: str) -> str:
    """Where `path` leads, which is a regular file or free; of the folders above, only new ones are looked at."""
    folder, last = os.path.split(path)
    target = os.path.join(_real_folder(folder or "."), last)
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISLNK(mode):
        target = os.path.realpath(target)
        _stands(target, name, "replace")
    elif not stat.S_ISREG(mode):
        raise OutputError(f"{name} is {kind_of(mode)}; only a regular file is written or replaced")
    return target


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def _has_syncfs(folder: str) -> bool:
    """Whether syncfs in this folder waits for the disk, and says what failed."""
    release = os.uname().release.split(".")
    buffer = ctypes.create_string_buffer(256)
    if not hasattr(_libc(), "syncfs") or _libc().statfs(os.fsencode(folder), buffer) != 0:
        return False
    is_recent = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release[:2]) >= KERNEL
    return is_recent and int.from_bytes(buffer.raw[:4], "little") in LOCAL
