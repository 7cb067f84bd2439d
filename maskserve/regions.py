"""Ranges of a plan's fold, and the cells of one read block by block from a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from maskserve.blocks import Cells, counting, covering, spans
from maskserve.execution import finisher_of, nan_policy
from maskserve.masks import intersection
from maskserve.ops.rows import Ordering, Reduction
from maskserve.pages import KeptPages, Pages
from maskserve.plan import Plan
from maskserve.sources import Masked, Source, Stored, Window, n_cells

Made = TypeVar("Made")
Region: TypeAlias = tuple[slice, ...]
"""A range of each group of a fold."""

BLOCK = 1 << 20
"""Cells that a thread reads at a time: few enough for the cache, and many enough that a read is no call too many."""
WIDE = 1 << 15
"""Columns that are read side by side at least, where rows are wider: so that a row's part is more than a few pages."""
SEEN = 1 << 22
"""Cells of a block that a thread sees where it lies: none is copied, and each block costs some calls of Python."""
LEAST_SEEN = 1 << 17
"""Cells of a block from which it is seen where it lies: a smaller one is copied in the time that this takes."""
FETCHED = 1 << 24
"""Bytes of an object that are in memory at a time: columns of a row share what is asked for."""
TOGETHER = 32
"""Blocks below each other that a thread joins while their states are in its cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a result: where it lies in the result's fold, and its cells."""

    where: Window
    values: Tensor
    mask: Tensor
    n_masked_before: int = 0
    """How many cells of the question were masked there, where the request is about masks."""


class InPlace(NamedTuple):
    """Some cells of a tensor that is written: its name, the shape that it is seen in, where in it, and the cells."""

    name: str
    shape: tuple[int, ...]
    where: Window
    cells: Tensor


class SourceCells(Cells):
    """The cells of a region as (outer, n, inner), read block by block."""

    narrow = WIDE
    together = TOGETHER

    def __init__(
        self,
        plan: Plan,
        source: Source,
        weights: Source | None,
        region: Region,
        *,
        policy: str,
        pages: Pages | None = None,
        is_seen: bool = False,
    ) -> None:
        """`pages` is what blocks are read into; with `is_seen` those that a file shows are not read."""
        sizes = sizes_of(region)
        self.plan, self.policy, self.region, self.sizes = plan, policy, region, sizes
        self.shape = (prod(sizes[:-2]), sizes[-2], sizes[-1])
        *outer, n, inner = plan.fold
        self.first = (
            flat_index(plan.fold[:-2], [s.start for s in region[:-2]]) if is_run(plan.fold[:-2], region[:-2]) else -1
        )
        shape = plan.fold if self.first < 0 else (prod(outer), n, inner)
        self.source = source.folded(shape)
        self.pages, self.is_seen = pages or Pages(), is_seen
        self.weights_source = None if weights is None else weights.folded(shape)

    def weight(self, *where: slice) -> tuple[Tensor, ...]:
        if self.weights_source is None:
            return ()
        return (self.read(self.weights_source, where, Pages())[0],)

    def stored(self, outer: slice, run: slice, inner: slice) -> Masked:
        data, mask = self.read(self.source, (outer, run, inner), self.pages)
        if self.weights_source is not None:
            weights = self.read(self.weights_source, (outer, run, inner), Pages())
            mask = intersection([mask, counting(self.plan.row, *weights, self.plan.params["nan"])])
        return data, mask

    def read(self, source: Source, where: Window, pages: Pages) -> Masked:
        """A block of the region."""
        outer, run, inner = where
        last = (moved(run, self.region[-2].start), moved(inner, self.region[-1].start))
        if self.first >= 0:
            where = (moved(outer, self.first), *last)
            if not isinstance(source, Stored):
                return source.window(where)
            is_seen = self.is_seen and n_cells(where) >= LEAST_SEEN
            return (source.seen(where) if is_seen else None) or source.read(where, pages)
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


def is_shown(plan: Plan, source: Source) -> bool:
    """Whether blocks are computed on where they lie: a file shows them, and nothing is made of them before."""
    return isinstance(source, Stored) and source.lies is not None and plan.as_stored and not plan.weighted


def flat_index(shape: Sequence[int], index: Sequence[int]) -> int:
    at = 0
    for n, i in zip(shape, index, strict=True):
        at = at * n + i
    return at


def of_cells(plan: Plan, source: Source, weights: Source | None, region: Region, make: Callable[[Cells], Made]) -> Made:
    """What `make` makes of the cells of a region, of which it keeps none; far ones are fetched at once."""
    cells_of = fetched_cells if source.is_far else lifted_cells
    made = make(cells_of(plan, source, weights, region))
    for read in (source, weights):
        if isinstance(read, Stored):
            read.refuse_spoilt()
    return made


def fetched_cells(plan: Plan, source: Source, weights: Source | None, region: Region) -> Cells:
    """The cells of a region, all of them in memory."""
    far = SourceCells(plan, source, weights, region, policy=nan_policy(plan))
    where = tuple(slice(0, n) for n in far.shape)
    data, mask = far.stored(*where)
    masked = None if mask is None else mask.reshape(far.sizes)
    own = [weight.reshape(far.sizes) for weight in far.weight(*where)]
    return Cells(of_sizes(plan, far.sizes), data.reshape(far.sizes), masked, *own, policy=far.policy)


def lifted_cells(plan: Plan, source: Source, weights: Source | None, region: Region) -> SourceCells:
    """The cells of a region of which states alone are made: where they lie, or in memory that the back end does not keep."""
    is_forgotten = finisher_of(plan) is not None and weights is None
    pages = KeptPages() if is_forgotten else None
    return SourceCells(plan, source, weights, region, policy=nan_policy(plan), pages=pages, is_seen=True)


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
