"""Plans on sources: what is larger than memory is lifted where it lies, in the order of the whole, within a budget of bytes.

A region is a range of each group of the plan's fold. One whose states fit is lifted block by block on the engine's threads;
a larger one is cut along its first group that has more than one index: kept ones lie side by side, reduced ones are
aligned subtrees that join as they would in memory (docs/order.md). So all is read in the order in which it lies, and the
bits are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from maskserve import engine, execution
from maskserve.backends import Parts
from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.blocks import Cells, counting, covering, cut, seen, spans
from maskserve.dtypes import Kind
from maskserve.errors import OutOfMemoryError
from maskserve.execution import BLOCKS_A_THREAD, backend_of, finisher_of, n_threads, nan_policy
from maskserve.masks import intersection
from maskserve.ops.rows import Normalization, Ordering, Reach, Reduction, Scan
from maskserve.plan import Plan
from maskserve.sources import Masked, Source, Window
from maskserve.trees import Counter, subtrees

Region: TypeAlias = tuple[slice, ...]
"""A range of each group of a fold."""

BLOCK = 1 << 20
"""Cells that a thread reads at a time: few enough for its cache, and many enough that a read is no call too many."""
WIDE = 1 << 14
"""Columns that are read side by side at least, where rows are wider: so that a row's part is more than a few pages."""
MOST_STATES = 1 << 18
"""States of a region's blocks, before they are joined into one a result: so many stay in the cache."""
BLOCKS_SHARE = 4
"""The part of the budget for the blocks of all threads."""
LEAST_BLOCK = 1 << 14
"""Cells below which blocks cost more in calls than they save."""
WINDOW_WIDTHS = 8
"""How many times the bytes of a window are held where new masks are made of its cells."""
WIDTHS_OF_STATE = 256
"""Bytes a cell, at most, where a running sum goes on from a state: 20 or so float64 copies, of which some live at once."""
SHARE = 4
"""The part of the budget that they may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a result: where it lies in the result's fold, and its cells."""

    where: Window
    values: Tensor
    mask: Tensor
    n_masked_before: int = 0
    """How many cells of the question were masked there, where the request is about masks."""


class SourceCells(Cells):
    """The cells of a region as (outer, n, inner), read block by block."""

    narrow = WIDE

    def __init__(self, plan: Plan, source: Source, weights: Source | None, region: Region, *, policy: str) -> None:
        sizes = sizes_of(region)
        self.plan, self.policy, self.region, self.sizes = plan, policy, region, sizes
        self.shape = (prod(sizes[:-2]), sizes[-2], sizes[-1])
        *outer, n, inner = plan.fold
        self.first = (
            flat_index(plan.fold[:-2], [s.start for s in region[:-2]]) if is_run(plan.fold[:-2], region[:-2]) else -1
        )
        shape = plan.fold if self.first < 0 else (prod(outer), n, inner)
        self.source = source.folded(shape)
        self.weights_source = None if weights is None else weights.folded(shape)

    def weight(self, *where: slice) -> tuple[Tensor, ...]:
        if self.weights_source is None:
            return ()
        return (self.read(self.weights_source, where)[0],)

    def block(self, outer: slice, run: slice, inner: slice, *, negated: bool = True) -> Masked:
        data, mask = self.read(self.source, (outer, run, inner))
        row = self.plan.row
        if self.weights_source is not None:
            weights = self.read(self.weights_source, (outer, run, inner))
            mask = intersection([mask, counting(row, *weights, self.plan.params["nan"])])
        data = seen(self.plan, data)
        if negated and isinstance(row, Normalization) and row.negates:
            data = data.neg()
        return data, counting(row, data, mask, self.policy)

    def read(self, source: Source, where: Window) -> Masked:
        """A block of the region."""
        outer, run, inner = where
        last = (moved(run, self.region[-2].start), moved(inner, self.region[-1].start))
        if self.first >= 0:
            return source.window((moved(outer, self.first), *last))
        box, sizes, exact = covering(self.sizes[:-2], (self.shape[0],), (outer,))
        starts = [s.start for s in self.region[:-2]]
        data, mask = source.window((*map(moved, box, starts), *last))
        shape = (*sizes, *data.shape[-2:])
        return data.reshape(shape)[exact], None if mask is None else mask.reshape(shape)[exact]


