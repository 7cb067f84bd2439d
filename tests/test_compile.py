"""torch.compile over functions of MaskedTensors: values and gradients are those without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import maskserve as ms

MASK = torch.tensor([[True, True, False], [True, False, True]])
NET = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))


def between(x: Tensor) -> Any:
    """Torch's ops on plain tensors before, between and after ours."""
    m = ms.as_masked_tensor(torch.sin(x) * 2, MASK)
    return (ms.softmax(m * m.exp(), 1).sum(1).to_tensor(0.0) * m.shape[0]).square().sum()


def trained(x: Tensor) -> Any:
    return functional.mse_loss(NET(ms.as_masked_tensor(x, MASK)), torch.zeros(2, 2))


def attended(x: Tensor) -> Any:
    m = ms.as_masked_tensor(x, MASK).reshape(1, 2, 3)
    return functional.scaled_dot_product_attention(m, m, m).sum()


def of_a_gradient(x: Tensor) -> Any:
    value, gradient = ms.value_and_grad(lambda m: (m * m).sum())(ms.as_masked_tensor(x, MASK))
    return value + gradient.sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [between, trained, attended, of_a_gradient], ids=lambda f: f.__name__)
def test_a_compiled_function_gives_the_same_values_and_gradients(
    function: Callable[[Tensor], Any], backend: str
) -> None:
    found = []
    for called in (function, torch.compile(function, backend=backend)):
        x = torch.tensor([[0.5, -1.0, torch.nan], [2.0, torch.inf, 0.25]], requires_grad=True)
        for _ in range(2):
            NET.zero_grad()
            made = called(x)
            made.backward()
        value = made.to_tensor() if isinstance(made, ms.MaskedTensor) else made
        assert x.grad is not None
        found.append(
            [value.detach(), torch.where(MASK, x.grad, 0), *[p.grad for p in NET.parameters() if p.grad is not None]]
        )
    for one, other in zip(*found, strict=True):
        assert bool(one.isfinite().all())
        assert torch.equal(one, other)


def test_a_whole_graph_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="maskserve computes on data and mask"):
        torch.compile(trained, backend="eager", fullgraph=True)(torch.zeros(2, 3))
