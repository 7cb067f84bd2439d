"""Optimizers: a masked parameter is as many parameters as it has cells; a plain one is torch's."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve import MaskedTensor, optim
from maskserve.errors import GradientError, ParameterError

F64 = torch.float64
SHAPE = (2, 3)
N_STEPS = 6

Rule = Any
"""An optimizer's name and options."""

OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {
        "momentum": (0, 0.9), "dampening": (0, 0.3), "nesterov": (False, True), "weight_decay": (0, 0.1),
        "maximize": (False, True),
    },
    "Adagrad": {
        "lr_decay": (0, 0.2), "weight_decay": (0, 0.1), "initial_accumulator_value": (0, 0.5),
        "maximize": (False, True),
    },
    "Adam": {
        "betas": ((0.9, 0.999), (0.5, 0.6)), "weight_decay": (0, 0.1), "amsgrad": (False, True),
        "maximize": (False, True), "decoupled_weight_decay": (False, True),
    },
    "AdamW": {"betas": ((0.9, 0.999), (0.0, 0.6)), "weight_decay": (0, 0.1), "amsgrad": (False, True)},
}  # fmt: skip


def rules() -> Iterator[Any]:
    """Every optimizer with every combination of its options that torch takes."""
    for name, options in OPTIONS.items():
        for values in product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            if chosen.get("nesterov") and (not chosen["momentum"] or chosen["dampening"]):
                continue
            said = ",".join(f"{option}={value}" for option, value in chosen.items() if value)
            yield pytest.param((name, {"lr": 0.1} | chosen), id=f"{name}({said})")


every_rule = pytest.mark.parametrize("rule", list(rules()))
every_optimizer = pytest.mark.parametrize(
    "rule",
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.2}),
        ("Adam", {"lr": 0.1, "amsgrad": True}),
        ("AdamW", {"lr": 0.1}),
    ],
    ids=lambda rule: rule[0],
)
seeds = st.integers(0, 2**31)


def ours(rule: Rule, params: Any) -> Any:
    return getattr(optim, rule[0])(params, **rule[1])


def torchs(rule: Rule, params: Any) -> Any:
    return getattr(torch.optim, rule[0])(params, **rule[1])


def sample(seed: int, dtype: torch.dtype = F64, shape: tuple[int, ...] = SHAPE) -> tuple[MaskedTensor, torch.Generator]:
    """A parameter with junk under its mask, and what later steps are drawn from."""
    draw = torch.Generator().manual_seed(seed)
    data = torch.randn(shape, generator=draw, dtype=dtype)
    mask = torch.rand(shape, generator=draw) < 0.8
    data[~mask] = math.nan
    return ms.masked_tensor(data, mask, requires_grad=True), draw


def give_gradients(masked: MaskedTensor, cells: list[Tensor], draw: torch.Generator) -> None:
    """The same gradients to the masked parameter and to one parameter a cell; None where they are masked. Some are 0."""
    g = torch.randn(masked.shape, generator=draw, dtype=masked.dtype) * (torch.rand(masked.shape, generator=draw) < 0.9)
    specified = (torch.rand(masked.shape, generator=draw) < 0.5) & masked.get_mask()
    masked.grad = ms.masked_tensor(g, specified) if torch.rand((), generator=draw) < 0.9 else None
    for cell, value, moves in zip(cells, g.flatten(), specified.flatten(), strict=True):
        cell.grad = value.clone() if moves and masked.grad is not None else None


def scalars(masked: MaskedTensor) -> list[Tensor]:
    return [cell.clone().requires_grad_() for cell in masked._data.detach().flatten()]


def close(got: Tensor, expected: Tensor, seed: int, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda said: f"seed {seed}: {said}"
    )


# -- the law ------------------------------------------------------------------------------------------------------


@every_rule
@given(seed=seeds)
def test_a_masked_parameter_moves_as_one_torch_parameter_a_cell(rule: Rule, seed: int) -> None:
    masked, draw = sample(seed)
    cells = scalars(masked)
    before = masked._data.detach().clone()
    mine, theirs = ours(rule, [masked]), torchs(rule, cells)
    for _ in range(N_STEPS):
        give_gradients(masked, cells, draw)
        mine.step()
        theirs.step()
        close(masked._data.detach(), torch.stack(cells).detach().reshape(SHAPE), seed)
    assert torch.equal(masked._data[~masked.get_mask()].isnan(), before[~masked.get_mask()].isnan())
    kept = mine.state[masked._data]
    for i, cell in enumerate(cells):
        for name, value in theirs.state[cell].items():
            if value is not None:
                close(kept[name].flatten()[i].to(value.dtype), value, seed)


