"""Arithmetic that the passes share: halving, exact sums and products, exp and log as the native kernels compute them."""

from types import FunctionType

import triton
import triton.language as tl

from maskserve.backends import merges


def shared(step):
    """Lines that torch runs too, as a step of kernels; the interpreter looks for the language among its globals."""
    return triton.jit(FunctionType(step.__code__, globals(), step.__name__))


two_sum = shared(merges.two_sum)
carried = shared(merges.carried)
added_pairs = shared(merges.added_pairs)
shifted_mean = shared(merges.shifted_mean)

SCALE = tl.constexpr(128)
"""The binary exponent by which a float64 sum that overflows on the way is computed again."""
SCALE_DOWN = tl.constexpr(2.0**-128)
LIMB_VALUE = tl.constexpr(2.0**32)
SPLITTER = tl.constexpr(134217729.0)
EXPONENT = tl.constexpr(0x7FF)
ONE = tl.constexpr(1023)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def bits_of(x):
    """The bits of float64 cells."""
    return x.to(tl.int64, bitcast=True)


@triton.jit
def of_bits(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def nan_like(x):
    """NaN in every cell: a constant that is unlike itself would be a new one at each look."""
    return of_bits(tl.full(x.shape, 0x7FF8000000000000, tl.int64))


@triton.jit
def is_finite(x):
    return (x - x) == 0.0


@triton.jit
def finite_or_zero(x):
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def power_of_two(k):
    """2**k for -1022 <= k <= 1023."""
    return of_bits((k + ONE) << 52)


# -- tiles (groups, n, lanes), halved along n ---------------------------------------------------------------------


@triton.jit
def counted(keep):
    return tl.sum(keep.to(tl.int32), 1).to(tl.int64)


@triton.jit
def never(value):
    """No value lacks a number."""
    return tl.zeros(value.shape, tl.int1)


@triton.jit
def at_least_one(count):
    return tl.maximum(count, 1).to(tl.float64)


@triton.jit
def halves(x):
    """The first and the second half of a tile's cells."""
    cut = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2, x.shape[2]))
    return tl.split(tl.permute(cut, (0, 2, 3, 1)))


@triton.jit
def flat(x):
    """(groups, 1, lanes) as (groups, lanes)."""
    return tl.reshape(x, (x.shape[0], x.shape[2]))


@triton.jit
def spread(x):
    """(groups, lanes) as (groups, 1, lanes)."""
    return tl.expand_dims(x, 1)


@triton.jit
def halve(x):
    """The sum by halving: cell i absorbs cell i + h for h = n / 2, ..., 2, 1; -0 becomes +0."""
    if x.shape[1] == 1:
        return flat(x) + 0.0
    else:
        a, b = halves(x)
        return halve(a + b)


@triton.jit
def halve_pairs(high, low):
    """The sum as an unevaluated pair, by the same tree."""
    if high.shape[1] == 1:
        return flat(high) + 0.0, flat(low) + 0.0
    else:
        a, b = halves(high)
        a_low, b_low = halves(low)
        total, rest = added_pairs(a, a_low, b, b_low)
        return halve_pairs(total, rest)


@triton.jit
def halve_wrapped(x):
    """The integer product modulo 2**64."""
    if x.shape[1] == 1:
        return flat(x)
    else:
        a, b = halves(x)
        return halve_wrapped(a * b)


@triton.jit
def scaled_pair(cells):
    """The float64 sum of a leaf as (total + low) * 2**exponent."""
    total, low = halve_pairs(cells, tl.zeros_like(cells))
    lost = (is_finite(total) & is_finite(low)) == 0
    exponent = tl.zeros(total.shape, tl.int64)
    if tl.max(tl.max(lost.to(tl.int32), 1), 0) != 0:
        again, again_low = halve_pairs(cells * SCALE_DOWN, tl.zeros_like(cells))
        total = tl.where(lost, again, total)
        low = tl.where(lost, again_low, low)
        exponent = tl.where(lost, exponent + SCALE, exponent)
    return total, tl.where(is_finite(total), low, 0.0), exponent


# -- products -----------------------------------------------------------------------------------------------------


@triton.jit
def top_half(x):
    wide = SPLITTER * x
    return wide - (wide - x)


