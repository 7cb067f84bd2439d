"""States of regions: the sizes that fit a budget, and a region cut into parts whose states do, joined as in memory.

A region whose states fit is lifted block by block on the engine's threads; a larger one is cut along its first group that
has more than one index: kept ones lie side by side, reduced ones are aligned subtrees (docs/order.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from maskserve import engine, regions
from maskserve.backends import Parts
from maskserve.backends.reference import kernel
from maskserve.blocks import spans
from maskserve.dtypes import Kind
from maskserve.execution import backend_of, in_parallel
from maskserve.ops.rows import Reduction
from maskserve.plan import Plan
from maskserve.regions import Region, moved, of_cells, of_sizes, put, sizes_of
from maskserve.sources import Source
from maskserve.trees import Counter, subtrees

MERGED = 1 << 15
"""Results whose states a thread merges at a time."""
MOST_STATES = 1 << 20
"""States of a region's blocks, before they are joined into one a result: so many stay in the cache."""
SHARE = 4
"""The part of the budget that states may take."""


def lifts(plan: Plan) -> bool:
    """Whether the plan is a reduction whose states join."""
    row = plan.row
    return isinstance(row, Reduction) and bool(row.passes) and not row.picks and plan.stored.kind is not Kind.COMPLEX


def state_bytes(plan: Plan) -> int:
    """The bytes of the state of one result."""
    return sum(part.dtype.n_bytes for part in plan.passes[0].parts(plan.dtype))


class Most(NamedTuple):
    """What of a region is in work at once."""

    states: int
    cells: int
    """Of a source that is far, and fetched."""

    def units(self, plan: Plan, source: Source, region: Region, axis: int) -> int:
        """How many units of a group: 1 at least."""
        n = -(-(region[axis].stop - region[axis].start) // unit_of(plan, axis))
        fit: int = self.states // max(-(-n_states(plan, region) // n), 1)
        if source.is_far:
            fit = min(fit, self.cells // max(-(-prod(sizes_of(region)) // n), 1))
        return max(fit, 1)

    def holds(self, plan: Plan, source: Source, region: Region) -> bool:
        return n_states(plan, region) <= self.states and (not source.is_far or prod(sizes_of(region)) <= self.cells)


def most_of(plan: Plan, source: Source, budget: int) -> Most:
    n_bytes = min(regions.FETCHED, budget // SHARE)
    return Most(most_states(plan, budget), max(n_bytes // source.cell_bytes, 1))


def most_states(plan: Plan, budget: int) -> int:
    return max(min(budget // (SHARE * state_bytes(plan)), MOST_STATES), 1)


def most_results(plan: Plan, budget: int) -> int:
    """How many results fit at once, with a state for each level of the tree and two more while they join."""
    levels = prod(plan.fold[1::2]).bit_length() + 2
    return max(budget // (2 * levels * state_bytes(plan)), 1)


def n_states(plan: Plan, region: Region) -> int:
    """How many states a region has at once while its blocks are lifted."""
    *outer, n, inner = sizes_of(region)
    n_tiles = prod(outer) * -(-inner // regions.WIDE)
    n_runs = -(-n * min(inner, regions.WIDE) // regions.BLOCK)
    n_joined = -(-n_runs // engine.joined_at_once(n_tiles, n_runs, regions.TOGETHER))
    return prod(outer) * inner * max(n_joined, 1)


def state(plan: Plan, source: Source, weights: Source | None, region: Region, most: Most) -> Parts:
    """The state of each result of a region, (first kept group, other kept groups); at most `most` of it at a time."""
    axis = next((d for d, s in enumerate(region) if s.stop - s.start > unit_of(plan, d)), None)
    if axis is None or most.holds(plan, source, region):
        return of_cells(plan, source, weights, region, partial(engine.joined, of_sizes(plan, sizes_of(region))))
    if axis % 2 == 0:
        return side_by_side(plan, source, weights, region, most, axis)
    counter = Counter(side_by_side_merge(plan))
    for first, n_units, part in parts_of(plan, region, axis, most.units(plan, source, region, axis)):
        parts = state(plan, source, weights, part, most)
        counter.add(first, n_units, placed(plan, parts, axis, part[axis].start - region[axis].start))
    return counter.joined()


def side_by_side_merge(plan: Plan) -> Callable[[Parts, Parts], Parts]:
    """The plan's merge, on our threads where results are many: torch's own wait for each other after each step of it."""
    backend = backend_of(plan)
    merge = backend.merge(plan)

    def merged(left: Parts, right: Parts) -> Parts:
        rows, others = left["count"].shape
        if rows * others <= MERGED:
            return merge(left, right)
        made = {name: torch.empty_like(part) for name, part in left.items()}

        def task(*where: slice) -> Callable[[], None]:
            def merge_some() -> None:
                some = merge(*({name: part[where] for name, part in side.items()} for side in (left, right)))
                for name, part in some.items():
                    made[name][where] = part

            return merge_some

        tiles = product(spans(rows, max(1, MERGED // others)), spans(others, MERGED))
        in_parallel(backend, rows * others, [task(*tile) for tile in tiles])
        return made

    return merged


def unit_of(plan: Plan, axis: int) -> int:
    """The indices of a group that stay together: a leaf of the last reduced one."""
    return plan.leaf if axis == len(plan.fold) - 2 else 1


def parts_of(plan: Plan, region: Region, axis: int, most: int) -> Iterator[tuple[int, int, Region]]:
    """A reduced group cut into aligned subtrees of at most so many units: the first unit of each, how many, and its region."""
    unit, of = unit_of(plan, axis), region[axis]
    n_units = -(-(of.stop - of.start) // unit)
    largest: int = 1 << most.bit_length() - 1
    for start, size in subtrees(of.start // unit, of.start // unit + n_units, largest):
        cells = slice(start * unit, min((start + size) * unit, of.stop))
        yield start, size, put(region, axis, cells)


def placed(plan: Plan, parts: Parts, axis: int, by: int) -> Parts:
    """The parts of a region that begins `by` indices later: places in the slice count from its start."""
    shift = getattr(kernel(plan.passes[0].reference), "shift", None)
    return shift(parts, by * prod(plan.fold[axis + 2 :: 2])) if shift and by else parts


def side_by_side(plan: Plan, source: Source, weights: Source | None, region: Region, most: Most, axis: int) -> Parts:
    """States of a region cut along a kept group."""
    size, step = region[axis].stop - region[axis].start, most.units(plan, source, region, axis)
    step = -(-size // -(-size // step))  # parts alike, so that of far ones none is a sliver with a wide gap before it
    cut = [put(region, axis, moved(part, region[axis].start)) for part in spans(size, step)]
    found = [(part, state(plan, source, weights, part, most)) for part in cut]
    kept = sizes_of(region)[::2]

    def joined(name: str) -> Tensor:
        own = [parts[name].view(sizes_of(part)[::2]) for part, parts in found]
        return torch.cat(own, axis // 2).view(kept[0], -1)

    return {name: joined(name) for name in found[0][1]}
