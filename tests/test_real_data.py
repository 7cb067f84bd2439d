"""Figures on two real data sets agree with pandas and with exact arithmetic, through whole requests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import maskserve as ms
from examples import make_co2, make_flights
from maskserve.answers import run
from maskserve.payload import json as payload_json
from maskserve.requests import build

EXAMPLES = Path(__file__).parent.parent / "examples"
CO2 = EXAMPLES / "co2.safetensors"
CO2_SHA256 = "765c1e49b80ca4e56f4a54da19b16c9a241e9226375701caffb2db036fdc2d60"
ULPS = 4
RTOL = 1e-12

SELECTED = ("count", "amin", "amax", "median")
COMPUTED = ("sum", "mean", "var", "std")
PANDAS = {"amin": "min", "amax": "max"}  # its other words are ours

Source = Path | bytes


def exact(op: str, cells: list[float] | list[int]) -> float:
    """The figure from exact rational arithmetic, rounded once (std: twice)."""
    numbers = [Fraction(cell) for cell in cells]
    total, squares, n = sum(numbers), sum(x * x for x in numbers), len(numbers)
    if op == "sum":
        return float(total)
    if op == "mean":
        return float(total / n)
    variance = float((n * squares - total * total) / (n * (n - 1)))
    return variance if op == "var" else math.sqrt(variance)


def in_ulps(ours: float, expected: float) -> float:
    return abs(ours - expected) / math.ulp(expected)


def reduced(source: Source, op: str, **words: Any) -> dict[str, list[Any]]:
    """Each variable's result as a flat list, None where masked."""
    answer = ms.load(ms.compute("reduce", source, op=op, **words).to_bytes())
    return {name: np.atleast_1d(np.array(of.tolist(), dtype=object)).ravel().tolist() for name, of in answer.items()}


def by_pandas(table: pd.DataFrame, op: str) -> list[Any]:
    """One figure a column."""
    function: Callable[[], pd.Series] = getattr(table, PANDAS.get(op, op))
    return list(function())


# -- Mauna Loa ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def co2() -> pd.DataFrame:
    """(44 years, 53 weeks), NaN where masked."""
    read = ms.load(CO2)
    table = read["co2"]
    cells = np.where(table.get_mask().numpy(), table.get_data().numpy(), np.nan)
    return pd.DataFrame(cells, index=read["year"].tolist(), columns=read["week"].tolist())


def slices(co2: pd.DataFrame, dim: str | None) -> pd.DataFrame:
    """A column for each slice that reducing `dim` reduces."""
    if dim is None:
        return pd.DataFrame(co2.to_numpy().ravel())
    return co2.T if dim == "week" else co2


every_dim = pytest.mark.parametrize("dim", [None, "week", "year"])


def words(dim: str | None) -> dict[str, str]:
    return {} if dim is None else {"dim": dim}


@every_dim
@pytest.mark.parametrize("op", SELECTED)
def test_selected_co2_figures_are_those_of_pandas(co2: pd.DataFrame, op: str, dim: str | None) -> None:
    assert reduced(CO2, op, **words(dim))["co2"] == by_pandas(slices(co2, dim), op)


@every_dim
@pytest.mark.parametrize("op", COMPUTED)
def test_computed_co2_figures_are_exact_to_a_few_ulps(co2: pd.DataFrame, op: str, dim: str | None) -> None:
    ours = reduced(CO2, op, **words(dim))["co2"]
    columns = slices(co2, dim)
    expected = [exact(op, column.dropna().tolist()) for _, column in columns.items()]
    assert max(map(in_ulps, ours, expected)) <= ULPS
    np.testing.assert_allclose(ours, by_pandas(columns, op), rtol=RTOL)


def test_several_quantiles_are_those_of_pandas_along_a_new_first_dim(co2: pd.DataFrame) -> None:
    for dim, kept in (("week", "year"), ("year", "week")):
        answer = ms.load(ms.compute("reduce", CO2, op="quantile", q="0.1,0.5,0.9", dim=dim).to_bytes())
        assert answer.dims["co2"] == ("quantile", kept)
        expected = slices(co2, dim).quantile([0.1, 0.5, 0.9]).to_numpy()
        np.testing.assert_allclose(answer["co2"].get_data().numpy(), expected, rtol=RTOL)
    twice = ms.compute(
        "reduce", ms.compute("reduce", CO2, op="quantile", q="0,1", dim="week").to_bytes(), op="quantile", q="0,1"
    )
    assert ms.load(twice.to_bytes()).dims["co2"] == ("quantile",)
    again = ms.compute("reduce", CO2, op="quantile", q="0,1", dim="week").to_bytes()
    again = ms.compute("reduce", again, op="quantile", q="0,0.5,1", dim="year").to_bytes()
    assert ms.load(again).dims["co2"] == ("quantile_", "quantile")


