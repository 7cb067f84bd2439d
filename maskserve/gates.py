"""Cells kept or set to 0 by a mask or a reach, and the one made of the other: in one pass where cells are dense.

The bits are those of `select` and `> 0`, which do it where autograd or a transform looks on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from maskserve.backends import backends
from maskserve.backends.cpu import empty, missing, native
from maskserve.backends.reference.cells import BITS, select
from maskserve.compact import Compact, Mask
from maskserve.execution import in_parallel
from maskserve.tracing import are_followed, has_memory, is_followed

DTYPE = torch.bfloat16
"""Counts in it saturate, and neither cancel nor vanish."""
MEASURED = (torch.float32, torch.float64)
"""Whose rows kernels measure."""
RUN = 1 << 20
"""Cells that a thread walks at a time."""
SPREAD = 1 << 17
"""Cells of a compact mask that are spread out at a time: their bytes stay in L2."""


def kept(cells: Tensor, mask: Tensor | None) -> Tensor:
    """`cells` where the mask is True, else 0. Without a mask they are the cells themselves: never write into them."""
    if mask is not None and (n := repeated(cells, mask)):
        return kept(once(cells, n), once(mask, n)).expand(cells.shape)
    if mask is None or not are_dense(cells, mask := laid_out(mask)):
        return select(cells, mask)
    return walked(cells, mask, of_reach=False)


def kept_in_place(cells: Tensor, mask: Tensor) -> Tensor:
    """The same, in the memory of `cells`, which are nobody else's; they may come back in other memory."""
    if not are_dense(cells, mask := laid_out(mask)):
        return select(cells, mask)
    return walked(cells, mask, of_reach=False, made=cells)


def hide_few(cells: Tensor, mask: Tensor) -> Tensor:
    """The same where the cells are few and new, and nobody follows them: asking who does takes longer than this."""
    shape = cells.shape
    is_walked = cells.is_cpu and mask.is_cpu and cells.is_contiguous() and mask.is_contiguous() and mask.shape == shape
    if not is_walked or cells.itemsize not in BITS or missing() is not None:
        return kept_in_place(cells, mask.expand(shape))
    at = cells.data_ptr()
    native().keep(False, at, mask.data_ptr(), cells.itemsize, cells.numel(), at)
    return cells


def hidden(cells: Tensor, mask: Compact, *, in_place: bool) -> Tensor:
    """`cells` where a compact mask of their shape says that they are valid, else 0; without bools of all of them.

    `in_place`: in the memory of `cells`, which are nobody else's; they may come back in other memory.
    """
    if not are_dense(cells) or mask.device != cells.device:
        return select(cells, mask.bools().expand(cells.shape))
    made, (said, held) = cells if in_place else empty(cells.shape, cells.dtype), mask.form()
    width, first, made_first = cells.itemsize, cells.data_ptr(), made.data_ptr()

    def walk(start: int, n_cells: int) -> None:
        bools = torch.empty(min(SPREAD, n_cells), dtype=torch.bool)
        for at in range(start, start + n_cells, SPREAD):
            n = min(SPREAD, start + n_cells - at)
            native().spread_mask(held.data_ptr(), said.data_ptr(), at, n, bools.data_ptr())
            native().keep(False, first + at * width, bools.data_ptr(), width, n, made_first + at * width)

    in_runs(cells.numel(), walk)
    return made


def expanded(mask: Mask, shape: Sequence[int]) -> Tensor:
    """The mask as bools of this shape; all cells of a compact one by kernels, a quarter of the time that torch takes."""
    if isinstance(mask, Compact):
        mask = spread_out(mask) if mask.dim == len(mask.shape) - 1 else mask.bools()
    return mask if mask.shape == tuple(shape) else mask.expand(shape)


def spread_out(mask: Compact) -> Tensor:
    """The bools of all cells."""
    if 0 in mask.shape or mask.device.type != "cpu" or missing() is not None or not has_memory(mask.cells):
        return mask.bools()
    made, (said, held) = empty(mask.shape, torch.bool), mask.form()

    def walk(at: int, n: int) -> None:
        native().spread_mask(held.data_ptr(), said.data_ptr(), at, n, made.data_ptr() + at)

    in_runs(made.numel(), walk)
    return made


