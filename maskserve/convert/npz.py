"""A NumPy .npz file: a zip archive of arrays; X.mask is the mask of X, True = valid, as in a payload."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator

import numpy as np

from maskserve.convert.dataset import Array, Dataset, DataVariable, Reading, Writing, left_out, variable_of, widened
from maskserve.convert.npy import array_of
from maskserve.convert.payloads import safe_name
from maskserve.convert.sizes import refuse_beyond
from maskserve.errors import PayloadError, TooLargeError
from maskserve.payload.header import DEFAULT_LIMITS, shown
from maskserve.payload.variables import MASK

SUFFIX = ".npy"
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the two that NumPy writes
ENCRYPTED = 1


def read(path: str, reading: Reading) -> Dataset:
    """Every array under its name; which is whose mask is for the payload's rules to say."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        refuse_bomb(entries, reading.memory)
        arrays = dict(arrays_of(archive, entries, reading.memory))
    if lost := [name for name, array in arrays.items() if array is None and safe_name(name) != name]:
        raise PayloadError(
            f"{shown(lost[0])} is a mask by its name and holds text or objects: left out, its cells would be valid; save it "
            "as bool"
        )
    return Dataset(
        variables=tuple(variable for variable in arrays.values() if variable is not None),
        notes=left_out({name: "text, objects or a type of NumPy's own" for name, v in arrays.items() if v is None}),
    )


def refuse_bomb(entries: list[zipfile.ZipInfo], memory: int) -> None:
    """Raise where the archive's directory says that it does not fit, before any of it is unpacked."""
    if len(entries) > DEFAULT_LIMITS.tensors:
        raise TooLargeError(f"the archive has {len(entries)} entries; at most {DEFAULT_LIMITS.tensors} are read")
    refuse_beyond(sum(entry.file_size for entry in entries), memory, "the archive, unpacked,")
    names = [entry.filename for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PayloadError(f"the archive has the entry {shown(twice[0])} twice; rename one")
    for entry in entries:
        if entry.flag_bits & ENCRYPTED or entry.compress_type not in METHODS:
            raise PayloadError(f"{shown(entry.filename)} is encrypted or packed in a way that NumPy does not write")


def arrays_of(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], memory: int
) -> Iterator[tuple[str, DataVariable | None]]:
    """Each array by name, None where it holds no numbers; the archive stops an entry that outgrows its declared size."""
    for entry in entries:
        if not entry.filename.endswith(SUFFIX):
            raise PayloadError(f"{shown(entry.filename)} is no {SUFFIX} entry: the archive is not NumPy's")
        name = entry.filename.removesuffix(SUFFIX)
        with archive.open(entry) as stream:
            array = array_of(stream, entry.file_size, memory, shown(name))
            if array is not None and stream.read(1):
                raise PayloadError(f"{shown(name)} is longer than the archive's directory says")
        yield name, None if array is None else variable_of(name, array)


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes every variable and its mask; lines about what was decided."""
    variables, notes = widened(dataset.variables, "NumPy")
    with zipfile.ZipFile(path, "w") as archive:  # by hand: numpy.savez takes names as keywords, and one is `file`
        for variable in variables:
            add(archive, variable.name, variable.cells)
            if variable.valid is not None:
                add(archive, f"{variable.name}.{MASK}", variable.valid)
    return notes


def add(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with archive.open(zipfile.ZipInfo(name + SUFFIX), "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)
