"""The public functions, one a row, with torch's names and signatures: `maskserve.mean(tensor, dim=0)`.

A function is a few generated lines (as dataclasses and attrs do it), so that its signature is real and a call costs no
more than a dict look-up and a cached plan.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from maskserve import cellwise, contracting, gradients, masking, masks, operations, sparse_ops, wholes
from maskserve.backends.reference.cells import select
from maskserve.backends.reference.moves import Masked
from maskserve.blocks import counting
from maskserve.compact import Compact, as_bools
from maskserve.compiling import uncompiled
from maskserve.engine import form_of, run_held, run_held_with_indices
from maskserve.errors import DtypeError, ParameterError, ShapeError
from maskserve.foreign import from_foreign
from maskserve.making import as_masked_tensor, operand, tensor_of
from maskserve.moving import moved
from maskserve.ops import OPS
from maskserve.ops.parameters import NAN, REQUIRED, Parameter, Type
from maskserve.ops.rows import (
    Cells,
    Contraction,
    Elementwise,
    Formula,
    Layer,
    Loss,
    Masking,
    Move,
    Reduction,
    Row,
    Whole,
)
from maskserve.params import accept, names_of, resolve
from maskserve.plan import Plan, SlicedRow, plan, with_masked_slices
from maskserve.reach import Operand, narrowed
from maskserve.sparse import SparseTensor, refused
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of
from maskserve.tracing import in_transform, is_followed

Function = Callable[..., Any]

_SYNONYMS = {"dim": "axis", "keepdim": "keepdims"}
"""numpy's words, which torch takes too."""


class Pair(NamedTuple):
    """What torch's functions with a dim give: the cells, and where they stand in their slices."""

    values: MaskedTensor
    indices: MaskedTensor


def sliced(
    row: SlicedRow, tensor: Any, mask: Any, given: tuple[tuple[str, Any], ...], weights: Any = None
) -> MaskedTensor | Pair:
    """An op along dims of one tensor."""
    if (sparse := sparse_ops.as_sparse(tensor, mask)) is not None:
        return sliced_sparse(row, sparse, given, weights)
    cells = unwrap(row, tensor, mask, compact=True)
    data = cells.value
    device = "cpu" if data.device.type == "cpu" else str(data.device)
    operands = [cells]
    if weights is not None:
        operands.append(side_input(row, weights, data))
        given = (*given, ("weights", dtype_of(operands[1].value)))
    planned = plan(row, given, tuple(data.shape), dtype_of(data), device)
    if any(is_followed(operand.value) for operand in operands):
        return traced(planned, operands)
    return computed(planned, operands)


def sliced_sparse(
    row: SlicedRow, tensor: SparseTensor, given: tuple[tuple[str, Any], ...], weights: Any
) -> MaskedTensor | Pair:
    """The same of a sparse tensor, whose weights are taken where it stores cells."""
    side = None
    if weights is not None:
        side = sparse_ops.side_input(row, weights, tensor)
        given = (*given, ("weights", dtype_of(side._data)))
    device = "cpu" if tensor.device.type == "cpu" else str(tensor.device)
    planned = plan(row, given, tuple(tensor.shape), dtype_of(tensor._cells._data), device)
    values, indices = sparse_ops.sliced(planned, tensor, side, traced)
    if indices is None or not row.indices or planned.params["dim"] is None:
        return values
    return Pair(values, indices)


def computed(planned: Plan, operands: Sequence[Operand]) -> MaskedTensor | Pair:
    """The engine's result."""
    data, own, *_ = operands[0]
    if planned.row.indices and planned.params["dim"] is not None:
        values, valid, indices = run_held_with_indices(planned, data, own)
        own = valid.clone() if isinstance(valid, Tensor) else valid
        return Pair(MaskedTensor._of(values, valid), MaskedTensor._of(indices, own))
    return MaskedTensor._of(*run_held(planned, data, own, operands[1][:2] if len(operands) > 1 else None))


