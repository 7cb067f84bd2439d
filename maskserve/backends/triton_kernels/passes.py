"""What each pass makes of a tile's leaves, how two states join, and what a row's result is of a state.

`lift(x, keep, at, OPTION)` takes cells (groups, n, lanes), int64, float32 or float64, where they count, and their
places in the slice; it gives parts (groups, lanes), in the order of `ops/passes.py`. `merge(a, b)` joins states of
neighbours. `finish(parts, OPTION)` gives float64, int64 or truth values, and whether one of them has no number.
The meaning, and the reason for each step, is the reference's; here are the same steps.
"""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import (
    INFINITY,
    LIMB_VALUE,
    SCALE,
    SCALE_DOWN,
    added_pairs,
    bits_of,
    carried,
    exponential,
    finite_or_zero,
    halve,
    halve_pairs,
    halve_wrapped,
    is_finite,
    logarithm,
    multiplied,
    nan_like,
    normal,
    quick_exponential,
    scaled_pair,
    settled,
    shifted_mean,
    split_exponent,
    spread,
    times_pair,
    times_power,
    two_product,
    two_sum,
)

LIMB = tl.constexpr(0xFFFFFFFF)
FARTHEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LEAST = tl.constexpr(-0x8000000000000000)
HALF = tl.constexpr(1 << 31)
STEP = tl.constexpr(64)
HALF_SCALE_DOWN = tl.constexpr(2.0**-64)


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
    return counted(keep), counted((x != 0) & keep)


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


# -- extremes: as integers that are in the order of the cells, -0 below +0 and NaN beyond -------------------------


@triton.jit
def key_of(x, LARGEST: tl.constexpr):
    """An int64 in the order of the cells; a NaN is what wins."""
    if x.dtype == tl.int64:
        return x
    else:
        bits = bits_of(x.to(tl.float64))
        ordered = tl.where(bits < 0, bits ^ FARTHEST, bits)
        return tl.where(x != x, FARTHEST if LARGEST else LEAST, ordered)


@triton.jit
def cell_of(key, like):
    """The cell that a key stands for."""
    if like.dtype == tl.int64:
        return key
    else:
        bits = tl.where(key < 0, key ^ FARTHEST, key)
        cell = bits.to(tl.float64, bitcast=True)
        return tl.where((key == FARTHEST) | (key == LEAST), nan_like(cell), cell).to(like.dtype)


@triton.jit
def best_of(x, keep, OPTION: tl.constexpr, LARGEST: tl.constexpr):
    """OPTION: the dtype's worst value, which is chosen only where no cell is valid."""
    worst = key_of(tl.full(x.shape, OPTION, x.dtype), LARGEST)
    keys = tl.where(keep, key_of(x, LARGEST), worst)
    if LARGEST:
        return cell_of(tl.max(keys, 1), x)
    else:
        return cell_of(tl.min(keys, 1), x)


@triton.jit
def lift_largest(x, keep, at, OPTION: tl.constexpr):
    return counted(keep), best_of(x, keep, OPTION, True)


@triton.jit
def lift_smallest(x, keep, at, OPTION: tl.constexpr):
    return counted(keep), best_of(x, keep, OPTION, False)


@triton.jit
def merge_largest(a, b):
    best = tl.maximum(key_of(a[1], True), key_of(b[1], True))
    return a[0] + b[0], cell_of(best, a[1])


@triton.jit
def merge_smallest(a, b):
    best = tl.minimum(key_of(a[1], False), key_of(b[1], False))
    return a[0] + b[0], cell_of(best, a[1])


@triton.jit
def finish_best(parts, OPTION: tl.constexpr):
    return parts[1], never(parts[0])


@triton.jit
def first_of(best, x, keep, at):
    """The place of the first valid cell that equals the best one, 0 where none does; -0 equals 0, and NaN NaN."""
    wanted = spread(best)
    hit = ((x == wanted) | ((x != x) & (wanted != wanted))) & keep
    place = tl.min(tl.where(hit, at, FARTHEST), 1)
    return tl.where(place == FARTHEST, tl.zeros_like(place), place)


@triton.jit
def lift_first_largest(x, keep, at, OPTION: tl.constexpr):
    best = best_of(x, keep, OPTION, True)
    return counted(keep), best, first_of(best, x, keep, at)


@triton.jit
def lift_first_smallest(x, keep, at, OPTION: tl.constexpr):
    best = best_of(x, keep, OPTION, False)
    return counted(keep), best, first_of(best, x, keep, at)


