"""Unsigned, fp8 and complex cells, strides, and the words that every row knows, on the rows beyond sums."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import maskserve as ms
from maskserve.errors import NanError, ParameterError
from tests.ties import (
    f32,
    f64,
    inf,
    nan,
    parts,
    t,
)

# -- dtypes that torch does not compute with ----------------------------------------------------------------------------


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
FLOATING = (
    "sum",
    "mean",
    "var",
    "std",
    "amax",
    "median",
    "prod",
    "norm",
    "ptp",
    "first",
    "logsumexp",
    "standardize",
    "cumsum",
)


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


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_cells_agree_with_torch_on_the_valid_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    data = torch.randn(6, 50, generator=generator, dtype=dtype)
    mask = torch.rand(6, 50, generator=generator) < 0.7
    tensor = ms.masked_tensor(torch.where(mask, data, complex(nan, inf)), mask)
    names = ("sum", "mean", "var", "std", "prod", "logsumexp")
    got = {op: getattr(ms, op)(tensor, 1) for op in names} | {p: ms.norm(tensor, p, 1) for p in (2, 1, inf, 0.5, -1)}
    running = {op: getattr(ms, op)(tensor, 1) for op in ("cumsum", "cumprod")} | {
        "normalize": ms.normalize(tensor, 2, 1)
    }
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


# -- the words that every row knows -------------------------------------------------------------------------------------


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
LAID = [
    *WORDED,
    "median",
    "count_distinct",
    "cumprod",
    "cummax",
    "logcumsumexp",
    "rank",
    "sort",
    "argsort",
    "ffill",
    "bfill",
]


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
    for mine, theirs in zip(
        parts(getattr(ms, op)(row, *given)), parts(getattr(ms, op)(row.clone(), *given)), strict=True
    ):
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
