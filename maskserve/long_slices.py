"""Slices of which one alone does not fit: read in parts, where what is asked can be carried from part to part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from maskserve import engine, regions
from maskserve.backends import Selector
from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.blocks import cut, spans
from maskserve.dtypes import Kind
from maskserve.execution import BLOCKS_A_THREAD, finisher_of, n_threads, nan_policy
from maskserve.ops.rows import Normalization, Reach, Reduction, Scan
from maskserve.plan import Plan
from maskserve.region_states import SHARE, most_of, most_results, state
from maskserve.regions import Piece, SourceCells, flat_index, kept_tiles, moved, of_sizes, put, sizes_of, whole
from maskserve.room import Need, beyond, memory_for
from maskserve.sources import Source
from maskserve.whole_slices import bytes_at_once, slices_at_once

WIDTHS_OF_STATE = 256
"""Bytes a cell, at most, where a running sum goes on from a state: 20 or so float64 copies, of which some live at once."""

Reader: TypeAlias = Callable[[Plan, Source, int], Iterator[Piece]]
"""Reads a plan's slices from a source, within a budget."""


def long_slices(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Slices of which one alone is too long."""
    read = reader(plan)
    if read is None:
        raise beyond(need(plan, source.cell_bytes), budget, memory_for(least_budget(plan, source.cell_bytes)))
    return read(plan, source, budget)


def need(plan: Plan, cell_bytes: int) -> Need:
    """What a plan takes whose slices are whole, or nothing."""
    return Need(
        memory=memory_for(least_budget(plan, cell_bytes)),
        why=f"{plan.row.name} holds each slice whole, {plan.n_reduced} cells",
        instead=", or another dim",
    )


def least_budget(plan: Plan, cell_bytes: int) -> int:
    """The least budget for slices of so many bytes a cell; 0 where they may be read in parts."""
    return 0 if slices_at_once(plan, cell_bytes, 0) or reader(plan) else bytes_at_once(plan, cell_bytes)


def reader(plan: Plan) -> Reader | None:
    """What reads slices in parts; None where each must be whole."""
    row, is_real = plan.row, plan.stored.kind is not Kind.COMPLEX
    if isinstance(row, Normalization):
        return normalized if row.passes and is_real else None
    if isinstance(row, Reduction):
        return searched if row.select and searchable(plan) else None
    assert isinstance(row, Scan)
    if row.reach is Reach.OWN:
        return cell_by_cell
    if row.carries == "state":
        return handed_on if is_real else None
    return carried if row.carries in ("forward", "backward") and plan.params.get("limit") is None else None


def normalized(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Two passes: the state of each slice, then its cells, some blocks for each thread at a time."""
    most = most_of(plan, source, budget)
    fit = min(budget // (SHARE * (plan.result.n_bytes + 1)), regions.BLOCK * BLOCKS_A_THREAD * n_threads())
    for tile in kept_tiles(plan, most_results(plan, budget), whole(plan)):
        parts = state(plan, source, None, tile, most)
        outer, n, inner = sizes_of(tile)
        blocks = cut(plan, (outer, n, inner), fit, narrow=regions.WIDE)
        for (rows, columns), run in product(blocks.tiles, blocks.runs):
            where = tuple(moved(s, own.start) for s, own in zip((rows, run, columns), tile, strict=True))
            cells = SourceCells(plan, source, None, where, policy=nan_policy(plan))
            own = {name: part[rows, columns] for name, part in parts.items()}
            values, mask = engine.applied(of_sizes(plan, sizes_of(where)), cells, own)
            yield Piece(where=where, values=values, mask=mask)


def searchable(plan: Plan) -> bool:
    finisher = finisher_of(plan)
    return isinstance(finisher, Selector) and finisher.search(plan, 1) is not None


def searched(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Selections from slices that are read several times, a few slices side by side."""
    finisher, fold = finisher_of(plan), plan.fold
    assert isinstance(finisher, Selector)
    cells = SourceCells(plan, source, None, whole(plan), policy=nan_policy(plan))
    kept, reduced = fold[:-2:2], fold[1:-2:2]
    for index in product(*map(range, kept)):
        outers = [flat_index(fold[:-2], woven(index, inner)) for inner in product(*map(range, reduced))]
        for columns in spans(fold[-1], engine.SEARCHED_TOGETHER):
            lanes = columns.stop - columns.start
            search = finisher.search(plan, lanes)
            assert search is not None
            runs = spans(fold[-2], max(1, regions.BLOCK // lanes))
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


def carried(plan: Plan, source: Source, budget: int) -> Iterator[Piece]:
    """Parts of a slice one after the other: before each lies the last valid result of those that came."""
    assert isinstance(plan.row, Scan)
    backward = plan.row.carries == "backward"
    folded, step = source.folded(plan.fold), max(1, budget // (8 * (source.cell_bytes + plan.result.n_bytes + 1)))
    dtype = getattr(torch, plan.stored.torch)
    for kept in kept_tiles(plan, 1, whole(plan)):
        carry, known = (torch.zeros((1, 1, 1), dtype=of, device=plan.device) for of in (dtype, torch.bool))
        for run in reversed(spans(plan.fold[1], step)) if backward else spans(plan.fold[1], step):
            where = put(kept, 1, run)
            n = run.stop - run.start
            data, mask = folded.window(where)
            mask = torch.ones(data.shape, dtype=torch.bool, device=data.device) if mask is None else mask
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
    step = max(1, min(budget // WIDTHS_OF_STATE, regions.BLOCK) // plan.leaf) * plan.leaf
    for kept in kept_tiles(plan, 1, whole(plan)):
        carry = None
        cells = SourceCells(plan, source, None, kept, policy=plan.params["nan"])
        for run in spans(n, step):
            data, mask = cells.block(slice(0, 1), run, slice(0, 1))
            (values, own), carry = scan_on(plan, data, mask, carry)
            valid = torch.ones(values.shape, dtype=torch.bool, device=values.device) if own is None else own
            yield Piece(where=put(kept, 1, run), values=engine.narrowed(plan, select(values, own)), mask=valid)
