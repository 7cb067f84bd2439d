"""`warmup`: what is compiled at first use is compiled before the first request, here or for a device that is elsewhere."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from maskserve.errors import ParameterError
from maskserve_cli import outputs
from maskserve_cli.command import AsJson
from maskserve_cli.progress import progress

if TYPE_CHECKING:
    from maskserve.warming import Warmed

T = TypeVar("T")
Device = Annotated[str, typer.Option("--device", help="where: auto, cpu, cuda or cuda:N")]
Dtypes = Annotated[str, typer.Option("--dtypes", metavar="NAMES", help="the dtypes of the cells to come, with commas")]
Ops = Annotated[
    str, typer.Option("--ops", metavar="NAMES", help="the ops to come, with commas; all where none is given")
]
Shapes = Annotated[str, typer.Option("--shapes", metavar="SIZES", help="shapes to come, such as 8192x8192,64x1024x64")]
Capability = Annotated[
    str,
    typer.Option(
        "--capability", metavar="X.Y", help="compile ahead, without a device, for GPUs of this compute capability"
    ),
]


def warmup(
    device: Device = "auto",
    dtypes: Dtypes = "f32,f16,bf16",
    ops: Ops = "",
    shapes: Shapes = "",
    capability: Capability = "",
    as_json: AsJson = False,
) -> None:
    from maskserve import warming
    from maskserve.accelerators import CPU
    from maskserve.dtypes import parse
    from maskserve.loading import device_of
    from maskserve.ops import find

    sm = number_of(capability) if capability else None
    where = CPU if sm is not None else device_of(device)
    asked = warming.uses(where, words(dtypes, parse), words(ops, find), words(shapes, shape_of))
    found = asked if sm is None else warming.with_kernels(asked, sm)
    done: list[Warmed] = []
    with progress("warming up", len(found), "uses") as tick:
        for one in map(warming.run, found) if sm is None else warming.ahead(found, sm):
            done.append(one)
            tick(1)
    target = where if sm is None else f"sm_{sm}"
    folder = None if sm is None else warming.cache_folder()
    outputs.write_text([as_data(target, folder, done)] if as_json else lines(target, folder, done))


def words(text: str, parse: Callable[[str], T]) -> list[T]:
    """What words between commas mean."""
    return [parse(word.strip()) for word in text.split(",") if word.strip()]


def shape_of(word: str) -> tuple[int, ...]:
    """
    >>> shape_of("64x1024x64")
    (64, 1024, 64)
    """
    if not re.fullmatch(r"[1-9][0-9]{0,9}(x[1-9][0-9]{0,9})*", word):
        raise ParameterError(
            f"shapes has {word[:40]!r}; it must be sizes with x between them, such as 8192x8192", parameter="shapes"
        )
    return tuple(map(int, word.split("x")))


def number_of(word: str) -> int:
    """A compute capability as compilers write it.

    >>> number_of("9.0")
    90
    """
    if not re.fullmatch(r"[1-9][0-9]?\.[0-9]", word):
        raise ParameterError(
            f"capability is {word[:40]!r}; it must be as doctor prints it, such as 9.0", parameter="capability"
        )
    return int(word.replace(".", ""))


def as_data(target: str, folder: str | None, done: Sequence[Warmed]) -> str:
    """What was done, for programs."""
    seconds: dict[str, float] = defaultdict(float)
    for one in done:
        seconds[one.op] += one.seconds
    record = {"device": target, "seconds": seconds, "backends": by_backend(done)}
    ahead = {} if folder is None else {"folder": folder, "kernels": sum(one.kernels for one in done)}
    return json.dumps({**record, **ahead})


def by_backend(done: Sequence[Warmed]) -> dict[str, int]:
    """How many ops each back end serves."""
    return dict(Counter(backend for backend, _ in {(one.backend, one.op) for one in done}))


def lines(target: str, folder: str | None, done: Sequence[Warmed]) -> Iterator[str]:
    """What was done, for people."""
    shares = ", ".join(f"{n} by {name}" for name, n in sorted(by_backend(done).items()))
    n_ops, seconds = len({one.op for one in done}), sum(one.seconds for one in done)
    yield f"warm: {n_ops} ops on {target} in {seconds:.1f} s ({shares or 'none is served'})"
    if folder is not None:
        yield f"compiled ahead: {sum(one.kernels for one in done)} launches of kernels, kept in {folder}"
