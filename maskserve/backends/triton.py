"""Launches the Triton kernels on a CUDA device; the bits of the reference for what is made of + - * / sqrt and choice.

Importable without triton and without a GPU. TRITON_INTERPRET=1 runs the kernels on the CPU, in numpy: for tests, which say
what the kernels mean, and nothing of how they do on a device.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskserve.backends.reference import kernel as reference
from maskserve.backends.reference import lift as lift_as_reference
from maskserve.backends.triton_plans import (
    Stage,
    Tile,
    ending_stage,
    holding_tile,
    scanning_tile,
    stages_of,
)
from maskserve.dtypes import FLOATING, INTEGRAL, DType, bf16, boolean, f16, f32, f64, i64
from maskserve.ops import passes
from maskserve.ops.rows import Normalization, Pass, Reduction, Scan

if TYPE_CHECKING:
    from maskserve.plan import Plan

Parts = dict[str, Tensor]
Masked = tuple[Tensor, Tensor]
Strides = tuple[int, int, int]

SERVED = FLOATING | INTEGRAL
SHORT = frozenset({f32, f16, bf16})
ORDERS = (2, 1, 0, 0.5, -1, -2, math.inf, -math.inf)
"""The orders of norms that kernels know."""
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}
"""A contracted a * b + c rounds once, where the reference rounds twice."""
WORD = "TRITON_INTERPRET"
OLDEST = (3, 7)
"""Tuples of pointers, and functions as constants, are as kernels need them from here on."""

# what kernels are called, by what they compute in: float32 (and halves), float64, int64, narrower integers and bools
KINDS = ("single", "double", "long", "whole")


def one(lift: str, merge: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(KINDS, (lift, merge))


LIFTS: Mapping[Pass, Mapping[str, tuple[str, str]]] = {
    passes.COUNT: one("lift_count", "merge_count"),
    passes.TOTAL: {
        "single": ("lift_sum", "merge_sums"),
        "double": ("lift_pair", "merge_pair"),
        "long": ("lift_limbs", "merge_limbs"),
        "whole": ("lift_limbs", "merge_limbs"),
    },
    passes.MOMENTS: one("lift_moments", "merge_moments")
    | {
        "double": ("lift_moments_of_doubles", "merge_moments"),
        "long": ("lift_moments_of_longs", "merge_moments"),
    },
    passes.LARGEST: one("lift_largest", "merge_largest"),
    passes.SMALLEST: one("lift_smallest", "merge_smallest"),
    passes.FIRST_LARGEST: one("lift_first_largest", "merge_first_largest"),
    passes.FIRST_SMALLEST: one("lift_first_smallest", "merge_first_smallest"),
    passes.TRUTHS: one("lift_truths", "merge_sums"),
    passes.EXPONENTIALS: one("lift_exponentials", "merge_exponentials"),
    passes.PRODUCT: one("lift_product", "merge_product"),
    passes.POWERS: one("lift_powers", "merge_powers"),
}
PASSES = {step.name: step for step in LIFTS}
OF_SUMS = {
    ".reductions:finalize_sum": "finish_sum",
    ".reductions:finalize_mean": "finish_mean",
}
FINISHES = {
    ".reductions:finalize_var": "finish_var",
    ".reductions:finalize_std": "finish_std",
    ".reductions:finalize_best": "finish_best",
    ".reductions:finalize_at": "finish_at",
    ".reductions:finalize_count": "finish_count",
    ".reductions:finalize_any": "finish_any",
    ".reductions:finalize_all": "finish_all",
    ".reductions:finalize_logsumexp": "finish_logsumexp",
    ".products:finalize_prod": "finish_prod",
    ".norms:finalize_norm": "finish_norm",
}
APPLIES = {
    ".normalizations:apply_softmax": "apply_softmax",
    ".normalizations:apply_log_softmax": "apply_log_softmax",
    ".normalizations:apply_standardize": "apply_standardize",
    ".norms:apply_normalize": "apply_normalize",
}
SCANS = {".scans:CumulativeSum": "cumsum_kernel"}
PULLS = {
    ".gradients:softmax": ("softmax_share", "pull_softmax"),
    ".gradients:softmin": ("softmax_share", "pull_softmin"),
    ".gradients:log_softmax": ("log_softmax_share", "pull_log_softmax"),
}


# -- whether there is anything to launch with ---------------------------------------------------------------------


def interprets() -> bool:
    """Whether kernels run on the CPU, in numpy."""
    return os.environ.get(WORD) == "1"


@cache
def missing() -> str | None:
    """Why triton cannot be used, and what to do; None where it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'maskserve[gpu]'"
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is too old for its kernels: it takes {OLDEST[0]}.{OLDEST[1]}, which torch 2.13 brings"
    return None


