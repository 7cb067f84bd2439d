"""Normalizations: one row each."""

from __future__ import annotations

from maskserve.dtypes import COMPLEX, NUMERIC
from maskserve.ops import passes
from maskserve.ops.parameters import CORRECTION, DIM, DTYPE, KEYWORD_DTYPE, NAN, ORD, Parameter, Type
from maskserve.ops.results import floated
from maskserve.ops.rows import Normalization

EPS = Parameter(
    name="eps", type=Type.REAL, default=1e-12, keyword_only=True, help="the least norm that cells are divided by"
)

ROWS = (
    Normalization(
        name="softmax",
        summary="exponentials of the valid cells, scaled to sum to 1 along dim",
        parameters=(DIM, DTYPE, NAN),
        result=floated, passes=(passes.EXPONENTIALS,), apply=".normalizations:apply_softmax",
        vjp=".gradients:softmax",
    ),
    Normalization(
        name="log_softmax",
        summary="logarithm of the softmax of the valid cells along dim",
        parameters=(DIM, DTYPE, NAN),
        result=floated, passes=(passes.EXPONENTIALS,), apply=".normalizations:apply_log_softmax",
        vjp=".gradients:log_softmax",
    ),
    Normalization(
        name="softmin",
        summary="softmax of the negated valid cells along dim",
        parameters=(DIM, DTYPE, NAN),
        result=floated, passes=(passes.EXPONENTIALS,), apply=".normalizations:apply_softmax", negates=True,
        vjp=".gradients:softmin",
    ),
    Normalization(
        name="normalize",
        summary="valid cells divided by their norm along dim",
        parameters=(ORD, DIM, EPS, KEYWORD_DTYPE, NAN),
        accepts=NUMERIC | COMPLEX, on_complex=".complexes:normalized",
        result=floated, passes=(passes.POWERS,), apply=".norms:apply_normalize",
        torch_words={"p": "ord"}, torch_defaults={"dim": 1},
        vjp=".gradients_of_norms:normalize",
    ),
    Normalization(
        name="standardize",
        summary="valid cells less their mean, divided by their standard deviation along dim",
        parameters=(DIM, CORRECTION, KEYWORD_DTYPE, NAN),
        result=floated, passes=(passes.MOMENTS,), apply=".normalizations:apply_standardize",
        needs=lambda params: params["correction"],
        vjp=".gradients:standardize",
    ),
)  # fmt: skip
