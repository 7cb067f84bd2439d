"""What a path leads to, be it a file or an object of a store: whether something is there, and which version. Imports no torch.

Payloads are opened by `maskserve.opening` and written by `maskserve.payload.files`, wherever they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from maskserve.errors import OutputError
from maskserve.payload.files import file_state
from maskserve.payload.header import shown
from maskserve.stores.addresses import is_address


def expanded(paths: Sequence[str]) -> list[str]:
    """Paths with each folder or pattern of a store replaced by the objects that it means, sorted."""
    if not any(map(is_address, paths)):
        return list(paths)
    from maskserve.stores import listing

    return listing.expanded(paths)


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
