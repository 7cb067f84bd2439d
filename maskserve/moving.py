"""Move rows: data and mask by the same way, views staying views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.backends.reference.moves import Masked
from maskserve.cellwise import HOMES
from maskserve.compact import Compact
from maskserve.compact_moves import joined, viewed
from maskserve.errors import DimError, DtypeError, MaskserveError, ParameterError, ShapeError, UncoveredFunctionError
from maskserve.gates import hidden
from maskserve.health import is_of_device
from maskserve.making import tensor_of
from maskserve.ops.rows import Cells, Move
from maskserve.reach import channel
from maskserve.sparse_moves import first_sparse
from maskserve.tensor import MaskedTensor
from maskserve.tracing import in_transform, is_followed, same_memory

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def moved(row: Move, args: Arguments, kwargs: Keywords) -> Any:
    """Data and mask by the same way, as one tensor or a tuple of them; a result is a view where torch's is."""
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        raise DtypeError(f"{row.name} as another dtype would take the mask's bytes for something else; use .to(dtype)")
    if kwargs.pop("out", None) is not None:
        raise UncoveredFunctionError(f"{row.name}: out= would lose the mask; use the returned MaskedTensor")
    try:
        if first_sparse(args) is not None:
            from maskserve import sparse_ops

            return sparse_ops.moved(row, args, kwargs)
        return by_kernel(row, args, kwargs) if row.function else by_torch(row, args, kwargs)
    except MaskserveError:
        raise
    except IndexError as error:
        raise DimError(f"{row.name}: {str(error).splitlines()[0]}") from error
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        if is_of_device(error):
            raise
        raise ShapeError(f"{row.name}: {str(error).splitlines()[0]}") from error


def by_torch(row: Move, args: Arguments, kwargs: Keywords) -> Any:
    """torch's function on the data, and again on the masks."""
    sources, others = parted(row, args, kwargs)
    move, listed = function(row), row.cells is Cells.LIST

    def go(cells: list[Tensor]) -> Any:
        return move(cells, *others, **kwargs) if listed else move(*cells, *others, **kwargs)

    data = go([source._data for source in sources])
    reach = the_same_way(go, reaches) if (reaches := asked(sources)) else None
    if all(source._held is None for source in sources):
        return placed(data, None, reach, sources)
    if row.keeps_places and isinstance(sources[0]._held, Compact):
        return placed(data, sources[0]._held, reach, sources)
    if (compact := in_form(row, go, sources, data)) is not None:
        return placed(data, compact, reach, sources)
    masks = [source._full_mask() for source in sources]
    return placed(data, ones_beside(go, masks) if row.zeros else the_same_way(go, masks), reach, sources)


def in_form(row: Move, go: Callable[[list[Tensor]], Any], sources: Sequence[MaskedTensor], data: Any) -> Any:
    """The masks of the results in the compact form of the sources' masks; None where they have none."""
    held = [source._held for source in sources]
    if any(isinstance(mask, Tensor) for mask in held) or row.zeros or in_transform():
        return None
    compact = [mask for mask in held if isinstance(mask, Compact)]
    if row.cells is Cells.LIST:
        together = [None if isinstance(mask, Tensor) else mask for mask in held]
        return joined(together, [source._data.shape for source in sources], go, data.shape)
    first = data if isinstance(data, Tensor) else next(iter(data), None)
    if (
        len(sources) > 1 or first is None or not same_memory(first, sources[0]._data)
    ):  # copies would be made of masks too
        return None
    return viewed(compact[0], lambda probe: go([probe]))


def asked(sources: Sequence[MaskedTensor]) -> list[Tensor]:
    """The reaches of all sources, where a gradient asks for one of them."""
    if not torch.is_grad_enabled() or all(source._reach is None for source in sources):
        return []
    return [channel(source._data) if source._reach is None else source._reach for source in sources]


def the_same_way(go: Callable[[list[Tensor]], Any], masks: list[Tensor]) -> Any:
    """The masks moved; copies of them where their strides allow no view and the data's do."""
    try:
        return go(masks)
    except RuntimeError:
        return go([mask.contiguous() for mask in masks])


def ones_beside(go: Callable[[list[Tensor]], Tensor], masks: list[Tensor]) -> Tensor:
    """The masks moved, True where torch makes zeros."""
    return ~go([~mask for mask in masks])


def by_kernel(row: Move, args: Arguments, kwargs: Keywords) -> Any:
    """The row's kernel, on every tensor argument with its mask."""
    sources = [source_of(args[0])]

    def pair(argument: Any) -> Any:
        if not isinstance(argument, Tensor | MaskedTensor):
            return argument
        source = source_of(argument)
        reach = source._reach if torch.is_grad_enabled() else None
        return Masked(source._data, None if source._held is None else source._full_mask(), reach)

    made: Masked = kernel(row.function)(
        pair(sources[0]), *map(pair, args[1:]), **{k: pair(v) for k, v in kwargs.items()}
    )
    return placed(made.data, made.mask, made.reach, sources)


@cache
def function(row: Move) -> Callable[..., Any]:
    """torch's function of the row's name; the method, which takes (2, 3) and 2, 3 alike, where there is one."""
    homes = (torch.Tensor, *HOMES) if row.is_method else HOMES
    found: Callable[..., Any] = next(getattr(home, row.name) for home in homes if hasattr(home, row.name))
    return found


def parted(row: Move, args: Arguments, kwargs: Keywords) -> tuple[list[MaskedTensor], Arguments]:
    """The arguments that hold cells, and the others."""
    if row.cells is Cells.TWO and "src" in kwargs:
        args = (args[0], kwargs.pop("src"), *args[1:])
    others: Arguments
    if row.cells is Cells.ALL:
        cells, others = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args, ()
    elif row.cells is Cells.LIST:
        cells, others = args[0], args[1:]
    else:
        n = 2 if row.cells is Cells.TWO else 1
        cells, others = args[:n], args[n:]
    if not isinstance(cells, Sequence):
        raise ParameterError(f"{row.name} takes a list of tensors, not a {type(cells).__name__}", parameter="tensors")
    return [source_of(cell) for cell in cells], tuple(
        other.to_tensor() if isinstance(other, MaskedTensor) else other for other in others
    )


def source_of(value: Any) -> MaskedTensor:
    """Anything that can be a tensor; a plain one is valid everywhere."""
    tensor = tensor_of(value)
    return tensor if isinstance(tensor, MaskedTensor) else MaskedTensor._of(tensor, None)


# -- results ------------------------------------------------------------------------------------------------------


def placed(data: Any, mask: Any, reach: Any, sources: Sequence[MaskedTensor]) -> Any:
    """MaskedTensors of moved parts: views of the source whose memory they share, or copies with 0 under the mask."""
    if isinstance(data, tuple | list):
        none = [None] * len(data)
        parts = zip(data, none if mask is None else mask, none if reach is None else reach, strict=True)
        return tuple(placed(*part, sources) for part in parts)
    if not is_followed(data):
        reach = None
    for source in sources:
        if same_memory(data, source._data):
            made = source._view_of(data, mask, reach)
            made._owns_mask &= data.dtype is source.dtype  # a real part made valid would make the imaginary one so
            return made
    if mask is None:
        return MaskedTensor._of(data, None, reach)
    if isinstance(mask, Compact):
        return MaskedTensor._of(hidden(data, mask, in_place=True), mask, reach)
    if any(source._held is not None and same_memory(mask, source._mask) for source in sources):
        mask = mask.clone()
    return MaskedTensor._of(select(data, mask), mask, reach)
