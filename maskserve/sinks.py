"""Where answers go that do not fit into memory: their places are known before their cells, which are written as they come."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from maskserve.payload.files import failing
from maskserve.payload.header import Shape, shown
from maskserve.payload.writing import Output, places
from maskserve.regions import InPlace
from maskserve.sources import Window, runs
from maskserve.steps import Result

Put: TypeAlias = Callable[[memoryview, int], None]
"""Writes bytes at an offset of the file."""
NO_ROOM_HELD = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
"""What file systems answer that cannot hold room for a file; then a full one is met while writing."""


class InParts(Protocol):
    """Tensors whose cells come while they are written."""

    def outputs(self) -> Iterator[Output]:
        """The tensors, without bytes yet."""
        ...

    def windows(self) -> Iterator[InPlace]:
        """All their cells, once."""
        ...


def write(descriptor: int, name: str, results: Iterable[Result | InParts], metadata: Mapping[str, str]) -> int:
    """The payload's bytes, once it is in the file; it takes all its room first, so that a full disk is met at once.

    `name` is what messages call the file.
    """
    results = tuple(results)
    outputs = [out for result in results for out in result.outputs()]
    header, starts, n_bytes = places(outputs, metadata)

    def put(view: memoryview, offset: int) -> None:
        with failing(f"{shown(name)} cannot be written"):
            while view.nbytes:
                n = os.pwrite(descriptor, view, offset)
                view, offset = view[n:], offset + n

    with failing(f"{shown(name)} cannot be written"):
        hold_room(descriptor, n_bytes)
    put(memoryview(header), 0)
    for result in results:
        if isinstance(result, Result):
            for out in result.outputs():
                put(cells_of(out), starts[out.name])
            continue
        for part in result.windows():
            write_window(put, part.cells, starts[part.name], part.shape, full(part.shape, part.where))
    return n_bytes


def hold_room(descriptor: int, n_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in NO_ROOM_HELD:
            raise
        os.ftruncate(descriptor, n_bytes)


def full(shape: Shape, where: Window) -> Window:
    return tuple(slice(0, n) if s == slice(None) else s for n, s in zip(shape, where, strict=True))


def write_window(put: Put, cells: Tensor, begin: int, shape: Shape, where: Window) -> None:
    """A window of a tensor that begins at a byte of the file."""
    width, raw = cells.element_size(), cells.contiguous().reshape(-1).view(torch.uint8).numpy().data
    done = 0
    for n_cells, starts in runs(shape, where):
        n = n_cells * width
        for start in starts:
            put(raw[done : done + n], begin + start * width)
            done += n


def cells_of(out: Output) -> memoryview:
    assert isinstance(out.chunks, bytes | bytearray | memoryview), "a computed tensor is one buffer"
    return memoryview(out.chunks).cast("B")
