"""Move rows: data and mask by the same way, views staying views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskserve.errors import DtypeError, ShapeError
from maskserve.making import as_masked_tensor
from maskserve.ops.rows import Move
from maskserve.tensor import MaskedTensor


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


def move_mask(move: Callable[..., Any], mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The mask moved; a copy of it where its strides allow no view and the data's do."""
    try:
        moved: Tensor = move(mask, *args, **kwargs)
    except RuntimeError:
        moved = move(mask.contiguous(), *args, **kwargs)
    return moved
