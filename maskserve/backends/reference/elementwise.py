"""Elementwise functions where torch's own would be silently wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.errors import IntegerOverflowError


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