def kept_where_reached(cells: Tensor, reach: Tensor) -> Tensor:
    """`cells` where the reach is above 0, else 0."""
    if n := repeated(cells, reach):
        return kept_where_reached(once(cells, n), once(reach, n)).expand(cells.shape)
    if not are_dense(cells, reach := laid_out(reach)):
        return select(cells, is_reached(reach))
    return walked(cells, reach, of_reach=True)


def as_cotangent(mask: Tensor) -> Tensor:
    """1 where the mask is True, else 0."""
    if n := repeated(mask):
        return as_cotangent(once(mask, n)).expand(mask.shape)
    if not are_dense(mask := laid_out(mask)):
        return mask.to(DTYPE)
    made = empty(mask.shape, DTYPE)
    in_runs(mask.numel(), lambda at, n: native().to_reach(mask.data_ptr() + at, n, made.data_ptr() + 2 * at))
    return made


def is_reached(reach: Tensor) -> Tensor:
    """Where a reach is above 0."""
    if n := repeated(reach):
        return is_reached(once(reach, n)).expand(reach.shape)
    if reach.dtype is not DTYPE or not are_dense(reach):
        return reach > 0
    made = empty(reach.shape, torch.bool)
    in_runs(reach.numel(), lambda at, n: native().to_mask(reach.data_ptr() + 2 * at, n, made.data_ptr() + at))
    return made


def repeated(*tensors: Tensor) -> int:
    """Along how many of their last dims tensors of one shape repeat one cell, as `expand` makes them; 0 as a rule."""
    first = tensors[0]
    if any(x.is_contiguous() or x.shape != first.shape or is_followed(x) or not has_memory(x) for x in tensors):
        return 0
    n, n_cells = 0, 1
    for size, *steps in zip(reversed(first.shape), *(reversed(x.stride()) for x in tensors), strict=True):
        if size > 1 and any(steps):
            break
        n, n_cells = n + 1, n_cells * size
    return n if n_cells > 1 else 0


def once(tensor: Tensor, n: int) -> Tensor:
    """The tensor with size 1 along its last n dims, which repeat."""
    return tensor.as_strided((*tensor.shape[: tensor.ndim - n], *(1,) * n), tensor.stride())


def laid_out(mask: Tensor) -> Tensor:
    """The mask with its cells side by side: a byte copied takes a tenth of the time of a step over strides."""
    return mask if mask.is_contiguous() else mask.contiguous()


def are_bools(cells: Tensor) -> bool:
    """Whether bytes are 0 and 1 alone: torch takes any, and some of its kernels then go wrong. Without torch's threads."""
    raw = cells.view(torch.uint8)
    if missing() is not None or raw.device.type != "cpu" or not has_memory(raw):
        return not raw.numel() or bool(raw.amax() <= 1)
    lined = raw if raw.ndim > 1 and not raw.is_contiguous() else raw.view(1, -1)
    sizes, steps = lined.shape, lined.stride()
    for index in product(*map(range, sizes[:-2])):
        at = lined.data_ptr() + sum(i * step for i, step in zip(index, steps, strict=False))
        if not native().are_bools(at, sizes[-2], steps[-2], sizes[-1], steps[-1]):
            return False
    return True


def spread(mask: Tensor) -> Tensor:
    """A copy of a mask whose last dim repeats one cell: without torch's threads, which wait for each other in ours."""
    first = mask[..., 0].contiguous()
    if mask.shape[-1] <= 1 or not are_dense(first):
        return mask.contiguous()
    made = empty(mask.shape, torch.bool)
    native().spread_rows(first.data_ptr(), first.numel(), mask.shape[-1], made.data_ptr())
    return made


def rows_alike(mask: Tensor) -> Tensor | None:
    """(..., n) -> (...): what each row of a mask says of all its cells; None where one says two things."""
    if mask.shape[-1] == 1 or repeated(mask):
        return mask[..., 0]
    if 0 in mask.shape or not are_dense(mask):
        first = mask[..., :1]
        return first.squeeze(-1) if mask.shape[-1] and torch.equal(mask, first.expand(mask.shape)) else None
    made = empty(mask.shape[:-1], torch.bool)
    is_whole = native().rows_alike(mask.data_ptr(), made.numel(), mask.shape[-1], made.data_ptr())
    return made if is_whole else None


