"""Elementwise ops: one row each, the values torch's own, the masks ours. Arithmetic, comparisons, logic, bits and choice."""

from __future__ import annotations

from typing import Final

from maskserve.dtypes import COMPLEX, INTEGRAL, NUMERIC, and_stored, boolean, f32, f64, u64
from maskserve.ops import activations, mathematics, special
from maskserve.ops.parameters import Parameter, Type
from maskserve.ops.rows import OTHER, Beyond, Elementwise, MaskRule

ALPHA = Parameter(name="alpha", type=Type.NUMBER, default=1, keyword_only=True, help="factor of the second operand")
VALUE = Parameter(name="value", type=Type.NUMBER, default=1, keyword_only=True, help="factor of what is added")
ROUNDING = Parameter(
    name="rounding_mode", type=Type.CHOICE, choices=("trunc", "floor"), keyword_only=True,
    help="round the quotient towards 0 or down",
)  # fmt: skip
RTOL = Parameter(name="rtol", type=Type.NUMBER, default=1e-05, help="allowed distance, relative to other")
ATOL = Parameter(name="atol", type=Type.NUMBER, default=1e-08, help="allowed distance")
EQUAL_NAN = Parameter(name="equal_nan", type=Type.FLAG, default=False, help="whether two NaN are close")
NAN_TO = Parameter(name="nan", type=Type.NUMBER, default=0.0, help="what NaN becomes")
POSINF = Parameter(name="posinf", type=Type.NUMBER, help="what inf becomes; the largest finite number when not given")
NEGINF = Parameter(name="neginf", type=Type.NUMBER, help="what -inf becomes; the smallest finite number when not given")

TWO: Final = ("input", "other")

REAL = and_stored(NUMERIC)
ANY = REAL | COMPLEX
COUNTING = REAL - {boolean}
SIGNED = ANY - {boolean}
WHOLE = and_stored(INTEGRAL)
ORDERED = REAL | {u64}
EVERY = ANY | {u64}

