"""Nodes: the states of aligned subtrees, each read window by window of results: from memory, from a file, or from the cells.

What a window of results needs is read when it is due, so that states of any size are written and merged within a budget.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from maskserve import execution, region_states
from maskserve.backends import Parts
from maskserve.backends.reference import kernel
from maskserve.errors import StateError, about
from maskserve.payload.format import Payload
from maskserve.payload.header import Shape, TensorInfo
from maskserve.plan import Plan
from maskserve.region_states import most_of, most_results, state, state_bytes, unit_of
from maskserve.regions import Region, kept_tiles, moved, sizes_of
from maskserve.shards import Shard
from maskserve.sources import Source, Stored, Window, read_cells
from maskserve.streaming import block_cells
from maskserve.trees import subtrees

HELD_TWICE = 2
"""How many times a state is held while its parts are put together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A subtree, for `n_rows` indices of the first kept group from `row` on.

    The subtree is `n_units` units of the first reduced group from `start` on (leaves, where it is the only one).
    """

    row: int
    n_rows: int
    start: int
    n_units: int

    @property
    def stop(self) -> int:
        return self.start + self.n_units

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.n_rows)

    def __str__(self) -> str:
        return f"{self.row}.{self.n_rows}.{self.start}.{self.n_units}"

    def cells(self, plan: Plan) -> tuple[int, int]:
        """The flat index of its first cell, and how many there are up to its last one."""
        below = prod(plan.fold[2:])
        first, last = (min(at * unit_of(plan, 1), plan.fold[1]) for at in (self.start, self.stop))
        begin = (self.row * plan.fold[1] + first) * below
        return begin, ((self.row + self.n_rows - 1) * plan.fold[1] + last) * below - begin

    def shape(self, plan: Plan) -> Shape:
        """Its results: (n_rows, the other kept groups)."""
        return (self.n_rows, *plan.fold[2::2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The state of a subtree."""

    place: Place
    read: Callable[[Window], Parts]
    """The parts of a window of its results, (rows, all others)."""

    def parts(self, plan: Plan) -> Parts:
        """The parts of all its results."""
        return self.read(tuple(slice(0, n) for n in self.place.shape(plan)))

    def held(self, plan: Plan) -> Node:
        """The node, read now."""
        return held(plan, self.place, self.parts(plan))

    def windows(self, plan: Plan, budget: int) -> Iterator[tuple[Window, Parts]]:
        """All its parts, as many results at a time as the budget holds."""
        region = tuple(slice(0, n) for n in (self.place.n_rows, *plan.fold[1:]))
        for tile in tiles(plan, region, budget):
            yield tile[::2], self.read(tile[::2])


def held(plan: Plan, place: Place, parts: Parts) -> Node:
    """A node whose parts, (n_rows, all other kept groups), are in memory."""
    shape = place.shape(plan)

    def read(where: Window) -> Parts:
        sizes = flat(where)
        return {name: part.view(shape)[where].reshape(sizes) for name, part in parts.items()}

    return Node(place=place, read=read)


def flat(where: Window) -> Shape:
    """The sizes of a window of results as (rows, all others)."""
    n_rows, *others = sizes_of(where)
    return n_rows, prod(others)


def by_place(node: Node) -> tuple[int, int]:
    return node.place.row, node.place.start


def tiles(plan: Plan, region: Region, budget: int | None) -> Iterator[Region]:
    """A region cut along kept groups, so that the states of a part's results fit; whole where there is no bound."""
    n_results = prod(sizes_of(region)[::2])
    return kept_tiles(plan, n_results if budget is None else most_results(plan, budget), region)