def hide_rows(cells: Tensor, valid: Tensor) -> None:
    """Sets the rows of (..., n) that are not valid, (...), to 0: without a thread, for they are few."""
    if are_dense(cells) and are_dense(valid := laid_out(valid)):
        native().hide_rows(cells.data_ptr(), valid.data_ptr(), valid.numel(), cells.shape[-1] * cells.itemsize)
    else:
        cells.masked_fill_(~valid.unsqueeze(-1), 0)


def valid_first(mask: Tensor) -> list[int] | None:
    """(m, ..., n) -> m: how many cells of a row are valid, where these come first, as many in all rows at an index of m."""
    if not are_dense(mask := laid_out(mask)):
        return None
    lengths = torch.empty(mask.shape[:-1], dtype=torch.int64)
    if not native().lengths_of(mask.data_ptr(), lengths.numel(), mask.shape[-1], lengths.data_ptr()):
        return None
    by_index = lengths.view(len(mask), -1)
    found: list[int] = by_index[:, 0].tolist()
    return found if torch.equal(by_index, by_index[:, :1].expand_as(by_index)) else None


def longest_row(cells: Tensor, valid: Tensor | None = None, *, together: bool = False) -> float | None:
    """The largest sum of squares of a valid row, (..., n), NaN where one is; None where kernels do not read the cells.

    `together`: no less than it, in a third of the time, since rows side by side are taken as one. In double precision, and
    without torch's threads: where others use the cores too, these wait milliseconds for each other.
    """
    if cells.ndim > 2 and not cells.is_contiguous():
        cells = cells.transpose(-3, -2)  # heads, as layers lay them
        valid = None if valid is None else valid.transpose(-2, -1)
    n = cells.shape[-1] if cells.ndim else 0
    if not n or cells.dtype not in MEASURED or not are_dense(cells):
        return None
    if valid is not None and not are_dense(valid := laid_out(valid)):
        return None
    if valid is None and together:
        n = cells.numel()
    rows, found = cells.numel() // n, []
    is_wide, first, row_bytes, step = (
        cells.dtype is torch.float64,
        cells.data_ptr(),
        n * cells.itemsize,
        max(1, RUN // n),
    )

    def walk(at: int) -> Callable[[], None]:
        n_rows = min(step, rows - at)
        if valid is None:
            return lambda: found.append(native().longest_row(first + at * row_bytes, is_wide, n_rows, n))
        valid_ptr = valid.data_ptr() + at
        return lambda: found.append(
            native().longest_valid(first + at * row_bytes, valid_ptr, is_wide, n_rows, n, together)
        )

    in_parallel(backends()[0], cells.numel() if rows > step else 0, [walk(at) for at in range(0, rows, step)])
    return max(found) if all(x == x for x in found) else math.nan


def are_dense(*tensors: Tensor) -> bool:
    """Whether kernels can walk them side by side."""
    shape = tensors[0].shape
    for tensor in tensors:
        if not tensor.is_cpu or tensor.shape != shape or not tensor.is_contiguous():
            return False
        if tensor.itemsize not in BITS or not has_memory(tensor):
            return False
    return missing() is None and not are_followed(tensors)


def walked(cells: Tensor, keep: Tensor, *, of_reach: bool, made: Tensor | None = None) -> Tensor:
    made = empty(cells.shape, cells.dtype) if made is None else made
    width, keep_width = cells.itemsize, keep.itemsize
    first, keep_first, made_first = cells.data_ptr(), keep.data_ptr(), made.data_ptr()

    def walk(at: int, n: int) -> None:
        native().keep(of_reach, first + at * width, keep_first + at * keep_width, width, n, made_first + at * width)

    in_runs(cells.numel(), walk)
    return made


def in_runs(n_cells: int, walk: Callable[[int, int], None]) -> None:
    """walk(first, how many) over all cells, on all threads where there are many."""
    if n_cells <= RUN:
        walk(0, n_cells)
        return

    def task(at: int) -> Callable[[], None]:
        return lambda: walk(at, min(RUN, n_cells - at))

    in_parallel(backends()[0], n_cells, [task(at) for at in range(0, n_cells, RUN)])
