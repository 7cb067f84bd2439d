"""The one place where the engine's results meet autograd: values by the engine there, by formulas of torch back.

An operation's `pull` is made of ordinary torch operations and is linear in what comes from above, so that its own
derivative is the second one, and its transpose the forward-mode one; `back`, which carries reach back, is linear too,
and its transpose carries reach forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select
from maskserve.compiling import uncompiled
from maskserve.gates import as_cotangent, is_reached, kept
from maskserve.reach import Memory, Operand, applied, channel
from maskserve.tracing import differentiable_again, in_forward_mode, primal

Cells = tuple[Tensor, ...]
Masks = tuple[Tensor | None, ...]


class Result(NamedTuple):
    """What an operation makes of plain tensors."""

    values: Tensor
    valid: Tensor
    aside: Tensor | None = None
    """Where the cells stood that a picking row took; what else a way back reads that is no cell."""


class Given(NamedTuple):
    """The operands of an operation, their masks, and what it made of them."""

    operands: Cells
    masks: Masks
    result: Result


class Above(NamedTuple):
    """What comes back to a result: its cotangent, and which of its cells count; the others are 0 here."""

    g: Tensor
    gate: Tensor


class Operation(ABC):
    """Something computed from operands, with one result."""

    @property
    def is_differentiable(self) -> bool:
        return True

    @abstractmethod
    def compute(self, operands: Cells, masks: Masks) -> Result:
        """The result, from plain tensors."""

    @abstractmethod
    def pull(self, given: Given, above: Above) -> Cells:
        """The gradients by each operand, of its shape; what they say of cells that are not reached is not looked at."""

    @abstractmethod
    def back(self, given: Given, reach: Tensor) -> Cells:
        """The reach of each operand, 0 where it is masked."""

    @abstractmethod
    def batched(self, n: int) -> Operation:
        """The same on n tensors at once, along a new first dim."""

    @property
    def batch_dim(self) -> int:
        """Where the results of a batched operation have their batch."""
        return 0

    def touched(self, given: Given, reached: Tensor) -> Tensor:
        """Which results the gradients of the reached ones are computed from."""
        return reached

    def reached(self, given: Given, gate: Tensor) -> Cells:
        """Which cells of each operand are reached from the result's cells in `gate`; bool."""
        return tuple(is_reached(reach) for reach in self.back(given, as_cotangent(gate)))

    def swept(self, given: Given, above: Above, *, wants_reach: bool) -> tuple[Tensor, Tensor | None] | None:
        """The gradient by the only operand and its cotangent of reach at once; None where it takes formulas."""
        return None

    def gradients(self, given: Given, above: Above, reached: Cells) -> Cells:
        """The gradients by each operand, exactly 0 where not reached."""
        parts = self.pull(given, Above(select(above.g, above.gate), above.gate))
        return tuple(kept(part.expand(at.shape), at) for part, at in zip(parts, reached, strict=True))


def apply(operation: Operation, *operands: Operand) -> tuple[Operand, Tensor | None]:
    """(the result, what was put aside for the way back), leaving a trace for autograd and for transforms."""
    parts = zip(*[operand[:3] for operand in operands], strict=True)
    values, valid, reach, *aside = applied(
        Compute, operation, len(operands), *[part for kind in parts for part in kind]
    )
    asked = values.requires_grad or (
        operation.is_differentiable and any(operand.reach is not None for operand in operands)
    )
    return Operand(values, valid, reach if asked else None), aside[0] if aside else None


@uncompiled
class Compute(torch.autograd.Function):
    """(operation, n, data of n operands, their masks, their reaches) -> (values, valid, reach[, aside])."""

    @staticmethod
    def forward(operation: Operation, n: int, *tensors: Any) -> Cells:
        made = [part for part in operation.compute(tensors[:n], tensors[n : 2 * n]) if part is not None]
        if in_forward_mode():  # which takes no views here
            made = [part.clone() for part in made]
        values, valid, *aside = made
        return (values, valid, channel(values), *aside)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Cells) -> None:
        ctx.operation, n, *tensors = inputs
        ctx.n, ctx.memory = n, Memory()
        ctx.has_reach = [reach is not None for reach in tensors[2 * n :]]
        values, valid, reach, *aside = output
        fixed = [valid, *aside]
        if not ctx.operation.is_differentiable or not (values.is_floating_point() or values.is_complex()):
            fixed += [values, reach]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        saved = (*tensors[: 2 * n], values, valid, *aside)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None, cotangent: Tensor | None, *__: None) -> tuple[Tensor | None, ...]:
        operation, given = ctx.operation, unpacked(ctx)
        now = None if cotangent is None else is_reached(cotangent)
        wanted = now is not None and any(ctx.has_reach)
        gate = ctx.memory.gate(now, lambda reached: operation.touched(given, reached))
        gate = given.result.valid if gate is None else gate
        if g is not None and (gate is now or not wanted):
            swept = operation.swept(given, Above(g, gate), wants_reach=wanted)
            if swept is not None:
                return (None, None, swept[0], None, swept[1])
        reached = operation.reached(given, gate)
        data: tuple[Tensor | None, ...] = (None,) * ctx.n
        if g is not None:
            found = operation.gradients(given, Above(g, gate), reached)
            data = tuple(part.to(operand.dtype) for part, operand in zip(found, given.operands, strict=True))
        reaches: tuple[Tensor | None, ...] = (None,) * ctx.n
        if wanted:
            assert now is not None
            back = reached if gate is now else operation.reached(given, now)
            reaches = tuple(
                as_cotangent(at) if wanted else None for at, wanted in zip(back, ctx.has_reach, strict=True)
            )
        return (None, None, *data, *[None] * ctx.n, *reaches)

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n, operation, given = ctx.n, ctx.operation, unpacked(ctx, primal)
        values, valid, aside = given.result
        reached = operation.reached(given, valid)
        data = transposed(lambda u: operation.gradients(given, Above(u, valid), reached), values, tangents[2 : 2 + n])
        reach = transposed(lambda u: operation.back(given, u), channel(values), tangents[2 + 2 * n :])
        return (select(data, valid), None, reach, *[None for _ in (aside,) if aside is not None])

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
    """What was saved."""
    saved: list[Any] = [None if part is None else seen(part) for part in ctx.saved_tensors]
    n = ctx.n
    return Given(tuple(saved[:n]), tuple(saved[n : 2 * n]), Result(*saved[2 * n :]))


def transposed(pull: Callable[[Tensor], Cells], result: Tensor, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """What tangents of the operands make of the result, by the transpose of a map that is linear."""
    if all(tangent is None for tangent in tangents):
        return torch.zeros_like(result)

    def moved(u: Tensor) -> Tensor:
        products = [(part * t.conj()).sum().real for part, t in zip(pull(u), tangents, strict=True) if t is not None]
        total: Tensor = sum(products[1:], products[0])
        return total

    change: Tensor = torch.func.grad(moved)(torch.zeros_like(result))
    return change
