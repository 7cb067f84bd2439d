"""Elementwise rows: torch computes the values, the row's mask rule their validity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.blocks import counting
from maskserve.compact import Compact, as_bools, common
from maskserve.dtypes import INFINITIES, WIDE, DType, i64, u64
from maskserve.errors import DataError, DtypeError, MaskserveError, ParameterError, ShapeError
from maskserve.gates import hidden, kept
from maskserve.health import is_of_device
from maskserve.masks import Policy, check_equal, intersection, union
from maskserve.ops.parameters import NAN, Type
from maskserve.ops.rows import OTHER, Beyond, Elementwise, MaskRule
from maskserve.params import accept, check, names_of
from maskserve.reach import Operand, Through, applied
from maskserve.torch_dtypes import DTYPES, dtype_of
from maskserve.tracing import is_followed, same_memory

HOMES = (torch, torch.special, torch.nn.functional)

_LOWEST = -(2**63)


@cache
def function(row: Elementwise) -> Callable[..., Tensor]:
    """torch's function of the row's name, or the reference's where torch's is silently wrong."""
    found: Callable[..., Tensor] = (
        kernel(row.function) if row.function else next(getattr(h, row.name) for h in HOMES if hasattr(h, row.name))
    )
    return found


def compute(
    row: Elementwise, operands: Sequence[Operand], given: Mapping[str, Any], policy: Policy, nan: str | None = None
) -> Operand:
    """The row of its operands, broadcast; hidden cells are 0."""
    kinds = [dtype_of(operand.value) for operand in operands if isinstance(operand.value, Tensor)]
    for kind in kinds:
        if kind not in row.accepts:
            refuse(row, kind)
    if row.rule is MaskRule.CHOSEN:
        check_condition(row, operands[0].value)
    if any(kind in WIDE or kind is u64 for kind in kinds):
        operands = readable(row, operands, kinds)
    if row.beyond is not Beyond.TORCHS and any(type(operand.value) is int for operand in operands):
        operands = in_range(row, operands)
    if nan is not None:
        operands = nan_checked(row, operands, nan)
    params = resolve(row, given) if row.parameters else {}
    tensors = [operand.value for operand in operands if isinstance(operand.value, Tensor)]
    shape = broadcast_shape(row, tensors)
    held: Compact | None = None
    if any(isinstance(operand.mask, Compact) for operand in operands):
        held, operands = without_compact(row, operands, shape, policy)
    masks = [None if mask is None else padded(mask, len(shape)) for _, mask, *_ in operands]
    if policy is Policy.STRICT:
        check_equal(row.name, [m for m, operand in zip(masks, operands, strict=True) if operand.is_masked], shape)
    reach = None
    try:
        if any(map(is_followed, tensors)):
            operands, reach = followed(row, operands, masks, shape, policy)
        values, mask = flow(row, operands, masks, policy)
        data = called(row, values, params)
        if policy is Policy.UNION:
            data = alone(row, operands, data)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, MaskserveError):
            raise
        raise refused(row, error, kinds) from error
    if data.dtype not in DTYPES:
        raise DtypeError(f"{row.name} gives {data.dtype}, which is not supported; convert to torch.float32 first")
    if not (data.is_floating_point() or data.is_complex()):
        reach = None
    if held is not None:
        return Operand(
            hidden(data, held, in_place=not any(same_memory(data, tensor) for tensor in tensors)), held, reach
        )
    if mask is None:
        return Operand(data.clone() if any(same_memory(data, tensor) for tensor in tensors) else data, None, reach)
    if any(same_memory(mask, m) for m in masks if m is not None):
        mask = mask.clone()  # a later assignment into the result is none into the operand
    full = mask if mask.shape == data.shape else mask.expand(data.shape)
    return Operand(kept(data, full) if data.is_contiguous() else select(data, full), mask, reach)


def without_compact(
    row: Elementwise, operands: Sequence[Operand], shape: torch.Size, policy: Policy
) -> tuple[Compact | None, Sequence[Operand]]:
    """The compact mask of the result, where it has one, and the operands with masks of bools, or none where it says all."""
    held: Compact | None = None
    if policy is Policy.INTERSECT and row.rule is MaskRule.ALL:
        held = common([operand.mask for operand in operands], shape)
    is_asked = held is None or row.unsafe or row.unsafe_floats
    return held, [operand._replace(mask=as_bools(operand.mask) if is_asked else None) for operand in operands]


def followed(
    row: Elementwise, operands: Sequence[Operand], masks: Sequence[Tensor | None], shape: torch.Size, policy: Policy
) -> tuple[Sequence[Operand], Tensor | None]:
    """The operands on their way through the gate, at the result's shape, and the result's reach."""
    if not row.is_differentiable:
        return [without_history(operand) for operand in operands], None
    fixed = [name in row.no_gradient_by for name in row.operands]
    operands = [without_history(o) if is_fixed else o for is_fixed, o in zip(fixed, operands, strict=True)]
    places = [i for i, operand in enumerate(operands) if not fixed[i] and has_derivative(operand.value)]
    reaches = [None if (own := operands[i].reach) is None else spread(own, shape) for i in places]
    if not places or (row.is_linear and not any(reach is not None for reach in reaches)):
        return operands, None
    live = live_cells(row, operands, masks, shape, policy)
    gate = [live[i] for i in places]
    if len(places) == 2 and all(part is None for part in gate):
        a, b = (operands[place] for place in places)
        if a.value is b.value and a.reach is b.reach:  # x * x
            gate, reaches = gate[:1], reaches[:1]
    cells = [spread(operands[i].value, shape) for i in places[: len(gate)]]
    *values, reach = applied(Through, not row.is_linear, len(gate), *gate, *cells, *reaches)
    made = list(operands)
    for place, i in enumerate(places):
        made[i] = operands[i]._replace(value=values[min(place, len(values) - 1)])
    return made, reach


def spread(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor if tensor.shape == shape else tensor.expand(shape)


def without_history(operand: Operand) -> Operand:
    return operand._replace(value=operand.value.detach(), reach=None) if isinstance(operand.value, Tensor) else operand


def has_derivative(value: Any) -> bool:
    """Whether a gradient by it can be asked for."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and is_followed(value)


