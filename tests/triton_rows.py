"""Which rows the Triton kernels serve, and samples for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from maskserve import dtypes
from maskserve.backends.triton_tables import SERVED, serves_row
from maskserve.dtypes import DType
from maskserve.ops.rows import Reduction, Row
from maskserve.params import names_of
from tests.samples import SLICED, cells, plan_of

EXPONENTIAL = {"logsumexp", "softmax", "log_softmax", "softmin"}
"""Rows with exp or log, whose bits are the back ends' own."""


def is_served(row: Row) -> bool:
    return "dim" in names_of(row) and serves_row(plan_of(row, cells(dtypes.f32, (2, 3), 0).data, dim=1))


ROWS = [row for row in SLICED if is_served(row)]
PAIRS = [(row, dtype) for row in ROWS for dtype in dtypes.ALL if dtype in row.accepts & SERVED]


def of_row(row: Row, dtype: DType) -> bool:
    """Whether there is a kernel for cells of the dtype."""
    return dtype is not dtypes.f64 or row.name != "cumsum"


def dims_of(row: Row, ndim: int) -> Iterator[dict[str, Any]]:
    """Each dim, and where the row takes them, all and the outermost two."""
    yield from ({"dim": dim} for dim in range(ndim))
    if isinstance(row, Reduction):
        yield {}
        if ndim > 2:
            yield {"dim": (0, ndim - 1)}
