"""What is timed: shapes, dims, dtypes and masks. The ops come from the op table, so a new row is timed unasked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor

from maskserve.dtypes import DType, bf16, f16, f32, f64, i8, i32, i64
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Normalization, Reduction, Scan
from maskserve.plan import SlicedRow

Shape = tuple[int, ...]
SEED = 20240229
SORTED_CELLS = 1 << 22
"""Beyond it no row is timed that sorts: a call would take seconds and say what it says of fewer cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One data set and the dim to work along; `mask` is a kind of `make_mask`, "none" or "nan"."""

    label: str
    shape: Shape
    dim: int | None
    dtype: DType = f32
    mask: str = "70 %"

    @property
    def n(self) -> int:
        """How many cells it has."""
        return prod(self.shape)

    @property
    def omits_nan(self) -> bool:
        """Whether the missing values are NaN in the data, and no mask is given."""
        return self.mask == "nan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cells that are reported side by side; `is_small` ones are about the cost of a call, not of a cell."""

    title: str
    cells: tuple[Cell, ...]
    is_small: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """The tensors of a cell; mask None: all valid, or NaN where missing."""

    data: Tensor
    mask: Tensor | None

    @property
    def full_mask(self) -> Tensor | None:
        """The mask in the data's shape, for peers that do not broadcast it."""
        return None if self.mask is None else self.mask.expand(self.data.shape).contiguous()


def rows() -> tuple[SlicedRow, ...]:
    """The rows that work on slices: reductions, normalizations and scans."""
    return tuple(row for row in OPS.values() if isinstance(row, Reduction | Normalization | Scan))


NEEDED: dict[Type, Any] = {Type.NUMBERS: 0.25, Type.CELL: 1, Type.COUNT: 3}
"""A value for each parameter that has no default, dims apart."""


def leading(row: SlicedRow) -> tuple[Any, ...]:
    """The parameters that stand before the dim, as in torch and numpy: the order of a norm, the share of a quantile."""
    before = takewhile(lambda p: p.name != "dim" and not p.keyword_only, row.parameters)
    return tuple(NEEDED[p.type] if p.default is REQUIRED else p.default for p in before)


def arguments(row: SlicedRow, cell: Cell) -> tuple[Any, ...]:
    """What a call gives after the data: the leading parameters, and the dim where the row has one."""
    return (*leading(row), cell.dim) if "dim" in types(row) else leading(row)


def types(row: SlicedRow) -> dict[str, Type]:
    return {p.name: p.type for p in row.parameters}


def takes_nan(row: SlicedRow) -> bool:
    """Whether it can take NaN for missing."""
    return "nan" in types(row)


def sorts(row: SlicedRow) -> bool:
    """Whether it puts each slice in order, by the modules that do."""
    needs_whole = row.select if isinstance(row, Reduction) else row.scan if isinstance(row, Scan) else ""
    return needs_whole.startswith((".selections:", ".orders:"))


def fits(row: SlicedRow, cell: Cell) -> bool:
    """Whether `row` is asked for `cell`: it takes the dtype, all dims or the one, and that many cells."""
    takes_all = types(row).get("dim") is Type.DIMS or cell.dim is not None
    takes_missing = not cell.omits_nan or takes_nan(row)
    return cell.dtype in row.accepts and takes_all and takes_missing and not (sorts(row) and cell.n > SORTED_CELLS)


def pairs(groups: tuple[Group, ...], among: tuple[SlicedRow, ...]) -> Iterator[tuple[SlicedRow, Cell]]:
    """Every row with every cell that fits it, cell by cell, so that a sample is made once."""
    for group in groups:
        for cell in group.cells:
            yield from ((row, cell) for row in among if fits(row, cell))


# -- the sets -----------------------------------------------------------------------------------------------------

SMALL = Group(
    title="About 1,000 cells",
    is_small=True,
    cells=(Cell(label="1,024", shape=(32, 32), dim=1), Cell(label="1,024 nan", shape=(32, 32), dim=1, mask="nan")),
)

