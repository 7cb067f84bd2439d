"""What is done, as lines on disk that only their one writer appends to; and who still writes. Imports no torch.

Each run has a part of the ledger of its own, locked for as long as the run lives: a lock ends with its process, however
that ends, so what bears the name of a run whose part can be locked was left behind.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Self

from maskserve.batch.outputs import OWN
from maskserve.errors import OutputError, SettingsError
from maskserve.payload.files import TEMP_PREFIX, _sync_folder, failing
from maskserve.payload.header import shown
from maskserve.shards import WHOLE, Shard
from maskserve.stores.addresses import is_address

SYNC_S = 1.0
"""How old a line may be that is not on disk yet: what a power cut forgets is done again."""
ABANDONED_S = 86_400
"""Where a file system has no locks, what was not touched for a day is taken to be left behind."""
_PART = re.compile(r"part-((\d+)of(\d+)-\d{8}T\d{6}\.\d{6}Z)\.jsonl")
_TEMP = re.compile(re.escape(TEMP_PREFIX) + r"(\d+of\d+-\d{8}T\d{6}\.\d{6}Z)-.*")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An output that is on disk, and what it was made of."""

    uri: str
    size: int
    mtime: str = ""
    """Of a file."""
    etag: str = ""
    """Of an object."""
    request_sha256: str
    version: str
    output: str
    output_sha256: str
    attempts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An input that has no output, and why."""

    uri: str
    code: str
    exit: int
    message: str
    attempts: int


def as_dict(record: Entry | Failure) -> dict[str, str | int | float]:
    """What a line says: all but the time or tag that there is none of. (dataclasses.asdict takes 15 microseconds.)"""
    return {name: value for name in record.__slots__ if (value := getattr(record, name)) != ""}


def shard_name(shard: Shard) -> str:
    return f"{shard.index}of{shard.n}"


def entries(folder: str) -> dict[str, Entry]:
    """The newest entry of each input, of every part in `folder`; a line that a kill has torn is no entry."""
    if is_address(folder):
        from maskserve.batch import stored

        return stored.entries(folder)
    found: dict[str, Entry] = {}
    for path in sorted(parts(folder), key=lambda path: path.rpartition("-")[2]):
        with suppress(FileNotFoundError), open(path, "rb") as file:
            for line in file:
                entry = parsed(line)
                if entry is not None:
                    found[entry.uri] = entry
    return found


def parsed(line: bytes) -> Entry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def parts(folder: str) -> list[str]:
    """The parts of the ledger in `folder`."""
    try:
        return [os.path.join(folder, name) for name in os.listdir(folder) if _PART.fullmatch(name)]
    except FileNotFoundError:
        return []


def refuse_other(found: Iterable[Entry], request_sha256: str, version: str, to: str) -> None:
    """Raise where an output that stands is of another request, or of a version that may give other bits."""
    for entry in found:
        if entry.request_sha256 != request_sha256:
            what = "another request"
        elif entry.version != version:
            what = f"maskserve {entry.version}, and this is {version}"
        else:
            continue
        raise SettingsError(
            f"{shown(to)} has results of {what}, such as {shown(entry.output)}; give another output.to, or "
            f'output.exists = "replace" to make all of them anew',
            parameter="exists",
        )


class AnyPart(Protocol):
    """This run's part of the ledger, in a folder or in a store; it is there once it is entered, and complete once it is left."""

    run: str

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def add(self, done: Iterable[Entry]) -> None: ...
    def add_failures(self, failed: Iterable[Failure]) -> None: ...


def part_of(folder: str, shard: Shard) -> AnyPart:
    """The part of a new run."""
    if is_address(folder):
        from maskserve.batch import stored

        return stored.StoredPart(folder, shard)
    return Part(folder, shard)


def new_run(shard: Shard) -> str:
    """The name of a run that starts now; the time in it says which of two entries is newer."""
    now = time.time_ns()
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 10**9)) + f".{now // 1000 % 10**6:06d}Z"
    return f"{shard_name(shard)}-{stamp}"


def text_of(records: Iterable[Entry | Failure]) -> bytes:
    """A line for each record."""
    return "".join(json.dumps(as_dict(r), ensure_ascii=False) + "\n" for r in records).encode(
        "utf-8", "surrogateescape"
    )


