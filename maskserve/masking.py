"""New masks for the cells of a tensor: what the row `mask` computes, torch's side of it.

In this order: the tests, each of which masks cells; and; or; not. A number is compared in the data's dtype, rounded
once; NaN equals nothing and lies in no range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from maskserve import masks
from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.dtypes import INFINITIES, WIDENED, DType, boolean
from maskserve.errors import DataError, DtypeError
from maskserve.ops.parameters import Type
from maskserve.ops.rows import Masking
from maskserve.params import accept, resolve
from maskserve.payload.metadata import Means
from maskserve.torch_dtypes import dtype_of

Number = int | float
Masks = Mapping[str, Tensor | None]
"""Validity by the name of the parameter that brought it; None is valid everywhere."""


def compute(
    row: Masking, data: Tensor, mask: Tensor | None, given: Mapping[str, Any], others: Masks
) -> tuple[Tensor, Tensor]:
    """(data with 0 under the new mask, the new mask at full size); `others` broadcast to the data."""
    dtype = dtype_of(data)
    known = check(row, dtype, given)
    decide: Callable[..., Tensor] = kernel(row.function)
    own = torch.ones((), dtype=torch.bool, device=data.device) if mask is None else mask
    new = decide(computable(data, dtype), own.expand(data.shape), known, others)
    return select(data, new), new


def computable(data: Tensor, dtype: DType) -> Tensor:
    """The cells in a dtype that torch can compare: each has the same value there."""
    return data.to(getattr(torch, WIDENED[dtype].torch)) if dtype in WIDENED else data


def check(row: Masking, dtype: DType, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters that are no tensors, defaults filled in; raises where they do not fit cells of this dtype."""
    accept(row, dtype)
    params = resolve(row, given)
    for p in row.parameters:
        if dtype is boolean and p.type in (Type.RANGE, Type.REAL) and params[p.name] is not None:
            raise DtypeError(
                f"{row.name}: {p.name} compares numbers, and these cells are bool: they can be tested for being equal to "
                "0 or 1",
                parameter=p.name,
            )
    return params


def new_mask(data: Tensor, mask: Tensor, params: Mapping[str, Any], others: Masks) -> Tensor:
    """The new mask, of data's shape and in memory of its own."""
    new = mask.clone(memory_format=torch.contiguous_format)
    for masked in masked_by(data, params):
        new &= ~masked
    for name in ("valid", "and"):
        if (other := others.get(name)) is not None:
            new &= other
    if "or" in others:
        other = others["or"]
        new = torch.ones_like(new) if other is None else new | other
    return ~new if params["not"] else new


def masked_by(data: Tensor, params: Mapping[str, Any]) -> Iterator[Tensor]:
    """The cells that each test masks, a test at a time."""
    equal = params["equal"]
    for value in () if equal is None else equal if isinstance(equal, tuple) else (equal,):
        yield equals(data, value)
    if (ends := params["inside"]) is not None:
        yield at_least(data, ends[0]) & at_most(data, ends[1])
    if (ends := params["outside"]) is not None:
        yield below(data, ends[0]) | above(data, ends[1])
    if (ends := params["valid_range"]) is not None:
        yield ~(at_least(data, ends[0]) & at_most(data, ends[1]))
    if (value := params["less"]) is not None:
        yield below(data, value)
    if (value := params["greater"]) is not None:
        yield above(data, value)
    if not data.dtype.is_floating_point:
        return
    if params["is_nan"] or params["is_invalid"]:
        yield data.isnan()
    if params["is_inf"] or params["is_invalid"]:
        yield data.isinf()


# -- comparisons with a number that the dtype may not hold --------------------------------------------------------


def equals(data: Tensor, value: Number) -> Tensor:
    if data.dtype.is_floating_point:
        number = rounded(value, data.dtype)
        overflows = number in INFINITIES and value not in INFINITIES
        return none(data) if overflows else data == number
    return data == int(value) if held(data, value) else none(data)


def at_least(data: Tensor, value: Number) -> Tensor:
    """data >= value; False for NaN."""
    if data.dtype.is_floating_point:
        bound = rounded(value, data.dtype)
        if bound == -math.inf != value:
            bound = torch.finfo(data.dtype).min  # what lies beyond all finite cells keeps them apart from infinity
        return data >= bound
    info = torch.iinfo(data.dtype)
    if value <= info.min:
        return ~none(data)
    return none(data) if value > info.max else data >= math.ceil(value)


def at_most(data: Tensor, value: Number) -> Tensor:
    """data <= value; False for NaN."""
    if data.dtype.is_floating_point:
        bound = rounded(value, data.dtype)
        if bound == math.inf != value:
            bound = torch.finfo(data.dtype).max
        return data <= bound
    info = torch.iinfo(data.dtype)
    if value >= info.max:
        return ~none(data)
    return none(data) if value < info.min else data <= math.floor(value)


def below(data: Tensor, value: Number) -> Tensor:
    return ~at_least(data, value) & (data == data)


def above(data: Tensor, value: Number) -> Tensor:
    return ~at_most(data, value) & (data == data)


def none(data: Tensor) -> Tensor:
    return torch.zeros(data.shape, dtype=torch.bool, device=data.device)


def held(data: Tensor, value: Number) -> bool:
    return dtype_of(data).holds(value)


def rounded(value: Number, dtype: torch.dtype) -> float:
    """The nearest number in `dtype`, ties to even, infinite beyond its range; rounded once, not by way of float32.

    >>> rounded(0.1, torch.bfloat16), rounded(65519, torch.float16), rounded(65520, torch.float16)
    (0.10009765625, 65504.0, inf)
    """
    number = float(value)
    if dtype is torch.float64 or number == 0 or number in INFINITIES:
        return number
    info = torch.finfo(dtype)
    if abs(number) >= 2 * info.max:  # beside float64's own end the scaling below would overflow
        return math.copysign(math.inf, number)
    smallest = math.frexp(info.tiny)[1] + math.frexp(info.eps)[1] - 2  # the last place of the subnormals
    place = max(math.frexp(number)[1] - 1 + math.frexp(info.eps)[1] - 1, smallest)
    nearest = math.ldexp(round(math.ldexp(number, -place)), place)
    return math.copysign(math.inf, number) if abs(nearest) > info.max else nearest


def validity(data: Tensor, mask: Tensor | None, means: Means = "valid") -> Tensor | None:
    """What a tensor says of validity: a bool one where it is true, or false if that `means` valid; others by their mask."""
    if data.dtype is not torch.bool:
        if mask is None:
            raise DataError(
                "a tensor that is named for its mask has none, and is not bool: make a mask of its cells first, as equal=0 "
                "does of zeros"
            )
        return mask
    return masks.intersection([~data if means == "missing" else data, mask])
