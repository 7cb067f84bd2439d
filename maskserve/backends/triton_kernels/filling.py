"""Kernels that write a result for each cell: normalizations by the state of their slice, and their gradients."""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import exponential, halve, is_finite, logarithm, nan_like, never
from maskserve.backends.triton_kernels.extremes import LEAST
from maskserve.backends.triton_kernels.powers import finish_norm, raised
from maskserve.backends.triton_kernels.reducing import as_part
from maskserve.backends.triton_kernels.sums import finish_std
from maskserve.backends.triton_kernels.tiles import (
    BYTES,
    cells_at,
    joined,
    kept,
    narrowed,
    place_of,
    program_at,
    read,
    run_at,
)

# -- what a cell becomes, by the state of its slice: (cells, parts, OPTIONs) -> float64 ----------------------------


@triton.jit
def top_of(parts):
    """The max to subtract; NaN where it is infinite, so that the slice becomes NaN."""
    return tl.where(is_finite(parts[1]), parts[1], nan_like(parts[1]))


@triton.jit
def apply_softmax(x, parts, EXACTNESS: tl.constexpr, OPTION: tl.constexpr):
    return raised(x.to(tl.float64), top_of(parts), EXACTNESS) / parts[2]


@triton.jit
def apply_log_softmax(x, parts, EXACTNESS: tl.constexpr, OPTION: tl.constexpr):
    return (x.to(tl.float64) - top_of(parts)) - logarithm(parts[2])


@triton.jit
def apply_standardize(x, parts, LIFT_OPTION: tl.constexpr, OPTION: tl.constexpr):
    """OPTION: the correction."""
    deviation, _ = finish_std(parts, OPTION)
    return ((x.to(tl.float64) - parts[1]) - parts[2]) / deviation


@triton.jit
def apply_normalize(x, parts, ORD: tl.constexpr, OPTION: tl.constexpr):
    """OPTION: the least norm that cells are divided by."""
    norm, _ = finish_norm(parts, ORD)
    return x.to(tl.float64) / tl.where(norm < OPTION, OPTION, norm)


@triton.jit
def write_cells(results_ptr, value, lacks, valid, offsets, inside, CHECKS: tl.constexpr):
    """Values where valid, 0 elsewhere; a flag where one of them does not fit."""
    made, lost = narrowed(tl.where(valid, value, tl.zeros_like(value)), results_ptr[0].dtype.element_ty)
    tl.store(results_ptr[0] + offsets, made, mask=inside)
    tl.store(results_ptr[1] + offsets, valid, mask=inside)
    if CHECKS:
        wrong = (lost | lacks) & valid
        tl.store(results_ptr[2] + tl.zeros_like(offsets), wrong.to(tl.int32), mask=wrong)


@triton.jit(do_not_specialize_on_alignment=["data_ptr", "mask_ptr"])  # see UNALIGNED
def normalize_kernel(
    data_ptr, mask_ptr, state_ptr, results_ptr, n, inner, n_lanes, n_blocks, data_strides, mask_place, state_strides,
    result_strides, LIFT: tl.constexpr, MERGE: tl.constexpr, APPLY: tl.constexpr, LIFT_OPTION: tl.constexpr,
    OPTION: tl.constexpr, NEEDS: tl.constexpr, CHECKS: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, OMITS: tl.constexpr,
    NEGATES: tl.constexpr, KNOWN: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile of cells normalized: of whole slices, read once, or of parts of slices whose states are KNOWN."""
    run, lane = program_at(n_blocks, LANES)
    cell = cells_at(run * (GROUPS * N), GROUPS, N)
    x, keep, inside = read(
        data_ptr, mask_ptr, lane, cell, n, inner, n_lanes, data_strides, mask_place, FORM, ROWS, OMITS, NEGATES, True
    )
    parts = ()
    if KNOWN:
        for i in tl.static_range(len(state_ptr)):
            at = place_of(lane, 0, inner, state_strides[0], 0, state_strides[1])
            part = tl.load(state_ptr[i] + at, mask=lane < n_lanes, other=0)
            parts = parts + (as_part(part, 0, False)[None, None, :],)
    else:
        whole = joined(LIFT(x, keep, cell, LIFT_OPTION), MERGE)
        for i in tl.static_range(len(whole)):
            parts = parts + (whole[i][None, None, :],)
    valid = keep & (parts[0].to(tl.float64) > NEEDS)
    value = APPLY(x, parts, LIFT_OPTION, OPTION)
    offsets = place_of(lane[None, None, :], cell, inner, result_strides[0], result_strides[1], result_strides[2])
    write_cells(results_ptr, value, never(value), valid, offsets, inside, CHECKS)


@triton.jit(do_not_specialize=["number"], do_not_specialize_on_alignment=["data_ptr", "mask_ptr"])  # see UNALIGNED
def fill_kernel(
    data_ptr, mask_ptr, results_ptr, number, n, inner, n_lanes, n_blocks, data_strides, mask_place, result_strides,
    FLIPPED: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile of cells, the masked ones the `number`: the bits of a float64, or an int64. FLIPPED: of u64, the sign bit."""
    run, lane = program_at(n_blocks, LANES)
    cell = cells_at(run * N, 1, N)
    x, keep, inside = read(
        data_ptr, mask_ptr, lane, cell, n, inner, n_lanes, data_strides, mask_place, FORM, ROWS, False, False, True
    )
    given = tl.full((1, 1, 1), number, tl.int64)
    if x.dtype != tl.int64:
        given = given.to(tl.float64, bitcast=True).to(x.dtype)
    offsets = place_of(lane[None, None, :], cell, inner, result_strides[0], result_strides[1], result_strides[2])
    cells = tl.where(keep, x, given)
    write_cells(results_ptr, cells ^ LEAST if FLIPPED else cells, never(x), inside, offsets, inside, False)


# -- the gradients of softmax and its kin -------------------------------------------------------------------------


@triton.jit
def pull_softmax(g, out, total):
    return out * (g - total)


@triton.jit
def pull_softmin(g, out, total):
    return -(out * (g - total))


@triton.jit
def pull_log_softmax(g, out, total):
    return g - exponential(out) * total


@triton.jit
def softmax_share(g, out):
    """What a cell adds to the total of its slice."""
    return g * out


@triton.jit
def log_softmax_share(g, out):
    return g


@triton.jit
def above(out_ptr, g_ptr, gate_ptr, lane, cell, n, inner, n_lanes, out_strides, g_strides, gate_strides):
    """(result, its gradient, where that counts) of a tile, in float64; 0 where it does not."""
    lanes = lane[None, None, :]
    inside = (cell < n) & (lanes < n_lanes)
    gate = kept(gate_ptr, gate_strides, lanes, cell, inner, inside, BYTES, 0)
    at = place_of(lanes, cell, inner, out_strides[0], out_strides[1], out_strides[2])
    out = tl.load(out_ptr + at, mask=inside, other=0).to(tl.float64)
    at = place_of(lanes, cell, inner, g_strides[0], g_strides[1], g_strides[2])
    g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float64)
    return out, tl.where(gate, g, 0.0), gate


