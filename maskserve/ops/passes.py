"""The passes that rows are made of: the names and dtypes of their parts. Several rows share one pass."""

from __future__ import annotations

from maskserve.dtypes import DType, f64, i64
from maskserve.ops.rows import Part, Pass

COUNT_PART = Part(name="count", dtype=i64)


def total_parts(dtype: DType) -> tuple[Part, ...]:
    """Floats up to 32 bits: one f64. f64: a pair and its binary exponent. Integers: two exact limbs."""
    if dtype.is_integral:
        return (COUNT_PART, Part(name="high", dtype=i64), Part(name="low", dtype=i64))
    if dtype is f64:
        return (
            COUNT_PART,
            Part(name="total", dtype=f64),
            Part(name="low", dtype=f64),
            Part(name="exponent", dtype=i64),
        )
    return (COUNT_PART, Part(name="total", dtype=f64))


def product_parts(dtype: DType) -> tuple[Part, ...]:
    """(high + low) * 2**exponent; for integers also the product modulo 2**64."""
    wrapped = (Part(name="wrapped", dtype=i64),) if dtype.is_integral else ()
    return (
        COUNT_PART,
        Part(name="high", dtype=f64),
        Part(name="low", dtype=f64),
        Part(name="exponent", dtype=i64),
        *wrapped,
    )


COUNT = Pass(name="count", parts=lambda _: (COUNT_PART,), reference=".reductions:Count", reads_cells=False)
TOTAL = Pass(name="total", parts=total_parts, reference=".reductions:Total")
MOMENTS = Pass(
    name="moments",
    parts=lambda _: (COUNT_PART, Part(name="mean", dtype=f64), Part(name="low", dtype=f64), Part(name="m2", dtype=f64)),
    reference=".reductions:Moments",
)
LARGEST = Pass(
    name="largest", parts=lambda d: (COUNT_PART, Part(name="best", dtype=d)), reference=".reductions:Largest"
)
SMALLEST = Pass(
    name="smallest", parts=lambda d: (COUNT_PART, Part(name="best", dtype=d)), reference=".reductions:Smallest"
)
FIRST_LARGEST = Pass(
    name="first_largest",
    parts=lambda d: (COUNT_PART, Part(name="best", dtype=d), Part(name="at", dtype=i64)),
    reference=".reductions:FirstLargest",
)
FIRST_SMALLEST = Pass(
    name="first_smallest",
    parts=lambda d: (COUNT_PART, Part(name="best", dtype=d), Part(name="at", dtype=i64)),
    reference=".reductions:FirstSmallest",
)
TRUTHS = Pass(
    name="truths", parts=lambda _: (COUNT_PART, Part(name="trues", dtype=i64)), reference=".reductions:Truths"
)
EXPONENTIALS = Pass(
    name="exponentials",
    parts=lambda _: (COUNT_PART, Part(name="max", dtype=f64), Part(name="total", dtype=f64)),
    reference=".reductions:Exponentials",
    exact_bits=False,
)
PRODUCT = Pass(name="product", parts=product_parts, reference=".products:Product")
POWERS = Pass(
    name="powers",
    parts=lambda _: (
        COUNT_PART, Part(name="total", dtype=f64), Part(name="low", dtype=f64),
        Part(name="scale", dtype=f64), Part(name="ord", dtype=f64),
    ),
    reference=".norms:Powers",
)  # fmt: skip
FIRST = Pass(name="first", parts=lambda d: (COUNT_PART, Part(name="best", dtype=d)), reference=".places:First")
LAST = Pass(name="last", parts=lambda d: (COUNT_PART, Part(name="best", dtype=d)), reference=".places:Last")
EXTENT = Pass(
    name="extent",
    parts=lambda d: (COUNT_PART, Part(name="low", dtype=d), Part(name="high", dtype=d)),
    reference=".places:Extent",
)
WEIGHT_PARTS = (COUNT_PART, Part(name="weight", dtype=f64))
WEIGHTED_TOTAL = Pass(
    name="weighted_total",
    parts=lambda _: (
        *WEIGHT_PARTS, Part(name="weight_low", dtype=f64),
        Part(name="total", dtype=f64), Part(name="low", dtype=f64), Part(name="exponent", dtype=i64),
    ),
    reference=".weighted:WeightedTotal",
)  # fmt: skip
WEIGHTED_MOMENTS = Pass(
    name="weighted_moments",
    parts=lambda _: (
        *WEIGHT_PARTS, Part(name="mean", dtype=f64), Part(name="low", dtype=f64), Part(name="m2", dtype=f64)
    ),
    reference=".weighted:WeightedMoments",
)  # fmt: skip
