"""Selections, orders, scans, fills and whole-tensor rows beside numpy, pandas, pyarrow, scipy and torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import maskserve as ms
from maskserve.errors import DataError, NanError, ParameterError

inf, nan = math.inf, math.nan
f16, f32, f64 = torch.float16, torch.float32, torch.float64

Array = np.ndarray[Any, Any]
SHAPES = ((40, 7), (7, 40), (200, 3))
DTYPES = (f64, f32, f16, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
WIDE = (torch.uint64,)
"""The range of cells that int64 cannot hold is refused."""
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUNDING = {f32: 2e-7, f16: 1e-3}


def t(values: Any, dtype: torch.dtype = f64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[ms.MaskedTensor, Array, Array]:
    """(tensor with junk under its mask, cells with many ties, mask): a row and a column fully masked, ints at their ends."""
    generator = np.random.default_rng(seed)
    cells = torch.from_numpy(generator.integers(0, 9, shape)).to(dtype)
    mask = torch.from_numpy(generator.random(shape) < 0.7)
    mask[0], mask[:, 0] = False, False
    under = torch.from_numpy(generator.integers(0, 120, shape))
    junk = torch.full(shape, nan).to(dtype) if dtype.is_floating_point else under.to(dtype)
    at = cells.numpy() if dtype is not torch.uint64 else cells.numpy() + np.uint64(2**63 - 4)
    own = torch.from_numpy(np.where(mask.numpy(), at, junk.numpy()))
    return ms.masked_tensor(own, mask), at, mask.numpy()


def lanes(cells: Array, mask: Array, dim: int) -> Iterator[tuple[tuple[Any, ...], Array, Array]]:
    """(index of a slice, its valid cells, where they stand)."""
    for i in range(cells.shape[1 - dim]):
        at = (slice(None), i) if dim == 0 else (i, slice(None))
        yield at, cells[at][mask[at]], np.flatnonzero(mask[at])


def every_sample(dtype: torch.dtype) -> Iterator[tuple[ms.MaskedTensor, Array, Array, int]]:
    for seed, shape in enumerate(SHAPES):
        for dim in (0, 1):
            yield (*drawn(shape, dtype, seed), dim)


def of(result: ms.MaskedTensor, at: Any) -> Any:
    return result.tolist()[at[0] if isinstance(at[1], slice) else at[1]]


def lane(result: ms.MaskedTensor, at: tuple[Any, ...]) -> list[Any]:
    """One slice of a result of the data's shape, None where masked."""
    cells = np.array(result.tolist(), dtype=object)[at]
    assert isinstance(cells, np.ndarray)
    return list(cells)


# -- selections ---------------------------------------------------------------------------------------------------


@every_dtype
def test_picked_cells_and_their_places(dtype: torch.dtype) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        most, largest, smallest = ms.mode(tensor, dim), ms.max(tensor, dim), ms.min(tensor, dim)
        first, last, extent = ms.first(tensor, dim), ms.last(tensor, dim), ms.ptp(tensor, dim) if dtype not in WIDE else None
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
                np.testing.assert_allclose(several[:, index].tolist(), expected, rtol=ROUNDING.get(several.dtype, 1e-14))


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


# -- orders -------------------------------------------------------------------------------------------------------


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


# -- scans and fills ----------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("limit", [None, 0, 1, 2])
def test_fills_agree_with_pandas(dtype: torch.dtype, limit: int | None) -> None:
    for tensor, cells, mask, dim in every_sample(dtype):
        places = pd.DataFrame(np.where(mask, np.arange(cells.size).reshape(cells.shape), nan))  # every dtype's cells, by place
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
    assert ms.logcumsumexp(t([-inf, -inf, 1000, 1000]), 0).tolist() == pytest.approx([-inf, -inf, 1000, 1000 + math.log(2)])


# -- normalizations -----------------------------------------------------------------------------------------------


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


# -- functions of a whole tensor ------------------------------------------------------------------------------------


def covariance(x: Array, y: Array, correction: int = 1) -> float:
    a, b = ([Fraction(float(v)) for v in side] for side in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return float(sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True)) / (len(a) - correction))


