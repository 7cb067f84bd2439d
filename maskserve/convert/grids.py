"""Datasets of xarray, which reads netCDF and Zarr, as ours and back. xarray itself masks nothing here and scales nothing."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from maskserve.convert.cf import BOOL, FILL, OF_PACKING, variable_from
from maskserve.convert.dataset import Dataset, DataVariable, Reading, Writing, left_out, n_bytes_of, widened
from maskserve.convert.fills import Number, fill_of, holds, said
from maskserve.convert.formats import library
from maskserve.convert.payloads import with_safe_names
from maskserve.convert.sizes import refuse_beyond
from maskserve.dtypes import BY_TORCH, Kind, boolean, f16, i8
from maskserve.errors import NotComputableError
from maskserve.payload.header import shown

NUMBERS = "iufb"
SEPARATOR = "/"  # of groups: a name with one would be read back from another group, or not at all
SCRATCH_BYTES = 9  # a cell's float64 once it is scaled, and its mask
ATTRIBUTE_NAME = re.compile(r"[A-Za-z][\w .:@+-]*")  # an underscore first is for what libraries say
INT_END = 1 << 63
NOT_WRITTEN = frozenset({*OF_PACKING, BOOL, "dtype"})  # each would change what is read

Customary: TypeAlias = Mapping[str, tuple[Number, ...]]
"""By numpy's code of a dtype ("f4"): the fill values to try first."""


