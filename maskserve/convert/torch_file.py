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

WHAT = "a .pt file is read if it holds a tensor or a flat dict of tensors by name: torch.save({'x': tensor}, path)"


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
    tensors = checked({"data": loaded} if isinstance(loaded, torch.Tensor) else loaded)
    refuse_beyond(sum(t.numel() * t.element_size() for t in tensors.values()), reading.memory, "its tensors")
    return Dataset(variables=tuple(variable(name, tensor) for name, tensor in tensors.items()))


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
