"""`maskserve`: finds the command that is asked for, runs it, and turns what goes wrong into a line and an exit code.

Only the command that is called is built, so that `info` pays neither for the models of requests nor for torch.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
import typer.main
from typer.core import TyperGroup

from maskserve.errors import nearest
from maskserve.ops import verb_summary, verbs
from maskserve_cli import exits
from maskserve_cli.command import Command, imported, write_examples
from maskserve_cli.exits import Terminated, report, say
from maskserve_cli.words import examples, in_expression, rows

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises at words it does not understand; the class lives in click or in typer, by typer's version."""

NAME = "maskserve"
COMPLETION = "_MASKSERVE_COMPLETE"
"""The shell sets it to ask for completions."""

ABOUT = "Computes on tensors in which some values are missing. A mask says which: true = the value counts."
EXAMPLES = (
    "maskserve info rain.safetensors",
    "maskserve head rain.safetensors",
    "maskserve ops",
)

DOUBLED_S = 1.0
"""A second SIGTERM within this time is the first one: `timeout` sends it to a process, and then to its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A command: the function behind it, made when it is called, and what help says of it."""

    summary: str
    callback: Callable[[], Callable[..., object]]
    examples: Callable[[], str]


def entries() -> Mapping[str, Entry]:
    """Every command by name: the verbs of the op table, then our own."""
    own = {name: ours(name, *words) for name, words in OWN.items()}
    return {**{verb: of_verb(verb) for verb in verbs()}, **own}


OWN: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "info": (
        "maskserve_cli.look:info",
        "names, dims, dtypes and masks of a file; --stats counts its cells",
        ("maskserve info rain.safetensors", "maskserve info --stats rain.safetensors"),
    ),
    "head": (
        "maskserve_cli.look:head",
        "the first cells of every variable",
        ("maskserve head rain.safetensors", "maskserve head -n 10 rain.safetensors"),
    ),
    "validate": (
        "maskserve_cli.look:validate",
        "whether files can be read: a line each, exit 65 if one cannot",
        ("maskserve validate data/*.safetensors",),
    ),
    "convert": (
        "maskserve_cli.convert:convert",
        "data of another format, with its masks: netCDF, Zarr, CSV, Parquet, NumPy, GeoTIFF, torch",
        (
            "maskserve convert rain.safetensors rain.npz",
            "maskserve convert flights.csv flights.parquet --columns dep_delay,arr_delay",
            "maskserve convert sst.nc sst.safetensors",
        ),
    ),
    "diff": (
        "maskserve_cli.diff:diff",
        "where two files differ: quiet and exit 0 where they do not, exit 1 where they do",
        (
            "maskserve diff before.safetensors after.safetensors",
            "maskserve diff --rtol 1e-6 --json a.safetensors b.json",
        ),
    ),
    "merge": (
        "maskserve_cli.shards:merge",
        "the answer of all shards of a reduction, from their states",
        (
            "maskserve reduce --op mean --dim 0 --shard 0/2 --state 0.state rain.safetensors",
            "maskserve merge *.state -o mean.safetensors",
        ),
    ),
    "batch": (
        "maskserve_cli.batch:batch",
        "one request over many files, as a job file says; started again, it does what is missing",
        (
            "maskserve batch job.toml",
            "maskserve batch job.toml --dry-run",
            "maskserve batch job.toml --set request.op=max --set output.to=highest",
            "maskserve batch job.toml --shard 0/4",
        ),
    ),
    "ops": (
        "maskserve_cli.ops:ops",
        "what can be computed, and the parameters of one op",
        ("maskserve ops", "maskserve ops --json"),
    ),
    "serve": (
        "maskserve_cli.serve:serve",
        "the HTTP service",
        ("maskserve serve", "maskserve serve --port 9000 --max-body 1GiB"),
    ),
    "doctor": (
        "maskserve_cli.doctor:doctor",
        "versions, devices, back ends, and where each setting comes from",
        ("maskserve doctor", "maskserve doctor --json"),
    ),
    "warmup": (
        "maskserve_cli.warmup:warmup",
        "compiles what is compiled at first use, so that the first request does not wait for it",
        ("maskserve warmup", "maskserve warmup --dtypes f32,bf16"),
    ),
}


def ours(name: str, where: str, summary: str, examples: tuple[str, ...]) -> Entry:
    return Entry(summary=summary, callback=partial(imported, where), examples=lambda: "\n".join(examples))


def of_verb(verb: str) -> Entry:
    """A verb's command; nothing of it is imported before it is called."""

    def callback() -> Callable[..., object]:
        from maskserve_cli.verbs import command

        return command(verb)

    return Entry(summary=verb_summary(verb), callback=callback, examples=lambda: examples(verb))


