"""Payload bytes as torch tensors, and back, without a copy where the bytes are aligned. The one module with torch."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import numpy as np
import torch

from maskserve.compact import Bits, Lengths, Mask, as_bools
from maskserve.dtypes import BY_TORCH, DType, boolean
from maskserve.errors import DataError, DtypeError, MaskDtypeError, MaskError, PayloadError, TooLargeError
from maskserve.patterns import CSR, Pattern
from maskserve.payload.format import Buffer, Output, Payload
from maskserve.payload.header import Shape, TensorInfo, shown
from maskserve.payload.sparse_parts import COO_PARTS, CSR_PARTS
from maskserve.payload.variables import MaskKind, MaskSource, Variable
from maskserve.sparse import check_range, densified, from_coo, from_csr, stacked
from maskserve.tensor import MaskedTensor

SPREAD, SMALL_SPREAD = 9, 1 << 20
"""How many times the bytes of its payload a sparse tensor may have with every cell, or so many bytes."""
FEW = 1 << 22
"""Cells up to which numpy looks at them: as fast as torch, which begins later and then waits for all of its own threads."""


def load(payload: Payload, variable: Variable) -> tuple[torch.Tensor, Mask | None]:
    """The tensor of `variable` and its mask: bool, True = valid, as many dims (size 1 broadcasts); lengths and bits stay compact;
    None = all valid.

    Both may share the memory of the payload: they are read, never written to.
    """
    if variable.stored is not None:
        return spread_out(payload, variable)
    data = load_tensor(payload, variable.info)
    return data, None if variable.mask is None else load_mask(payload, variable.info, variable.mask)


def load_sparse(payload: Payload, variable: Variable) -> tuple[Pattern, torch.Tensor, torch.Tensor | None]:
    """The pattern of a sparse variable, its stored values and which of them are valid (None: all), each index checked."""
    stored = variable.stored
    assert stored is not None
    first, *columns, values = (load_tensor(payload, part) for part in stored.parts)
    shape = torch.Size(variable.info.shape)
    try:
        if columns:
            pattern, values = from_csr(first, columns[0], values, shape)
        else:
            check_range(first.long(), shape)
            pattern, values = from_coo(first.long(), values, shape, is_sorted=True)
    except DataError as error:
        raise PayloadError(f"{shown(variable.name)}: {error.message}", parameter=shown(variable.name)) from None
    return (
        pattern,
        values,
        None if variable.mask is None else as_bools(load_mask(payload, stored.values, variable.mask)),
    )


def spread_out(payload: Payload, variable: Variable) -> tuple[torch.Tensor, torch.Tensor]:
    """A sparse variable as a strided one, where that is in proportion to the payload."""
    n_bytes = variable.info.n_cells * (variable.info.dtype.n_bytes + 1)
    most = max(SMALL_SPREAD, SPREAD * payload.n_bytes)
    if n_bytes > most:
        raise TooLargeError(
            f"{shown(variable.name)} is sparse, and with every cell it has {n_bytes} bytes, where at most {most} are spread "
            "out here; reductions, softmax and scans take it as it is stored",
            parameter=shown(variable.name),
        )
    pattern, values, mask = load_sparse(payload, variable)
    dense = densified(pattern, MaskedTensor._of(values, None if mask is None else mask.expand(values.shape)))
    return dense._data, dense._full_mask()


def sparse_outputs(
    name: str, mask_name: str, pattern: Pattern, values: torch.Tensor, mask: torch.Tensor
) -> Iterator[Output]:
    """The parts of a sparse tensor as they are written, and the mask of its stored values."""
    if pattern.layout is CSR:
        yield output(f"{name}.{CSR_PARTS[0]}", pattern.rows_begin())
        yield output(f"{name}.{CSR_PARTS[1]}", pattern.coordinates()[1])
        yield output(f"{name}.{CSR_PARTS[2]}", values)
    else:
        yield output(f"{name}.{COO_PARTS[0]}", stacked(pattern))
        yield output(f"{name}.{COO_PARTS[1]}", values)
    yield output(mask_name, mask)


def load_tensor(payload: Payload, info: TensorInfo) -> torch.Tensor:
    """The tensor that `info` describes; a BOOL tensor is checked to hold bytes 0 and 1 only."""
    data = tensor_of(payload.read(info.name), info.dtype, info.shape)
    if info.dtype is boolean:
        refuse_other_bytes(data, info.name, is_mask=False)
    return data


def tensor_of(buffer: Buffer, dtype: DType, shape: Shape) -> torch.Tensor:
    """A tensor of `shape` over the bytes of `buffer`, or over an aligned copy where they start at an odd address."""
    torch_dtype: torch.dtype = getattr(torch, dtype.torch)
    if sys.byteorder != "little":
        raise DtypeError("payloads are little-endian, and this machine is not")
    if memoryview(buffer).nbytes == 0:
        return torch.empty(shape, dtype=torch_dtype)
    if not memoryview(buffer).readonly:
        return _viewed(torch.frombuffer(buffer, dtype=torch.uint8), torch_dtype, shape)
    cells = np.frombuffer(buffer, np.uint8)
    # A writable alias, since torch warns of read-only memory, once per process and unfilterably across threads;
    # it keeps `cells` alive, and torch keeps it alive.
    alias = (ctypes.c_char * cells.nbytes).from_address(cells.ctypes.data)
    alias.owner = cells  # type: ignore[attr-defined]  # ctypes arrays take attributes
    return _viewed(torch.frombuffer(alias, dtype=torch.uint8), torch_dtype, shape)


def _viewed(raw: torch.Tensor, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    aligned = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
    return aligned.view(dtype).reshape(shape)


def load_mask(payload: Payload, of: TensorInfo, mask: MaskSource) -> Mask:
    """The mask of the tensor `of`, True = valid: bool, whose shape broadcasts to the tensor's, or as its lengths or bits."""
    cells = tensor_of(payload.read(mask.info.name), mask.info.dtype, mask.info.shape)
    match mask.kind:
        case MaskKind.LENGTHS:
            return _from_lengths(cells, of, mask.info.name)
        case MaskKind.BITMASK:
            return Bits(~cells if mask.means == "missing" else cells, torch.Size(of.shape))
        case MaskKind.BOOL:
            valid = _checked(cells, mask.info.name)
            return ~valid if mask.means == "missing" else valid


