"""A NumPy .npy file: one array, without a mask. Pickled objects are never loaded."""

from __future__ import annotations

import os
from typing import IO, Any, NamedTuple

import numpy as np

from maskserve.convert.dataset import (
    Dataset,
    DataVariable,
    Reading,
    Writing,
    n_bytes_of,
    the_only,
    variable_of,
    widened,
)
from maskserve.convert.fills import fill_of, said
from maskserve.convert.sizes import refuse_beyond
from maskserve.errors import NotComputableError, PayloadError
from maskserve.payload.header import shown

CUSTOMARY = {"f": (float("nan"), 1e20), "i": (999999,), "u": (999999,)}
"""NaN, then what numpy.ma fills with."""

VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def n_bytes(self) -> int:
        return n_bytes_of(self.shape, self.dtype.itemsize)


def read(path: str, reading: Reading) -> Dataset:
    """The array as the variable `data`."""
    with open(path, "rb") as file:
        array = array_of(file, os.fstat(file.fileno()).st_size, reading.memory, "the array")
    variable = None if array is None else variable_of("data", array)
    if variable is None:
        raise NotComputableError("the array holds no numbers that a payload holds: text, objects, or a wider type")
    return Dataset(variables=(variable,))


def array_of(stream: IO[bytes], n_file: int, memory: int, what: str) -> np.ndarray[Any, np.dtype[Any]] | None:
    """The array that `stream` holds in `n_file` bytes; None where it would have to be unpickled.

    Its size is compared with what the file has and with `memory` before any is spent.
    """
    header = header_of(stream)
    if header is None or header.dtype.hasobject:
        return None
    n_data = n_file - stream.tell()
    if header.n_bytes != n_data:
        raise PayloadError(
            f"{what} is {header.dtype} of shape {shown(str(header.shape))}, {header.n_bytes} bytes, but {n_data} follow its "
            "header: the file is cut short or lies"
        )
    refuse_beyond(header.n_bytes, memory, what)
    stream.seek(0)
    array: np.ndarray[Any, np.dtype[Any]] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def header_of(stream: IO[bytes]) -> Header | None:
    """The header at the start of `stream`; None for one of a version that only structured types need."""
    read_header = VERSIONS.get(np.lib.format.read_magic(stream))
    if read_header is None:
        return None
    shape, _, dtype = read_header(stream)
    return Header(shape, dtype)


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes the one variable of `dataset`; lines about what was decided."""
    [variable], notes = widened([the_only(dataset, ".npy", ".npz")], "NumPy")
    fills = {}
    if variable.has_masked:
        fills[variable.name] = fill_of(variable, writing.fill_value, CUSTOMARY.get(variable.cells.dtype.kind, ()))
    with open(path, "wb") as file:
        save_array(file, variable, fills.get(variable.name))
    return notes + said(fills, "a value")


def save_array(file: IO[bytes], variable: DataVariable, fill: Any) -> None:
    np.lib.format.write_array(file, variable.filled(fill), allow_pickle=False)
