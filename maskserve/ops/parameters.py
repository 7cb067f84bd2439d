"""The parameters that rows share: what each may hold, and the words that explain it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any, Final

Params = Mapping[str, Any]
Number = int | float | bool


class Type(StrEnum):
    """What a parameter may hold; every front end translates these few words and nothing else."""

    DIMS = "dims"  # None, one dim or several, by number (or by name where the data has names)
    DIM = "dim"  # exactly one dim
    FLAG = "flag"
    COUNT = "count"  # an int >= 0
    NUMBER = "number"
    REAL = "real"  # a number, inf and -inf among them
    CELL = "cell"  # a number that the data's dtype can hold
    NUMBERS = "numbers"  # one number or several
    RANGE = "range"  # two numbers, the lower first
    MEETING = "meeting"  # how many dims of two tensors meet, or which ones of the first and of the second
    EQUATION = "equation"  # einsum's words
    WHOLE = "whole"  # a whole number, negative ones too
    SIZES = "sizes"  # one whole number or several
    DTYPE = "dtype"
    CHOICE = "choice"
    CHOICE_OR_NUMBER = "choice_or_number"
    WORD = "word"
    WORDS = "words"  # several, by repeating the option
    NAMES = "names"  # several names of an expression, with commas between
    PAIRS = "pairs"  # names of an expression and what they stand for: x=blk.0.w
    EXPRESSION = "expression"
    TENSOR = "tensor"  # in Python a tensor, in a request the name of one in the payload: a side input


REPEATED: Final = frozenset({Type.DIMS, Type.WORDS, Type.NUMBERS, Type.NAMES, Type.PAIRS})
"""A request may say these more than once."""


class Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = Required()


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """Where a number must lie."""

    least: float = -inf
    most: float = inf
    is_open: bool = False
    """Whether the least itself is too small."""

    def __contains__(self, value: float) -> bool:
        return (self.least < value if self.is_open else self.least <= value) and value <= self.most

    def __str__(self) -> str:
        if self.most < inf:
            return f"from {self.least:g} to {self.most:g}"
        return f"above {self.least:g}" if self.is_open else f"from {self.least:g} on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of an op; `help` is the command line's help and OpenAPI's text."""

    name: str
    type: Type
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    within: Within | None = None
    """Of a number: where it must lie."""
    sample: str = ""
    """What examples give it, where its type's sample says little."""
    keyword_only: bool = False
    python_only: bool = False
    """Kept for torch's signature; requests have a plainer word for it."""
    request_only: bool = False
    """Python says it in its own words."""
    verb: str = ""
    """The one verb that takes it, where the row's others do not."""


DIMS = Parameter(
    name="dim", type=Type.DIMS, help="dims to reduce, by number (in files also by name); all when not given"
)
DIM = Parameter(
    name="dim", type=Type.DIM, default=REQUIRED, help="the dim to work along, by number (in files also by name)"
)
KEEPDIM = Parameter(name="keepdim", type=Type.FLAG, default=False, help="keep each reduced dim with size 1")
DTYPE = Parameter(name="dtype", type=Type.DTYPE, help="dtype of the result, e.g. f64; torch's own rule when not given")
KEYWORD_DTYPE = Parameter(name="dtype", type=Type.DTYPE, keyword_only=True, help=DTYPE.help)
MIN_COUNT = Parameter(
    name="min_count", type=Type.COUNT, default=1, keyword_only=True,
    help="mask a result with fewer valid cells than this; 0 gives the op's identity for none",
)  # fmt: skip
EMPTY = Parameter(
    name="empty", type=Type.CHOICE_OR_NUMBER, default="mask", choices=("mask", "raise"), keyword_only=True,
    help="what a slice with too few valid cells gives: a masked result, an error, or this number",
)  # fmt: skip
NAN = Parameter(
    name="nan", type=Type.CHOICE, default="propagate", choices=("propagate", "omit", "raise"), keyword_only=True,
    help="what a valid NaN is: a value, a missing cell, or an error",
)  # fmt: skip
CORRECTION = Parameter(
    name="correction", type=Type.NUMBER, default=1, keyword_only=True,
    help="taken from the count in the divisor: 1 for a sample's variance, 0 for a population's",
)  # fmt: skip
UNBIASED = Parameter(
    name="unbiased",
    type=Type.FLAG,
    python_only=True,
    help="torch's older word: True is correction=1, False correction=0",
)
WEIGHTS = Parameter(
    name="weights", type=Type.TENSOR, keyword_only=True,
    help="what each cell counts for, aligned by dim names or broadcast; a masked weight masks its cell",
)  # fmt: skip
ORD = Parameter(name="ord", type=Type.REAL, default=2, help="order of the norm: any number, inf and -inf among them")
