"""The reference back end: plain torch on any device, and the meaning of every row."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts, join
from maskserve.compact import Part, spread_part
from maskserve.ops.rows import Pass, kernel_name
from maskserve.plan import Plan

Merge = Callable[[Parts, Parts], Parts]


@cache
def kernel(reference: str) -> Any:
    """The kernel that a row names."""
    module, name = kernel_name(reference)
    return getattr(importlib.import_module(module), name)


class ReferenceBackend:
    """Serves every plan."""

    name = "reference"
    block_cells = 1 << 16
    """A block and its float64 copies stay in L2; smaller ones cost more in calls than they save."""
    threads_inside = True
    """torch spreads each call over its own threads, so the engine hands over one block at a time."""
    widths_held = 9
    """Those of normalize of complex cells; most hold blocks alone."""
    omits_nan = False
    reads_compact = False

    def why_not(self, plan: Plan) -> str | None:
        return None

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, weights: Tensor | None = None) -> Parts:
        """The one state of a block (outer, n, inner): parts of shape (outer, inner)."""
        return lift(plan, plan.passes[0], data, spread_part(mask), weights)

    def merge(self, plan: Plan) -> Merge:
        """What joins two of its states."""
        merge: Merge = kernel(plan.passes[0].reference).merge
        return merge


def lift(plan: Plan, step: Pass, data: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Parts:
    """A block's leaves lifted and joined."""
    of = kernel(step.reference)
    n = data.shape[1]
    leaf = n if of.exact else plan.leaf  # an exact kernel gives the same bits however it is cut
    full = n // leaf * leaf if leaf else 0
    given = (data, mask) if weights is None else (data, mask, weights)
    pieces = []
    if full:
        pieces.append(of.lift(plan, *[leaves(cells, leaf, full) for cells in given]))
    if full < n or not n:
        pieces.append(of.lift(plan, *[None if cells is None else cells[:, full:].unsqueeze(1) for cells in given]))
    parts = pieces[0] if len(pieces) == 1 else {k: torch.cat([p[k] for p in pieces], 1) for k in pieces[0]}
    return join(of.merge, parts, 1)


def leaves(cells: Tensor | None, leaf: int, n: int | None = None) -> Tensor | None:
    """(outer, n, inner) as (outer, leaves, leaf, inner)."""
    if cells is None:
        return None
    cut: Tensor = cells[:, :n].unflatten(1, (-1, leaf))
    return cut


__all__ = ["Parts", "ReferenceBackend", "join", "kernel", "lift"]
