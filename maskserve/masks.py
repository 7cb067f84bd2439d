"""Mask rules: what a mask may be, and how validity flows through an op on several tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from maskserve.compact import Compact, Mask, as_bools
from maskserve.errors import MaskDtypeError, MaskMismatchError, MaskShapeError, ParameterError

M = TypeVar("M", bound=Mask)
P = ParamSpec("P")
R = TypeVar("R")


class Policy(StrEnum):
    """What two different masks give; `intersect` is numpy.ma's, Arrow's and SQL's rule, `strict` torch.masked's."""

    INTERSECT = "intersect"  # valid where every operand is
    STRICT = "strict"  # the masks must be equal
    UNION = "union"  # a missing operand is the op's identity on its side


_policy: ContextVar[Policy] = ContextVar("policy", default=Policy.INTERSECT)


@contextmanager
def policy(name: str) -> Iterator[None]:
    """Elementwise ops inside follow the policy "intersect", "strict" or "union"."""
    token = _policy.set(parse_policy(name))
    try:
        yield
    finally:
        _policy.reset(token)


def by_intersection(function: Callable[P, R]) -> Callable[P, R]:
    """The function, in which elementwise ops are valid where all operands are, whatever the policy is around it."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if _policy.get() is Policy.INTERSECT:
            return function(*args, **kwargs)
        with policy(Policy.INTERSECT):
            return function(*args, **kwargs)

    return called


def parse_policy(name: str | None) -> Policy:
    """The policy by name; the current one for None."""
    if name is None:
        return _policy.get()
    try:
        return Policy(name)
    except ValueError:
        allowed = [p.value for p in Policy]
        raise ParameterError(
            f"policy is {name!r}; it must be one of {', '.join(allowed)}", parameter="policy", allowed=allowed
        ) from None


def checked(data: Tensor, mask: object, name: str = "mask") -> Tensor | None:
    """`mask` as a bool tensor of data's ndim on its device, size 1 where it broadcasts; None stays None."""
    if mask is None:
        return None
    if isinstance(mask, bool):
        return torch.full((1,) * data.ndim, mask, device=data.device)
    if not isinstance(mask, Tensor):
        try:
            mask = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise MaskDtypeError(
                f"{name} is a {type(mask).__name__}; a mask is a bool tensor, True = valid", parameter=name
            ) from error
    if mask.dtype is not torch.bool:
        raise MaskDtypeError(
            f"{name} is {str(mask.dtype).removeprefix('torch.')}; a mask is bool, True = valid: pass {name}.bool()",
            parameter=name,
        )
    if mask.ndim != data.ndim:
        raise MaskShapeError(
            f"{name} has shape {tuple(mask.shape)}, the data {tuple(data.shape)}; a mask has as many dims as its tensor: "
            f"{name}.unsqueeze(-1) broadcasts over the last dim, {name}[None] over the first",
            parameter=name,
        )
    if any(m not in (1, n) for m, n in zip(mask.shape, data.shape, strict=True)):
        raise MaskShapeError(
            f"{name} has shape {tuple(mask.shape)}, the data {tuple(data.shape)}; a mask must broadcast to its tensor",
            parameter=name,
        )
    return mask.to(data.device)


def intersection(masks: Sequence[M | None]) -> M | None:
    """Valid where all are; None is valid everywhere. What are compact masks stays one where it can."""
    together: M | None = None
    for mask in masks:
        if mask is not None:
            together = mask if together is None else both(together, mask)
    return together


def both(a: Mask, b: Mask) -> Any:
    """Valid where both are."""
    met = a.met(b) if isinstance(a, Compact) and isinstance(b, Compact) and a.shape == b.shape else None
    if met is not None:
        return met
    left, right = as_bools(a), as_bools(b)
    assert left is not None
    assert right is not None
    return left & right


def union(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Valid where any is."""
    together: Tensor | None = None
    for mask in masks:
        if mask is None:
            return None
        together = mask if together is None else together | mask
    return together


def check_equal(op: str, masks: Sequence[Tensor | None], shape: torch.Size) -> None:
    """Policy strict: raise unless every mask says the same."""
    full = [torch.ones(shape, dtype=torch.bool) if m is None else m.expand(shape).cpu() for m in masks]
    if any(not torch.equal(full[0], other) for other in full[1:]):
        raise MaskMismatchError(
            f"{op}: the masks differ and the policy is strict; policy intersect takes cells valid in both, union in either"
        )