@pytest.mark.parametrize("correction", [0, 1, 2])
@pytest.mark.parametrize("kind", ["near", "far", "far apart"])
def test_covariances_are_exact_pair_by_pair(kind: str, correction: int) -> None:
    """Far apart: in columns where the other row is masked a row is a thousand million larger."""
    generator = np.random.default_rng(0)
    cells = generator.normal(size=(8, 30)) + (1e9 if kind == "far" else 0)
    mask = generator.random((8, 30)) < 0.6
    if kind == "far apart":
        cells[:4, :15] += 1e9
        mask[4:, :15] = False
    got = ms.cov(ms.masked_tensor(t(np.where(mask, cells, nan)), torch.from_numpy(mask)), correction=correction)
    related = ms.corrcoef(ms.masked_tensor(t(cells), torch.from_numpy(mask)))
    for i in range(8):
        for j in range(8):
            x, y = (cells[k][mask[i] & mask[j]] for k in (i, j))
            if len(x) <= max(correction, 1):
                assert len(x) > correction or got.tolist()[i][j] is None
                continue
            size = math.sqrt(covariance(x, x, correction) * covariance(y, y, correction))
            assert abs(got.tolist()[i][j] - covariance(x, y, correction)) <= 1e-14 * size
            assert abs(related.tolist()[i][j] - covariance(x, y, correction) / size) <= 1e-14


def test_covariances_agree_with_pandas_pairwise() -> None:
    generator = np.random.default_rng(1)
    cells, mask = generator.normal(size=(9, 40)), generator.random((9, 40)) < 0.5
    frame = pd.DataFrame(np.where(mask, cells, nan)).T
    tensor = ms.masked_tensor(t(cells), torch.from_numpy(mask))
    for got, theirs in ((ms.cov(tensor), frame.cov()), (ms.corrcoef(tensor), frame.corr())):
        assert got.get_mask().all()
        np.testing.assert_allclose(got.get_data(), theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [f64, f32, torch.int8, torch.uint8], ids=str)
def test_covariances_of_whole_rows_agree_with_numpy(dtype: torch.dtype) -> None:
    data = (torch.randn(6, 50, generator=torch.Generator().manual_seed(2)) * 20).abs().to(dtype)
    for correction in (0, 1):
        for one in (data, data[0], data[:, :2]):
            expected = np.cov(one.double().numpy(), ddof=correction)
            np.testing.assert_allclose(ms.cov(one, correction=correction).get_data(), expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(ms.corrcoef(data).get_data(), np.corrcoef(data.double().numpy()), rtol=1e-6, atol=1e-7)
    assert ms.corrcoef(data).get_data().diagonal().tolist() == [1.0] * 6


def test_correlations_of_constant_infinite_and_very_large_rows() -> None:
    constant = t([[0.1] * 10, list(range(10))])
    assert ms.corrcoef(constant).get_data().isnan().tolist() == [[True, True], [True, False]]
    mask = t([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]], torch.bool)  # the first row is constant where both are valid
    masked = ms.masked_tensor(t([[0.1, 0.1, 5, nan, nan], [1, 2, nan, 4, 9]]), mask)
    assert ms.corrcoef(masked).get_data().isnan().tolist() == [[False, True], [True, False]]
    data = t([[1, 2, 3, nan], [2, 4, 6.5, 1], [1, 1.5, 1, inf]])
    assert ms.cov(data).get_data().isnan().tolist() == torch.cov(data).isnan().tolist()
    hidden = ms.masked_tensor(data, t([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]], torch.bool))
    assert ms.cov(hidden).get_data().isfinite().all()
    assert ms.cov(hidden).tolist()[0][2] == pytest.approx(np.cov(data[:, :3])[0, 2], abs=1e-15)
    for size in (1e180, 1e-180):
        np.testing.assert_allclose(ms.corrcoef(data[:2, :3] * size).get_data(), np.corrcoef(data[:2, :3]), rtol=1e-14)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.uint64], ids=str)
@pytest.mark.parametrize("bins", [1, 7, 10, 100])
def test_histograms_agree_with_numpy(dtype: torch.dtype, bins: int) -> None:
    tensor, cells, mask = drawn((40, 7), dtype)
    own = cells[mask].astype(np.float64)
    for words in ({}, {"range": (0.0, 5.5)}, {"range": (3.0, 3.0)}, {"density": True}):
        got = ms.histogram(tensor, bins, **words)
        _, edges = np.histogram(own, bins, **words)  # type: ignore[call-overload]  # words of a dict
        np.testing.assert_allclose(got.bin_edges.get_data(), edges, rtol=1e-15, atol=1e-15)
        by_edges, _ = np.histogram(own, got.bin_edges.get_data().numpy(), density=words.get("density"))
        np.testing.assert_allclose(got.hist.get_data(), by_edges)
    edges = [0.0, 0.5, 2, 3, 8]
    assert ms.histogram(tensor, edges).hist.tolist() == np.histogram(own, edges)[0].tolist()


