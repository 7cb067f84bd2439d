"""Functions of a whole tensor: one row each. Python only: the data decides the shape, or several tensors come out."""

from __future__ import annotations

from maskserve.dtypes import FLOATING, INTEGRAL, NUMERIC, boolean, u64
from maskserve.ops.parameters import CORRECTION, NAN, Parameter, Type
from maskserve.ops.results import floated
from maskserve.ops.rows import Whole

BINS = Parameter(name="bins", type=Type.NUMBERS, default=100, help="how many bins of equal width, or their edges")
RANGE = Parameter(
    name="range", type=Type.RANGE, keyword_only=True, help="lowest and highest edge; the data's when not given"
)
DENSITY = Parameter(
    name="density", type=Type.FLAG, default=False, keyword_only=True, help="scale to an integral of 1 over the range"
)
EQUAL_BINS = Parameter(name="bins", type=Type.COUNT, default=100, help="how many bins of equal width")
LOWEST = Parameter(
    name="min",
    type=Type.NUMBER,
    default=0,
    help="the lower end of the range; the data's where min and max are one number",
)
HIGHEST = Parameter(name="max", type=Type.NUMBER, default=0, help="the upper end of the range")
LENGTH = Parameter(name="minlength", type=Type.COUNT, default=0, help="how many counts there are at least")
SORTED = Parameter(name="sorted", type=Type.FLAG, default=True, help="torch's word; the values always come in order")
INVERSE = Parameter(name="return_inverse", type=Type.FLAG, default=False, help="also where each cell's value stands")
COUNTS = Parameter(name="return_counts", type=Type.FLAG, default=False, help="also how often each value occurs")

ROWS = (
    Whole(
        name="histogram",
        summary="how many valid cells fall into each bin, and the edges of the bins",
        parameters=(BINS, RANGE, DENSITY, NAN),
        outputs=("hist", "bin_edges"), accepts=NUMERIC - {boolean}, function=".wholes:histogram",
    ),
    Whole(
        name="histc",
        summary="how many valid cells fall into each of some equal parts of the range, in the cells' dtype; others are left out",
        parameters=(EQUAL_BINS, LOWEST, HIGHEST, NAN), outputs=("hist",), accepts=FLOATING, function=".wholes:histc",
    ),
    Whole(
        name="bincount",
        summary="how often each whole number from 0 occurs among the valid cells",
        parameters=(LENGTH, NAN), outputs=("counts",), accepts=INTEGRAL - {boolean}, function=".wholes:bincount",
    ),
    Whole(
        name="unique",
        summary="different values of the valid cells, in order, NaN being one",
        parameters=(SORTED, INVERSE, COUNTS, NAN),
        outputs=("values", "inverse", "counts"), accepts=NUMERIC | {u64}, function=".wholes:unique",
    ),
    Whole(
        name="cov",
        summary="covariances of the rows, each pair over the columns where both are valid",
        parameters=(CORRECTION, NAN),
        result=floated, function=".wholes:cov",
        vjp=".gradients_of_wholes:cov",
    ),
    Whole(
        name="corrcoef",
        summary="correlation coefficients of the rows, each pair over the columns where both are valid",
        parameters=(NAN,),
        result=floated, function=".wholes:corrcoef",
        vjp=".gradients_of_wholes:corrcoef",
    ),
)  # fmt: skip
