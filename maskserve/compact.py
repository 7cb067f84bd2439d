"""Masks that hold no byte for each cell: the lengths of valid prefixes, and bits.

They are never written to, so that tensors share them. What knows them reads them as they are; for everything else they
are spread out to bools, a window at a time where there are many cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from maskserve.errors import MaskError
from maskserve.tracing import in_transform

if TYPE_CHECKING:
    from maskserve.compact_moves import Rows, Steps

Box: TypeAlias = Sequence[slice]

SPREAD_AT_ONCE = 1 << 20
"""Cells that are spread out at a time."""
BYTE = 8


class Form(NamedTuple):
    """How kernels find a cell of a compact mask (native/block.hpp): its Compact, and the cells of that."""

    said: Tensor
    cells: Tensor


class Part(NamedTuple):
    """A block of a compact mask where it lies, as kernels read it: strides in cells of the mask, from the cell `first` on."""

    form: Form
    strides: tuple[int, int, int]
    first: int
    spread: Callable[[], Tensor]
    """Its bools, for what knows no other."""


def is_strided(cells: Any) -> bool:
    """Whether it is a plain tensor of torch's."""
    return isinstance(cells, Tensor) and cells.layout is torch.strided


def is_plain(cells: Any) -> bool:
    """Whether its memory says what it holds, too: kernels read it without a sign that is still to be taken."""
    return is_strided(cells) and not cells.is_neg()


def spread_part(mask: Tensor | Part | None) -> Tensor | None:
    """The mask of a block as bools."""
    return mask.spread() if isinstance(mask, Part) else mask


class Compact(ABC):
    """Which cells of a tensor of `shape` are valid."""

    __slots__ = ()

    layout: ClassVar[str]
    shape: torch.Size

    @property
    @abstractmethod
    def cells(self) -> Tensor:
        """What it holds."""

    @abstractmethod
    def holding(self, cells: Tensor) -> Compact:
        """The same of other lengths or bits."""

    @abstractmethod
    def bools(self) -> Tensor:
        """All of it as bools: of the shape's dims, size 1 where it broadcasts."""

    @abstractmethod
    def window(self, box: Box) -> Tensor:
        """The bools of a box of cells, of the box's sizes."""

    @abstractmethod
    def expanded(self, shape: torch.Size) -> Compact | None:
        """The mask broadcast to a shape; None where that is no compact one."""

    @abstractmethod
    def met(self, other: Compact) -> Compact | None:
        """Valid where both are, of one shape; None where that is no compact mask."""

    def written(self) -> Tensor:
        """What a file holds of it."""
        return self.cells

    def clone(self) -> Compact:
        """The same of its own, without what a slice leaves out."""
        return self.holding(self.cells.clone())

    dim: int
    """Along which its rows lie, one for each index of the dims before."""

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """The shape of the cells that hold a row."""

    @abstractmethod
    def of_rows(self, cells: Tensor, shape: torch.Size) -> Compact:
        """The same of other rows, for a tensor of `shape`."""

    @abstractmethod
    def taken(self, rows: Rows, places: Steps, shape: torch.Size) -> Compact | None:
        """Some cells of some rows, as a tensor of `shape` whose dims are those of the rows, their own and the rest."""

    @abstractmethod
    def all_valid(self, shape: torch.Size) -> Compact:
        """Another one in this form, which hides nothing of a tensor whose rows are as long."""

    def valid_first(self, dim: int, shape: torch.Size) -> Compact | None:
        """That of a tensor of `shape`, where the valid cells of each slice along a dim stand first; None: no compact one."""
        return None

    def laid(self) -> Tensor:
        """Its cells in as many dims as the tensor has."""
        return self.cells.reshape((*self.shape[: self.dim], *(self.row_shape or (1,) * (len(self.shape) - self.dim))))

    @property
    @abstractmethod
    def is_sound(self) -> bool:
        """Whether what it holds fits its shape: kernels read it without another look."""

    @abstractmethod
    def rows(self) -> Tensor | None:
        """(...) bools: what each row (..., n) says of all its cells; None where one says two things."""

    @abstractmethod
    def form(self) -> Form:
        """What kernels read."""

    def part(self, shape: tuple[int, int, int]) -> Part:
        """All of it as kernels read it, folded to (outer, n, inner)."""
        _, n, inner = shape
        return Part(self.form(), (n * inner, inner, 1), 0, lambda: self.bools().expand(self.shape).reshape(shape))

    @property
    def nbytes(self) -> int:
        return self.cells.nbytes

    @property
    def device(self) -> torch.device:
        return self.cells.device

    def to(self, device: torch.device | str) -> Compact:
        return self if self.cells.device == torch.device(device) else self.holding(self.cells.to(device))

    def equals(self, other: Compact) -> bool:
        """Whether they say the same in the same form."""
        same = type(self) is type(other) and self.shape == other.shape and self.cells.shape == other.cells.shape
        return same and (self.cells is other.cells or torch.equal(self.cells, other.cells))


