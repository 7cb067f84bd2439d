"""Gradients by native kernels: every cell is read once and written once, in blocks and on all threads.

So it is where nobody differentiates again; docs/gradients.md says what a gradient is, backends/reference/gradients*.py
how it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve.backends import Puller, choose
from maskserve.backends.cpu import empty
from maskserve.backends.pulls import N_PARTS, Launch, count_ties, launch, pull_block
from maskserve.backends.reference.cells import Parts
from maskserve.blocks import Cells, Folded, cut
from maskserve.compact import Compact, Mask, Part, as_bools, spread_part
from maskserve.engine import joined
from maskserve.execution import backend_of, execution, in_parallel
from maskserve.gates import DTYPE, as_cotangent, kept, once, repeated
from maskserve.masks import intersection
from maskserve.plan import Plan, reduced_shape
from maskserve.tracing import has_memory

BLOCK_CELLS = 1 << 18
"""What is read twice is read from the cache the second time."""
GROUP_CELLS = 1 << 20
"""Where n * inner is more, all slices are read for their states first, and then again for their gradients."""
COLUMNS = 256
"""So many neighbours of whole slices at least: narrower strips are read a page a row."""


class Pulled(NamedTuple):
    gradient: Tensor
    reach: Tensor | None


def pulled(
    plan: Plan, data: Tensor, mask: Mask | None, values: Tensor, g: Tensor, gate: Tensor, *, wants_reach: bool
) -> Pulled | None:
    """The gradient by `data`, 0 where it has not reached, and its reach; None where the formula has to be used.

    `values` is the result, `g` its gradient and `gate` where that counts.
    """
    tensors = (data, values, g, gate) if not isinstance(mask, Tensor) else (data, mask, values, g, gate)
    if not all(map(has_memory, tensors)):
        return None
    backend = choose(plan, execution().backend).backend
    if isinstance(backend, Puller):
        gradient = torch.empty(plan.shape, dtype=data.dtype, device=data.device)
        reach = torch.empty(plan.shape, dtype=DTYPE, device=data.device) if wants_reach else None
        served = backend.pull(plan, data, mask, values, g, gate, gradient, reach)
        return Pulled(gradient, reach) if served else None
    how = launch(plan) if execution().backend in (None, "cpu") else None
    if how is None:
        return None
    if how.pull.is_even and not isinstance(mask, Compact) and how.states.params["nan"] == "propagate":
        parts = [spread_out(plan, part) for part in (g, gate)] + ([] if mask is None else [mask.expand(plan.shape)])
        if n := repeated(*parts):
            return evenly(plan, data.dtype, [once(part, n) for part in parts], wants_reach=wants_reach)
    made = Pulled(empty(plan.shape, data.dtype), empty(plan.shape, DTYPE) if wants_reach else None)
    if made.gradient.numel() and not Walk(how, data, mask, (g, gate, values), made)():
        return None
    return made


def evenly(plan: Plan, dtype: torch.dtype, parts: Sequence[Tensor], *, wants_reach: bool) -> Pulled:
    """The same where a cell's gradient is g of its slice: from g, gate and mask, as far as they differ from cell to cell."""
    g, *gates = parts
    reached = intersection(gates)
    assert reached is not None
    gradient = kept(g.to(dtype), reached).expand(plan.shape)
    return Pulled(gradient, as_cotangent(reached).expand(plan.shape) if wants_reach else None)


def spread_out(plan: Plan, result: Tensor) -> Tensor:
    """A result of a reduction, or what belongs to it, at the cells that it is of."""
    return result.reshape(reduced_shape(plan.shape, plan.dims, keepdim=True)).expand(plan.shape)


