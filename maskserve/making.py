"""Making MaskedTensors: like torch.tensor, like torch.as_tensor, and from lengths."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from maskserve.compact import Lengths, Mask, as_bits, as_bools, as_lengths
from maskserve.compiling import uncompiled
from maskserve.errors import DimError, DtypeError, MaskedValueError, MaskError, ParameterError
from maskserve.foreign import from_foreign
from maskserve.masks import intersection
from maskserve.reach import narrowed
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of
from maskserve.tracing import in_transform

MASK_LAYOUTS = ("none", "bool", "lengths", "packed")


def tensor_of(value: Any) -> Any:
    """A tensor or MaskedTensor of anything that can be one; DtypeError for the rest."""
    value = from_foreign(value)
    if isinstance(value, Tensor | MaskedTensor):
        return value
    if isinstance(value, list) and has_none(value):
        valid = torch.as_tensor(mapped(value, lambda cell: cell is not None))
        nothing: Any = 0 if not has_any(value, bool) else False  # bools beside None are bools
        return MaskedTensor(torch.as_tensor(mapped(value, lambda cell: nothing if cell is None else cell)), valid)
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DtypeError(f"a {type(value).__name__} is no tensor: {str(error).splitlines()[0]}") from error


def has_none(cells: list[Any]) -> bool:
    return any(has_none(cell) if isinstance(cell, list) else cell is None for cell in cells)


def has_any(cells: list[Any], kind: type) -> bool:
    return any(has_any(cell, kind) if isinstance(cell, list) else isinstance(cell, kind) for cell in cells)


def mapped(cells: list[Any], change: Callable[[Any], Any]) -> list[Any]:
    """The nested list with each cell changed."""
    return [mapped(cell, change) if isinstance(cell, list) else change(cell) for cell in cells]


@uncompiled
def masked_tensor(data: Any, mask: Any = None, *, requires_grad: bool = False) -> MaskedTensor:
    """A new MaskedTensor with memory of its own, like torch.tensor.

    `data` may be a list (None is masked), a tensor, numpy.ma or torch.masked. With `requires_grad` it is a leaf that
    collects a gradient in `.grad`; the history of `data` ends here either way (as_masked_tensor keeps it).
    """
    source = as_masked_tensor(data, mask)
    if source.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            "masked_tensor copies without history, so nothing computed from it trains what it was computed from: "
            "as_masked_tensor(data, mask) keeps the history; masked_tensor(data.detach(), mask) says that none is wanted",
            stacklevel=2,
        )
    made = source._copied()
    return made.requires_grad_() if requires_grad else made


@uncompiled
def as_masked_tensor(data: Any, mask: Any = None) -> MaskedTensor:
    """A MaskedTensor on the same data, like torch.as_tensor; of a MaskedTensor the masks are intersected. Copies the mask."""
    return MaskedTensor(tensor_of(data), mask)


def operand(given: Any) -> MaskedTensor:
    """The same, for an op that only reads it: a MaskedTensor as it is."""
    return given if isinstance(given, MaskedTensor) else as_masked_tensor(given)


@uncompiled
def from_lengths(data: Any, lengths: Any, dim: int) -> MaskedTensor:
    """The first `lengths` cells along `dim` are valid; lengths have the shape of the dims before it: (B,) for (B, T, D)."""
    tensor = tensor_of(data)
    if isinstance(tensor, MaskedTensor):
        own = from_lengths(tensor._data.detach(), lengths, dim)._held
        reach = narrowed(tensor._reach, as_bools(own))
        return MaskedTensor._of(tensor._data, intersection([tensor._held, own]), reach)
    counts = tensor_of(lengths)
    if not isinstance(counts, Tensor) or not isinstance(dim, int) or isinstance(dim, bool):
        _refuse("lengths are whole numbers and dim is one dim number", "lengths")
    counts = counts.to(tensor.device)
    if not -tensor.ndim <= dim < tensor.ndim:
        _refuse(f"dim {dim} is out of range for a tensor with {tensor.ndim} dims", "dim")
    along = dim % tensor.ndim
    n = tensor.shape[along]
    if counts.shape != tensor.shape[:along]:
        _refuse(
            f"lengths have shape {tuple(counts.shape)}, the dims before dim {along} {tuple(tensor.shape[:along])}; "
            "they must be equal",
            "lengths",
        )
    if counts.dtype not in (torch.int64, torch.int32):
        _refuse(f"lengths are {dtype_of(counts).name}; they must be i32 or i64: lengths.to(torch.int64)", "lengths")
    if bool(((counts < 0) | (counts > n)).any()):
        _refuse(f"lengths must be whole numbers from 0 to {n}, the size of dim {along}", "lengths")
    mask = Lengths(counts.to(torch.int64, copy=True), along, tensor.shape)
    return MaskedTensor._of(tensor, mask.bools() if in_transform() else mask)


def with_mask_layout(tensor: MaskedTensor, layout: str, dim: int | None = None) -> MaskedTensor:
    """A view of the same cells whose mask is held in another way."""
    if layout not in MASK_LAYOUTS:
        raise ParameterError(
            f"mask layout {layout!r} is not known: give one of {', '.join(MASK_LAYOUTS)}",
            parameter="layout",
            allowed=MASK_LAYOUTS,
        )
    if tensor.layout is not torch.strided:
        raise MaskError("a sparse tensor has no mask of every cell: to_dense() first")
    if dim is not None and layout != "lengths":
        raise ParameterError(f"dim is of layout 'lengths'; {layout!r} has none", parameter="dim")
    return tensor._view_of(tensor._data, held_as(tensor, layout, dim), tensor._reach)


def held_as(tensor: MaskedTensor, layout: str, dim: int | None) -> Mask | None:
    held, shape = tensor._held, tensor.shape
    if layout == "none":
        n = 0 if held is None else int((~tensor._full_mask()).sum())
        if n:
            raise MaskedValueError(
                f"{n} of {tensor.numel()} cells are masked, and layout 'none' says that all are valid"
            )
        return None
    if layout == "bool":
        return as_bools(held) if held is not None else tensor._full_mask()
    valid: Mask = torch.ones((1,) * len(shape), dtype=torch.bool, device=tensor.device) if held is None else held
    return as_bits(valid, shape) if layout == "packed" else as_lengths(valid, along(shape, dim), shape)


def along(shape: torch.Size, dim: int | None) -> int:
    """The dim that lengths count along."""
    n_dims = len(shape)
    given = min(1, n_dims - 1) if dim is None else dim
    if not isinstance(given, int) or not -n_dims <= given < n_dims or not n_dims:
        raise DimError(f"dim {given} is out of range for a tensor with {n_dims} dims", parameter="dim")
    return given % n_dims


def _refuse(message: str, parameter: str) -> NoReturn:
    raise ParameterError(f"from_lengths: {message}", parameter=parameter)
