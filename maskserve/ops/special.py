"""Elementwise ops: the functions of torch.special."""

from __future__ import annotations

from maskserve.dtypes import boolean
from maskserve.ops.families import REAL, TWO, WIDE
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import Beyond, Elementwise

P = Parameter(name="p", type=Type.COUNT, default=REQUIRED, help="number of dims of the gamma function")

ROWS = (
    Elementwise(name="erf", summary="error function", accepts=REAL),
    Elementwise(name="erfc", summary="1 - erf(input)", accepts=REAL),
    Elementwise(name="erfcx", summary="exp(input**2) * erfc(input)", accepts=WIDE),
    Elementwise(name="erfinv", summary="inverse of erf", accepts=REAL),
    Elementwise(name="ndtr", summary="normal distribution: the share below input", accepts=REAL),
    Elementwise(name="ndtri", summary="inverse of ndtr", accepts=WIDE),
    Elementwise(name="log_ndtr", summary="log of ndtr", accepts=WIDE),
    Elementwise(name="entr", summary="-input * log(input), 0 at 0, -inf below", accepts=REAL),
    Elementwise(name="xlogy", summary="input * log(other), 0 where input is 0", beyond=Beyond.TORCHS, operands=TWO,
                accepts=REAL),
    Elementwise(name="xlog1py", summary="input * log1p(other), 0 where input is 0", beyond=Beyond.TORCHS, operands=TWO,
                accepts=REAL),
    Elementwise(name="lgamma", summary="log of the absolute value of the gamma function", torch=("gammaln",), accepts=REAL),
    Elementwise(name="digamma", summary="derivative of the log of the gamma function", torch=("psi",), accepts=REAL),
    Elementwise(name="polygamma", summary="n-th derivative of digamma", operands=("n", "input"), method=(1, 0),
                function=".elementwise:polygamma", accepts=REAL),
    Elementwise(name="mvlgamma", summary="log of the multivariate gamma function", parameters=(P,),
                torch=("multigammaln",), accepts=REAL - {boolean}),
    Elementwise(name="gammainc", summary="lower incomplete gamma function, regularized", operands=TWO,
                tensors_only=True, torch=("igamma",), no_gradient_by=("input",),
                accepts=REAL),
    Elementwise(name="gammaincc", summary="upper incomplete gamma function, regularized", operands=TWO,
                tensors_only=True, torch=("igammac",), no_gradient_by=("input",),
                accepts=REAL),
    Elementwise(name="zeta", summary="Hurwitz zeta function", beyond=Beyond.TORCHS, operands=TWO,
                no_gradient_by=("input",), accepts=REAL),
    Elementwise(name="i0", summary="modified Bessel function of the first kind, order 0", accepts=REAL),
    Elementwise(name="i0e", summary="i0, scaled by exp(-|input|)", accepts=REAL),
    Elementwise(name="i1", summary="modified Bessel function of the first kind, order 1", accepts=REAL),
    Elementwise(name="i1e", summary="i1, scaled by exp(-|input|)", accepts=REAL),
    Elementwise(name="bessel_j0", summary="Bessel function of the first kind, order 0",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="bessel_j1", summary="Bessel function of the first kind, order 1",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="bessel_y0", summary="Bessel function of the second kind, order 0",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="bessel_y1", summary="Bessel function of the second kind, order 1",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="modified_bessel_i0", summary="i0, torch's other spelling",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="modified_bessel_i1", summary="i1, torch's other spelling",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="modified_bessel_k0", summary="modified Bessel function of the second kind, order 0",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="modified_bessel_k1", summary="modified Bessel function of the second kind, order 1",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="scaled_modified_bessel_k0", summary="modified_bessel_k0, scaled by exp(input)",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="scaled_modified_bessel_k1", summary="modified_bessel_k1, scaled by exp(input)",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="spherical_bessel_j0", summary="sin(input) / input, 1 at 0",
                is_differentiable=False, accepts=WIDE),
    Elementwise(name="airy_ai", summary="Airy function", is_differentiable=False, accepts=WIDE),
)  # fmt: skip
