"""`batch`: one request over many files, as a job file says; what is done stays done, and what failed is listed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Annotated

import typer

from maskserve.batch.job import read_job
from maskserve.batch.run import BYTES_A_SECOND, FILE_S, START_S, Outlook, Plan, Runner, Summary, plan
from maskserve.executors import RAY
from maskserve.on_ray.cluster import Joining
from maskserve.payload.header import shown
from maskserve.shards import WHOLE, parse_shard
from maskserve_cli import exits, outputs
from maskserve_cli.command import AsJson, Config, settings_of
from maskserve_cli.exits import Terminated, code_of, say
from maskserve_cli.inputs import limits_of
from maskserve_cli.outputs import bytes_text
from maskserve_cli.progress import progress

GRACE_S = 10.0
"""What runs at a signal may take so long to end; Kubernetes kills after 30 s."""

JobFile = Annotated[str, typer.Argument(metavar="JOB.toml", show_default=False)]
SET = typer.Option(
    "--set", metavar="KEY=VALUE", help="a key of the job file, such as request.op=max; repeat for several"
)
SHARD = typer.Option(
    "--shard", metavar="i/N", help="every N-th input, from i = 0; auto/N: i from the scheduler's variable"
)
ENGINE = typer.Option("--engine", metavar="local|ray", help="the same as --set run.engine=...")
WORKERS = typer.Option("--workers", metavar="N", help="the same as --set run.workers=N")
FAIL_FAST = typer.Option("--fail-fast", help="stop at the first input that fails", show_default=False)
DRY_RUN = typer.Option(
    "--dry-run", help="say what would be done, and what it would cost; do nothing", show_default=False
)


def batch(
    job_file: JobFile,
    changes: Annotated[list[str] | None, SET] = None,
    shard: Annotated[str | None, SHARD] = None,
    workers: Annotated[str | None, WORKERS] = None,
    engine: Annotated[str | None, ENGINE] = None,
    fail_fast: Annotated[bool, FAIL_FAST] = False,
    dry_run: Annotated[bool, DRY_RUN] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    settings = settings_of(config)
    said = [*(changes or [])]
    said += [] if workers is None else [f"run.workers={workers}"]
    said += [] if engine is None else [f"run.engine={engine}"]
    said += ["run.max_errors=0"] if fail_fast else []
    part = WHOLE if shard is None else parse_shard(shard)
    planned = plan(read_job(job_file, said), part, say)
    joining = Joining(address=settings["ray_address"], timeout_s=settings["ray_timeout"])
    if dry_run:
        outlook = planned.outlook()
        who = f"tasks of {joining}" if outlook.engine == RAY else "processes of this machine"
        outputs.write_text([json.dumps(asdict(outlook))] if as_json else lines(outlook, who))
        return
    runner = Runner(exit_of=code_of, tell=say, device=settings["device"], limits=limits_of(settings), joining=joining)
    with graceful(runner), progress("batch", len(planned.to_do), "files") as runner.tick:
        summary = runner.run(planned)
    if as_json:
        outputs.write_text([json.dumps(asdict(summary))])
    say(ended(summary, planned))
    if summary.exit:
        raise typer.Exit(summary.exit)


@contextmanager
def graceful(runner: Runner) -> Iterator[None]:
    """The first SIGTERM or SIGINT lets what runs end; a second one ends it at once."""

    def hear(number: int, _: FrameType | None) -> None:
        if runner.stop.is_asked:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        runner.stop_exit = exits.TERMINATED if number == signal.SIGTERM else exits.INTERRUPTED
        runner.stop.ask(grace_s=GRACE_S)
        # not print: this may come in the middle of one
        os.write(2, b"maskserve: stopping: what runs ends first; a second signal ends it at once\n")

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lines(outlook: Outlook, who: str) -> Iterator[str]:
    """What a run would do, for people."""
    yield f"inputs   {outlook.inputs}, {bytes_text(outlook.bytes)}"
    yield f"done     {outlook.done}"
    yield f"to do    {outlook.to_do}, {bytes_text(outlook.bytes_to_do)}"
    first = "" if outlook.first_output is None else f", the first as {shown(outlook.first_output)}"
    yield f"outputs  to {shown(outlook.to)}{first}"
    yield f"engine   {outlook.engine}: {who}"
    if outlook.to_do:
        rate = f"{1 / FILE_S:,.0f} files and {bytes_text(int(BYTES_A_SECOND))} a second and worker"
        each = f"{START_S[outlook.engine]:g} s to start, {rate}"
        n = outlook.workers
        yield f"time     about {duration(outlook.seconds)} with {n} worker{'s' if n > 1 else ''} ({each})"
    yield "a dry run: nothing was computed or written"


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(3.2), duration(95), duration(8000)
    ('4 s', '2 min', '2.2 h')
    """
    if seconds < 90:
        return f"{int(seconds) + 1} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def ended(summary: Summary, planned: Plan) -> str:
    """One line that says how it went, and what to do about what did not go well."""
    parts = [f"{summary.done} done"]
    parts += [f"{summary.skipped} done before"] if summary.skipped else []
    parts += [f"{summary.failed} failed"] if summary.failed else []
    left = summary.inputs - summary.done - summary.skipped - summary.failed
    parts += [f"{left} not begun"] if left else []
    line = (
        f"{summary.inputs} inputs: {', '.join(parts)}; {bytes_text(summary.bytes_read)} read in {summary.seconds:.1f} s"
    )
    if summary.failed:
        line += f"; why: {shown(planned.errors_path)}"
    if left and 0 <= planned.job.max_errors < summary.failed:
        line += "; stopped by run.max_errors (--fail-fast): without it, the same command tries all"
    elif summary.interrupted or left:
        line += "; the same command goes on"
    return line