def live_cells(
    row: Elementwise, operands: Sequence[Operand], masks: Sequence[Tensor | None], shape: torch.Size, policy: Policy
) -> Sequence[Tensor | None]:
    """Where the result depends on each operand; None: wherever it is valid."""
    if row.rule is MaskRule.CHOSEN:
        condition = operands[0].value.expand(shape)
        return None, condition, ~condition
    if policy is Policy.UNION:
        return [None if mask is None else mask.expand(shape) for mask in masks]
    return [None] * len(operands)


def called(row: Elementwise, values: list[Any], params: Mapping[str, Any]) -> Tensor:
    """torch's values. A number that torch takes in a later place only becomes a tensor of no dims, in the others' dtype."""
    if row.tensors_only or not isinstance(values[0], Tensor):
        values = with_tensors(row, values)
    if not row.as_stored and any(isinstance(v, Tensor) and v.dtype is torch.uint64 for v in values):
        data = function(row)(*[v.view(torch.int64) ^ _LOWEST for v in values], **params)
        return (data ^ _LOWEST).view(torch.uint64) if data.dtype is torch.int64 else data
    return function(row)(*values, **params)


def with_tensors(row: Elementwise, values: list[Any]) -> list[Any]:
    """The values with the numbers among them as tensors, or the first one only."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [torch.as_tensor(value) for value in values]
    device, made = tensors[0].device, list(values)
    for i, value in enumerate(values if row.tensors_only else values[:1]):
        if isinstance(value, int | float | complex) and row.rule is MaskRule.ALL:
            dtypes = [torch.result_type(tensor, value) for tensor in tensors]
            made[i] = torch.scalar_tensor(value, dtype=reduce(torch.promote_types, dtypes), device=device)
    return made


# -- what comes in ------------------------------------------------------------------------------------------------


def refuse(row: Elementwise, kind: DType) -> None:
    if kind is u64:
        raise DtypeError(
            f"{row.name} does not take u64, which torch has no arithmetic for: convert first, to torch.int64 where all "
            "cells are below 2**63, or to torch.float64, which rounds beyond 2**53",
            parameter="dtype",
        )
    accept(row, kind)


def refused(row: Elementwise, error: Exception, kinds: Sequence[DType]) -> MaskserveError:
    """torch's error as ours; a device's own error is none of the op's, and goes on as it is."""
    if is_of_device(error):
        raise error
    said = str(error).splitlines()[0]
    if "not implemented for" in said:
        names = " and ".join(dict.fromkeys(kind.name for kind in kinds))
        return DtypeError(f"{row.name} of {names} alone is not defined; convert to a float first", parameter="dtype")
    if "without overflow" in said:
        names = " and ".join(dict.fromkeys(kind.name for kind in kinds))
        return DataError(f"{row.name}: a number does not fit {names}; convert the data to a wider dtype first")
    return DataError(f"{row.name}: {said.removeprefix(row.name).lstrip(': ')}")


