"""The public functions, one a row, with torch's names and signatures: `maskserve.mean(tensor, dim=0)`.

A function is a few generated lines (as dataclasses and attrs do it), so that its signature is real and a call costs no
more than a dict look-up and a cached plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskserve import cellwise, masks
from maskserve.dtypes import BY_TORCH, DType
from maskserve.engine import run
from maskserve.errors import DtypeError, GradientError
from maskserve.ops import OPS
from maskserve.ops.rows import REQUIRED, Elementwise, Move, Parameter, Row, Type
from maskserve.plan import SlicedRow, plan
from maskserve.tensor import MaskedTensor

Function = Callable[..., Any]

_DTYPES: dict[torch.dtype, DType] = {getattr(torch, dtype.torch): dtype for dtype in BY_TORCH.values()}
_SYNONYMS = {"dim": "axis", "keepdim": "keepdims"}
"""numpy's words, which torch takes too."""


def sliced(row: SlicedRow, tensor: Any, mask: Any, given: tuple[tuple[str, Any], ...]) -> MaskedTensor:
    """A reduction, normalization or scan of one tensor."""
    data, own = unwrap(row, tensor, mask)
    device = "cpu" if data.device.type == "cpu" else str(data.device)
    return MaskedTensor._of(*run(plan(row, given, tuple(data.shape), dtype_of(data), device), data, own))


def elementwise(row: Elementwise, operands: tuple[Any, ...], policy: str | None, given: dict[str, Any]) -> MaskedTensor:
    """An elementwise op of tensors and numbers."""
    unwrapped = [
        (*unwrap(row, operand, None), isinstance(operand, MaskedTensor))
        if isinstance(operand, MaskedTensor | Tensor)
        else (operand, None, False)
        for operand in operands
    ]
    return MaskedTensor._of(*cellwise.compute(row, unwrapped, given, masks.parse_policy(policy)))


def moved(row: Move, tensor: MaskedTensor, *args: Any, **kwargs: Any) -> MaskedTensor:
    """Data and mask by the same way; the result is a view where torch's is."""
    move = getattr(torch.Tensor, row.name)
    mask = tensor._mask
    return tensor._view_of(
        move(tensor._data, *args, **kwargs),
        None if mask is None else move(mask.expand(tensor.shape), *args, **kwargs),
    )


def unwrap(row: Row, tensor: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
    """(data, mask) of a MaskedTensor, or of a plain tensor with `mask=`."""
    if isinstance(tensor, MaskedTensor):
        data, own = tensor._data, tensor._mask
        if mask is not None:
            own = masks.intersection([own, masks.checked(data, mask)])
    else:
        data = tensor if isinstance(tensor, Tensor) else torch.as_tensor(tensor)
        own = masks.checked(data, mask)
    if data.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            f"{row.name}: the tensor requires grad, and this version computes no gradients: "
            "call it under torch.no_grad(), or on tensor.detach()"
        )
    return data, own


def dtype_of(data: Tensor) -> DType:
    found = _DTYPES.get(data.dtype)
    if found is None:
        raise DtypeError(f"{data.dtype} is not supported: give one of {', '.join(BY_TORCH)}", parameter="dtype")
    return found


# -- generated functions ------------------------------------------------------------------------------------------


@cache
def public(name: str) -> Function:
    """The public function of the row `name`, built when it is first asked for."""
    return build(OPS[name])


def build(row: Row) -> Function:
    """The public function of a row."""
    lines = _ELEMENTWISE if isinstance(row, Elementwise) else _MOVE if isinstance(row, Move) else _SLICED
    source = lines.format(
        name=row.name,
        signature=signature(row),
        renames="".join(
            f"    if {other} is not None: {name} = {other}\n"
            for name, other in _SYNONYMS.items()
            if any(p.name == name for p in row.parameters)
        ),
        given=given(row),
        operands="".join(f"{o}, " for o in getattr(row, "operands", ())),
    )
    names: dict[str, Any] = {"_row": row, "_sliced": sliced, "_elementwise": elementwise, "_moved": moved}
    exec(compile(source, f"<maskserve.{row.name}>", "exec"), names)  # our own text, from our own table
    function: Function = names[row.name]
    function.__doc__ = docstring(row)
    function.__module__ = "maskserve"
    return function


_SLICED = """\
def {name}({signature}):
{renames}    if dim.__class__ is list: dim = tuple(dim)
    return _sliced(_row, input, mask, ({given}))
"""
_ELEMENTWISE = """\
def {name}({signature}):
    return _elementwise(_row, ({operands}), policy, {{k: v for k, v in ({given}) if v is not None}})
"""
_MOVE = """\
def {name}({signature}):
    return _moved(_row, input, *args, **kwargs)
"""


def given(row: Row) -> str:
    return "".join(f"({p.name!r}, {p.name}), " for p in row.parameters)


def signature(row: Row, annotate: bool = False) -> str:
    """The parameters of the function, as text; with types for the stub."""
    return ", ".join(_signature(row, annotate))


def _signature(row: Row, annotate: bool) -> Iterator[str]:
    def typed(name: str, kind: str, default: str | None = None) -> str:
        text = f"{name}: {kind}" if annotate else name
        equals = " = " if annotate else "="
        return text if default is None else f"{text}{equals}{default}"

    if isinstance(row, Move):
        yield from (typed("input", "MaskedTensor"), typed("*args", "Any"), typed("**kwargs", "Any"))
        return
    operands = row.operands if isinstance(row, Elementwise) else ("input",)
    yield from (typed(operand, "Operand") for operand in operands)
    yield from (parameter_text(p, typed) for p in row.parameters if not p.keyword_only)
    yield "*"
    yield from (parameter_text(p, typed) for p in row.parameters if p.keyword_only)
    if isinstance(row, Elementwise):
        yield typed("policy", "str | None", "None")
        return
    yield typed("mask", "Tensor | None", "None")
    names = {p.name: p for p in row.parameters}
    yield from (
        typed(other, f"{_HINTS[names[name].type]} | None", "None") for name, other in _SYNONYMS.items() if name in names
    )


def parameter_text(parameter: Parameter, typed: Callable[..., str]) -> str:
    hint = _HINTS[parameter.type]
    if parameter.default is REQUIRED:
        # axis= may stand for it, so that its absence is found by the plan, with a better message than Python's
        return typed(parameter.name, f"{hint} | None", "None")
    optional = " | None" if parameter.default is None else ""
    return typed(parameter.name, f"{hint}{optional}", repr(parameter.default))


_HINTS = {
    Type.DIMS: "int | Sequence[int]",
    Type.DIM: "int",
    Type.FLAG: "bool",
    Type.COUNT: "int",
    Type.NUMBER: "float",
    Type.DTYPE: "torch.dtype | str",
    Type.CHOICE: "str",
    Type.CHOICE_OR_NUMBER: "str | float",
}


def docstring(row: Row) -> str:
    """Summary, parameters and accepted dtypes, from the row."""
    lines = [f"{row.summary[0].upper()}{row.summary[1:]}.", ""]
    lines += [f"{p.name}: {p.help}" for p in row.parameters]
    if not isinstance(row, Elementwise | Move):
        lines += ["mask: bool, True = valid, of as many dims as a plain tensor; a MaskedTensor brings its own"]
    if isinstance(row, Elementwise):
        lines += ["policy: what different masks give: intersect (default), strict or union"]
    lines += [f"Accepts {', '.join(sorted(dtype.name for dtype in row.accepts))}."]
    return "\n".join(lines)
