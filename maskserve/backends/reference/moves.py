"""Moves that a mask cannot make by torch's function alone: new cells, indices with masks of their own, other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select
from maskserve.errors import DtypeError, MaskedValueError, ParameterError, UncoveredFunctionError
from maskserve.masks import intersection
from maskserve.reach import channel, narrowed


class Masked(NamedTuple):
    """A tensor argument: its data, its mask (None: all valid) and its reach (None: nobody asks), of the same shape."""

    data: Tensor
    mask: Tensor | None
    reach: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Masked:
        mask, reach = [None if part is None else move(part) for part in self[1:]]
        return Masked(move(self.data), mask, reach)

    def full_reach(self) -> Tensor:
        return channel(self.data) if self.reach is None else self.reach

    def full_mask(self) -> Tensor:
        return (
            torch.ones(self.data.shape, dtype=torch.bool, device=self.data.device) if self.mask is None else self.mask
        )


def plain(name: str, argument: Any) -> Any:
    """A tensor that says where or how often, and so must be valid everywhere."""
    if not isinstance(argument, Masked):
        return argument
    if argument.mask is not None and not bool(argument.mask.all()):
        raise MaskedValueError(f"{name} has masked cells, and the result depends on them: give it to_tensor(fill)")
    return argument.data


# -- shapes and parts ---------------------------------------------------------------------------------------------


def reshape_as(cells: Masked, other: Masked) -> Masked:
    return cells.moved(lambda tensor: tensor.reshape(other.data.shape))


def view_as(cells: Masked, other: Masked) -> Masked:
    shape = other.data.shape
    return Masked(cells.data.view(shape), *[None if part is None else part.reshape(shape) for part in cells[1:]])


def expand_as(cells: Masked, other: Masked) -> Masked:
    return cells.moved(lambda tensor: tensor.expand(other.data.shape))


def real(cells: Masked) -> Masked:
    return cells._replace(data=cells.data.real)


def imag(cells: Masked) -> Masked:
    return cells._replace(data=cells.data.imag)


def view_as_real(cells: Masked) -> Masked:
    data = torch.view_as_real(cells.data)
    return Masked(data, *[None if part is None else part.unsqueeze(-1).expand(data.shape) for part in cells[1:]])


def view_as_complex(cells: Masked) -> Masked:
    mask, reach = cells.mask, cells.reach
    both = None if mask is None else mask.all(-1)
    if reach is not None and mask is not None:
        reach = narrowed(reach, mask.all(-1, keepdim=True))
    return Masked(torch.view_as_complex(cells.data), both, None if reach is None else reach.sum(-1))


def repeat_interleave(cells: Masked, repeats: Any, dim: int | None = None, *, output_size: int | None = None) -> Masked:
    n = plain("repeats", repeats)
    return cells.moved(lambda tensor: torch.repeat_interleave(tensor, n, dim, output_size=output_size))


# -- new cells ----------------------------------------------------------------------------------------------------


def pad(cells: Masked, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Masked:
    """torch.nn.functional.pad: new cells are masked, or valid where `value` is given; the other modes copy cells."""
    function = torch.nn.functional.pad
    if mode == "constant":
        check_fits("pad", cells.data, value)
        data = function(cells.data, pad, value=value)
        reach = None if cells.reach is None else function(cells.reach, pad)
        if value is not None and cells.mask is None:
            return Masked(data, None, reach)
        return Masked(data, function(cells.full_mask(), pad, value=value is not None), reach)
    if value is not None:
        raise ParameterError(f"pad: value goes with mode constant, not {mode}", parameter="value")
    # torch pads no bools and few integers in these modes: it pads positions, in f64, and these are looked up
    n, shape = cells.data.numel(), cells.data.shape
    at = function(torch.arange(n, dtype=torch.float64, device=cells.data.device).view(shape), pad, mode=mode).long()
    return cells.moved(lambda tensor: tensor.reshape(-1)[at])


def check_fits(name: str, data: Tensor, value: Any) -> None:
    integral = not (data.is_floating_point() or data.is_complex())
    if integral and isinstance(value, float) and value != value // 1:
        dtype = str(data.dtype).removeprefix("torch.")
        raise DtypeError(
            f"{name}: value {value} does not fit {dtype}; convert first: .to(torch.float64)", parameter="value"
        )


def masked_fill(cells: Masked, mask: Masked, value: Any) -> Masked:
    """The value is valid; a masked value masks, and where the condition is masked so is the result."""
    check_fits("masked_fill", cells.data, value)
    fill = value.data if isinstance(value, Masked) else value
    data = torch.masked_fill(cells.data, mask.data, fill)
    fill_mask = value.mask if isinstance(value, Masked) else None
    valid = cells.mask
    if cells.mask is not None or fill_mask is not None:
        valid = torch.where(mask.data, True if fill_mask is None else fill_mask, cells.full_mask())
    found = intersection([valid, mask.mask])
    reach = None
    if asked(cells, value):
        filled = value.full_reach() if isinstance(value, Masked) else channel(mask.data)
        reach = torch.where(mask.data, filled, cells.full_reach())
    if found is not None:
        found = found.expand(data.shape)
        reach = narrowed(reach, found)
    return Masked(data, found, reach)


def asked(*arguments: Any) -> bool:
    """Whether a gradient asks for the reach of any of them."""
    return any(isinstance(argument, Masked) and argument.reach is not None for argument in arguments)


def index_fill(cells: Masked, dim: int, index: Any, value: Any) -> Masked:
    check_fits("index_fill", cells.data, value)
    at = plain("index", index)
    data = cells.data.index_fill(dim, at, value.data if isinstance(value, Masked) else value)
    fill_mask = value.mask if isinstance(value, Masked) else None
    reach = None
    if asked(cells, value):
        reach = cells.full_reach().index_fill(dim, at, value.full_reach() if isinstance(value, Masked) else 0)
    if cells.mask is None and fill_mask is None:
        return Masked(data, None, reach)
    return Masked(data, cells.full_mask().index_fill(dim, at, True if fill_mask is None else bool(fill_mask)), reach)


# -- cells by index -----------------------------------------------------------------------------------------------


def picked(move: Callable[[Tensor, Tensor], Tensor], cells: Masked, index: Masked, valid: Tensor | None) -> Masked:
    """The cells at an index: a masked one reads cell 0, and the result is masked there."""
    at = select(index.data, index.mask)
    data, mask, reach = cells.moved(lambda tensor: move(tensor, at))
    together = intersection([mask, valid])
    if together is None:
        return Masked(data, None, reach)
    return Masked(data, together.expand(data.shape), narrowed(reach, together.expand(data.shape)))


def gather(cells: Masked, dim: int, index: Masked, *, sparse_grad: bool = False) -> Masked:
    return picked(lambda tensor, at: tensor.gather(dim, at, sparse_grad=sparse_grad), cells, index, index.mask)


def take(cells: Masked, index: Masked) -> Masked:
    return picked(torch.take, cells, index, index.mask)


def take_along_dim(cells: Masked, indices: Masked, dim: int | None = None) -> Masked:
    if dim is None:  # along all cells in their order
        cells, indices, dim = cells.moved(flat), indices.moved(flat), 0
    return picked(lambda tensor, at: torch.take_along_dim(tensor, at, dim), cells, indices, indices.mask)


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def index_select(cells: Masked, dim: int, index: Masked) -> Masked:
    valid = index.mask
    if valid is not None and cells.data.ndim:
        valid = valid.reshape([-1 if d == dim % cells.data.ndim else 1 for d in range(cells.data.ndim)])
    return picked(lambda tensor, at: tensor.index_select(dim, at), cells, index, valid)


def masked_select(cells: Masked, mask: Masked) -> Masked:
    chosen = mask.data if mask.mask is None else mask.data & mask.mask
    shape = torch.broadcast_shapes(cells.data.shape, chosen.shape)
    return cells.moved(lambda tensor: tensor.expand(shape)[chosen.expand(shape)])


# -- cells from another tensor ------------------------------------------------------------------------------------


def replaced(cells: Masked, source: Masked, place: Callable[[Tensor, Tensor], Tensor]) -> Masked:
    """`cells` with some of them taken from `source`, where `place(positions, source's positions)` puts them.

    Data and mask are looked up by one and the same placement: where an index names a cell twice, they agree on the winner.
    """
    device = cells.data.device
    kept = torch.full(cells.data.shape, -1, dtype=torch.int64, device=device)
    at = place(kept, torch.arange(source.data.numel(), device=device).view(source.data.shape))
    is_taken, at = at >= 0, at.clamp(min=0)

    def looked_up(own: Tensor, theirs: Tensor) -> Tensor:
        if not theirs.numel():  # joined, own cells keep the history of none
            return torch.cat([own.reshape(-1), theirs.reshape(-1).to(own.dtype)]).view(own.shape)
        return torch.where(is_taken, theirs.reshape(-1)[at].to(own.dtype), own)

    data = looked_up(cells.data, source.data)
    reach = looked_up(cells.full_reach(), source.full_reach()) if asked(cells, source) else None
    if cells.mask is None and source.mask is None:
        return Masked(data, None, reach)
    return Masked(data, looked_up(cells.full_mask(), source.full_mask()), reach)


def same_dtype(name: str, cells: Masked, source: Masked) -> None:
    if cells.data.dtype is not source.data.dtype:
        raise DtypeError(f"{name}: source is {source.data.dtype}, the tensor {cells.data.dtype}; convert one of them")


def scatter(
    cells: Masked, dim: int, index: Any, src: Any = None, *, value: Any = None, reduce: str | None = None
) -> Masked:
    """Cells along `dim` taken from `src`, a tensor of at least the index's shape, or all from one number."""
    if reduce is not None:
        raise UncoveredFunctionError("scatter with reduce= computes, and has no rule for a mask; scatter moves cells")
    at, given = plain("index", index), src if src is not None else value
    if isinstance(given, Masked) and given.data.ndim:
        same_dtype("scatter", cells, given)
        return replaced(cells, given, lambda kept, positions: kept.scatter(dim, at, positions))
    check_fits("scatter", cells.data, given)
    one = given if isinstance(given, Masked) else Masked(torch.as_tensor(given, device=cells.data.device), None)
    return replaced(cells, one, lambda kept, positions: kept.scatter(dim, at, 0))


def index_copy(cells: Masked, dim: int, index: Any, source: Masked) -> Masked:
    same_dtype("index_copy", cells, source)
    at = plain("index", index)
    return replaced(cells, source, lambda kept, positions: kept.index_copy(dim, at, positions))


def masked_scatter(cells: Masked, mask: Any, source: Masked) -> Masked:
    same_dtype("masked_scatter", cells, source)
    where = plain("mask", mask)
    return replaced(cells, source, lambda kept, positions: kept.masked_scatter(where, positions))
