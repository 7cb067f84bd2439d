"""`convert`: the variables of one file in another, each in the format that its suffix says, with their masks."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskserve.convert.formats import FORMATS, by_suffix
from maskserve.errors import ParameterError, about
from maskserve.payload.format import Limits, Payload
from maskserve.payload.header import shown
from maskserve.payload.metadata import MEANS, Means
from maskserve.places import check_folder, one
from maskserve_cli import inputs
from maskserve_cli.command import Config, settings_of
from maskserve_cli.exits import say
from maskserve_cli.outputs import STDOUT, Wanted, asked_exists, stands
from maskserve_cli.progress import patience
from maskserve_cli.table import dims_text

if TYPE_CHECKING:
    from maskserve.convert.files import Converted

Names = list[str] | None
In = Annotated[str, typer.Argument(metavar="IN", show_default=False)]
Out = Annotated[str, typer.Argument(metavar="OUT", show_default=False)]
READING, WRITING = "Reading IN", "Writing OUT"


def option(*names: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, show_default=False, **more)


COLUMNS = option(
    "--columns", panel=READING, metavar="NAME,...", help="the columns of a table to read; each must hold numbers"
)
TENSOR = option("--tensor", panel=READING, metavar="NAME", help="the variables to write; repeat for several")
MASK = option("--mask", panel=READING, metavar="NAME", help="the tensor that is the mask of every variable")
MASK_MEANS = option("--mask-means", panel=READING, metavar="valid|missing", help="what true means in the masks of IN")
FILL = option(
    "--fill-value", panel=WRITING, metavar="V", help="what stands for masked cells where OUT's format has no masks"
)
TO = option(
    "--to",
    panel=WRITING,
    metavar="FORMAT",
    help=f"{', '.join(f.name for f in FORMATS)}; default: what OUT's suffix says",
)
EXISTS = option(
    "--exists", panel=WRITING, metavar="error|replace|skip", help="what to do where OUT stands; default: error"
)
FORCE = option("--force", panel=WRITING, help="the same as --exists replace")


def convert(
    source: In,
    target: Out,
    columns: Annotated[Names, COLUMNS] = None,
    tensor: Annotated[Names, TENSOR] = None,
    mask: Annotated[str | None, MASK] = None,
    mask_means: Annotated[str | None, MASK_MEANS] = None,
    fill_value: Annotated[str | None, FILL] = None,
    to: Annotated[str | None, TO] = None,
    exists: Annotated[str | None, EXISTS] = None,
    force: Annotated[bool, FORCE] = False,
    config: Config = None,
) -> None:
    from maskserve.convert import files as conversion

    if target == STDOUT:
        raise ParameterError("convert writes a file: give OUT a name, with the suffix of its format", parameter="OUT")
    said_exists = asked_exists(Wanted(exists=exists, force=force))
    source = one(source)
    fill, said_means = None if fill_value is None else number(fill_value), means(mask_means)
    row = conversion.target_format(target, to)
    conversion.check_words(row, said_exists, fill)
    check_folder(target)
    if conversion.stands(target, row, said_exists) if row.is_folder else stands(target, said_exists):
        say(f"{shown(target)} exists; skipped")
        return
    title, limits = inputs.title(source), inputs.limits_of(settings_of(config))
    with about(title), patience(f"converting {title} …"), read(source, limits, split(columns)) as payload:
        done = conversion.convert_payload(
            payload,
            target,
            row,
            tensor=split(tensor),
            fill_value=fill,
            mask=mask,
            mask_means=said_means,
            exists=said_exists,
        )
    report(done, target)


def split(words: Names) -> list[str] | None:
    """The names in "a,b", given once or more often."""
    return None if not words else [name for word in words for name in word.split(",") if name]


def number(word: str) -> int | float:
    """The number that a word spells; a whole one stays whole, however large."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    raise ParameterError(f"--fill-value {shown(word)} is no number", parameter="fill_value")


def means(word: str | None) -> Means | None:
    for known in MEANS:
        if word == known:
            return known
    if word is None:
        return None
    raise ParameterError(f"--mask-means {shown(word)}: give valid or missing", parameter="mask_means", allowed=MEANS)


def read(path: str, limits: Limits, columns: Collection[str] | None) -> Payload:
    """The payload at `path`; of a table, only the columns that were asked for."""
    if columns is None:
        return inputs.read(path, limits)
    from maskserve.convert.files import columns_of_no_table, open_foreign

    row = by_suffix(path)
    if row is None or not row.is_table:
        raise columns_of_no_table(row or FORMATS[0])
    return inputs.noted(path, open_foreign(path, limits, columns=columns))


def report(done: Converted, target: str) -> None:
    """What the writer decided, and one line that says what was written."""
    if not done.written:
        say(f"{shown(target)} exists; skipped")
        return
    for note in done.notes:
        say(f"{shown(target)}: {note}")
    variables = [variable for variable in done.variables if variable.dims != (variable.name,)]
    what = f"{len(variables)} variables"
    if len(variables) == 1:
        what = (
            f"{shown(variables[0].name)} {variables[0].dtype.name} {dims_text(variables[0].shape, variables[0].dims)}"
        )
    n_cells, n_masked = sum(v.n_cells for v in variables), sum(v.n_masked for v in variables)
    say(f"wrote {shown(target)}: {what}, {n_masked} of {n_cells} masked, {done.format}")
