"""The block of docs/gradients.md that shows gradients beside those of plain torch and torch.masked, from code that runs.

`python -m tests.gradient_page` writes it; a test keeps it true.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "gradients.md"
BEGIN, END = "<!-- gradients: begin -->", "<!-- gradients: end -->"

PRELUDE = """\
import torch
import maskserve as ms
from torch.masked import as_masked_tensor, masked_tensor
nan = torch.nan
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question, asked three times; each way leaves its `value` and its `gradient`."""

    title: str
    why: str
    plain: str
    masked: str
    ours: str


CASES = (
    Case(
        title="The branch that was not taken",
        why="exp overflows where the condition is false, and 0 * inf is NaN (pytorch issue 10729).",
        plain="""\
x = torch.tensor([-10., -5, 0, 5, 10, 50, 60, 70, 80, 90, 100], requires_grad=True)
y = torch.where(x < 0, torch.exp(x), torch.ones(()))
y.sum().backward()
value, gradient = y.sum().item(), x.grad""",
        masked="""\
x = torch.tensor([-10., -5, 0, 5, 10, 50, 60, 70, 80, 90, 100])
mx = masked_tensor(x, x < 0, requires_grad=True)
y = torch.where(x < 0, torch.exp(mx), masked_tensor(torch.ones_like(x), x >= 0))
y.sum().backward()
value, gradient = y.sum(), mx.grad""",
        ours="""\
x = ms.masked_tensor([-10., -5, 0, 5, 10, 50, 60, 70, 80, 90, 100], requires_grad=True)
y = torch.where(x < 0, torch.exp(x), 1.0)
y.sum().backward()
value, gradient = y.sum(), x.grad""",
    ),
    Case(
        title="Beside a path that was taken",
        why="The same, and x once more: what no path reaches contributes exactly nothing to what one does.",
        plain="""\
x = torch.tensor([-1., 0, 100, 1000], requires_grad=True)
y = (torch.where(x < 0, torch.exp(x), torch.ones(())) + x).sum()
y.backward()
value, gradient = y.item(), x.grad""",
        masked="""\
x = masked_tensor(torch.tensor([-1., 0, 100, 1000]), torch.ones(4).bool(), requires_grad=True)
y = (torch.where(x.get_data() < 0, torch.exp(x), torch.ones(4)) + x).sum()
y.backward()
value, gradient = y, x.grad""",
        ours="""\
x = ms.masked_tensor([-1., 0, 100, 1000], requires_grad=True)
y = (torch.where(x < 0, torch.exp(x), 1.0) + x).sum()
y.backward()
value, gradient = y, x.grad""",
    ),
    Case(
        title="A division that does not count",
        why="a / 0 stands in the branch that was not taken (pytorch issue 52248).",
        plain="""\
a, b, c = torch.tensor(1., requires_grad=True), torch.tensor(False), torch.tensor(1.)
y = torch.where(b, a / 0, c)
y.backward()
value, gradient = y.item(), a.grad""",
        masked="""\
a = masked_tensor(torch.tensor(1.), torch.tensor(True), requires_grad=True)
b, c = torch.tensor(False), torch.tensor(1.)
y = torch.where(b, a / 0, c)
y.backward()
value, gradient = y, a.grad""",
        ours="""\
a, b, c = ms.masked_tensor(1., requires_grad=True), torch.tensor(False), torch.tensor(1.)
y = torch.where(b, a / 0, c)
y.backward()
value, gradient = y, a.grad""",
    ),
    Case(
        title="Masked after the division",
        why="x / 0 is masked afterwards; its gradient is no gradient (pytorch issue 4132).",
        plain="""\
x, div = torch.tensor([1., 1], requires_grad=True), torch.tensor([0., 1])
y = (x / div)[div != 0].sum()
y.backward()
value, gradient = y.item(), x.grad""",
        masked="""\
x, div = torch.tensor([1., 1], requires_grad=True), torch.tensor([0., 1])
y = as_masked_tensor(x / div, div != 0).sum()
y.backward()
value, gradient = y, x.grad""",
        ours="""\
