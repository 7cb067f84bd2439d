"""Element types under our own names, so that rows, plans and payloads need no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from maskserve.errors import DtypeError, nearest


class Kind(StrEnum):
    """What the bits of an element mean."""

    FLOAT = "float"
    INT = "int"
    UINT = "uint"
    BOOL = "bool"
    COMPLEX = "complex"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DType:
    """One element type: `name` is ours and the command line's, `code` is safetensors', `torch` is torch's attribute."""

    name: str
    code: str
    torch: str
    n_bytes: int
    kind: Kind

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[object, ...]:
        return parse, (self.name,)  # one object a dtype, also after pickling: it is compared by identity

    @property
    def is_float(self) -> bool:
        return self.kind is Kind.FLOAT

    def holds(self, value: float) -> bool:
        """Whether a number is in this dtype's range, and whole where the dtype is.

        >>> u8.holds(-1), u8.holds(0.5), f16.holds(1e6), f16.holds(0.1), i64.holds(2**63 - 1)
        (False, False, False, True, True)
        """
        if self.kind in (Kind.FLOAT, Kind.COMPLEX):
            return value in INFINITIES or abs(value) <= _LARGEST[self.name]
        if value != value or value in INFINITIES or value != int(value):
            return False
        bits = 1 if self.kind is Kind.BOOL else 8 * self.n_bytes
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if self.kind is Kind.INT else (0, (1 << bits) - 1)
        return low <= value <= high

    @property
    def is_integral(self) -> bool:
        """Whether it is an integer or bool type, whose sums are exact."""
        return self.kind in (Kind.INT, Kind.UINT, Kind.BOOL)


INFINITIES = (math.inf, -math.inf)  # math.isinf raises for an int beyond float64

_LARGEST: Mapping[str, float] = MappingProxyType(
    {
        "f64": 1.7976931348623157e308,
        "f32": 3.4028234663852886e38,
        "bf16": 3.3895313892515355e38,
        "f16": 65504.0,
        "c64": 3.4028234663852886e38,
        "c128": 1.7976931348623157e308,
        "f8_e4m3": 448.0,
        "f8_e5m2": 57344.0,
    }
)

f64 = DType(name="f64", code="F64", torch="float64", n_bytes=8, kind=Kind.FLOAT)
f32 = DType(name="f32", code="F32", torch="float32", n_bytes=4, kind=Kind.FLOAT)
f16 = DType(name="f16", code="F16", torch="float16", n_bytes=2, kind=Kind.FLOAT)
bf16 = DType(name="bf16", code="BF16", torch="bfloat16", n_bytes=2, kind=Kind.FLOAT)
i64 = DType(name="i64", code="I64", torch="int64", n_bytes=8, kind=Kind.INT)
i32 = DType(name="i32", code="I32", torch="int32", n_bytes=4, kind=Kind.INT)
i16 = DType(name="i16", code="I16", torch="int16", n_bytes=2, kind=Kind.INT)
i8 = DType(name="i8", code="I8", torch="int8", n_bytes=1, kind=Kind.INT)
u64 = DType(name="u64", code="U64", torch="uint64", n_bytes=8, kind=Kind.UINT)
u32 = DType(name="u32", code="U32", torch="uint32", n_bytes=4, kind=Kind.UINT)
u16 = DType(name="u16", code="U16", torch="uint16", n_bytes=2, kind=Kind.UINT)
u8 = DType(name="u8", code="U8", torch="uint8", n_bytes=1, kind=Kind.UINT)
boolean = DType(name="bool", code="BOOL", torch="bool", n_bytes=1, kind=Kind.BOOL)
f8_e4m3 = DType(name="f8_e4m3", code="F8_E4M3", torch="float8_e4m3fn", n_bytes=1, kind=Kind.FLOAT)
f8_e5m2 = DType(name="f8_e5m2", code="F8_E5M2", torch="float8_e5m2", n_bytes=1, kind=Kind.FLOAT)
c128 = DType(name="c128", code="", torch="complex128", n_bytes=16, kind=Kind.COMPLEX)  # no payload holds it
c64 = DType(name="c64", code="C64", torch="complex64", n_bytes=8, kind=Kind.COMPLEX)

ALL: tuple[DType, ...] = (
    f64,
    f32,
    f16,
    bf16,
    i64,
    i32,
    i16,
    i8,
    u64,
    u32,
    u16,
    u8,
    boolean,
    f8_e4m3,
    f8_e5m2,
    c64,
    c128,
)
FLOATING = frozenset({f64, f32, f16, bf16})
INTEGRAL = frozenset({i64, i32, i16, i8, u8, boolean})
WIDENED: Mapping[DType, DType] = MappingProxyType({u16: i64, u32: i64, f8_e4m3: f32, f8_e5m2: f32})
"""What is stored narrow and computed wide: torch has no arithmetic of its own for these."""
COMPLEX = frozenset({c64, c128})
NUMERIC = FLOATING | INTEGRAL | frozenset(WIDENED)

WIDE: Mapping[DType, DType] = MappingProxyType({f8_e4m3: f32, f8_e5m2: f32, u16: i64, u32: i64})
"""Types that hold cells and have no arithmetic of their own, with the type that holds each of their values."""


def and_stored(computed: frozenset[DType]) -> frozenset[DType]:
    """`computed` and the types whose cells are computed there after widening.

    >>> sorted(d.name for d in and_stored(frozenset({f32})))
    ['f32', 'f8_e4m3', 'f8_e5m2']
    """
    return computed | {stored for stored, wide in WIDE.items() if wide in computed}


BY_CODE: Mapping[str, DType] = MappingProxyType({dtype.code: dtype for dtype in ALL if dtype.code})
BY_TORCH: Mapping[str, DType] = MappingProxyType({dtype.torch: dtype for dtype in ALL})
BY_NAME: Mapping[str, DType] = MappingProxyType({dtype.name: dtype for dtype in ALL})


def parse(word: str) -> DType:
    """The dtype that `word` spells in our way, torch's or safetensors'.

    >>> parse("f64"), parse("float32"), parse("BF16")
    (f64, f32, bf16)
    """
    lower = word.lower().removeprefix("torch.")
    found = BY_NAME.get(lower) or BY_TORCH.get(lower) or BY_CODE.get(word.upper())
    if found is None:
        raise DtypeError(
            f"dtype {word!r} is not known: give one of {', '.join(BY_NAME)}{nearest(lower, BY_NAME)}",
            parameter="dtype",
            allowed=BY_NAME,
        )
    return found
