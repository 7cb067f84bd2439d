"""Cells that are not in memory: a variable of a payload, read window by window where a computation asks for it.

A source is row-major, so that what is cut along its first dims is one run of bytes; windows that are cut further inside
are several. Nothing of a source is larger in memory than the window asked for.
"""

from __future__ import annotations

import errno
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from maskserve.accelerators import CPU
from maskserve.blocks import covering
from maskserve.dtypes import boolean
from maskserve.errors import InputError
from maskserve.execution import execution
from maskserve.gates import are_bools
from maskserve.loading import without_fill
from maskserve.pages import Pages
from maskserve.payload.format import Payload
from maskserve.payload.header import TensorInfo
from maskserve.payload.slices import FEW_BYTES, Validity, validity
from maskserve.payload.tensors import refuse_other_bytes, tensor_of
from maskserve.payload.variables import DATA, MASK, MaskKind, MaskSource, Variable
from maskserve.sides import Side
from maskserve.uploads import uploads_to

Shape: TypeAlias = tuple[int, ...]
Masked: TypeAlias = tuple[Tensor, Tensor | None]
Window: TypeAlias = tuple[slice, ...]
Read: TypeAlias = Callable[[Sequence[int], Tensor], None]
"""Fills a flat tensor with as many cells from each of some flat indices on."""

MOST_RUNS = 1 << 16
"""Runs that are told at once: a number in a list takes 40 bytes, and a run may be one cell."""


class Source(ABC):
    """Cells and their mask, of a shape, that are read by windows."""

    shape: Shape
    dtype: torch.dtype
    is_masked: bool
    is_far = False
    """Whether each read waits for an answer."""

    def expect(self, start: int, n: int) -> None:  # noqa: B027 - what is near is not fetched ahead
        """Says that the `n` cells from a flat index on will be read."""

    @abstractmethod
    def window(self, where: Window) -> Masked:
        """The cells of a window and their mask, in memory of their own."""

    @abstractmethod
    def folded(self, shape: Shape) -> Source:
        """The same cells in the same order, seen in another shape."""

    @property
    def cell_bytes(self) -> int:
        """The bytes of a cell and its mask."""
        return self.dtype.itemsize + self.is_masked

    def whole(self) -> Masked:
        return self.window(tuple(slice(0, n) for n in self.shape))


