"""A job from its file to its summary: what is to do, passes over it until nothing that may pass has failed, and what to tell.

Imports no torch: workers do. Who calls it says what a second signal does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace

from maskserve.batch import engines, ledger, outputs
from maskserve.batch.inputs import Version, find, versions_of
from maskserve.batch.job import Job
from maskserve.batch.ledger import AnyPart, Failure
from maskserve.batch.work import Block, Item, Report, Work, failure
from maskserve.cgroup import cpus
from maskserve.executors import LOCAL, RAY, Executor, Limits, Outcome, Stop
from maskserve.on_ray.cluster import Joining
from maskserve.payload.files import _sync_folder, failing, save, temps_of
from maskserve.payload.header import Limits as HeaderLimits
from maskserve.payload.header import shown
from maskserve.payload.writing import Encoded
from maskserve.settings import LEAST_MEMORY
from maskserve.shards import WHOLE, Shard
from maskserve.stores.addresses import is_address

MAY_PASS = frozenset({69, 74, 75})
"""Exit codes of what another try may mend."""
BAD_DATA, TRY_AGAIN = 65, 75
BLOCK_ITEMS = 128
BLOCK_BYTES = 16 << 20
BLOCKS_A_WORKER = 4
"""At least, so that workers end at about the same time."""
COPIES = 3
"""What an input takes of memory: itself, its answer, and what lies between; at most a worker's share."""
FIRST_WAIT_S = 0.5
START_S, FILE_S, BYTES_A_SECOND = {LOCAL: 2.0, RAY: 12.0}, 0.0005, 250e6
"""What a dry run reckons with: starting, a small file, and the bytes of large ones; each worker has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run ended. `skipped` inputs were done before; `exit` is what the command ends with."""

    inputs: int
    done: int
    skipped: int
    failed: int
    bytes_read: int
    seconds: float
    exit: int
    interrupted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a run would do."""

    inputs: int
    bytes: int
    to_do: int
    bytes_to_do: int
    done: int
    to: str
    first_output: str | None
    workers: int
    engine: str
    seconds: float
    """An estimate: START_S of the engine, and for each input FILE_S and its bytes at BYTES_A_SECOND, shared by the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The inputs of a shard, and those of them that are to be done."""

    job: Job
    shard: Shard
    inputs: int
    to_do: tuple[Item, ...]
    versions: dict[str, Version | None]

    @property
    def ledger_folder(self) -> str:
        return ledger.folder_of(self.job.to)

    @property
    def errors_path(self) -> str:
        return os.path.join(self.ledger_folder, ledger.for_shard("errors.jsonl", self.shard))

    @property
    def summary_path(self) -> str:
        path = self.job.summary or os.path.join(self.ledger_folder, "summary.json")
        return ledger.for_shard(path, self.shard)

    def n_bytes(self, item: Item) -> int:
        version = self.versions[item.uri]
        return version.n_bytes if version else 0

    def outlook(self) -> Outlook:
        n_bytes = sum(version.n_bytes for version in self.versions.values() if version)
        to_do = sum(map(self.n_bytes, self.to_do))
        workers = max(1, min(self.job.workers or cpus(), len(self.to_do)))
        work_s = (len(self.to_do) * FILE_S + to_do / BYTES_A_SECOND) / workers
        return Outlook(
            inputs=self.inputs, bytes=n_bytes, to_do=len(self.to_do), bytes_to_do=to_do,
            done=self.inputs - len(self.to_do), to=self.job.to, first_output=self.to_do[0].output if self.to_do else None,
            workers=workers, engine=self.job.engine, seconds=round(START_S[self.job.engine] + work_s, 1) if self.to_do else 0.0,
        )  # fmt: skip


def plan(job: Job, shard: Shard = WHOLE, tell: Callable[[str], None] = lambda line: None) -> Plan:
    """What there is to do, or an error that stops the job before any work."""
    outputs.check_form(job.verb, job.name, job.to)
    told: dict[str, Version] = {}
    found = find(job.paths, job.list, tell, told)
    names = outputs.names(job.name, job.to, found)
    ours = list(zip(shard.of(found), shard.of(names), strict=True))
    versions = versions_of((uri for uri, _ in ours), told)
    known = ledger.entries(ledger.folder_of(job.to))
    stands = outputs.standing([output for _, output in ours] + [entry.output for entry in known.values()], job.to)
    if job.exists == "error":
        outputs.refuse_standing(stands & {output for _, output in ours})
    if job.exists != "replace":
        valid = (entry for entry in known.values() if entry.output in stands)
        ledger.refuse_other(valid, job.request_sha256, job.numeric_version, job.to)

    def is_done(uri: str, output: str) -> bool:
        entry = known.get(uri)
        return (
            entry is not None
            and output in stands
            and entry.output == output
            and versions[uri] == Version(entry.size, entry.mtime, entry.etag)
        )

    todo = ours if job.exists == "replace" else [pair for pair in ours if not is_done(*pair)]
    return Plan(job=job, shard=shard, inputs=len(ours), versions=versions, to_do=tuple(Item(*pair) for pair in todo))


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has happened so far."""

    done: int = 0
    n_bytes: int = 0
    failed: dict[str, Failure] = field(default_factory=dict)
    unwritable: Failure | None = None
    """An output that could not be written though it was tried again: then none can."""

    def add(self, report: Report, failed: Iterable[Failure]) -> None:
        self.done += len(report.done)
        self.n_bytes += report.n_bytes
        self.failed.update((failure.uri, failure) for failure in failed)


