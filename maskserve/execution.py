"""Where and how blocks run: the back end, the threads and the size of a block. Nothing here changes a bit of a result."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Generic, TypeVar

from maskserve import cgroup
from maskserve.backends import Backend, Finisher, choose
from maskserve.errors import OutOfMemoryError, SettingsError
from maskserve.health import health, is_full
from maskserve.plan import Plan

log = logging.getLogger("maskserve")
T = TypeVar("T")
SMALL = 1 << 16
"""Cells below which one block in this thread beats handing work out."""


WAITING = 64
"""Threads for requests with checkpoints, where most of them wait for their turn."""
SMALLER = (1 << 24, 1 << 20)
"""Cells of the blocks in which a device that is out of memory is tried again."""
BLOCKS_A_THREAD = 4
"""So that threads end at about the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What changes how a request runs, and never what it gives."""

    backend: str | None = None
    threads: int | None = None
    block_cells: int | None = None
    checkpoint: Callable[[], None] | None = None
    """Called before each block, in the thread that will compute it: it may wait, and what it raises ends the request."""
    tick: Callable[[int], None] | None = None
    """Where memory is bounded, hears of the bytes of each window that is read, and of what was read whole once it is computed."""


_DEFAULT = Execution()
_execution: ContextVar[Execution | None] = ContextVar("execution", default=None)


def execution() -> Execution:
    """How requests run here and now."""
    return _execution.get() or _DEFAULT


@contextmanager
def using(
    *,
    backend: str | None = None,
    threads: int | None = None,
    block_cells: int | None = None,
    checkpoint: Callable[[], None] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Iterator[None]:
    """Run what is inside with this back end (by name), threads, block size, checkpoint and tick; None leaves one as it is."""
    given: dict[str, Any] = {
        "backend": backend, "threads": threads, "block_cells": block_cells, "checkpoint": checkpoint, "tick": tick
    }  # fmt: skip
    said = {k: v for k, v in given.items() if v is not None}
    if not said:  # as every small request has it
        yield
        return
    token = _execution.set(replace(execution(), **said))
    try:
        yield
    finally:
        _execution.reset(token)


def n_threads() -> int:
    """The threads to use: `using`, else MASKSERVE_THREADS, else the CPUs that the cgroup grants."""
    asked = execution().threads
    if asked is not None:
        return asked
    word = os.environ.get("MASKSERVE_THREADS") or "0"
    if not word.isdecimal():
        raise SettingsError(f"MASKSERVE_THREADS is {word[:40]!r}; it must be a whole number, 0 for every CPU")
    return int(word) or cgroup.cpus()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="maskserve")


def in_parallel(backend: Backend, n_cells: int, tasks: list[Callable[[], None]]) -> None:
    """Run the tasks, on the shared pool where that pays; the first error is raised."""
    threads = 1 if backend.threads_inside or n_cells < SMALL else min(n_threads(), len(tasks))
    if threads <= 1:
        for task in in_turn(tasks):
            task()
        return
    left = iter(tasks)
    waiting = in_turn(left)

    def work() -> None:
        for task in waiting:
            task()

    helpers = pool(n_threads() if execution().checkpoint is None else WAITING)
    futures = [helpers.submit(work) for _ in range(threads - 1)]
    try:
        work()  # this thread too: waking another one takes longer than a small block
    finally:
        for _ in left:  # after an error nothing more is begun
            pass
        for future in futures:
            if not future.cancel():
                future.result()


class in_turn(Generic[T]):  # noqa: N801  # an iterator, as zip is
    """The blocks of a request, each after a checkpoint. Threads may share it: no generator, which one at a time can use."""

    def __init__(self, blocks: Iterable[T]) -> None:
        self._blocks = iter(blocks)
        self._checkpoint = execution().checkpoint

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._checkpoint is not None:
            self._checkpoint()
        return next(self._blocks)


def block_cells(backend: Backend, shape: tuple[int, ...]) -> int:
    """The cells of a block of a tensor of this shape: as many as the back end likes, and some blocks for each thread."""
    share = max(SMALL, prod(shape) // (BLOCKS_A_THREAD * n_threads()))
    return execution().block_cells or min(backend.block_cells, share)


def within_memory(what: str, device: str, compute: Callable[[], T]) -> T:
    """What `compute` gives; where the memory of a device does not do, in smaller and smaller blocks, which change no bit."""
    try:
        return compute()
    except RuntimeError as error:
        refuse_other(error, device)
    for cells in SMALLER:
        log.info("%s: %s is out of memory; blocks of %d cells are tried", what, device, cells)
        try:
            with using(block_cells=cells):
                return compute()
        except RuntimeError as error:
            refuse_other(error, device)
    raise OutOfMemoryError(
        f"{what}: {device} is out of memory, in blocks of {SMALLER[-1]} cells too; give device=cpu, or send less"
    )


def refuse_other(error: RuntimeError, device: str) -> None:
    """Raise what a device's error says beside that it is out of memory: that it is lost, or the error itself."""
    lost = health().heard(device, error)
    if lost is not None:
        raise lost from error
    if not is_full(error):
        raise error


def backend_of(plan: Plan) -> Backend:
    return choose(plan, execution().backend).backend


def nan_policy(plan: Plan) -> str:
    """What the engine does about a valid NaN; nothing where the back end passes over it by itself."""
    policy: str = plan.params.get("nan", "propagate")
    return "propagate" if policy == "omit" and backend_of(plan).omits_nan else policy


def finisher_of(plan: Plan) -> Finisher | None:
    """The plan's back end where it writes results itself."""
    return choose(plan, execution().backend).finisher