@triton.jit
def better_of(a, b, better):
    take = (b[0] > 0) & ((a[0] == 0) | better | ((b[1] != b[1]) & (a[1] == a[1])))
    return a[0] + b[0], tl.where(take, b[1], a[1]), tl.where(take, b[2], a[2])


@triton.jit
def merge_first_largest(a, b):
    return better_of(a, b, b[1] > a[1])


@triton.jit
def merge_first_smallest(a, b):
    return better_of(a, b, b[1] < a[1])


@triton.jit
def finish_at(parts, OPTION: tl.constexpr):
    return parts[2], never(parts[0])


# -- exponentials -------------------------------------------------------------------------------------------------


@triton.jit
def raised(x, top, OPTION: tl.constexpr):
    """exp(x - top) for x <= top. OPTION: how exact, "quick" or "full" or, with the difference's rounding error, "pair"."""
    if OPTION == "quick":
        return quick_exponential(x - top)
    elif OPTION == "full":
        return exponential(x - top)
    else:
        difference, error = two_sum(x, -top)
        power = exponential(difference)
        return tl.where(is_finite(difference), power + power * error, power)


@triton.jit
def lift_exponentials(x, keep, at, OPTION: tl.constexpr):
    cells = tl.where(keep, x.to(tl.float64), -INFINITY)
    top = cell_of(tl.max(key_of(cells, True), 1), cells)
    powers = tl.where(cells == -INFINITY, 0.0, raised(cells, spread(finite_or_zero(top)), OPTION))
    return counted(keep), top, halve(powers)


@triton.jit
def merge_exponentials(a, b):
    top = tl.where((b[1] > a[1]) | (b[1] != b[1]), b[1], a[1])
    base = finite_or_zero(top)
    return a[0] + b[0], top, a[2] * exponential(a[1] - base) + b[2] * exponential(b[1] - base)


@triton.jit
def finish_logsumexp(parts, OPTION: tl.constexpr):
    top = parts[1]
    return tl.where(is_finite(top), top + logarithm(parts[2]), top), never(top)


# -- products -----------------------------------------------------------------------------------------------------


@triton.jit
def lift_product(x, keep, at, OPTION: tl.constexpr):
    """OPTION: whether cells are float64, whose mantissas are multiplied as pairs."""
    cells = tl.where(keep, x, tl.full(x.shape, 1, x.dtype))
    mantissa, exponent = split_exponent(cells.to(tl.float64))
    high, low, total = multiplied(mantissa, tl.zeros_like(mantissa), exponent, OPTION, 1)
    high, low, shift = normal(high, low if OPTION else tl.zeros_like(low))
    if x.dtype == tl.int64:
        return counted(keep), high, low, settled(high, total + shift), halve_wrapped(cells)
    else:
        return counted(keep), high, low, settled(high, total + shift)


@triton.jit
def times_states(a, a_low, a_exponent, b, b_low, b_exponent):
    product, error = times_pair(a, a_low, b, b_low)
    high, low, shift = normal(product, error)
    return high, low, settled(high, a_exponent + b_exponent + shift)


@triton.jit
def merge_product(a, b):
    high, low, exponent = times_states(a[1], a[2], a[3], b[1], b[2], b[3])
    if len(a) == 5:
        return a[0] + b[0], high, low, exponent, a[4] * b[4]
    else:
        return a[0] + b[0], high, low, exponent


@triton.jit
def finish_prod(parts, OPTION: tl.constexpr):
    return times_power(parts[1] + parts[2], parts[3]), never(parts[1])