def units(plan: Plan) -> int:
    """The units of the first reduced group."""
    return -(-plan.fold[1] // unit_of(plan, 1))


def rectangles(plan: Plan, shard: Shard) -> Iterator[tuple[slice, int, int]]:
    """(rows, start, n_units) of a shard: the end of a row, whole rows, and the begin of one.

    Shards are equal parts of all rows' units, so that each reads what lies in one piece.
    """
    n_units = units(plan)
    total = plan.fold[0] * n_units
    first, last = (i * total // shard.n for i in (shard.index, shard.index + 1))
    while first < last:
        row, unit = divmod(first, n_units)
        if unit == 0 and last - first >= n_units:
            n_rows = (last - first) // n_units
            yield slice(row, row + n_rows), 0, n_units
            first += n_rows * n_units
            continue
        stop = min(n_units, unit + last - first)
        for start, n in subtrees(unit, stop):
            yield slice(row, row + 1), start, n
        first += stop - unit


def holds(plan: Plan, nodes: Sequence[Node], room: int) -> bool:
    """Whether the nodes' states fit; few always do."""
    n = sum(prod(node.place.shape(plan)) for node in nodes)
    return n <= region_states.MOST_STATES or HELD_TWICE * n * state_bytes(plan) <= room


def are_siblings(left: Place, right: Place) -> bool:
    """Whether the two are the halves of one aligned subtree."""
    n = left.n_units
    is_half = n == right.n_units and left.stop == right.start and not n & (n - 1) and left.start % (2 * n) == 0
    return is_half and left.rows == right.rows


def refuse_overlap(nodes: Sequence[Node]) -> None:
    for left, right in pairwise(node.place for node in nodes):
        if right.row < left.row + left.n_rows and (left.rows != right.rows or right.start < left.stop):
            raise StateError(f"two states cover leaf {right.start} of row {right.row}; merge each shard once")


# -- nodes of cells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifting:
    """What states are lifted from, and within which budget."""

    plan: Plan
    source: Source
    weights: Source | None
    budget: int
    backend: str

    def node(self, rows: slice, start: int, n_units: int) -> Node:
        """A node whose cells are read and lifted when a window of it is due."""
        place = Place(row=rows.start, n_rows=rows.stop - rows.start, start=start, n_units=n_units)
        return Node(place=place, read=partial(self.read, place))

    def read(self, place: Place, where: Window) -> Parts:
        plan, unit = self.plan, unit_of(self.plan, 1)
        cells = slice(place.start * unit, min(place.stop * unit, plan.fold[1]))
        reduced = (cells, *(slice(0, n) for n in plan.fold[3::2]))
        kept = (moved(where[0], place.row), *where[1:])
        region = tuple((reduced if d % 2 else kept)[d // 2] for d in range(len(plan.fold)))
        with execution.using(backend=self.backend, block_cells=block_cells(plan, self.source, self.budget)):
            parts = state(plan, self.source, self.weights, region, most_of(plan, self.source, self.budget))
        return shifted(plan, parts, place.start * unit)


def shifted(plan: Plan, parts: Parts, start: int) -> Parts:
    """Places count from the start of the slice: `start` is in indices of the first reduced group."""
    shift = getattr(kernel(plan.passes[0].reference), "shift", None)
    return shift(parts, start * prod(plan.fold[3::2])) if shift else parts


# -- nodes of a file ----------------------------------------------------------------------------------------------


def stored_nodes(
    plan: Plan, payload: Payload, names: Mapping[str, TensorInfo], title: str | None = None
) -> Iterator[Node]:
    """The nodes of a payload, each with exactly the parts that the plan's pass has, in their dtypes and shape."""
    others = prod(plan.fold[2::2])
    wanted = MappingProxyType({part.name: part.dtype for part in plan.passes[0].parts(plan.dtype)})
    found: dict[Place, dict[str, TensorInfo]] = {}
    for name, info in names.items():
        place, part = named_place(name)
        if info.dtype is not wanted.get(part) or info.shape != (place.n_rows, others):
            raise StateError(f"{name[:64]} is no part of this state: {info.dtype} {info.shape}")
        found.setdefault(place, {})[part] = info
    for place, infos in found.items():
        check_place(plan, place)
        if infos.keys() != wanted.keys():
            raise incomplete(place)
        yield Node(
            place=place, read=StoredParts(plan=plan, place=place, payload=payload, infos=infos, title=title).read
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParts:
    """The parts of a node where they lie in a file."""

    plan: Plan
    place: Place
    payload: Payload
    infos: Mapping[str, TensorInfo]
    title: str | None

    def read(self, where: Window) -> Parts:
        sizes = flat(where)
        with about(self.title) if self.title else nullcontext():
            parts = {name: self.window(info, where).view(sizes) for name, info in self.infos.items()}
            check_counts(self.plan, self.place, parts["count"])
        return parts

    def window(self, info: TensorInfo, where: Window) -> Tensor:
        dtype = getattr(torch, info.dtype.torch)
        return Stored(partial(read_cells, self.payload, info), None, dtype, self.place.shape(self.plan)).window(where)[
            0
        ]


NAMED = re.compile(r"(0|[1-9][0-9]{0,15})\.([1-9][0-9]{0,15})\.(0|[1-9][0-9]{0,15})\.([1-9][0-9]{0,15})\.([a-z0-9_]+)")


def named_place(name: str) -> tuple[Place, str]:
    """(place, part) of "0.1.4.2.total"; each number in its one spelling."""
    found = NAMED.fullmatch(name)
    if found is None:
        raise StateError(f"{name[:64]!r} names no part of a state")
    row, n_rows, start, n_units = (int(word) for word in found.groups()[:4])
    return Place(row=row, n_rows=n_rows, start=start, n_units=n_units), found[5]


def check_place(plan: Plan, place: Place) -> None:
    """An aligned subtree inside the index: only the last may be smaller, or all units."""
    n_units, first, size = units(plan), place.start, place.n_units
    aligned = (not size & (size - 1) and first % size == 0) or (first == 0 and size == n_units)
    if not aligned or place.stop > n_units or place.row + place.n_rows > plan.fold[0]:
        raise incomplete(place)


def incomplete(place: Place) -> StateError:
    return StateError(
        f"the state of leaves {place.start} to {place.stop} is incomplete, unaligned or outside the index"
    )


def check_counts(plan: Plan, place: Place, count: Tensor) -> None:
    """Raise where a subtree counts more cells than it has."""
    unit = unit_of(plan, 1)
    cells = (min(place.stop * unit, plan.fold[1]) - place.start * unit) * prod(plan.fold[3::2])
    if count.numel() and not 0 <= int(count.min()) <= int(count.max()) <= cells:
        raise StateError(f"the state of leaves {place.start} to {place.stop} counts cells that it cannot have")
