"""What goes into another format comes back: values bit for bit, masks, dtypes, dims and shapes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import maskserve as ms
from maskserve.convert.formats import FORMATS
from tests.convert_cases import FLOATS, INTS, Variable, assert_same, payload, there_and_back, variables

ANY_SHAPE = st.sampled_from([(), (0,), (1,), (7,), (2, 3), (3, 0), (2, 1, 4), (200,)])
COLUMN = st.sampled_from([(0,), (1,), (7,), (300,)])
RASTER = st.sampled_from([(1, 1), (3, 5), (2, 3, 4), (1, 100, 2)])
SHAPES = {"csv": COLUMN, "tsv": COLUMN, "parquet": COLUMN, "arrow": COLUMN, "tif": RASTER}
NOT_THERE = {"nc": ("float16",), "zarr": ("float16",), "tif": ("float16", "bool")}
"""Types that a format lacks; others stand for them."""

CASES = [
    (suffix, dtype)
    for suffix in ("npz", "pt", "safetensors", "json", "parquet", "arrow", "nc", "zarr", "tif")
    for dtype in ("bool", *INTS, *FLOATS)
    if dtype not in NOT_THERE.get(suffix, ())
]


@pytest.mark.parametrize(("suffix", "dtype"), CASES)
@given(data=st.data())
def test_values_masks_and_dtypes_come_back(suffix: str, dtype: str, data: st.DataObject) -> None:
    cells, valid = data.draw(variables(dtype, SHAPES.get(suffix, ANY_SHAPE)))
    with tempfile.TemporaryDirectory() as folder:
        back = there_and_back(Path(folder), suffix, payload({"data": (cells, valid)}))
        found = back["data"]
        assert_same(found if suffix != "tif" else found.reshape(cells.shape), cells, valid)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("dtype", ["int64", "float64", "bool"])
@given(data=st.data())
def test_text_holds_every_number(suffix: str, dtype: str, data: st.DataObject) -> None:
    cells, valid = data.draw(variables(dtype, st.sampled_from([(1,), (7,), (300,)]), nan=False))
    with tempfile.TemporaryDirectory() as folder:
        back = there_and_back(Path(folder), suffix, payload({"a": (cells, valid), 'b,"c': (cells, valid)}))
    if valid.any():
        assert_same(back["a"], cells, valid)
        assert_same(back['b,"c'], cells, valid)
    else:  # a column without a value has no type; pandas says float64, too
        assert_same(back["a"], np.zeros(cells.shape), valid)


@given(one=variables("float32", st.just((300,)), nan=False), alone=st.booleans())
def test_text_has_the_digits_of_narrow_floats(one: Variable, alone: bool) -> None:
    cells, valid = one
    with tempfile.TemporaryDirectory() as folder:
        given = payload({"a": one} if alone else {"a": one, "b": one})
        back = there_and_back(Path(folder), "csv", given)["a"]
    narrow = back.get_data().numpy().astype(np.float32)
    np.testing.assert_array_equal(narrow[valid], cells[valid])
    np.testing.assert_array_equal(back.get_mask().numpy(), valid)


@pytest.mark.parametrize("suffix", ["nc", "zarr", "safetensors", "json"])
def test_dims_coordinates_and_texts_come_back(tmp_path: Path, suffix: str) -> None:
    rain, valid = np.arange(6, dtype="f4").reshape(2, 3), np.array([[True, False, True], [True] * 3])
    lat = np.array([-10.0, 0, 10.5])
    dims = {"rain": ["time", "lat"], "lat": ["lat"]}
    given = payload({"rain": (rain, valid), "lat": (lat, np.ones(3, bool))}, dims, title="Rain")
    back = there_and_back(tmp_path, suffix, given)
    assert back.dims == {"rain": ("time", "lat"), "lat": ("lat",)}
    assert back.metadata["title"] == "Rain"
    assert_same(back["rain"], rain, valid)
    assert_same(back["lat"], lat, np.ones(3, bool))


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_every_format_can_be_read_and_written(tmp_path: Path, row: object) -> None:
    suffix = row.suffixes[0]  # type: ignore[attr-defined]  # a row of FORMATS
    shape = (1, 2, 3) if suffix == ".tif" else (3,)
    cells, valid = np.arange(np.prod(shape), dtype="f8").reshape(shape), np.ones(shape, bool)
    back = there_and_back(tmp_path, suffix[1:], payload({"data": (cells, valid)}))
    assert_same(back["data"], cells, valid)


def test_columns_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("z,b,a,m\n1,1.5,True,\n2,2.5,False,3\n")
    for source, target in (("a.csv", "b.safetensors"), ("b.safetensors", "c.parquet"), ("c.parquet", "d.csv")):
        ms.convert_file(tmp_path / source, tmp_path / target)
    assert (tmp_path / "d.csv").read_text() == "z,b,a,m\n1,1.5,true,\n2,2.5,false,3\n"


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("suffix", ["npz", "parquet", "arrow", "nc", "zarr"])
def test_floats_that_a_format_lacks_become_f32_and_it_is_said(tmp_path: Path, suffix: str, name: str) -> None:
    import torch

    data = torch.tensor([1.5, -0.0, 448.0]).to(getattr(torch, name))
    ms.save({"data": ms.masked_tensor(data, torch.tensor([True, True, False]))}, tmp_path / "in.safetensors")
    done = ms.convert_file(tmp_path / "in.safetensors", tmp_path / f"out.{suffix}")
    assert any("written as f32, which holds each value: data (" in note for note in done.notes)
    assert ms.load(tmp_path / f"out.{suffix}")["data"].tolist() == [1.5, 0.0, None]


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_torch_files_hold_every_dtype(tmp_path: Path, suffix: str, name: str) -> None:
    import torch

    data = torch.tensor([1.5, 2.0, 448.0]).to(getattr(torch, name))
    ms.save({"data": ms.masked_tensor(data, torch.tensor([True, True, False]))}, tmp_path / "in.safetensors")
    ms.convert_file(tmp_path / "in.safetensors", tmp_path / f"out.{suffix}")
    back = ms.load(tmp_path / f"out.{suffix}")["data"]
    assert back.dtype == data.dtype
    assert back.get_mask().tolist() == [True, True, False]
