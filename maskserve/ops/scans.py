"""Scans: one row each."""

from __future__ import annotations

from maskserve.dtypes import COMPLEX, NUMERIC, boolean, f64, u64
from maskserve.ops.parameters import DIM, KEYWORD_DTYPE, NAN, Parameter, Type
from maskserve.ops.results import always, floated, same, summed
from maskserve.ops.rows import Scan

METHOD = Parameter(
    name="method", type=Type.CHOICE, default="average", choices=("average", "min", "max", "dense", "ordinal"),
    keyword_only=True, help="the rank of equal cells: their mean, lowest or highest, one for all without a gap, or by place",
)  # fmt: skip

ROWS = (
    Scan(
        name="cumsum",
        summary="running sum of the valid cells along dim; masked cells are skipped and stay masked",
        parameters=(DIM, KEYWORD_DTYPE, NAN),
        accepts=NUMERIC | COMPLEX, on_complex=".complexes:by_parts",
        result=summed, scan=".scans:CumulativeSum", carries="state",
        vjp=".gradients:cumsum", vjp_reads_cells=False,
    ),
    Scan(
        name="cumprod",
        summary="running product of the valid cells along dim; masked cells are skipped and stay masked",
        parameters=(DIM, KEYWORD_DTYPE, NAN),
        accepts=NUMERIC | COMPLEX, on_complex=".complexes:running_product",
        result=summed, scan=".products:CumulativeProduct",
        vjp=".gradients_of_products:cumprod",
    ),
    Scan(
        name="cummax",
        summary="largest valid cell so far along dim, and its index, the last of equal ones",
        parameters=(DIM, NAN),
        accepts=NUMERIC | {u64}, picks=True, indices=True,
        result=same, scan=".places:CumulativeLargest", carries="forward",
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
    Scan(
        name="cummin",
        summary="smallest valid cell so far along dim, and its index, the last of equal ones",
        parameters=(DIM, NAN),
        accepts=NUMERIC | {u64}, picks=True, indices=True,
        result=same, scan=".places:CumulativeSmallest", carries="forward",
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
    Scan(
        name="logcumsumexp",
        summary="log of the running sum of exponentials of the valid cells along dim",
        parameters=(DIM, KEYWORD_DTYPE, NAN),
        result=floated, scan=".scans:LogCumulativeSumOfExponentials",
        vjp=".gradients_of_products:logcumsumexp",
    ),
    Scan(
        name="rank",
        summary="rank of each valid cell along dim, from 1",
        parameters=(DIM, METHOD, NAN),
        accepts=(NUMERIC | {u64}) - {boolean}, sorts=True,
        result=always(f64), scan=".orders:Rank",
        steps=True,
    ),
)  # fmt: skip