@every_optimizer
@given(seed=seeds)
def test_plain_parameters_move_as_torchs_bit_for_bit(rule: Rule, seed: int) -> None:
    masked, draw = sample(seed)
    plain = [torch.randn(3, 2, generator=draw, requires_grad=True) for _ in range(2)]
    same = [p.detach().clone().requires_grad_() for p in plain]
    mine, theirs = ours(rule, [plain[0], masked, plain[1]]), torchs(rule, same)
    for _ in range(N_STEPS):
        give_gradients(masked, scalars(masked), draw)
        for p, q in zip(plain, same, strict=True):
            p.grad = torch.randn(3, 2, generator=draw) if torch.rand((), generator=draw) < 0.8 else None
            q.grad = p.grad
        mine.step()
        theirs.step()
        for p, q in zip(plain, same, strict=True):
            assert torch.equal(p, q), f"seed {seed}"


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex128], ids=str)
def test_other_dtypes_too(rule: Rule, dtype: torch.dtype) -> None:
    name, options = rule
    rule = name, options | ({} if name == "SGD" else {"eps": 1e-2})
    for seed in range(5):
        masked, draw = sample(seed, dtype)
        cells = scalars(masked)
        mine, theirs = ours(rule, [masked]), torchs(rule, cells)
        for _ in range(N_STEPS):
            give_gradients(masked, cells, draw)
            mine.step()
            theirs.step()
        real = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        tolerance = {torch.complex128: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
        assert masked.dtype is dtype
        close(masked._data.detach().to(real), torch.stack(cells).detach().reshape(SHAPE).to(real), seed, tolerance)


def test_g_one_adagrad_step_where_the_gradient_is_specified() -> None:
    g = torch.zeros(2, 4)
    g[0, 2], g[1, 0], g[1, 2] = 3, 4, 5
    for loaded in (False, True):
        param = ms.masked_tensor(torch.arange(8.0).reshape(2, 4), requires_grad=True)
        adagrad = optim.Adagrad([param], lr=0.1, eps=1e-10, initial_accumulator_value=0 if loaded else 0.5)
        if loaded:
            state = adagrad.state_dict()
            state["state"][0]["sum"] = torch.full((2, 4), 0.5)
            adagrad.load_state_dict(state)
        param.grad = ms.masked_tensor(g, g != 0)
        adagrad.step()
        assert adagrad.state_dict()["state"][0]["sum"].tolist() == [[0.5, 0.5, 9.5, 0.5], [16.5, 0.5, 25.5, 0.5]]
        expected = torch.tensor([[0, 1, 1.9027, 3], [3.9015, 5, 5.9010, 7]])
        torch.testing.assert_close(param.get_data().detach(), expected, rtol=0, atol=5e-5)
        assert param.get_data()[g == 0].tolist() == [0, 1, 3, 5, 7]


def test_a_step_follows_a_backward() -> None:
    x = torch.tensor([-1.0, 0.5, 800.0], dtype=F64)
    param = ms.masked_tensor(x, [True, True, True], requires_grad=True)
    sgd = optim.SGD([param], lr=0.5, weight_decay=0.1)
    ms.where(param < 0, ms.exp(param), 1).sum().backward()
    sgd.step()
    assert param.tolist() == [pytest.approx(-1 - 0.5 * (math.exp(-1) - 0.1)), 0.5, 800.0]


def test_momentum_that_is_switched_off_and_on_again_is_torchs() -> None:
    masked, draw = sample(3)
    cells = scalars(masked)
    mine, theirs = (make(("SGD", {"lr": 0.1}), params) for make, params in ((ours, [masked]), (torchs, cells)))
    for momentum in (0, 0.9, 0.9, 0, 0, 0.9, 0.9):
        mine.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = momentum
        give_gradients(masked, cells, draw)
        mine.step()
        theirs.step()
    close(masked._data.detach(), torch.stack(cells).detach().reshape(SHAPE), 3)


def test_a_cell_under_the_mask_keeps_its_bits() -> None:
    hidden = torch.tensor([math.nan, math.inf, -0.0, 1e300, 7.0], dtype=F64)
    for rule in (
        ("SGD", {"lr": 1.0, "momentum": 0.5, "weight_decay": 0.1}),
        ("Adam", {}),
        ("Adagrad", {}),
        ("AdamW", {}),
    ):
        param = ms.masked_tensor(hidden, [False, False, False, False, True], requires_grad=True)
        optimizer = ours(rule, [param])
        for _ in range(3):
            optimizer.zero_grad()
            (param * 2).sum().backward()
            optimizer.step()
        assert torch.equal(param._data.detach().view(torch.int64)[:4], hidden.view(torch.int64)[:4])
        assert param._data[4] != 7


# -- torch's tools around an optimizer ----------------------------------------------------------------------------


def leaf(*cells: float | None) -> MaskedTensor:
    return ms.masked_tensor([float(cell) if cell is not None else None for cell in cells], requires_grad=True)


def test_groups_have_options_of_their_own_and_are_added_later() -> None:
    a, b, c, w = leaf(1, 2), leaf(1, None), leaf(3, 4), torch.ones(2, requires_grad=True)
    group = {"params": [b], "lr": 0.5}
    sgd = optim.SGD([{"params": a}, group], lr=0.25)
    assert group == {"params": [b], "lr": 0.5}
    sgd.add_param_group({"params": [("c", c)][0][1], "lr": 1})
    sgd.add_param_group({"params": w, "lr": 2.0})
    (a.sum() + b.sum() + c.sum() + w.sum()).backward()
    sgd.step()
    assert (a.tolist(), b.tolist(), c.tolist()) == ([0.75, 1.75], [0.5, None], [2, 3])
    assert w.tolist() == [-1, -1]
    named = optim.Adam([("a", a), ("w", w)])
    assert named.state_dict()["param_groups"][0]["param_names"] == ["a", "w"]


def test_schedulers_change_the_rate() -> None:
    param = leaf(1, None)
    sgd = optim.SGD([param], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=1, gamma=0.5)
    for _ in range(3):
        sgd.zero_grad()
        param.sum().backward()
        sgd.step()
        schedule.step()
    assert param.tolist() == [1 - 1 - 0.5 - 0.25, None]


def test_a_closure_is_called_with_gradients_on_and_its_loss_comes_back() -> None:
    param = leaf(1, None)
    sgd = optim.SGD([param], lr=torch.tensor(0.5))

    def closure() -> Any:
        sgd.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    assert sgd.step(closure).item() == 1
    assert param.tolist() == [0, None]
    assert param.requires_grad
    assert param.is_leaf


def test_zero_grad_leaves_no_specified_0() -> None:
    for to_none in (True, False):
        param, w = leaf(1, None), torch.ones(2, requires_grad=True)
        sgd = optim.SGD([param, w], lr=1.0, weight_decay=0.5)
        (param * w).sum().backward()
        sgd.zero_grad(set_to_none=to_none)
        assert param.grad is None
        assert (w.grad is None) is to_none
        sgd.step()
        assert param.tolist() == [1, None]
        param.sum().backward()
        assert param.grad is not None
        assert param.grad.tolist() == [1, None]


def test_clipping_takes_the_parameters_of_the_groups() -> None:
    param = leaf(3, 4, None)
    sgd = optim.SGD([param], lr=1.0)
    (param * param / 2).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(sgd.param_groups[0]["params"], 1.0)
    assert norm.item() == 5
    sgd.step()
    assert param.tolist() == [pytest.approx(3 - 0.6), pytest.approx(4 - 0.8), None]


def test_hooks_run_once_a_step() -> None:
    torch.optim.SGD([torch.ones(1, requires_grad=True)])  # torch wraps its classes when they are first used
    called = []
    sgd = optim.SGD([leaf(1)], lr=1.0)
    sgd.register_step_pre_hook(lambda *_: called.append("before"))
    sgd.register_step_post_hook(lambda *_: called.append("behind"))
    sgd.step()
    assert called == ["before", "behind"]


@every_optimizer
def test_a_checkpoint_goes_on_where_it_stopped(rule: Rule) -> None:
    masked, draw = sample(11)
    optimizer = ours(rule, [masked])
    for _ in range(3):
        give_gradients(masked, scalars(masked), draw)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"param": masked, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    again = found["param"]
    resumed = ours(rule, [again])
    resumed.load_state_dict(found["optimizer"])
    for _ in range(3):
        give_gradients(masked, scalars(masked), draw)
        again.grad = masked.grad
        optimizer.step()
        resumed.step()
    assert again.requires_grad
    assert again.tolist() == masked.tolist()


@every_optimizer
def test_torchs_checkpoint_loads(rule: Rule) -> None:
    """Its one count of steps is that of each cell."""
    masked = ms.masked_tensor(torch.arange(6.0, dtype=F64).reshape(SHAPE), requires_grad=True)
    plain = masked.get_data().detach().clone().requires_grad_()
    theirs = torchs(rule, [plain])
    for step in range(4):
        plain.grad = torch.full(SHAPE, step + 1.0, dtype=F64)
        theirs.step()
        if step == 1:
            masked.requires_grad_(False).copy_(plain.detach()).requires_grad_()
            mine = ours(rule, [masked])
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))  # else they would share it, as torch's do
        if step > 1:
            masked.grad = ms.masked_tensor(plain.grad)
            mine.step()
    close(masked.get_data().detach(), plain.detach(), 0)


