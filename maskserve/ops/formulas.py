"""Formulas: one row, whose parameter is an expression over a payload's variables."""

from __future__ import annotations

from maskserve import dtypes
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import GRAD, Formula

ROWS = (
    Formula(
        name="eval", function="maskserve.evaluation:of_tensors",
        summary="value of an expression over variables, such as (x - mean(x, dim=0, keepdim=True)) / y",
        parameters=(
            Parameter(
                name="expr", type=Type.EXPRESSION, default=REQUIRED, sample="x * 2",
                help="the expression: variables by name (a single one is also x), numbers, + - * / **, a comparison, & | ~, "
                "and ops called with their parameters by name",
            ),
            Parameter(
                name="let", type=Type.PAIRS, request_only=True,
                help="another name for a tensor in the expression: x=blk.0.w (repeatable)",
            ),
            Parameter(
                name="wrt", type=Type.NAMES, request_only=True, verb=GRAD,
                help="the variables to give gradients by, with commas between; default: each one of numbers",
            ),
        ),
        accepts=frozenset(dtypes.ALL),
    ),
)  # fmt: skip
