"""Where payloads live: bytes in memory, regular files, and the safe way to make a file. Imports no torch.

Files are read by pread; they are mapped for a moment alone, and under guard, since a mapped file that shrinks kills the
process. They appear whole or not at all.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from glob import has_magic
from typing import Literal, Protocol, Self, TypeAlias, TypeVar

from maskserve.errors import (
    InputChangedError,
    InputError,
    InputNotFoundError,
    NotComputableError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    ParameterError,
    UnknownTensorError,
    nearest,
)
from maskserve.payload.drafts import Draft
from maskserve.payload.header import DEFAULT_LIMITS, Buffer, Header, Limits, TensorInfo, parse_header, shown
from maskserve.payload.writing import Encoded
from maskserve.stores.addresses import is_a_folder, is_address

StrPath: TypeAlias = str | os.PathLike[str]
Exists: TypeAlias = Literal["error", "replace", "skip"]
EXISTS: tuple[Exists, ...] = ("error", "replace", "skip")
MANY = 4  # runs from which they are read in one call: between two calls threads wait for the interpreter
TEMP_PREFIX = ".maskserve-"  # known, so that what a kill leaves behind can be told from data
_owner: ContextVar[str] = ContextVar("owner", default="")

_NOT_FOUND = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
_Error = TypeVar("_Error", bound=OSError)
Spoil: TypeAlias = Callable[[], None]
"""Notes that bytes which were looked at where they lie were not all the file's."""


class Payload(Protocol):
    """Named tensors that can be read, whole or in ranges of bytes."""

    @property
    def header(self) -> Header: ...
    @property
    def n_bytes(self) -> int: ...
    def read(self, name: str) -> memoryview: ...
    def read_range(self, name: str, start_byte: int, n_bytes: int) -> memoryview: ...
    def read_runs(self, name: str, start_bytes: Sequence[int], view: memoryview) -> None: ...
    def mapped(self, name: str, start_byte: int, n_bytes: int, spoil: Spoil) -> memoryview | None: ...
    def expect(self, name: str, start_byte: int, n_bytes: int) -> None: ...
    @property
    def is_far(self) -> bool: ...
    def refuse_changed(self) -> None: ...
    def identity(self) -> Iterator[tuple[object, ...]]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


