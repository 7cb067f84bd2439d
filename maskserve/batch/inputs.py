"""Which files a job reads: patterns, folders and lists, sorted, each once. Nothing is opened. Imports no torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from maskserve.errors import InputError, InputNotFoundError, SettingsError
from maskserve.payload.header import shown


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one version of a file from the next."""

    n_bytes: int
    mtime: str

    @staticmethod
    def of(status: os.stat_result) -> Version:
        """The time as seconds with nine digits: as text, since a float has not enough of them."""
        return Version(status.st_size, f"{status.st_mtime_ns // 10**9}.{status.st_mtime_ns % 10**9:09d}")


def version_of(path: str) -> Version | None:
    """The version of the file at `path`; None where there is none that can be read: whoever opens it says why."""
    try:
        return Version.of(os.stat(path))
    except (OSError, ValueError):
        return None


def find(paths: tuple[str, ...], list_file: str, tell: Callable[[str], None]) -> list[str]:
    """Every input, sorted, each once; InputNotFoundError where there is none.

    A path without a pattern is an input even where no file is: its absence is an error of its own.
    """
    found: dict[str, str] = {}
    for path in paths:
        matches = list(matching(path))
        if not matches:
            tell(f"{shown(path)} matches nothing")
        for match in matches:
            found.setdefault(os.path.abspath(match), match)
    for line in lines(list_file) if list_file else ():
        found.setdefault(os.path.abspath(line), os.path.normpath(line))
    if not found:
        where = [*paths, *([f"the list {list_file}"] if list_file else [])]
        raise InputNotFoundError(f"there is no input: {', '.join(map(shown, where))} match nothing in {os.getcwd()}")
    return sorted(found.values())


def matching(path: str) -> Iterator[str]:
    refuse_store(path)
    if path.endswith("/"):
        path = f"{glob.escape(path)}**/*"
        yield from (found for found in glob.iglob(path, recursive=True) if not os.path.isdir(found))
    elif glob.has_magic(path) and not os.path.lexists(path):
        yield from map(os.path.normpath, glob.iglob(path, recursive=True))
    else:
        yield os.path.normpath(path)


def lines(list_file: str) -> list[str]:
    """The paths in a file, one a line; empty lines and those that begin with # are passed over."""
    try:
        with open(list_file, encoding="utf-8", errors="surrogateescape") as file:
            said = [line.strip() for line in file]
    except OSError as cause:
        kind = InputNotFoundError if isinstance(cause, FileNotFoundError) else InputError
        error = kind(f"{shown(list_file)} cannot be read: {cause.strerror}")
        error.errno = cause.errno
        raise error from cause
    found = [line for line in said if line and not line.startswith("#")]
    for line in found:
        refuse_store(line)
    return found


def refuse_store(path: str) -> None:
    if "://" in path:
        raise SettingsError(
            f"{shown(path)}: this version reads files of a file system; mount the store, or fetch its objects first",
            parameter="paths",
        )
