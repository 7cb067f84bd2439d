"""The loss of each cell, by torch's own functions: their values, derivatives and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def together(given: Tensor, target: Tensor) -> list[Tensor]:
    """Both in one float dtype and of one shape, which torch warns of where it has to make it."""
    dtype = torch.result_type(given, target)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    pair: list[Tensor] = torch.broadcast_tensors(given.to(dtype), target.to(dtype))
    return pair


def in_own_dtype(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss beside torch.autocast, which widens some and not others: what is masked keeps the dtype of its cells."""

    @wraps(loss)
    def computed(given: Tensor, *others: Any, **params: Any) -> Tensor:
        if not torch.is_autocast_enabled(given.device.type):
            return loss(given, *others, **params)
        with torch.autocast(given.device.type, enabled=False):
            return loss(given, *others, **params)

    return computed


@in_own_dtype
def mse_loss(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.mse_loss(given, target, reduction="none")


@in_own_dtype
def l1_loss(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.l1_loss(given, target, reduction="none")


@in_own_dtype
def huber_loss(given: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    given, target = together(given, target)
    return functional.huber_loss(given, target, reduction="none", delta=delta)


@in_own_dtype
def smooth_l1_loss(given: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    given, target = together(given, target)
    return functional.smooth_l1_loss(given, target, reduction="none", beta=beta)


@in_own_dtype
def binary_cross_entropy(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.binary_cross_entropy(given, target, reduction="none")


@in_own_dtype
def binary_cross_entropy_with_logits(given: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    given, target = together(given, target)
    return functional.binary_cross_entropy_with_logits(given, target, reduction="none", pos_weight=pos_weight)


@in_own_dtype
def kl_div(given: Tensor, target: Tensor, log_target: bool = False) -> Tensor:
    given, target = together(given, target)
    return functional.kl_div(given, target, reduction="none", log_target=log_target)
