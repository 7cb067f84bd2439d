"""The Python operators of MaskedTensor, from the rows that name one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskserve.errors import DtypeError, ShapeError
from maskserve.ops import OPS
from maskserve.ops.rows import Contraction, Elementwise

if TYPE_CHECKING:
    from maskserve.tensor import MaskedTensor

Operator = Callable[..., Any]

COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
"""Python reflects these by itself, and they have no form in place."""


def attach(cls: type[MaskedTensor]) -> None:
    """__add__, __radd__, __iadd__ and the like."""
    for row in OPS.values():
        if isinstance(row, Contraction) and row.operator:  # m @= n is m = m @ n, as in torch
            setattr(cls, f"__{row.operator}__", binary(row.name, reflected=False, numbers=()))
            setattr(cls, f"__r{row.operator}__", binary(row.name, reflected=True, numbers=()))
        if not isinstance(row, Elementwise) or not row.operator:
            continue
        if len(row.operands) == 1:
            setattr(cls, f"__{row.operator}__", unary(row.name))
            continue
        setattr(cls, f"__{row.operator}__", binary(row.name, reflected=False))
        if row.operator not in COMPARISONS:
            setattr(cls, f"__r{row.operator}__", binary(row.name, reflected=True))
            setattr(cls, f"__i{row.operator}__", in_place(row.name))


def unary(name: str) -> Operator:
    def operator(self: MaskedTensor) -> Any:
        from maskserve.functions import public

        return public(name)(self)

    return operator


NUMBERS = (int, float, complex)


def binary(name: str, *, reflected: bool, numbers: tuple[type, ...] = NUMBERS) -> Operator:
    def operator(self: MaskedTensor, other: Any) -> Any:
        from maskserve.foreign import from_foreign
        from maskserve.functions import public
        from maskserve.tensor import MaskedTensor

        other = from_foreign(other)
        if not isinstance(other, (MaskedTensor, Tensor, *numbers)):
            return NotImplemented
        return public(name)(other, self) if reflected else public(name)(self, other)

    return operator


def in_place(name: str) -> Operator:
    """m += other: the cells and their validity change where they are, for every tensor that shares them."""
    forward = binary(name, reflected=False)

    def operator(self: MaskedTensor, other: Any) -> Any:
        result = forward(self, other)
        if result is NotImplemented:
            return result
        if result.shape != self.shape:
            raise ShapeError(
                f"{name} in place: the result has shape {tuple(result.shape)}, the tensor {tuple(self.shape)}; "
                "assign the result of the plain operator instead"
            )
        if not torch.can_cast(result.dtype, self.dtype):
            raise DtypeError(
                f"{name} in place: the result is {result.dtype}, the tensor {self.dtype}; assign the result of the plain "
                "operator instead, or convert first"
            )
        own = getattr(getattr(other, "_cells", None), "_held", None)
        self._replace(result, same_mask=result._cells._held is not None and own is None)
        return self

    return operator
