"""Who is timed beside maskserve: torch.masked, numpy.ma, plain torch, bottleneck, and one read of the same bytes.

Each contender is a call without arguments that gives values, or (values, valid); a peer without the op is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import maskserve as ms
from benchmarks.cases import Cell, Sample, arguments, leading, takes_nan
from benchmarks.forms import FORMS, NAN_FORMS
from maskserve.ops.passes import COUNT
from maskserve.ops.rows import Reduction
from maskserve.plan import SlicedRow

Call = Callable[[], Any]

OURS, READ = "maskserve", "one read"
TORCH_MASKED, NUMPY_MA, PLAIN, BOTTLENECK = "torch.masked", "numpy.ma", "plain torch", "bottleneck"
UNMASKED = "unmasked torch"
PEERS = (TORCH_MASKED, NUMPY_MA, PLAIN, BOTTLENECK)


def contenders(row: SlicedRow, cell: Cell, sample: Sample) -> dict[str, Call]:
    """Every call to time for one op on one sample, by name."""
    ours = getattr(ms, row.name)
    words = {"nan": "omit"} if cell.omits_nan else {"mask": sample.mask}
    calls: dict[str, Call | None] = {
        OURS: partial(ours, sample.data, *arguments(row, cell), **words),
        READ: one_read(row, sample),
        TORCH_MASKED: None if cell.omits_nan else torch_masked(row, cell, sample),
        NUMPY_MA: None if cell.omits_nan else numpy_ma(row, cell, sample),
        PLAIN: plain(row, cell, sample),
        BOTTLENECK: bottleneck(row, cell, sample) if cell.omits_nan or not takes_nan(row) else None,
    }
    return {name: call for name, call in calls.items() if call is not None}


# -- one read -----------------------------------------------------------------------------------------------------


def one_read(row: SlicedRow, sample: Sample) -> Call:
    """The bytes that `row` must read, once, with all cores; for a result as large as the data, as many written too."""
    reads_data = not (isinstance(row, Reduction) and row.passes == (COUNT,))
    mask = None if sample.mask is None else words(sample.mask)
    data = words(sample.data) if reads_data or mask is None else None
    if isinstance(row, Reduction):
        tensors = [tensor for tensor in (data, mask) if tensor is not None]
        return lambda: [tensor.sum() for tensor in tensors]
    written = torch.empty_like(sample.data)
    return lambda: (written.copy_(sample.data), mask is None or mask.sum())


def words(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` as float32: the sum of a large float32 tensor is the fastest plain read that torch has."""
    cells = tensor.reshape(-1).view(torch.uint8)
    return cells[: len(cells) // 4 * 4].view(torch.float32)


# -- libraries ----------------------------------------------------------------------------------------------------


def torch_masked(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The op of the same name in torch.masked."""
    function = getattr(import_module("torch.masked"), row.name, None)
    if function is None:
        return None
    if row.name == "median" and cell.dim is None:  # its dim has a default, and None is not one of its values
        return partial(function, sample.data.reshape(-1), 0, mask=flat(sample.full_mask))
    return partial(function, sample.data, *arguments(row, cell), mask=sample.full_mask)


NUMPY_NAMES = {"amax": "max", "amin": "min", "fill": "filled"}
NUMPY_WORDS: dict[str, dict[str, Any]] = {"var": {"ddof": 1}, "std": {"ddof": 1}, "argsort": {"kind": "stable"}}
"""numpy and bottleneck divide by the count, torch and maskserve by one less; numpy's sorts are not stable unasked."""
IN_PLACE = ("sort",)
"""Methods that overwrite the data, where the function of the same name does not."""


def numpy_ma(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The method of numpy.ma, or its function where there is no method."""
    if str(sample.data.dtype) == "torch.bfloat16":
        return None
    name = NUMPY_NAMES.get(row.name, row.name)
    mask = sample.full_mask
    array = np.ma.masked_array(sample.data.numpy(), np.ma.nomask if mask is None else (~mask).numpy())
    words = NUMPY_WORDS.get(row.name, {})
    if hasattr(array, name) and name not in IN_PLACE:
        return partial(getattr(array, name), *arguments(row, cell), **words)
    function = getattr(np.ma, name, None)
    return function and partial(function, array, *arguments(row, cell), **words)


BOTTLENECK_NAMES = {"rank": "nanrankdata", "ffill": "push"}


def bottleneck(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """bottleneck's nan function; None where it has none, or is not installed. A mask becomes NaN before the clock runs."""
    name = BOTTLENECK_NAMES.get(row.name, "nan" + NUMPY_NAMES.get(row.name, row.name))
    function = getattr(bottleneck_module(), name, None)
    if function is None or not sample.data.is_floating_point():
        return None
    data = sample.data if sample.mask is None else sample.data.masked_fill(~sample.mask, torch.nan)
    words = {"axis": cell.dim, **NUMPY_WORDS.get(row.name, {})}
    return partial(function, data.numpy(), **words)


def bottleneck_module() -> ModuleType | None:
    try:
        return import_module("bottleneck")
    except ImportError:
        return None


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


def flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1)
