"""Cells as a table for people: 6 digits, labels from coordinates, and the edges of what does not fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from maskserve.dtypes import DType
from maskserve.payload.header import Shape
from maskserve.payload.slices import numbers
from maskserve_cli.outputs import is_terminal

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MASKED = "--"
GAP = "…"
ROWS, ROW_EDGE = 24, 6
COLUMNS, COLUMN_EDGE = 40, 20
SLABS, FIRST_SLABS = 4, 2
INDENT = "  "
Indices: TypeAlias = Sequence[int | None]
"""Which cells along a dim are shown; None stands for those left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A variable to look at: its cells as stored, which of them are valid (None: all), and the labels of its dims."""

    name: str
    dtype: DType
    shape: Shape
    dims: tuple[str, ...] | None
    cells: Array
    valid: Array | None
    note: str
    is_head: bool = False
    """Whether `cells` are only the first of `shape`."""

    @property
    def sizes(self) -> Shape:
        """The cells as (slabs, rows, columns): one column where there is one dim, one cell where there is none."""
        *lead, rows, columns = (*self.cells.shape, 1) if self.cells.ndim == 1 else (1, 1, *self.cells.shape)
        return prod(lead), rows, columns

    def texts(self, slab: int, rows: Indices, columns: Indices) -> list[list[str]]:
        """The cells at these rows and columns of a slab, spelled; a gap where an index is None."""
        at = slab, *([[i or 0] for i in rows], [i or 0 for i in columns])
        values = numbers(self.cells.reshape(self.sizes)[at], self.dtype).tolist()
        valid = None if self.valid is None else self.valid.reshape(self.sizes)[at].tolist()
        return [
            [
                GAP if row is None or column is None else MASKED if valid and not valid[r][c] else spelled(values[r][c])
                for c, column in enumerate(columns)
            ]
            for r, row in enumerate(rows)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Texts in rows and columns, with a label for each; no `columns` where there is only one, without a name."""

    title: str
    corner: str
    rows: list[str]
    columns: list[str] | None
    cells: list[list[str]]


