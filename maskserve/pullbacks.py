"""A gradient from above, pulled back through what a request computes to each of its inputs: autograd's way, as in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskserve.autograd import grad_by
from maskserve.backends.reference.cells import canonical
from maskserve.compact import Mask
from maskserve.engine import hidden_as_zero
from maskserve.functions import Pair, traced
from maskserve.plan import Plan
from maskserve.reach import Operand
from maskserve.tensor import MaskedTensor

Masked = tuple[Tensor, Mask | None]
Leaves = Mapping[str, MaskedTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of the cells of an input: each is counted once."""

    nonzero: int
    zero: int
    masked: int
    """Masked in the input, and so in its gradient."""
    unreached: int
    """Valid in the input; no path of valid cells leads from them to what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradient by one input, specified where it was reached; `valid` is the input's own mask."""

    data: Tensor
    reached: Tensor
    valid: Tensor | None

    def at_home(self) -> Gradient:
        """The same in the CPU's memory."""
        valid = None if self.valid is None else self.valid.cpu()
        return Gradient(data=self.data.cpu(), reached=self.reached.cpu(), valid=valid)

    @property
    def tally(self) -> Tally:
        n_cells, n_reached = self.data.numel(), int(self.reached.count_nonzero())
        nonzero = (
            int((self.data != 0).count_nonzero()) if self.data.itemsize > 1 else int(self.data.float().count_nonzero())
        )
        masked = 0 if self.valid is None else n_cells - int(self.valid.expand(self.data.shape).count_nonzero())
        return Tally(nonzero=nonzero, zero=n_reached - nonzero, masked=masked, unreached=n_cells - n_reached - masked)


# -- the way back -------------------------------------------------------------------------------------------------


def of_plan(planned: Plan, name: str, *sides: Masked) -> Callable[[Leaves], MaskedTensor]:
    """The plan as a function of the input `name`; side inputs are constants."""

    def compute(leaves: Leaves) -> MaskedTensor:
        leaf = leaves[name]
        made = traced(planned, [Operand(leaf._data, leaf._held, leaf._reach), *(Operand(*side) for side in sides)])
        return made.values if isinstance(made, Pair) else made

    return compute


def pulled_back(
    function: Callable[[Leaves], MaskedTensor], inputs: Mapping[str, Masked], above: Masked | None
) -> tuple[tuple[Tensor, Tensor], dict[str, Gradient]]:
    """(what the function gives, the gradient by each input)."""
    with torch.enable_grad():
        leaves = {name: MaskedTensor._of(data.detach(), mask).requires_grad_() for name, (data, mask) in inputs.items()}
        value = function(leaves)
        seed = torch.ones_like(value._data) if above is None else MaskedTensor._of(*above)
        found = grad_by([value], [*leaves.values()], [seed], allow_unused=True, materialize_grads=True)
    gradients = dict(gradients_of(leaves, found))
    mask = value._full_mask()
    return (hidden_as_zero(value._data.detach(), mask), mask), gradients


def gradients_of(leaves: Leaves, found: tuple[MaskedTensor, ...]) -> Iterator[tuple[str, Gradient]]:
    for (name, source), gradient in zip(leaves.items(), found, strict=True):
        data = (
            gradient._data if gradient._data.itemsize == 1 else canonical(gradient._data)
        )  # torch knows no NaN of fp8
        yield name, Gradient(data=data, reached=gradient._full_mask(), valid=source._mask)
