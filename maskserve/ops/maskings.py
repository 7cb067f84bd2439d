"""Maskings: one row, whose parameters are the tests that mask cells and the masks that join them."""

from __future__ import annotations

from maskserve import dtypes
from maskserve.ops.parameters import Parameter, Type
from maskserve.ops.rows import Masking, Report


def _test(name: str, kind: Type, text: str, sample: str = "") -> Parameter:
    default = False if kind is Type.FLAG else None
    return Parameter(name=name, type=kind, help=text, default=default, keyword_only=True, sample=sample)


ALONG = Parameter(name="dim", type=Type.DIM, help="the dim to look along; default: all cells in their order, flat")

ROWS = (
    Masking(
        name="mask",
        summary="the same cells under a new mask: a valid cell stays valid unless a test masks it",
        parameters=(
            _test("equal", Type.NUMBERS, "mask cells that equal this number, or one of several, in the data's dtype", "0"),
            _test("inside", Type.RANGE, "mask cells from LO to HI, both included"),
            _test("outside", Type.RANGE, "mask cells below LO or above HI"),
            _test("valid_range", Type.RANGE, "keep cells from LO to HI alone: as outside, and NaN is masked too"),
            _test("less", Type.REAL, "mask cells less than this"),
            _test("greater", Type.REAL, "mask cells greater than this"),
            _test("is_nan", Type.FLAG, "mask NaN"),
            _test("is_inf", Type.FLAG, "mask infinities"),
            _test("is_invalid", Type.FLAG, "mask NaN and infinities"),
            Parameter(
                name="valid", type=Type.TENSOR, keyword_only=True, python_only=True,
                help="a bool tensor: mask cells where it is False",
            ),
            Parameter(
                name="and", type=Type.TENSOR, request_only=True,
                help="then mask cells that are masked in this tensor too: a BOOL tensor is a mask, of others the mask counts",
            ),
            Parameter(
                name="or", type=Type.TENSOR, request_only=True,
                help="then make cells valid that are valid in this tensor; what lay under them comes to light",
            ),
            Parameter(
                name="not", type=Type.FLAG, default=False, request_only=True,
                help="last, make masked cells valid and valid ones masked",
            ),
        ),
        accepts=dtypes.NUMERIC,
        function="maskserve.masking:new_mask",
        reports=(
            Report(
                name="clumps", choices=("valid", "masked"), parameters=(ALONG,), function="maskserve.runs:clumps",
                help="list the runs of valid, or of masked, cells; nothing is written",
            ),
            Report(
                name="edges", parameters=(ALONG,), function="maskserve.runs:edges",
                help="list the first and the last valid cell; nothing is written",
            ),
        ),
    ),
)  # fmt: skip
