"""Datasets as payloads, so that every verb works on them, and payloads as datasets, to be written in other formats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from maskserve.convert.dataset import FOREIGN_TO_NUMPY, Array, Attributes, Dataset, DataVariable
from maskserve.convert.formats import Format
from maskserve.dtypes import boolean
from maskserve.errors import NotComputableError, TooLargeError
from maskserve.payload.format import Limits, Output, Payload
from maskserve.payload.header import is_encodable, shown
from maskserve.payload.held import HeldPayload
from maskserve.payload.metadata import KEY_DIMS, KEY_HISTORY
from maskserve.payload.slices import cells_at, stored, validity
from maskserve.payload.sparse_parts import COO_PARTS, CSR_PARTS
from maskserve.payload.variables import MASK, MaskKind, Variable, Variables

KEY_ATTRIBUTES = "maskserve.attributes"
"""Attributes of the file and of each variable, and the order of the variables, as JSON; jobs keep it."""

METADATA_BYTES = 56 * 1024  # of the 64 KiB that a payload may have: jobs add their history


# -- in -----------------------------------------------------------------------------------------------------------


def payload_of(dataset: Dataset, row: Format, limits: Limits) -> HeldPayload:
    """The payload that holds `dataset`; nothing is copied."""
    if not dataset.variables:
        left = "; ".join(dataset.notes)
        raise NotComputableError(f"the file has no variable of numbers{'; ' + left if left else ''}")
    for variable in dataset.variables:
        if not variable.dtype.code:
            raise NotComputableError(
                f"{shown(variable.name)} is {variable.dtype.torch}, which no payload holds; convert it first",
                parameter=shown(variable.name),
            )
    outputs = [output for variable in dataset.variables for output in outputs_of(variable)]
    if len(outputs) > limits.tensors:
        raise TooLargeError(
            f"the file has {len(dataset.variables)} variables, {len(outputs)} tensors with their masks; at most "
            f"{limits.tensors} are read{': pick some with --columns' if row.is_table else ''}"
        )
    metadata, notes = metadata_of(dataset)
    return HeldPayload(
        outputs,
        metadata,
        format=row.name,
        has_own_masks=row.has_own_masks,
        notes=(*dataset.notes, *notes),
        limits=limits,
    )


def outputs_of(variable: DataVariable) -> Iterator[Output]:
    """The variable and, if it has one, its mask."""
    yield Output(variable.name, variable.dtype, variable.shape, buffer_of(variable.cells))
    if variable.valid is not None:
        yield Output(f"{variable.name}.{MASK}", boolean, variable.shape, buffer_of(variable.valid))


def buffer_of(cells: Array) -> memoryview:
    """The bytes of an array in row-major order."""
    return np.ascontiguousarray(cells).reshape(-1).view(np.uint8).data


def metadata_of(dataset: Dataset) -> tuple[dict[str, str], list[str]]:
    """Names of dims, the attributes, and the file's texts as entries of their own; and a line if some did not fit."""
    dims = {v.name: list(v.dims) for v in dataset.variables if v.dims is not None}
    texts = {k: v for k, v in dataset.attributes.items() if isinstance(v, str) and not k.startswith("maskserve.")}
    others = {k: v for k, v in dataset.attributes.items() if k not in texts and not k.startswith("maskserve.")}
    record = {
        "file": plain(others),
        "order": order_of(dataset.variables),
        "variables": {v.name: plain(v.attributes) for v in dataset.variables if v.attributes},
    }
    record = {key: value for key, value in record.items() if value}
    lost, budget = [], METADATA_BYTES - size_of(dims)
    entries = {k: text for k, text in texts.items() if k and k.isprintable() and is_encodable(text)}
    entries |= {KEY_HISTORY: str(dataset.attributes[KEY_HISTORY])} if KEY_HISTORY in dataset.attributes else {}
    while entries and size_of(entries) + size_of(record) > budget:
        lost.append(max(entries, key=lambda key: len(entries[key])))
        del entries[lost[-1]]
    if size_of(record) > budget:
        lost.append("the attributes of the variables")
        record = {}
    metadata = entries | ({KEY_ATTRIBUTES: compact(record)} if record else {})
    metadata |= {KEY_DIMS: compact(dims)} if dims else {}
    return metadata, [f"too long for a payload's metadata, left out: {', '.join(map(shown, lost))}"] if lost else []


def order_of(variables: Iterable[DataVariable]) -> list[str]:
    """The names in their order, where a payload's own order (widest dtype first, then name) is another."""
    names = [v.name for v in variables]
    payload_s = [v.name for v in sorted(variables, key=lambda v: (-v.dtype.n_bytes, v.name))]
    return names if names != payload_s else []


