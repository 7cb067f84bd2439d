"""What moves leave of compact masks. A compact mask is rows, one after another, and a dim along which each row says which
cells are valid; as long as torch's own strides tell where rows and that dim went, the result has a compact mask too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve.compact import Compact
from maskserve.tracing import in_transform

Move = Callable[[Any], Any]


class Rows(NamedTuple):
    """Some rows of a mask, in dims of their own: sizes, and strides in rows, from row `first` on."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int

    def of(self, cells: Tensor, n_dims: int) -> Tensor:
        """What rows of `cells`, of which so many dims say which row, hold; a view."""
        own = cells.contiguous()
        width = prod(own.shape[n_dims:])
        strides = (*(width * step for step in self.strides), *own.stride()[n_dims:])
        return own.as_strided((*self.sizes, *own.shape[n_dims:]), strides, own.storage_offset() + width * self.first)


class Steps(NamedTuple):
    """Some cells of a row: n of them, `step` apart, from `start` on; step 0: one and the same."""

    start: int
    step: int
    n: int

    @property
    def last(self) -> int:
        return self.start + (self.n - 1) * self.step


def viewed(mask: Compact, go: Move) -> Any:
    """The mask of each result of a move that copies no cell, as torch's function gives them; None where one has none."""
    n = mask.shape[mask.dim]
    gap = n + 1  # between rows: torch takes no two dims of rows and places for one
    sizes = mask.shape[: mask.dim]
    strides = [gap * prod(sizes[dim + 1 :]) for dim in range(mask.dim)]
    probe = torch.empty_strided(
        mask.shape, (*strides, 1, *(0 for _ in mask.shape[mask.dim + 1 :])), dtype=torch.uint8, device="meta"
    )
    try:
        made = go(probe)
    except RuntimeError:  # no view of these strides, or no answer without cells
        return None
    if isinstance(made, Tensor):
        return seen(mask, probe, made)
    found = [seen(mask, probe, one) for one in made]
    return None if any(one is None for one in found) else found


def seen(mask: Compact, probe: Tensor, view: Tensor) -> Compact | None:
    """The mask of a view, whose strides say by how many rows, or by how many cells of a row, each dim steps."""
    if view.untyped_storage()._cdata != probe.untyped_storage()._cdata or not view.numel():
        return None
    n = mask.shape[mask.dim]
    gap = n + 1
    steps = {dim: step for dim, step in enumerate(view.stride()) if step and view.shape[dim] > 1}
    along = [dim for dim, step in steps.items() if step < gap]
    of_rows = [dim for dim in steps if dim not in along]
    dim = along[0] if along else max(of_rows, default=-1) + 1
    first, start = divmod(int(view.storage_offset()), gap)
    if len(along) > 1 or dim >= view.ndim or any(d > dim or steps[d] % gap for d in of_rows):
        return None
    places = Steps(start, steps.get(dim, 0) if along else 0, view.shape[dim])
    if places.last >= n:
        return None
    rows = Rows(tuple(view.shape[:dim]), tuple(steps.get(d, 0) // gap for d in range(dim)), first)
    return mask.taken(rows, places, view.shape)


def picked(mask: Compact, index: Any, shape: torch.Size) -> Compact | None:
    """The mask of torch's index, a tensor of `shape`: by tensors and lists where those take whole rows alone."""
    if in_transform():
        return None
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, Tensor | list) for part in parts):
        found: Compact | None = viewed(mask, lambda cells: cells[index])
        return found
    parts = parts[:-1] if parts[-1] is ... else parts
    widths = [width_of(part) for part in parts]
    if 0 in widths or sum(widths) > mask.dim:
        return None
    return mask.of_rows(mask.cells[parts], shape)


def width_of(part: Any) -> int:
    """How many dims a part of an index takes; 0 for what does not say so at a glance."""
    if isinstance(part, Tensor):
        return part.ndim if part.dtype in (torch.bool, torch.uint8) else 1
    if isinstance(part, list):
        return int(all(type(one) in (int, bool) for one in part))
    return int(type(part) in (int, slice))


def joined(
    masks: Sequence[Compact | None], shapes: Sequence[torch.Size], go: Move, shape: torch.Size
) -> Compact | None:
    """The mask of tensors one after the other, where a move puts whole rows beside each other; None of a mask: all valid."""
    first = next((mask for mask in masks if mask is not None), None)
    if first is None:
        return None
    behind = len(first.shape) - first.dim
    tail = first.shape[first.dim :]
    if shape[-behind:] != tail or any(own[-behind:] != tail for own in shapes):
        return None
    given = [first.all_valid(own) if mask is None else mask for mask, own in zip(masks, shapes, strict=True)]
    if any(type(mask) is not type(first) or len(mask.shape) - mask.dim != behind for mask in given):
        return None
    laid = [mask.laid() for mask in given]
    made = go(laid)
    fits = made.shape[-behind:] == laid[0].shape[-behind:]
    return first.of_rows(made.reshape((*made.shape[:-behind], *first.row_shape)), shape) if fits else None
