"""Launches the Triton kernels on a CUDA device; the bits of the reference for what is made of + - * / sqrt and choice.

Importable without triton and without a GPU. TRITON_INTERPRET=1 runs the kernels on the CPU, in numpy: for tests, which say
what the kernels mean, and nothing of how they do on a device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskserve.backends import triton_trees
from maskserve.backends.reference import kernel as reference
from maskserve.backends.reference import lift as lift_as_reference
from maskserve.backends.triton_launches import ended, fill, folded, join, merged, normalize, pull, scan, states_of
from maskserve.backends.triton_plans import ending_stage, holding_tile
from maskserve.backends.triton_tables import (
    FILLED,
    PULLS,
    SERVED,
    WRITTEN,
    finishing,
    interprets,
    missing,
    reducing,
    serves_order,
    serves_row,
)
from maskserve.compact import Compact, Mask, Part, spread_part
from maskserve.dtypes import FLOATING
from maskserve.ops.passes import WEIGHTED_MOMENTS
from maskserve.ops.rows import Normalization, Reduction, Scan

if TYPE_CHECKING:
    from maskserve.blockwise import Cells, Op
    from maskserve.plan import Plan

Parts = dict[str, Tensor]
Masked = tuple[Tensor, Tensor]


def on_plans(plan: Plan, data: Tensor, mask: Tensor | Part | None) -> tuple[Tensor, Tensor | Part | None]:
    """A block in the memory of the plan's device: what is read from a file is in the CPU's memory."""
    if plan.device == "cpu" or (isinstance(mask, Part) and mask.form.cells.is_cuda):
        return data.to(plan.device), mask
    own = spread_part(mask)
    return data.to(plan.device), None if own is None else own.to(plan.device)


def read_in(mask: Mask | None, plan: Plan, shape: tuple[int, int, int]) -> Tensor | Part | None:
    """The mask of a whole tensor, folded: a compact one where it lies."""
    if isinstance(mask, Compact):
        return mask.part(shape)
    return None if mask is None else folded(mask.expand(plan.shape), shape)


def distinct(tensor: Tensor) -> Tensor:
    """The cells of a tensor that broadcasts, each once."""
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]


class TritonBackend:
    """The Triton kernels on tensors in the memory of a CUDA device."""

    name = "triton"
    block_cells = sys.maxsize
    """Kernels cut by themselves."""
    reads_compact = True
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
            return f"it has no kernel for {row.name}"
        if plan.weighted and plan.params["weights"] not in SERVED:
            return f"it has no kernel for weights of {plan.params['weights']}"
        if not serves_order(plan):
            return f"it has no kernel for {row.name} with this ord"
        if plan.dtype not in SERVED:
            return f"it has no kernel for {plan.stored}"
        if plan.flipped and plan.weighted:
            return f"it has no kernel for {plan.stored} with weights"
        if not isinstance(row, Reduction) and not row.picks and plan.result not in WRITTEN:
            return f"it has no kernel for {row.name} in {plan.result}"
        return missing()

    def takes_cells(self, plan: Plan) -> bool:
        """No kernel picks cells."""
        return False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=device)

    # -- reductions -----------------------------------------------------------------------------------------------

    def run(self, plan: Plan, data: Tensor, mask: Mask | None, places: Tensor | None = None) -> Masked | None:
        """(values, mask) of the plan on whole tensors; None where the reference has to do a part of it."""
        if plan.weighted or plan.params.get("nan") == "raise" or not math.prod(plan.shape):
            return None
        *outer, n, inner = plan.fold
        shape = (math.prod(outer), n, inner)
        cells = folded(data, shape)
        own = read_in(mask, plan, shape)
        values = torch.empty(plan.out_shape, dtype=getattr(torch, plan.result.torch), device=data.device)
        valid = torch.empty(plan.out_shape, dtype=torch.bool, device=data.device)
        if not isinstance(plan.row, Reduction):
            status = self.fill(plan, cells, own, values.view(shape), valid.view(shape))
            return (values, valid) if status == "done" else None
        return (values, valid) if self.reduced(plan, plan.fold, cells, own, values, valid, (inner, 1)) else None

    def reduce(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, values: Tensor, valid: Tensor) -> bool:
        """Whole slices (outer, n, inner) reduced to `values` and `valid`, (1, outer, inner); False: not served."""
        fold = (data.shape[0], data.shape[1], data.shape[2])
        data, own = on_plans(plan, data, mask)
        return self.reduced(plan, fold, data, own, values, valid, (values.stride(1), values.stride(2)))

    def reduced(
        self, plan: Plan, fold: tuple[int, ...], data: Tensor, mask: Tensor | Part | None, values: Tensor, valid: Tensor,
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

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, weights: Tensor | None = None) -> Parts:
        """The named parts of a block: (outer, n, inner) -> (outer, inner) of each."""
        outer, n, inner = data.shape
        if weights is not None and plan.passes[0] is WEIGHTED_MOMENTS and bool((distinct(weights) < 0).any()):
            return lift_as_reference(plan, plan.passes[0], data, spread_part(mask), weights)  # which says what is wrong
        data, own = on_plans(plan, data, mask)
        parts = states_of(plan, outer * inner, data.device)
        weighs = None if weights is None else weights.to(plan.device)
        ended(plan, (outer, n, inner), data, own, tuple(parts), (inner, 1), None, weighs)
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
        self, plan: Plan, data: Tensor, mask: Tensor | Part | None, values: Tensor, valid: Tensor | None,
        places: Tensor | None = None, states: Parts | None = None,
    ) -> str:  # fmt: skip
        """A normalization or scan of whole slices, written to `values` and `valid`, hidden cells 0.

        A normalization that is given the slices' `states`, (outer, inner), takes any part of the slices.
        "done", "overflowed" where a finite value became inf, or "refused": the reference has to do this block.
        """
        data, own = on_plans(plan, data, mask)
        if valid is None:
            valid = torch.empty(values.shape, dtype=torch.bool, device=data.device)
        if isinstance(plan.row, Scan) and plan.row.scan == FILLED:
            fill(plan, data, own, (values, valid))
            return "done"
        wrong = torch.zeros(1, dtype=torch.int32, device=data.device)
        if isinstance(plan.row, Normalization):
            normalize(plan, data, own, (values, valid, wrong), self.known(plan, data, own, states))
            return "overflowed" if wrong.item() else "done"
        scan(plan, data, own, (values, valid, wrong))
        return "refused" if wrong.item() else "done"

    def known(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, states: Parts | None) -> Parts | None:
        """The states of slices that no tile holds."""
        outer, n, inner = data.shape
        if states is not None or holding_tile(n, plan.leaf, outer * inner, is_inner=inner == 1) is not None:
            return states
        return self.lift(plan, data, mask)

    # -- trees of elementwise ops ---------------------------------------------------------------------------------

    def computes_on(self, device: str, name: str | None) -> bool:
        """Whether it is who computes there; in numpy where it is asked for."""
        return device.startswith("cuda") or (interprets() and name == self.name)

    def why_not_fused(self, ops: Sequence[Op]) -> str | None:
        """The first limit that the ops meet; None where one kernel computes them all."""
        return triton_trees.why_not(ops)

    def fused(
        self, ops: Sequence[Op], leaves: Sequence[Cells], shape: tuple[int, ...], kept: Compact | None
    ) -> tuple[Tensor, Tensor | None]:
        """(cells, where they are valid) of the last op."""
        return triton_trees.run(ops, leaves, shape, kept)

    # -- gradients ------------------------------------------------------------------------------------------------

    def pull(
        self, plan: Plan, data: Tensor, mask: Mask | None, values: Tensor, g: Tensor, gate: Tensor,
        gradient: Tensor, reach: Tensor | None,
    ) -> bool:  # fmt: skip
        """The gradient by `data`, and where it has reached; False: the reference's formula is needed."""
        if not self.pulls(plan) or not math.prod(plan.shape):
            return False
        *outer, n, inner = plan.fold
        own = read_in(mask, plan, (math.prod(outer), n, inner))
        pull(plan, data, own, (values, g, gate), gradient, reach)
        return True

    def pulls(self, plan: Plan) -> bool:
        """Whether there is a kernel for the gradient."""
        floats = plan.stored in FLOATING and plan.stored is plan.dtype and plan.result in FLOATING
        return floats and plan.row.vjp in PULLS and plan.params.get("nan") != "raise"
