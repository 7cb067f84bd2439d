"""Functions of a whole tensor beside numpy, pandas, torch and exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

import maskserve as ms
from maskserve.errors import DataError, ParameterError
from tests.ties import (
    DTYPES,
    Array,
    drawn,
    f32,
    f64,
    inf,
    nan,
    t,
)


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