class _Ranges(ABC):
    """Tensors as ranges of bytes; who derives from it says how one range is read."""

    header: Header
    n_bytes: int
    title = ""
    """The name of the file, without its folder; a link has that of its file."""
    is_far = False
    """Whether each read waits for an answer: much at a time is read from there, and ahead."""
    version: object = None
    """Which version of an object was read; None of what is no object."""

    def read(self, name: str) -> memoryview:
        """Exactly the bytes of tensor `name`."""
        return self._range(self.header.data_start + self.info(name).begin, self.info(name).n_bytes)

    def read_range(self, name: str, start_byte: int, n_bytes: int) -> memoryview:
        """The `n_bytes` of tensor `name` from `start_byte` on."""
        return self._range(self._offset(name, start_byte, n_bytes), n_bytes)

    def read_runs(self, name: str, start_bytes: Sequence[int], view: memoryview) -> None:
        """Fills `view` with as many bytes of tensor `name` from each of `start_bytes`, in rising order, on."""
        if not start_bytes:
            return
        first, n = start_bytes[0], view.nbytes // len(start_bytes)
        offset = self._offset(name, first, start_bytes[-1] - first + n) - first
        self._fill_runs([offset + start for start in start_bytes], view)

    def mapped(self, name: str, start_byte: int, n_bytes: int, spoil: Spoil) -> memoryview | None:
        """The `n_bytes` of tensor `name` from `start_byte` on where they lie, not to be written; None where they must be read.

        Where they turn out to have been other bytes than the file's, `spoil` is called once nothing refers to them.
        """
        return None

    def expect(self, name: str, start_byte: int, n_bytes: int) -> None:  # noqa: B027 - what is near is not fetched ahead
        """Says that these bytes of tensor `name` will be read, all of them: no others beside them are fetched ahead."""

    def refuse_changed(self) -> None:  # noqa: B027 - what lies in memory is as it was
        """Raises where the bytes may be other ones than at first: to be asked once all is read."""

    def identity(self) -> Iterator[tuple[object, ...]]:
        """What tells the payload from another one, without a look at its cells: what it is called, its size and its tensors."""
        tensors = [(i.name, i.dtype.name, i.shape, i.begin) for i in self.header.tensors.values()]
        yield self.title, self.n_bytes, tensors, sorted(self.header.metadata.items())

    def _offset(self, name: str, start_byte: int, n_bytes: int) -> int:
        info = self.info(name)
        if start_byte < 0 or n_bytes < 0 or start_byte + n_bytes > info.n_bytes:
            raise ParameterError(
                f"bytes {start_byte} to {start_byte + n_bytes} are outside {shown(name)}, which has {info.n_bytes}"
            )
        return self.header.data_start + info.begin + start_byte

    def _fill(self, offset: int, view: memoryview) -> None:
        view[:] = self._range(offset, view.nbytes)

    def _fill_runs(self, offsets: Sequence[int], view: memoryview) -> None:
        n = view.nbytes // len(offsets)
        for i, offset in enumerate(offsets):
            self._fill(offset, view[i * n : (i + 1) * n])

    def info(self, name: str) -> TensorInfo:
        if name not in self.header.tensors:
            if any(f"{name}.{part}" in self.header.tensors for part in ("coo_values", "crow_indices")):
                raise NotComputableError(
                    f"{shown(name)} is sparse, and here strided tensors are read alone; reductions, softmax and scans of "
                    "one file take it as it is",
                    parameter=shown(name),
                )
            raise UnknownTensorError(
                f"there is no tensor {shown(name)}{nearest(name, self.header.tensors)}", parameter=shown(name)
            )
        return self.header.tensors[name]

    def close(self) -> None:  # noqa: B027 - memory has nothing to give back
        """Gives back what it holds; buffers that were read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def _range(self, offset: int, n: int) -> memoryview: ...


class BytesPayload(_Ranges):
    """A payload in memory; what it reads are views of `buffer`, not copies."""

    def __init__(self, buffer: Buffer, limits: Limits = DEFAULT_LIMITS) -> None:
        self._view = memoryview(buffer).cast("B")
        self.n_bytes = self._view.nbytes
        self.header = parse_header(self._range, self.n_bytes, limits)

    def mapped(self, name: str, start_byte: int, n_bytes: int, spoil: Spoil) -> memoryview | None:
        return self.read_range(name, start_byte, n_bytes)

    def _range(self, offset: int, n: int) -> memoryview:
        return self._view[offset : offset + n]


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes where somebody writes to a file or replaces it."""

    n_bytes: int
    mtime_ns: int
    inode: int


def file_state(of: os.stat_result) -> FileState:
    return FileState(of.st_size, of.st_mtime_ns, of.st_ino)