ROWS = (
    Elementwise(name="add", summary="input + alpha * other", beyond=Beyond.TORCHS, operands=TWO, parameters=(ALPHA,),
                identity=(0, 0), operator="add", accepts=ANY),
    Elementwise(name="sub", summary="input - alpha * other", beyond=Beyond.TORCHS, operands=TWO, parameters=(ALPHA,),
                identity=(None, 0), operator="sub", torch=("subtract",), accepts=SIGNED),
    Elementwise(name="rsub", summary="other - alpha * input", beyond=Beyond.TORCHS, operands=TWO, parameters=(ALPHA,),
                identity=(0, None), torch=("__rsub__",), accepts=SIGNED),
    Elementwise(name="mul", summary="input * other", beyond=Beyond.TORCHS, operands=TWO, identity=(1, 1),
                operator="mul", torch=("multiply",), accepts=ANY),
    Elementwise(name="div", summary="input / other", beyond=Beyond.TORCHS, function=".elementwise:div", operands=TWO,
                parameters=(ROUNDING,), identity=(None, 1), operator="truediv", torch=("divide", "true_divide"),
                unsafe=True, accepts=ANY),
    Elementwise(name="floor_divide", summary="input / other, rounded down", operands=TWO, identity=(None, 1),
                operator="floordiv", torch=("__floordiv__",), unsafe=True, accepts=REAL),
    Elementwise(name="remainder", summary="input modulo other, with other's sign", operands=TWO, operator="mod",
                unsafe=True, accepts=REAL),
    Elementwise(name="fmod", summary="input modulo other, with input's sign", operands=TWO, unsafe=True, accepts=REAL),
    Elementwise(name="pow", summary="input to the power exponent", operands=("input", "exponent"), identity=(None, 1),
                operator="pow", torch=("__pow__",), unsafe=True, accepts=ANY),
    Elementwise(name="float_power", summary="input to the power exponent, in f64", beyond=Beyond.TORCHS,
                operands=("input", "exponent"), identity=(None, 1), accepts=ANY),
    Elementwise(name="neg", summary="-input", operator="neg", torch=("negative",), accepts=SIGNED),
    Elementwise(name="positive", summary="+input", operator="pos", accepts=SIGNED),
    Elementwise(name="abs", summary="absolute value; an error for the smallest int, which has none",
                function=".elementwise:checked_abs", operator="abs", torch=("absolute",), unsafe=True, accepts=ANY),
    Elementwise(name="square", summary="input * input", accepts=ANY),
    Elementwise(name="reciprocal", summary="1 / input", accepts=ANY),
    Elementwise(name="maximum", summary="the larger of two cells, NaN where one is", operands=TWO, tensors_only=True,
                identity=(OTHER, OTHER), accepts=ORDERED),
    Elementwise(name="minimum", summary="the smaller of two cells, NaN where one is", operands=TWO, tensors_only=True,
                identity=(OTHER, OTHER), accepts=ORDERED),
    Elementwise(name="fmax", summary="the larger of two cells, the other one where one is NaN", operands=TWO,
                tensors_only=True, identity=(OTHER, OTHER), accepts=REAL),
    Elementwise(name="fmin", summary="the smaller of two cells, the other one where one is NaN", operands=TWO,
                tensors_only=True, identity=(OTHER, OTHER), accepts=REAL),
    Elementwise(name="clamp", summary="input, at least min and at most max", operands=("input", "min", "max"),
                n_optional=2, function=".elementwise:clamp", torch=("clip",), identity=(None, OTHER, OTHER),
                accepts=REAL),
    Elementwise(name="clamp_min", summary="input, at least min", operands=("input", "min"), identity=(None, OTHER),
                accepts=REAL),
    Elementwise(name="clamp_max", summary="input, at most max", operands=("input", "max"), identity=(None, OTHER),
                accepts=REAL),
    Elementwise(name="lerp", summary="input + weight * (end - input)", operands=("input", "end", "weight"),
                accepts=mathematics.FLOATS | COMPLEX),
    Elementwise(name="addcmul", summary="input + value * tensor1 * tensor2", operands=("input", "tensor1", "tensor2"),
                parameters=(VALUE,), identity=(0, None, None), tensors_only=True, accepts=ANY),
    Elementwise(name="addcdiv", summary="input + value * tensor1 / tensor2", operands=("input", "tensor1", "tensor2"),
                parameters=(VALUE,), identity=(0, None, None), tensors_only=True, accepts=ANY),
    Elementwise(name="gcd", summary="greatest common divisor", operands=TWO, tensors_only=True, identity=(0, 0),
                accepts=WHOLE),
    Elementwise(name="lcm", summary="least common multiple", function=".elementwise:lcm", operands=TWO,
                tensors_only=True, identity=(1, 1), accepts=WHOLE),
    Elementwise(name="heaviside", summary="0 below 0, 1 above, values at 0", operands=("input", "values"),
                tensors_only=True, accepts=REAL),
    Elementwise(name="eq", summary="input == other", beyond=Beyond.EXACT, operands=TWO, operator="eq", accepts=EVERY),
    Elementwise(name="ne", summary="input != other", beyond=Beyond.EXACT, operands=TWO, operator="ne",
                torch=("not_equal",), accepts=EVERY),
    Elementwise(name="lt", summary="input < other", beyond=Beyond.EXACT, operands=TWO, operator="lt", torch=("less",),
                accepts=ORDERED),
    Elementwise(name="le", summary="input <= other", beyond=Beyond.EXACT, operands=TWO, operator="le",
                torch=("less_equal",), accepts=ORDERED),
    Elementwise(name="gt", summary="input > other", beyond=Beyond.EXACT, operands=TWO, operator="gt",
                torch=("greater",), accepts=ORDERED),
    Elementwise(name="ge", summary="input >= other", beyond=Beyond.EXACT, operands=TWO, operator="ge",
                torch=("greater_equal",), accepts=ORDERED),
    Elementwise(name="isclose", summary="whether the cells are within atol + rtol * |other|", operands=TWO,
                parameters=(RTOL, ATOL, EQUAL_NAN), tensors_only=True, accepts=ANY),
    Elementwise(name="isnan", summary="whether the cell is NaN", accepts=ANY),
    Elementwise(name="isinf", summary="whether the cell is inf or -inf", accepts=ANY),
    Elementwise(name="isfinite", summary="whether the cell is neither infinite nor NaN", accepts=ANY),
    Elementwise(name="isposinf", summary="whether the cell is inf", accepts=REAL),
    Elementwise(name="isneginf", summary="whether the cell is -inf", accepts=REAL),
    Elementwise(name="isreal", summary="whether the cell has no imaginary part", accepts=ANY),
    Elementwise(name="nan_to_num", summary="input, with NaN and infinities replaced by numbers",
                parameters=(NAN_TO, POSINF, NEGINF), accepts=ANY),
    Elementwise(name="logical_and", summary="both nonzero", operands=TWO, tensors_only=True, identity=(1, 1), accepts=ANY),
    Elementwise(name="logical_or", summary="either nonzero", operands=TWO, tensors_only=True, identity=(0, 0), accepts=ANY),
    Elementwise(name="logical_xor", summary="one of the two nonzero", operands=TWO, tensors_only=True, identity=(0, 0),
                accepts=ANY),
    Elementwise(name="logical_not", summary="whether the cell is 0", accepts=ANY),
    Elementwise(name="bitwise_and", summary="input & other", beyond=Beyond.TORCHS, operands=TWO, operator="and",
                torch=("__and__", "__rand__"), identity=(OTHER, OTHER), accepts=WHOLE),
    Elementwise(name="bitwise_or", summary="input | other", beyond=Beyond.TORCHS, operands=TWO, operator="or",
                torch=("__or__", "__ror__"), identity=(0, 0), accepts=WHOLE),
    Elementwise(name="bitwise_xor", summary="input ^ other", beyond=Beyond.TORCHS, operands=TWO, operator="xor",
                torch=("__xor__", "__rxor__"), identity=(0, 0), accepts=WHOLE),
    Elementwise(name="bitwise_not", summary="~input", operator="invert", torch=("__invert__",), accepts=WHOLE),
    Elementwise(name="bitwise_left_shift", summary="input << other", operands=TWO, operator="lshift",
                torch=("__lshift__",), identity=(None, 0), accepts=WHOLE),
    Elementwise(name="bitwise_right_shift", summary="input >> other", operands=TWO, operator="rshift",
                torch=("__rshift__",), identity=(None, 0), accepts=WHOLE),
    Elementwise(name="where", summary="input where condition, else other; validity from the chosen branch",
                operands=("condition", "input", "other"), rule=MaskRule.CHOSEN, method=(1, 0, 2), as_stored=True,
                accepts=EVERY),
    Elementwise(name="angle", summary="angle of a complex cell; 0 or pi of a real one", accepts=ANY),
    Elementwise(name="conj_physical", summary="complex conjugate, in memory of its own", accepts=ANY),
    Elementwise(name="complex", summary="real + i * imag", operands=("real", "imag"), tensors_only=True,
                accepts=and_stored(frozenset({f32, f64}))),
    Elementwise(name="polar", summary="abs * (cos angle + i * sin angle)", operands=("abs", "angle"),
                tensors_only=True, accepts=and_stored(frozenset({f32, f64}))),
    *mathematics.ROWS,
    *activations.ROWS,
    *special.ROWS,
)  # fmt: skip
