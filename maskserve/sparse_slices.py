"""Ops along dims of sparse tensors: the bits of the strided tensor from the stored cells alone, and no dense temporary.

A masked cell is the identity in its place and changes nothing (docs/order.md), so a slice is computed from what it
stores wherever each stored cell meets the others in the same order as before: exact states in the order of the cells;
the cells of a leaf at their index modulo a smaller power of two, where that keeps them apart; leaves in the same tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve import engine
from maskserve.backends import Parts, Spreader
from maskserve.backends.reference import join, kernel
from maskserve.backends.reference.cells import canonical, select
from maskserve.blocks import Cells, Cut, counting, cut, seen, spans
from maskserve.dtypes import Kind
from maskserve.execution import backend_of, block_cells, in_parallel, in_turn, nan_policy
from maskserve.masks import intersection
from maskserve.ops.rows import Fill, Normalization, Ordering, Reduction
from maskserve.patterns import Pattern, ravelled, unravelled
from maskserve.plan import INNER_LEAF, OUTER_LEAF, Plan, fold
from maskserve.sparse import SparseTensor, in_bits, put_at, refused, taken_at
from maskserve.tensor import MaskedTensor
from maskserve.trees import Merge

BLOCK_CELLS = 1 << 20
"""Cells that are spread out at a time."""
SPREAD_CELLS = 1 << 17
"""The same where a back end does it, in memory that stays in L2."""
WIDEST = 1 << 24
"""Cells of a slice that are spread out at most."""
NARROWER = (16, 128, 1024)
"""Widths of a leaf that are tried before its own."""
CROWD = 1024
"""Of a tensor of fewer cells than so many times the stored ones, a back end that can spreads out blocks itself."""
CROWD_OF_FEWER = 100
"""The same of cells that are picked, which the other way finds sooner, and where torch's operations spread out."""
CROWDED = 8
"""Of so many times the square root of a width, cells in random places meet but in one leaf of fifty."""

Entries = tuple[Tensor, Tensor | None, Tensor | None]
"""Cells as kernels see them, where they count, and their weights, in the order of slices: (n,) each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slices:
    """The stored cells by slice, and by place within it: `numbers` are those of the m slices that store a cell."""

    order: Tensor | None
    """Which stored cell each is; None: they stand in this order."""
    of: Tensor
    """Which of the m slices it is in: (n,)."""
    places: Tensor
    """Where in the slice, as if it were one dim: (n,)."""
    numbers: Tensor
    counts: Tensor

    @property
    def m(self) -> int:
        return len(self.numbers)

    def ordered(self, stored: Any) -> Any:
        return stored if stored is None or self.order is None else taken_at(stored, self.order)

    def as_stored(self, ordered: Tensor) -> Tensor:
        """Back into the order of the pattern."""
        if self.order is None:
            return ordered
        made = torch.empty_like(ordered)
        put_at(made, self.order, ordered)
        return made


def slices_of(pattern: Pattern, sizes: Sequence[int], dims: Sequence[int]) -> Slices:
    """The stored cells of a tensor seen as `sizes`, in slices along `dims`, which ascend."""
    kept, along = (
        [dim for dim, size in enumerate(sizes) if size != 1 and (dim in dims) is wanted] for wanted in (False, True)
    )
    n_slice = max(prod(sizes[dim] for dim in dims), 1)
    if kept + along == sorted(kept + along):
        order = None
        number = pattern.positions // n_slice
        places = pattern.positions - number * n_slice
    else:
        index = unravelled(pattern.positions, sizes)
        number, places = (
            ravelled([index[d] for d in some], [sizes[d] for d in some], pattern.positions) for some in (kept, along)
        )
        number, order = in_turn_of(number, prod(sizes[dim] for dim in kept))
        places = places.index_select(0, order)
    numbers, of, counts = number.unique_consecutive(return_inverse=True, return_counts=True)
    return Slices(order=order, of=of, places=places, numbers=numbers, counts=counts)


def in_turn_of(number: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(ascending numbers below n, which each was): those of one number stay in their order, ascending places."""
    narrow = number.to(torch.int16) if n <= 1 << 15 else number  # a third of the time
    ascending, order = narrow.sort(stable=True)
    return ascending.long(), order


