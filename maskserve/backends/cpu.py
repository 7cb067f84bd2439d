"""Launches the native kernels: one block a call, in the calling thread, the GIL released, the bits of the reference.

Rows with exp or log have bits of their own, the same from every instruction set.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from maskserve.backends.reference import kernel as reference
from maskserve.backends.reference import lift as lift_as_reference
from maskserve.compact import Compact, Mask, Part, spread_part
from maskserve.dtypes import BY_NAME, FLOATING, INTEGRAL, f64, i64
from maskserve.ops import passes
from maskserve.ops.rows import Normalization, Ordering, Reduction, Scan
from maskserve.plan import as_floats

if TYPE_CHECKING:
    from maskserve.plan import Plan

NO_STRIDES = (0, 0, 0)
NOT_COMPACT = (0, 0)
NO_STATES = (0, 0, 0, 0)
"""Instead of the count and the parts that a normalization reads."""
SIGN = 1 << 63
SERVED = FLOATING | INTEGRAL
STATUS = ("done", "overflowed", "refused")

# what the native kernels are called: by pass, by the reference's apply or scan, by its finalize
LIFTS = {
    passes.TOTAL: "total",
    passes.COUNT: "count",
    passes.MOMENTS: "moments",
    passes.LARGEST: "largest",
    passes.SMALLEST: "smallest",
    passes.FIRST_LARGEST: "largest",
    passes.FIRST_SMALLEST: "smallest",
    passes.TRUTHS: "truths",
    passes.EXPONENTIALS: "exponentials",
    passes.POWERS: "powers",
    passes.PRODUCT: "product",
    passes.FIRST: "first",
    passes.LAST: "last",
    passes.EXTENT: "extent",
    passes.WEIGHTED_TOTAL: "weighted_total",
    passes.WEIGHTED_MOMENTS: "weighted_moments",
}
PASSES = {step.name: step for step in LIFTS}
Merge: TypeAlias = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
"""Makes one state of that of cells and that of the cells behind them."""
MERGES = frozenset({passes.MOMENTS, passes.LARGEST, passes.SMALLEST, passes.FIRST_LARGEST, passes.FIRST_SMALLEST})
"""The passes whose states kernels of their lift's name merge."""
TAKES = {
    ".places:CumulativeLargest": "cumulative_largest",
    ".places:CumulativeSmallest": "cumulative_smallest",
    ".places:Filled": "fill_value",
    ".places:FilledForward": "fill_forward",
    ".places:FilledBackward": "fill_backward",
}
"""Fills whose results are cells as they came, in any dtype."""
FILLS = {
    **TAKES,
    ".normalizations:apply_softmax": "softmax",
    ".normalizations:apply_log_softmax": "log_softmax",
    ".norms:apply_normalize": "normalize",
    ".normalizations:apply_standardize": "standardize",
    ".scans:CumulativeSum": "cumulative_sum",
    ".scans:LogCumulativeSumOfExponentials": "cumulative_logsumexp",
    ".products:CumulativeProduct": "cumulative_product",
    ".orders:Sorted": "sorted",
    ".orders:Top": "top",
    ".orders:Rank": "rank",
}
SELECTIONS = {
    ".selections:median": "median",
    ".selections:quantile": "quantile",
    ".selections:mode": "mode",
    ".selections:count_distinct": "count_distinct",
}
WHOLE = {*FILLS, *SELECTIONS}
BY_ORDER = {
    ".orders:Sorted", ".orders:Top", ".orders:Rank", ".selections:mode", ".selections:count_distinct",
}  # fmt: skip
"""Those that order cells and read no values: u64 seen as i64 will do."""
AS_GIVEN = (
    "ord", "eps", "correction", "limit", "q", "interpolation", "method", "k", "descending", "largest",
)  # fmt: skip
OPTIONS: dict[str, Callable[[Plan, Any], Any]] = {
    **dict.fromkeys(AS_GIVEN, lambda plan, given: given),
    "value": lambda plan, given: bits_of(plan, given),
}
"""The parameters that kernels read, by their names in the row, as kernels read them."""
VALUES: dict[str, tuple[float, ...]] = {"ord": (2, 1, 3, 0.5, 0, -1, -2, math.inf, -math.inf)}
"""The values that kernels know of a parameter, where they do not know all."""
HUGE = 1 << 22
"""Bytes from which huge pages pay: a fault for each 4 KB took a third of the time of a large softmax."""
N_PARTS = 6
"""The parts of a state at most, its count among them."""
FINISHES = {
    ".reductions:finalize_sum": "sum",
    ".reductions:finalize_mean": "mean",
    ".reductions:finalize_var": "var",
    ".reductions:finalize_std": "std",
    ".reductions:finalize_best": "same",
    ".reductions:finalize_at": "at",
    ".reductions:finalize_count": "count",
    ".reductions:finalize_any": "any",
    ".reductions:finalize_all": "all",
    ".reductions:finalize_logsumexp": "logsumexp",
    ".norms:finalize_norm": "norm",
    ".products:finalize_prod": "prod",
    ".places:finalize_ptp": "ptp",
    ".weighted:finalize_sum": "weighted_sum",
    ".weighted:finalize_mean": "weighted_mean",
    ".weighted:finalize_var": "weighted_var",
    ".weighted:finalize_std": "weighted_std",
}