QUICK = (
    Group(
        title="Shapes: f32 with 70 % valid",
        cells=(
            Cell(label="all", shape=(8192, 1024), dim=None),
            Cell(label="first", shape=(8192, 1024), dim=0),
            Cell(label="last", shape=(8192, 1024), dim=1),
            Cell(label="middle", shape=(64, 128, 256), dim=1),
            Cell(label="n 3", shape=(700_000, 3), dim=1),
            Cell(label="n 64", shape=(32_768, 64), dim=1),
            Cell(label="inner 3", shape=(512, 1365, 3), dim=1),
        ),
    ),
    Group(
        title="Dtypes and masks, (2048, 1024) along the last dim",
        cells=(
            Cell(label="f32", shape=(2048, 1024), dim=1),
            Cell(label="f64", shape=(2048, 1024), dim=1, dtype=f64),
            Cell(label="f16", shape=(2048, 1024), dim=1, dtype=f16),
            Cell(label="i64", shape=(2048, 1024), dim=1, dtype=i64),
            Cell(label="99 %", shape=(2048, 1024), dim=1, mask="99 %"),
            Cell(label="1 %", shape=(2048, 1024), dim=1, mask="1 %"),
            Cell(label="blocky", shape=(2048, 1024), dim=1, mask="blocky"),
            Cell(label="lengths", shape=(16, 128, 1024), dim=1, mask="lengths"),
            Cell(label="no mask", shape=(2048, 1024), dim=1, mask="none"),
            Cell(label="nan omit", shape=(2048, 1024), dim=1, mask="nan"),
        ),
    ),
    SMALL,
)

