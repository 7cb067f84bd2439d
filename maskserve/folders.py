"""Which files a path on disk means: itself, or what a folder or a pattern has, as `maskserve.stores.listing` says of a store.

Imports no torch.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from maskserve.convert.formats import by_suffix, is_data
from maskserve.errors import InputError, InputNotFoundError
from maskserve.payload.files import kind_of
from maskserve.payload.header import shown
from maskserve.stores.addresses import compiled

Inode: TypeAlias = tuple[int, int]
Entry: TypeAlias = os.DirEntry[str]
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def is_folder(path: str) -> bool:
    """Whether a path means what lies below it. A folder that is one input, as Zarr's are, means itself."""
    return not is_input(path) and (path.endswith("/") or os.path.isdir(path))


def is_input(path: str) -> bool:
    """Whether a folder is a payload by its suffix."""
    found = by_suffix(path)
    return found is not None and found.is_folder


def matching(path: str) -> Iterator[str]:
    """The files that a path means, in any order; one that is no folder and no pattern is itself, there or not.

    Names that begin with a dot are meant only where they are spelled so. Raises InputError where a folder cannot be read.
    """
    if is_folder(path):
        yield from files(f"{glob.escape(path.rstrip('/') or '/')}/**/*")
    elif glob.has_magic(path) and not os.path.lexists(path):
        yield from files(path)
    else:
        yield os.path.normpath(path)


def files(pattern: str) -> Iterator[str]:
    """What matches, but for folders, and for what lies within an input that is one and that the pattern does not spell.

    A folder that is named like a file of data stays: whoever opens it says that it is none.
    """
    names = [name for name, after in pairwise([*pattern.split("/"), ""]) if (name, after) != ("**", "**")]
    n_spelled = next(i for i, name in enumerate(names) if glob.has_magic(name))
    for entry in below("".join(f"{name}/" for name in names[:n_spelled]), names[n_spelled:], frozenset()):
        if by_suffix(entry.path) is not None or not is_dir(entry):
            yield os.path.normpath(entry.path)


def below(folder: str, names: Sequence[str], trail: frozenset[Inode]) -> Iterator[Entry]:
    """What matches the names, one a level and ** for any number of levels; a link to a folder above is not followed."""
    own = inode_of(folder)
    if own is None or own in trail:
        return
    found, trail = entries(folder), trail | {own}
    if names[0] != "**":
        yield from among(found, names, trail)
        return
    yield from among(found, names[1:] or ["*"], trail)
    for entry in found:
        if not entry.name.startswith(".") and is_dir(entry) and not is_input(entry.path):
            yield from below(f"{entry.path}/", names, trail)


def among(found: Sequence[Entry], names: Sequence[str], trail: frozenset[Inode]) -> Iterator[Entry]:
    """What matches the names, the first of them among what a folder has."""
    matches, rest = compiled(names[0]).fullmatch, names[1:]
    for entry in found:
        if not matches(entry.name):
            continue
        if not rest:
            yield entry
        elif is_dir(entry) and not (is_input(entry.path) and glob.has_magic(names[0])):
            yield from below(f"{entry.path}/", rest, trail)


def inode_of(folder: str) -> Inode | None:
    """What tells a folder from others; None where there is none."""
    try:
        status = os.stat(folder or ".")
    except OSError as cause:
        if cause.errno in NOT_THERE:
            return None
        raise unreadable(folder, cause) from cause
    return (status.st_dev, status.st_ino)


def entries(folder: str) -> list[Entry]:
    try:
        with os.scandir(folder or ".") as found:
            return [*found]
    except NotADirectoryError:
        return []
    except OSError as cause:
        raise unreadable(folder, cause) from cause


def is_dir(entry: Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle: whoever opens it says so
        return False


def unreadable(folder: str, cause: OSError) -> InputError:
    error = InputError(f"{shown(folder.rstrip('/') or folder or '.')} cannot be read: {cause.strerror}")
    error.errno = cause.errno
    return error


def meant(path: str) -> list[str]:
    """The files that a folder or a pattern means, sorted; any other path as it is spelled."""
    if not is_folder(path) and not (glob.has_magic(path) and not os.path.lexists(path)):
        return [path]
    found = sorted({*matching(path)})
    for one in found:
        refuse_pipes(one)
    if not found:
        raise InputNotFoundError(f"{shown(path)} means no file: none is below it, or like it")
    return found


def refuse_pipes(path: str) -> None:
    """Raises where a path that nobody spelled is a pipe or a device: reading it might wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says why
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{shown(path)} is {kind_of(mode)}; a folder or a pattern means regular files")


def of_data(folder: str, found: Iterable[str], tell: Callable[[str], None]) -> Iterator[str]:
    """What was found below a folder, without files whose suffix says that they hold no tensors: those are told of."""
    others = []
    for path in found:
        if is_data(path):
            yield path
        else:
            others.append(path)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        tell(
            f"{shown(folder)}: passed over {shown(os.path.basename(min(others)))}{more}: no such suffix is read; "
            "a pattern, or its name, takes it"
        )
