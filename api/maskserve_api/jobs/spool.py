"""The files of jobs: bodies and results too large for the store. Whole or not there, and on disk before a row names them."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
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
OURS = re.compile(rf"[0-9a-f]{{32}}|{re.escape(TEMP_PREFIX)}.*", re.DOTALL)
"""The names of files of jobs: what is called otherwise is somebody else's."""


class Spool:
    """A folder with the files of jobs, locked while the process lives; SettingsError where it cannot be used."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.realpath(folder)
        self._bodies, self._results = (os.path.join(self.folder, name) for name in ("bodies", "results"))
        self._lock = -1
        try:
            self._open()
        except (OSError, ValueError) as error:
            self.close()
            raise error if isinstance(error, SettingsError) else unusable(folder, error) from None

    def _open(self) -> None:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        for path in (self._bodies, self._results):
            make_folder(path)
        self._lock = os.open(os.path.join(self.folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._identities = {LOCK: identity(os.fstat(self._lock)), STORE: identity(self._make_store())}
        _sync_folder(self.folder)
        with suppress(PermissionError):  # a folder above that is closed to us was there before
            _sync_folder(os.path.dirname(self.folder))

    def _make_store(self) -> os.stat_result:
        """The file of the store, there; SettingsError where a new one would not know of files that are there already."""
        # nobody else's to read, in a folder that was there before, too; what SQLite puts beside it is like it
        store = os.open(self.store_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(store)
        finally:
            os.close(store)  # before SQLite opens it: to close it later would end SQLite's locks
        for folder in (self._bodies, self._results):
            if found.st_size == 0 and any(OURS.fullmatch(name) for name in os.listdir(folder)):
                raise SettingsError(
                    f"{shown(folder)} has files of jobs, and there is no {STORE} that knows them: put it back, remove them, "
                    "or give another --jobs-folder",
                    parameter="serve_jobs_folder",
                )
        return found

    @property
    def store_path(self) -> str:
        return os.path.join(self.folder, STORE)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def body(self, id: str) -> str:
        return os.path.join(self._bodies, id)

    def result(self, id: str) -> str:
        return os.path.join(self._results, id)

    def sweep(self, bodies: Collection[str], results: Collection[str]) -> int:
        """How many files of jobs were removed that a process has left behind: all but these, by the ids of their jobs."""
        n_removed = 0
        for folder, known in ((self._bodies, bodies), (self._results, results)):
            for name in filter(OURS.fullmatch, set(os.listdir(folder)) - set(known)):
                remove(os.path.join(folder, name))
                n_removed += 1
        return n_removed

    def fault(self) -> str | None:
        """Why the folder takes no job; None where it does."""
        try:
            found = {name: identity(os.stat(os.path.join(self.folder, name))) for name in self._identities}
            is_read_only = bool(os.statvfs(self.folder).f_flag & os.ST_RDONLY)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                return f"the folder of jobs cannot be used: {os.strerror(error.errno or 0).lower()}"
            found, is_read_only = {}, False
        if found != self._identities:  # what SQLite has open would take jobs, and nobody would find them again
            return "the folder of jobs is gone or was replaced: the service must be started again"
        return "the folder of jobs is read-only" if is_read_only else None


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


def unusable(folder: str, error: OSError | ValueError) -> SettingsError:
    """Why no spool can be there, as who starts the service is told of it."""
    if isinstance(error, BlockingIOError):
        text = f"{shown(folder)} is in use by another service: stop it, or give another --jobs-folder"
    else:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        text = f"{shown(folder)} cannot hold jobs: {reason}; give another --jobs-folder"
    return SettingsError(text, parameter="serve_jobs_folder")


def make_folder(path: str) -> None:
    """A folder of ours, there; SettingsError where something else has its name: a link leads to what is somebody else's."""
    with suppress(FileExistsError):
        os.mkdir(path, mode=0o700)
    if not stat.S_ISDIR(mode := os.lstat(path).st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no folder"
        raise SettingsError(
            f"{shown(path)} is {kind}, and jobs are kept in a folder of that name: remove it, or give another --jobs-folder",
            parameter="serve_jobs_folder",
        )


def identity(of: os.stat_result) -> tuple[int, int]:
    """What a file is, whatever its name."""
    return of.st_dev, of.st_ino


def open_file(path: str) -> int:
    """The descriptor of a file of a job, to be read; OSError where it is none, such as a link or a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file")
    return fd


def remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def digest(path: str, checkpoint: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The size of a file and its SHA-256."""
    sha, n_bytes = sha256(), 0
    try:
        with open(open_file(path), "rb", buffering=0) as file:
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
