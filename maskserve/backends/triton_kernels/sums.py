"""Counts, truths, sums, means and variances, with weights and without; what steps are is said in __init__.py."""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import (
    LIMB_VALUE,
    SCALE,
    SCALE_DOWN,
    added_pairs,
    at_least_one,
    carried,
    counted,
    halve,
    halve_pairs,
    is_finite,
    never,
    scaled_pair,
    shifted_mean,
    spread,
    times_power,
    two_product,
    two_sum,
)

LIMB = tl.constexpr(0xFFFFFFFF)
HALF = tl.constexpr(1 << 31)
HALF_SCALE_DOWN = tl.constexpr(2.0**-64)


# -- counts and truths --------------------------------------------------------------------------------------------


@triton.jit
def lift_count(x, keep, at, OPTION: tl.constexpr):
    return (counted(keep),)


@triton.jit
def merge_count(a, b):
    return (a[0] + b[0],)


@triton.jit
def finish_count(parts, OPTION: tl.constexpr):
    return parts[0], never(parts[0])


@triton.jit
def lift_truths(x, keep, at, OPTION: tl.constexpr):
    """OPTION: what false is."""
    return counted(keep), counted((x != OPTION) & keep)


@triton.jit
def merge_sums(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def finish_any(parts, OPTION: tl.constexpr):
    return parts[1] > 0, never(parts[1])


@triton.jit
def finish_all(parts, OPTION: tl.constexpr):
    return parts[1] == parts[0], never(parts[1])


# -- sums and means -----------------------------------------------------------------------------------------------


@triton.jit
def lift_sum(x, keep, at, OPTION: tl.constexpr):
    return counted(keep), halve(tl.where(keep, x, 0.0).to(tl.float64))


@triton.jit
def finish_sum(parts, OPTION: tl.constexpr):
    return parts[1], never(parts[1])


@triton.jit
def finish_mean(parts, OPTION: tl.constexpr):
    return parts[1] / at_least_one(parts[0]), never(parts[1])


@triton.jit
def limbs_of(x, keep):
    cells = tl.where(keep, x, 0)
    return carried(tl.sum(cells >> 32, 1), tl.sum(cells & LIMB, 1))


@triton.jit
def lift_limbs(x, keep, at, OPTION: tl.constexpr):
    high, low = limbs_of(x, keep)
    return counted(keep), high, low


@triton.jit
def merge_limbs(a, b):
    high, low = carried(a[1] + b[1], a[2] + b[2])
    return a[0] + b[0], high, low


@triton.jit
def rounded_limbs(high, low):
    return high.to(tl.float64) * LIMB_VALUE + low.to(tl.float64)


@triton.jit
def finish_sum_of_limbs(parts, OPTION: tl.constexpr):
    """OPTION: whether the result is a float."""
    if OPTION:
        return rounded_limbs(parts[1], parts[2]), never(parts[1])
    else:
        return (parts[1] << 32) + parts[2], (parts[1] < -HALF) | (parts[1] >= HALF)


@triton.jit
def finish_mean_of_limbs(parts, OPTION: tl.constexpr):
    return rounded_limbs(parts[1], parts[2]) / at_least_one(parts[0]), never(parts[1])


@triton.jit
def unsigned(parts):
    """The limbs of u64 cells, each of which is seen 2**63 less than it is."""
    return parts[0], parts[1] + (parts[0] << 31), parts[2]


@triton.jit
def finish_sum_of_unsigned(parts, OPTION: tl.constexpr):
    return finish_sum_of_limbs(unsigned(parts), OPTION)


@triton.jit
def finish_mean_of_unsigned(parts, OPTION: tl.constexpr):
    return finish_mean_of_limbs(unsigned(parts), OPTION)


@triton.jit
def lift_pair(x, keep, at, OPTION: tl.constexpr):
    total, low, exponent = scaled_pair(tl.where(keep, x, 0.0))
    return counted(keep), total, low, exponent


@triton.jit
def scaled_to(part, exponent, wanted):
    return tl.where(exponent < wanted, part * SCALE_DOWN, part)


@triton.jit
def added_to(a, b, exponent):
    return added_pairs(
        scaled_to(a[1], a[3], exponent),
        scaled_to(a[2], a[3], exponent),
        scaled_to(b[1], b[3], exponent),
        scaled_to(b[2], b[3], exponent),
    )


@triton.jit
def merge_pair(a, b):
    exponent = tl.maximum(a[3], b[3])
    total, low = added_to(a, b, exponent)
    lost = ((is_finite(total) & is_finite(low)) == 0) & (exponent == 0)
    exponent = tl.where(lost, exponent + SCALE, exponent)
    again, again_low = added_to(a, b, exponent)
    total = tl.where(lost, again, total)
    low = tl.where(lost, again_low, low)
    return a[0] + b[0], total, tl.where(is_finite(total), low, 0.0), exponent


@triton.jit
def finish_sum_of_pair(parts, OPTION: tl.constexpr):
    return times_power(parts[1] + parts[2], parts[3]), never(parts[1])


@triton.jit
def finish_mean_of_pair(parts, OPTION: tl.constexpr):
    """Divided before it is scaled: the mean of two 1.7e308 is 1.7e308."""
    return times_power((parts[1] + parts[2]) / at_least_one(parts[0]), parts[3]), never(parts[1])


# -- variances ----------------------------------------------------------------------------------------------------


@triton.jit
def moments_from(count, mean, deviation):
    error = halve(deviation)
    low = error / at_least_one(count)
    m2 = halve(deviation * deviation) - error * low
    return count, mean, low, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def lift_moments(x, keep, at, OPTION: tl.constexpr):
    count = counted(keep)
    cells = tl.where(keep, x, tl.zeros_like(x)).to(tl.float64)
    mean = halve(cells) / at_least_one(count)
    return moments_from(count, mean, tl.where(keep, cells - spread(mean), 0.0))


@triton.jit
def lift_moments_of_doubles(x, keep, at, OPTION: tl.constexpr):
    count = counted(keep)
    cells = tl.where(keep, x, 0.0)
    total, low, exponent = scaled_pair(cells)
    mean = times_power((total + low) / at_least_one(count), exponent)
    return moments_from(count, mean, tl.where(keep, cells - spread(mean), 0.0))


@triton.jit
def lift_moments_of_longs(x, keep, at, OPTION: tl.constexpr):
    """Deviations of int64 cells, exact where float64 cells would have lost the low bits."""
    count = counted(keep)
    high, low = limbs_of(x, keep)
    mean = rounded_limbs(high, low) / at_least_one(count)
    mean = tl.minimum(tl.maximum(mean, -9223372036854775808.0), 9223372036854774784.0)
    whole = mean.to(tl.int64)
    from_high = ((x >> 32) - spread(whole >> 32)).to(tl.float64) * LIMB_VALUE
    from_low = ((x & LIMB) - spread(whole & LIMB)).to(tl.float64)
    return moments_from(count, whole.to(tl.float64), tl.where(keep, from_high + from_low, 0.0))


@triton.jit
def merge_moments(a, b):
    count = a[0] + b[0]
    weight = b[0].to(tl.float64) / at_least_one(count)
    delta = (b[1] - a[1]) + (b[2] - a[2])
    mean, low, shift = shifted_mean(a[1], a[2], delta, weight)
    low = tl.where(is_finite(mean), low, 0.0)
    m2 = (a[3] + b[3]) + delta * shift * a[0].to(tl.float64)
    no_a = a[0] == 0
    no_b = b[0] == 0
    mean = tl.where(no_a, b[1], tl.where(no_b, a[1], mean))
    low = tl.where(no_a, b[2], tl.where(no_b, a[2], low))
    return count, mean, low, tl.where(no_a, b[3], tl.where(no_b, a[3], m2))


@triton.jit
def finish_var(parts, OPTION: tl.constexpr):
    """OPTION: the correction."""
    divisor = parts[0].to(tl.float64) - OPTION
    return parts[3] / tl.where(divisor > 0.0, divisor, 1.0), never(parts[0])


@triton.jit
def finish_std(parts, OPTION: tl.constexpr):
    value, lacks = finish_var(parts, OPTION)
    return tl.sqrt(value), lacks


# -- with weights: x is (cells, weights), both as float64; OPTION: whether sums are pairs, and no product is rounded ----


@triton.jit
def pair_sum(cells, PAIRS: tl.constexpr):
    if PAIRS:
        high, low = halve_pairs(cells, tl.zeros_like(cells))
        return high, tl.where(is_finite(high), low, 0.0)
    else:
        total = halve(cells)
        return total, tl.zeros_like(total)


@triton.jit
def pair_of_products(a, b, PAIRS: tl.constexpr):
    if PAIRS:
        product, error = two_product(a, b)
        total, low = pair_sum(product, True)
        return total, tl.where(is_finite(total), low + halve(error), 0.0)
    else:
        return pair_sum(a * b, False)


@triton.jit
def lift_weighted_total(x, keep, at, OPTION: tl.constexpr):
    cells = tl.where(keep, x[0], 0.0)
    own = tl.where(keep, x[1], 0.0)
    weight, weight_low = pair_sum(own, True)
    total, low = pair_of_products(cells, own, OPTION)
    lost = is_finite(total) == 0
    exponent = tl.zeros(total.shape, tl.int64)
    if tl.max(tl.max(lost.to(tl.int32), 1), 0) != 0:
        again, again_low = pair_of_products(cells * HALF_SCALE_DOWN, own * HALF_SCALE_DOWN, OPTION)
        total = tl.where(lost, again, total)
        low = tl.where(lost, again_low, low)
        exponent = tl.where(lost, exponent + SCALE, exponent)
    return counted(keep), weight, weight_low, total, low, exponent


@triton.jit
def merge_weighted_total(a, b):
    weight, error = two_sum(a[1], b[1])
    weight_low = tl.where(is_finite(weight), (a[2] + b[2]) + error, 0.0)
    count, total, low, exponent = merge_pair((a[0], a[3], a[4], a[5]), (b[0], b[3], b[4], b[5]))
    return count, weight, weight_low, total, low, exponent


@triton.jit
def nonzero(weight):
    """The weight, or 1 where it is 0 and the result is masked."""
    return tl.where(weight == 0.0, 1.0, weight)


@triton.jit
def finish_weighted_sum(parts, OPTION: tl.constexpr):
    return times_power(parts[3] + parts[4], parts[5]), never(parts[1])


@triton.jit
def finish_weighted_mean(parts, OPTION: tl.constexpr):
    return times_power((parts[3] + parts[4]) / nonzero(parts[1] + parts[2]), parts[5]), never(parts[1])


@triton.jit
def settled_sum(cells, PAIRS: tl.constexpr):
    high, low = pair_sum(cells, PAIRS)
    return high + low


@triton.jit
def lift_weighted_moments(x, keep, at, OPTION: tl.constexpr):
    cells = tl.where(keep, x[0], 0.0)
    own = tl.where(keep, x[1], 0.0)
    weight = settled_sum(own, OPTION)
    mean = settled_sum(cells * own, OPTION) / nonzero(weight)
    deviation = tl.where(keep, cells - spread(mean), 0.0)
    error = settled_sum(deviation * own, OPTION)
    low = error / nonzero(weight)
    m2 = settled_sum(deviation * deviation * own, OPTION) - error * low
    return counted(keep), weight, mean, low, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def merge_weighted_moments(a, b):
    weight = a[1] + b[1]
    share = b[1] / nonzero(weight)
    delta = (b[2] - a[2]) + (b[3] - a[3])
    mean, low, _ = shifted_mean(a[2], a[3], delta, share)
    low = tl.where(is_finite(mean), low, 0.0)
    m2 = (a[4] + b[4]) + delta * delta * share * a[1]
    no_a = (a[1] == 0.0) & (a[2] == a[2])  # what weighs nothing changes nothing, but for a NaN
    no_b = (b[1] == 0.0) & (b[2] == b[2])
    weight = tl.where(no_a, b[1], tl.where(no_b, a[1], weight))
    mean = tl.where(no_a, b[2], tl.where(no_b, a[2], mean))
    low = tl.where(no_a, b[3], tl.where(no_b, a[3], low))
    return a[0] + b[0], weight, mean, low, tl.where(no_a, b[4], tl.where(no_b, a[4], m2))


@triton.jit
def finish_weighted_var(parts, OPTION: tl.constexpr):
    return parts[4] / nonzero(parts[1]), never(parts[0])


@triton.jit
def finish_weighted_std(parts, OPTION: tl.constexpr):
    value, lacks = finish_weighted_var(parts, OPTION)
    return tl.sqrt(value), lacks
