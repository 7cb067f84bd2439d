"""Leaves and plain tensors of a few cells, and what a gradient is expected to be, for the cases of gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maskserve as ms
from maskserve import MaskedTensor

T, F = True, False
nan, inf = math.nan, math.inf
every_float = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def leaf(cells: Any, mask: Any = None, dtype: torch.dtype = torch.float64) -> MaskedTensor:
    return ms.masked_tensor(
        torch.tensor(cells, dtype=dtype), None if mask is None else torch.tensor(mask), requires_grad=True
    )


def plain(cells: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(cells, dtype=dtype, requires_grad=True)


def cells(cells: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(cells, dtype=dtype)


def assert_is(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Nested lists, None for a masked cell."""
    assert found is not None
    if isinstance(expected, list):
        found = found if isinstance(found, list) else found.tolist()
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None), (found, expected)
            if other is not None:
                assert_is(one, other, tolerance)
        return
    found = found if isinstance(found, float) else found.tolist()
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance / 100)
