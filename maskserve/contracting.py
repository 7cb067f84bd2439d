"""Contraction rows: dims are moved until two tensors are batches of matrices, and their masked product is the one core.

All else here is permute, reshape and the like, which a tensor takes in the same way as its mask.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve import gradients, operations
from maskserve.backends.reference import contractions, kernel
from maskserve.backends.reference.moves import Masked
from maskserve.dtypes import WIDENED, bf16, f16, f64
from maskserve.equations import Equation, Label, Labels, checked, name_of, of_row
from maskserve.errors import DataError, DtypeError, ShapeError
from maskserve.ops.rows import Contraction
from maskserve.params import accept
from maskserve.reach import Operand
from maskserve.torch_dtypes import dtype_of
from maskserve.tracing import is_followed

HALVES = (f16, bf16)


def product(a: Masked, b: Masked) -> Masked:
    """(batch, i, k) and (batch, k, j) -> (batch, i, j): the only place that reads cells."""
    if not (is_followed(a.data) or is_followed(b.data)):
        return Masked(*contractions.product(a.data, a.mask, b.data, b.mask))
    made = gradients.apply(operations.OfProduct(), Operand(*a), Operand(*b))[0]
    return Masked(made.value, made.mask, made.reach)


def compute(row: Contraction, operands: Sequence[Masked], params: dict[str, Any]) -> Masked:
    """The sums of products that the row's equation says, fresh and contiguous; hidden cells are 0."""
    shapes = [tuple(cells.data.shape) for cells in operands]
    equation = of_row(row) if row.equation else kernel(row.function)(row, shapes, params)
    return contracted(operands, checked(row, equation, shapes))


# -- what comes in ------------------------------------------------------------------------------------------------


def computable(row: Contraction, operands: Sequence[Masked]) -> tuple[list[Masked], torch.dtype]:
    """The operands in the dtype that sums are computed in, masks of their shapes, and the result's dtype."""
    stored = [dtype_of(cells.data) for cells in operands]
    kinds = [WIDENED.get(kind, kind) for kind in stored]
    for i, kind in enumerate(stored):
        accept(row, kind)
        if kinds[i] is not kinds[0]:
            narrow = [name_of(row, at) for at in (0, i) if kinds[at] is not f64]
            widened = " and ".join(f"float_power({name}, 1)" for name in narrow)
            raise DtypeError(
                f"{row.name}: {name_of(row, 0)} is {stored[0]}, {name_of(row, i)} {kind}; give both one dtype: "
                f".to(torch.{kinds[0].torch}) in Python, {widened} in an expression",
                parameter=name_of(row, i),
            )
    devices = list(dict.fromkeys(str(cells.data.device) for cells in operands))
    if len(devices) > 1:
        raise DataError(f"{row.name}: the tensors are on {' and '.join(devices)}; move them to one device: .to(device)")
    if not operands:
        return [], torch.float32
    # each product and each sum of a half is rounded once, at the end
    wide = torch.float32 if kinds[0] in HALVES else getattr(torch, kinds[0].torch)
    given = [Masked(cells.data.to(wide), whole_mask(cells), cells.reach) for cells in operands]
    return given, getattr(torch, row.result(kinds[0], {}).torch)


def whole_mask(cells: Masked) -> Tensor | None:
    return None if cells.mask is None else cells.mask.expand(cells.data.shape)


def check_joins(row: Contraction, shape: Sequence[int], other: Sequence[int]) -> None:
    """ShapeError unless an optional operand of shape `other` broadcasts to the result."""
    grown = (1,) * (len(shape) - len(other)) + tuple(other)
    if len(grown) != len(shape) or any(m not in (1, n) for m, n in zip(grown, shape, strict=True)):
        raise ShapeError(
            f"{row.name}: {row.operands[-1]} has shape {tuple(other)}, the result {tuple(shape)}; it must "
            "broadcast to the result"
        )


