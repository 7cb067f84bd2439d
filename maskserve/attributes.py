"""What a MaskedTensor says of itself as torch's tensors do: shape, dtype, memory, and its dims in other orders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskserve.compact import Compact, Lengths, Mask
from maskserve.errors import MaskError, ShapeError

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

    from maskserve.sparse import SparseTensor
    from maskserve.tensor import MaskedTensor


class Attributes:
    """Attributes of the data, and moves that torch spells as attributes."""

    __slots__ = ("_data",)

    _data: Tensor
    _held: Mask | None

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
    def is_nested(self) -> bool:
        """Never: what torch's modules ask before they choose a way."""
        return False

    @property
    def ndim(self) -> int:
        return self._data.ndim

    def dim(self) -> int:
        return self._data.ndim

    def numel(self) -> int:
        return self._data.numel()

    def size(self, dim: int | None = None) -> Any:
        return self._data.size() if dim is None else self._data.size(dim)

    @property
    def is_cuda(self) -> bool:
        return self._data.is_cuda

    @property
    def is_meta(self) -> bool:
        return self._data.is_meta

    @property
    def itemsize(self) -> int:
        return self._data.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of the data; a bool mask has one more a cell, or a broadcast dim of it, a packed one an eighth of that."""
        return self._data.nbytes

    def is_floating_point(self) -> bool:
        return self._data.is_floating_point()

    def is_complex(self) -> bool:
        return self._data.is_complex()

    def element_size(self) -> int:
        return self._data.element_size()

    def stride(self, dim: int | None = None) -> Any:
        return self._data.stride() if dim is None else self._data.stride(dim)

    def is_contiguous(self) -> bool:
        """Whether the data is."""
        return self._data.is_contiguous()

    @property
    def T(self) -> MaskedTensor:  # noqa: N802 - torch's name
        """All dims in reverse order."""
        return self._moved("permute", tuple(range(self.ndim))[::-1])

    @property
    def mT(self) -> MaskedTensor:  # noqa: N802 - torch's name
        """The last two dims exchanged."""
        return self._moved("transpose", -2, -1)

    @property
    def H(self) -> MaskedTensor:  # noqa: N802 - torch's name
        """A matrix with its dims exchanged and complex cells conjugated."""
        if self.ndim not in (0, 2):
            raise ShapeError(f"H is of a matrix, and the tensor has {self.ndim} dims; mH exchanges the last two")
        return self.mH if self.ndim else self._moved("conj")

    @property
    def mH(self) -> MaskedTensor:  # noqa: N802 - torch's name
        """The last two dims exchanged and complex cells conjugated."""
        return self._moved("adjoint")

    @property
    def real(self) -> MaskedTensor:
        """The real part, sharing memory."""
        return self._moved("real")

    @property
    def imag(self) -> MaskedTensor:
        """The imaginary part, sharing memory."""
        return self._moved("imag")

    def to_dense(self) -> MaskedTensor:
        """The strided tensor of the same cells: this one, where it is strided."""
        return self  # type: ignore[return-value]  # attributes of a MaskedTensor alone

    def to_sparse(self, layout: torch.layout = torch.sparse_coo) -> SparseTensor:
        """The sparse tensor that stores the valid cells."""
        from maskserve.sparse import sparsified

        return sparsified(self, layout)  # type: ignore[arg-type]  # attributes of a MaskedTensor alone

    def to_sparse_coo(self) -> SparseTensor:
        """The same cells stored with the index of each along each dim."""
        return self.to_sparse(torch.sparse_coo)

    def to_sparse_csr(self) -> SparseTensor:
        """The cells of a matrix stored row by row."""
        return self.to_sparse(torch.sparse_csr)

    @property
    def mask_layout(self) -> str:
        """How the mask is held: "none" (all valid), "bool", "lengths" (of valid prefixes) or "packed" (a bit a cell)."""
        held = self._held
        return "none" if held is None else held.layout if isinstance(held, Compact) else "bool"

    def to_mask_layout(self, layout: str, dim: int | None = None) -> MaskedTensor:
        """The same cells, sharing memory, with the mask held as "bool", "lengths" or "packed"; "none" where all are valid.

        Lengths count along `dim`, without it dim 1, or the only one; the mask must be a prefix there. `lengths` says them.
        """
        from maskserve.making import with_mask_layout

        return with_mask_layout(self, layout, dim)  # type: ignore[arg-type]  # attributes of a MaskedTensor alone

    @property
    def lengths(self) -> Tensor:
        """How many cells of each prefix are valid, of a mask that is held as lengths; a copy."""
        if not isinstance(self._held, Lengths):
            raise MaskError(
                f"the mask is held as {self.mask_layout}, not as lengths: to_mask_layout('lengths') makes them of prefixes"
            )
        return self._held.lengths.clone()

    def to_nested(self) -> Tensor:
        """torch's nested tensor (layout jagged) of the valid prefixes along dim 1, with history."""
        from maskserve.jagged import to_nested

        return to_nested(self)  # type: ignore[arg-type]  # attributes of a MaskedTensor alone

    def to_packed_sequence(self) -> PackedSequence:
        """torch's PackedSequence of the valid prefixes along dim 1, (batch, time, ...), longest first, with history."""
        from maskserve.jagged import to_packed_sequence

        return to_packed_sequence(self)  # type: ignore[arg-type]  # attributes of a MaskedTensor alone

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def is_sparse_csr(self) -> bool:
        return self.layout is torch.sparse_csr

    def _moved(self, name: str, *args: Any) -> MaskedTensor:
        from maskserve.functions import public

        moved: MaskedTensor = public(name)(self, *args)
        return moved
