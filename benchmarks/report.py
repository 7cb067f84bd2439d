"""Tables of a run, as text that is also Markdown, and the generated block of docs/performance.md."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch

from benchmarks.cases import Cell, Group
from benchmarks.libraries import TORCH_MASKED
from benchmarks.peers import OURS, PEERS, UNMASKED
from benchmarks.targets import Miss, fastest_peer, misses, overhead_us, start_misses
from benchmarks.timing import Timing

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
INITIALS = dict(zip(PEERS, "pmnwjbga", strict=True))
NONE, WRONG = "", "WRONG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run measured, and how it was asked for."""

    command: str
    groups: tuple[Group, ...]
    timings: tuple[Timing, ...]
    starts: Mapping[str, float | None]
    seconds: float

    def of(self, group: Group) -> list[Timing]:
        cells = set(group.cells)
        return [timing for timing in self.timings if timing.cell in cells]

    @property
    def large(self) -> list[Timing]:
        return [timing for group in self.groups if not group.is_small for timing in self.of(group)]

    @property
    def small(self) -> list[Timing]:
        return [timing for group in self.groups if group.is_small for timing in self.of(group)]

    @property
    def wrong(self) -> list[Timing]:
        return [timing for timing in self.timings if timing.is_wrong]


def report(run: Run) -> str:
    """The whole report."""
    return "\n\n".join(part for part in parts(run) if part)


def parts(run: Run) -> Iterator[str]:
    yield machine(run)
    for group in run.groups:
        timings = run.of(group)
        if not timings:
            continue
        yield f"### {group.title}"
        if group.is_small:
            yield calls(timings)
            continue
        yield "Our time in plain reads of the same bytes (less is better):"
        yield grid(group.cells, timings, lambda t: number(t.reads))
        if copied := [t for t in timings if t.copies is not None]:
            yield "Our time in copies of the same bytes into fresh memory, for results as large as the data:"
            yield grid(group.cells, copied, lambda t: number(t.copies))
        yield "Times faster than torch.masked:"
        yield grid(group.cells, timings, versus_torch_masked)
        letters = ", ".join(f"{letter} {name}" for name, letter in INITIALS.items())
        yield f"Times faster than the fastest peer that gives the same result ({letters}):"
        yield grid(group.cells, timings, versus_fastest)
    yield "### In short"
    yield summary(run)
    if run.starts:
        yield "### Processes, best of several"
        yield processes(run.starts)
    yield "### Targets that are missed"
    yield failing([*misses(run.large, run.small, isa()), *start_misses(run.starts)])


# -- the parts ----------------------------------------------------------------------------------------------------


def machine(run: Run) -> str:
    """Where, when and how the run was made."""
    lines = [
        f"- `{run.command}`, {date.today().isoformat()}, {run.seconds:.0f} s",
        f"- {cpu()}, kernels: {isa()}, L3 {l3_cache()}",
        f"- Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads",
    ]
    return "\n".join(lines)


def grid(cells: Sequence[Cell], timings: Iterable[Timing], text: Callable[[Timing], str]) -> str:
    """A line for each op, a column for each cell."""
    by_op: dict[str, dict[Cell, str]] = {}
    for timing in timings:
        by_op.setdefault(timing.row.name, {})[timing.cell] = WRONG if timing.is_wrong else text(timing)
    lines = [[op, *(found.get(cell, NONE) for cell in cells)] for op, found in by_op.items()]
    return table(["op", *(cell.label for cell in cells)], lines)


def versus_torch_masked(timing: Timing) -> str:
    """Our lead; `!` where torch.masked gives another result, so that the lead means little."""
    return number(timing.lead(TORCH_MASKED)) + ("!" if TORCH_MASKED in timing.differing else "")


def versus_fastest(timing: Timing) -> str:
    name, lead = fastest_peer(timing)
    return f"{number(lead)} {INITIALS[name]}" if name else NONE


