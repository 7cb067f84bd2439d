"""What headers alone tell of ops that are made of others or move cells: shape, dtype and names of dims of the result, and
the bytes held on the way. A row names its function here, and expressions call the row by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import torch

from maskserve import contracting, equations, fitting, functions, losses
from maskserve.alignment import Shape, described, dim_numbers, laid_over, laid_together
from maskserve.backends.reference import kernel
from maskserve.backends.reference.moves import Masked
from maskserve.blockwise import laid
from maskserve.dim_names import result_dims
from maskserve.dtypes import WIDENED, DType, Kind, boolean
from maskserve.errors import DtypeError, MaskserveError, ShapeError
from maskserve.ops import OPS
from maskserve.ops.layouts import Layout
from maskserve.ops.parameters import Params, Type
from maskserve.ops.rows import Contraction, Layer, Loss, Move, Reduction, Row
from maskserve.params import accept, resolve
from maskserve.payload.metadata import Dims
from maskserve.plan import plan
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of


class Given(fitting.Header, Protocol):
    """An operand, from its header."""

    @property
    def sample(self) -> MaskedTensor: ...


Operands = Mapping[str, Any]
"""Given ones by name; numbers stay numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A result before a cell is read."""

    shape: Shape
    dtype: DType
    dims: Dims | None = None
    held_bytes: int = 0
    """What is held at once beside the operands and the result."""
    n_products: int = 0
    """How many pairs of cells are multiplied."""
    n_between: int = 0
    """The cells of the largest tensor in between."""
    params: Params = field(default_factory=dict)
    """The parameters, dims by number."""
    axes: Mapping[str, Shape] = field(default_factory=dict)
    """The dims that operands are laid along, of `n_dims`; an operand that is not here stays as it is."""
    n_dims: int = 0


def outline(row: Row, given: Operands, params: Params) -> Outline:
    """The result of a row; what goes wrong says so in the row's name."""
    try:
        made: Outline = kernel(row.outline)(row, given, params)
    except MaskserveError as error:
        if not error.message.startswith(row.name):
            error.message = f"{row.name}: {error.message}"
            error.args = (error.message, *error.args[1:])
        raise
    return made


def by_number(row: Row, dims: Dims | None, params: Params) -> Params:
    """The parameters that are dims as numbers."""
    kinds = {p.name: p.type for p in row.parameters}
    return MappingProxyType({
        name: dim_numbers(row.name, dims, value) if kinds[name] in (Type.DIM, Type.DIMS) and value is not None else value
        for name, value in params.items()
    })  # fmt: skip


def distinct(names: tuple[str | None, ...]) -> Dims | None:
    """The names of dims, where each has one of its own."""
    found = tuple(name for name in names if name is not None)
    return found if len({*found}) == len(names) else None


# -- moves --------------------------------------------------------------------------------------------------------


COPIES = 3
"""How many more copies of cells and masks a move holds whose result has memory of its own."""


def move(row: Move, given: Operands, params: Params) -> Outline:
    """Cells in other places; a result whose dims are not all old ones has no names."""
    (source,) = given.values()
    assert row.layout is not None
    said = by_number(row, source.dims, params)
    layout: Layout = row.layout(source.shape, said)
    own = source.dims
    names = None if own is None else distinct(tuple(None if p.source is None else own[p.source] for p in layout))
    copied = COPIES * (source.dtype.n_bytes + 1) * prod(place.size for place in layout) if row.copies else 0
    return Outline(
        shape=tuple(place.size for place in layout), dtype=source.dtype, dims=names, params=said,
        held_bytes=copied,
    )  # fmt: skip


# -- contractions -------------------------------------------------------------------------------------------------

OPERAND_WIDTHS, RESULT_WIDTHS = 10, 13
"""How many times the bytes of its float cells and masks a product holds: a third where no valid cell is inf or NaN."""
WHOLE_BYTES = 80
"""The bytes a cell that products of whole numbers hold: limbs of 20 bits as float64."""


