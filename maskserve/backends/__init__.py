"""HOW ops are computed: back ends in order of preference, each stating its limits as data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from torch import Tensor

from maskserve.errors import BackendError, nearest
from maskserve.plan import Plan

Parts = dict[str, Tensor]
log = logging.getLogger("maskserve")


class Backend(Protocol):
    """A way to lift blocks. `why_not` may look at the row, params, dtype and device alone: never at size or strides."""

    name: str
    block_cells: int
    threads_inside: bool

    def why_not(self, plan: Plan) -> str | None: ...

    def lift(self, plan: Plan, data: Tensor, mask: Tensor | None) -> Parts: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The back end of a plan, and why each one before it was not chosen."""

    backend: Backend
    refusals: tuple[tuple[str, str], ...]


@cache
def backends() -> tuple[Backend, ...]:
    from maskserve.backends.cpu import CpuBackend
    from maskserve.backends.reference import ReferenceBackend

    return (CpuBackend(), ReferenceBackend())


def choose(plan: Plan, name: str | None = None) -> Choice:
    """The first back end that serves the plan, or the one asked for by name, which must."""
    refusals: list[tuple[str, str]] = []
    known = [backend.name for backend in backends()]
    if name is not None and name not in known:
        raise BackendError(
            f"back end {name!r} is not known: give one of {', '.join(known)}{nearest(name, known)}",
            parameter="backend",
            allowed=known,
        )
    for backend in backends():
        if name is not None and backend.name != name:
            continue
        reason = backend.why_not(plan)
        if reason is None:
            return Choice(backend=backend, refusals=tuple(refusals))
        refusals.append((backend.name, reason))
    raise BackendError(f"back end {name} cannot serve {plan.row.name}: {refusals[0][1]}", parameter="backend")
