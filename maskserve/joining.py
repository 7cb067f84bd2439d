"""What a request reads: its payloads, joined to one where they are several, and those that it names beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from maskserve import sides
from maskserve.errors import about
from maskserve.payload.format import Payload
from maskserve.payload.header import shown
from maskserve.payload.joined import JoinedPayload, Part
from maskserve.payload.metadata import mask_means_of
from maskserve.payload.shelf import Shelf
from maskserve.places import is_named
from maskserve.requests import Request
from maskserve.sides import Payloads
from maskserve.stores.addresses import is_address

FAR_AT_ONCE = 16
Read = Callable[[str], Payload]
"""The payload at a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A payload, and the ones that the request names by their paths."""

    payload: Payload
    others: Payloads
    first: Payload
    """The payload itself, or the first one where it is joined of several."""


@contextmanager
def question(
    request: Request, paths: Sequence[str], read: Read, along: int | str = 0, titled: Callable[[str], str] = shown
) -> Iterator[Question]:
    """What the request reads at `paths`, open; of many files few are open at once. Errors name files by their title."""
    with ExitStack() as stack:
        shelf = Shelf(read)
        opened = opened_all(paths, read if len(paths) == 1 else shelf.payload, titled)
        for payload in opened:
            stack.callback(payload.close)
        others = {}
        for word in files_named(request, opened[0]):
            others[word] = stack.enter_context(opened_at(word, read, titled(word)))
        payload = opened[0]
        if len(paths) > 1:
            payload = join(request, [*zip(map(titled, paths), opened, strict=True)], others, along)
        yield Question(payload=payload, others=others, first=opened[0])


def opened_all(paths: Sequence[str], read: Read, titled: Callable[[str], str]) -> list[Payload]:
    """The payloads at the paths; objects of a store several at a time, since each waits for an answer."""
    if sum(map(is_address, paths)) < 2:
        return [opened_at(path, read, titled(path)) for path in paths]
    with ThreadPoolExecutor(FAR_AT_ONCE, thread_name_prefix="maskserve-open") as pool:
        try:
            return list(pool.map(lambda path: opened_at(path, read, titled(path)), paths))
        finally:
            pool.shutdown(cancel_futures=True)


def opened_at(path: str, read: Read, title: str) -> Payload:
    with about(title):
        return read(path)


def files_named(request: Request, payload: Payload) -> list[str]:
    """The files and objects that stand where a tensor may be named: a tensor of the payload comes first."""
    words = [str(request.params[p.name]) for p in sides.parameters(request.row) if p.name in request.params]
    return [word for word in words if word not in payload.header.tensors and is_named(word)]


def join(
    request: Request, opened: Sequence[tuple[str, Payload]], others: Payloads, along: int | str = 0
) -> JoinedPayload:
    """The payloads, each with its title, side by side along a dim, in their order."""
    from maskserve.answers import resolved  # which brings torch along: a file that cannot be read is told without

    parts = []
    for title, payload in opened:
        with about(title):
            parts.append(Part(title=title, payload=payload, variables=resolved(request, payload, others)))
    means = mask_means_of(parts[0].payload.header.metadata, request.common.get("mask_means"))
    return JoinedPayload(parts, along, means)
