"""Where the valid cells of a tensor lie: runs of them, and the first and last one. Counts and indices, never values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskserve.errors import DimError, ParameterError
from maskserve.making import as_masked_tensor
from maskserve.tensor import MaskedTensor

OF = ("valid", "masked")


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Runs of cells, in order: run i is cells start[i] to stop[i] - 1 of the slice at[i], an index in the other dims."""

    at: Tensor
    start: Tensor
    stop: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def slices(self) -> list[slice]:
        """Each run as a slice, as numpy.ma.clump_unmasked gives them."""
        return [slice(start, stop) for start, stop in zip(self.start.tolist(), self.stop.tolist(), strict=True)]

    @property
    def columns(self) -> tuple[str, ...]:
        return "start", "stop", "length"

    def rows(self, limit: int) -> list[list[int | None]]:
        """The first runs: the index of their slice, start, stop and length."""
        start, stop = self.start[:limit, None], self.stop[:limit, None]
        rows: list[list[int | None]] = torch.cat([self.at[:limit], start, stop, stop - start], 1).tolist()
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """The index of the first and of the last valid cell of each slice, of the shape without dim; `--` where none is."""

    first: MaskedTensor
    last: MaskedTensor

    def __len__(self) -> int:
        return self.first.numel()

    @property
    def columns(self) -> tuple[str, ...]:
        return "first", "last"

    def rows(self, limit: int) -> list[list[int | None]]:
        """The first slices: their index, first and last."""
        n = min(limit, len(self))
        at = unravelled(torch.arange(n), tuple(self.first.shape)).tolist()
        ends = [MaskedTensor(t._data.reshape(-1)[:n], t._full_mask().reshape(-1)[:n]).tolist() for t in self._both]
        return [[*index, first, last] for index, first, last in zip(at, *ends, strict=True)]

    @property
    def _both(self) -> tuple[MaskedTensor, MaskedTensor]:
        return self.first, self.last


def clumps(input: Any, of: str = "valid", dim: int | None = None) -> Runs:
    """The runs of valid (or masked) cells along `dim`; without a dim, in the flattened tensor.

    >>> x = as_masked_tensor([None, 2.0, 3.0, None, 5.0])
    >>> clumps(x).slices(), clumps(x, "masked").slices()
    ([slice(1, 3, None), slice(4, 5, None)], [slice(0, 1, None), slice(3, 4, None)])
    """
    if of not in OF:
        raise ParameterError(f"clumps: of is {of!r:.40}; it must be one of {', '.join(OF)}", parameter="of", allowed=OF)
    chosen, shape = in_slices(input, dim)
    n_slices = len(chosen)
    if of == "masked":
        chosen = ~chosen
    edge = torch.zeros((n_slices, 1), dtype=torch.bool, device=chosen.device)
    walled = torch.cat([edge, chosen, edge], 1)
    changes = (walled[:, 1:] != walled[:, :-1]).nonzero()  # starts and stops by turns, in each slice an even number
    at = unravelled(changes[::2, 0], shape)
    return Runs(at, changes[::2, 1], changes[1::2, 1])


def edges(input: Any, dim: int | None = None) -> Edges:
    """The first and last valid cell along `dim`, masked where a slice has none; without a dim, of the flattened tensor."""
    valid, shape = in_slices(input, dim)
    found = valid.any(1)
    n = valid.shape[1]
    if n:
        bits = valid.to(torch.uint8)  # argmax gives the first of equals for integers, and takes no bool
        first, last = bits.argmax(1), n - 1 - bits.flip(1).argmax(1)
    else:
        first = last = torch.zeros(len(valid), dtype=torch.int64, device=valid.device)
    of = [torch.where(found, index, 0).reshape(shape) for index in (first, last)]
    return Edges(*[MaskedTensor(index, found.reshape(shape)) for index in of])


def in_slices(input: Any, dim: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """(validity as (slices, cells), the shape of the slices); one slice where no dim is given."""
    valid = as_masked_tensor(input)._full_mask()
    if dim is None:
        return valid.reshape(1, -1), ()
    ndim = max(valid.ndim, 1)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise DimError(
            f"dim {dim!r:.40} is out of range for a tensor with {valid.ndim} dims; give {-ndim} to {ndim - 1}",
            parameter="dim",
        )
    if not valid.ndim:
        return valid.reshape(1, 1), ()
    last = valid.movedim(dim, -1)
    shape = tuple(last.shape[:-1])
    n_slices = 1
    for size in shape:
        n_slices *= size
    return last.reshape(n_slices, last.shape[-1]), shape


def unravelled(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n,) flat indices into `shape` as (n, ndim) ones."""
    columns: list[Tensor] = []
    for size in reversed(shape):
        columns.append(flat % max(size, 1))
        flat = flat // max(size, 1)
    return torch.stack(columns[::-1], 1) if columns else flat.new_empty((len(flat), 0))
