"""Files of other formats as payloads, and from one format to another: what the library and the command line call."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from maskserve.convert.dataset import Dataset, DataVariable, Reading, Writing
from maskserve.convert.formats import FORMATS, Format, by_name, by_suffix, module_of, suffix_of
from maskserve.convert.payloads import dataset_of, payload_of
from maskserve.convert.sizes import readable_bytes
from maskserve.dtypes import DType
from maskserve.errors import (
    InputError,
    InputNotFoundError,
    MaskserveError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    ParameterError,
    PayloadError,
)
from maskserve.payload.files import (
    EXISTS,
    Exists,
    Payload,
    StrPath,
    _open_regular,
    _stands,
    failing,
    placed,
    temp_name,
)
from maskserve.payload.header import DEFAULT_LIMITS, Limits, shown
from maskserve.payload.held import HeldPayload, refuse_other_masks
from maskserve.payload.metadata import Means, Pairs
from maskserve.payload.opening import open_own
from maskserve.payload.variables import resolve
from maskserve.stores.addresses import is_address


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One variable of a conversion, as it stands in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    dims: tuple[str, ...] | None
    n_masked: int

    @property
    def n_cells(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion did; `notes` say what was left out or decided, a line each. Not written: a file stood there."""

    written: bool
    format: str
    variables: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()


# -- in -----------------------------------------------------------------------------------------------------------


def open_foreign(
    path: StrPath,
    limits: Limits = DEFAULT_LIMITS,
    *,
    columns: Collection[str] | None = None,
    memory: int | None = None,
) -> HeldPayload:
    """The payload that a file of another format holds, by its suffix.

    columns: those of a table that are wanted, all of numbers. memory: the bytes that its cells may take.
    """
    name = os.fspath(path)
    row = by_suffix(name)
    assert row is not None, "who calls this has looked at the suffix"
    if columns is not None and not row.is_table:
        raise columns_of_no_table(row)
    check_there(name, row)
    module = module_of(row, "reading")
    reading = Reading(
        columns=None if columns is None else tuple(dict.fromkeys(columns)),
        memory=readable_bytes() if memory is None else memory,
    )
    with bad_data(row):
        dataset = module.read(name, reading)
    return payload_of(dataset, row, limits)


def columns_of_no_table(row: Format) -> ParameterError:
    tables = ", ".join(known.name for known in FORMATS if known.is_table)
    return ParameterError(
        f"columns are those of a table ({tables}), not of {row.name}; use tensor", parameter="columns"
    )


def check_there(path: str, row: Format) -> None:
    """Raise where there is no file, or no folder for a format that is one; its libraries say less clearly what is wrong."""
    if not row.is_folder:
        os.close(_open_regular(path))
    elif not os.path.exists(path):
        raise InputNotFoundError(f"{shown(path)} cannot be opened: No such file or directory")
    elif not os.path.isdir(path):
        raise InputError(f"{shown(path)} is not a folder, and {row.name} is read from one")
    elif not os.access(path, os.R_OK | os.X_OK):
        error = InputError(f"{shown(path)} cannot be opened: Permission denied")
        error.errno = errno.EACCES
        raise error


@contextmanager
def bad_data(row: Format) -> Iterator[None]:
    """Whatever a library raises at bytes that it cannot read is bad data, in one line."""
    try:
        yield
    except MaskserveError:
        raise
    except MemoryError as cause:
        raise OutOfMemoryError(f"the {row.name} file does not fit into memory; read a part of it") from cause
    except Exception as cause:  # damaged bytes make libraries raise anything: struct.error, KeyError, their own
        raise PayloadError(f"it cannot be read as {row.name}: {reason(cause)}") from cause


def reason(cause: BaseException) -> str:
    """The first line of what a library says."""
    first = str(cause).strip().splitlines()[:1]
    return shown(first[0]) if first else type(cause).__name__


# -- out ----------------------------------------------------------------------------------------------------------


