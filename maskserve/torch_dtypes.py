"""torch's dtypes as ours."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.dtypes import BY_TORCH, DType
from maskserve.errors import DtypeError

DTYPES: dict[torch.dtype, DType] = {getattr(torch, dtype.torch): dtype for dtype in BY_TORCH.values()}


def dtype_of(data: Tensor) -> DType:
    """Our name of a tensor's dtype; DtypeError where it has none."""
    found = DTYPES.get(data.dtype)
    if found is None:
        name = str(data.dtype).removeprefix("torch.")
        raise DtypeError(f"{name} is not supported: give one of {', '.join(BY_TORCH)}", parameter="dtype")
    return found