@triton.jit
def shares_of(
    out_ptr, g_ptr, gate_ptr, lane, start, stop, n, inner, n_lanes, out_strides, g_strides, gate_strides,
    SHARE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(how many cells of a run are reached, the total of their shares), (1, 1, lanes), a tile after the other."""
    total = tl.zeros((1, 1, LANES), tl.float64)
    n_reached = tl.zeros((1, 1, LANES), tl.int64)
    for begin in range(start, stop, N):
        cell = cells_at(tl.full((), begin, tl.int64), 1, N)
        out, g, gate = above(
            out_ptr, g_ptr, gate_ptr, lane, cell, n, inner, n_lanes, out_strides, g_strides, gate_strides
        )
        total += halve(tl.where(gate, SHARE(g, out), 0.0))[:, None, :]
        n_reached += tl.sum(gate.to(tl.int64), 1, keep_dims=True)
    return n_reached, total


@triton.jit(do_not_specialize_on_alignment=["out_ptr", "g_ptr", "gate_ptr"])  # see UNALIGNED
def share_kernel(
    out_ptr, g_ptr, gate_ptr, state_ptr, n, inner, n_lanes, n_blocks, run_cells, out_strides, g_strides, gate_strides,
    SHARE: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The shares of runs of slices that are few and long, as states (runs, lanes) that sums are joined of."""
    run, lane, start, stop = run_at(n, n_blocks, run_cells, LANES)
    shares = shares_of(
        out_ptr, g_ptr, gate_ptr, lane, start, stop, n, inner, n_lanes, out_strides, g_strides, gate_strides, SHARE, N,
        LANES,
    )  # fmt: skip
    at = (run * n_lanes + lane)[None, None, :]
    tl.store(state_ptr[0] + at, shares[0], mask=lane[None, None, :] < n_lanes)
    tl.store(state_ptr[1] + at, shares[1], mask=lane[None, None, :] < n_lanes)


@triton.jit(
    do_not_specialize_on_alignment=["data_ptr", "mask_ptr", "out_ptr", "g_ptr", "gate_ptr", "gradient_ptr", "reach_ptr"]
)  # see UNALIGNED
def pull_kernel(
    data_ptr, mask_ptr, out_ptr, g_ptr, gate_ptr, gradient_ptr, reach_ptr, state_ptr, n, inner, n_lanes, n_blocks,
    run_cells, data_strides, mask_place, out_strides, g_strides, gate_strides, gradient_strides, SHARE: tl.constexpr,
    PULL: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, OMITS: tl.constexpr, REACHES: tl.constexpr,
    N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradients of a run of LANES slices: their totals, which `state_ptr` has where runs are not whole, then their cells."""
    _run, lane, start, stop = run_at(n, n_blocks, run_cells, LANES)
    if state_ptr is None:
        n_reached, total = shares_of(
            out_ptr, g_ptr, gate_ptr, lane, start, stop, n, inner, n_lanes, out_strides, g_strides, gate_strides, SHARE,
            N, LANES,
        )  # fmt: skip
    else:
        n_reached = tl.load(state_ptr[0] + lane, mask=lane < n_lanes, other=0)[None, None, :]
        total = tl.load(state_ptr[1] + lane, mask=lane < n_lanes, other=0)[None, None, :]
    for begin in range(start, stop, N):
        cell = cells_at(tl.full((), begin, tl.int64), 1, N)
        out, g, _ = above(out_ptr, g_ptr, gate_ptr, lane, cell, n, inner, n_lanes, out_strides, g_strides, gate_strides)
        _, keep, inside = read(
            data_ptr, mask_ptr, lane, cell, n, inner, n_lanes, data_strides, mask_place, FORM, ROWS, OMITS, False, OMITS
        )
        reached = keep & (n_reached > 0)
        made, _ = narrowed(tl.where(reached, PULL(g, out, total), 0.0), gradient_ptr.dtype.element_ty)
        lanes = lane[None, None, :]
        at = place_of(lanes, cell, inner, gradient_strides[0], gradient_strides[1], gradient_strides[2])
        tl.store(gradient_ptr + at, made, mask=inside)
        if REACHES:
            tl.store(reach_ptr + at, reached.to(tl.float32).to(tl.bfloat16), mask=inside)
