"""Sparse MaskedTensors: the cells that are stored, in one dim, and the pattern of where they are; the others are masked.

The stored cells are a strided MaskedTensor with its own mask and history, so an op on cells knows of no layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from maskserve.backends.reference.cells import BITS, select
from maskserve.compact import is_plain
from maskserve.compiling import uncompiled
from maskserve.errors import (
    DtypeError,
    MaskDtypeError,
    MaskError,
    MaskMismatchError,
    ShapeError,
    TooLargeError,
    UncoveredFunctionError,
)
from maskserve.formatting import SUMMARIZED, text_of_stored
from maskserve.making import as_masked_tensor
from maskserve.patterns import COO, CSR, LAYOUTS, Pattern, checked_shape, found, ravelled, sorted_once, within
from maskserve.tensor import MaskedTensor
from maskserve.tracing import is_followed

if TYPE_CHECKING:
    import numpy as np


def refused(what: str, shape: torch.Size) -> UncoveredFunctionError:
    """The error of what is defined for strided tensors alone."""
    return UncoveredFunctionError(
        f"{what} takes strided tensors, and this one is sparse: to_dense() makes one of shape {tuple(shape)}, which holds "
        "every cell"
    )


@uncompiled
class SparseTensor(MaskedTensor):
    """A MaskedTensor in COO or CSR: `_cells` are the stored ones, (n,), `_pattern` says where they are.

    A stored cell may be masked itself, and a stored 0 is a valid 0. Whoever asks for data and mask as one strided pair
    is refused: nothing is spread out without being asked for.
    """

    __slots__ = ("_cells", "_pattern")

    _cells: MaskedTensor
    _pattern: Pattern

    def __init__(self, data: Any, mask: Any = None) -> None:
        self._pattern, self._cells = parts_of(data, mask)

    @classmethod
    def _on(cls, pattern: Pattern, cells: MaskedTensor) -> SparseTensor:
        """The cells where the pattern says."""
        made = object.__new__(cls)
        made._pattern, made._cells = pattern, cells
        return made

    def _like(self, cells: MaskedTensor) -> SparseTensor:
        return SparseTensor._on(self._pattern, cells)

    def _seen(self, pattern: Pattern) -> SparseTensor:
        """A view: the same memory and history, and a tensor of its own, whose requires_grad_() is not the source's."""
        return SparseTensor._on(pattern, self._cells[:])

    def _refuse(self) -> NoReturn:
        raise refused("this operation", self.shape)

    _data = property(_refuse)  # there is no strided data, and who asks for it must hear so
    _held = property(_refuse)
    _reach = property(_refuse)

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return self._pattern.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._cells.dtype

    @property
    def device(self) -> torch.device:
        return self._cells.device

    @property
    def layout(self) -> torch.layout:
        return self._pattern.layout

    @property
    def is_sparse(self) -> bool:
        """Whether it is COO, as torch means it."""
        return self.layout is COO

    @property
    def mask_layout(self) -> str:
        """How the mask of the stored cells is held."""
        return self._cells.mask_layout

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self._pattern.numel

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def nnz(self) -> int:
        """How many cells are stored, masked ones among them."""
        return self._pattern.n

    @property
    def nbytes(self) -> int:
        """The bytes of the stored cells and of their positions."""
        return self._cells.nbytes + self._pattern.positions.nbytes

    @property
    def itemsize(self) -> int:
        return self._cells.itemsize

    def element_size(self) -> int:
        return self._cells.itemsize

    def is_floating_point(self) -> bool:
        return self._cells.is_floating_point()

    def is_complex(self) -> bool:
        return self._cells.is_complex()

    @property
    def is_cuda(self) -> bool:
        return self._cells.is_cuda

    @property
    def is_meta(self) -> bool:
        return self._cells.is_meta

    def values(self) -> MaskedTensor:
        """The stored cells, (n,), in the order of their positions."""
        return self._cells

    def indices(self) -> Tensor:
        """The index of each stored cell along each dim: (dims, n)."""
        return stacked(self._pattern)

    def get_data(self) -> Tensor:
        """The stored values as torch's sparse tensor, with whatever lies under the mask of stored cells."""
        return as_torch(self._pattern, self._cells.get_data())

    def get_mask(self) -> Tensor:
        """Which stored cells are valid, as torch's sparse tensor of the same pattern."""
        return as_torch(self._pattern, self._cells.get_mask())

    def to_tensor(self, fill: float | None = None) -> Tensor:
        """A plain strided tensor with `fill` in the masked cells; without a fill a masked cell is an error."""
        return self.to_dense().to_tensor(fill)

    # -- layouts ---------------------------------------------------------------------------------------------------

    def to_dense(self) -> MaskedTensor:
        """The strided tensor: what is not stored is masked there."""
        return densified(self._pattern, self._cells)

    def to_sparse(self, layout: torch.layout = COO) -> SparseTensor:
        return self if self.layout is layout else self._seen(self._pattern.in_layout(known(layout)))

    # -- copies ----------------------------------------------------------------------------------------------------

    def _copied(self) -> SparseTensor:
        return self._like(self._cells._copied())

    def _changed(self, change: Callable[[MaskedTensor], MaskedTensor]) -> Self:
        cells = change(self._cells)
        if cells is self._cells:
            return self
        if cells.is_meta:
            raise refused("a move to the meta device", self.shape)
        pattern = self._pattern.to(cells.device)
        return SparseTensor._on(pattern, cells)  # type: ignore[return-value]  # nobody derives from it

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """On another device or in another dtype, as torch.Tensor.to; the tensor itself where nothing changes."""
        return self._changed(lambda cells: cells.to(*args, **kwargs))

    def type(self, dtype: Any = None) -> Any:
        return self._cells.type() if dtype is None else self._changed(lambda cells: cells.type(dtype))

    def detach(self) -> Self:
        return self._changed(lambda cells: cells.detach())

    def contiguous(self) -> Self:
        return self

    def is_contiguous(self) -> bool:
        return True

    def coalesce(self) -> Self:
        """The tensor itself: its cells stand in order, each once."""
        return self

    def __copy__(self) -> SparseTensor:
        return self._like(self._cells.__copy__())

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseTensor:
        return self._like(self._cells.__deepcopy__(memo))

    def __reduce__(self) -> tuple[Any, ...]:
        pattern = self._pattern
        return _unpickled, (pattern.layout is CSR, tuple(pattern.shape), pattern.positions, self._cells)

    # -- cells as Python and numpy values --------------------------------------------------------------------------

    def item(self) -> Any:
        if self.numel() != 1:
            raise ShapeError(f"item() needs one cell, the tensor has {self.numel()}; tolist() gives all")
        return self.to_dense().item()

    def _refuse_masked(self, what: str) -> None:
        self.to_dense()._refuse_masked(what)

    def __index__(self) -> int:
        return self.to_dense().__index__()

    def tolist(self) -> Any:
        return self.to_dense().tolist()

    def numpy(self) -> np.ma.MaskedArray[Any, Any]:
        return self.to_dense().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.to_dense().__array__(dtype, copy)

    def __format__(self, spec: str) -> str:
        return format(self.to_dense(), spec) if spec and not self.ndim else format(repr(self), spec)

    def __repr__(self) -> str:
        if self.numel() <= SUMMARIZED:
            return repr(self.to_dense().detach())[:-1] + f", layout={self.layout}{self._grad_word()})"
        return text_of_stored(self.indices(), self._cells, f"size={tuple(self.shape)}, layout={self.layout}")

    def _grad_word(self) -> str:
        return ", requires_grad=True" if self.requires_grad else ""

    def __len__(self) -> int:
        if not self.ndim:
            raise ShapeError("a tensor with 0 dims has no length; item() gives its cell")
        return self.shape[0]

    def __iter__(self) -> Iterator[MaskedTensor]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return value in self._cells

    def __getitem__(self, index: Any) -> MaskedTensor:
        from maskserve.sparse_moves import indexed

        return indexed(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise refused("assignment", self.shape)

    def _replace(self, result: MaskedTensor, *, same_mask: bool) -> None:
        if not isinstance(result, SparseTensor) or not self._pattern.is_like(result._pattern):
            raise MaskError(
                "an operation in place that changes which cells are stored: write m = m + ..., not m += ..."
            )
        self._cells._replace(result._cells, same_mask=same_mask)

    # -- autograd --------------------------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        return self._cells.requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self.requires_grad_(wanted)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        self._cells.requires_grad_(requires_grad)
        return self

    @property
    def is_leaf(self) -> bool:
        return self._cells.is_leaf

    @property
    def grad_fn(self) -> Any:
        return self._cells.grad_fn

    def retain_grad(self) -> None:
        self._cells.retain_grad()

    @property
    def grad(self) -> MaskedTensor | None:
        """The gradient that backward() collected, in the same pattern."""
        return None if self._cells.grad is None else self._like(self._cells.grad)

    @grad.setter
    def grad(self, gradient: MaskedTensor | None) -> None:
        self._cells.grad = None if gradient is None else aligned(gradient, self._pattern)


def _unpickled(is_csr: bool, shape: tuple[int, ...], positions: Tensor, cells: MaskedTensor) -> SparseTensor:
    is_shape = isinstance(shape, tuple) and all(type(size) is int for size in shape)
    if not is_shape or not is_plain(positions) or type(cells) is not MaskedTensor or positions.device != cells.device:
        raise ShapeError("what was pickled is no sparse tensor: it was not written by maskserve")
    if positions.is_meta:
        raise refused("a load to the meta device", torch.Size(shape))
    checked_positions(positions, checked_shape(shape), "the file")
    if positions.shape != cells.shape:
        raise ShapeError(f"the file has {len(positions)} positions and {cells.numel()} cells; they must be as many")
    pattern = Pattern(layout=COO, shape=torch.Size(shape), positions=positions)
    return SparseTensor._on(pattern.in_layout(CSR if is_csr else COO), cells)


torch.serialization.add_safe_globals([_unpickled])


REFUSED_MEMORY = ("allocate memory", "calculation overflowed")
"""What torch says where memory is not there, or its bytes are beyond 2^63."""


def known(layout: torch.layout) -> torch.layout:
    if layout not in LAYOUTS:
        raise DtypeError(
            f"{layout} is not known here; COO and CSR are: to_sparse_coo() takes any shape, to_sparse_csr() matrices",
            parameter="layout",
        )
    return layout


# -- between layouts ----------------------------------------------------------------------------------------------


def densified(pattern: Pattern, cells: MaskedTensor) -> MaskedTensor:
    """The strided tensor; hidden cells are 0."""
    from maskserve.functions import public

    with every_cell_of("to_dense()", pattern.shape, cells.itemsize):
        data = torch.zeros(pattern.numel, dtype=cells.dtype, device=cells.device)
        mask = torch.zeros(pattern.numel, dtype=torch.bool, device=cells.device)
    if is_followed(cells._data):
        spread: MaskedTensor = public("index_copy")(MaskedTensor._of(data, mask), 0, pattern.positions, cells)
        reshaped: MaskedTensor = public("reshape")(spread, pattern.shape)
        return reshaped
    own = cells._full_mask()
    put_at(data, pattern.positions, select(cells._data.detach(), own))
    put_at(mask, pattern.positions, own)
    return MaskedTensor._of(data.reshape(pattern.shape), mask.reshape(pattern.shape))


@contextmanager
def every_cell_of(what: str, shape: Sequence[int], cell_bytes: int) -> Iterator[None]:
    """TooLargeError where the memory of a strided result is not there: its cells are counted by no file."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in REFUSED_MEMORY):
            raise
        raise TooLargeError(
            f"{what} of shape {tuple(shape)} needs {prod(shape) * (cell_bytes + 1)} bytes, and they are not there: "
            "keep it sparse, or take a part of it, m[a:b]"
        ) from error


def sparsified(tensor: MaskedTensor, layout: torch.layout) -> SparseTensor:
    """The valid cells of a strided tensor, stored."""
    where = tensor._full_mask().reshape(-1).nonzero().squeeze(1)
    pattern = Pattern(layout=COO, shape=checked_shape(tensor.shape), positions=where).in_layout(known(layout))
    return SparseTensor._on(pattern, gathered(tensor, pattern))


def gathered(tensor: MaskedTensor, pattern: Pattern) -> MaskedTensor:
    """The cells of a strided tensor, which broadcasts to the pattern's shape, at its positions."""
    own = (1,) * (len(pattern.shape) - tensor.ndim) + tuple(tensor.shape)
    given = tensor if tensor.ndim == len(own) else reshaped(tensor, own)
    coordinates = [
        torch.zeros_like(index) if size == 1 else index for index, size in zip(pattern.coordinates(), own, strict=True)
    ]
    if not own:
        return reshaped(given, (1,))[torch.zeros_like(pattern.positions)]
    return given[tuple(coordinates)]


def in_bits(cells: Tensor) -> Tensor:
    """Cells as integers of their width, which torch picks and puts in every case: it has no index of u64 and its like."""
    bits = BITS.get(cells.element_size())
    return cells if bits is None or cells.dtype is torch.bool else cells.detach().view(bits)


def taken_at(cells: Tensor, at: Tensor) -> Tensor:
    """The cells at indices of their only dim, in the shape of those."""
    return in_bits(cells).index_select(0, at.reshape(-1)).view(cells.dtype).reshape(at.shape)


def put_at(cells: Tensor, at: Tensor, given: Tensor) -> None:
    """Cells written at indices of their only dim: by scatter_, which takes a quarter of an index's time."""
    in_bits(cells).scatter_(0, at, in_bits(given))


def reshaped(tensor: MaskedTensor, shape: tuple[int, ...]) -> MaskedTensor:
    from maskserve.functions import public

    made: MaskedTensor = public("reshape")(tensor, shape)
    return made


def aligned(tensor: MaskedTensor, pattern: Pattern) -> MaskedTensor:
    """The cells of a tensor at the positions of a pattern; those that it does not store are masked."""
    if not isinstance(tensor, SparseTensor):
        return gathered(as_masked(tensor), pattern)
    own, cells = tensor._pattern, tensor._cells
    if own.is_like(pattern):
        return cells
    at, stored = found(within(pattern.positions, pattern.shape, own.shape), own.positions)
    if not own.n:  # masked cells with the history of none
        nothing = MaskedTensor(torch.zeros(pattern.n, dtype=cells.dtype, device=cells.device), stored)
        return torch.cat([cells, nothing])  # type: ignore[list-item, return-value]  # MaskedTensors in, one out
    return cells[at] if bool(stored.all()) else as_masked_tensor(cells[at], stored)


def as_masked(value: Any) -> MaskedTensor:
    return value if isinstance(value, MaskedTensor) else MaskedTensor._of(value, None)


# -- torch's sparse tensors ---------------------------------------------------------------------------------------


def stacked(pattern: Pattern) -> Tensor:
    coordinates = pattern.coordinates()
    return torch.stack(coordinates) if coordinates else pattern.positions.new_zeros((0, pattern.n))


def as_torch(pattern: Pattern, values: Tensor) -> Tensor:
    """torch's sparse tensor of a pattern and its values."""
    shape = pattern.shape
    if pattern.layout is COO:
        return torch.sparse_coo_tensor(stacked(pattern), values, shape, check_invariants=False, is_coalesced=True)
    rows, columns = pattern.rows_begin(), pattern.coordinates()[1]
    tell_torch()
    return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)


