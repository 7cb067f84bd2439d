"""`ops`: the table of what can be computed, and the parameters of one op."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from maskserve.ops import OPS, Row, default, find
from maskserve_cli import outputs
from maskserve_cli.command import AsJson
from maskserve_cli.table import columns
from maskserve_cli.words import help_text, usage

PYTHON_ONLY = "Python"


def ops(
    name: Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)] = None, as_json: AsJson = False
) -> None:
    chosen = [*OPS.values()] if name is None else [find(name)]
    if as_json:
        records = [record(row) for row in chosen]
        outputs.write_text([json.dumps(records if name is None else records[0], ensure_ascii=False)])
    else:
        outputs.write_text(table(chosen) if name is None else one(chosen[0]))


def record(row: Row) -> dict[str, Any]:
    """A row as data, with the exact JSON schema of its parameters."""
    from maskserve.requests import schema

    return {
        "name": row.name,
        "aliases": list(row.aliases),
        "verb": row.verb,
        "verbs": list(row.verbs),
        "summary": row.summary,
        "parameters": schema(row),
    }


def table(rows: list[Row]) -> Iterator[str]:
    """The rows by verb: name and summary."""
    words = [[spelled(row), ", ".join(row.verbs) or PYTHON_ONLY, row.summary] for row in rows]
    yield from columns([["op", "verb", "what comes out"], *words])


def spelled(row: Row) -> str:
    return row.name if not row.aliases else f"{row.name} ({', '.join(row.aliases)})"


def one(row: Row) -> Iterator[str]:
    """One row: what it is, what it takes, and its parameters."""
    from maskserve import dtypes

    yield f"{spelled(row)}: {row.summary}"
    taken = ", ".join(dtype.name for dtype in dtypes.ALL if dtype in row.accepts)
    op = "" if row.verb and default(row.verb) is row else f" --op {row.name}"
    for verb in row.verbs:
        yield f"  maskserve {verb}{op if verb == row.verb else f' --op {row.name}'} FILE"
    if not row.verbs:
        yield "  in Python and in expressions"
    yield f"  takes {taken}"
    yield ""
    words = [(usage(p), help_text(p)) for p in row.requestable]
    indent = max((len(word) for word, _ in words), default=0) + 4
    width = max(shutil.get_terminal_size().columns - indent, 30)
    for word, text in words:
        first, *rest = textwrap.wrap(text, width) or [""]
        yield f"  {word:{indent - 4}}  {first}"
        yield from (" " * indent + line for line in rest)
