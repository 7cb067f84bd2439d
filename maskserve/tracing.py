"""Whether anyone follows a computation: autograd, a transform of torch.func, forward-mode differentiation; and what is shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
innermost: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
"""Of torch.func's transforms, None outside them all."""


def is_followed(data: Tensor) -> bool:
    """Whether what is computed from `data` must leave a trace, and cannot be read by its memory."""
    return (data.requires_grad and torch.is_grad_enabled()) or in_transform() or is_batched(data)


def are_followed(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them is."""
    if in_transform():
        return bool(tensors)
    is_recorded = torch.is_grad_enabled()
    for tensor in tensors:  # noqa: SIM110 - any() takes as long again, and each op of few cells asks several times
        if (is_recorded and tensor.requires_grad) or is_batched(tensor):
            return True
    return False


def has_memory(data: Tensor) -> bool:
    """Whether a kernel can read the cells where `data_ptr` says: no wrapper of a transform, and no sign left to take."""
    return not (is_wrapped(data) or data._is_zerotensor() or data.is_neg())


def in_transform() -> bool:
    """Whether torch.func looks on (tensors have no memory of their own there), or forward mode."""
    return innermost() is not None or in_forward_mode()


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def lies_in(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a tensor has the memory of one of the others."""
    if in_transform():  # where tensors have none
        return any(tensor is other for other in others)
    own = tensor.untyped_storage().data_ptr()
    return tensor.numel() > 0 and any(own == x.untyped_storage().data_ptr() and x.numel() > 0 for x in others)


def same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and lies_in(a, [b])


def primal(data: Tensor) -> Tensor:
    """The tensor without the tangent that a jvp is computing from: else it would be computed again inside, and again."""
    if not (data.is_floating_point() or data.is_complex()):
        return data
    bare: Tensor = forward_ad.unpack_dual(data).primal
    return bare


def differentiable_again(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A jvp that a forward mode around it sees too: torch runs it with all of them off, and its derivative would be 0."""

    @wraps(jvp)
    def seen(*args: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(*args)

    return seen
