"""Modules and torch's optimizers train through masked losses, to what they would be without the cells that are masked."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import maskserve as ms
from maskserve import OPS, MaskedTensor
from maskserve.errors import UncoveredFunctionError
from maskserve.ops.rows import Loss
from tests.samples import beside_input

F64 = torch.float64
N, WIDE, OUT, STEPS = 7, 4, 3, 20
JUNK = (float("nan"), float("inf"), 1e300)

every_optimizer = pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda parameters: torch.optim.Adam(parameters, lr=0.02, amsgrad=True),
    ],
    ids=["SGD", "Adam"],
)
seeds = st.integers(0, 2**31)
few = settings(max_examples=max(3, settings.default.max_examples // 3))  # each trains some models


def perceptron(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDE, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, OUT)).double()


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input, target, rows that are valid, cells of the target that are): a valid cell among them, and a masked row."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(N, WIDE, generator=draw, dtype=F64)
    y = torch.randn(N, OUT, generator=draw, dtype=F64)
    rows = torch.rand(N, generator=draw) < 0.6
    cells = torch.rand(N, OUT, generator=draw) < 0.6
    rows[0], rows[1] = True, False
    cells[0, 0], cells[1] = True, False
    return x, y, rows, cells


def spoiled(cells: Tensor, mask: Tensor, junk: float) -> MaskedTensor:
    return ms.masked_tensor(torch.where(mask, cells, torch.tensor(junk, dtype=cells.dtype)), mask)


def trained(model: nn.Module, optimizer: Any, loss: Callable[[nn.Module], Any]) -> list[Tensor]:
    """The parameters after some steps."""
    moves = optimizer(model.parameters())
    for _ in range(STEPS):
        moves.zero_grad()
        loss(model).backward()
        moves.step()
    return [parameter.detach() for parameter in model.parameters()]


def masked_loss(x: Any, y: Any) -> Callable[[nn.Module], Any]:
    return lambda model: ((model(x) - y) ** 2).mean()


def assert_close(got: list[Tensor], expected: list[Tensor], seed: int) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda said: f"seed {seed}: {said}")


def assert_the_same_bits_each_time(runs: list[list[Tensor]], seed: int) -> None:
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True)), f"seed {seed}"


@every_optimizer
@few
@given(seed=seeds)
def test_masked_rows_train_as_if_they_were_not_there(optimizer: Any, seed: int) -> None:
    x, y, rows, _ = drawn(seed)
    whole = rows[:, None].expand(N, WIDE)
    expected = trained(perceptron(seed), optimizer, masked_loss(x[rows], y[rows]))
    runs = [
        trained(perceptron(seed), optimizer, masked_loss(spoiled(x, whole, junk), target))
        for junk, target in zip(
            JUNK, (y, *[spoiled(y, rows[:, None].expand(N, OUT), junk) for junk in JUNK[1:]]), strict=True
        )
    ]
    assert_close(runs[0], expected, seed)
    assert_the_same_bits_each_time(runs, seed)


@every_optimizer
@few
@given(seed=seeds)
def test_masked_cells_of_the_target_train_as_if_they_were_not_there(optimizer: Any, seed: int) -> None:
    x, y, _, cells = drawn(seed)
    expected = trained(perceptron(seed), optimizer, lambda model: ((model(x)[cells] - y[cells]) ** 2).mean())
    runs = [trained(perceptron(seed), optimizer, masked_loss(x, spoiled(y, cells, junk))) for junk in JUNK]
    assert_close(runs[0], expected, seed)
    assert_the_same_bits_each_time(runs, seed)


@every_optimizer
@few
@given(seed=seeds)
def test_masked_cells_of_the_input_weigh_as_zeros_do(optimizer: Any, seed: int) -> None:
    """A product with a masked side adds nothing; a row needs one valid cell to have a result."""
    x, y, _, _ = drawn(seed)
    valid = torch.rand(N, WIDE, generator=torch.Generator().manual_seed(seed)) < 0.5
    valid[2:, 0], valid[1] = True, False
    some = valid.any(1)
    expected = trained(perceptron(seed), optimizer, masked_loss(torch.where(valid, x, 0)[some], y[some]))
    runs = [trained(perceptron(seed), optimizer, masked_loss(spoiled(x, valid, junk), y)) for junk in JUNK]
    assert_close(runs[0], expected, seed)
    assert_the_same_bits_each_time(runs, seed)


@few
@given(seed=seeds)
def test_masked_and_plain_parameters_train_together(seed: int) -> None:
    """Embeddings of which some cells are missing, before a module: in one optimizer of ours."""
    x, y, _, cells = drawn(seed)
    mask = torch.rand(N, WIDE, generator=torch.Generator().manual_seed(seed)) < 0.8
    mask[0], mask[1] = True, False
    runs = []
    for junk in JUNK:
        table = spoiled(x, mask, junk).requires_grad_()
        model = perceptron(seed)
        adam = ms.optim.Adam([table, *model.parameters()], lr=0.05)
        losses = []
        for _ in range(STEPS):
            adam.zero_grad()
            loss = ((model(table) - spoiled(y, cells, junk)) ** 2).mean()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"seed {seed}"
        assert table.get_mask().equal(mask)
        runs.append([table.to_tensor(0.0).detach(), *[p.detach() for p in model.parameters()]])
    assert_the_same_bits_each_time(runs, seed)


def test_a_weights_gradient_is_dense_and_0_where_nothing_reached_it() -> None:
    model = nn.Linear(3, 2).double()
    x = ms.masked_tensor([[1.0, None, 2.0], [None, None, None]]).double()
    y = ms.masked_tensor([[1.0, None], [3.0, 4.0]]).double()
    ((model(x) - y) ** 2).mean().backward()
    error = 2 * (model.weight[0, 0] + 2 * model.weight[0, 2] + model.bias[0] - 1).item()
    assert type(model.weight.grad) is Tensor
    assert model.weight.grad.tolist() == [[pytest.approx(error), 0, pytest.approx(2 * error)], [0, 0, 0]]
    assert model.bias.grad is not None
    assert model.bias.grad.tolist() == [pytest.approx(error), 0]


def test_a_batch_of_nothing_valid_moves_nothing() -> None:
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    ((model(ms.masked_tensor(torch.ones(1, 3), False)) - 1.0) ** 2).mean().backward()
    sgd.step()
    assert model.weight.grad is not None
    assert model.weight.grad.abs().sum() == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_of_batches_add_up() -> None:
    x, y, rows, _ = drawn(3)
    model = perceptron(3)
    for part in (slice(0, 3), slice(3, N)):
        mask = rows[part, None].expand(-1, WIDE)
        ((model(spoiled(x[part], mask, JUNK[0])) - y[part]) ** 2).sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    ((model(x[rows]) - y[rows]) ** 2).sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [row for row in OPS.values() if isinstance(row, Loss)], ids=lambda row: row.name)
def test_autocast_changes_no_digit_of_a_masked_loss(loss: Loss) -> None:
    x = ms.masked_tensor(torch.rand(4, 3, dtype=torch.bfloat16), torch.rand(4, 3) < 0.8)
    others = [o.bfloat16() if o.is_floating_point() else o for o in beside_input(loss, (4, 3))]
    expected = getattr(ms, loss.name)(x, *others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = getattr(ms, loss.name)(x, *others)
    assert made.dtype is expected.dtype
    assert made.tolist() == expected.tolist()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_changes_no_digit_of_a_masked_product(backward_inside: bool) -> None:
    """torch would compute it in a half; a masked one keeps the dtype that it names."""
    model, x = nn.Linear(3, 2), ms.masked_tensor([[1.1, None, 2.3], [None, None, 0.7]])
    ((model(x) - 1.0) ** 2).mean().backward()
    expected = copy.deepcopy([p.grad for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model(x)
        loss = ((made - 1.0) ** 2).mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert made.tolist() == model(x).tolist()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_the_pages_code_runs() -> None:
    """docs/gradients.md, the section on training."""
    page = (Path(__file__).parent.parent / "docs" / "gradients.md").read_text()
    section = page.partition("## Training")[2].partition("\n## ")[0]
    names: dict[str, Any] = {"torch": torch, "ms": ms}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
    assert names["loss"].tolist() > 0
    assert names["model"].weight.grad is not None
    assert names["table"].tolist()[1][1] is None
    assert names["table"].tolist()[0][0] != pytest.approx(0.1)


def test_a_parameter_of_masked_cells_is_refused_with_the_way_to_have_one() -> None:
    m = ms.masked_tensor([[1.0, None]])
    with pytest.raises(UncoveredFunctionError, match=r"nn.Parameter takes a plain tensor: make the data the parameter"):
        torch.nn.Parameter(m)  # type: ignore[arg-type]  # a MaskedTensor
    weight = torch.nn.Parameter(m.get_data())
    ms.as_masked_tensor(weight, m.get_mask()).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 0]]
