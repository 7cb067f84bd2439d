"""Where a sparse tensor stores its cells: one sorted list of positions, whatever the layout is called.

A position is a cell's index in row-major order, so COO and CSR are two ways to write the same list down, and reshaping
changes nothing of it. What is not in the list is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from maskserve.errors import MaskMismatchError, ShapeError, TooLargeError

COO, CSR = torch.sparse_coo, torch.sparse_csr
LAYOUTS = (COO, CSR)
MOST_CELLS = 2**63 - 1
MOST_ROWS = 1 << 28
"""Rows of a CSR tensor: it writes 8 bytes for each, stored cells or not."""
MOST_SPREAD = 1 << 24
"""Stored cells of a tensor that broadcasts, each with its 8 bytes of position, a coordinate a dim, and a sort."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pattern:
    """The stored cells of a tensor of `shape`: ascending positions, (n,) int64, each once."""

    layout: torch.layout
    shape: torch.Size
    positions: Tensor

    @property
    def n(self) -> int:
        return len(self.positions)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def coordinates(self) -> tuple[Tensor, ...]:
        """The index of each stored cell along each dim."""
        return unravelled(self.positions, self.shape)

    def rows_begin(self) -> Tensor:
        """Where each row of a matrix begins among the stored cells, and where the last one ends: (rows + 1,)."""
        n_rows, n_columns = self.shape
        rows = torch.arange(n_rows + 1, device=self.device) * n_columns
        return torch.searchsorted(self.positions, rows)

    def in_layout(self, layout: torch.layout) -> Pattern:
        """The same cells in COO or CSR; ShapeError where the layout cannot hold the shape."""
        if layout is CSR and len(self.shape) != 2:
            raise ShapeError(
                f"a CSR tensor is a matrix, and the tensor has {len(self.shape)} dims; to_sparse_coo() takes any"
            )
        if layout is CSR and self.shape[0] > MOST_ROWS:
            raise ShapeError(
                f"a CSR tensor of {self.shape[0]} rows writes 8 bytes for each, and at most {MOST_ROWS} are written; "
                "to_sparse_coo() writes stored cells alone"
            )
        return replace(self, layout=layout)

    def of_shape(self, shape: Sequence[int], positions: Tensor | None = None) -> Pattern:
        """A pattern that came of this one: CSR where it is one and the new shape is a matrix, else COO."""
        layout = self.layout if len(shape) == 2 and shape[0] <= MOST_ROWS else COO
        kept = self.positions if positions is None else positions
        return Pattern(layout=layout, shape=checked_shape(shape), positions=kept)

    def to(self, device: torch.device) -> Pattern:
        return self if device == self.device else replace(self, positions=self.positions.to(device))

    def is_like(self, other: Pattern) -> bool:
        """Whether both store the same cells."""
        same = self.positions is other.positions
        return self.shape == other.shape and (same or torch.equal(self.positions, other.positions))


def checked_shape(shape: Sequence[int]) -> torch.Size:
    """The shape, where its cells can be counted."""
    spanned = prod(max(size, 1) for size in shape)
    if any(size < 0 for size in shape) or spanned > MOST_CELLS:
        raise ShapeError(f"shape {tuple(shape)} has a negative size, or more than 2^63 - 1 cells; make it smaller")
    return torch.Size(shape)


# -- positions and coordinates ------------------------------------------------------------------------------------