def convert_file(
    source: StrPath,
    target: StrPath,
    *,
    columns: Collection[str] | None = None,
    tensor: Collection[str] | None = None,
    fill_value: int | float | None = None,
    mask: str | Pairs | None = None,
    mask_means: Means | None = None,
    exists: Exists = "error",
    to: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    memory: int | None = None,
) -> Converted:
    """Write the variables of one file into another, each in the format that its suffix says, with their masks.

    columns: those of a table to read. tensor: the variables to write. fill_value: what stands for masked cells where
    the format has no masks; by default a value that no valid cell has. mask, mask_means: as in `load`. exists: what to do
    where `target` stands already. to: the format, where the suffix of `target` says none. memory: the bytes that the
    cells of `source` may take, by default half of what is free.
    """
    row = target_format(os.fspath(target), to)
    check_words(row, exists, fill_value)
    if stands(os.fspath(target), row, exists):
        return Converted(written=False, format=row.name)
    with opened(source, limits, columns, memory) as payload:
        done = convert_payload(
            payload, target, row, tensor=tensor, fill_value=fill_value, mask=mask, mask_means=mask_means, exists=exists
        )
        return replace(done, notes=(*getattr(payload, "notes", ()), *done.notes))


def opened(source: StrPath, limits: Limits, columns: Collection[str] | None, memory: int | None) -> Payload:
    row = by_suffix(os.fspath(source))
    if row is not None and not row.is_ours:
        return open_foreign(source, limits, columns=columns, memory=memory)
    if columns is not None:
        raise columns_of_no_table(row or FORMATS[0])
    return open_own(source, limits)


def convert_payload(
    payload: Payload,
    target: StrPath,
    row: Format,
    *,
    tensor: Collection[str] | None = None,
    fill_value: int | float | None = None,
    mask: str | Pairs | None = None,
    mask_means: Means | None = None,
    exists: Exists = "error",
) -> Converted:
    """Write the variables of a payload in the format of `row`; its own notes are for who opened it to say."""
    refuse_in_store(os.fspath(target), row)
    module = module_of(row, "writing")
    refuse_other_masks(payload, mask, mask_means)
    variables = resolve(payload.header, mask=mask, mask_means=mask_means, tensors=tensor)
    dataset = dataset_of(payload, variables, with_sides=tensor is None)
    notes: list[str] = []
    make = partial(made, module, dataset, Writing(fill_value=fill_value), notes)
    place = placed_folder if row.is_folder else placed_file
    is_written = place(os.fspath(target), make, exists)
    return Converted(
        written=is_written,
        format=row.name,
        variables=tuple(map(written, dataset.variables)),
        notes=tuple(notes) if is_written else (),
    )


def made(module: Any, dataset: Dataset, writing: Writing, notes: list[str], path: str) -> None:
    notes += module.write(dataset, path, writing)


def written(variable: DataVariable) -> Written:
    n_masked = 0 if variable.valid is None else variable.valid.size - int(variable.valid.sum())
    return Written(
        name=variable.name, dtype=variable.dtype, shape=variable.shape, dims=variable.dims, n_masked=n_masked
    )


def target_format(path: str, to: str | None) -> Format:
    """The format to write: what the suffix says, else `to`, else safetensors where there is no suffix."""
    by_path = by_suffix(path)
    row = by_path if to is None else by_name(to)
    if row is None and suffix_of(path):
        raise ParameterError(
            f"{shown(path)}: no format has this suffix; say which it is with to: {', '.join(f.name for f in FORMATS)}",
            parameter="to",
            allowed=[f.name for f in FORMATS],
        )
    if by_path is not None and row is not by_path:
        assert row is not None
        raise ParameterError(f"{shown(path)} is {by_path.name} by its suffix, and to says {row.name}", parameter="to")
    return row or FORMATS[0]


def check_words(row: Format, exists: str, fill_value: object) -> None:
    if exists not in EXISTS:
        raise ParameterError(
            f"exists is {shown(exists)}; give one of {', '.join(EXISTS)}", parameter="exists", allowed=EXISTS
        )
    if fill_value is not None and row.holds_masks:
        raise ParameterError(
            f"fill_value stands for masked cells in formats without masks, and {row.name} has them; leave it out",
            parameter="fill_value",
        )