x, div = ms.masked_tensor([1., 1], requires_grad=True), torch.tensor([0., 1])
y = ms.as_masked_tensor(x / div, div != 0).sum()
y.backward()
value, gradient = y, x.grad""",
    ),
    Case(
        title="A plain parameter beside missing data",
        why="nansum leaves the NaN out of the value and in the gradient (pytorch issue 67180).",
        plain="""\
a, b = torch.tensor([1., 2, nan]), torch.tensor(1., requires_grad=True)
y = torch.nansum(a * b)
y.backward()
value, gradient = y.item(), b.grad""",
        masked="""\
a, b = torch.tensor([1., 2, nan]), torch.tensor(1., requires_grad=True)
y = torch.sum(masked_tensor(a, ~a.isnan()) * b)
y.backward()
value, gradient = y, b.grad""",
        ours="""\
a, b = torch.tensor([1., 2, nan]), torch.tensor(1., requires_grad=True)
y = torch.sum(ms.masked_tensor(a, ~a.isnan()) * b)
y.backward()
value, gradient = y, b.grad""",
    ),
    Case(
        title="Softmax of padding",
        why="A slice without a valid cell has no softmax, and no gradient (pytorch issue 55056).",
        plain="""\
x = torch.tensor([[.7036, 0, 0], [-.1679, 0, -.4656], [0, 0, 0]], requires_grad=True)
valid = torch.tensor([[True, False, False], [True, False, True], [False, False, False]])
y = torch.softmax(x.masked_fill(~valid, -torch.inf), 0)
torch.where(valid, y, 0)[0].sum().backward()
value, gradient = y.detach(), x.grad""",
        masked="""\
x = torch.tensor([[.7036, 0, 0], [-.1679, 0, -.4656], [0, 0, 0]])
valid = torch.tensor([[True, False, False], [True, False, True], [False, False, False]])
mx = masked_tensor(x, valid, requires_grad=True)
y = torch.softmax(mx, 0)
y[0].sum().backward()
value, gradient = y, mx.grad""",
        ours="""\
x = torch.tensor([[.7036, 0, 0], [-.1679, 0, -.4656], [0, 0, 0]])
valid = torch.tensor([[True, False, False], [True, False, True], [False, False, False]])
mx = ms.masked_tensor(x, valid, requires_grad=True)
y = torch.softmax(mx, 0)
y[0].sum().backward()
value, gradient = y, mx.grad""",
    ),
)


WAYS = ("maskserve", "torch.masked", "plain torch")


def block() -> str:
    """The text between the markers: the gradients at a glance, then the code of each."""
    outcomes = [(case, [outcome(code) for code in (case.ours, case.masked, case.plain)]) for case in CASES]
    rows = ["| gradient | " + " | ".join(WAYS) + " |", "|---|---|---|---|"]
    rows += [f"| {case.title} | " + " | ".join(f"`{found.brief}`" for found in made) + " |" for case, made in outcomes]
    return "\n".join([*rows, "", *(line for case, made in outcomes for line in lines(case, made))])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a way gives, at length and in a few words."""

    text: str
    brief: str


def lines(case: Case, made: list[Outcome]) -> Iterator[str]:
    yield f"### {case.title}\n\n{case.why}\n"
    for name, code, found in zip(WAYS, (case.ours, case.masked, case.plain), made, strict=True):
        yield f"{name}:\n\n```python\n{code}\n```\n\n```text\n{found.text}\n```\n"


def outcome(code: str) -> Outcome:
    """The value and the gradient that the code leaves, or the first line of its error."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.masked is a prototype, and says so
        try:
            exec(PRELUDE + code, names)  # our own text, from above
        except Exception as error:  # whatever a peer raises
            shown = textwrap.shorten(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", 150)
            return Outcome(text=shown, brief=type(error).__name__)
    value, gradient = (shown_cells(str(names[name])) for name in ("value", "gradient"))
    return Outcome(text=f"{value}\n{gradient}", brief=" ".join(cells(gradient)))


def shown_cells(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def cells(text: str) -> list[str]:
    """The numbers of a printed tensor.

    >>> cells("tensor([[1.0, nan],\\n   [2e-05, --]])")
    ['1.0', 'nan', '2e-05', '--']
    """
    return re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?|nan|--", text)


def rewritten(page: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{block()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
