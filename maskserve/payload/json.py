"""Payloads as JSON, for people and small tensors: the plain form of a list, and the explicit one that names a dtype.

null only ever means a masked cell; NaN, Infinity and -Infinity are strings, and so are whole numbers that a double
would round. What is read becomes an ordinary payload, so that all that follows is the same code. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NoReturn, TypeAlias

from maskserve.dtypes import BY_CODE, DType, Kind, boolean, f64, i64
from maskserve.errors import NotComputableError, PayloadError, TooLargeError, nearest
from maskserve.payload.cells import Cells, cells_of
from maskserve.payload.format import BytesPayload, Output, to_bytes
from maskserve.payload.header import (
    DEFAULT_LIMITS,
    METADATA,
    Header,
    Limits,
    Shape,
    TensorInfo,
    check_metadata,
    check_name,
    check_shape,
    shown,
    shown_shape,
    strict_json,
)
from maskserve.payload.metadata import KEY_DIMS, dim_names
from maskserve.payload.texts import texts_of
from maskserve.payload.variables import MASK, Variables, mask_name, resolve

Form: TypeAlias = Literal["plain", "explicit"]
EXPLICIT_FIELDS = frozenset({"dtype", "shape", "dims", "values"})
REQUIRED_FIELDS = frozenset({"dtype", "values"})
CELLS_PER_CHUNK = 4096


class JsonPayload(BytesPayload):
    """A payload that came as JSON; `form` is how it was written, and how its answer is; `has_nulls`: nulls made a mask."""

    def __init__(self, buffer: bytes, form: Form, limits: Limits = DEFAULT_LIMITS, *, has_nulls: bool = False) -> None:
        super().__init__(buffer, limits)
        self.form: Form = form
        self.has_nulls = has_nulls


def decode(text: bytes | str, limits: Limits = DEFAULT_LIMITS) -> JsonPayload:
    """The payload that `text` spells: each tensor under its name and, where it has a null, its mask as NAME.mask."""
    root = _root(text, limits)
    metadata = dict(check_metadata(root.pop(METADATA, {}), limits))
    if len(root) > limits.tensors:
        raise TooLargeError(f"the payload has {len(root)} tensors; at most {limits.tensors} are read")
    explicit = {name for name, entry in root.items() if isinstance(entry, dict)}
    outputs: list[Output] = []
    dims: dict[str, object] = {}
    for name, entry in root.items():
        check_name(name, limits)
        cells = _explicit(name, entry, limits) if isinstance(entry, dict) else _plain(name, entry, limits)
        outputs += outputs_of(name, cells, root)
        if isinstance(entry, dict) and "dims" in entry:
            dims[name] = entry["dims"]
    if dims:
        metadata[KEY_DIMS] = json.dumps(dims, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    form: Form = "explicit" if explicit else "plain"
    payload = JsonPayload(to_bytes(outputs, metadata), form, limits, has_nulls=len(outputs) > len(root))
    dim_names(payload.header)
    return payload


def _root(text: bytes | str, limits: Limits) -> dict[str, object]:
    root = document(text, "the payload", limits)
    if not isinstance(root, dict):
        raise PayloadError('the payload must be a JSON object of tensors, like {"data": [[1, 2, null]]}')
    return root


def document(text: bytes | str, what: str, limits: Limits = DEFAULT_LIMITS, *, constants: bool = False) -> object:
    """The one JSON value that `text` is; `constants` as strict_json has it."""
    if len(text) > limits.json_bytes:
        raise TooLargeError(
            f"the JSON has more than {limits.json_bytes} bytes, the most that are read: send large tensors as safetensors"
        )
    try:
        words = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise PayloadError(f"the JSON is not UTF-8: bad byte at {error.start}") from None
    _check_values(words, limits)
    words = words.strip(" \t\r\n")
    root, end = strict_json(words, what, numbers=True, constants=constants)
    if end < len(words):
        raise PayloadError(f"{what} goes on after its JSON value, which ends at character {end}")
    return root


def _check_values(words: str, limits: Limits) -> None:
    """Counts what the parser will make, in a tenth of its time."""
    if limits.json_values is None or 4 * len(words) <= limits.json_values:
        return
    if words.count(",") + 4 * sum(map(words.count, "[{:")) > limits.json_values:
        raise TooLargeError(
            f"the JSON has more than {limits.json_values} values, a list counted as four: "
            "send large tensors as bytes, in safetensors or as binary data"
        )


def outputs_of(name: str, cells: Cells, names: Collection[str]) -> Iterator[Output]:
    """The tensor of `cells` and, where one is null, its mask; `names` are those of all tensors that came."""
    yield Output(name, cells.dtype, cells.shape, cells.data)
    if cells.valid is not None:
        mask = mask_name(name)
        given = next((other for other in (mask, MASK) if other in names), None)
        if given is not None:
            raise PayloadError(
                f"{shown(name)} has null values and a mask, {shown(given)}: say what is masked in one way",
                parameter=shown(name),
            )
        yield Output(mask, boolean, cells.shape, cells.valid)


def _plain(name: str, entry: object, limits: Limits) -> Cells:
    """All ints: I64, all bools: BOOL, else F64."""
    shape, values = _flatten(name, entry, limits)
    kinds = {_kind(name, value) for value in values} - {type(None)}
    if bool in kinds and len(kinds) > 1:
        _fail(name, "mixes true or false with numbers")
    dtype = boolean if kinds == {bool} else i64 if kinds == {int} else f64
    return cells_of(name, values, dtype, shape)


def _kind(name: str, value: object) -> type:
    """bool, int or float: what a value is, also where it is spelled as a string."""
    if isinstance(value, str):
        return int if value.lstrip("-").isdigit() else float
    if value is None or isinstance(value, bool | int | float):
        return type(value)
    return _fail(name, "must hold numbers, true, false or null in its lists")


def _explicit(name: str, entry: dict[str, object], limits: Limits) -> Cells:
    for field in entry:
        if field not in EXPLICIT_FIELDS:
            _fail(name, f"has the unknown field {shown(field)}{nearest(field, EXPLICIT_FIELDS)}")
    if not entry.keys() >= REQUIRED_FIELDS:
        _fail(name, "must have the fields dtype and values")
    dtype = _dtype(name, entry["dtype"])
    shape = shape_of(name, entry["shape"], limits) if "shape" in entry else None
    return shaped_cells(name, dtype, shape, entry["values"], limits)


def shaped_cells(
    name: str, dtype: DType, shape: Shape | None, nested: object, limits: Limits = DEFAULT_LIMITS
) -> Cells:
    """The cells of nested lists, or, where the shape is known, of a flat one; null is a masked cell."""
    found, values = _flatten(name, nested, limits)
    shape = found if shape is None else shape
    check_shape(name, dtype, shape, limits)
    n_cells = TensorInfo(name, dtype, shape, 0, 0).n_cells
    if len(values) != n_cells or (len(found) > 1 and found != shape and n_cells > 0):
        _fail(name, f"has values of shape {shown_shape(found)}; its shape says {shown_shape(shape)}")
    return cells_of(name, values, dtype, shape)


def _dtype(name: str, code: object) -> DType:
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise NotComputableError(
            f"tensor {shown(name)} has dtype {shown(code, 40)}; give one of {', '.join(BY_CODE)}",
            parameter=shown(name),
            allowed=BY_CODE,
        )
    refuse_complex(name, dtype)
    return dtype


def shape_of(name: str, shape: object, limits: Limits = DEFAULT_LIMITS) -> Shape:
    """A shape as JSON gives one, checked."""
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        _fail(name, "has a shape that is not a list of whole numbers")
    if len(shape) > limits.dims:
        raise NotComputableError(f"tensor {shown(name)} has {len(shape)} dims; at most {limits.dims} are computed on")
    return tuple(shape)


def _flatten(name: str, value: object, limits: Limits) -> tuple[Shape, list[object]]:
    """The shape of nested lists, which must be rectangular, and their values in row-major order."""
    shape: list[int] = []
    level: list[object] = [value]
    while level and isinstance(level[0], list):
        n = len(level[0])
        if any(not isinstance(row, list) or len(row) != n for row in level):
            _fail(name, f"has lists of different lengths or depths at level {len(shape) + 1}")
        if len(shape) == limits.dims:
            raise NotComputableError(f"tensor {shown(name)} has more than {limits.dims} dims, the most computed on")
        shape.append(n)
        level = [item for row in level for item in row]  # type: ignore[attr-defined]  # all are lists, checked above
    if any(isinstance(item, list | dict) for item in level):
        _fail(name, f"has lists of different lengths or depths at level {len(shape) + 1}")
    return tuple(shape), level


def encode(outputs: Iterable[Output], metadata: Mapping[str, str], form: Form) -> Iterator[bytes]:
    """The JSON text of `outputs` in pieces, by name; masked cells are null. The plain form leaves the metadata out."""
    held = {output.name: _whole(output) for output in outputs}
    for output in held.values():
        refuse_complex(output.name, output.dtype)
    variables = _variables(held, metadata)
    return _document(held, variables, metadata, form)


def _document(
    held: Mapping[str, Output], variables: Variables, metadata: Mapping[str, str], form: Form
) -> Iterator[bytes]:
    everything = [*variables.computed.values(), *variables.coordinates.values(), *variables.side_inputs.values()]
    opening = "{"
    if form == "explicit" and (said := {key: text for key, text in sorted(metadata.items()) if key != KEY_DIMS}):
        yield f"{{{json.dumps(METADATA)}: {_word(said)}".encode()
        opening = ", "
    for variable in sorted(everything, key=lambda variable: variable.name):
        output = held[variable.name]
        mask = None if variable.mask is None else held[variable.mask.info.name]
        texts = texts_of(output.dtype, output.shape, output.chunks, mask)
        yield f"{opening}{_word(variable.name)}: ".encode()
        opening = ", "
        if form == "plain":
            yield from _nested(output.shape, texts)
        else:
            dims = {} if variable.dims is None else {"dims": list(variable.dims)}
            fields = {"dtype": output.dtype.code, "shape": list(output.shape), **dims}
            yield f'{_word(fields)[:-1]}, "values": '.encode()
            yield from _nested((TensorInfo(output.name, output.dtype, output.shape, 0, 0).n_cells,), texts)
            yield b"}"
    yield b"}\n" if opening != "{" else b"{}\n"


def _nested(shape: Shape, texts: Iterator[str]) -> Iterator[bytes]:
    """Lists in lists, of `shape`; the innermost in pieces."""
    if not shape:
        yield next(texts).encode()
    elif len(shape) == 1:
        yield b"["
        for start in range(0, shape[0], CELLS_PER_CHUNK):
            n = min(CELLS_PER_CHUNK, shape[0] - start)
            yield ((", " if start else "") + ", ".join(islice(texts, n))).encode()
        yield b"]"
    else:
        for row in range(shape[0]):
            yield b", " if row else b"["
            yield from _nested(shape[1:], texts)
        yield b"]" if shape[0] else b"[]"


def _whole(output: Output) -> Output:
    """`output` with its bytes in one piece: JSON is for small tensors."""
    chunks = output.chunks
    data = bytes(chunks) if isinstance(chunks, bytes | bytearray | memoryview) else b"".join(chunks)
    return Output(output.name, output.dtype, output.shape, data)


def _variables(held: Mapping[str, Output], metadata: Mapping[str, str]) -> Variables:
    """The outputs as variables with masks, by the rules that a reader of the same answer would follow."""
    infos = {name: TensorInfo(name, output.dtype, output.shape, 0, 0) for name, output in held.items()}
    if not infos:
        return Variables(computed={}, coordinates={}, side_inputs={})
    return resolve(Header(infos, metadata, 0))


def refuse_complex(name: str, dtype: DType) -> None:
    if dtype.kind is Kind.COMPLEX:
        raise NotComputableError(
            f"{shown(name)} is complex, which JSON cannot hold; use safetensors", parameter=shown(name)
        )


def _word(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fail(name: str, what: str) -> NoReturn:
    raise PayloadError(f"tensor {shown(name)} {what}", parameter=shown(name))
