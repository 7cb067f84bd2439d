"""A verb's request, from its words to its answer: read, explain, run, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from shlex import quote
from typing import TYPE_CHECKING, Any

from maskserve import requests
from maskserve.errors import about
from maskserve.executors import LOCAL, RAY
from maskserve.ops import default
from maskserve.payload.format import Payload
from maskserve.requests import Request
from maskserve.settings import Settings
from maskserve.sides import Payloads
from maskserve_cli import explanations, inputs, outputs, reports, shards
from maskserve_cli.asked import Asked, questioned, title_of
from maskserve_cli.command import collect_again, settings_of, some_files
from maskserve_cli.exits import say, say_data
from maskserve_cli.outputs import Form, Target, bytes_text
from maskserve_cli.progress import progress

if TYPE_CHECKING:
    from maskserve.answers import Answer
    from maskserve.steps import Step


def perform(asked: Asked) -> None:
    """Runs what was asked, or says what would be run."""
    settings = settings_of(asked.config, {"device": asked.words.get("device"), "memory": asked.memory})
    shards.check_engine(asked)
    request = requests.build(asked.verb, {**asked.words, "device": settings["device"]})
    paths = some_files(asked.verb, asked.files)
    asked = replace(asked, files=[*paths])  # folders are listed, and told of, once
    if asked.shard is not None or asked.state is not None:
        shards.write_state(asked, request, paths, settings)
        return
    if asked.is_shared:
        shards.refuse_streams(asked, paths)
    if asked.wanted.out not in (None, outputs.STDOUT):
        outputs.target(asked.wanted, None)  # what cannot be written is an error before stdin is waited for
    with questioned(request, paths, asked.along, settings) as question:
        payload, others = question.payload, question.others
        target = outputs.target(asked.wanted, inputs.form_of(payload))
        with about(title_of(paths)):
            act(asked, request, payload, others, target, settings)


def act(asked: Asked, request: Request, payload: Payload, others: Payloads, target: Target, settings: Settings) -> None:
    """Explains, runs and writes, as far as was asked."""
    from maskserve_cli import render

    if asked.listing is not None:
        reports.refuse_output(asked.listing, target)
    if asked.workers is not None:
        from maskserve.crews import checked

        checked(asked.workers)
    if asked.engine == RAY:
        shards.check_cluster(asked, settings)
    if target.skip and not asked.dry_run:
        render.say_skipped(str(target.path))
        return
    explain = explainer(request, payload, others, target) if asked.explain else unexplained
    if asked.dry_run:
        explain(None)
        dry_run(asked, request, payload, others, target, settings)
        return
    refuse(asked, request, payload, others, target, inputs.memory_of(settings))
    with answered(asked, request, payload, others, settings) as answer:
        explain(answer)
        if asked.listing is not None:
            reports.write(asked.listing, answer, target)
            return
        render.write(answer, target, inputs.form_of(payload), nan_hint(request))


def explainer(request: Request, payload: Payload, others: Payloads, target: Target) -> Callable[[Answer | None], None]:
    """Says at once what is known before it runs; to be called with the answer, or with None after a dry run.

    Where the answer is JSON on stdout, all is one line of JSON on stderr.
    """
    from maskserve import answers

    steps = answers.explain(request, payload, others)
    if target.form is Form.JSON and target.path is None:
        return lambda answer: say_data(explanations.record(steps, answer))
    for line in explanations.of_plans(steps):
        say(line)

    def explain(answer: Answer | None) -> None:
        for line in explanations.of_gradients(answer) if answer else ():
            say(line)

    return explain


def unexplained(_: Answer | None) -> None:
    """Nothing was asked for."""


@contextmanager
def answered(
    asked: Asked, request: Request, payload: Payload, others: Payloads, settings: Settings
) -> Iterator[Answer]:
    """The answer, on the threads that the settings give; what does not fit into memory is computed while it is written."""
    from maskserve import answers, execution

    if asked.is_shared:
        n_bytes = answers.bytes_to_read(request, payload, others, memory=inputs.memory_of(settings))
        with shards.by_workers(asked, request, settings, n_bytes) as answer:
            for source in (payload, *others.values()):
                source.refuse_changed()  # a worker compares what it read with what it opened, which may have been later
            yield answer
        return
    collect_again()
    memory = inputs.memory_of(settings)
    n_bytes = answers.bytes_to_read(request, payload, others, memory=memory)
    with progress("reading", n_bytes) as tick, execution.using(threads=settings["threads"] or None, tick=tick):
        yield answers.run(request, payload, others, memory=memory)


def nan_hint(request: Request) -> str | None:
    """How to leave NaN out, from the row: the parameter that can omit them, unless it was given."""
    for parameter in request.row.requestable:
        if "omit" in parameter.choices and parameter.name not in request.params:
            return f"--{parameter.name} omit treats them as missing"
    return None


# -- before it runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a request would do with one variable, from the header alone."""

    name: str
    passes_through: bool
    reads: str
    writes: str
    bytes_read: int
    bytes_written: int
    bytes_held: int
    backend: str | None
    streamed: bool
    """Whether it is read in parts, since it is larger than --memory."""
    passes: int
    """How many times it is read at most; 0: as its cells decide."""
    written_in_parts: bool
    """Whether its result is written as it is computed, since it is larger than its share of --memory."""
    least_memory: int
    """The memory that it must be given to be computed; 0 where it has enough."""


