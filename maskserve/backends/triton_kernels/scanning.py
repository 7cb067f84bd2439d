"""Running states along slices: what a cell lifts, how states follow one another, and what a row's result is of a state.

`begin(LANES)` is the state of no cell, (1, 1, lanes). `lift(x, keep, at)` gives the states of cells (1, n, lanes), and
`merge(a, b)` joins two of them.
`finish(parts, keep, at, limit, OPTION)` gives values, where one has no number, and where they are valid.
"""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import (
    INFINITY,
    LIMB_VALUE,
    carried,
    never,
    settled,
    split_exponent,
    times_power,
)
from maskserve.backends.triton_kernels.extremes import FARTHEST, LEAST, key_of
from maskserve.backends.triton_kernels.filling import write_cells
from maskserve.backends.triton_kernels.powers import finish_logsumexp, finish_prod, merge_exponentials, times_states
from maskserve.backends.triton_kernels.sums import HALF, LIMB, merge_pair
from maskserve.backends.triton_kernels.tiles import cells_at, place_of, program_at, read, run_at

# -- sums: of float64 where cells are shorter floats, of limbs where they are integers, of pairs -------------------


@triton.jit
def begin_sums(LANES: tl.constexpr):
    return (tl.zeros((1, 1, LANES), tl.float64),)


@triton.jit
def lift_cells(x, keep, at):
    return (tl.where(keep, x, 0.0).to(tl.float64),)


@triton.jit
def merge_sums(a, b):
    return (a[0] + b[0],)


@triton.jit
def finish_sums(parts, keep, at, limit, OPTION: tl.constexpr):
    return parts[0], never(parts[0]), keep


@triton.jit
def begin_limbs(LANES: tl.constexpr):
    zero = tl.zeros((1, 1, LANES), tl.int64)
    return zero, zero


@triton.jit
def lift_limbs_of_cells(x, keep, at):
    cells = tl.where(keep, x, 0)
    return cells >> 32, cells & LIMB


@triton.jit
def merge_limbs(a, b):
    high, low = carried(a[0] + b[0], a[1] + b[1])
    return high, low


@triton.jit
def finish_limbs(parts, keep, at, limit, OPTION: tl.constexpr):
    """OPTION: whether the result is a float."""
    high, low = parts[0], parts[1]
    if OPTION:
        return high.to(tl.float64) * LIMB_VALUE + low.to(tl.float64), never(high), keep
    else:
        return (high << 32) + low, (high < -HALF) | (high >= HALF), keep


@triton.jit
def begin_pairs(LANES: tl.constexpr):
    zero = tl.zeros((1, 1, LANES), tl.float64)
    return zero, zero, tl.zeros((1, 1, LANES), tl.int64)


@triton.jit
def lift_pairs(x, keep, at):
    cells = tl.where(keep, x, 0.0)
    return cells, tl.zeros_like(cells), tl.zeros(cells.shape, tl.int64)


@triton.jit
def merge_pairs(a, b):
    _, total, low, exponent = merge_pair((0, a[0], a[1], a[2]), (0, b[0], b[1], b[2]))
    return total, low, exponent


@triton.jit
def finish_pairs(parts, keep, at, limit, OPTION: tl.constexpr):
    return times_power(parts[0] + parts[1], parts[2]), never(parts[0]), keep


# -- products, as a mantissa and an exponent; of integers the product modulo 2**64 too ------------------------------


@triton.jit
def begin_products(LANES: tl.constexpr):
    zero = tl.zeros((1, 1, LANES), tl.float64)
    return zero + 0.5, zero, tl.full((1, 1, LANES), 1, tl.int64)


@triton.jit
def lift_products(x, keep, at):
    mantissa, exponent = split_exponent(tl.where(keep, x.to(tl.float64), 1.0))
    return mantissa, tl.zeros_like(mantissa), settled(mantissa, exponent)


@triton.jit
def merge_products(a, b):
    return times_states(a[0], a[1], a[2], b[0], b[1], b[2])


@triton.jit
def finish_products(parts, keep, at, limit, OPTION: tl.constexpr):
    return times_power(parts[0] + parts[1], parts[2]), never(parts[0]), keep


@triton.jit
def begin_wrapped(LANES: tl.constexpr):
    high, low, exponent = begin_products(LANES)
    return high, low, exponent, tl.full((1, 1, LANES), 1, tl.int64)


@triton.jit
def lift_wrapped(x, keep, at):
    high, low, exponent = lift_products(x, keep, at)
    return high, low, exponent, tl.where(keep, x, 1)