def test_years_with_few_weeks_can_be_masked() -> None:
    means = reduced(CO2, "mean", dim="week", min_count=40)
    missing = [year for year, mean in zip(means["year"], means["co2"], strict=True) if mean is None]
    assert missing == [1958, 1964]


def test_the_co2_file_is_what_its_script_makes_of_its_tensors() -> None:
    read = ms.load(CO2)
    tensors = {name: of.get_data() for name, of in read.items()} | {"co2.mask": read["co2"].get_mask()}
    made = make_co2.payload(tensors)
    assert made == CO2.read_bytes()
    assert hashlib.sha256(made).hexdigest() == CO2_SHA256


def test_the_co2_file_holds_the_record(co2: pd.DataFrame) -> None:
    assert (co2.shape, co2.index[0], co2.index[-1]) == ((44, 53), 1958, 2001)
    assert co2.count().sum() == 2284 - 59
    assert co2.loc[1958].first_valid_index() == (date(1958, 3, 29).timetuple().tm_yday + 6) // 7
    assert (co2.loc[1958, 13], co2.loc[2001, 52]) == (316.1, 371.5)
    hidden = ms.load(CO2)["co2"]
    assert not hidden.get_data()[~hidden.get_mask()].any()


def test_the_script_makes_the_file_from_the_record() -> None:
    pytest.importorskip("statsmodels", reason="statsmodels carries the record; it is not needed to run maskserve")
    assert make_co2.payload(make_co2.tensors(make_co2.record())) == CO2.read_bytes()


SELECTING: dict[str, Callable[[pd.Series], Any]] = {
    "first": lambda c: c.dropna().iloc[0],
    "last": lambda c: c.dropna().iloc[-1],
    "mode": lambda c: c.mode()[0],
    "count_distinct": lambda c: c.nunique(),
    "ptp": lambda c: c.max() - c.min(),
}


@every_dim
@pytest.mark.parametrize("op", SELECTING)
def test_co2_cells_that_are_picked_are_those_of_pandas(co2: pd.DataFrame, op: str, dim: str | None) -> None:
    expected = [SELECTING[op](column) for _, column in slices(co2, dim).items()]
    assert reduced(CO2, op, **words(dim))["co2"] == expected


@every_dim
def test_co2_products_are_exact_to_an_ulp(co2: pd.DataFrame, dim: str | None) -> None:
    ours = reduced(CO2, "prod", **words(dim))["co2"]
    for mine, (_, column) in zip(ours, slices(co2, dim).items(), strict=True):
        factors = math.prod(map(Fraction, column.dropna().tolist()))
        assert mine == math.inf if factors > Fraction(1.7976931348623157e308) else in_ulps(mine, float(factors)) <= 1


@pytest.mark.parametrize("dim", ["week", "year"])
def test_co2_fills_ranks_and_running_extremes_are_those_of_pandas(co2: pd.DataFrame, dim: str) -> None:
    axis = ("year", "week").index(dim)
    for verb, op, given, expected in (
        ("fill", "ffill", {}, co2.ffill(axis=axis)),
        ("fill", "bfill", {"limit": 2}, co2.bfill(axis=axis, limit=2)),
        ("scan", "rank", {}, co2.rank(axis=axis)),
        ("scan", "rank", {"method": "dense"}, co2.rank(axis=axis, method="dense")),
        ("scan", "cummax", {}, co2.cummax(axis=axis)),
    ):
        got = ms.load(ms.compute(verb, CO2, op=op, dim=dim, **given).to_bytes())["co2"]
        np.testing.assert_array_equal(got.get_mask().numpy(), expected.notna())
        np.testing.assert_array_equal(got.get_data().numpy(), expected.fillna(0))


def test_covariances_of_the_co2_years_are_those_of_pandas_pairwise(co2: pd.DataFrame) -> None:
    years = ms.load(CO2)["co2"]
    for got, expected in ((ms.cov(years), co2.T.cov()), (ms.corrcoef(years), co2.T.corr())):
        valid = got.get_mask().numpy()
        np.testing.assert_allclose(got.get_data().numpy()[valid], expected.to_numpy()[valid], rtol=1e-9, atol=1e-11)
        assert expected.isna().to_numpy()[~valid].all()


