"""Which Triton kernels make up a row, and what their constants are: decided once a plan, without a device or triton."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from maskserve.backends.reference import kernel as reference
from maskserve.backends.reference import lift as lift_as_reference
from maskserve.dtypes import FLOATING, INTEGRAL, bf16, boolean, f16, f32, f64, i64, u16, u32, u64
from maskserve.ops import passes
from maskserve.ops.rows import Normalization, Pass, Reduction, Scan

if TYPE_CHECKING:
    from maskserve.plan import Plan

SERVED = FLOATING | INTEGRAL
WRITTEN = SERVED | {u16, u32, u64}
"""The dtypes of results; wide ones are computed of narrow or flipped cells."""
SHORT = frozenset({f32, f16, bf16})
WORD = "TRITON_INTERPRET"
OLDEST = (3, 7)
"""Tuples of pointers, and functions as constants, are as kernels need them from here on."""

# what kernels are called, by what they compute in: float32 (and halves), float64, int64, narrower integers and bools, u64
KINDS = ("single", "double", "long", "whole", "unsigned")


def one(lift: str, merge: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(KINDS, (lift, merge))


LIFTS: Mapping[Pass, Mapping[str, tuple[str, str]]] = {
    passes.COUNT: one("sums:lift_count", "sums:merge_count"),
    passes.TOTAL: {
        "single": ("sums:lift_sum", "sums:merge_sums"),
        "double": ("sums:lift_pair", "sums:merge_pair"),
        "long": ("sums:lift_limbs", "sums:merge_limbs"),
        "whole": ("sums:lift_limbs", "sums:merge_limbs"),
        "unsigned": ("sums:lift_limbs", "sums:merge_limbs"),
    },
    passes.MOMENTS: one("sums:lift_moments", "sums:merge_moments")
    | {
        "double": ("sums:lift_moments_of_doubles", "sums:merge_moments"),
        "long": ("sums:lift_moments_of_longs", "sums:merge_moments"),
        "unsigned": ("sums:lift_moments_of_longs", "sums:merge_moments"),
    },
    passes.LARGEST: one("extremes:lift_largest", "extremes:merge_largest"),
    passes.SMALLEST: one("extremes:lift_smallest", "extremes:merge_smallest"),
    passes.FIRST_LARGEST: one("extremes:lift_first_largest", "extremes:merge_first_largest"),
    passes.FIRST_SMALLEST: one("extremes:lift_first_smallest", "extremes:merge_first_smallest"),
    passes.FIRST: one("extremes:lift_first", "extremes:merge_first"),
    passes.LAST: one("extremes:lift_last", "extremes:merge_last"),
    passes.EXTENT: one("extremes:lift_extent", "extremes:merge_extent"),
    passes.TRUTHS: one("sums:lift_truths", "sums:merge_sums"),
    passes.EXPONENTIALS: one("powers:lift_exponentials", "powers:merge_exponentials"),
    passes.PRODUCT: one("powers:lift_product", "powers:merge_product"),
    passes.POWERS: one("powers:lift_powers", "powers:merge_powers"),
    passes.WEIGHTED_TOTAL: one("sums:lift_weighted_total", "sums:merge_weighted_total"),
    passes.WEIGHTED_MOMENTS: one("sums:lift_weighted_moments", "sums:merge_weighted_moments"),
}
PASSES = {step.name: step for step in LIFTS}


def of_sums(name: str) -> dict[str, str]:
    """What ends states of floats, pairs and limbs."""
    kinds = {"double": "_of_pair", "long": "_of_limbs", "whole": "_of_limbs", "unsigned": "_of_unsigned"}
    return {kind: name + kinds.get(kind, "") for kind in KINDS}


FINISHES: Mapping[str, Mapping[str, str]] = {
    ".reductions:finalize_sum": of_sums("sums:finish_sum"),
    ".reductions:finalize_mean": of_sums("sums:finish_mean"),
    ".reductions:finalize_var": dict.fromkeys(KINDS, "sums:finish_var"),
    ".reductions:finalize_std": dict.fromkeys(KINDS, "sums:finish_std"),
    ".reductions:finalize_best": dict.fromkeys(KINDS, "extremes:finish_best")
    | {"unsigned": "extremes:finish_best_of_unsigned"},
    ".reductions:finalize_at": dict.fromkeys(KINDS, "extremes:finish_at"),
    ".reductions:finalize_count": dict.fromkeys(KINDS, "sums:finish_count"),
    ".reductions:finalize_any": dict.fromkeys(KINDS, "sums:finish_any"),
    ".reductions:finalize_all": dict.fromkeys(KINDS, "sums:finish_all"),
    ".reductions:finalize_logsumexp": dict.fromkeys(KINDS, "powers:finish_logsumexp"),
    ".products:finalize_prod": dict.fromkeys(KINDS, "powers:finish_prod"),
    ".norms:finalize_norm": dict.fromkeys(KINDS, "powers:finish_norm"),
    ".places:finalize_ptp": dict.fromkeys(KINDS, "extremes:finish_extent"),
    ".weighted:finalize_sum": dict.fromkeys(KINDS, "sums:finish_weighted_sum"),
    ".weighted:finalize_mean": dict.fromkeys(KINDS, "sums:finish_weighted_mean"),
    ".weighted:finalize_var": dict.fromkeys(KINDS, "sums:finish_weighted_var"),
    ".weighted:finalize_std": dict.fromkeys(KINDS, "sums:finish_weighted_std"),
}
OVERFLOWING = frozenset(
    {".reductions:finalize_sum", ".reductions:finalize_mean", ".products:finalize_prod", ".places:finalize_ptp"}
)
"""What can end in an integer that its dtype does not hold."""
FILLED = ".places:Filled"
APPLIES = {
    ".normalizations:apply_softmax": "filling:apply_softmax",
    ".normalizations:apply_log_softmax": "filling:apply_log_softmax",
    ".normalizations:apply_standardize": "filling:apply_standardize",
    ".norms:apply_normalize": "filling:apply_normalize",
}


class Scanning(NamedTuple):
    """The steps of a scan, and the dtypes of its states; `dtypes` are float64 unless they are said."""

    begin: str
    lift: str
    scan: str
    merge: str
    finish: str
    parts: tuple[torch.dtype, ...] = (torch.float64,)
    reads: bool = True
    reverses: bool = False

    @property
    def constants(self) -> Mapping[str, Any]:
        """What each of its launches has."""
        return {"BEGIN": of_scans(self.begin), "MERGE": of_scans(self.merge)}


LATEST = Scanning(
    "begin_latest", "lift_latest", "scan_by_halves", "merge_latest", "finish_latest", (torch.int64,), reads=False
)
PRODUCTS = Scanning(
    "begin_products", "lift_products", "scan_by_halves", "merge_products", "finish_products",
    (torch.float64, torch.float64, torch.int64),
)  # fmt: skip
WRAPPED = Scanning(
    "begin_wrapped", "lift_wrapped", "scan_by_halves", "merge_wrapped", "finish_wrapped",
    (torch.float64, torch.float64, torch.int64, torch.int64),
)  # fmt: skip
LIMBS = Scanning(
    "begin_limbs", "lift_limbs_of_cells", "scan_by_sums", "merge_limbs", "finish_limbs", (torch.int64, torch.int64)
)
SCANS: Mapping[str, Mapping[str, Scanning]] = {
    ".scans:CumulativeSum": {
        "single": Scanning("begin_sums", "lift_cells", "scan_by_sums", "merge_sums", "finish_sums"),
        "double": Scanning(
            "begin_pairs", "lift_pairs", "scan_by_halves", "merge_pairs", "finish_pairs",
            (torch.float64, torch.float64, torch.int64),
        ),
        "long": LIMBS,
        "whole": LIMBS,
    },
    ".products:CumulativeProduct": {"single": PRODUCTS, "double": PRODUCTS, "long": WRAPPED, "whole": WRAPPED},
    ".scans:LogCumulativeSumOfExponentials": dict.fromkeys(
        KINDS,
        Scanning(
            "begin_exponentials", "lift_exponents", "scan_by_halves", "merge_running_exponentials", "finish_exponentials",
            (torch.float64, torch.float64),
        ),
    ),
    ".places:CumulativeLargest": dict.fromkeys(
        KINDS,
        Scanning(
            "begin_largest", "lift_largest_place", "scan_by_halves", "merge_largest_place", "finish_place",
            (torch.int64, torch.int64),
        ),
    ),
    ".places:CumulativeSmallest": dict.fromkeys(
        KINDS,
        Scanning(
            "begin_smallest", "lift_smallest_place", "scan_by_halves", "merge_smallest_place", "finish_place",
            (torch.int64, torch.int64),
        ),
    ),
    ".places:FilledForward": dict.fromkeys(KINDS, LATEST),
    ".places:FilledBackward": dict.fromkeys(KINDS, LATEST._replace(reverses=True)),
}  # fmt: skip
PULLS = {
    ".gradients:softmax": ("filling:softmax_share", "filling:pull_softmax"),
    ".gradients:softmin": ("filling:softmax_share", "filling:pull_softmin"),
    ".gradients:log_softmax": ("filling:log_softmax_share", "filling:pull_log_softmax"),
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


def named(name: str | None) -> Any:
    """The kernel, or step of kernels, that "module:function" names."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    return getattr(kernels(module), function)


