"""The same cells of two variables beside each other, be they stored one by one or as sparse tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from maskserve.payload.files import Payload
from maskserve.payload.slices import BLOCK_CELLS, blocks, cells_at
from maskserve.payload.variables import Variable

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Block: TypeAlias = tuple[Array, Array | None]
Places: TypeAlias = Array | range
Of: TypeAlias = tuple[Payload, Variable]


def side_by_side(a: Of, b: Of) -> Iterator[tuple[Block, Block, Places]]:
    """(cells, valid) of both, a block at a time, and their flat indices; without what neither of two sparse tensors stores."""
    if a[1].stored is None and b[1].stored is None:
        at = 0
        for ours, theirs in zip(blocks(*a), blocks(*b), strict=True):
            yield ours, theirs, range(at, at + ours[0].size)
            at += ours[0].size
    elif a[1].stored is not None and b[1].stored is not None:
        one, other = Stored.of(*a), Stored.of(*b)
        every = np.union1d(one.places, other.places)
        for start in range(0, every.size, BLOCK_CELLS):
            places = every[start : start + BLOCK_CELLS]
            yield one.at(places), other.at(places), places
    elif a[1].stored is not None:
        yield from ((ours, theirs, where) for theirs, ours, where in side_by_side(b, a))
    else:
        sparse, at = Stored.of(*b), 0
        for block in blocks(*a):
            yield block, sparse.at(np.arange(at, at + block[0].size)), range(at, at + block[0].size)
            at += block[0].size


@dataclass(frozen=True, slots=True)
class Stored:
    """The stored cells of a sparse tensor, their flat indices in rising order, and which are valid."""

    places: Array
    cells: Array
    valid: Array

    @staticmethod
    def of(payload: Payload, variable: Variable) -> Stored:
        from maskserve.payload.tensors import load_sparse  # which brings torch along

        assert variable.stored is not None
        pattern, *_ = load_sparse(payload, variable)
        none = cells_at(payload, variable.stored.values, 0, 0), None
        parts = [
            (data, np.ones(data.shape, np.bool_) if valid is None else valid)
            for data, valid in (none, *blocks(payload, variable))
        ]
        data, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Stored(pattern.positions.numpy(), data, valid)

    def at(self, places: Array) -> Block:
        """The cells at these flat indices; what is not stored is missing."""
        if not self.places.size:
            return np.zeros(places.shape, self.cells.dtype), np.zeros(places.shape, np.bool_)
        where = np.minimum(np.searchsorted(self.places, places), self.places.size - 1)
        is_there = self.places[where] == places
        cells = np.where(is_there, self.cells[where], np.zeros(1, self.cells.dtype))
        return cells, is_there & self.valid[where]