@cache
def tell_torch() -> None:
    """torch says once in a process, at its first CSR tensor, that they are in beta: nobody asked it for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0),
            (0, 0),
            check_invariants=False,
        )


def parts_of(data: Any, mask: Any) -> tuple[Pattern, MaskedTensor]:
    """(pattern, cells) of sparse data, or of strided data whose mask is sparse, and what the mask leaves valid."""
    if isinstance(data, SparseTensor):
        pattern, cells = data._pattern, data._cells
    elif data.layout is not torch.strided:
        pattern, values = taken(data)
        cells = MaskedTensor._of(values, None)
    else:
        pattern = valid_pattern(mask)
        if pattern.shape != data.shape:
            raise ShapeError(f"the mask has shape {tuple(pattern.shape)}, the data {tuple(data.shape)}; give both one")
        return pattern, gathered(as_masked(data), pattern)
    return pattern, cells if mask is None else as_masked_tensor(cells, mask_on(pattern, mask))


def mask_on(pattern: Pattern, mask: Any) -> Any:
    """Which stored cells a mask leaves valid; a sparse mask that says valid where nothing is stored is an error."""
    from maskserve import masks

    if isinstance(mask, bool):
        return mask
    if getattr(mask, "layout", torch.strided) is torch.strided:
        empty = torch.empty((), device=pattern.device).expand(pattern.shape)
        own = masks.checked(empty, mask)
        assert own is not None
        return gathered(MaskedTensor._of(own, None), pattern)._data
    valid = valid_pattern(mask)
    if valid.shape != pattern.shape:
        raise ShapeError(f"the mask has shape {tuple(valid.shape)}, the data {tuple(pattern.shape)}; give both one")
    if not bool(found(valid.positions, pattern.positions)[1].all()):
        raise MaskMismatchError(
            "the mask says valid where the data stores no value: give both one pattern, or leave those cells out of the mask"
        )
    return found(pattern.positions, valid.positions)[1]


def valid_pattern(mask: Any) -> Pattern:
    """The cells that a sparse mask says are valid: stored and True."""
    if isinstance(mask, SparseTensor):
        pattern, values = mask._pattern, mask._cells._data & mask._cells._full_mask()
    else:
        pattern, values = taken(mask)
    if values.dtype is not torch.bool:
        raise MaskDtypeError(
            f"mask is {values.dtype}; a mask is bool, True = valid: pass mask.bool()", parameter="mask"
        )
    return pattern if bool(values.all()) else pattern.of_shape(pattern.shape, pattern.positions[values])


def taken(tensor: Tensor) -> tuple[Pattern, Tensor]:
    """(pattern, values) of torch's COO or CSR tensor, its invariants checked: torch itself trusts its maker."""
    if tensor.layout is COO:
        return taken_coo(tensor)
    if tensor.layout is CSR:
        return taken_csr(tensor)
    raise DtypeError(f"{tensor.layout} is not read: give COO or CSR, tensor.to_sparse_coo() or tensor.to_sparse_csr()")


