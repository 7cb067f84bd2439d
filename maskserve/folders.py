"""Which files a path on disk means: itself, or what a folder or a pattern has, as `maskserve.stores.listing` says of a store.

Imports no torch.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator

from maskserve.convert.formats import by_suffix, is_data
from maskserve.errors import InputNotFoundError
from maskserve.payload.header import shown


def is_folder(path: str) -> bool:
    """Whether a path means what lies below it. A folder that is one input, as Zarr's are, means itself."""
    return not is_input(path) and (path.endswith("/") or os.path.isdir(path))


def is_input(path: str) -> bool:
    """Whether a folder is a payload by its suffix."""
    found = by_suffix(path)
    return found is not None and found.is_folder


def matching(path: str) -> Iterator[str]:
    """The files that a path means, in any order; one that is no folder and no pattern is itself, there or not.

    Names that begin with a dot are meant only where they are spelled so.
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
    spelled = inputs_above(pattern)
    for found in glob.iglob(pattern, recursive=True):
        if inputs_above(found) == spelled and (by_suffix(found) is not None or not os.path.isdir(found)):
            yield os.path.normpath(found)


def inputs_above(path: str) -> int:
    return sum(map(is_input, path.split("/")[:-1]))


def meant(path: str) -> list[str]:
    """The files that a folder or a pattern means, sorted; any other path as it is spelled."""
    if not is_folder(path) and not (glob.has_magic(path) and not os.path.lexists(path)):
        return [path]
    found = sorted(matching(path))
    if not found:
        raise InputNotFoundError(f"{shown(path)} means no file: none is below it, or like it")
    return found


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
