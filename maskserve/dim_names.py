"""Names of dims: which numbers they are, and which live on in a result. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from maskserve.ops.rows import Reduction
from maskserve.payload.metadata import Dims
from maskserve.plan import Plan


def numbers_of(asked: Sequence[int | str], names: Sequence[str]) -> tuple[int, ...] | None:
    """The dims by number; None where one is asked for by a name that is none of `names`.

    >>> numbers_of(("lat", 0), ("time", "lat")), numbers_of(("lon",), ("time", "lat"))
    ((1, 0), None)
    """
    if any(isinstance(dim, str) and dim not in names for dim in asked):
        return None
    return tuple(names.index(dim) if isinstance(dim, str) else dim for dim in asked)


def result_dims(planned: Plan, dims: Dims | None) -> Dims | None:
    """The names of the result's dims, where its input's are `dims`."""
    row, params = planned.row, planned.params
    if dims is None or not isinstance(row, Reduction):
        return dims
    kept = tuple(name for dim, name in enumerate(dims) if params["keepdim"] or dim not in planned.dims)
    return kept if planned.labels is None else (new_dim(row.leading_dim, kept), *kept)


def new_dim(name: str, taken: Dims) -> str:
    """`name`, with an underscore for each dim that has it already."""
    while name in taken:
        name += "_"
    return name