def output(name: str, tensor: torch.Tensor) -> Output:
    """`tensor` as it is written: little-endian bytes in row-major order, shared with the tensor where they lie so."""
    word = str(tensor.dtype).removeprefix("torch.")
    if word not in BY_TORCH or not BY_TORCH[word].code:
        held = [known for known, dtype in BY_TORCH.items() if dtype.code]
        raise DtypeError(f"{shown(name)} is {word}, which a payload cannot hold: give one of {', '.join(held)}")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = plain.reshape(-1)
    if flat.stride(0) != 1:  # one cell, or none, is contiguous whatever its stride, and then torch views no bytes of it
        flat = flat.clone(memory_format=torch.contiguous_format)
    cells = flat.view(torch.uint8).numpy()
    return Output(name, BY_TORCH[word], tuple(tensor.shape), cells.data)


def _checked(cells: torch.Tensor, name: str) -> torch.Tensor:
    refuse_other_bytes(cells, name, is_mask=True)
    return cells.view(torch.bool)


def refuse_other_bytes(cells: torch.Tensor, name: str, *, is_mask: bool) -> None:
    """Raise where bools are more than 0 and 1."""
    if not _has_other_bytes(cells):
        return
    if is_mask:
        raise MaskDtypeError(
            f"{shown(name)} holds bytes other than 0 and 1; write true and false (mask.bool() in torch)",
            parameter=shown(name),
        )
    raise PayloadError(
        f"{shown(name)} is BOOL and holds bytes other than 0 and 1; write it as bool", parameter=shown(name)
    )


def _has_other_bytes(cells: torch.Tensor) -> bool:
    """Whether a byte is more than 1: torch takes any, and some of its kernels then go wrong."""
    raw = cells.reshape(-1).view(torch.uint8)
    return int(raw.numpy().max(initial=0)) > 1 if raw.numel() <= FEW else bool(raw.amax() > 1)


def _from_lengths(lengths: torch.Tensor, of: TensorInfo, name: str) -> Lengths:
    """(B,) lengths of a (B, T, D) tensor: the first cells along T are valid."""
    dim = lengths.dim()
    n = of.shape[dim]
    if lengths.numel() and (bool(lengths.amin() < 0) or bool(lengths.amax() > n)):
        raise MaskError(
            f"{shown(name)} holds a length outside 0 to {n}, the size of dim {dim} of {shown(of.name)}",
            parameter=shown(name),
        )
    return Lengths(lengths.long(), dim, torch.Size(of.shape))