class Stored(Source):
    """The cells of a payload's variable; those that equal `fill` are masked."""

    def __init__(
        self, cells: Read, valid: Read | None, dtype: torch.dtype, shape: Shape, fill: float | None = None,
        lies: Lies | None = None, expects: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        self.cells, self.valid, self.dtype, self.shape, self.fill, self.lies = cells, valid, dtype, shape, fill, lies
        self.expects, self.is_far = expects, expects is not None
        self.tick = execution().tick  # of whoever asks for the source: threads that read have no context of their own
        self.is_masked = valid is not None or fill is not None

    def folded(self, shape: Shape) -> Stored:
        return Stored(self.cells, self.valid, self.dtype, shape, self.fill, self.lies, self.expects)

    def expect(self, start: int, n: int) -> None:
        if self.expects is not None:
            self.expects(start, n)

    def window(self, where: Window) -> Masked:
        return self.read(where, Pages())

    def read(self, where: Window, pages: Pages) -> Masked:
        """The cells of a window and their mask, in these pages."""
        sizes = tuple(s.stop - s.start for s in where)
        data = pages.empty(DATA, sizes, self.dtype)
        mask = None if self.valid is None else pages.empty(MASK, sizes, torch.bool)
        done = 0
        for n, starts in runs(self.shape, where):
            part = slice(done, done + n * len(starts))
            self.cells(starts, data.view(-1)[part])
            if self.valid is not None and mask is not None:
                self.valid(starts, mask.view(-1)[part])
            done = part.stop
        if self.tick is not None:
            self.tick(data.nbytes + (0 if mask is None else mask.nbytes))
        return data, without_fill(data, mask, self.fill)

    def seen(self, where: Window) -> Masked | None:
        """The cells of a window and their mask where they lie; None where they are to be read.

        They must not be written to, and count once refuse_spoilt has passed alone.
        """
        sizes = tuple(s.stop - s.start for s in where)
        if self.lies is None or 0 in sizes:
            return None
        steps = [prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        first = sum(s.start * step for s, step in zip(where, steps, strict=True))
        n = 1 + sum((s.stop - 1) * step for s, step in zip(where, steps, strict=True)) - first
        found = self.lies.seen(first, n)
        if found is None:
            return None
        data, mask = (None if part is None else part.as_strided(sizes, steps) for part in found)
        assert data is not None
        data, mask = self.lies.checked(data, mask)
        if self.tick is not None:
            self.tick(prod(sizes) * self.cell_bytes)
        return data, without_fill(data, mask, self.fill)

    def refuse_spoilt(self) -> None:
        """Raises where cells that were seen were not all the file's."""
        if self.lies is not None:
            self.lies.refuse_spoilt()


def runs(shape: Shape, where: Window) -> Iterator[tuple[int, Sequence[int]]]:
    """How long each run of a window that lies in one piece is, and where in row-major order some of them start.

    >>> [*runs((4, 3, 5), (slice(1, 3), slice(0, 2), slice(0, 5)))], [*runs((4, 3), (slice(1, 3), slice(0, 3)))]
    ([(10, [15, 30])], [(6, [3])])
    """
    split = len(shape)
    while split and where[split - 1] == slice(0, shape[split - 1]):
        split -= 1
    split = max(split - 1, 0)  # the first dim that is cut, from the right, is still one run
    steps = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(s.start * step for s, step in zip(where[split:], steps[split:], strict=True))
    n = prod(s.stop - s.start for s in where[split:])
    if not all(s.stop > s.start for s in where):
        return
    outer = [range(s.start * step, s.stop * step, step) for s, step in zip(where[:split], steps, strict=False)]
    starts = (first + sum(places) for places in product(*outer))
    while some := [*islice(starts, MOST_RUNS)]:
        yield n, some


# -- what a payload holds -----------------------------------------------------------------------------------------


def stored(payload: Payload, variable: Variable, fill: float | None = None) -> Stored:
    """A variable of a payload that is read where it lies."""
    info, mask = variable.info, variable.mask
    dtype = getattr(torch, info.dtype.torch)
    valid = None if mask is None else validity_of(payload, info, mask)
    is_plain = mask is None or (mask.kind is MaskKind.BOOL and mask.info.shape == info.shape)
    lies = Lies(payload, info, mask) if is_plain and sys.byteorder == "little" else None
    expects = partial(expect_cells, payload, info, mask) if payload.is_far else None
    return Stored(partial(read_cells, payload, info), valid, dtype, info.shape, fill, lies, expects)


@dataclass(slots=True)
class Lies:
    """Where the cells of a variable lie, and a mask of its shape beside them."""

    payload: Payload
    info: TensorInfo
    mask: MaskSource | None
    is_spoilt: bool = False

    def seen(self, start: int, n: int) -> Masked | None:
        """`n` cells from a flat index on, and the bytes of their mask; None where the payload does not show them."""
        self.refuse_spoilt()
        data = self._seen(self.info, start, n)
        if data is None or self.mask is None:
            return None if data is None else (data, None)
        mask = self._seen(self.mask.info, start, n)
        return None if mask is None else (data, mask)

    def _seen(self, info: TensorInfo, start: int, n: int) -> Tensor | None:
        width = info.dtype.n_bytes
        view = self.payload.mapped(info.name, start * width, n * width, self.spoil)
        if view is None or np.frombuffer(view, np.uint8).ctypes.data % width:
            return None
        return tensor_of(view, info.dtype, (n,)).view(getattr(torch, info.dtype.torch))

    def spoil(self) -> None:
        self.is_spoilt = True

    def refuse_spoilt(self) -> None:
        if self.is_spoilt:
            self.payload.refuse_changed()
            raise InputError(f"the file of {self.info.name} cannot be read: {os.strerror(errno.EIO)}")

    def checked(self, data: Tensor, mask: Tensor | None) -> Masked:
        if self.info.dtype is boolean and not are_bools(data):
            refuse_other_bytes(data, self.info.name, is_mask=False)
        if self.mask is None or mask is None:
            return data, None
        if not are_bools(mask):
            refuse_other_bytes(mask, self.mask.info.name, is_mask=True)
        return data, ~mask if self.mask.means == "missing" else mask


def read_cells(payload: Payload, info: TensorInfo, starts: Sequence[int], into: Tensor) -> None:
    width, raw = info.dtype.n_bytes, into.view(torch.uint8)
    payload.read_runs(info.name, [start * width for start in starts], raw.numpy().data)
    if info.dtype is boolean:
        refuse_other_bytes(raw, info.name, is_mask=False)


def expect_cells(payload: Payload, info: TensorInfo, mask: MaskSource | None, start: int, n: int) -> None:
    payload.expect(info.name, start * info.dtype.n_bytes, n * info.dtype.n_bytes)
    if mask is not None and mask.kind is MaskKind.BOOL and mask.info.shape == info.shape:
        payload.expect(mask.info.name, start, n)


def validity_of(payload: Payload, of: TensorInfo, mask: MaskSource) -> Read:
    """Which cells of a variable are valid: a mask of its shape is read where it lies, a small one once."""
    if mask.kind is MaskKind.BOOL and mask.info.shape == of.shape:
        return partial(read_mask, payload, mask)
    return partial(by_run, validity(payload, of, mask))


def read_mask(payload: Payload, mask: MaskSource, starts: Sequence[int], into: Tensor) -> None:
    raw = into.view(torch.uint8)
    payload.read_runs(mask.info.name, starts, raw.numpy().data)
    refuse_other_bytes(raw, mask.info.name, is_mask=True)
    if mask.means == "missing":
        into.logical_not_()


def by_run(valid: Validity, starts: Sequence[int], into: Tensor) -> None:
    """Runs one after the other."""
    n, cells = into.numel() // max(len(starts), 1), into.numpy()
    for i, start in enumerate(starts):
        cells[i * n : (i + 1) * n] = valid(start, n)


class Folded(Source):
    """A source in another shape of as many cells, by boxes of its own dims."""

    def __init__(self, of: Source, shape: Shape) -> None:
        self.of, self.shape, self.dtype, self.is_masked = of, shape, of.dtype, of.is_masked

    @property
    def cell_bytes(self) -> int:
        return self.of.cell_bytes

    def window(self, where: Window) -> Masked:
        box, sizes, exact = covering(self.of.shape, self.shape, where)
        parts = cut_at_rows(self.of.shape, self.shape, where) if prod(sizes) > MOST_AROUND * n_cells(where) else None
        if parts is not None:
            dim, halves = parts
            (left, left_mask), (right, right_mask) = map(self.window, halves)
            masks = [mask for mask in (left_mask, right_mask) if mask is not None]
            return torch.cat([left, right], dim), torch.cat(masks, dim) if masks else None
        data, mask = self.of.window(box)
        return data.reshape(sizes)[exact], None if mask is None else mask.expand(data.shape).reshape(sizes)[exact]

    def folded(self, shape: Shape) -> Source:
        return self.of.folded(shape)


MOST_AROUND = 2
"""How many times its cells the box of a window may hold; a window that lies across long rows is cut where one ends."""


def n_cells(where: Window) -> int:
    return prod(s.stop - s.start for s in where)


def cut_at_rows(shape: Shape, folded: Shape, where: Window) -> tuple[int, tuple[Window, Window]] | None:
    """A window cut in two where a row of the dims behind ends, with the dim that is cut; None where none is cut inside.

    >>> dim, halves = cut_at_rows((2, 100), (200,), (slice(99, 102),))
    >>> halves
    ((slice(99, 100, None),), (slice(100, 102, None),))
    """
    dim = 0
    for at, (size, wanted) in enumerate(zip(folded, where, strict=True)):
        rest = size
        while rest > 1:
            rest //= shape[dim]
            dim += 1
            end = -(-wanted.start // rest) * rest if wanted.start % rest else wanted.stop // rest * rest
            if wanted.start < end < wanted.stop:
                halves = (slice(wanted.start, end), slice(end, wanted.stop))
                left, right = ((*where[:at], half, *where[at + 1 :]) for half in halves)
                return at, (left, right)
    return None


class Laid(Source):
    """A source over a larger shape: its dims in another order, sizes 1 broadcast."""

    def __init__(self, of: Source, order: Shape, sizes: Shape, shape: Shape) -> None:
        self.of, self.order, self.sizes, self.shape = of, order, sizes, shape
        self.dtype, self.is_masked = of.dtype, of.is_masked

    def window(self, where: Window) -> Masked:
        asked = [slice(0, n) for n in self.of.shape]
        own = (dim for dim in self.order if self.of.shape[dim] != 1)
        lengths = [1] * len(self.shape)
        for at, n in enumerate(self.sizes):
            if n != 1:
                asked[next(own)] = where[at]
                lengths[at] = where[at].stop - where[at].start
        data, mask = self.of.window(tuple(asked))
        full = tuple(s.stop - s.start for s in where)
        laid = data.permute(self.order).reshape(lengths).expand(full)
        return laid, None if mask is None else mask.expand(data.shape).permute(self.order).reshape(lengths).expand(full)

    def folded(self, shape: Shape) -> Source:
        return Folded(self, shape)


class Held(Source):
    """Cells that are in memory already."""

    def __init__(self, data: Tensor, mask: Tensor | None) -> None:
        self.data, self.mask = data, mask
        self.shape, self.dtype, self.is_masked = tuple(data.shape), data.dtype, mask is not None

    def window(self, where: Window) -> Masked:
        return self.data[where], None if self.mask is None else self.mask.expand(self.data.shape)[where]

    def folded(self, shape: Shape) -> Source:
        return Folded(self, shape)


def of_side(side: Side, shape: Shape) -> Source:
    """A side input over a variable of this shape: read where it lies, once where it is small."""
    of = stored(side.payload, side.variable)
    return Laid(Held(*of.whole()) if side.variable.info.n_bytes <= FEW_BYTES else of, side.order, side.shape, shape)


# -- on their way to a device ---------------------------------------------------------------------------------------


class Uploaded(Source):
    """A source whose windows are in the memory of a device."""

    def __init__(self, of: Source, device: str) -> None:
        self.of, self.device = of, device
        self.shape, self.dtype, self.is_masked, self.is_far = of.shape, of.dtype, of.is_masked, of.is_far

    @property
    def cell_bytes(self) -> int:
        return self.of.cell_bytes

    def expect(self, start: int, n: int) -> None:
        self.of.expect(start, n)

    def folded(self, shape: Shape) -> Source:
        return Uploaded(self.of.folded(shape), self.device)

    def window(self, where: Window) -> Masked:
        return uploads_to(self.device).block(partial(read_into, self.of, where))


def read_into(source: Source, where: Window, pages: Pages) -> Masked:
    """A window of a source, in these pages where it can be read into some."""
    return source.read(where, pages) if isinstance(source, Stored) else source.window(where)


def onto(source: Source, device: str) -> Source:
    """The source with its windows on this device."""
    return source if device == CPU else Uploaded(source, device)
