"""The formats that `convert` knows, a row each. Imports nothing but what it needs to tell them apart."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

from maskserve.errors import MissingExtraError, ParameterError, nearest
from maskserve.payload.header import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format: its module in this package has `read(path, reading)` and `write(dataset, path, writing)`."""

    name: str
    summary: str
    suffixes: tuple[str, ...]
    module: str
    extra: str | None = None
    """The extra of ours that installs its libraries."""
    libraries: tuple[str, ...] = ()
    is_folder: bool = False
    is_table: bool = False
    """Whether it holds columns of one length."""
    holds_masks: bool = True
    """Whether a masked cell can be told from every valid one, so that no fill value is needed."""
    has_own_masks: bool = False
    """Whether its own rules say what is missing, so that a request has no say in it."""
    is_ours: bool = False
    """Whether it is a payload already, told by its bytes and not by its suffix."""


FORMATS: tuple[Format, ...] = (
    Format(
        name="safetensors", summary="the payload itself", suffixes=(".safetensors",), module="payload_files", is_ours=True
    ),
    Format(name="json", summary="small payloads for people", suffixes=(".json",), module="json_text", is_ours=True),
    Format(name="npy", summary="one NumPy array", suffixes=(".npy",), module="npy", holds_masks=False),
    Format(name="npz", summary="NumPy arrays by name, masks among them", suffixes=(".npz",), module="npz"),
    Format(
        name="csv", summary="a table as text, commas", suffixes=(".csv",), module="csv_text",
        extra="arrow", libraries=("pyarrow",), is_table=True, has_own_masks=True,
    ),
    Format(
        name="tsv", summary="a table as text, tabs", suffixes=(".tsv",), module="tsv_text",
        extra="arrow", libraries=("pyarrow",), is_table=True, has_own_masks=True,
    ),
    Format(
        name="parquet", summary="a table in columns", suffixes=(".parquet",), module="parquet",
        extra="arrow", libraries=("pyarrow",), is_table=True, has_own_masks=True,
    ),
    Format(
        name="arrow", summary="a table as Arrow IPC (Feather)", suffixes=(".arrow", ".feather", ".ipc"), module="arrow_ipc",
        extra="arrow", libraries=("pyarrow",), is_table=True, has_own_masks=True,
    ),
    Format(
        name="netcdf", summary="gridded data with named dims", suffixes=(".nc", ".nc4", ".cdf"), module="netcdf",
        extra="netcdf", libraries=("xarray", "netCDF4"), holds_masks=False, has_own_masks=True,
    ),
    Format(
        name="zarr", summary="gridded data as a folder of chunks", suffixes=(".zarr",), module="zarr_folder",
        extra="netcdf", libraries=("xarray", "zarr"), is_folder=True,
        holds_masks=False, has_own_masks=True,
    ),
    Format(
        name="geotiff", summary="rasters with a map projection", suffixes=(".tif", ".tiff"), module="geotiff",
        extra="geo", libraries=("rasterio",), holds_masks=False, has_own_masks=True,
    ),
    Format(name="torch", summary="a tensor or a dict of tensors", suffixes=(".pt", ".pth"), module="torch_file"),
)  # fmt: skip


def by_suffix(path: str) -> Format | None:
    """The format that the suffix of `path` says, if it says one.

    >>> by_suffix("a/rain.NC").name, by_suffix("rain.zarr/").name, by_suffix("rain")
    ('netcdf', 'zarr', None)
    """
    suffix = suffix_of(path)
    return next((row for row in FORMATS if suffix in row.suffixes), None)


def is_data(path: str) -> bool:
    """Whether a file may hold tensors, as far as its suffix says: one of a format, or none at all.

    >>> is_data("rain.nc"), is_data("rain"), is_data("README.txt")
    (True, True, False)
    """
    return not suffix_of(path) or by_suffix(path) is not None


def suffix_of(path: str) -> str:
    return os.path.splitext(os.path.basename(path.rstrip("/")))[1].lower()


def by_name(name: str) -> Format:
    for row in FORMATS:
        if row.name == name:
            return row
    names = [row.name for row in FORMATS]
    raise ParameterError(
        f"the format {shown(name)} is not known: give one of {', '.join(names)}{nearest(name, names)}",
        parameter="to",
        allowed=names,
    )


def module_of(row: Format, doing: str) -> Any:
    """The module of a format, once its libraries are known to be there; `doing` is reading or writing."""
    try:
        for name in row.libraries:
            importlib.import_module(name)
    except ImportError as cause:
        raise MissingExtraError(
            f"{doing} {row.suffixes[0]} needs {' and '.join(row.libraries)}: pip install 'maskserve[{row.extra}]'"
        ) from cause
    return importlib.import_module(f"maskserve.convert.{row.module}")


def library(name: str) -> Any:
    """A library that not every installation has, without its types: they are not installed everywhere either."""
    return importlib.import_module(name)
