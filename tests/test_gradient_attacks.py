"""What was found by attacking the gradients."""

from __future__ import annotations

import math

import pytest
import torch

import maskserve as ms

inf, nan = math.inf, math.nan


@pytest.mark.parametrize("op", ["sum", "mean", "var", "std"])
@pytest.mark.parametrize("bad", [inf, nan])
def test_an_unreached_slice_adds_nothing_to_the_gradient_by_weights_that_several_slices_share(op: str, bad: float) -> None:
    cells = torch.tensor([[1.0, 2.0, 5.0], [bad, 3.0, 4.0]])
    params = {"correction": 0} if op in ("var", "std") else {}
    weights = ms.masked_tensor([0.5, 1.0, 2.0], requires_grad=True)
    getattr(ms, op)(cells, 1, weights=weights, **params)[0].backward()
    alone = ms.masked_tensor([0.5, 1.0, 2.0], requires_grad=True)
    getattr(ms, op)(cells[0], 0, weights=alone, **params).backward()
    assert torch.equal(weights.grad.to_tensor(), alone.grad.to_tensor())


def test_a_masked_slice_adds_nothing_to_the_gradient_by_weights_that_several_slices_share() -> None:
    cells = ms.masked_tensor([[1.0, 2.0, 5.0], [inf, None, 4.0]])
    weights = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
    ms.sum(cells, 1, weights=weights, min_count=3).sum().backward()
    assert weights.grad.tolist() == [1.0, 2.0, 5.0]


@pytest.mark.parametrize("ord", [inf, -inf])
def test_ties_of_a_norm_share_in_its_own_precision(ord: float) -> None:
    cells = torch.tensor([2.0, -2.0, 2.0], dtype=torch.float64, requires_grad=True)
    ms.norm(ms.as_masked_tensor(cells), ord, 0).backward()
    assert cells.grad is not None
    assert cells.grad.tolist() == [1 / 3, -1 / 3, 1 / 3]


@pytest.mark.parametrize("cells", [[1.0, inf, 2.0], [inf, inf, -inf], [1.0, -inf, 2.0]])
def test_an_infinite_cell_spoils_no_other_in_the_gradient_of_logsumexp(cells: list[float]) -> None:
    plain = torch.tensor(cells, dtype=torch.float64, requires_grad=True)
    torch.logsumexp(plain, 0).backward()
    x = ms.masked_tensor([*cells, None]).double()
    leaf = x.detach().requires_grad_()
    ms.logsumexp(leaf, 0).backward()
    assert plain.grad is not None
    torch.testing.assert_close(leaf.grad.get_data()[:3], plain.grad, equal_nan=True)
