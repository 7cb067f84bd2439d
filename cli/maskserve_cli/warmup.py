"""`warmup`: what is compiled at first use is compiled before the first request."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from maskserve_cli import outputs
from maskserve_cli.command import AsJson

if TYPE_CHECKING:
    from maskserve.devices import Warmed

Device = Annotated[str, typer.Option("--device", help="where: auto, cpu, cuda or cuda:N")]
Dtypes = Annotated[str, typer.Option("--dtypes", metavar="NAMES", help="the dtypes of the cells to come, with commas")]


def warmup(device: Device = "auto", dtypes: Dtypes = "f32,f16,bf16", as_json: AsJson = False) -> None:
    from maskserve.devices import warm
    from maskserve.dtypes import parse
    from maskserve.loading import device_of

    where = device_of(device)
    done = list(warm(where, tuple(parse(word.strip()) for word in dtypes.split(","))))
    if as_json:
        seconds: dict[str, float] = defaultdict(float)
        for one in done:
            seconds[one.op] += one.seconds
        outputs.write_text([json.dumps({"device": where, "seconds": seconds, "backends": by_backend(done)})])
    else:
        outputs.write_text(lines(where, done))


def by_backend(done: Sequence[Warmed]) -> dict[str, int]:
    """How many ops each back end serves."""
    return dict(Counter(backend for backend, _ in {(one.backend, one.op) for one in done}))


def lines(where: str, done: Sequence[Warmed]) -> Iterator[str]:
    """What was done, for people."""
    shares = ", ".join(f"{n} by {name}" for name, n in sorted(by_backend(done).items()))
    yield f"warm: {len({one.op for one in done})} ops on {where} in {sum(one.seconds for one in done):.1f} s ({shares})"
