"""Where an answer goes and in which form: decided, and refused where it cannot be, before a cell is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from maskserve.errors import OutputError, OutputExistsError, ParameterError, nearest
from maskserve.payload.files import EXISTS, Exists, failing, placed
from maskserve.payload.header import shown
from maskserve.places import is_taken
from maskserve_cli.inputs import JsonForm

STDOUT = "-"
CHUNK = 1 << 20


class Form(StrEnum):
    """The forms of an answer."""

    TABLE = "table"
    TEXT = "text"
    JSON = "json"
    SAFETENSORS = "safetensors"


FILE_FORMS = (Form.SAFETENSORS, Form.JSON)
SUFFIXES = {".safetensors": Form.SAFETENSORS, ".json": Form.JSON}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A file at `path`, or stdout where that is None; `skip`: the file stands and is to be left."""

    path: str | None
    form: Form
    exists: Exists = "error"
    skip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the common options say of the output, as given."""

    out: str | None = None
    form: str | None = None
    as_json: bool = False
    exists: str | None = None
    force: bool = False


def target(wanted: Wanted, question: JsonForm | None) -> Target:
    """Where the answer to a question of this form goes; raises where that cannot be done."""
    form, exists = asked_form(wanted), asked_exists(wanted)
    if wanted.out is not None and wanted.out != STDOUT:
        return file_target(wanted.out, form, exists)
    if form is None:
        form = stdout_form(question) if wanted.out == STDOUT else Form.TABLE if is_terminal() else Form.TEXT
    if form is Form.SAFETENSORS and is_terminal():
        raise ParameterError("safetensors is not for a terminal: give -o FILE, or pipe it on", parameter="out")
    return Target(path=None, form=form)


def asked_form(wanted: Wanted) -> Form | None:
    if wanted.form is not None and wanted.form not in tuple(Form):
        raise ParameterError(
            f"--format {shown(wanted.form)}: give one of {', '.join(Form)}{nearest(wanted.form, Form)}",
            parameter="format",
            allowed=tuple(Form),
        )
    form = None if wanted.form is None else Form(wanted.form)
    if wanted.as_json and form not in (None, Form.JSON):
        raise ParameterError(f"--json and --format {form}: give one of them", parameter="format")
    return Form.JSON if wanted.as_json else form


def asked_exists(wanted: Wanted) -> Exists:
    given = wanted.exists or ("replace" if wanted.force else "error")
    if wanted.force and given != "replace":
        raise ParameterError(f"--force and --exists {shown(given)}: give one of them", parameter="exists")
    for known in EXISTS:
        if known == given:
            return known
    raise ParameterError(
        f"--exists {shown(given)}: give one of {', '.join(EXISTS)}{nearest(given, EXISTS)}",
        parameter="exists",
        allowed=EXISTS,
    )


def stdout_form(question: JsonForm | None) -> Form:
    return Form.SAFETENSORS if question is None else Form.JSON


def file_target(path: str, form: Form | None, exists: Exists) -> Target:
    """The file at `path`, in the form that its suffix says; one that stands already is found before any work."""
    suffix = os.path.splitext(os.path.basename(path))[1]
    if suffix and suffix not in SUFFIXES:
        raise ParameterError(
            f"-o {shown(path)}: an answer is written as .safetensors, .json or with no suffix; write one of these, then "
            f"maskserve convert RESULT.safetensors {shown(path)}",
            parameter="out",
            allowed=tuple(SUFFIXES),
        )
    by_suffix = SUFFIXES.get(suffix, form or Form.SAFETENSORS)
    if form is not None and (form is not by_suffix or form not in FILE_FORMS):
        raise ParameterError(
            f"-o {shown(path)} and --format {form} do not fit: a file is {' or '.join(FILE_FORMS)}, as its suffix says",
            parameter="format",
        )
    return Target(path=path, form=by_suffix, exists=exists, skip=stands(path, exists))


def stands(path: str, exists: Exists) -> bool:
    """Whether a file is at `path` and to be left there; what else would stop the writer is an error now, not later."""
    if not is_taken(path):
        return False
    if exists == "error":
        raise OutputExistsError(
            f"{shown(path)} exists; --force replaces it, --exists skip leaves it", parameter="exists"
        )
    return exists == "skip"


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def write_text(lines: Iterable[str]) -> None:
    """Lines on stdout, as they are made."""
    if sys.stdout is None:
        raise OutputError("stdout is closed; give -o FILE")
    for line in lines:
        sys.stdout.write(line + "\n")


def write_bytes(chunks: Iterable[bytes | memoryview]) -> None:
    """Bytes on stdout, as they are made."""
    if sys.stdout is None:
        raise OutputError("stdout is closed; give -o FILE")
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()


def write_in_place(path: str, write: Callable[[int], int], exists: Exists) -> int | None:
    """How many bytes `write(descriptor)` put into the file at `path`; None where one stands that is to be left."""
    sizes = []

    def make(descriptor: int, _: str) -> None:
        sizes.append(write(descriptor))
        with failing(f"{shown(path)} cannot be written"):
            os.fsync(descriptor)

    return sizes[0] if placed(path, make, exists=exists) else None


def chunks_of(file: BinaryIO) -> Iterator[bytes]:
    """All that is in a file."""
    file.seek(0)
    while chunk := file.read(CHUNK):
        yield chunk


def bytes_text(n: int) -> str:
    """A size for people.

    >>> bytes_text(864), bytes_text(1234567)
    ('864 bytes', '1.2 MB')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} byte{'' if n == 1 else 's'}"
