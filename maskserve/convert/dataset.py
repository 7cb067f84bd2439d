"""What every format is read into and written from: variables with masks, names of dims and attributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from maskserve.dtypes import BY_TORCH, DType, bf16, f8_e4m3, f8_e5m2, f32
from maskserve.errors import NotComputableError
from maskserve.payload.cells import decoded
from maskserve.payload.header import shown

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Attributes: TypeAlias = Mapping[str, Any]

FOREIGN_TO_NUMPY = frozenset({bf16, f8_e4m3, f8_e5m2})
"""Floats that numpy lacks: their cells are codes, unsigned integers of the same width."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataVariable:
    """One variable in memory; `valid` has the shape of `cells`, and None means that all are valid."""

    name: str
    dtype: DType
    cells: Array
    valid: Array | None = None
    dims: tuple[str, ...] | None = None
    attributes: Attributes = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.cells.shape)

    @property
    def is_coordinate(self) -> bool:
        """Whether it labels the cells of its only dim, by name."""
        return self.dims == (self.name,)

    @property
    def has_masked(self) -> bool:
        return self.valid is not None and not self.valid.all()

    def valid_cells(self) -> Array:
        """The valid cells, flat."""
        return self.cells.reshape(-1) if self.valid is None else self.cells[self.valid]

    def hidden_as_zero(self) -> DataVariable:
        """The same variable with 0 under its mask: what is written leaks nothing."""
        if self.valid is None or self.valid.all():
            return self
        cells = self.cells.copy()
        cells[~self.valid] = 0
        return replace(self, cells=cells)

    def filled(self, fill: Any) -> Array:
        """The cells with `fill` where they are masked."""
        if not self.has_masked:
            return self.cells
        cells = self.cells.copy()
        cells[~self.valid] = fill  # type: ignore[operator]  # a mask is there where cells are masked
        return cells


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """What a file holds; `notes` say what was left out or decided on the way, a line each."""

    variables: tuple[DataVariable, ...]
    attributes: Attributes = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to read: the `columns` of a table that are wanted, and the bytes that cells may take in memory."""

    columns: tuple[str, ...] | None = None
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How to write: the value that stands for a masked cell, where one was asked for."""

    fill_value: int | float | None = None


def variable_of(name: str, array: Array, valid: Array | None = None, **more: Any) -> DataVariable | None:
    """The variable of a numpy array; None where no dtype of ours holds its cells."""
    dtype = BY_TORCH.get(array.dtype.name)
    if dtype is None:
        return None
    little = np.asarray(array).astype(array.dtype.newbyteorder("<"), copy=False)  # of 0 dims, operators give scalars
    return DataVariable(
        name=name, dtype=dtype, cells=little, valid=None if valid is None else np.asarray(valid), **more
    )


def left_out(names: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The line that says which variables were left out and why, if any were.

    >>> left_out({"carrier": "text", "time": "timestamp"})
    ('left out, not numbers: carrier (text), time (timestamp)',)
    """
    words = [f"{shown(name, 40)} ({what})" for name, what in dict(names).items()]
    more = f" and {len(words) - 20} more" if len(words) > 20 else ""
    return (f"left out, not numbers: {', '.join(words[:20])}{more}",) if words else ()


def widened(variables: Iterable[DataVariable], target: str, *lacking: DType) -> tuple[list[DataVariable], list[str]]:
    """The variables as numpy can hold them; those of a dtype that `target` lacks become f32, which holds each value."""
    foreign = FOREIGN_TO_NUMPY | set(lacking)
    result, said = [], []
    for variable in variables:
        if variable.dtype in foreign:
            said.append(f"{shown(variable.name)} ({variable.dtype.name})")
            wide = decoded(variable.cells, variable.dtype) if variable.dtype in FOREIGN_TO_NUMPY else variable.cells
            variable = replace(variable, dtype=f32, cells=wide.astype(np.float32))
        result.append(variable)
    return result, [
        f"{target} has no such type, written as f32, which holds each value: {', '.join(said)}"
    ] if said else []


def the_only(dataset: Dataset, target: str, instead: str) -> DataVariable:
    """The variable of a format that holds one; coordinates stay behind."""
    variables = [variable for variable in dataset.variables if not variable.is_coordinate]
    if len(variables) != 1:
        names = ", ".join(shown(v.name, 40) for v in variables[:8])
        raise NotComputableError(
            f"{target} holds one variable, and there are {len(variables)}: {names}; pick one with --tensor, or write "
            f"{instead}",
            parameter="tensor",
        )
    return variables[0]


def n_bytes_of(shape: Iterable[int], width: int) -> int:
    return math.prod(int(size) for size in shape) * width
