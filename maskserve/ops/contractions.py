"""Contractions: one row each, an equation in einsum's words. Python only."""

from __future__ import annotations

from maskserve.ops.parameters import NAN, REQUIRED, Parameter, Type
from maskserve.ops.rows import Contraction

MEETING = Parameter(
    name="dims", type=Type.MEETING, default=2,
    help="how many last dims of a meet the first ones of b, or which dims of each meet",
)  # fmt: skip
EQUATION = Parameter(
    name="equation",
    type=Type.EQUATION,
    default=REQUIRED,
    help="a letter for each dim of each tensor, as in 'ij,jk->ik'",
)

ROWS = (
    Contraction(name="matmul", summary="matrix product; dims before the last two broadcast",
                function="maskserve.equations:matmul", operator="matmul"),
    Contraction(name="mm", summary="product of two matrices", operands=("input", "mat2"), equation="ik,kj->ij"),
    Contraction(name="bmm", summary="products of matrices, pair by pair", operands=("input", "mat2"), equation="bik,bkj->bij"),
    Contraction(name="mv", summary="product of a matrix and a vector", operands=("input", "vec"), equation="ik,k->i"),
    Contraction(name="dot", summary="sum of the products of two vectors", operands=("input", "tensor"), equation="k,k->"),
    Contraction(name="inner", summary="sums of products along the last dims of both", function="maskserve.equations:inner"),
    Contraction(name="outer", summary="each cell of one vector times each of another", operands=("input", "vec2"),
                equation="i,j->ij", torch=("ger",)),
    Contraction(name="tensordot", summary="sums of products over some dims of both", operands=("a", "b"),
                function="maskserve.equations:tensordot", parameters=(MEETING, NAN), in_torchs_methods=False, outline=""),
    Contraction(name="einsum", summary="sums of products over the dims whose letters the result lacks", operands=("*operands",),
                function="maskserve.equations:einsum", parameters=(EQUATION, NAN), in_torchs_methods=False, outline=""),
    Contraction(name="linear", summary="input times the transposed weight, plus the bias", operands=("input", "weight", "bias"),
                n_optional=1, function="maskserve.equations:linear", added="add", in_torchs_methods=False),
)  # fmt: skip