@triton.jit
def merge_wrapped(a, b):
    high, low, exponent = times_states(a[0], a[1], a[2], b[0], b[1], b[2])
    return high, low, exponent, a[3] * b[3]


@triton.jit
def finish_wrapped(parts, keep, at, limit, OPTION: tl.constexpr):
    """OPTION: whether the result is a float."""
    value, lacks = finish_prod((0, parts[0], parts[1], parts[2], parts[3]), OPTION)
    return value, lacks, keep


# -- exponentials, as their largest and the sum of what they are beside it ------------------------------------------


@triton.jit
def begin_exponentials(LANES: tl.constexpr):
    return tl.full((1, 1, LANES), -INFINITY, tl.float64), tl.zeros((1, 1, LANES), tl.float64)


@triton.jit
def lift_exponents(x, keep, at):
    cells = tl.where(keep, x.to(tl.float64), -INFINITY)
    return cells, (cells != -INFINITY).to(tl.float64)


@triton.jit
def merge_running_exponentials(a, b):
    _, top, total = merge_exponentials((0, a[0], a[1]), (0, b[0], b[1]))
    return top, total


@triton.jit
def finish_exponentials(parts, keep, at, limit, OPTION: tl.constexpr):
    value, lacks = finish_logsumexp((0, parts[0], parts[1]), OPTION)
    return value, lacks, keep


# -- places: of the best cell so far, the last of equal ones, and of the last valid one -----------------------------


@triton.jit
def begin_largest(LANES: tl.constexpr):
    return tl.full((1, 1, LANES), LEAST, tl.int64), tl.zeros((1, 1, LANES), tl.int64)


@triton.jit
def begin_smallest(LANES: tl.constexpr):
    return tl.full((1, 1, LANES), FARTHEST, tl.int64), tl.zeros((1, 1, LANES), tl.int64)


@triton.jit
def unsigned_zero(x):
    """-0 as +0, which it equals."""
    return x if x.dtype == tl.int64 else x + 0.0


@triton.jit
def lift_largest_place(x, keep, at):
    return tl.where(keep, key_of(unsigned_zero(x), True), LEAST), at + tl.zeros_like(keep).to(tl.int64)


@triton.jit
def lift_smallest_place(x, keep, at):
    return tl.where(keep, key_of(unsigned_zero(x), False), FARTHEST), at + tl.zeros_like(keep).to(tl.int64)


@triton.jit
def merge_largest_place(a, b):
    return tl.maximum(a[0], b[0]), tl.where(b[0] >= a[0], b[1], a[1])


@triton.jit
def merge_smallest_place(a, b):
    return tl.minimum(a[0], b[0]), tl.where(b[0] <= a[0], b[1], a[1])


@triton.jit
def finish_place(parts, keep, at, limit, OPTION: tl.constexpr):
    return parts[1], never(parts[1]), keep


@triton.jit
def begin_latest(LANES: tl.constexpr):
    return (tl.full((1, 1, LANES), -1, tl.int64),)


@triton.jit
def lift_latest(x, keep, at):
    return (tl.where(keep, at, -1),)


@triton.jit
def merge_latest(a, b):
    return (tl.maximum(a[0], b[0]),)


@triton.jit
def finish_latest(parts, keep, at, limit, OPTION: tl.constexpr):
    return tl.maximum(parts[0], 0), never(parts[0]), (parts[0] >= 0) & (at - parts[0] <= limit)


# -- the kernels --------------------------------------------------------------------------------------------------


@triton.jit
def scan_by_sums(parts, MERGE: tl.constexpr):
    """States that are numbers to add, each joined with all before it in the tile; and that of all, (1, 1, lanes)."""
    scanned = ()
    whole = ()
    for i in tl.static_range(len(parts)):
        scanned = scanned + (tl.cumsum(parts[i], 1),)
        whole = whole + (tl.sum(parts[i], 1, keep_dims=True),)
    return scanned, whole


@triton.jit
def scan_by_halves(parts, MERGE: tl.constexpr):
    """The same of any states: blocks of 1, 2, 4, ... cells, of which the later of two takes the whole of the earlier on.

    The order is that of this tree, and not of a compiler's: the bits are one device's as another's.
    """
    cells = ()
    whole = ()
    for i in tl.static_range(len(parts)):
        cells = cells + (tl.reshape(parts[i], (parts[i].shape[1], 1, parts[i].shape[2])),)
        whole = whole + (tl.reshape(parts[i], (parts[i].shape[1], 1, parts[i].shape[2])),)
    return doubled(cells, whole, MERGE)


