"""A tensor or a flat dict of tensors that torch.save wrote; pickled objects other than tensors are never loaded."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from typing import Any

import torch

from maskserve.convert.dataset import Dataset, DataVariable, Reading, Writing
from maskserve.convert.payloads import outputs_of
from maskserve.convert.sizes import refuse_beyond
from maskserve.errors import PayloadError
from maskserve.payload.header import shown
from maskserve.payload.slices import stored
from maskserve.payload.tensors import output, tensor_of
from maskserve.tensor import MaskedTensor

WHAT = "a .pt file is read if it holds a tensor or a flat dict of tensors by name, masked or not: torch.save({'x': tensor}, path)"


def read(path: str, reading: Reading) -> Dataset:
    """Every tensor under its name, a tensor alone as `data`; X.mask is the mask of X, as in a payload."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            refuse_beyond(
                sum(entry.file_size for entry in archive.infolist()), reading.memory, "the archive, unpacked,"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old pickle; what matters of it is an error
            loaded = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as cause:
        raise PayloadError(f"it holds Python objects, which are never loaded, or is damaged; {WHAT}") from cause
    tensors = checked(parts({"data": loaded} if isinstance(loaded, torch.Tensor | MaskedTensor) else loaded))
    refuse_beyond(sum(t.numel() * t.element_size() for t in tensors.values()), reading.memory, "its tensors")
    return Dataset(variables=tuple(variable(name, tensor) for name, tensor in tensors.items()))


def parts(loaded: Any) -> Any:
    """A dict with each MaskedTensor in it as its data and, under NAME.mask, its mask."""
    if not isinstance(loaded, dict):
        return loaded
    found: dict[Any, Any] = {}
    for name, value in loaded.items():
        own = {name: value}
        if isinstance(value, MaskedTensor):
            own = {name: value.get_data().detach()} | (
                {} if value._mask is None else {f"{name}.mask": value.get_mask()}
            )
        if taken := found.keys() & own.keys():
            raise PayloadError(f"{shown(min(taken))} is there, and the mask of a MaskedTensor too: give one of them")
        found |= own
    return found


def checked(loaded: Any) -> dict[str, torch.Tensor]:
    """`loaded`, if it is a flat dict of dense tensors."""
    if not isinstance(loaded, dict):
        raise PayloadError(f"it holds a {type(loaded).__name__}; {WHAT}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise PayloadError(f"{shown(name, 40)} is a {type(tensor).__name__}; {WHAT}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise PayloadError(f"{shown(name)} is sparse, quantized or has no cells; save it dense, with to_dense()")
    return loaded


def variable(name: str, tensor: torch.Tensor) -> DataVariable:
    out = output(name, tensor)
    assert isinstance(out.chunks, memoryview)
    return DataVariable(name=name, dtype=out.dtype, cells=stored(out.chunks, out.dtype).reshape(out.shape))


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes a dict of the variables and their masks; lines about what was decided: none, torch holds all."""
    tensors = {}
    for variable in dataset.variables:
        for out in outputs_of(variable):
            assert isinstance(out.chunks, memoryview)
            tensors[out.name] = tensor_of(out.chunks, out.dtype, out.shape).clone()
    with open(path, "wb") as file:  # given a path, torch takes its name for one inside the archive
        torch.save(tensors, file)
    return []