def taken_coo(tensor: Tensor) -> tuple[Pattern, Tensor]:
    if tensor.dense_dim():
        raise ShapeError(
            f"a COO tensor with {tensor.dense_dim()} dense dims stores blocks; each stored value must be one cell: "
            "tensor.to_dense().to_sparse()"
        )
    shape, indices = checked_shape(tensor.shape), tensor._indices().long()
    check_range(indices, shape)
    if tensor.requires_grad and not tensor.is_coalesced():
        n = tensor._nnz()
        tensor = tensor.coalesce()
        if tensor._nnz() < n:
            sorted_once(ravelled(tuple(indices), shape, indices.new_zeros(n)).sort().values, "the tensor")
        indices = tensor._indices()
    values = tensor.values() if tensor.is_coalesced() else tensor._values()
    return from_coo(indices, values, shape)


def from_coo(indices: Tensor, values: Tensor, shape: torch.Size, *, is_sorted: bool = False) -> tuple[Pattern, Tensor]:
    """(pattern, values) of indices in range, (dims, n), in any order; or an error where they must be sorted and are not."""
    positions = ravelled(tuple(indices), shape, indices.new_zeros(indices.shape[1]))
    if is_sorted and bool((positions[1:] < positions[:-1]).any()):
        raise ShapeError("indices of a COO tensor are sorted, the last dim fastest; here they are not")
    positions, order = sorted_once(positions, "the COO tensor")
    pattern = Pattern(layout=COO, shape=shape, positions=positions)
    return pattern, values if order is None else values[order]


