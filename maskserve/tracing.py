"""Whether anyone follows a computation: autograd, a transform of torch.func, forward-mode differentiation; and what is shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

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


def has_memory(data: Tensor) -> bool:
    """Whether a kernel can read the cells where `data_ptr` says: no wrapper of a transform, and no sign left to take."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(data) or data._is_zerotensor() or data.is_neg()
    return not wrapped


def in_transform() -> bool:
    """Whether torch.func looks on (tensors have no memory of their own there), or forward mode."""
    return torch._C._functorch.peek_interpreter_stack() is not None or in_forward_mode()


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    if in_transform():  # where tensors have none
        return a is b
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


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
