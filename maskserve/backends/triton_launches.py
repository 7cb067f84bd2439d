"""The launches of Triton kernels: operands, grids and constants, and the order in which they follow one another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskserve.backends.triton_plans import (
    Stage,
    Tile,
    holding_tile,
    joins,
    pow2,
    scanning_runs,
    scanning_tile,
    stages_of,
)
from maskserve.backends.triton_tables import (
    APPLIES,
    PULLS,
    UNFINISHED,
    Finishing,
    named,
    needs,
    of_scans,
    omits,
    reducing,
    scanning,
)
from maskserve.compact import Part, spread_part
from maskserve.dtypes import f64
from maskserve.ops.rows import Normalization, Scan

if TYPE_CHECKING:
    from maskserve.plan import Plan

Parts = dict[str, Tensor]
Strides = tuple[int, int, int]

SHARED = (torch.int64, torch.float64)
"""How many cells a gradient has reached, and what they share."""
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
"""A contracted a * b + c rounds once, where the reference rounds twice."""


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Launches go to this device; in numpy what overflows says nothing."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        with np.errstate(all="ignore"):
            yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One launch, as it would be."""

    kernel: str
    programs: int
    args: tuple[Any, ...]
    constants: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.partition(":")[2]

    def run(self, device: torch.device) -> None:
        with on(device):
            named(self.kernel)[(self.programs,)](*self.args, **self.constants, **LAUNCH)


_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)
_seen: ContextVar[list[Call] | None] = ContextVar("seen", default=None)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """What would be launched inside; nothing is, and results are memory as it was found."""
    yield from noted(_calls)


@contextmanager
def watching() -> Iterator[list[Call]]:
    """What is launched inside."""
    yield from noted(_seen)


def noted(into: ContextVar[list[Call] | None]) -> Iterator[list[Call]]:
    calls: list[Call] = []
    token = into.set(calls)
    try:
        yield calls
    finally:
        into.reset(token)


