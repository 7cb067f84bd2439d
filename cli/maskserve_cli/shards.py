"""Parts of a reduction: their states as files, the answer that `merge` makes of them, and parts in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

from maskserve.cgroup import cpus
from maskserve.errors import ParameterError, about
from maskserve.executors import ENGINES, RAY
from maskserve.payload.shelf import Shelf
from maskserve.shards import WHOLE, parse_shard
from maskserve_cli import inputs, outputs
from maskserve_cli.asked import Asked, questioned, title_of
from maskserve_cli.command import AsJson, Config, Files, collect_again, settings_of, some_files
from maskserve_cli.exits import say
from maskserve_cli.options import EXISTS, FORCE, FORM, MEMORY, OUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from maskserve.answers import Answer
    from maskserve.on_ray.cluster import Joining
    from maskserve.requests import Request
    from maskserve.settings import Settings
    from maskserve.steps import Step


def write_state(asked: Asked, request: Request, paths: Sequence[str], settings: Settings) -> None:
    """The state of a shard, in its file."""
    path, shard = state_path(asked), WHOLE if asked.shard is None else parse_shard(asked.shard)
    exists = outputs.asked_exists(asked.wanted)
    if outputs.stands(path, exists):
        say(f"{path} exists; skipped")
        return
    from maskserve import states

    with questioned(request, paths, asked.along, settings) as question, about(title_of(paths)):
        collect_again()
        memory = inputs.memory_of(settings)
        state = states.lift(request, question.payload, question.others, shard, memory)
        n_bytes = outputs.write_in_place(path, lambda descriptor: state.write(descriptor, path, memory), exists)
    if n_bytes is None:
        say(f"{path} exists; skipped")
    else:
        say(f"wrote {path}: the state of shard {shard}, {outputs.bytes_text(n_bytes)}")


def state_path(asked: Asked) -> str:
    if asked.state is None:
        raise ParameterError(
            "--shard needs --state OUT, the file for the state; maskserve merge makes the answer", parameter="state"
        )
    if asked.wanted.out is not None or asked.wanted.form is not None or asked.wanted.as_json or asked.dry_run:
        raise ParameterError(
            "--state writes a state, and no answer: leave -o, --format, --json and --dry-run out", parameter="state"
        )
    if asked.is_shared:
        word = "--engine ray" if asked.engine == RAY else "--workers"
        raise ParameterError(f"{word} goes with an answer, not with --state; leave one out", parameter="workers")
    return asked.state


def refuse_streams(asked: Asked, paths: Sequence[str]) -> None:
    """Raise where processes cannot each open what is read."""
    if any(path == inputs.STDIN or inputs.is_stream(path) for path in paths):
        word = "--workers" if asked.workers is not None else "--engine ray"
        raise ParameterError(
            f"{word} reads files, which each process opens; stdin cannot be shared", parameter="workers"
        )


def refuse_unmergeable(steps: Sequence[Step]) -> None:
    """Raise where processes could not each do a part."""
    from maskserve import states

    states.check_steps(steps)


def memory_to_hold(steps: Sequence[Step], memory: int, beside: Sequence[int]) -> int | None:
    """The memory in which the parent of processes holds all, also what has so many bytes `beside`; None where this one does."""
    from maskserve.room import enough, held

    sizes = [*(step.result.n_bytes for step in steps), *beside]
    least = enough(lambda more: next((short for is_held, short in held(sizes, more) if not is_held), 0), memory)
    return None if least == memory else least


def check_engine(asked: Asked) -> None:
    """Raise where the engine is none."""
    if asked.engine not in (None, *ENGINES):
        raise ParameterError(
            f"--engine is {asked.engine[:40]!r}; give one of {', '.join(ENGINES)}", parameter="engine", allowed=ENGINES
        )


def joining_of(settings: Settings) -> Joining:
    """The Ray cluster that the settings name."""
    from maskserve.on_ray.cluster import Joining

    return Joining(address=settings["ray_address"], timeout_s=settings["ray_timeout"])


def check_cluster(asked: Asked, settings: Settings) -> None:
    """Raise, before a cluster is asked, where its address or the device cannot be."""
    from maskserve.on_ray.cluster import gpus_of

    joining_of(settings).resolved()
    gpus_of(settings["device"])


def who(asked: Asked, settings: Settings) -> str | None:
    """Who does the parts, for a dry run; None where this process does all."""
    if not asked.is_shared:
        return None
    if asked.engine != RAY:
        return f"{asked.workers or cpus()} processes"
    at_once = f", {asked.workers} at once," if asked.workers else ""
    return f"tasks of {joining_of(settings)}{at_once}"


@contextmanager
def by_workers(asked: Asked, request: Request, settings: Settings, n_bytes: int) -> Iterator[Answer]:
    """The answer, its parts reduced in processes or by a cluster; of so many bytes."""
    paths = some_files(asked.verb, asked.files)
    words = {**asked.words, "device": settings["device"]}
    limits, workers = inputs.limits_of(settings), asked.workers or 0
    if asked.engine == RAY:
        from maskserve.on_ray.reduction import reduced

        with reduced(
            request.verb, words, paths, asked.along, joining=joining_of(settings), workers=workers, limits=limits,
            memory=settings["memory"], n_bytes=n_bytes, tell=say,
        ) as answer:  # fmt: skip
            yield answer
        return
    from maskserve.crews import reduce

    yield reduce(
        request.verb,
        words,
        paths,
        asked.along,
        workers=workers,
        limits=limits,
        memory=inputs.memory_of(settings),
        tell=say,
    )


# -- merge --------------------------------------------------------------------------------------------------------


def merge(
    files: Files = None,
    out: Annotated[str | None, OUT] = None,
    form: Annotated[str | None, FORM] = None,
    as_json: AsJson = False,
    exists: Annotated[str | None, EXISTS] = None,
    force: Annotated[bool, FORCE] = False,
    memory: Annotated[str | None, MEMORY] = None,
    config: Config = None,
) -> None:
    paths = some_files("merge", files, of_states=True)
    settings = settings_of(config, {"memory": memory})
    wanted = outputs.Wanted(out=out, form=form, as_json=as_json, exists=exists, force=force)
    target = outputs.target(wanted, None)
    if target.skip:
        say(f"{target.path} exists; skipped")
        return
    from maskserve import states
    from maskserve.partials import LIMITS
    from maskserve_cli import render

    collect_again()
    budget, read = inputs.memory_of(settings), []
    shelf = Shelf(partial(inputs.read, limits=LIMITS, memory=budget))
    for path in paths:
        title = inputs.title(path)
        with about(title):
            read.append((title, states.read(shelf.payload(path), title)))
    render.write(states.merge(read).answer(budget), target, None, None)
