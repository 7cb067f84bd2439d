"""Results beside other people's code, on random data with junk under the mask."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.special
import torch

import maskserve as ms
from tests.samples import SLICED, ulps

SHAPES = ((60,), (7, 4500), (4500, 7), (6, 70, 5))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool)


def sample(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor, np.ma.MaskedArray[Any, Any]]:
    """(data, mask, the same as a float64 numpy.ma); a fully masked slice among them."""
    generator = np.random.default_rng(seed)
    data = torch.from_numpy(np.abs(generator.normal(5, 3, shape)) % 11).to(dtype)
    mask = torch.from_numpy(generator.random(shape) < 0.6)
    mask[0] = mask[0] & False if len(shape) > 1 else mask[0]
    masked = np.ma.MaskedArray(data.double().numpy(), mask=~mask.numpy())
    data[~mask] = True if dtype is torch.bool else (math.nan if dtype.is_floating_point else torch.iinfo(dtype).min)
    return data, mask, masked


CLOSE = {torch.float64: 1e-11, torch.float32: 2e-7, torch.float16: 1e-3}
"""numpy.ma sums in plain float64; what it rounds on the way is its own."""

NUMPY_MA = {
    "sum": lambda a, d: a.sum(d),
    "mean": lambda a, d: a.mean(d),
    "var": lambda a, d: a.var(d, ddof=1),
    "std": lambda a, d: a.std(d, ddof=1),
    "amax": lambda a, d: a.max(d),
    "amin": lambda a, d: a.min(d),
    "count": lambda a, d: np.ma.MaskedArray(a.count(d)),
    "any": lambda a, d: a.astype(bool).any(d),
    "all": lambda a, d: a.astype(bool).all(d),
    "median": lambda a, d: np.ma.median(a, d),
    "cumsum": lambda a, d: a.cumsum(d),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NUMPY_MA)
def test_agrees_with_numpy_ma_in_float64(op: str, dtype: torch.dtype) -> None:
    for shape, seed in itertools.product(SHAPES, range(2)):
        data, mask, masked = sample(shape, dtype, seed)
        needs_dim = op == "cumsum"
        for dim in (*(() if needs_dim else (None,)), *range(len(shape))):
            with np.errstate(all="ignore"):
                expected = np.ma.MaskedArray(NUMPY_MA[op](masked, dim))
            wider = {"dtype": torch.float32} if dtype is torch.float16 and "sum" in op else {}
            got = getattr(ms, op)(data, *(() if dim is None else (dim,)), mask=mask, **wider)
            valid = torch.from_numpy(np.atleast_1d(~np.ma.getmaskarray(expected)))
            if op in ("var", "std"):  # numpy.ma masks exact zeros and single cells for reasons of its own
                valid = torch.from_numpy(np.atleast_1d(np.asarray(masked.count(dim)) > 1))
            own = got.get_mask().reshape(valid.shape)
            assert torch.equal(own, valid), (op, shape, dim)
            values = torch.from_numpy(np.atleast_1d(np.asarray(expected.data, dtype=np.float64)))
            mine = got.get_data().double().reshape(valid.shape)
            rtol = CLOSE.get(got.dtype, 0.0)
            torch.testing.assert_close(mine[valid], values[valid].to(got.dtype).double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.bool], ids=str)
def test_indices_agree_with_numpy_ma(op: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        data, mask, masked = sample(shape, dtype, 3)
        for dim in (None, *range(len(shape))):
            got = getattr(ms, op)(data, dim, mask=mask)
            expected = torch.from_numpy(np.atleast_1d(getattr(masked, op)(dim)))
            valid = got.get_mask().reshape(expected.shape)
            assert torch.equal(got.get_data().reshape(expected.shape)[valid], expected[valid])


@pytest.mark.parametrize("op", ["sum", "mean", "var", "std", "amax", "amin", "median", "count"])
def test_columns_agree_with_pandas(op: str) -> None:
    data, mask, masked = sample((4500, 7), torch.float64, 4)
    frame = pd.DataFrame(masked.filled(np.nan))
    name = {"amax": "max", "amin": "min"}.get(op, op)
    expected = torch.tensor(getattr(frame, name)().tolist(), dtype=torch.float64)
    got = getattr(ms, op)(data, 0, mask=mask).get_data().double()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", ["logsumexp", "softmax", "log_softmax"])
def test_exponentials_agree_with_scipy(op: str) -> None:
    data, mask, masked = sample((40, 300), torch.float64, 5)
    got = getattr(ms, op)(data, 1, mask=mask)
    for row in range(40):
        valid = mask[row]
        if not valid.any():
            assert not got.get_mask()[row].any()
            continue
        expected = getattr(scipy.special, op)(masked[row].compressed())
        mine = got.get_data()[row][valid] if op != "logsumexp" else got.get_data()[row]
        np.testing.assert_allclose(mine.numpy(), expected, rtol=1e-14, atol=1e-14)


def first(result: Any) -> Any:
    """The values, where indices come with them."""
    return result.values if isinstance(result, tuple) else result


@pytest.mark.parametrize("row", SLICED, ids=lambda row: row.name)
def test_unmasked_results_are_torchs(row: Any) -> None:
    """Where nothing is masked, a masked op is the plain one (median apart, which says so)."""
    function = getattr(torch, row.name, None)
    if row.differs or function is None or row.name in ("count", "norm"):
        return
    data = torch.from_numpy(np.random.default_rng(6).normal(size=(50, 60)))
    for dtype in (torch.float64, torch.float32):
        # torch's functions of a value and its place; quantile's share comes first
        given = (0.3, 1) if row.name == "quantile" else (3, 1) if row.name == "topk" else (1,)
        got, expected = first(getattr(ms, row.name)(data.to(dtype), *given)), first(function(data.to(dtype), *given))
        assert got.dtype == expected.dtype
        assert got.get_mask().all()
        if dtype is torch.float32 and got.is_floating_point():
            wide = first(function(data.to(dtype).double(), *given)).to(dtype)
            assert ulps(got.get_data(), wide, dtype) <= 1
        else:
            torch.testing.assert_close(got.get_data(), expected, rtol=1e-12, atol=1e-13)
