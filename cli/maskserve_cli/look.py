"""`info`, `head` and `validate`: what a payload holds and whether it can be trusted. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated

import typer

from maskserve.errors import MaskserveError, ParameterError, about
from maskserve.payload.format import Limits, Payload
from maskserve.payload.header import shown
from maskserve.payload.held import HeldPayload
from maskserve.payload.metadata import KEY_HISTORY
from maskserve.payload.variables import Variable, Variables, resolve
from maskserve.places import expanded, refuse_pipes
from maskserve_cli import exits, inputs, outputs
from maskserve_cli.command import AsJson, Config, Files, one_file, settings_of
from maskserve_cli.exits import say
from maskserve_cli.progress import progress
from maskserve_cli.table import columns, dims_text

if TYPE_CHECKING:
    from maskserve.payload.slices import Counts
    from maskserve_cli.table import Shown

STATS_HELP = "read the cells: valid, masked, NaN and inf of each variable"
HEAD_COLUMNS = 40
"""The most cells of a row that `head` reads: more fit no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One variable of a payload, as its header says, and what its cells are where they were counted."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...] | None
    role: str
    mask: str | None
    mask_means: str | None
    n_bytes: int
    layout: str = "strided"
    n_stored: int | None = None
    """How many cells a sparse one stores."""
    counts: Counts | None = None