@cache
def kernels(module: str) -> ModuleType:
    """A module of kernels."""
    return import_module(f"maskserve.backends.triton_kernels.{module}")


def named(name: str | None, module: str = "passes") -> Any:
    return None if name is None else getattr(kernels(module), name)


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

    name: str
    module: str
    programs: int
    args: tuple[Any, ...]
    constants: Mapping[str, Any]

    def run(self, device: torch.device) -> None:
        with on(device):
            named(self.name, self.module)[(self.programs,)](*self.args, **self.constants, **LAUNCH)


_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """What would be launched inside; nothing is, and results are memory as it was found."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def launch(name: str, module: str, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """One launch of a kernel; none of no programs."""
    call = Call(name=name, module=module, programs=programs, args=args, constants=constants)
    calls = _calls.get()
    if calls is not None:
        calls.append(call)
    elif programs:
        call.run(device)


# -- what a plan asks of the kernels, decided once ----------------------------------------------------------------


def kind_of(dtype: DType) -> str:
    if dtype.is_float:
        return "double" if dtype is f64 else "single"
    return "long" if dtype is i64 else "whole"


def worst_of(plan: Plan, *, largest: bool) -> float | int:
    """What a masked cell becomes where the best one is looked for."""
    if plan.dtype.is_float:
        return -math.inf if largest else math.inf
    if plan.dtype is boolean:
        return int(not largest)
    info = torch.iinfo(getattr(torch, plan.dtype.torch))
    return info.min if largest else info.max


def exactness(plan: Plan) -> str:
    """How exact exp has to be."""
    if plan.dtype is f64:
        return "pair"
    return "quick" if plan.dtype in SHORT and plan.result in SHORT else "full"


LIFT_OPTIONS: Mapping[Pass, Callable[[Plan], Any]] = {
    passes.LARGEST: partial(worst_of, largest=True),
    passes.FIRST_LARGEST: partial(worst_of, largest=True),
    passes.SMALLEST: partial(worst_of, largest=False),
    passes.FIRST_SMALLEST: partial(worst_of, largest=False),
    passes.EXPONENTIALS: exactness,
    passes.PRODUCT: lambda plan: plan.dtype is f64,
    passes.POWERS: lambda plan: float(plan.params["ord"]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reducing:
    """The constants of a plan's launches, and the parts that go between them."""

    lift: Mapping[str, Any]
    merge: Mapping[str, Any]
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shifts: bool


@lru_cache(maxsize=1024)
def reducing(plan: Plan) -> Reducing:
    step = plan.passes[0]
    lift, merge = LIFTS[step][kind_of(plan.dtype)]
    option = LIFT_OPTIONS[step](plan) if step in LIFT_OPTIONS else None
    parts = step.parts(plan.dtype)
    nothing = torch.empty((1, 0, 1), dtype=getattr(torch, plan.dtype.torch))
    of_no_cells = lift_as_reference(plan, step, nothing, None)
    negates = isinstance(plan.row, Normalization) and plan.row.negates
    return Reducing(
        lift={
            "LIFT": named(lift), "MERGE": named(merge), "LIFT_OPTION": option, "OMITS": omits(plan), "NEGATES": negates,
            "READS": step.reads_cells or omits(plan),
        },
        merge={"MERGE": named(merge), "NOTHING": tuple(of_no_cells[part.name].item() for part in parts)},
        names=tuple(part.name for part in parts),
        dtypes=tuple(getattr(torch, part.dtype.torch) for part in parts),
        shifts=hasattr(reference(step.reference), "shift"),
    )  # fmt: skip


