"""Elementwise ops: one row each, the values torch's own, the masks ours."""

from __future__ import annotations

from maskserve.dtypes import INTEGRAL, NUMERIC, boolean
from maskserve.ops.rows import Elementwise, MaskRule, Parameter, Type

ALPHA = Parameter(name="alpha", type=Type.NUMBER, default=1, keyword_only=True, help="factor of the second operand")
ROUNDING = Parameter(
    name="rounding_mode", type=Type.CHOICE, choices=("trunc", "floor"), keyword_only=True,
    help="round the quotient towards 0 or down",
)  # fmt: skip
TWO = ("input", "other")

ROWS = (
    Elementwise(name="add", summary="input + alpha * other", operands=TWO, function="add", parameters=(ALPHA,),
                identity=(0, 0), operator="add"),
    Elementwise(name="sub", summary="input - alpha * other", operands=TWO, function="sub", parameters=(ALPHA,),
                identity=(None, 0), operator="sub", torch=("subtract",)),
    Elementwise(name="mul", summary="input * other", operands=TWO, function="mul", identity=(1, 1), operator="mul",
                torch=("multiply",)),
    Elementwise(name="div", summary="input / other", operands=TWO, function="div", parameters=(ROUNDING,),
                identity=(None, 1), operator="truediv", torch=("divide", "true_divide"), unsafe=True),
    Elementwise(name="floor_divide", summary="input / other, rounded down", operands=TWO, function="floor_divide",
                identity=(None, 1), operator="floordiv", torch=("__floordiv__",), unsafe=True),
    Elementwise(name="remainder", summary="input modulo other, with other's sign", operands=TWO, function="remainder",
                operator="mod", unsafe=True),
    Elementwise(name="pow", summary="input to the power exponent", operands=("input", "exponent"), function="pow",
                identity=(None, 1), operator="pow", torch=("__pow__",), unsafe=True),
    Elementwise(name="maximum", summary="the larger of two cells", operands=TWO, function="maximum", tensors_only=True),
    Elementwise(name="minimum", summary="the smaller of two cells", operands=TWO, function="minimum", tensors_only=True),
    Elementwise(name="eq", summary="input == other", operands=TWO, function="eq", operator="eq"),
    Elementwise(name="ne", summary="input != other", operands=TWO, function="ne", operator="ne", torch=("not_equal",)),
    Elementwise(name="lt", summary="input < other", operands=TWO, function="lt", operator="lt", torch=("less",)),
    Elementwise(name="le", summary="input <= other", operands=TWO, function="le", operator="le", torch=("less_equal",)),
    Elementwise(name="gt", summary="input > other", operands=TWO, function="gt", operator="gt", torch=("greater",)),
    Elementwise(name="ge", summary="input >= other", operands=TWO, function="ge", operator="ge",
                torch=("greater_equal",)),
    Elementwise(name="logical_and", summary="both nonzero", operands=TWO, function="logical_and",
                tensors_only=True, identity=(1, 1)),
    Elementwise(name="logical_or", summary="either nonzero", operands=TWO, function="logical_or",
                tensors_only=True, identity=(0, 0)),
    Elementwise(name="logical_xor", summary="one of the two nonzero", operands=TWO, function="logical_xor", tensors_only=True,
                identity=(0, 0)),
    Elementwise(name="logical_not", summary="whether the cell is 0", function="logical_not"),
    Elementwise(name="bitwise_and", summary="input & other", operands=TWO, function="bitwise_and", operator="and",
                torch=("__and__", "__rand__"), accepts=INTEGRAL),
    Elementwise(name="bitwise_or", summary="input | other", operands=TWO, function="bitwise_or", operator="or",
                torch=("__or__", "__ror__"), accepts=INTEGRAL, identity=(0, 0)),
    Elementwise(name="bitwise_xor", summary="input ^ other", operands=TWO, function="bitwise_xor", operator="xor",
                torch=("__xor__", "__rxor__"), accepts=INTEGRAL, identity=(0, 0)),
    Elementwise(name="bitwise_not", summary="~input", function="bitwise_not", operator="invert", accepts=INTEGRAL),
    Elementwise(name="where", summary="input where condition, else other; validity from the chosen branch",
                operands=("condition", "input", "other"), function="where", rule=MaskRule.CHOSEN, method=(1, 0, 2)),
    Elementwise(name="neg", summary="-input", function="neg", operator="neg", torch=("negative",),
                accepts=NUMERIC - {boolean}),
    Elementwise(name="abs", summary="absolute value; an error for the smallest int, which has none",
                function=".elementwise:checked_abs", operator="abs", torch=("absolute",), unsafe=True),
    Elementwise(name="exp", summary="e to the power input", function="exp"),
    Elementwise(name="log", summary="natural logarithm", function="log"),
    Elementwise(name="sqrt", summary="square root", function="sqrt"),
)  # fmt: skip