def check_condition(row: Elementwise, condition: Any) -> None:
    """A condition says yes or no; of u8 torch takes it too."""
    if isinstance(condition, Tensor) and condition.dtype not in (torch.bool, torch.uint8):
        word = row.operands[0]
        raise DtypeError(
            f"{row.name}: {word} is {dtype_of(condition).name}; it must be bool, as comparisons are: {word} != 0",
            parameter=word,
        )


def readable(row: Elementwise, operands: Sequence[Operand], kinds: Sequence[DType]) -> Sequence[Operand]:
    """Cells of storage types in the type that torch computes in; u64 beside u64 alone, which is compared as it is."""
    branches = kinds[1:] if row.rule is MaskRule.CHOSEN else kinds
    if u64 in branches:
        first = 1 if row.rule is MaskRule.CHOSEN else 0
        return [*operands[:first], *[o._replace(value=as_u64(row, o.value)) for o in operands[first:]]]
    if row.as_stored and len(set(branches)) == 1:
        return operands
    return [
        operand._replace(value=operand.value.to(getattr(torch, WIDE[dtype_of(operand.value)].torch)))
        if isinstance(operand.value, Tensor) and dtype_of(operand.value) in WIDE
        else operand
        for operand in operands
    ]


def as_u64(row: Elementwise, value: Any) -> Tensor:
    """A number or tensor that u64 holds, as u64."""
    if isinstance(value, Tensor) and dtype_of(value).name in ("u64", "u32", "u16", "u8", "bool"):
        return value.to(torch.uint64)
    if isinstance(value, int) and u64.holds(value):
        return torch.tensor(value, dtype=torch.uint64)
    what = f"a tensor of {dtype_of(value).name}" if isinstance(value, Tensor) else repr(value)
    raise DtypeError(
        f"{row.name} of u64 and {what} has no type that holds both: give unsigned whole numbers below 2**64, "
        "or convert both to torch.int64 or torch.float64 first",
        parameter="dtype",
    )


def in_range(row: Elementwise, operands: Sequence[Operand]) -> Sequence[Operand]:
    """The operands where their integer dtype holds each int among them; torch would wrap it without a word."""
    tensors = [operand.value for operand in operands if isinstance(operand.value, Tensor)]
    if not tensors or any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return operands
    dtype = reduce(torch.promote_types, [torch.result_type(tensor, 1) for tensor in tensors])
    kind = DTYPES[dtype]
    beyond = [o.value for o in operands if type(o.value) is int and not kind.holds(o.value)]
    if not beyond:
        return operands
    if row.beyond is Beyond.EXACT and kind is not u64 and all(i64.holds(value) for value in beyond):
        return [o._replace(value=o.value.to(torch.int64)) if isinstance(o.value, Tensor) else o for o in operands]
    raise DtypeError(
        f"{row.name}: {beyond[0]} does not fit {kind.name}; convert the tensor first, to a dtype that holds it"
    )


def nan_checked(row: Elementwise, operands: Sequence[Operand], nan: str) -> Sequence[Operand]:
    """nan="omit": a NaN operand is a masked one; "raise": it is an error."""
    if check(row, NAN, nan) == "propagate":
        return operands
    checked: list[Operand] = []
    for operand in operands:
        value = operand.value
        if isinstance(value, float | complex) and value != value:
            operand = operand._replace(value=(value := torch.tensor(value)))
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            operand = operand._replace(mask=counting(row, value, as_bools(operand.mask), nan), is_masked=True)
        checked.append(operand)
    return checked


