"""Other people's libraries, called as their documentation says: each gives a call, or None where it has no such op.

What a library wants in a form of its own (NaN for missing, its own arrays, a compiled function) is made before the clock runs.
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

from benchmarks.cases import Cell, Sample, arguments, takes_nan
from maskserve.plan import SlicedRow

Call = Callable[[], Any]
Library = Callable[[SlicedRow, Cell, Sample], Call | None]

NUMPY_NAMES = {"amax": "max", "amin": "min", "fill": "filled"}
NUMPY_WORDS: dict[str, dict[str, Any]] = {"var": {"ddof": 1}, "std": {"ddof": 1}, "argsort": {"kind": "stable"}}
"""numpy and its like divide by the count, torch and maskserve by one less; numpy's sorts are not stable unasked."""
IN_PLACE = ("sort",)
"""Methods that overwrite the data, where the function of the same name does not."""
WHERE = ("sum", "mean", "var", "std", "amax", "amin", "any", "all", "prod")
"""The reductions that take where= in numpy and in JAX."""


def installed(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def as_numpy(sample: Sample) -> np.ndarray[Any, Any] | None:
    return None if str(sample.data.dtype) == "torch.bfloat16" else sample.data.numpy()


def flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1)


def torch_masked(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The op of the same name in torch.masked."""
    function = getattr(import_module("torch.masked"), row.name, None)
    if function is None or cell.omits_nan:
        return None
    if row.name == "median" and cell.dim is None:  # its dim has a default, and None is not one of its values
        return partial(function, sample.data.reshape(-1), 0, mask=flat(sample.full_mask))
    return partial(function, sample.data, *arguments(row, cell), mask=sample.full_mask)


def numpy_ma(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """The method of numpy.ma, or its function where there is no method."""
    data, mask = as_numpy(sample), sample.full_mask
    if data is None or cell.omits_nan:
        return None
    name = NUMPY_NAMES.get(row.name, row.name)
    array = np.ma.masked_array(data, np.ma.nomask if mask is None else (~mask).numpy())
    words = NUMPY_WORDS.get(row.name, {})
    if hasattr(array, name) and name not in IN_PLACE:
        return partial(getattr(array, name), *arguments(row, cell), **words)
    function = getattr(np.ma, name, None)
    return function and partial(function, array, *arguments(row, cell), **words)


def least(data: np.ndarray[Any, Any], *, largest: bool) -> Any:
    """The identity of a maximum or a minimum."""
    if data.dtype.kind == "f":
        return -np.inf if largest else np.inf
    info = np.iinfo(data.dtype)
    return info.min if largest else info.max


def where_words(row: SlicedRow, cell: Cell, data: np.ndarray[Any, Any], mask: Any) -> dict[str, Any]:
    """axis, where= and what else numpy and JAX need of one reduction."""
    words: dict[str, Any] = {"axis": cell.dim, **NUMPY_WORDS.get(row.name, {})}
    if mask is None:
        return words
    if row.name in ("amax", "amin"):
        words["initial"] = least(data, largest=row.name == "amax")
    return words | {"where": mask}


def numpy_where(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """numpy's where= argument."""
    data = as_numpy(sample)
    if data is None or cell.omits_nan or row.name not in WHERE:
        return None
    mask = None if sample.mask is None else sample.mask.numpy()
    return partial(getattr(np, NUMPY_NAMES.get(row.name, row.name)), data, **where_words(row, cell, data, mask))


def jax_where(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """JAX's where= argument, compiled; its arrays are made, and the function compiled, before the clock runs."""
    jax, data = installed("jax"), as_numpy(sample)
    if jax is None or data is None or cell.omits_nan:
        return None
    jax.config.update("jax_enable_x64", True)  # else it computes f64 and i64 in 32 bits
    jnp = import_module("jax.numpy")
    mask = None if sample.mask is None else jnp.asarray(sample.mask.numpy())
    if row.name in WHERE:
        function = getattr(jnp, NUMPY_NAMES.get(row.name, row.name))
        words = where_words(row, cell, data, mask)
    elif row.name in ("softmax", "log_softmax", "logsumexp"):
        function = getattr(jax.nn, row.name)
        words = {"axis": cell.dim} | ({} if mask is None else {"where": mask})
    else:
        return None
    masks = {name: words.pop(name) for name in ("where",) if name in words}
    compiled = jax.jit(lambda cells, **given: function(cells, **words, **given))
    call = partial(compiled, jnp.asarray(data), **masks)
    return lambda: call().block_until_ready()


def with_nan(row: SlicedRow, cell: Cell, sample: Sample) -> np.ndarray[Any, Any] | None:
    """The data with NaN where a cell is missing; None where it cannot be, or where the mask is the point."""
    if not sample.data.is_floating_point() or str(sample.data.dtype) == "torch.bfloat16":
        return None
    if takes_nan(row) and not cell.omits_nan:
        return None
    return (sample.data if sample.mask is None else sample.data.masked_fill(~sample.mask, torch.nan)).numpy()


BOTTLENECK_NAMES = {"rank": "nanrankdata", "ffill": "push"}


def bottleneck(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """bottleneck's nan function."""
    name = BOTTLENECK_NAMES.get(row.name, "nan" + NUMPY_NAMES.get(row.name, row.name))
    function, data = getattr(installed("bottleneck"), name, None), with_nan(row, cell, sample)
    if function is None or data is None:
        return None
    return partial(function, data, axis=cell.dim, **NUMPY_WORDS.get(row.name, {}))


def numbagg(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """numbagg's nan function, compiled by numba before the clock runs."""
    name = row.name if row.name in ("ffill", "bfill") else "nan" + NUMPY_NAMES.get(row.name, row.name)
    function, data = getattr(installed("numbagg"), name, None), with_nan(row, cell, sample)
    if function is None or data is None or row.name == "quantile":  # its quantiles stand last, not first
        return None
    return partial(function, data, axis=cell.dim, **NUMPY_WORDS.get(row.name, {}))


ARROW_NAMES = {"var": "variance", "std": "stddev", "amax": "max", "amin": "min", "prod": "product"}


def pyarrow(row: SlicedRow, cell: Cell, sample: Sample) -> Call | None:
    """Arrow's aggregate of one array with nulls: it knows no dims."""
    names = ("sum", "mean", "var", "std", "amax", "amin", "prod", "count", "any", "all")
    compute, data = installed("pyarrow.compute"), as_numpy(sample)
    if compute is None or data is None or cell.omits_nan or cell.dim is not None or row.name not in names:
        return None
    mask = sample.full_mask
    array = import_module("pyarrow").array(data.reshape(-1), mask=None if mask is None else (~mask).numpy().reshape(-1))
    function = getattr(compute, ARROW_NAMES.get(row.name, row.name))
    call = partial(function, array, **NUMPY_WORDS.get(row.name, {}))
    return lambda: call().as_py()


TORCH_MASKED, BOTTLENECK = "torch.masked", "bottleneck"
LIBRARIES: dict[str, Library] = {
    TORCH_MASKED: torch_masked,
    "numpy.ma": numpy_ma,
    "numpy where=": numpy_where,
    "JAX where=": jax_where,
    BOTTLENECK: bottleneck,
    "numbagg": numbagg,
    "pyarrow": pyarrow,
}
COMPILED = ("JAX where=", "numbagg")
"""Their first call compiles, and counts for nothing."""
