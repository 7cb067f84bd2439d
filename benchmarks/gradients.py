"""`python -m benchmarks --gradients`: forward and backward of one op, beside torch.masked and plain torch.

Gradients are compared at valid cells before anything is timed. Plain torch is the double where that people write: safe
cells in, masked cells out. It and torch.masked tell nobody which gradients mean something.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import maskserve as ms
from benchmarks.cases import PRODUCTS, Cell, drawn
from benchmarks.report import number, table
from benchmarks.timing import Effort, attempt, interleaved, quiet

OURS, PLAIN, TORCH_MASKED = "maskserve", "plain torch", "torch.masked"
BOOKKEEPING, BOOKKEEPING_US = 2.0, 120.0
"""The aims: at most twice a double where beyond any cache, and so many microseconds an op on a few cells."""

CELLS = (
    Cell(label="last", shape=(4096, 1024), dim=1),
    Cell(label="first", shape=(4096, 1024), dim=0),
    Cell(label="10 million", shape=(10_000, 1000), dim=1),
)
SMALL = Cell(label="1,000", shape=(10, 100), dim=1)
QUICK = Effort(rounds=7, budget_s=0.6, once_s=3.0)

Form = Callable[[Tensor, Tensor, int], Tensor]
"""(cells, mask, dim) -> values; what masked slices give is not looked at."""


def shown(x: Tensor, m: Tensor, fill: float = 0.0) -> Tensor:
    return torch.where(m, x, fill)


def mean(x: Tensor, m: Tensor, dim: int) -> Tensor:
    return shown(x, m).sum(dim) / m.sum(dim)


def var(x: Tensor, m: Tensor, dim: int) -> Tensor:
    centred = shown(x, m) - mean(x, m, dim).unsqueeze(dim)
    return shown(centred, m).square().sum(dim) / (m.sum(dim) - 1)


PLAIN_FORMS: Mapping[str, Form] = {
    "exp": lambda x, m, dim: shown(shown(x, m).exp(), m),
    "sin": lambda x, m, dim: shown(shown(x, m).sin(), m),
    "square": lambda x, m, dim: shown(shown(x, m).square(), m),
    "sigmoid": lambda x, m, dim: shown(shown(x, m).sigmoid(), m),
    "sum": lambda x, m, dim: shown(x, m).sum(dim),
    "mean": mean,
    "var": var,
    "std": lambda x, m, dim: var(x, m, dim).sqrt(),
    "amax": lambda x, m, dim: shown(x, m, -torch.inf).amax(dim),
    "norm": lambda x, m, dim: torch.linalg.vector_norm(shown(x, m), 2, dim),
    "prod": lambda x, m, dim: shown(x, m, 1.0).prod(dim),
    "ptp": lambda x, m, dim: shown(x, m, -torch.inf).amax(dim) - shown(x, m, torch.inf).amin(dim),
    "norm of order 1": lambda x, m, dim: torch.linalg.vector_norm(shown(x, m), 1, dim),
    "norm of order 3": lambda x, m, dim: torch.linalg.vector_norm(shown(x, m), 3, dim),
    "norm of order inf": lambda x, m, dim: torch.linalg.vector_norm(shown(x, m), torch.inf, dim),
    "logsumexp": lambda x, m, dim: shown(x, m, -torch.inf).logsumexp(dim),
    "softmax": lambda x, m, dim: shown(shown(x, m, -torch.inf).softmax(dim), m),
    "log_softmax": lambda x, m, dim: shown(shown(x, m, -torch.inf).log_softmax(dim), m),
    "cumsum": lambda x, m, dim: shown(shown(x, m).cumsum(dim), m),
    "cumprod": lambda x, m, dim: shown(shown(x, m, 1.0).cumprod(dim), m),
    "logcumsumexp": lambda x, m, dim: shown(shown(x, m, -1e30).logcumsumexp(dim), m),
}
"""The ops that are timed, and how they are written without a library."""
WITHOUT_DIM = ("exp", "sin", "square", "sigmoid")
ORDERS = {"norm": 2, "norm of order 1": 1, "norm of order 3": 3, "norm of order inf": torch.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    op: str
    cell: Cell
    seconds: Mapping[str, float]
    differing: tuple[str, ...]
    failed: Mapping[str, str]


def measure(op: str, cell: Cell, effort: Effort) -> Timing:
    """Gradients compared at valid cells, then times."""
    sample = drawn(cell.shape, cell.dtype, cell.mask, near_one=op in PRODUCTS)
    assert sample.mask is not None
    calls = contenders(op, cell, sample.data, sample.mask)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results, first, failed = attempt(calls)
        ours = results.pop(OURS)
        differing = tuple(
            name
            for name, theirs in results.items()
            if not torch.allclose(theirs[sample.mask], ours[sample.mask], rtol=1e-3, atol=1e-5, equal_nan=True)
        )
        timed = {name: call for name, call in calls.items() if name not in failed}
        return Timing(
            op=op, cell=cell, seconds=interleaved(timed, first, effort), differing=differing, failed=failed
        )  # fmt: skip


def contenders(op: str, cell: Cell, data: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward, giving the gradient as a plain tensor."""
    given = () if op in WITHOUT_DIM else (ORDERS[op], cell.dim) if op in ORDERS else (cell.dim,)
    word = "norm" if op in ORDERS else op
    leaf, ours, form = data.clone().requires_grad_(), ms.masked_tensor(data, mask, requires_grad=True), PLAIN_FORMS[op]
    assert cell.dim is not None
    above = torch.ones_like(form(data, mask, cell.dim))

    def by_maskserve() -> Tensor:
        getattr(ms, word)(ours, *given).backward(above)
        gradient = ours.grad
        ours.grad = None
        assert gradient is not None
        return gradient.get_data()

    def by_hand() -> Tensor:
        assert cell.dim is not None
        form(leaf, mask, cell.dim).backward(above)
        return taken(leaf)

    def by_torch_masked() -> Tensor:
        if op in WITHOUT_DIM:
            theirs = import_module("torch.masked").masked_tensor(data, mask, requires_grad=True)
            getattr(torch, op)(theirs).sum().backward()
            gradient: Tensor = theirs.grad.to_tensor(0.0)
            return gradient
        getattr(import_module("torch.masked"), word)(leaf, *given, mask=mask).backward(above)
        return taken(leaf)

    return {OURS: by_maskserve, PLAIN: by_hand, TORCH_MASKED: by_torch_masked}


