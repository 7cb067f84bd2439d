"""One kernel for a tree of elementwise ops: what it computes of a tile is generated, from the formulas of the rows.

Operands are read once and the result is written once. Each op's result is rounded as if it had been written too: halves
are computed in float32, and what is kept of them is the float32 of their bits.
"""

import triton
import triton.language as tl

from maskserve.backends.triton_kernels.tiles import ABSENT, as_bfloat16, kept

# -- the words of formulas ----------------------------------------------------------------------------------------


@triton.jit
def divided(a, b):
    """Rounded once; `/` of float32 is not."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def root(x):
    """Rounded once; `sqrt` of float32 is not."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def negated(x):
    """`-x` is 0 - x, which loses the sign of 0."""
    if x.dtype.is_floating():
        return x * -1.0
    else:
        return 0 - x


@triton.jit
def inverted(x):
    """`~x` of u8 is an error in the interpreter."""
    if x.dtype == tl.int1:
        return x == 0
    elif x.dtype == tl.uint8:
        return 255 - x
    else:
        return ~x


@triton.jit
def magnitude(x):
    return tl.abs(x)


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def smaller(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def chosen(condition, a, b):
    return tl.where(condition, a, b)


# -- between them -------------------------------------------------------------------------------------------------


@triton.jit
def stored_as(x, DTYPE: tl.constexpr):
    """Cells as they are computed, in the dtype that they have in memory."""
    if DTYPE == tl.bfloat16:
        return as_bfloat16(x)
    else:
        return x.to(DTYPE)


@triton.jit
def computed(x):
    """Cells of memory as they are computed."""
    return x.to(tl.float32) if x.dtype == tl.float16 or x.dtype == tl.bfloat16 else x


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Cells of one dtype as those of another, as torch's `to` gives them."""
    if x.dtype == tl.int1 and DTYPE != tl.int1:
        x = x.to(tl.int32)
    if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
        return computed(stored_as(x.to(tl.float32), DTYPE))
    elif DTYPE == tl.int1:
        return x != 0
    else:
        return x.to(DTYPE)


@triton.jit
def number(bits, IS_FLOAT: tl.constexpr, DTYPE: tl.constexpr):
    """A number of the expression, given as the bits of a float64 or as an int64."""
    given = tl.full((1,), bits, tl.int64)
    if IS_FLOAT:
        return cast(given.to(tl.float64, bitcast=True), DTYPE)
    else:
        return cast(given, DTYPE)


# -- the kernel ---------------------------------------------------------------------------------------------------


@triton.jit
def offset_of(cell, sizes, strides, FIRST: tl.constexpr):
    """Where a cell of the result lies in an operand: its strides are those from FIRST on, one for each of the sizes."""
    if len(sizes) == 1:
        return cell * strides[FIRST]
    else:
        at = cell * 0
        for i in tl.static_range(len(sizes) - 1, 0, -1):
            at += (cell % sizes[i]) * strides[FIRST + i]
            cell = cell // sizes[i]
        return at + cell * strides[FIRST]


@triton.jit(do_not_specialize=["numbers"])
def tree_kernel(
    data_ptr, mask_ptr, kept_ptr, result_ptr, valid_ptr, kept_place, sizes, data_strides, mask_strides, numbers, n,
    COMPUTE: tl.constexpr, IS_MASKED: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, IS_LONG: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """N cells of the result, and where they are valid; those that are not, or not in a compact mask of all, are 0."""
    start = tl.program_id(0)
    if IS_LONG:
        start = start.to(tl.int64)
    cell = start * N + tl.arange(0, N)
    inside = cell < n
    data = ()
    for i in tl.static_range(len(data_ptr)):
        at = offset_of(cell, sizes, data_strides, i * len(sizes))
        data = data + (computed(tl.load(data_ptr[i] + at, mask=inside, other=0)),)
    masks = ()
    for i in tl.static_range(len(mask_ptr)):
        at = offset_of(cell, sizes, mask_strides, i * len(sizes))
        masks = masks + (tl.load(mask_ptr[i] + at, mask=inside, other=0) != 0,)
    value, valid = COMPUTE(data, masks, numbers)
    if IS_MASKED:
        value = tl.where(valid, value, tl.zeros_like(value))
        tl.store(valid_ptr + cell, valid, mask=inside)
    if FORM != ABSENT:
        keep = kept(kept_ptr, kept_place, 0, cell, 1, inside, FORM, ROWS)
        value = tl.where(keep, value, tl.zeros_like(value))
    tl.store(result_ptr + cell, stored_as(value, result_ptr.dtype.element_ty), mask=inside)
