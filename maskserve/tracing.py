"""Whether anyone follows a computation: autograd, a transform of torch.func, forward-mode differentiation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_followed(data: Tensor) -> bool:
    """Whether what is computed from `data` must leave a trace, and cannot be read by its memory."""
    return (
        (data.requires_grad and torch.is_grad_enabled())
        or in_transform()
        or torch._C._functorch.is_legacy_batchedtensor(data)
    )


def in_transform() -> bool:
    """Whether torch.func looks on (tensors have no memory of their own there), or forward mode."""
    return torch._C._functorch.peek_interpreter_stack() is not None or in_forward_mode()


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def primal(data: Tensor) -> Tensor:
    """The tensor without the tangent that a jvp is computing from: else it would be computed again inside, and again."""
    if torch._C._functorch.peek_interpreter_stack() is not None or not data.is_floating_point():
        return data  # torch.func takes care of its levels
    bare: Tensor = forward_ad.unpack_dual(data).primal
    return bare
