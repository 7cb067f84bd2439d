"""run(plan, data, mask): passes over blocks, one fixed merge tree, finalize or apply.

Blocks are free (threads, strides and cache decide them); the order of arithmetic is the plan's (docs/order.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count, product
from math import prod

import torch
from torch import Tensor

from maskserve.backends import Backend, Finisher, Parts, Search, Selector
from maskserve.backends.reference import join, kernel
from maskserve.backends.reference import lift as lift_block
from maskserve.backends.reference.cells import BITS, canonical, rounded, select
from maskserve.blocks import Cells, as_stored, counting, cut, spans
from maskserve.compact import Compact, Mask, as_bools, spread_part
from maskserve.dtypes import Kind, i64
from maskserve.errors import EmptySliceError
from maskserve.execution import (
    BLOCKS_A_THREAD,
    SMALL,
    backend_of,
    block_cells,
    execution,
    finisher_of,
    in_parallel,
    in_turn,
    n_threads,
    nan_policy,
    within_memory,
)
from maskserve.gates import expanded
from maskserve.masks import intersection
from maskserve.ops.rows import Normalization, Ordering, Reach, Reduction, Scan
from maskserve.plan import Plan
from maskserve.trees import Counter

Masked = tuple[Tensor, Tensor]
Held = tuple[Tensor, Mask]
"""Values and their mask, which is compact where the data's was and the same cells are valid."""
Weights = tuple[Tensor, Tensor | None]

SHORT = 256
"""Cells of a slice up to which its state weighs: a block takes whole slices, and their states stay in the cache."""
SEARCHED_TOGETHER = 8
"""Long slices beside each other that share cache lines."""
LONG = 1 << 20
"""Cells of a slice beyond which its state is joined from blocks and its cells are normalized by it, on all threads: in
memory too, so that streamed slices have the same bits."""
SAMPLED = 1 << 15
"""Cells of a long slice that say where in it to look: results between two of them are a 50th of all."""


def run(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None = None) -> Masked:
    """(values, mask) of the plan as run_held() gives them, the mask as bools."""
    values, valid = run_held(plan, data, mask, weights)
    return values, in_bools(valid)


def run_held(plan: Plan, data: Tensor, mask: Mask | None, weights: Weights | None = None) -> Held:
    """(values, mask) of the plan on `data`, valid where `mask` (of data's ndim, size 1 broadcasts; None: everywhere).

    `weights` are a tensor and its mask, both of data's ndim.
    """
    if plan.row.picks and not taking_cells(plan):
        values, valid, _ = run_held_with_indices(plan, data, mask)
        return values, valid
    if plan.stored.kind is Kind.COMPLEX:
        return run_complex(plan, data, as_bools(mask), weights)
    return compute(plan, data, mask, weights)


def run_with_indices(plan: Plan, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, indices) as run_held_with_indices() gives them, the mask as bools."""
    values, valid, indices = run_held_with_indices(plan, data, mask)
    return values, in_bools(valid), indices


def in_bools(valid: Mask) -> Tensor:
    assert isinstance(valid, Tensor), "a compact mask comes of one alone"
    return valid


def run_held_with_indices(plan: Plan, data: Tensor, mask: Mask | None) -> tuple[Tensor, Mask, Tensor]:
    """(values, mask, indices) of a row that picks cells: an index counts within its slice, flat where dims are several."""
    if finisher := taking_cells(plan):
        indices = finisher.empty(plan.out_shape, torch.int64, plan.device)
        return *compute(plan, data, mask, places=indices), indices
    indices, valid = compute(indexing(plan), data, mask)
    return picked(plan, data, indices, valid), valid, indices


def taking_cells(plan: Plan) -> Finisher | None:
    """The back end of a picking row where it takes the cells itself; where not, it gives their places."""
    finisher = finisher_of(plan)
    return finisher if finisher and finisher.takes_cells(plan) else None


def picking_width(plan: Plan) -> int:
    """The bytes that are held for each result beside it where its place comes first and its cell after that."""
    return 8 + 3 * plan.stored.n_bytes if plan.row.picks and not taking_cells(plan) else 0


def compute(
    plan: Plan, data: Tensor, mask: Mask | None, weights: Weights | None = None, *, places: Tensor | None = None
) -> Held:
    """(values, mask) of the plan; a compact mask that the result has too is kept."""
    kept = form_of(plan, mask)
    compute_by = partial(computed, plan, data, mask, weights, places=places, writes_mask=kept is None)
    values, valid = within_memory(plan.row.name, plan.device, compute_by)
    return values, valid if kept is None else kept


def form_of(plan: Plan, mask: Mask | None) -> Compact | None:
    """The compact mask of the plan's result; None where it has none."""
    if not isinstance(mask, Compact):
        return None
    if plan.row.keeps_mask(plan.params):
        return mask
    if plan.row.masked_last and plan.params.get("nan") != "omit":
        return mask.valid_first(plan.dims[0], torch.Size(plan.out_shape))
    return None