def test_histograms_agree_with_torch_and_refuse_what_has_no_bins() -> None:
    data = torch.randn(5000, generator=torch.Generator().manual_seed(3), dtype=f64)
    got, theirs = torch.histogram(ms.masked_tensor(data), 50), torch.histogram(data, 50)
    assert got.hist.tolist() == theirs.hist.tolist()
    torch.testing.assert_close(got.bin_edges.get_data(), theirs.bin_edges)
    assert ms.histogram(t([16777217, 16777216, 0], torch.int64), bins=[0, 16777216, 16777217]).hist.tolist() == [1, 2]
    assert ms.histogram(t([0.7], f32), bins=[0.7, 1]).hist.tolist() == [0]  # float32's 0.7 is less
    assert ms.histogram(t([-1.7e308, 1.7e308]), 3).hist.tolist() == [1, 0, 1]
    assert ms.histogram(t([1, 1 + 2**-52, 1 + 2**-51]), 2).hist.tolist() == [1, 2]
    with pytest.raises(ParameterError, match="finite"):
        ms.histogram(data, range=(0, inf))
    with pytest.raises(DataError, match="nan=omit"):
        ms.histogram(t([nan, 1]))


# -- dtypes that torch does not compute with -------------------------------------------------------------------------


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", UNSIGNED, ids=str)
def test_unsigned_cells_agree_with_numpy(dtype: torch.dtype) -> None:
    top = torch.iinfo(dtype).max
    values = np.random.default_rng(4).integers(0, top, (20, 9), dtype=np.dtype(str(dtype)[6:]), endpoint=True)
    values[0, :3] = 0, top, top
    mask = np.random.default_rng(5).random((20, 9)) < 0.7
    mask[0] = True
    tensor = ms.masked_tensor(torch.from_numpy(values), torch.from_numpy(mask))
    masked = np.ma.MaskedArray(values, ~mask)
    for dim in (None, 0, 1):
        for op, theirs in (("amax", masked.max(dim)), ("amin", masked.min(dim)), ("count", masked.count(dim))):
            assert getattr(ms, op)(tensor, dim).tolist() == np.asarray(theirs).tolist()
        exact = [int(x) for x in values[mask]] if dim is None else None
        if exact:
            assert ms.mean(tensor).item() == pytest.approx(float(Fraction(sum(exact), len(exact))), rel=1e-15)
            assert ms.sum(tensor, dtype=f64).item() == float(sum(exact))
        assert ms.argmax(tensor, dim).tolist() == np.asarray(masked.argmax(dim)).tolist()
        middle = np.asarray(np.ma.median(masked.astype(float), dim))
        np.testing.assert_allclose(ms.median(tensor, dim).get_data(), middle, rtol=1e-15)
    assert ms.quantile(tensor, 1.0).item() == float(top)
    assert ms.sort(tensor, 1).values.tolist()[0][-1] == top
    assert ms.ffill(tensor, 0).get_data().numpy()[0].tolist() == values[0].tolist()
    assert ms.fill(tensor, top).tolist() == np.where(mask, values, values.dtype.type(top)).tolist()
    assert ms.var(tensor).item() == pytest.approx(np.var(values[mask].astype(np.longdouble), ddof=1), rel=1e-12)


EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATING = ("sum", "mean", "var", "std", "amax", "median", "prod", "norm", "ptp", "first", "logsumexp", "standardize", "cumsum")


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_fp8_cells_give_what_float32_ones_do(dtype: torch.dtype) -> None:
    wide = torch.randn(6, 50, generator=torch.Generator().manual_seed(6)).clamp(-1.5, 1.5).to(dtype).float()
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(7)) < 0.7
    for op in (*FLOATING, "softmax", "cumprod", "quantile", "rank", "sort", "mode", "max", "ffill", "cummax", "topk"):
        given = (0.3, 1) if op == "quantile" else (3, 1) if op == "topk" else (2, 1) if op == "norm" else (1,)
        for mine, theirs in zip(
            parts(getattr(ms, op)(ms.masked_tensor(wide.to(dtype), mask), *given)),
            parts(getattr(ms, op)(ms.masked_tensor(wide, mask), *given)),
            strict=True,
        ):
            assert mine.dtype == theirs.dtype
            assert mine.tolist() == theirs.tolist()


