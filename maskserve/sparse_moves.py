"""Moves of sparse tensors: positions change, cells do not. What the table names for a row is here; the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import index as index_of
from typing import Any

import torch
from torch import Tensor

from maskserve.errors import DimError, ParameterError, ShapeError
from maskserve.patterns import Pattern, checked_shape, ravelled
from maskserve.sparse import SparseTensor, refused
from maskserve.tensor import SPARSE, MaskedTensor, plain_index

Move = Callable[..., Any]


def first_sparse(args: Sequence[Any]) -> Any:
    """The first sparse tensor among the arguments, or in a list of them; None where there is none."""
    flat = (part for arg in args for part in (arg if isinstance(arg, list | tuple) else (arg,)))
    return next((part for part in flat if getattr(part, "layout", None) in SPARSE), None)


def source_of(row: str, value: Any) -> SparseTensor:
    if getattr(value, "layout", None) not in SPARSE:
        raise ParameterError(
            f"{row} takes sparse tensors beside a sparse one, and here is a strided one: to_dense() the others, or "
            "to_sparse() it"
        )
    return value if isinstance(value, SparseTensor) else SparseTensor(value)


# -- kernels ------------------------------------------------------------------------------------------------------


def reshaped(move: Move, tensor: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """The cells in another shape: row-major positions stay."""
    shape = move(meta(tensor.shape), *args, **kwargs).shape
    return tensor._seen(tensor._pattern.of_shape(shape))


def permuted(move: Move, tensor: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Dims in another order; a matrix in CSR stays one, its cells sorted by their new rows."""
    ndim = tensor.ndim
    order = move(torch.empty_strided((1,) * ndim, tuple(range(ndim)), device="meta"), *args, **kwargs).stride()
    coordinates = tensor._pattern.coordinates()
    shape = torch.Size([tensor.shape[dim] for dim in order])
    return rebuilt(tensor, [coordinates[dim] for dim in order], shape, tensor._cells)


