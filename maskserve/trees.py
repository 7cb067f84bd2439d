"""The power-of-two tree in which states join (docs/order.md): its aligned ranges, and the counter that walks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Parts = dict[str, Tensor]
Merge = Callable[[Parts, Parts], Parts]


def subtrees(start: int, stop: int, largest: int | None = None) -> Iterator[tuple[int, int]]:
    """The aligned power-of-two ranges (start, n) that make up start..stop, left to right, each at most `largest`.

    >>> list(subtrees(0, 7)), list(subtrees(3, 8)), list(subtrees(0, 5, 2))
    ([(0, 4), (4, 2), (6, 1)], [(3, 1), (4, 4)], [(0, 2), (2, 2), (4, 1)])
    """
    while start < stop:
        n = 1 << (stop - start).bit_length() - 1
        while start % n or (largest is not None and n > largest):
            n >>= 1
        yield start, n
        start += n


class Counter:
    """States of consecutive subtrees, joined as soon as both halves of a larger one are there."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.nodes: list[tuple[int, int, Parts]] = []

    def add(self, start: int, n_units: int, parts: Parts) -> None:
        """The state of `n_units` units from `start` on, which follow those before."""
        while self.nodes:
            first, n, before = self.nodes[-1]
            if n != n_units or first % (2 * n):
                break
            self.nodes.pop()
            start, n_units, parts = first, 2 * n, self.merge(before, parts)
        self.nodes.append((start, n_units, parts))

    def joined(self) -> Parts:
        """The state of all; what is left over joins from the right."""
        *nodes, (_, _, last) = self.nodes
        for _, _, parts in reversed(nodes):
            last = self.merge(parts, last)
        return last