def check_range(indices: Tensor, shape: torch.Size) -> None:
    """Raise where an index is outside its dim."""
    for dim, (size, index) in enumerate(zip(shape, indices, strict=True)):
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
            allowed = f"outside 0 to {size - 1}" if size else "there, and it has size 0"
            raise ShapeError(f"a stored index of dim {dim} is {allowed}; the shape is {tuple(shape)}")


def taken_csr(tensor: Tensor) -> tuple[Pattern, Tensor]:
    if tensor.ndim != 2 or tensor.dense_dim():
        raise ShapeError(f"a CSR tensor of {tensor.ndim} dims is a batch; one matrix is read: tensor.to_sparse_coo()")
    return from_csr(tensor.crow_indices(), tensor.col_indices(), tensor.values(), tensor.shape)


def from_csr(crow: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> tuple[Pattern, Tensor]:
    """(pattern, values) of the three tensors of a CSR matrix."""
    n_rows, n_columns = checked_shape(shape)
    crow, columns = crow.long(), columns.long()
    if len(crow) != n_rows + 1 or len(columns) != len(values):
        raise ShapeError(
            f"a CSR matrix of {n_rows} rows has {n_rows + 1} row starts and as many columns as values; here are "
            f"{len(crow)}, {len(columns)} and {len(values)}"
        )
    counts = crow.diff()
    if int(crow[0]) or int(crow[-1]) != len(values) or bool((counts < 0).any()):
        raise ShapeError(f"row starts of a CSR matrix go from 0 up to its {len(values)} values, and none goes back")
    if len(columns) and (int(columns.min()) < 0 or int(columns.max()) >= n_columns):
        raise ShapeError(f"a stored column is outside 0 to {n_columns - 1}; the shape is {tuple(shape)}")
    positions = torch.arange(n_rows, device=crow.device).repeat_interleave(counts) * n_columns + columns
    if bool((positions[1:] <= positions[:-1]).any()):
        raise ShapeError("columns of a CSR matrix ascend within each row, each once; here they do not")
    return Pattern(layout=CSR, shape=torch.Size(shape), positions=positions), values


def checked_positions(positions: Tensor, shape: torch.Size, what: str) -> None:
    """Raise unless positions ascend within the shape."""
    n = Pattern(layout=COO, shape=shape, positions=positions).numel
    if positions.ndim != 1 or positions.dtype is not torch.int64 or bool((positions[1:] <= positions[:-1]).any()):
        raise ShapeError(f"{what} has positions that do not ascend")
    if len(positions) and (int(positions[0]) < 0 or int(positions[-1]) >= n):
        raise ShapeError(f"{what} has a position outside its {n} cells")
