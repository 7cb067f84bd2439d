"""Cells kept or set to 0 by a mask or a reach, and the one made of the other: in one pass where cells are dense.

The bits are those of `select` and `> 0`, which do it where autograd or a transform looks on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskserve.backends import backends
from maskserve.backends.cpu import empty, missing, native
from maskserve.backends.reference.cells import BITS, select
from maskserve.execution import in_parallel
from maskserve.tracing import has_memory, is_followed

DTYPE = torch.bfloat16
"""Counts in it saturate, and neither cancel nor vanish."""
RUN = 1 << 20
"""Cells that a thread walks at a time."""


def kept(cells: Tensor, mask: Tensor | None) -> Tensor:
    """`cells` where the mask is True, else 0. Without a mask they are the cells themselves: never write into them."""
    if mask is None or not are_dense(cells, mask):
        return select(cells, mask)
    return walked(cells, mask, of_reach=False)


def kept_in_place(cells: Tensor, mask: Tensor) -> Tensor:
    """The same, in the memory of `cells`, which are nobody else's; they may come back in other memory."""
    if not are_dense(cells, mask):
        return select(cells, mask)
    return walked(cells, mask, of_reach=False, made=cells)


def kept_where_reached(cells: Tensor, reach: Tensor) -> Tensor:
    """`cells` where the reach is above 0, else 0."""
    if not are_dense(cells, reach):
        return select(cells, is_reached(reach))
    return walked(cells, reach, of_reach=True)


def as_cotangent(mask: Tensor) -> Tensor:
    """1 where the mask is True, else 0."""
    if not are_dense(mask):
        return mask.to(DTYPE)
    made = empty(mask.shape, DTYPE)
    in_runs(mask.numel(), lambda at, n: native().to_reach(mask.data_ptr() + at, n, made.data_ptr() + 2 * at))
    return made


def is_reached(reach: Tensor) -> Tensor:
    """Where a reach is above 0."""
    if reach.dtype is not DTYPE or not are_dense(reach):
        return reach > 0
    made = empty(reach.shape, torch.bool)
    in_runs(reach.numel(), lambda at, n: native().to_mask(reach.data_ptr() + 2 * at, n, made.data_ptr() + at))
    return made


def are_dense(*tensors: Tensor) -> bool:
    """Whether kernels can walk them side by side."""
    shape = tensors[0].shape
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.shape != shape or not tensor.is_contiguous():
            return False
        if tensor.itemsize not in BITS or not has_memory(tensor) or is_followed(tensor):
            return False
    return missing() is None


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
