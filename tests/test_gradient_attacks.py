"""What was found by attacking the gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import maskserve as ms

inf, nan = math.inf, math.nan


@pytest.mark.parametrize("op", ["sum", "mean", "var", "std"])
@pytest.mark.parametrize("bad", [inf, nan])
def test_an_unreached_slice_adds_nothing_to_the_gradient_by_shared_weights(op: str, bad: float) -> None:
    cells = torch.tensor([[1.0, 2.0, 5.0], [bad, 3.0, 4.0]])
    params = {"correction": 0} if op in ("var", "std") else {}
    weights: Any = ms.masked_tensor([0.5, 1.0, 2.0], requires_grad=True)
    getattr(ms, op)(cells, 1, weights=weights, **params)[0].backward()
    alone: Any = ms.masked_tensor([0.5, 1.0, 2.0], requires_grad=True)
    getattr(ms, op)(cells[0], 0, weights=alone, **params).backward()
    assert torch.equal(weights.grad.to_tensor(), alone.grad.to_tensor())


def test_a_masked_slice_adds_nothing_to_the_gradient_by_shared_weights() -> None:
    cells = ms.masked_tensor([[1.0, 2.0, 5.0], [inf, None, 4.0]])
    weights: Any = torch.tensor([1.0, 1.0, 2.0], requires_grad=True)
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


SECOND: dict[str, dict[str, float]] = {
    "sum": {}, "mean": {}, "var": {}, "std": {}, "amax": {}, "logsumexp": {}, "norm": {"ord": 3}, "prod": {}, "median": {},
    "ptp": {}, "softmax": {}, "softmin": {}, "log_softmax": {}, "cumsum": {}, "cumprod": {}, "logcumsumexp": {},
    "normalize": {"ord": 2.0}, "standardize": {},
}  # fmt: skip


def second(op: str, cells: Any, leaf: Any) -> tuple[list[float], list[float] | None]:
    """The gradient of the first row's result by the leaf, and of that gradient's squares."""
    first = getattr(ms, op)(cells, dim=1, **SECOND[op])[0]
    above = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (g,) = torch.autograd.grad((first * above).sum() if first.ndim else first, leaf, create_graph=True)
    if not g.requires_grad:
        return g.tolist(), None
    (h,) = torch.autograd.grad((g * g * above).sum(), leaf, allow_unused=True)
    return g.tolist(), None if h is None else h.tolist()


@pytest.mark.parametrize("op", SECOND)
@pytest.mark.parametrize("bad", [inf, -inf, nan])
def test_an_unreached_slice_adds_nothing_to_a_second_derivative(op: str, bad: float) -> None:
    leaf = ms.masked_tensor([1.0, 2.0, 4.0]).double().requires_grad_()
    moved = torch.tensor([[0.0, 0.0, 0.0], [0.0, bad, 0.0]], dtype=torch.float64)
    assert second(op, leaf + moved, leaf) == second(op, leaf + torch.zeros(1, 3, dtype=torch.float64), leaf)


@pytest.mark.parametrize("op", ["cumsum", "cumprod", "logcumsumexp"])
@pytest.mark.parametrize("bad", [inf, -inf, nan])
def test_a_cell_behind_what_was_reached_adds_nothing_to_a_second_derivative(op: str, bad: float) -> None:
    def of(moved: list[float]) -> Any:
        leaf: Any = ms.masked_tensor([1.5, 2.0, 3.0]).double().requires_grad_()
        cells = torch.cat([leaf, *[leaf[:1] + m for m in moved]])
        (g,) = torch.autograd.grad(getattr(ms, op)(cells, dim=0)[2], leaf, create_graph=True)
        return torch.autograd.grad((g * g).sum(), leaf)[0].tolist() if g.requires_grad else None

    assert of([bad]) == of([])


@pytest.mark.parametrize("op", ["mean", "var", "std"])
def test_an_unreached_slice_adds_nothing_to_a_second_derivative_by_shared_weights(op: str) -> None:
    def of(cells: list[list[float]]) -> Any:
        x: Any = ms.masked_tensor([cells[0]], requires_grad=True)
        weights: Any = ms.masked_tensor([1.0, 2.0], requires_grad=True)
        rows = torch.cat([x, torch.tensor(cells[1:])]) if cells[1:] else x
        value = getattr(ms, op)(rows, 1, weights=weights, **({} if op == "mean" else {"correction": 0}))[0]
        first = torch.autograd.grad(value, [x, weights], create_graph=True)
        return [h.tolist() for h in torch.autograd.grad((first[0] ** 2).sum() + (first[1] ** 2).sum(), [x, weights])]

    assert of([[1.0, 2.0], [inf, 4.0]]) == of([[1.0, 2.0]])


def test_each_operand_that_shares_its_data_with_the_other_keeps_its_own_reach() -> None:
    plain: Any = torch.ones(3, requires_grad=True)
    first: Any = ms.as_masked_tensor(plain, torch.tensor([True, True, False])).requires_grad_()
    second: Any = ms.as_masked_tensor(plain, torch.tensor([True, False, True])).requires_grad_()
    (plain * first)[0].backward()
    assert first.grad.get_mask().tolist() == [True, False, False]
    (first * second).sum().backward()
    assert second.grad.get_mask().tolist() == [True, False, False]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_a_forward_derivative_of_what_requires_grad_already() -> None:
    tangent = ms.masked_tensor([1.0, 1.0, None])
    leaf = ms.masked_tensor([5.0, 2.0, 3.0], requires_grad=True)
    value, change = ms.jvp(lambda x: x * x, (leaf,), (tangent,))
    assert value.tolist() == [25.0, 4.0, 9.0]
    assert change.tolist() == [10.0, 4.0, None]
    (change.sum()).backward()
    assert leaf.grad is not None
    assert leaf.grad.to_tensor(0.0).tolist() == [2.0, 2.0, 0.0]


def test_every_public_name_is_in_the_type_stub() -> None:
    stub = Path(ms.__file__).with_suffix(".pyi").read_text()
    missing = [name for name in vars(ms)["__all__"] if f"as {name}\n" not in stub and f"def {name}(" not in stub]
    assert not missing


@pytest.mark.parametrize("function", [torch.max, torch.min])
def test_tied_extremes_of_all_cells_share_as_in_torch(function: Any) -> None:
    x = ms.masked_tensor([4.0, 4.0, None], requires_grad=True)
    function(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.5, 0.5, None]