def computed(
    plan: Plan, data: Tensor, mask: Mask | None, weights: Weights | None, *, places: Tensor | None, writes_mask: bool
) -> Masked:
    """The same by whoever is fastest at its size; `places` are written where a scan picks.

    Where it need not write the mask, what it gives of that means nothing.
    """
    reads_cells = mask is not None or not plan.passes or plan.passes[0].reads_cells
    walked = data.numel() if reads_cells or plan.params.get("nan") == "omit" else 0
    finisher = finisher_of(plan) if plan.as_stored else None
    if finisher and (walked <= SMALL or (finisher.runs_whole and walked <= (execution().block_cells or walked))):
        made = finisher.run(plan, data, mask, places)
        if made is not None:
            return made
    if weights is not None:
        mask = intersection([mask, counting(plan.row, *weights, plan.params["nan"])])
    cells = Cells(
        plan, data, mask, weights[0] if weights is not None else None, policy=nan_policy(plan),
        reads_compact=backend_of(plan).reads_compact, writes_mask=writes_mask,
    )  # fmt: skip
    row = plan.row
    if isinstance(row, Reduction):
        return select_whole(plan, cells) if row.select else reduce(plan, cells)
    if isinstance(row, Normalization):
        return normalize(plan, cells)
    return scan(plan, row, cells, places)


# -- cells that are picked, complex cells ---------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def indexing(plan: Plan) -> Plan:
    """The plan of a picking row's indices."""
    return replace(plan, result=i64)


def picked(plan: Plan, data: Tensor, indices: Tensor, valid: Mask) -> Tensor:
    """The cells at `indices` of their slices; 0 where no cell is valid."""
    data, outer = data.detach(), prod(plan.fold[::2])
    if len(plan.fold) > 3:
        order = kept_first(plan)
        data, folded = data.permute(order), (outer, plan.n_reduced, 1)
    else:
        folded = (plan.fold[0], plan.fold[1], plan.fold[2])
    dtype = getattr(torch, plan.result.torch)
    if not data.numel() or not indices.numel():
        return torch.zeros(plan.out_shape, dtype=dtype, device=data.device)
    places = indices.reshape(folded[0], -1, folded[2])
    bits = BITS[data.element_size()]  # torch gathers no u16, u32 or u64
    cells = data.reshape(folded).view(bits)
    values = cells.squeeze(2).gather(1, places.squeeze(2))  # in two dims torch gathers 3 to 5 times faster
    values = values.view(data.dtype).reshape(plan.out_shape)
    return select(canonical(values.to(dtype)), expanded(valid, plan.out_shape))


def run_complex(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None) -> Masked:
    """Complex cells by the row's own way to real ones."""
    if not plan.shape:  # a dim to reduce that is not that of the parts
        line = replace(plan, shape=(1,), dims=(0,))
        return run_complex(line, data.view(1), None if mask is None else mask.view(1), weights)
    row = plan.row
    mask = counting(row, data, mask, plan.params["nan"])
    result: Masked = kernel(row.on_complex)(plan, data, mask, weights, compute)
    return result


# -- reductions ---------------------------------------------------------------------------------------------------


def reduce(plan: Plan, cells: Cells) -> Masked:
    """The slices' states, finalized; a result cell is masked where too few cells were valid."""
    finisher = finisher_of(plan)
    reduced = reduce_whole(plan, cells, finisher) if finisher and len(plan.fold) == 3 else None
    return finish(plan, joined(plan, cells)) if reduced is None else reduced


def is_short(plan: Plan, shape: tuple[int, int, int]) -> bool:
    """Whether slices, as (outer, n, inner), are so short that a back end that can reduces each whole, without a state."""
    _, n, inner = shape
    return not plan.weighted and prod(shape) > 0 and (n * inner <= SMALL or n <= SHORT)


