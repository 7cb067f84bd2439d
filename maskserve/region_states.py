"""States of regions: the sizes that fit a budget, and a region cut into parts whose states do, joined as in memory.

A region whose states fit is lifted block by block on the engine's threads; a larger one is cut along its first group that
has more than one index: kept ones lie side by side, reduced ones are aligned subtrees (docs/order.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from maskserve import engine, regions
from maskserve.backends import Parts
from maskserve.backends.reference import kernel
from maskserve.blocks import spans
from maskserve.dtypes import Kind
from maskserve.execution import backend_of
from maskserve.ops.rows import Reduction
from maskserve.plan import Plan
from maskserve.regions import Region, lifted_cells, moved, of_sizes, put, sizes_of
from maskserve.sources import Source
from maskserve.trees import Counter, subtrees

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


def state(plan: Plan, source: Source, weights: Source | None, region: Region, most: int) -> Parts:
    """The state of each result of a region, (first kept group, other kept groups); at most `most` of them at a time."""
    axis = next((d for d, s in enumerate(region) if s.stop - s.start > unit_of(plan, d)), None)
    if axis is None or n_states(plan, region) <= most:
        below = of_sizes(plan, sizes_of(region))
        return engine.joined(below, lifted_cells(plan, source, weights, region))
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
