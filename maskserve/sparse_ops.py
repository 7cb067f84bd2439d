"""What ops do with sparse tensors: cell by cell on what is stored, along dims, and in products with strided ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.cellwise import broadcast_shape
from maskserve.equations import checked, of_row
from maskserve.errors import MaskMismatchError, ShapeError
from maskserve.making import as_masked_tensor, tensor_of
from maskserve.masks import Policy
from maskserve.moving import function
from maskserve.ops.rows import Contraction, Elementwise, MaskRule, Move, Reduction
from maskserve.patterns import Pattern, intersection, spread, union
from maskserve.plan import INNER_LEAF, Plan, SlicedRow
from maskserve.reach import Operand, applied
from maskserve.sparse import SparseTensor, aligned, as_masked, every_cell_of, refused
from maskserve.sparse_moves import first_sparse, source_of
from maskserve.sparse_slices import (
    BLOCK_CELLS,
    Bucket,
    Made,
    Slices,
    buckets,
    compute,
    of_plan,
    refuse,
    rows_plan,
    slices_of,
)
from maskserve.tensor import SPARSE, MaskedTensor
from maskserve.tracing import in_transform, is_followed

Compute = Callable[[Sequence[Any]], MaskedTensor]


def as_sparse(tensor: Any, mask: Any = None) -> SparseTensor | None:
    """The tensor, where it or its mask is sparse."""
    if isinstance(tensor, SparseTensor) and mask is None:
        return tensor
    if type(tensor) is MaskedTensor and mask is None:
        return None
    if not any(getattr(part, "layout", None) in SPARSE for part in (tensor, mask)):
        return None
    made = MaskedTensor(tensor, mask)
    assert isinstance(made, SparseTensor)
    return made


# -- cell by cell -------------------------------------------------------------------------------------------------


def elementwise(row: Elementwise, operands: Sequence[Any], policy: Policy, compute_cells: Compute) -> MaskedTensor:
    """The row on the cells of a common pattern; strided, where the result is valid beside what is stored."""
    shape = broadcast_shape(row, [o for o in operands if isinstance(o, Tensor | MaskedTensor)])  # type: ignore[misc]  # they have shapes
    given = [o.to_dense() if isinstance(o, SparseTensor) and not o.ndim and shape else o for o in operands]
    pattern = pattern_of(row, given, shape, policy)
    if pattern is None:
        if not any(isinstance(o, Tensor | MaskedTensor) and not is_sparse(o) and o.shape == shape for o in given):
            raise refused(f"{row.name}, whose result is valid where nothing is stored,", shape)
        return compute_cells([o.to_dense() if is_sparse(o) else o for o in given])
    cells = [on_pattern(o, pattern) for o in given]
    if policy is Policy.STRICT:
        check_equal(row, given, cells, pattern)
    return SparseTensor._on(pattern, compute_cells(cells))


def is_sparse(operand: Any) -> bool:
    return isinstance(operand, SparseTensor)


def pattern_of(row: Elementwise, operands: Sequence[Any], shape: torch.Size, policy: Policy) -> Pattern | None:
    """Where the result is stored; None: it is valid where no operand stores a cell."""
    patterns = [o._pattern if is_sparse(o) else None for o in operands]
    stored = [pattern for pattern in patterns if pattern is not None]
    if not stored:
        return None
    if row.rule is MaskRule.CHOSEN:
        condition, *branches = patterns
        if condition is not None:
            return spread(condition, shape)[0]
        return all_of(stored, shape) if all(branch is not None for branch in branches) else None
    if policy is Policy.UNION:
        given = [pattern for pattern, operand in zip(patterns, operands, strict=True) if operand is not None]
        return None if None in given else all_of(stored, shape)
    return intersection(stored, shape)


def all_of(patterns: Sequence[Pattern], shape: torch.Size) -> Pattern:
    return union([spread(pattern, shape)[0] for pattern in patterns])


def on_pattern(operand: Any, pattern: Pattern) -> Any:
    """An operand's cells at the positions of a pattern; numbers, and tensors of no dims, as they are."""
    if not isinstance(operand, Tensor | MaskedTensor) or (not operand.ndim and pattern.shape):
        return operand
    cells = aligned(as_masked(operand), pattern)
    return cells if isinstance(operand, MaskedTensor) else cells._data