def refuse_in_store(path: str, row: Format) -> None:
    """Raise where a format would go to a store, from which it could not be read."""
    if not is_address(path):
        return
    if row.is_folder:
        raise OutputError(f"{shown(path)}: {row.name} is a folder of files; write it to a file system")
    if not row.is_ours:
        raise OutputError(f"{shown(path)}: {row.name} cannot be read from a store; write it to a file system")


def stands(path: str, row: Format, exists: Exists) -> bool:
    """Whether a file is at `path` and to be left there; a folder only where the format is one."""
    if is_address(path):
        from maskserve.stores import writing

        refuse_in_store(path, row)
        return writing.stands(path, exists)
    if row.is_folder:
        return folder_stands(os.path.realpath(path), exists)
    with failing(f"{shown(path)} cannot be written"):
        return _stands(os.path.realpath(path), shown(path), exists)


def placed_file(path: str, make: Any, exists: Exists) -> bool:
    """Whether what `make(path)` writes was put at `path`, whole and on disk."""

    def write(fd: int, temp: str) -> None:
        with unwritable(path):
            make(temp)
        with failing(f"{shown(path)} cannot be written"):
            sync(temp)

    return placed(path, write, exists=exists, needs_name=True)


@contextmanager
def unwritable(path: str) -> Iterator[None]:
    """What a library raises while it writes is that the file cannot be written, in one line."""
    try:
        yield
    except (MaskserveError, MemoryError):
        raise
    except Exception as cause:  # errors of their own: GDAL's, Arrow's, HDF5's RuntimeError
        error = OutputError(f"{shown(path)} cannot be written: {reason(cause)}")
        error.errno = getattr(cause, "errno", None)
        raise error from cause


def sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def folder_stands(path: str, exists: Exists) -> bool:
    if not os.path.lexists(path):
        return False
    if not os.path.isdir(path):
        raise OutputError(f"{shown(path)} is not a folder; only a folder is replaced by one")
    if exists == "error":
        raise OutputExistsError(
            f"{shown(path)} exists; say replace to overwrite it, or skip to keep it", parameter="exists"
        )
    if exists == "replace" and not any(os.path.exists(os.path.join(path, mark)) for mark in MARKS):
        raise OutputError(f"{shown(path)} is a folder, but not of zarr; only such a one is replaced")
    return exists == "skip"


MARKS = (".zgroup", ".zarray", "zarr.json")
"""A folder with one of them is Zarr's."""


def placed_folder(path: str, make: Any, exists: Exists) -> bool:
    """As placed_file, for a folder: made beside `path` and renamed; one that stood there is moved away first."""
    target = os.path.realpath(path)
    if folder_stands(target, exists):
        return False
    beside = os.path.join(os.path.dirname(target), temp_name())
    old = f"{beside}-old"
    try:
        with unwritable(path):
            make(beside)
        with failing(f"{shown(path)} cannot be written"):
            for folder, _, names in os.walk(beside):
                for name in (*names, "."):
                    sync(os.path.join(folder, name))
            swap(beside, target, old)
            sync(os.path.dirname(target))
        return True
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if os.path.isdir(target):
            shutil.rmtree(old, ignore_errors=True)


def place(made: str, path: str) -> None:
    """Renames a file or folder of ours, which is on disk, to `path`, over one of its kind; both are in one folder."""
    target = os.path.realpath(path)
    is_folder = os.path.isdir(made)
    with failing(f"{shown(path)} cannot be written"):
        if is_folder:
            folder_stands(target, "replace")
            old = os.path.join(os.path.dirname(target), f"{temp_name()}-old")
            swap(made, target, old)
            shutil.rmtree(old, ignore_errors=True)
        else:
            _stands(target, shown(path), "replace")
            os.replace(made, target)
        sync(os.path.dirname(target))


def swap(new: str, target: str, old: str) -> None:
    """`new` becomes `target`, and what stood there `old`; where that fails, it is put back."""
    if os.path.isdir(target):
        os.rename(target, old)
    try:
        os.rename(new, target)  # not over a folder that came meanwhile, unless that is empty
    except OSError:
        if os.path.isdir(old):
            os.rename(old, target)
        raise