def traced(planned: Plan, operands: Sequence[Operand]) -> MaskedTensor | Pair:
    """The same, with a trace for autograd; a row without a derivative leaves none."""
    row = planned.row
    if not row.vjp and not in_transform():
        return computed(planned, [operand._replace(value=operand.value.detach()) for operand in operands])
    fill = planned.params.get("empty", "mask")
    if isinstance(fill, int | float):  # a number that depends on no cell is no part of the derivative
        planned = with_masked_slices(planned)
    data, held = operands[0], operands[0].mask
    if not isinstance(held, Compact) or in_transform():
        data, held = data._replace(mask=as_bools(held)), None
    else:
        data = data._replace(mask=None)
    result, indices = gradients.apply(operations.OfSlices(planned, held), data, *operands[1:])
    form = form_of(planned, held)
    made = MaskedTensor._of(result.value, result.mask if form is None else form, result.reach)
    if isinstance(fill, int | float):
        return cast(MaskedTensor, public("fill")(made, fill))
    if indices is not None and row.indices and planned.params["dim"] is not None:
        return Pair(made, MaskedTensor._of(indices, made.get_mask() if form is None else form))
    return made


def whole(row: Whole, tensor: Any, mask: Any, given: dict[str, Any]) -> Any:
    """A function of the whole tensor: one MaskedTensor, or several by name."""
    cells = unwrap(row, tensor, mask)
    dtype = dtype_of(cells.value)
    accept(row, dtype)
    params = resolve(row, given)
    if row.vjp and is_followed(cells.value):
        return MaskedTensor._of(*gradients.apply(operations.OfWhole(row, params), cells)[0][:3])
    parts = wholes.compute(row, params, cells.value.detach(), cells.mask)
    made = {name: MaskedTensor._of(*part) for name, part in parts.items() if params.get(f"return_{name}", True)}
    return several_of(row.name, made) if len(made) > 1 else next(iter(made.values()))


def several_of(name: str, made: dict[str, MaskedTensor]) -> Any:
    """A named tuple that pickle takes for the call that makes it: its class is in no module."""
    bare = namedtuple(name, made)  # type: ignore[misc]  # the names are those of the row
    return type(name, (bare,), {"__slots__": (), "__reduce__": lambda self: (several_of, (name, self._asdict()))})(
        **made
    )


def side_input(row: Row, given: Any, data: Tensor) -> Operand:
    """A tensor that is used and not computed on, with data's ndim, as its mask and reach."""
    values, valid, reach, _ = unwrap(row, given, None)
    grown = [1] * (data.ndim - values.ndim) + list(values.shape)
    if len(grown) != data.ndim or any(m not in (1, n) for m, n in zip(grown, data.shape, strict=True)):
        raise ShapeError(
            f"{row.name}: weights have shape {tuple(values.shape)}, the data {tuple(data.shape)}; weights must broadcast to "
            "the data: sizes equal or 1, counted from the last dim"
        )
    return Operand(
        values.reshape(grown),
        None if valid is None else valid.expand(values.shape).reshape(grown),
        None if reach is None else reach.reshape(grown),
    )


def several(value: Any) -> Any:
    """Lists, ranges and plain tensors of numbers as tuples, so that a plan can be cached by them."""
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, list | range) else value


def masked(row: Masking, tensor: Any, mask: Any, given: tuple[tuple[str, Any], ...]) -> MaskedTensor:
    """The same cells under a new mask."""
    cells = unwrap(row, tensor, mask)
    data, own = cells.value.detach(), cells.mask
    dtype_of(data)
    tensors = {p.name for p in row.callable if p.type is Type.TENSOR}
    others = {name: other_mask(data, name, value) for name, value in given if name in tensors and value is not None}
    params = {name: value for name, value in given if name not in tensors and value is not None}
    values, valid = masking.compute(row, data, own, params, others)
    if is_followed(cells.value):
        both = valid if own is None else valid & own
        return MaskedTensor._of(select(cells.value, valid), valid, narrowed(cells.reach, both))
    return MaskedTensor._of(values, valid)


