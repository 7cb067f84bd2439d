"""Many payloads as the one that a request is about: their variables joined along a dim."""

from __future__ import annotations

from collections.abc import Sequence

from maskserve.answers import resolved
from maskserve.payload.format import Payload
from maskserve.payload.joined import JoinedPayload, Part
from maskserve.payload.metadata import mask_means_of
from maskserve.requests import Request
from maskserve.sides import Payloads


def join(
    request: Request, opened: Sequence[tuple[str, Payload]], others: Payloads, along: int | str = 0
) -> JoinedPayload:
    """The payloads, each with what it is called, side by side along a dim, in their order."""
    parts = [
        Part(title=title, payload=payload, variables=resolved(request, payload, others, title=title))
        for title, payload in opened
    ]
    means = mask_means_of(parts[0].payload.header.metadata, request.common.get("mask_means"))
    return JoinedPayload(parts, along, means)