def calls(timings: Sequence[Timing]) -> str:
    """Microseconds a call on small tensors."""
    names = [name for name in (OURS, UNMASKED, *PEERS) if any(name in t.seconds for t in timings)]
    lines = []
    for t in timings:
        times = [f"{t.seconds[name] * 1e6:.1f}" if name in t.seconds else NONE for name in names]
        over = overhead_us(t)
        lines.append([t.row.name, t.cell.label, *times, NONE if over is None else f"{over:.1f}"])
    return "Microseconds a call:\n\n" + table(["op", "cells", *names, "over unmasked"], lines)


def summary(run: Run) -> str:
    """Geometric mean and worst cell against one read, one copy and each peer, over all cells but the small ones."""
    lines = [summary_line("one read (our time / its)", run.large, lambda t: t.reads, worst=max)]
    lines.append(summary_line("one copy (our time / its)", run.large, lambda t: t.copies, worst=max))
    lines += [summary_line(f"{peer} (its time / ours)", run.large, partial(lead, peer), worst=min) for peer in PEERS]
    text = table(["against", "cells", "geomean", "worst", "where"], [line for line in lines if line])
    if run.wrong:
        text += "\n\nNo peer agrees, not timed: " + ", ".join(f"{t.row.name} ({t.cell.label})" for t in run.wrong)
    return text


def lead(peer: str, timing: Timing) -> float | None:
    return timing.lead(peer)


def summary_line(
    against: str,
    timings: Iterable[Timing],
    ratio: Callable[[Timing], float | None],
    worst: Callable[[Iterable[float]], float],
) -> list[str]:
    found = {value: t for t in timings if (value := ratio(t)) is not None}
    if not found:
        return []
    at = worst(found)
    where = f"{found[at].row.name}, {found[at].cell.label}"
    return [against, str(len(found)), number(geometric_mean(found)), number(at), where]


def processes(starts: Mapping[str, float | None]) -> str:
    return table(
        ["command", "seconds"],
        [[f"`{name}`", "fails" if seconds is None else f"{seconds:.2f}"] for name, seconds in starts.items()],
    )


def failing(found: Sequence[Miss]) -> str:
    if not found:
        return "None."
    lines = [
        [miss.aim, miss.worst, miss.where, f"{miss.n_missed} of {miss.n_cells}", shortened(miss.ops)] for miss in found
    ]
    return table(["target", "worst", "where", "cells", "ops"], lines)


def shortened(words: Sequence[str], at_most: int = 6) -> str:
    return " ".join(words) if len(words) <= at_most else f"{len(words)} ops"


# -- text ---------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Two digits, and no exponent.

    >>> number(0.0312), number(1.26), number(12.6), number(None)
    ('0.031', '1.3', '13', '')
    """
    if value is None:
        return NONE
    if value < 0.1:
        return f"{value:.2g}" if value >= 1e-4 else "0"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up, figures to the right."""
    widths = [max(3, *(len(line[i]) for line in (head, *lines))) for i in range(len(head))]
    left = [all(not re.match(r"[-+]?\d", line[i]) for line in lines if line[i]) for i in range(len(head))]
    rule = [("-" * w if is_left else "-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    body = [
        [text.ljust(w) if is_left else text.rjust(w) for text, w, is_left in zip(line, widths, left, strict=True)]
        for line in (head, *lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (body[0], rule, *body[1:]))


# -- the machine --------------------------------------------------------------------------------------------------


def cpu() -> str:
    return f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def l3_cache() -> str:
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return size.read_text().strip() if size.exists() else "unknown"


def isa() -> str:
    """The instruction set of the native kernels; "none" where they were not built."""
    from maskserve.backends import cpu

    return "none" if cpu.missing() else str(cpu.native().isa())


# -- docs/performance.md ------------------------------------------------------------------------------------------


def rewrite(page: str, block: str, name: str = "benchmarks") -> str:
    """`page` with what stands between the markers of that name replaced."""
    begin, end = (text.replace("benchmarks", name) for text in (BEGIN, END))
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"
