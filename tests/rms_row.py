"""A pytest plugin and a module that adds one row, root mean square, to the table: what adding an op takes."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts, counted, halve, widened
from maskserve.dtypes import f64
from maskserve.ops import OPS, passes
from maskserve.ops.parameters import DIMS, KEEPDIM
from maskserve.ops.reductions import OURS
from maskserve.ops.results import floated
from maskserve.ops.rows import Part, Pass, Reduction
from maskserve.plan import Plan


class Squares:
    """(count, total): the sum of squares."""

    exact = False

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        return {"count": counted(data, mask, 2), "total": halve(widened(data, mask).square_())}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        return {name: a[name] + b[name] for name in a}


def finalize(plan: Plan, parts: Parts) -> Tensor:
    return torch.sqrt(parts["total"] / parts["count"].clamp(min=1))


RMS = Reduction(
    name="rms",
    summary="root of the mean square of the valid cells",
    parameters=(DIMS, KEEPDIM, *OURS),
    result=floated,
    passes=(
        Pass(
            name="squares",
            parts=lambda _: (passes.COUNT_PART, Part(name="total", dtype=f64)),
            reference="tests.rms_row:Squares",
        ),
    ),
    finalize="tests.rms_row:finalize",
)


def add() -> None:
    """The one edit."""
    OPS.add(RMS)


def pytest_configure() -> None:
    """As a plugin (`-p tests.rms_row`) the row is in the table before a test is collected."""
    add()
