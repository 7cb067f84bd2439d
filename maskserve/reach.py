"""The reach channel: how a gradient knows its mask.

A MaskedTensor that is followed by autograd carries beside its data a second tensor of the data's shape that takes no
memory, its *reach*. Nothing is computed from it; its cotangent says which cells the gradient has reached, and flows
back by the op's mask rule while the data's cotangent flows back by its derivative. Where the derivative is unbounded
(0 * inf is NaN), what was not reached is set to 0 before anything is summed.

Three invariants hold the rest up: a cotangent of data is exactly 0 at cells that were not reached; only valid cells are
reached; the cotangent of a reach is at least 0, and only `> 0` is read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select
from maskserve.compiling import uncompiled
from maskserve.gates import DTYPE, as_cotangent, is_reached, kept, kept_where_reached
from maskserve.tracing import differentiable_again, in_forward_mode, in_transform


class Operand(NamedTuple):
    """What an op is given: cells, where they are valid (None: everywhere), and their reach (None: nobody asks for it)."""

    value: Any
    """A tensor; in elementwise ops also a number, or None where it is optional."""
    mask: Any = None
    """Bool, or compact where an op takes that too; None: everywhere."""
    reach: Tensor | None = None
    is_masked: bool = False
    """Whether it is a MaskedTensor: plain tensors and numbers are valid everywhere."""


def channel(data: Tensor, *, leaf: bool = False) -> Tensor:
    """The reach of new cells."""
    if in_forward_mode():  # tangents have the layout of their tensor, and must be written
        return torch.zeros(data.shape, dtype=DTYPE, device=data.device)
    reach = torch.zeros((), dtype=DTYPE, device=data.device).expand(data.shape)
    return reach.detach().requires_grad_() if leaf else reach


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """What the function gives, with its trace."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # what torch's own apply does then, less 60 us of looking up the signature of forward
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]  # its base is in C


class Memory:
    """What an op's gradients have reached so far, for a second derivative.

    Its cotangents come by data alone, since a gradient's dependence on the op's inputs carries no reach; what they may
    touch is what the first derivatives touched.
    """

    __slots__ = ("reached",)

    def __init__(self) -> None:
        self.reached: Tensor | None = None

    def gate(self, now: Tensor | None, touched: Callable[[Tensor], Tensor] = lambda reached: reached) -> Tensor | None:
        """Where a cotangent of data counts in this walk, given what is reached now; None: nothing is known.

        `touched(reached)` are the results that the gradients of the reached ones are computed from.
        """
        if now is None:
            return self.reached
        before = self.reached
        if torch.is_grad_enabled():  # else no graph of this walk is kept, so no second one will ask
            self.reached = touched(now) if before is None else touched(now) | before
        return now if before is None else now | before


@uncompiled
class Through(torch.autograd.Function):
    """Operands of one shape into an op of the same shape, and its result's reach.

    (gated, n, live masks, operands, their reaches) -> (operands..., reach). `live[i]` is where the result depends on
    operand i (None: everywhere); an operand whose history nobody masked has no reach (None).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gated: bool, n: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        operands = [operand for operand in tensors[n : 2 * n] if operand is not None]
        copied = in_forward_mode()  # the tangent of a broadcast operand is written cell by cell
        return (*[x.clone() if copied else x.view_as(x) for x in operands], channel(operands[0]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.gated, ctx.n, *tensors = inputs
        ctx.has_reach = [reach is not None for reach in tensors[2 * ctx.n :]]
        ctx.save_for_backward(*tensors[: ctx.n])
        ctx.save_for_forward(*tensors[: ctx.n])
        ctx.shape, ctx.device = output[-1].shape, output[-1].device
        ctx.dtypes = [operand.dtype for operand in output[:-1]]
        ctx.memory = Memory()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *data, reach = cotangents
        if ctx.gated and reach is not None and ctx.memory.reached is None and not torch.is_grad_enabled():
            data = [None if g is None else kept_where_reached(g, reach) for g in data]
        elif ctx.gated:
            gate = ctx.memory.gate(None if reach is None else is_reached(reach))
            data = [None if g is None else kept(g, gate) for g in data]
        back = [
            None if reach is None or not wanted else kept(reach, live)
            for wanted, live in zip(ctx.has_reach, ctx.saved_tensors, strict=True)
        ]
        return (None, None, *[None] * ctx.n, *data, *back)

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tangents = tangents[2 + ctx.n :]
        moved = [
            torch.zeros(ctx.shape, dtype=dtype, device=ctx.device) if t is None else t.view_as(t)
            for t, dtype in zip(tangents[: ctx.n], ctx.dtypes, strict=True)
        ]
        reaches = zip(tangents[ctx.n :], ctx.saved_tensors, strict=True)
        back = [select(t, live) for t, live in reaches if t is not None]
        reach = sum_of(back)
        return (*moved, torch.zeros(ctx.shape, dtype=DTYPE, device=ctx.device) if reach is None else reach)


def narrowed(reach: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The reach of cells of which only those in `mask` stay valid."""
    if reach is None or mask is None or not (torch.is_grad_enabled() or in_transform()):
        return reach
    # an op of one operand that is live in the mask; no cells are wanted of it, so the reach stands for them
    narrow: Tensor = applied(Through, False, 1, mask.expand(reach.shape), reach, reach)[1]
    return narrow


def sum_of(tensors: Sequence[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return total


@uncompiled
class Exit(torch.autograd.Function):
    """Data on its way to a plain tensor: there every valid cell counts as reached, and masked cells have no say."""

    generate_vmap_rule = True

    @staticmethod
    def forward(data: Tensor, mask: Tensor, reach: Tensor | None) -> Tensor:
        return data.clone() if in_forward_mode() else data.view_as(data)  # the tangent is no view of the one given

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, reach = inputs
        ctx.has_reach = reach is not None
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return kept(g, mask), None, as_cotangent(mask) if ctx.has_reach else None

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, data: Tensor, mask: None, reach: Tensor | None) -> Tensor:
        return select(data, ctx.saved_tensors[0])


@uncompiled
class Cross(torch.autograd.Function):
    """The reach of a gradient, from that of its input: a second derivative is specified where both first ones are."""

    generate_vmap_rule = True

    @staticmethod
    def forward(reached: Tensor, reach: Tensor) -> Tensor:
        return channel(reach)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, Cross.crossed(ctx, cotangent)

    @staticmethod
    @differentiable_again
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return Cross.crossed(ctx, tangent)

    @staticmethod
    def crossed(ctx: Any, reach: Tensor) -> Tensor:
        (reached,) = ctx.saved_tensors
        return as_cotangent(reached & (reach > 0).any())