@triton.jit
def two_product(a, b):
    """(p, e) with p = fl(a * b) and p + e = a * b (Dekker); e is 0 where a half of a or b overflows."""
    product = a * b
    a_top = top_half(a)
    b_top = top_half(b)
    a_rest = a - a_top
    b_rest = b - b_top
    error = ((a_top * b_top - product) + a_top * b_rest + a_rest * b_top) + a_rest * b_rest
    return product, finite_or_zero(error)


@triton.jit
def times_pair(a, a_low, b, b_low):
    """(a + a_low) * (b + b_low) as a pair; mantissas are too small to overflow."""
    product, error = two_product(a, b)
    error = error + (a * b_low + a_low * b)
    total = product + error
    rest = error - (total - product)
    finite = is_finite(product)
    return tl.where(finite, total, product), tl.where(finite, rest, 0.0)


@triton.jit
def split_exponent(x):
    """(mantissa, exponent) with the mantissa in [1/2, 1); 0, inf and NaN are their own mantissas."""
    tiny = (bits_of(x) >> 52) & EXPONENT == 0
    bits = bits_of(tl.where(tiny, x * 18014398509481984.0, x))  # 2**54: subnormals become normal
    field = (bits >> 52) & EXPONENT
    plain = (x == 0.0) | (field == EXPONENT)
    mantissa = of_bits((bits & -9218868437227405313) | (1022 << 52))  # the exponent's bits replaced
    exponent = field - 1022 - tl.where(tiny, 54, 0)
    return tl.where(plain, x, mantissa), tl.where(plain, tl.zeros_like(exponent), exponent)


@triton.jit
def times_power(x, exponent):
    """x * 2**exponent, rounded once."""
    clamped = tl.minimum(tl.maximum(exponent, -2200), 2200)
    third = (clamped + 6600) // 3 - 2200  # rounded down: the operands of // are not negative
    return ((x * power_of_two(clamped - 2 * third)) * power_of_two(third)) * power_of_two(third)


@triton.jit
def multiplied(high, low, exponent, PAIRS: tl.constexpr, LEVEL: tl.constexpr):
    """The product of mantissas by halving, their powers of two taken out every few levels: (high, low, exponent)."""
    if high.shape[1] == 1:
        return flat(high), flat(low), flat(exponent)
    else:
        a, b = halves(high)
        e, f = halves(exponent)
        if PAIRS:
            a_low, b_low = halves(low)
            product, rest = times_pair(a, a_low, b, b_low)
        else:
            product = a * b
            rest = product
        total = e + f
        if LEVEL % 9 == 0:  # as many levels of mantissas of at least 1/2 stay far from float64's end
            product, rest, shift = normal(product, rest)
            total = total + shift
        return multiplied(product, rest, total, PAIRS, LEVEL + 1)


@triton.jit
def normal(high, low):
    """The pair with its mantissa in [1/2, 1), and the exponent that was taken out."""
    mantissa, shift = split_exponent(high)
    return mantissa, tl.where(is_finite(mantissa), times_power(low, -shift), 0.0), shift


@triton.jit
def settled(high, exponent):
    """Exponent 0 where the mantissa is 0, inf or NaN and has none."""
    return tl.where((high == 0.0) | (is_finite(high) == 0), tl.zeros_like(exponent), exponent)


# -- exp and log: the steps of native/elementary.hpp, so that no library decides about bits -----------------------

