"""Who is timed beside maskserve: other libraries, the best of plain torch, and reads and copies of the same bytes.

Each contender is a call without arguments that gives values, or (values, valid); a peer without the op is left out.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

import maskserve as ms
from benchmarks.cases import Cell, Sample, arguments, leading
from benchmarks.forms import FORMS, NAN_FORMS
from benchmarks.libraries import COMPILED, LIBRARIES, Call, flat
from maskserve.ops.passes import COUNT
from maskserve.ops.rows import Reduction
from maskserve.plan import SlicedRow

OURS, READ, COPY, PLAIN, UNMASKED = "maskserve", "one read", "one copy", "plain torch", "unmasked torch"
BOUNDS = (READ, COPY)
"""What only moves bytes: it has no result to compare."""
PEERS = (PLAIN, *LIBRARIES)


def contenders(row: SlicedRow, cell: Cell, sample: Sample, *, among: tuple[str, ...] | None = None) -> dict[str, Call]:
    """Every call to time for one op on one sample, by name: ours, the bounds, and the peers `among`, None all."""
    ours = getattr(ms, row.name)
    words = {"nan": "omit"} if cell.omits_nan else {"mask": sample.mask}
    calls: dict[str, Call | None] = {
        OURS: partial(ours, sample.data, *arguments(row, cell), **words),
        READ: one_read(row, cell, sample),
        COPY: one_copy(row, cell, sample),
        PLAIN: plain(row, cell, sample),
        **{name: library(row, cell, sample) for name, library in LIBRARIES.items()},
    }
    if among is not None:
        calls = {name: call for name, call in calls.items() if name in (OURS, *BOUNDS, *among)}
    for name in COMPILED:
        if (call := calls.get(name)) is not None:
            with suppress(Exception):  # it fails again, and is named, where results are compared
                call()
    return {name: call for name, call in calls.items() if call is not None}


# -- bounds -------------------------------------------------------------------------------------------------------


def one_read(row: SlicedRow, cell: Cell, sample: Sample) -> Call:
    """The bytes that `row` must read, once, with all cores; a result as large as the data is written, to memory at hand."""
    reads_data = not (isinstance(row, Reduction) and row.passes == (COUNT,))
    mask = None if sample.mask is None else words(sample.mask)
    data = words(sample.data) if reads_data or mask is None else None
    if isinstance(row, Reduction):
        tensors = [tensor for tensor in (data, mask) if tensor is not None]
        return lambda: [tensor.sum() for tensor in tensors]
    written = torch.empty(sample.data.shape, dtype=result_dtype(row, cell))
    return lambda: (written.copy_(sample.data), mask is None or mask.sum())


def one_copy(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The same into fresh memory, which the system clears: what a result as large as the data costs at the least."""
    if isinstance(row, Reduction):
        return None
    mask, dtype = None if sample.mask is None else words(sample.mask), result_dtype(row, cell)
    return lambda: (sample.data.to(dtype, copy=True), mask is None or mask.sum())


def result_dtype(row: SlicedRow, cell: Cell) -> torch.dtype:
    found: torch.dtype = getattr(torch, row.result(cell.dtype, {}).torch)
    return found


def words(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` as float32: the sum of a large float32 tensor is the fastest plain read that torch has."""
    cells = tensor.reshape(-1).view(torch.uint8)
    return cells[: len(cells) // 4 * 4].view(torch.float32)


def unmasked(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """torch's own op on the data alone: what a call costs at the least."""
    function = getattr(torch, row.name, None) or {"count": torch.count_nonzero}.get(row.name)
    return function and partial(function, sample.data, *arguments(row, cell))


# -- plain torch --------------------------------------------------------------------------------------------------


def plain(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The fastest formulation in plain torch that gives (values, valid) and holds with NaN under the mask."""
    nan_form = NAN_FORMS.get(row.name) if cell.omits_nan else None
    form = nan_form or FORMS.get(row.name)
    if form is None:
        return None
    data, mask, dim = sample.data, sample.full_mask, cell.dim
    if dim is None:
        data, mask, dim = data.reshape(-1), flat(mask), 0
    given = leading(row)
    if cell.omits_nan and nan_form is None:
        return lambda: form(data, ~data.isnan(), dim, *given)
    return partial(form, data, mask, dim, *given)
