"""Sums of exponentials, products, and norms."""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import (
    INFINITY,
    counted,
    exponential,
    finite_or_zero,
    halve,
    halve_pairs,
    halve_wrapped,
    is_finite,
    logarithm,
    multiplied,
    never,
    normal,
    quick_exponential,
    settled,
    split_exponent,
    spread,
    times_pair,
    times_power,
    two_sum,
)
from maskserve.backends.triton_kernels.extremes import (
    cell_of,
    key_of,
)

STEP = tl.constexpr(64)


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
    """The sum below the lesser top is scaled to the other: what belongs to that would be times exp(0), which is 1."""
    b_leads = (b[1] > a[1]) | (b[1] != b[1])
    top, lesser = tl.where(b_leads, b[1], a[1]), tl.where(b_leads, a[1], b[1])
    scaled = tl.where(b_leads, a[2], b[2]) * exponential(lesser - finite_or_zero(top))
    return a[0] + b[0], top, tl.where(b_leads, b[2], a[2]) + scaled


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
def sign_of(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def finish_prod(parts, OPTION: tl.constexpr):
    """OPTION: whether the result is a float. Of integers the estimate cannot tell beside 2**63 whether it fits, and the sign
    can: what wraps there changes it."""
    estimate = times_power(parts[1] + parts[2], parts[3])
    if OPTION:
        return estimate, never(estimate)
    else:
        fits = (tl.abs(estimate) < 9223372046077798400.0) & (sign_of(parts[4]) == sign_of(estimate))
        return parts[4], fits == 0


# -- norms --------------------------------------------------------------------------------------------------------


@triton.jit
def power(size, ORD: tl.constexpr):
    """size**ORD: of whole orders by products."""
    if ORD < 0:
        return 1.0 / power(size, -ORD)
    elif ORD == 0.5:
        return tl.sqrt(size)
    elif ORD == 1:
        return size
    elif ORD % 2 == 0:
        return power(size * size, ORD / 2)
    elif ORD % 1 == 0:
        return power(size, ORD - 1) * size
    else:
        return exponential(ORD * logarithm(size))


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
    else:
        scale = one
        if OPTION > 6 or OPTION < -6 or (x.dtype == tl.float64 and OPTION != 0.5):
            scale = scale_of(extreme_size(size, OPTION))
            size = size / spread(scale)
        powers = power(size, OPTION)
        if x.dtype != tl.float64:
            return count, halve(powers), zero, scale, order
        total, low = halve_pairs(powers, tl.zeros_like(powers))
        return count, total, tl.where(is_finite(total), low, 0.0), scale, order


@triton.jit
def scaleless(total):
    """Where a state takes the other's scale: it is 0, infinite or NaN on any."""
    return (total == 0.0) | (is_finite(total) == 0)


@triton.jit
def share(own, scale, order):
    """What a total counts for on another scale, in powers of two; exactly 1 on its own. Orders that have scales are whole."""
    _, exponent = split_exponent(own)
    _, wanted = split_exponent(scale)
    return tl.where(own == scale, 1.0, power_of((exponent - wanted) * order.to(tl.int64)))


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
    if ORD < 0:
        return 1.0 / inverse_power(total, low, -ORD)
    elif ORD == 1:
        return total + low
    elif ORD == 0.5:
        return tl.where(is_finite(total), total * total + 2.0 * total * low, total)
    elif ORD == 2:
        plain = tl.sqrt(total)
        size = tl.where(plain > 0.0, plain + low / (2.0 * plain), plain)
        return tl.where(is_finite(plain), size, plain)
    else:  # one step of Newton's method makes good what rounding on the way lost
        plain = exponential(logarithm(total) / ORD)
        better = plain - plain * ((power(plain, ORD) - total) - low) / (ORD * total)
        return tl.where((total > 0.0) & is_finite(better), better, plain)
