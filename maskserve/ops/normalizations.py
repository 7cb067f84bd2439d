"""Normalizations: one row each."""

from __future__ import annotations

from maskserve.ops import passes
from maskserve.ops.rows import DIM, DTYPE, NAN, Normalization, floated

ROWS = (
    Normalization(
        name="softmax",
        summary="exponentials of the valid cells, scaled to sum to 1 along dim",
        parameters=(DIM, DTYPE, NAN),
        result=floated, passes=(passes.EXPONENTIALS,), apply=".normalizations:apply_softmax",
    ),
    Normalization(
        name="log_softmax",
        summary="logarithm of the softmax of the valid cells along dim",
        parameters=(DIM, DTYPE, NAN),
        result=floated, passes=(passes.EXPONENTIALS,), apply=".normalizations:apply_log_softmax",
    ),
)  # fmt: skip
