"""Where the cells of a move go, from shapes alone: each dim of the result, its size and the dim that it was. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

from maskserve.errors import DimError, ParameterError, ShapeError

Shape: TypeAlias = tuple[int, ...]
Params: TypeAlias = Mapping[str, Any]
MOST_CELLS = 2**62
"""What sizes may multiply to."""


class Place(NamedTuple):
    """A dim of a result: its size, and which dim of the input it is; None where it is a new one."""

    size: int
    source: int | None


Layout: TypeAlias = tuple[Place, ...]
Rule: TypeAlias = Callable[[Shape, Params], Layout]


def as_is(shape: Shape) -> Layout:
    return tuple(Place(size, dim) for dim, size in enumerate(shape))


def number(dim: int, n_dims: int) -> int:
    """The dim from 0 on; a tensor without dims has the one that torch gives it.

    >>> number(-1, 3), number(0, 0)
    (2, 0)
    """
    most = max(n_dims, 1)
    if not -most <= dim < most:
        raise DimError(f"dim {dim} is out of range: it must be from {-most} to {most - 1}", parameter="dim")
    return dim % most


def numbers(dims: Iterable[int], n_dims: int) -> Shape:
    found = tuple(number(dim, n_dims) for dim in dims)
    if len({*found}) < len(found):
        raise DimError(f"dims {found} name one dim twice", parameter="dim")
    return found


# -- dims in another order ----------------------------------------------------------------------------------------


def transpose(shape: Shape, params: Params) -> Layout:
    places = list(as_is(shape))
    a, b = (number(params[name], len(shape)) for name in ("dim0", "dim1"))
    if places:
        places[a], places[b] = places[b], places[a]
    return tuple(places)


def matrix(shape: Shape, params: Params) -> Layout:
    if len(shape) > 2:
        raise ShapeError(f"the input has shape {shape}; it must have at most 2 dims")
    return as_is(shape)[::-1]


def last_two(shape: Shape, params: Params) -> Layout:
    if len(shape) < 2:
        raise ShapeError(f"the input has shape {shape}; it must have at least 2 dims")
    return transpose(shape, {"dim0": -2, "dim1": -1})


def permute(shape: Shape, params: Params) -> Layout:
    dims = numbers(params["dims"], len(shape))
    if len(dims) != len(shape):
        raise DimError(f"dims names {len(dims)} dims, and the input has {len(shape)}: give each once", parameter="dims")
    return tuple(as_is(shape)[dim] for dim in dims)


def movedim(shape: Shape, params: Params) -> Layout:
    sources, places = (numbers(params[name], len(shape)) for name in ("source", "destination"))
    if len(sources) != len(places):
        raise ParameterError("source and destination name as many dims as each other", parameter="destination")
    at = dict(zip(places, sources, strict=True))
    rest = iter(dim for dim in range(len(shape)) if dim not in sources)
    return tuple(as_is(shape)[at[dim] if dim in at else next(rest)] for dim in range(len(shape)))


# -- dims of size 1 -----------------------------------------------------------------------------------------------


def squeeze(shape: Shape, params: Params) -> Layout:
    given = params.get("dim")
    dims = range(len(shape)) if given is None else numbers(given, len(shape))
    return tuple(place for place in as_is(shape) if not (place.size == 1 and place.source in dims))


def unsqueeze(shape: Shape, params: Params) -> Layout:
    dim, places = number(params["dim"], len(shape) + 1), list(as_is(shape))
    places.insert(dim, Place(1, None))
    return tuple(places)


def expand(shape: Shape, params: Params) -> Layout:
    sizes = params["size"]
    n_new = len(sizes) - len(shape)
    if n_new < 0:
        raise ShapeError(f"size {sizes} has fewer dims than the input's shape {shape}")
    places = []
    for at, size in enumerate(sizes):
        own = shape[at - n_new] if at >= n_new else None
        if size < -1 or (size == -1 and own is None) or (own not in (None, 1, size) and size != -1):
            raise ShapeError(f"shape {shape} does not expand to {sizes}: sizes must be equal, or 1 in the input")
        places.append(Place(own if size == -1 and own is not None else size, None if own is None else at - n_new))
    return whole(tuple(places))


# -- other shapes -------------------------------------------------------------------------------------------------


def reshape(shape: Shape, params: Params) -> Layout:
    """A size of -1 is what is left."""
    sizes, n_cells = list(params["shape"]), prod(shape)
    known = prod(size for size in sizes if size != -1)
    n_open = sizes.count(-1)
    if n_open == 1 and known > 0 and n_cells % known == 0:
        sizes[sizes.index(-1)] = n_cells // known
    if any(size < 0 for size in sizes) or prod(sizes) != n_cells:
        raise ShapeError(f"shape {shape} has {n_cells} cells, which do not fill {tuple(params['shape'])}")
    # a dim that nothing before or after it was joined with stays itself
    before, after = shared(shape, sizes), shared(shape[::-1], sizes[::-1])
    after = min(after, len(shape) - before, len(sizes) - before)
    old, new = len(shape) - after, len(sizes) - after
    return tuple(
        Place(size, at if at < before else at - new + old if at >= new else None) for at, size in enumerate(sizes)
    )


def shared(one: Iterable[int], other: Iterable[int]) -> int:
    """How many first sizes are the same."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def flatten(shape: Shape, params: Params) -> Layout:
    first, last = (number(params.get(name, own), len(shape)) for name, own in (("start_dim", 0), ("end_dim", -1)))
    if first > last:
        raise DimError(f"start_dim {first} comes after end_dim {last}", parameter="start_dim")
    places = as_is(shape)
    if not shape:
        return (Place(1, None),)
    joined = places[first] if first == last else Place(prod(shape[first : last + 1]), None)
    return (*places[:first], joined, *places[last + 1 :])