def reduce_whole(plan: Plan, cells: Cells, finisher: Finisher) -> Masked | None:
    """Short slices, whole: their states never leave the back end. None where slices are long, or it cannot."""
    outer, n, inner = cells.shape
    if not is_short(plan, cells.shape):
        return None
    shape = (len(plan.labels or (0,)), outer, inner)
    values = finisher.empty(shape, getattr(torch, plan.result.torch), plan.device)
    valid = finisher.empty(shape, torch.bool, plan.device)
    served: list[bool] = []

    def task(rows: slice, columns: slice) -> Callable[[], None]:
        def reduce_block() -> None:
            data, mask = cells.block(rows, slice(0, n), columns)
            where = (slice(None), rows, columns)
            served.append(finisher.reduce(plan, data, mask, values[where], valid[where]))

        return reduce_block

    tiles = cut(plan, cells.shape, block_cells(finisher, cells.shape), whole=True).tiles
    in_parallel(finisher, outer * n * inner, [task(*tile) for tile in tiles])
    return (values.view(plan.out_shape), valid.view(plan.out_shape)) if all(served) else None


def state(plan: Plan, data: Tensor, mask: Mask | None) -> Parts:
    """The one state of each result cell, before finalize: parts of shape (kept dims before, kept dims after)."""
    return joined(plan, Cells(plan, data, mask, policy=nan_policy(plan), reads_compact=backend_of(plan).reads_compact))


def joined(plan: Plan, cells: Cells) -> Parts:
    """Blocks lifted, runs joined, then the earlier groups of dims."""
    outer, n, inner = cells.shape
    if not plan.n_reduced:  # nothing to read
        kept = (plan.fold[0], prod(plan.fold[2::2]))
        return {name: part.view(kept) for name, part in identity(plan, prod(kept)).items()}
    if outer * n * inner <= SMALL:  # one block: nothing to cut, assemble or hand out
        parts = lift(plan, backend_of(plan), cells, slice(0, outer), slice(0, n), slice(0, inner))
    else:
        parts = lift_all(plan, cells)
    return join_groups(plan, parts)


def identity(plan: Plan, n: int) -> Parts:
    """The state of no cells, n times: parts of shape (n, 1)."""
    nothing = torch.empty((n, 0, 1), dtype=getattr(torch, plan.dtype.torch), device=plan.device)
    return lift_block(plan, plan.passes[0], nothing, None, *[nothing] * plan.weighted)


def lift(plan: Plan, backend: Backend, cells: Cells, outer: slice, run: slice, inner: slice) -> Parts:
    data, mask = cells.block(outer, run, inner)
    parts = backend.lift(plan, data, mask, *cells.weight(outer, run, inner))
    shift = getattr(kernel(plan.passes[0].reference), "shift", None)
    return shift(parts, run.start) if shift and run.start else parts


def lift_all(plan: Plan, cells: Cells) -> Parts:
    """The parts of every result cell, (outer, inner), over blocks."""
    outer, n, inner = cells.shape
    backend = backend_of(plan)
    blocks = cut(plan, cells.shape, block_cells(backend, cells.shape), narrow=cells.narrow)
    n_together = joined_at_once(len(blocks.tiles), len(blocks.runs), cells.together)
    groups = [blocks.runs[span] for span in spans(len(blocks.runs), n_together)]
    merge = backend.merge(plan)
    states = empty_states(plan, (outer, len(groups), inner))

    def task(tile: tuple[slice, slice], index: int, group: Sequence[slice]) -> Callable[[], None]:
        def lift_group() -> None:
            counter = Counter(merge)
            for at, span in enumerate(group):
                counter.add(at, 1, lift(plan, backend, cells, tile[0], span, tile[1]))
            for name, part in counter.joined().items():
                states[name][tile[0], index, tile[1]] = part

        return lift_group

    tasks = [task(tile, index, group) for tile in blocks.tiles for index, group in enumerate(groups)]
    in_parallel(backend, outer * n * inner, tasks)
    return join(merge, states, 1)


def empty_states(plan: Plan, shape: tuple[int, ...]) -> Parts:
    """Memory for states."""
    return {
        part.name: torch.empty(shape, dtype=getattr(torch, part.dtype.torch), device=plan.device)
        for part in plan.passes[0].parts(plan.dtype)
    }