def of_scans(name: str | None) -> Any:
    return None if name is None else named(f"scanning:{name}")


# -- what a plan asks of the kernels, decided once ----------------------------------------------------------------


def kind_of(plan: Plan) -> str:
    if plan.dtype.is_float:
        return "double" if plan.dtype is f64 else "single"
    if plan.flipped:
        return "unsigned"
    return "long" if plan.dtype is i64 else "whole"


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
    passes.EXTENT: lambda plan: (worst_of(plan, largest=False), worst_of(plan, largest=True)),
    passes.TRUTHS: lambda plan: torch.iinfo(torch.int64).min if plan.flipped else 0,
    passes.EXPONENTIALS: exactness,
    passes.PRODUCT: lambda plan: plan.dtype is f64,
    passes.POWERS: lambda plan: float(plan.params["ord"]),
    passes.WEIGHTED_TOTAL: lambda plan: plan.result is f64,
    passes.WEIGHTED_MOMENTS: lambda plan: plan.result is f64,
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
    lift, merge = LIFTS[step][kind_of(plan)]
    option = LIFT_OPTIONS[step](plan) if step in LIFT_OPTIONS else None
    parts = step.parts(plan.dtype)
    nothing = torch.empty((1, 0, 1), dtype=getattr(torch, plan.dtype.torch))
    of_no_cells = lift_as_reference(plan, step, nothing, None, *[nothing] * plan.weighted)
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


