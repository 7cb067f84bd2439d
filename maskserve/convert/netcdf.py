"""netCDF: what its conventions call missing is masked, on the values as they are packed; groups below the root are not read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from maskserve.convert.cf import DEFAULT_FILLS
from maskserve.convert.dataset import Dataset, Reading, Writing
from maskserve.convert.formats import library
from maskserve.convert.grids import grid_of, opened, read_dataset
from maskserve.payload.header import shown

ENGINE = "netcdf4"
CUSTOMARY = {**{code: (fill,) for code, fill in DEFAULT_FILLS.items()}, "i1": (-127,), "u1": (255,)}


def read(path: str, reading: Reading) -> Dataset:
    """The variables of numbers in the root group."""
    with opened(partial(library("xarray.backends").NetCDF4DataStore.open, path)) as (variables, attributes):
        dataset = read_dataset(variables, attributes, reading, has_defaults=True)
    with library("netCDF4").Dataset(path) as file:
        groups = [shown(name, 40) for name in file.groups]
    line = f"groups are not read, only the root is: {', '.join(groups[:20])}"
    return replace(dataset, notes=(*dataset.notes, line)) if groups else dataset


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes netCDF-4; lines about what was decided."""
    grid, notes = grid_of(dataset, writing, ".nc", CUSTOMARY)
    grid.to_netcdf(path, engine=ENGINE, format="NETCDF4")
    return notes
