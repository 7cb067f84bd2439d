"""Result dtypes: torch's own rules, under our names."""

from __future__ import annotations

from collections.abc import Callable

from maskserve import dtypes
from maskserve.dtypes import DType
from maskserve.ops.parameters import Params

ResultRule = Callable[[DType, Params], DType]


def same(dtype: DType, params: Params) -> DType:
    """The data's dtype."""
    return dtype


def chosen(default: Callable[[DType], DType]) -> ResultRule:
    """`dtype=` where it is given, else `default(data's dtype)`."""

    def rule(dtype: DType, params: Params) -> DType:
        return params.get("dtype") or default(dtype)

    return rule


def always(dtype: DType) -> ResultRule:
    return lambda _, params: dtype


summed = chosen(lambda dtype: dtypes.i64 if dtype.is_integral else dtype)


def summed_or_weighted(dtype: DType, params: Params) -> DType:
    """As a sum, and float64 where integers count for weights."""
    return floated(dtype, params) if params.get("weights") else summed(dtype, params)


def real_of(dtype: DType) -> DType:
    """The dtype of a complex one's parts."""
    return {dtypes.c64: dtypes.f32, dtypes.c128: dtypes.f64}.get(dtype, dtype)


def spread(dtype: DType, params: Params) -> DType:
    """As a mean, and real for complex cells."""
    return floated(real_of(dtype), params)


floated = chosen(lambda dtype: dtypes.f64 if dtype.is_integral else dtype)
kept = chosen(lambda dtype: dtype)
