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
from maskserve.errors import DtypeError, GradientError, ParameterError, ShapeError
from maskserve.making import as_masked_tensor, tensor_of
from maskserve.ops import OPS
from maskserve.ops.rows import REQUIRED, Elementwise, Move, Parameter, Row, Type
from maskserve.plan import SlicedRow, names_of, plan
from maskserve.tensor import MaskedTensor, from_foreign

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
    unwrapped = [unwrapped_operand(row, operand) for operand in operands]
    return MaskedTensor._of(*cellwise.compute(row, unwrapped, given, masks.parse_policy(policy)))


def unwrapped_operand(row: Elementwise, operand: Any) -> cellwise.Operand:
    operand = from_foreign(operand)
    if isinstance(operand, MaskedTensor | Tensor):
        return (*unwrap(row, operand, None), isinstance(operand, MaskedTensor))
    if not isinstance(operand, int | float):
        raise DtypeError(f"{row.name} takes tensors and numbers, not a {type(operand).__name__}")
    return operand, None, False


def moved(row: Move, tensor: MaskedTensor, *args: Any, **kwargs: Any) -> MaskedTensor:
    """Data and mask by the same way; the result is a view where torch's is."""
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        raise DtypeError(f"{row.name} as another dtype would take the mask's bytes for something else; use .to(dtype)")
    if not isinstance(tensor, MaskedTensor):
        tensor = as_masked_tensor(tensor)
    move = getattr(torch.Tensor, row.name)
    try:
        data = move(tensor._data, *args, **kwargs)
        mask = None if tensor._mask is None else move_mask(move, tensor._full_mask(), args, kwargs)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ShapeError(f"{row.name}: {str(error).splitlines()[0]}") from error
    return tensor._view_of(data, mask)


def move_mask(move: Function, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The mask moved; a copy of it where its strides allow no view and the data's do."""
    try:
        moved: Tensor = move(mask, *args, **kwargs)
    except RuntimeError:
        moved = move(mask.contiguous(), *args, **kwargs)
    return moved


def unwrap(row: Row, tensor: Any, mask: Any) -> tuple[Tensor, Tensor | None]:
    """(data, mask) of a MaskedTensor, or of a plain tensor with `mask=`."""
    if not isinstance(tensor, MaskedTensor):
        tensor = tensor_of(tensor)
    if isinstance(tensor, MaskedTensor):
        data, own = tensor._data, tensor._mask
        if mask is not None:
            own = masks.intersection([own, masks.checked(data, mask)])
    else:
        data, own = tensor, masks.checked(tensor, mask)
    if data.layout is not torch.strided or data.is_meta:
        raise DtypeError(f"{row.name} takes strided tensors with cells, not {data.layout} on {data.device}")
    if data.is_neg():
        data = data.resolve_neg()
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


def one(name: str, value: Any, other: str, synonym: Any) -> Any:
    """numpy's word in place of torch's; not both."""
    if value is not None and value is not False:
        raise ParameterError(f"{name}={value} and {other}={synonym} say the same thing; give one", parameter=name)
    return synonym


# -- generated functions ------------------------------------------------------------------------------------------


@cache
def public(name: str) -> Function:
    """The public function of the row `name`, built when it is first asked for."""
    return build(OPS[name])


@cache
def method(name: str) -> Function:
    """The row's function as a method of MaskedTensor and of torch.Tensor."""
    row, function = OPS[name], public(name)
    if not isinstance(row, Elementwise) or not row.method:
        return function

    def reordered(*args: Any, **kwargs: Any) -> Any:
        named = {row.operands[place]: arg for place, arg in zip(row.method, args, strict=False)}
        return function(**named, **kwargs)

    reordered.__doc__ = function.__doc__
    return reordered


def build(row: Row) -> Function:
    """The public function of a row."""
    lines = _ELEMENTWISE if isinstance(row, Elementwise) else _MOVE if isinstance(row, Move) else _SLICED
    source = lines.format(
        name=row.name,
        signature=signature(row),
        masked="    if mask is not None: input = _masked(input, mask)\n" if takes_mask(row) else "",
        renames="".join(
            f"    if {other} is not None: {name} = _one({name!r}, {name}, {other!r}, {other})\n"
            for name, other in _SYNONYMS.items()
            if any(p.name == name for p in row.parameters)
        ),
        given=given(row),
        operands="".join(f"{o}, " for o in getattr(row, "operands", ())),
    )
    names: dict[str, Any] = {
        "_row": row, "_sliced": sliced, "_elementwise": elementwise, "_moved": moved, "_one": one, "_masked": as_masked_tensor
    }  # fmt: skip
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
{masked}    return _elementwise(_row, ({operands}), policy, {{k: v for k, v in ({given}) if v is not None}})
"""
_MOVE = """\
def {name}({signature}):
    return _moved(_row, input, *args, **kwargs)
"""


def takes_mask(row: Row) -> bool:
    """Whether a plain tensor may bring its mask along: there is one tensor that it can belong to."""
    return not isinstance(row, Elementwise | Move) or (isinstance(row, Elementwise) and len(row.operands) == 1)


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
        if takes_mask(row):
            yield typed("mask", "Tensor | None", "None")
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
    lines += [f"{p.name}: {p.help}{' (' + ', '.join(p.choices) + ')' if p.choices else ''}" for p in row.parameters]
    lines += [f"{other}: numpy's word for {name}" for name, other in _SYNONYMS.items() if name in names_of(row)]
    if takes_mask(row):
        lines += ["mask: bool, True = valid, of as many dims as a plain tensor; a MaskedTensor brings its own"]
    if isinstance(row, Elementwise):
        lines += ["policy: what different masks give: intersect (default), strict or union"]
    lines += [f"Accepts {', '.join(sorted(dtype.name for dtype in row.accepts))}."]
    return "\n".join(lines)
