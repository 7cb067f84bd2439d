"""The loss of each cell, by torch's own functions: their values, derivatives and errors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def together(given: Tensor, target: Tensor) -> list[Tensor]:
    """Both in one float dtype and of one shape, which torch warns of where it has to make it."""
    dtype = torch.result_type(given, target)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    pair: list[Tensor] = torch.broadcast_tensors(given.to(dtype), target.to(dtype))
    return pair


def mse_loss(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.mse_loss(given, target, reduction="none")


def l1_loss(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.l1_loss(given, target, reduction="none")


def huber_loss(given: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    given, target = together(given, target)
    return functional.huber_loss(given, target, reduction="none", delta=delta)


def smooth_l1_loss(given: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    given, target = together(given, target)
    return functional.smooth_l1_loss(given, target, reduction="none", beta=beta)


def binary_cross_entropy(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.binary_cross_entropy(given, target, reduction="none")


def binary_cross_entropy_with_logits(given: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    given, target = together(given, target)
    return functional.binary_cross_entropy_with_logits(given, target, reduction="none", pos_weight=pos_weight)


def kl_div(given: Tensor, target: Tensor, log_target: bool = False) -> Tensor:
    given, target = together(given, target)
    return functional.kl_div(given, target, reduction="none", log_target=log_target)
