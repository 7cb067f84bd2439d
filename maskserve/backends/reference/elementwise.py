"""Elementwise functions where torch's own would be silently wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskserve.errors import DtypeError, IntegerOverflowError, ParameterError


def checked_abs(data: Tensor) -> Tensor:
    """|data|; an error for the smallest signed integer, whose absolute value its dtype cannot hold."""
    if data.dtype is torch.bool:
        return data
    if not data.dtype.is_floating_point and not data.dtype.is_complex:
        smallest = torch.iinfo(data.dtype).min
        if smallest < 0 and (data == smallest).any():
            raise IntegerOverflowError(
                f"abs: a cell is {smallest}, and {-smallest} does not fit {str(data.dtype).removeprefix('torch.')}; "
                "convert to a wider dtype first"
            )
    return data.abs()


def clamp(data: Tensor, low: Any, high: Any) -> Tensor:
    """torch.clamp; a number beside a tensor becomes one, which torch refuses to mix."""
    if isinstance(low, Tensor) and isinstance(high, int | float):
        high = torch.as_tensor(high, dtype=torch.result_type(data, high), device=data.device)
    if isinstance(high, Tensor) and isinstance(low, int | float):
        low = torch.as_tensor(low, dtype=torch.result_type(data, low), device=data.device)
    return torch.clamp(data, low, high)


def polygamma(n: Tensor, data: Tensor) -> Tensor:
    """torch.polygamma, whose degree is one number."""
    if n.ndim or n != n.trunc():
        raise ParameterError("polygamma: n is one whole number", parameter="n")
    return torch.polygamma(int(n), data)


def div(data: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    """torch.div, which ends the process (SIGFPE) at the smallest int / -1 rounded towards 0: that wraps here, as in -data."""
    if rounding_mode is None:
        return torch.div(data, other)
    dtype = torch.result_type(data, other)
    if isinstance(other, int) and not (dtype.is_floating_point or dtype is torch.bool):
        limits = torch.iinfo(dtype)
        if not limits.min <= other <= limits.max:
            raise DtypeError(f"div: {other} does not fit {dtype}; convert the tensor first, to a dtype that holds it")
    if rounding_mode != "trunc" or dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        return torch.div(data, other, rounding_mode=rounding_mode)
    cells, by = torch.as_tensor(data, dtype=dtype), torch.as_tensor(other, dtype=dtype, device=data.device)
    negated = by == -1
    return torch.where(negated, -cells, torch.div(cells, torch.where(negated, 1, by), rounding_mode="trunc"))


def lcm(data: Tensor, other: Tensor) -> Tensor:
    """torch.lcm, which ends the process (SIGFPE) where its gcd of the smallest int comes out as -1."""
    divisor = torch.gcd(data, other).abs()
    return (torch.div(data, torch.where(divisor == 0, 1, divisor), rounding_mode="floor") * other).abs()
