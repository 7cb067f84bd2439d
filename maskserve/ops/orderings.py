"""Orderings: one row each. Valid cells in order, masked ones last."""

from __future__ import annotations

from dataclasses import replace

from maskserve.dtypes import NUMERIC, i64, u64
from maskserve.ops.parameters import DIM, NAN, REQUIRED, Parameter, Params, Type
from maskserve.ops.results import always, same
from maskserve.ops.rows import Ordering

LAST = replace(DIM, default=-1)
DESCENDING = Parameter(name="descending", type=Type.FLAG, default=False, help="largest first")
STABLE = Parameter(
    name="stable", type=Type.FLAG, default=False, help="torch's word; equal cells always keep their order"
)
K = Parameter(name="k", type=Type.COUNT, default=REQUIRED, help="how many cells of each slice")
LARGEST = Parameter(name="largest", type=Type.FLAG, default=True, help="the largest cells, or the smallest")
SORTED = Parameter(name="sorted", type=Type.FLAG, default=True, help="torch's word; the cells always come in order")
ORDERED = NUMERIC | {u64}


def first_k(params: Params, n: int) -> int:
    """topk gives k of the n cells."""
    return int(params["k"])


ROWS = (
    Ordering(
        name="sort",
        summary="valid cells in order along dim, masked ones last, and where they stood",
        parameters=(LAST, DESCENDING, STABLE, NAN),
        accepts=ORDERED, picks=True, indices=True,
        result=same, scan=".orders:Sorted",
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
    Ordering(
        name="argsort",
        summary="where the cells of the sorted slice stood; masked where that cell is",
        parameters=(LAST, DESCENDING, STABLE, NAN),
        accepts=ORDERED,
        result=always(i64), scan=".orders:Sorted",
    ),
    Ordering(
        name="topk",
        summary="k largest valid cells in order along dim, and where they stood; masked where there are fewer",
        parameters=(K, LAST, LARGEST, SORTED, NAN),
        accepts=ORDERED, picks=True, indices=True, size=first_k,
        result=same, scan=".orders:Top",
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
)  # fmt: skip