@dataclass(frozen=True, slots=True, eq=False)
class Lengths(Compact):
    """The first `lengths` cells along `dim` are valid; lengths are int64, of the dims before it."""

    layout = "lengths"

    lengths: Tensor
    dim: int
    shape: torch.Size

    @property
    def cells(self) -> Tensor:
        return self.lengths

    def holding(self, cells: Tensor) -> Lengths:
        return replace(self, lengths=cells)

    def bools(self) -> Tensor:
        valid = torch.arange(self.shape[self.dim], device=self.device) < self.lengths.unsqueeze(-1)
        return valid.reshape(*valid.shape, *(1 for _ in self.shape[self.dim + 1 :]))

    def window(self, box: Box) -> Tensor:
        along = box[self.dim]
        valid = torch.arange(along.start, along.stop, device=self.device) < self.lengths[
            tuple(box[: self.dim])
        ].unsqueeze(-1)
        return valid.reshape(*valid.shape, *(1 for _ in box[self.dim + 1 :])).expand(sizes_of(box))

    def expanded(self, shape: torch.Size) -> Lengths | None:
        fits = len(shape) == len(self.shape) and shape[: self.dim + 1] == self.shape[: self.dim + 1]
        return replace(self, shape=shape) if fits else None

    def met(self, other: Compact) -> Lengths | None:
        if not isinstance(other, Lengths) or other.dim != self.dim:
            return None
        return self if self.equals(other) else self.holding(torch.minimum(self.lengths, other.lengths))

    @property
    def row_shape(self) -> tuple[int, ...]:
        return ()

    def of_rows(self, cells: Tensor, shape: torch.Size) -> Lengths:
        return Lengths(cells, cells.ndim, shape)

    def taken(self, rows: Rows, places: Steps, shape: torch.Size) -> Lengths:
        left = rows.of(self.lengths, self.dim) - places.start
        if places.step:
            kept = (left + (places.step - 1)).div(places.step, rounding_mode="floor").clamp(min=0, max=places.n)
        else:  # one cell of each, for all cells of what is now a row
            kept = (left > 0) * places.n
        return self.of_rows(kept, shape)

    def valid_first(self, dim: int, shape: torch.Size) -> Lengths | None:
        return self.of_rows(self.lengths.clamp(max=shape[self.dim]), shape) if dim >= self.dim else None

    def all_valid(self, shape: torch.Size) -> Lengths:
        sizes = shape[: len(shape) - len(self.shape) + self.dim]
        return self.of_rows(self.lengths.new_full(sizes, self.shape[self.dim]), shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lengths, (self.lengths, self.dim, self.shape)

    @property
    def is_sound(self) -> bool:
        if not isinstance(self.shape, torch.Size) or not is_plain(self.lengths) or type(self.dim) is not int:
            return False
        is_dim = 0 <= self.dim < len(self.shape) and self.lengths.shape == self.shape[: self.dim]
        if not is_dim or self.lengths.dtype is not torch.int64:
            return False
        return self.lengths.is_meta or not bool(((self.lengths < 0) | (self.lengths > self.shape[self.dim])).any())

    def rows(self) -> Tensor | None:
        n_dims = len(self.shape)
        if self.dim < n_dims - 1:
            return replace(self, shape=self.shape[:-1]).bools().expand(self.shape[:-1])
        are_whole = (self.lengths == 0) | (self.lengths == self.shape[-1])
        return self.lengths > 0 if bool(are_whole.all()) else None

    def form(self) -> Form:
        row, step = prod(self.shape[self.dim :]), prod(self.shape[self.dim + 1 :])
        return Form(torch.tensor([0, row, 0, step]), self.lengths.contiguous())


@dataclass(frozen=True, slots=True, eq=False)
class Bits(Compact):
    """A bit for each cell, along the last dim: (..., ceil(n / 8)) bytes, the lowest bit first; what pads is not looked at."""

    layout = "packed"

    packed: Tensor
    shape: torch.Size

    @property
    def cells(self) -> Tensor:
        return self.packed

    def holding(self, cells: Tensor) -> Bits:
        return replace(self, packed=cells)

    def bools(self) -> Tensor:
        return self.window([slice(0, n) for n in self.shape])

    def window(self, box: Box) -> Tensor:
        last = box[-1]
        first = last.start // BYTE
        some = self.packed[*box[:-1], first : -(-last.stop // BYTE)]
        return unpacked(some)[..., last.start - first * BYTE : last.stop - first * BYTE]

    def expanded(self, shape: torch.Size) -> Bits | None:
        return self if shape == self.shape else None

    def met(self, other: Compact) -> Bits | None:
        if not isinstance(other, Bits):
            return None
        return self if self.cells is other.cells else self.holding(self.packed & other.packed)

    @property
    def dim(self) -> int:  # type: ignore[override]  # always the last one
        return len(self.shape) - 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (-(-self.shape[-1] // BYTE),)

    def of_rows(self, cells: Tensor, shape: torch.Size) -> Bits:
        return Bits(cells, shape)

    def taken(self, rows: Rows, places: Steps, shape: torch.Size) -> Bits | None:
        if places.step != 1 or places.start % BYTE or len(rows.sizes) + 1 != len(shape):
            return None
        whole = rows.of(self.packed, self.packed.ndim - 1)
        return Bits(whole[..., places.start // BYTE : places.last // BYTE + 1], shape)

    def all_valid(self, shape: torch.Size) -> Bits:
        return Bits(self.packed.new_full((*shape[:-1], self.packed.shape[-1]), 255), shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bits, (self.packed, self.shape)

    @property
    def is_sound(self) -> bool:
        if not isinstance(self.shape, torch.Size) or not self.shape or not is_plain(self.packed):
            return False
        if self.packed.dtype is not torch.uint8:
            return False
        return self.packed.shape == (*self.shape[:-1], -(-self.shape[-1] // BYTE))

    def rows(self) -> Tensor | None:
        n = self.shape[-1]
        if not n:
            return None
        whole, bits = self.last_bytes(), self.written()
        valid = (bits == whole).all(-1)
        return valid if bool((valid | (bits == 0).all(-1)).all()) else None

    def last_bytes(self) -> Tensor:
        """(bytes of a row,) with each bit that is a cell's."""
        whole = torch.full(self.packed.shape[-1:], 255, dtype=torch.uint8, device=self.device)
        whole[-1:] >>= -self.shape[-1] % BYTE
        return whole

    def written(self) -> Tensor:
        return self.packed & self.last_bytes()

    def form(self) -> Form:
        return Form(torch.tensor([1, self.shape[-1], BYTE * self.packed.shape[-1], 0]), self.packed.contiguous())


Mask: TypeAlias = Tensor | Compact


def as_bools(mask: Mask | None) -> Tensor | None:
    """A mask as bools, of as many dims, size 1 where it broadcasts."""
    return mask.bools() if isinstance(mask, Compact) else mask


def common(masks: Sequence[Mask | None], shape: torch.Size) -> Compact | None:
    """The compact mask of `shape` that says where all masks are valid; None where there is none, or no mask is compact."""
    together: Compact | None = None
    for mask in masks:
        if mask is None:
            continue
        own = mask.expanded(shape) if isinstance(mask, Compact) else None
        together = own if together is None or own is None else together.met(own)
        if together is None:
            return None
    return together


def sizes_of(box: Box) -> list[int]:
    return [along.stop - along.start for along in box]


# -- bits ---------------------------------------------------------------------------------------------------------


def is_numpys(cells: Tensor) -> bool:
    """Whether numpy can read the cells."""
    return cells.device.type == "cpu" and not in_transform()


def unpacked(packed: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 8 n) bools, the lowest bit first."""
    if is_numpys(packed):
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, bitorder="little").view(np.bool_))
    places = torch.arange(BYTE, dtype=torch.uint8, device=packed.device)
    bits: Tensor = packed.unsqueeze(-1) >> places & 1
    return bits.bool().flatten(-2)


def packed(valid: Tensor) -> Tensor:
    """(..., n) bools -> (..., ceil(n / 8)) bytes, the lowest bit first, 0 behind the last."""
    if is_numpys(valid):
        return torch.from_numpy(np.packbits(valid.numpy(), axis=-1, bitorder="little"))
    n_bytes = -(-valid.shape[-1] // BYTE)
    whole = torch.nn.functional.pad(valid.to(torch.uint8), (0, n_bytes * BYTE - valid.shape[-1]))
    places = torch.arange(BYTE, dtype=torch.uint8, device=valid.device)
    bits: Tensor = whole.unflatten(-1, (n_bytes, BYTE)) << places
    return bits.sum(-1, dtype=torch.uint8)


# -- from one form to another -------------------------------------------------------------------------------------


def as_bits(mask: Mask, shape: torch.Size) -> Bits:
    """The mask of a tensor of this shape as bits, a few rows at a time."""
    if isinstance(mask, Bits):
        return mask
    if not shape:
        raise MaskError(
            "a tensor without dims has one cell, and no row of bits: its mask stays bool", parameter="layout"
        )
    rows = shape if len(shape) > 1 else (1, *shape)
    made = torch.empty((*rows[:-1], -(-rows[-1] // BYTE)), dtype=torch.uint8, device=mask.device)
    step = max(1, SPREAD_AT_ONCE // max(prod(rows[1:]), 1))
    for start in range(0, rows[0], step):
        stop = min(start + step, rows[0])
        box = [slice(start, stop), *(slice(0, n) for n in rows[1:])][len(rows) - len(shape) :]
        some = mask.window(box) if isinstance(mask, Compact) else mask.expand(shape)[tuple(box)]
        made[start:stop] = packed(some)
    return Bits(made.reshape(*shape[:-1], made.shape[-1]), shape)


def as_lengths(mask: Mask, dim: int, shape: torch.Size) -> Lengths:
    """The mask of a tensor of this shape as lengths along `dim`; an error where it is no prefix of that."""
    if isinstance(mask, Lengths) and mask.dim == dim:
        return mask
    valid = as_bools(mask)
    assert valid is not None
    if not prod(shape[dim + 1 :]):
        return Lengths(torch.zeros(shape[:dim], dtype=torch.int64, device=valid.device), dim, shape)
    first = valid
    for behind in range(dim + 1, len(shape)):
        first = first.narrow(behind, 0, min(1, first.shape[behind]))
    along = first.reshape(first.shape[: dim + 1]).expand(shape[: dim + 1])
    lengths = along.sum(-1)
    made = Lengths(lengths, dim, shape)
    if not bool((valid == first).all()) or not torch.equal(made.bools().reshape(along.shape), along):
        raise MaskError(
            f"the mask is no prefix along dim {dim}, so lengths cannot say it: give another dim, or layout 'packed', which "
            "holds any mask",
            parameter="layout",
        )
    return made


torch.serialization.add_safe_globals([Lengths, Bits, torch.Size])  # torch.load(weights_only=True)
