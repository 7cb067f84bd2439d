"""netCDF, Zarr and GeoTIFF: what their conventions call missing, compared with xarray, netCDF4 and rasterio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import rasterio
import xarray as xr
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

import maskserve as ms
from maskserve.convert.cf import DEFAULT_FILLS
from maskserve.convert.files import open_foreign
from maskserve.errors import ConversionWarning, NotComputableError, ParameterError
from tests.convert_cases import payload

Array = np.ndarray[Any, np.dtype[Any]]


def netcdf(folder: Path, cells: Array, **attributes: Any) -> Path:
    """A file with the variable x of one dim; its cells are written as they are."""
    path = folder / "x.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("t", len(cells))
        fill, endian = attributes.pop("_FillValue", None), "big" if cells.dtype.str[0] == ">" else "native"
        x = file.createVariable("x", cells.dtype, ("t",), fill_value=fill, endian=endian)
        x.set_auto_maskandscale(False)
        x.setncatts(attributes)
        x[:] = cells
    return path


def lists(path: Path) -> tuple[list[Any], tuple[str, ...]]:
    """x as a list, None where masked, and the notes."""
    notes = open_foreign(path).notes
    if notes:
        with pytest.warns(ConversionWarning):
            return ms.load(path)["x"].tolist(), notes
    return ms.load(path)["x"].tolist(), notes


def i2(*cells: int) -> Array:
    return np.array(cells, "i2")


@pytest.mark.parametrize(
    ("cells", "attributes", "expected"),
    [
        (i2(1, -9, 3), {"_FillValue": np.int16(-9)}, [1, None, 3]),
        (i2(1, -9, 3), {"missing_value": np.int16(-9)}, [1, None, 3]),
        (i2(1, -9, 3), {"missing_value": -9.0}, [1, None, 3]),
        (i2(1, -9, 3), {"missing_value": i2(3, -9)}, [1, None, None]),
        (i2(1, -9, 3), {"valid_min": np.int16(0)}, [1, None, 3]),
        (i2(1, -9, 3), {"valid_max": np.int16(1)}, [1, -9, None]),
        (i2(1, -9, 3), {"valid_range": i2(0, 2)}, [1, None, None]),
        (i2(1, -9, 3), {"scale_factor": 0.5, "add_offset": 1.0, "_FillValue": np.int16(-9)}, [1.5, None, 2.5]),
        (i2(1, -9, 3), {"scale_factor": 0.5, "valid_max": np.int16(2)}, [0.5, -4.5, None]),
        (i2(1, -9, 3), {"scale_factor": 0.5, "valid_max": 1.0}, [0.5, -4.5, None]),  # wider: of unpacked values (NUG)
        (np.array([1, -1, -2], "i1"), {"_Unsigned": "true", "_FillValue": np.int8(-1)}, [1, None, 254]),
        (np.array([1, 255, 254], "u1"), {"_Unsigned": "false", "_FillValue": np.uint8(255)}, [1, None, -2]),
        (np.array([1, -1, -2], "i1"), {"_Unsigned": "true", "valid_max": np.int16(254)}, [1, None, 254]),
        (np.array([1, -1, -2], "i1"), {"_Unsigned": "true", "valid_max": np.int16(300)}, [1, 255, 254]),
        (np.array([1, 256, -2], ">i2"), {"_Unsigned": "true", "_FillValue": np.int16(-2)}, [1, 256, None]),
        (np.array([1, -2**63]), {"units": "days since 2000-01-01"}, [1, None]),  # NaT
        (np.array([1, -2**63]), {"units": "m"}, [1, -2**63]),
        (np.array([1, 1e20, 3], "f4"), {"missing_value": 1e20}, [1, None, 3]),
        (np.array([1, np.nan, 3], "f4"), {"_FillValue": np.float32(np.nan)}, [1, None, 3]),
        (np.array([1, -127, 255 - 256], "i1"), {}, [1, -127, -1]),  # in one byte every value is data
        (np.array([2**63 - 1, 2**63 - 2]), {"_FillValue": np.int64(2**63 - 1)}, [None, 2**63 - 2]),
    ],
)  # fmt: skip
def test_what_conventions_call_missing_is_masked(
    tmp_path: Path, cells: Array, attributes: dict[str, Any], expected: list[Any]
) -> None:
    assert lists(netcdf(tmp_path, cells, **attributes)) == (expected, ())


@pytest.mark.parametrize(
    ("cells", "attributes", "expected", "note"),
    [
        (i2(1, -9, 3), {"_FillValue": np.int16(-9), "missing_value": np.int16(3)}, [1, None, None],
         "x: _FillValue -9 and missing_value 3 differ; both are masked"),
        (i2(1, -9, 3), {"_FillValue": np.int16(-9), "missing_value": 1e20}, [1, None, 3],
         "x: missing_value 1e+20 is no int16, so no cell can hold it; ignored"),
        (i2(1, -9, 3), {"missing_value": "-9"}, [1, -9, 3], "x: missing_value -9 is no int16, so no cell can hold it; ignored"),
        (i2(1, -9, 3), {"valid_range": i2(1, 2, 3)}, [1, -9, 3], "x: valid_range is not two numbers; ignored"),
        (i2(1, -32767, 3), {}, [1, None, 3],
         "x: 1 of its cells hold netCDF's default fill value, -32767, as never written: masked"),
    ],
)  # fmt: skip
def test_what_conflicts_is_said(
    tmp_path: Path, cells: Array, attributes: dict[str, Any], expected: list[Any], note: str
) -> None:
    assert lists(netcdf(tmp_path, cells, **attributes)) == (expected, (note,))


def test_the_default_fill_values_are_the_librarys() -> None:
    wide = {code: fill for code, fill in netCDF4.default_fillvals.items() if code[0] != "c" and code[1] != "1"}
    assert wide == DEFAULT_FILLS


def test_a_nan_is_a_value_where_no_attribute_says_otherwise(tmp_path: Path) -> None:
    found = ms.load(netcdf(tmp_path, np.array([1, np.nan])))["x"]
    assert found.get_mask().all()


@pytest.mark.parametrize(
    ("packed", "scale", "expected"), [("i2", "f4", "float32"), ("i2", "f8", "float64"), ("i4", "f4", "float64")]
)
def test_unpacked_values_have_the_type_of_the_scale(tmp_path: Path, packed: str, scale: str, expected: str) -> None:
    path = netcdf(tmp_path, np.array([1, 7], packed), scale_factor=np.dtype(scale).type(0.1))
    found = ms.load(path)["x"].get_data().numpy()
    assert found.dtype == expected
    with xr.open_dataset(path) as by_xarray:
        np.testing.assert_allclose(found, by_xarray["x"].values, rtol=1e-6)


def test_a_value_at_a_limit_is_inside_whatever_the_dtype_of_the_limit(tmp_path: Path) -> None:
    wide = ms.load(netcdf(tmp_path, np.array([0.1, 0.3, 0.2], "f4"), valid_range=np.array([0.1, 0.2])))["x"]
    assert wide.get_mask().tolist() == [True, False, True]
    packed = ms.load(netcdf(tmp_path, i2(1, 3, 2), scale_factor=np.float32(0.1), valid_range=np.array([0.1, 0.2])))["x"]
    assert packed.get_mask().tolist() == [True, False, True]
    whole = ms.load(netcdf(tmp_path, np.array([2**53 + 1, 2**53]), valid_max=float(2**53)))["x"]
    assert whole.get_mask().tolist() == [False, True]


def test_text_and_groups_are_left_out_and_named(tmp_path: Path) -> None:
    path = netcdf(tmp_path, np.array([1, 2]))
    with netCDF4.Dataset(path, "a") as file:
        file.createVariable("s", str, ("t",))[:] = np.array(["a", "b"], object)
        file.createVariable("c", "S1", ("t",))[:] = np.array([b"a", b"b"])
        file.createGroup("deep").createVariable("y", "f4")
    payload = open_foreign(path)
    assert payload.notes == ("left out, not numbers: s (text), c (text)", "groups are not read, only the root is: deep")
    assert list(payload.header.tensors) == ["x"]


def test_lists_records_and_bools_with_a_fill_value(tmp_path: Path) -> None:
    path = netcdf(tmp_path, np.array([0, 1, -127], "i1"), _FillValue=np.int8(-127), dtype="bool")
    with netCDF4.Dataset(path, "a") as file:
        file.createVariable("lists", file.createVLType("i4", "some"), ("t",))
        file.createVariable("records", file.createCompoundType(np.dtype([("a", "f4")]), "pair"), ("t",))
        file.createVariable("mask", "i1", ("t", "t"))[:] = 1
    found, notes = lists(path)
    assert found == [False, True, None]
    assert notes == (
        "left out, not numbers: records (void32), lists (lists)",
        "renamed, a payload gives these names a meaning or cannot hold them: mask is mask_ here",
    )


def test_names_of_groups_and_reserved_attributes_are_not_written(tmp_path: Path) -> None:
    one = np.ones(2), np.ones(2, bool)
    (tmp_path / "slash.safetensors").write_bytes(payload({"blk/0": one}))
    forged = '{"variables": {"x": {"scale_factor": 2, "_FillValue": 1.0, "dtype": "bool", "units": "m"}}}'
    given = payload({"x": one}, None, _NCProperties="x", **{"a/b": "x", "maskserve.attributes": forged})
    (tmp_path / "in.safetensors").write_bytes(given)
    for suffix in ("nc", "zarr"):
        with pytest.raises(
            NotComputableError, match=r"has no / in names, and there is blk/0; rename it, or write \.npz"
        ):
            ms.convert_file(tmp_path / "slash.safetensors", tmp_path / f"slash.{suffix}")
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / f"out.{suffix}")
        with xr.open_dataset(tmp_path / f"out.{suffix}", chunks=None) as found:
            assert found["x"].values.tolist() == [1.0, 1.0]
            assert found["x"].attrs == {"units": "m"}


def test_declared_sizes_are_compared_with_memory_before_it_is_spent(tmp_path: Path) -> None:
    path = tmp_path / "huge.nc"
    with netCDF4.Dataset(path, "w") as file:
        file.createDimension("t", 2**40)
        file.createVariable("t", "f8", ("t",), chunksizes=(1024,))  # nothing is written: the file is small
    assert path.stat().st_size < 10**6
    with pytest.raises(ms.MaskserveError, match=r"the variables would take \d+ bytes of memory"):
        open_foreign(path)


def test_units_time_and_packing_come_through_a_job(tmp_path: Path) -> None:
    path = tmp_path / "t.nc"
    time = xr.Variable(("time",), np.array([0, 1]), {"units": "days since 2000-01-01", "calendar": "standard"})
    rain = xr.Variable(
        ("time", "lat"), np.array([[1.0, 2.0], [np.nan, 4.0]]), {"units": "mm", "valid_min": np.int16(0)}
    )
    encoding = {"rain": {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -1}}
    xr.Dataset({"rain": rain, "time": time}, attrs={"title": "Rain", "version": 3}).to_netcdf(path, encoding=encoding)
    answer = ms.compute("reduce", path, op="sum", dim="lat")
    (tmp_path / "sum.safetensors").write_bytes(answer.to_bytes())
    ms.convert_file(tmp_path / "sum.safetensors", tmp_path / "sum.nc")
    with xr.open_dataset(tmp_path / "sum.nc") as found:
        assert found["rain"].attrs["units"] == "mm"
        assert not {"scale_factor", "valid_min", "missing_value"} & set(found["rain"].attrs)
        assert (found.attrs["title"], found.attrs["version"]) == ("Rain", 3)
        assert found["rain"].values.tolist() == [3.0, 4.0]
        assert str(found["time"].values[1]) == "2000-01-02T00:00:00.000000000"


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_valid_nan_stays_a_value(tmp_path: Path, suffix: str, is_masked: bool) -> None:
    valid = np.array([True, True, not is_masked])
    (tmp_path / "in.safetensors").write_bytes(payload({"x": (np.array([1.0, np.nan, 7]), valid)}))
    ms.convert_file(tmp_path / "in.safetensors", tmp_path / f"out.{suffix}")
    np.testing.assert_array_equal(ms.load(tmp_path / f"out.{suffix}")["x"].get_mask().numpy(), valid)


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int64", "uint8"])
def test_xarray_reads_what_is_written(tmp_path: Path, suffix: str, dtype: str) -> None:
    cells, valid = np.arange(6).astype(dtype).reshape(2, 3), np.array([[True, False, True], [True, True, False]])
    given = payload({"x": (cells, valid)}, {"x": ["a", "b"]})
    (tmp_path / "in.safetensors").write_bytes(given)
    done = ms.convert_file(tmp_path / "in.safetensors", tmp_path / f"out.{suffix}")
    assert done.notes[0].startswith("masked cells are written as _FillValue: x ")
    with xr.open_dataset(tmp_path / f"out.{suffix}", chunks=None) as found:
        np.testing.assert_array_equal(found["x"].isnull(), ~valid)
        np.testing.assert_array_equal(found["x"].values[valid], cells[valid])
        assert found["x"].dims == ("a", "b")


def test_where_no_cell_is_masked_every_value_may_be_taken(tmp_path: Path) -> None:
    every = np.arange(256).astype("u1"), np.ones(256, bool)
    for suffix in ("nc", "zarr", "tif", "npy"):
        tensor = {"x": (every[0].reshape(16, 16), np.ones((16, 16), bool))} if suffix == "tif" else {"x": every}
        (tmp_path / "in.safetensors").write_bytes(payload(tensor))
        done = ms.convert_file(tmp_path / "in.safetensors", tmp_path / f"out.{suffix}")
        assert done.notes == ()
        [found] = ms.load(tmp_path / f"out.{suffix}").values()
        assert found.get_mask().all()


def test_a_valid_value_that_means_never_written_gets_another_fill_value(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(payload({"x": (i2(1, -32767, 3), np.ones(3, bool))}))
    assert ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.nc").notes == ()
    assert lists(tmp_path / "out.nc") == ([1, -32767, 3], ())
    with netCDF4.Dataset(tmp_path / "out.nc") as file:
        assert not np.ma.getmaskarray(file["x"][:]).any()


def test_a_fill_value_is_one_that_no_valid_cell_has(tmp_path: Path) -> None:
    every = np.arange(256).astype("u1"), np.ones(256, bool)
    every[1][7] = False
    (tmp_path / "one_free.safetensors").write_bytes(payload({"x": every}))
    done = ms.convert_file(tmp_path / "one_free.safetensors", tmp_path / "out.nc")
    assert done.notes == ("masked cells are written as _FillValue: x 7",)
    all_taken = np.arange(257).astype("u1"), np.arange(257) < 256
    (tmp_path / "none_free.safetensors").write_bytes(payload({"x": all_taken}))
    with pytest.raises(NotComputableError, match="x has masked cells and no u8 is free to stand for them"):
        ms.convert_file(tmp_path / "none_free.safetensors", tmp_path / "none.nc")
    assert not (tmp_path / "none.nc").exists()


@pytest.mark.parametrize(
    ("fill", "said"),
    [(3, "is the value of a valid cell of x"), (300, "does not fit x, which is u8"), (0.5, "does not fit"), (-1, "does not fit"),
     (float("nan"), "does not fit")],
)  # fmt: skip
def test_a_fill_value_that_was_asked_for_is_checked(tmp_path: Path, fill: float, said: str) -> None:
    (tmp_path / "in.safetensors").write_bytes(payload({"x": (np.array([3, 4], "u1"), np.array([True, False]))}))
    with pytest.raises(ParameterError, match=said):
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.nc", fill_value=fill)
    assert ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.nc", fill_value=9).notes[0].endswith("x 9")
    with pytest.raises(ParameterError, match="formats without masks, and npz has them"):
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.npz", fill_value=9)


def test_a_dim_has_one_size_in_a_grid(tmp_path: Path) -> None:
    two = {"a": (np.ones(2), np.ones(2, bool)), "b": (np.ones(3), np.ones(3, bool))}
    (tmp_path / "in.safetensors").write_bytes(payload(two, {"a": ["t"], "b": ["t"]}))
    with pytest.raises(NotComputableError, match=r"the dim t has \d cells in one variable and \d in "):
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.nc")
    (tmp_path / "free.safetensors").write_bytes(payload(two))
    assert ms.convert_file(tmp_path / "free.safetensors", tmp_path / "free.nc").written


# -- GeoTIFF ------------------------------------------------------------------------------------------------------

CELLS = np.arange(12, dtype="f4").reshape(1, 3, 4)
PLACE = {"crs": "EPSG:32632", "transform": rasterio.Affine(30, 0, 5e5, 0, -30, 5e6)}


def raster(path: Path, cells: Array, valid: Array | None = None, **profile: Any) -> Path:
    """A GeoTIFF of (band, y, x) cells, with a mask band where `valid` is given."""
    shape = {"count": len(cells), "height": cells.shape[1], "width": cells.shape[2], "dtype": cells.dtype}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", "GTiff", **shape, **PLACE, **profile) as file,
    ):
        file.write(cells)
        if valid is not None:
            file.write_mask(valid)
    return path


def agree_with_rasterio(path: Path, expected: list[int]) -> None:
    """The same cells are masked here and there: those at the flat indices `expected`."""
    found = ms.load(path)["data"]
    with rasterio.open(path) as file:
        theirs = file.read(masked=True)
    hidden = np.zeros(found.shape, bool)
    hidden.reshape(-1)[expected] = True
    np.testing.assert_array_equal(~found.get_mask().numpy(), hidden)
    np.testing.assert_array_equal(np.ma.getmaskarray(theirs)[: len(hidden)], hidden)
    np.testing.assert_array_equal(found.get_data().numpy()[~hidden], theirs.data[: len(hidden)][~hidden])


def test_nodata_is_masked(tmp_path: Path) -> None:
    agree_with_rasterio(raster(tmp_path / "a.tif", CELLS, nodata=5), [5])
    with_nan = np.where(CELLS == 7, np.float32(np.nan), CELLS)
    agree_with_rasterio(raster(tmp_path / "b.tif", with_nan, nodata=np.nan), [7])
    low = np.where(CELLS == 7, np.finfo("f4").min, CELLS)
    agree_with_rasterio(raster(tmp_path / "c.tif", low, nodata=float(np.finfo("f4").min)), [7])
    assert ms.load(raster(tmp_path / "d.tif", with_nan))["data"].get_mask().all()  # no nodata: NaN is a value


def test_a_mask_band_masks(tmp_path: Path) -> None:
    agree_with_rasterio(raster(tmp_path / "a.tif", CELLS, (CELLS[0] > 2)), [0, 1, 2])


def test_an_alpha_band_masks_and_is_no_data(tmp_path: Path) -> None:
    alpha = np.where(CELLS == 3, 0, np.where(CELLS == 4, 128, 255))
    path = raster(
        tmp_path / "a.tif", np.concatenate([CELLS, CELLS, CELLS, alpha]).astype("u1"), photometric="RGB", alpha="YES"
    )
    with rasterio.open(path) as file:
        assert file.colorinterp[-1] == ColorInterp.alpha
    found = ms.load(path)["data"]
    assert found.shape == (3, 3, 4)
    assert np.flatnonzero(~found.get_mask()[0].numpy()).tolist() == [3]


def test_blocks_of_a_tiled_raster_are_put_together(tmp_path: Path) -> None:
    cells = np.arange(2 * 50 * 70, dtype="i4").reshape(2, 50, 70)
    path = raster(tmp_path / "a.tif", cells, nodata=17, tiled=True, blockxsize=16, blockysize=32)
    agree_with_rasterio(path, [17])


def test_a_scale_that_is_not_applied_is_said(tmp_path: Path) -> None:
    path = raster(tmp_path / "a.tif", CELLS)
    assert open_foreign(path).notes == ()
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = [0.5] * file.count, [2.0] * file.count
    assert open_foreign(path).notes == (
        "band 1: its scale 0.5 and offset 2.0 are not applied, cells are as they are stored",
    )


def test_nodata_that_no_cell_can_hold_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    raster(path, CELLS, nodata=5)
    from maskserve.convert.geotiff import nodata_of

    class Bands:
        nodatavals = (-9999.0,)

    assert nodata_of(Bands(), [1], np.dtype("u1")) == (
        [None], ["band 1: nodata -9999.0 is no uint8, so no cell can hold it; ignored"],
    )  # fmt: skip


def test_crs_and_transform_come_through_a_job(tmp_path: Path) -> None:
    path = raster(tmp_path / "in.tif", np.concatenate([CELLS, CELLS + 1]), nodata=5)
    (tmp_path / "mean.safetensors").write_bytes(ms.compute("reduce", path, op="mean", dim="band").to_bytes())
    done = ms.convert_file(tmp_path / "mean.safetensors", tmp_path / "mean.tif")
    with rasterio.open(tmp_path / "mean.tif") as file:
        assert (file.crs, file.transform, file.count) == (PLACE["crs"], PLACE["transform"], 1)
        assert not file.read(masked=True).mask.any()
    assert done.notes == ()
    (tmp_path / "row.safetensors").write_bytes(ms.compute("reduce", path, op="mean", dim="y").to_bytes())
    ms.convert_file(tmp_path / "row.safetensors", tmp_path / "row.tif")
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(tmp_path / "row.tif") as file:
        assert file.crs is None


def test_a_written_raster_has_nodata_that_rasterio_reads(tmp_path: Path) -> None:
    valid = CELLS != 4
    (tmp_path / "in.safetensors").write_bytes(payload({"data": (CELLS, valid)}))
    done = ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.tif")
    assert done.notes == ("masked cells are written as nodata: data -9999.0",)
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.read(masked=True).mask, ~valid)


def test_a_raster_has_two_or_three_dims(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(payload({"x": (np.ones(3), np.ones(3, bool))}))
    with pytest.raises(
        NotComputableError, match=r"tif holds \(y, x\) or \(band, y, x\), each at least 1, and x has shape"
    ):
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.tif")


def test_a_raster_is_measured_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    size = {"count": 1, "width": 100_000, "height": 100_000, "dtype": "float64"}
    with pytest.warns(NotGeoreferencedWarning):
        rasterio.open(path, "w", "GTiff", SPARSE_OK=True, tiled=True, **size).close()
    with pytest.raises(ms.MaskserveError, match="the raster would take 90000000000 bytes of memory"):
        open_foreign(path)
