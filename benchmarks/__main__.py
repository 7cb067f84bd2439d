"""`python -m benchmarks`: the quick set, under six minutes on 2 cores; `--full` for tensors of 67 million cells."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks import cases, gradients, timing
from benchmarks.picture import draw
from benchmarks.report import PAGE, Run, report, rewrite
from maskserve.ops import find
from maskserve.plan import SlicedRow

PICTURE = PAGE.with_suffix(".svg")
SAMPLE = PAGE.parents[1] / "examples" / "co2.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and with --write rewrites the page; 1 where a result of ours agrees with no peer."""
    given = parser().parse_args(arguments)
    if given.gradients and (given.op or given.full or given.targets):
        parser().error("--gradients times a set of its own: leave --op, --full and --targets out")
    if given.targets and given.full:
        parser().error("--targets times a set of its own: leave --full out")
    if given.gradients:
        text = gradients.report("python -m benchmarks --gradients")
        print(text)
        if given.write:
            PAGE.write_text(rewrite(PAGE.read_text(), text, "gradients"))
        return 0
    wanted = {find(word).name for word in given.op}
    rows = tuple(row for row in cases.rows() if not wanted or row.name in wanted)
    if given.targets:
        rows = tuple(row for row in rows if row.name in cases.LARGE_OPS)
        run = measured(cases.LARGE, rows, timing.LARGE, command="python -m benchmarks --targets", best_of=0)
        print(text := report(run))
        if given.write:
            PAGE.write_text(rewrite(PAGE.read_text(), text, "targets"))
        return 1 if run.wrong else 0
    groups = cases.FULL if given.full else cases.QUICK
    effort = timing.FULL if given.full else timing.QUICK
    run = measured(groups, rows, effort, command="python -m benchmarks" + (" --full" if given.full else ""))
    text = report(run)
    print(text)
    if given.write:
        PAGE.write_text(rewrite(PAGE.read_text(), text))
        draw(run, PICTURE)
    return 1 if run.wrong else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="tensors of 67 million cells; needs 16 GB and hours")
    parser.add_argument(
        "--targets", action="store_true", help="the ops with targets on 67 million cells, in six minutes"
    )
    parser.add_argument("--gradients", action="store_true", help="forward and backward of some ops, in two minutes")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--op", action="append", default=[], help="this op alone (repeatable)")
    which.add_argument(
        "--write", action="store_true", help="rewrite the figures and the picture of docs/performance.md"
    )
    return parser


def measured(
    groups: tuple[cases.Group, ...],
    rows: tuple[SlicedRow, ...],
    effort: timing.Effort,
    *,
    command: str,
    best_of: int = timing.BEST_OF,
) -> Run:
    """Every cell of the groups, then the processes (best_of 0: none)."""
    start = time.perf_counter()
    timings = []
    for group in groups:
        for found in timing.measure_group(group, rows, effort):
            timings.append(found)
            progress(f"{len(timings)} cells, {found.row.name} {found.cell.label}")
    progress("")
    starts = timing.start_times(timing.command_lines(SAMPLE), best_of) if best_of else {}
    seconds = time.perf_counter() - start
    return Run(command=command, groups=groups, timings=tuple(timings), starts=starts, seconds=seconds)


def progress(words: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
