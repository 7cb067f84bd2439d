"""Devices beside the CPU, as their driver tells of them. Who needs to know asks here, and a test puts a stand-in in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a driver tells of a device."""

    model: str
    capability: str
    memory_bytes: int


class Event(Protocol):
    """What comes once a device has done what it was told before."""

    def synchronize(self) -> None:
        """Returns once it has come."""
        ...


class Copies(Protocol):
    """Copies to a device that go on beside what it computes."""

    def pinned(self, n_bytes: int) -> Tensor:
        """Bytes of the CPU's memory that the device reads by itself."""
        ...

    def empty(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device to copy into."""
        ...

    def copy(self, into: Tensor, cells: Tensor) -> None:
        """Begins a copy of pinned memory."""
        ...

    def joined(self, made: Sequence[Tensor]) -> Event:
        """Has what is computed from now on wait for the copies so far, and may use what they have `made`; comes when they end."""
        ...

    def computed(self) -> Event:
        """Comes when the device has computed all that it was told so far."""
        ...


class Accelerators(Protocol):
    """The devices of a machine beside its CPU; each has the name that torch knows it by."""

    def names(self) -> Sequence[str]: ...

    def about(self, device: str) -> About: ...

    def free_bytes(self, device: str) -> int:
        """What can still be had of a device's memory, what torch keeps for later among it."""
        ...

    def synchronize(self, device: str) -> None:
        """Returns once all is done that the device was told to do."""
        ...

    def copies(self, device: str) -> Copies: ...


class CudaCopies:
    """Copies on a stream of their own, beside the one that computes."""

    def __init__(self, device: str) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def pinned(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self.stream):  # of this stream's memory: what still computes has none of it
            return torch.empty(sizes, dtype=dtype, device=self.device)

    def copy(self, into: Tensor, cells: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            into.copy_(cells, non_blocking=True)

    def joined(self, made: Sequence[Tensor]) -> torch.cuda.Event:
        event: torch.cuda.Event = self.stream.record_event()
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(event)
        for tensor in made:
            tensor.record_stream(computing)  # its memory is not given away before that is done with it
        return event

    def computed(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event


class Cuda:
    """The CUDA devices that torch sees."""

    def __init__(self) -> None:
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self._names = tuple(f"cuda:{i}" for i in range(n))

    def names(self) -> Sequence[str]:
        return self._names

    def about(self, device: str) -> About:
        of = torch.cuda.get_device_properties(device)
        return About(model=of.name, capability=f"{of.major}.{of.minor}", memory_bytes=of.total_memory)

    def free_bytes(self, device: str) -> int:
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))

    def synchronize(self, device: str) -> None:
        torch.cuda.synchronize(device)

    def copies(self, device: str) -> Copies:
        return CudaCopies(device)


@cache
def accelerators() -> Accelerators:
    """Those of this machine."""
    return Cuda()