def other_mask(data: Tensor, name: str, value: Any) -> Tensor | None:
    """A mask that the caller brings: bool, true and itself valid."""
    value = tensor_of(value)
    if isinstance(value, MaskedTensor) and value.dtype is torch.bool:
        value = value._data & value._full_mask()
    return masks.checked(data, value, name)


def elementwise(
    row: Elementwise, operands: tuple[Any, ...], policy: str | None, nan: str | None, given: dict[str, Any]
) -> MaskedTensor:
    """An elementwise op of tensors and numbers."""
    operands = tuple(map(from_foreign, operands))
    if any(map(sparse_ops.is_sparse, operands)):

        def of_cells(cells: Sequence[Any]) -> MaskedTensor:
            return elementwise(row, tuple(cells), policy, nan, given)

        return sparse_ops.elementwise(row, operands, masks.parse_policy(policy), of_cells)
    last = len(operands) - row.n_optional
    unwrapped = [unwrapped_operand(row, operand, optional=i >= last) for i, operand in enumerate(operands)]
    return MaskedTensor._of(*cellwise.compute(row, unwrapped, given, masks.parse_policy(policy), nan)[:3])


def unwrapped_operand(row: Elementwise, operand: Any, *, optional: bool) -> Operand:
    if isinstance(operand, MaskedTensor | Tensor):
        return unwrap(row, operand, None, compact=True)
    if not isinstance(operand, int | float | complex) and not (operand is None and optional):
        raise DtypeError(f"{row.name} takes tensors and numbers, not a {type(operand).__name__}")
    return Operand(operand)


def contraction(row: Contraction, operands: Sequence[Any], given: dict[str, Any]) -> MaskedTensor:
    """Sums of products of cells; an optional operand joins them cell by cell."""
    params = resolve(row, given)
    if row.takes_any_number and len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = operands[0]
    n = len(operands) - row.n_optional
    operands = tuple(map(from_foreign, operands))
    if any(map(sparse_ops.is_sparse, operands)):
        sums = sparse_ops.contraction(row, operands[:n], params, batch_product(params))
        for side in (unwrap(row, operand, None) for operand in operands[n:] if operand is not None):
            added = with_added(row, Masked(sums._data, sums._mask, sums._reach), Masked(*side[:3]))
            sums = MaskedTensor._of(*added)
        return sums
    unwrapped = [unwrap(row, operand, None) for i, operand in enumerate(operands) if i < n or operand is not None]
    cells = [Masked(o.value, counting(row, o.value, o.mask, params["nan"]), o.reach) for o in unwrapped]
    cells, dtype = contracting.computable(row, cells)
    made = contracting.compute(row, cells[:n], params)
    for other in cells[n:]:
        made = with_added(row, made, other)
    return MaskedTensor._of(made.data.to(dtype), made.mask, made.reach)


def batch_product(params: dict[str, Any]) -> Callable[[Any, Any], MaskedTensor]:
    """The masked product of batches of matrices, with the NaN policy of a contraction."""
    return partial(public("bmm"), nan=params["nan"])


def with_added(row: Contraction, made: Masked, other: Masked) -> Masked:
    """The sums and an optional operand, by the elementwise op that the row names."""
    added = OPS[row.added]
    assert isinstance(added, Elementwise)
    contracting.check_joins(row, made.data.shape, other.data.shape)
    sides = [c.data if c.mask is None and c.reach is None else MaskedTensor._of(*c) for c in (made, other)]
    joined = elementwise(added, tuple(sides), None, None, {})
    return Masked(joined._data, joined._mask, joined._reach)


def formula(row: Formula, expr: str, variables: dict[str, Any]) -> MaskedTensor:
    """An expression on tensors by name."""
    tensors = {name: operand(given) for name, given in variables.items()}
    made: MaskedTensor = implementation(row)(expr, tensors)
    return as_masked_tensor(made) if any(made is tensor for tensor in tensors.values()) else made


