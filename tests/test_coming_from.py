"""Every line of docs/coming-from.md: what is typed here gives what is typed there."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskserve as ms
from maskserve_cli.app import main
from tests.documents import ROOT

xr = pytest.importorskip("xarray")

PAGE = (ROOT / "docs" / "coming-from.md").read_text()


def lines(table: str) -> list[tuple[str, ...]]:
    """The cells of a table, the code in them alone."""
    found = re.search(rf"<!-- {re.escape(table)} -->\n\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    assert found, table
    return [tuple(code(cell) for cell in row[1:-1].split("|")) for row in found[1].splitlines()]


def code(cell: str) -> str:
    """The first piece of code of a cell; a cell may say a word about it."""
    pieces = re.findall(r"`([^`]+)`", cell)
    return pieces[0] if pieces else ""


COMMANDS = [(theirs, ours) for _, theirs, ours in lines("commands")]


@pytest.fixture(scope="module")
def rain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rain.nc; enough of it is missing that some means are of no cell."""
    generator = np.random.default_rng(7)
    cells = generator.gamma(2.0, 2.0, (12, 4, 6)).round(1)
    cells[generator.random(cells.shape) < 0.3] = np.nan
    cells[generator.random(cells.shape) < 0.1] = 0
    cells[:, 0, 0] = np.nan
    cells[3] = np.nan
    lat, lon = np.array([-60.0, -20.0, 20.0, 60.0]), np.arange(0.0, 360.0, 60.0)
    area = np.cos(np.deg2rad(lat))[:, None] * np.ones(6)
    data = {"rain": (("time", "lat", "lon"), cells.astype(np.float32)), "area": (("lat", "lon"), area)}
    folder = tmp_path_factory.mktemp("rain")
    dataset = xr.Dataset(data, coords={"time": np.arange(12), "lat": lat, "lon": lon})
    missing = {"rain": {"_FillValue": np.float32(-9999)}, "area": {"_FillValue": None}}
    dataset.to_netcdf(folder / "rain.nc", encoding=missing)
    return folder


@pytest.mark.parametrize(("theirs", "ours"), COMMANDS, ids=[ours for _, ours in COMMANDS])
def test_a_command_gives_what_xarray_gives(
    theirs: str, ours: str, rain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(ours)
    verb = words[1]
    out = rain / ("copy.nc" if verb == "convert" else "answer.safetensors")
    more = ["--force"] if verb == "convert" else ["-o", str(out), "--force"] if theirs else []
    monkeypatch.chdir(rain)
    assert main([*words[1:], *more]) == 0, capfd.readouterr().err
    if not theirs:
        return
    with xr.open_dataset(rain / "rain.nc") as dataset, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = dataset["rain"].astype("f8")
        expected = eval(theirs.replace("idxmax", "argmax_of_valid"), {"rain": Cells(cells), "area": dataset["area"]})
        expected = expected.transpose(*[d for d in ("time", "lat", "lon") if d in expected.dims]).values
    got = ms.load(out)["rain"]
    assert tuple(got.shape) == expected.shape
    assert np.array_equal(got.get_mask().numpy(), ~np.isnan(expected)) or "count" in theirs.split(".")[1]
    valid = got.get_mask().numpy()
    np.testing.assert_allclose(got.get_data().double().numpy()[valid], expected[valid], rtol=2e-6, atol=2e-6)


class Cells:
    """An xarray.DataArray with idxmax as a place, and NaN where no cell is."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)

    def argmax_of_valid(self, dim: str) -> Any:
        place = self.array.fillna(-np.inf).argmax(dim).astype("f8")
        return place.where(self.array.count(dim) > 0)

    def __sub__(self, other: Any) -> Any:
        return self.array - other

    def __ge__(self, other: Any) -> Any:
        return self.array >= other

    def __le__(self, other: Any) -> Any:
        return self.array <= other

    def __ne__(self, other: Any) -> Any:
        return self.array != other

    __hash__ = None  # type: ignore[assignment]


def names() -> dict[str, Any]:
    """What the Python tables speak of; a column is all masked, and junk lies under every mask."""
    generator = np.random.default_rng(3)
    cells = generator.normal(0, 1, (4, 6)).round(1)
    mask = generator.random((4, 6)) < 0.7
    cells[0, :3], mask[0, :3] = 0, True
    x = torch.from_numpy(np.where(mask, cells, 1e30))
    a = np.ma.MaskedArray(np.where(mask, cells, 1e30), mask=~mask)
    return {
        "np": np, "torch": torch, "ms": ms, "a": a, "m": ms.masked_tensor(a), "w": np.arange(1.0, 7.0),
        "x": x, "mask": torch.from_numpy(mask),
    }  # fmt: skip


PYTHON = [(theirs, ours) for table in ("numpy.ma", "torch.masked") for theirs, ours in lines(table)]


@pytest.mark.parametrize(("theirs", "ours"), PYTHON, ids=[theirs for theirs, _ in PYTHON])
@pytest.mark.filterwarnings("ignore:.*MaskedTensors is in prototype", "ignore:.*maskedtensors.*")
def test_an_expression_gives_what_numpy_or_torch_gives(theirs: str, ours: str) -> None:
    known = names()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, got = ms.masked_tensor(eval(theirs, known)), ms.masked_tensor(eval(ours, known))
    assert got.shape == expected.shape
    both = got.get_mask() & expected.get_mask()
    if not theirs.startswith("torch.masked.") or "masked_tensor" in theirs:  # torch.masked's functions have no mask
        assert torch.equal(got.get_mask(), expected.get_mask())
    assert both.any()
    torch.testing.assert_close(
        got.get_data()[both].double(), expected.get_data()[both].double(), rtol=1e-12, atol=1e-13
    )
