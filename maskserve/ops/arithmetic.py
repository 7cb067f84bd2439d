"""What cells of an elementwise row are, in arithmetic that rounds each result once: whoever computes it has torch's bits.

Rows that are not here have bits of their own on each device (exp), or leave some to the machine (the sign of max(0, -0)). A
square root is rounded once on every device; on a CPU torch asks MKL, which need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from maskserve.dtypes import FLOATING, INTEGRAL, DType, boolean

WHOLE = INTEGRAL - {boolean}
NUMBERS = FLOATING | WHOLE


def is_power_of_two(number: float) -> bool:
    """Whether division by it is a product with its inverse, which is what torch computes on a device."""
    return (
        number != 0 and math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5 and 2**-100 < abs(number) < 2**100
    )


def is_two(number: float) -> bool:
    return number == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """`text` names operands in braces, and knows + - * & | ^, comparisons, and the words of triton_kernels/trees.py."""

    text: str
    of: frozenset[DType] = NUMBERS
    """The dtypes that it is computed in."""
    compares: bool = False
    """Its result is of bools, and it is computed in the operands' dtype, one for all; else in the result's."""
    only: Mapping[str, Callable[[float], bool]] = field(default_factory=lambda: MappingProxyType({}))
    """What operands must be where they are numbers."""
    numbers: frozenset[str] = frozenset()
    """The operands that are numbers, and no tensors."""
    conditions: frozenset[str] = frozenset()
    """The operands that are bools whatever it is computed in."""


def of_two(sign: str, dtypes: frozenset[DType] = NUMBERS) -> Arithmetic:
    return Arithmetic(text=f"{{input}} {sign} {{other}}", of=dtypes)


def comparison(sign: str) -> Arithmetic:
    return Arithmetic(text=f"{{input}} {sign} {{other}}", compares=True)


ADD, SUB, MUL = map(of_two, "+-*")
AND, OR, XOR = (of_two(sign, INTEGRAL) for sign in "&|^")
REVERSED = Arithmetic(text="{other} - {input}")
DIV = Arithmetic(text="divided({input}, {other})", of=FLOATING, only=MappingProxyType({"other": is_power_of_two}))
POW = Arithmetic(text="{input} * {input}", only=MappingProxyType({"exponent": is_two}), numbers=frozenset({"exponent"}))
NEG = Arithmetic(text="negated({input})")
NOT = Arithmetic(text="inverted({input})", of=INTEGRAL)
SAME = Arithmetic(text="{input}")
SIZE = Arithmetic(text="magnitude({input})", of=FLOATING)
ROOT = Arithmetic(text="root({input})", of=FLOATING)
SQUARE = Arithmetic(text="{input} * {input}")
LARGER = Arithmetic(text="larger({input}, {other})", of=WHOLE)
SMALLER = Arithmetic(text="smaller({input}, {other})", of=WHOLE)
IS_NAN = Arithmetic(text="{input} != {input}", of=FLOATING, compares=True)
WHERE = Arithmetic(
    text="chosen({condition}, {input}, {other})", of=FLOATING | INTEGRAL, conditions=frozenset({"condition"})
)
