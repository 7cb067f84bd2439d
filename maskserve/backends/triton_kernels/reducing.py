"""The two kernels of every reduction: leaves of a tile to a state, and states to one, or to results."""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.tiles import (
    cells_at,
    joined,
    place_of,
    program_at,
    read,
    working,
    write_parts,
    write_results,
)


@triton.jit
def ended(
    parts, target_ptr, lane, inner, n_lanes, target_strides, min_count,
    FINISH: tl.constexpr, OPTION: tl.constexpr, NEEDS: tl.constexpr, CHECKS: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """States written, or their results where there is a FINISH."""
    inside = lane < n_lanes
    offsets = place_of(lane, 0, inner, target_strides[0], 0, target_strides[1])
    if FINISH is None:
        write_parts(target_ptr, parts, offsets, inside)
    else:
        value, lacks = FINISH(parts, OPTION)
        enough = (parts[0] >= min_count) & (parts[0].to(tl.float64) > NEEDS)
        if WEIGHS:
            enough = enough & (parts[1] != 0.0)
        write_results(target_ptr, value, lacks, enough, offsets, inside, CHECKS)


@triton.jit(do_not_specialize_on_alignment=["data_ptr", "mask_ptr", "weight_ptr"])  # see UNALIGNED
def lift_kernel(
    data_ptr, mask_ptr, weight_ptr, target_ptr, n, inner, n_lanes, n_blocks, data_strides, mask_place, weight_strides,
    target_strides, run_stride, min_count, LIFT: tl.constexpr, MERGE: tl.constexpr, FINISH: tl.constexpr,
    LIFT_OPTION: tl.constexpr, OPTION: tl.constexpr, NEEDS: tl.constexpr, CHECKS: tl.constexpr, WEIGHS: tl.constexpr,
    FORM: tl.constexpr, ROWS: tl.constexpr, OMITS: tl.constexpr, NEGATES: tl.constexpr, READS: tl.constexpr,
    GROUPS: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A run of GROUPS leaves of N cells of LANES slices: their state, or where that is all, their results."""
    run, lane = program_at(n_blocks, LANES)
    cell = cells_at(run * (GROUPS * N), GROUPS, N)
    x, keep, inside = read(
        data_ptr, mask_ptr, lane, cell, n, inner, n_lanes, data_strides, mask_place, FORM, ROWS, OMITS, NEGATES, READS
    )
    if weight_ptr is not None:
        at = place_of(lane[None, None, :], cell, inner, weight_strides[0], weight_strides[1], weight_strides[2])
        x = (x.to(tl.float64), working(tl.load(weight_ptr + at, mask=inside, other=0)).to(tl.float64))
    parts = joined(LIFT(x, keep, cell, LIFT_OPTION), MERGE)
    moved = ()
    for i in tl.static_range(len(target_ptr)):
        moved = moved + (target_ptr[i] + run * run_stride,)
    ended(parts, moved, lane, inner, n_lanes, target_strides, min_count, FINISH, OPTION, NEEDS, CHECKS, WEIGHS)


@triton.jit
def join_kernel(
    state_ptr, target_ptr, m, inner, n_lanes, n_blocks, state_strides, target_strides, run_stride, below, min_count,
    MERGE: tl.constexpr, FINISH: tl.constexpr, NOTHING: tl.constexpr, OPTION: tl.constexpr, NEEDS: tl.constexpr,
    CHECKS: tl.constexpr, WEIGHS: tl.constexpr, SHIFTS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A run of GROUPS states of each lane as one. SHIFTS: the third part is a place, `below` further on for each state."""
    run, lane = program_at(n_blocks, LANES)
    group = run * GROUPS + tl.arange(0, GROUPS)[:, None]
    lanes = lane[None, :]
    inside = (group < m) & (lanes < n_lanes)
    offsets = place_of(lanes, group, inner, state_strides[0], state_strides[1], state_strides[2])
    parts = ()
    for i in tl.static_range(len(state_ptr)):
        part = tl.load(state_ptr[i] + offsets, mask=inside, other=NOTHING[i])
        parts = parts + (as_part(part, group * below, SHIFTS and i == 2),)
    whole = joined(parts, MERGE)
    moved = ()
    for i in tl.static_range(len(target_ptr)):
        moved = moved + (target_ptr[i] + run * run_stride,)
    ended(whole, moved, lane, inner, n_lanes, target_strides, min_count, FINISH, OPTION, NEEDS, CHECKS, WEIGHS)


@triton.jit
def as_part(part, shift, IS_PLACE: tl.constexpr):
    """A part as kernels compute with it."""
    if IS_PLACE:
        return part + shift
    elif part.dtype.is_floating():
        return part if part.dtype == tl.float64 else part.to(tl.float32)
    else:
        return part.to(tl.int64)
