"""What a header alone tells of a tensor that a request reads or gives. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from maskserve.dtypes import DType
from maskserve.payload.metadata import Dims


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A tensor of a question or an answer, from the header alone."""

    dtype: DType
    shape: tuple[int, ...]
    dims: Dims | None
    stored_bytes: int | None = None
    """Of a sparse tensor, what it stores and where."""

    @property
    def n_bytes(self) -> int:
        """Its bytes and its mask's."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return prod(self.shape) * (self.dtype.n_bytes + 1)
