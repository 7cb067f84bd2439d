"""docs/coverage.svg: which op takes which dtype, and who computes it. Drawn from the op table."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from maskserve.backends import choose
from maskserve.dtypes import ALL, DType
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Contraction, Elementwise, Move, Row, Sliced
from maskserve.plan import SlicedRow, plan

CELL, LEFT, TOP = 18, 130, 84
KINDS = {"native": "#1f6f8b", "reference": "#9fd0dd", "refused": "#f1f1f1"}
SAID = {"native": "native CPU kernels", "reference": "plain torch, on CPU or GPU", "refused": "refused with an error"}
SAMPLES = {Type.NUMBERS: 0.5, Type.CELL: 1, Type.COUNT: 1}


def who(row: SlicedRow, dtype: DType) -> str:
    """Who computes the row on CPU cells of this dtype."""
    if dtype not in row.accepts:
        return "refused"
    needed = {p.name: SAMPLES[p.type] for p in row.parameters if p.default is REQUIRED and p.type in SAMPLES}
    if any(p.name == "dim" for p in row.parameters):
        needed["dim"] = 0
    return {"cpu": "native"}.get(
        choose(plan(row, tuple(needed.items()), (2, 3), dtype, "cpu")).backend.name, "reference"
    )


def svg() -> str:
    """The picture: a line an op, a column a dtype."""
    rows: list[SlicedRow] = [row for row in OPS.values() if isinstance(row, Sliced)]  # type: ignore[misc]  # each kind is one
    width, height = LEFT + CELL * len(ALL) + 130, TOP + CELL * (len(rows) + 2) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *legend(),
        *(column(i, dtype) for i, dtype in enumerate(ALL)),
    ]
    for i, row in enumerate(rows):
        y = TOP + CELL * i
        lines.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(row.name)}</text>')
        lines += [square(j, y, row, dtype) for j, dtype in enumerate(ALL)]
    lines.append(f'<text x="10" y="{TOP + CELL * len(rows) + 24}">{escape(others())}</text>')
    return "\n".join([*lines, "</svg>", ""])


def legend() -> Iterator[str]:
    for i, (kind, colour) in enumerate(KINDS.items()):
        x = 10 + 190 * i
        yield f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/><text x="{x + 16}" y="18">{SAID[kind]}</text>'


def column(i: int, dtype: DType) -> str:
    x = LEFT + CELL * i + 13
    return f'<text transform="translate({x},{TOP - 4}) rotate(-60)" font-size="10">{dtype.name}</text>'


def square(i: int, y: int, row: SlicedRow, dtype: DType) -> str:
    kind = who(row, dtype)
    title = f"{row.name} of {dtype.name}: {SAID[kind]}"
    where = f'x="{LEFT + CELL * i}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"'
    return f'<rect {where} rx="2" fill="{KINDS[kind]}"><title>{escape(title)}</title></rect>'


def others() -> str:
    """What the picture leaves out, in a line."""

    def count(kind: type[Row]) -> int:
        return sum(isinstance(row, kind) for row in OPS.values())

    return (
        f"and {count(Elementwise)} elementwise functions, {count(Contraction)} contractions and {count(Move)} moves: "
        "docs/ops.md"
    )