def loss(row: Loss, operands: tuple[Any, ...], params: dict[str, Any]) -> MaskedTensor:
    made: MaskedTensor = implementation(row)(row, (operand(operands[0]), *operands[1:]), params)
    return made


@cache
def implementation(row: Formula | Loss | Layer) -> Function:
    """What computes a row that is made of other rows: it calls these functions.

    A policy is for the ops of an expression. A layer or a loss has a mask rule of its own, to which those inside hold.
    """
    module, _, name = row.function.partition(":")
    found: Function = getattr(import_module(module), name)
    return found if isinstance(row, Formula) else masks.by_intersection(found)


def unwrap(row: Row, tensor: Any, mask: Any, *, compact: bool = False) -> Operand:
    """The parts of a MaskedTensor, or of a plain tensor with `mask=`; its mask may be a compact one where that will do."""
    if not isinstance(tensor, MaskedTensor):
        tensor = tensor_of(tensor)
    if (sparse := sparse_ops.as_sparse(tensor, mask)) is not None:
        raise refused(row.name, sparse.shape)
    if is_masked := isinstance(tensor, MaskedTensor):
        if mask is not None:
            tensor = as_masked_tensor(tensor, mask)
        data, own, reach = tensor._data, tensor._held if compact else tensor._mask, tensor._reach
    else:
        data, own, reach = tensor, masks.checked(tensor, mask), None
    if data.layout is not torch.strided or data.is_meta:
        raise DtypeError(f"{row.name} takes strided tensors with cells, not {data.layout} on {data.device}")
    if data.is_neg() or data.is_conj():
        data = data.resolve_neg().resolve_conj()
    return Operand(data, own, reach, is_masked)


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
    if row.torch_words:
        return in_torchs_words(row, function)
    if not isinstance(row, Elementwise) or not row.method:
        return function

    def reordered(*args: Any, **kwargs: Any) -> Any:
        named = {row.operands[place]: arg for place, arg in zip(row.method, args, strict=False)}
        return function(**named, **kwargs)

    reordered.__doc__ = function.__doc__
    return reordered


def in_torchs_words(row: Row, function: Function) -> Function:
    """The function, for callers who use torch's names of parameters and of values as well as ours."""

    def ours(value: Any) -> Any:
        return row.torch_values.get(value, value) if isinstance(value, str) else value

    def called(*args: Any, **kwargs: Any) -> Any:
        said = {row.torch_words.get(name, name): ours(value) for name, value in kwargs.items()}
        return function(*map(ours, args), **said)

    called.__doc__ = function.__doc__
    return called


def build(row: Row) -> Function:
    """The public function of a row."""
    lines = next((text for kind, text in _TEMPLATES.items() if isinstance(row, kind)), _SLICED)
    source = lines.format(
        name=row.name,
        signature=signature(row),
        masked="    if mask is not None: input = _masked(input, mask)\n" if takes_mask(row) else "",
        renames="".join(
            f"    if {other} is not None: {name} = _one({name!r}, {name}, {other!r}, {other})\n"
            for name, other in _SYNONYMS.items()
            if any(p.name == name for p in row.parameters)
        ),
        tuples="".join(_TUPLE.format(name=p.name) for p in row.callable if p.type in _MANY),
        other=_OTHER.format(name=row.binary) if isinstance(row, Reduction) and row.binary else "",
        given=given(row),
        tensors="".join(f"({p.name!r}, {p.name}), " for p in row.callable if p.type is Type.TENSOR),
        sides="".join(f", {p.name}" for p in row.callable if p.type is Type.TENSOR),
        operands="".join(f"{o}, " for o in getattr(row, "operands", ())),
        cells=f"{first_of(row)}, " if isinstance(row, Move | Layer) and first_of(row) else "",
        nan="nan" if isinstance(row, Elementwise) and has_nan_policy(row) else None,
    )
    names: dict[str, Any] = {
        "_row": row, "_sliced": sliced, "_elementwise": elementwise, "_moved": moved, "_whole": whole,
        "_contraction": contraction, "_formula": formula, "_loss": loss, "_layer": implementation,
        "_masking": masked, "_one": one, "_masked": as_masked_tensor, "_many": (list, range, Tensor), "_several": several,
        "_tensors": (Tensor, MaskedTensor), "_public": public,
    }  # fmt: skip
    exec(compile(source, f"<maskserve.{row.name}>", "exec"), names)  # our own text, from our own table
    function: Function = names[row.name]
    function.__doc__ = docstring(row)
    function.__module__ = "maskserve"
    return uncompiled(function)