# -- parts of a dim -----------------------------------------------------------------------------------------------


def select(shape: Shape, params: Params) -> Layout:
    dim, index = own_dim(shape, params["dim"]), params["index"]
    if not -shape[dim] <= index < shape[dim]:
        raise DimError(f"index {index} is out of range for dim {dim}, which has size {shape[dim]}", parameter="index")
    return tuple(place for place in as_is(shape) if place.source != dim)


def narrow(shape: Shape, params: Params) -> Layout:
    dim, start, length = own_dim(shape, params["dim"]), params["start"], params["length"]
    size = shape[dim]
    first = start + size if start < 0 else start
    if length < 0 or not 0 <= first <= size or first + length > size:
        raise ShapeError(f"start {start} and length {length} lie outside of dim {dim}, which has size {size}")
    return tuple(Place(length, dim) if place.source == dim else place for place in as_is(shape))


def own_dim(shape: Shape, dim: int) -> int:
    if not shape:
        raise DimError("the input has no dims", parameter="dim")
    return number(dim, len(shape))


def diagonal(shape: Shape, params: Params) -> Layout:
    if len(shape) < 2:
        raise ShapeError(f"the input has shape {shape}; it must have at least 2 dims")
    given = (params.get("dim1", 0), params.get("dim2", 1))
    dims, offset = numbers(given, len(shape)), params.get("offset", 0)
    rows, columns = (shape[dim] for dim in dims)
    length = max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)
    return (*(place for place in as_is(shape) if place.source not in dims), Place(length, None))


# -- cells in another order ---------------------------------------------------------------------------------------


def in_place(shape: Shape, params: Params) -> Layout:
    numbers(params.get("dims", ()), len(shape))
    return as_is(shape)


def rolled(shape: Shape, params: Params) -> Layout:
    """Each shift has its dim, which may come twice; a single one without dims is along all cells."""
    shifts, dims = params["shifts"], params.get("dims") or None
    if not prod(shape) and len(shifts) == len(dims or ()) == 1:  # torch does not even look at the dim
        return as_is(shape)
    if len(shifts) != (1 if dims is None else len(dims)):
        raise ParameterError("give a dim for each shift: shifts=(1, 2), dims=(0, 1)", parameter="dims")
    for dim in dims or ():
        own_dim(shape, dim)
    return as_is(shape)


def triangle(shape: Shape, params: Params) -> Layout:
    if len(shape) < 2:
        raise ShapeError(f"the input has shape {shape}; it must have at least 2 dims")
    return as_is(shape)


def whole(layout: Layout) -> Layout:
    """The layout, whose cells torch can count."""
    if prod(max(place.size, 1) for place in layout) > MOST_CELLS:
        raise ShapeError(f"shape {tuple(place.size for place in layout)} has more cells than there can be")
    return layout