class Walk:
    """One gradient, block by block."""

    def __init__(self, how: Launch, data: Tensor, mask: Mask | None, above: Sequence[Tensor], made: Pulled) -> None:
        self.how, self.plan, self.data, self.mask = how, how.states, data, mask
        self.cells = self.cells_in(mask)
        self.above = [self.folded(result) for result in above]
        self.made = [None if part is None else part.view(self.cells.shape) for part in made]
        self.states: list[Folded] = []
        outer, n, inner = self.cells.shape
        self.n_cells = outer * n * inner
        self.is_whole = how.pull.of_slices or (n * inner <= GROUP_CELLS and len(self.plan.fold) == 3)
        self.served: list[bool] = []

    def cells_in(self, mask: Mask | None) -> Cells:
        """The cells that count in a mask."""
        reads = backend_of(self.plan).reads_compact
        return Cells(self.plan, self.data, mask, policy=self.plan.params["nan"], reads_compact=reads)

    def folded(self, result: Tensor) -> Folded:
        """A result, or what belongs to it, in the folded shape of the data."""
        return Folded(spread_out(self.plan, result) if self.how.reduces else result, self.cells.shape)

    def __call__(self) -> bool:
        """Whether every block was served."""
        if not self.is_whole:
            self.states = [self.folded(part) for part in self.all_states()]
        _, n, inner = self.cells.shape
        least = n * (min(inner, COLUMNS) if self.how.pull.of_slices else inner) if self.is_whole else 0
        blocks = cut(self.plan, self.cells.shape, max(BLOCK_CELLS, least), whole=self.is_whole)
        in_parallel(
            backend_of(self.plan),
            self.n_cells,
            [self.task(rows, run, columns) for rows, columns in blocks.tiles for run in blocks.runs],
        )
        return all(self.served)

    def task(self, rows: slice, run: slice, columns: slice) -> Callable[[], None]:
        def pull_one() -> None:
            data, mask = self.cells.block(rows, run, columns)
            of = slice(0, 1) if self.how.reduces else run
            above = [result[rows, of, columns] for result in self.above]
            parts = [part[rows, slice(0, 1), columns].squeeze(1) for part in self.states]
            if self.is_whole:
                parts = self.block_states(data, mask, above)
            gradient, reach = (None if made is None else made[rows, run, columns] for made in self.made)
            assert gradient is not None
            self.served.append(pull_block(self.how, data, mask, above, parts, gradient, reach))

        return pull_one

    def block_states(self, data: Tensor, mask: Tensor | Part | None, above: Sequence[Tensor]) -> list[Tensor]:
        """What the kernel reads of each slice of a block, (outer, inner)."""

        def lifted(kept: Tensor | Part | None) -> Parts:
            return backend_of(self.plan).lift(self.plan, data, kept)

        def tied(found: Tensor | None) -> Tensor:
            return self.ties(data, mask, above[2] if found is None else found.unsqueeze(1))

        return self.read(self.spared(lifted, data, mask), tied)

    def all_states(self) -> list[Tensor]:
        """The same of every slice, before its cells are read again."""

        def lifted(kept: Mask | None) -> Parts:
            return joined(self.plan, self.cells_in(kept))

        def tied(found: Tensor | None) -> Tensor:
            return self.all_ties(self.above[2] if found is None else self.folded(found))

        return self.read(self.spared(lifted, self.data, self.mask), tied)

    def spared(self, lifted: Callable[[Any], Parts], data: Tensor, mask: Mask | Part | None) -> Parts:
        """The states, none without a pass. Where cells of 0 are left out, those of the others and how many are 0."""
        if self.how.pull.step is None:
            return {}
        states = lifted(mask)
        if not self.how.pull.spares_zeros:
            return states
        if not (states["high"] == 0).any():
            return states | {"count": torch.zeros_like(states["count"])}
        others = data != 0
        own = spread_part(mask) if isinstance(mask, Part) else as_bools(mask)
        spared = lifted(others if own is None else others & own)
        return spared | {"count": states["count"] - spared["count"]}

    def read(self, states: Parts, tied: Callable[[Tensor | None], Tensor]) -> list[Tensor]:
        """The parts of states and the counts of ties that the kernel reads, in its order."""
        names = self.how.pull.ties
        if states and not names:
            names = tuple(part.name for part in self.plan.passes[0].parts(self.plan.dtype))[:N_PARTS]
            return [states[name] for name in names]
        if not states:
            return [tied(None)] if names else []
        found = [states[name] for name in names]
        return found + [tied(part) for part in found]

    def ties(self, data: Tensor, mask: Tensor | Part | None, found: Tensor) -> Tensor:
        count = torch.empty((data.shape[0], data.shape[2]), dtype=torch.int64)
        dtype = self.plan.result if self.how.pull.step is None else self.plan.dtype
        count_ties(self.how, data, mask, found, dtype, count)
        return count

    def all_ties(self, found: Folded) -> Tensor:
        outer, _, inner = self.cells.shape
        blocks = cut(self.plan, self.cells.shape, BLOCK_CELLS)
        counts = torch.empty((outer, len(blocks.runs), inner), dtype=torch.int64)

        def task(rows: slice, index: int, run: slice, columns: slice) -> Callable[[], None]:
            def count_block() -> None:
                data, mask = self.cells.block(rows, run, columns)
                counts[rows, index, columns] = self.ties(data, mask, found[rows, slice(0, 1), columns])

            return count_block

        tasks = [task(*(tile[0], i, run, tile[1])) for tile in blocks.tiles for i, run in enumerate(blocks.runs)]
        in_parallel(backend_of(self.plan), self.n_cells, tasks)
        groups = counts.sum(1).reshape(*self.plan.fold[:-2], inner)
        earlier = tuple(range(1, len(self.plan.fold) - 2, 2))
        return groups.sum(earlier) if earlier else groups