def taken(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient


def in_a_chain(n: int = 20) -> float:
    """Microseconds that each further op of a chain costs, forward and backward, on 1,000 cells."""
    sample = drawn(SMALL.shape, SMALL.dtype, SMALL.mask, near_one=False)
    ours = ms.masked_tensor(sample.data, sample.mask, requires_grad=True)
    above = torch.ones_like(sample.data)

    def chain(length: int) -> Callable[[], Any]:
        def run() -> None:
            made = ours
            for _ in range(length):
                made = ms.sin(made)
            made.backward(above)

        return run

    calls = {"short": chain(1), "long": chain(1 + n)}
    with quiet():
        seconds = interleaved(calls, attempt(calls)[1], QUICK)
    return (seconds["long"] - seconds["short"]) / n * 1e6


# -- report -------------------------------------------------------------------------------------------------------


def report(command: str) -> str:
    """All tables, as Markdown."""
    large = [measure(op, cell, QUICK) for cell in CELLS for op in PLAIN_FORMS]
    small = [measure(op, SMALL, QUICK) for op in PLAIN_FORMS]
    return "\n\n".join(parts(command, large, small, in_a_chain()))


def parts(command: str, large: Sequence[Timing], small: Sequence[Timing], chained_us: float) -> Iterator[str]:
    yield f"`{command}`: forward and backward, f32, 70 % valid, {torch.get_num_threads()} threads."
    for peer in (PLAIN, TORCH_MASKED):
        yield f"Times faster than {peer}" + (
            " (`!`: its gradient differs at valid cells):" if peer == TORCH_MASKED else ":"
        )
        yield grid(large, peer)
    yield "Microseconds on 1,000 cells:"
    names = (OURS, PLAIN, TORCH_MASKED)
    lines = [[t.op, *(f"{t.seconds[name] * 1e6:.0f}" if name in t.seconds else "" for name in names)] for t in small]
    yield table(["op", *names], lines)
    yield (
        f"Each further op of a chain costs {chained_us:.0f} us on 1,000 cells (aim: {BOOKKEEPING_US:.0f}). "
        f"Beyond {BOOKKEEPING:g} x plain torch at 10 million cells: {', '.join(slow(large)) or 'none'}."
    )


def slow(timings: Sequence[Timing]) -> list[str]:
    """The ops that miss the aim for bookkeeping."""
    found = [(t, t.seconds[OURS] / t.seconds[PLAIN]) for t in timings if t.cell is CELLS[-1]]
    return [f"{t.op} ({number(ratio)} x)" for t, ratio in found if ratio > BOOKKEEPING]


def grid(timings: Sequence[Timing], peer: str) -> str:
    """A line for each op, a column for each cell."""
    lines: dict[str, list[str]] = {}
    for t in timings:
        lead = t.seconds[peer] / t.seconds[OURS] if peer in t.seconds else None
        lines.setdefault(t.op, [t.op]).append(number(lead) + ("!" if peer in t.differing else ""))
    return table(["op", *dict.fromkeys(t.cell.label for t in timings)], list(lines.values()))
