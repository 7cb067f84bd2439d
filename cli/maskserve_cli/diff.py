"""`diff`: where two files hold different cells. Read block by block; imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from maskserve.dtypes import DType
from maskserve.errors import ParameterError, UnknownTensorError, about, nearest
from maskserve.payload.format import Payload
from maskserve.payload.header import shown
from maskserve.payload.variables import Variable, resolve
from maskserve_cli import exits, inputs, outputs
from maskserve_cli.command import AsJson, Config, settings_of
from maskserve_cli.progress import progress
from maskserve_cli.table import dims_text, spelled

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
    from maskserve.payload.beside import Places

Index: TypeAlias = tuple[int, ...]
Pair: TypeAlias = Annotated[list[str] | None, typer.Argument(metavar="A B", show_default=False)]

TENSOR_HELP = "compare this tensor alone (repeatable); default: every one"
RTOL_HELP = "cells within ATOL + RTOL * |B| of each other are the same; default: 0"
ATOL_HELP = "see --rtol; default: 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The largest of some differences, and the first cell that has it."""

    value: float | int
    index: Index


@dataclass(slots=True, kw_only=True)
class Difference:
    """How one tensor differs between two files; what does not is empty."""

    name: str
    only_in: str | None = None
    dtype: tuple[str, str] | None = None
    shape: tuple[Index, Index] | None = None
    dims: tuple[tuple[str, ...] | None, tuple[str, ...] | None] | None = None
    role: tuple[str, str] | None = None
    n_cells: int = 0
    validity: int = 0
    first_validity: Index | None = None
    n_compared: int = 0
    values: int = 0
    absolute: Largest | None = None
    relative: Largest | None = None
    ulps: Largest | None = None
    uneven: int = 0
    """Cells of which one alone is NaN, or that are infinite: they differ, and by no number."""

    def is_same(self) -> bool:
        headers = (self.only_in, self.dtype, self.shape, self.dims, self.role)
        return not any(headers) and self.validity == self.values == 0