@contextmanager
def opened(open_store: Callable[[], Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The variables of a store of xarray, lazy and as they are stored, and its attributes.

    Below open_dataset, which would read coordinates at once and take int8 for bool before its fill value is seen. The
    warnings of libraries are kept back: what matters of them is in our notes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = open_store()
        try:
            yield store.load()
        finally:
            store.close()


def read_dataset(
    stored: Mapping[str, Any], attributes: Mapping[str, Any], reading: Reading, *, has_defaults: bool
) -> Dataset:
    """The variables of numbers, with what the conventions call missing masked."""
    variables = {str(name): variable for name, variable in stored.items()}
    others = {name: "text" if v.dtype.kind in "SUO" else v.dtype.name for name, v in variables.items() if is_other(v)}
    kept = {name: variable for name, variable in variables.items() if name not in others}
    sizes = (n_bytes_of(v.shape, v.dtype.itemsize + SCRATCH_BYTES) for v in kept.values())
    refuse_beyond(sum(sizes), reading.memory, "the variables")
    found, notes = [], []
    for name, variable in kept.items():
        cells = np.asarray(variable.values)
        if cells.dtype.kind not in NUMBERS:  # lists of numbers call themselves numbers until they are read
            others[name] = "lists"
            continue
        dims = tuple(map(str, variable.dims))
        one, lines = variable_from(name, cells, variable.attrs, dims, has_defaults=has_defaults)
        found.append(one)
        notes += lines
    renamed, lines_of_names = with_safe_names(found)
    return Dataset(variables=renamed, attributes=dict(attributes), notes=(*left_out(others), *notes, *lines_of_names))


def is_other(variable: Any) -> bool:
    """Whether a variable holds text or a type of the file's own."""
    return variable.dtype.kind not in NUMBERS or variable.dtype.name not in BY_TORCH


# -- out ----------------------------------------------------------------------------------------------------------


def grid_of(dataset: Dataset, writing: Writing, target: str, customary: Customary) -> tuple[Any, list[str]]:
    """The xarray dataset to write, each masked variable with a fill value; and lines about what was decided."""
    xarray = library("xarray")
    variables, notes = widened(refuse_complex(dataset.variables, target), target, f16)
    dims = named_dims(variables)
    flags = {variable.name: flags_of(variable) for variable in variables}
    grid, fills = {}, {}
    for variable in map(without_bool, variables):
        refuse_separator(variable, target)
        fill = fill_for(variable, writing, customary)
        if fill is not None:
            fills[variable.name] = fill
        # as an attribute: given as encoding, xarray would write it over every valid NaN
        attributes = writable(variable.attributes) | flags[variable.name] | ({} if fill is None else {FILL: fill})
        encoding = {FILL: None} if fill is None else {}
        cells = variable.filled(fill)
        grid[variable.name] = xarray.Variable(dims[variable.name], cells, attributes, encoding=encoding)
    shown_fills = {v.name: fills[v.name] for v in variables if v.has_masked}
    return xarray.Dataset(grid, attrs=writable(dataset.attributes)), notes + said(shown_fills, FILL)


def fill_for(variable: DataVariable, writing: Writing, customary: Customary) -> Any:
    """The fill value that `variable` needs: where cells are masked, or a valid one would be read as never written."""
    first = customary.get(variable.cells.dtype.str[1:], ())
    if variable.has_masked:
        return fill_of(variable, writing.fill_value, first)
    if not variable.shape or variable.cells.dtype.itemsize == 1:  # read_dataset takes none of these for never written
        return None
    values, defaults = variable.valid_cells(), [variable.cells.dtype.type(value) for value in first if value == value]
    return fill_of(variable, None, first) if any(holds(values, default) for default in defaults) else None


def refuse_separator(variable: DataVariable, target: str) -> None:
    if any(SEPARATOR in name for name in (variable.name, *(variable.dims or ()))):
        raise NotComputableError(
            f"{target} has no {SEPARATOR} in names, and there is {shown(variable.name)}; rename it, or write .npz",
            parameter=shown(variable.name),
        )


def refuse_complex(variables: Iterable[DataVariable], target: str) -> tuple[DataVariable, ...]:
    for variable in variables:
        if variable.dtype.kind is Kind.COMPLEX:
            name = shown(variable.name)
            raise NotComputableError(
                f"{target} has no complex numbers, and {name} is complex; write .npz", parameter=name
            )
    return tuple(variables)


def flags_of(variable: DataVariable) -> dict[str, str]:
    """What says that bytes are bools: to us, and to xarray where none is masked; it would take a fill value for True."""
    if variable.dtype is not boolean:
        return {}
    return {BOOL: "bool"} | ({} if variable.has_masked else {"dtype": "bool"})


def without_bool(variable: DataVariable) -> DataVariable:
    """A bool variable as bytes of 0 and 1; others as they are."""
    if variable.dtype is not boolean:
        return variable
    return replace(variable, dtype=i8, cells=variable.cells.astype(np.int8))


def named_dims(variables: Iterable[DataVariable]) -> dict[str, tuple[str, ...]]:
    """The names of every variable's dims; made up where there are none, alike for alike sizes."""
    given = list(variables)
    sizes: dict[str, int] = {}
    for variable in given:
        for dim, size in zip(variable.dims or (), variable.shape, strict=False):
            if sizes.setdefault(dim, size) != size:
                raise NotComputableError(
                    f"the dim {shown(dim)} has {sizes[dim]} cells in one variable and {size} in {shown(variable.name)}; "
                    "here a dim has one size: pick variables with --tensor",
                    parameter="tensor",
                )
    return {variable.name: variable.dims or made_up(variable, sizes) for variable in given}


def made_up(variable: DataVariable, sizes: dict[str, int]) -> tuple[str, ...]:
    names = []
    for i, size in enumerate(variable.shape):
        name = f"dim_{i}"
        if sizes.get(name, size) != size:
            name = f"{variable.name}_{name}"
        while sizes.get(name, size) != size:
            name += "_"
        sizes[name] = size
        names.append(name)
    return tuple(names)


def writable(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that a file can hold and that are still true: not those of how cells were packed."""
    kept = {key: value for key, value in attributes.items() if key not in NOT_WRITTEN and ATTRIBUTE_NAME.fullmatch(key)}
    return {key: value for key, value in kept.items() if is_writable(value)}


def is_writable(value: Any) -> bool:
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        return bool(value) and kinds in ({str}, {int}, {float}, {int, float}) and all(map(is_writable, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    return not isinstance(value, int) or -INT_END <= value < INT_END
