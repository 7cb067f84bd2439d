"""Launches the native kernels of gradients: one block a call, in the calling thread, the GIL released.

They say what the reference's formulas say (backends/reference/gradients*.py), in double precision, and cannot be
differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from torch import Tensor

from maskserve.backends.cpu import NOT_COMPACT, missing, native, number_of, options, strided_mask
from maskserve.compact import Part
from maskserve.dtypes import FLOATING, DType
from maskserve.ops import passes
from maskserve.ops.rows import Pass, Reduction
from maskserve.plan import Plan

ABSENT = (0, 0, 0, 0)
"""An operand that a kernel does not read."""
N_PARTS = 4


Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A native kernel, and what it reads beside cells, result and gradient from above."""

    kernel: str
    step: Pass | None = None
    """The pass whose states it reads."""
    ties: tuple[str, ...] = ()
    """The states, or without a pass the result, whose ties it reads: how many cells of the slice equal each."""
    of_sizes: bool = False
    """Whether ties are of |cells|."""
    spares_zeros: bool = False
    """Whether its states leave out cells of 0, and their count is of those."""
    is_even: bool = False
    """Whether each cell's gradient is g of its slice, whatever the cells are."""
    of_slices: bool = False
    """Whether it reads slices whole: each cell's gradient depends on g of the others."""
    serves: Callable[[Params], bool] = lambda params: True


def is_euclidean(params: Params) -> bool:
    """A result in another dtype may be 0 where the norm is not."""
    return bool(params["ord"] == 2) and params["dtype"] is None


def is_extreme(params: Params) -> bool:
    return math.isinf(params["ord"]) and params["dtype"] is None


RESULT = ("result",)
# by the name of the reference's formula; the first that serves
PULLS = {
    ".gradients:total": (Pull(kernel="pull_total", is_even=True),),
    ".gradients:mean": (Pull(kernel="pull_mean", step=passes.COUNT),),
    ".gradients:var": (Pull(kernel="pull_var", step=passes.MOMENTS),),
    ".gradients:std": (Pull(kernel="pull_std", step=passes.MOMENTS),),
    ".gradients:logsumexp": (Pull(kernel="pull_logsumexp", step=passes.EXPONENTIALS),),
    ".gradients:extreme": (Pull(kernel="pull_extreme", ties=RESULT),),
    ".gradients:extent": (Pull(kernel="pull_extent", step=passes.EXTENT, ties=("low", "high")),),
    ".gradients_of_orders:extreme_or_picked": (
        Pull(kernel="pull_extreme", ties=RESULT, serves=lambda params: params["dim"] is None),
    ),
    ".gradients_of_products:prod": (Pull(kernel="pull_product", step=passes.PRODUCT, spares_zeros=True),),
    ".gradients_of_norms:norm": (
        Pull(kernel="pull_norm", step=passes.MOMENTS, serves=is_euclidean),
        Pull(kernel="pull_norm_of_order", serves=lambda params: params["ord"] == 1),
        Pull(kernel="pull_norm_of_order", ties=RESULT, of_sizes=True, serves=is_extreme),
        Pull(kernel="pull_norm_of_order", step=passes.POWERS, serves=lambda params: params["ord"] in (3, 0.5, -1, -2)),
    ),
    ".gradients:softmax": (Pull(kernel="pull_softmax", of_slices=True),),
    ".gradients:softmin": (Pull(kernel="pull_softmin", of_slices=True),),
    ".gradients:log_softmax": (Pull(kernel="pull_log_softmax", of_slices=True),),
    ".gradients_of_norms:normalize": (Pull(kernel="pull_normalize", of_slices=True, serves=is_euclidean),),
    ".gradients:standardize": (Pull(kernel="pull_standardize", step=passes.MOMENTS, of_slices=True),),
    ".gradients:cumsum": (Pull(kernel="pull_cumsum", of_slices=True),),
    ".gradients_of_products:cumprod": (Pull(kernel="pull_cumprod", of_slices=True),),
    ".gradients_of_products:logcumsumexp": (Pull(kernel="pull_logcumsumexp", of_slices=True),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the gradient of a plan is computed natively, decided once."""

    pull: Pull
    kernel: int
    options: Any
    reduces: bool
    states: Plan
    """The plan of a reduction that ends with the states that the kernel reads."""


@lru_cache(maxsize=1024)
def launch(plan: Plan) -> Launch | None:
    """None where the reference's formula is needed: for other devices, dtypes and rows, and for weights."""
    row = plan.row
    pull = next((pull for pull in PULLS.get(row.vjp, ()) if pull.serves(plan.params)), None)
    floats = plan.stored in FLOATING and plan.stored is plan.dtype and plan.result in FLOATING
    if pull is None or not floats or plan.device != "cpu" or plan.weighted or plan.labels is not None:
        return None
    reduces = isinstance(row, Reduction)
    if not (reduces or pull.of_slices) or missing() is not None:
        return None
    of = Reduction(
        name=row.name, summary=row.summary, parameters=row.parameters, accepts=row.accepts, result=row.result,
        passes=(pull.step or passes.COUNT,),
    )  # fmt: skip
    nan = "omit" if plan.params.get("nan") == "omit" else "propagate"  # a NaN to raise for has been met already
    return Launch(
        pull=pull,
        kernel=list(native().PULLS).index(pull.kernel),
        options=options(plan),
        reduces=reduces,
        states=replace(plan, row=of, params=MappingProxyType({**plan.params, "nan": nan})),
    )


def strided(cells: Tensor | None) -> tuple[int, ...]:
    """Address and strides of a block's operand; n repeats where it has size 1."""
    if cells is None:
        return ABSENT
    outer, n, inner = cells.stride()
    return (cells.data_ptr(), outer, n if cells.shape[1] > 1 else 0, inner)


def of_mask(mask: Tensor | Part | None) -> tuple[int, ...]:
    return strided_mask(mask) if isinstance(mask, Part) else (*strided(mask), *NOT_COMPACT)


def numbers(
    plan: Plan, data: Tensor, mask: Tensor | Part | None, above: Sequence[Tensor], dtype: DType, parts: Sequence[Tensor]
) -> list[int]:
    """A block and what comes from above (g, gate, result), as kernels read it."""
    made = [*strided(data), *of_mask(mask), number_of(plan.dtype.name), *data.shape, plan.leaf]
    for cells in above:
        made += strided(cells)
    made.append(number_of(dtype.name))
    for part in parts:
        made += strided(part.unsqueeze(1))
    return made + list(ABSENT) * (N_PARTS - len(parts))


def pull_block(
    how: Launch, data: Tensor, mask: Tensor | Part | None, above: Sequence[Tensor], parts: Sequence[Tensor],
    gradient: Tensor, reach: Tensor | None,
) -> bool:  # fmt: skip
    """The gradient of a block, and where it has reached, of the strides of `gradient`; False: it needs the formula."""
    given = numbers(how.states, data, mask, above, how.states.result, parts)
    given += (gradient.data_ptr(), 0 if reach is None else reach.data_ptr(), *gradient.stride())
    status: int = native().pull(how.kernel, how.options, tuple(given))
    return status == 0


def count_ties(
    how: Launch, data: Tensor, mask: Tensor | Part | None, found: Tensor, dtype: DType, count: Tensor
) -> None:
    """How many cells of each slice equal what was found in it, (outer, 1, inner): into (outer, inner) of `count`, dense."""
    given = numbers(how.states, data, mask, (found,) * 3, dtype, ())
    native().ties(how.pull.of_sizes, (*given, count.data_ptr()))