def diff(
    files: Pair = None,
    tensor: Annotated[list[str] | None, typer.Option("--tensor", metavar="NAME", help=TENSOR_HELP)] = None,
    rtol: Annotated[float, typer.Option("--rtol", metavar="R", help=RTOL_HELP, show_default=False)] = 0.0,
    atol: Annotated[float, typer.Option("--atol", metavar="A", help=ATOL_HELP, show_default=False)] = 0.0,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    first, second = two_files(files)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 <= value < math.inf:
            raise ParameterError(f"--{name} {value}: give a number from 0 on", parameter=name)
    limits = inputs.limits_of(settings_of(config))
    with about(inputs.title(first)):
        a = inputs.read(first, limits)
    with a:
        with about(inputs.title(second)):
            b = inputs.read(second, limits)
        with b:
            titles = inputs.title(first), inputs.title(second)
            found = list(differences(a, b, titles, tensor, Tolerance(rtol, atol)))
    differing = [one for one in found if not one.is_same()]
    if as_json:
        record = {"same": not differing, "files": titles, "tensors": [record_of(one) for one in found]}
        outputs.write_text([json.dumps(record, ensure_ascii=False)])
    else:
        outputs.write_text(line for one in differing for line in lines(one, titles))
    if differing:
        raise typer.Exit(exits.DIFFERENT)


def two_files(files: list[str] | None) -> tuple[str, str]:
    if files is None or len(files) != 2:
        raise ParameterError(f"diff compares two files, A and B; {len(files or ())} given", parameter="FILE")
    if files[0] == files[1] == inputs.STDIN:
        raise ParameterError("diff reads stdin once: give one of the two as a file", parameter="FILE")
    return files[0], files[1]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far cells may be apart: atol + rtol * |b|."""

    rtol: float
    atol: float

    @property
    def is_none(self) -> bool:
        return self.rtol == self.atol == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What comparing two tensors needs beside their cells."""

    shape: Index
    dtypes: tuple[DType, DType]
    tolerance: Tolerance


def differences(
    a: Payload, b: Payload, titles: tuple[str, str], asked: list[str] | None, tolerance: Tolerance
) -> Iterator[Difference]:
    """Every tensor of either payload, compared, in the order of their names."""
    ours, theirs = by_role(a, titles[0]), by_role(b, titles[1])
    names = sorted({*ours, *theirs})
    for name in asked or ():
        if name not in names:
            raise UnknownTensorError(
                f"neither file has a tensor {shown(name)}{nearest(name, names)}", parameter="tensor", allowed=names
            )
    chosen = [name for name in names if not asked or name in asked]
    n_bytes = sum(ours[name][1].info.n_bytes for name in chosen if name in ours and name in theirs)
    with progress("comparing", n_bytes) as tick:
        for name in chosen:
            if name not in ours or name not in theirs:
                yield Difference(name=name, only_in=titles[0] if name in ours else titles[1])
                continue
            found = of_headers(name, ours[name], theirs[name])
            if found.shape is None:
                compare(found, (a, ours[name][1]), (b, theirs[name][1]), tolerance, tick)
            yield found


def by_role(payload: Payload, title: str) -> dict[str, tuple[str, Variable]]:
    with about(title):
        variables = resolve(payload.header)
    roles = {
        "variable": variables.computed,
        "coordinate": variables.coordinates,
        "side input": variables.side_inputs,
    }
    return {name: (role, variable) for role, group in roles.items() for name, variable in group.items()}


def of_headers(name: str, a: tuple[str, Variable], b: tuple[str, Variable]) -> Difference:
    """What can be told without a cell."""
    (a_role, ours), (b_role, theirs) = a, b
    found = Difference(name=name, n_cells=ours.info.n_cells)
    if ours.info.dtype is not theirs.info.dtype:
        found.dtype = ours.info.dtype.name, theirs.info.dtype.name
    if ours.info.shape != theirs.info.shape:
        found.shape = ours.info.shape, theirs.info.shape
    if ours.dims != theirs.dims:
        found.dims = ours.dims, theirs.dims
    if a_role != b_role:
        found.role = a_role, b_role
    return found


# -- cells --------------------------------------------------------------------------------------------------------


def compare(
    found: Difference,
    a: tuple[Payload, Variable],
    b: tuple[Payload, Variable],
    tolerance: Tolerance,
    tick: Callable[[int], None],
) -> None:
    """Counts the cells that differ, a block of both at a time; NaN is NaN, and what is masked in both is the same."""
    import numpy as np

    from maskserve.payload.beside import side_by_side

    shape = a[1].info.shape
    rules = Rules(shape=shape, dtypes=(a[1].info.dtype, b[1].info.dtype), tolerance=tolerance)
    with np.errstate(all="ignore"):
        for (ours, our_valid), (theirs, their_valid), places in side_by_side(a, b):
            every = np.True_
            one = every if our_valid is None else our_valid
            other = every if their_valid is None else their_valid
            apart = np.broadcast_to(one != other, ours.shape)
            if apart.any():
                if found.first_validity is None:
                    found.first_validity = index_of(int(places[int(apart.argmax())]), shape)
                found.validity += int(np.count_nonzero(apart))
            both = np.broadcast_to(one & other, ours.shape)
            found.n_compared += int(np.count_nonzero(both))
            compare_values(found, ours, theirs, both, places, rules)
            tick(ours.nbytes)


def compare_values(found: Difference, ours: Array, theirs: Array, both: Array, places: Places, rules: Rules) -> None:
    """Adds the cells of a block that are valid in both; `places` are their flat indices."""
    import numpy as np

    from maskserve.payload.slices import numbers

    shape, (our_dtype, their_dtype), tolerance = rules.shape, rules.dtypes, rules.tolerance
    a, b = numbers(ours, our_dtype), numbers(theirs, their_dtype)
    differs = both & (a != b)
    if not differs.any():
        return
    rest = np.flatnonzero(differs & ((a == a) | (b == b)))
    where = places.start + rest if isinstance(places, range) else places[rest]
    a, b, at, codes = a[rest], b[rest], where, (ours[rest], theirs[rest])
    gap = distance(a, b)
    size = np.abs(b.astype(np.float64)) if b.dtype.kind != "c" else np.abs(b)
    if not tolerance.is_none:
        out = ~(gap <= tolerance.atol + tolerance.rtol * size) | ~np.isfinite(size)
        at, gap, size, codes = at[out], gap[out], size[out], (codes[0][out], codes[1][out])
    found.values += at.size
    told = np.isfinite(gap)
    found.uneven += int(np.count_nonzero(~told))
    gap, size, at, codes = gap[told], size[told], at[told], (codes[0][told], codes[1][told])
    if not at.size:
        return
    found.absolute = larger(found.absolute, gap, at, shape)
    found.relative = larger(found.relative, gap / size, at, shape)
    if our_dtype is their_dtype and our_dtype.is_float:
        found.ulps = larger(found.ulps, distance(*(ordered(code, our_dtype) for code in codes)), at, shape)


def distance(a: Array, b: Array) -> Array:
    """|a - b|; exact for integers, whose distance may need all 64 bits."""
    import numpy as np

    kind = np.promote_types(a.dtype, b.dtype)
    if kind.kind == "b":
        a, b, kind = a.view(np.uint8), b.view(np.uint8), np.dtype(np.uint8)
    if kind.kind in "iu":
        x, y = a.astype(kind), b.astype(kind)
        over, under = x.astype(np.uint64), y.astype(np.uint64)  # differences wrap around to what they should be
        exact: Array = np.where(x > y, over - under, under - over)
        return exact
    wide = np.dtype(np.complex128 if kind.kind == "c" else np.float64)
    gap: Array = np.abs(a.astype(wide) - b.astype(wide))
    return gap


def ordered(cells: Array, dtype: DType) -> Array:
    """Codes of floats as integers in the order of their values: neighbours are 1 apart, and -0 is 0."""
    import numpy as np

    n_bits = 8 * dtype.n_bytes
    codes = np.ascontiguousarray(cells).view(f"<i{dtype.n_bytes}").astype(np.int64)
    sign = np.int64(-(1 << n_bits - 1))
    in_order: Array = np.where(codes < 0, sign - codes, codes)
    return in_order


def larger(known: Largest | None, values: Array, at: Array, shape: Index) -> Largest:
    """The larger of what is known and of the largest of `values`."""
    place = int(values.argmax())
    value = values[place].item()
    return (
        known
        if known is not None and known.value >= value
        else Largest(value=value, index=index_of(int(at[place]), shape))
    )


def index_of(flat: int, shape: Index) -> Index:
    """A flat index as one for each dim.

    >>> index_of(5, (2, 3)), index_of(0, ())
    ((1, 2), ())
    """
    index: list[int] = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


# -- words --------------------------------------------------------------------------------------------------------


def lines(one: Difference, titles: tuple[str, str]) -> Iterator[str]:
    """A line for each way in which a tensor differs."""
    name = shown(one.name)
    if one.only_in is not None:
        yield f"{name}: only in {one.only_in}"
    if one.role is not None:
        yield f"{name}: a {one.role[0]} in {titles[0]}, a {one.role[1]} in {titles[1]}"
    if one.dtype is not None:
        yield f"{name}: {one.dtype[0]} and {one.dtype[1]}"
    if one.shape is not None:
        yield f"{name}: shape {dims_text(one.shape[0], None)} and {dims_text(one.shape[1], None)}; cells not compared"
    if one.dims is not None:
        yield f"{name}: dims {dims_words(one.dims[0])} and {dims_words(one.dims[1])}"
    if one.validity:
        yield f"{name}: {one.validity} of {one.n_cells} cells valid in one alone, the first at {list(one.first_validity or ())}"
    if one.values:
        yield f"{name}: {one.values} of {one.n_compared} cells valid in both differ{'; ' if by(one) else ''}{by(one)}"


def by(one: Difference) -> str:
    """How far cells differ, and where most."""
    words = [
        f"{what}{spelled(largest.value)}{unit} at {list(largest.index)}"
        for what, largest, unit in (
            ("at most ", one.absolute, ""),
            ("relative ", one.relative, ""),
            ("", one.ulps, " ulp" if one.ulps is not None and one.ulps.value == 1 else " ulps"),
        )
        if largest is not None
    ]
    return ", ".join([*words, *([f"{one.uneven} by NaN or infinity"] if one.uneven else [])])


def dims_words(dims: tuple[str, ...] | None) -> str:
    return "without names" if dims is None else f"({', '.join(map(shown, dims))})"


def record_of(one: Difference) -> dict[str, Any]:
    """A difference as JSON data: a number that JSON lacks is a word."""
    record = {"name": one.name, "same": one.is_same(), **asdict(one)}
    for word in ("absolute", "relative", "ulps"):
        if record[word] is not None and not math.isfinite(record[word]["value"]):
            record[word]["value"] = "Infinity"
    return record
