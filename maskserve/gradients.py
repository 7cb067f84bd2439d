"""The one place where an op of slices meets autograd: the engine's values forward, the row's `vjp` back.

The vjp is made of ordinary torch operations, so that its own derivative is the second one, and its transpose the
forward-mode one; the rule that carries reach back is linear, and its transpose carries reach forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from maskserve import wholes
from maskserve.backends.reference import contractions, kernel
from maskserve.backends.reference.cells import select
from maskserve.backends.reference.gradients import Slices
from maskserve.blocks import spans
from maskserve.engine import run, run_with_indices
from maskserve.masks import intersection
from maskserve.ops.rows import Reach, Reduction, Whole
from maskserve.plan import Plan, batched, narrowed, reduced_shape
from maskserve.reach import Memory, Operand, applied, as_cotangent, channel
from maskserve.tracing import differentiable_again, in_forward_mode, is_followed, primal

Masks = tuple[Tensor | None, ...]


class Result(NamedTuple):
    values: Tensor
    valid: Tensor
    indices: Tensor | None = None
    """Where the cells stood that a picking row took."""


Given = tuple[tuple[Tensor, ...], Masks, Result]
"""The operands of an operation, their masks, and what it made of them."""


class Operation(Protocol):
    """Something computed from operands, one result."""

    @property
    def is_differentiable(self) -> bool: ...

    @property
    def batch_dim(self) -> int:
        """Where the results of a batched operation have their batch."""

    def compute(self, operands: tuple[Tensor, ...], masks: Masks) -> Result:
        """The result, from plain tensors."""

    def pull(
        self, operands: tuple[Tensor, ...], masks: Masks, result: Result, g: Tensor, reached: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients by each operand, of cotangents that are 0 where not reached; linear in them."""

    def back(self, operands: tuple[Tensor, ...], masks: Masks, result: Result, reach: Tensor) -> tuple[Tensor, ...]:
        """The reach of each operand; linear too."""

    def touched(self, result: Result, reached: Tensor) -> Tensor:
        """Which results the gradients of the reached ones are computed from."""

    def batched(self, n: int) -> Operation:
        """The same on n tensors at once, along a new first dim."""


def apply(operation: Operation, *operands: Operand) -> tuple[Operand, Tensor | None]:
    """(the result, the indices of picked cells), leaving a trace for autograd and for transforms."""
    parts = zip(*[operand[:3] for operand in operands], strict=True)
    values, valid, reach, *indices = applied(Compute, operation, len(operands), *[part for kind in parts for part in kind])
    asked = values.requires_grad or (operation.is_differentiable and any(operand.reach is not None for operand in operands))
    return Operand(values, valid, reach if asked else None), indices[0] if indices else None


class Compute(torch.autograd.Function):
    """(operation, n, data of n operands, their masks, their reaches) -> (values, valid, reach[, indices])."""

    @staticmethod
    def forward(operation: Operation, n: int, *tensors: Any) -> tuple[Tensor, ...]:
        made = [part for part in operation.compute(tensors[:n], tensors[n : 2 * n]) if part is not None]
        if in_forward_mode():  # which takes no views here
            made = [part.clone() for part in made]
        values, valid, *indices = made
        return (values, valid, channel(values), *indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operation, n, *tensors = inputs
        ctx.n, ctx.memory = n, Memory()
        ctx.has_reach = [reach is not None for reach in tensors[2 * n :]]
        values, valid, reach, *indices = output
        fixed = [valid, *indices]
        if not ctx.operation.is_differentiable or not (values.is_floating_point() or values.is_complex()):
            fixed += [values, reach]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        saved = (*tensors[: 2 * n], values, valid, *indices)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None, cotangent: Tensor | None, *__: None) -> tuple[Tensor | None, ...]:
        given = unpacked(ctx)
        now = None if cotangent is None else cotangent > 0
        gate = ctx.memory.gate(now, lambda reached: ctx.operation.touched(given[2], reached))
        gate = given[2].valid if gate is None else gate
        data: tuple[Tensor | None, ...] = (None,) * ctx.n
        reached = reaches_of(ctx.operation, given, gate)
        if g is not None:
            data = gradients_of(ctx.operation, given, g, gate, reached)
        reaches: tuple[Tensor | None, ...] = (None,) * ctx.n
        if now is not None and any(ctx.has_reach):
            back = reached if gate is now else reaches_of(ctx.operation, given, now)
            reaches = tuple(as_cotangent(at) if wanted else None for at, wanted in zip(back, ctx.has_reach, strict=True))
        return (None, None, *data, *[None] * ctx.n, *reaches)

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n, operation, given = ctx.n, ctx.operation, unpacked(ctx, primal)
        values, hide, indices = given[2]
        reached = reaches_of(operation, given, hide)
        data = transposed(lambda u: pulled(operation, given, u, hide, reached), values, tangents[2 : 2 + n])
        reach = transposed(lambda u: operation.back(*given, u), channel(values), tangents[2 + 2 * n :])
        return (select(data, hide), None, reach, *[None for _ in (indices,) if indices is not None])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], operation: Operation, n: int, *tensors: Tensor | None) -> Any:
        size = info.batch_size
        front = [
            None if tensor is None
            else tensor.movedim(dim, 0) if dim is not None
            else tensor.expand(size, *tensor.shape)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]  # fmt: skip
        wider = operation.batched(size)
        made = applied(Compute, wider, n, *front)
        return made, tuple(wider.batch_dim for _ in made)