N = 8192
FULL = (
    Group(
        title="Shapes: f32 with 70 % valid, 67 million cells",
        cells=(
            Cell(label="all", shape=(N, N), dim=None),
            Cell(label="first", shape=(N, N), dim=0),
            Cell(label="last", shape=(N, N), dim=1),
            Cell(label="n 3", shape=(N * N // 3, 3), dim=1),
            Cell(label="n 64", shape=(N * N // 64, 64), dim=1),
            Cell(label="inner 3", shape=(8, N * 1024 // 3, 3), dim=1),
            Cell(label="inner 1024", shape=(8, N, 1024), dim=1),
        ),
    ),
    Group(
        title="Shapes: f32 with 70 % valid, other foldings",
        cells=(
            Cell(label="n 3 first", shape=(3, N * N // 3), dim=0),
            Cell(label="n 3 inner 3", shape=(N * N // 9, 3, 3), dim=1),
            Cell(label="n 3 in 1024", shape=(N * 1024 // 384, 3, 1024), dim=1),
            Cell(label="n 64 inner 3", shape=(N * N // 192, 64, 3), dim=1),
            Cell(label="n 64 in 1024", shape=(1024, 64, 1024), dim=1),
        ),
    ),
    Group(
        title="Dtypes with 70 % valid, (8192, 8192) along the last dim",
        cells=tuple(
            Cell(label=dtype.name, shape=(N, N), dim=1, dtype=dtype) for dtype in (f64, f16, bf16, i64, i32, i8)
        ),
    ),
    Group(
        title="Masks of f32, (8192, 8192) along the last dim",
        cells=(
            *(
                Cell(label=mask, shape=(N, N), dim=1, mask=mask)
                for mask in ("99 %", "1 %", "blocky", "broadcast", "none", "nan")
            ),
            Cell(label="lengths", shape=(64, 1024, 1024), dim=1, mask="lengths"),
        ),
    ),
    SMALL,
)  # fmt: skip

LARGE = (
    Group(title=FULL[0].title, cells=(*FULL[0].cells, FULL[1].cells[0])),
    Group(title=FULL[2].title, cells=tuple(cell for cell in FULL[2].cells if cell.dtype in (f64, f16, i32, i8))),
    Group(
        title="f32 without a mask of its size, 67 million cells: NaN for missing; lengths of (64, 1024, 1024)",
        cells=(
            Cell(label="nan last", shape=(N, N), dim=1, mask="nan"),
            Cell(label="nan first", shape=(N, N), dim=0, mask="nan"),
            Cell(label="nan all", shape=(N, N), dim=None, mask="nan"),
            Cell(label="lengths", shape=(64, 1024, 1024), dim=1, mask="lengths"),
        ),
    ),
)
"""What the targets are about: tensors beyond the caches of most machines."""
LARGE_OPS = ("sum", "amax", "argmax", "count", "any", "var", "norm", "prod", "logsumexp", "softmax")
"""One op of each kernel that has a target: mean is as fast as sum."""

TINY = (
    Group(
        title="Tiny",
        cells=(
            Cell(label="all", shape=(6, 40), dim=None),
            Cell(label="first", shape=(6, 40), dim=0),
            Cell(label="broadcast", shape=(6, 40), dim=1, mask="broadcast"),
            Cell(label="f16", shape=(6, 40), dim=1, dtype=f16),
            Cell(label="i64", shape=(6, 40), dim=1, dtype=i64),
            Cell(label="none", shape=(6, 40), dim=1, mask="none"),
            Cell(label="nan", shape=(6, 40), dim=1, mask="nan"),
        ),
    ),
    Group(title="Tiny calls", cells=(Cell(label="small", shape=(4, 4), dim=1, mask="blocky"),), is_small=True),
)

# -- samples ------------------------------------------------------------------------------------------------------


PRODUCTS = ("prod", "cumprod")
"""What multiplies gets cells near 1, and integers of 1 and -1: of other cells products overflow, or vanish."""


def sample(row: SlicedRow, cell: Cell) -> Sample:
    """The tensors of a cell, the same in every run."""
    return drawn(cell.shape, cell.dtype, cell.mask, near_one=row.name in PRODUCTS)


@lru_cache(maxsize=2)
def drawn(shape: Shape, dtype: DType, mask: str, *, near_one: bool) -> Sample:
    """Only those of the last cell are kept in memory: near 1, and others."""
    generator = torch.Generator().manual_seed(SEED)
    data = (make_factors if near_one else make_data)(shape, dtype, generator)
    if mask == "none":
        return Sample(data, None)
    valid = make_mask(mask, shape, generator)
    return Sample(data.masked_fill_(~valid, torch.nan), None) if mask == "nan" else Sample(data, valid)


def make_data(shape: Shape, dtype: DType, generator: torch.Generator) -> Tensor:
    """Normal around 1, so that sums do not cancel and figures can be compared; integers up to 2**20 either way."""
    wanted: torch.dtype = getattr(torch, dtype.torch)
    if dtype.is_float:
        return torch.randn(shape, generator=generator).add_(1).to(wanted)
    bound = min(2**20, torch.iinfo(wanted).max)
    return torch.randint(-bound, bound, shape, generator=generator, dtype=wanted)


def make_factors(shape: Shape, dtype: DType, generator: torch.Generator) -> Tensor:
    """So near 1 that the product of 67 million stays within float32; integers of 1 and -1."""
    wanted: torch.dtype = getattr(torch, dtype.torch)
    normal = torch.randn(shape, generator=generator)
    return (normal.mul_(0.003).exp_() if dtype.is_float else normal.sign_().add_(0.5).sign_()).to(wanted)


def make_mask(kind: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """True = valid: a share of the cells ("70 %"; "nan" too), "blocky" prefixes of rows, or one row for all, "broadcast".

    "lengths" are those of (B, T, D) data, one for each of B.
    """
    if kind == "blocky":  # what padding leaves: the valid prefix of each row
        lengths = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        return torch.arange(shape[-1]) < lengths
    if kind == "lengths":
        lengths = torch.randint(0, shape[1] + 1, shape[:1], generator=generator)
        return torch.arange(shape[1])[:, None] < lengths[:, None, None]  # (B, T, 1), as from_lengths keeps it
    share = float(kind.removesuffix("%")) / 100 if kind.endswith("%") else 0.7
    drawn = (*(1 for _ in shape[:-1]), shape[-1]) if kind == "broadcast" else shape
    return torch.rand(drawn, generator=generator) < share