def by_cell(move: Move, tensor: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """What is done to each stored cell, or to their memory."""
    made: MaskedTensor = getattr(tensor._cells, move.__name__)(*args, **kwargs)  # our method of torch's name
    return tensor if made is tensor._cells else tensor._like(made)


def joined(move: Move, tensors: Sequence[Any], dim: int = 0) -> SparseTensor:
    """Sparse tensors one after the other along a dim, in the layout of the first."""
    sources = [source_of("cat", tensor) for tensor in tensors]
    shape = joined_shape([source.shape for source in sources], dim)
    along, offset, parts = dim % len(shape), 0, []
    for source in sources:
        coordinates = list(source._pattern.coordinates())
        coordinates[along] = coordinates[along] + offset
        parts.append(coordinates)
        offset += source.shape[along]
    together = [torch.cat(part) for part in zip(*parts, strict=True)]
    cells: MaskedTensor = torch.cat([source._cells for source in sources])  # type: ignore[misc, assignment]  # ours
    return rebuilt(sources[0], together, shape, cells)


def joined_shape(shapes: Sequence[torch.Size], dim: int) -> torch.Size:
    """The shape of tensors one after the other along a dim: torch checks theirs, checked_shape the sum's.

    Tensors of no cells along it do for that; on the meta device torch would import its compiler, for seconds.
    """
    whole = list(shapes[0]) if shapes else []
    if not (-len(whole) <= dim < len(whole) and all(len(shape) == len(whole) for shape in shapes)):
        return torch.cat([meta(shape) for shape in shapes], dim).shape
    whole[dim] = sum(shape[dim] for shape in shapes)
    checked_shape(whole)
    torch.cat([torch.empty((*shape[:dim], 0, *shape[dim:][1:])) for shape in shapes], dim)
    return torch.Size(whole)


def stacked(move: Move, tensors: Sequence[Any], dim: int = 0) -> SparseTensor:
    """Sparse tensors one after the other along a new dim."""
    return joined(move, [source_of("stack", tensor).unsqueeze(dim) for tensor in tensors], dim)


def picked(move: Move, tensor: SparseTensor, dim: int, index: Any) -> MaskedTensor:
    """One index of a dim, or several."""
    at = dim % max(tensor.ndim, 1)
    if not -tensor.ndim <= dim < tensor.ndim:
        raise DimError(f"dim {dim} is out of range for a tensor with {tensor.ndim} dims")
    chosen = selected(index, at, tensor.shape[at]) if move.__name__ == "index_select" else index
    return indexed(tensor, (*[slice(None)] * at, chosen))


def selected(index: Any, dim: int, size: int) -> Tensor:
    """The indices of index_select, which takes less than m[...] does: integers from 0 on, in one dim."""
    at = plain_index(index)
    if not isinstance(at, Tensor) or at.dtype not in (torch.int32, torch.int64) or at.ndim > 1:
        given = f"{at.dtype} with {at.ndim} dims" if isinstance(at, Tensor) else type(at).__name__
        raise ParameterError(
            f"index_select: index is {given}; it must be an int32 or int64 tensor with one dim: m[index] takes bool ones",
            parameter="index",
        )
    if bool(((at < 0) | (at >= size)).any()):
        raise DimError(
            f"index_select: an index of dim {dim} is outside 0 to {size - 1}; m[index] counts negative ones from the end"
        )
    return at.reshape(-1)


def narrowed(move: Move, tensor: SparseTensor, dim: int, start: int, length: int) -> MaskedTensor:
    """A range of a dim."""
    move(meta(tensor.shape), dim, start, length)  # which checks it
    begin = start % max(tensor.shape[dim], 1) if start < 0 else start
    return picked(move, tensor, dim, slice(begin, begin + length))


def meta(shape: Sequence[int]) -> Tensor:
    """A tensor of a shape and no memory; in bytes, for torch counts those of the cells up to 2^63 - 1."""
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def rebuilt(
    source: SparseTensor, coordinates: Sequence[Tensor], shape: torch.Size, cells: MaskedTensor
) -> SparseTensor:
    """The cells at new coordinates, put in order."""
    positions = ravelled(coordinates, shape, torch.empty(len(cells), dtype=torch.int64, device=cells.device))
    positions, order = positions.sort()
    return SparseTensor._on(source._pattern.of_shape(shape, positions), cells[order])


# -- indexing -----------------------------------------------------------------------------------------------------


def indexed(tensor: SparseTensor, index: Any) -> SparseTensor:
    """m[i], m[a:b], m[rows], m[None], and a tuple of such, one a dim; one of them at most is a list of indices."""
    given = plain_index(index)
    items = [plain_item(item) for item in (given if isinstance(given, tuple) else (given,))]
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    n_given = sum(item is not None and item is not Ellipsis for item in items)
    if len(dots) > 1:
        raise ParameterError(f"an index holds {len(dots)} times ...; give it once", parameter="index")
    if n_given > tensor.ndim:
        raise DimError(f"{n_given} indices are given, and the tensor has {tensor.ndim} dims")
    for i in dots:
        items[i : i + 1] = [slice(None)] * (tensor.ndim - n_given)
    cuts = [item for item in items if item is not None]
    if sum(not isinstance(item, int | slice) for item in cuts) > 1:
        raise refused("indexing by several lists", tensor.shape)
    for dim in reversed(range(len(cuts))):
        tensor = cut(tensor, dim, cuts[dim])
    if len(cuts) == len(items):
        return tensor if cuts else tensor._seen(tensor._pattern)
    sizes = iter(tensor.shape)
    shape = [1 if item is None else next(sizes) for item in items if item is None or not is_whole(item)]
    return tensor._seen(tensor._pattern.of_shape((*shape, *sizes)))


def is_whole(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def plain_item(item: Any) -> Any:
    """An int for a whole number of any library; all else as it is."""
    n_dims, dtype = getattr(item, "ndim", 0), str(getattr(item, "dtype", ""))
    if isinstance(item, bool) or n_dims or "bool" in dtype:
        return item
    try:
        return index_of(item)
    except TypeError:
        return item


def cut(tensor: SparseTensor, dim: int, item: Any) -> SparseTensor:
    """One dim narrowed, taken at some indices, or left at one."""
    size = tensor.shape[dim]
    if isinstance(item, slice):
        try:
            start, stop, step = item.indices(size)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"a slice of dim {dim}: {error}", parameter="index") from error
        if step < 1:
            raise ParameterError(f"the step of a slice is {step}; torch takes steps of at least 1", parameter="index")
        return ranged(tensor, dim, start, len(range(start, stop, step)), step)
    if is_whole(item):
        if not -size <= item < size:
            raise DimError(f"index {item} is out of range for dim {dim} of {size} cells")
        one = ranged(tensor, dim, item % size, 1, 1)
        shape = (*tensor.shape[:dim], *tensor.shape[dim + 1 :])
        return SparseTensor._on(one._pattern.of_shape(shape), one._cells)
    return listed(tensor, dim, item)


def ranged(tensor: SparseTensor, dim: int, start: int, n: int, step: int) -> SparseTensor:
    """`n` indices of a dim from `start` on; those of the first dim stand beside each other."""
    pattern = tensor._pattern
    size = tensor.shape[dim]
    if (start, n, step) == (0, size, 1):
        return tensor._seen(pattern)
    shape = torch.Size((*tensor.shape[:dim], n, *tensor.shape[dim + 1 :]))
    below = prod(tensor.shape[dim + 1 :])
    if dim == 0 and step == 1:
        ends = torch.tensor([start * below, (start + n) * below], device=pattern.device)
        first, last = torch.searchsorted(pattern.positions, ends).tolist()
        positions = pattern.positions[first:last] - start * below
        return SparseTensor._on(pattern.of_shape(shape, positions), tensor._cells[first:last])
    index = pattern.positions // below % size - start
    kept = ((index >= 0) & (index < n * step) & (index % step == 0)).nonzero().squeeze(1)
    return moved_along(tensor, kept, dim, index[kept] // step, shape)


def listed(tensor: SparseTensor, dim: int, item: Any) -> SparseTensor:
    """The indices of a dim in a list, in its order; one may stand there twice."""
    size = tensor.shape[dim]
    try:
        at = torch.as_tensor(item, device=tensor.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(
            f"an index of dim {dim} is {type(item).__name__}; give an int, a slice, ..., None, or a list of ints or bools",
            parameter="index",
        ) from error
    if isinstance(item, list) and not item:
        at = at.long()  # torch makes it float32
    if at.dtype is torch.bool and at.ndim == 1:
        if len(at) != size:
            raise ShapeError(f"a bool index has {len(at)} cells, and dim {dim} of the tensor {size}; give one for each")
        at = at.nonzero().squeeze(1)
    if at.ndim != 1 or at.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise refused("indexing by anything but indices, slices and one list of indices", tensor.shape)
    at = at.long()
    if bool(((at < -size) | (at >= size)).any()):
        raise DimError(f"an index is out of range for dim {dim} of {size} cells")
    at = torch.where(at < 0, at + size, at)
    index = tensor._pattern.positions // prod(tensor.shape[dim + 1 :]) % max(size, 1)
    ascending, order = index.sort(stable=True)
    first, last = torch.searchsorted(ascending, at), torch.searchsorted(ascending, at, right=True)
    n = last - first
    new = torch.arange(len(at), device=at.device).repeat_interleave(n)
    begins = n.cumsum(0) - n
    kept = order[first[new] + torch.arange(len(new), device=at.device) - begins[new]]
    shape = torch.Size((*tensor.shape[:dim], len(at), *tensor.shape[dim + 1 :]))
    return moved_along(tensor, kept, dim, new, shape)


def moved_along(tensor: SparseTensor, kept: Tensor, dim: int, index: Tensor, shape: torch.Size) -> SparseTensor:
    """The kept cells, with a new index along a dim."""
    pattern: Pattern = tensor._pattern
    coordinates = [part[kept] for part in pattern.coordinates()]
    coordinates[dim] = index
    return rebuilt(tensor, coordinates, shape, tensor._cells[kept])