def joined_at_once(n_tiles: int, n_runs: int, most: int) -> int:
    """How many runs below each other one task lifts and joins: as many as leave some tasks for each thread."""
    while most > 1 and n_tiles * -(-n_runs // most) < BLOCKS_A_THREAD * n_threads():
        most //= 2
    return most


def join_groups(plan: Plan, parts: Parts) -> Parts:
    """(outer, inner) states joined along the earlier groups of reduced dims, last first, until kept dims are left."""
    of, merge = kernel(plan.passes[0].reference), backend_of(plan).merge(plan)
    below = plan.fold[-2]
    for group in range(len(plan.fold) - 4, 0, -2):
        n = plan.fold[group]
        shape = (prod(plan.fold[:group]), n, prod(plan.fold[group + 1 :: 2]))
        parts = {name: part.reshape(shape) for name, part in parts.items()}
        if hasattr(of, "shift"):
            parts = of.shift(parts, torch.arange(n, device=plan.device)[:, None] * below)
        parts = join(merge, parts, 1)
        below *= n
    return parts


def finish(plan: Plan, parts: Parts) -> Masked:
    """States to (values, mask) in the result's shape and dtype."""
    row, finisher = plan.row, finisher_of(plan)
    assert isinstance(row, Reduction)
    finished = finisher.finish(plan, parts) if finisher else None
    if finished is not None:
        return finished
    enough = reached(plan, parts["count"])
    if plan.weighted:
        enough &= parts["weight"] != 0
    if not enough.all():  # what becomes masked overflows nothing
        parts = {"count": parts["count"]} | {k: select(part, enough) for k, part in parts.items() if k != "count"}
    return masked_where_too_few(plan, kernel(plan.finalize)(plan, parts), enough)


def reached(plan: Plan, count: Tensor) -> Tensor:
    """Where enough cells were valid."""
    row = plan.row
    assert isinstance(row, Reduction)
    enough = count >= (0 if row.never_masked else plan.params["min_count"])
    return enough if row.needs is None else enough & (count > row.needs(plan.params))


def masked_where_too_few(plan: Plan, values: Tensor, enough: Tensor) -> Masked:
    """`values` in the result's dtype, valid where `enough` cells were."""
    valid = enough.reshape(plan.out_shape)
    result = narrowed(plan, select(values.reshape(plan.out_shape), valid))  # what is masked overflows nothing
    return (result, valid) if plan.params.get("empty", "mask") == "mask" else filled(plan, result, valid)


def narrowed(plan: Plan, values: Tensor) -> Tensor:
    """`values` rounded once to the result's dtype, NaN canonical; a finite value that becomes inf is worth a warning."""
    dtype = getattr(torch, plan.result.torch)
    if not plan.result.is_float:
        return values.to(dtype)
    if not values.is_floating_point():
        return values.double().to(dtype)
    if values.dtype == dtype:
        return canonical(values)
    result = rounded(values.double(), dtype)
    if (result.isinf() & values.isfinite()).any():
        warn_of_overflow(plan)
    return canonical(result)


def warn_of_overflow(plan: Plan) -> None:
    warnings.warn(
        f"{plan.row.name}: a finite result overflows {plan.result.name} and became inf; dtype=f64 holds it",
        RuntimeWarning,
        stacklevel=2,
    )


def filled(plan: Plan, result: Tensor, valid: Tensor) -> Masked:
    """empty="raise", or empty=NUMBER: the number is an ordinary, valid cell."""
    empty = plan.params["empty"]
    if empty == "raise":
        if not valid.all():
            raise EmptySliceError(
                f"{plan.row.name}: a slice has too few valid cells and empty=raise; empty=mask gives a masked cell",
                parameter="empty",
            )
        return result, valid
    number = empty if plan.result.is_integral else float(empty)  # torch takes no integer beyond 64 bits
    return torch.where(valid, result, torch.full((), number, dtype=result.dtype, device=result.device)), valid | True


def select_whole(plan: Plan, cells: Cells) -> Masked:
    """A reduction whose kernel sees whole slices: groups of reduced dims are brought together first."""
    row = plan.row
    assert isinstance(row, Reduction)
    if len(plan.fold) > 3:
        cells = gathered(plan, cells)
    outer, n, inner = cells.shape
    labels = plan.labels
    backend, finisher = backend_of(plan), finisher_of(plan)
    reduced = reduce_whole(plan, cells, finisher) if finisher else None
    if reduced is not None:
        return reduced
    wide = torch.int64 if plan.result.is_integral else torch.float64
    values = torch.empty((1 if labels is None else len(labels), outer, inner), dtype=wide, device=plan.device)
    counts = torch.empty((outer, inner), dtype=torch.int64, device=plan.device)
    selector = finisher if isinstance(finisher, Selector) else None
    of = selector.select if selector else kernel(row.select)

    def task(rows: slice, columns: slice) -> Callable[[], None]:
        def select_block() -> None:
            values[:, rows, columns], counts[rows, columns] = of(plan, *cells.block(rows, slice(0, n), columns))

        return select_block

    if not (selector and search_all(plan, cells, selector, values, counts)):
        tiles = cut(plan, cells.shape, block_cells(backend, cells.shape), whole=True).tiles
        in_parallel(backend, prod(cells.shape), [task(*tile) for tile in tiles])
    return finish_selection(plan, values, counts)


def finish_selection(plan: Plan, values: Tensor, counts: Tensor) -> Masked:
    """What was selected, (leading, outer, inner), of slices with so many valid cells, in the result's shape and dtype."""
    finisher = finisher_of(plan)
    counts = counts.expand(values.shape)
    finished = finisher.finish(plan, {"count": counts, "total": values}) if finisher else None
    if finished is not None:
        return finished
    enough = reached(plan, counts if plan.labels is not None else counts[0])
    return masked_where_too_few(plan, values, enough)


def search_all(plan: Plan, cells: Cells, finisher: Selector, values: Tensor, counts: Tensor) -> bool:
    """Slices of more cells than a block, a few side by side at a time; False where they are shorter, or it cannot."""
    outer, n, inner = cells.shape
    most = block_cells(finisher, cells.shape)
    if n * min(inner, SEARCHED_TOGETHER) <= max(most // 4, SEARCHED_TOGETHER):
        return False
    for row, columns in product(range(outer), spans(inner, SEARCHED_TOGETHER)):
        search = finisher.search(plan, columns.stop - columns.start)
        if search is None:
            return False
        runs = spans(n, max(1, most // 4 // (columns.stop - columns.start)))
        run_search(search, finisher, cells, [(slice(row, row + 1), run, columns) for run in runs])
        values[:, row, columns], counts[row, columns] = search.results()
    return True


def run_search(search: Search, finisher: Finisher, cells: Cells, blocks: list[tuple[slice, slice, slice]]) -> None:
    """Rounds over the blocks until all is found."""
    n_sampled = -(-min(SAMPLED, cells.shape[1] // 4) // len(blocks))

    def sample(seed: int, where: tuple[slice, slice, slice]) -> Callable[[], None]:
        return lambda: search.sample(*cells.block(*where), n_sampled, seed)

    def sift(where: tuple[slice, slice, slice]) -> Callable[[], None]:
        return lambda: search.sift(*cells.block(*where))

    seeds, settled = count(), False
    while not settled:
        in_parallel(finisher, cells.shape[1], [sample(next(seeds), where) for where in blocks])
        search.bracket()
        in_parallel(finisher, cells.shape[1], [sift(where) for where in blocks])
        settled = search.settle()


def gathered(plan: Plan, cells: Cells) -> Cells:
    """The cells with all reduced dims moved last (a view where strides allow)."""
    order = kept_first(plan)
    shape = tuple(plan.shape[dim] for dim in order)
    moved = replace(plan, shape=shape, fold=(prod(plan.fold[::2]), plan.n_reduced, 1))
    made = Cells(moved, cells.data.tensor.permute(order), None, policy=cells.policy)
    made.mask = None if cells.mask is None else cells.mask.permuted(order, made.shape)
    return made


def kept_first(plan: Plan) -> list[int]:
    """The dims of the data with the reduced ones last."""
    return [dim for dim in range(len(plan.shape)) if dim not in plan.dims] + list(plan.dims)


# -- normalizations and scans -------------------------------------------------------------------------------------


def normalize(plan: Plan, cells: Cells) -> Masked:
    """State of each slice, then apply; a slice that fits a block is read once."""
    finisher = finisher_of(plan)
    if finisher and cells.shape[1] <= LONG:
        return fill(plan, cells, finisher, cells.shape[1])
    return applied(plan, cells, joined(plan, cells))


def applied(plan: Plan, cells: Cells, states: Parts) -> Masked:
    """Cells of slices, all of them or a part, normalized by the slices' states, (outer, inner)."""
    finisher = finisher_of(plan)
    if finisher:
        return fill(plan, cells, finisher, cells.shape[1], states=states)
    row = plan.row
    assert isinstance(row, Normalization)
    result, valid = empty_like(plan, cells)
    blocks = cut(plan, cells.shape, block_cells(backend_of(plan), cells.shape), narrow=cells.narrow)
    for (rows, columns), run in in_turn(product(blocks.tiles, blocks.runs) if result.numel() else ()):
        where, own = (rows, run, columns), {name: part[rows, columns] for name, part in states.items()}
        data, mask = cells.spread_block(*where)
        values = kernel(row.apply)(plan, data, mask, own)
        if row.needs is not None:
            mask = intersection([mask, (own["count"] > row.needs(plan.params)).unsqueeze(1).expand(data.shape)])
        write(plan, result, valid, where, values, mask)
    return result.view(plan.out_shape), valid.view(plan.out_shape)


def scan(plan: Plan, row: Scan, cells: Cells, places: Tensor | None = None) -> Masked:
    """Each slice whole, a tile of slices at a time."""
    finisher = finisher_of(plan)
    n = cells.shape[1]
    size = row.size(plan.params, n) if isinstance(row, Ordering) else n
    if finisher:
        return fill(plan, cells, finisher, size, places)
    result, valid = empty_like(plan, cells, size)
    if not n:
        return result.view(plan.out_shape), valid.view(plan.out_shape)
    tiles = cut(plan, cells.shape, block_cells(backend_of(plan), cells.shape), whole=True).tiles
    for rows, columns in in_turn(tiles):
        values, own = kernel(row.scan).scan(plan, *cells.spread_block(rows, slice(0, n), columns))
        write(plan, result, valid, (rows, slice(0, size), columns), values, own)
    return result.view(plan.out_shape), valid.view(plan.out_shape)


def fill(
    plan: Plan,
    cells: Cells,
    finisher: Finisher,
    size: int,
    places: Tensor | None = None,
    states: Parts | None = None,
) -> Masked:
    """Each slice, written by the back end itself: whole, but where its cells need no other ones or its state is known.

    What it refuses is a scan that the reference does.
    """
    result, valid = empty_like(plan, cells, size)
    at = None if places is None else places.view(result.shape)
    whole = states is None and plan.row.reach is not Reach.OWN
    overflowed: list[bool] = []

    def task(rows: slice, run: slice, columns: slice) -> Callable[[], None]:
        def fill_block() -> None:
            where = (rows, run, columns)
            data, mask = cells.block(*where, negated=False)
            if mask is None:  # nothing that the back end would write of it
                valid[where] = True
            known = None if states is None else {name: part[rows, columns] for name, part in states.items()}
            at_block = None if at is None else at[where]
            written = valid[where] if cells.writes_mask else None
            status = finisher.fill(plan, data, mask, result[where], written, at_block, known)
            if status == "refused":
                assert isinstance(plan.row, Scan)
                mask = counting(plan.row, data, spread_part(mask), plan.params.get("nan", "propagate"))
                values, own = kernel(plan.row.scan).scan(plan, data, mask)
                if finisher.takes_cells(plan) and plan.row.picks:
                    if at is not None:
                        at[where] = select(values, own)
                    values = as_stored(plan, data.gather(1, values))
                write(plan, result, valid, where, values, own)
            elif status == "overflowed":
                overflowed.append(True)

        return fill_block

    if result.numel():
        blocks = cut(plan, cells.shape, block_cells(finisher, cells.shape), whole=whole, narrow=cells.narrow)
        tasks = [task(rows, run, columns) for rows, columns in blocks.tiles for run in blocks.runs]
        in_parallel(finisher, result.numel(), tasks)
    if overflowed:  # one warning, however many blocks
        warn_of_overflow(plan)
    return result.view(plan.out_shape), valid.view(plan.out_shape)


def empty_like(plan: Plan, cells: Cells, size: int | None = None) -> Masked:
    """Memory for a result of the data's folded shape, or of `size` cells a slice."""
    outer, n, inner = cells.shape
    shape = (outer, n if size is None else size, inner)
    finisher = finisher_of(plan)
    empty = partial(finisher.empty if finisher else torch.empty, device=plan.device)
    valid = empty(shape if cells.writes_mask else (1, 1, 1), dtype=torch.bool).expand(shape)
    return empty(shape, dtype=getattr(torch, plan.result.torch)), valid


def write(
    plan: Plan, result: Tensor, valid: Tensor, where: tuple[slice, ...], values: Tensor, mask: Tensor | None
) -> None:
    """One block of the result, its hidden cells 0."""
    result[where] = narrowed(plan, select(values, mask))
    if valid.is_contiguous():  # else nobody reads it
        valid[where] = True if mask is None else mask


def hidden_as_zero(data: Tensor, mask: Tensor | None) -> Tensor:
    """`data` with what lies under the mask 0: what is written leaks nothing."""
    return data if mask is None else select(data, mask)
