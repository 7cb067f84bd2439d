"""What families of elementwise rows share: the dtypes that torch computes them in, and their operands."""

from __future__ import annotations

from typing import Final

from maskserve.dtypes import COMPLEX, FLOATING, INTEGRAL, NUMERIC, and_stored, boolean, f32, f64, u64

TWO: Final = ("input", "other")

REAL = and_stored(NUMERIC)
ANY = REAL | COMPLEX
COUNTING = REAL - {boolean}
SIGNED = ANY - {boolean}
FLOATS = and_stored(FLOATING)
WHOLE = and_stored(INTEGRAL)
WIDE = and_stored(INTEGRAL | {f64, f32})
ORDERED = REAL | {u64}
EVERY = ANY | {u64}
