"""Side inputs: tensors that a request names beside what it computes on, laid over each variable. Imports no torch.

A side input comes from the payload itself or, by name, from another one. It is never computed on, counted or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from maskserve.errors import MaskserveError, ShapeError, UnknownTensorError
from maskserve.ops.parameters import Parameter, Type
from maskserve.ops.rows import Row
from maskserve.payload.format import Payload
from maskserve.payload.header import Shape, TensorInfo, shown, shown_shape
from maskserve.payload.metadata import Means, dim_names, mask_means_of
from maskserve.payload.slices import BLOCK_CELLS, cells_at, numbers
from maskserve.payload.variables import Dims, Variable, Variables, resolve, unknown

if TYPE_CHECKING:
    from maskserve.payload.slices import Array

ELSEWHERE = "another payload"
"""What history says of a tensor from another payload: its path is nobody's business, and differs by door."""
Payloads = Mapping[str, Payload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A side input of one variable: where it is, and how its dims lie over the variable's."""

    parameter: Parameter
    payload: Payload
    variable: Variable
    order: Shape
    """Its dims in the variable's order."""
    shape: Shape
    """Its sizes, dims in that order, with 1 for each dim that it lacks: as many as the variable has."""
    means: Means
    """What true says in it where it is itself a mask."""


def parameters(row: Row) -> tuple[Parameter, ...]:
    """The parameters of a row that name tensors in a request."""
    return tuple(p for p in row.requestable if p.type is Type.TENSOR)


def names(row: Row, params: Mapping[str, object], payload: Payload, others: Payloads) -> tuple[str, ...]:
    """The tensors of `payload` itself that the request names as side inputs."""
    found = []
    for p in parameters(row):
        name = str(params[p.name]) if p.name in params else None
        if name is None or name in others:
            continue
        if name not in payload.header.tensors:
            raise unknown(name, payload.header.tensors, parameter=p.name)
        found.append(name)
    return tuple(found)


def of_variable(
    row: Row,
    params: Mapping[str, object],
    variable: Variable,
    variables: Variables,
    payload: Payload,
    others: Payloads,
    means: Means | None,
) -> Iterator[Side]:
    """Every side input that the request names, laid over `variable`."""
    for p in parameters(row):
        if p.name not in params:
            continue
        name = str(params[p.name])
        source = others.get(name, payload)
        side = matching(source, variable.name, name, p, means) if name in others else variables.side_inputs[name]
        if source is not payload:
            refuse_other_places(p, name, side, variable, source, payload)
        order, shape = laid_over(side, variable, p)
        said = mask_means_of(source.header.metadata, means)
        yield Side(parameter=p, payload=source, variable=side, order=order, shape=shape, means=said)


def matching(payload: Payload, name: str, word: str, parameter: Parameter, means: Means | None) -> Variable:
    """The variable of another payload that has this name, or its only one."""
    tensors = payload.header.tensors
    if len(tensors) == 1:  # a mask by itself is not an orphan here
        (info,) = tensors.values()
        return Variable(info=info, mask=None, dims=dim_names(payload.header).get(info.name))
    try:
        variables = resolve(payload.header, mask_means=means)
    except MaskserveError as error:
        error.message = f"{parameter.name}: {shown(word)}: {error.message}"
        raise
    if name in variables.computed:
        return variables.computed[name]
    if len(variables) == 1:
        return next(iter(variables))
    raise UnknownTensorError(
        f"{parameter.name}: {shown(word)} has no variable {shown(name)}, and {len(variables)} others; "
        "give a payload with one of that name, or with one alone",
        parameter=parameter.name,
        allowed=[shown(known) for known in variables.computed],
    )


def refuse_other_places(
    p: Parameter, word: str, side: Variable, variable: Variable, source: Payload, payload: Payload
) -> None:
    """Raise where a coordinate of the same name says otherwise in the two payloads: their cells do not belong together."""
    for dim in set(side.dims or ()) & set(variable.dims or ()):
        own, other = payload.header.tensors.get(dim), source.header.tensors.get(dim)
        if own is None or other is None or own.shape != other.shape or 1 in own.shape:
            continue
        if not same_places(partial(places, payload, own), partial(places, source, other)):
            raise ShapeError(
                f"{p.name}: the coordinate {shown(dim)} of {shown(word)} differs from the data's: its cells lie elsewhere, or "
                "in another order; write it on the data's grid first",
                parameter=p.name,
            )


def places(payload: Payload, coordinate: TensorInfo) -> Iterator[Array]:
    """The cells of a coordinate as float64, some at a time."""
    import numpy as np

    for start in range(0, coordinate.n_cells, BLOCK_CELLS):
        cells = cells_at(payload, coordinate, start, min(BLOCK_CELLS, coordinate.n_cells - start))
        yield numbers(cells, coordinate.dtype).astype(np.float64)


def same_places(mine: Callable[[], Iterator[Array]], theirs: Callable[[], Iterator[Array]]) -> bool:
    """Whether two coordinates agree up to what rounding to another dtype may move: far less than the way to a neighbour."""
    import numpy as np

    near = 1e-3 * least_gap(mine())
    atol = near if np.isfinite(near) else 0
    return all(np.isclose(a, b, rtol=0, atol=atol, equal_nan=True).all() for a, b in zip(mine(), theirs(), strict=True))


def least_gap(blocks: Iterator[Array]) -> float:
    """The least way from a place to another that follows it; infinite where all are one."""
    import numpy as np

    least, last = np.inf, np.empty(0)
    for block in blocks:
        finite = np.concatenate([last, block[np.isfinite(block)]])
        gaps, last = np.abs(np.diff(finite)), finite[-1:]
        least = gaps[gaps > 0].min(initial=least)
    return float(least)


def laid_over(side: Variable, variable: Variable, parameter: Parameter) -> tuple[Shape, Shape]:
    """(order, shape) of a side input over a variable: by the names of dims where both have them, else from the last dim."""
    shape = side.info.shape
    if side.dims is None or variable.dims is None:
        order: Shape = tuple(range(len(shape)))
        laid: Shape = (1,) * (len(variable.info.shape) - len(shape)) + shape
    else:
        order, laid = by_names(side, side.dims, variable, variable.dims, parameter)
    if len(laid) > len(variable.info.shape) or any(
        n not in (1, size) for n, size in zip(laid, variable.info.shape, strict=True)
    ):
        raise ShapeError(
            f"{parameter.name}: {shown(side.name)} has shape {shown_shape(shape)}, {shown(variable.name)} "
            f"{shown_shape(variable.info.shape)}; sizes must be equal or 1, "
            + ("counted from the last dim" if order == tuple(range(len(shape))) else "dim by dim of the same name"),
            parameter=parameter.name,
        )
    return order, laid


def by_names(side: Variable, own: Dims, variable: Variable, dims: Dims, parameter: Parameter) -> tuple[Shape, Shape]:
    missing = [dim for dim in own if dim not in dims]
    if missing:
        raise ShapeError(
            f"{parameter.name}: {shown(side.name)} has the dim {shown(missing[0])}, and {shown(variable.name)} has "
            f"{', '.join(map(shown, dims)) or 'none'}: it cannot be laid over it; tensor (--tensor) picks the variables",
            parameter=parameter.name,
        )
    order = tuple(own.index(dim) for dim in dims if dim in own)
    return order, tuple(side.info.shape[own.index(dim)] if dim in own else 1 for dim in dims)
