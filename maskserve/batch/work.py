"""What a worker of a job does: a block of inputs, each opened, computed and written; one wait for the disk for all of them."""

from __future__ import annotations

import errno
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from maskserve.batch.conversion import CONVERT
from maskserve.batch.inputs import Version, version_of_object
from maskserve.batch.ledger import Entry, Failure, remove
from maskserve.errors import DeviceLostError, InputChangedError, MaskserveError, OutputError, TooLargeError
from maskserve.payload.files import TEMP_PREFIX, temp_name, temps_of
from maskserve.payload.format import Payload
from maskserve.payload.groups import Group
from maskserve.payload.header import Limits, shown
from maskserve.payload.writing import Encoded
from maskserve.stores.addresses import is_address

if TYPE_CHECKING:
    from maskserve.answers import Answer
    from maskserve.joining import Question
    from maskserve.requests import Request

SETTLED_S = 0.02
"""A file written this short a time ago may be written again without its time telling: clocks of file systems tick every 4 ms."""
SETTLE_TRIES = 5
FAR_AT_ONCE = 8
"""Small inputs of a store that a worker does at a time."""
OF_THE_PLACE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENODEV,
        errno.ESTALE,
    }
)
"""Errors of where outputs go: what the next one would meet too."""


@dataclass(frozen=True, slots=True)
class Item:
    """One input, and where its output goes."""

    uri: str
    output: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """Inputs that a worker takes at once; `n_bytes` is what the largest of them may take of memory."""

    items: tuple[Item, ...]
    n_bytes: int

    def __str__(self) -> str:
        return " ".join(
            [shown(self.items[0].uri), *([f"and {len(self.items) - 1} more"] if len(self.items) > 1 else [])]
        )

    def split(self) -> list[Block]:
        return [Block((item,), self.n_bytes) for item in self.items]


@dataclass(frozen=True, slots=True)
class Report:
    """How a block went. An output that cannot be written is no fault of its input: the next one will fare no better."""

    done: tuple[Entry, ...]
    failed: tuple[Failure, ...]
    n_bytes: int
    unwritable: tuple[str, ...] = ()
    """The inputs that failed for their outputs alone."""


@dataclass(slots=True, kw_only=True)
class Work:
    """Runs blocks of one job; made once by the job, and once more by each worker."""

    verb: str
    words: Mapping[str, Any]
    device: str
    limits: Limits
    memory: int
    """Bytes that a worker holds of an input and its answer at once."""
    request_sha256: str
    version: str
    run: str
    stops_at_error: bool
    exit_of: Callable[[BaseException], int]
    request: Request | None = field(default=None, init=False)

    def prepare(self) -> None:
        """What every block needs: the request, and torch."""
        from maskserve import requests

        warnings.showwarning = lambda message, *_, **__: print(f"maskserve: warning: {message}", file=sys.stderr)
        if self.verb != CONVERT:
            import maskserve.answers  # noqa: F401  # here, so that a worker is ready once it can compute

            self.request = requests.build(self.verb, {**self.words, "device": self.device})
        gc.freeze()  # what the imports made stays: the collector would walk all of torch every few hundred files

    def __call__(self, block: Block) -> Report:
        with temps_of(self.run):
            return _Blockwise(self).run(block)


class _Blockwise:
    """The state of one block."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.group = Group()
        self.entries: dict[str, tuple[Item, Entry]] = {}
        self.done: list[Entry] = []
        self.failed: list[Failure] = []
        self.unwritable: list[str] = []
        self.n_bytes = 0

    def run(self, block: Block) -> Report:
        try:
            for _ in self.each(block.items):
                if self.work.stops_at_error and self.failed:
                    break
            self.commit()
        finally:
            self.group.abandon()
        return Report(tuple(self.done), tuple(self.failed), self.n_bytes, tuple(self.unwritable))

    def each(self, items: Sequence[Item]) -> Iterator[None]:
        """Does the items in turn; those of a store several at a time, since each waits for answers most of the time."""
        if len(items) == 1 or not any(is_address(path) for item in items for path in (item.uri, item.output)):
            yield from map(self.one, items)
            return
        with ThreadPoolExecutor(FAR_AT_ONCE, thread_name_prefix="maskserve-item") as pool:
            futures = [pool.submit(copy_context().run, self.one, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def one(self, item: Item) -> None:
        start_s = time.perf_counter()
        try:
            if self.work.verb == CONVERT:
                temp, (version, sha256) = "", converted(self.work, item)
            else:
                version, temp, sha256 = answered(self.work, item, self.group)
        except (
            DeviceLostError
        ):  # no fault of this input's alone: the worker ends, and each is tried by itself in another
            raise
        except Exception as error:
            self.fail(item, error)
            return
        self.n_bytes += version.n_bytes
        entry = Entry(
            uri=item.uri,
            size=version.n_bytes,
            mtime=version.mtime,
            etag=version.etag,
            request_sha256=self.work.request_sha256,
            version=self.work.version,
            output=item.output,
            output_sha256=sha256,
            attempts=item.attempts,
            seconds=round(time.perf_counter() - start_s, 6),
        )
        if temp:
            self.entries[temp] = (item, entry)
        else:
            self.done.append(entry)

    def commit(self) -> None:
        """Puts the outputs in their places, and only then calls their inputs done."""
        errors = self.group.commit()
        for temp, (item, entry) in self.entries.items():
            if temp in errors:
                self.fail(item, errors[temp])
            else:
                self.done.append(entry)

    def fail(self, item: Item, error: Exception) -> None:
        if isinstance(error, OutputError) and error.errno in OF_THE_PLACE:
            self.unwritable.append(item.uri)
        self.failed.append(failure(item, error, self.work.exit_of))


def failure(item: Item, error: BaseException, exit_of: Callable[[BaseException], int]) -> Failure:
    is_ours = isinstance(error, MaskserveError)
    return Failure(
        uri=item.uri,
        code=error.code if isinstance(error, MaskserveError) else "internal_error",
        exit=exit_of(error),
        message=str(error) if is_ours else f"{type(error).__name__}: {error}",
        attempts=item.attempts,
    )


@contextmanager
def unchanged(path: str) -> Iterator[Version]:
    """The version of a file or object, which must be the same when the block ends: a mixture of two is nobody's data."""
    if is_address(path):
        version = version_of_object(path)
        yield version
        if version_of_object(path) != version:
            raise InputChangedError(f"{shown(path)} changed while it was read; try again once it is written")
        return
    before = settled(path)
    yield Version.of(before) if before is not None else Version(0, "")  # who opens it says what is wrong
    after = status(path)
    if before is None or after is None or identity(before) != identity(after):
        raise InputChangedError(f"{shown(path)} changed while it was read; try again once it is written")