def resolve(row: Elementwise, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that differ from torch's defaults, checked; numbers may be infinite or NaN here."""
    params = {}
    known_names = names_of(row)
    for name in given:
        if name not in known_names:
            raise ParameterError(
                f"{row.name} has no parameter {name!r}; it takes {', '.join(known_names)}", parameter=name
            )
    for parameter in row.parameters:
        value = given.get(parameter.name, parameter.default)
        if parameter.type is not Type.NUMBER or not isinstance(value, int | float | complex):
            value = check(row, parameter, value)
        if value != parameter.default:
            params[parameter.name] = value
    return params


# -- masks --------------------------------------------------------------------------------------------------------


def flow(
    row: Elementwise, operands: Sequence[Operand], masks: list[Tensor | None], policy: Policy
) -> tuple[list[Any], Tensor | None]:
    """The values to compute with, and where the result is valid."""
    values = [operand.value for operand in operands]
    if row.rule is MaskRule.CHOSEN:
        condition, yes, no = masks
        if not isinstance(values[0], Tensor):
            values[0] = torch.as_tensor(values[0])
        if yes is None and no is None:
            return values, condition
        chosen = torch.where(values[0], True if yes is None else yes, True if no is None else no)
        return values, chosen if condition is None else chosen & condition
    if policy is Policy.UNION and any(mask is not None for mask in masks):
        return filled_with_identity(row, operands), union(
            [m for m, v in zip(masks, values, strict=True) if v is not None]
        )
    together = intersection(masks)
    if (row.unsafe or row.unsafe_floats) and together is not None:
        values = [safe(value, together, floats=row.unsafe_floats) for value in values]
    return values, together


def filled_with_identity(row: Elementwise, operands: Sequence[Operand]) -> list[Any]:
    """Policy union: a missing operand is the op's identity on its side."""
    values = []
    for i, (value, mask, *_) in enumerate(operands):
        identity = row.identity[i] if row.identity else None
        if mask is None:
            values.append(value)
        elif identity is None:
            raise ParameterError(
                f"{row.name} has no identity for {row.operands[i]}, so policy union cannot fill it; use intersect",
                parameter="policy",
            )
        elif identity == OTHER or identity in INFINITIES:
            other = operands[1 if i == 0 else 0].value
            values.append(torch.where(mask.expand(value.shape), value, other))
        else:
            assert not isinstance(identity, str)
            values.append(select(value, mask.expand(value.shape), identity))
    return values


def alone(row: Elementwise, operands: Sequence[Operand], data: Tensor) -> Tensor:
    """The other operand's cell where one is missing whose identity is infinite: torch's derivatives are NaN beside it."""
    for i, (identity, operand) in enumerate(zip(row.identity, operands, strict=False)):
        if operand.mask is not None and identity in INFINITIES:
            data = torch.where(operand.mask, data, operands[1 - i].value)
    return data


def safe(value: Any, mask: Tensor, *, floats: bool = False) -> Any:
    """Integers that are 1 where the result is hidden: torch raises on a division by 0 wherever it stands."""
    if not isinstance(value, Tensor) or (value.dtype.is_floating_point and not floats):
        return value
    shape = broadcast(value.shape, mask.shape)
    return select(value.expand(shape), mask.expand(shape), 1)


def broadcast_shape(row: Elementwise, tensors: Sequence[Tensor]) -> torch.Size:
    if not tensors:
        return torch.Size()
    first = tensors[0].shape
    if all(tensor.shape == first for tensor in tensors[1:]):
        return first
    try:
        return broadcast(*[tensor.shape for tensor in tensors])
    except ValueError:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ShapeError(
            f"{row.name}: shapes {shapes} do not broadcast; sizes must be equal or 1, counted from the last dim"
        ) from None


def broadcast(*shapes: Sequence[int]) -> torch.Size:
    """The shape of what has these shapes together; ValueError where they do not fit. torch's own takes 30 us.

    >>> broadcast((3, 1), (4,))
    torch.Size([3, 4])
    """
    ndim = max(map(len, shapes))
    sizes = [1] * ndim
    for shape in shapes:
        for dim, size in enumerate(shape, ndim - len(shape)):
            if size == 1:
                continue
            if sizes[dim] not in (1, size):
                raise ValueError(shapes)
            sizes[dim] = size
    return torch.Size(sizes)


def padded(mask: Tensor, ndim: int) -> Tensor:
    """The mask with leading dims of size 1."""
    return mask if mask.ndim == ndim else mask.reshape((1,) * (ndim - mask.ndim) + tuple(mask.shape))