def check_equal(row: Elementwise, operands: Sequence[Any], cells: Sequence[Any], pattern: Pattern) -> None:
    """Policy strict: raise unless the same cells are valid in every masked operand: as many in each as in all together."""
    masked = [(o, own) for o, own in zip(operands, cells, strict=True) if isinstance(o, MaskedTensor)]
    common = torch.ones(pattern.n, dtype=torch.bool, device=pattern.device)
    for _, own in masked:
        common &= own._full_mask()
    n = int(common.sum())
    if any(n_valid(operand, pattern) != n for operand, _ in masked):
        raise MaskMismatchError(
            f"{row.name}: the masks differ and the policy is strict; policy intersect takes cells valid in both, union in "
            "either"
        )


def n_valid(tensor: MaskedTensor, pattern: Pattern) -> int:
    """How many cells are valid of a tensor that is broadcast to the pattern's shape."""
    mask = tensor._cells._full_mask() if isinstance(tensor, SparseTensor) else tensor._full_mask()
    return int(mask.sum()) * (pattern.numel // max(tensor.numel(), 1))


# -- along dims ---------------------------------------------------------------------------------------------------


def sliced(
    planned: Plan, tensor: SparseTensor, weights: MaskedTensor | None, trace: Callable[[Plan, Sequence[Operand]], Any]
) -> tuple[MaskedTensor, MaskedTensor | None]:
    """(values, places of picked ones): strided of a reduction, else in the same pattern.

    `trace(plan, operands)` is the op of strided operands that are followed.
    """
    refuse(planned)
    sides = None if weights is None else (weights._data, weights._mask)
    cells = tensor._cells
    tracked = is_followed(cells._data) or (weights is not None and is_followed(weights._data))
    if not planned.row.vjp and in_transform():
        parts = applied(Unfollowed, planned, tensor._pattern, tensor._pattern.positions, cells._data, cells._mask)
        return wrapped(planned, tensor, Made(*parts))
    if not tracked or not planned.row.vjp:
        return wrapped(planned, tensor, compute_all(planned, tensor, sides))
    slices = of_plan(planned, tensor._pattern)
    exact = None if in_transform() else compute_all(planned, tensor, sides)
    ordered, side = in_order(slices, cells), None if weights is None else in_order(slices, weights)
    some = list(buckets(slices))
    results = zip(*[bucket_result(planned, slices, bucket, ordered, side, trace) for bucket in some], strict=True)
    if isinstance(planned.row, Reduction):
        given = [
            MaskedTensor(one.new_zeros((1, 1)), False) for one in (cells._data, *([] if side is None else [side._data]))
        ]
        empty = side_by_side(planned, given, trace)
        made = [reductions_placed(planned, slices, some, *both) for both in zip(results, empty, strict=True)]
    else:
        made = [cells_placed(slices, some, part) for part in results]
    traced, *places = made
    if exact is not None:
        values = applied(Instead, traced._data, exact.values)
        traced = MaskedTensor._of(values, exact.valid, traced._reach)
    at = places[0]._data if places else None
    result, indices = wrapped(planned, tensor, Made(traced._data, traced._full_mask(), at))
    result._cells._reach = traced._reach
    return result, indices


def computed(planned: Plan, tensor: MaskedTensor, weights: MaskedTensor | None) -> MaskedTensor:
    """The values of a plan of a sparse tensor, by weights that are strided, where nobody follows."""
    assert isinstance(tensor, SparseTensor)
    refuse(planned)
    side = None if weights is None else aligned(weights, tensor._pattern)
    made = compute_all(planned, tensor, None if side is None else (side._data, side._mask))
    return wrapped(planned, tensor, made)[0]


def compute_all(planned: Plan, tensor: SparseTensor, weights: tuple[Tensor, Tensor | None] | None) -> Made:
    """compute(), where the memory is there: a reduction has a result for each slice, whether something is stored in it or not."""
    with every_cell_of(f"{planned.row.name}: a result", planned.out_shape, planned.result.n_bytes):
        return compute(planned, tensor, weights)


def wrapped(planned: Plan, tensor: SparseTensor, made: Made) -> tuple[MaskedTensor, MaskedTensor | None]:
    values = MaskedTensor._of(made.values, made.valid)
    indices = None if made.indices is None else MaskedTensor._of(made.indices, made.valid.clone())
    if isinstance(planned.row, Reduction):
        return values, indices
    return tensor._like(values), None if indices is None else tensor._like(indices)


def in_order(slices: Slices, cells: MaskedTensor) -> MaskedTensor:
    return cells if slices.order is None else cells[slices.order]


Trace = Callable[[Plan, Sequence[Operand]], Any]


def bucket_result(
    planned: Plan, slices: Slices, bucket: Bucket, cells: MaskedTensor, weights: MaskedTensor | None, trace: Trace
) -> tuple[MaskedTensor, ...]:
    """(values, places of picked ones in their whole slices, where the row picks) of slices of about as many cells."""
    given = [as_masked_tensor(part[bucket.at], bucket.stored) for part in (cells, weights) if part is not None]
    values, *picked = side_by_side(planned, given, trace)
    places = slices.places[bucket.at]
    return values, *[whole_places(places, at) for at in picked]


def whole_places(places: Tensor, picked: MaskedTensor) -> MaskedTensor:
    """Where the picked cells stand in their slices, of their indices among (rows, width) cells at `places`."""
    at, mask = picked._data, picked._full_mask()
    return MaskedTensor._of(select(places.gather(1, at if at.ndim > 1 else at.unsqueeze(1)).view_as(at), mask), mask)


def side_by_side(planned: Plan, given: Sequence[MaskedTensor], trace: Trace) -> tuple[MaskedTensor, ...]:
    """(values, places of picked ones) of slices beside each other."""
    operands = [Operand(part._data, part._mask, part._reach, True) for part in given]
    made = trace(rows_plan(planned, *given[0].shape, INNER_LEAF), operands)
    return (made,) if isinstance(made, MaskedTensor) else tuple(made)


def reductions_placed(
    planned: Plan, slices: Slices, some: Sequence[Bucket], parts: Sequence[MaskedTensor], empty: MaskedTensor
) -> MaskedTensor:
    """The results of slices among those of all; `empty` is that of a slice without cells."""
    rows = torch.cat([bucket.rows for bucket in some])
    together: Any = torch.cat(parts, -1)  # type: ignore[arg-type]  # MaskedTensors in, one out
    shape = (*together.shape[:-1], prod(planned.fold[::2]))
    every: Any = MaskedTensor._of(empty._data.expand(shape).clone(), empty._full_mask().expand(shape).clone())
    made: MaskedTensor = torch.index_copy(every, together.ndim - 1, slices.numbers[rows], together)  # type: ignore[assignment]  # as above
    return made.reshape(planned.out_shape)  # type: ignore[no-any-return]  # a method of the table


def cells_placed(slices: Slices, some: Sequence[Bucket], parts: Sequence[MaskedTensor]) -> MaskedTensor:
    """The results of stored cells, in the order of the pattern."""
    at = torch.cat([bucket.at[bucket.stored] for bucket in some])
    cells: Any = torch.cat([part[bucket.stored] for bucket, part in zip(some, parts, strict=True)])  # type: ignore[misc]  # MaskedTensors in, one out
    if slices.order is not None:
        at = slices.order[at]
    made: MaskedTensor = cells[at.argsort()]
    return made


class Unfollowed(torch.autograd.Function):
    """(values, mask) of an op without a derivative, inside a transform: only here have the stored cells their memory."""

    @staticmethod
    def forward(planned: Plan, pattern: Pattern, positions: Tensor, data: Tensor, mask: Tensor | None) -> Any:
        stored = SparseTensor._on(replace(pattern, positions=positions), MaskedTensor._of(data, mask))
        return compute(planned, stored)[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return (None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], planned: Plan, pattern: Pattern, *tensors: Tensor | None) -> Any:
        each = []
        for i in range(info.batch_size):
            own = [
                t if t is None or dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims[2:], strict=True)
            ]
            each.append(applied(Unfollowed, planned, pattern, *own))
        return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0)


