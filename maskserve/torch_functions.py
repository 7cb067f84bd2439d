"""Which function of torch is which row: what `torch.sum(m)` and `plain + m` reach. What no row covers raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from maskserve import autograd
from maskserve.errors import MaskError, MaskserveError, UncoveredFunctionError
from maskserve.functions import in_torchs_words, method, public
from maskserve.ops import OPS
from maskserve.ops.refusals import REFUSALS
from maskserve.ops.rows import Cells, Contraction, Elementwise, Move, Row
from maskserve.tensor import plain_index

NAMESPACES = (torch, torch.Tensor, torch.nn.functional, torch.special, torch.linalg)
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
    if getattr(function, "__name__", "") in in_place():
        # not a TypeError: Python would compute plain + m, and leave behind what shares plain's cells
        raise MaskError(
            f"{name_of(function)} would change data in place without its mask: write m += ..., or m[...] = ..., where m is a "
            "MaskedTensor"
        )
    ours = table().get(function)
    if ours is None:
        raise uncovered(function)
    if kwargs.pop("out", None) is not None:
        raise UncoveredFunctionError(f"{name_of(function)}: out= would lose the mask; use the returned MaskedTensor")
    if kwargs.get("inplace"):
        raise UncoveredFunctionError(
            f"{name_of(function)}: inplace=True would change data and not mask; leave it out and use the returned MaskedTensor"
        )
    for name in [k for k, v in kwargs.items() if v is None or k.startswith("_") or k == "inplace"]:
        del kwargs[name]  # None is torch's word for what is not given: torch.unique hands on dim=None
    try:
        return ours(*args, **kwargs)
    except TypeError as error:
        if isinstance(error, MaskserveError) or "argument" not in str(error):
            raise
        raise UncoveredFunctionError(f"{name_of(function)}: {error}, as a MaskedTensor is given") from error


@cache
def table() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """torch function -> ours."""
    found = {theirs: ours for row in OPS.values() if not row.differs for theirs, ours in functions_of(row)}
    return found | {torch.autograd.grad: autograd.grad_by, torch.autograd.backward: autograd.backward}


@cache
def in_place() -> frozenset[str]:
    """What torch calls the forms of elementwise ops that write into their first operand."""
    rows = [row for row in OPS.values() if isinstance(row, Elementwise)]
    return frozenset({f"{row.name}_" for row in rows} | {f"__i{row.operator}__" for row in rows if row.operator})


def functions_of(row: Row) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """torch's functions under the row's names, and what they call here."""
    for namespace in NAMESPACES:
        if namespace is torch.Tensor and not row.is_method:
            continue
        ours = method(row.name) if namespace is torch.Tensor else public(row.name)
        for name in (row.name, *row.torch):
            theirs = getattr(namespace, name, None)
            if callable(theirs) and f"{namespace.__name__}.{name}".removeprefix("torch.") not in row.unlike:
                yield theirs, spoken(row, ours) if row.torch_words or row.torch_values or row.torch_defaults else ours
    if isinstance(row, Contraction) and row.operator:
        yield getattr(torch.Tensor, f"__r{row.operator}__"), reflected(public(row.name))
    if isinstance(row, Move) and row.cells is Cells.ALL and hasattr(torch._C._VariableFunctions, row.name):
        yield getattr(torch._C._VariableFunctions, row.name), public(row.name)  # what torch calls for a list of tensors


def reflected(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our function of two tensors, called with the second one first."""

    def called(second: Any, first: Any) -> Any:
        return ours(first, second)

    return called


def spoken(row: Row, ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our function, called in torch's words and with torch's defaults."""
    worded = in_torchs_words(row, ours)

    def called(*args: Any, **kwargs: Any) -> Any:
        positional = {p.name for p in row.callable[: len(args) - 1]}
        missing = {k: v for k, v in row.torch_defaults.items() if k not in positional and kwargs.get(k) is None}
        return worded(*args, **kwargs | missing)

    return called


def name_of(function: Callable[..., Any]) -> str:
    return "torch." + str(getattr(function, "__name__", function)).removeprefix("special_")


def uncovered(function: Callable[..., Any]) -> UncoveredFunctionError:
    """The error that names the function and a way out."""
    name = name_of(function).removeprefix("torch.")
    way_out = next((refusal.instead for refusal in REFUSALS if name in refusal.functions), WAY_OUT)
    if getattr(torch.nn.functional, name, None) is function:
        return UncoveredFunctionError(f"torch.nn.functional.{name} has no rule for a MaskedTensor: {way_out}")
    for row in OPS.values():
        if row.differs and name == row.name:
            return UncoveredFunctionError(f"{row.differs}: call maskserve.{row.name}")
        if name in [other.replace(".", "_") for other in row.unlike]:
            return UncoveredFunctionError(
                f"torch.{name.replace('_', '.', 1)} means other things too; maskserve.{row.name} gives the {row.summary}"
            )
        if name == f"nan{row.name}":
            return UncoveredFunctionError(f'torch.{name}: call maskserve.{row.name} with nan="omit"')
        if name in row.aliases:
            return UncoveredFunctionError(
                f"torch.{name} means several things; maskserve.{row.name} gives the {row.summary}"
            )
    return UncoveredFunctionError(f"torch.{name} has no rule for a MaskedTensor: {way_out}")
