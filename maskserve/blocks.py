"""Blocks: a plan's cells as (outer, n, inner), cut into unions of whole subtrees, without a copy where strides allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from maskserve.compact import Compact, Form, Mask, Part, spread_part
from maskserve.errors import NanError
from maskserve.gates import spread
from maskserve.ops.rows import Normalization, Row
from maskserve.plan import Plan

NARROW = 512
"""Columns side by side from which rows are read at full speed."""


WHOLE = 1 << 20
"""Cells of a mask up to which it is spread out at once, and not in each block for itself."""

Where: TypeAlias = tuple[slice, ...]
Block: TypeAlias = tuple[Tensor, Tensor | Part | None]


class Cells:
    """The data and mask of a plan as (outer, n, inner), where n is the last reduced group, cut into blocks on demand."""

    narrow = NARROW
    """Columns that a block has at least; so many and tall rather than wide and low: states cost their joining."""
    writes_mask = True
    """Whether the mask of a result is asked for."""
    together = 1
    """Blocks of a run that a thread lifts one after the other, and joins before the next comes: a power of two."""

    def __init__(
        self, plan: Plan, data: Tensor, mask: Mask | None, weights: Tensor | None = None, *, policy: str,
        reads_compact: bool = False, writes_mask: bool = True,
    ) -> None:  # fmt: skip
        """`reads_compact`: kernels read compact masks; `writes_mask`: that of a result is asked for."""
        self.writes_mask = writes_mask
        *outer, n, inner = plan.fold
        self.shape = (prod(outer), n, inner)
        self.plan = plan
        self.policy = policy
        self.data = Folded(data, self.shape)
        self.mask: Folded | FoldedCompact | None = None
        if isinstance(mask, Compact):
            is_read = reads_compact and policy == "propagate"
            self.mask = FoldedCompact(mask, self.shape, form=mask.form() if is_read and 0 not in plan.shape else None)
        elif mask is not None:
            self.mask = Folded(mask.expand(plan.shape), self.shape)
        self.weights = None if weights is None else Folded(weights.expand(plan.shape), self.shape)

    def weight(self, *where: slice) -> tuple[Tensor, ...]:
        """The weights of a block, where there are any."""
        return () if self.weights is None else (self.weights[where],)

    def block(self, outer: slice, run: slice, inner: slice, *, negated: bool = True) -> Block:
        """Data and mask of a block, as kernels see them; the mask tells what counts, NaN policy included.

        A compact mask is seen as it is where kernels read it so. The cells of a row that negates are `negated`, where the
        kernel does not do that itself.
        """
        data, mask = self.stored(outer, run, inner)
        data = seen(self.plan, data)
        if negated and isinstance(self.plan.row, Normalization) and self.plan.row.negates:
            data = data.neg()
        return data, mask if isinstance(mask, Part) else counting(self.plan.row, data, mask, self.policy)

    def spread_block(self, outer: slice, run: slice, inner: slice) -> tuple[Tensor, Tensor | None]:
        """The same, the mask as bools."""
        data, mask = self.block(outer, run, inner)
        return data, spread_part(mask)

    def stored(self, outer: slice, run: slice, inner: slice) -> Block:
        """Data and mask of a block as they came."""
        where = (outer, run, inner)
        return self.data[where], None if self.mask is None else self.mask[where]


def counting(row: Row, data: Tensor, mask: Tensor | None, policy: str) -> Tensor | None:
    """Where cells count: the mask, and what the policy makes of a valid NaN."""
    if policy == "propagate" or not (data.is_floating_point() or data.is_complex()):
        return mask
    nan = data.isnan()
    if policy == "raise" and (nan if mask is None else nan & mask).any():
        raise NanError(f"{row.name}: a valid cell is NaN and nan=raise; nan=omit treats NaN as missing")
    return ~nan if mask is None else mask & ~nan


def seen(plan: Plan, data: Tensor) -> Tensor:
    """The cells in the dtype that kernels compute in."""
    if plan.as_stored:
        return data
    if plan.flipped:
        return data.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return data.to(getattr(torch, plan.dtype.torch))


def as_stored(plan: Plan, cells: Tensor) -> Tensor:
    """Cells that kernels saw, in the dtype that they came in."""
    return (cells ^ torch.iinfo(torch.int64).min).view(torch.uint64) if plan.flipped else cells


class Folded:
    """A tensor seen in a folded shape; where strides allow no view, only the block asked for is copied."""

    def __init__(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        self.tensor = tensor.detach()
        self.shape = shape
        try:
            self.view: Tensor | None = self.tensor.view(shape)
        except RuntimeError:
            is_small = repeats_last(self.tensor) and tensor.numel() <= WHOLE
            self.view = spread(self.tensor).view(shape) if is_small else None

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        if self.view is not None:
            return self.view[slices]
        return self.window(slices)

    def permuted(self, order: Sequence[int], shape: tuple[int, ...]) -> Folded:
        """The tensor with its dims in another order, folded."""
        return Folded(self.tensor.permute(*order), shape)

    def window(self, slices: tuple[slice, ...]) -> Tensor:
        """A copy of the block."""
        box, sizes, exact = covering(tuple(self.tensor.shape), self.shape, slices)
        part = self.tensor[box]
        if repeats_last(part):
            part = spread(part)
        return part.reshape(sizes)[exact]


def repeats_last(tensor: Tensor) -> bool:
    """Whether it is a mask that says one thing all along its last dim."""
    return tensor.dtype is torch.bool and tensor.ndim > 0 and tensor.stride(-1) == 0 and tensor.numel() > 0


class FoldedCompact:
    """A compact mask seen in a folded shape: blocks of it as kernels read them where there is a `form`, else as bools.

    `order` is that of the mask's dims in the shape that is folded.
    """

    def __init__(
        self, mask: Compact, shape: tuple[int, ...], *, form: Form | None, order: Sequence[int] | None = None
    ) -> None:
        self.mask, self.shape, self.form = mask, shape, form
        self.order = range(len(mask.shape)) if order is None else order

    def __getitem__(self, where: Where) -> Tensor | Part:
        if self.form is None:
            return self.window(where)
        _, n, inner = self.shape
        strides = (n * inner, inner, 1)
        first = sum(s.start * step for s, step in zip(where, strides, strict=True))
        return Part(self.form, strides, first, partial(self.window, where))

    def window(self, where: Where) -> Tensor:
        """The bools of a block."""
        if 0 in self.shape:
            return torch.empty([along.stop - along.start for along in where], dtype=torch.bool, device=self.mask.device)
        box, sizes, exact = covering(tuple(self.mask.shape[dim] for dim in self.order), self.shape, where)
        own = [slice(0, 0)] * len(box)
        for dim, along in zip(self.order, box, strict=True):
            own[dim] = along
        return self.mask.window(own).permute(*self.order).reshape(sizes)[exact]

    def permuted(self, order: Sequence[int], shape: tuple[int, ...]) -> FoldedCompact:
        """The mask of permuted data, folded."""
        return FoldedCompact(self.mask, shape, form=None, order=order)


def covering(
    shape: tuple[int, ...], folded: tuple[int, ...], where: tuple[slice, ...]
) -> tuple[tuple[slice, ...], tuple[int, ...], tuple[slice, ...]]:
    """The box of a tensor of `shape` that holds a window of it `folded`: the box, its sizes folded, the window in it.

    Each group of dims is narrowed as far as its range allows.

    >>> covering((4, 3, 5), (12, 5), (slice(4, 6), slice(0, 5)))
    ((slice(1, 2, None), slice(1, 3, None), slice(0, 5, None)), (2, 5), (slice(0, 2, None), slice(0, 5, None)))
    """
    dim, box, sizes, exact = 0, [], [], []
    for size, wanted in zip(folded, where, strict=True):
        start, stop, rest, height = wanted.start, wanted.stop, size, 1
        while rest > 1 and height == 1:  # a range inside one index of a dim goes on to the next dim
            rest //= shape[dim]
            first, last = start // rest, -(-stop // rest)
            box.append(slice(first, last))
            start, stop = start - first * rest, stop - first * rest
            height, dim = last - first, dim + 1
        sizes.append(height * rest)
        exact.append(slice(start, stop))
        while rest > 1:
            rest //= shape[dim]
            box.append(slice(0, shape[dim]))
            dim += 1
    box += [slice(0, n) for n in shape[dim:]]
    return tuple(box), tuple(sizes), tuple(exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How (outer, n, inner) is cut: `tiles` of result cells, `runs` of whole subtrees of the reduced dim."""

    tiles: tuple[tuple[slice, slice], ...]
    runs: tuple[slice, ...]


def cut(plan: Plan, shape: tuple[int, int, int], block_cells: int, *, whole: bool = False, narrow: int = NARROW) -> Cut:
    """Blocks of about `block_cells`; a run is leaf * 2**k cells, so that it is a subtree of its own; or n, if `whole`."""
    outer, n, inner = shape
    run, width = n, inner
    if n * inner > block_cells:
        width = min(inner, max(1 if whole else min(narrow, block_cells // min(n, plan.leaf)), block_cells // n, 1))
        if not whole and n * width > block_cells:
            leaves = max(1, block_cells // (plan.leaf * width))
            run = plan.leaf << (leaves.bit_length() - 1)
    height = max(1, block_cells // max(1, min(n, run) * width)) if run >= n and width == inner else 1
    return Cut(
        tiles=tuple(product(spans(outer, height), spans(inner, width))),
        runs=tuple(spans(n, run)) or (slice(0, 0),),
    )


def spans(n: int, step: int) -> list[slice]:
    """0..n cut every `step`.

    >>> spans(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + step, n)) for start in range(0, n, max(step, 1))]