class Instead(torch.autograd.Function):
    """Values of the same formula in the order of the strided tensor: its bits, and the trace of those computed here."""

    @staticmethod
    def forward(traced: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def side_input(row: SlicedRow, given: Any, tensor: SparseTensor) -> MaskedTensor:
    """The weights of the stored cells."""
    weights = tensor_of(given)
    if not fits(weights.shape, tensor.shape):
        raise ShapeError(
            f"{row.name}: weights have shape {tuple(weights.shape)}, the data {tuple(tensor.shape)}; weights must broadcast "
            "to the data: sizes equal or 1, counted from the last dim"
        )
    return aligned(as_masked(weights), tensor._pattern)


def fits(shape: torch.Size, whole: torch.Size) -> bool:
    grown = (1,) * (len(whole) - len(shape)) + tuple(shape)
    return len(grown) == len(whole) and all(m in (1, n) for m, n in zip(grown, whole, strict=True))


# -- products -----------------------------------------------------------------------------------------------------


def contraction(
    row: Contraction, operands: Sequence[Any], params: dict[str, Any], product: Callable[..., Any]
) -> MaskedTensor:
    """The sums of products of a sparse and a strided tensor: strided. `product` is the batched one of matrices."""
    if len(operands) != 2 or sum(map(is_sparse, operands)) != 1:
        what = "more than one of them" if sum(map(is_sparse, operands)) > 1 else f"{len(operands)} tensors"
        raise refused(f"{row.name} of {what}", next(o.shape for o in operands if is_sparse(o)))
    shapes = [tuple(o.shape) for o in operands]
    equation = checked(row, of_row(row) if row.equation else kernel(row.function)(row, shapes, params), shapes)
    at = 0 if is_sparse(operands[0]) else 1
    sparse, dense = operands[at], as_masked(operands[1 - at])
    own, other = equation.operands[at], equation.operands[1 - at]
    kept = [label for label in own if label in equation.result]
    met = [label for label in own if label not in equation.result]
    columns = [label for label in other if label not in own]
    sizes = dict(zip((*own, *other), (*sparse.shape, *dense.shape), strict=True)) | dict(
        zip(own, sparse.shape, strict=True)
    )
    meets = all(dense.shape[other.index(label)] == sizes[label] for label in met if label in other)
    is_batched = bool(set(kept) & set(other) or set(met) - set(other))
    if is_batched or not meets or len({*own, *other}) < len(own) + len(other) - len(met):
        raise refused(f"{row.name} in batches, or with a dim that broadcasts,", sparse.shape)
    n_met, n_rows = prod(sizes[label] for label in met), prod(sizes[label] for label in kept)
    turned = sparse.permute([own.index(label) for label in (*kept, *met)])
    n_columns = prod(sizes[label] for label in columns)
    flat = dense.permute([other.index(label) for label in (*met, *columns)]).reshape((n_met, n_columns))
    made = rows_by_matrix(turned, n_rows, n_met, flat, product)
    named = [*kept, *columns]
    shaped = made.reshape([sizes[label] for label in named])
    result: MaskedTensor = shaped.permute([named.index(label) for label in equation.result]).contiguous()
    return result


def rows_by_matrix(sparse: SparseTensor, n_rows: int, n_met: int, dense: Any, product: Callable[..., Any]) -> Any:
    """(rows, met) by (met, columns): each row's stored cells meet the rows of the matrix that they name."""
    slices = slices_of(sparse._pattern, (n_rows, n_met), (1,))
    n_columns = dense.shape[1]
    rows, parts = [], []
    for bucket in buckets(slices):
        for some in windowed(bucket, max(1, BLOCK_CELLS // max(bucket.at.shape[1] * n_columns, 1))):
            cells: Any = as_masked_tensor(sparse._cells[some.at], some.stored)
            parts.append(product(cells.unsqueeze(1), dense[slices.places[some.at]]).squeeze(1))
            rows.append(some.rows)
    together: Any = torch.cat(parts)
    positions = slices.numbers[torch.cat(rows)]
    pattern = Pattern(layout=torch.sparse_coo, shape=torch.Size((n_rows,)), positions=positions)
    return scattered(together, pattern, n_columns)


def scattered(rows: Any, pattern: Pattern, n_columns: int) -> Any:
    """Rows at their places among masked ones."""
    with every_cell_of("a product", (pattern.numel, n_columns), rows.itemsize):
        data = torch.zeros((pattern.numel, n_columns), dtype=rows.dtype, device=rows.device)
        every: Any = MaskedTensor._of(data, torch.zeros_like(data, dtype=torch.bool))
    return torch.index_copy(every, 0, pattern.positions, rows)


def windowed(bucket: Bucket, n: int) -> Iterator[Bucket]:
    for start in range(0, max(len(bucket.rows), 1), n):  # none is one window too
        yield Bucket(*[part[start : start + n] for part in bucket])


# -- moves --------------------------------------------------------------------------------------------------------


def moved(row: Move, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The row's way of moving positions."""
    if not row.on_patterns:
        raise refused(row.name, first_sparse(args).shape)
    first, *rest = args
    given = first if isinstance(first, list | tuple) else source_of(row.name, first)
    return kernel(row.on_patterns)(function(row), given, *rest, **kwargs)
