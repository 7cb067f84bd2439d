"""Columns of an Arrow table as variables, and back: a null is a masked cell, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from maskserve.convert.dataset import Array, Dataset, DataVariable, Reading, left_out, variable_of, widened
from maskserve.convert.formats import library
from maskserve.convert.payloads import with_safe_names
from maskserve.convert.sizes import refuse_beyond
from maskserve.dtypes import Kind
from maskserve.errors import NotComputableError, PayloadError, UnknownTensorError, nearest
from maskserve.payload.header import shown

ROW = "row"


def kind_of(type_: Any) -> str | None:
    """What a column holds, in a word, where it holds no numbers; None where it does."""
    types = library("pyarrow").types
    if types.is_dictionary(type_):
        return kind_of(type_.value_type)
    if types.is_integer(type_) or types.is_floating(type_) or types.is_boolean(type_) or types.is_null(type_):
        return None
    words = (
        ("text", (types.is_string, types.is_large_string, types.is_string_view)),
        ("bytes", (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)),
        ("timestamp", (types.is_timestamp, types.is_date)),
        ("time", (types.is_time, types.is_duration, types.is_interval)),
        ("decimal", (types.is_decimal,)),
    )
    return next((word for word, tests in words if any(test(type_) for test in tests)), "nested")


def chosen(schema: Any, reading: Reading) -> tuple[list[str], tuple[str, ...]]:
    """The columns to read, all of numbers, and the line that says which are left out."""
    check_names(schema.names, reading)
    kinds = {name: kind_of(schema.field(name).type) for name in reading.columns or schema.names}
    others = {name: kind for name, kind in kinds.items() if kind is not None}
    if reading.columns and others:
        name, kind = next(iter(others.items()))
        raise PayloadError(
            f"the column {shown(name)} holds no numbers but {kind}; leave it out of --columns", parameter="columns"
        )
    return [name for name, kind in kinds.items() if kind is None], left_out(others)


def check_names(names: list[str], reading: Reading) -> None:
    """Raise where a name stands twice, or a column that was asked for is not there."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PayloadError(f"the column {shown(name)} is there twice; rename one")
        seen.add(name)
    for name in reading.columns or ():
        if name not in seen:
            some = ", ".join(shown(n, 40) for n in names[:8]) + (", …" if len(names) > 8 else "")
            raise UnknownTensorError(
                f"there is no column {shown(name)}; the file has {some}{nearest(name, names)}",
                parameter="columns",
                allowed=[shown(n) for n in names],
            )


def refuse_rows(n_rows: int, schema: Any, names: Iterable[str], memory: int) -> None:
    """Raise where `n_rows` of the columns, with their masks, would not fit into memory."""
    width = sum(width_of(schema.field(name).type) + 1 for name in names)
    refuse_beyond(n_rows * width, memory, f"{n_rows} rows")


def width_of(type_: Any) -> int:
    types = library("pyarrow").types
    if types.is_dictionary(type_):
        return width_of(type_.value_type)
    return 8 if types.is_null(type_) else max(1, int(type_.bit_width) // 8)


def dataset_of(table: Any, notes: tuple[str, ...]) -> Dataset:
    """The columns of `table`, all of numbers, as 1-D variables along `row`."""
    dim = ROW
    while dim in table.column_names:  # a variable that is named like its dim would be a coordinate
        dim += "_"
    columns = (variable_of_column(name, table.column(name), dim) for name in table.column_names)
    variables, renamed = with_safe_names(columns)
    return Dataset(variables=variables, notes=(*notes, *renamed))


def variable_of_column(name: str, column: Any, dim: str) -> DataVariable:
    """One column; null is masked, and NaN is a value."""
    pa = library("pyarrow")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        column = column.cast(pa.float64())
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
    variable = variable_of(name, cells_of(array), valid, dims=(dim,))
    assert variable is not None, "kind_of let only numbers pass"
    return variable.hidden_as_zero()


def cells_of(array: Any) -> Array:
    """The cells of an Arrow array of numbers, whatever lies in those that are null."""
    pa = library("pyarrow")
    if pa.types.is_boolean(array.type):
        cells: Array = array.fill_null(False).to_numpy(zero_copy_only=False)
        return cells
    dtype = np.dtype(array.type.to_pandas_dtype())
    values = array.buffers()[1]
    if values is None or len(array) == 0:
        return np.zeros(len(array), dtype)
    return np.frombuffer(values, dtype, len(array), array.offset * dtype.itemsize).copy()


def table_of(dataset: Dataset, target: str) -> tuple[Any, list[str]]:
    """The variables as a table, null where masked; and lines about what was decided."""
    pa = library("pyarrow")
    check_columns(dataset, target)
    variables, notes = widened(dataset.variables, target)
    return pa.table({v.name: column_of(v) for v in variables}), notes


def check_columns(dataset: Dataset, target: str) -> None:
    """Raise where the variables are not columns of one length."""
    for variable in dataset.variables:
        name = shown(variable.name)
        if len(variable.shape) != 1:
            raise NotComputableError(
                f"{target} holds columns, and {name} has shape {variable.shape}; pick 1-D variables with --tensor, or "
                "write .npz or .nc",
                parameter="tensor",
            )
        if variable.dtype.kind is Kind.COMPLEX:
            raise NotComputableError(
                f"{target} has no complex numbers, and {name} is complex; write .npz", parameter=name
            )
        if len(variable.cells) != len(dataset.variables[0].cells):
            first = dataset.variables[0]
            raise NotComputableError(
                f"{target} holds columns of one length; {shown(first.name)} has {len(first.cells)} cells, {name} "
                f"{len(variable.cells)}: pick those of one length with --tensor",
                parameter="tensor",
            )


def column_of(variable: DataVariable) -> Any:
    pa = library("pyarrow")
    hidden = ~variable.valid if variable.valid is not None and variable.has_masked else None
    return pa.array(variable.cells, mask=hidden, from_pandas=False)
