"""Which files a path on disk means: itself, or what a folder or a pattern has, as `maskserve.stores.listing` says of a store.

Imports no torch.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import deque
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
Tell: TypeAlias = Callable[[str], None]
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def is_folder(path: str) -> bool:
    """Whether a path means what lies below it. A folder that is one input, as Zarr's are, means itself."""
    return not is_input(path) and (path.endswith("/") or os.path.isdir(path))


def is_input(path: str) -> bool:
    """Whether a folder is a payload by its suffix."""
    found = by_suffix(path)
    return found is not None and found.is_folder


def matching(path: str, tell: Tell | None = None) -> Iterator[str]:
    """The files that a path means, in any order; one that is no folder and no pattern is itself, there or not.

    Names that begin with a dot are meant only where they are spelled so. `tell` hears of links that are passed over.
    Raises InputError where a folder cannot be read.
    """
    if is_folder(path):
        yield from files(path, f"{glob.escape(path.rstrip('/') or '/')}/**/*", tell)
    elif is_pattern(path):
        yield from files(path, path, tell)
    else:
        yield os.path.normpath(path)


def is_pattern(path: str) -> bool:
    """Whether a path stands for what is like it: one that is there means itself."""
    return glob.has_magic(path) and not os.path.lexists(path)


def files(path: str, pattern: str, tell: Tell | None) -> list[str]:
    """What matches, but for folders, and for what lies within an input that is one and that the pattern does not spell.

    A folder that is named like a file of data stays: whoever opens it says that it is none.
    """
    names = [name for name, after in pairwise([*pattern.split("/"), ""]) if (name, after) != ("**", "**")]
    n_spelled = next(i for i, name in enumerate(names) if glob.has_magic(name))
    links: list[str] = []
    matches = below("".join(f"{name}/" for name in names[:n_spelled]), names[n_spelled:], links)
    found = once([entry for entry in matches if by_suffix(entry.path) is not None or not is_dir(entry)], links)
    if links and tell is not None:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        tell(f"{shown(path)}: passed over {shown(min(links))}{more}: a link to what is read by its own name")
    return found


def below(start: str, names: Sequence[str], links: list[str]) -> Iterator[Entry]:
    """What matches the names, one a level and ** for any number of levels; each folder is read once.

    Links to folders come last, so that what lies there has its own name; those to a folder that was read go to `links`.
    A list of what is to be read holds any depth, where a call a level would not.
    """
    own, linked, seen = [(start, names)], deque[tuple[str, Sequence[str]]](), set[tuple[Inode, int]]()
    while own or linked:
        is_link = not own
        folder, left = linked.popleft() if is_link else own.pop()
        inode = inode_of(folder)
        if inode is None:
            continue
        if (inode, len(left)) in seen:
            if is_link:
                links.append(os.path.normpath(folder))
            continue
        seen.add((inode, len(left)))
        for entry, rest in steps(entries(folder), left):
            if not rest:
                yield entry
            else:
                (linked if entry.is_symlink() else own).append((f"{entry.path}/", rest))


def steps(found: Sequence[Entry], names: Sequence[str]) -> Iterator[tuple[Entry, Sequence[str]]]:
    """What the first of the names matches among what a folder has, each with the names that are left below it."""
    if names[0] == "**":
        for entry in found:
            if not entry.name.startswith(".") and is_dir(entry) and not is_input(entry.path):
                yield entry, names
        names = names[1:] or ["*"]
    matches, rest = compiled(names[0]).fullmatch, names[1:]
    for entry in found:
        if matches(entry.name) and (
            not rest or (is_dir(entry) and not (is_input(entry.path) and glob.has_magic(names[0])))
        ):
            yield entry, rest


def once(found: Sequence[Entry], links: list[str]) -> list[str]:
    """The paths, without links to a file that is there by its own name or by a link before; those go to `links`.

    Two hard links are two files: neither is the other's name, and who saves room so has the data twice all the same.
    """
    linked = sorted((entry for entry in found if entry.is_symlink()), key=lambda entry: entry.path)
    own = [entry.path for entry in found if not entry.is_symlink()]
    seen = {file_inode(path) for path in own} if linked else set()
    for entry in linked:
        inode = file_inode(entry.path)
        if inode is not None and inode in seen:
            links.append(os.path.normpath(entry.path))
        else:
            seen.add(inode)
            own.append(entry.path)
    return [os.path.normpath(path) for path in own]


def file_inode(path: str) -> Inode | None:
    """What tells a file from others; None where there is none: whoever opens it says so."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino)


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


def meant(path: str, tell: Tell | None = None) -> list[str]:
    """The files that a folder or a pattern means, sorted; any other path as it is spelled."""
    if not is_folder(path) and not is_pattern(path):
        return [path]
    found = sorted({*matching(path, tell)})
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
        error = InputError(f"{shown(path)} is {kind_of(mode)}; a folder or a pattern means regular files")
        error.errno = errno.ESPIPE  # it is none however often it is tried
        raise error


def of_data(folder: str, found: Iterable[str], tell: Tell) -> Iterator[str]:
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
