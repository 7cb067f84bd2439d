"""Which function of torch is which row: what `torch.sum(m)` and `plain + m` reach. What no row covers raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from maskserve.errors import UncoveredFunctionError
from maskserve.functions import public
from maskserve.ops import OPS
from maskserve.ops.rows import Row
from maskserve.tensor import plain_index

NAMESPACES = (torch, torch.Tensor, torch.nn.functional, torch.special)
WAY_OUT = (
    "compute on its parts, get_data() and get_mask(), or on to_tensor(fill), where you choose what a missing cell is"
)


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The row's result for a torch function called with a MaskedTensor among its arguments."""
    if function is torch.Tensor.__getitem__:
        return args[0][plain_index(args[1])]
    if function is torch.Tensor.__setitem__:
        raise UncoveredFunctionError(
            "a plain tensor cannot take masked cells by assignment: make it a MaskedTensor first, or assign value.to_tensor(fill)"
        )
    name = table().get(function)
    if name is None:
        raise uncovered(function)
    if "out" in kwargs:
        raise UncoveredFunctionError(f"torch.{name}: out= would lose the mask; use the returned MaskedTensor")
    return public(name)(*args, **{k: v for k, v in kwargs.items() if not k.startswith("_")})


@cache
def table() -> Mapping[Callable[..., Any], str]:
    """torch function -> name of its row."""
    return {function: row.name for row in OPS.values() if not row.differs for function in functions_of(row)}


def functions_of(row: Row) -> Iterator[Callable[..., Any]]:
    """torch's functions under the row's names."""
    for namespace in NAMESPACES:
        for name in (row.name, *row.torch):
            function = getattr(namespace, name, None)
            if function is not None:
                yield function


def uncovered(function: Callable[..., Any]) -> UncoveredFunctionError:
    """The error that names the function and a way out."""
    name = str(getattr(function, "__name__", function)).removeprefix("special_")
    for row in OPS.values():
        if row.differs and name == row.name:
            return UncoveredFunctionError(f"{row.differs}: call maskserve.{row.name}")
        if name in row.aliases:
            return UncoveredFunctionError(
                f"torch.{name} means several things; maskserve.{row.name} gives the {row.summary}"
            )
    return UncoveredFunctionError(f"torch.{name} has no rule for a MaskedTensor: {WAY_OUT}")
