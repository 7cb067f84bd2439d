"""Elementwise ops: the activation functions of torch.nn.functional."""

from __future__ import annotations

from maskserve.dtypes import COMPLEX, u8
from maskserve.ops.families import COUNTING, FLOATS, REAL
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import Elementwise

SLOPE = Parameter(name="negative_slope", type=Type.NUMBER, default=0.01, help="slope below 0")
ELU_ALPHA = Parameter(name="alpha", type=Type.NUMBER, default=1.0, help="the limit far below 0 is -alpha")
APPROXIMATE = Parameter(
    name="approximate", type=Type.CHOICE, default="none", choices=("none", "tanh"), keyword_only=True,
    help="by erf, or by tanh",
)  # fmt: skip
BETA = Parameter(name="beta", type=Type.NUMBER, default=1.0, help="sharpness at 0")
LINEAR = Parameter(name="threshold", type=Type.NUMBER, default=20.0, help="linear where beta * input exceeds this")
MIN_VAL = Parameter(name="min_val", type=Type.NUMBER, default=-1.0, help="smallest result")
MAX_VAL = Parameter(name="max_val", type=Type.NUMBER, default=1.0, help="largest result")
LAMBD = Parameter(name="lambd", type=Type.NUMBER, default=0.5, help="cells within lambd of 0 become 0")
THRESHOLD = Parameter(name="threshold", type=Type.NUMBER, default=REQUIRED, help="cells above this are kept")
VALUE = Parameter(name="value", type=Type.NUMBER, default=REQUIRED, help="what the others become")
EPS = Parameter(name="eps", type=Type.NUMBER, help="clamp to eps and 1 - eps first")

ROWS = (
    Elementwise(name="relu", summary="input, at least 0", accepts=COUNTING),
    Elementwise(name="relu6", summary="input, between 0 and 6", accepts=COUNTING),
    Elementwise(name="leaky_relu", summary="input, below 0 times negative_slope", parameters=(SLOPE,), accepts=FLOATS),
    Elementwise(name="elu", summary="input, below 0 alpha * (exp(input) - 1)", parameters=(ELU_ALPHA,), accepts=FLOATS),
    Elementwise(name="selu", summary="elu, scaled to keep mean 0 and variance 1", accepts=FLOATS),
    Elementwise(name="celu", summary="input, below 0 alpha * (exp(input / alpha) - 1)", parameters=(ELU_ALPHA,),
                accepts=FLOATS),
    Elementwise(name="gelu", summary="input times the normal distribution at input", parameters=(APPROXIMATE,),
                accepts=FLOATS),
    Elementwise(name="silu", summary="input * sigmoid(input)", accepts=FLOATS | COMPLEX),
    Elementwise(name="mish", summary="input * tanh(softplus(input))", accepts=FLOATS),
    Elementwise(name="softplus", summary="log(1 + exp(beta * input)) / beta", parameters=(BETA, LINEAR), accepts=FLOATS),
    Elementwise(name="softsign", summary="input / (1 + |input|)", accepts=COUNTING | COMPLEX),
    Elementwise(name="sigmoid", summary="1 / (1 + exp(-input))", torch=("expit",), accepts=REAL | COMPLEX),
    Elementwise(name="logsigmoid", summary="log(sigmoid(input))", accepts=FLOATS),
    Elementwise(name="logit", summary="log(input / (1 - input))", parameters=(EPS,), accepts=REAL),
    Elementwise(name="tanhshrink", summary="input - tanh(input)", accepts=COUNTING | COMPLEX),
    Elementwise(name="hardtanh", summary="input, between min_val and max_val", parameters=(MIN_VAL, MAX_VAL),
                accepts=COUNTING - {u8}),
    Elementwise(name="hardsigmoid", summary="input / 6 + 1 / 2, between 0 and 1", accepts=FLOATS),
    Elementwise(name="hardswish", summary="input * hardsigmoid(input)", accepts=FLOATS),
    Elementwise(name="hardshrink", summary="input, 0 within lambd of 0", parameters=(LAMBD,), accepts=FLOATS),
    Elementwise(name="softshrink", summary="input moved towards 0 by lambd", parameters=(LAMBD,), accepts=FLOATS),
    Elementwise(name="threshold", summary="input where it exceeds threshold, else value",
                parameters=(THRESHOLD, VALUE), accepts=COUNTING),
)  # fmt: skip
