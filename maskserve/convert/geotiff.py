"""GeoTIFF: nodata, a mask band and alpha say what is masked; CRS and transform travel as attributes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from maskserve.convert.dataset import (
    Array,
    Dataset,
    DataVariable,
    Reading,
    Writing,
    n_bytes_of,
    the_only,
    variable_of,
    widened,
)
from maskserve.convert.fills import as_cell, as_numbers, fill_of, said
from maskserve.convert.formats import library
from maskserve.convert.sizes import refuse_beyond
from maskserve.dtypes import Kind, f16
from maskserve.errors import NotComputableError, PayloadError
from maskserve.payload.header import shown

DRIVER = "GTiff"  # said, so that no other of GDAL's drivers is tried on the bytes
DIMS = ("band", "y", "x")
CUSTOMARY = {"f": (-9999.0, float("nan")), "i": (-9999,), "u": (255, 65535, 0)}


@contextmanager
def opened(path: str, mode: str = "r", **profile: Any) -> Iterator[Any]:
    """The raster at `path`; one without a map is no reason to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with library("rasterio").open(path, mode, driver=DRIVER, **profile) as raster:
            yield raster


def read(path: str, reading: Reading) -> Dataset:
    """The variable `data` (band, y, x), read a window at a time; an alpha band masks and is no data."""
    with opened(path) as raster:
        bands, alpha = roles(raster)
        dtype = dtype_of(raster, bands)
        shape = (len(bands), raster.height, raster.width)
        refuse_beyond(n_bytes_of(shape, dtype.itemsize + 1), reading.memory, "the raster")
        cells, valid = np.empty(shape, dtype), np.ones(shape, np.bool_)
        nodata, notes = nodata_of(raster, bands, dtype)
        for _, window in raster.block_windows(bands[0]):
            here = (slice(None), *window.toslices())
            cells[here] = raster.read(bands, window=window)
            valid[here] = validity(raster, bands, alpha, window, cells[here], nodata)
        attributes = attributes_of(raster)
        notes += scaling_of(raster, bands)
    variable = variable_of("data", cells, None if valid.all() else valid, dims=DIMS, attributes=attributes)
    assert variable is not None, "dtype_of let only numbers pass"
    return Dataset(variables=(variable.hidden_as_zero(),), notes=tuple(notes))


def roles(raster: Any) -> tuple[list[int], int | None]:
    """The bands of data, and the one of alpha if there is one."""
    is_alpha = library("rasterio.enums").ColorInterp.alpha
    alphas = [i for i, meaning in zip(raster.indexes, raster.colorinterp, strict=True) if meaning == is_alpha]
    bands = [i for i in raster.indexes if i not in alphas]
    if not bands:
        raise PayloadError("the raster has no band but alpha; there is no data to read")
    return bands, alphas[0] if alphas else None


def dtype_of(raster: Any, bands: list[int]) -> np.dtype[Any]:
    """The one dtype of the bands."""
    names = sorted({raster.dtypes[band - 1] for band in bands})
    if len(names) > 1 or names[0].startswith("complex"):
        raise NotComputableError(f"the bands are {' and '.join(names)}; they are read where all have one real type")
    return np.dtype(str(names[0]))


def nodata_of(raster: Any, bands: list[int], dtype: np.dtype[Any]) -> tuple[list[Any], list[str]]:
    """The nodata value of each band in its dtype, None where it has none; a line for one that no cell can hold."""
    found, notes = [], []
    for band in bands:
        given = raster.nodatavals[band - 1]
        cell = None if given is None else as_cell(given, dtype)
        if given is not None and cell is None:
            notes.append(f"band {band}: nodata {given} is no {dtype.name}, so no cell can hold it; ignored")
        found.append(cell)
    return found, notes


def scaling_of(raster: Any, bands: list[int]) -> list[str]:
    """The line that says that the cells are as they are stored, where a band has a scale or an offset."""
    scaled = [band for band in bands if (raster.scales[band - 1], raster.offsets[band - 1]) != (1, 0)]
    if not scaled:
        return []
    scale, offset = raster.scales[scaled[0] - 1], raster.offsets[scaled[0] - 1]
    return [f"band {scaled[0]}: its scale {scale} and offset {offset} are not applied, cells are as they are stored"]