# -- dims ---------------------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """A tensor whose dims have labels, each once."""

    cells: Masked
    labels: Labels

    def size(self, label: Label) -> int:
        return self.cells.data.shape[self.labels.index(label)]

    def sizes(self, labels: Labels) -> tuple[int, ...]:
        return tuple(self.size(label) for label in labels)

    def grouped(self, *groups: Labels) -> Masked:
        """The cells with one dim for each group of labels."""
        order = [self.labels.index(label) for group in groups for label in group]
        shape = [prod(self.sizes(group)) for group in groups]
        return self.cells.moved(lambda tensor: tensor.permute(order).reshape(shape))


def contracted(operands: Sequence[Masked], equation: Equation) -> Masked:
    """The operands joined from left to right; a single one goes through the core too, beside ones."""
    parts = [diagonal(cells, labels) for cells, labels in zip(operands, equation.operands, strict=True)]
    if len(parts) == 1:
        made = summed(parts[0], equation.result)
    else:
        made, rest = parts[0], parts[1:]
        while rest:
            part, *rest = rest
            made = joined(made, part, {*equation.result, *(label for later in rest for label in later.labels)})
    if made.labels == equation.result:
        return made.cells.moved(lambda tensor: tensor.contiguous())
    order = [made.labels.index(label) for label in equation.result]
    return made.cells.moved(lambda tensor: tensor.permute(order).contiguous())


def diagonal(cells: Masked, labels: Labels) -> Labelled:
    """The diagonals of dims that share a label."""
    while len(set(labels)) < len(labels):
        label = next(label for label in labels if labels.count(label) > 1)
        first = labels.index(label)
        second = labels.index(label, first + 1)
        cells = cells.moved(partial(torch.diagonal, offset=0, dim1=first, dim2=second))
        labels = (*(other for i, other in enumerate(labels) if i not in (first, second)), label)
    return Labelled(cells, labels)


def joined(a: Labelled, b: Labelled, needed: Collection[Label]) -> Labelled:
    """The sums of products over what both have and nothing needs any more."""
    a, b = without_broadcast(a, b), without_broadcast(b, a)
    a, b = (summed(x, {*needed, *y.labels}) if {*x.labels} - {*needed, *y.labels} else x for x, y in ((a, b), (b, a)))
    batch = tuple(label for label in a.labels if label in b.labels and label in needed)
    met = tuple(label for label in a.labels if label in b.labels and label not in needed)
    rows = tuple(label for label in a.labels if label not in b.labels)
    columns = tuple(label for label in b.labels if label not in a.labels)
    made = product(a.grouped(batch, rows, met), b.grouped(batch, met, columns))
    shape = (*a.sizes(batch), *a.sizes(rows), *b.sizes(columns))
    return Labelled(made.moved(lambda tensor: tensor.reshape(shape)), (*batch, *rows, *columns))


def without_broadcast(a: Labelled, b: Labelled) -> Labelled:
    """`a` without its dims of size 1 that b has in another size: their one cell meets each of b's."""
    kept = [i for i, label in enumerate(a.labels) if not (label in b.labels and a.size(label) == 1 != b.size(label))]
    if len(kept) == len(a.labels):
        return a
    shape = [a.cells.data.shape[i] for i in kept]
    return Labelled(a.cells.moved(lambda tensor: tensor.reshape(shape)), tuple(a.labels[i] for i in kept))


def summed(part: Labelled, needed: Collection[Label]) -> Labelled:
    """The sums over dims whose label nothing needs: products with 1."""
    kept = tuple(label for label in part.labels if label in needed)
    cells = part.grouped((), kept, tuple(label for label in part.labels if label not in needed))
    ones = Masked(torch.ones((1, cells.data.shape[2], 1), dtype=cells.data.dtype, device=cells.data.device), None)
    shape = part.sizes(kept)
    return Labelled(product(cells, ones).moved(lambda tensor: tensor.reshape(shape)), kept)