def plain(attributes: Attributes) -> dict[str, Any]:
    """Attributes as JSON can hold them; what it cannot hold is left out."""
    values = {str(key): plain_value(value) for key, value in attributes.items()}
    return {key: value for key, value in values.items() if value is not None and is_encodable(key)}


def plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        items = [plain_value(item) for item in value]
        return None if any(item is None for item in items) else items
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, str):
        return value if is_encodable(value) else None
    return value if isinstance(value, bool | int | float) else None


def compact(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def size_of(record: Any) -> int:
    return len(compact(record).encode())


def with_safe_names(variables: Iterable[DataVariable]) -> tuple[tuple[DataVariable, ...], tuple[str, ...]]:
    """The variables under names that mean a variable in a payload, and the line that says which were renamed.

    For formats that have masks of their own: there a column called `mask` is a column.
    """
    given = list(variables)
    taken = {variable.name for variable in given}
    result, renamed = [], []
    for variable in given:
        name = safe_name(variable.name)
        if name != variable.name:
            while name in taken:
                name += "_"
            taken.add(name)
            renamed.append(f"{shown(variable.name, 40) or 'an empty name'} is {shown(name, 40)} here")
        result.append(replace(variable, name=name))
    line = f"renamed, a payload gives these names a meaning or cannot hold them: {', '.join(renamed[:20])}"
    return tuple(result), (line,) if renamed else ()


def safe_name(name: str) -> str:
    """A name that a payload takes for that of a variable.

    >>> safe_name("mask"), safe_name("rain.mask"), safe_name("a\\tb"), safe_name("")
    ('mask_', 'rain_mask', 'a_b', 'unnamed')
    """
    name = "".join(char if char.isprintable() else "_" for char in name) or "unnamed"
    if name == MASK or name == "__metadata__":
        return f"{name}_"
    for suffix in (*(f".{kind}" for kind in MaskKind), *(f".{part}" for part in (*COO_PARTS, *CSR_PARTS[:2]))):
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}_{suffix[1:]}"
    return name


# -- out ----------------------------------------------------------------------------------------------------------


def dataset_of(payload: Payload, variables: Variables, *, with_sides: bool) -> Dataset:
    """The variables of a payload, the coordinates of their dims and, if asked for, its side inputs."""
    record = attributes_of(payload.header.metadata)
    named = record.get("variables")
    attributes = named if isinstance(named, dict) else {}
    alive = {dim for variable in variables for dim in variable.dims or ()}
    chosen = [*variables, *(c for c in variables.coordinates.values() if c.name in alive)]
    chosen += variables.side_inputs.values() if with_sides else ()
    found = [data_variable(payload, variable, attributes.get(variable.name)) for variable in chosen]
    order = record.get("order")
    rank = {name: i for i, name in enumerate(order)} if isinstance(order, list) and all_text(order) else {}
    found.sort(key=lambda variable: rank.get(variable.name, len(rank)))
    texts = {k: v for k, v in payload.header.metadata.items() if k == KEY_HISTORY or not k.startswith("maskserve.")}
    of_file = record.get("file")
    return Dataset(variables=tuple(found), attributes={**(of_file if isinstance(of_file, dict) else {}), **texts})


def all_text(items: list[Any]) -> bool:
    return all(isinstance(item, str) for item in items)


def attributes_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What KEY_ATTRIBUTES says; nothing where it does not make sense: it is a note, not data."""
    try:
        record = json.loads(metadata.get(KEY_ATTRIBUTES, "{}"))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def spread_out(payload: Payload, variable: Variable) -> tuple[Any, Any]:
    """A sparse variable with every cell, as other formats hold it: (cells, valid), refused where that is out of proportion."""
    from maskserve.payload import tensors  # torch, which no strided variable needs

    data, mask = tensors.spread_out(payload, variable)
    cells = stored(tensors.output("", data).chunks, variable.info.dtype)  # type: ignore[arg-type]  # one buffer
    return cells.reshape(variable.info.shape), mask.numpy()


def data_variable(payload: Payload, variable: Variable, attributes: Any) -> DataVariable:
    """A variable of a payload in memory, 0 under its mask."""
    info = variable.info
    n = info.n_cells
    valid = None
    if variable.stored is not None:
        cells, valid = spread_out(payload, variable)
    else:
        cells = cells_at(payload, info, 0, n).reshape(info.shape)
    if variable.mask is not None and variable.stored is None:
        whole = validity(payload, info, variable.mask)(0, n) if n else np.ones(0, np.bool_)
        valid = np.asarray(whole, np.bool_).reshape(info.shape)
    return DataVariable(
        name=variable.name,
        dtype=info.dtype,
        cells=cells if info.dtype in FOREIGN_TO_NUMPY else cells.view(info.dtype.torch),
        valid=valid,
        dims=variable.dims,
        attributes=attributes if isinstance(attributes, dict) else {},
    ).hidden_as_zero()