def omits(plan: Plan) -> bool:
    """Whether kernels pass over NaN."""
    return plan.dtype.is_float and plan.params.get("nan") == "omit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finishing:
    """How states become results."""

    constants: Mapping[str, Any]
    min_count: int


UNFINISHED: Mapping[str, Any] = {"FINISH": None, "OPTION": None, "NEEDS": -math.inf, "CHECKS": False}


@lru_cache(maxsize=1024)
def finishing(plan: Plan) -> Finishing | None:
    """How the plan's states are finished by a kernel; None where the reference's way is needed."""
    row, params = plan.row, plan.params
    if not isinstance(row, Reduction) or params.get("empty", "mask") != "mask" or plan.result not in SERVED:
        return None
    name = FINISHES.get(plan.finalize)
    if plan.finalize in OF_SUMS:
        of = {"single": "", "double": "_of_pair", "long": "_of_limbs", "whole": "_of_limbs"}[kind_of(plan.dtype)]
        name = OF_SUMS[plan.finalize] + of
    elif name == "finish_prod" and plan.result.is_integral:
        name = "finish_prod_of_integers"
    if name is None:
        return None
    option: Any = params.get("ord", params.get("correction"))
    option = plan.result.is_float if option is None else float(option)
    return Finishing(
        constants={
            "FINISH": named(name), "OPTION": option, "NEEDS": needs(plan),
            "CHECKS": plan.result is not f64 and (plan.result.is_float or plan.finalize in OF_SUMS or "prod" in name),
        },
        min_count=-1 if row.never_masked else int(params["min_count"]),
    )  # fmt: skip


def needs(plan: Plan) -> float:
    """The count that must be exceeded."""
    return -math.inf if plan.row.needs is None else float(plan.row.needs(plan.params))


# -- operands -----------------------------------------------------------------------------------------------------


def strided(cells: Tensor) -> Strides:
    """The strides of a block (outer, n, inner)."""
    outer, n, inner = cells.stride()
    return outer, n, inner


def mask_operand(mask: Tensor | None, data: Tensor) -> tuple[Tensor, Strides, int]:
    """A mask, its strides and its form: absent, or a byte a cell. Packed bits and lengths are forms too, once they come."""
    if mask is None:
        return data, (0, 0, 0), 0
    return mask, strided(mask), 1


