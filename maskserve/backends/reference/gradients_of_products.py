"""Gradients of products and of running products. Nothing is divided by a cell, so a 0 among them is right in every derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.gradients import Slices, wide
from maskserve.plan import Plan


def flattened(plan: Plan, cells: Tensor) -> Tensor:
    """Kept dims first, then all reduced ones as a last dim."""
    if not plan.shape:
        return cells.reshape(1)
    kept = [dim for dim in range(len(plan.shape)) if dim not in plan.dims]
    return cells.permute(*kept, *plan.dims).flatten(len(kept))


def restored(plan: Plan, cells: Tensor) -> Tensor:
    """The dims of `flattened` cells where they were."""
    if not plan.shape:
        return cells.reshape(())
    order = [dim for dim in range(len(plan.shape)) if dim not in plan.dims] + list(plan.dims)
    return cells.reshape([plan.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])


def factors(plan: Plan, slices: Slices) -> Tensor:
    """The cells in torch's convention, flattened and wide, hidden ones 1."""
    cells = wide(slices.data).conj()
    return flattened(plan, cells if slices.mask is None else torch.where(slices.mask, cells, 1.0))


def prod(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The product of the other cells."""
    return g * restored(plan, others(factors(plan, slices)))


def others(cells: Tensor) -> Tensor:
    """The product of all cells of the last dim but each one: halves are multiplied up a tree, and their siblings down it."""
    n = cells.shape[-1]
    if n < 2:
        return torch.ones_like(cells)
    half = (n + 1) // 2
    left, right = cells[..., :half], cells[..., half:]
    if n % 2:
        right = torch.cat([right, torch.ones_like(right[..., :1])], -1)
    above = others(left * right)
    return torch.cat([above * right, above * left], -1)[..., :n]