def of_plan(plan: Plan, pattern: Pattern) -> Slices:
    return slices_of(pattern, plan.fold, range(1, len(plan.fold), 2))


# -- the way of an op ---------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """Values, where they are valid, and the places of picked ones."""

    values: Tensor
    valid: Tensor
    indices: Tensor | None = None


def refuse(plan: Plan) -> None:
    """Raise where what is masked changes its place, or becomes valid."""
    if isinstance(plan.row, Fill | Ordering):
        raise refused(f"{plan.row.name}, whose result is valid where nothing is stored,", torch.Size(plan.shape))


def compute(plan: Plan, tensor: SparseTensor, weights: tuple[Tensor, Tensor | None] | None = None) -> Made:
    """The plan of a sparse tensor: a strided result of a reduction, else cells for the same pattern."""
    cells = tensor._cells
    if weights is None and (blocks := grid_of(plan, cells.numel())) is not None:
        return by_blocks(plan, blocks, tensor._pattern.positions, cells._data.detach(), whole_mask(cells))
    slices = of_plan(plan, tensor._pattern)
    data, mask = slices.ordered(cells._data.detach()), slices.ordered(whole_mask(cells))
    side = None
    if weights is not None:
        side = slices.ordered(weights[0].detach())
        mask = intersection([mask, counting(plan.row, side, slices.ordered(weights[1]), plan.params["nan"])])
    if isinstance(plan.row, Reduction):
        return reduction(plan, slices, data, mask, side)
    if isinstance(plan.row, Normalization) and plan.n_reduced > engine.LONG:
        made = normalized(plan, slices, data, mask)
    else:
        made = by_windows(plan, slices, data, mask)
    return Made(*[None if part is None else slices.as_stored(part) for part in made])  # type: ignore[arg-type]  # two are none


def whole_mask(cells: MaskedTensor) -> Tensor | None:
    return None if cells._held is None else cells._full_mask()


def reduction(plan: Plan, slices: Slices, data: Tensor, mask: Tensor | None, weights: Tensor | None) -> Made:
    row = plan.row
    assert isinstance(row, Reduction)
    if not row.passes or row.picks or plan.stored.kind is Kind.COMPLEX:
        return whole_slices(plan, slices, data, mask, weights)
    entries = as_seen(plan, data, mask, weights)
    parts = states(plan, slices, entries)
    kept = (plan.fold[0], prod(plan.fold[2::2]))
    every = engine.identity(plan, prod(kept))
    for name, part in parts.items():
        every[name].view(-1)[slices.numbers] = part
    return Made(*engine.finish(plan, {name: part.view(kept) for name, part in every.items()}))