def contraction(row: Contraction, given: Operands, params: Params) -> Outline:
    """Sums of products, by the equation of the shapes; dims keep the names that they have in the operands."""
    resolve(row, params)
    operands = list(given.values())
    samples = [Masked(g.sample._data, g.sample._mask) for g in operands]
    _, dtype = contracting.computable(row, samples)
    n = len(row.operands) - row.n_optional
    shapes = [g.shape for g in operands[:n]]
    equation = equations.checked(
        row, equations.of_row(row) if row.equation else kernel(row.function)(row, shapes, params), shapes
    )
    sizes: dict[equations.Label, int] = {}
    names: dict[equations.Label, str | None] = {}
    for labels, g in zip(equation.operands, operands, strict=False):
        for at, (label, size) in enumerate(zip(labels, g.shape, strict=True)):
            name = None if g.dims is None else g.dims[at]
            if sizes.get(label, 1) == 1:
                sizes[label], names[label] = size, name
            elif names[label] != name and size != 1:
                names[label] = None
    shape = tuple(sizes[label] for label in equation.result)
    for g in operands[n:]:
        contracting.check_joins(row, shape, g.shape)
    result = dtype_of(torch.empty(0, dtype=dtype))
    return Outline(
        shape=shape, dtype=result, dims=distinct(tuple(names[label] for label in equation.result)), params=params,
        held_bytes=held_by_product(sum(prod(s) for s in shapes), prod(shape), result),
        n_products=prod(sizes.values()),
    )  # fmt: skip


def held_by_product(n_cells: int, n_results: int, dtype: DType) -> int:
    if dtype.is_integral:
        return WHOLE_BYTES * (n_cells + n_results)
    width = max(dtype.n_bytes, 4)
    return OPERAND_WIDTHS * (width + 1) * n_cells + RESULT_WIDTHS * (width + 1) * n_results


# -- losses -------------------------------------------------------------------------------------------------------

LOSS_WIDTHS = 8
"""How many times the bytes of its cells and masks a loss holds before it is reduced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The loss of each cell, or of each sample of classes, before they are reduced."""

    shape: Shape
    dims: Dims | None
    dtype: DType
    n_cells: int
    axes: Mapping[str, Shape] = field(default_factory=dict)
    weight: DType | None = None
    """Of what each loss counts for."""


def loss(row: Loss, given: Operands, params: Params) -> Outline:
    """The losses, or their sum or mean."""
    sides = {p.name: given[p.name] for p in row.parameters if p.name in given}
    pair = {word: given[word] for word in row.operands}
    dims = losses_dims(row, pair)
    said = by_number(row, dims, params)
    full = resolve(row, {**said, **{name: side.dtype for name, side in sides.items()}})
    found = of_cells(row, pair, sides, full) if row.cells is not None else of_classes(row, pair, sides, full)
    shape, names, dtype = reduced(row, found, full["reduction"], full["dim"])
    width = max(found.dtype.n_bytes, dtype.n_bytes, 4) + 1
    return Outline(
        shape=shape, dtype=dtype, dims=names, held_bytes=LOSS_WIDTHS * width * found.n_cells, params=said,
        axes=found.axes, n_dims=len(found.shape), n_between=found.n_cells,
    )  # fmt: skip


def laid_beside(row: Loss, pair: Operands) -> tuple[Shape, Dims | None, Mapping[str, Shape]]:
    """(common shape, names of its dims, the dims that each operand's lie along): one value a row lies along all but the last."""
    tensors = {word: given for word, given in pair.items() if not isinstance(given, int | float)}
    cells, rows = pair[row.operands[0]], tensors.get(row.each_row)
    if rows is None or not losses.is_one_a_row(rows, cells) or None not in (rows.dims, cells.dims):
        return laid_together(row.name, tensors)
    del tensors[row.each_row]
    shape, dims, axes = laid_together(row.name, tensors)
    return shape, dims, {**axes, row.each_row: axes["input"][:-1]}


def losses_dims(row: Loss, pair: Operands) -> Dims | None:
    """The names of the losses' dims."""
    if row.cells is not None:
        return laid_beside(row, pair)[1]
    dims: Dims | None = pair["input"].dims
    return None if dims is None else without(dims, class_dim(dims))


