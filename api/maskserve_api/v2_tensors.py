"""The tensors of a request in the Open Inference Protocol v2: their cells in its JSON, or as bytes behind it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from maskserve import dtypes
from maskserve.dtypes import DType
from maskserve.errors import NotComputableError, PayloadError, TooLargeError
from maskserve.payload.cells import Cells
from maskserve.payload.format import Limits, Output
from maskserve.payload.header import check_name, check_shape, shown, shown_shape
from maskserve.payload.json import outputs_of, shape_of, shaped_cells
from maskserve_api.errors import NotOfferedError

Json: TypeAlias = Mapping[str, Any]
DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "BOOL": dtypes.boolean,
        "UINT8": dtypes.u8, "UINT16": dtypes.u16, "UINT32": dtypes.u32, "UINT64": dtypes.u64,
        "INT8": dtypes.i8, "INT16": dtypes.i16, "INT32": dtypes.i32, "INT64": dtypes.i64,
        "FP16": dtypes.f16, "FP32": dtypes.f32, "FP64": dtypes.f64, "BF16": dtypes.bf16,
    }
)  # fmt: skip
BINARY_ONLY = frozenset({dtypes.bf16})
"""What the protocol has no JSON for."""
SHARED_MEMORY = "shared_memory_region"


def tensors(inputs: list[Json], binary: memoryview) -> list[Output]:
    """Each input and, where its JSON has nulls, its mask; `binary` is what follows the JSON, and is used up."""
    names = names_of(inputs)
    outputs: list[Output] = []
    at = 0
    for name, entry in zip(names, inputs, strict=True):
        n_bytes = binary_size(name, entry)
        if n_bytes is None:
            outputs += outputs_of(name, cells(name, entry), names)
            continue
        dtype, shape = described(name, entry)
        due = check_shape(name, dtype, shape)
        if n_bytes != due:
            fail(name, f"has binary_data_size {n_bytes}; {entry['datatype']} of shape {shown_shape(shape)} takes {due}")
        if n_bytes > binary.nbytes - at:
            fail(name, f"has binary_data_size {n_bytes}; {binary.nbytes - at} bytes are left of the body")
        outputs.append(Output(name, dtype, shape, binary[at : at + n_bytes]))
        at += n_bytes
    if at != binary.nbytes:
        raise PayloadError(f"the inputs take {at} bytes, but {binary.nbytes} follow the JSON: they must be the same")
    return outputs


def names_of(entries: list[Json]) -> list[str]:
    names: list[str] = []
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str):
            raise PayloadError("each tensor must have a name, a string", parameter="name")
        check_name(name)
        names.append(name)
    if len(set(names)) < len(names):
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise PayloadError(f"two tensors are called {shown(twice)}", parameter=shown(twice))
    return names


def described(name: str, entry: Json) -> tuple[DType, tuple[int, ...]]:
    code = entry.get("datatype")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise NotComputableError(
            f"tensor {shown(name)} has datatype {shown(code, 40)}; V2 takes {', '.join(DTYPES)}, and safetensors sent to "
            "/v1 more",
            parameter=shown(name),
            allowed=DTYPES,
        )
    return dtype, shape_of(name, entry.get("shape"))


def cells(name: str, entry: Json) -> Cells:
    """The cells that stand in the JSON, flat or in nested lists; null is a masked one."""
    dtype, shape = described(name, entry)
    if "data" not in entry:
        fail(name, "has neither data nor the parameter binary_data_size")
    if dtype in BINARY_ONLY:
        fail(name, f"is {entry['datatype']}, which JSON does not hold: send it as binary data")
    return shaped_cells(name, dtype, shape, entry["data"])


def binary_size(name: str, entry: Json) -> int | None:
    """The binary_data_size of an input; None where its cells stand in the JSON."""
    parameters = parameters_of(entry)
    refuse_shared_memory(parameters)
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        fail(name, "has a binary_data_size that is not a number of bytes")
    if "data" in entry:
        fail(name, "has data and the parameter binary_data_size: send its cells in one way")
    return size


def fail(name: str, what: str) -> NoReturn:
    raise PayloadError(f"tensor {shown(name)} {what}", parameter=shown(name))


def objects(root: Json, name: str, limits: Limits) -> list[Json]:
    """The list of objects that stands under `name`; none where nothing does."""
    entries = root.get(name)
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise PayloadError(f"{name} must be a list of JSON objects", parameter=name)
    if len(entries) > limits.tensors:
        raise TooLargeError(f"there are {len(entries)} {name}; at most {limits.tensors} are read", parameter=name)
    return entries


def parameters_of(entry: Json) -> Json:
    parameters = entry.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise PayloadError("parameters must be a JSON object", parameter="parameters")
    return parameters or {}


def refuse_shared_memory(parameters: Json) -> None:
    if SHARED_MEMORY in parameters:
        raise NotOfferedError("shared memory is not offered: send the cells with the request", parameter=SHARED_MEMORY)