@cache
def native() -> ModuleType:
    """The compiled extension; ImportError where it was not built."""
    return import_module("maskserve.backends._native")


@cache
def missing() -> str | None:
    """Why the extension cannot be used, and what to do; None where it can."""
    try:
        native().isa()
    except (ImportError, RuntimeError) as error:
        reason = (
            f"its native extension cannot be used ({error}): build it with `pip install .`, or name another back end"
        )
        logging.getLogger("maskserve").warning("the cpu back end is passed over, and all is slower: %s", reason)
        return reason
    return None


@cache
def number_of(dtype_name: str) -> int:
    """The kernels' number for a dtype."""
    return list(native().DTYPES).index(dtype_name)


@lru_cache(maxsize=1024)
def options(plan: Plan) -> Any:
    """What the plan's parameters say to a kernel."""
    said = native().Options()
    for name, read in OPTIONS.items():
        if plan.params.get(name) is not None:
            setattr(said, name, read(plan, plan.params[name]))
    said.omits_nan = plan.dtype.is_float and plan.params.get("nan") == "omit"
    said.negates = isinstance(plan.row, Normalization) and plan.row.negates
    said.wide = plan.result is f64
    if plan.flipped:
        said.flip = SIGN
    return said


def bits_of(plan: Plan, given: float) -> int:
    """The bits of a number as a cell of the plan's result; -0 is 0."""
    cell = torch.full((), given or 0, dtype=getattr(torch, plan.result.torch))
    return int.from_bytes(cell.view(1).view(torch.uint8).numpy().tobytes(), sys.byteorder)


@cache
def lift_kernel(pass_name: str, dtype_name: str) -> tuple[int, int, tuple[tuple[str, torch.dtype], ...]]:
    """The number of the kernel, that of the dtype, and the parts it writes, in the order of its pointers.

    By name: the hash of a DType takes longer than the sum of a thousand cells.
    """
    step = PASSES[pass_name]
    parts = tuple((part.name, getattr(torch, part.dtype.torch)) for part in step.parts(BY_NAME[dtype_name]))
    return list(native().LIFTS).index(LIFTS[step]), number_of(dtype_name), parts


def strided(cells: Tensor | None) -> tuple[int, ...]:
    """Address and strides of a block's operand."""
    return (0, *NO_STRIDES) if cells is None else (cells.data_ptr(), *cells.stride())


def strided_mask(mask: Tensor | Part | None) -> tuple[int, ...]:
    """The same of a block's mask; then how a compact one says what counts, and where it begins."""
    if isinstance(mask, Part):
        said, cells = mask.form
        return (cells.data_ptr(), *mask.strides, said.data_ptr(), mask.first)
    return (*strided(mask), *NOT_COMPACT)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Dense memory that is about to be written; a large one in huge pages, where the system leaves that to programs."""
    made = torch.empty(shape, dtype=dtype)
    if made.nbytes >= HUGE:
        native().will_write(made.data_ptr(), made.nbytes)
    return made


def merge_states(
    kernel: int, dtype: int, names: tuple[str, ...], a: dict[str, Tensor], b: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The states of cells and of those behind them, as one: a fifth of the time of torch's passes."""
    left, right = ([side[name].contiguous() for name in names] for side in (a, b))
    both = [torch.empty_like(part) for part in left]
    native().merge(kernel, dtype, left[0].numel(), *map(addresses, (left, right, both)))
    return dict(zip(names, both, strict=True))