def as_seen(plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Entries:
    cells = seen(plan, data)
    if isinstance(plan.row, Normalization) and plan.row.negates:
        cells = cells.neg()
    return cells, counting(plan.row, cells, mask, nan_policy(plan)), weights


# -- crowded tensors ----------------------------------------------------------------------------------------------


def grid_of(plan: Plan, n_stored: int) -> Cut | None:
    """The blocks of a reduction of many stored cells, which are spread out in their places: sorting costs more.

    None where they are few, or the back end spreads nothing out itself and no block holds a leaf of every column.
    """
    row = plan.row
    if not isinstance(row, Reduction) or not row.passes or plan.stored.kind is Kind.COMPLEX:
        return None
    spreads = isinstance(backend_of(plan), Spreader)
    crowd = CROWD if spreads and not row.picks else CROWD_OF_FEWER
    if len(plan.fold) != 3 or not n_stored or n_stored * crowd < prod(plan.fold):
        return None
    outer, n, inner = plan.fold
    if spreads:
        return cut(plan, (outer, n, inner), SPREAD_CELLS)
    fits = min(n, plan.leaf) * inner <= BLOCK_CELLS
    return cut(plan, (outer, n, inner), BLOCK_CELLS, narrow=inner) if fits else None


def by_blocks(plan: Plan, blocks: Cut, positions: Tensor, data: Tensor, mask: Tensor | None) -> Made:
    """The states of blocks of the tensor as it lies, joined in the tree of their runs."""
    outer, n, inner = plan.fold
    positions = positions.contiguous()
    cells, own, _ = as_seen(plan, data.contiguous(), None if mask is None else mask.contiguous())
    backend, of = backend_of(plan), kernel(plan.passes[0].reference)
    parts = engine.empty_states(plan, (outer, len(blocks.runs), inner))
    if isinstance(backend, Spreader):
        lift_stored(plan, backend, blocks, positions, cells, own, parts)
    else:
        lift_spread(plan, blocks, positions, cells, own, parts)
    if hasattr(of, "shift"):
        starts = torch.tensor([run.start for run in blocks.runs], device=positions.device)
        parts = of.shift(parts, starts[:, None])
    parts = join(backend.merge(plan), parts, 1)
    if not plan.row.picks:
        return Made(*engine.finish(plan, parts))
    at, valid = engine.finish(engine.indexing(plan), parts)
    first = torch.arange(outer, device=at.device)[:, None] * (n * inner) + torch.arange(inner, device=at.device)
    which = torch.searchsorted(positions, first + at.view(outer, inner) * inner)
    picked = taken_at(data, which.clamp(max=len(data) - 1).view(-1)).view(at.shape)
    return Made(select(canonical(picked.to(getattr(torch, plan.result.torch))), valid), valid, at)


def lift_stored(
    plan: Plan, backend: Spreader, blocks: Cut, positions: Tensor, cells: Tensor, own: Tensor | None, parts: Parts
) -> None:
    """The back end spreads out and lifts blocks, a few in each call."""
    (rows, columns), run = blocks.tiles[0], blocks.runs[0]
    size = (rows.stop, run.stop, columns.stop)
    every, at_once = range(len(blocks.tiles) * len(blocks.runs)), max(1, block_cells(backend, plan.fold) // prod(size))

    def task(some: range) -> Callable[[], None]:
        return lambda: backend.lift_stored(plan, size, positions, cells, own, some, parts)

    in_parallel(backend, prod(plan.fold), [task(every[span]) for span in spans(len(every), at_once)])


def lift_spread(plan: Plan, blocks: Cut, positions: Tensor, cells: Tensor, own: Tensor | None, parts: Parts) -> None:
    """The same by torch's operations, of blocks whose cells lie side by side."""
    _, n, inner = plan.fold
    where = list(product((rows for rows, _ in blocks.tiles), enumerate(blocks.runs)))
    begins = [(rows.start * n + run.start) * inner for rows, (_, run) in where] + [prod(plan.fold)]
    cuts = torch.searchsorted(positions, torch.tensor(begins, device=positions.device)).tolist()
    for i, (rows, (at_run, run)) in enumerate(in_turn(where)):
        shape, some = (rows.stop - rows.start, run.stop - run.start, inner), slice(cuts[i], cuts[i + 1])
        at = positions[some] - begins[i]
        flat = torch.zeros(prod(shape), dtype=cells.dtype, device=cells.device)
        valid = torch.zeros(prod(shape), dtype=torch.bool, device=cells.device)
        put_at(flat, at, cells[some])
        put_at(valid, at, torch.ones_like(at, dtype=torch.bool) if own is None else own[some])
        for name, part in backend_of(plan).lift(plan, flat.view(shape), valid.view(shape)).items():
            parts[name][rows, at_run] = part


# -- states -------------------------------------------------------------------------------------------------------


def states(plan: Plan, slices: Slices, entries: Entries) -> Parts:
    """The state of each slice that stores a cell: parts of shape (m,)."""
    of = kernel(plan.passes[0].reference)
    return exact_states(plan, slices, entries) if of.exact else leaf_states(plan, slices, entries)


def exact_states(plan: Plan, slices: Slices, entries: Entries) -> Parts:
    """Cell by cell, joined in their order: such states are the same however they are cut."""
    of = kernel(plan.passes[0].reference)
    data, own, weights = (None if part is None else part.unsqueeze(1) for part in entries)
    assert data is not None
    parts = lifted(plan, data, own, weights)
    if hasattr(of, "shift"):
        parts = of.shift(parts, slices.places)
    n = len(slices.of)
    begins = slices.counts.cumsum(0) - slices.counts
    ranks = torch.arange(n, device=slices.of.device) - begins[slices.of]
    widest = max(int(slices.counts.max()) if n else 1, 1)
    return joined(backend_of(plan).merge(plan), parts, slices.of, ranks, widest)


def leaf_states(plan: Plan, slices: Slices, entries: Entries) -> Parts:
    """Leaf by leaf, each as narrow as its cells allow; then the tree of the leaves, and of the earlier groups of dims."""
    last, leaf = plan.fold[-2], plan.leaf
    n_leaves, earlier = -(-last // leaf), plan.fold[1:-2:2]
    group = slices.places // last
    index = slices.places - group * last
    inside = index // leaf
    keys = (slices.of * prod(earlier) + group) * n_leaves + inside
    segments, of, counts = keys.unique_consecutive(return_inverse=True, return_counts=True)
    index = index - inside * leaf
    leaves = Slices(order=None, of=of, places=index, numbers=segments, counts=counts)
    widths = apart(leaves, min(leaf, last))
    made: dict[str, Tensor] = {}
    for width in widths.unique().tolist():
        for window in windows((widths == width).nonzero().squeeze(1), leaves, index % width, width):
            data, own, weights = entries
            side = None if weights is None else window.spread(weights, width)
            parts = lifted(plan, window.spread(data, width), window.spread(own, width), side)
            for name, part in parts.items():
                made.setdefault(name, part.new_empty(len(segments)))[window.rows] = part
    if not made:
        return {name: part.view(-1) for name, part in engine.identity(plan, 0).items()}
    merge, at_slice = backend_of(plan).merge(plan), segments
    for size in (n_leaves, *reversed(earlier)):
        at_slice, made = level_by_level(merge, made, at_slice // size, at_slice % size, size)
    return made


def lifted(plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Parts:
    """The state of each row of (m, n) cells: parts of shape (m,)."""
    sides = () if weights is None else (weights.unsqueeze(-1),)
    if not data.numel():
        return {name: part.view(-1) for name, part in engine.identity(plan, len(data)).items()}
    parts = backend_of(plan).lift(plan, data.unsqueeze(-1), None if mask is None else mask.unsqueeze(-1), *sides)
    return {name: part.reshape(-1) for name, part in parts.items()}


def apart(leaves: Slices, leaf: int) -> Tensor:
    """The width of each leaf: a power of two modulo which its cells have different indices, or the leaf's own.

    Halving (docs/order.md) then joins the same cells in the same order: whoever is further away joins nobody before.
    """
    widths, mean = torch.full_like(leaves.counts, leaf), len(leaves.of) / max(leaves.m, 1)
    for width in reversed([width for width in NARROWER if width < leaf and mean**2 < CROWDED * width]):
        widths[free_in(leaves, leaves.places % width, width)] = width
    return widths


def free_in(slices: Slices, index: Tensor, width: int) -> Tensor:
    """The slices of which no two cells get one index: (m,)."""
    keys = (slices.of * width + index).sort().values
    free = torch.ones(slices.m, dtype=torch.bool, device=keys.device)
    free[keys[1:][keys[1:] == keys[:-1]] // width] = False
    return free


class Window(NamedTuple):
    """A few rows, side by side: which they are, the stored cells in them, and the place of each among the rows' cells."""

    rows: Tensor
    at: Tensor | slice
    places: Tensor

    def of(self, part: Tensor) -> Tensor:
        """Its own of what all stored cells have."""
        return part[self.at] if isinstance(self.at, slice) else taken_at(part, self.at)

    def spread(self, part: Tensor | None, width: int) -> Tensor:
        """(rows, width) stored cells among zeros; of no mask, all that are stored are valid."""
        given = torch.ones_like(self.places, dtype=torch.bool) if part is None else self.of(part)
        made = torch.zeros(len(self.rows) * width, dtype=given.dtype, device=given.device)
        put_at(made, self.places, given)
        return made.view(len(self.rows), width)

    def collect(self, cells: Tensor, whole: Tensor) -> None:
        """The stored cells of (rows, width) into what all have."""
        own = taken_at(cells.reshape(-1), self.places)
        if isinstance(self.at, slice):
            in_bits(whole)[self.at] = in_bits(own)
        else:
            put_at(whole, self.at, own)


def windows(rows: Tensor, slices: Slices, index: Tensor, width: int) -> Iterator[Window]:
    """Rows of `width` cells, each stored cell at its index there: so many rows at a time that a block holds them."""
    begins = torch.cat([slices.counts.new_zeros(1), slices.counts.cumsum(0)])
    at_once = spans(len(rows), max(1, BLOCK_CELLS // max(width, 1)))
    if len(rows) == slices.m:  # all of them: what is stored lies side by side
        for span in in_turn(at_once):
            some = slice(int(begins[span.start]), int(begins[span.stop]))
            yield Window(rows[span], some, (slices.of[some] - span.start) * width + index[some])
        return
    for span in in_turn(at_once):
        counts = slices.counts[rows[span]]
        where = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        at = begins[rows[span]][where] + torch.arange(len(where), device=rows.device) - first[where]
        yield Window(rows[span], at, where * width + index[at])


def joined(merge: Merge, parts: Parts, outer: Tensor, index: Tensor, size: int) -> Parts:
    return level_by_level(merge, parts, outer, index, size)[1]


def level_by_level(merge: Merge, parts: Parts, outer: Tensor, index: Tensor, size: int) -> tuple[Tensor, Parts]:
    """States at ascending (outer, index), joined along the index by the power-of-two tree; what has no partner passes up."""
    while size > 1 and bool((outer[1:] == outer[:-1]).any()):
        index, size = index >> 1, (size + 1) // 2
        pair = (outer[1:] == outer[:-1]) & (index[1:] == index[:-1])
        left = pair.nonzero().squeeze(1)
        if not len(left):
            continue
        both = merge(
            {name: part[left] for name, part in parts.items()}, {name: part[left + 1] for name, part in parts.items()}
        )
        for name, part in both.items():
            parts[name][left] = part
        kept = torch.ones(len(outer), dtype=torch.bool, device=outer.device)
        kept[left + 1] = False
        parts = {name: part[kept] for name, part in parts.items()}
        outer, index = outer[kept], index[kept]
    return outer, parts


# -- whole slices -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def rows_plan(plan: Plan, m: int, n: int, leaf: int) -> Plan:
    """The plan of m slices of n cells beside each other."""
    params = dict(plan.params)
    if isinstance(plan.row, Reduction):
        params |= {"dim": (1,), "keepdim": False}
    else:
        params["dim"] = 1
    labels = plan.labels
    out_shape = (m, n) if not isinstance(plan.row, Reduction) else (() if labels is None else (len(labels),)) + (m,)
    return replace(
        plan, params=MappingProxyType(params), shape=(m, n), dims=(1,), out_shape=out_shape, fold=fold((m, n), (1,)),
        leaf=leaf,
    )  # fmt: skip


class Bucket(NamedTuple):
    """Slices of about as many stored cells: which they are, and their cells, (rows, width), where `stored`."""

    rows: Tensor
    at: Tensor
    stored: Tensor


def buckets(slices: Slices) -> Iterator[Bucket]:
    """The slices by the power of two that holds their cells: together at most twice the cells.

    Of no slices one bucket without rows: what is computed from it has the history of the cells.
    """
    begins = slices.counts.cumsum(0) - slices.counts
    widths = torch.where(slices.counts > 1, 1 << (slices.counts - 1).double().log2().floor().long() + 1, 1)
    for width in widths.unique().tolist() or [1]:
        rows = (widths == width).nonzero().squeeze(1)
        steps = torch.arange(width, device=rows.device)
        stored = steps < slices.counts[rows].unsqueeze(1)
        yield Bucket(rows, torch.where(stored, begins[rows].unsqueeze(1) + steps, 0), stored)


def as_they_are(slices: Slices, n: int) -> Iterator[Bucket]:
    """The slices spread out over their n cells, a few at a time."""
    every = torch.arange(slices.m, device=slices.of.device)
    cells = torch.arange(len(slices.of), device=slices.of.device)
    for window in windows(every, slices, slices.places, n):
        yield Bucket(window.rows, window.spread(cells, n), window.spread(None, n))


def whole_slices(plan: Plan, slices: Slices, data: Tensor, mask: Tensor | None, weights: Tensor | None) -> Made:
    """A reduction whose result no order changes, from the stored cells of each slice side by side.

    That of complex cells is a sum or product of parts, in their order: its slices are spread out where they are not too long.
    """
    lead = 1 if plan.labels is None else len(plan.labels)
    picks = isinstance(plan.row, Reduction) and plan.row.picks
    values, valid, indices = empty_results(plan, lead, slices.m, data)
    in_order = plan.stored.kind is Kind.COMPLEX and len(plan.fold) == 3 and plan.n_reduced <= engine.LONG
    leaf = plan.leaf if in_order else INNER_LEAF
    for bucket in in_turn(as_they_are(slices, plan.n_reduced) if in_order else buckets(slices)):
        own = bucket.stored if mask is None else bucket.stored & mask[bucket.at]
        below = rows_plan(plan, *bucket.at.shape, leaf)
        cells = taken_at(data, bucket.at)
        if picks:
            made, own_valid, at = engine.run_with_indices(below, cells, own)
            places = slices.places[bucket.at].gather(1, at.view(lead, -1).T).T
            indices[:, bucket.rows] = select(places, own_valid.view(lead, -1))
        else:
            side = () if weights is None else ((taken_at(weights, bucket.at), None),)
            made, own_valid = engine.run(below, cells, own, *side)
        in_bits(values)[:, bucket.rows] = in_bits(made.view(lead, -1))
        valid[:, bucket.rows] = own_valid.view(lead, -1)
    return placed(plan, slices, Made(values, valid, indices))


def empty_results(plan: Plan, lead: int, m: int, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = getattr(torch, plan.result.torch)
    made = torch.zeros((lead, m), dtype=dtype, device=data.device)
    return made, torch.zeros_like(made, dtype=torch.bool), torch.zeros_like(made, dtype=torch.int64)


def placed(plan: Plan, slices: Slices, made: Made) -> Made:
    """The results of the slices that store a cell among those of all."""
    n_slices = prod(plan.fold[::2])
    if slices.m == n_slices:
        every = made
    else:
        values, valid = of_nothing(plan, made.values.device)
        every = Made(
            values.repeat(1, n_slices),
            valid.repeat(1, n_slices),
            made.values.new_zeros((len(values), n_slices), dtype=torch.int64),
        )
        for whole, part in zip(every, made, strict=True):
            assert whole is not None
            assert part is not None
            in_bits(whole)[:, slices.numbers] = in_bits(part)
    return Made(*[part.reshape(plan.out_shape) for part in every])  # type: ignore[union-attr]  # all are there


def of_nothing(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values, mask) of a slice that stores nothing: (leading, 1)."""
    cells = torch.zeros((1, 1), dtype=getattr(torch, plan.stored.torch), device=device)
    mask = torch.zeros((1, 1), dtype=torch.bool, device=device)
    side = (
        ((cells.new_zeros((1, 1), dtype=getattr(torch, plan.params["weights"].torch)), None),) if plan.weighted else ()
    )
    values, valid = engine.run(rows_plan(plan, 1, 1, INNER_LEAF), cells, mask, *side)
    return values.view(-1, 1), valid.view(-1, 1)


# -- cells for the same pattern -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How slices are spread out: in leaves of so many cells, in rows of a width, each stored cell at its place."""

    leaf: int
    width: int
    places: Tensor


def layouts(plan: Plan, slices: Slices) -> Iterator[Layout]:
    """From the narrowest to the slices as they are. The order in which cells meet is the same in each that keeps them apart."""
    n, leaf = plan.n_reduced, plan.leaf
    in_leaf = len(slices.of) / max(slices.m * -(-n // leaf), 1)
    if isinstance(plan.row, Normalization):
        widths = [width for width in NARROWER if width < n <= leaf and in_leaf**2 < CROWDED * width]
        yield from (Layout(leaf, width, slices.places % width) for width in widths)
        if n > leaf > OUTER_LEAF and in_leaf**2 < CROWDED * OUTER_LEAF:
            narrow = slices.places // leaf * OUTER_LEAF + slices.places % OUTER_LEAF
            yield Layout(OUTER_LEAF, -(-n // leaf) * OUTER_LEAF, narrow)
    yield Layout(leaf, n, slices.places)


def by_windows(plan: Plan, slices: Slices, data: Tensor, mask: Tensor | None) -> Made:
    """Normalizations and scans: whole slices, spread out a few at a time."""
    n, device = len(data), data.device
    values = torch.empty(n, dtype=getattr(torch, plan.result.torch), device=device)
    valid = torch.empty(n, dtype=torch.bool, device=device)
    indices = torch.empty(n, dtype=torch.int64, device=device) if plan.row.picks else None
    left = torch.ones(slices.m, dtype=torch.bool, device=device)
    for layout in layouts(plan, slices):
        is_last = layout.width == plan.n_reduced
        free = left if is_last else left & free_in(slices, layout.places, layout.width)
        left = left & ~free
        for window in windows(free.nonzero().squeeze(1), slices, layout.places, layout.width):
            for whole, part in zip((values, valid, indices), computed(plan, layout, window, data, mask), strict=False):
                assert whole is not None
                window.collect(part, whole)
    return Made(values, valid, indices)


def computed(plan: Plan, layout: Layout, window: Window, data: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Values, their mask and the places of picked ones, (rows, width), of a few slices spread out."""
    if layout.width > WIDEST:
        raise refused(f"{plan.row.name} along {plan.n_reduced} cells", torch.Size(plan.shape))
    block, own = (window.spread(part, layout.width) for part in (data, mask))
    below = rows_plan(plan, len(window.rows), layout.width, layout.leaf)
    return engine.run_with_indices(below, block, own) if plan.row.picks else engine.run(below, block, own)


def normalized(plan: Plan, slices: Slices, data: Tensor, mask: Tensor | None) -> Made:
    """Cells of long slices, each by the state of its own."""
    parts = states(plan, slices, as_seen(plan, data, mask))
    below = rows_plan(plan, len(data), 1, plan.leaf)
    cells = Cells(below, data.view(-1, 1), None if mask is None else mask.view(-1, 1), policy=nan_policy(plan))
    values, valid = engine.applied(below, cells, {name: part[slices.of].view(-1, 1) for name, part in parts.items()})
    return Made(values.view(-1), valid.view(-1))
