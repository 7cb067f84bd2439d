"""(row, params, shape, dtype, device) -> Plan: everything that can be decided before a cell is read. Pure and torch-free.

The order of a result's arithmetic is decided here and nowhere else: `fold` and `leaf` follow from the shape and the
dims alone (docs/order.md), so strides, threads and blocks cannot change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from maskserve import dtypes
from maskserve.dtypes import DType, f64, i64, u64
from maskserve.errors import DimError, DtypeError, ParameterError
from maskserve.ops.parameters import Type
from maskserve.ops.rows import Normalization, Ordering, Pass, Reduction, Row, Scan
from maskserve.params import accept, resolve

INNER_LEAF = 4096
OUTER_LEAF = 64

Shape = tuple[int, ...]
SlicedRow = Reduction | Normalization | Scan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """One op on one shape: `fold` is the shape as (kept, reduced, kept, reduced, ..., kept), size-1 dims left out.

    `stored` is the dtype of the cells as they come, `dtype` the one that kernels see: what torch cannot compute with
    is widened, and u64 is seen as i64 with the sign bit flipped, which keeps its order.
    """

    row: SlicedRow
    params: Mapping[str, Any]
    shape: Shape
    stored: DType
    dtype: DType
    device: str
    result: DType
    dims: Shape
    out_shape: Shape
    fold: Shape
    leaf: int

    @property
    def passes(self) -> tuple[Pass, ...]:
        if isinstance(self.row, Scan):
            return ()
        return self.row.weighted if self.weighted and isinstance(self.row, Reduction) else self.row.passes

    @property
    def weighted(self) -> bool:
        """Whether each cell counts for its weight."""
        return self.params.get("weights") is not None

    @property
    def finalize(self) -> str:
        """The kernel that ends the passes."""
        assert isinstance(self.row, Reduction)
        return self.row.finalize_weighted if self.weighted else self.row.finalize

    @property
    def sorted_width(self) -> int:
        """The bytes that a kernel holds for each cell that it works on beside it, where it sorts a copy of the valid ones."""
        return 4 * max(self.dtype.n_bytes, 4) if self.row.sorts else 0

    @property
    def slice_cells(self) -> int:
        return math.prod(self.shape[dim] for dim in self.dims)

    @property
    def labels(self) -> tuple[float, ...] | None:
        """The labels of a new first dim, where several results a slice are asked for."""
        return self.row.leading(self.params) if isinstance(self.row, Reduction) else None

    @property
    def flipped(self) -> bool:
        """Whether kernels see u64 cells as i64, 2**63 less than they are."""
        return self.stored is u64 and self.dtype is i64

    @property
    def as_stored(self) -> bool:
        """Whether kernels see the cells in the dtype that they have in memory."""
        return self.stored is self.dtype

    @property
    def n_reduced(self) -> int:
        """The cells of one slice."""
        return math.prod(self.fold[1::2])


@lru_cache(maxsize=1024)
def batched(plan: Plan, n: int) -> Plan:
    """The same for n tensors at once, along a new first dim that is kept."""
    shape, dims = (n, *plan.shape), tuple(dim + 1 for dim in plan.dims)
    labels = 0 if plan.labels is None else 1
    out_shape = (*plan.out_shape[:labels], n, *plan.out_shape[labels:])
    return replace(plan, shape=shape, dims=dims, out_shape=out_shape, fold=fold(shape, dims))


@lru_cache(maxsize=1024)
def narrowed(plan: Plan, dim: int, n: int) -> Plan:
    """The same on n cells of a dim that is kept."""
    shape = tuple(n if d == dim else size for d, size in enumerate(plan.shape))
    out_shape = shape
    if isinstance(plan.row, Reduction):
        labels = () if plan.labels is None else (len(plan.labels),)
        out_shape = labels + reduced_shape(shape, plan.dims, keepdim=plan.params["keepdim"])
    elif isinstance(plan.row, Ordering):
        out_shape = tuple(n if d == dim else size for d, size in enumerate(plan.out_shape))
    return replace(plan, shape=shape, out_shape=out_shape, fold=fold(shape, plan.dims))


@lru_cache(maxsize=1024)
def with_masked_slices(plan: Plan) -> Plan:
    """The same, where a slice with too few valid cells gives a masked one and no number."""
    return replace(plan, params=MappingProxyType({**plan.params, "empty": "mask"}))


def fold(shape: Shape, dims: Shape) -> Shape:
    """The sizes (kept, reduced, kept, ..., kept) of `shape` with `dims` reduced; adjacent dims of a kind are one.

    Dims of size 1 are left out: they change neither a cell's index nor the order.

    >>> fold((2, 3, 4), (1,)), fold((2, 3, 4), (0, 2)), fold((5, 1, 7), (0, 2)), fold((), ())
    ((2, 3, 4), (1, 2, 3, 4, 1), (1, 35, 1), (1, 1, 1))
    """
    sizes = [1]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        is_reduced = len(sizes) % 2 == 0
        if (dim in dims) == is_reduced:
            sizes[-1] *= size
        else:
            sizes.append(size)
    if len(sizes) == 1:
        sizes.append(1)
    if len(sizes) % 2 == 0:
        sizes.append(1)
    return tuple(sizes)


def plan(row: SlicedRow, given: tuple[tuple[str, Any], ...], shape: Shape, dtype: DType, device: str) -> Plan:
    """The plan of `row` with the parameters `given` on data of this shape; raises where they do not fit."""
    try:
        return _plan(row, given, tuple([kind_of(value) for _, value in given]), shape, dtype, device)
    except TypeError as error:
        if isinstance(error, DtypeError):
            raise
        for name, value in given:
            try:
                hash(value)
            except TypeError:
                raise ParameterError(
                    f"{row.name}: {name} cannot be a {type(value).__name__}", parameter=name
                ) from error
        raise


def kind_of(value: Any) -> Any:
    return tuple([type(item) for item in value]) if value.__class__ is tuple else value.__class__


@lru_cache(maxsize=1024)
def _plan(
    row: SlicedRow,
    given: tuple[tuple[str, Any], ...],
    kinds: tuple[Any, ...],  # 1 and True are one key otherwise
    shape: Shape,
    dtype: DType,
    device: str,
) -> Plan:
    accept(row, dtype)
    params = resolve(row, dict(given))
    check_cells(row, params, dtype)
    dims = normalize_dims(row, params.get("dim"), shape)
    result = row.result(as_floats(dtype), params)
    check_result(row, as_floats(dtype), result, row.result(as_floats(dtype), {**params, "dtype": None}))
    folded = fold(shape, dims)
    out_shape = shape
    if isinstance(row, Reduction):
        check_reduction(row, params, result)
        labels = row.leading(params)
        out_shape = (() if labels is None else (len(labels),)) + reduced_shape(shape, dims, keepdim=params["keepdim"])
    elif isinstance(row, Ordering):
        if not shape and resized(row, params, 1) == 0:
            params["k"] = 1  # a result without dims has one cell; so it is in torch
        out_shape = tuple(resized(row, params, n) if dim in dims else n for dim, n in enumerate(shape))
    return Plan(
        row=row,
        params=MappingProxyType(params),
        shape=shape,
        stored=dtype,
        dtype=seen(row, dtype),
        device=device,
        result=result,
        dims=dims,
        out_shape=out_shape,
        fold=folded,
        leaf=INNER_LEAF if folded[-1] == 1 else OUTER_LEAF,
    )


def resized(row: Ordering, params: Mapping[str, Any], n: int) -> int:
    """How many cells the row gives of the `n` of a slice."""
    size = row.size(params, n)
    if size > n:
        raise ParameterError(
            f"{row.name}: {size} cells are asked for, and a slice has {n}; give at most {n}", parameter="k"
        )
    return size


def as_floats(dtype: DType) -> DType:
    """fp8 is storage alone: its results are float32."""
    return dtypes.WIDENED[dtype] if dtype.is_float and dtype in dtypes.WIDENED else dtype


def seen(row: SlicedRow, dtype: DType) -> DType:
    """The dtype in which kernels see cells of `dtype`."""
    wide = i64 if dtype is u64 else dtypes.WIDENED.get(dtype, dtype)
    negates = isinstance(row, Normalization) and row.negates
    return f64 if negates and wide.is_integral else wide


def check_result(row: Row, dtype: DType, result: DType, natural: DType) -> None:
    """`dtype=` may float an integer, or narrow or widen within a kind; it may not drop fractions without a word."""
    whole = dtypes.INTEGRAL - {dtypes.boolean} if natural.is_integral else frozenset()
    allowed = dtypes.FLOATING | whole
    if result is not natural and result not in allowed:
        names = [d.name for d in dtypes.ALL if d in allowed]
        raise DtypeError(
            f"{row.name} of {dtype.name} cannot give {result.name}: give one of {', '.join(names)}",
            parameter="dtype",
            allowed=names,
        )


def check_cells(row: Row, params: Mapping[str, Any], dtype: DType) -> None:
    """A number that becomes a cell must be one that the data's dtype can hold."""
    for parameter in row.parameters:
        value = params[parameter.name]
        if parameter.type is Type.CELL and value is not None and not dtype.holds(value):
            raise ParameterError(
                f"{row.name}: {parameter.name} {value!r:.40} does not fit {dtype.name}; give a value that does, or convert "
                "the data first",
                parameter=parameter.name,
            )


