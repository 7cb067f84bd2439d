"""Selections, orders, scans, fills and normalizations beside numpy, pandas, pyarrow, scipy and torch."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import scipy.special
import scipy.stats
import torch

import maskserve as ms
from maskserve.errors import ParameterError
from tests.ties import (
    DTYPES,
    ROUNDING,
    WIDE,
    drawn,
    every_dtype,
    every_sample,
    f16,
    f32,
    f64,
    inf,
    lane,
    lanes,
    nan,
    of,
    t,
)

# -- selections ---------------------------------------------------------------------------------------------------------


@every_dtype
def test_picked_cells_and_their_places(dtype: torch.dtype) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        most, largest, smallest = ms.mode(tensor, dim), ms.max(tensor, dim), ms.min(tensor, dim)
        first, last, extent = (
            ms.first(tensor, dim),
            ms.last(tensor, dim),
            ms.ptp(tensor, dim) if dtype not in WIDE else None,
        )
        for at, own, stood in lanes(cells, mask, dim):
            got = [of(x, at) for x in (*most, *largest, *smallest, first, last)]
            if not len(own):
                assert got == [None] * 8
                continue
            mode = pd.Series(own).mode()[0]
            assert got[0] == mode == scipy.stats.mode(own).mode
            assert got[1] == stood[np.flatnonzero(own == mode)[0]]
            assert got[2:4] == [own.max(), stood[own.argmax()]]
            assert got[4:6] == [own.min(), stood[own.argmin()]]
            assert got[6:] == [own[0], own[-1]]
            assert extent is None or of(extent, at) == np.ptp(own)


@every_dtype
def test_distinct_cells(dtype: torch.dtype) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        counts = ms.count_distinct(tensor, dim)
        for at, own, _ in lanes(cells, mask, dim):
            assert of(counts, at) == pd.Series(own).nunique() == pc.count_distinct(pa.array(own)).as_py()
        got = ms.unique(tensor, return_inverse=True, return_counts=True)
        values, inverse, times = np.unique(cells[mask], return_inverse=True, return_counts=True)
        assert got.values.tolist() == values.tolist() == sorted(pc.unique(pa.array(cells[mask])).to_pylist())
        assert got.inverse.get_data().numpy()[mask].tolist() == inverse.tolist()
        assert np.array_equal(got.inverse.get_mask().numpy(), mask)
        assert got.counts.tolist() == times.tolist()


@pytest.mark.parametrize("how", ["linear", "lower", "higher", "midpoint", "nearest"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.uint64], ids=str)
def test_quantiles_agree_with_numpy(dtype: torch.dtype, how: str) -> None:
    shares = [0, 0.1, 0.25, 0.3, 0.5, 0.77, 1]
    for tensor, cells, mask, dim in every_sample(dtype):
        several = ms.quantile(tensor, shares, dim, interpolation=how)
        kept = ms.quantile(tensor, shares, dim, keepdim=True, interpolation=how)
        assert several.shape == (7, cells.shape[1 - dim])
        assert kept.shape == ((7, 1, cells.shape[1]) if dim == 0 else (7, cells.shape[0], 1))
        assert kept.get_data().flatten().tolist() == several.get_data().flatten().tolist()
        assert ms.quantile(tensor, 0.3, dim, interpolation=how).tolist() == several[3].tolist()
        for at, own, _ in lanes(cells, mask, dim):
            index = at[0] if dim == 1 else at[1]
            if not len(own):
                assert several[:, index].tolist() == [None] * 7
            else:
                expected = np.quantile(own.astype(np.float64), shares, method=how)  # type: ignore[call-overload]  # how: str
                np.testing.assert_allclose(
                    several[:, index].tolist(), expected, rtol=ROUNDING.get(several.dtype, 1e-14)
                )


def test_quantiles_agree_with_torch_and_pandas() -> None:
    tensor, cells, mask = drawn((200, 3), f64)
    plain = torch.randn(50, 60, generator=torch.Generator().manual_seed(0), dtype=f64)
    for how in ("linear", "lower", "higher", "midpoint", "nearest"):
        for dim in (0, 1):
            expected = torch.quantile(plain, t([0.2, 0.9]), dim, interpolation=how)
            torch.testing.assert_close(ms.quantile(plain, [0.2, 0.9], dim, interpolation=how).get_data(), expected)
            by_torch = torch.quantile(ms.masked_tensor(plain), t([0.2, 0.9]), dim, interpolation=how)
            torch.testing.assert_close(by_torch.get_data(), expected)
        frame = pd.DataFrame(np.where(mask, cells, nan)).quantile(0.3, interpolation=how)  # type: ignore[call-overload]  # how: str
        np.testing.assert_allclose(ms.quantile(tensor, 0.3, 0, interpolation=how).get_data()[1:], frame.to_numpy()[1:])


def test_quantiles_over_several_dims_in_any_order() -> None:
    data = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=f64)
    expected = np.quantile(data.numpy(), [0.2, 0.8], axis=(0, 2))
    for dims in ((0, 2), (2, 0), (-1, 0), (-3, -1)):
        got = ms.quantile(data, (0.2, 0.8), dims)
        np.testing.assert_allclose(got.get_data().numpy(), expected, rtol=1e-14)
        assert ms.quantile(data, (0.2, 0.8), dims, keepdim=True).shape == (2, 1, 5, 1)
    assert ms.quantile(data, (0.5,)).shape == (1,)
    assert ms.quantile(data, 0.5, keepdim=True).shape == (1, 1, 1)
    assert ms.quantile(t(3.0), (0.1, 0.2)).tolist() == [3.0, 3.0]
    assert ms.quantile(torch.zeros(0, 3), (0.1, 0.2), 0).tolist() == [[None] * 3] * 2
    assert ms.quantile(torch.zeros(0, 3), 0.1, 0, empty=7).tolist() == [7.0] * 3
    assert ms.quantile(torch.zeros(0, 3), (0.1, 0.2), 1).shape == (2, 0)
    for wrong in (1.1, -0.1, (0.1, 2)):
        with pytest.raises(ParameterError, match="from 0 to 1"):
            ms.quantile(data, wrong)


def test_nan_is_a_value_of_selections() -> None:
    data = t([[1, nan, 3, nan], [2, 2, inf, -inf], [nan, nan, nan, 1]])
    assert ms.max(data, 1).indices.tolist() == torch.max(data, 1).indices.tolist() == [1, 2, 0]
    assert ms.min(data, 1).indices.tolist() == torch.min(data, 1).indices.tolist() == [1, 3, 0]
    assert ms.count_distinct(data, 1).tolist() == pd.DataFrame(data.numpy()).nunique(axis=1, dropna=False).tolist()
    assert ms.count_distinct(data, 1, nan="omit").tolist() == pd.DataFrame(data.numpy()).nunique(axis=1).tolist()
    assert ms.mode(data, 1, nan="omit").values.tolist() == pd.DataFrame(data.numpy()).mode(axis=1)[0].tolist()
    np.testing.assert_array_equal(ms.mode(data, 1).values.get_data(), [nan, 2, nan])
    np.testing.assert_array_equal(ms.quantile(data, 0.5, 1).get_data(), np.quantile(data.numpy(), 0.5, 1))
    np.testing.assert_array_equal(ms.ptp(data, 1).get_data(), np.ptp(data.numpy(), 1))
    np.testing.assert_array_equal(ms.unique(data).get_data(), np.unique(data.numpy()))
    for how in ("cummax", "cummin"):
        for mine, theirs in zip(getattr(ms, how)(data, 1), getattr(torch, how)(data, 1), strict=True):
            np.testing.assert_array_equal(mine.get_data(), theirs)
    for descending in (False, True):
        mine, theirs = ms.sort(data, 1, descending), torch.sort(data, dim=1, descending=descending, stable=True)
        np.testing.assert_array_equal(mine.values.get_data(), theirs.values)
        np.testing.assert_array_equal(mine.indices.get_data(), theirs.indices)


# -- orders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "min", "max", "dense", "ordinal"])
@every_dtype
def test_ranks_agree_with_scipy_and_pandas(dtype: torch.dtype, method: str) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        got = ms.rank(tensor, dim, method=method)
        assert got.dtype == f64
        assert np.array_equal(got.get_mask().numpy(), mask)
        for at, own, stood in lanes(cells, mask, dim):
            mine = [lane(got, at)[place] for place in stood]
            assert mine == scipy.stats.rankdata(own, method).tolist()
            theirs = pd.Series(own).rank(method="first" if method == "ordinal" else method)  # type: ignore[arg-type]  # a str
            assert mine == theirs.tolist()


@every_dtype
def test_sorted_cells_agree_with_pandas(dtype: torch.dtype) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        for descending in (False, True):
            values, indices = ms.sort(tensor, dim, descending)
            places = ms.argsort(tensor, dim, descending)
            assert places.tolist() == indices.tolist()
            top = {k: ms.topk(tensor, k, dim, largest=descending) for k in (1, 3)}
            assert ms.topk(tensor, 0, dim).values.numel() == 0
            for at, own, stood in lanes(cells, mask, dim):
                theirs = pd.Series(own).sort_values(ascending=not descending, kind="stable", na_position="last")
                masked = [None] * (cells.shape[dim] - len(own))
                assert lane(values, at) == theirs.tolist() + masked
                assert lane(places, at) == stood[theirs.index].tolist() + masked
                for k, (cells_of_top, places_of_top) in top.items():
                    assert lane(cells_of_top, at) == lane(values, at)[:k]
                    assert lane(places_of_top, at) == lane(places, at)[:k]


# -- scans and fills ----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("limit", [None, 0, 1, 2])
def test_fills_agree_with_pandas(dtype: torch.dtype, limit: int | None) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        places = pd.DataFrame(
            np.where(mask, np.arange(cells.size).reshape(cells.shape), nan)
        )  # every dtype's cells, by place
        for op in ("ffill", "bfill"):
            got = getattr(ms, op)(tensor, dim, limit=limit)
            expected = (getattr(places, op)(axis=dim, limit=limit) if limit != 0 else places).to_numpy()
            valid = ~np.isnan(expected)
            assert np.array_equal(got.get_mask().numpy(), valid)
            assert got.get_data().numpy()[valid].tolist() == cells.ravel()[expected[valid].astype(int)].tolist()
        assert ms.fill(tensor, 7).tolist() == np.where(mask, cells, cells.dtype.type(7)).tolist()


@pytest.mark.parametrize("dtype", [f64, f32, f16, torch.int64, torch.uint8, torch.uint16, torch.uint32], ids=str)
def test_running_products_and_extremes_agree_with_numpy(dtype: torch.dtype) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        valid, wide = torch.from_numpy(mask), tensor.get_data().double()
        small = wide / 5 if dtype.is_floating_point else wide
        factors = ms.masked_tensor(torch.where(valid, small, 1).to(dtype), valid)
        if dtype.is_floating_point or cells.shape[dim] <= 7:
            got = ms.cumprod(factors, dim, **({"dtype": f64} if dtype is f16 else {}))
            kind = np.float64 if dtype.is_floating_point else np.int64
            expected = np.where(mask, np.cumprod(factors.get_data().numpy().astype(kind), dim), 0)
            rounding = {"rtol": ROUNDING.get(got.dtype, 1e-13)} if dtype.is_floating_point else {"rtol": 0}
            np.testing.assert_allclose(got.get_data().numpy(), expected, **rounding)
        for op, accumulate, junk in (("cummax", np.maximum, -1), ("cummin", np.minimum, 99)):
            values, places = getattr(ms, op)(tensor, dim)
            expected = accumulate.accumulate(np.where(mask, cells.astype(np.float64), junk), dim)
            assert values.get_data().numpy()[mask].tolist() == expected[mask].tolist()
            back = np.take_along_axis(cells, places.get_data().numpy(), dim)
            assert back[mask].tolist() == expected[mask].tolist()


def test_logcumsumexp_agrees_with_torch() -> None:
    tensor, cells, mask = drawn((40, 7), f64)
    got = ms.logcumsumexp(tensor, 0)
    for at, own, stood in lanes(cells, mask, 0):
        mine = [lane(got, at)[place] for place in stood]
        np.testing.assert_allclose(mine, torch.logcumsumexp(t(own.tolist()), 0), rtol=1e-14)
        if len(own):
            assert mine[-1] == pytest.approx(scipy.special.logsumexp(own), rel=1e-14)
    assert ms.logcumsumexp(t([-inf, -inf, 1000, 1000]), 0).tolist() == pytest.approx(
        [-inf, -inf, 1000, 1000 + math.log(2)]
    )


# -- normalizations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f64, f32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("correction", [0, 1])
def test_standard_scores_agree_with_scipys_masked_ones(dtype: torch.dtype, correction: int) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        got = ms.standardize(tensor, dim, correction=correction)
        for at, own, stood in lanes(cells, mask, dim):
            if len(own) > correction and len(np.unique(own)) > 1:
                theirs = scipy.stats.mstats.zscore(np.ma.MaskedArray(own.astype(np.float64)), ddof=correction)
                mine = [lane(got, at)[place] for place in stood]
                rounding = ROUNDING.get(got.dtype, 1e-13)
                np.testing.assert_allclose(mine, theirs, rtol=rounding, atol=rounding)
            elif len(own) <= correction:
                assert lane(got, at) == [None] * cells.shape[dim]


@pytest.mark.parametrize("dtype", [f64, f32, torch.uint8], ids=str)
def test_softmin_and_normalize_agree_with_torch_on_the_valid_cells(dtype: torch.dtype) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        softmin = ms.softmin(tensor, dim)
        norms = {ord: ms.normalize(tensor, ord, dim) for ord in (2, 1, inf, 3, 0.5)}
        for at, own, stood in lanes(cells, mask, dim):
            wide = t(own.tolist())
            rounding = ROUNDING.get(softmin.dtype, 1e-14)
            mine = [lane(softmin, at)[place] for place in stood]
            np.testing.assert_allclose(mine, torch.nn.functional.softmin(wide, 0), rtol=rounding)
            for ord, got in norms.items():
                mine = [lane(got, at)[place] for place in stood]
                if len(own):
                    np.testing.assert_allclose(mine, torch.nn.functional.normalize(wide, ord, 0), rtol=rounding)
