"""Elementwise functions where torch's own would be silently wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.errors import IntegerOverflowError, ParameterError


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


def clamp(data: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    """torch.clamp; a number beside a tensor becomes one, which torch refuses to mix."""
    if isinstance(low, Tensor) and isinstance(high, int | float):
        high = torch.as_tensor(high, dtype=torch.result_type(data, high), device=data.device)
    if isinstance(high, Tensor) and isinstance(low, int | float):
        low = torch.as_tensor(low, dtype=torch.result_type(data, low), device=data.device)
    return torch.clamp(data, low, high)  # type: ignore[call-overload, no-any-return]  # two overloads, no mixture


def polygamma(n: Tensor, data: Tensor) -> Tensor:
    """torch.polygamma, whose degree is one number."""
    if n.ndim or n != n.trunc():
        raise ParameterError("polygamma: n is one whole number", parameter="n")
    return torch.polygamma(int(n), data)
