"""Launches the native kernels: one block a call, in the calling thread, the GIL released, the bits of the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskserve.dtypes import BY_NAME, FLOATING, INTEGRAL, f64

if TYPE_CHECKING:
    from maskserve.plan import Plan

NO_MASK = (0, 0, 0)
SERVED = FLOATING | INTEGRAL


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
def total_kernel(dtype_name: str) -> tuple[int, tuple[tuple[str, torch.dtype], ...]]:
    """The kernel's number for a dtype, and what it writes beside the count, in the order of its pointers.

    By name: the hash of a DType takes longer than the sum of a thousand cells.
    """
    dtype = BY_NAME[dtype_name]
    parts: tuple[tuple[str, torch.dtype], ...] = (("total", torch.float64),)
    if dtype in INTEGRAL:
        parts = (("high", torch.int64), ("low", torch.int64))
    elif dtype == f64:
        parts = (("total", torch.float64), ("low", torch.float64), ("exponent", torch.int64))
    return list(native().DTYPES).index(dtype_name), parts


def lift_total(plan: Plan, data: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Count and sum of the valid cells: (outer, n, inner) -> (outer, inner) of each part."""
    outer, n, inner = data.shape
    kernel_dtype, part_dtypes = total_kernel(plan.dtype.name)
    parts = {"count": torch.empty((outer, inner), dtype=torch.int64)}
    for name, dtype in part_dtypes:
        parts[name] = torch.empty((outer, inner), dtype=dtype)
    parts_ptr = [part.data_ptr() for part in parts.values()]
    parts_ptr += [0] * (4 - len(parts_ptr))
    mask_ptr, mask_strides = (0, NO_MASK) if mask is None else (mask.data_ptr(), mask.stride())

    def walked(cells: Tensor) -> bool:
        return bool(
            native().total(
                cells.data_ptr(), mask_ptr, kernel_dtype, outer, n, inner,
                *cells.stride(), *mask_strides, plan.leaf, *parts_ptr,
            )
        )  # fmt: skip

    if not walked(data):  # neither n nor a kept dim is dense
        walked(data.contiguous())
    return parts


def lift_count(plan: Plan, data: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Count of the valid cells: (outer, n, inner) -> (outer, inner). The data are not read."""
    outer, n, inner = data.shape
    if mask is None:
        return {"count": torch.full((outer, inner), n, dtype=torch.int64)}
    count = torch.empty((outer, inner), dtype=torch.int64)

    def walked(cells: Tensor) -> bool:
        return bool(native().count(cells.data_ptr(), outer, n, inner, *cells.stride(), plan.leaf, count.data_ptr()))

    if not walked(mask):
        walked(mask.contiguous())
    return {"count": count}


Lift = Callable[["Plan", Tensor, Tensor | None], dict[str, Tensor]]
KERNELS: dict[str, Lift] = {"total": lift_total, "count": lift_count}  # by the name of the pass


class CpuBackend:
    """The native kernels on tensors in CPU memory."""

    name = "cpu"
    block_cells = 1 << 20  # a call costs some 10 us in Python; the kernel tiles for the caches by itself
    threads_inside = False

    def why_not(self, plan: Plan) -> str | None:
        """The first limit of this back end that the plan's row, dtype or device meets; None where it serves it."""
        if plan.device != "cpu":
            return f"it computes in CPU memory, and the tensor is on {plan.device}"
        passes = [step.name for step in plan.passes]
        unknown = [name for name in passes if name not in KERNELS]
        if unknown or not passes:
            return f"it has no kernel for {plan.row.name}"
        if plan.dtype not in SERVED:
            return f"it has no kernel for {plan.dtype}"
        return missing()

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The named parts of a block's only pass, each (outer, inner)."""
        return KERNELS[plan.passes[0].name](plan, data, mask)
