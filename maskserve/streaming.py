"""Plans on sources: what is larger than memory is lifted where it lies, in the order of the whole, within a budget of bytes.

All is read in the order in which it lies, and the bits are those of the whole: regions and their states (region_states)
for reductions whose states join, slices for the rest, whole (whole_slices) or in parts (long_slices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import prod

import torch
from torch import Tensor

from maskserve import engine, execution, regions
from maskserve.accelerators import CPU
from maskserve.blocks import spans
from maskserve.execution import backend_of, finisher_of, n_threads
from maskserve.long_slices import least_budget, long_slices, need
from maskserve.ops.rows import Normalization, Scan
from maskserve.plan import Plan
from maskserve.region_states import lifts, most_of, most_results, state
from maskserve.regions import Piece, kept_tiles, of_cells, of_sizes, result_sizes, sizes_of, whole
from maskserve.room import Need
from maskserve.sources import Source, Window
from maskserve.whole_slices import slices_at_once, whole_slices

BLOCKS_SHARE = 4
"""The part of the budget for the blocks of all threads."""
LEAST_BLOCK = 1 << 14
"""Cells below which blocks cost more in calls than they save."""
COPIED_BUDGET = 1 << 26
"""Bytes for windows of what is only copied: 8 MB at a time."""
WINDOW_WIDTHS = 8
"""How many times the bytes of a window are held where new masks are made of its cells."""


def run(plan: Plan, source: Source, weights: Source | None, budget: int) -> tuple[Tensor, Tensor]:
    """(values, mask) of the plan on a source, whole in memory."""
    shape = result_sizes(plan, plan.fold)
    values, mask = assembled(shape, getattr(torch, plan.result.torch), pieces(plan, source, weights, budget))
    return values.view(plan.out_shape), mask.view(plan.out_shape)


def block_cells(plan: Plan, source: Source, budget: int) -> int:
    """The cells that each thread reads at a time: fewer where each takes much memory while it is made."""
    fit = budget // (BLOCKS_SHARE * n_threads() * source.cell_bytes)
    most = regions.BLOCK if plan.device == CPU and not regions.is_shown(plan, source) else regions.SEEN
    return min(backend_of(plan).block_cells, most, max(fit, LEAST_BLOCK))


def assembled(shape: tuple[int, ...], dtype: torch.dtype, made: Iterator[Piece]) -> tuple[Tensor, Tensor]:
    values, mask = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=torch.bool)
    for piece in made:
        values[piece.where], mask[piece.where] = piece.values, piece.mask
    return values, mask


def by_window(source: Source, piece: Callable[[Window], Piece], budget: int) -> Iterator[Piece]:
    """Windows of a source that follow each other, as many cells at a time as fit."""
    most = max(budget // (WINDOW_WIDTHS * source.cell_bytes), 1)
    for where in windows(source.shape, most):
        yield piece(where)


def copied(source: Source) -> Iterator[Piece]:
    """What is only copied, a few megabytes at a time."""

    def piece(where: Window) -> Piece:
        data, mask = source.window(where)
        return Piece(where=where, values=data, mask=torch.ones(data.shape, dtype=torch.bool) if mask is None else mask)

    yield from by_window(source, piece, COPIED_BUDGET)


def windows(shape: Sequence[int], most: int) -> Iterator[Window]:
    """A shape cut along its first dims into windows of at most `most` cells.

    >>> [[(s.start, s.stop) for s in where] for where in windows((3, 4), 8)]
    [[(0, 2), (0, 4)], [(2, 3), (0, 4)]]
    """
    steps, rest = [], most
    for n in reversed(shape):
        steps.append(max(min(n, rest), 1))
        rest //= max(n, 1)
    return product(*[spans(n, step) for n, step in zip(shape, reversed(steps), strict=True)])


def pieces(plan: Plan, source: Source, weights: Source | None, budget: int) -> Iterator[Piece]:
    """The result in parts, each from what the budget holds at once."""
    with execution.using(block_cells=block_cells(plan, source, budget)):
        if lifts(plan):
            yield from reduced(plan, source, weights, budget)
        elif slices_at_once(plan, source.cell_bytes, budget):
            yield from whole_slices(plan, source, weights, budget)
        else:
            yield from long_slices(plan, source, budget)


def needs(plan: Plan, cell_bytes: int) -> Need | None:
    """What the plan must hold at once; None where parts of any size will do."""
    return None if lifts(plan) or not least_budget(plan, cell_bytes) else need(plan, cell_bytes)


def n_passes(plan: Plan, cell_bytes: int, budget: int) -> int:
    """How many times a source is read; 0 where that depends on its cells."""
    if lifts(plan) or slices_at_once(plan, cell_bytes, budget):
        return 1
    return 2 if isinstance(plan.row, Normalization) else 1 if isinstance(plan.row, Scan) else 0


def is_without_states(plan: Plan, source: Source) -> bool:
    """Whether the back end makes results of cells at once."""
    if len(plan.fold) > 3 or finisher_of(plan) is None or (source.is_far and plan.fold[-1] > 1):
        return False  # columns of a far source would be read each for itself
    return engine.is_short(plan, (plan.fold[0], plan.fold[1], plan.fold[2]))


def reduced(plan: Plan, source: Source, weights: Source | None, budget: int) -> Iterator[Piece]:
    """A reduction, as many results at a time as their states fit."""
    most, n_results, is_short = (
        most_of(plan, source, budget),
        most_results(plan, budget),
        is_without_states(plan, source),
    )
    source.expect(0, prod(source.shape))
    if is_short and source.is_far:
        n_results = max(min(n_results, most.cells // max(plan.n_reduced, 1)), 1)
    for tile in kept_tiles(plan, n_results, whole(plan)):
        below = of_sizes(plan, sizes_of(tile))
        if is_short or most.holds(plan, source, tile):
            values, mask = of_cells(plan, source, weights, tile, partial(engine.reduce, below))
        else:
            values, mask = engine.finish(below, state(plan, source, weights, tile, most))
        yield Piece(where=tile[::2], values=values, mask=mask)
