"""A job's body becomes its result: in the lane what takes the device, in another thread what takes the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from io import FileIO

from maskserve import answers
from maskserve.answers import Answer
from maskserve.errors import InputError, PayloadError
from maskserve.payload.format import Buffer, Limits, Payload
from maskserve.requests import Request
from maskserve.steps import Result as Held
from maskserve_api.forms import Form
from maskserve_api.jobs.incoming import INLINE_BYTES
from maskserve_api.jobs.job import Result
from maskserve_api.jobs.spool import Body, File, digest, open_file
from maskserve_api.work import ENCODERS, START_BYTES, decode, refuse_large_answer, refuse_large_json, refuse_misnamed


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A result that is not on disk yet: its pieces, or the file that has it."""

    n_bytes: int
    media_type: str
    chunks: Sequence[Buffer] = ()
    file: File | None = None


def opened(body: bytes | str, n_bytes: int, form: Form, limits: Limits) -> Payload:
    """The payload of a body, which is its bytes or the path of its file; InputError where it has not `n_bytes`."""
    refuse_changed(body, n_bytes)
    if isinstance(body, bytes):
        return decode(body, form, None, limits)
    if form is Form.JSON:
        refuse_large_json(n_bytes, limits)
        return decode(contents(body), form, None, limits)
    try:
        return Body(body, limits)
    except PayloadError as error:
        refuse_misnamed(contents(body, START_BYTES), form, error)
        raise


def refuse_changed(body: bytes | str, n_bytes: int) -> None:
    """A body that is not as long as its job's row says is the disk's fault, and not a malformed one of its client."""
    if isinstance(body, bytes):
        found = len(body)
    else:
        with reading(body) as file:
            found = os.fstat(file.fileno()).st_size
    if found != n_bytes:
        raise InputError(f"the body of a job has {found} bytes, and had {n_bytes} when it came")


def contents(path: str, most: int = -1) -> bytes:
    with reading(path) as file:
        return file.read(most)


@contextmanager
def reading(path: str) -> Iterator[FileIO]:
    """A file of a job, open; InputError where it cannot be read."""
    try:
        with open(open_file(path), "rb", buffering=0) as file:
            yield file
    except OSError as cause:
        error = InputError(f"a file of a job cannot be read: {cause.strerror}")
        error.errno = cause.errno
        raise error from cause


def made(
    request: Request, payload: Payload, form: Form, limits: Limits, *, memory: int, make: Callable[[], File]
) -> Made:
    """The result; one that does not fit into memory is written to a file that `make` gives, as it is computed."""
    answer = answers.run(request, payload, memory=memory)
    if form is not Form.SAFETENSORS and answer.is_streamed:
        answer = in_memory(answer, limits)
    if answer.is_streamed:
        file = make()
        try:
            return Made(n_bytes=answer.write(file.fd, "the result"), media_type=form, file=file)
        except BaseException:  # a cancelled job's, too
            file.discard()
            raise
    reply = ENCODERS[form](answer, payload, limits)
    return Made(n_bytes=reply.n_bytes, media_type=reply.media_type, chunks=reply.chunks)


def in_memory(answer: Answer, limits: Limits) -> Answer:
    """A streamed answer that is to be text, which no more than `limits` have of it may be."""
    n_bytes = sum(result.n_cells * result.dtype.n_bytes for result in answer.results)
    refuse_large_answer(n_bytes, limits)
    return replace(answer, results=tuple(r if isinstance(r, Held) else r.in_memory() for r in answer.results))


def on_disk(found: Made, make: Callable[[], File]) -> Result:
    """The result, once nothing can lose it but the store's commit: a small one goes there, a large one is a file."""
    if found.file is None and found.n_bytes <= INLINE_BYTES:
        data = b"".join(found.chunks)
        return Result(n_bytes=found.n_bytes, sha256=sha256(data).hexdigest(), media_type=found.media_type, data=data)
    file = found.file or make()
    try:
        file.write(found.chunks)
        n_bytes, sha = digest(file.temp)
        file.publish()
    except BaseException:
        file.discard()
        raise
    assert n_bytes == found.n_bytes, "what was written is what was counted"
    return Result(n_bytes=n_bytes, sha256=sha, media_type=found.media_type)
