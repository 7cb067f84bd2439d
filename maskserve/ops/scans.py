"""Scans: one row each."""

from __future__ import annotations

from maskserve.ops.rows import DIM, KEYWORD_DTYPE, NAN, Scan, summed

ROWS = (
    Scan(
        name="cumsum",
        summary="running sum of the valid cells along dim; masked cells are skipped and stay masked",
        parameters=(DIM, KEYWORD_DTYPE, NAN),
        result=summed, scan=".scans:CumulativeSum",
    ),
)  # fmt: skip