def settled(path: str) -> os.stat_result | None:
    """The status of a file that was not written just now; one that is written all the time is refused."""
    for _ in range(SETTLE_TRIES):
        found = status(path)
        if found is None or abs(time.time() - found.st_mtime) >= SETTLED_S:
            return found
        time.sleep(SETTLED_S)
    raise InputChangedError(f"{shown(path)} is being written; try again once that is done")


def status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def answered(work: Work, item: Item, group: Group) -> tuple[Version, str, str]:
    """Writes the answer to one input: what was read, the temporary name of the output where it has one, and its sha256."""
    from maskserve.joining import question
    from maskserve.opening import open_any

    request = work.request
    assert request is not None, "a worker prepares before its first block"
    read = partial(open_any, limits=work.limits)
    if is_address(item.uri):  # all its ranges are of one version, without another look
        with question(request, [item.uri], read) as asked:
            found = version_read(asked.payload)
            return (found, *put(work, request, asked, item, group))
    with unchanged(item.uri) as version, question(request, [item.uri], read) as asked:
        written = put(work, request, asked, item, group)
    return (version, *written)


def version_read(payload: Payload) -> Version:
    """The version of the object that a payload was read from."""
    version = getattr(payload, "version", None)
    assert version is not None, "what is opened at an address knows its version"
    return Version(version.n_bytes, etag=version.etag)


def put(work: Work, request: Request, asked: Question, item: Item, group: Group) -> tuple[str, str]:
    """Writes the answer; one that does not fit into memory is written as it is computed. An object has no temporary name."""
    from maskserve import answers

    answer = answers.run(request, asked.payload, asked.others, memory=work.memory)
    is_json = os.path.splitext(item.output)[1] == ".json"
    if answer.is_streamed and is_json:
        raise TooLargeError(
            f"the answer to {shown(item.uri)} does not fit into memory as JSON: name outputs .safetensors"
        )
    if is_address(item.output):
        from maskserve.stores import writing

        if answer.is_streamed:
            return "", writing.sent_by(item.output, partial(answer.write, name=item.output))
        return "", writing.sent(item.output, as_json(asked.payload, answer) if is_json else answer.encoded())
    if answer.is_streamed:
        staged = group.write_by(item.output, partial(answer.write, name=item.output))
    else:
        staged = group.write(item.output, as_json(asked.payload, answer) if is_json else answer.encoded())
    return staged.temp, staged.sha256


def as_json(payload: Payload, answer: Answer) -> Encoded:
    from maskserve.payload.json import encode

    text = memoryview(b"".join(encode(answer.outputs(), answer.metadata, getattr(payload, "form", None) or "explicit")))
    return Encoded(text.nbytes, iter([text]))


def converted(work: Work, item: Item) -> tuple[Version, str]:
    """Writes the input in the format of its output; gives the version that was read, and the sha256 of what was written."""
    from maskserve.convert.files import convert_file, place

    if is_address(item.output):
        return converted_to_store(work, item)
    temp = os.path.join(os.path.dirname(item.output), temp_name() + os.path.splitext(item.output)[1])
    try:
        with unchanged(item.uri) as version:
            convert_file(item.uri, temp, limits=work.limits, **work.words)
        sha256 = sha256_of(temp)
        place(temp, item.output)
    finally:
        remove(temp)
    return version, sha256


def converted_to_store(work: Work, item: Item) -> tuple[Version, str]:
    """As converted, by way of a file of the system's folder for temporary ones."""
    from maskserve.convert.files import convert_file
    from maskserve.stores import writing

    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX) as folder:
        temp = os.path.join(folder, "made" + os.path.splitext(item.output)[1])
        with unchanged(item.uri) as version:
            convert_file(item.uri, temp, limits=work.limits, **work.words)
        return version, writing.sent_file(item.output, temp)


def sha256_of(path: str) -> str:
    """The sha256 of a file; of a folder, that of the names and bytes of its files."""
    import hashlib

    if not os.path.isdir(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            inner = os.path.join(folder, name)
            digest.update(f"{os.path.relpath(inner, path)}\0{sha256_of(inner)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