def scanning(plan: Plan) -> Scanning:
    """The steps of a scan of the plan's cells."""
    assert isinstance(plan.row, Scan)
    return SCANS[plan.row.scan][kind_of(plan)]


def omits(plan: Plan) -> bool:
    """Whether kernels pass over NaN."""
    return plan.dtype.is_float and plan.params.get("nan") == "omit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finishing:
    """How states become results."""

    constants: Mapping[str, Any]
    min_count: int


UNFINISHED: Mapping[str, Any] = {"FINISH": None, "OPTION": None, "NEEDS": -math.inf, "CHECKS": False, "WEIGHS": False}


@lru_cache(maxsize=1024)
def finishing(plan: Plan) -> Finishing | None:
    """How the plan's states are finished by a kernel; None where the reference's way is needed."""
    row, params = plan.row, plan.params
    if not isinstance(row, Reduction) or params.get("empty", "mask") != "mask" or plan.result not in WRITTEN:
        return None
    option: Any = params.get("ord", params.get("correction"))
    option = plan.result.is_float if option is None else float(option)
    return Finishing(
        constants={
            "FINISH": named(FINISHES[plan.finalize][kind_of(plan)]), "OPTION": option, "NEEDS": needs(plan),
            "CHECKS": plan.result is not f64 and (plan.result.is_float or plan.finalize in OVERFLOWING),
            "WEIGHS": plan.weighted,
        },
        min_count=-1 if row.never_masked else int(params["min_count"]),
    )  # fmt: skip


def needs(plan: Plan) -> float:
    """The count that must be exceeded."""
    return -math.inf if plan.row.needs is None else float(plan.row.needs(plan.params))


def serves_row(plan: Plan) -> bool:
    row = plan.row
    known = all(PASSES.get(step.name) is step for step in plan.passes)
    if isinstance(row, Reduction):
        return known and bool(plan.passes) and plan.finalize in FINISHES
    return known and (row.apply in APPLIES if isinstance(row, Normalization) else row.scan in {*SCANS, FILLED})


def serves_order(plan: Plan) -> bool:
    """Whether powers of a norm are products or roots; other ones are by exp and log, which float64 would show."""
    size = abs(plan.params.get("ord", 2))
    if size in (0, math.inf) or plan.params.get("ord") == 0.5:
        return True
    return size <= 8 if size % 1 == 0 else 0.5 <= size <= 6 and f64 not in (plan.dtype, plan.result)