class Commands(TyperGroup):
    """The commands, each built when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(entries())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = entries().get(cmd_name)
        return None if entry is None else built(cmd_name, entry)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in entries() and not ctx.resilient_parsing:
            served = [row for verb in verbs() for row in rows(verb) if name in (row.name, *row.aliases)]
            hint = f"; it is an op: maskserve {served[0].verb} --op {name}" if served else nearest(name, entries())
            ctx.fail(f"{name!r:.80} is not a command{hint}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        first = next(iter(verbs()))
        write_examples(formatter, [*entries()[first].examples().splitlines()[:2], *EXAMPLES])
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(ABOUT)
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in entries().items()])
        with formatter.section("Options"):
            formatter.write_dl([r for p in self.get_params(ctx) if (r := p.get_help_record(ctx)) is not None])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in exits.MEANINGS.items()])


def built(name: str, entry: Entry) -> Any:
    """One command of typer's."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, cls=Command, help=entry.summary, epilog=entry.examples())(entry.callback())
    return typer.main.get_command(app)


def show_version(is_asked: bool) -> None:
    if is_asked:
        from maskserve.version import version

        print(f"maskserve {version()}")
        raise typer.Exit


VERSION = typer.Option("--version", callback=show_version, is_eager=True, help="the version", show_default=False)


def build_app() -> typer.Typer:
    """The typer application."""
    app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False)

    @app.callback(invoke_without_command=True)
    def root(context: typer.Context, version: Annotated[bool, VERSION] = False) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` and returns the exit code; without `argv`, runs the process's words, and what computes ends it."""
    if argv is not None:
        return outcome(list(argv))
    code = outcome(sys.argv[1:])
    if sys.argv[1:2] and sys.argv[1] in (*verbs(), "serve"):
        leave(code)
    return code


def leave(code: int) -> NoReturn:
    """Ends the process at once: all is written and closed by now, and Python would take 0.4 s to take torch apart."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads: that was reported already
            stream.flush()
    os._exit(code)


def outcome(words: list[str]) -> int:
    """The exit code of the words, once what went wrong is said; a signal may come while it is said, too."""
    with prepared():
        try:
            return told(words)
        except KeyboardInterrupt:
            say("interrupted")
            return exits.INTERRUPTED
        except Terminated:
            say("terminated")
            return exits.TERMINATED


def told(words: list[str]) -> int:
    try:
        return run(words)
    except UsageError as error:
        say(misused(error))
        return exits.USAGE
    except BrokenPipeError:
        abandon_stdout()
        return exits.BROKEN_PIPE
    except Exception as error:
        return report(error)


def run(words: list[str]) -> int:
    """Runs the words and says how it went, without what typer's own main makes of errors and signals."""
    command = typer.main.get_command(build_app())
    if COMPLETION in os.environ:
        command.main(words, prog_name=NAME)
    try:
        with command.make_context(NAME, words) as context:
            command.invoke(context)
        code = exits.DONE
    except typer.Exit as end:
        code = end.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


@contextmanager
def prepared() -> Iterator[None]:
    """What a short-lived process wants: no garbage collection, warnings in a line, a SIGTERM that unwinds."""
    show, collects = warnings.showwarning, gc.isenabled()
    gc.disable()  # nine tenths of the time are imports, and the collector walks what they make: -10 %
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    in_main = threading.current_thread() is threading.main_thread()  # signals belong to nobody else
    handler = signal.signal(signal.SIGTERM, terminate) if in_main else None
    try:
        yield
    finally:
        warnings.showwarning = show
        gc.unfreeze()
        if collects:
            gc.enable()
        if in_main:
            signal.signal(signal.SIGTERM, handler)


def terminate(*_: object) -> NoReturn:
    """Unwinds, so that nothing half-written stays behind. Who sends SIGTERM again, later than at once, does not wait for that."""
    begun_s = time.monotonic()

    def again(*_: object) -> None:
        if time.monotonic() - begun_s > DOUBLED_S:
            os._exit(exits.TERMINATED)

    signal.signal(signal.SIGTERM, again)
    raise Terminated


def abandon_stdout() -> None:
    """Nobody reads any more: what is still buffered goes nowhere, so that Python's own flush at exit finds no fault."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def misused(error: Exception) -> str:
    """typer's complaint as one line of ours, with the nearest option and where to read on."""
    message = str(getattr(error, "message", error)).rstrip(".")
    context = getattr(error, "ctx", None)
    name = getattr(error, "option_name", None)
    if name is not None and context is not None and not message.startswith("Option"):
        known = [opt for p in context.command.get_params(context) for opt in p.opts]
        message = f"there is no option {name}{in_expression(context.info_name, name) or nearest(name, known)}"
    elif hasattr(error, "format_message"):
        message = error.format_message().rstrip(".")
    where = context.command_path if context is not None else NAME
    return f"{message} ({where} --help)"
