"""Where a question comes from: a file, a pipe or stdin; safetensors and JSON are told apart by their first bytes."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from typing import BinaryIO, Literal, TypeAlias

from maskserve.errors import InputError, OutOfMemoryError, OutputError, PayloadError
from maskserve.opening import open_any
from maskserve.payload.files import SpooledPayload
from maskserve.payload.format import BytesPayload, FilePayload, Limits, Payload
from maskserve.payload.header import is_text, shown
from maskserve.payload.held import HeldPayload
from maskserve.payload.opening import LENGTH_BYTES, decoded, is_json
from maskserve.settings import Settings
from maskserve.temporary import room_for
from maskserve_cli.exits import say

JsonForm: TypeAlias = Literal["plain", "explicit"]
STDIN = "-"
CHUNK = 1 << 20


def limits_of(settings: Settings) -> Limits:
    """What a reader accepts at most, as the settings say."""
    return Limits(
        header_bytes=settings["header_bytes"], tensors=settings["max_tensors"], json_bytes=settings["json_bytes"]
    )


def memory_of(settings: Settings) -> int:
    """The bytes of its data that a command holds at once."""
    from maskserve.cgroup import default_memory

    return settings["memory"] or default_memory()


def title(path: str) -> str:
    """What messages call the input."""
    return "stdin" if path == STDIN else shown(path)


def read(path: str, limits: Limits, memory: int | None = None) -> Payload:
    """The payload at `path`, "-" being stdin; a regular file is read where it lies, a pipe is read to its end.

    What a pipe holds beyond `memory` goes to a file in the system's folder for such ones first. What was left
    out or decided while a file of another format was read is said, a line each.
    """
    if path == STDIN:
        if sys.stdin is None:
            raise InputError("stdin is closed; give a file")
        return read_stream(sys.stdin.buffer, title(path), limits, memory)
    if is_stream(path):
        with open(path, "rb") as stream:
            return read_stream(stream, title(path), limits, memory)
    return noted(path, open_any(path, limits))


def noted(path: str, payload: Payload) -> Payload:
    """The payload, once its notes are said."""
    for note in payload.notes if isinstance(payload, HeldPayload) else ():
        say(f"{title(path)}: {note}")
    return payload


def form_of(payload: Payload) -> JsonForm | None:
    """How the question was spelled, if it was JSON; an answer comes in the form of its question."""
    return None if isinstance(payload, FilePayload) else getattr(payload, "form", None)


def is_stream(path: str) -> bool:
    """Whether `path` is a pipe, as in <(command): it can be read once and not by ranges."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # whoever opens it says what is wrong


def read_stream(stream: BinaryIO, name: str, limits: Limits, memory: int | None = None) -> Payload:
    """The payload that `stream` holds; no more is read than its header announces, and one byte to see a lie."""
    try:
        first = stream.read(LENGTH_BYTES)
        if is_json(first):
            return decoded(first + stream.read(limits.json_bytes + 1 - len(first)), limits)
        if is_text(first):
            raise PayloadError(
                "text came where a payload belongs; the command before a pipe writes safetensors with -o -"
            )
        buffer = bytearray(first)
        n_header = int.from_bytes(first, "little")
        if len(first) == LENGTH_BYTES and n_header <= limits.header_bytes:
            buffer += stream.read(n_header)
            n_bytes = announced(bytes(buffer[LENGTH_BYTES:]))
            if memory is not None and n_bytes > memory:
                return spooled(stream, buffer, len(buffer) + n_bytes + 1, limits)
            read_up_to(stream, buffer, len(buffer) + n_bytes + 1)
    except OutputError:  # there is no room to put it
        raise
    except OSError as cause:
        error = InputError(f"{name} cannot be read: {cause.strerror or cause}")
        error.errno = cause.errno
        raise error from cause
    except MemoryError as cause:
        raise OutOfMemoryError(f"{name} does not fit into memory; give it as a file, which is read in parts") from cause
    return BytesPayload(buffer, limits)


def spooled(stream: BinaryIO, begun: bytearray, n_bytes: int, limits: Limits) -> Payload:
    """What a stream holds, in a file without a name that is read in parts."""
    with room_for(n_bytes), tempfile.TemporaryFile() as file:
        file.write(begun)
        left = n_bytes - len(begun)
        while left and (chunk := stream.read(min(CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
        file.flush()
        return SpooledPayload(file.fileno(), limits)


def read_up_to(stream: BinaryIO, buffer: bytearray, n_bytes: int) -> None:
    """Append what `stream` has, until `buffer` holds `n_bytes`."""
    while len(buffer) < n_bytes and (chunk := stream.read(min(CHUNK, n_bytes - len(buffer)))):
        buffer += chunk


def announced(header: bytes) -> int:
    """The bytes that a header says will follow; 0 where it makes no sense, for the strict reader to say why."""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for entry in entries.values() if "data_offsets" in entry]
        return max([0, *(end for end in ends if type(end) is int)])
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return 0
