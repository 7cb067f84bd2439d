"""A lane for each device: who asks for one by number gets its lane, who asks for any gets the one with the least to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count

from maskserve.accelerators import CPU, accelerators
from maskserve.health import health
from maskserve.loading import ANY, device_of
from maskserve.requests import AUTO, Request
from maskserve_api.lane import Lane


class Lanes:
    """The lanes of this process's devices, each of at most `limit` requests."""

    def __init__(self, limit: int) -> None:
        self.cpu = Lane(limit)
        self.of_device = {CPU: self.cpu, **{name: Lane(limit) for name in accelerators().names()}}
        self._turn = count()

    def __iter__(self) -> Iterator[tuple[str, Lane]]:
        """Each device's name, and its lane."""
        return iter(self.of_device.items())

    def placed(self, request: Request) -> tuple[Lane, Request]:
        """The lane that computes a request, and the request with its device by name where several would do."""
        word = request.device
        others = accelerators().names()
        if word not in (ANY, AUTO) or len(others) < 2:
            return self.of_device[device_of(word)], request
        name = self.freest(others)
        return self.of_device[name], on(request, name)

    def freest(self, names: Sequence[str]) -> str:
        """The device with the fewest requests, of equal ones the next in turn; one that is lost only where all are."""
        well = [name for name in names if name not in health().lost] or names
        first = next(self._turn) % len(well)
        return min([*well[first:], *well[:first]], key=lambda name: self.of_device[name].n_pending)


@lru_cache(maxsize=256)
def on(request: Request, device: str) -> Request:
    """The request on this device: the same one again for the same request, by which plans are remembered."""
    return request.on(device)