_SLICED = """\
def {name}({signature}):
{other}{renames}{tuples}    return _sliced(_row, input, mask, ({given}){sides})
"""
_TUPLE = "    if {name}.__class__ in _many: {name} = _several({name})\n"
_OTHER = "    if isinstance(dim, _tensors): return _public({name!r})(input, dim)\n"
_MANY = (Type.DIMS, Type.NUMBERS, Type.RANGE)
"""Parameters that may be given as lists."""

_ELEMENTWISE = """\
def {name}({signature}):
{masked}    return _elementwise(_row, ({operands}), policy, {nan}, {{k: v for k, v in ({given}) if v is not None}})
"""
_MASKING = """\
def {name}({signature}):
{tuples}    return _masking(_row, input, mask, ({given}{tensors}))
"""
_MOVE = """\
def {name}({signature}):
    return _moved(_row, ({cells}*args,), kwargs)
"""
_WHOLE = """\
def {name}({signature}):
{tuples}    return _whole(_row, input, mask, {{k: v for k, v in ({given}) if v is not None}})
"""
_CONTRACTION = """\
def {name}({signature}):
    return _contraction(_row, ({operands}), {{k: v for k, v in ({given}) if v is not None}})
"""
_LOSS = """\
def {name}({signature}):
{tuples}    return _loss(_row, ({operands}), dict(({given}{tensors})))
"""
_LAYER = """\
def {name}({signature}):
    return _layer(_row)({cells}*args, **kwargs)
"""
_FORMULA = """\
def {name}({signature}):
    return _formula(_row, {given}, variables)
"""
_TEMPLATES: dict[type[Row], str] = {
    Elementwise: _ELEMENTWISE, Masking: _MASKING, Move: _MOVE, Whole: _WHOLE, Contraction: _CONTRACTION,
    Formula: _FORMULA, Loss: _LOSS, Layer: _LAYER,
}  # fmt: skip


def has_nan_policy(row: Elementwise) -> bool:
    """Whether `nan=` is the policy: nan_to_num has a parameter of that name."""
    return "nan" not in names_of(row)


def takes_mask(row: Row) -> bool:
    """Whether a plain tensor may bring its mask along: there is one tensor that it can belong to."""
    return not isinstance(row, Elementwise | Move | Contraction | Formula | Loss | Layer) or (
        isinstance(row, Elementwise) and len(row.operands) == 1
    )


def given(row: Row) -> str:
    if isinstance(row, Formula):
        return ", ".join(p.name for p in row.callable)
    return "".join(f"({p.name!r}, {p.name}), " for p in row.callable if p.type is not Type.TENSOR)


def signature(row: Row, annotate: bool = False) -> str:
    """The parameters of the function, as text; with types for the stub."""
    return ", ".join(_signature(row, annotate))


