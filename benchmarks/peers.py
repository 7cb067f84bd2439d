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
from benchmarks.cases import Cell, Sample
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
        OURS: partial(ours, sample.data, dim=cell.dim, **words),
        READ: one_read(row, sample),
        TORCH_MASKED: None if cell.omits_nan else torch_masked(row, cell, sample),
        NUMPY_MA: None if cell.omits_nan else numpy_ma(row, cell, sample),
        PLAIN: plain(row, cell, sample),
        BOTTLENECK: bottleneck(row, cell, sample) if cell.omits_nan else None,
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
    return partial(function, sample.data, cell.dim, mask=sample.full_mask)


NUMPY_NAMES = {"amax": "max", "amin": "min"}
ONE_LESS: dict[str, dict[str, Any]] = {"var": {"ddof": 1}, "std": {"ddof": 1}}
"""numpy and bottleneck divide by the count, torch and maskserve by one less."""


def numpy_ma(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The method of numpy.ma, or its function where there is no method."""
    if str(sample.data.dtype) == "torch.bfloat16":
        return None
    name = NUMPY_NAMES.get(row.name, row.name)
    mask = sample.full_mask
    array = np.ma.masked_array(sample.data.numpy(), np.ma.nomask if mask is None else (~mask).numpy())
    words = {"axis": cell.dim, **ONE_LESS.get(row.name, {})}
    if hasattr(array, name):
        return partial(getattr(array, name), **words)
    function = getattr(np.ma, name, None)
    return function and partial(function, array, **words)


def bottleneck(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """bottleneck's nan function; None where it has none, or is not installed."""
    library = bottleneck_module()
    function = getattr(library, "nan" + NUMPY_NAMES.get(row.name, row.name), None)
    words = {"axis": cell.dim, **ONE_LESS.get(row.name, {})}
    return function and partial(function, sample.data.numpy(), **words)


def bottleneck_module() -> ModuleType | None:
    try:
        return import_module("bottleneck")
    except ImportError:
        return None


def unmasked(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """torch's own op on the data alone: what a call costs at the least."""
    function = getattr(torch, row.name, None) or {"count": torch.count_nonzero}.get(row.name)
    return function and partial(function, sample.data, cell.dim)


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
    if cell.omits_nan and nan_form is None:
        return lambda: form(data, ~data.isnan(), dim)
    return partial(form, data, mask, dim)


def flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1)


def zeroed(x: Tensor, m: Tensor | None) -> Tensor:
    """`x` with 0 where masked, by an integer AND: about twice as fast as torch.where."""
    if m is None:
        return x
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return m.to(bits).neg_().bitwise_and_(x.view(bits)).view(x.dtype)


def filled(x: Tensor, m: Tensor | None, fill: float) -> Tensor:
    return x if m is None else torch.where(m, x, fill)


def count(x: Tensor, m: Tensor | None, dim: int) -> Tensor:
    """How many are valid: an int32 sum of bytes is faster than a sum of bools; in 1-D count_nonzero beats both."""
    if m is None:
        return torch.full((), x.shape[dim]).expand(x.select(dim, 0).shape)
    return m.count_nonzero() if m.ndim == 1 else m.view(torch.uint8).sum(dim, dtype=torch.int32)


def some(x: Tensor, m: Tensor | None, dim: int) -> Tensor:
    """Whether any is valid: the maximum of bytes is faster than any() of bools."""
    return count(x, m, dim) > 0 if m is None else m.view(torch.uint8).amax(dim).view(torch.bool)


def lowest(x: Tensor) -> float:
    return -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


def highest(x: Tensor) -> float:
    return torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).max


def floated(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


def accumulator(x: Tensor) -> torch.dtype:
    """half and bfloat16 overflow on the way."""
    return torch.float32 if x.element_size() < 4 and x.is_floating_point() else floated(x[:0]).dtype


def mean(x: Tensor, m: Tensor | None, dim: int) -> Any:
    n = count(x, m, dim)
    return (zeroed(x, m).sum(dim, dtype=accumulator(x)) / n).to(floated(x[:0]).dtype), n > 0


def var(x: Tensor, m: Tensor | None, dim: int) -> Any:
    n = count(x, m, dim)
    if m is None:
        return floated(x).var(dim), n > 1
    center = zeroed(x, m).sum(dim, keepdim=True, dtype=accumulator(x)) / n.unsqueeze(dim)
    squares = zeroed(x - center, m).square_().sum(dim)
    return (squares / (n - 1)).to(floated(x[:0]).dtype), n > 1


def std(x: Tensor, m: Tensor | None, dim: int) -> Any:
    values, valid = var(x, m, dim)
    return values.sqrt(), valid


def median(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """The mean of the two middle cells, by sorting: nanmedian gives the lower, and nanquantile stops at 2**24 cells."""
    ordered = filled(floated(x), m, torch.inf).sort(dim).values
    n = count(x, m, dim).unsqueeze(dim).long()
    middle = ordered.gather(dim, (n - 1).clamp(min=0) // 2) + ordered.gather(dim, (n // 2).clamp(max=x.shape[dim] - 1))
    return middle.squeeze(dim) / 2, n.squeeze(dim) > 0


def softmax(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return zeroed(filled(floated(x), m, -torch.inf).softmax(dim), m), m


def log_softmax(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return zeroed(filled(floated(x), m, -torch.inf).log_softmax(dim), m), m


Form = Callable[[Tensor, Tensor | None, int], Any]
FORMS: dict[str, Form] = {
    "sum": lambda x, m, dim: (zeroed(x, m).sum(dim), some(x, m, dim)),
    "mean": mean,
    "var": var,
    "std": std,
    "amax": lambda x, m, dim: (filled(x, m, lowest(x)).amax(dim), some(x, m, dim)),
    "amin": lambda x, m, dim: (filled(x, m, highest(x)).amin(dim), some(x, m, dim)),
    "argmax": lambda x, m, dim: (filled(x, m, lowest(x)).argmax(dim), some(x, m, dim)),
    "argmin": lambda x, m, dim: (filled(x, m, highest(x)).argmin(dim), some(x, m, dim)),
    "count": lambda x, m, dim: count(x, m, dim),
    "any": lambda x, m, dim: ((x != 0 if m is None else m & (x != 0)).any(dim), some(x, m, dim)),
    "all": lambda x, m, dim: ((x != 0 if m is None else ~m | (x != 0)).all(dim), some(x, m, dim)),
    "logsumexp": lambda x, m, dim: (filled(floated(x), m, -torch.inf).logsumexp(dim), some(x, m, dim)),
    "median": median,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "cumsum": lambda x, m, dim: (zeroed(zeroed(x, m).cumsum(dim), m), m),
}
NAN_FORMS: dict[str, Form] = {
    "sum": lambda x, m, dim: x.nansum(dim),
    "mean": lambda x, m, dim: x.nanmean(dim),
}
