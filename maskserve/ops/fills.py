"""Fills: one row each. Masked cells become valid."""

from __future__ import annotations

from maskserve.dtypes import NUMERIC, u64
from maskserve.ops.parameters import DIM, REQUIRED, Parameter, Type
from maskserve.ops.results import same
from maskserve.ops.rows import Fill, Reach

VALUE = Parameter(name="value", type=Type.CELL, default=REQUIRED, help="what the masked cells become")
LIMIT = Parameter(
    name="limit",
    type=Type.COUNT,
    keyword_only=True,
    help="how many masked cells in a row are filled; all when not given",
)

ROWS = (
    Fill(
        name="fill", aliases=("value",),
        summary="cells with every masked one a valid `value`",
        parameters=(VALUE,),
        accepts=NUMERIC | {u64},
        result=same, scan=".places:Filled", reach=Reach.OWN,
        differs="torch.fill overwrites every cell, maskserve.fill the masked ones",
        vjp=".gradients:total", vjp_reads_cells=False,
    ),
    Fill(
        name="ffill",
        summary="masked cells filled with the last valid cell before them along dim",
        parameters=(DIM, LIMIT),
        accepts=NUMERIC | {u64}, picks=True,
        result=same, scan=".places:FilledForward", carries="forward",
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
    Fill(
        name="bfill",
        summary="masked cells filled with the next valid cell after them along dim",
        parameters=(DIM, LIMIT),
        accepts=NUMERIC | {u64}, picks=True,
        result=same, scan=".places:FilledBackward", carries="backward",
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
)  # fmt: skip
