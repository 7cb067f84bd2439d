"""Launches the native kernels: one block a call, in the calling thread, the GIL released, the bits of the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskserve.dtypes import FLOATING, INTEGRAL, DType, f64

if TYPE_CHECKING:
    from maskserve.plan import Plan

NO_MASK = (0, 0, 0)


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
        return f"its native extension cannot be used ({error}): build it with `pip install .`, or name another back end"
    return None


@cache
def part_dtypes(dtype: DType) -> dict[str, torch.dtype]:
    """What the kernels write of a total beside the count, in the order of their pointers."""
    if dtype in INTEGRAL:
        return {"high": torch.int64, "low": torch.int64}
    if dtype is f64:
        return {"total": torch.float64, "low": torch.float64, "exponent": torch.int64}
    return {"total": torch.float64}


@cache
def dtype_index(dtype: DType) -> int:
    return list(native().DTYPES).index(dtype.name)


def lift_total(plan: Plan, data: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Count and sum of the valid cells: (outer, n, inner) -> (outer, inner) of each part."""
    outer, n, inner = data.shape
    parts = {"count": torch.empty((outer, inner), dtype=torch.int64)}
    for name, dtype in part_dtypes(plan.dtype).items():
        parts[name] = torch.empty((outer, inner), dtype=dtype)
    parts_ptr = [part.data_ptr() for part in parts.values()]
    parts_ptr += [0] * (4 - len(parts_ptr))
    mask_ptr, mask_strides = (0, NO_MASK) if mask is None else (mask.data_ptr(), mask.stride())

    def walked(cells: Tensor) -> bool:
        return bool(
            native().total(
                cells.data_ptr(), mask_ptr, dtype_index(plan.dtype), outer, n, inner,
                *cells.stride(), *mask_strides, plan.leaf, *parts_ptr,
            )
        )  # fmt: skip

    assert walked(data) or walked(data.contiguous())
    return parts


def lift_count(plan: Plan, data: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Count of the valid cells: (outer, n, inner) -> (outer, inner). The data are not read."""
    outer, n, inner = data.shape
    if mask is None:
        return {"count": torch.full((outer, inner), n, dtype=torch.int64)}
    count = torch.empty((outer, inner), dtype=torch.int64)

    def walked(cells: Tensor) -> bool:
        return bool(
            native().count(cells.data_ptr(), outer, n, inner, *cells.stride(), plan.leaf, count.data_ptr())
        )  # fmt: skip

    assert walked(mask) or walked(mask.contiguous())
    return {"count": count}


Lift = Callable[["Plan", Tensor, Tensor | None], dict[str, Tensor]]
KERNELS: dict[str, Lift] = {"total": lift_total, "count": lift_count}  # by the name of the pass


class CpuBackend:
    """The native kernels on tensors in CPU memory."""

    name = "cpu"
    block_cells = 1 << 16  # data, mask and states of a block stay in half of L2
    threads_inside = False

    def why_not(self, plan: Plan) -> str | None:
        """The first limit of this back end that the plan's row, dtype or device meets; None where it serves it."""
        if plan.device != "cpu":
            return f"it computes in CPU memory, and the tensor is on {plan.device}"
        passes = [step.name for step in plan.passes]
        unknown = [name for name in passes if name not in KERNELS]
        if unknown or not passes:
            return f"it has no kernel for {plan.row.name}"
        if plan.dtype not in INTEGRAL | FLOATING:
            return f"it has no kernel for {plan.dtype}"
        return missing()

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The named parts of a block's only pass, each (outer, inner)."""
        return KERNELS[plan.passes[0].name](plan, data, mask)
