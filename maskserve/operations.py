"""What autograd follows: ops along dims, masked products of matrices, functions of whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from maskserve import wholes
from maskserve.backends.reference import contractions, kernel
from maskserve.backends.reference.cells import select
from maskserve.backends.reference.gradients import Slices
from maskserve.blocks import spans
from maskserve.compact import Compact, as_bools
from maskserve.engine import run_held, run_held_with_indices
from maskserve.gates import as_cotangent, expanded
from maskserve.gradients import Above, Cells, Given, Masks, Operation, Result, apply
from maskserve.masks import intersection
from maskserve.ops.rows import Reach, Reduction, Whole
from maskserve.plan import Plan, batched, narrowed, reduced_shape
from maskserve.pulling import pulled
from maskserve.reach import Operand
from maskserve.tracing import is_followed

BLOCK_CELLS = 1 << 17
"""A few float64 copies of so many cells stay in L2; shorter blocks cost more in calls than they save."""
CACHE_LINES = 128
"""So many cells of the last dim at least: a part of a row is read in whole cache lines."""

# -- slices -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfSlices(Operation):
    """An op along dims; its operands are the data and, where there are any, the weights.

    `held` is the data's mask where that is compact: as an operand autograd would keep it in bools.
    """

    plan: Plan
    held: Compact | None = None

    @property
    def is_differentiable(self) -> bool:
        return bool(self.plan.row.vjp)

    @property
    def batch_dim(self) -> int:
        return 0 if self.plan.labels is None else 1

    def batched(self, n: int) -> OfSlices:
        return OfSlices(batched(self.plan, n))

    def compute(self, operands: Cells, masks: Masks) -> Result:
        mask = masks[0] if self.held is None else self.held
        weights = (operands[1], masks[1]) if len(operands) > 1 else None
        made: tuple[Any, ...]
        if self.plan.row.picks:
            made = run_held_with_indices(self.plan, operands[0], mask)
        else:
            made = run_held(self.plan, operands[0], mask, weights)
        values, valid, *aside = made
        return Result(values, expanded(valid, values.shape), *aside)

    def pull(self, given: Given, above: Above) -> Cells:
        plan, row, own = self.plan, self.plan.row, self.counting(given)
        if any(map(is_followed, given.operands)) or any(operand.shape != plan.shape for operand in given.operands):
            own = self.within_reach(own, given, above.gate)
        reads = row.vjp_reads_cells or len(given.operands) > 1
        operands = [singles(operand.expand(plan.shape)) for operand in given.operands]
        data, *weights = [select(operand, own) if reads else operand for operand in operands]
        indices = given.result.aside
        slices = Slices(
            data,
            own,
            self.kept(singles(given.result.values)),
            None if indices is None else self.kept(indices),
            weights[0] if weights else None,
        )
        g = self.kept(singles(above.g))
        if not weights:
            return (kernel(row.vjp)(plan, slices, g).expand(plan.shape),)
        assert isinstance(row, Reduction)
        parts = zip(kernel(row.vjp_weighted)(plan, slices, g), given.operands, strict=True)
        return tuple(reduced_to(part.expand(plan.shape), operand.shape) for part, operand in parts)

    def within_reach(self, own: Tensor | None, given: Given, gate: Tensor) -> Tensor | None:
        """The cells that count, without those that no reached result depends on.

        The derivative there may be NaN: 0 times it would spoil shared weights, and the second derivative of what cells share.
        """
        if not isinstance(self.plan.row, Reduction) and self.plan.row.reach not in (Reach.SLICE, Reach.BEFORE):
            return own
        at = self.spread(self.kept(as_cotangent(gate)), given.result) > 0
        return intersection([own, at.expand(self.plan.shape)])

    def back(self, given: Given, reach: Tensor) -> Cells:
        at = self.spread(self.kept(reach), given.result).expand(self.plan.shape)
        at = select(at, self.counting(given))
        return tuple(reduced_to(at, operand.shape) for operand in given.operands)

    def spread(self, reach: Tensor, result: Result) -> Tensor:
        """From results to the cells of their slices that they depend on."""
        plan = self.plan
        if plan.labels is not None:
            reach = reach.sum(0)
        if not plan.dims or isinstance(plan.row, Reduction):
            return reach
        match plan.row.reach:
            case Reach.SLICE:
                return reach.sum(plan.dims, keepdim=True)
            case Reach.BEFORE:
                return reach.flip(plan.dims).cumsum(plan.dims[0]).flip(plan.dims)
            case Reach.PICKED:
                assert result.aside is not None
                return reach.new_zeros(plan.shape).scatter_add(plan.dims[0], result.aside, reach)
            case Reach.OWN:
                return reach

    def touched(self, given: Given, reached: Tensor) -> Tensor:
        """Of a normalization its whole slices, of a scan what comes before: softmax is a formula of its own result."""
        row = self.plan.row
        if isinstance(row, Reduction) or row.reach not in (Reach.SLICE, Reach.BEFORE):
            return reached
        return (self.spread(as_cotangent(reached), given.result) > 0).expand(reached.shape) & given.result.valid

    def reached(self, given: Given, gate: Tensor) -> Cells:
        plan = self.plan
        if len(given.operands) > 1 or plan.labels is not None or not isinstance(plan.row, Reduction):
            return super().reached(given, gate)
        at, own = self.kept(gate).expand(plan.shape), self.counting(given)  # the most frequent case, without numbers
        return (at if own is None else at & own,)

    def counting(self, given: Given) -> Tensor | None:
        """Where cells count: mask, weights' mask, and no NaN where those are omitted."""
        omits = self.plan.params.get("nan") == "omit"
        own = intersection(
            [as_bools(self.held), *given.masks, *[~operand.isnan() for operand in given.operands if omits]]
        )
        return None if own is None else own.expand(self.plan.shape)

    def kept(self, tensor: Tensor) -> Tensor:
        """A result with its reduced dims, of size 1."""
        plan = self.plan
        if not isinstance(plan.row, Reduction):
            return tensor
        labels = () if plan.labels is None else (len(plan.labels),)
        return tensor.reshape(labels + reduced_shape(plan.shape, plan.dims, keepdim=True))

    # -- by kernels, and by formulas in blocks ---------------------------------------------------------------------

    def swept(self, given: Given, above: Above, *, wants_reach: bool) -> tuple[Tensor, Tensor | None] | None:
        data = given.operands[0]
        if len(given.operands) > 1 or data.shape != self.plan.shape or any(map(is_followed, (data, *above))):
            return None
        return pulled(
            self.plan,
            data,
            given.masks[0] if self.held is None else self.held,
            given.result.values,
            *above,
            wants_reach=wants_reach,
        )

    def gradients(self, given: Given, above: Above, reached: Cells) -> Cells:
        """Where nobody differentiates again, in blocks that stay in the cache: several times faster."""
        dim = self.free_dim(given.operands)
        if dim is None or any(map(is_followed, (*given.operands, above.g))):
            return super().gradients(given, above, reached)
        made = tuple(torch.empty(cells.shape, dtype=cells.dtype, device=cells.device) for cells in given.operands)
        for span, block, *parts in self.blocks(dim, given, above, reached):
            for whole, part in zip(made, Operation.gradients(block, *parts), strict=True):
                whole.narrow(dim, span.start, span.stop - span.start).copy_(part)
        return made

    def free_dim(self, operands: Cells) -> int | None:
        """The longest dim that holds whole slices, where there is one and the cells are many."""
        plan = self.plan
        if any(operand.shape != plan.shape for operand in operands) or prod(plan.shape) < 2 * BLOCK_CELLS:
            return None
        kept = [dim for dim in range(len(plan.shape)) if dim not in plan.dims]
        return max(kept, key=lambda dim: plan.shape[dim], default=None)

    def blocks(self, dim: int, given: Given, above: Above, reached: Cells) -> Iterator[Any]:
        """(span, the operation, what is given, what comes from above, what is reached) of each part of that dim."""
        shape = self.plan.shape
        least = CACHE_LINES if dim == len(shape) - 1 else 1
        for span in spans(shape[dim], max(least, BLOCK_CELLS * shape[dim] // prod(shape))):
            n = span.stop - span.start
            block = OfSlices(narrowed(self.plan, dim, n))

            def own(tensor: Any, start: int = span.start, n: int = n) -> Any:
                return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.narrow(dim, start, n)

            def made(tensor: Any, start: int = span.start, n: int = n, block: OfSlices = block) -> Any:
                if tensor is None:
                    return None
                return self.kept(tensor).narrow(dim + self.batch_dim, start, n).reshape(block.plan.out_shape)

            masks = tuple(map(own, given.masks))
            if self.held is not None:
                box = [span if i == dim else slice(0, size) for i, size in enumerate(shape)]
                masks = (self.held.window(box), *masks[1:])
            part = Given(tuple(map(own, given.operands)), masks, Result(*map(made, given.result)))
            yield span, block, part, Above(*map(made, above)), tuple(map(own, reached))


def singles(tensor: Tensor) -> Tensor:
    """Cells in a dtype to differentiate in: halves as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def reduced_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """What reached the copies of a broadcast operand, added up."""
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)


# -- products of matrices -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfProduct(Operation):
    """(..., i, k) and (..., k, j): the masked product; its gradients are masked products too, and so differentiable."""

    def batched(self, n: int) -> OfProduct:
        return self

    def compute(self, operands: Cells, masks: Masks) -> Result:
        a, b = operands
        flat: list[Any] = [
            None if part is None else part.reshape(prod(part.shape[:-2]), *part.shape[-2:])
            for part in (a, masks[0], b, masks[1])
        ]
        values, valid = contractions.product(*flat)
        shape = (*a.shape[:-1], b.shape[-1])
        valid = torch.ones(shape, dtype=torch.bool, device=a.device) if valid is None else valid.reshape(shape)
        return Result(values.reshape(shape), valid)

    def pull(self, given: Given, above: Above) -> Cells:
        """A pair whose product was not reached contributes nothing, whatever inf stands in it."""
        from_above = Operand(*above)
        a, b = (
            Operand(
                operand.conj_physical().mT if operand.is_complex() else operand.mT, None if mask is None else mask.mT
            )
            for operand, mask in zip(given.operands, given.masks, strict=True)
        )
        return apply(self, from_above, b)[0].value, apply(self, a, from_above)[0].value

    def back(self, given: Given, reach: Tensor) -> Cells:
        parts = zip(given.operands, given.masks, strict=True)
        a, b = (torch.ones_like(cells, dtype=torch.float32) if mask is None else mask.float() for cells, mask in parts)
        return select(reach.float() @ b.mT, given.masks[0]), select(a.mT @ reach.float(), given.masks[1])


# -- whole tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OfWhole(Operation):
    """A function of rows whose result has a cell for each pair of them; of several tensors at once after `batched`."""

    row: Whole
    params: Mapping[str, Any]
    n_batches: int = 0

    def batched(self, n: int) -> OfWhole:
        return OfWhole(self.row, self.params, self.n_batches + 1)

    def compute(self, operands: Cells, masks: Masks) -> Result:
        data, mask = operands[0], masks[0]
        if self.n_batches:
            inner = OfWhole(self.row, self.params, self.n_batches - 1)
            each = [inner.compute((cells,), (None if mask is None else mask[i],)) for i, cells in enumerate(data)]
            return Result(torch.stack([one.values for one in each]), torch.stack([one.valid for one in each]))
        ((values, valid),) = wholes.compute(self.row, self.params, data, mask).values()
        return Result(values, torch.ones_like(values, dtype=torch.bool) if valid is None else valid)

    def pull(self, given: Given, above: Above) -> Cells:
        def one(data: Tensor, mask: Tensor, out: Tensor, g: Tensor) -> Tensor:
            made: Tensor = kernel(self.row.vjp)(self.params, select(data, mask), mask, out, g)
            return made

        for _ in range(self.n_batches):
            one = torch.func.vmap(one)
        return (one(given.operands[0], self.counting(given), given.result.values, above.g),)

    def back(self, given: Given, reach: Tensor) -> Cells:
        """A pair of rows depends on the columns where both are valid."""
        own = self.counting(given)
        if own.ndim == self.n_batches + 1:
            return (select(reach.unsqueeze(-1).expand(own.shape), own),)
        return (select((reach + reach.mT).float() @ own.float(), own),)

    def counting(self, given: Given) -> Tensor:
        """Where cells count."""
        data, mask = given.operands[0], given.masks[0]
        own = torch.ones(data.shape, dtype=torch.bool, device=data.device) if mask is None else mask.expand(data.shape)
        return own & ~data.isnan() if self.params["nan"] == "omit" else own
