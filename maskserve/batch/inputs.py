"""Which files and objects a job reads: patterns, folders and lists, sorted, each once. Nothing is opened. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from maskserve.errors import InputError, InputNotFoundError, ParameterError, SettingsError
from maskserve.folders import matching, of_data
from maskserve.payload.header import shown
from maskserve.places import means_what_is_below
from maskserve.stores.addresses import Address, is_address, parse


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one version of a file, or of an object, from the next: its size, and its time or its tag."""

    n_bytes: int
    mtime: str = ""
    etag: str = ""

    @staticmethod
    def of(status: os.stat_result) -> Version:
        """The time as seconds with nine digits: as text, since a float has not enough of them."""
        return Version(status.st_size, f"{status.st_mtime_ns // 10**9}.{status.st_mtime_ns % 10**9:09d}")


def version_of(path: str) -> Version | None:
    """The version of what is at `path`; None where nothing can be read there: whoever opens it says why."""
    try:
        if is_address(path):
            return version_of_object(path)
        return Version.of(os.stat(path))
    except (OSError, ValueError):
        return None


def version_of_object(path: str) -> Version:
    from maskserve.stores import objects

    found = objects.version_of(path)
    return Version(found.n_bytes, etag=found.etag)


def versions_of(paths: Iterable[str], told: dict[str, Version]) -> dict[str, Version | None]:
    """The version of each path; those of objects that no listing told are asked for together."""
    paths = list(paths)
    known: dict[str, Version | None] = {**told}
    ask = [path for path in paths if is_address(path) and path not in known]
    if ask:
        from maskserve.stores.calls import at_once

        known.update(zip(ask, at_once(version_of, ask), strict=True))
    return {path: known[path] if path in known else version_of(path) for path in paths}


def identity(path: str) -> str:
    """The same for the same file or object, however it is spelled."""
    return path if is_address(path) else os.path.abspath(path)


def find(paths: tuple[str, ...], list_file: str, tell: Callable[[str], None], known: dict[str, Version]) -> list[str]:
    """Every input, sorted, each once; InputNotFoundError where there is none. What a store told of its objects goes to `known`.

    A path without a pattern is an input even where no file is: its absence is an error of its own.
    """
    found: dict[str, str] = {}
    for path in paths:
        matches = list(matching_objects(path, known) if is_address(path) else matching(path, tell))
        if means_what_is_below(path):
            matches = list(of_data(path, matches, tell))
        if not matches:
            tell(f"{shown(path)} matches nothing")
        for match in matches:
            found.setdefault(identity(match), match)
    for line in lines(list_file) if list_file else ():
        one = str(address_of(line)) if is_address(line) else os.path.normpath(line)
        found.setdefault(identity(one), one)
    if not found:
        where = [*paths, *([f"the list {list_file}"] if list_file else [])]
        raise InputNotFoundError(f"there is no input: {', '.join(map(shown, where))} match nothing in {os.getcwd()}")
    return sorted(found.values())


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
    return [line for line in said if line and not line.startswith("#")]


def matching_objects(path: str, known: dict[str, Version]) -> Iterator[str]:
    """The objects that an address means; one that is no folder and no pattern is itself, there or not."""
    address = address_of(path)
    if not address.is_many:
        yield str(address)
        return
    from maskserve.stores import listing

    found = listing.listed(address)
    known.update((uri, Version(version.n_bytes, etag=version.etag)) for uri, version in found.items())
    yield from found


def address_of(path: str) -> Address:
    """The address, which a job may write down: one that is signed would leave its secret in the ledger."""
    try:
        address = parse(path)
    except ParameterError as error:
        raise SettingsError(error.message, parameter="paths") from None
    if address.query:
        raise SettingsError(
            f"{address}: a job writes down what it has read, so its addresses are not signed (they have no ?)",
            parameter="paths",
        )
    return address
