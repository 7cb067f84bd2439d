"""The best cells, and where they stand."""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import (
    bits_of,
    counted,
    nan_like,
    never,
    spread,
)

FARTHEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LEAST = tl.constexpr(-0x8000000000000000)


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
def finish_best_of_unsigned(parts, OPTION: tl.constexpr):
    """u64 cells are seen with the sign bit flipped."""
    return parts[1] ^ LEAST, never(parts[0])


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


# -- the first and the last valid cell, and the range -------------------------------------------------------------


@triton.jit
def cell_at(place, count, x, keep, at):
    """The valid cell at a place of each slice; 0 where none is valid."""
    key = tl.max(tl.where(keep & (at == spread(place)), key_of(x, True), LEAST), 1)
    cell = cell_of(key, x)
    return tl.where(count > 0, cell, tl.zeros_like(cell))


@triton.jit
def lift_first(x, keep, at, OPTION: tl.constexpr):
    count = counted(keep)
    return count, cell_at(tl.min(tl.where(keep, at, FARTHEST), 1), count, x, keep, at)


@triton.jit
def lift_last(x, keep, at, OPTION: tl.constexpr):
    count = counted(keep)
    return count, cell_at(tl.max(tl.where(keep, at, LEAST), 1), count, x, keep, at)


@triton.jit
def merge_first(a, b):
    return a[0] + b[0], tl.where(a[0] > 0, a[1], b[1])


@triton.jit
def merge_last(a, b):
    return merge_first(b, a)


@triton.jit
def lift_extent(x, keep, at, OPTION: tl.constexpr):
    """OPTION: the worst values of the smallest and of the largest cell."""
    return counted(keep), best_of(x, keep, OPTION[0], False), best_of(x, keep, OPTION[1], True)


@triton.jit
def merge_extent(a, b):
    count, low = merge_smallest(a, b)
    _, high = merge_largest((a[0], a[2]), (b[0], b[2]))
    return count, low, high


@triton.jit
def finish_extent(parts, OPTION: tl.constexpr):
    if parts[1].dtype == tl.int64:
        extent = parts[2] - parts[1]
        return extent, extent < 0
    else:
        return parts[2].to(tl.float64) - parts[1].to(tl.float64), never(parts[0])
