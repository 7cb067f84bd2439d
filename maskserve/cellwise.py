"""Elementwise rows: torch computes the values, the row's mask rule their validity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.dtypes import BY_TORCH, DType
from maskserve.errors import DataError, DtypeError, MaskserveError, ParameterError, ShapeError
from maskserve.masks import Policy, check_equal, intersection, union
from maskserve.ops.rows import Elementwise, MaskRule
from maskserve.plan import accept, resolve

Operand = tuple[Any, Tensor | None, bool]
"""(tensor or number, its mask, whether it is a MaskedTensor): plain tensors and numbers are valid everywhere."""


@cache
def function(name: str) -> Callable[..., Tensor]:
    """torch's function of that name, or the reference's where torch's is silently wrong."""
    found: Callable[..., Tensor] = kernel(name) if ":" in name else getattr(torch, name)
    return found


def compute(
    row: Elementwise, operands: Sequence[Operand], given: Mapping[str, Any], policy: Policy
) -> tuple[Tensor, Tensor | None]:
    """(values, mask) of the row on its operands, broadcast; hidden cells are 0."""
    tensors = [value for value, _, _ in operands if isinstance(value, Tensor)]
    for tensor in tensors:
        accept(row, known(tensor))
    params = {}
    if row.parameters:
        defaults = {p.name: p.default for p in row.parameters}
        params = {name: value for name, value in resolve(row, given).items() if value != defaults[name]}
    shape = broadcast_shape(row, tensors)
    masks = [None if mask is None else padded(mask, len(shape)) for _, mask, _ in operands]
    if policy is Policy.STRICT:
        check_equal(row.name, [m for m, (_, _, masked) in zip(masks, operands, strict=True) if masked], shape)
    try:
        values, mask = flow(row, operands, masks, policy)
        if row.tensors_only:
            values = [v if isinstance(v, Tensor) else torch.as_tensor(v, device=tensors[0].device) for v in values]
        data = function(row.function)(*values, **params)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, MaskserveError):
            raise
        raise DataError(f"{row.name}: {str(error).splitlines()[0]}") from error
    if mask is None:
        return (data.clone() if any(data is tensor for tensor in tensors) else data), None
    if any(mask.untyped_storage().data_ptr() == m.untyped_storage().data_ptr() for m in masks if m is not None):
        mask = mask.clone()  # a later assignment into the result is none into the operand
    return select(data, mask.expand(data.shape)), mask


def known(tensor: Tensor) -> DType:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in BY_TORCH:
        raise DtypeError(f"{name} is not supported: give one of {', '.join(BY_TORCH)}", parameter="dtype")
    return BY_TORCH[name]


def flow(
    row: Elementwise, operands: Sequence[Operand], masks: list[Tensor | None], policy: Policy
) -> tuple[list[Any], Tensor | None]:
    """The values to compute with, and where the result is valid."""
    values = [value for value, _, _ in operands]
    if row.rule is MaskRule.CHOSEN:
        condition, yes, no = masks
        if yes is None and no is None:
            return values, condition
        chosen = torch.where(values[0], True if yes is None else yes, True if no is None else no)
        return values, chosen if condition is None else chosen & condition
    if policy is Policy.UNION and any(mask is not None for mask in masks):
        return filled_with_identity(row, operands), union(masks)
    together = intersection(masks)
    if row.unsafe and together is not None:
        values = [safe(value, together) for value in values]
    return values, together


def filled_with_identity(row: Elementwise, operands: Sequence[Operand]) -> list[Any]:
    """Policy union: a missing operand is the op's identity on its side."""
    values = []
    for i, (value, mask, _) in enumerate(operands):
        identity = row.identity[i] if row.identity else None
        if mask is not None and identity is None:
            raise ParameterError(
                f"{row.name} has no identity for {row.operands[i]}, so policy union cannot fill it; use intersect",
                parameter="policy",
            )
        values.append(value if mask is None else select(value, mask.expand(value.shape), identity or 0))
    return values


def safe(value: Any, mask: Tensor) -> Any:
    """Integers that are 1 where the result is hidden: torch raises on a division by 0 wherever it stands."""
    if not isinstance(value, Tensor) or value.dtype.is_floating_point:
        return value
    shape = torch.broadcast_shapes(value.shape, mask.shape)
    return select(value.expand(shape), mask.expand(shape), 1)


def broadcast_shape(row: Elementwise, tensors: Sequence[Tensor]) -> torch.Size:
    if not tensors:
        return torch.Size()
    first = tensors[0].shape
    if all(tensor.shape == first for tensor in tensors[1:]):
        return first  # torch.broadcast_shapes takes 30 us for equal ones
    try:
        shape: torch.Size = torch.broadcast_shapes(*[tensor.shape for tensor in tensors])
        return shape
    except RuntimeError:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ShapeError(
            f"{row.name}: shapes {shapes} do not broadcast; sizes must be equal or 1, counted from the last dim"
        ) from None


def padded(mask: Tensor, ndim: int) -> Tensor:
    """The mask with leading dims of size 1."""
    return mask.reshape((1,) * (ndim - mask.ndim) + tuple(mask.shape))
