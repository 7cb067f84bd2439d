"""One command for every verb of the op table: its options are what its rows take, and what every request may say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Annotated, Any

import typer

from maskserve import requests
from maskserve.ops import default
from maskserve.ops.parameters import REPEATED, Parameter, Type
from maskserve.ops.rows import Reduction, Report
from maskserve_cli import reports
from maskserve_cli.asked import Asked
from maskserve_cli.command import AsJson, Config, Files
from maskserve_cli.options import (
    ALONG,
    DRY_RUN,
    ENGINE,
    EXISTS,
    EXPLAIN,
    FORCE,
    FORM,
    MEMORY,
    OUT,
    PANELS,
    SHARD,
    STATE,
    WORKERS,
)
from maskserve_cli.outputs import Wanted
from maskserve_cli.words import flag, help_text, keyword, metavar, rows
from maskserve_cli.work import perform

REPORTS = "Reports"


def command(verb: str) -> Callable[..., None]:
    """The function behind a verb's command, with one keyword for every option."""
    parameters = requests.parameters(verb)
    listings = reports.of_verb(verb)

    def callback(**given: Any) -> None:
        words = {"op": given.pop("op"), **{p.name: given.pop(keyword(p)) for p in parameters}}
        said = {name: value for name, value in words.items() if value not in (None, [])}
        wanted = Wanted(**{field.name: given.pop(field.name) for field in fields(Wanted)})
        listing = reports.chosen(listings, {name: given.pop(name) for name in reports.options(listings)})
        perform(Asked(verb=verb, words=said, wanted=wanted, listing=listing, **given))

    shards = SHARD_OPTIONS if all(isinstance(row, Reduction) for row in rows(verb)) else ()
    options = [*own_options(verb, parameters), *report_options(listings), *shards, *OUTPUT_OPTIONS]
    callback.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # typer reads the options here
    callback.__annotations__ = {option.name: option.annotation for option in options}
    return callback


def own_options(verb: str, parameters: tuple[Parameter, ...]) -> Iterator[inspect.Parameter]:
    """FILE, the op, and an option for each parameter."""
    yield option("files", Files)
    row = default(verb)
    names = [row.name for row in rows(verb)]
    otherwise = f"; default: {row.name}" if row else ""
    op = typer.Option(
        "--op", metavar="OP", help=f"what to compute: {', '.join(names)}{otherwise}", rich_help_panel=PANELS["own"],
        autocompletion=completion(tuple(names)),
    )  # fmt: skip
    yield option("op", Annotated[str | None, op])
    for parameter in parameters:
        yield option(keyword(parameter), annotation(parameter))


def report_options(listings: tuple[Report, ...]) -> Iterator[inspect.Parameter]:
    """An option for each report of the verb, and for what the reports take."""
    for name, source in reports.options(listings).items():
        is_flag = isinstance(source, Report) and not source.choices
        spelled = "|".join(source.choices) if isinstance(source, Report) else metavar(source)
        info = typer.Option(
            f"--{name}", metavar=spelled or None, help=source.help, rich_help_panel=REPORTS, show_default=False,
            autocompletion=completion(source.choices) if source.choices else None,
        )  # fmt: skip
        yield option(name, Annotated[bool if is_flag else str | None, info], False if is_flag else None)


def option(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def annotation(parameter: Parameter) -> Any:
    """The typer type of a parameter; what a word may be is checked where every front end's words are."""
    panel = PANELS["common" if parameter in requests.COMMON else "running" if parameter in requests.RUNNING else "own"]
    is_flag = parameter.type is Type.FLAG
    name = f"{flag(parameter)}/--no-{flag(parameter)[2:]}" if is_flag and parameter.default else flag(parameter)
    info = typer.Option(
        name,
        metavar=metavar(parameter) or None,
        help=help_text(parameter),
        rich_help_panel=panel,
        show_default=False,
        autocompletion=completion(parameter.choices) if parameter.choices else None,
    )
    kind = bool if is_flag else list[str] if parameter.type in REPEATED else str
    return Annotated[kind | None, info]


def completion(words: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


SHARD_OPTIONS = (
    option("shard", Annotated[str | None, SHARD]),
    option("state", Annotated[str | None, STATE]),
    option("workers", Annotated[int | None, WORKERS]),
    option("engine", Annotated[str | None, ENGINE]),
)
OUTPUT_OPTIONS = (
    option("out", Annotated[str | None, OUT]),
    option("form", Annotated[str | None, FORM]),
    option("as_json", AsJson, False),
    option("exists", Annotated[str | None, EXISTS]),
    option("force", Annotated[bool, FORCE], False),
    option("dry_run", Annotated[bool, DRY_RUN], False),
    option("explain", Annotated[bool, EXPLAIN], False),
    option("config", Config),
    option("memory", Annotated[str | None, MEMORY]),
    option("along", Annotated[str | None, ALONG]),
)
