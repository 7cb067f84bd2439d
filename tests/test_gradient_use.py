"""Gradients in use: what is refused, the rest of torch around them, and what people type first."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import GradientError, MaskedValueError, MaskError
from tests.gradient_cells import F, T, assert_is, cells, inf, leaf, nan, plain
from tests.samples import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


# -- refusals -------------------------------------------------------------------------------------------------------


def test_errors_are_one_clear_line() -> None:
    x = leaf([1.0, 2], [T, F])
    for call, said in (
        (lambda: (x * 2).backward(), "one cell, and the tensor has shape (2,)"),
        (lambda: ms.masked_tensor(cells(1)).backward(), "no history"),
        (lambda: x.detach().sum().backward(), "no history"),
        (lambda: (x * 2).backward(cells([1, 2, 3])), "(3,), the tensor (2,)"),
        (lambda: torch.autograd.grad((x * 2).sum(), x, is_grads_batched=True), "vmap"),
        (lambda: ms.grad(lambda x: x * 2)(x), "one cell"),
        (lambda: ms.grad(lambda x: 3.0)(x), "gives a float"),
        (lambda: ms.grad(lambda x: x.sum(), argnums=1)(x), "argnums"),
        (lambda: ms.grad(lambda x: x.sum())(ms.masked_tensor([1, 2])), "float"),
        (lambda: ms.vjp(lambda x: x, 3.0), "tensors"),
    ):
        with pytest.raises(GradientError) as caught:
            call()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(MaskedValueError):
        x.to_tensor()


def test_a_followed_tensor_is_not_written_to() -> None:
    x = leaf([1.0, 2], [T, F])
    y = x * 2
    for tensor in (x, y, y[:1]):
        before = tensor.detach().clone().tolist()
        with pytest.raises(GradientError, match=r"no_grad|torch\.where"):
            tensor[0] = 5.0
        with pytest.raises(GradientError):
            tensor += 1
        with pytest.raises(GradientError):
            tensor.copy_(cells([1, 1])[: len(before)])
        assert tensor.tolist() == before
    free = ms.masked_tensor(cells([1, 2]))
    with pytest.raises(GradientError, match="detach"):
        free[0] = x[0]
    with pytest.raises(GradientError):
        free += x
    assert free.tolist() == [1, 2]
    with torch.no_grad():
        x[0] = 7.0
        x *= 2
    assert x.tolist() == [14, None]
    assert x.requires_grad
    (x * x).sum().backward()
    assert_is(x.grad, [28, None])


# -- the rest of torch ----------------------------------------------------------------------------------------------


def chained(x: MaskedTensor) -> MaskedTensor:
    return (x.softmax(0) * x).sum() + x.var() + x.exp().mean()


def gradient_of_chain(x: MaskedTensor) -> MaskedTensor:
    y = x.detach().clone().requires_grad_()
    chained(y).backward()
    assert y.grad is not None
    return y.grad


def test_saved_tensors_may_be_packed() -> None:
    x = leaf([1.0, nan, 3], [T, F, T])
    packed = []

    def pack(tensor: Tensor) -> Any:
        packed.append(tensor)
        return tensor.detach().numpy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        total = chained(x)
    total.backward()
    assert packed
    assert x.grad is not None
    assert x.grad.tolist() == gradient_of_chain(x).tolist()
    y = leaf([1.0, nan, 3], [T, F, T])
    with torch.autograd.graph.save_on_cpu():
        total = chained(y)
    total.backward()
    assert y.grad is not None
    assert y.grad.tolist() == x.grad.tolist()


def test_anomaly_mode_finds_nothing_in_finite_cells() -> None:
    x = leaf([1.0, 2, 3], [T, F, T])
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        chained(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == gradient_of_chain(x).tolist()


def test_checkpoints_compute_the_same() -> None:
    x, w = leaf([1.0, nan, 3], [T, F, T]), plain([1.0, 2, 3])
    checkpoint(chained, x, use_reentrant=False).backward()
    assert x.grad is not None
    assert x.grad.tolist() == gradient_of_chain(x).tolist()

    def closure(cells: Tensor) -> Tensor:
        return chained(ms.as_masked_tensor(cells, torch.tensor([T, F, T]))).to_tensor()

    checkpoint(closure, w, use_reentrant=False).backward()
    assert w.grad is not None
    assert torch.equal(w.grad, torch.func.grad(closure)(w.detach()))


def test_backward_from_several_threads() -> None:
    x = leaf([1.0, nan, 3], [T, F, T])
    kept, errors = chained(x), []

    def work() -> None:
        try:
            chained(x).backward()
            kept.backward(retain_graph=True)
        except Exception as error:  # a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    alone = gradient_of_chain(x)
    assert x.grad is not None
    assert torch.equal(x.grad.get_mask(), alone.get_mask())
    torch.testing.assert_close(x.grad.get_data(), 12 * alone.get_data())


def test_modules_compute_on_masked_tensors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh(), nn.GELU(), nn.Flatten(), nn.LogSoftmax(dim=1)
    )
    first = None
    for junk in (0.0, nan, inf):
        data = torch.tensor([[1, junk, 3], [4, 5, 6], [junk, junk, junk]])
        x = ms.masked_tensor(data, torch.tensor([[T, F, T], [T, T, T], [F, F, F]]), requires_grad=True)
        net.zero_grad()
        y = net(x)
        assert y.tolist()[2] == [None, None]
        (y * y).sum().backward()
        assert x.grad is not None
        assert x.grad.get_mask().tolist() == [[T, F, T], [T, T, T], [F, F, F]]
        grads = [parameter.grad for parameter in net.parameters()]
        assert all(type(grad) is Tensor for grad in grads)
        parts = (*[grad for grad in grads if grad is not None], x.grad.get_data())
        assert all(part.isfinite().all() for part in parts)
        if first is not None:
            assert_same_bits(parts, first, junk)
        first = parts


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,)], ids=str)
def test_single_cells_and_no_cells(shape: tuple[int, ...]) -> None:
    for mask in (None, torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        x = ms.masked_tensor(torch.ones(shape, dtype=torch.float64), mask, requires_grad=True)
        y = (x * x).exp()
        (y.softmax(0) * y if shape else y).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        assert torch.equal(x.grad.get_mask(), x.get_mask())


def test_leaves_of_other_strides() -> None:
    mask = torch.tensor([[T, F, T], [F, T, T]])
    turned = torch.arange(6, dtype=torch.float64).reshape(3, 2).T
    expanded = cells([[1.0], [2.0]]).expand(2, 3)
    for data in (turned, expanded, torch.arange(12, dtype=torch.float64).reshape(2, 6)[:, ::2]):
        found = []
        for own in (data, data.clone().contiguous()):
            x = ms.as_masked_tensor(own.detach(), mask).requires_grad_()
            (x.softmax(1) * x + x @ x.T.sum(1, keepdim=True)).sum().backward()
            assert x.grad is not None
            found.append(x.grad)
        torch.testing.assert_close(found[0].get_data(), found[1].get_data())
        assert torch.equal(found[0].get_mask(), mask)
        assert torch.equal(found[1].get_mask(), mask)


def test_a_broadcast_mask_and_none_work_alike() -> None:
    for mask in (torch.tensor([[T], [F]]), torch.tensor([[T, T], [F, F]])):
        x = ms.masked_tensor(cells([[1, 2], [3, 4]]), mask, requires_grad=True)
        ((x * x).sum(1) + x.mean(1)).sum().backward()
        assert_is(x.grad, [[2.5, 4.5], [None, None]])


def test_a_leaf_may_be_used_without_grad_first() -> None:
    x = leaf([1.0, 2], [T, F])
    with torch.no_grad():
        view, product = x[:1], x * 2
    assert product.tolist() == [2, None]
    (x * 3).sum().backward()
    assert_is(x.grad, [3, None])
    assert view.tolist() == [1]


def test_inference_mode_leaves_no_history() -> None:
    with torch.inference_mode():
        x = ms.masked_tensor(cells([1, 2]), torch.tensor([T, F]))
        assert (x * x).softmax(0).tolist() == [1, None]
    assert not (x * 2).requires_grad
    y = leaf([1.0, 2], [T, F])
    with torch.inference_mode():
        assert not (y * 2).sum().requires_grad
    (y * 2).sum().backward()
    assert_is(y.grad, [2, None])


def test_integers_and_comparisons_carry_no_history() -> None:
    x = leaf([1.5, 2.5], [T, F])
    for made in (x > 1, x.isnan(), x.argmax(), x.count(), x.argsort(0), x.to(torch.int64), ms.rank(x, 0)):
        assert not made.requires_grad
        assert made._reach is None
    with pytest.raises(GradientError):
        ms.masked_tensor([1, 2], requires_grad=True)


# -- what people type first ---------------------------------------------------------------------------------------


def test_a_copy_of_what_has_a_history_warns_that_it_trains_nothing() -> None:
    output = torch.ones(2, requires_grad=True) * 2
    with pytest.warns(UserWarning, match="as_masked_tensor"):
        ms.masked_tensor(output, torch.tensor([True, False]))
    with torch.no_grad():
        ms.masked_tensor(output)


def test_a_loss_is_formatted_like_a_number() -> None:
    loss = ms.masked_tensor([1.0, 2.0, None], requires_grad=True).sum()
    assert (f"{loss:.2f}", f"{ms.masked_tensor(1.0, False):.2f}") == ("3.00", "--")
    assert f"{ms.masked_tensor([1.0, None])}" == "masked_tensor([1.0000,     --])"


def test_shapes_that_do_not_fit_are_said_in_a_line() -> None:
    x = ms.masked_tensor([1.0, 2.0, None])
    _, pull = ms.vjp(lambda a: a * a, x)
    for call in (
        lambda: pull(torch.ones(1)), lambda: ms.jvp(lambda a: a * a, (x,), (1.0,)),
        lambda: ms.jvp(lambda a: a * a, x, torch.ones(3)), lambda: ms.jvp(lambda a: a * a, (x,), ()),
    ):  # fmt: skip
        with pytest.raises(GradientError, match=r"shape|tuple|pairs"):
            call()


def test_a_gradient_is_replaced_by_a_plain_one() -> None:
    x = ms.masked_tensor([1.0, None], requires_grad=True)
    x.grad = torch.ones(2)  # type: ignore[assignment]  # a plain tensor is valid everywhere
    assert x.grad.tolist() == [1, None]
    with pytest.raises(GradientError, match=r"shape \(2,\), or None, and not one of shape \(3,\)"):
        x.grad = torch.ones(3)


def test_bools_beside_none_are_bools() -> None:
    assert ms.masked_tensor([True, None, False]).dtype is torch.bool


def test_a_file_is_read_by_a_process_that_has_made_no_tensor_yet(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    torch.save(ms.masked_tensor([1.0, None]), path)
    code = f"import torch, maskserve; print(torch.load({str(path)!r}).tolist())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[1.0, None]\n"


def test_an_infinite_cell_has_the_gradient_of_logsumexp_to_itself() -> None:
    x = ms.masked_tensor([1.0, torch.inf, 3.0], requires_grad=True)
    ms.logsumexp(x, 0).backward()
    assert x.grad is not None
    assert (x.grad.tolist()[0], x.grad.tolist()[2]) == (0, 0)


def test_a_gradient_is_scaled_where_it_is() -> None:
    x = ms.masked_tensor([1.0, 2.0, None], requires_grad=True)
    (x * 4)[:1].sum().backward()
    assert x.grad is not None
    x.grad *= 0.5
    assert x.grad.tolist() == [2, None, None]
    assert x.grad.get_data().tolist() == [2, 0, 0]
    with pytest.raises(MaskError):
        x.grad[1] = 1.0


def test_a_first_gradient_and_a_first_join_of_sparse_tensors_import_no_sympy() -> None:
    """Torch's own functions import it to compare shapes, 0.7 s in which nobody else is served."""
    code = (
        "import sys, torch, maskserve as ms\n"
        "x = ms.masked_tensor([1.0, None, 3.0], requires_grad=True)\n"
        "(x * x).mean().backward()\n"
        "(by,) = torch.autograd.grad(x.exp(), x, torch.ones(3), create_graph=True)\n"
        "(second,) = torch.autograd.grad(by.sum(), x)\n"
        "torch.cat([ms.masked_tensor(torch.ones(2, 2).to_sparse())] * 2, -1)\n"
        "print(x.grad.tolist(), second.get_mask().tolist(), 'sympy' in sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.stdout == "[1.0, None, 3.0] [True, False, True] False\n", made.stderr


def test_a_torch_without_its_engine_at_hand_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.autograd.graph, "_engine_run_backward")
    x, unused = (ms.masked_tensor([1.0, None, 3.0], requires_grad=True) for _ in range(2))
    assert torch.autograd.grad([x.square().sum()], [x, unused], allow_unused=True)[1] is None
    x.square().sum().backward(inputs=[x])
    assert x.grad is not None
    assert x.grad.tolist() == [2, None, 6]
