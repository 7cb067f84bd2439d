"""Functions of a whole tensor, run: dtypes in, the row's kernel, dtypes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import canonical
from maskserve.blocks import counting
from maskserve.dtypes import WIDENED
from maskserve.ops.results import same
from maskserve.ops.rows import Whole
from maskserve.plan import as_floats
from maskserve.torch_dtypes import dtype_of


def compute(
    row: Whole, params: Mapping[str, Any], data: Tensor, mask: Tensor | None
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(values, mask) of each of the row's outputs."""
    dtype = dtype_of(data)
    if dtype in WIDENED:
        data = data.to(getattr(torch, WIDENED[dtype].torch))
    parts = kernel(row.function)(data, counting(row, data, mask, params["nan"]), params)
    wide = getattr(torch, row.result(as_floats(dtype), params).torch)
    return {
        name: (canonical(values.to(wide) if row.result is not same else values), valid)
        for name, (values, valid) in zip(row.outputs, parts, strict=True)
    }
