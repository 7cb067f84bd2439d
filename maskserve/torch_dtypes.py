"""torch's dtypes as ours."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.dtypes import BY_TORCH, DType
from maskserve.errors import DtypeError

DTYPES: dict[torch.dtype, DType] = {getattr(torch, dtype.torch): dtype for dtype in BY_TORCH.values()}


def dtype_of(data: Tensor) -> DType:
    """Our name of a tensor's dtype; DtypeError where it has none."""
    return DTYPES.get(data.dtype) or known(data.dtype)


def known(dtype: torch.dtype) -> DType:
    """Our name of a dtype; DtypeError where it has none."""
    found = DTYPES.get(dtype)
    if found is None:
        name = str(dtype).removeprefix("torch.")
        raise DtypeError(f"{name} is not supported: give one of {', '.join(BY_TORCH)}", parameter="dtype")
    return found