def spelled(value: object) -> str:
    """A number as the table shows it.

    >>> spelled(16.666666), spelled(True), spelled(float("nan")), spelled(12345678)
    ('16.6667', 'true', 'NaN', '12345678')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    text = f"{value:.6g}"
    return "NaN" if text == "nan" else text


def dims_text(shape: Shape, dims: Sequence[str] | None) -> str:
    """ "(time 12, lat 8)", or "(12, 8)" where the dims have no names."""
    sizes = [str(size) for size in shape]
    return f"({', '.join(sizes if dims is None else [f'{d} {s}' for d, s in zip(dims, sizes, strict=True)])})"


def indices(n: int, limit: int, edge: int) -> Indices:
    """All of n where they are at most `limit`, else `edge` from both ends.

    >>> indices(3, 4, 1), indices(9, 4, 2)
    ([0, 1, 2], [0, 1, None, 7, 8])
    """
    return list(range(n)) if n <= limit else [*range(edge), None, *range(n - edge, n)]


def lines(shown: Shown, coordinates: Mapping[str, Shown], *, color: bool | None = None) -> Iterator[str]:
    """The table of one variable, its header first; a coordinate labels the dim that has its name."""
    paint = Paint(is_color() if color is None else color)
    yield f"{paint.bold(shown.name)}  {shown.dtype.name} {dims_text(shown.shape, shown.dims)}  {shown.note}"
    if 0 in shown.cells.shape:
        yield f"{INDENT}no cells"
        return
    width = shutil.get_terminal_size().columns
    for position, grid in enumerate(grids(shown, coordinates)):
        if position:
            yield ""
        yield from laid_out(grid, width, paint, from_the_left=shown.is_head)


def tables(every: Iterable[Shown], coordinates: Mapping[str, Shown]) -> Iterator[str]:
    """Tables with an empty line between them."""
    for position, one in enumerate(every):
        if position:
            yield ""
        yield from lines(one, coordinates)


def grids(shown: Shown, coordinates: Mapping[str, Shown]) -> Iterator[Grid]:
    """The slabs of a variable: its last two dims, for the first and the last indices of those before."""
    n_slabs, n_rows, n_columns = shown.sizes
    rows = indices(n_rows, n_rows if shown.is_head else ROWS, ROW_EDGE)
    columns = indices(n_columns, COLUMNS, COLUMN_EDGE)
    slabs = [*range(n_slabs)] if n_slabs <= SLABS else [*range(FIRST_SLABS), None, n_slabs - 1]
    for slab in slabs:
        if slab is None:
            yield Grid(title=f"{GAP} {n_slabs - FIRST_SLABS - 1} more", corner="", rows=[], columns=None, cells=[])
        else:
            yield grid(shown, coordinates, slab, rows, columns)


def grid(shown: Shown, coordinates: Mapping[str, Shown], slab: int, rows: Indices, columns: Indices) -> Grid:
    """One slab with its labels."""
    n_dims = shown.cells.ndim
    return Grid(
        title=title(shown, coordinates, slab),
        corner=" \\ ".join((shown.dims or ())[-2:]),
        rows=labels(shown, coordinates, max(n_dims - 2, 0), rows) if n_dims else [""],
        columns=labels(shown, coordinates, n_dims - 1, columns) if n_dims > 1 else None,
        cells=shown.texts(slab, rows, columns),
    )


def title(shown: Shown, coordinates: Mapping[str, Shown], slab: int) -> str:
    """Where a slab stands along the dims before the last two: "time 2001, level 850", or "[0, 3, :, :]"."""
    lead = shown.cells.shape[:-2]
    at = [slab // prod(lead[dim + 1 :]) % size for dim, size in enumerate(lead)]
    if not lead:
        return ""
    if shown.dims is None:
        return f"[{', '.join([*map(str, at), ':', ':'])}]"
    words = [labels(shown, coordinates, dim, [index])[0] for dim, index in enumerate(at)]
    return ", ".join(f"{name} {word}" for name, word in zip(shown.dims, words, strict=False))


def labels(shown: Shown, coordinates: Mapping[str, Shown], dim: int, chosen: Indices) -> list[str]:
    """A label for each chosen index of a dim: the cell of its coordinate, or the index.

    A dim that was reduced and kept has size 1, and its coordinate no longer says where it is.
    """
    coordinate = coordinates.get(shown.dims[dim]) if shown.dims else None
    if coordinate is None or coordinate.shape != shown.shape[dim : dim + 1]:
        return [GAP if i is None else str(i) for i in chosen]
    return [row[0] for row in coordinate.texts(0, chosen, [0])]


def laid_out(grid: Grid, width: int, paint: Paint, *, from_the_left: bool) -> Iterator[str]:
    """The lines of a grid, no wider than `width` where that can be."""
    if grid.title:
        yield f"{INDENT}{paint.bold(grid.title)}"
    if not grid.cells:
        return
    heads = grid.columns or [""]
    columns = [aligned([row[c] for row in grid.cells], head) for c, head in enumerate(heads)]
    stubs = [text.rjust(max(map(len, [*grid.rows, grid.corner]))) for text in [grid.corner, *grid.rows]]
    room = width - len(INDENT) - len(stubs[0])
    columns = fitting(columns, room, from_the_left=from_the_left)
    for position, texts in enumerate(zip(stubs, *columns, strict=True)):
        first, *cells = texts
        line = INDENT.join([paint.faint(first), *(paint.cell(cell, is_head=position == 0) for cell in cells)])
        if position or line.strip():
            yield (INDENT + line if first else line).rstrip()


def aligned(texts: list[str], head: str) -> list[str]:
    """`head` and `texts` in one width: decimal points below each other, unless one has an exponent."""
    fractions = [0 if GAP in text else len(text) - len(text.partition(".")[0]) for text in texts]
    has_exponent = any("e" in text and text not in ("true", "false") for text in texts)
    tail = 0 if has_exponent else max(fractions)
    padded = [text if has_exponent else text + " " * (tail - n) for text, n in zip(texts, fractions, strict=True)]
    wide = max(map(len, [head, *padded]))
    return [text.rjust(wide) for text in [head, *padded]]


def fitting(columns: list[list[str]], room: int, *, from_the_left: bool) -> list[list[str]]:
    """The columns that fit beside the labels: all, or those of both ends with a gap between."""
    widths = [len(column[0]) + len(INDENT) for column in columns]
    if sum(widths) <= room:
        return columns
    room -= len(INDENT) + len(GAP)
    left, right = 0, len(columns)
    while left < right:
        from_left = from_the_left or left <= len(columns) - right
        wanted = widths[left] if from_left else widths[right - 1]
        if wanted > room and left:
            break
        room -= wanted
        left, right = (left + 1, right) if from_left else (left, right - 1)
    gap = [GAP] * len(columns[0])
    ends = [[c for c in end if c[0].strip() != GAP] for end in (columns[:left], columns[right:])]
    return [*ends[0], gap, *ends[1]]


def is_color() -> bool:
    """Whether colors are wanted: on a terminal, unless NO_COLOR says otherwise."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True, slots=True)
class Paint:
    """Escapes for a terminal, or none."""

    on: bool

    def bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self.on else text

    def faint(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self.on and text.strip() else text

    def cell(self, text: str, *, is_head: bool) -> str:
        return self.faint(text) if is_head or text.strip() in (MASKED, GAP) else text


def columns(rows: Sequence[Sequence[str]], *, indent: str = "", right: Collection[int] = ()) -> Iterator[str]:
    """Rows of words in columns as wide as their widest word; those in `right` end below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        words = [w.rjust(n) if i in right else w.ljust(n) for i, (w, n) in enumerate(zip(row, widths, strict=True))]
        yield (indent + "  ".join(words)).rstrip()
