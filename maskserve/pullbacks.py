"""What the verb grad adds to a request: a gradient from above, pulled back through what is computed to each input.

The gradient from above is the side input `grad_output`; without it, it is ones. The way back is autograd's, as in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from maskserve.autograd import grad_by
from maskserve.backends.reference.cells import canonical
from maskserve.dtypes import COMPLEX, DType, boolean
from maskserve.errors import DtypeError, ParameterError, ShapeError
from maskserve.functions import Pair, traced
from maskserve.payload.header import Shape, shown, shown_shape
from maskserve.payload.variables import GRAD_OUTPUT, Dims, Variable, Variables
from maskserve.plan import Plan
from maskserve.reach import Operand, channel
from maskserve.tensor import MaskedTensor

VALUE = "value"
"""What an answer calls the result that the gradients are of."""
Masked = tuple[Tensor, Tensor | None]
Leaves = Mapping[str, MaskedTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Above:
    """The tensor that holds the gradient from above, and its dims in the order of the result's."""

    variable: Variable
    order: Shape


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

    @property
    def tally(self) -> Tally:
        n_cells, n_reached = self.data.numel(), int(self.reached.count_nonzero())
        nonzero = int((self.data != 0).count_nonzero()) if self.data.itemsize > 1 else int(self.data.float().count_nonzero())
        masked = 0 if self.valid is None else n_cells - int(self.valid.expand(self.data.shape).count_nonzero())
        return Tally(nonzero=nonzero, zero=n_reached - nonzero, masked=masked, unreached=n_cells - n_reached - masked)


# -- before it runs -----------------------------------------------------------------------------------------------


def refuse_several(variables: Variables) -> None:
    """Raise where more than one variable would be called `value`."""
    if len(variables) > 1:
        names = [shown(variable.name) for variable in variables]
        raise ParameterError(
            f"grad gives the gradient of one result, and the payload has {len(names)} variables: {', '.join(names[:8])}"
            f"{', …' if len(names) > 8 else ''}; tensor (--tensor) picks one",
            parameter="tensor",
            allowed=names,
        )


def refuse_steps(variable: Variable, dtype: DType) -> None:
    """Raise where cells cannot change a little."""
    if not (dtype.is_float or dtype in COMPLEX):
        raise DtypeError(
            f"{shown(variable.name)} is {dtype.name}, and a gradient is by floats: write its cells as floats first (in JSON "
            'as 1.0 or with "dtype": "F64", in torch with .double())',
            parameter=shown(variable.name),
        )


def above_of(variables: Variables, planned: Plan, dims: Dims | None) -> Above | None:
    """The payload's gradient from above, which has exactly the result's shape; None where it has none."""
    given = variables.side_inputs.get(GRAD_OUTPUT)
    if given is None:
        return None
    if given.info.dtype is boolean or (given.info.dtype in COMPLEX and planned.result not in COMPLEX):
        what = "; where it is masked says grad_output.mask" if given.info.dtype is boolean else ""
        raise DtypeError(
            f"{GRAD_OUTPUT} is {given.info.dtype.name}, and the gradient of {planned.result.name} cells is numbers like them"
            f"{what}",
            parameter=GRAD_OUTPUT,
        )
    if given.dims is not None and dims is not None and set(given.dims) != set(dims):
        raise ShapeError(
            f"{GRAD_OUTPUT} has the dims {listed(given.dims)}, the result of {planned.row.name} has {listed(dims)}; they must "
            "be the same",
            parameter=GRAD_OUTPUT,
        )
    named = given.dims is not None and dims is not None
    order = tuple(given.dims.index(dim) for dim in dims) if named and given.dims and dims else range(len(given.info.shape))
    if tuple(given.info.shape[dim] for dim in order) != planned.out_shape:
        raise ShapeError(
            f"{GRAD_OUTPUT} has shape {shown_shape(given.info.shape)}, the result of {planned.row.name} "
            f"{shown_shape(planned.out_shape)}; they must be equal",
            parameter=GRAD_OUTPUT,
        )
    return Above(variable=given, order=tuple(order))


def listed(dims: Dims) -> str:
    return ", ".join(map(shown, dims)) or "none"


# -- the way back -------------------------------------------------------------------------------------------------


def of_plan(planned: Plan, name: str, *sides: Masked) -> Callable[[Leaves], MaskedTensor]:
    """The plan as a function of the input `name`; side inputs are constants."""

    def compute(leaves: Leaves) -> MaskedTensor:
        leaf = leaves[name]
        made = traced(planned, [Operand(leaf._data, leaf._mask, leaf._reach), *(Operand(*side) for side in sides)])
        return made.values if isinstance(made, Pair) else made

    return compute


def pulled_back(
    function: Callable[[Leaves], MaskedTensor], inputs: Mapping[str, Masked], above: Masked | None
) -> tuple[Masked, dict[str, Gradient]]:
    """(what the function gives, the gradient by each input)."""
    with torch.enable_grad():
        leaves = {name: leaf(*parts) for name, parts in inputs.items()}
        value = function(leaves)
        seed = torch.ones_like(value._data) if above is None else MaskedTensor._of(*above)
        found = grad_by([value], [*leaves.values()], [seed], allow_unused=True, materialize_grads=True)
    gradients = dict(gradients_of(leaves, found))
    return (value._data.detach(), value._full_mask()), gradients


def gradients_of(leaves: Leaves, found: tuple[MaskedTensor, ...]) -> Iterator[tuple[str, Gradient]]:
    for (name, source), gradient in zip(leaves.items(), found, strict=True):
        data = gradient._data if gradient._data.itemsize == 1 else canonical(gradient._data)  # torch knows no NaN of fp8
        yield name, Gradient(data=data, reached=gradient._full_mask(), valid=source._mask)


def leaf(data: Tensor, mask: Tensor | None) -> MaskedTensor:
    """Cells that a gradient is asked for, where they lie."""
    followed = data.detach().requires_grad_()
    return MaskedTensor._of(followed, mask, channel(followed, leaf=True))
