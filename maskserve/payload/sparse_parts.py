"""Which tensors of a payload are the parts of a sparse one. Imports no torch.

X.coo_indices and X.coo_values, or X.crow_indices, X.col_indices and X.values; `maskserve.shapes` in the metadata has X's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from maskserve.dtypes import boolean, i32, i64
from maskserve.errors import PayloadError
from maskserve.payload.header import (
    DEFAULT_LIMITS,
    LARGEST_BYTES,
    Header,
    Limits,
    Shape,
    TensorInfo,
    check_shape,
    shown,
    shown_shape,
)
from maskserve.payload.metadata import KEY_SHAPES, shapes_of

COO_PARTS = ("coo_indices", "coo_values")
CSR_PARTS = ("crow_indices", "col_indices", "values")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The parts of a sparse tensor, values last: of COO indices and values, of CSR row starts, columns and values."""

    parts: tuple[TensorInfo, ...]

    @property
    def values(self) -> TensorInfo:
        return self.parts[-1]

    @property
    def is_csr(self) -> bool:
        return len(self.parts) == len(CSR_PARTS)


def stored_in(header: Header, limits: Limits = DEFAULT_LIMITS) -> dict[str, Stored]:
    """The sparse tensors of a payload by name, the shapes of their parts checked."""
    found: dict[str, Stored] = {}
    for name in header.tensors:
        owner, _, suffix = name.rpartition(".")
        if owner and suffix in (*COO_PARTS, *CSR_PARTS[:2]):  # X.values alone is a tensor of that name
            parts = COO_PARTS if suffix in COO_PARTS else CSR_PARTS
            found[owner] = _stored(header, owner, parts, found.get(owner))
    for name, stored in found.items():
        _check(name, stored, _shape(header, name), limits)
    return found


def seen(header: Header, stored: Mapping[str, Stored]) -> Header:
    """The header with each sparse tensor in place of its parts: of its whole shape, and of the bytes that it stores."""
    if not stored:
        return header
    parts = {part.name for one in stored.values() for part in one.parts}
    tensors = {name: info for name, info in header.tensors.items() if name not in parts}
    for name, one in stored.items():
        n_bytes = sum(part.n_bytes for part in one.parts)
        begin = one.values.begin
        tensors[name] = TensorInfo(name, one.values.dtype, _shape(header, name), begin, begin + n_bytes)
    return replace(header, tensors=MappingProxyType(tensors), memo={})


def _stored(header: Header, owner: str, parts: tuple[str, ...], known: Stored | None) -> Stored:
    names = [f"{owner}.{part}" for part in parts]
    missing = [name for name in names if name not in header.tensors]
    if missing:
        raise PayloadError(
            f"{shown(missing[0])} is missing: a sparse tensor {shown(owner)} is {' and '.join(map(shown, names))}",
            parameter=shown(owner),
        )
    made = Stored(parts=tuple(header.tensors[name] for name in names))
    if owner in header.tensors or (known is not None and known.parts != made.parts):
        raise PayloadError(f"{shown(owner)} is there in two forms; keep one", parameter=shown(owner))
    return made


def _shape(header: Header, name: str) -> Shape:
    shape = shapes_of(header).get(name)
    if shape is None:
        raise PayloadError(
            f'the sparse tensor {shown(name)} has no shape: the metadata {KEY_SHAPES} says it, as {{"{shown(name)}": [3, 4]}}',
            parameter=KEY_SHAPES,
        )
    return shape


def _check(name: str, stored: Stored, shape: Shape, limits: Limits) -> None:
    *indices, values = stored.parts
    if len(shape) > limits.dims:
        _fail(name, f"has {len(shape)} dims; at most {limits.dims} are computed on")
    check_shape(name, boolean, shape, replace(limits, dim_size=LARGEST_BYTES))  # no cell of it need be there
    for part in indices:
        if part.dtype not in (i64, i32):
            _fail(part.name, f"is {part.dtype.code}; indices are I64 or I32")
    if len(values.shape) != 1:
        _fail(values.name, f"has {len(values.shape)} dims; stored values have one")
    (n,) = values.shape
    wanted = [(shape[0] + 1,), (n,)] if stored.is_csr and len(shape) == 2 else [(len(shape), n)]
    if stored.is_csr and len(shape) != 2:
        _fail(name, f"has {len(shape)} dims; a CSR tensor is a matrix")
    for part, due in zip(indices, wanted, strict=True):
        if part.shape != due:
            _fail(
                part.name,
                f"has shape {shown_shape(part.shape)}; of {n} values and shape {shown_shape(shape)} it is {shown_shape(due)}",
            )


def _fail(name: str, what: str) -> None:
    raise PayloadError(f"tensor {shown(name)} {what}", parameter=shown(name))
