"""Elementwise ops: powers and logarithms, angles, rounding and signs."""

from __future__ import annotations

from maskserve.ops.arithmetic import ROOT
from maskserve.ops.families import ANY, COUNTING, FLOATS, REAL, TWO
from maskserve.ops.parameters import Parameter, Type
from maskserve.ops.rows import Beyond, Elementwise

DECIMALS = Parameter(
    name="decimals", type=Type.NUMBER, default=0, keyword_only=True, help="digits after the point; floats only"
)

ROWS = (
    Elementwise(name="exp", summary="e to the power input", accepts=ANY),
    Elementwise(name="exp2", summary="2 to the power input", accepts=ANY),
    Elementwise(name="expm1", summary="exp(input) - 1, exact near 0", accepts=ANY),
    Elementwise(name="log", summary="natural logarithm", accepts=ANY),
    Elementwise(name="log2", summary="logarithm to base 2", accepts=ANY),
    Elementwise(name="log10", summary="logarithm to base 10", accepts=ANY),
    Elementwise(name="log1p", summary="log(1 + input), exact near 0", accepts=ANY),
    Elementwise(name="logaddexp", summary="log(exp(input) + exp(other))", operands=TWO, tensors_only=True,
                identity=(float("-inf"), float("-inf")), accepts=ANY),
    Elementwise(name="logaddexp2", summary="log2(2**input + 2**other)", operands=TWO, tensors_only=True,
                identity=(float("-inf"), float("-inf")), accepts=REAL),
    Elementwise(name="sqrt", summary="square root", arithmetic=ROOT, accepts=ANY),
    Elementwise(name="rsqrt", summary="1 / square root", accepts=ANY),
    Elementwise(name="hypot", summary="sqrt(input**2 + other**2)", operands=TWO, tensors_only=True, identity=(0, 0),
                accepts=REAL),
    Elementwise(name="sin", summary="sine", accepts=ANY),
    Elementwise(name="cos", summary="cosine", accepts=ANY),
    Elementwise(name="tan", summary="tangent", accepts=ANY),
    Elementwise(name="asin", summary="inverse sine", torch=("arcsin",), accepts=ANY),
    Elementwise(name="acos", summary="inverse cosine", torch=("arccos",), accepts=ANY),
    Elementwise(name="atan", summary="inverse tangent", torch=("arctan",), accepts=ANY),
    Elementwise(name="atan2", summary="angle of the point (other, input)", operands=TWO, torch=("arctan2",),
                tensors_only=True, accepts=REAL),
    Elementwise(name="sinh", summary="hyperbolic sine", accepts=ANY),
    Elementwise(name="cosh", summary="hyperbolic cosine", accepts=ANY),
    Elementwise(name="tanh", summary="hyperbolic tangent", accepts=ANY),
    Elementwise(name="asinh", summary="inverse hyperbolic sine", torch=("arcsinh",), accepts=ANY),
    Elementwise(name="acosh", summary="inverse hyperbolic cosine", torch=("arccosh",), accepts=ANY),
    Elementwise(name="atanh", summary="inverse hyperbolic tangent", torch=("arctanh",), accepts=ANY),
    Elementwise(name="sinc", summary="sin(pi * input) / (pi * input), 1 at 0", accepts=ANY),
    Elementwise(name="deg2rad", summary="degrees as radians", accepts=REAL),
    Elementwise(name="rad2deg", summary="radians as degrees", accepts=REAL),
    Elementwise(name="sign", summary="-1, 0 or 1", accepts=REAL),
    Elementwise(name="sgn", summary="sign; of a complex cell input / |input|", accepts=ANY),
    Elementwise(name="signbit", summary="whether the sign bit is set, as in -0.0", accepts=REAL),
    Elementwise(name="copysign", summary="input with the sign of other", beyond=Beyond.TORCHS, operands=TWO, accepts=REAL),
    Elementwise(name="floor", summary="rounded down", accepts=COUNTING),
    Elementwise(name="ceil", summary="rounded up", accepts=COUNTING),
    Elementwise(name="round", summary="rounded to decimals, halves to even", parameters=(DECIMALS,), accepts=COUNTING),
    Elementwise(name="trunc", summary="rounded towards 0", torch=("fix",), accepts=COUNTING),
    Elementwise(name="frac", summary="input - trunc(input)", accepts=FLOATS),
    Elementwise(name="nextafter", summary="the number next to input towards other", operands=TWO, tensors_only=True,
                accepts=REAL),
    Elementwise(name="ldexp", summary="input * 2**other", operands=TWO, tensors_only=True, identity=(None, 0), accepts=ANY),
)  # fmt: skip
