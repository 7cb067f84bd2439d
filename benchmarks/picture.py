"""The figures of a run as a picture: one dot a cell, on a logarithmic axis."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import PEERS
from benchmarks.targets import fastest_peer

if TYPE_CHECKING:
    from benchmarks.report import Run


def draw(run: Run, path: Path) -> None:
    """Ops downwards: left our time in reads of the same bytes, right how many times faster we are than the fastest peer."""
    mpl, ticker = import_module("matplotlib"), import_module("matplotlib.ticker")
    mpl.rcParams["svg.hashsalt"] = "maskserve"  # the same picture from the same figures
    ops = list(dict.fromkeys(t.row.name for t in run.large))[::-1]
    colours = dict(zip(PEERS, mpl.colormaps["tab10"].colors, strict=False))
    figure = import_module("matplotlib.figure").Figure(figsize=(11, 0.24 * len(ops) + 1.6), layout="constrained")
    reads, leads = figure.subplots(1, 2, sharey=True)
    seen: set[str] = set()
    for timing in run.large:
        at = ops.index(timing.row.name)
        if timing.reads is not None:
            reads.plot(timing.reads, at, ".", color="0.3", alpha=0.6)
        name, lead = fastest_peer(timing)
        if lead is not None:
            leads.plot(lead, at, ".", color=colours[name], alpha=0.8, label=name if name not in seen else None)
            seen.add(name)
    for axes, title in ((reads, "our time, in reads of the same bytes"), (leads, "times faster than the fastest peer")):
        axes.set_xscale("log")
        axes.axvline(1, color="0.6", linewidth=0.8)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    reads.set_yticks(range(len(ops)), ops, fontsize=8)
    if seen:
        leads.legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