@triton.jit
def sign_of(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def finish_prod_of_integers(parts, OPTION: tl.constexpr):
    """Beside 2**63 the estimate cannot tell whether it fits, and the sign can: what wraps there changes it."""
    estimate = times_power(parts[1] + parts[2], parts[3])
    fits = (tl.abs(estimate) < 9223372046077798400.0) & (sign_of(parts[4]) == sign_of(estimate))
    return parts[4], fits == 0


# -- norms --------------------------------------------------------------------------------------------------------


@triton.jit
def power(size, ORD: tl.constexpr):
    """size**ORD of the orders that are served."""
    if ORD == 2:
        return size * size
    elif ORD == 1:
        return size
    elif ORD == 0.5:
        return tl.sqrt(size)
    elif ORD == -1:
        return 1.0 / size
    else:
        return 1.0 / (size * size)


@triton.jit
def scale_of(reach):
    """A power of 2**64 next to the cell that counts most."""
    _, exponent = split_exponent(reach)
    steps = (tl.maximum(exponent - 1, -1000) + 64 * STEP) // STEP - 64  # rounded down
    return tl.where(is_finite(reach) & (reach != 0.0), power_of(steps * STEP), 1.0)


@triton.jit
def power_of(exponent):
    return times_power(tl.full(exponent.shape, 1.0, tl.float64), exponent)


@triton.jit
def extreme_size(size, ORD: tl.constexpr):
    """The largest |cell|, or of a negative order the smallest."""
    if ORD > 0:
        return cell_of(tl.max(key_of(size, True), 1), size)
    else:
        return cell_of(tl.min(key_of(size, False), 1), size)


@triton.jit
def lift_powers(x, keep, at, OPTION: tl.constexpr):
    """OPTION: the order."""
    count = counted(keep)
    order = tl.full(count.shape, OPTION, tl.float64)
    size = tl.where(keep, tl.abs(x.to(tl.float64)), INFINITY if OPTION < 0 else 0.0)
    zero = tl.zeros_like(order)
    one = zero + 1.0
    if OPTION == INFINITY or OPTION == -INFINITY:
        return count, extreme_size(size, OPTION), zero, one, order
    elif OPTION == 0:
        return count, counted(size != 0.0).to(tl.float64), zero, one, order
    elif x.dtype != tl.float64:
        return count, halve(power(size, OPTION)), zero, one, order
    else:
        scale = one
        if OPTION != 0.5:
            scale = scale_of(extreme_size(size, OPTION))
            size = size / spread(scale)
        powers = power(size, OPTION)
        total, low = halve_pairs(powers, tl.zeros_like(powers))
        return count, total, tl.where(is_finite(total), low, 0.0), scale, order


@triton.jit
def scaleless(total):
    """Where a state takes the other's scale: it is 0, infinite or NaN on any."""
    return (total == 0.0) | (is_finite(total) == 0)


@triton.jit
def share(own, scale, order):
    """What a total counts for on another scale, in powers of two; exactly 1 on its own."""
    ratio = own / scale
    square = ratio * ratio
    by_order = tl.where(
        order == 2.0, square, tl.where(order == 1.0, ratio, tl.where(order == -1.0, 1.0 / ratio, 1.0 / square))
    )
    return tl.where(own == scale, 1.0, tl.where(order == 0.5, tl.sqrt(ratio), by_order))


@triton.jit
def merge_powers(a, b):
    order = a[4]
    a_scale = tl.where(scaleless(a[1]), b[3], a[3])
    b_scale = tl.where(scaleless(b[1]), a[3], b[3])
    scale = tl.where(order > 0.0, tl.maximum(a_scale, b_scale), tl.minimum(a_scale, b_scale))
    a_share = share(a_scale, scale, order)
    b_share = share(b_scale, scale, order)
    total, error = two_sum(a[1] * a_share, b[1] * b_share)
    low = a[2] * a_share + b[2] * b_share + error
    larger = cell_of(tl.maximum(key_of(a[1], True), key_of(b[1], True)), total)
    smaller = cell_of(tl.minimum(key_of(a[1], False), key_of(b[1], False)), total)
    total = tl.where(order == INFINITY, larger, tl.where(order == -INFINITY, smaller, total))
    low = tl.where(is_finite(total) & is_finite(order), low, 0.0)
    return a[0] + b[0], total, low, scale, order


@triton.jit
def finish_norm(parts, OPTION: tl.constexpr):
    """OPTION: the order."""
    total = parts[1]
    if OPTION == 0 or OPTION == INFINITY or OPTION == -INFINITY:
        return total, never(total)
    else:
        return inverse_power(total, parts[2], OPTION) * parts[3], never(total)


@triton.jit
def inverse_power(total, low, ORD: tl.constexpr):
    """(total + low)**(1 / ORD)."""
    if ORD == 1:
        return total + low
    elif ORD == -1:
        return 1.0 / (total + low)
    elif ORD == 0.5:
        return tl.where(is_finite(total), total * total + 2.0 * total * low, total)
    else:
        plain = tl.sqrt(total)
        size = tl.where(plain > 0.0, plain + low / (2.0 * plain), plain)
        size = tl.where(is_finite(plain), size, plain)
        return size if ORD == 2 else 1.0 / size
