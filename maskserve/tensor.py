"""MaskedTensor: a torch tensor and a bool mask that travel together. True = the cell is specified, valid, counts.

A plain class with __torch_function__, not a torch.Tensor subclass: a function that no row covers raises, where a
subclass would fall through to one that does not know the mask (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from maskserve import masks
from maskserve.errors import DtypeError, GradientError, MaskedValueError, MaskError, ParameterError, ShapeError
from maskserve.formatting import nested, text_of

if TYPE_CHECKING:
    import numpy as np


class MaskedTensor:
    """`data` and `mask` (bool, of as many dims, size 1 broadcasts; None = all valid, and costs nothing).

    Results of ops have 0 under the mask; a tensor made from data keeps what was there, unread. `get_data()` and
    `get_mask()` give the two; `to_tensor(fill)` gives a plain tensor.
    """

    __slots__ = ("_data", "_is_view", "_mask")
    __array_ufunc__ = None  # numpy arrays on the left leave the operator to us
    __hash__ = object.__hash__  # == is elementwise; as with torch, a tensor hashes by identity

    _data: Tensor
    _mask: Tensor | None
    _is_view: bool

    def __init__(self, data: Tensor, mask: Tensor | bool | None = None) -> None:
        if not isinstance(data, Tensor):
            raise DtypeError(
                f"MaskedTensor takes a torch tensor, not a {type(data).__name__}; masked_tensor(...) converts lists, "
                "numpy.ma and torch.masked",
                parameter="data",
            )
        own = masks.checked(data, mask)
        self._data, self._mask, self._is_view = data, None if own is None else own.clone(), False

    @classmethod
    def _of(cls, data: Tensor, mask: Tensor | None, is_view: bool = False) -> MaskedTensor:
        """From parts that fit together, without a copy or a check."""
        made = object.__new__(cls)
        made._data, made._mask, made._is_view = data, mask, is_view
        return made

    def _view_of(self, data: Tensor, mask: Tensor | None) -> MaskedTensor:
        return MaskedTensor._of(data, mask, is_view=data._base is not None)

    # -- what torch asks -------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from maskserve.torch_functions import call

        return call(function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """An op of the table as a method, built when it is first used."""
        from maskserve.functions import public
        from maskserve.ops import OPS

        if name in OPS:
            setattr(MaskedTensor, name, public(name))
            return getattr(self, name)
        known = "torch.Tensor has it, but no row covers it; " if hasattr(Tensor, name) else ""
        raise AttributeError(
            f"MaskedTensor has no attribute {name!r}; {known}get_data() and get_mask() give the parts as plain tensors"
        )

    # -- parts -----------------------------------------------------------------------------------------------------

    def get_data(self) -> Tensor:
        """The data, with whatever lies under the mask."""
        return self._data

    def get_mask(self) -> Tensor:
        """A copy of the mask, of the data's shape."""
        return self._full_mask().clone()

    def _full_mask(self) -> Tensor:
        if self._mask is None:
            return torch.ones(self._data.shape, dtype=torch.bool, device=self._data.device)
        return self._mask.expand(self._data.shape)

    def to_tensor(self, fill: float | None = None) -> Tensor:
        """A plain tensor with `fill` in the masked cells; without a fill a masked cell is an error."""
        if self._mask is None or bool(self._mask.all()):
            return self._data.clone()
        if fill is None:
            n = int((~self._full_mask()).sum())
            raise MaskedValueError(
                f"{n} of {self._data.numel()} cells are masked; give to_tensor(fill) a value for them"
            )
        return torch.where(self._full_mask(), self._data, self._fitting(fill))

    def _fitting(self, fill: float) -> Tensor:
        """`fill` in the data's dtype, or an error where it would change."""
        dtype = self._data.dtype
        if dtype is torch.bool:
            fits = isinstance(fill, bool)
        elif dtype.is_floating_point or dtype.is_complex:
            fits = True
        else:
            info = torch.iinfo(dtype)
            fits = isinstance(fill, int) and info.min <= fill <= info.max
        if not fits:
            raise DtypeError(
                f"fill {fill!r} does not fit {str(dtype).removeprefix('torch.')}; give a value that does, or convert "
                "first: .to(torch.float64)",
                parameter="fill",
            )
        return torch.full((), fill, dtype=dtype, device=self._data.device)

    @property
    def shape(self) -> torch.Size:
        return self._data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        return self._data.device

    @property
    def layout(self) -> torch.layout:
        return self._data.layout

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def requires_grad(self) -> bool:
        return self._data.requires_grad

    def dim(self) -> int:
        return self._data.ndim

    def numel(self) -> int:
        return self._data.numel()

    def size(self, dim: int | None = None) -> Any:
        return self._data.size() if dim is None else self._data.size(dim)

    def is_floating_point(self) -> bool:
        return self._data.is_floating_point()

    # -- copies ----------------------------------------------------------------------------------------------------

    def _mapped(self, data: Tensor) -> MaskedTensor:
        """The same validity on converted data, in memory of its own."""
        return MaskedTensor._of(data, None if self._mask is None else self._mask.to(data.device, copy=True))

    def to(self, *args: Any, **kwargs: Any) -> MaskedTensor:
        """On another device or in another dtype, as torch.Tensor.to; the tensor itself where nothing changes."""
        data = self._data.to(*args, **kwargs)
        return self if data is self._data else self._mapped(data)

    def float(self) -> MaskedTensor:
        return self.to(torch.float32)

    def double(self) -> MaskedTensor:
        return self.to(torch.float64)

    def cpu(self) -> MaskedTensor:
        return self.to("cpu")

    def cuda(self) -> MaskedTensor:
        return self.to("cuda")

    def clone(self) -> MaskedTensor:
        return self._mapped(self._data.clone())

    def detach(self) -> MaskedTensor:
        return self._view_of(self._data.detach(), self._mask)

    def contiguous(self) -> MaskedTensor:
        return self if self._data.is_contiguous() else self._mapped(self._data.contiguous())

    def __copy__(self) -> MaskedTensor:
        return self._view_of(self._data, self._mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedTensor:
        return self.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._data, self._mask)

    # -- cells as Python and numpy values --------------------------------------------------------------------------

    def item(self) -> Any:
        """The one cell as a Python number; an error where it is masked."""
        if self._data.numel() != 1:
            raise ShapeError(f"item() needs one cell, the tensor has {self._data.numel()}; tolist() gives all")
        self._refuse_masked("item()")
        return self._data.item()

    def _refuse_masked(self, what: str) -> None:
        if self._mask is not None and not bool(self._mask.all()):
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

        return np.ma.MaskedArray(self._data.detach().cpu().numpy(), mask=(~self._full_mask()).cpu().numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self._refuse_masked("numpy.asarray")
        array = self._data.detach().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

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
        return self._view_of(self._data[index], None if self._mask is None else self._full_mask()[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        """Cells take the value and its validity: a plain value makes them valid, a masked one masks them."""
        if self._data.requires_grad and torch.is_grad_enabled():
            raise GradientError("assignment into a tensor that requires grad: call it under torch.no_grad()")
        index = plain_index(index)
        value = from_foreign(value)
        new_data = value._data if isinstance(value, MaskedTensor) else value
        new_mask = value._mask if isinstance(value, MaskedTensor) else None
        own = self._writable_mask(needed=new_mask is not None)
        try:
            self._data[index] = new_data
        except (RuntimeError, TypeError) as error:
            raise ShapeError(f"assignment: {str(error).splitlines()[0]}") from error
        if own is not None:
            own[index] = True if new_mask is None else value._full_mask()

    def _writable_mask(self, *, needed: bool) -> Tensor | None:
        """The mask, in memory of its own where a cell of it can be written; None where all stay valid."""
        if self._mask is None and not needed:
            return None
        if self._mask is not None and self._mask.shape == self.shape and not _overlaps(self._mask):
            return self._mask
        if self._is_view:
            raise MaskError(
                "assignment through a view whose mask is absent or broadcast would be lost on the tensor it views; "
                "assign on that tensor itself: m[0, 1] = v, not m[0][1] = v"
            )
        self._mask = self._full_mask().clone()
        return self._mask

    def copy_(self, source: Any) -> MaskedTensor:
        """Every cell takes the value and the validity of the source."""
        self[...] = source
        return self


def _overlaps(mask: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(mask.stride(), mask.shape, strict=True))


def _unpickled(data: Tensor, mask: Tensor | None) -> MaskedTensor:
    return MaskedTensor._of(data, mask)


def plain_index(index: Any) -> Any:
    """An index with each MaskedTensor made plain: bool ones select where valid and true, others must be all valid."""
    if isinstance(index, MaskedTensor):
        if index.dtype is torch.bool:
            return index._data & index._full_mask()
        return index.to_tensor()
    return tuple(plain_index(i) for i in index) if isinstance(index, tuple) else index


# -- operators ----------------------------------------------------------------------------------------------------


def _operators() -> None:
    """__add__ and the like from the rows that name an operator."""
    from maskserve.ops import OPS
    from maskserve.ops.rows import Elementwise

    for row in OPS.values():
        if isinstance(row, Elementwise) and row.operator:
            if len(row.operands) == 1:
                setattr(MaskedTensor, f"__{row.operator}__", _unary(row.name))
                continue
            setattr(MaskedTensor, f"__{row.operator}__", _binary(row.name, reflected=False))
            if row.operator not in _COMPARISONS:
                setattr(MaskedTensor, f"__r{row.operator}__", _binary(row.name, reflected=True))


_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})  # Python reflects these by itself


def _unary(name: str) -> Callable[[Any], Any]:
    def operator(self: Any) -> Any:
        from maskserve.functions import public

        return public(name)(self)

    return operator


def _binary(name: str, *, reflected: bool) -> Callable[[Any, Any], Any]:
    def operator(self: Any, other: Any) -> Any:
        from maskserve.functions import public

        other = from_foreign(other)
        if not isinstance(other, MaskedTensor | Tensor | int | float | complex):
            return NotImplemented
        return public(name)(other, self) if reflected else public(name)(self, other)

    return operator


_operators()


# -- making them --------------------------------------------------------------------------------------------------


def from_foreign(value: Any) -> Any:
    """numpy arrays (numpy.ma with its mask) and torch.masked tensors as ours; anything else as it is."""
    kind = type(value)
    if kind.__module__.startswith("numpy"):
        import numpy as np

        if isinstance(value, np.ma.MaskedArray):
            valid = ~np.ma.getmaskarray(value)
            return MaskedTensor._of(torch.as_tensor(np.asarray(value.data)), torch.as_tensor(valid))
        return value.item() if isinstance(value, np.generic) else torch.as_tensor(value)
    if kind.__module__.startswith("torch.masked"):
        return MaskedTensor._of(value.get_data(), value.get_mask().clone())
    return value


def masked_tensor(data: Any, mask: Any = None, *, requires_grad: bool = False) -> MaskedTensor:
    """A new MaskedTensor with memory of its own, like torch.tensor; `data` may be a list, a tensor, numpy.ma or torch.masked."""
    source = as_masked_tensor(data, mask)
    copied = source._data.detach().clone()
    if requires_grad:
        copied.requires_grad_()
    return MaskedTensor._of(copied, source._mask)


def as_masked_tensor(data: Any, mask: Any = None) -> MaskedTensor:
    """A MaskedTensor on the same data, like torch.as_tensor; of a MaskedTensor the masks are intersected. Copies the mask."""
    data = from_foreign(data)
    if isinstance(data, MaskedTensor):
        own = masks.intersection([data._mask, masks.checked(data._data, mask)])
        return data._view_of(data._data, None if own is None else own.clone())
    return MaskedTensor(data if isinstance(data, Tensor) else torch.as_tensor(data), mask)


def from_lengths(data: Any, lengths: Any, dim: int) -> MaskedTensor:
    """The first `lengths` cells along `dim` are valid; lengths have the shape of the dims before it: (B,) for (B, T, D)."""
    tensor = data if isinstance(data, Tensor) else torch.as_tensor(data)
    counts = torch.as_tensor(lengths, device=tensor.device)
    if not -tensor.ndim <= dim < tensor.ndim:
        _refuse(f"dim {dim} is out of range for a tensor with {tensor.ndim} dims", "dim")
    along = dim % tensor.ndim
    n = tensor.shape[along]
    if counts.shape != tensor.shape[:along]:
        _refuse(
            f"lengths have shape {tuple(counts.shape)}, the dims before dim {along} {tuple(tensor.shape[:along])}; "
            "they must be equal",
            "lengths",
        )
    if counts.dtype not in (torch.int64, torch.int32) or bool(((counts < 0) | (counts > n)).any()):
        _refuse(f"lengths must be whole numbers from 0 to {n}, the size of dim {along}", "lengths")
    valid = torch.arange(n, device=tensor.device) < counts.unsqueeze(-1)
    return MaskedTensor._of(tensor, valid.reshape(valid.shape + (1,) * (tensor.ndim - along - 1)))


def _refuse(message: str, parameter: str) -> NoReturn:
    raise ParameterError(f"from_lengths: {message}", parameter=parameter)
