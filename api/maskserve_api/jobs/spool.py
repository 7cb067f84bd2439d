"""The files of jobs: bodies and results too large for the store. Whole or not there, and on disk before a row names them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from hashlib import sha256

from maskserve.errors import InputError, OutputError, SettingsError
from maskserve.execution import execution
from maskserve.payload.files import TEMP_PREFIX, FilePayload, _sync_folder, failing, temp_name
from maskserve.payload.format import Buffer, Limits
from maskserve.payload.header import shown
from maskserve_api.errors import NoSpaceError, ServiceError, SpoolError

PIECE_BYTES = 1 << 22
"""Of what is read between two checkpoints, or hashed at once."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
STORE, LOCK = "jobs.sqlite3", "lock"


class Spool:
    """A folder with the files of jobs, locked while the process lives; SettingsError where it cannot be used."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.realpath(folder)
        self._bodies, self._results = (os.path.join(self.folder, name) for name in ("bodies", "results"))
        try:
            for path in (self.folder, self._bodies, self._results):
                os.makedirs(path, mode=0o700, exist_ok=True)
            self._lock = os.open(os.path.join(self.folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # nobody else's to read, in a folder that was there before, too; what SQLite puts beside it is like it
            os.close(os.open(self.store_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            _sync_folder(self.folder)
            with suppress(PermissionError):  # a folder above that is closed to us was there before
                _sync_folder(os.path.dirname(self.folder))
        except BlockingIOError:
            raise SettingsError(
                f"{shown(folder)} is in use by another service: stop it, or give another --jobs-folder",
                parameter="serve_jobs_folder",
            ) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise SettingsError(
                f"{shown(folder)} cannot hold jobs: {reason}; give another --jobs-folder", parameter="serve_jobs_folder"
            ) from None

    @property
    def store_path(self) -> str:
        return os.path.join(self.folder, STORE)

    def close(self) -> None:
        os.close(self._lock)

    def body(self, id: str) -> str:
        return os.path.join(self._bodies, id)

    def result(self, id: str) -> str:
        return os.path.join(self._results, id)

    def sweep(self, bodies: Collection[str], results: Collection[str]) -> int:
        """How many files were removed that a process has left behind: all but these, by the ids of their jobs."""
        n_removed = 0
        for folder, known in ((self._bodies, bodies), (self._results, results)):
            for name in set(os.listdir(folder)) - set(known):
                remove(os.path.join(folder, name))
                n_removed += 1
        return n_removed

    def is_read_only(self) -> bool:
        try:
            return bool(os.statvfs(self.folder).f_flag & os.ST_RDONLY)
        except OSError:
            return True


class File:
    """A file that is being written: `publish` or `discard` ends it."""

    def __init__(self, target: str) -> None:
        self.target = target
        folder = os.path.dirname(target)
        self.temp = os.path.join(folder, temp_name())
        assert os.path.basename(self.temp).startswith(TEMP_PREFIX), "what a kill leaves behind is no id of a job"
        with failing("a file of a job cannot be made"):
            self.fd = os.open(self.temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, chunks: Iterable[Buffer]) -> None:
        with failing("a file of a job cannot be written"):
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view.nbytes:
                    view = view[os.write(self.fd, view) :]

    def publish(self) -> None:
        """The file at its name, and on disk."""
        with failing("a file of a job cannot be written"):
            os.fsync(self.fd)
            os.close(self.fd)
            self.fd = -1
            os.replace(self.temp, self.target)
            _sync_folder(os.path.dirname(self.target))

    def discard(self) -> None:
        """Nothing of it stays, whether it was published or not."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        remove(self.temp)
        remove(self.target)


def failure(error: OutputError | InputError) -> ServiceError:
    """A failure of the spool's disk as clients are told of it: no path of the service is their business."""
    if error.errno in FULL:
        return NoSpaceError("the disk of the service is full; try again later")
    reason = os.strerror(error.errno).lower() if error.errno else "it is not as it was left"
    return SpoolError(f"the folder of jobs cannot be used: {reason}")


def remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def digest(path: str, checkpoint: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The size of a file and its SHA-256."""
    sha, n_bytes = sha256(), 0
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                checkpoint()
                sha.update(piece)
                n_bytes += len(piece)
    except OSError as error:
        raise OutputError(f"a file of a job cannot be read: {error.strerror}") from error
    return n_bytes, sha.hexdigest()


class Body(FilePayload):
    """A body in a file, of which a large part is read in pieces: whoever else wants the device need not wait for a disk."""

    def __init__(self, path: str, limits: Limits) -> None:
        super().__init__(path, limits)
        self._shown, self.title = "the body", ""

    def _fill(self, offset: int, view: memoryview) -> None:
        checkpoint = execution().checkpoint
        for start in range(0, view.nbytes, PIECE_BYTES):
            if start and checkpoint is not None:
                checkpoint()
            super()._fill(offset + start, view[start : start + PIECE_BYTES])
