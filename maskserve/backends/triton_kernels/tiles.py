"""Tiles of a plan's cells as (groups, n, lanes): read once, with the mask, and results written once.

A lane is a slice, or its part beside others: lane = outer * n_inner + column. So inner, outer and middle reduced dims are
one kernel at different strides.
"""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.elementary import is_finite

UNALIGNED = tl.constexpr(True)
"""Kernels are compiled as if addresses were not aligned: neighbours go to neighbouring threads and not to one, so that the
first halvings join a thread's own cells. With 16 bytes a thread LLVM took minutes for one kernel."""
ABSENT = tl.constexpr(0)
BYTES = tl.constexpr(1)
LENGTHS = tl.constexpr(2)
BITS = tl.constexpr(3)
COLUMNS = tl.constexpr(0)
RUNS = tl.constexpr(1)


@triton.jit
def working(x):
    """Cells as kernels compute: integers and bools in int64, halves in float32."""
    if x.dtype.is_floating():
        if x.dtype == tl.float64:
            return x
        else:
            return x.to(tl.float32)
    else:
        return x.to(tl.int64)


@triton.jit
def place_of(lane, cell, inner, outer_stride, n_stride, inner_stride):
    return (lane // inner) * outer_stride + cell * n_stride + (lane % inner) * inner_stride


@triton.jit
def kept(mask_ptr, mask_place, lane, cell, inner, inside, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Where cells count, by the form in which the mask lies in memory; every kernel reads masks here and nowhere else.

    `mask_place` are the strides of a byte a cell, 0 where it broadcasts; or of what takes less, where its rows lie.
    """
    if FORM == BYTES:
        at = place_of(lane, cell, inner, mask_place[0], mask_place[1], mask_place[2])
        return inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    elif FORM == LENGTHS:
        row, within = row_of(mask_place, lane, cell, inner, ROWS)
        length = tl.load(mask_ptr + tl.minimum(row, mask_place[9]))  # of no cell, where the last one's will do
        return inside & (within < length * mask_place[8])
    elif FORM == BITS:
        row, within = row_of(mask_place, lane, cell, inner, ROWS)
        bit = row * mask_place[8] + within
        byte = tl.load(mask_ptr + (bit >> 3), mask=inside, other=0).to(tl.int32)
        return inside & ((byte >> (bit & 7).to(tl.int32)) & 1 != 0)
    else:
        return inside


@triton.jit
def row_of(place, lane, cell, inner, ROWS: tl.constexpr):
    """The row of a compact mask that a cell belongs to, and its place there: rows of columns, of runs of n, of slices.

    What is divided is a lane wherever it can be: a tile has many more cells.
    """
    outer = lane // inner + place[0]
    cell = cell + place[1]
    column = lane % inner + place[2]
    n_cells = place[3]
    width = place[4]
    divisor = place[5]
    if ROWS == COLUMNS:
        return outer * place[6] + cell * place[7] + column // divisor, column % divisor
    elif ROWS == RUNS:
        return outer * place[6] + cell // divisor, (cell % divisor) * width + column
    else:
        return outer // divisor, (outer % divisor) * n_cells + cell * width + column


@triton.jit
def lanes_at(block, LANES: tl.constexpr):
    return block.to(tl.int64) * LANES + tl.arange(0, LANES)


@triton.jit
def program_at(n_blocks, LANES: tl.constexpr):
    """The run of this program, and its lanes."""
    program = tl.program_id(0)
    return (program // n_blocks).to(tl.int64), lanes_at(program % n_blocks, LANES)


@triton.jit
def run_at(n, n_blocks, run_cells, LANES: tl.constexpr):
    """The same, and where in their slices the run begins and ends."""
    run, lane = program_at(n_blocks, LANES)
    start = run * run_cells
    return run, lane, start, tl.minimum(start + run_cells, n)


@triton.jit
def cells_at(start, GROUPS: tl.constexpr, N: tl.constexpr):
    """The places in the slice of a tile's cells, (groups, n, 1)."""
    group = tl.arange(0, GROUPS)[:, None, None].to(tl.int64)
    return start + group * N + tl.arange(0, N)[None, :, None]


@triton.jit
def read(
    data_ptr, mask_ptr, lane, cell, n, inner, n_lanes, data_strides, mask_place, FORM: tl.constexpr,
    ROWS: tl.constexpr, OMITS: tl.constexpr, NEGATES: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """(cells, where they count, where there are any) of a tile."""
    lanes = lane[None, None, :]
    inside = (cell < n) & (lanes < n_lanes)
    keep = kept(mask_ptr, mask_place, lanes, cell, inner, inside, FORM, ROWS)
    if READS:
        offsets = place_of(lanes, cell, inner, data_strides[0], data_strides[1], data_strides[2])
        seen = (
            keep if FORM == LENGTHS else inside
        )  # what is behind a length is not read; other masks are not waited for
        x = working(tl.load(data_ptr + offsets, mask=seen, other=0))
        if NEGATES:
            if x.dtype == tl.int64:
                x = x.to(tl.float64)
            x = -x
        if OMITS:
            keep = keep & (x == x)
    else:
        x = inside.to(tl.int64)
    return x, keep, inside


# -- states and results -------------------------------------------------------------------------------------------


@triton.jit
def joined(parts, MERGE: tl.constexpr):
    """States (groups, lanes) joined along their first dim in a power-of-two tree, neighbours first: (lanes,)."""
    if parts[0].shape[0] == 1:
        whole = ()
        for i in tl.static_range(len(parts)):
            whole = whole + (tl.reshape(parts[i], (parts[i].shape[1],)),)
        return whole
    else:
        left = ()
        right = ()
        for i in tl.static_range(len(parts)):
            pairs = tl.reshape(parts[i], (parts[i].shape[0] // 2, 2, parts[i].shape[1]))
            a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
            left = left + (a,)
            right = right + (b,)
        return joined(MERGE(left, right), MERGE)


@triton.jit
def as_stored(value, DTYPE: tl.constexpr):
    """An exact value in the dtype of a part; the interpreter casts to bfloat16 by cutting off, which is exact too."""
    if DTYPE == tl.int1:
        return value != 0
    else:
        return value.to(DTYPE)


@triton.jit
def write_parts(parts_ptr, parts, offsets, inside):
    for i in tl.static_range(len(parts)):
        tl.store(parts_ptr[i] + offsets, as_stored(parts[i], parts_ptr[i].dtype.element_ty), mask=inside)


@triton.jit
def rounded_to_odd(value):
    """float64 as float32, so that rounding it once more rounds the float64 (Boldo & Melquiond, 2008)."""
    single = value.to(tl.float32)
    back = single.to(tl.float64)
    bits = single.to(tl.int32, bitcast=True)
    odd = tl.where(tl.abs(back) > tl.abs(value), bits - 1, bits) | 1
    inexact = (back != value) & is_finite(value) & is_finite(back)
    return tl.where(inexact, odd, bits).to(tl.float32, bitcast=True)


@triton.jit
def as_bfloat16(single):
    """To nearest even, by integers: one way on every device and in the interpreter."""
    bits = single.to(tl.int32, bitcast=True)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(single != single, 0x7FC0, near).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def canonical(value, BITS: tl.constexpr, NAN_BITS: tl.constexpr):
    bits = value.to(BITS, bitcast=True)
    return tl.where(value != value, tl.full(bits.shape, NAN_BITS, BITS), bits).to(value.dtype, bitcast=True)


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """`value` rounded once to a result's dtype, NaN canonical; and where a finite one became inf."""
    lost = tl.zeros(value.shape, tl.int1)
    if DTYPE == tl.int1:
        return value != 0, lost
    elif DTYPE.is_int():
        made = value.to(tl.int64)
        return made.to(DTYPE), made.to(DTYPE).to(tl.int64) != made
    else:
        wide = value.to(tl.float64)
        if DTYPE == tl.float64:
            return canonical(wide, tl.int64, 0x7FF8000000000000), lost
        else:
            if DTYPE == tl.float32:
                made = canonical(wide.to(tl.float32), tl.int32, 0x7FC00000)
            elif DTYPE == tl.float16:
                made = canonical(rounded_to_odd(wide).to(tl.float16), tl.int16, 0x7E00)
            else:
                made = as_bfloat16(rounded_to_odd(wide))
            single = made.to(tl.float32)
            return made, (is_finite(single) == 0) & (single == single) & is_finite(wide)


@triton.jit
def write_results(results_ptr, value, lacks, enough, offsets, inside, CHECKS: tl.constexpr):
    """Values where enough cells were valid, 0 elsewhere; a flag where one of them does not fit."""
    made, lost = narrowed(tl.where(enough, value, tl.zeros_like(value)), results_ptr[0].dtype.element_ty)
    tl.store(results_ptr[0] + offsets, made, mask=inside)
    tl.store(results_ptr[1] + offsets, enough, mask=inside)
    if CHECKS:
        wrong = (lost | lacks) & enough & inside
        tl.store(results_ptr[2] + tl.zeros_like(offsets), wrong.to(tl.int32), mask=wrong)  # each writes the same 1
