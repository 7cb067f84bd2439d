"""Dims of several tensors beside each other: by name where all have names, else counted from the last. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from maskserve.dim_names import numbers_of
from maskserve.errors import DimError, ShapeError, nearest
from maskserve.payload.metadata import Dims

Shape: TypeAlias = tuple[int, ...]


class Shaped(Protocol):
    """What has a shape and perhaps names of dims."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dims(self) -> Dims | None: ...


def aligned(terms: Mapping[str, Shaped]) -> tuple[Dims | None, Mapping[str, Shape]]:
    """The names of the result's dims, and for each operand the dims that its own lie along: by name where all have names."""
    n_dims = max(len(term.shape) for term in terms.values())
    with_dims = [term for term in terms.values() if term.shape]
    if all(term.dims is not None for term in with_dims):
        named = [term.dims or () for term in with_dims]
        every = tuple(dict.fromkeys(name for dims in named for name in dims))
        dims = next((own for own in named if len(own) == len(every)), every)
        return dims, {word: tuple(dims.index(d) for d in term.dims or ()) for word, term in terms.items()}
    last = {word: tuple(range(n_dims - len(term.shape), n_dims)) for word, term in terms.items()}
    return next((t.dims for t in with_dims if t.dims is not None and len(t.shape) == n_dims), None), last


def broadcast(op: str, terms: Mapping[str, Shaped], axes: Mapping[str, Shape], n_dims: int) -> Shape:
    """The common shape of terms that lie along `axes`."""
    shape = [1] * n_dims
    for word, term in terms.items():
        for n, dim in zip(term.shape, axes[word], strict=True):
            if shape[dim] not in (1, n) and n != 1:
                shapes = " and ".join(described(t) for t in terms.values())
                raise ShapeError(f"{op}: shapes {shapes} do not broadcast; sizes must be equal or 1")
            shape[dim] = n if shape[dim] == 1 else shape[dim]
    return tuple(shape)


def laid_together(op: str, terms: Mapping[str, Shaped]) -> tuple[Shape, Dims | None, Mapping[str, Shape]]:
    """(common shape, names of its dims, the dims that each term's own lie along)."""
    dims, axes = aligned(terms)
    n_dims = len(dims) if dims is not None else max(len(term.shape) for term in terms.values())
    return broadcast(op, terms, axes, n_dims), dims, axes


def laid_over(name: str, side: Shaped, inputs: Shaped) -> Shape:
    _, axes = aligned({"input": inputs, name: side})
    n_dims = len(inputs.shape)
    by_name = not side.shape or not inputs.shape or (side.dims is not None and inputs.dims is not None)
    fits = len(side.shape) <= n_dims and (not by_name or set(side.dims or ()) <= set(inputs.dims or ()))
    if not fits or any(n not in (1, inputs.shape[d]) for n, d in zip(side.shape, axes[name], strict=True)):
        raise ShapeError(f"{name} has shape {described(side)}, the data {described(inputs)}: it cannot be laid over it")
    return axes[name]


def described(term: Shaped) -> str:
    if term.dims is None:
        return str(term.shape)
    return "(" + ", ".join(f"{d[:40]} {n}" for d, n in zip(term.dims, term.shape, strict=True)) + ")"


def dim_numbers(op: str, dims: Dims | None, given: Any) -> Any:
    """Dims by number; a name that there is none of is an error."""
    names, asked = dims or (), given if isinstance(given, tuple) else (given,)
    numbers = numbers_of(asked, names)
    if numbers is None:
        dim = next(dim for dim in asked if isinstance(dim, str) and dim not in names)
        have = f"it has {', '.join(names)}" if names else "its dims have no names: give a number"
        raise DimError(
            f"{op}: there is no dim {dim[:64]!r}; {have}{nearest(dim, names)}", parameter="dim", allowed=names
        )
    return numbers if isinstance(given, tuple) else numbers[0]