def _signature(row: Row, annotate: bool) -> Iterator[str]:
    def typed(name: str, kind: str, default: str | None = None) -> str:
        text = f"{name}: {kind}" if annotate else name
        equals = " = " if annotate else "="
        return text if default is None else f"{text}{equals}{default}"

    if isinstance(row, Layer):
        yield from (typed("input", "Operand"), typed("*args", "Any"), typed("**kwargs", "Any"))
        return
    if isinstance(row, Move):
        yield from ([typed(first_of(row), _CELLS[row.cells])] if first_of(row) else [])
        yield from (typed("*args", "Any"), typed("**kwargs", "Any"))
        return
    if isinstance(row, Formula):
        yield from (typed(p.name, _HINTS[p.type]) for p in row.callable)
        yield from ("/", typed("**variables", "Operand"))
        return
    if isinstance(row, Contraction) and row.takes_any_number:
        yield from (parameter_text(p, typed) for p in row.callable if not p.keyword_only)
        yield typed(row.operands[0], "Operand")
        yield from (parameter_text(p, typed) for p in row.callable if p.keyword_only)
        return
    operands = row.operands if isinstance(row, Elementwise | Contraction | Loss) else ("input",)
    last = len(operands) - (row.n_optional if isinstance(row, Elementwise | Contraction) else 0)
    yield from (typed(operand, "Operand") for operand in operands[:last])
    yield from (typed(operand, "Operand | None", "None") for operand in operands[last:])
    yield from (parameter_text(p, typed) for p in row.callable if not p.keyword_only)
    yield "*"
    yield from (parameter_text(p, typed) for p in row.callable if p.keyword_only)
    if isinstance(row, Elementwise | Whole | Contraction | Loss):
        if takes_mask(row):
            yield typed("mask", "Tensor | None", "None")
        if isinstance(row, Elementwise):
            yield typed("policy", "str | None", "None")
            if has_nan_policy(row):
                yield typed("nan", "str | None", "None")
        return
    yield typed("mask", "Tensor | None", "None")
    names = {p.name: p for p in row.callable}
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


_CELLS = {Cells.FIRST: "Operand", Cells.TWO: "Operand", Cells.LIST: "Sequence[Operand]"}


def first_of(row: Move | Layer) -> str:
    """torch's name of the first argument of a move or a layer; "" where every positional argument is a tensor."""
    if isinstance(row, Layer):
        return "input"
    return {Cells.LIST: "tensors", Cells.ALL: ""}.get(row.cells, "input")


_HINTS = {
    Type.DIMS: "int | Sequence[int]",
    Type.DIM: "int",
    Type.FLAG: "bool",
    Type.COUNT: "int",
    Type.NUMBER: "float",
    Type.REAL: "float",
    Type.CELL: "float",
    Type.NUMBERS: "float | Sequence[float]",
    Type.RANGE: "Sequence[float]",
    Type.MEETING: "int | Sequence[int | Sequence[int]]",
    Type.EQUATION: "str",
    Type.WHOLE: "int",
    Type.SIZES: "int | Sequence[int]",
    Type.EXPRESSION: "str",
    Type.TENSOR: "Operand",
    Type.DTYPE: "torch.dtype | str",
    Type.CHOICE: "str",
    Type.CHOICE_OR_NUMBER: "str | float",
}


def docstring(row: Row) -> str:
    """Summary, parameters and accepted dtypes, from the row."""
    lines = [f"{row.summary[0].upper()}{row.summary[1:]}.", ""]
    lines += [f"{p.name}: {p.help}{' (' + ', '.join(p.choices) + ')' if p.choices else ''}" for p in row.callable]
    lines += [f"{other}: numpy's word for {name}" for name, other in _SYNONYMS.items() if name in names_of(row)]
    if takes_mask(row):
        lines += ["mask: bool, True = valid, of as many dims as a plain tensor; a MaskedTensor brings its own"]
    if isinstance(row, Elementwise):
        lines += ["policy: what different masks give: intersect (default), strict or union"]
        lines += [f"nan: {NAN.help} (propagate, omit, raise)"] if has_nan_policy(row) else []
    lines += (
        ["Takes torch's own arguments; any dtype."]
        if isinstance(row, Move)
        else ["Takes torch's own arguments."]
        if isinstance(row, Layer)
        else [f"Accepts {', '.join(sorted(dtype.name for dtype in row.accepts))}."]
    )
    return "\n".join(lines)