def parts(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_cells_agree_with_torch_on_the_valid_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    data = torch.randn(6, 50, generator=generator, dtype=dtype)
    mask = torch.rand(6, 50, generator=generator) < 0.7
    tensor = ms.masked_tensor(torch.where(mask, data, complex(nan, inf)), mask)
    names = ("sum", "mean", "var", "std", "prod", "logsumexp")
    got = {op: getattr(ms, op)(tensor, 1) for op in names} | {p: ms.norm(tensor, p, 1) for p in (2, 1, inf, 0.5, -1)}
    running = {op: getattr(ms, op)(tensor, 1) for op in ("cumsum", "cumprod")} | {"normalize": ms.normalize(tensor, 2, 1)}
    real = torch.float32 if dtype is torch.complex64 else f64
    for i in range(6):
        own = data[i][mask[i]].to(torch.complex128)
        expected = {op: getattr(torch, op)(own, 0) for op in names}
        expected |= {p: torch.linalg.vector_norm(own, p) for p in (2, 1, inf, 0.5, -1)}
        for op, value in expected.items():
            assert got[op].dtype == (dtype if value.is_complex() else real), op
            rounding = {"rtol": 1e-6, "atol": 1e-6} if real is f32 else {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(got[op].get_data()[i].to(value.dtype), value, **rounding)
        for op, result in running.items():
            wanted = torch.nn.functional.normalize(own, dim=0) if op == "normalize" else getattr(torch, op)(own, 0)
            torch.testing.assert_close(result.get_data()[i][mask[i]].to(wanted.dtype), wanted, rtol=1e-5, atol=1e-6)
    assert ms.count(tensor).item() == int(mask.sum())


# -- the words that every row knows ----------------------------------------------------------------------------------


WORDED = ["prod", "norm", "quantile", "mode", "first", "last", "ptp", "max", "min"]


@pytest.mark.parametrize("op", WORDED)
def test_min_count_and_empty_and_nan(op: str) -> None:
    data, mask = t([[1.0, 2, 2], [3, nan, 5], [7, 7, 7]]), t([[1, 1, 1], [1, 0, 1], [0, 0, 0]], torch.bool)
    given = (0.5, 1) if op == "quantile" else (2, 1) if op == "norm" else (1,)
    tensor, function = ms.masked_tensor(data, mask), getattr(ms, op)

    def valid(**words: Any) -> list[bool]:
        result = function(tensor, *given, **words)
        found: list[bool] = parts(result)[0].get_mask().tolist()
        return found

    assert valid() == [True, True, False]
    assert valid(min_count=3) == [True, False, False]
    assert valid(nan="omit") == [True, True, False]
    if op in ("prod", "norm"):
        assert parts(function(tensor, *given, min_count=0))[0].tolist()[2] == {"prod": 1, "norm": 0}[op]
    else:
        with pytest.raises(ParameterError, match="min_count"):
            valid(min_count=0)
    if op not in ("max", "min", "mode"):
        assert function(tensor, *given, empty=-1).tolist()[2] == -1
    seen = ms.masked_tensor(data, t([[1, 1, 1], [1, 1, 1], [0, 0, 0]], torch.bool))
    omitted = parts(function(seen, *given, nan="omit"))[0].tolist()
    assert omitted == parts(function(tensor, *given))[0].tolist()
    with pytest.raises(NanError, match="nan=raise"):
        function(seen, *given, nan="raise")


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "flipped": lambda x: x.flip(1).contiguous().flip(1),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}
LAID = [*WORDED, "median", "count_distinct", "cumprod", "cummax", "logcumsumexp", "rank", "sort", "argsort", "ffill", "bfill"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", LAID)
def test_strides_change_nothing(op: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(9)
    data, mask = torch.randn(9, 30, generator=generator), torch.rand(9, 30, generator=generator) < 0.7
    laid = [LAYOUTS[layout](x) for x in (data, mask)]
    for dim in (0, 1, -1):
        given = (0.5, dim) if op == "quantile" else (2, dim) if op == "norm" else (dim,)
        for mine, theirs in zip(
            parts(getattr(ms, op)(laid[0], *given, mask=laid[1])),
            parts(getattr(ms, op)(data, *given, mask=mask)),
            strict=True,
        ):
            assert mine.tolist() == theirs.tolist()
    row = data[:1].expand(4, 30)
    given = (0.5, 0) if op == "quantile" else (2, 0) if op == "norm" else (0,)
    for mine, theirs in zip(parts(getattr(ms, op)(row, *given)), parts(getattr(ms, op)(row.clone(), *given)), strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("op", LAID)
def test_tensors_of_no_dims_and_of_no_cells(op: str) -> None:
    given = (0.5,) if op == "quantile" else (2,) if op == "norm" else ()
    for dim in (0, -1):
        results = parts(getattr(ms, op)(t(3.0), *given, dim))
        assert all(r.shape == () and r.get_mask().item() for r in results)
        assert results[0].item() == {"ptp": 0, "count_distinct": 1, "rank": 1, "argsort": 0}.get(op, 3)
        if len(results) > 1:
            assert results[1].item() == 0
    for shape in ((0, 3), (3, 0), (2, 0, 3), (0,)):
        for dim in range(len(shape)):
            for result in parts(getattr(ms, op)(torch.zeros(shape), *given, dim)):
                reduced = shape[:dim] + shape[dim + 1 :]
                assert tuple(result.shape) in (reduced, shape)
                assert op == "count_distinct" or not result.get_mask().any()
