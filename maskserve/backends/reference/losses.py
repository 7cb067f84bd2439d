"""The loss of each cell, by torch's own functions: their values, derivatives and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def together(*cells: Tensor) -> list[Tensor]:
    """All in one float dtype and of one shape, which torch warns of where it has to make it."""
    dtype = reduce(torch.promote_types, (torch.result_type(cells[0], other) for other in cells[1:]))
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    made: list[Tensor] = torch.broadcast_tensors(*[each.to(dtype) for each in cells])
    return made


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


@in_own_dtype
def soft_margin_loss(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return functional.soft_margin_loss(given, target, reduction="none")


@in_own_dtype
def hinge_embedding_loss(given: Tensor, target: Tensor, margin: float = 1.0) -> Tensor:
    given, target = together(given, target)
    return functional.hinge_embedding_loss(given, target, margin, reduction="none")


@in_own_dtype
def margin_ranking_loss(one: Tensor, other: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    one, other, target = together(one, other, target)
    return functional.margin_ranking_loss(one, other, target, margin, reduction="none")


@in_own_dtype
def poisson_nll_loss(
    given: Tensor, target: Tensor, log_input: bool = True, full: bool = False, eps: float = 1e-8
) -> Tensor:
    given, target = together(given, target)
    return functional.poisson_nll_loss(given, target, log_input, full, eps=eps, reduction="none")


@in_own_dtype
def gaussian_nll_loss(given: Tensor, target: Tensor, var: Tensor, full: bool = False, eps: float = 1e-6) -> Tensor:
    given, target, var = together(given, target, var)
    return functional.gaussian_nll_loss(given, target, var, full, eps, reduction="none")


@in_own_dtype
def multilabel_soft_margin_loss(given: Tensor, target: Tensor) -> Tensor:
    given, target = together(given, target)
    return -(target * functional.logsigmoid(given) + (1 - target) * functional.logsigmoid(-given))
