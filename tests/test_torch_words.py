"""torch's functions of selections, norms and whole tensors, called with a MaskedTensor in torch's own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import maskserve as ms
from maskserve.errors import UncoveredFunctionError

CELLS = torch.tensor([[3, 1, 2, 9], [5, 5, 4, 0]], dtype=torch.float64)
VALID = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
M = ms.masked_tensor(CELLS, VALID)

SAID: list[tuple[str, Callable[[], Any], Any]] = [
    ("max", lambda: torch.max(M, 1).values, [3, 5]),
    ("max keepdim", lambda: torch.max(M, dim=1, keepdim=True).indices, [[0], [0]]),
    ("max of all", lambda: torch.max(M), 5),
    ("max of two", lambda: torch.max(M, M * 2)[0], [6, 2, 4, None]),
    ("quantile", lambda: torch.quantile(M, 0.5, 1, interpolation="lower"), [2, 5]),
    ("quantiles", lambda: torch.quantile(M, torch.tensor([0.5, 1]), dim=1, keepdim=True), [[[2], [5]], [[3], [5]]]),
    ("norm", lambda: torch.norm(M, p=1, dim=1), [6, 10]),
    ("norm fro", lambda: torch.norm(M, "fro"), 8),
    ("norm of dims", lambda: torch.norm(M, p=2, dim=(1, 0)), 8),
    ("vector_norm", lambda: torch.linalg.vector_norm(M, 1, dim=1), [6, 10]),
    ("cov", lambda: torch.cov(M, correction=1)[0], [1, 0]),
    ("corrcoef", lambda: torch.corrcoef(M[0]), 1),
    ("histogram", lambda: torch.histogram(M, 2, range=(0.0, 6.0)).hist, [3, 3]),
    ("unique", lambda: torch.unique(M), [0, 1, 2, 3, 5]),
    ("unique counts", lambda: torch.unique(M, return_counts=True)[1], [1, 1, 1, 1, 2]),
    ("unique all", lambda: torch.unique(M, return_inverse=True, return_counts=True)[1][0], [3, 1, 2, None]),
    ("sort", lambda: torch.sort(M, dim=1, descending=True, stable=True).values[0], [3, 2, 1, None]),
    ("argsort", lambda: torch.argsort(M, dim=0)[:, 2], [0, None]),
    ("topk", lambda: torch.topk(M, k=2, dim=1, largest=False).indices, [[1, 2], [3, 0]]),
    ("mode", lambda: torch.mode(M).values, [1, 5]),
    ("prod", lambda: torch.prod(M, 1), [6, 0]),
    ("cummax", lambda: torch.cummax(M, 1).values[1], [5, 5, None, 5]),
    ("normalize", lambda: torch.nn.functional.normalize(M, p=float("inf"))[1], [1, 1, None, 0]),
]


@pytest.mark.parametrize(("call", "expected"), [case[1:] for case in SAID], ids=[case[0] for case in SAID])
def test_torchs_words_reach_the_row(call: Callable[[], Any], expected: Any) -> None:
    assert call().tolist() == expected


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("matrix 2-norm", lambda: torch.linalg.norm(M, 2), "maskserve.norm"),
    ("matrix 1-norm", lambda: torch.linalg.norm(M, 1, dim=(0, 1)), "maskserve.norm"),
    ("matrix_norm", lambda: torch.linalg.matrix_norm(M), "get_data"),
    ("nanmean", lambda: torch.nanmean(M, 1), 'maskserve.mean with nan="omit"'),
    ("nanquantile", lambda: torch.nanquantile(M, 0.5), 'maskserve.quantile with nan="omit"'),
    ("nanmedian", lambda: torch.nanmedian(M), 'maskserve.median with nan="omit"'),
    ("median", lambda: torch.median(M), "maskserve.median"),
    ("weights of cov", lambda: torch.cov(M, fweights=torch.ones(4, dtype=torch.int64)), "fweights"),
    ("unique rows", lambda: torch.unique(M, dim=0), "dim"),
    ("kthvalue", lambda: torch.kthvalue(M, 1), "get_data"),
]


@pytest.mark.parametrize(("call", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_means_something_else_says_what_to_do(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UncoveredFunctionError, match=said):
        call()


def test_methods_take_torchs_words_too() -> None:
    m = ms.masked_tensor([[3.0, 4.0, None]])
    assert m.norm(p=1, dim=1).tolist() == m.norm(ord=1, dim=1).tolist() == [7]
    assert m.norm(p="fro").tolist() == m.norm("fro").tolist() == 5