def validity(raster: Any, bands: list[int], alpha: int | None, window: Any, cells: Array, nodata: list[Any]) -> Array:
    """Which cells of a window are valid: not nodata, not hidden by the mask band, alpha not 0."""
    flags = library("rasterio.enums").MaskFlags
    valid = np.ones(cells.shape, np.bool_)
    for i, (band, value) in enumerate(zip(bands, nodata, strict=True)):
        if value is not None:
            valid[i] &= ~np.isnan(cells[i]) if value != value else cells[i] != value
        kinds = raster.mask_flag_enums[band - 1]
        if flags.per_dataset in kinds and flags.alpha not in kinds:
            valid[i] &= raster.read_masks(band, window=window) != 0
    if alpha is not None:
        valid &= raster.read(alpha, window=window) != 0
    return valid


def attributes_of(raster: Any) -> dict[str, Any]:
    """CRS as WKT and the transform, as far as there are any, with the height and width that they are for."""
    found: dict[str, Any] = {}
    if raster.crs:
        found["crs"] = raster.crs.to_wkt()
    if not raster.transform.is_identity:
        found |= {"transform": list(raster.transform)[:6], "height": raster.height, "width": raster.width}
    if any(raster.descriptions):
        found["descriptions"] = [text or "" for text in raster.descriptions]
    return found


# -- out ----------------------------------------------------------------------------------------------------------


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes the one raster of `dataset`; lines about what was decided."""
    only = the_only(dataset, ".tif", ".nc")
    [variable], notes = widened([only], ".tif", f16)
    variable = as_numbers(variable)
    cells = bands_of(variable)
    fills = {}
    if variable.has_masked or has_negative_zero(variable.cells):
        kind = variable.cells.dtype.kind
        fills[variable.name] = fill_of(variable, writing.fill_value, CUSTOMARY.get(kind, ()), as_double=True)
    fill = fills.get(variable.name)
    filled = variable.filled(fill).reshape(cells.shape)
    profile = {"count": len(cells), "height": cells.shape[1], "width": cells.shape[2], "dtype": cells.dtype.name}
    with opened(path, "w", nodata=fill, BIGTIFF="IF_SAFER", **profile, **place_of(only)) as raster:
        raster.write(filled)
    return notes + (said(fills, "nodata") if variable.has_masked else [])


def has_negative_zero(cells: Array) -> bool:
    """Whether a cell is -0.0: without nodata, GDAL writes no block of zeros and reads one of 0.0."""
    return cells.dtype.kind == "f" and bool((np.signbit(cells) & (cells == 0)).any())


def bands_of(variable: DataVariable) -> Array:
    """The cells as (band, y, x)."""
    shape, name = variable.shape, shown(variable.name)
    if variable.dtype.kind is Kind.COMPLEX:
        raise NotComputableError(
            f".tif is written with real numbers, and {name} is complex; write .npz", parameter=name
        )
    if len(shape) not in (2, 3) or 0 in shape:
        raise NotComputableError(
            f".tif holds (y, x) or (band, y, x), each at least 1, and {name} has shape {shape}; write .nc",
            parameter=name,
        )
    return variable.cells.reshape((-1, *shape[-2:]))


def place_of(variable: DataVariable) -> dict[str, Any]:
    """CRS and transform, where the last two dims still are those of the raster that they came from."""
    found: dict[str, Any] = {}
    if variable.dims is not None and variable.dims[-2:] != DIMS[-2:]:
        return found
    crs, transform = variable.attributes.get("crs"), variable.attributes.get("transform")
    if isinstance(crs, str):
        found["crs"] = library("rasterio.crs").CRS.from_wkt(crs)
    size = (variable.attributes.get("height"), variable.attributes.get("width"))
    if isinstance(transform, list) and len(transform) == 6 and size == variable.shape[-2:]:
        found["transform"] = library("rasterio").Affine(*map(float, transform))
    return found