def folded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as (outer, n, inner); a copy where strides allow no view."""
    return tensor.detach().reshape(shape)


class TritonBackend:
    """The Triton kernels on tensors in the memory of a CUDA device."""

    name = "triton"
    block_cells = sys.maxsize
    """Kernels cut by themselves."""
    runs_whole = True
    threads_inside = True
    widths_held = 0
    omits_nan = True

    def why_not(self, plan: Plan) -> str | None:
        """The first limit of this back end that the plan's row, dtype or device meets; None where it serves it."""
        is_cuda = plan.device.startswith("cuda")
        if not (is_cuda or (interprets() and plan.device == "cpu")):
            return f"it computes on CUDA devices, and the tensor is on {plan.device}"
        row = plan.row
        if not serves_row(plan):
            return f"it has no kernel for {row.name}" + (" with weights" if plan.weighted else "")
        if plan.params.get("ord", 2) not in ORDERS:
            return f"it has no kernel for {row.name} with this ord"
        if plan.dtype not in SERVED or plan.flipped:
            return f"it has no kernel for {plan.stored}"
        if not isinstance(row, Reduction) and plan.result not in FLOATING | {i64}:
            return f"it has no kernel for {row.name} in {plan.result}"
        if isinstance(row, Scan) and plan.dtype is f64:
            return f"it has no kernel for {row.name} of f64"  # whose running sums carry their rounding errors along
        return missing()

    def takes_cells(self, plan: Plan) -> bool:
        """No kernel picks cells."""
        return False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=device)

    # -- reductions -----------------------------------------------------------------------------------------------

    def run(self, plan: Plan, data: Tensor, mask: Tensor | None, places: Tensor | None = None) -> Masked | None:
        """(values, mask) of the plan on whole tensors; None where the reference has to do a part of it."""
        if plan.params.get("nan") == "raise" or not math.prod(plan.shape):
            return None
        *outer, n, inner = plan.fold
        shape = (math.prod(outer), n, inner)
        cells = folded(data, shape)
        own = None if mask is None else folded(mask.expand(plan.shape), shape)
        values = torch.empty(plan.out_shape, dtype=getattr(torch, plan.result.torch), device=data.device)
        valid = torch.empty(plan.out_shape, dtype=torch.bool, device=data.device)
        if not isinstance(plan.row, Reduction):
            status = self.fill(plan, cells, own, values.view(shape), valid.view(shape))
            return (values, valid) if status == "done" else None
        return (values, valid) if self.reduced(plan, plan.fold, cells, own, values, valid, (inner, 1)) else None

    def reduce(self, plan: Plan, data: Tensor, mask: Tensor | None, values: Tensor, valid: Tensor) -> bool:
        """Whole slices (outer, n, inner) reduced to `values` and `valid`, (1, outer, inner); False: not served."""
        fold = (data.shape[0], data.shape[1], data.shape[2])
        return self.reduced(plan, fold, data, mask, values, valid, (values.stride(1), values.stride(2)))

    def reduced(
        self, plan: Plan, fold: tuple[int, ...], data: Tensor, mask: Tensor | None, values: Tensor, valid: Tensor,
        strides: tuple[int, int],
    ) -> bool:  # fmt: skip
        how = finishing(plan)
        if how is None:
            return False
        wrong = torch.zeros(1, dtype=torch.int32, device=data.device) if how.constants["CHECKS"] else valid
        if len(fold) > 3:
            strides = (math.prod(fold[2::2]), 1)
        ended(plan, fold, data, mask, (values, valid, wrong), strides, how)
        return not how.constants["CHECKS"] or not wrong.item()

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Parts:
        """The named parts of a block: (outer, n, inner) -> (outer, inner) of each."""
        outer, n, inner = data.shape
        parts = states_of(plan, outer * inner, data.device)
        ended(plan, (outer, n, inner), data, mask, tuple(parts), (inner, 1), None)
        return {name: part.view(outer, inner) for name, part in zip(reducing(plan).names, parts, strict=True)}

    def merge(self, plan: Plan) -> Callable[[Parts, Parts], Parts]:
        """The reference's merge; where that raises e to a power, the kernel's."""
        if plan.passes[0].exact_bits:
            merge: Callable[[Parts, Parts], Parts] = reference(plan.passes[0].reference).merge
            return merge
        return partial(merged, plan)

    def finish(self, plan: Plan, parts: Parts) -> Masked | None:
        """States to (values, mask) in the result's shape and dtype; None where the reference has to do it."""
        how = finishing(plan)
        if how is None or not parts["count"].numel():
            return None
        values = torch.empty(plan.out_shape, dtype=getattr(torch, plan.result.torch), device=parts["count"].device)
        valid = torch.empty(plan.out_shape, dtype=torch.bool, device=values.device)
        wrong = torch.zeros(1, dtype=torch.int32, device=values.device)
        held = tuple(parts[name].contiguous().view(-1) for name in reducing(plan).names)
        join(plan, ending_stage(held[0].numel()), held, (values, valid, wrong), (1, 0), how)
        return None if wrong.item() else (values, valid)

    # -- a result for each cell -----------------------------------------------------------------------------------

    def fill(
        self, plan: Plan, data: Tensor, mask: Tensor | None, values: Tensor, valid: Tensor, places: Tensor | None = None,
        states: Parts | None = None,
    ) -> str:  # fmt: skip
        """A normalization or scan of whole slices, written to `values` and `valid`, hidden cells 0.

        A normalization that is given the slices' `states`, (outer, inner), takes any part of the slices.
        "done", "overflowed" where a finite value became inf, or "refused": the reference has to do this block.
        """
        wrong = torch.zeros(1, dtype=torch.int32, device=data.device)
        if isinstance(plan.row, Normalization):
            normalize(plan, data, mask, (values, valid, wrong), self.known(plan, data, mask, states))
            return "overflowed" if wrong.item() else "done"
        scan(plan, data, mask, (values, valid, wrong))
        return "refused" if wrong.item() else "done"

    def known(self, plan: Plan, data: Tensor, mask: Tensor | None, states: Parts | None) -> Parts | None:
        """The states of slices that no tile holds."""
        outer, n, inner = data.shape
        if states is not None or holding_tile(n, plan.leaf, outer * inner, is_inner=inner == 1) is not None:
            return states
        return self.lift(plan, data, mask)

    # -- gradients ------------------------------------------------------------------------------------------------

    def pull(
        self, plan: Plan, data: Tensor, mask: Tensor | None, values: Tensor, g: Tensor, gate: Tensor,
        gradient: Tensor, reach: Tensor | None,
    ) -> bool:  # fmt: skip
        """The gradient by `data`, and where it has reached; False: the reference's formula is needed."""
        if not self.pulls(plan) or not math.prod(plan.shape):
            return False
        pull(plan, data, mask, (values, g, gate), gradient, reach)
        return True

    def pulls(self, plan: Plan) -> bool:
        """Whether there is a kernel for the gradient."""
        floats = plan.stored in FLOATING and plan.stored is plan.dtype and plan.result in FLOATING
        return floats and plan.row.vjp in PULLS and plan.params.get("nan") != "raise"


