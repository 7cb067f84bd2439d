"""How a plan is cut into launches of Triton kernels, and what each reads and writes: decided by shapes alone, without a device.

A tile is (groups of leaves, cells of a leaf, lanes); a lane is a slice, or its part beside others. Tiles are unions of whole
subtrees of the plan's order, so that their size changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

TILE = 4096
"""Cells of a tile where slices lie one after the other: a leaf, or whole short slices."""
SHORT_TILE = 1024
"""Cells of a tile of several short slices: its halvings cross threads, and of 4096 the compiler takes 17 s for a variance."""
WIDE_TILE = 8192
COLUMNS = 32
"""Neighbours that are read together, where there are so many: a line of a device's memory is 128 bytes."""
NARROW = 16
"""Neighbours at least, for whole slices to be held in a tile."""
JOINED = 1024
"""States that a program joins at most."""
SCANNED = 1024
"""Cells of a slice that a program takes at a time where each result follows from the last."""


BUSY = 256
"""Programs that keep a device busy: it has some 100 multiprocessors. What is fewer and long is cut, and its cells read twice."""
SPLIT = 8
"""Tiles of a slice from which it is cut."""


def pow2(n: int) -> int:
    """The least power of two that is at least n.

    >>> [pow2(n) for n in (0, 1, 2, 3, 64, 65)]
    [1, 1, 2, 4, 64, 128]
    """
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The cells of one program: `groups` leaves of `n` cells, or `groups` states where n is 1, of each of `lanes` slices."""

    groups: int
    n: int
    lanes: int

    @property
    def cells(self) -> int:
        """Of each slice."""
        return self.groups * self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One launch: what stands `count` times in each of `lanes` slices becomes `runs` states of each, or results of one."""

    tile: Tile
    count: int
    lanes: int
    inner: int
    runs: int
    below: int = 0
    """The cells of a slice that one state stands for, where they are states of earlier groups of dims."""
    is_new_group: bool = False
    """Whether its states lie as (outer, count, inner); else as (count, lanes)."""

    @property
    def blocks(self) -> int:
        """The programs beside each other."""
        return -(-self.lanes // self.tile.lanes)

    @property
    def programs(self) -> int:
        return self.blocks * self.runs


def lifting_tile(n: int, leaf: int, lanes: int, *, is_inner: bool) -> Tile:
    """The tile that reads slices of n cells."""
    cells = min(leaf, pow2(n))
    if is_inner:
        beside = min(pow2(lanes), max(1, SHORT_TILE // cells))
    else:
        beside = min(pow2(lanes), max(COLUMNS, TILE // cells if n <= leaf else 0))
    most = (TILE if is_inner else WIDE_TILE) // (cells * beside)
    return Tile(groups=max(1, min(pow2(-(-n // cells)), most)), n=cells, lanes=beside)


@lru_cache(maxsize=1024)
def stages_of(fold: tuple[int, ...], leaf: int) -> tuple[Stage, ...]:
    """The launches that reduce a folded shape: one for the leaves, then one for each 1024 states of a slice that meet.

    >>> [(s.programs, s.runs) for s in stages_of((1, 10**7, 1), 4096)]
    [(2442, 2442), (3, 3), (1, 1)]
    >>> [(s.programs, s.runs) for s in stages_of((8192, 100, 1), 4096)]
    [(1024, 1)]
    """
    *outer, n, inner = fold
    lanes = prod(outer) * inner
    tile = lifting_tile(n, leaf, lanes, is_inner=inner == 1)
    stages = [Stage(tile=tile, count=n, lanes=lanes, inner=inner, runs=-(-n // tile.cells))]
    stages += joins(stages[0].runs, lanes, inner)
    below = n
    for group in range(len(fold) - 4, 0, -2):
        m, inner = fold[group], prod(fold[group + 1 :: 2])
        stages += joins(m, prod(fold[:group]) * inner, inner, below)
        below *= m
    return tuple(stages)


def joins(m: int, lanes: int, inner: int, below: int = 0) -> list[Stage]:
    """The launches that join m states of each slice: of an earlier group of dims where `below` cells are below each."""
    stages: list[Stage] = []
    while m > 1:
        groups = min(pow2(m), JOINED)
        tile = Tile(groups=groups, n=1, lanes=min(pow2(lanes), max(1, JOINED // groups)))
        runs, is_new = -(-m // groups), bool(below) and not stages
        stages.append(
            Stage(
                tile=tile, count=m, lanes=lanes, inner=inner, runs=runs, below=below if is_new else 0, is_new_group=is_new
            )
        )  # fmt: skip
        m = runs
    return stages


@lru_cache(maxsize=1024)
def ending_stage(lanes: int) -> Stage:
    """The launch that makes results of finished states."""
    return Stage(tile=Tile(groups=1, n=1, lanes=min(pow2(lanes), JOINED)), count=1, lanes=lanes, inner=1, runs=1)


@lru_cache(maxsize=1024)
def holding_tile(n: int, leaf: int, lanes: int, *, is_inner: bool) -> Tile | None:
    """The tile that holds slices whole; None where they are too long."""
    cells = min(leaf, pow2(n))
    groups = pow2(-(-n // cells))
    room = max(SHORT_TILE, groups * cells if groups * cells <= TILE else 0) if is_inner else WIDE_TILE
    beside = min(pow2(lanes), room // (groups * cells))
    if beside < min(pow2(lanes), 1 if is_inner else NARROW):
        return None
    return Tile(groups=groups, n=cells, lanes=beside)


@lru_cache(maxsize=1024)
def scanning_tile(n: int, lanes: int, *, is_inner: bool) -> Tile:
    """The tile that walks along slices."""
    cells = min(TILE if is_inner else SCANNED // COLUMNS, pow2(n))
    return Tile(groups=1, n=cells, lanes=min(pow2(lanes), max(1, TILE // cells) if is_inner else COLUMNS))


@lru_cache(maxsize=1024)
def scanning_runs(n: int, lanes: int, tile: Tile) -> int:
    """Into how many runs slices are cut that are few and long; 1 where their number alone keeps a device busy.

    >>> scanning_runs(10**7, 1, Tile(groups=1, n=4096, lanes=1)), scanning_runs(10**7, 10**6, Tile(groups=1, n=32, lanes=32))
    (814, 1)
    """
    blocks, tiles = -(-lanes // tile.lanes), -(-n // tile.n)
    if blocks >= BUSY or tiles < SPLIT:
        return 1
    most = min(JOINED, BUSY * 4 // blocks)
    return -(-tiles // -(-tiles // most))
