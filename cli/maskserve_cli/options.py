"""Options that several commands share, and the panels of their help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

PANELS: Mapping[str, str] = {"common": "Reading the payload", "running": "Running", "own": "Parameters of the op"}
OUTPUT = "Output"
SHARDS = "Part of the work"


def output_option(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=OUTPUT, show_default=False, **more)


OUT = output_option(
    "-o", "--out", metavar="OUT", help="file or s3:// object to write: .safetensors, .json or no suffix; - is stdout"
)
FORM = output_option("--format", metavar="table|text|json|safetensors", help="default: table on a terminal, else text")
EXISTS = output_option("--exists", metavar="error|replace|skip", help="what to do where OUT stands; default: error")
FORCE = output_option("--force", help="the same as --exists replace")
DRY_RUN = output_option("--dry-run", help="say what would be read, computed and written; do nothing")
EXPLAIN = output_option(
    "--explain", help="say on stderr who computes, why no other back end does, and where a gradient is"
)
MEMORY = typer.Option(
    "--memory", metavar="SIZE", rich_help_panel=PANELS["running"], show_default=False,
    help="bytes of the data to hold at once, such as 512MB; default: half of what the machine or container grants",
)  # fmt: skip
ALONG = typer.Option(
    "--along", metavar="DIM", rich_help_panel=PANELS["common"], show_default=False,
    help="the dim that several FILEs are joined along, by number or name; default: 0",
)  # fmt: skip


def shard_option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=SHARDS, show_default=False, help=text)


SHARD = shard_option(
    "--shard", "i/N", "reduce part i of N alone, from 0; auto/N asks the scheduler's variable; with --state"
)
STATE = shard_option("--state", "OUT", "write what maskserve merge makes the answer of, in place of the answer")
WORKERS = shard_option(
    "--workers",
    "N",
    "processes that reduce a part each; 0: one a CPU; default: threads of this process, or all CPUs with ray",
)
ENGINE = shard_option(
    "--engine", "local|ray", "who reduces the parts: this machine (default), or a Ray cluster, joined or started"
)