def serves_row(plan: Plan) -> bool:
    row = plan.row
    known = all(PASSES.get(step.name) is step for step in plan.passes) and not plan.weighted
    if isinstance(row, Reduction):
        ends = plan.finalize in OF_SUMS or plan.finalize in FINISHES
        return known and bool(plan.passes) and ends
    return known and (row.apply in APPLIES if isinstance(row, Normalization) else row.scan in SCANS)


# -- launches -----------------------------------------------------------------------------------------------------


def states_of(plan: Plan, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """Memory for the parts of n states."""
    return tuple(torch.empty(n, dtype=dtype, device=device) for dtype in reducing(plan).dtypes)


def ended(
    plan: Plan, fold: tuple[int, ...], data: Tensor, mask: Tensor | None, target: tuple[Tensor, ...],
    strides: tuple[int, int], how: Finishing | None,
) -> None:  # fmt: skip
    """The launches of a reduction, the last of which writes the `target`: results where it is told how, else states."""
    first, *others = stages_of(fold, plan.leaf)
    held = target if not others else states_of(plan, first.runs * first.lanes, data.device)
    last = how if not others else None
    lift(plan, first, data, mask, held, strides if not others else (first.inner, 1), last)
    for i, stage in enumerate(others, 1):
        is_last = i == len(others)
        made = target if is_last else states_of(plan, stage.runs * stage.lanes, data.device)
        join(plan, stage, held, made, strides if is_last else (stage.inner, 1), how if is_last else None)
        held = made


def lift(
    plan: Plan, stage: Stage, data: Tensor, mask: Tensor | None, target: tuple[Tensor, ...], strides: tuple[int, int],
    how: Finishing | None,
) -> None:  # fmt: skip
    own, mask_strides, form = mask_operand(mask, data)
    tile = stage.tile
    launch(
        "lift_kernel", "reducing", stage.programs, data.device, data, own, target, stage.count, stage.inner, stage.lanes,
        stage.blocks, strided(data), mask_strides, strides, stage.lanes, how.min_count if how else 0,
        FORM=form, GROUPS=tile.groups, N=tile.n, LANES=tile.lanes, **reducing(plan).lift,
        **(how.constants if how else UNFINISHED),
    )  # fmt: skip


def join(
    plan: Plan, stage: Stage, states: tuple[Tensor, ...], target: tuple[Tensor, ...], strides: tuple[int, int],
    how: Finishing | None,
) -> None:  # fmt: skip
    tile, of = stage.tile, reducing(plan)
    new = (stage.count * stage.inner, stage.inner, 1)
    launch(
        "join_kernel", "reducing", stage.programs, states[0].device, states, target, stage.count, stage.inner, stage.lanes,
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
    tile = Tile(groups=2, n=1, lanes=min(1 << max(n - 1, 0).bit_length(), 512))
    join(plan, Stage(tile=tile, count=2, lanes=n, inner=1, runs=1), both, made, (1, 0), None)
    return {name: part.view(shape) for name, part in zip(names, made, strict=True)}


def normalize(
    plan: Plan, data: Tensor, mask: Tensor | None, results: tuple[Tensor, Tensor, Tensor], states: Parts | None
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
    own, mask_strides, form = mask_operand(mask, data)
    blocks = -(-lanes // tile.lanes)
    option = plan.params.get("eps", plan.params.get("correction"))
    launch(
        "normalize_kernel", "filling", blocks * -(-n // tile.cells), data.device, data, own, known or (data,), results,
        n, inner, lanes, blocks, strided(data), mask_strides, (inner, 1), strided(results[0]),
        APPLY=named(APPLIES[plan.row.apply], "filling"), OPTION=None if option is None else float(option),
        NEEDS=needs(plan), CHECKS=plan.result is not f64, FORM=form, KNOWN=bool(known), GROUPS=tile.groups, N=tile.n,
        LANES=tile.lanes, **how,
    )  # fmt: skip


def scan(plan: Plan, data: Tensor, mask: Tensor | None, results: tuple[Tensor, Tensor, Tensor]) -> None:
    outer, n, inner = data.shape
    assert isinstance(plan.row, Scan)
    lanes = outer * inner
    tile = scanning_tile(n, lanes, is_inner=inner == 1)
    own, mask_strides, form = mask_operand(mask, data)
    launch(
        SCANS[plan.row.scan], "filling", -(-lanes // tile.lanes), data.device, data, own, results, n, inner, lanes,
        strided(data), mask_strides, strided(results[0]), IS_FLOAT=plan.result.is_float, CHECKS=plan.result is not f64,
        FORM=form, OMITS=omits(plan), N=tile.n, LANES=tile.lanes,
    )  # fmt: skip


def pull(
    plan: Plan, data: Tensor, mask: Tensor | None, above: tuple[Tensor, Tensor, Tensor], gradient: Tensor,
    reach: Tensor | None,
) -> None:  # fmt: skip
    *outer, n, inner = plan.fold
    shape = (math.prod(outer), n, inner)
    lanes = shape[0] * inner
    tile = scanning_tile(n, lanes, is_inner=inner == 1)
    cells, made = folded(data, shape), gradient.view(shape)
    own, mask_strides, form = mask_operand(None if mask is None else folded(mask.expand(plan.shape), shape), cells)
    given = tuple(folded(one, shape) for one in above)
    share, step = PULLS[plan.row.vjp]
    launch(
        "pull_kernel", "filling", -(-lanes // tile.lanes), data.device, cells, own, *given, made,
        made if reach is None else reach.view(shape), n, inner, lanes, strided(cells), mask_strides,
        *map(strided, given), strided(made), SHARE=named(share, "filling"), PULL=named(step, "filling"), FORM=form,
        OMITS=omits(plan), REACHES=reach is not None, N=tile.n, LANES=tile.lanes,
    )  # fmt: skip