@every_optimizer
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_an_optimizer_moves_its_own_parameters(rule: Rule, copied: Any) -> None:
    masked, draw = sample(5)
    optimizer = ours(rule, [masked])
    give_gradients(masked, scalars(masked), draw)
    optimizer.step()
    before = masked.tolist()
    other = copied(optimizer)
    (param,) = other._masked.values()
    param.grad = ms.masked_tensor(torch.ones(SHAPE, dtype=F64))
    other.step()
    assert masked.tolist() == before
    masked.grad = ms.masked_tensor(torch.ones(SHAPE, dtype=F64))
    optimizer.step()
    assert masked.tolist() == param.tolist() != before


def test_a_parameter_copied_with_its_optimizer_is_the_one_that_moves() -> None:
    param = leaf(1, None)
    param, sgd = copy.deepcopy((param, optim.SGD([param], lr=1.0)))
    param.sum().backward()
    sgd.step()
    assert param.tolist() == [0, None]


def test_a_frozen_parameter_stays_and_goes_on_later() -> None:
    param = leaf(1, None)
    sgd = optim.SGD([param], lr=1.0)
    param.requires_grad_(False)
    sgd.step()
    assert param.tolist() == [1, None]
    param.requires_grad_()
    param.sum().backward()
    sgd.step()
    assert param.tolist() == [0, None]


