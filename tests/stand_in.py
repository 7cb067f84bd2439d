"""Devices for tests where there is none: torch computes for them on the CPU, and all else takes them for devices of their own.

Their names are cpu:0, cpu:1 and so on, which torch takes for the CPU. Memory, loss and copies are what a test says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from maskserve import accelerators, uploads
from maskserve.accelerators import About
from maskserve.health import health

ASSERT = "CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA to enable device-side assertions."


@dataclass
class LateCopies:
    """Copies that are in flight until somebody waits for them; what is written over before that is an error."""

    room: int = 10**12
    """Bytes that one tensor may take."""
    flying: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Pinned memory that is read, and what it must hold until it is."""
    log: list[str] = field(default_factory=list)
    n_pinned: int = 0

    def pinned(self, n_bytes: int) -> Tensor:
        self.n_pinned += 1
        return torch.full((n_bytes,), 255, dtype=torch.uint8)

    def empty(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(sizes, dtype=dtype)
        if made.nbytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return made

    def copy(self, into: Tensor, cells: Tensor) -> None:
        self.check()
        self.log.append("copy")
        raw = cells.reshape(-1).view(torch.uint8)
        self.flying.append((raw, raw.clone()))
        into.copy_(cells)  # what waits for it on the device has it in time

    def joined(self, made: Sequence[Tensor]) -> Late:
        self.log.append("joined")
        return Late(self, "copied", len(self.flying), [raw for raw, _ in self.flying])

    def computed(self) -> Late:
        self.log.append("computed")
        return Late(self, "computed", 0, [])

    def check(self) -> None:
        for raw, held in self.flying:
            assert torch.equal(raw, held), "a buffer was written before its copy was done"


@dataclass
class Late:
    """The end of what was in flight when it was made."""

    of: LateCopies
    what: str
    n: int
    ended: list[Tensor]

    def synchronize(self) -> None:
        self.of.check()
        self.of.log.append(f"waited until {self.what}")
        self.of.flying = [pair for pair in self.of.flying if not any(pair[0] is raw for raw in self.ended)]


class StandIn:
    """Some devices, each with so many free bytes."""

    def __init__(self, n: int = 1, free: int = 10**12, room: int = 10**12) -> None:
        self.free = {f"cpu:{i}": free for i in range(n)}
        self.copies_of = {name: LateCopies(room) for name in self.free}

    def names(self) -> Sequence[str]:
        return tuple(self.free)

    def about(self, device: str) -> About:
        return About(model="a stand-in", capability="9.0", memory_bytes=10**12)

    def free_bytes(self, device: str) -> int:
        return self.free[device]

    def synchronize(self, device: str) -> None:
        return

    def copies(self, device: str) -> LateCopies:
        return self.copies_of[device]


@contextmanager
def standing_in(monkeypatch: pytest.MonkeyPatch, devices: StandIn) -> Iterator[StandIn]:
    """Inside, this process has these devices, none of which was lost before."""

    def forget() -> None:
        accelerators.accelerators.cache_clear()
        health.cache_clear()
        uploads._local.__dict__.clear()

    with monkeypatch.context() as patched:
        patched.setattr(accelerators, "Cuda", lambda: devices)
        forget()
        try:
            yield devices
        finally:
            forget()
