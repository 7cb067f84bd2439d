"""Zarr: a folder of chunks, read and written as xarray does, but with what is missing masked on the packed values."""

from __future__ import annotations

from functools import partial

from maskserve.convert.cf import DEFAULT_FILLS
from maskserve.convert.dataset import Dataset, Reading, Writing
from maskserve.convert.formats import library
from maskserve.convert.grids import grid_of, opened, read_dataset

VERSION = 2  # read by more programs than 3, and by all that read 3
NAN = (float("nan"),)
CUSTOMARY = {
    **{code: (fill,) for code, fill in DEFAULT_FILLS.items()},
    "i1": (-127,),
    "u1": (255,),
    "f4": NAN,
    "f8": NAN,
}


def read(path: str, reading: Reading) -> Dataset:
    """The arrays of numbers in the root group."""
    with opened(partial(library("xarray.backends").ZarrStore.open_group, path, mode="r")) as (variables, attributes):
        return read_dataset(variables, attributes, reading, has_defaults=False)


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes the folder; lines about what was decided."""
    grid, notes = grid_of(dataset, writing, ".zarr", CUSTOMARY)
    grid.to_zarr(path, mode="w", zarr_format=VERSION, consolidated=True)
    return notes