def moved(where: slice, by: int) -> slice:
    return slice(where.start + by, where.stop + by)


def sizes_of(region: Region) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in region)


def is_run(shape: Sequence[int], region: Region) -> bool:
    """Whether a box is one run of row-major indices: the first dim that has more than one index may be cut, no later one."""
    cut_before = False
    for n, s in zip(shape, region, strict=True):
        if cut_before and s != slice(0, n):
            return False
        cut_before = cut_before or s.stop - s.start > 1
    return True


def flat_index(shape: Sequence[int], index: Sequence[int]) -> int:
    at = 0
    for n, i in zip(shape, index, strict=True):
        at = at * n + i
    return at


@lru_cache(maxsize=1024)
def of_sizes(plan: Plan, sizes: tuple[int, ...]) -> Plan:
    """The plan on a region of these sizes."""
    out_shape = result_sizes(plan, sizes)
    return replace(
        plan, shape=sizes, dims=tuple(range(1, len(sizes), 2)), fold=sizes, out_shape=out_shape,
    )  # fmt: skip


def result_sizes(plan: Plan, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a result, as its fold has them: kept groups of a reduction; else all, the last reduced one maybe cut."""
    if isinstance(plan.row, Reduction):
        return (*(() if plan.labels is None else (len(plan.labels),)), *sizes[::2])
    if isinstance(plan.row, Ordering):
        return (*sizes[:-2], plan.row.size(plan.params, sizes[-2]), sizes[-1])
    return sizes


def whole(plan: Plan) -> Region:
    return tuple(slice(0, n) for n in plan.fold)


# -- results ------------------------------------------------------------------------------------------------------


def run(plan: Plan, source: Source, weights: Source | None, budget: int) -> tuple[Tensor, Tensor]:
    """(values, mask) of the plan on a source, whole in memory."""
    shape = result_sizes(plan, plan.fold)
    values, mask = assembled(shape, getattr(torch, plan.result.torch), pieces(plan, source, weights, budget))
    return values.view(plan.out_shape), mask.view(plan.out_shape)


def block_cells(plan: Plan, source: Source, budget: int) -> int:
    """The cells that each thread reads at a time: fewer where each takes much memory while it is made."""
    fit = budget // (BLOCKS_SHARE * n_threads() * source.cell_bytes)
    return min(backend_of(plan).block_cells, BLOCK, max(fit, LEAST_BLOCK))


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
        else:
            yield from whole_slices(plan, source, weights, budget)


def n_passes(plan: Plan, cell_bytes: int, budget: int) -> int:
    """How many times a source is read; 0 where that depends on its cells."""
    if lifts(plan) or slices_at_once(plan, cell_bytes, budget) >= 1:
        return 1
    return 2 if isinstance(plan.row, Normalization) else 1 if isinstance(plan.row, Scan) else 0


def lifts(plan: Plan) -> bool:
    """Whether the plan is a reduction whose states join."""
    row = plan.row
    return isinstance(row, Reduction) and bool(row.passes) and not row.picks and plan.stored.kind is not Kind.COMPLEX


def reduced(plan: Plan, source: Source, weights: Source | None, budget: int) -> Iterator[Piece]:
    """A reduction, as many results at a time as their states fit."""
    most = most_states(plan, budget)
    for tile in kept_tiles(plan, most_results(plan, budget), whole(plan)):
        below = of_sizes(plan, sizes_of(tile))
        if n_states(plan, tile) <= most:
            policy = nan_policy(plan)
            values, mask = engine.reduce(below, SourceCells(plan, source, weights, tile, policy=policy))
        else:
            values, mask = engine.finish(below, state(plan, source, weights, tile, most))
        yield Piece(where=tile[::2], values=values, mask=mask)


def state_bytes(plan: Plan) -> int:
    """The bytes of the state of one result."""
    return sum(part.dtype.n_bytes for part in plan.passes[0].parts(plan.dtype))


def most_states(plan: Plan, budget: int) -> int:
    return max(min(budget // (SHARE * state_bytes(plan)), MOST_STATES), 1)


def most_results(plan: Plan, budget: int) -> int:
    """How many results fit at once, with a state for each level of the tree and two more while they join."""
    levels = prod(plan.fold[1::2]).bit_length() + 2
    return max(budget // (2 * levels * state_bytes(plan)), 1)


def kept_tiles(plan: Plan, most: int, region: Region) -> Iterator[Region]:
    """The region cut along kept groups, the first ones first, into parts of at most `most` results."""
    n_results = prod(sizes_of(region)[::2])
    axis = next((d for d in range(0, len(region), 2) if region[d].stop - region[d].start > 1), None)
    if n_results <= most or axis is None:
        yield region
        return
    size = region[axis].stop - region[axis].start
    step = max(1, most // max(n_results // size, 1))
    for part in spans(size, step):
        yield from kept_tiles(plan, most, put(region, axis, moved(part, region[axis].start)))


def put(region: Region, axis: int, part: slice) -> Region:
    return (*region[:axis], part, *region[axis + 1 :])


def n_states(plan: Plan, region: Region) -> int:
    """How many states a region has at once while its blocks are lifted."""
    *outer, n, inner = sizes_of(region)
    n_runs = -(-n * min(inner, WIDE) // BLOCK)
    return prod(outer) * inner * max(n_runs, 1)


# -- states -------------------------------------------------------------------------------------------------------


def state(plan: Plan, source: Source, weights: Source | None, region: Region, most: int) -> Parts:
    """The state of each result of a region, (first kept group, other kept groups); at most `most` of them at a time."""
    axis = next((d for d, s in enumerate(region) if s.stop - s.start > unit_of(plan, d)), None)
    if axis is None or n_states(plan, region) <= most:
        below = of_sizes(plan, sizes_of(region))
        return engine.joined(below, SourceCells(plan, source, weights, region, policy=nan_policy(plan)))
    if axis % 2 == 0:
        return side_by_side(plan, source, weights, region, most, axis)
    counter = Counter(backend_of(plan).merge(plan))
    for first, n_units, part in parts_of(plan, region, axis, most):
        parts = state(plan, source, weights, part, most)
        counter.add(first, n_units, placed(plan, parts, axis, part[axis].start - region[axis].start))
    return counter.joined()


def unit_of(plan: Plan, axis: int) -> int:
    """The indices of a group that stay together: a leaf of the last reduced one."""
    return plan.leaf if axis == len(plan.fold) - 2 else 1


def parts_of(plan: Plan, region: Region, axis: int, most: int) -> Iterator[tuple[int, int, Region]]:
    """A reduced group cut into aligned subtrees whose states fit: the first unit of each, how many, and its region."""
    unit, of = unit_of(plan, axis), region[axis]
    n_units = -(-(of.stop - of.start) // unit)
    each = -(-n_states(plan, region) // n_units)
    largest = max(1, 1 << max(most // max(each, 1), 1).bit_length() - 1)
    for start, size in subtrees(of.start // unit, of.start // unit + n_units, largest):
        cells = slice(start * unit, min((start + size) * unit, of.stop))
        yield start, size, put(region, axis, cells)


def placed(plan: Plan, parts: Parts, axis: int, by: int) -> Parts:
    """The parts of a region that begins `by` indices later: places in the slice count from its start."""
    shift = getattr(kernel(plan.passes[0].reference), "shift", None)
    return shift(parts, by * prod(plan.fold[axis + 2 :: 2])) if shift and by else parts


def side_by_side(plan: Plan, source: Source, weights: Source | None, region: Region, most: int, axis: int) -> Parts:
    """States of a region cut along a kept group."""
    n_results, size = n_states(plan, region), region[axis].stop - region[axis].start
    step = max(1, most // max(-(-n_results // size), 1))
    cut = [put(region, axis, moved(part, region[axis].start)) for part in spans(size, step)]
    found = [(part, state(plan, source, weights, part, most)) for part in cut]
    kept = sizes_of(region)[::2]

    def joined(name: str) -> Tensor:
        own = [parts[name].view(sizes_of(part)[::2]) for part, parts in found]
        return torch.cat(own, axis // 2).view(kept[0], -1)

    return {name: joined(name) for name in found[0][1]}


# -- whole slices -------------------------------------------------------------------------------------------------


def whole_slices(plan: Plan, source: Source, weights: Source | None, budget: int) -> Iterator[Piece]:
    """What needs its slices whole, as many at a time as fit."""
    most = slices_at_once(plan, source.cell_bytes, budget)
    if most < 1:
        yield from long_slices(plan, source, budget)
        return
    folded = source.folded(plan.fold)
    laid = () if weights is None else (weights.folded(plan.fold),)
    for tile in kept_tiles(plan, most, whole(plan)):
        below = of_sizes(plan, sizes_of(tile))
        values, mask = engine.run(below, *folded.window(tile), *(w.window(tile) for w in laid))
        yield Piece(where=of_result(plan, tile), values=values, mask=mask)


def slices_at_once(plan: Plan, cell_bytes: int, budget: int) -> int:
    """How many slices fit; one at least where it is empty, or where memory has it whole and parts of it had other bits."""
    is_whole = isinstance(plan.row, Normalization) and plan.n_reduced <= engine.LONG and finisher_of(plan) is not None
    return max(budget // (2 * bytes_a_slice(plan, cell_bytes)), int(is_whole or not plan.n_reduced))


def bytes_a_slice(plan: Plan, cell_bytes: int) -> int:
    """The bytes that are held of each slice: its cells, its results, and what the back end makes of them."""
    n = max(plan.n_reduced, 1)
    n_results = n if not isinstance(plan.row, Reduction) else len(plan.labels or (0,))
    widths = backend_of(plan).widths_held * plan.dtype.n_bytes * n
    return n * cell_bytes + n_results * (plan.result.n_bytes + 1) + widths + plan.sorted_bytes


def of_result(plan: Plan, tile: Region) -> Window:
    if isinstance(plan.row, Reduction):
        return (*(() if plan.labels is None else (slice(None),)), *tile[::2])
    return (*tile[:-2], slice(None), tile[-1]) if isinstance(plan.row, Ordering) else tile


# -- slices longer than memory ------------------------------------------------------------------------------------


def long_slices(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Slices of which one alone is too long."""
    row = plan.row
    if isinstance(row, Normalization) and row.passes and plan.stored.kind is not Kind.COMPLEX:
        return normalized(plan, source, budget)
    if isinstance(row, Reduction) and row.select and searchable(plan):
        return searched(plan, source)
    if isinstance(row, Scan) and row.reach is Reach.OWN:
        return cell_by_cell(plan, source, budget)
    if isinstance(row, Scan) and row.carries == "state" and plan.stored.kind is not Kind.COMPLEX:
        return handed_on(plan, source, budget)
    if isinstance(row, Scan) and row.carries in ("forward", "backward") and plan.params.get("limit") is None:
        return carried(plan, source, budget, backward=row.carries == "backward")
    needed = 2 * bytes_a_slice(plan, source.cell_bytes)
    raise OutOfMemoryError(
        f"{row.name} holds each slice whole, {plan.n_reduced} cells: that takes {needed} bytes, and {budget} are allowed; "
        "give more memory, or another dim"
    )


def normalized(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Two passes: the state of each slice, then its cells, some blocks for each thread at a time."""
    most = most_states(plan, budget)
    fit = min(budget // (SHARE * (plan.result.n_bytes + 1)), BLOCK * BLOCKS_A_THREAD * n_threads())
    for tile in kept_tiles(plan, most_results(plan, budget), whole(plan)):
        parts = state(plan, source, None, tile, most)
        outer, n, inner = sizes_of(tile)
        blocks = cut(plan, (outer, n, inner), fit, narrow=WIDE)
        for (rows, columns), run in product(blocks.tiles, blocks.runs):
            where = tuple(moved(s, own.start) for s, own in zip((rows, run, columns), tile, strict=True))
            cells = SourceCells(plan, source, None, where, policy=nan_policy(plan))
            own = {name: part[rows, columns] for name, part in parts.items()}
            values, mask = engine.applied(of_sizes(plan, sizes_of(where)), cells, own)
            yield Piece(where=where, values=values, mask=mask)


def searchable(plan: Plan) -> bool:
    finisher = finisher_of(plan)
    return finisher is not None and finisher.search(plan, 1) is not None


def searched(plan: Plan, source: Source) -> Iterator[Piece]:
    """Selections from slices that are read several times, a few slices side by side."""
    finisher, fold = finisher_of(plan), plan.fold
    assert finisher is not None
    cells = SourceCells(plan, source, None, whole(plan), policy=nan_policy(plan))
    kept, reduced = fold[:-2:2], fold[1:-2:2]
    for index in product(*map(range, kept)):
        outers = [flat_index(fold[:-2], woven(index, inner)) for inner in product(*map(range, reduced))]
        for columns in spans(fold[-1], engine.SEARCHED_TOGETHER):
            lanes = columns.stop - columns.start
            search = finisher.search(plan, lanes)
            assert search is not None
            runs = spans(fold[-2], max(1, BLOCK // lanes))
            engine.run_search(search, finisher, cells, [(slice(o, o + 1), r, columns) for o in outers for r in runs])
            below = of_sizes(plan, (*(1 if d % 2 == 0 else n for d, n in enumerate(fold[:-1])), lanes))
            values, counts = search.results()
            values, mask = engine.finish_selection(below, values.unsqueeze(1), counts.unsqueeze(0))
            where = (*(slice(i, i + 1) for i in index), columns)
            yield Piece(where=where if plan.labels is None else (slice(None), *where), values=values, mask=mask)


def woven(kept: Sequence[int], reduced: Sequence[int]) -> list[int]:
    """The index of a fold from those of its kept groups and of its reduced ones."""
    index = [0] * (len(kept) + len(reduced))
    index[::2], index[1::2] = kept, reduced
    return index


def cell_by_cell(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """What looks at no other cell."""
    folded, n = source.folded(plan.fold), plan.fold[1]
    for kept in kept_tiles(plan, 1, whole(plan)):
        for run in spans(n, max(1, budget // (4 * (source.cell_bytes + plan.result.n_bytes + 1)))):
            where = put(kept, 1, run)
            values, mask = engine.run(of_sizes(plan, sizes_of(where)), *folded.window(where))
            yield Piece(where=where, values=values, mask=mask)


def carried(plan: Plan, source: Source, budget: int, *, backward: bool) -> Iterator[Piece]:
    """Parts of a slice one after the other: before each lies the last valid result of those that came."""
    folded, step = source.folded(plan.fold), max(1, budget // (8 * (source.cell_bytes + plan.result.n_bytes + 1)))
    dtype = getattr(torch, plan.stored.torch)
    for kept in kept_tiles(plan, 1, whole(plan)):
        carry, known = torch.zeros((1, 1, 1), dtype=dtype), torch.zeros((1, 1, 1), dtype=torch.bool)
        for run in reversed(spans(plan.fold[1], step)) if backward else spans(plan.fold[1], step):
            where = put(kept, 1, run)
            n = run.stop - run.start
            data, mask = folded.window(where)
            mask = torch.ones(data.shape, dtype=torch.bool) if mask is None else mask
            cells = torch.cat([data, carry] if backward else [carry, data], 1)
            valid = torch.cat([mask, known] if backward else [known, mask], 1)
            values, own = engine.run(of_sizes(plan, (1, n + 1, 1)), cells, valid)
            last, known = last_valid(values, own, backward=backward)
            carry = last.to(dtype)  # a cell as it came, though fp8 gives float32
            part = slice(0, n) if backward else slice(1, n + 1)
            yield Piece(where=where, values=values[:, part], mask=own[:, part])


def last_valid(values: Tensor, mask: Tensor, *, backward: bool) -> tuple[Tensor, Tensor]:
    """The last valid cell of one slice, (1, 1, 1), or the first one; masked where none is valid."""
    found = mask.view(-1).nonzero()
    if not len(found):
        return torch.zeros_like(values[:, :1]), torch.zeros_like(mask[:, :1])
    at = int(found[0 if backward else -1])
    return values[:, at : at + 1], mask[:, at : at + 1]


def handed_on(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Parts of a slice one after the other, each of whole leaves: the kernel hands its state on."""
    row, n = plan.row, plan.fold[1]
    assert isinstance(row, Scan)
    scan_on = kernel(row.scan).scan_on
    step = max(1, min(budget // WIDTHS_OF_STATE, BLOCK) // plan.leaf) * plan.leaf
    for kept in kept_tiles(plan, 1, whole(plan)):
        carry = None
        cells = SourceCells(plan, source, None, kept, policy=plan.params["nan"])
        for run in spans(n, step):
            data, mask = cells.block(slice(0, 1), run, slice(0, 1))
            (values, own), carry = scan_on(plan, data, mask, carry)
            valid = torch.ones(values.shape, dtype=torch.bool) if own is None else own
            yield Piece(where=put(kept, 1, run), values=engine.narrowed(plan, select(values, own)), mask=valid)