LOG2_E = tl.constexpr(float.fromhex("0x1.71547652b82fep0"))
LN2 = tl.constexpr(float.fromhex("0x1.62e42fefa39efp-1"))
LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e42feep-1"))
LN2_LOW = tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))
ROUND = tl.constexpr(float.fromhex("0x1.8p52"))
ROUND_BITS = tl.constexpr(0x4338000000000000)
LEAST_QUICK = tl.constexpr(-700.0)
ODD_0 = tl.constexpr(float.fromhex("0x1.ad202c3a3f01cp-26"))
ODD_1 = tl.constexpr(float.fromhex("0x1.71df55223be7dp-19"))
ODD_2 = tl.constexpr(float.fromhex("0x1.a01a011c37fe1p-13"))
ODD_3 = tl.constexpr(float.fromhex("0x1.111111112882cp-7"))
ODD_4 = tl.constexpr(float.fromhex("0x1.5555555555501p-3"))
EVEN_0 = tl.constexpr(float.fromhex("0x1.289f81b8b23ecp-22"))
EVEN_1 = tl.constexpr(float.fromhex("0x1.a019ab35a72e4p-16"))
EVEN_2 = tl.constexpr(float.fromhex("0x1.6c16c17cc0c0bp-10"))
EVEN_3 = tl.constexpr(float.fromhex("0x1.555555555320ep-5"))
QUICK_0 = tl.constexpr(float.fromhex("0x1.9f085a86b2c3ep-13"))
QUICK_1 = tl.constexpr(float.fromhex("0x1.6d8d525635662p-10"))
QUICK_2 = tl.constexpr(float.fromhex("0x1.1112714545ef4p-7"))
QUICK_3 = tl.constexpr(float.fromhex("0x1.55548d7480e7ep-5"))
QUICK_4 = tl.constexpr(float.fromhex("0x1.5555544292901p-3"))
QUICK_5 = tl.constexpr(float.fromhex("0x1.0000003a461d0p-1"))
LOG_ODD_0 = tl.constexpr(3.999999999940941908e-01)
LOG_ODD_1 = tl.constexpr(2.222219843214978396e-01)
LOG_ODD_2 = tl.constexpr(1.531383769920937332e-01)
LOG_EVEN_0 = tl.constexpr(6.666666666666735130e-01)
LOG_EVEN_1 = tl.constexpr(2.857142874366239149e-01)
LOG_EVEN_2 = tl.constexpr(1.818357216161805012e-01)
LOG_EVEN_3 = tl.constexpr(1.479819860511658591e-01)


@triton.jit
def series_of(r):
    """exp(r) - 1 - r for |r| <= ln(2) / 2."""
    square = r * r
    odd = ((ODD_0 * square + ODD_1) * square + ODD_2) * square + ODD_3
    even = ((EVEN_0 * square + EVEN_1) * square + EVEN_2) * square + EVEN_3
    odd = odd * square + ODD_4
    even = even * square + 0.5
    return (odd * r + even) * square


@triton.jit
def power_in(shifted):
    """2**k where k stands in the last bits of `shifted`."""
    return of_bits((bits_of(shifted) << 52) + (ONE << 52))


@triton.jit
def exponential(x):
    """exp(x), below 1 ulp, down to the subnormals."""
    clamped = tl.where(x < -800.0, -800.0, tl.where(x > 800.0, 800.0, x))
    shifted = clamped * LOG2_E + ROUND
    k = shifted - ROUND
    high = clamped - k * LN2_HIGH
    low = k * LN2_LOW
    r = high - low
    y = 1.0 + (r + (series_of(r) + ((high - r) - low)))
    biased = bits_of(shifted) - ROUND_BITS + 4096
    half = biased >> 1
    rest = biased - half
    return y * power_of_two(half - 2048) * power_of_two(rest - 2048)


@triton.jit
def quick_exponential(x):
    """exp(x) for x <= 0 to 2**-34, for what is rounded to float32 or less."""
    clamped = tl.where(x < LEAST_QUICK, LEAST_QUICK, x)
    shifted = clamped * LOG2_E + ROUND
    r = clamped - (shifted - ROUND) * LN2
    square = r * r
    high = QUICK_0 * r + QUICK_1
    middle = QUICK_2 * r + QUICK_3
    low = QUICK_4 * r + QUICK_5
    return (1.0 + (r + ((high * square + middle) * square + low) * square)) * power_in(shifted)


@triton.jit
def logarithm(x):
    """log(x) for x >= 0 (fdlibm's e_log.c)."""
    tiny = x < 2.2250738585072014e-308
    bits = bits_of(tl.where(tiny, x * 18014398509481984.0, x))
    shifted = bits - 0x3FE6A09E667F3BCD  # sqrt(1/2): the fraction is in [sqrt(1/2), sqrt(2))
    exponent = (shifted + (1024 << 52)) >> 52
    f = of_bits((shifted & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD) - 1.0
    k = (exponent - 1024).to(tl.float64) - tl.where(tiny, 54.0, 0.0)
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = w * (LOG_ODD_0 + w * (LOG_ODD_1 + w * LOG_ODD_2))
    even = z * (LOG_EVEN_0 + w * (LOG_EVEN_1 + w * (LOG_EVEN_2 + w * LOG_EVEN_3)))
    half_square = 0.5 * f * f
    value = k * LN2_HIGH + (f - (half_square - (s * (half_square + (odd + even)) + k * LN2_LOW)))
    end = tl.where(x == 0.0, -INFINITY, x)  # inf and NaN stay
    return tl.where((x > 0.0) & (x < INFINITY), value, end)
