"""Batches of samples, and tensors on their way between processes: what torch.utils.data and torch.multiprocessing ask.

Both keep a table of types; torch has imported them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

if TYPE_CHECKING:
    from maskserve.compact import Mask
    from maskserve.tensor import MaskedTensor


def register(kind: type[MaskedTensor]) -> None:
    """Have a DataLoader batch MaskedTensors, and processes hand them on."""
    default_collate_fn_map[kind] = batch_of
    ForkingPickler.register(kind, in_parts)


def batch_of(samples: Sequence[Any], *, collate_fn_map: Mapping[Any, Callable[..., Any]] | None = None) -> MaskedTensor:
    """The samples stacked along a new first dim; plain ones among them are valid everywhere."""
    batch: MaskedTensor = torch.stack(list(samples))  # type: ignore[assignment]  # MaskedTensors in, one out
    return batch


def in_parts(tensor: MaskedTensor) -> tuple[Any, ...]:
    """How another process makes the tensor on the same memory; torch refuses one that is no leaf."""
    return joined, (tensor._data, tensor._held, tensor._is_view, tensor._owns_mask)


def joined(data: Tensor, mask: Mask | None, is_view: bool, owns_mask: bool) -> MaskedTensor:
    from maskserve.tensor import MaskedTensor

    made = MaskedTensor._of(data, mask)
    made._is_view, made._owns_mask = is_view, owns_mask
    return made.requires_grad_() if data.requires_grad else made
