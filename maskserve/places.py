"""What a path leads to, be it a file or an object of a store: whether something is there, and which version. Imports no torch.

Payloads are opened by `maskserve.opening` and written by `maskserve.payload.files`, wherever they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from maskserve import folders
from maskserve.errors import InputNotFoundError, OutputError, ParameterError
from maskserve.payload.files import file_state
from maskserve.payload.header import shown
from maskserve.stores.addresses import is_address, parse


def expanded(
    paths: Sequence[str], tell: Callable[[str], None] | None = None, *, takes_pipes: bool = False
) -> list[str]:
    """Paths with each folder or pattern, on disk or of a store, replaced by the files or objects that it means, sorted.

    With `tell`, what has no suffix of data is passed over below a folder, and told of. A pipe among them is an error,
    but for who takes them and says so of each.
    """
    found: list[str] = []
    for path in paths:
        below = data_below(path, tell) if tell is not None and means_what_is_below(path) else meant(path, tell)
        if not takes_pipes and below != [path]:
            refuse_pipes(below)
        found += below
    return found


def one(path: str) -> str:
    """The file or object that a path means: itself, or the only one that a folder or a pattern has."""
    found = data_below(path, lambda _: None) if means_what_is_below(path) else meant(path)
    if len(found) > 1:
        raise ParameterError(
            f"{shown(path)} means {len(found)} files, and one is read: name it, such as {shown(found[0])}",
            parameter="FILE",
        )
    if found != [path]:
        refuse_pipes(found)
    return found[0]


def refuse_pipes(found: Sequence[str]) -> None:
    """Raise where one of the files that a folder or a pattern means is a pipe or a device."""
    for path in found:
        if not is_address(path):
            folders.refuse_pipes(path)


def meant(path: str, tell: Callable[[str], None] | None = None) -> list[str]:
    """The files or objects that a path means, sorted; one that is no folder and no pattern is itself."""
    if is_address(path):
        from maskserve.stores import listing

        return listing.meant(path)
    return folders.meant(path, tell)


def means_what_is_below(path: str) -> bool:
    """Whether a path is a folder, on disk or of a store."""
    return parse(path).is_folder if is_address(path) else folders.is_folder(path)


def data_below(path: str, tell: Callable[[str], None]) -> list[str]:
    """The files or objects below a folder that may hold tensors; at least one."""
    found = list(folders.of_data(path, meant(path, tell), tell))
    if not found:
        raise InputNotFoundError(f"{shown(path)} has no file of a format that is read; name one, or give a pattern")
    return found


def is_named(path: str) -> bool:
    """Whether a word is the path of something to read: a file that exists, or any address."""
    return is_address(path) or os.path.exists(path)


def state_of(path: str) -> object:
    """What tells a file or object from the one that it was before; OSError where there is none."""
    if is_address(path):
        from maskserve.stores import objects

        return objects.version_of(path)
    return file_state(os.stat(path))


def is_taken(path: str) -> bool:
    """Whether an output stands at `path`; what else would stop its writer is an error now, not later."""
    if is_address(path):
        from maskserve.stores import writing

        return writing.is_there(path)
    check_folder(path)
    if not os.path.lexists(path):
        return False
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OutputError(f"{shown(path)} is not a regular file; only such a file is written or replaced")
    return True


def check_folder(path: str) -> None:
    """Raise where there is no folder for a file at `path`; stores have none."""
    if is_address(path):
        return
    folder = os.path.dirname(path.rstrip("/")) or "."
    try:
        has_folder = os.path.isdir(folder) and os.path.lexists(path) in (True, False)
    except ValueError:  # a name that no file can have
        has_folder = False
    if not has_folder:
        raise OutputError(f"{shown(path)} cannot be written: there is no folder {shown(folder)}; make it first")
