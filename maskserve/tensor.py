"""MaskedTensor: a torch tensor and a bool mask that travel together. True = the cell is specified, valid, counts.

A plain class with __torch_function__, not a torch.Tensor subclass: a function that no row covers raises, where a
subclass would fall through to one that does not know the mask (docs/decisions.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskserve import batches, masks
from maskserve.compact import Compact, Mask, as_bools, is_strided
from maskserve.compact_moves import picked
from maskserve.compiling import uncompiled
from maskserve.dtypes import BY_TORCH, f64
from maskserve.errors import DtypeError, GradientError, MaskedValueError, MaskError, ShapeError, UncoveredFunctionError
from maskserve.formatting import nested, text_of
from maskserve.gates import hidden, kept_in_place
from maskserve.history import History
from maskserve.operators import attach
from maskserve.reach import Exit, applied, narrowed
from maskserve.tracing import is_followed, same_memory

if TYPE_CHECKING:
    import numpy as np

SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


class MaskedTensor(History):
    """`data` and `mask` (bool, of as many dims, size 1 broadcasts; None = all valid, and costs nothing).

    Results of ops have 0 under the mask; a tensor made from data keeps what was there, unread. `get_data()` and
    `get_mask()` give the two; `to_tensor(fill)` gives a plain tensor.
    """

    __slots__ = ("_held", "_is_view", "_owns_mask")
    __array_ufunc__ = None  # numpy arrays on the left leave the operator to us
    __hash__ = object.__hash__  # == is elementwise; as with torch, a tensor hashes by identity

    _held: Mask | None
    """The mask as it is held: bool, or compact."""
    _is_view: bool
    """Whether another MaskedTensor sees the same data."""
    _owns_mask: bool
    """Whether a cell of the mask can be written in place: it is full, and every tensor that sees it should see that."""

    def __new__(cls, data: Any = None, mask: Any = None) -> MaskedTensor:
        """Of sparse data, or of data with a sparse mask, a sparse one."""
        if cls is MaskedTensor and any(getattr(part, "layout", None) in SPARSE for part in (data, mask)):
            from maskserve.sparse import SparseTensor

            cls = SparseTensor
        return object.__new__(cls)

    def __init__(self, data: Tensor, mask: Tensor | bool | None = None) -> None:
        from maskserve.foreign import from_foreign

        data = from_foreign(data)
        self._reach = None
        if isinstance(data, MaskedTensor):
            own = masks.checked(data._data, mask)
            self._reach = narrowed(data._reach, own)
            data, mask = data._data, masks.intersection([data._held, own])
        if not isinstance(data, Tensor):
            raise DtypeError(
                f"MaskedTensor takes a torch tensor, not a {type(data).__name__}; masked_tensor(...) converts lists, "
                "numpy.ma and torch.masked",
                parameter="data",
            )
        own = mask if isinstance(mask, Compact) else masks.checked(data, mask)  # compact: what data brought
        self._data, self._held, self._is_view = data, own.clone() if isinstance(own, Tensor) else own, False
        self._owns_mask = isinstance(own, Tensor) and own.shape == data.shape

    @classmethod
    def _of(cls, data: Tensor, mask: Mask | None, reach: Tensor | None = None) -> MaskedTensor:
        """From parts that fit together and are nobody else's, without a copy or a check."""
        made = object.__new__(cls)
        made._data, made._held, made._reach, made._is_view = data, mask, reach, False
        made._owns_mask = isinstance(mask, Tensor) and mask.shape == data.shape
        return made

    def _view_of(self, data: Tensor, mask: Mask | None, reach: Tensor | None = None) -> MaskedTensor:
        """Parts that were made from this tensor's parts, as views or as copies."""
        shares_data, shares_mask = same_memory(data, self._data), False
        if isinstance(mask, Tensor) and isinstance(self._held, Tensor) and same_memory(mask, self._held):
            shares_mask = shares_data
            mask = mask if shares_data else mask.clone()
        made = MaskedTensor._of(data, mask, reach)
        if shares_data:
            made._is_view, made._owns_mask = True, shares_mask and self._owns_mask
        return made

    # -- what torch asks -------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from maskserve.torch_functions import call

        return call(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """An op of the table as a method, built when it is first used."""
        from maskserve.functions import method
        from maskserve.ops import instead_of, method_of

        row = method_of(name) if not name.startswith("__") else None
        if row is not None:
            setattr(MaskedTensor, name, method(row.name))
            return getattr(self, name)
        if name.endswith("_") and method_of(name.rstrip("_")):
            raise AttributeError(
                f"MaskedTensor has no {name}: write m[...] = m.{name.rstrip('_')}(...), or m += and the like"
            )
        known = "torch.Tensor has it, but no masked operation is defined for it; " if hasattr(Tensor, name) else ""
        raise AttributeError(
            f"MaskedTensor has no attribute {name!r}"
            + (instead_of(name) or f"; {known}get_data() and get_mask() give the parts as plain tensors")
        )

    def __dir__(self) -> list[str]:
        from maskserve.ops import OPS

        return sorted({*object.__dir__(self), *(row.name for row in OPS.values() if row.is_method)})

    @property
    def _is_param(self) -> bool:
        """What torch.nn.Parameter asks of tensors that are not torch's own, and sets."""
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        raise UncoveredFunctionError(
            "nn.Parameter takes a plain tensor: make the data the parameter, nn.Parameter(m.get_data()), keep the mask as a "
            "buffer, and compute with as_masked_tensor(parameter, mask)"
        )

    # -- parts -----------------------------------------------------------------------------------------------------

    def get_data(self) -> Tensor:
        """The data, with whatever lies under the mask. A gradient that comes back by it reaches every valid cell."""
        if not is_followed(self._data):
            return self._data
        plain: Tensor = applied(Exit, self._data, self._full_mask(), self._reach)
        return plain

    def get_mask(self) -> Tensor:
        """A copy of the mask, of the data's shape."""
        return self._full_mask().clone()

    @property
    def _mask(self) -> Tensor | None:
        """The mask as bools: of as many dims, size 1 where it broadcasts; a compact one is spread out each time."""
        return as_bools(self._held)

    def _full_mask(self) -> Tensor:
        mask = self._mask
        if mask is None:
            return torch.ones(self._data.shape, dtype=torch.bool, device=self._data.device)
        return mask.expand(self._data.shape)

    def to_tensor(self, fill: float | None = None) -> Tensor:
        """A plain tensor with `fill` in the masked cells; without a fill a masked cell is an error."""
        if fill is None:
            n = 0 if self._held is None else int((~self._full_mask()).sum())
            if n:
                raise MaskedValueError(
                    f"{n} of {self._data.numel()} cells are masked; give to_tensor(fill) a value for them"
                )
        if self._held is None or fill is None:
            return self.get_data().clone()
        return torch.where(self._full_mask(), self.get_data(), self._fitting(fill))

    def _fitting(self, fill: float) -> Tensor:
        """`fill` in the data's dtype, or an error where it would change."""
        dtype = self._data.dtype
        known = BY_TORCH.get(
            str(dtype).removeprefix("torch."), f64
        )  # what we compute nothing on, as complex128, is wide
        kind = bool if dtype is torch.bool else int if known.is_integral else float | int
        if not isinstance(fill, kind) or not (known.holds(fill) or fill != fill):
            example = "False or True" if kind is bool else "a value that does"
            raise DtypeError(
                f"fill {fill!r} does not fit {str(dtype).removeprefix('torch.')}; give {example}, or convert first: "
                ".to(torch.float64)",
                parameter="fill",
            )
        return torch.full((), fill, dtype=dtype, device=self._data.device)

    # -- copies ----------------------------------------------------------------------------------------------------

    def _mapped(self, data: Tensor) -> MaskedTensor:
        """The same validity on converted data, in memory of its own; of another dtype it is a result, 0 where hidden."""
        mask = self._held
        mask = mask.to(data.device, copy=True) if isinstance(mask, Tensor) else mask and mask.to(data.device)
        if data.dtype is not self.dtype:
            if isinstance(mask, Compact):
                data = hidden(data, mask, in_place=True)
            elif mask is not None:
                data = kept_in_place(data, mask.expand(data.shape))
        reach = None if self._reach is None or not is_followed(data) else self._reach.to(data.device)
        return MaskedTensor._of(data, mask, reach)

    @property
    def _cells(self) -> MaskedTensor:
        """What is stored: here all of it, of a sparse tensor the stored cells in one dim."""
        return self

    def _like(self, cells: MaskedTensor) -> MaskedTensor:
        """Other cells in the place of those that are stored."""
        return cells

    def _copied(self) -> MaskedTensor:
        """A copy without history."""
        return MaskedTensor._of(self._data.detach().clone(), self._held)

    def to(self, *args: Any, **kwargs: Any) -> MaskedTensor:
        """On another device or in another dtype, as torch.Tensor.to; the tensor itself where nothing changes."""
        data = self._data.to(*args, **kwargs)
        return self if data is self._data else self._mapped(data)

    def type(self, dtype: Any = None) -> Any:
        """In another dtype; without one the name of torch's type, as torch.Tensor.type."""
        return self._data.type() if dtype is None else self._mapped(self._data.type(dtype))

    def type_as(self, other: Any) -> MaskedTensor:
        return self.to(other.dtype)

    def cpu(self) -> MaskedTensor:
        return self.to("cpu")

    def cuda(self) -> MaskedTensor:
        return self.to("cuda")

    def detach(self) -> MaskedTensor:
        return self._view_of(self._data.detach(), self._held)

    def contiguous(self) -> MaskedTensor:
        return self if self._data.is_contiguous() else self._mapped(self._data.contiguous())

    def __copy__(self) -> MaskedTensor:
        return self._view_of(self._data, self._held, self._reach)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedTensor:
        """A leaf that collects a gradient is copied part by part, as torch's: what shares its data shares the copy's."""
        if not self.is_leaf:
            raise GradientError(
                "a deep copy of a tensor that was computed from a leaf would lose its history: detach() it first"
            )
        if not self.requires_grad:
            return self._moved("clone")
        data, mask, reach = copy.deepcopy((self._data, self._held, self._reach), memo)
        made = MaskedTensor._of(data, mask, reach)
        made._is_view, made._owns_mask = self._is_view, self._owns_mask
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """As with torch's, what is unpickled is a leaf, and requires grad where this one does."""
        from maskserve.engine import hidden_as_zero

        mask = None if self._held is None else self._full_mask()
        held = self._held.clone() if isinstance(self._held, Compact) else mask if mask is None else mask.clone()
        return _unpickled, (hidden_as_zero(self._data.detach(), mask).clone(), held, self.requires_grad)

    def pin_memory(self) -> MaskedTensor:
        """Data and mask in memory that a CUDA device reads directly; the tensor itself where they are there."""
        data, mask = self._data.pin_memory(), self._with_mask_cells(Tensor.pin_memory)
        return self if data is self._data and mask is self._held else self._view_of(data, mask, self._reach)

    def _mask_cells(self) -> Tensor | None:
        """What the mask is held in."""
        return self._held.cells if isinstance(self._held, Compact) else self._held

    def _with_mask_cells(self, change: Callable[[Tensor], Tensor]) -> Mask | None:
        """The mask as it is held, in changed memory."""
        if isinstance(self._held, Compact):
            cells = change(self._held.cells)
            return self._held if cells is self._held.cells else self._held.holding(cells)
        return None if self._held is None else change(self._held)

    def is_pinned(self) -> bool:
        """Whether data and mask are in pinned memory."""
        mask = self._mask_cells()
        return self._data.is_pinned() and (mask is None or mask.is_pinned())

    def share_memory_(self) -> MaskedTensor:
        """The tensor itself, its data and mask in memory that processes share from now on."""
        self._data.share_memory_()
        self._with_mask_cells(Tensor.share_memory_)
        self._is_view = True
        return self

    def is_shared(self) -> bool:
        """Whether data and mask are in memory that processes share."""
        mask = self._mask_cells()
        return self._data.is_shared() and (mask is None or mask.is_shared())

    # -- cells as Python and numpy values --------------------------------------------------------------------------

    def item(self) -> Any:
        """The one cell as a Python number; an error where it is masked."""
        if self._data.numel() != 1:
            raise ShapeError(f"item() needs one cell, the tensor has {self._data.numel()}; tolist() gives all")
        self._refuse_masked("item()")
        return self._data.item()

    def _refuse_masked(self, what: str) -> None:
        if self._held is not None and not bool(self._full_mask().all()):
            raise MaskedValueError(f"{what} of a masked cell is undefined; to_tensor(fill) gives a plain tensor")

    def __float__(self) -> Any:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        self._refuse_masked("an index")
        return self._data.__index__()

    def __bool__(self) -> bool:
        return bool(self.item())

    def tolist(self) -> Any:
        """Nested lists, None for a masked cell."""
        return nested(self._data, self._mask)

    def numpy(self) -> np.ma.MaskedArray[Any, Any]:
        """numpy.ma, whose mask means the opposite: True there is masked."""
        import numpy as np

        return np.ma.MaskedArray(self._array(), mask=(~self._full_mask()).cpu().numpy())

    def _array(self) -> np.ndarray[Any, Any]:
        if self.dtype is torch.bfloat16:
            raise DtypeError("numpy has no bfloat16: convert first, .float()")
        array: np.ndarray[Any, Any] = self._data.detach().resolve_conj().resolve_neg().cpu().numpy()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self._refuse_masked("numpy.asarray")
        array = self._array()
        return array if dtype is None else array.astype(dtype)

    def __format__(self, spec: str) -> str:
        """A single cell in Python's format, "--" where it is masked; of several cells the whole text."""
        if not spec or self._data.ndim:
            return format(repr(self), spec)
        return format(self._data.item(), spec) if bool(self._full_mask()) else "--"

    def __repr__(self) -> str:
        return text_of(self._data, self._mask)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[MaskedTensor]:
        if not self._data.ndim:
            raise ShapeError("a tensor with 0 dims has no rows to iterate over; item() gives its cell")
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        return bool(((self._data == value) & self._full_mask()).any())

    # -- indexing --------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> MaskedTensor:
        index = plain_index(index)
        data, mask = self._data[index], self._held
        if isinstance(mask, Compact):
            mask = picked(mask, index, data.shape) or self._full_mask()[index]
        elif mask is not None:
            mask = mask.expand(self._data.shape)[index]
        reach = None if self._reach is None or not torch.is_grad_enabled() else self._reach[index]
        return self._view_of(data, mask, reach)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Cells take the value and its validity: a plain value makes them valid, a masked one or None masks them."""
        from maskserve.foreign import from_foreign

        if self._data.requires_grad and torch.is_grad_enabled():
            raise GradientError(
                "assignment into a tensor that requires grad: call it under torch.no_grad()"
                if self.is_leaf
                else "assignment into a tensor that was computed from a leaf would leave its history behind: make a new one, "
                "torch.where(condition, value, m) or m.masked_fill(condition, value)"
            )
        index = plain_index(index)
        value = MaskedTensor(torch.zeros((), dtype=self.dtype), False) if value is None else from_foreign(value)
        new_data = value._data if isinstance(value, MaskedTensor) else value
        new_mask = value._full_mask() if isinstance(value, MaskedTensor) and value._held is not None else None
        if isinstance(new_data, Tensor) and new_data.requires_grad and torch.is_grad_enabled():
            raise GradientError("assignment of a tensor that requires grad: assign value.detach()")
        if _overlaps(self._data):
            raise ShapeError("assignment into an expanded tensor would write several cells at once; clone() it first")
        own = self._writable_mask(needed=new_mask is not None)
        try:
            if new_mask is not None:  # what lies under the value's mask goes nowhere
                new_data = torch.where(new_mask, new_data.to(self.dtype), self._data[index])
            self._data[index] = new_data
        except (RuntimeError, TypeError, ValueError, OverflowError, IndexError) as error:
            raise ShapeError(f"assignment: {str(error).splitlines()[0]}") from error
        if own is not None:
            own[index] = True if new_mask is None else new_mask

    def _writable_mask(self, *, needed: bool) -> Tensor | None:
        """The mask, in memory of its own where a cell of it can be written; None where all stay valid."""
        if self._held is None and not needed:
            return None
        if not self._owns_mask:
            if self._is_view:
                raise MaskError(
                    "assignment through a view whose mask is absent or broadcast would be lost on the tensor it views; "
                    "assign on that tensor itself: m[0, 1] = v, not m[0][1] = v"
                )
            self._held = self._full_mask().contiguous().clone()
            self._owns_mask = True
        assert isinstance(self._held, Tensor), "a mask that is owned is full"
        return self._held

    def _replace(self, result: MaskedTensor, *, same_mask: bool) -> None:
        """Every cell takes the result's value and validity; `same_mask`: which are the tensor's own."""
        if torch.is_grad_enabled() and (self._data.requires_grad or result._data.requires_grad):
            raise GradientError(
                "an operation in place on or with a tensor that requires grad: write m = m + ..., not m += ..."
            )
        own, given = self._held, result._held
        both = (own, given) if isinstance(own, Compact) and isinstance(given, Compact) else None
        takes_form = both is not None and not self._is_view  # who sees the cells has a compact mask of its own
        same_mask |= both is not None and both[0].equals(both[1])
        if own is None or not (same_mask or takes_form):
            self[...] = result
        elif _overlaps(self._data):
            raise ShapeError("writing into an expanded tensor would write several cells at once; clone() it first")
        else:  # through a view too, whose mask could not be written: a hidden cell here may be valid in another tensor
            valid = result._full_mask() if takes_form else self._full_mask()
            self._data.copy_(torch.where(valid, result._data.to(self.dtype), self._data))
            self._held = given if takes_form else own

    def copy_(self, source: Any) -> MaskedTensor:
        """Every cell takes the value and the validity of the source."""
        self[...] = source
        return self


def _overlaps(cells: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(cells.stride(), cells.shape, strict=True))


def _unpickled(data: Tensor, mask: Mask | None, requires_grad: bool = False) -> MaskedTensor:
    if not _are_parts(data, mask):
        raise MaskError("what was pickled has a mask that does not fit its cells: it was not written by maskserve")
    made = MaskedTensor._of(data, mask)
    return made.requires_grad_() if requires_grad else made


def _are_parts(data: Any, mask: Any) -> bool:
    """Whether the two are what one MaskedTensor is made of: what is unpickled may be anything."""
    if not is_strided(data):
        return False
    if isinstance(mask, Compact):
        return mask.is_sound and mask.shape == data.shape and mask.device == data.device
    if mask is None or not is_strided(mask):
        return mask is None
    fits = mask.ndim == data.ndim and all(m in (1, n) for m, n in zip(mask.shape, data.shape, strict=True))
    return mask.dtype is torch.bool and mask.device == data.device and fits


torch.serialization.add_safe_globals([_unpickled])  # torch.load(weights_only=True): it takes data, mask and a bool


def plain_index(index: Any) -> Any:
    """An index with each MaskedTensor made plain: bool ones select where valid and true, others must be all valid."""
    if isinstance(index, MaskedTensor):
        if index.dtype is torch.bool:
            return index._data & index._full_mask()
        return index.to_tensor()
    if isinstance(index, tuple):
        return tuple(plain_index(i) for i in index)
    if isinstance(index, list) and any(isinstance(i, MaskedTensor) for i in index):
        return torch.as_tensor([plain_index(i).tolist() if isinstance(i, MaskedTensor) else i for i in index])
    return index


def _converted(tensor: MaskedTensor, dtype: torch.dtype) -> MaskedTensor:
    return tensor.to(dtype)


def _conversions() -> None:
    """half(), int() and the like. Named in the class, they would hide Python's own types there."""
    for name in ("double", "float", "half", "bfloat16", "long", "int", "short", "bool"):
        setattr(MaskedTensor, name, partialmethod(_converted, getattr(torch, name)))


attach(MaskedTensor)
_conversions()
for part in MaskedTensor.__mro__[:-1]:
    uncompiled(part)
batches.register(MaskedTensor)
