"""Every strided sample that torch ships for its own masked ops, against float64 references taken slice by slice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from torch.testing._internal.opinfo.definitions import _masked as masked

import maskserve as ms

Slice = np.ndarray[Any, Any]
REDUCED: dict[str, Callable[..., Any]] = {
    "sum": lambda x, **_: x.sum(),
    "prod": lambda x, **_: np.prod(x),
    "amax": lambda x, **_: x.max(),
    "amin": lambda x, **_: x.min(),
    "mean": lambda x, **_: x.mean(),
    "median": lambda x, **_: np.median(x),
    "norm": lambda x, ord, **_: np.linalg.norm(x, ord),
    "var": lambda x, correction, **_: (np.abs(x - x.mean()) ** 2).sum() / (len(x) - correction),
    "std": lambda x, correction, **_: np.sqrt((np.abs(x - x.mean()) ** 2).sum() / (len(x) - correction)),
    "logsumexp": lambda x, **_: scipy.special.logsumexp(x),
}
PLACED = {"argmax": np.argmax, "argmin": np.argmin}
KEPT: dict[str, Callable[..., Any]] = {
    "cumsum": lambda x, **_: np.cumsum(x),
    "cumprod": lambda x, **_: np.cumprod(x),
    "softmax": lambda x, **_: scipy.special.softmax(x),
    "log_softmax": lambda x, **_: scipy.special.log_softmax(x),
    "softmin": lambda x, **_: scipy.special.softmax(-x),
    "normalize": lambda x, ord, eps=1e-12, **_: x / max(np.linalg.norm(x, ord), eps),
}
POSITIONAL = {"norm": ("ord",), "normalize": ("ord", "dim"), "logsumexp": ("dim",), "var": ("dim",), "std": ("dim",)}
POSITIONAL |= dict.fromkeys(
    ("cumsum", "cumprod", "softmax", "log_softmax", "softmin", "median", "argmax", "argmin"), ("dim",)
)
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-22, torch.complex64: 2**-20}

OPS = [op for op in masked.op_db if op.name.removeprefix("masked.") in {*REDUCED, *PLACED, *KEPT}]
CASES = [(op, dtype) for op in OPS for dtype in sorted(op.supported_dtypes("cpu"), key=str)]


def named(sample: Any, op: str) -> dict[str, Any]:
    """The sample's parameters by name."""
    given = dict(zip(POSITIONAL.get(op, ()), sample.args, strict=False)) | sample.kwargs
    if given.pop("unbiased", None) is not None:
        given["correction"] = int(sample.kwargs["unbiased"])
    return {**given, "correction": 1 if given.get("correction") is None else given["correction"]}


def of_as_many_dims(mask: torch.Tensor | None, data: torch.Tensor) -> torch.Tensor | None:
    """torch.masked takes masks of fewer dims; we ask for as many."""
    return None if mask is None else mask.reshape((1,) * (data.ndim - mask.ndim) + mask.shape)


def wide(data: torch.Tensor) -> Slice:
    kind = torch.complex128 if data.is_complex() else torch.float64
    array: Slice = data.detach().resolve_conj().to(kind).numpy()
    return array


def slices(shape: torch.Size, dim: Any) -> Iterator[tuple[Any, ...]]:
    """The index of each slice, a slice(None) for every dim in it."""
    named = dim if isinstance(dim, tuple | list) else (dim,)
    dims = range(len(shape)) if dim in (None, ()) else [d % max(len(shape), 1) for d in named]
    return itertools.product(*[[slice(None)] if d in dims else range(n) for d, n in enumerate(shape)])


def is_empty(index: tuple[Any, ...], shape: torch.Size) -> bool:
    return math.prod(n for i, n in zip(index, shape, strict=True) if isinstance(i, slice)) == 0


@pytest.mark.parametrize(("op", "dtype"), CASES, ids=[f"{op.name}-{dtype}"[7:] for op, dtype in CASES])
@pytest.mark.filterwarnings("ignore:.*overflows")
def test_agrees_with_a_reference_slice_by_slice(op: Any, dtype: torch.dtype) -> None:
    name = op.name.removeprefix("masked.")
    n_slices = 0
    for sample in op.sample_inputs("cpu", dtype):
        params = named(sample, name)
        data, mask = sample.input, params.get("mask")
        mask = of_as_many_dims(mask, data)
        call = {k: v for k, v in sample.kwargs.items() if k != "mask"}
        got = getattr(ms, name)(data.detach(), *sample.args, mask=mask, **call)
        cells = wide(data)
        full = np.broadcast_to(True if mask is None else mask.numpy(), cells.shape)
        mine, own_mask = wide(got.get_data()), got.get_mask().numpy()
        for index in slices(data.shape, params.get("dim")):
            if is_empty(index, data.shape) and name in KEPT:
                continue
            n_slices += 1
            check(name, mine, own_mask, got.dtype, index, cells[index], full[index], params)
    assert n_slices


def check(
    name: str,
    got: Slice,
    got_mask: Slice,
    dtype: torch.dtype,
    index: tuple[Any, ...],
    cells: Slice,
    valid: Slice,
    params: dict[str, Any],
) -> None:
    """One slice of a result of `dtype` against the reference on its valid cells."""
    own = cells[valid].reshape(-1)
    if name in KEPT:
        assert np.array_equal(got_mask[index], valid)
        if own.size:
            assert_close(got[index][valid].reshape(-1), KEPT[name](own, **params), dtype)
        return
    kept = params.get("keepdim", False)
    at = (
        tuple(0 if isinstance(i, slice) else i for i in index)
        if kept
        else tuple(i for i in index if not isinstance(i, slice))
    )
    enough = own.size > (params["correction"] if name in ("var", "std") else 0) and own.size > 0
    assert bool(got_mask[at]) == enough
    if not enough:
        return
    mine = got[at]
    if name in PLACED:
        flat = cells.reshape(-1).copy()
        flat[~valid.reshape(-1)] = -math.inf if name == "argmax" else math.inf
        assert mine == PLACED[name](flat)
    else:
        with np.errstate(all="ignore"):
            assert_close(mine, REDUCED[name](own, **params), dtype)


def assert_close(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Equal in the result's dtype: beyond its range inf, else within its rounding."""
    expected = np.asarray(expected)
    if dtype.is_floating_point:
        expected = torch.from_numpy(expected.astype(np.float64)).to(dtype).double().numpy()
    tolerance = TOLERANCE.get(dtype, 1e-12)
    # numpy's own float64 is no closer to 0 than this
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * 1e-2 if dtype.is_complex else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logaddexp_agrees(dtype: torch.dtype) -> None:
    (op,) = [op for op in masked.op_db if op.name == "masked.logaddexp"]
    for sample in op.sample_inputs("cpu", dtype):
        other = sample.args[0]
        masks = [of_as_many_dims(sample.kwargs.get(f"{side}_mask"), sample.input) for side in ("input", "other")]
        got = ms.logaddexp(ms.MaskedTensor(sample.input.detach(), masks[0]), ms.MaskedTensor(other.detach(), masks[1]))
        valid = np.ones(sample.input.shape, bool)
        for mask in masks:
            valid &= True if mask is None else mask.numpy()
        assert np.array_equal(got.get_mask().numpy(), valid)
        expected = np.logaddexp(wide(sample.input), wide(other))[valid]
        rounding = TOLERANCE.get(dtype, 1e-14)
        np.testing.assert_allclose(wide(got.get_data())[valid], expected, rtol=2 * rounding, atol=rounding)