# -- what is refused ----------------------------------------------------------------------------------------------


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda m: [m * 2], GradientError, "the leaf itself"),
    (lambda m: [m.detach()], GradientError, r"requires_grad_\(\)"),
    (lambda m: m, ParameterError, r"\[m\]"),
    (lambda m: [], ValueError, "empty parameter list"),
    (lambda m: [{"params": [m]}, {"params": [m]}], ValueError, "more than one parameter group"),
    (lambda m: [1.0], TypeError, "can only optimize Tensors"),
    (lambda m: [{"params": {m}}], TypeError, "list"),
]


@pytest.mark.parametrize(("params", "error", "words"), WRONG)
def test_what_cannot_be_optimized_is_refused_in_one_line(params: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        optim.SGD(params(leaf(1, None)), lr=0.1)
    assert "\n" not in str(raised.value)


def test_options_that_cannot_be_kept_are_refused() -> None:
    param = leaf(1, None)
    for option in ("fused", "differentiable"):
        with pytest.raises(ParameterError, match=f"{option}=True is for plain"):
            optim.SGD([param], **{option: True})
    with pytest.raises(ValueError, match="learning rate: -1"):
        optim.Adam([param], lr=-1)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        torch.optim.SGD([param])  # type: ignore[list-item]  # as users may


@every_optimizer
def test_signatures_are_torchs(rule: Rule) -> None:
    kind, theirs = getattr(ms.optim, rule[0]), getattr(torch.optim, rule[0])
    assert inspect.signature(kind) == inspect.signature(theirs)
    assert issubclass(kind, theirs)


# -- mixed precision ----------------------------------------------------------------------------------------------


def test_a_scaled_masked_loss_is_a_masked_tensor() -> None:
    scaler = optim.GradScaler("cpu", init_scale=8.0)
    loss = ms.masked_tensor([3.0, None]).sum()
    plain = torch.tensor(2.0)
    assert scaler.scale(loss).tolist() == 24
    assert isinstance(scaler.scale(loss), MaskedTensor)
    first, (second, third) = scaler.scale([loss, (plain, loss)])
    assert (first.tolist(), second.item(), third.tolist()) == (24, 16, 24)
    assert scaler.scale(plain).item() == 16
    assert scaler.scale(ms.masked_tensor([None]).sum()).tolist() is None
    assert optim.GradScaler("cpu", enabled=False).scale(loss) is loss
    assert scaler.scale(loss.double()).dtype is F64


@pytest.mark.parametrize("scaler_of", [optim.GradScaler, torch.amp.GradScaler], ids=["ours", "torchs"])
def test_a_scaler_unscales_and_skips_what_overflows(scaler_of: Any) -> None:
    param, w = leaf(1, 2, None), torch.ones(3, requires_grad=True)
    x = ms.masked_tensor([1.0, None, 1.0])
    optimizers = [optim.SGD([param], lr=1.0), torch.optim.SGD([w], lr=1.0)]
    scaler = scaler_of("cpu", init_scale=4.0)

    def step(factor: float) -> None:
        loss = (param * factor).sum() + (x * w).sum() * factor
        scaled = scaler.scale(loss if scaler_of is optim.GradScaler else loss.to_tensor())
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaled.backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    step(0.5)
    assert (param.tolist(), w.tolist(), scaler.get_scale()) == ([0.5, 1.5, None], [0.5, 1, 0.5], 4)
    step(3e38)
    assert (param.tolist(), w.tolist(), scaler.get_scale()) == ([0.5, 1.5, None], [0.5, 1, 0.5], 2)
    step(0.5)
    assert (param.tolist(), w.tolist(), scaler.get_scale()) == ([0, 1, None], [0, 1, 0], 2)


def test_gradients_are_clipped_by_the_norm_of_those_that_are_specified() -> None:
    def grown() -> tuple[MaskedTensor, Tensor, MaskedTensor]:
        param, w = leaf(1, 2, None), torch.ones(3, requires_grad=True)
        weights = ms.masked_tensor([3.0, None, 5.0])
        ((param * weights).sum() + (w * 4.0).sum()).backward()
        return param, w, leaf(7)

    found = [3.0, 4.0, 4.0, 4.0]  # the second cell of param meets a masked weight
    param, w, untouched = grown()
    norm = optim.clip_grad_norm_([param, w, untouched], 2.0)
    assert norm.item() == pytest.approx(math.hypot(*found))
    assert param.grad.tolist() == [pytest.approx(3 * 2 / norm.item(), rel=1e-6), None, None]
    assert w.grad is not None
    assert w.grad.tolist() == pytest.approx([4 * 2 / norm.item()] * 3, rel=1e-6)
    assert untouched.grad is None
    param, w, _ = grown()
    optim.clip_grad_value_((param, w), 3.5)
    assert (param.grad.tolist(), w.grad.tolist()) == ([3, None, None], [3.5] * 3)  # type: ignore[union-attr]  # it has one
    assert optim.clip_grad_norm_(grown()[0], 9.0, norm_type=math.inf).item() == 3
    with pytest.raises(GradientError, match="does not require grad"):
        optim.clip_grad_norm_([ms.masked_tensor([1.0])], 1.0)


@pytest.mark.parametrize("order", [-1.0, -math.inf, 2.0, math.inf])
def test_a_norm_of_any_order_is_of_the_specified_cells(order: float) -> None:
    x = ms.masked_tensor(torch.tensor([3.0, math.nan, 4.0]), torch.tensor([True, False, True]), requires_grad=True)
    hidden = ms.masked_tensor(torch.ones(2), torch.zeros(2, dtype=torch.bool), requires_grad=True)
    plain = torch.tensor([5.0], requires_grad=True)
    ((x * x).sum() + plain.sum()).backward()
    (hidden * 2).sum().backward()
    cells = torch.tensor([6.0, 8.0, 1.0])
    norm = optim.clip_grad_norm_([x, plain, hidden], 0.5, order)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(cells, order))
    torch.testing.assert_close(x.grad.get_data()[x.grad.get_mask()], cells[:2] * min(0.5 / (float(norm) + 1e-6), 1))
