"""A value that stands for masked cells in formats without masks: one that no valid cell has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from maskserve.convert.dataset import Array, DataVariable
from maskserve.dtypes import boolean, u8
from maskserve.errors import NotComputableError, ParameterError
from maskserve.payload.header import shown

Number: TypeAlias = int | float

LARGEST_EXACT = 2**53
"""Up to here a double holds every whole number."""


def fill_of(
    variable: DataVariable, asked: Number | None, customary: Iterable[Number], *, as_double: bool = False
) -> Any:
    """The fill value of `variable`, in its dtype: the one asked for, else the first customary one that is free, else any.

    `as_double`: the format keeps it as a double, so that it must be exact there.
    """
    values = variable.valid_cells()
    if asked is not None:
        return checked(variable, asked, values)
    for candidate in (*customary, *ordinary(variable.cells.dtype), *gaps(values)):
        fill = as_cell(candidate, variable.cells.dtype)
        if fill is not None and not (as_double and is_inexact(fill)) and not holds(values, fill):
            return fill
    raise NotComputableError(
        f"{shown(variable.name)} has masked cells and no {variable.dtype.name} is free to stand for them; compute with a "
        f"wider dtype first (reduce and scan take --dtype), or write a format that has masks: .npz, .parquet, .safetensors",
        parameter=shown(variable.name),
    )


def checked(variable: DataVariable, asked: Number, values: Array) -> Any:
    fill = as_cell(asked, variable.cells.dtype)
    if fill is None:
        raise ParameterError(
            f"--fill-value {asked} does not fit {shown(variable.name)}, which is {variable.dtype.name}",
            parameter="fill_value",
        )
    if holds(values, fill):
        raise ParameterError(
            f"--fill-value {asked} is the value of a valid cell of {shown(variable.name)}; give one that no cell has",
            parameter="fill_value",
        )
    return fill


def as_cell(value: Number, dtype: np.dtype[Any]) -> Any:
    """`value` in `dtype`; None where it does not fit. A float is rounded, but not to infinity."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            cell = dtype.type(value)
        return None if np.isinf(cell) and abs(value) != np.inf else cell
    if dtype.kind not in "iu" or value != value or value in (np.inf, -np.inf) or value != int(value):
        return None
    bounds = np.iinfo(dtype)
    return dtype.type(int(value)) if bounds.min <= value <= bounds.max else None


def holds(values: Array, fill: Any) -> bool:
    """Whether one of `values` is `fill`, or a NaN where that is one."""
    return bool((np.isnan(values) if fill != fill else values == fill).any())


def is_inexact(fill: Any) -> bool:
    return fill.dtype.kind in "iu" and abs(int(fill)) > LARGEST_EXACT


def ordinary(dtype: np.dtype[Any]) -> tuple[Number, ...]:
    """What to try where every customary value is taken."""
    if dtype.kind == "f":
        largest = float(np.finfo(dtype).max)
        return (float("nan"), -largest, largest, float("-inf"), float("inf"))
    if dtype == np.bool_:
        return ()
    bounds = np.iinfo(dtype)
    return (int(bounds.min), int(bounds.max), -9999, -LARGEST_EXACT, LARGEST_EXACT)


def gaps(values: Array) -> Iterator[Number]:
    """A few integers that lie between two of `values`; lazily, since it has to sort them."""
    if values.dtype.kind not in "iu":
        return
    used = np.unique(values)
    if not used.size:
        yield 0
        return
    steps = np.diff(used).view(f"u{used.dtype.itemsize}")  # what wraps in int64 is right again as unsigned
    wide = np.flatnonzero(steps > 1)
    near = wide[np.argsort(np.abs(used[wide].astype(np.float64)))[:2]] if wide.size else wide
    for i in near:
        yield int(used[i]) + 1
    yield from (int(used[0]) - 1, int(used[-1]) + 1)


def as_numbers(variable: DataVariable) -> DataVariable:
    """A bool variable as uint8, for formats without bools; others as they are."""
    if variable.dtype is not boolean:
        return variable
    return replace(variable, dtype=u8, cells=variable.cells.astype(np.uint8))


def said(fills: dict[str, Any], word: str) -> list[str]:
    """The line that says which values stand for masked cells.

    >>> said({"rain": -9999.0}, "_FillValue")
    ['masked cells are written as _FillValue: rain -9999.0']
    """
    words = [f"{shown(name, 40)} {fill}" for name, fill in fills.items()]
    more = f" and {len(words) - 20} more" if len(words) > 20 else ""
    return [f"masked cells are written as {word}: {', '.join(words[:20])}{more}"] if words else []