class FilePayload(_Ranges):
    """A payload in a regular file; what it reads are fresh, aligned copies, and threads may read at once."""

    def __init__(self, path: StrPath, limits: Limits = DEFAULT_LIMITS) -> None:
        self._shown = shown(os.fspath(path))
        self._fd = _open_regular(path)
        self.title = os.path.basename(os.path.realpath(path) if os.path.islink(path) else os.fspath(path))
        try:
            self.state = file_state(os.fstat(self._fd))
            self.n_bytes = self.state.n_bytes
            self._refuse_unsized()
            self.header = parse_header(self._range, self.n_bytes, limits)
        except BaseException:
            self.close()
            raise

    def _refuse_unsized(self) -> None:
        """Files of /proc are regular, have size 0, and hold bytes all the same."""
        if self.n_bytes == 0:
            try:
                has_bytes = bool(os.pread(self._fd, 1, 0))
            except OSError:
                has_bytes = True
            if has_bytes:
                raise InputError(f"{self._shown} has no size, like a file of /proc; copy it to a file first")

    def _range(self, offset: int, n: int) -> memoryview:
        try:
            view = memoryview(bytearray(n))
        except (MemoryError, OverflowError) as cause:
            raise OutOfMemoryError(f"{n} bytes of {self._shown} do not fit into memory; read it in ranges") from cause
        self._fill(offset, view)
        return view

    def _fill(self, offset: int, view: memoryview) -> None:
        done, n = 0, view.nbytes
        while done < n:
            try:
                read = os.preadv(self._fd, [view[done:] if done else view], offset + done)
            except OSError as cause:
                raise self._unreadable(cause) from cause
            if read == 0:
                raise self._ended()
            done += read

    def _fill_runs(self, offsets: Sequence[int], view: memoryview) -> None:
        if len(offsets) < MANY:
            super()._fill_runs(offsets, view)
            return
        from maskserve.backends.native_runs import read_runs  # which brings torch along

        failed = read_runs(self._fd, offsets, view)
        if failed is not None:
            raise self._ended() if failed.errno is None else self._unreadable(failed)

    def mapped(self, name: str, start_byte: int, n_bytes: int, spoil: Spoil) -> memoryview | None:
        from maskserve.backends.native_maps import mapped_range  # which brings torch along

        return mapped_range(self._fd, self._offset(name, start_byte, n_bytes), n_bytes, spoil)

    def _ended(self) -> InputChangedError:
        n_bytes = os.fstat(self._fd).st_size
        return InputChangedError(f"{self._shown} changed while it was read: it ends at byte {n_bytes}")

    def _unreadable(self, cause: OSError) -> InputError:
        return _because(InputError, f"{self._shown} cannot be read: {_reason(cause)}", cause)

    def refuse_changed(self) -> None:
        now = os.fstat(self._fd)
        if now.st_size < self.n_bytes:
            raise self._ended()
        if file_state(now) != self.state:
            raise InputChangedError(f"{self._shown} changed while it was read; run again once it is written")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


