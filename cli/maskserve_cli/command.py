"""What the commands share: options, settings, and help that shows examples first."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

from maskserve.settings import Settings, load
from maskserve_cli.exits import say

Files: TypeAlias = Annotated[list[str] | None, typer.Argument(metavar="FILE", show_default=False)]
Config: TypeAlias = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="the settings file (TOML); default: $MASKSERVE_CONFIG")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on stdout", show_default=False)]

HELP_WIDTH = 100


class Command(TyperCommand):
    """A command whose help begins with the lines of `epilog` as examples, and groups its options by panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = max(formatter.width, min(HELP_WIDTH, terminal_columns()))
        if self.epilog:
            write_examples(formatter, self.epilog.splitlines())
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and record[0].startswith("-"):
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def write_examples(formatter: Any, examples: Sequence[str]) -> None:
    with formatter.section("Examples"):
        for example in examples:
            formatter.write(f"{'':{formatter.current_indent}}{example}\n")
    formatter.write_paragraph()


def terminal_columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns - 2


def settings_of(config: str | None, flags: dict[str, object] | None = None) -> Settings:
    """The settings of this call; a variable that looks like ours and is not gets a warning."""
    settings = load(flags, config, os.environ)
    for line in settings.unknown:
        say(f"warning: {line}")
    return settings


def collect_again() -> None:
    """Garbage collection from here on, for what computes or serves; what the imports made is left out of it."""
    gc.freeze()
    gc.enable()


def one_file(command: str, files: Sequence[str] | None) -> str:
    """The one file that a command reads."""
    from maskserve.errors import ParameterError
    from maskserve.places import one

    if not files:
        raise ParameterError(f"{command} needs a FILE; - is stdin", parameter="FILE")
    if len(files) > 1:
        raise ParameterError(
            f"{command} reads one FILE, and {len(files)} are given; run it once for each", parameter="FILE"
        )
    return one(files[0])


def some_files(command: str, files: Sequence[str] | None, *, of_states: bool = False) -> Sequence[str]:
    """The files and objects that a command reads as one, those of folders and patterns listed; stdin once at most.

    Of states every file below a folder is one, else those with a suffix of data.
    """
    from maskserve.errors import ParameterError
    from maskserve.places import expanded

    if not files:
        raise ParameterError(f"{command} needs a FILE; - is stdin", parameter="FILE")
    if files.count("-") > 1:
        raise ParameterError(f"{command} reads stdin (-) once; give it once", parameter="FILE")
    return expanded(files, None if of_states else say)


def imported(where: str) -> Callable[..., object]:
    """The object that "module:name" says."""
    module, _, name = where.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), name)
    return found