@triton.jit
def doubled(cells, whole, MERGE: tl.constexpr):
    """Blocks (m, width, lanes) scanned inside, and the whole of each, (m, 1, lanes): two and two, until there is one."""
    if cells[0].shape[0] == 1:
        return cells, whole
    else:
        first = ()
        second = ()
        first_whole = ()
        second_whole = ()
        for i in tl.static_range(len(cells)):
            a, b = neighbours(cells[i])
            first = first + (a,)
            second = second + (b,)
            a, b = neighbours(whole[i])
            first_whole = first_whole + (a,)
            second_whole = second_whole + (b,)
        second = MERGE(first_whole, second)
        made = ()
        for i in tl.static_range(len(cells)):
            made = made + (beside(first[i], second[i]),)
        return doubled(made, MERGE(first_whole, second_whole), MERGE)


@triton.jit
def neighbours(x):
    """The first and the second of each two blocks."""
    pairs = tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1], x.shape[2]))
    return tl.split(tl.permute(pairs, (0, 2, 3, 1)))


@triton.jit
def beside(a, b):
    """Blocks of both, one behind the other."""
    pairs = tl.permute(tl.join(a, b), (0, 3, 1, 2))
    return tl.reshape(pairs, (a.shape[0], 2 * a.shape[1], a.shape[2]))


@triton.jit(do_not_specialize_on_alignment=["data_ptr", "mask_ptr"])  # see UNALIGNED
def scan_kernel(
    data_ptr, mask_ptr, before_ptr, target_ptr, n, inner, n_lanes, n_blocks, run_cells, limit, data_strides, mask_place,
    result_strides, BEGIN: tl.constexpr, LIFT: tl.constexpr, SCAN: tl.constexpr, MERGE: tl.constexpr,
    FINISH: tl.constexpr, OPTION: tl.constexpr, REVERSED: tl.constexpr, CHECKS: tl.constexpr, FORM: tl.constexpr,
    ROWS: tl.constexpr, OMITS: tl.constexpr, READS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A run of cells of LANES slices, a tile after the other: results, or without a FINISH the state of the run.

    `before_ptr`: the states of what lies before each run. REVERSED: strides are negative, and places count from the end.
    """
    run, lane, start, stop = run_at(n, n_blocks, run_cells, LANES)
    state = BEGIN(LANES)
    if before_ptr is not None:
        state = states_at(before_ptr, run * n_lanes + lane, lane < n_lanes)
    for begin in range(start, stop, N):
        cell = cells_at(begin, 1, N)
        x, keep, inside = read(
            data_ptr, mask_ptr, lane, cell, n, inner, n_lanes, data_strides, mask_place, FORM, ROWS, OMITS, False, READS
        )
        scanned, whole = SCAN(LIFT(x, keep, cell), MERGE)
        if FINISH is not None:
            value, lacks, valid = FINISH(MERGE(state, scanned), keep, cell, limit, OPTION)
            if REVERSED:
                value = n - 1 - value
            offsets = place_of(
                lane[None, None, :], cell, inner, result_strides[0], result_strides[1], result_strides[2]
            )
            write_cells(target_ptr, value, lacks, valid & inside, offsets, inside, CHECKS)
        state = MERGE(state, whole)
    if FINISH is None:
        write_states(target_ptr, state, run * n_lanes + lane, lane < n_lanes)


@triton.jit
def states_at(state_ptr, at, inside):
    parts = ()
    for i in tl.static_range(len(state_ptr)):
        parts = parts + (tl.load(state_ptr[i] + at, mask=inside, other=0)[None, None, :],)
    return parts


@triton.jit
def write_states(state_ptr, parts, at, inside):
    for i in tl.static_range(len(state_ptr)):
        tl.store(state_ptr[i] + at[None, None, :], parts[i], mask=inside[None, None, :])


@triton.jit
def carry_kernel(state_ptr, n_runs, n_lanes, BEGIN: tl.constexpr, MERGE: tl.constexpr, LANES: tl.constexpr):
    """The states of runs (runs, lanes), in their place those of all that lies before each."""
    _, lane = program_at(tl.num_programs(0), LANES)
    state = BEGIN(LANES)
    for run in range(n_runs):
        at = lane + run * n_lanes  # few lanes, or there were no runs
        own = states_at(state_ptr, at, lane < n_lanes)
        write_states(state_ptr, state, at, lane < n_lanes)
        state = MERGE(state, own)