@dataclass(slots=True, kw_only=True)
class Runner:
    """What a job needs from who started it: exit codes of errors, ears for lines and for progress, and a way to stop."""

    exit_of: Callable[[BaseException], int]
    tell: Callable[[str], None]
    tick: Callable[[int], None] = lambda n_inputs: None
    stop: Stop = field(default_factory=Stop)
    stop_exit: int = 143
    """The exit code of a run that `stop` ended."""
    device: str = "auto"
    joining: Joining = field(default_factory=Joining)
    """The cluster of jobs whose engine is ray."""
    limits: HeaderLimits = field(default_factory=HeaderLimits)

    def run(self, plan: Plan) -> Summary:
        """Does what is to do; the summary is written whatever happens."""
        start_s, progress = time.monotonic(), Progress()
        try:
            if plan.to_do:
                self.work(plan, progress)
        except BaseException as error:
            code = self.stop_exit if not isinstance(error, Exception) else self.exit_of(error)
            with suppress(Exception):  # what went wrong first is what must be heard
                write_summary(plan, summary(plan, progress, start_s, code, not isinstance(error, Exception)))
            raise
        is_interrupted = self.stop.is_asked and progress.done + len(progress.failed) < len(plan.to_do)
        code = self.stop_exit if is_interrupted else exit_code(progress)
        made = summary(plan, progress, start_s, code, is_interrupted)
        write_summary(plan, made)
        return made

    def work(self, plan: Plan, progress: Progress) -> None:
        """Passes over what is to do, each over what the last one left, until no failure is left that may pass."""
        engines.check_device(plan.job, self.device)
        make_folders(plan)
        if plan.job.exists == "replace":
            ledger.forget(plan.ledger_folder, plan.shard)
        with ledger.part_of(plan.ledger_folder, plan.shard) as part, temps_of(part.run):
            n_swept = ledger.sweep(plan.ledger_folder, places(plan))
            if n_swept:
                self.tell(f"removed {n_swept} temporary files that a killed run had left")
            try:
                with engines.opened(plan.job, self.device, self.joining, self.tell) as (executor, job):
                    self.passes(replace(plan, job=job), part, progress, executor)
            finally:  # of workers that were killed, by whomever: none runs any more
                ledger.sweep_run(part.run, places(plan))

    def passes(self, plan: Plan, part: AnyPart, progress: Progress, executor: Executor) -> None:
        left = plan.to_do
        for n_before in range(plan.job.retries + 1):
            if n_before:
                self.wait(FIRST_WAIT_S * 2 ** (n_before - 1))
            again = self.one_pass(plan, part, left, progress, executor, is_last=n_before == plan.job.retries)
            if self.is_enough(plan, progress):
                first = next(iter(progress.failed.values()))
                self.tell(f"{shown(first.uri)} failed first: {first.message}")
                break
            if not again or self.stop.is_asked:
                break
            left = again

    def wait(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.stop.is_asked:
            time.sleep(0.05)

    def is_enough(self, plan: Plan, progress: Progress) -> bool:
        return 0 <= plan.job.max_errors < len(progress.failed)

    def one_pass(
        self, plan: Plan, part: AnyPart, items: Sequence[Item], progress: Progress, executor: Executor, *, is_last: bool
    ) -> tuple[Item, ...]:
        """The items to try again: what failed and may pass, and what was not begun since nothing could be written."""
        left = {item.uri: item for item in items}
        again: list[Item] = []
        stop = Stop(self.stop)
        unwritable: Failure | None = None
        flight = Limits(memory=memory_of(plan.job), weigh=lambda block: block.n_bytes, stop=stop)
        # closed, whatever happens: workers end before what they have left is swept
        with closing(executor.run(self.function(plan, part), blocks(plan, items), flight)) as outcomes:
            for report in map(self.reported, outcomes):
                part.add(report.done)
                final = []
                for failed in report.failed:
                    item = left.pop(failed.uri)
                    is_unwritable = failed.uri in report.unwritable
                    unwritable = failed if is_unwritable else unwritable
                    if not is_last and (is_unwritable or failed.exit in MAY_PASS):
                        again.append(replace(item, attempts=item.attempts + 1))
                    else:
                        final.append(failed)
                for entry in report.done:
                    del left[entry.uri]
                progress.add(report, final)
                self.tick(len(report.done) + len(final))
                part.add_failures(final)
                if unwritable or self.is_enough(plan, progress):
                    stop.ask(grace_s=float("inf"))
        if is_last:
            progress.unwritable = unwritable
        return (*again, *left.values()) if again else ()

    def function(self, plan: Plan, part: AnyPart) -> Work:
        job = plan.job
        return Work(
            verb=job.verb, words=job.words, device=engines.device_of(job, self.device), limits=self.limits, memory=share_of(job),
            request_sha256=job.request_sha256, version=job.numeric_version, run=part.run,
            stops_at_error=job.max_errors == 0, exit_of=self.exit_of,
        )  # fmt: skip

    def reported(self, outcome: Outcome[Block, Report]) -> Report:
        """What a block did; one whose worker was lost, or that failed as a whole, failed with each of its inputs."""
        if outcome.result is not None:
            return outcome.result
        assert outcome.error is not None, "an outcome is a result or an error"
        items = (replace(item, attempts=item.attempts + outcome.attempts - 1) for item in outcome.task.items)
        return Report((), tuple(failure(item, outcome.error, self.exit_of) for item in items), 0)


def share_of(job: Job) -> int:
    """The bytes that each worker may hold: what is larger is read, and written, in parts."""
    return max(memory_of(job) // max(job.workers, 1), LEAST_MEMORY)


def memory_of(job: Job) -> int:
    assert job.memory is not None, "known once the engine is there"
    return job.memory


def blocks(plan: Plan, items: Sequence[Item]) -> Iterator[Block]:
    """The items in blocks: small files together, since one wait for the disk serves them all, and large ones alone."""
    most = max(1, min(BLOCK_ITEMS, -(-len(items) // (plan.job.workers * BLOCKS_A_WORKER))))
    block: list[Item] = []
    n_bytes = largest = 0
    for item in items:
        size = plan.n_bytes(item)
        if block and (len(block) >= most or n_bytes + size > BLOCK_BYTES):
            yield Block(tuple(block), min(COPIES * largest, share_of(plan.job)))
            block, n_bytes, largest = [], 0, 0
        block.append(item)
        n_bytes, largest = n_bytes + size, max(largest, size)
    if block:
        yield Block(tuple(block), min(COPIES * largest, share_of(plan.job)))


def places(plan: Plan) -> set[str]:
    """The folders that outputs, the ledger and the summary are written to; a store has none."""
    folders = {os.path.dirname(item.output) or "." for item in plan.to_do}
    every = {*folders, plan.ledger_folder, os.path.dirname(plan.summary_path) or "."}
    return {folder for folder in every if not is_address(folder)}


def make_folders(plan: Plan) -> None:
    """The folders that are missing, on disk; their own place is synced too, so that a power cut leaves no output without one."""
    for folder in sorted(places(plan)):
        if os.path.isdir(folder):
            continue
        with failing(f"{shown(folder)} cannot be made"):
            os.makedirs(folder, exist_ok=True)
            _sync_folder(os.path.dirname(os.path.abspath(folder)))


def exit_code(progress: Progress) -> int:
    """0 where nothing failed; the code of the place for outputs, where that failed; 75 where another start may help; else 65."""
    if progress.unwritable:
        return progress.unwritable.exit
    codes = {failure.exit for failure in progress.failed.values()}
    return 0 if not codes else TRY_AGAIN if codes & MAY_PASS else BAD_DATA


def summary(plan: Plan, progress: Progress, start_s: float, code: int, is_interrupted: bool) -> Summary:
    return Summary(
        inputs=plan.inputs, done=progress.done, skipped=plan.inputs - len(plan.to_do), failed=len(progress.failed),
        bytes_read=progress.n_bytes, seconds=round(time.monotonic() - start_s, 3), exit=code, interrupted=is_interrupted,
    )  # fmt: skip


def write_summary(plan: Plan, made: Summary) -> None:
    text = memoryview((json.dumps(asdict(made)) + "\n").encode())
    folder = os.path.dirname(plan.summary_path) or "."
    if not is_address(folder):
        with failing(f"{shown(folder)} cannot be made"):
            os.makedirs(folder, exist_ok=True)
    save(plan.summary_path, Encoded(text.nbytes, iter([text])), exists="replace")
