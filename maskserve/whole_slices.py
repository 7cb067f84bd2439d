"""What needs its slices whole: as many of them at a time as fit."""

from __future__ import annotations

from collections.abc import Iterator

from maskserve import engine
from maskserve.execution import backend_of, finisher_of
from maskserve.ops.rows import Normalization, Ordering, Reduction
from maskserve.plan import Plan
from maskserve.regions import Piece, Region, kept_tiles, of_sizes, sizes_of, whole
from maskserve.sources import Source, Window


def whole_slices(plan: Plan, source: Source, weights: Source | None, budget: int) -> Iterator[Piece]:
    """What needs its slices whole, as many at a time as fit."""
    most = slices_at_once(plan, source.cell_bytes, budget)
    folded = source.folded(plan.fold)
    laid = () if weights is None else (weights.folded(plan.fold),)
    for tile in kept_tiles(plan, most, whole(plan)):
        below = of_sizes(plan, sizes_of(tile))
        values, mask = engine.run(below, *folded.window(tile), *(w.window(tile) for w in laid))
        yield Piece(where=of_result(plan, tile), values=values, mask=mask)


def slices_at_once(plan: Plan, cell_bytes: int, budget: int) -> int:
    """How many slices fit; one at least where it is empty, or where memory has it whole and parts of it had other bits."""
    is_whole = isinstance(plan.row, Normalization) and plan.n_reduced <= engine.LONG and finisher_of(plan) is not None
    return max(budget // bytes_at_once(plan, cell_bytes), int(is_whole or not plan.n_reduced))


def bytes_at_once(plan: Plan, cell_bytes: int) -> int:
    """The part of a budget that one slice takes, which is read while the one before it is still written."""
    return 2 * bytes_a_slice(plan, cell_bytes)


def bytes_a_slice(plan: Plan, cell_bytes: int) -> int:
    """The bytes that are held of each slice: its cells, its results, and what the back end makes of them."""
    n = max(plan.n_reduced, 1)
    n_results = n if not isinstance(plan.row, Reduction) else len(plan.labels or (0,))
    widths = backend_of(plan).widths_held * plan.dtype.n_bytes * n
    return n * cell_bytes + n_results * (plan.result.n_bytes + 1) + widths + plan.sorted_width * plan.slice_cells


def of_result(plan: Plan, tile: Region) -> Window:
    if isinstance(plan.row, Reduction):
        return (*(() if plan.labels is None else (slice(None),)), *tile[::2])
    return (*tile[:-2], slice(None), tile[-1]) if isinstance(plan.row, Ordering) else tile
