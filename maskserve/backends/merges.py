"""Steps that operators alone express: torch runs them on tensors, and Triton compiles the same lines for a GPU.

Triton looks up annotations as values, so that there are none here.
"""


def two_sum(a, b):
    """(s, e) with s = fl(a + b) and s + e = a + b exactly (Knuth, TAOCP 2, 4.2.2)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def carried(high, low):
    """Limbs in normal form, 0 <= low < 2**32: one integer, one pair of bits."""
    return high + (low >> 32), low & 0xFFFFFFFF


def added_pairs(a, a_low, b, b_low):
    """(a + a_low) + (b + b_low) as a pair."""
    s = a + b
    bb = s - a
    return s, (a_low + b_low) + ((a - (s - bb)) + (b - bb))


def shifted_mean(mean, low, delta, weight):
    """The mean, as a pair, of two sides: the second lies `delta` from the first and weighs `weight` of both; and the shift."""
    shift = delta * weight
    b = low + shift
    s = mean + b
    bb = s - mean
    return s, (mean - (s - bb)) + (b - bb), shift