def unravelled(positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """The index along each dim of cells at row-major positions.

    >>> [part.tolist() for part in unravelled(torch.tensor([2, 5]), (2, 3))]
    [[0, 1], [2, 2]]
    """
    parts: list[Tensor] = []
    first = next((dim for dim, size in enumerate(shape) if size > 1), 0)
    for dim in reversed(range(len(shape))):
        size = shape[dim]
        if size <= 1 or dim == first:
            parts.append(positions if dim == first else torch.zeros_like(positions))
            continue
        rest = positions // size  # a division takes longer than all else here
        parts.append(positions - rest * size)
        positions = rest
    return tuple(reversed(parts))


def ravelled(coordinates: Sequence[Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    """Row-major positions of cells at coordinates; without dims they are all 0, as many as `like` has."""
    position = torch.zeros_like(like)
    for size, index in zip(shape, coordinates, strict=True):
        position = position * size + index
    return position


# -- several patterns ---------------------------------------------------------------------------------------------


def found(wanted: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """(where each wanted position stands among ascending ones, whether it does): 0 and False where it does not."""
    if not len(among):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    at = torch.searchsorted(among, wanted).clamp_(max=len(among) - 1)
    return at, among[at] == wanted


def intersection(patterns: Sequence[Pattern], shape: torch.Size) -> Pattern:
    """The cells of `shape` that all store, each broadcast to it; in the layout of the first.

    Begun with the one that has the fewest there: the others are asked for its cells, and not spread out.
    """
    fewest = min(patterns, key=lambda pattern: n_spread(pattern, shape))
    positions = spread(fewest, shape)[0].positions
    for other in patterns:
        if other is fewest or (other.positions is positions and other.shape == shape):
            continue
        stored = found(within(positions, shape, other.shape), other.positions)[1]
        if not bool(stored.all()):
            positions = positions[stored]
    return patterns[0].of_shape(shape, positions)


def union(patterns: Sequence[Pattern]) -> Pattern:
    """The cells that any stores, in the layout of the first."""
    first, *others = patterns
    if all(first.is_like(other) for other in others):
        return first
    return replace(first, positions=torch.cat([pattern.positions for pattern in patterns]).unique())


def grown(own: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that broadcasts to another, with as many dims."""
    return (1,) * (len(shape) - len(own)) + tuple(own)


def within(positions: Tensor, shape: torch.Size, own: torch.Size) -> Tensor:
    """Which position of a tensor of shape `own`, which broadcasts to `shape`, each cell of `shape` is.

    >>> within(torch.tensor([2, 5]), torch.Size((2, 3)), torch.Size((1, 3))).tolist()
    [2, 2]
    """
    if own == shape:
        return positions
    sizes = grown(own, shape)
    coordinates = unravelled(positions, shape)
    kept = [torch.zeros_like(index) if size == 1 else index for index, size in zip(coordinates, sizes, strict=True)]
    return ravelled(kept, sizes, positions)


def n_spread(pattern: Pattern, shape: torch.Size) -> int:
    """How many cells a pattern has that is broadcast to `shape`."""
    return pattern.n * (prod(shape) // max(pattern.numel, 1))


def spread(pattern: Pattern, shape: torch.Size) -> tuple[Pattern, Tensor | None]:
    """(the pattern broadcast to `shape`, which stored cell each of its cells is); None: they are as they were.

    TooLargeError beyond MOST_SPREAD cells.
    """
    if pattern.shape == shape:
        return pattern, None
    n = n_spread(pattern, shape)
    if n > MOST_SPREAD:
        raise TooLargeError(
            f"a sparse tensor of shape {tuple(pattern.shape)} that broadcasts to {tuple(shape)} stores {n} cells there, "
            f"and at most {MOST_SPREAD} are spread out: to_dense() it where that fits"
        )
    own = grown(pattern.shape, shape)
    coordinates = list(unravelled(pattern.positions, own))
    at = torch.arange(pattern.n, device=pattern.device)
    if not n:
        return pattern.of_shape(shape, at[:0]), at[:0]
    for dim, (size, wanted) in enumerate(zip(own, shape, strict=True)):
        if size != wanted:
            copies = torch.arange(wanted, device=pattern.device)
            coordinates = [part.repeat_interleave(wanted) for part in coordinates]
            coordinates[dim] = copies.repeat(len(at))
            at = at.repeat_interleave(wanted)
    positions, order = ravelled(coordinates, shape, at).sort()
    return pattern.of_shape(shape, positions), at[order]


def sorted_once(positions: Tensor, what: str) -> tuple[Tensor, Tensor | None]:
    """(ascending positions, the order that they had before); MaskMismatchError where a cell is stored twice."""
    order = None
    if bool((positions[1:] < positions[:-1]).any()):
        positions, order = positions.sort(stable=True)
    if bool((positions[1:] == positions[:-1]).any()):
        raise MaskMismatchError(
            f"{what} stores a cell twice, and which of the two counts is not said: coalesce() adds them up"
        )
    return positions, order
