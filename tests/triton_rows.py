"""Which rows the Triton kernels serve, and samples for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

import maskserve as ms
from maskserve import dtypes, evaluation
from maskserve.backends.triton_tables import SERVED, serves_row
from maskserve.dtypes import DType
from maskserve.evaluation import Term
from maskserve.expression import parse
from maskserve.ops.rows import Reduction, Row, Scan
from maskserve.params import names_of
from tests.samples import SLICED, cells, plan_of, with_junk

EXPONENTIAL = {"logsumexp", "softmax", "log_softmax", "softmin", "logcumsumexp"}
"""Rows with exp or log, whose bits are the back ends' own."""


def is_served(row: Row) -> bool:
    return serves_row(plan_of(row, cells(dtypes.f32, (2, 3), 0).data, **taken(row, dim=1)))


def taken(row: Row, **params: Any) -> dict[str, Any]:
    """Those of the parameters that the row has: a fill by a value has no dim."""
    return {name: value for name, value in params.items() if name in names_of(row)}


ROWS = [row for row in SLICED if is_served(row)]
OWN = [row for row in ROWS if not row.picks or isinstance(row, Scan)]
"""Without the reductions that take the cells at the places of argmax and argmin."""
PAIRS = [(row, dtype) for row in ROWS for dtype in dtypes.ALL if dtype in row.accepts & (SERVED | {dtypes.u64})]


def has_own_bits(row: Row, dtype: DType) -> bool:
    """Whether results are within an ulp of the reference's: exp and log, and running states in the order of the scan."""
    return row.name in EXPONENTIAL or (isinstance(row, Scan) and not row.picks and dtype.is_float)


def ulps_apart(row: Row, dtype: torch.dtype) -> int:
    """How far bits of their own may be from the reference's; torch's running sum of exponentials drifts in float64."""
    return 32 if row.name == "logcumsumexp" and dtype is torch.float64 else 1


def dims_of(row: Row, ndim: int) -> Iterator[dict[str, Any]]:
    """Each dim, and where the row takes them, all and the outermost two."""
    yield from ({"dim": dim} for dim in range(ndim))
    if isinstance(row, Reduction):
        yield {}
        if ndim > 2:
            yield {"dim": (0, ndim - 1)}


TREES = {
    "(x - y) / (x * x + 1) < z": dtypes.f32,
    "where(x > 0.5, abs(x) / z, -y) * 2 - z": dtypes.f32,
    "where(x > 0.5, z, 3) + square(y) / 8": dtypes.f64,
    "-(x - 0.1) ** 2 / (1 + y)": dtypes.f32,
    "x * y - (1 - x) / z + 0.5": dtypes.f16,
    "-(x * y) / z - abs(x)": dtypes.bf16,
    "maximum(x, y) - minimum(y, 3) * -z": dtypes.i32,
    "(x & y) | ~z": dtypes.u8,
    "(x == y) & (x <= 3) | ~(y != z)": dtypes.i64,
    "x / y + x ** 2": dtypes.i16,
    "~(x & y) | z": dtypes.boolean,
    "where(x > 1, isnan(y), ~(z < 0))": dtypes.f32,
}


def variables(dtype: DType) -> dict[str, ms.MaskedTensor]:
    """x, y and z, of which the second broadcasts along the first dim, and the third has no mask and other strides."""
    made = [with_junk(cells(dtype, shape, seed)) for seed, shape in enumerate(((3, 5, 70), (5, 1), (3, 70, 5)))]
    x, y = (ms.as_masked_tensor(sample.data, sample.mask) for sample in made[:2])
    return {"x": x, "y": y, "z": ms.as_masked_tensor(cells(dtype, (3, 70, 5), 2).data.transpose(1, 2))}


def stages_of_tree(text: str, given: Mapping[str, ms.MaskedTensor]) -> list[Term]:
    """The terms of an expression that are held whole, before a cell is read."""
    declared = {name: evaluation.declared_of(tensor) for name, tensor in given.items()}
    term = evaluation.planned(parse(text).root, declared)
    return list(evaluation.stages(term))