def class_dim(sizes: Sized) -> int:
    return min(len(sizes) - 1, 1)


def without(items: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    return items[:dim] + items[dim + 1 :]


def of_cells(row: Loss, pair: Operands, sides: Operands, params: Params) -> Losses:
    """Operands are laid beside each other as those of an elementwise op, and weights over them."""
    assert row.cells is not None
    shape, dims, axes = laid_beside(row, pair)
    over = fitting.Spread(shape, dims)
    axes = {**axes, **{name: laid_over(name, side, over) for name, side in sides.items()}}
    samples = {
        word: laid(operand.sample, axes[word], len(shape)) if word in axes else operand
        for word, operand in {**pair, **sides}.items()
    }
    third = [samples.get(row.third)] if row.third else []
    made = losses.of_cells(row.cells, (*(samples[word] for word in row.operands), *third), params)
    weight = sides.get("weight")
    counts = weight is not None and row.weighs_mean and params["reduction"] == "mean"
    if weight is not None and not counts:
        made = functions.public("mul")(made, samples["weight"])
    return Losses(
        shape=shape, dims=dims, dtype=dtype_of(made._data), n_cells=prod(shape), axes=axes,
        weight=weight.dtype if weight is not None and counts else None,
    )  # fmt: skip


def of_classes(row: Loss, pair: Operands, sides: Operands, params: Params) -> Losses:
    """Targets that are whole numbers have the input's dims without that of the classes; probabilities have all."""
    given, target = pair["input"], pair["target"]
    accept(row, given.dtype)
    if isinstance(target, int | float):
        raise ShapeError(f"target is the number {target}; it must be a tensor of classes, or of probabilities")
    if not given.shape:
        raise ShapeError("classes lie along dim 1, or along the only dim; the input has no dim")
    dim = class_dim(given.shape)
    n_classes, samples = given.shape[dim], without(given.shape, dim)
    of_probabilities = target.dtype.kind is Kind.FLOAT
    if of_probabilities and not row.of_logits:
        raise DtypeError("targets are classes, whole numbers; cross_entropy takes probabilities too")
    if target.dtype is boolean or not (of_probabilities or target.dtype.is_integral):
        raise DtypeError(f"targets are classes, whole numbers, not {target.dtype.name}")
    wanted = given.shape if of_probabilities else samples
    if target.shape != wanted:
        dims = (0, len(given.shape) - 1, *range(1, len(given.shape) - 1))
        at_the_end = len(dims) > 2 and target.shape == given.shape[:-1]
        moved = f": where they are last, permute(x, dims={dims}) moves them there" if at_the_end else ""
        raise ShapeError(
            f"target has shape {described(target)}, the input {described(given)}; it must be {wanted}, as classes lie along dim "
            f"{dim}{moved}"
        )
    weight = sides.get("weight")
    if weight is not None and weight.shape != (n_classes,):
        raise ShapeError(f"weight has shape {weight.shape}, and there are {n_classes} classes: give one for each")
    for word, side in (("weight", weight), ("target", target if of_probabilities else None)):
        if side is not None and WIDENED.get(side.dtype, side.dtype) is not WIDENED.get(given.dtype, given.dtype):
            raise DtypeError(
                f"{word} is {side.dtype.name}, the input {given.dtype.name}; they must be the same: {fitting.AS_F64}"
            )
    counts = weight is not None and not of_probabilities and params["reduction"] == "mean"
    return Losses(
        shape=samples, dims=None if given.dims is None else without(given.dims, dim), n_cells=prod(given.shape),
        dtype=WIDENED.get(given.dtype, given.dtype), weight=weight.dtype if weight is not None and counts else None,
    )  # fmt: skip


def reduced(row: Loss, losses: Losses, reduction: str, dim: Any) -> tuple[Shape, Dims | None, DType]:
    """(shape, names, dtype) of the losses, or of their sum or mean."""
    if reduction == "none":
        return losses.shape, losses.dims, losses.dtype
    weights = (("weights", losses.weight),) if losses.weight is not None else ()
    op = OPS["mean" if reduction == "mean" else "sum"]  # as the loss itself calls them
    assert isinstance(op, Reduction)
    planned = plan(op, (("dim", dim), *weights), losses.shape, losses.dtype, "cpu")
    dtype = planned.result
    if reduction == "batchmean":
        dtype = dtype_of(functions.public("div")(torch.empty(0, dtype=getattr(torch, dtype.torch)), 1)._data)
    return tuple(planned.out_shape), result_dims(planned, losses.dims), dtype


# -- layers -------------------------------------------------------------------------------------------------------

LAYER_WIDTHS = 7
"""How many times the bytes of its cells and masks a layer holds beside its result."""


def normalized(row: Layer, given: Operands, params: Params) -> Outline:
    """Cells as they were, along the last dims; weights have the shape of those."""
    fitting.check_normalized(row, given, params["normalized_shape"])
    return as_input(row, given, params)


def in_groups(row: Layer, given: Operands, params: Params) -> Outline:
    """Cells as they were, in groups of channels; weights have one cell a channel."""
    fitting.check_groups(row, given, params["num_groups"])
    return as_input(row, given, params)


def sloped(row: Layer, given: Operands, params: Params) -> Outline:
    """Cells as they were; weights are of one cell, or of one a channel."""
    fitting.check_slopes(row, given)
    return as_input(row, given, params)


def as_input(row: Layer, given: Operands, params: Params) -> Outline:
    source = given[row.operands[0]]
    held = LAYER_WIDTHS * (max(g.dtype.n_bytes for g in given.values()) + 1) * prod(source.shape)
    return Outline(
        shape=source.shape, dtype=source.dtype, dims=source.dims, held_bytes=held, params=params,
        n_between=prod(source.shape),
    )  # fmt: skip


COSINE_WIDTHS = 12
"""How many times those of its common shape the cosine of two tensors holds."""


def cosine(row: Layer, given: Operands, params: Params) -> Outline:
    """Two tensors beside each other, without the dim that vectors lie along."""
    dtype = fitting.one_dtype(row, given)
    shape, dims, axes = laid_together(row.name, given)
    said = by_number(row, dims, params)
    resolve(row, said)
    op = OPS["sum"]  # as the layer itself calls it
    assert isinstance(op, Reduction)
    planned = plan(op, (("dim", said.get("dim", 1)),), shape, dtype, "cpu")
    held = COSINE_WIDTHS * (dtype.n_bytes + 1) * prod(shape)
    return Outline(
        shape=tuple(planned.out_shape), dtype=planned.result, dims=result_dims(planned, dims), held_bytes=held,
        params=said, axes=axes, n_dims=len(shape), n_between=prod(shape),
    )  # fmt: skip


SCORE_WIDTHS = 18
"""How many times the bytes of the scores and their masks attention holds: a third where no valid cell is inf or NaN, and
none where torch's fused kernel computes it."""


def attention(row: Layer, given: Operands, params: Params) -> Outline:
    """(..., queries, cells), (..., keys, cells), (..., keys, other cells) -> (..., queries, other cells)."""
    dtype, scores, shape = fitting.of_attention(row, given, bool(params.get("is_causal")))
    own = {word: g for word, g in given.items() if word != "attn_mask"}
    q, k, v = own.values()
    names = None
    if q.dims is not None and v.dims is not None and len(q.shape) == len(shape):
        names = distinct((*q.dims[:-1], v.dims[-1]))
    n_cells, n_scores = sum(prod(g.shape) for g in own.values()), prod(scores)
    held = held_by_product(n_cells, prod(shape), dtype) + SCORE_WIDTHS * (max(dtype.n_bytes, 4) + 1) * n_scores
    return Outline(
        shape=shape, dtype=dtype, dims=names, held_bytes=held, params=params,
        n_products=n_scores * q.shape[-1] + prod(shape) * k.shape[-2], n_between=n_scores,
    )  # fmt: skip