def addresses(parts: list[Tensor]) -> list[int]:
    return [*(part.data_ptr() for part in parts), *[0] * (N_PARTS - len(parts))]


@cache
def merge_kernel(pass_name: str, dtype_name: str) -> Merge | None:
    """What merges the states of a pass; None where torch's operations do."""
    step = PASSES[pass_name]
    if step not in MERGES:
        return None
    names = tuple(part.name for part in step.parts(BY_NAME[dtype_name]))
    return partial(merge_states, list(native().MERGES).index(LIFTS[step]), number_of(dtype_name), names)


def raised(cells: Tensor) -> Tensor:
    """exp of float64 cells, as the kernels compute it."""
    cells = cells.contiguous()
    powers = torch.empty_like(cells)
    native().raise_(cells.data_ptr(), powers.data_ptr(), cells.numel())
    return powers


@dataclass(frozen=True, slots=True, kw_only=True)
class Finishing:
    """What the native finish of a plan needs, decided once."""

    kernel: int
    parts: tuple[str, ...]
    min_count: int
    needs: float
    dtype: torch.dtype
    number: int


@lru_cache(maxsize=1024)
def finishing(plan: Plan) -> Finishing | None:
    """How the plan's states are finished natively; None where the reference's way is needed."""
    row, params = plan.row, plan.params
    if not isinstance(row, Reduction) or params.get("empty", "mask") != "mask" or plan.result not in SERVED:
        return None
    name = "same" if plan.result is i64 else "sum"
    parts: tuple[str, ...] = ("count", "total")  # a selection's values are int64, or float64 as a sum's are
    if row.passes:
        if plan.finalize not in FINISHES:
            return None
        name, parts = FINISHES[plan.finalize], tuple(part.name for part in plan.passes[0].parts(plan.dtype))
        of_dtype = name + ("_pair" if "exponent" in parts else "_limbs" if "high" in parts else "")
        name = of_dtype if of_dtype in native().FINISHES else name
        if name in ("sum_limbs", "prod") and plan.result.is_integral and plan.result is not i64:
            return None  # narrower than the kernel checks
    return Finishing(
        kernel=list(native().FINISHES).index(name),
        parts=parts,
        min_count=-1 if row.never_masked else int(params["min_count"]),
        needs=float(row.needs(params)) if row.needs else -math.inf,
        dtype=getattr(torch, plan.result.torch),
        number=number_of(plan.result.name),
    )