def info(
    files: Files = None,
    stats: Annotated[bool, typer.Option("--stats", help=STATS_HELP, show_default=False)] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    path = one_file("info", files)
    limits = inputs.limits_of(settings_of(config))
    with about(inputs.title(path)), inputs.read(path, limits) as payload:
        try:
            variables = resolve(payload.header)
        except MaskserveError:
            outputs.write_text(raw_lines(payload, path))
            raise
        described = list(descriptions(payload, variables, stats=stats or is_held(payload)))
        lines = [info_json(payload, path, described)] if as_json else info_lines(payload, path, described)
        outputs.write_text(lines)


def descriptions(payload: Payload, variables: Variables, *, stats: bool) -> Iterator[Description]:
    """Every variable in its role; with `stats`, its cells are read."""
    roles = {"": variables.computed, "coordinate": variables.coordinates, "side input": variables.side_inputs}
    every = [(role, variable) for role, group in roles.items() for variable in group.values()]
    total = sum(variable.info.n_bytes for _, variable in every) if stats else 0
    with progress("counting", total) as tick:
        for role, variable in every:
            counts = None
            if stats:
                from maskserve.payload.slices import counted

                counts = counted(payload, variable, tick)
            yield described(role, variable, counts)


def described(role: str, variable: Variable, counts: Counts | None) -> Description:
    return Description(
        name=variable.name,
        dtype=variable.info.dtype.name,
        shape=variable.info.shape,
        dims=variable.dims,
        role=role or "variable",
        mask=None if variable.mask is None else variable.mask.info.name,
        mask_means=None if variable.mask is None else variable.mask.means,
        n_bytes=variable.info.n_bytes,
        layout="strided" if variable.stored is None else "csr" if variable.stored.is_csr else "coo",
        n_stored=None if variable.stored is None else variable.stored.values.n_cells,
        counts=counts,
    )


def info_json(payload: Payload, path: str, described: list[Description]) -> str:
    record = {
        "file": inputs.title(path),
        "format": format_of(payload),
        "bytes": payload.n_bytes,
        "variables": [asdict(one) for one in described],
        "metadata": dict(payload.header.metadata),
    }
    return json.dumps(record, ensure_ascii=False)


def info_lines(payload: Payload, path: str, described: list[Description]) -> Iterator[str]:
    """The file in a line, its variables in a table, and its other metadata."""
    yield file_line(payload, path, sum(one.role == "variable" for one in described))
    yield ""
    heads = ["name", "type", "dims", "bytes", "mask"]
    with_counts = any(one.counts for one in described)
    rows = [[*heads, *(["valid", "masked", "share", "NaN", "inf"] if with_counts else [])]]
    rows += [[*described_words(one), *count_words(one)] for one in described]
    yield from columns(rows, indent="  ", right=range(5, 10))
    metadata = payload.header.metadata
    history = [line for line in metadata.get(KEY_HISTORY, "").split("\n") if line]
    if history:
        yield ""
        yield from (f"  made by  {line}" for line in history)
    others = {key: text for key, text in metadata.items() if not key.startswith("maskserve.")}
    if others:
        yield ""
        yield from (f"  {shown(key)}: {shown(text)}" for key, text in others.items())


def is_held(payload: Payload) -> bool:
    """Whether its cells are in memory already, as those of a file of another format: then they are counted, too."""
    return isinstance(payload, HeldPayload)


def file_line(payload: Payload, path: str, n: int) -> str:
    size = "" if inputs.form_of(payload) else f", {outputs.bytes_text(payload.n_bytes)}"  # JSON: its text's is no use
    size = f"{size} of cells and masks" if is_held(payload) else size
    return f"{inputs.title(path)}: {format_of(payload)}{size}, {n} variable{'' if n == 1 else 's'}"


def format_of(payload: Payload) -> str:
    form = inputs.form_of(payload)
    if isinstance(payload, HeldPayload):
        return payload.format
    return "safetensors" if form is None else f"JSON ({form} form)"


def described_words(one: Description) -> list[str]:
    mask = "none, all valid" if one.mask is None else f"{one.mask} (true = {one.mask_means})"
    role = mask if one.role == "variable" else one.role
    cells = "" if one.n_stored is None else f", {one.n_stored} stored ({one.layout.upper()})"
    return [one.name, one.dtype, dims_text(one.shape, one.dims) + cells, outputs.bytes_text(one.n_bytes), role]


def count_words(one: Description) -> list[str]:
    if one.counts is None:
        return []
    n = one.counts.valid + one.counts.masked
    share = f"{100 * one.counts.masked / n:.3g} %" if n else "--"
    return [str(one.counts.valid), str(one.counts.masked), share, str(one.counts.nan), str(one.counts.inf)]


def raw_lines(payload: Payload, path: str) -> Iterator[str]:
    """The tensors as the header lists them, for a payload whose masks do not add up."""
    tensors = payload.header.tensors.values()
    yield f"{inputs.title(path)}: {format_of(payload)}, {len(tensors)} tensors; which is whose mask cannot be told"
    yield ""
    yield from columns([[t.name, t.dtype.name, dims_text(t.shape, None)] for t in tensors], indent="  ")


# -- head ---------------------------------------------------------------------------------------------------------


def head(
    files: Files = None,
    rows: Annotated[int, typer.Option("-n", "--rows", metavar="N", help="how many rows of each variable", min=0)] = 5,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    path = one_file("head", files)
    with about(inputs.title(path)), inputs.read(path, inputs.limits_of(settings_of(config))) as payload:
        from maskserve_cli.table import tables

        variables = resolve(payload.header)
        firsts = [first_cells(payload, variable, rows) for variable in variables]
        if as_json:
            outputs.write_text([json.dumps([asdict(part_of(first)) for first in firsts], ensure_ascii=False)])
            return
        coordinates = {
            name: first_cells(payload, variable, max(rows, HEAD_COLUMNS))
            for name, variable in variables.coordinates.items()
        }
        outputs.write_text(tables(firsts, coordinates))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The first cells of a variable as JSON data: `values` are those of `part`, flat, null where masked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...] | None
    part: tuple[int, ...]
    values: list[object]


def part_of(first: Shown) -> Part:
    from maskserve.dtypes import boolean
    from maskserve.payload.format import Output
    from maskserve.payload.texts import texts_of

    part = first.cells.shape
    mask = None if first.valid is None else Output("", boolean, part, first.valid.tobytes())
    texts = texts_of(first.dtype, part, first.cells.tobytes(), mask)
    return Part(
        name=first.name,
        dtype=first.dtype.name,
        shape=first.shape,
        dims=first.dims,
        part=part,
        values=json.loads(f"[{','.join(texts)}]"),
    )


def first_cells(payload: Payload, variable: Variable, rows: int) -> Shown:
    """The first rows of a variable, in its first slab, and the first cells of each."""
    import numpy as np

    from maskserve.payload.beside import Stored
    from maskserve.payload.slices import cells_at, stored, validity
    from maskserve_cli.table import Shown

    info = variable.info
    part = window(info.shape, rows)
    cells, valid = stored(b"", info.dtype).reshape(part if 0 in part else -1), None
    if 0 not in part:
        n, step = part[-1] if part else 1, info.shape[-1] if part else 1
        starts = [row * step for row in range(prod(part[:-1]))]
    if 0 not in part and variable.stored is not None:
        places = np.concatenate([np.arange(start, start + n) for start in starts])
        cells, own = Stored.of(payload, variable).at(places)
        cells, valid = cells.reshape(part), None if own is None else own.reshape(part)
    elif 0 not in part:
        cells = np.concatenate([cells_at(payload, info, start, n) for start in starts]).reshape(part)
        if variable.mask is not None:
            valid_at = validity(payload, info, variable.mask)
            valid = np.concatenate([valid_at(start, n) for start in starts]).reshape(part)
    return Shown(
        name=variable.name,
        dtype=info.dtype,
        shape=info.shape,
        dims=variable.dims,
        cells=cells,
        valid=valid,
        note=part_text(part, info.shape),
        is_head=True,
    )


def window(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """How much of a shape `head` reads.

    >>> window((9,), 5), window((3, 9, 100), 5), window((), 5)
    ((5,), (1, 5, 40), ())
    """
    if len(shape) < 2:
        return tuple(min(rows, size) for size in shape)
    return (*(min(1, size) for size in shape[:-2]), min(rows, shape[-2]), min(HEAD_COLUMNS, shape[-1]))


def part_text(part: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What part of a variable is shown, as Python writes it; nothing where it is all.

    >>> part_text((5,), (9,)), part_text((1, 5, 8), (3, 9, 8)), part_text((2, 2), (2, 2))
    ('first cells, [:5]', 'first cells, [0, :5, :]', '')
    """
    lead, last = shape[:-2], zip(part[-2:], shape[-2:], strict=True)
    words = [*("0" for _ in lead), *(":" if n == size else f":{n}" for n, size in last)]
    return "" if part == shape else f"first cells, [{', '.join(words)}]"


# -- validate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one file is a payload, and what is wrong where it is not."""

    file: str
    ok: bool
    exit: int
    code: str | None
    message: str


def validate(files: Files = None, as_json: AsJson = False, config: Config = None) -> None:
    if not files:
        raise ParameterError("validate needs a FILE; - is stdin", parameter="FILE")
    limits = inputs.limits_of(settings_of(config))
    codes = set()
    for path in expanded(files, say, takes_pipes=True):
        found = verdict(path, limits, is_spelled=path in files)
        codes.add(found.exit)
        line = json.dumps(asdict(found), ensure_ascii=False) if as_json else f"{found.file}: {found.message}"
        outputs.write_text([line])
    codes.discard(exits.DONE)
    if codes:
        raise typer.Exit(exits.BAD_DATA if exits.BAD_DATA in codes else min(codes))


def verdict(path: str, limits: Limits, *, is_spelled: bool) -> Verdict:
    """What is found in the bytes of one file, all masks included; a pipe that nobody spelled is not waited for."""
    title = inputs.title(path)
    try:
        if not is_spelled:
            refuse_pipes([path])
        with inputs.read(path, limits) as payload:
            variables = resolve(payload.header)
            check_cells(payload, variables)
    except MaskserveError as error:
        return Verdict(file=title, ok=False, exit=exits.code_of(error), code=error.code, message=plain(error, title))
    n = len(variables)
    return Verdict(file=title, ok=True, exit=exits.DONE, code=None, message=f"ok, {n} variable{'' if n == 1 else 's'}")


def plain(error: MaskserveError, title: str) -> str:
    """The message without the file's name, which the line begins with."""
    return error.message.removeprefix(f"{title} ").removeprefix(f"{title}: ")


def check_cells(payload: Payload, variables: Variables) -> None:
    """Raise where cells or masks hold what their dtype cannot."""
    from maskserve.payload.slices import check

    for group in (variables.computed, variables.coordinates, variables.side_inputs):
        for variable in group.values():
            check(payload, variable)