def check_reduction(row: Reduction, params: Mapping[str, Any], result: DType) -> None:
    empty = params.get("empty")
    if isinstance(empty, int | float) and not result.holds(empty):
        raise ParameterError(
            f"{row.name}: empty={empty!r:.40} does not fit the result's dtype {result.name}; give a number that does"
            + ("" if result.is_float else ", or dtype=f64"),
            parameter="empty",
        )
    if params.get("min_count") == 0 and row.identity is None:
        raise ParameterError(
            f"{row.name}: min_count=0 needs an identity, and {row.name} of no cells is undefined; use min_count=1",
            parameter="min_count",
        )
    if params.get("weights") in dtypes.COMPLEX:
        raise DtypeError(f"{row.name}: weights are {params['weights'].name}; give real ones", parameter="weights")
    if params.get("weights") is not None and params.get("correction"):
        raise ParameterError(
            f"{row.name}: weights are no counts, so no correction is defined for them; give correction=0",
            parameter="correction",
        )


def normalize_dims(row: Row, dims: tuple[int, ...] | None, shape: Shape) -> Shape:
    """Sorted non-negative dims; None and () mean all, as in torch."""
    ndim = len(shape)
    if dims is None or dims == ():
        return tuple(range(ndim))
    last = max(ndim, 1)  # torch takes dim 0 and -1 of a 0-d tensor
    for dim in dims:
        if not -last <= dim < last:
            raise DimError(
                f"{row.name}: dim {dim} is out of range for a tensor with {ndim} dims; "
                + (f"give {-last} to {last - 1}" if ndim else "a single cell has only dim 0"),
                parameter="dim",
                allowed=[str(d) for d in range(-last, last)],
            )
    normal = sorted(dim % last for dim in dims)
    if len(set(normal)) < len(normal):
        raise DimError(f"{row.name}: dim {dims} names a dim twice; name each once", parameter="dim")
    return tuple(normal) if ndim else ()


def reduced_shape(shape: Shape, dims: Shape, *, keepdim: bool) -> Shape:
    """`shape` with `dims` gone, or of size 1 with keepdim.

    >>> reduced_shape((2, 3, 4), (1,), keepdim=False), reduced_shape((2, 3), (0, 1), keepdim=True)
    ((2, 4), (1, 1))
    """
    if keepdim:
        return tuple(1 if dim in dims else size for dim, size in enumerate(shape))
    return tuple(size for dim, size in enumerate(shape) if dim not in dims)