class CpuBackend:
    """The native kernels on tensors in CPU memory."""

    name = "cpu"
    widths_held = 0
    omits_nan = True
    reads_compact = True
    block_cells = 1 << 22  # a call costs some 10 us in Python; the kernel tiles for the caches by itself
    runs_whole = False
    threads_inside = False

    def why_not(self, plan: Plan) -> str | None:
        """The first limit of this back end that the plan's row, dtype or device meets; None where it serves it."""
        if plan.device != "cpu":
            return f"it computes in CPU memory, and the tensor is on {plan.device}"
        row = plan.row
        whole = [name for name in (getattr(row, kind, "") for kind in ("select", "apply", "scan")) if name]
        known = all(PASSES.get(step.name) is step for step in plan.passes) and all(name in WHOLE for name in whole)
        if not known or not (plan.passes or whole):
            return f"it has no kernel for {row.name}" + (" with weights" if plan.weighted else "")
        for parameter, values in VALUES.items():
            if plan.params.get(parameter, values[0]) not in values:
                return f"it has no kernel for {row.name} with this {parameter}"  # the value is a client's: logs lack it
        if plan.weighted and plan.params["weights"] not in SERVED:
            return f"it has no kernel for weights of {plan.params['weights']}"
        takes = self.takes_cells(plan)
        by_order = bool(whole) and BY_ORDER.issuperset(whole)
        if plan.dtype not in SERVED or (plan.flipped and not takes and not by_order):
            return f"it has no kernel for {plan.stored}"
        fits = row.picks or plan.result in FLOATING | {i64}
        if takes:  # cells as they came, and not the places that a plan of the same row may ask for
            fits = plan.result is as_floats(plan.stored) and (plan.result is plan.dtype or plan.flipped)
        if isinstance(row, Normalization | Scan) and not fits:
            return f"it has no kernel for {row.name} in {plan.result}"
        return missing()

    def takes_cells(self, plan: Plan) -> bool:
        """Whether its results are the cells that the row picks, and not their places."""
        return isinstance(plan.row, Scan) and plan.row.scan in TAKES

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        """Memory for a result."""
        return empty(shape, dtype)

    def run(
        self, plan: Plan, data: Tensor, mask: Mask | None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """(values, mask) of the plan on dense cells in one native call; None where it takes more than that."""
        mask = mask.bools().expand(data.shape).contiguous() if isinstance(mask, Compact) else mask
        how = direct(plan)
        if how is None or not data.is_contiguous():
            return None
        mask_ptr = 0
        if mask is not None:
            if mask.shape != data.shape or not mask.is_contiguous():
                return None
            mask_ptr = mask.data_ptr()
        values = torch.empty(plan.out_shape, dtype=how.dtype)
        new_mask = torch.ones if how.writes_no_mask and mask is None else torch.empty
        valid = new_mask(plan.out_shape, dtype=torch.bool)
        results_ptr = (values.data_ptr(), valid.data_ptr())
        places_ptr = (0 if places is None else places.data_ptr(),) if how.takes_places else ()
        status = how.call(*how.before, data.data_ptr(), mask_ptr, *how.after, *results_ptr, *how.strides, *places_ptr)
        return (values, valid) if STATUS[status] == "done" else None

    def reduce(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, values: Tensor, valid: Tensor) -> bool:
        """Whole slices (outer, n, inner) reduced to `values` and `valid`, (leading, outer, inner); False: not served.

        One result of every slice is dense.
        """
        how = finishing(plan)
        if how is None:
            return False
        mask_ptr, *mask_strides = strided_mask(mask)
        status: int = native().reduce(
            reduce_kernel(plan), how.kernel, options(plan), len(how.parts), data.data_ptr(), mask_ptr,
            number_of(plan.dtype.name), *data.shape, *data.stride(), *mask_strides, plan.leaf,
            how.min_count, how.needs, how.number, values.data_ptr(), valid.data_ptr(), values.stride(0),
        )  # fmt: skip
        return STATUS[status] == "done"

    def lift(
        self, plan: Plan, data: Tensor, mask: Tensor | Part | None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The named parts of a block's only pass: (outer, n, inner) -> (outer, inner) of each."""
        outer, n, inner = data.shape
        kernel, dtype, part_dtypes = lift_kernel(plan.passes[0].name, plan.dtype.name)
        parts = {name: torch.empty((outer, inner), dtype=dtype) for name, dtype in part_dtypes}
        parts_ptr = [part.data_ptr() for part in parts.values()]
        parts_ptr += [0] * (N_PARTS - len(parts_ptr))
        mask_ptr, *mask_strides = strided_mask(mask)
        weights_ptr, *weights_strides = strided(weights)
        weights_dtype = dtype if weights is None else number_of(plan.params["weights"].name)
        lift = native().lift

        def walked(cells: Tensor) -> bool:
            walked: bool = lift(
                kernel, options(plan), cells.data_ptr(), mask_ptr, dtype, outer, n, inner,
                *cells.stride(), *mask_strides, plan.leaf, *parts_ptr,
                weights_ptr, weights_dtype, *weights_strides,
            )  # fmt: skip
            return walked

        if walked(data):
            return parts
        if weights is not None:  # one of them is negative
            return lift_as_reference(plan, plan.passes[0], data, spread_part(mask), weights)
        if len(part_dtypes) == 1:  # a count reads the mask alone
            assert mask is not None
            mask = mask if isinstance(mask, Part) else mask.contiguous()
            mask_ptr, *mask_strides = strided_mask(mask)
        dense = data.contiguous()  # neither n nor a kept dim was dense
        fits = walked(dense)
        assert fits, "dense cells have a walk"
        return parts

    def lift_stored(
        self, plan: Plan, size: Sequence[int], positions: Tensor, cells: Tensor, mask: Tensor | None, blocks: range,
        parts: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Blocks of stored cells, which lie dense, each spread out and lifted to `parts`, (outer, runs, inner).

        `size`: rows, cells of a run and columns of a block. Blocks are counted along the columns, then along the runs.
        """
        kernel, dtype, part_dtypes = lift_kernel(plan.passes[0].name, plan.dtype.name)
        stored = (positions.data_ptr(), cells.data_ptr(), 0 if mask is None else mask.data_ptr(), len(positions))
        held = [parts[name] for name, _ in part_dtypes]
        is_lifted = native().lift_stored(
            kernel, options(plan), (*stored, dtype, plan.leaf, *plan.fold, *size), blocks.start, blocks.stop,
            addresses(held), [part.itemsize for part in held] + [0] * (N_PARTS - len(held)),
        )  # fmt: skip
        assert is_lifted, "dense cells have a walk"

    def merge(self, plan: Plan) -> Merge:
        """A kernel of the bits of the reference's merge, or that one; where it raises e to a power, with the kernels' own exp."""
        own = merge_kernel(plan.passes[0].name, plan.dtype.name)
        if own is not None:
            return own
        of = reference(plan.passes[0].reference)
        return of.merge if plan.passes[0].exact_bits else partial(of.merge, exp=raised)

    def fill(
        self,
        plan: Plan,
        data: Tensor,
        mask: Tensor | Part | None,
        values: Tensor,
        valid: Tensor | None,
        places: Tensor | None = None,
        states: dict[str, Tensor] | None = None,
    ) -> str:
        """A normalization or scan of whole slices, written to `values` and, with a mask, `valid`, hidden cells 0.

        `valid` is None where it is not asked for. A picking row writes the cells, and to `places`, at the strides of
        `values`, where they stood. A normalization that is given the slices' `states`, (outer, inner), takes any part of
        the slices.
        "done", "overflowed" where a finite value became inf, or "refused": the reference has to do this block.
        """
        kernel, result = fill_kernel(plan)
        mask_ptr, *mask_strides = strided_mask(mask)
        held = [] if states is None else [states[name].contiguous() for name in state_parts(plan)]
        states_ptr = (*(part.data_ptr() for part in held), *NO_STATES[len(held) :])
        status: int = native().fill(
            kernel, options(plan), data.data_ptr(), mask_ptr, number_of(plan.dtype.name), *data.shape,
            *data.stride(), *mask_strides, plan.leaf, *states_ptr,
            values.data_ptr(), 0 if valid is None else valid.data_ptr(), result, *values.stride(),
            0 if places is None else places.data_ptr(),
        )  # fmt: skip
        return STATUS[status]

    def select(self, plan: Plan, data: Tensor, mask: Tensor | Part | None) -> tuple[Tensor, Tensor]:
        """(values, count) of whole slices: (outer, n, inner) -> (leading, outer, inner) and (outer, inner)."""
        outer, n, inner = data.shape
        wide = torch.int64 if plan.result.is_integral else torch.float64
        values = torch.empty((len(plan.labels or (0,)), outer, inner), dtype=wide)
        count = torch.empty((outer, inner), dtype=torch.int64)
        mask_ptr, *mask_strides = strided_mask(mask)
        native().select(
            select_kernel(plan), options(plan), data.data_ptr(), mask_ptr, number_of(plan.dtype.name), outer, n, inner,
            *data.stride(), *mask_strides, values.data_ptr(), count.data_ptr(),
        )  # fmt: skip
        return values, count

    def search(self, plan: Plan, lanes: int) -> Search | None:
        """The selection of `lanes` slices side by side, block by block; None where it needs each slice whole."""
        assert isinstance(plan.row, Reduction)
        name = SELECTIONS[plan.row.select]
        return Search(plan, name, lanes) if name in native().SEARCHES else None

    def finish(self, plan: Plan, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """States to (values, mask) in the result's shape and dtype; None where the reference has to do it.

        So it is for empty= other than "mask", a result that does not fit and a finite one that becomes inf.
        """
        how = finishing(plan)
        if how is None:
            return None
        held = [part if part.is_contiguous() else part.contiguous() for part in (parts[name] for name in how.parts)]
        parts_ptr = [part.data_ptr() for part in held]
        parts_ptr += [0] * (N_PARTS - len(parts_ptr))
        values = torch.empty(plan.out_shape, dtype=how.dtype)
        valid = torch.empty(plan.out_shape, dtype=torch.bool)
        status: int = native().finish(
            how.kernel, options(plan), held[0].numel(), *parts_ptr, how.min_count, how.needs, how.number,
            values.data_ptr(), valid.data_ptr(),
        )  # fmt: skip
        return (values, valid) if STATUS[status] == "done" else None


class Search:
    """Results of a few slices (1, n, lanes), from rounds over their blocks."""

    def __init__(self, plan: Plan, name: str, lanes: int) -> None:
        self.of = native().Search(list(native().SEARCHES).index(name), number_of(plan.dtype.name), options(plan), lanes)
        self.shape = (len(plan.labels or (0,)), lanes)
        self.number = number_of(plan.dtype.name)

    def sample(self, data: Tensor, mask: Tensor | Part | None, n_cells: int, seed: int) -> None:
        """`n_cells` of each slice, by chance: they make the round short, and change no result."""
        self.of.sample(*self.operands(data, mask), n_cells, seed)

    def bracket(self) -> None:
        """After the samples: what to look for in the blocks."""
        self.of.bracket()

    def sift(self, data: Tensor, mask: Tensor | Part | None) -> None:
        """A block counted."""
        self.of.sift(*self.operands(data, mask))

    def settle(self) -> bool:
        """After the blocks: whether all results are found."""
        settled: bool = self.of.settle()
        return settled

    def results(self) -> tuple[Tensor, Tensor]:
        """(values, count): (leading, lanes) and (lanes)."""
        values, count = torch.empty(self.shape, dtype=torch.float64), torch.empty(self.shape[1], dtype=torch.int64)
        self.of.write(values.data_ptr(), count.data_ptr())
        return values, count

    def operands(self, data: Tensor, mask: Tensor | Part | None) -> tuple[int, ...]:
        mask_ptr, *mask_strides = strided_mask(mask)
        return (data.data_ptr(), mask_ptr, self.number, *data.shape, *data.stride(), *mask_strides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """What one native call needs to run a plan on dense cells, decided once."""

    call: Callable[..., int]
    before: tuple[Any, ...]
    after: tuple[float, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    takes_places: bool
    writes_no_mask: bool
    """Where the data has none."""


@lru_cache(maxsize=1024)
def direct(plan: Plan) -> Direct | None:
    """How the plan runs in one call; None where it takes several, or the reference's way."""
    if len(plan.fold) != 3 or plan.weighted or plan.params.get("nan") == "raise" or not math.prod(plan.shape):
        return None
    row, number, result = plan.row, number_of(plan.dtype.name), number_of(plan.result.name)
    _, n, inner = plan.fold
    dense = (n * inner, inner, 1)
    if not isinstance(row, Reduction):
        kernel, _ = fill_kernel(plan)
        size = row.size(plan.params, n) if isinstance(row, Ordering) else n
        return Direct(
            call=native().fill,
            before=(kernel, options(plan)),
            after=(number, *plan.fold, *dense, *dense, *NOT_COMPACT, plan.leaf, *NO_STATES),
            strides=(result, size * inner, inner, 1),
            dtype=getattr(torch, plan.result.torch),
            takes_places=True,
            writes_no_mask=not options(plan).omits_nan,
        )
    how = finishing(plan)
    if how is None:
        return None
    return Direct(
        call=native().reduce,
        before=(reduce_kernel(plan), how.kernel, options(plan), len(how.parts)),
        after=(number, *plan.fold, *dense, *dense, *NOT_COMPACT, plan.leaf, how.min_count, how.needs, how.number),
        strides=(plan.fold[0] * inner,),
        dtype=how.dtype,
        takes_places=False,
        writes_no_mask=False,
    )


@lru_cache(maxsize=1024)
def select_kernel(plan: Plan) -> int:
    """The number of the kernel."""
    row = plan.row
    assert isinstance(row, Reduction)
    return list(native().SELECTIONS).index(SELECTIONS[row.select])


def reduce_kernel(plan: Plan) -> int:
    """The number of the lift or, after all lifts, of the selection."""
    if not plan.passes:
        return len(native().LIFTS) + select_kernel(plan)
    return lift_kernel(plan.passes[0].name, plan.dtype.name)[0]


@lru_cache(maxsize=1024)
def state_parts(plan: Plan) -> tuple[str, ...]:
    """The parts of a state that its normalization reads: the count first, and all or all but a parameter of the row."""
    return tuple(part.name for part in plan.passes[0].parts(plan.dtype))[: len(NO_STATES)]


@lru_cache(maxsize=1024)
def fill_kernel(plan: Plan) -> tuple[int, int]:
    """The numbers of the kernel and of the result's dtype."""
    row = plan.row
    assert not isinstance(row, Reduction)
    name = FILLS[row.apply if isinstance(row, Normalization) else row.scan]
    return list(native().FILLS).index(name), number_of((plan.dtype if plan.flipped else plan.result).name)
