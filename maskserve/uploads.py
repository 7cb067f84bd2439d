"""Cells on their way to a device: copied while the ones before are computed on, by two buffers that the device reads itself.

A buffer of pinned memory is filled, its copy is begun, and the other one is filled meanwhile. It is written again only when its
copy is done, and no third block goes to the device before the first is computed on: so memory is bounded on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from threading import local

import torch
from torch import Tensor

from maskserve.accelerators import CPU, Copies, Event, accelerators
from maskserve.pages import Pages
from maskserve.payload.variables import DATA, MASK

Block = tuple[Tensor, Tensor | None]
CHUNK_BYTES = 1 << 24
"""Bytes of a tensor in memory that a buffer takes at a time."""
LEAST_BYTES = 1 << 22
"""Bytes up to which a copy through a buffer costs more than it saves."""


class Buffer(Pages):
    """Memory that a device reads by itself; a block of a size that was there before takes no new one."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.kept: dict[str, Tensor] = {}
        self.is_copied: Event | None = None
        """Comes once the device has read the buffer."""
        self.is_computed: Event | None = None
        """Comes once the device has computed on what it has read of it."""

    def empty(self, name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        n_bytes = prod(sizes) * dtype.itemsize
        kept = self.kept.get(name)
        if kept is None or kept.numel() < n_bytes:
            kept = self.kept[name] = self.copies.pinned(n_bytes)
        return kept[:n_bytes].view(dtype).view(sizes)

    def holding(self, name: str, cells: Tensor) -> Tensor:
        """The cells in the buffer: as they are where they lie there already."""
        own = self.kept.get(name)
        if own is not None and own.untyped_storage().data_ptr() == cells.untyped_storage().data_ptr():
            return cells
        made = self.empty(name, tuple(cells.shape), cells.dtype)
        return made.copy_(cells)


class Uploads:
    """What one thread sends to a device, a block after the other."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.buffer, self.other = Buffer(copies), Buffer(copies)

    def free_buffer(self) -> Buffer:
        """The buffer that is not the last one, once it may be written."""
        self.buffer, self.other = self.other, self.buffer
        if self.buffer.is_copied is not None:
            self.buffer.is_copied.synchronize()
        return self.buffer

    def block(self, read: Callable[[Pages], Block]) -> Block:
        """The block that `read` gives, in the memory of the device; what is computed from now on waits for it."""
        if self.buffer.is_copied is not None:  # by now all is asked of the block before
            self.buffer.is_computed = self.copies.computed()
        buffer = self.free_buffer()
        data, mask = read(buffer)
        if buffer.is_computed is not None:
            buffer.is_computed.synchronize()
        parts = [(DATA, data), *([] if mask is None else [(MASK, mask)])]
        sent = [self.sent(buffer.holding(name, cells)) for name, cells in parts]
        buffer.is_copied = self.copies.joined(sent)
        return sent[0], sent[1] if mask is not None else None

    def sent(self, cells: Tensor) -> Tensor:
        made = self.copies.empty(tuple(cells.shape), cells.dtype)
        self.copies.copy(made, cells)
        return made

    def whole(self, cells: Tensor) -> Tensor:
        """A tensor of the CPU's memory in that of the device, a buffer at a time."""
        made = self.copies.empty(tuple(cells.shape), cells.dtype)
        flat, target = cells.contiguous().view(-1), made.view(-1)
        step = max(CHUNK_BYTES // cells.itemsize, 1)
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            buffer = self.free_buffer()
            self.copies.copy(target[part], buffer.holding(DATA, flat[part]))
            buffer.is_copied = self.copies.joined([])
        self.copies.joined([made])
        return made


_local = local()


def uploads_to(device: str) -> Uploads:
    """Those of this thread."""
    known: dict[str, Uploads] = _local.__dict__
    if device not in known:
        known[device] = Uploads(accelerators().copies(device))
    return known[device]


def uploaded(cells: Tensor, device: str) -> Tensor:
    """A tensor of the CPU's memory, on the device."""
    if device == CPU or cells.nbytes < LEAST_BYTES or cells.numel() == 0:
        return cells.to(device)
    return uploads_to(device).whole(cells)