def unpacked(ctx: Any, seen: Callable[[Tensor], Tensor] = lambda saved: saved) -> Given:
    """(operands, masks, result) as they were saved."""
    saved: list[Any] = [None if part is None else seen(part) for part in ctx.saved_tensors]
    n = ctx.n
    return tuple(saved[:n]), tuple(saved[n : 2 * n]), Result(*saved[2 * n :])


def reaches_of(operation: Operation, given: Given, gate: Tensor) -> tuple[Tensor, ...]:
    """Which cells of each operand are reached from the result's cells in `gate`; bool."""
    if isinstance(operation, OfSlices) and operation.plan.labels is None and isinstance(operation.plan.row, Reduction):
        operands, masks, _ = given  # the most frequent case, without a detour over numbers
        at = operation.kept(gate).expand(operation.plan.shape)
        own = operation.counting(operands, masks)
        if len(operands) == 1:
            return (at if own is None else at & own,)
    return tuple(reach > 0 for reach in operation.back(*given, as_cotangent(gate)))


def gradients_of(
    operation: Operation, given: Given, g: Tensor, gate: Tensor, reached: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients by each operand in its dtype; where nobody differentiates again, in blocks that stay in the cache."""
    operands = given[0]
    dim = operation.free_dim(operands) if isinstance(operation, OfSlices) else None
    if not isinstance(operation, OfSlices) or dim is None or any(map(is_followed, (*operands, g))):
        parts = pulled(operation, given, g, gate, reached)
        return tuple(part.to(operand.dtype) for part, operand in zip(parts, operands, strict=True))
    made = tuple(torch.empty(operand.shape, dtype=operand.dtype, device=operand.device) for operand in operands)
    shape = operands[0].shape
    least = CACHE_LINES if dim == len(shape) - 1 else 1
    for span in spans(shape[dim], max(least, BLOCK_CELLS * shape[dim] // shape.numel())):
        for whole, part in zip(made, pulled(*operation.block(dim, span, given, g, gate, reached)), strict=True):
            whole.narrow(dim, span.start, span.stop - span.start).copy_(part)
    return made


BLOCK_CELLS = 1 << 17
"""A few float64 copies of so many cells stay in L2; shorter blocks cost more in calls than they save."""
CACHE_LINES = 128
"""So many cells of the last dim at least: a part of a row is read in whole cache lines."""


def pulled(
    operation: Operation, given: Given, g: Tensor, gate: Tensor, reached: tuple[Tensor, ...]
) -> Iterator[Tensor]:
    """The gradients by each operand, exactly 0 where not reached."""
    parts = zip(operation.pull(*given, select(g, gate), gate), reached, strict=True)
    return (select(part.expand(at.shape), at) for part, at in parts)


def transposed(pull: Any, result: Tensor, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """What tangents of the operands make of the result, by the transpose of a map that is linear."""
    if all(tangent is None for tangent in tangents):
        return torch.zeros_like(result)

    def moved(u: Tensor) -> Tensor:
        products = [(part * t.conj()).sum().real for part, t in zip(pull(u), tangents, strict=True) if t is not None]
        total: Tensor = sum(products[1:], products[0])
        return total

    change: Tensor = torch.func.grad(moved)(torch.zeros_like(result))
    return change


# -- slices -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OfSlices:
    """An op along dims; its operands are the data and, where there are any, the weights."""

    plan: Plan

    @property
    def is_differentiable(self) -> bool:
        return bool(self.plan.row.vjp)

    @property
    def batch_dim(self) -> int:
        return 0 if self.plan.labels is None else 1

    def batched(self, n: int) -> OfSlices:
        return OfSlices(batched(self.plan, n))

    def free_dim(self, operands: tuple[Tensor, ...]) -> int | None:
        """The longest dim that holds whole slices."""
        plan = self.plan
        if any(operand.shape != plan.shape for operand in operands) or prod(plan.shape) < 2 * BLOCK_CELLS:
            return None
        kept = [dim for dim in range(len(plan.shape)) if dim not in plan.dims]
        return max(kept, key=lambda dim: plan.shape[dim], default=None)

    def block(self, dim: int, span: slice, given: Given, g: Tensor, gate: Tensor, reached: tuple[Tensor, ...]) -> Any:
        operands, masks, result = given
        n = span.stop - span.start
        part = OfSlices(narrowed(self.plan, dim, n))

        def own(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, span.start, n)

        def made(tensor: Tensor) -> Tensor:
            return self.kept(tensor).narrow(dim + self.batch_dim, span.start, n).reshape(part.plan.out_shape)

        return (
            part,
            (
                tuple(map(own, operands)),
                tuple(None if mask is None else own(mask) for mask in masks),
                Result(made(result.values), made(result.valid), None if result.indices is None else made(result.indices)),
            ),
            made(g),
            made(gate),
            tuple(map(own, reached)),
        )

    def compute(self, operands: tuple[Tensor, ...], masks: Masks) -> Result:
        data, weights = operands[0], (operands[1], masks[1]) if len(operands) > 1 else None
        if self.plan.row.picks:
            return Result(*run_with_indices(self.plan, data, masks[0]))
        return Result(*run(self.plan, data, masks[0], weights))

    def pull(
        self, operands: tuple[Tensor, ...], masks: Masks, result: Result, g: Tensor, reached: Tensor
    ) -> tuple[Tensor, ...]:
        row, own = self.plan.row, self.counting(operands, masks)
        data, *weights = [select(singles(operand.expand(self.plan.shape)), own) for operand in operands]
        slices = Slices(
            data,
            own,
            self.kept(singles(result.values)),
            None if result.indices is None else self.kept(result.indices),
            weights[0] if weights else None,
        )
        vjp = row.vjp_weighted if weights and isinstance(row, Reduction) else row.vjp
        made = kernel(vjp)(self.plan, slices, self.kept(singles(g)))
        parts = made if weights else (made,)
        return tuple(
            reduced_to(part.expand(self.plan.shape), operand.shape) for part, operand in zip(parts, operands, strict=True)
        )

    def back(self, operands: tuple[Tensor, ...], masks: Masks, result: Result, reach: Tensor) -> tuple[Tensor, ...]:
        at = self.reached(self.kept(reach), result)
        at = select(at.expand(self.plan.shape), self.counting(operands, masks))
        return tuple(reduced_to(at, operand.shape) for operand in operands)

    def touched(self, result: Result, reached: Tensor) -> Tensor:
        """Of a normalization its whole slices, of a scan what comes before: softmax is a formula of its own result."""
        row = self.plan.row
        if isinstance(row, Reduction) or row.reach not in (Reach.SLICE, Reach.BEFORE):
            return reached
        return (self.reached(as_cotangent(reached), result) > 0).expand(reached.shape) & result.valid

    def reached(self, reach: Tensor, result: Result) -> Tensor:
        """Which cells of their slices the results depend on."""
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
                assert result.indices is not None
                return reach.new_zeros(plan.shape).scatter_add(plan.dims[0], result.indices, reach)
            case Reach.OWN:
                return reach

    def counting(self, operands: tuple[Tensor, ...], masks: Masks) -> Tensor | None:
        """Where cells count: mask, weights' mask, and no NaN where those are omitted."""
        omits = self.plan.params.get("nan") == "omit"
        own = intersection([*masks, *[~operand.isnan() for operand in operands if omits]])
        return None if own is None else own.expand(self.plan.shape)

    def kept(self, tensor: Tensor) -> Tensor:
        """A result with its reduced dims, of size 1."""
        plan = self.plan
        if not isinstance(plan.row, Reduction):
            return tensor
        labels = () if plan.labels is None else (len(plan.labels),)
        return tensor.reshape(labels + reduced_shape(plan.shape, plan.dims, keepdim=True))


# -- products of matrices -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OfProduct:
    """(..., i, k) and (..., k, j): the masked product; its gradients are masked products too, and so differentiable."""

    is_differentiable = True
    batch_dim = 0

    def batched(self, n: int) -> OfProduct:
        return self

    def compute(self, operands: tuple[Tensor, ...], masks: Masks) -> Result:
        a, b = operands
        flat: list[Any] = [
            None if part is None else part.reshape(-1, *part.shape[-2:]) for part in (a, masks[0], b, masks[1])
        ]
        values, valid = contractions.product(*flat)
        shape = (*a.shape[:-1], b.shape[-1])
        valid = torch.ones(shape, dtype=torch.bool, device=a.device) if valid is None else valid.reshape(shape)
        return Result(values.reshape(shape), valid)

    def pull(
        self, operands: tuple[Tensor, ...], masks: Masks, result: Result, g: Tensor, reached: Tensor
    ) -> tuple[Tensor, ...]:
        """A pair whose product was not reached contributes nothing, whatever inf stands in it."""
        above = Operand(g, reached)
        a, b = (
            Operand(operand.conj_physical().mT if operand.is_complex() else operand.mT, None if mask is None else mask.mT)
            for operand, mask in zip(operands, masks, strict=True)
        )
        return apply(self, above, b)[0].value, apply(self, a, above)[0].value

    def back(self, operands: tuple[Tensor, ...], masks: Masks, result: Result, reach: Tensor) -> tuple[Tensor, ...]:
        parts = zip(operands, masks, strict=True)
        a, b = (torch.ones_like(cells, dtype=torch.float32) if mask is None else mask.float() for cells, mask in parts)
        return select(reach.float() @ b.mT, masks[0]), select(a.mT @ reach.float(), masks[1])

    def touched(self, result: Result, reached: Tensor) -> Tensor:
        return reached


# -- whole tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OfWhole:
    """A function of rows whose result has a cell for each pair of them; of several tensors at once after `batched`."""

    row: Whole
    params: Mapping[str, Any]
    n_batches: int = 0

    is_differentiable = True
    batch_dim = 0

    def batched(self, n: int) -> OfWhole:
        return OfWhole(self.row, self.params, self.n_batches + 1)

    def compute(self, operands: tuple[Tensor, ...], masks: Masks) -> Result:
        data, mask = operands[0], masks[0]
        if self.n_batches:
            inner = OfWhole(self.row, self.params, self.n_batches - 1)
            each = [inner.compute((cells,), (None if mask is None else mask[i],)) for i, cells in enumerate(data)]
            return Result(torch.stack([one.values for one in each]), torch.stack([one.valid for one in each]))
        ((values, valid),) = wholes.compute(self.row, self.params, data, mask).values()
        return Result(values, torch.ones_like(values, dtype=torch.bool) if valid is None else valid)

    def pull(
        self, operands: tuple[Tensor, ...], masks: Masks, result: Result, g: Tensor, reached: Tensor
    ) -> tuple[Tensor, ...]:
        def one(data: Tensor, mask: Tensor, out: Tensor, above: Tensor) -> Tensor:
            made: Tensor = kernel(self.row.vjp)(self.params, select(data, mask), mask, out, above)
            return made

        for _ in range(self.n_batches):
            one = torch.func.vmap(one)
        return (one(operands[0], self.counting(operands[0], masks[0]), result.values, g),)

    def back(self, operands: tuple[Tensor, ...], masks: Masks, result: Result, reach: Tensor) -> tuple[Tensor, ...]:
        """A pair of rows depends on the columns where both are valid."""
        own = self.counting(operands[0], masks[0])
        if own.ndim == self.n_batches + 1:
            return (select(reach.unsqueeze(-1).expand(own.shape), own),)
        return (select((reach + reach.mT).float() @ own.float(), own),)

    def touched(self, result: Result, reached: Tensor) -> Tensor:
        return reached

    def counting(self, data: Tensor, mask: Tensor | None) -> Tensor:
        own = torch.ones(data.shape, dtype=torch.bool, device=data.device) if mask is None else mask.expand(data.shape)
        return own & ~data.isnan() if self.params["nan"] == "omit" else own


def singles(tensor: Tensor) -> Tensor:
    """Cells in a dtype to differentiate in: halves as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def reduced_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """What reached the copies of a broadcast operand, added up."""
    return tensor if tensor.shape == shape else tensor.sum_to_size(shape)