def test_means_weighted_by_the_week_of_the_year_are_those_of_pandas(co2: pd.DataFrame) -> None:
    weights = torch.arange(1.0, 54.0)
    ours = ms.mean(ms.load(CO2)["co2"], 1, weights=weights)
    expected = co2.mul(weights.numpy()).sum(axis=1) / co2.notna().mul(weights.numpy()).sum(axis=1)
    np.testing.assert_allclose(ours.get_data().numpy(), expected, rtol=RTOL)


# -- flights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flights() -> pd.DataFrame:
    return make_flights.flights()


@pytest.fixture(scope="module")
def payload() -> bytes:
    return make_flights.flights_payload()


def test_the_flights_are_whole_and_some_figures_are_missing(payload: bytes) -> None:
    counts = reduced(payload, "count")
    assert len(counts) == 14
    missing = {name: 336_776 - n for name, [n] in counts.items() if n != 336_776}
    assert missing == {"air_time": 9430, "arr_delay": 9430, "arr_time": 8713, "dep_delay": 8255, "dep_time": 8255}


@pytest.mark.parametrize("op", SELECTED)
def test_selected_flight_figures_are_those_of_pandas(flights: pd.DataFrame, payload: bytes, op: str) -> None:
    ours = reduced(payload, op)
    assert {name: ours[name][0] for name in flights} == dict(zip(flights, by_pandas(flights, op), strict=True))


@pytest.mark.parametrize("op", COMPUTED)
def test_computed_flight_figures_are_exact_to_a_few_ulps(flights: pd.DataFrame, payload: bytes, op: str) -> None:
    ours = reduced(payload, op)
    for name, column in flights.items():
        [figure] = ours[str(name)]
        expected = exact_of_integers(op, column.dropna().to_numpy(np.int64))
        assert figure == expected if op == "sum" else in_ulps(figure, expected) <= ULPS, name
    np.testing.assert_allclose([ours[name][0] for name in flights], by_pandas(flights, op), rtol=RTOL)


def test_flight_cells_that_are_picked_are_those_of_pandas(flights: pd.DataFrame, payload: bytes) -> None:
    for op, select in SELECTING.items():
        ours = reduced(payload, op)
        assert {name: ours[name][0] for name in flights} == {
            name: select(column) for name, column in flights.items()
        }, op


def test_flight_quantiles_are_those_of_pandas(flights: pd.DataFrame, payload: bytes) -> None:
    shares = [0.01, 0.25, 0.5, 0.999]
    for how in ("linear", "lower", "nearest"):
        ours = reduced(payload, "quantile", q="0.01,0.25,0.5,0.999", interpolation=how)
        for name, column in flights.items():
            expected = column.astype("float64").quantile(shares, interpolation=how)  # type: ignore[call-overload]  # a str
            np.testing.assert_allclose(ours[str(name)], expected, rtol=RTOL)


def test_flight_delays_are_ranked_filled_and_related_as_in_pandas(flights: pd.DataFrame, payload: bytes) -> None:
    names = ["dep_delay", "arr_delay", "air_time", "distance"]
    columns, table = ms.load(payload), flights[names].astype("float64")
    assert ms.rank(columns["arr_delay"], 0).get_data().tolist() == table["arr_delay"].rank().fillna(0).tolist()
    assert (
        ms.ffill(columns["dep_delay"], 0, limit=3).get_data().tolist()
        == table["dep_delay"].ffill(limit=3).fillna(0).tolist()
    )
    rows = ms.stack([columns[name].to(torch.float64) for name in names])
    np.testing.assert_allclose(ms.cov(rows).get_data().numpy(), table.cov(), rtol=1e-9)
    np.testing.assert_allclose(ms.corrcoef(rows).get_data().numpy(), table.corr(), rtol=1e-9)


def exact_of_integers(op: str, cells: np.ndarray) -> float:
    """`exact` for many small integers: their sums and sums of squares fit int64."""
    assert len(cells) * int(np.abs(cells).max()) ** 2 < 2**63
    total, squares, n = int(cells.sum()), int((cells * cells).sum()), len(cells)
    if op == "sum":
        return total
    if op == "mean":
        return float(Fraction(total, n))
    variance = float(Fraction(n * squares - total * total, n * (n - 1)))
    return variance if op == "var" else math.sqrt(variance)


# -- the short table ----------------------------------------------------------------------------------------------


def test_the_shop_that_has_not_opened_has_no_mean() -> None:
    text = (EXAMPLES / "sales.json").read_text()
    answer = run(build("reduce", {"op": "mean", "dim": 1}), payload_json.decode(text))
    rows = [[cell for cell in row if cell is not None] for row in json.loads(text)["data"]]
    means = [sum(row) / len(row) if row else None for row in rows]
    assert None in means
    assert ms.load(answer.to_bytes())["data"].tolist() == means
