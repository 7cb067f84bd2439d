"""One call of a verb as it was given, and what it reads, open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from maskserve import requests
from maskserve.executors import RAY
from maskserve.joining import Question, question
from maskserve.payload.joined import JoinedPayload
from maskserve.requests import Request
from maskserve.settings import Settings
from maskserve_cli import inputs
from maskserve_cli.exits import say
from maskserve_cli.outputs import Wanted
from maskserve_cli.reports import Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call of a verb, as given."""

    verb: str
    words: Mapping[str, Any]
    files: list[str] | None
    wanted: Wanted
    listing: Listing | None
    dry_run: bool
    explain: bool
    config: str | None
    memory: str | None = None
    along: str | None = None
    shard: str | None = None
    state: str | None = None
    workers: int | None = None
    engine: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether processes or tasks each do a part."""
        return self.workers is not None or self.engine == RAY


def title_of(paths: Sequence[str]) -> str:
    return inputs.title(paths[0]) if len(paths) == 1 else f"{len(paths)} files"


@contextmanager
def questioned(request: Request, paths: Sequence[str], along: str | None, settings: Settings) -> Iterator[Question]:
    """What the request reads, open; that files are taken as one is said."""
    memory, limits = inputs.memory_of(settings), inputs.limits_of(settings)
    read = partial(inputs.read, limits=limits, memory=memory)
    with question(request, paths, read, requests.parse_along(along), inputs.title) as opened:
        if isinstance(opened.payload, JoinedPayload):
            say(opened.payload.described)
        yield opened
