"""HOW ops are computed: back ends in order of preference, each stating its limits as data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskserve.compact import Compact, Mask, Part
from maskserve.errors import BackendError, nearest
from maskserve.plan import Plan

if TYPE_CHECKING:
    from maskserve.blockwise import Cells, Op

Parts = dict[str, Tensor]
log = logging.getLogger("maskserve")


class Backend(Protocol):
    """A way to lift blocks. `why_not` may look at the row, params, dtype and device alone: never at size or strides."""

    name: str
    block_cells: int
    threads_inside: bool
    widths_held: int
    """How many times the bytes of a request's cells it may hold at once while it computes."""
    omits_nan: bool
    """Whether it passes over a NaN by itself where nan="omit"; else the engine masks it."""
    reads_compact: bool
    """Whether it reads the lengths and bits of compact masks; else the engine spreads them out, a block at a time."""

    def why_not(self, plan: Plan) -> str | None: ...

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, weights: Tensor | None = None) -> Parts: ...

    def merge(self, plan: Plan) -> Callable[[Parts, Parts], Parts]: ...


class Search(Protocol):
    """A selection from a few long slices side by side, in rounds: sample all blocks, bracket, sift all blocks, settle."""

    def sample(self, data: Tensor, mask: Tensor | Part | None, n_cells: int, seed: int) -> None: ...

    def bracket(self) -> None: ...

    def sift(self, data: Tensor, mask: Tensor | Part | None) -> None: ...

    def settle(self) -> bool: ...

    def results(self) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class Finisher(Backend, Protocol):
    """A back end that also writes results: whole slices of normalizations, scans and selections, and finished states.

    Its `finish` means what the engine's own does, and gives the same bits. A scan that picks gives the cells, and their
    places too where `places` is there for them. A normalization fills parts of slices too, given the slices' states.
    """

    runs_whole: bool
    """Whether `run` is the way at any size; else blocks of what is not small go to all threads."""

    def takes_cells(self, plan: Plan) -> bool: ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor: ...

    def run(
        self, plan: Plan, data: Tensor, mask: Mask | None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None: ...

    def reduce(self, plan: Plan, data: Tensor, mask: Tensor | Part | None, values: Tensor, valid: Tensor) -> bool: ...

    def fill(
        self,
        plan: Plan,
        data: Tensor,
        mask: Tensor | Part | None,
        values: Tensor,
        valid: Tensor | None,
        places: Tensor | None = None,
        states: Parts | None = None,
    ) -> str: ...

    def finish(self, plan: Plan, parts: Parts) -> tuple[Tensor, Tensor] | None: ...


@runtime_checkable
class Selector(Finisher, Protocol):
    """A finisher that also selects from whole slices: medians and their like."""

    def select(self, plan: Plan, data: Tensor, mask: Tensor | Part | None) -> tuple[Tensor, Tensor]: ...

    def search(self, plan: Plan, lanes: int) -> Search | None: ...


@runtime_checkable
class Spreader(Backend, Protocol):
    """A back end that spreads stored cells out by itself, a block at a time, and lifts them where they then lie."""

    def lift_stored(
        self,
        plan: Plan,
        size: Sequence[int],
        positions: Tensor,
        cells: Tensor,
        mask: Tensor | None,
        blocks: range,
        parts: Parts,
    ) -> None: ...


@runtime_checkable
class Puller(Backend, Protocol):
    """A back end that also computes gradients, of whole tensors; False: the reference's formula is needed."""

    def pulls(self, plan: Plan) -> bool: ...

    def pull(
        self,
        plan: Plan,
        data: Tensor,
        mask: Mask | None,
        values: Tensor,
        g: Tensor,
        gate: Tensor,
        gradient: Tensor,
        reach: Tensor | None,
    ) -> bool: ...


@runtime_checkable
class Fuser(Backend, Protocol):
    """A back end that computes adjacent elementwise ops at once, with the bits of torch, on tensors of one device."""

    def computes_on(self, device: str, name: str | None) -> bool: ...

    def why_not_fused(self, ops: Sequence[Op]) -> str | None: ...

    def fused(
        self, ops: Sequence[Op], leaves: Sequence[Cells], shape: tuple[int, ...], kept: Compact | None
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FuserChoice:
    """Who computes a tree of elementwise ops on a device; None: torch, op by op, because of the refusals."""

    fuser: Fuser | None
    refusals: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The back end of a plan, and why each one before it was not chosen."""

    backend: Backend
    refusals: tuple[tuple[str, str], ...]
    finisher: Finisher | None
    """The back end again, where it writes results itself."""


@cache
def backends() -> tuple[Backend, ...]:
    from maskserve.backends.cpu import CpuBackend
    from maskserve.backends.reference import ReferenceBackend
    from maskserve.backends.triton import TritonBackend

    return (CpuBackend(), TritonBackend(), ReferenceBackend())


@cache
def say_once(name: str, reason: str) -> None:
    """A fall-back is slower, not wrong; it is said once."""
    log.info("back end %s is passed over: %s", name, reason)


def refuse_unknown(name: str | None) -> None:
    """Raise where no back end has this name."""
    known = [backend.name for backend in backends()]
    if name is not None and name not in known:
        raise BackendError(
            f"back end {name!r} is not known: give one of {', '.join(known)}{nearest(name, known)}",
            parameter="backend",
            allowed=known,
        )


@lru_cache(maxsize=1024)
def choose(plan: Plan, name: str | None = None) -> Choice:
    """The first back end that serves the plan, or the one asked for by name, which must."""
    refusals: list[tuple[str, str]] = []
    refuse_unknown(name)
    for backend in backends():
        if name is not None and backend.name != name:
            continue
        reason = backend.why_not(plan)
        if reason is None:
            finisher = backend if isinstance(backend, Finisher) else None
            return Choice(backend=backend, refusals=tuple(refusals), finisher=finisher)
        refusals.append((backend.name, reason))
        say_once(backend.name, reason)
    raise BackendError(f"back end {name} cannot serve {plan.row.name}: {refusals[0][1]}", parameter="backend")


def choose_fuser(ops: Sequence[Op], device: str, name: str | None = None) -> FuserChoice:
    """The first back end that computes on the device and serves the ops. One asked for by name must be it to be used.

    A device of torch's alone needs none, nor do the CPU's blocks: only who computes there refuses.
    """
    refusals: list[tuple[str, str]] = []
    for backend in backends():
        if not isinstance(backend, Fuser) or name not in (None, backend.name) or not backend.computes_on(device, name):
            continue
        reason = backend.why_not_fused(ops)
        if reason is None:
            return FuserChoice(fuser=backend)
        refusals.append((backend.name, reason))
        say_once(backend.name, reason)
    return FuserChoice(fuser=None, refusals=tuple(refusals))