def outlook(step: Step, memory: int) -> Outlook:
    """What a step would do in the memory that is left to it."""
    from maskserve_cli.table import dims_text

    need = step.need if step.is_streamed(memory) else None
    is_streamed = step.is_streamed(memory) and (need is None or need.memory <= memory)
    return Outlook(
        name=step.name,
        passes_through=step.passes_through,
        reads=", ".join(f"{v.info.dtype.name} {dims_text(v.info.shape, v.dims)}" for v in step.inputs),
        writes=", ".join(f"{new.dtype.name} {dims_text(new.shape, new.dims)}" for new in step.written),
        bytes_read=step.bytes_read,
        bytes_written=step.bytes_written,
        bytes_held=step.bytes_held,
        backend=", ".join(dict.fromkeys(work.backend for work in step.works)) or None,
        streamed=is_streamed,
        passes=step.passes(memory) if is_streamed else 1,
        written_in_parts=not step.holds(memory),
        least_memory=0 if need is None or need.memory <= memory else need.memory,
    )


def dry_run(
    asked: Asked, request: Request, payload: Payload, others: Payloads, target: Target, settings: Settings
) -> None:  # fmt: skip
    """Says what would be read, computed and written; what the run would refuse is refused here in the same words."""
    from maskserve import answers

    memory, who = inputs.memory_of(settings), shards.who(asked, settings)
    steps = answers.explain(request, payload, others)
    looks = [outlook(step, room) for step, room in answers.rooms(steps, memory)]
    refuse(asked, request, payload, others, target, memory)
    is_json = target.form is Form.JSON and target.path is None
    outputs.write_text(
        [as_json(request, looks, target, asked.engine or LOCAL)]
        if is_json
        else lines(request, looks, target, memory, who)
    )


def refuse(asked: Asked, request: Request, payload: Payload, others: Payloads, target: Target, memory: int) -> None:
    """Raise, before anything is read, what the memory or the processes do not allow."""
    from maskserve import answers
    from maskserve_cli import render

    steps = answers.explain(request, payload, others)
    beside = [] if asked.listing is not None else answers.bytes_beside(request, payload, others)
    if asked.is_shared:
        shards.refuse_unmergeable(steps)
        render.refuse_text(steps, target, shards.memory_to_hold(steps, memory, beside), is_report=False)
        return
    answers.refuse_beyond(steps, memory)
    enough = answers.memory_to_hold(steps, memory, beside)
    render.refuse_text(steps, target, enough, is_report=asked.listing is not None)


def lines(request: Request, looks: list[Outlook], target: Target, memory: int, who: str | None) -> Iterator[str]:
    """A dry run for people; `who` does the parts, where others than this process do."""
    from maskserve_cli.table import columns

    yield words_of(request)
    yield from columns([("variable", "read", "", "written", "", "by"), *map(outlook_words, looks)], indent="  ")
    n_read, n_written = sum(look.bytes_read for look in looks), sum(look.bytes_written for look in looks)
    where = target.path or "stdout"
    kept = " (it exists and would be skipped)" if target.skip else ""
    sizes = f"would read {bytes_text(n_read)} and write {bytes_text(n_written)} of cells and masks"
    yield f"{sizes} to {where} as {target.form}{kept}"
    if who is not None:
        yield f"{who} would each read a part, once"
    for look in looks if who is None else ():
        if look.streamed:
            yield f"{look.name} is larger than --memory {bytes_text(memory)}: would be read in parts, {often(look.passes)}"
    n_held = sum(look.bytes_held for look in looks if not look.streamed)
    if n_held > n_written:
        yield f"would hold at most {bytes_text(n_held)} at once beside what is read"
    yield "a dry run: nothing was computed or written"


def often(passes: int) -> str:
    if passes == 0:
        return "several times, as its cells decide"
    return "once" if passes == 1 else f"at most {passes} times"


def outlook_words(look: Outlook) -> tuple[str, ...]:
    by = "passes through" if look.passes_through else str(look.backend)
    return look.name, look.reads, bytes_text(look.bytes_read), look.writes, bytes_text(look.bytes_written), by


def words_of(request: Request) -> str:
    """The request as one would type it."""
    said = request.canonical()
    verb = said.pop("verb")
    if default(verb) is request.row:
        del said["op"]
    return " ".join([verb, *(f"--{name.replace('_', '-')}{spelled(value)}" for name, value in said.items())])


def spelled(value: Any) -> str:
    if value is True:
        return ""
    return " " + quote(",".join(map(str, value)) if isinstance(value, list) else str(value))


def as_json(request: Request, looks: list[Outlook], target: Target, engine: str) -> str:
    from dataclasses import asdict

    record = {
        "request": request.canonical(),
        "variables": [asdict(look) for look in looks],
        "out": target.path,
        "engine": engine,
    }
    return json.dumps(record, ensure_ascii=False)