class SpooledPayload(FilePayload):
    """What a stream held, in a file without a name: it has none to be told by, nor to be opened by again."""

    def __init__(self, descriptor: int, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(f"/proc/self/fd/{descriptor}", limits)
        self.title = ""  # shards of a stream that fits into memory and of one that does not belong together


def open_payload(path: StrPath, limits: Limits = DEFAULT_LIMITS) -> FilePayload:
    """The payload in the regular file at `path`; close it, or use it in a with statement."""
    return FilePayload(path, limits)


def _open_regular(path: StrPath) -> int:
    name = shown(os.fspath(path))
    try:
        # O_NONBLOCK: a FIFO without a writer would wait for one, for ever
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as cause:
        raise InputNotFoundError(f"{name} is not a path: no file name can hold such a character") from cause
    except OSError as cause:
        found = InputNotFoundError if cause.errno in _NOT_FOUND else InputError
        hint = (
            "; a pattern is not read here: name one file"
            if found is InputNotFoundError and has_magic(str(path))
            else ""
        )
        raise _because(found, f"{name} cannot be opened: {_reason(cause)}{hint}", cause) from cause
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise is_a_folder(f"{name} is a folder")
        error = InputError(f"{name} is {kind_of(mode)}; a payload is read from a regular file")
        error.errno = errno.ESPIPE  # it is none however often it is tried
        raise error
    return fd


@contextmanager
def temps_of(owner: str) -> Iterator[None]:
    """Temp files that are made inside carry this name, so that who finds one can tell whether its maker still runs."""
    token = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(token)


def temp_name() -> str:
    """A new name for what is made beside its target."""
    owner = _owner.get()
    return f"{TEMP_PREFIX}{owner}{'-' if owner else ''}{secrets.token_hex(8)}"


def save(path: StrPath, encoded: Encoded, *, exists: Exists = "error") -> bool:
    """Whether the payload was written to `path`: it is there whole and on disk, or nothing changed.

    `exists` says what to do where a file stands already: "error" raises OutputExistsError, also when the file appears
    meanwhile; "skip" leaves it and returns False. A symbolic link is followed; only regular files are replaced. An address
    is that of an object in a store.
    """
    if is_address(path):
        from maskserve.stores import writing

        refuse_other_words(exists)
        return writing.save(os.fspath(path), encoded, exists=exists)
    name = shown(os.fspath(path))
    return placed(path, lambda fd, _: _write(fd, encoded, name), exists=exists)


def placed(
    path: StrPath, make: Callable[[int, str], None], *, exists: Exists = "error", needs_name: bool = False
) -> bool:
    """Whether the file that `make(fd, path)` writes into an empty one was put at `path`; the rules are those of save.

    `needs_name`: make opens it by its path, and may put another file there.
    """
    refuse_other_words(exists)
    if is_address(path):
        from maskserve.stores import writing

        return writing.placed(os.fspath(path), make, exists=exists)
    name = shown(os.fspath(path))
    with failing(f"{name} cannot be written"):
        target = os.path.realpath(path)
        if _stands(target, name, exists):
            return False
        draft = Draft(os.path.join(os.path.dirname(target), temp_name()), needs_name=needs_name)
    try:
        make(draft.fd, draft.path)
        with failing(f"{name} cannot be written"):
            if _stands(target, name, exists) or not _put(draft, target, name, exists):
                return False
            _sync_folder(os.path.dirname(target))
        return True
    finally:
        draft.close()


def _put(draft: Draft, target: str, name: str, exists: Exists) -> bool:
    """Whether `target` now is what was made; what came meanwhile is replaced, left or an error, as `exists` says."""
    if exists == "replace":
        draft.replace(target)
        return True
    is_there = draft.link(target)
    if not is_there and exists == "error":
        raise _exists(name)
    return is_there


def refuse_other_words(exists: str) -> None:
    if exists not in EXISTS:
        raise ParameterError(
            f"exists is {shown(exists)}; give one of {', '.join(EXISTS)}", parameter="exists", allowed=EXISTS
        )


def _stands(target: str, name: str, exists: Exists) -> bool:
    """Whether a regular file stands at `target` and is to be left there."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        raise OutputError(f"{name} is {kind_of(mode)}; only a regular file is written or replaced")
    if exists == "error":
        raise _exists(name)
    return exists == "skip"


def _write(fd: int, encoded: Encoded, name: str) -> None:
    for chunk in encoded.chunks:  # its errors are its own: only those of the file become OutputError
        view = chunk
        with failing(f"{name} cannot be written"):
            while view.nbytes:
                view = view[os.write(fd, view) :]
    with failing(f"{name} cannot be written"):
        os.fsync(fd)


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as cause:
        if cause.errno != errno.EINVAL:  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(fd)


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError; what is ours already passes."""
    try:
        yield
    except OutputError:
        raise
    except ValueError as cause:
        raise OutputError(f"{what}: no file name can hold such a character") from cause
    except OSError as cause:
        raise _because(OutputError, f"{what}: {_reason(cause)}", cause) from cause


def _exists(name: str) -> OutputExistsError:
    error = OutputExistsError(f"{name} exists; say replace to overwrite it, or skip to keep it", parameter="exists")
    error.errno = errno.EEXIST
    return error


def _because(kind: type[_Error], message: str, cause: OSError) -> _Error:
    error = kind(message)
    error.errno = cause.errno
    return error


def _reason(cause: OSError) -> str:
    return cause.strerror or type(cause).__name__


def kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a symbolic link that leads to itself",
    }
    return kinds.get(stat.S_IFMT(mode), "not a regular file")
