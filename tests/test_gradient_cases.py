"""Gradients case by case: the examples that must hold, and torch's own words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import GradientError, MaskMismatchError
from tests.gradient_cells import F, T, assert_is, cells, every_float, inf, leaf, nan, plain

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


# -- the cases that must hold ---------------------------------------------------------------------------------------

STEPS = [-10.0, -5, 0, 5, 10, 50, 60, 70, 80, 90, 100]


@every_float
def test_o2_the_branch_that_is_not_taken_adds_nothing(dtype: torch.dtype) -> None:
    x = leaf(STEPS, dtype=dtype)
    total = torch.where(x < 0, torch.exp(x), 1).sum()
    total.backward()
    assert_is(total, 9.0068)
    assert_is(x.grad, [4.54e-5, 6.7379e-3, *[None] * 9])
    below = cells(STEPS, dtype) < 0
    x = leaf(STEPS, below.tolist(), dtype)
    ones = ms.masked_tensor(torch.ones(11, dtype=dtype), ~below)
    total = torch.where(below, torch.exp(x), ones).sum()
    total.backward()
    assert_is(total, 9.0068)
    assert_is(x.grad, [4.54e-5, 6.7379e-3, *[None] * 9])


@every_float
def test_o2b_what_no_path_reaches_adds_nothing_to_what_one_does(dtype: torch.dtype) -> None:
    x = leaf([-1.0, 0, 100, 1000], dtype=dtype)
    (torch.where(x < 0, torch.exp(x), 1) + x).sum().backward()
    assert_is(x.grad, [1.3679, 1, 1, 1])


@every_float
def test_o3_a_division_by_zero_that_is_not_chosen(dtype: torch.dtype) -> None:
    a = leaf(2.0, dtype=dtype)
    chosen = torch.where(torch.tensor(F), a / 0, cells(1.0, dtype))
    chosen.backward()
    assert chosen.tolist() == 1
    assert a.grad is not None
    assert a.grad.tolist() is None


@every_float
def test_o4_a_division_by_zero_that_is_masked_after(dtype: torch.dtype) -> None:
    by = cells([0.0, 1.0], dtype)
    x = leaf([1.0, 1.0], dtype=dtype)
    ms.as_masked_tensor(x / by, by != 0).sum().backward()
    assert_is(x.grad, [None, 1])
    x = leaf(1.0, dtype=dtype)
    ms.as_masked_tensor(x / by, by != 0).sum().backward()
    assert_is(x.grad, 1)
    factor = plain(1.0, dtype)
    ms.as_masked_tensor(ms.masked_tensor(torch.ones(2, dtype=dtype)) * factor / by, by != 0).sum().backward()
    assert_is(factor.grad, 1)


@every_float
def test_o5_nan_under_the_mask_does_not_reach_a_plain_scalar(dtype: torch.dtype) -> None:
    a, b = cells([1, 2, nan], dtype), plain(1.0, dtype)
    total = torch.sum(ms.masked_tensor(a, ~a.isnan()) * b)
    total.backward()
    assert total.item() == 3
    assert_is(b.grad, 3)


@every_float
def test_o6_softmax_of_columns_with_one_and_no_valid_cell(dtype: torch.dtype) -> None:
    data = torch.full((3, 3), nan, dtype=dtype)
    data[0, 0], data[1, 0], data[1, 2] = 0.7036, -0.1679, -0.4656
    x = ms.masked_tensor(data, ~data.isnan(), requires_grad=True)
    y = torch.softmax(x, dim=0)
    assert_is(y, [[0.7051, None, None], [0.2949, None, 1], [None, None, None]], 1e-3)
    (y * y).sum().backward()
    slope = 2 * 0.7051 * 0.2949 * (0.7051 - 0.2949)
    assert_is(x.grad, [[slope, None, None], [-slope, None, 0], [None, None, None]], 1e-3)


def test_a1_two_masks_under_the_three_policies() -> None:
    mask = [T, T, F, T, F]
    opposite = [not valid for valid in mask]
    data = [0.0, 1, 2, 3, 4]
    a, b = leaf(data, mask), leaf(data, opposite)
    nothing = ms.add(a, b)
    assert nothing.tolist() == [None] * 5
    nothing.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [None] * 5
    with pytest.raises(MaskMismatchError):
        ms.add(a, b, policy="strict")
    a, b = leaf(data, mask), leaf(data, opposite)
    both = ms.add(a, b, policy="union")
    assert both.tolist() == data
    (both * both).sum().backward()
    assert_is(a.grad, [0, 2, None, 6, None])
    assert_is(b.grad, [None, None, 4, None, 8])
    a, b = leaf(data, mask), leaf(data, mask)
    ms.mul(a, b, policy="strict").sum().backward()
    assert_is(a.grad, [0, 1, None, 3, None])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", [[1, None, 1, 1], [1, None]]), ("mean", [[1 / 3, None, 1 / 3, 1 / 3], [0.5, None]]),
        ("prod", [[6, None, 0, 0], [10, None]]), ("amin", [[1, None, 0, 0], [1, None]]),
        ("amax", [[0, None, 0, 1], [0, None]]),
    ],
)  # fmt: skip
def test_a3_a_slice_without_a_valid_cell_is_masked(name: str, expected: Any) -> None:
    first, (one, none) = expected
    x = leaf([[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], [[T, F, T, T], [F, F, F, F], [F, T, T, F]])
    getattr(ms, name)(x, 1).sum().backward()
    last = {"prod": [10, 9], "amin": [1, 0], "amax": [0, 1]}.get(name, [one, one])
    assert_is(x.grad, [first, [none] * 4, [None, *last, None]])


def test_a4_sums_that_meet_masks_before_and_after() -> None:
    data = torch.arange(10, dtype=torch.float64).reshape(2, 5)
    k0 = torch.tensor([[F, F, T, T, T], [T, T, T, F, F]])
    k1 = torch.tensor([[T, T, T, F, F], [F, F, T, T, T]])
    n0, n1 = ms.masked_tensor(data, k0, requires_grad=True), ms.masked_tensor(data + 10, k1, requires_grad=True)
    (n0 + n1).sum(0).sum().backward()
    assert_is(n0.grad, [[None, None, 1, None, None]] * 2)
    n0.grad = n1.grad = None
    total = n0.sum(0) + n1.sum(0)
    assert total.tolist() == [15, 17, 38, 21, 23]
    total.sum().backward()
    assert n0.grad is not None
    assert n1.grad is not None
    assert torch.equal(n0.grad.get_mask(), k0)
    assert torch.equal(n1.grad.get_mask(), k1)


@pytest.mark.parametrize("name", ["var", "std"])
def test_13_the_gradient_of_a_spread_is_finite(name: str) -> None:
    x = leaf([[1.0, nan, 3], [inf, nan, nan]], [[T, F, T], [F, F, F]])
    getattr(ms, name)(x, 1).sum().backward()
    slope = {"var": 2.0, "std": 0.5 * math.sqrt(2)}[name]
    assert_is(x.grad, [[-slope, None, slope], [None, None, None]])


def test_16_a_masked_then_a_plain_gradient_are_both_kept() -> None:
    x = leaf([[3.0, 1, 5], [1, 1, 1]])
    mask = torch.tensor([[T, F, T], [F, F, F]])
    (ms.as_masked_tensor(x, mask) * x.detach()).sum().backward()
    assert_is(x.grad, [[3, None, 5], [None, None, None]])
    (x.get_data() * 2).sum().backward()
    assert_is(x.grad, [[5, 2, 7], [2, 2, 2]])


# -- several paths --------------------------------------------------------------------------------------------------


def test_paths_under_two_masks_add_over_their_union() -> None:
    x = leaf([1.0, 2, 3, 4], [T, T, T, F])
    one = ms.as_masked_tensor(x * x, torch.tensor([T, F, F, T])).sum()
    other = ms.as_masked_tensor(x * 10, torch.tensor([T, T, F, T])).sum()
    (one + other).backward()
    assert_is(x.grad, [12, 10, None, None])


def test_losses_one_after_the_other_add_too() -> None:
    x = leaf([1.0, 2, 3], [T, T, F])
    (x[:1] * 3).sum().backward()
    assert_is(x.grad, [3, None, None])
    (x[1] * 5).backward()
    assert_is(x.grad, [3, 5, None])
    x.to_tensor(0).sum().backward()
    assert_is(x.grad, [4, 6, None])


def test_a_leaf_that_was_broadcast_is_specified_where_any_copy_is() -> None:
    x = leaf([[1.0, 2, 3]])
    (x * ms.masked_tensor(torch.ones(2, 3, dtype=torch.float64), torch.tensor([[T, F, F], [T, T, F]]))).sum().backward()
    assert_is(x.grad, [[2, 1, None]])


def test_a_plain_parameter_has_a_dense_gradient() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    x = ms.masked_tensor(cells([[1, nan, 3], [inf, nan, 6]]), torch.tensor([[T, F, T], [F, F, T]]))
    (x * weight).sum().backward()
    assert type(weight.grad) is Tensor
    assert weight.grad.tolist() == [1, 0, 9]
    weight.grad = None
    ms.as_masked_tensor((x * weight).sum(), torch.tensor(F)).backward()
    assert weight.grad.tolist() == [0, 0, 0]
    optimizer = torch.optim.SGD([weight], lr=0.5)
    (x * weight).sum().backward()
    optimizer.step()
    assert weight.tolist() == [0.5, 1, -3.5]


def test_a_graph_that_is_kept_gives_its_gradient_again() -> None:
    x = leaf([1.0, 2], [T, F])
    total = (x.softmax(0) * x * x).sum()
    total.backward(retain_graph=True)
    total.backward(retain_graph=True)
    assert_is(x.grad, [4, None])
    total.backward()
    assert_is(x.grad, [6, None])
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_a_kept_graph_forgets_what_another_loss_reached() -> None:
    x = leaf([0.0, 2], [T, T])
    y = x.log()
    ms.as_masked_tensor(y, torch.tensor([F, T])).sum().backward(retain_graph=True)
    assert_is(x.grad, [None, 0.5])
    x.grad = None
    ms.as_masked_tensor(y, torch.tensor([T, F])).sum().backward(retain_graph=True)
    assert_is(x.grad, [inf, None])
    x.grad = None
    ms.as_masked_tensor(y, torch.tensor([F, T])).sum().backward()
    assert_is(x.grad, [None, 0.5])


def test_without_grad_there_is_no_history() -> None:
    x = leaf([1.0, 2, 3], [T, F, T])
    with torch.no_grad():
        for made in (x * 2, x.softmax(0), x.sum(), ms.cat([x, x]), torch.outer(x, x), x.ffill(0)):
            assert not made.requires_grad
            assert made._reach is None
    y = x * 2
    with torch.no_grad():
        z = y * 3
    (y * z).sum().backward()
    assert_is(x.grad, [12, None, 36])


def test_masks_need_no_gradient() -> None:
    x, y = leaf([1.0, 2], [T, F]), ms.masked_tensor(cells([3, 4]))
    made = x * y
    assert made.requires_grad
    assert not made.get_mask().requires_grad
    assert not (x > 1).requires_grad
    assert y._reach is None
    assert not (y * y).requires_grad


def test_a_masked_condition_masks_both_branches() -> None:
    a, b = leaf([1.0, 2, 3]), leaf([4.0, 5, 6], [T, F, T])
    condition = ms.masked_tensor(torch.tensor([T, F, F]), torch.tensor([T, T, F]))
    torch.where(condition, a * 2, b * 3).sum().backward()
    assert_is(a.grad, [2, None, None])
    assert_is(b.grad, [None, None, None])


def test_very_many_paths_neither_cancel_nor_vanish() -> None:
    x = leaf([1.0, 2], [T, F])
    y = x
    for _ in range(200):
        y = y + x
    y.sum().backward()
    assert_is(x.grad, [201, None])
    x.grad = None
    y = x
    for _ in range(300):  # 2**300 paths
        y = (y + y) * 0.5
    (y - x).sum().backward()
    assert_is(x.grad, [0, None])


# -- ways out and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (lambda x: x.to_tensor(0).sum(), [1, None, 1]), (lambda x: x.to_tensor(7).exp().sum() * 0, [0, None, 0]),
        (lambda x: x.get_data().sum(), [1, None, 1]), (lambda x: x[2] * 3, [None, None, 3]),
        (lambda x: x[:1].to_tensor().sum(), [1, None, None]), (lambda x: x[torch.tensor([0, 0])].sum(), [2, None, None]),
        (lambda x: x[torch.tensor([T, T, F])].sum(), [1, None, None]), (lambda x: sum(x[i] for i in (0, 2)), [1, None, 1]),
        (lambda x: next(iter(x)) * 2, [2, None, None]), (lambda x: ms.cat([x, torch.ones(2)])[:4].sum(), [1, None, 1]),
        (lambda x: x.to(torch.float32).sum(), [1, None, 1]), (lambda x: x.half().sum(), [1, None, 1]),
        (lambda x: x.clone().sum(), [1, None, 1]), (lambda x: x.contiguous().sum(), [1, None, 1]),
        (lambda x: MaskedTensor(x, torch.tensor([F, T, T])).sum(), [None, None, 1]),
        (lambda x: ms.as_masked_tensor(x).sum(), [1, None, 1]), (lambda x: x.T.sum(), [1, None, 1]),
        (lambda x: (x.detach() * x).sum(), [1, None, 3]), (lambda x: x.to(torch.complex128).abs().sum(), [1, None, 1]),
        (lambda x: ms.fill(x, 5.0).sum(), [1, None, 1]), (lambda x: ms.sum(x, empty=0.0), [1, None, 1]),
        (lambda x: ms.mean(x * torch.ones(2, 1), 0)[0], [1, None, None]),
        (lambda x: ms.mask(x, less=2.0).sum(), None), (lambda x: x.max(0).values, [0, None, 1]),
        (lambda x: ms.sort(x, 0, descending=True).values[0], [0, None, 1]), (lambda x: x.__copy__().sum(), [1, None, 1]),
    ],
)  # fmt: skip
def test_a_gradient_finds_its_way_back(way: Any, expected: list[float | None] | None) -> None:
    x = leaf([1.0, nan, 3.0], [T, F, T])
    way(x).backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float64
    if expected is not None:
        assert_is(x.grad, expected)


def test_a_gradient_can_be_taken_away_and_replaced() -> None:
    x = leaf([1.0, 2], [T, F])
    assert x.grad is None
    (x * 2).sum().backward()
    x.grad = None
    assert x.grad is None
    (x * 3).sum().backward()
    assert_is(x.grad, [3, None])
    x.grad = ms.masked_tensor(cells([7, 8]))
    assert_is(x.grad, [7, None])
    (x * 3).sum().backward()
    assert_is(x.grad, [10, None])
    with pytest.raises(GradientError, match="shape"):
        x.grad = ms.masked_tensor(cells([7, 8, 9]))
    with pytest.raises(GradientError, match="not a list"):
        x.grad = [7, 8]  # type: ignore[assignment]  # what a caller must not do


def test_a_tensor_becomes_a_leaf_and_stops_being_one() -> None:
    x = ms.masked_tensor(cells([1, 2]), torch.tensor([T, F]))
    assert not x.requires_grad
    assert x.requires_grad_() is x
    assert x.requires_grad
    assert x.is_leaf
    (x * x).sum().backward()
    assert_is(x.grad, [2, None])
    assert (x * x).grad_fn is not None
    x.requires_grad = False
    assert not (x * x).requires_grad
    with torch.no_grad():
        y = (x * 2).requires_grad_()
    (y * 5).sum().backward()
    assert_is(y.grad, [5, None])


def test_a_tensor_between_keeps_its_gradient_when_asked() -> None:
    x = leaf([1.0, 2], [T, T])
    y = x * 3
    y.retain_grad()
    ms.as_masked_tensor(y * y, torch.tensor([T, F])).sum().backward()
    assert_is(y.grad, [6, None])
    assert_is(x.grad, [18, None])


def test_what_comes_from_above_may_be_masked() -> None:
    x = leaf([1.0, 2, 3], [T, T, F])
    (x * x).backward(ms.masked_tensor(cells([10, nan, 10]), torch.tensor([T, F, T])))
    assert_is(x.grad, [20, None, None])
    x.grad = None
    (x * x).backward(cells([10, 1, nan]))
    assert_is(x.grad, [20, 4, None])
    x.grad = None
    torch.autograd.backward([x.sum(), (x * x).sum()], [cells(1), cells(2)])
    assert_is(x.grad, [5, 9, None])
    x.grad = None
    torch.autograd.backward([(x * x).sum()])
    assert_is(x.grad, [2, 4, None])


def test_gradients_by_some_inputs_alone() -> None:
    x, y, w = leaf([1.0, 2], [T, F]), leaf([3.0, 4]), plain(2.0)
    total = (x * y * w).sum()
    total.backward(inputs=[y, w], retain_graph=True)
    assert x.grad is None
    assert_is(y.grad, [2, None])
    assert_is(w.grad, 3)
    by_x, by_w = torch.autograd.grad(total, (x, w), retain_graph=True)
    assert isinstance(by_x, MaskedTensor)
    assert_is(by_x, [6, None])
    assert_is(by_w, 3)
    other, unused = leaf([1.0], [F]), plain(1.0)
    with pytest.raises(GradientError, match="allow_unused"):
        torch.autograd.grad(total, (x, other), retain_graph=True)
    assert torch.autograd.grad(total, (x, other), retain_graph=True, allow_unused=True)[1] is None
    _, zero, dense = torch.autograd.grad(total, (x, other, unused), retain_graph=True, materialize_grads=True)
    assert zero.tolist() == [None]
    assert dense.tolist() == 0
    (again,) = torch.autograd.grad(total, x, grad_outputs=cells(10))
    assert_is(again, [60, None])


# -- second derivatives ---------------------------------------------------------------------------------------------


@every_float
def test_a_second_derivative_beside_a_first_one_of_zero(dtype: torch.dtype) -> None:
    x = leaf([0.0, 1, 2], [T, F, T], dtype)
    (first,) = torch.autograd.grad((x.sin() * x.sin()).sum(), x, create_graph=True)
    assert first.tolist()[:2] == [0, None]
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_is(second, [2, None, 2 * math.cos(4)])


def test_the_hessian_of_softmax() -> None:
    data = cells([0.3, 1.0, nan, 2.0])
    x = ms.masked_tensor(data, ~data.isnan(), requires_grad=True)
    (first,) = torch.autograd.grad(x.softmax(0)[0], x, create_graph=True)
    rows = [torch.autograd.grad(first[i], x, retain_graph=True)[0] for i in (0, 1, 3)]
    kept = data[[0, 1, 3]]
    expected = torch.func.hessian(lambda cells: cells.softmax(0)[0])(kept)
    for row, by_hand in zip(rows, expected, strict=True):
        assert row.tolist()[2] is None
        torch.testing.assert_close(row.get_data()[[0, 1, 3]], by_hand)


def test_two_gradients_of_one_graph_that_are_differentiated_again() -> None:
    x = leaf([1.0, 2.0])
    y = x * x * x
    halves = [ms.as_masked_tensor(y, torch.tensor(mask)).sum() for mask in ([T, F], [F, T])]
    one, other = [torch.autograd.grad(half, x, create_graph=True)[0] for half in halves]
    assert_is(one, [3, None])
    assert_is(other, [None, 12])
    assert_is(torch.autograd.grad(one.sum(), x, retain_graph=True)[0], [6, None])
    assert_is(torch.autograd.grad(other.sum(), x, retain_graph=True)[0], [None, 12])
    ((one * 2).sum().to_tensor(0) + other.sum().to_tensor(0)).backward()
    assert_is(x.grad, [12, 12])


def test_a_gradient_penalty_reaches_plain_parameters() -> None:
    weight, x = plain([2.0, 3.0]), leaf([1.0, nan], [T, F])
    (first,) = torch.autograd.grad((x * x * weight).sum(), x, create_graph=True)
    (first * first).sum().backward()
    assert_is(weight.grad, [16, 0])
    assert_is(x.grad, [32, None])


# -- transforms -----------------------------------------------------------------------------------------------------


def test_our_transforms_give_masked_gradients() -> None:
    x, y = ms.masked_tensor(cells([1, nan, 3]), torch.tensor([T, F, T])), cells([4, 5, 6])
    assert_is(ms.grad(lambda x: (x * x).sum())(x), [2, None, 6])
    value, (by_x, by_y) = ms.value_and_grad(lambda x, y: (x * y).sum(), argnums=(0, 1))(x, y)
    assert_is(value, 22)
    assert_is(by_x, [4, None, 6])
    assert_is(by_y, [1, 0, 3])
    gradient, extra = ms.grad(lambda x: ((x * x).sum(), x * 2), has_aux=True)(x)
    assert_is(gradient, [2, None, 6])
    assert_is(extra, [2, None, 6])
    out, pull = ms.vjp(lambda x: x * x, x)
    assert_is(pull(ms.masked_tensor(cells([1, 1, 1]), torch.tensor([T, T, F])))[0], [2, None, None])
    out, change = ms.jvp(lambda x: x.cumsum(0), (x,), (ms.masked_tensor(cells([1, 1, 1]), torch.tensor([F, T, T])),))
    assert_is(out, [1, None, 4])
    assert_is(change, [None, None, 1])


def test_our_transforms_nest() -> None:
    x = ms.masked_tensor(cells([1, nan, 3]), torch.tensor([T, F, T]))
    second = ms.grad(lambda x: ms.grad(lambda x: (x * x * x).sum())(x).sum())(x)
    assert_is(second, [6, None, 18])
    third = ms.grad(lambda x: ms.grad(lambda x: ms.grad(lambda x: (x**4).sum())(x).sum())(x).sum())(x)
    assert_is(third, [24, None, 72])
    _, along = ms.jvp(
        ms.grad(lambda x: (x * x * x).sum()), (x,), (ms.masked_tensor(torch.ones(3, dtype=torch.float64)),)
    )
    assert_is(along, [6, None, 18])
    ones = cells([1, 1, 1])
    _, twice = ms.jvp(lambda x: ms.jvp(torch.sin, (x,), (ones,))[1], (x,), (ones,))
    assert_is(twice, [-math.sin(1), None, -math.sin(3)])
    back = ms.grad(lambda x: ms.jvp(lambda x: x.cumsum(0).sin(), (x,), (ones,))[1][:1].sum())(x)
    assert_is(back, [-math.sin(1), None, None])


def test_torchs_transforms_compose_around_ours() -> None:
    mask = torch.tensor([T, F, T])

    def inner(cells: Tensor) -> Tensor:
        found: Tensor = ms.grad(lambda x: (x * x * x).sum())(ms.as_masked_tensor(cells, mask)).to_tensor(0)
        return found

    data = cells([[1, 2, 3], [4, 5, 6]])
    assert torch.func.vmap(inner)(data).tolist() == [[3, 0, 27], [48, 0, 108]]
    assert torch.func.jacrev(inner)(data[0]).diagonal().tolist() == [6, 0, 18]
    assert torch.func.jacfwd(inner)(data[0]).diagonal().tolist() == [6, 0, 18]