def launch(kernel: str, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """One launch of a kernel; none of no programs."""
    call = Call(kernel=kernel, programs=programs, args=args, constants=constants)
    calls = _calls.get()
    if calls is not None:
        calls.append(call)
    elif programs:
        if (seen := _seen.get()) is not None:
            seen.append(call)
        call.run(device)


# -- operands -----------------------------------------------------------------------------------------------------


def strided(cells: Tensor) -> Strides:
    """The strides of a block (outer, n, inner)."""
    outer, n, inner = cells.stride()
    return outer, n, inner


class MaskOperand(NamedTuple):
    """A mask as kernels read it: memory, where in that a cell is found, and constants that say how (tiles.py)."""

    cells: Tensor
    place: tuple[int, ...]
    constants: Mapping[str, int]


def mask_operand(mask: Tensor | Part | None, data: Tensor) -> MaskOperand:
    """A mask that is absent, has a byte a cell, or lies as lengths or bits."""
    if mask is None:
        return MaskOperand(data, (0, 0, 0), {"FORM": 0, "ROWS": 0})
    if isinstance(mask, Part):
        return compact_operand(mask)
    return MaskOperand(mask, strided(mask), {"FORM": 1, "ROWS": 0})


def compact_operand(mask: Part) -> MaskOperand:
    """A compact mask: where the block begins, what its rows are made of, and what the form says of a row.

    A row and (n, inner) are made of the last dims both: it lies within the columns, is some runs of them, or some slices.
    """
    are_bits, row, pitch, step = mask.form.said.tolist()
    of_slice, inner, _ = mask.strides
    start = (mask.first // of_slice, mask.first % of_slice // inner, mask.first % inner)
    if row <= inner:
        rows, how = 0, (row, of_slice // row, inner // row)
    elif row < of_slice:
        rows, how = 1, (row // inner, of_slice // row, 1)
    else:
        rows, how = 2, (row // of_slice, 1, 1)
    cells = mask.form.cells
    said = (pitch, 0) if are_bits else (step, cells.numel() - 1)
    return MaskOperand(cells, (*start, of_slice, inner, *how, *said), {"FORM": 3 if are_bits else 2, "ROWS": rows})


def folded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as (outer, n, inner); a copy where strides allow no view."""
    return tensor.detach().reshape(shape)


# -- of reductions -----------------------------------------------------------------------------------------------------


def states_of(plan: Plan, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """Memory for the parts of n states."""
    return tuple(torch.empty(n, dtype=dtype, device=device) for dtype in reducing(plan).dtypes)


def ended(
    plan: Plan, fold: tuple[int, ...], data: Tensor, mask: Tensor | Part | None, target: tuple[Tensor, ...],
    strides: tuple[int, int], how: Finishing | None, weights: Tensor | None = None,
) -> None:  # fmt: skip
    """The launches of a reduction, the last of which writes the `target`: results where it is told how, else states."""
    first, *others = stages_of(fold, plan.leaf)
    held = target if not others else states_of(plan, first.runs * first.lanes, data.device)
    last = how if not others else None
    lift(plan, first, data, mask, weights, held, strides if not others else (first.inner, 1), last)
    for i, stage in enumerate(others, 1):
        is_last = i == len(others)
        made = target if is_last else states_of(plan, stage.runs * stage.lanes, data.device)
        join(plan, stage, held, made, strides if is_last else (stage.inner, 1), how if is_last else None)
        held = made


def lift(
    plan: Plan, stage: Stage, data: Tensor, mask: Tensor | Part | None, weights: Tensor | None, target: tuple[Tensor, ...],
    strides: tuple[int, int], how: Finishing | None,
) -> None:  # fmt: skip
    own = mask_operand(mask, data)
    tile, weighed = stage.tile, (0, 0, 0) if weights is None else strided(weights)
    launch(
        "reducing:lift_kernel", stage.programs, data.device, data, own.cells, weights, target, stage.count, stage.inner,
        stage.lanes, stage.blocks, strided(data), own.place, weighed, strides, stage.lanes, how.min_count if how else 0,
        **own.constants, GROUPS=tile.groups, N=tile.n, LANES=tile.lanes, **reducing(plan).lift,
        **(how.constants if how else UNFINISHED),
    )  # fmt: skip


def join(
    plan: Plan, stage: Stage, states: tuple[Tensor, ...], target: tuple[Tensor, ...], strides: tuple[int, int],
    how: Finishing | None,
) -> None:  # fmt: skip
    tile, of = stage.tile, reducing(plan)
    new = (stage.count * stage.inner, stage.inner, 1)
    launch(
        "reducing:join_kernel", stage.programs, states[0].device, states, target, stage.count, stage.inner, stage.lanes,
        stage.blocks, new if stage.is_new_group else (stage.inner, stage.lanes, 1), strides, stage.lanes, stage.below,
        how.min_count if how else 0, SHIFTS=of.shifts and stage.is_new_group, GROUPS=tile.groups, LANES=tile.lanes,
        **of.merge, **(how.constants if how else UNFINISHED),
    )  # fmt: skip


def merged(plan: Plan, a: Parts, b: Parts) -> Parts:
    """Two states of each slice as one, by the kernel."""
    names, shape = reducing(plan).names, a["count"].shape
    both = tuple(torch.stack([a[name], b[name]]).view(-1) for name in names)
    n = a["count"].numel()
    made = states_of(plan, n, a["count"].device)
    tile = Tile(groups=2, n=1, lanes=min(pow2(n), 512))
    join(plan, Stage(tile=tile, count=2, lanes=n, inner=1, runs=1), both, made, (1, 0), None)
    return {name: part.view(shape) for name, part in zip(names, made, strict=True)}


def normalize(
    plan: Plan, data: Tensor, mask: Tensor | Part | None, results: tuple[Tensor, Tensor, Tensor], states: Parts | None
) -> None:
    outer, n, inner = data.shape
    assert isinstance(plan.row, Normalization)
    lanes = outer * inner
    tile = holding_tile(n, plan.leaf, lanes, is_inner=inner == 1) if states is None else None
    if tile is None:
        tile = stages_of((outer, n, inner), plan.leaf)[0].tile
    of, how = reducing(plan), dict(reducing(plan).lift)
    how.pop("READS")
    known = () if states is None else tuple(states[name].contiguous() for name in of.names)
    own = mask_operand(mask, data)
    blocks = -(-lanes // tile.lanes)
    option = plan.params.get("eps", plan.params.get("correction"))
    launch(
        "filling:normalize_kernel", blocks * -(-n // tile.cells), data.device, data, own.cells, known or (data,), results,
        n, inner, lanes, blocks, strided(data), own.place, (inner, 1), strided(results[0]),
        APPLY=named(APPLIES[plan.row.apply]), OPTION=None if option is None else float(option),
        NEEDS=needs(plan), CHECKS=plan.result is not f64, **own.constants, KNOWN=bool(known), GROUPS=tile.groups, N=tile.n,
        LANES=tile.lanes, **how,
    )  # fmt: skip


def scan(
    plan: Plan, data: Tensor, mask: Tensor | Part | None, results: tuple[Tensor, Tensor, Tensor]
) -> None:  # fmt: skip
    """One launch; of few long slices three: the states of runs, those of what lies before each, and the results."""
    outer, n, inner = data.shape
    assert isinstance(plan.row, Scan)
    how, lanes = scanning(plan), outer * inner
    tile = scanning_tile(n, lanes, is_inner=inner == 1)
    runs, blocks = scanning_runs(n, lanes, tile), -(-lanes // tile.lanes)
    run_cells = -(-n // (runs * tile.n)) * tile.n
    given, strides = turned(data) if how.reverses else (data, strided(data))
    shown = spread_part(mask) if how.reverses else mask
    own = mask_operand(shown, data)
    if how.reverses and isinstance(shown, Tensor):
        cells, back = turned(shown)
        own = own._replace(cells=cells, place=back)
    made = turned(results[0])[1] if how.reverses else strided(results[0])
    into = (*(turned(one)[0] for one in results[:2]), results[2]) if how.reverses else results
    limit = plan.params.get("limit")

    def walk(before: tuple[Tensor, ...] | None, target: tuple[Tensor, ...], finish: str | None) -> None:
        launch(
            "scanning:scan_kernel", blocks * runs, data.device, given, own.cells, before, target, n, inner, lanes,
            blocks, run_cells, n if limit is None else int(limit), strides, own.place, made, FINISH=of_scans(finish),
            OPTION=plan.result.is_float, REVERSED=how.reverses, CHECKS=plan.result is not f64, **own.constants,
            OMITS=omits(plan), READS=how.reads or omits(plan), N=tile.n, LANES=tile.lanes, **how.constants,
            LIFT=of_scans(how.lift), SCAN=of_scans(how.scan),
        )  # fmt: skip

    if runs == 1:
        walk(None, into, how.finish)
        return
    states = tuple(torch.empty(runs * lanes, dtype=dtype, device=data.device) for dtype in how.parts)
    walk(None, states, None)
    launch("scanning:carry_kernel", blocks, data.device, states, runs, lanes, LANES=tile.lanes, **how.constants)
    walk(states, into, how.finish)


def fill(plan: Plan, data: Tensor, mask: Tensor | Part | None, results: tuple[Tensor, Tensor]) -> None:
    """Cells with the masked ones a number, rounded here as torch does."""
    outer, n, inner = data.shape
    lanes, own = outer * inner, mask_operand(mask, data)
    tile = scanning_tile(n, lanes, is_inner=inner == 1)
    blocks, value = -(-lanes // tile.lanes), plan.params["value"]
    if plan.dtype.is_float:
        value = int(torch.tensor(value, dtype=data.dtype).double().view(torch.int64))
    elif plan.flipped:
        value += torch.iinfo(torch.int64).min
    launch(
        "filling:fill_kernel", blocks * -(-n // tile.n), data.device, data, own.cells, results, int(value), n, inner, lanes,
        blocks, strided(data), own.place, strided(results[0]), FLIPPED=plan.flipped, **own.constants, N=tile.n, LANES=tile.lanes,
    )  # fmt: skip


def turned(tensor: Tensor) -> tuple[Tensor, Strides]:
    """A block (outer, n, inner) from its last cells on, and the strides back from there."""
    outer, n, inner = strided(tensor)
    return tensor[:, -1:], (outer, -n, inner)


def pull(
    plan: Plan, data: Tensor, mask: Tensor | Part | None, above: tuple[Tensor, Tensor, Tensor], gradient: Tensor,
    reach: Tensor | None,
) -> None:  # fmt: skip
    *outer, n, inner = plan.fold
    shape = (math.prod(outer), n, inner)
    lanes = shape[0] * inner
    tile = scanning_tile(n, lanes, is_inner=inner == 1)
    cells, made = folded(data, shape), gradient.view(shape)
    own = mask_operand(mask, cells)
    given = tuple(folded(one, shape) for one in above)
    share, step = PULLS[plan.row.vjp]
    runs, blocks = scanning_runs(n, lanes, tile), -(-lanes // tile.lanes)
    run_cells = -(-n // (runs * tile.n)) * tile.n
    walk = {"SHARE": named(share), "N": tile.n, "LANES": tile.lanes}
    states = None
    if runs > 1:
        held = tuple(torch.empty(runs * lanes, dtype=dtype, device=cells.device) for dtype in SHARED)
        launch(
            "filling:share_kernel", blocks * runs, cells.device, *given, held, n, inner, lanes, blocks, run_cells,
            *map(strided, given), **walk,
        )  # fmt: skip
        states = added(held, runs, lanes)
    launch(
        "filling:pull_kernel", blocks * runs, cells.device, cells, own.cells, *given, made,
        made if reach is None else reach.view(shape), states, n, inner, lanes, blocks, run_cells, strided(cells), own.place,
        *map(strided, given), strided(made), PULL=named(step), **own.constants, OMITS=omits(plan),
        REACHES=reach is not None, **walk,
    )  # fmt: skip


def added(states: tuple[Tensor, ...], runs: int, lanes: int) -> tuple[Tensor, ...]:
    """States (count, total) of the runs of slices, (runs, lanes), as one of each slice."""
    made = tuple(torch.empty(lanes, dtype=state.dtype, device=state.device) for state in states)
    (stage,) = joins(runs, lanes, 1)
    launch(
        "reducing:join_kernel", stage.programs, states[0].device, states, made, runs, 1, lanes, stage.blocks,
        (1, lanes, 1), (1, 0), 0, 0, 0, MERGE=named("sums:merge_sums"), NOTHING=(0, 0.0), SHIFTS=False,
        GROUPS=stage.tile.groups, LANES=stage.tile.lanes, **UNFINISHED,
    )  # fmt: skip
    return made