class Part:
    """This run's part of the ledger: made when it is entered, locked until it ends."""

    def __init__(self, folder: str, shard: Shard) -> None:
        self._folder = folder
        self._shard = shard
        self._fd = -1
        self._synced_s = 0.0
        self.run = ""
        self.errors_path = os.path.join(folder, for_shard("errors.jsonl", shard))

    def __enter__(self) -> Part:
        with failing(f"{shown(self._folder)} cannot be written"):
            os.makedirs(self._folder, exist_ok=True)
            refuse_twin(self._folder, self._shard)
            self._create()
            self._errors = os.open(
                self.errors_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
            _sync_folder(self._folder)
        return self

    def __exit__(self, *exc: object) -> None:
        with failing(f"{shown(self._folder)} cannot be written"):
            try:
                os.fsync(self._fd)
                os.fsync(self._errors)
            finally:
                os.close(self._errors)
                os.close(self._fd)

    def _create(self) -> None:
        """A part that no other run has."""
        while self._fd < 0:
            self.run = new_run(self._shard)
            path = os.path.join(self._folder, f"part-{self.run}.jsonl")
            with suppress(FileExistsError):
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError as cause:
            if cause.errno not in _NO_LOCKS:
                raise

    def add(self, done: Iterable[Entry]) -> None:
        """Notes outputs that are on disk."""
        self._append(self._fd, done)
        if time.monotonic() - self._synced_s > SYNC_S:
            with failing("the ledger cannot be written"):
                os.fsync(self._fd)
            self._synced_s = time.monotonic()

    def add_failures(self, failed: Iterable[Failure]) -> None:
        self._append(self._errors, failed)

    def _append(self, fd: int, records: Iterable[Entry | Failure]) -> None:
        data = memoryview(text_of(records))
        with failing(f"{shown(self._folder)} cannot be written"):
            while data.nbytes:
                data = data[os.write(fd, data) :]


def for_shard(path: str, shard: Shard) -> str:
    """The path of a file that each shard writes for itself.

    >>> for_shard("out/summary.json", Shard(0, 4)), for_shard("errors.jsonl", WHOLE)
    ('out/summary-0of4.json', 'errors.jsonl')
    """
    stem, suffix = os.path.splitext(path)
    return path if shard == WHOLE else f"{stem}-{shard_name(shard)}{suffix}"


def refuse_twin(folder: str, shard: Shard) -> None:
    """Raise where another run does the same work: both would do all of it."""
    for path, run in runs(folder):
        if run.startswith(f"{shard_name(shard)}-") and is_alive(path):
            error = OutputError(f"another run of this job works here: it holds {shown(path)}; wait for it, or end it")
            error.errno = errno.EAGAIN
            raise error


def forget(folder: str, shard: Shard) -> None:
    """Removes what this shard noted before, and what was noted of other divisions into shards, unless it is being written."""
    if is_address(folder):
        from maskserve.batch import stored

        stored.forget(folder, shard)
        return
    for path, run in runs(folder):
        is_ours, of_n = run.startswith(f"{shard_name(shard)}-"), run.partition("-")[0].partition("of")[2]
        if (is_ours or of_n != str(shard.n)) and not is_alive(path):
            with failing(f"{shown(path)} cannot be removed"), suppress(FileNotFoundError):
                os.unlink(path)


def runs(folder: str) -> Iterator[tuple[str, str]]:
    for path in parts(folder):
        matched = _PART.fullmatch(os.path.basename(path))
        assert matched is not None, "parts() gives only such names"
        yield path, matched[1]


def is_alive(path: str) -> bool:
    """Whether a run still writes this part."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return is_fresh(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return is_fresh(path)
    finally:
        os.close(fd)
    return False


def is_fresh(path: str) -> bool:
    try:
        return time.time() - os.stat(path).st_mtime < ABANDONED_S
    except OSError:
        return False


def sweep(folder: str, places: Iterable[str]) -> int:
    """How many temporary files were removed that runs of this ledger have left in `places`; those of live runs stay."""
    alive: dict[str, bool] = {}
    n_removed = 0
    for place in places:
        for path, run in temps(place):
            if run not in alive:
                alive[run] = is_alive(os.path.join(folder, f"part-{run}.jsonl"))
            if not alive[run]:
                remove(path)
                n_removed += 1
    return n_removed


def sweep_run(run: str, places: Iterable[str]) -> None:
    """Removes what one run has left in `places`, once nobody works for it any more."""
    for place in places:
        for path, of_run in temps(place):
            if of_run == run:
                remove(path)


def temps(place: str) -> list[tuple[str, str]]:
    """The temporary files of runs in a folder, each with its run."""
    try:
        with os.scandir(place) as found:
            matches = [(entry.path, _TEMP.fullmatch(entry.name)) for entry in found]
    except OSError:
        return []
    return [(path, matched[1]) for path, matched in matches if matched]


def remove(path: str) -> None:
    with suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def folder_of(to: str) -> str:
    """Where the ledger of an output folder is."""
    return os.path.join(to, OWN)
