"""The gradient from above that a request may bring, `grad_output`, and what a gradient may be asked of. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from maskserve.dtypes import COMPLEX, DType, boolean, f64
from maskserve.errors import DtypeError, ParameterError, ShapeError
from maskserve.payload.header import Shape, shown, shown_shape
from maskserve.payload.variables import GRAD_OUTPUT, Dims, Variable, Variables
from maskserve.told import Told


@dataclass(frozen=True, slots=True, kw_only=True)
class Above:
    """The tensor that holds the gradient from above, and its dims in the order of the result's."""

    variable: Variable
    order: Shape


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


def differentiable(variable: Variable) -> DType:
    """The dtype in which the variable's cells can change a little: whole numbers count as float64."""
    dtype = variable.info.dtype
    if dtype is boolean:
        raise DtypeError(
            f"{shown(variable.name)} is bool, and a gradient is by numbers: tensor (--tensor) picks another variable",
            parameter=shown(variable.name),
        )
    return f64 if dtype.is_integral else dtype


def above_of(variables: Variables, op: str, result: Told) -> Above | None:
    """The payload's gradient from above, which has exactly the result's shape; None where it has none."""
    dims = result.dims
    given = variables.side_inputs.get(GRAD_OUTPUT)
    if given is None:
        return None
    if given.info.dtype is boolean or (given.info.dtype in COMPLEX and result.dtype not in COMPLEX):
        what = "; where it is masked says grad_output.mask" if given.info.dtype is boolean else ""
        raise DtypeError(
            f"{GRAD_OUTPUT} is {given.info.dtype.name}, and the gradient of {result.dtype.name} cells is numbers like them"
            f"{what}",
            parameter=GRAD_OUTPUT,
        )
    if given.dims is not None and dims is not None and set(given.dims) != set(dims):
        raise ShapeError(
            f"{GRAD_OUTPUT} has the dims {listed(given.dims)}, the result of {op} has {listed(dims)}; they must "
            "be the same",
            parameter=GRAD_OUTPUT,
        )
    named = given.dims is not None and dims is not None
    order = (
        tuple(given.dims.index(dim) for dim in dims) if named and given.dims and dims else range(len(given.info.shape))
    )
    if tuple(given.info.shape[dim] for dim in order) != result.shape:
        raise ShapeError(
            f"{GRAD_OUTPUT} has shape {shown_shape(given.info.shape)}, the result of {op} "
            f"{shown_shape(result.shape)}; they must be equal",
            parameter=GRAD_OUTPUT,
        )
    return Above(variable=given, order=tuple(order))


def listed(dims: Dims) -> str:
    return ", ".join(map(shown, dims)) or "none"
