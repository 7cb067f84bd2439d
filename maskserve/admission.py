"""A step on its device: at once what fits into its memory, in parts what does not; then an error, and a device that still works.

What a step gives comes back into the CPU's memory here, so that what a device says late is still heard in its step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import inf

from maskserve.accelerators import CPU, accelerators
from maskserve.errors import OutOfMemoryError
from maskserve.execution import execution
from maskserve.health import health, is_full
from maskserve.payload.format import Payload
from maskserve.payload.variables import Variables
from maskserve.regions import Piece
from maskserve.requests import Request
from maskserve.room import megabytes
from maskserve.steps import Result, Step, Streamed

log = logging.getLogger("maskserve")
Given = list[Result | Streamed]
Whole = Callable[[], Given]
InParts = Callable[[int], Iterator[Result | Streamed]]
SHARES = (2, 8, 32)
"""The parts of a device's free memory in which a step is tried, one after the other, that it has not as a whole."""
LEAST_ROOM = 1 << 17
"""Bytes below which parts cost more in calls than anybody waits for: a room of none was a call for each cell."""


def given(step: Step, request: Request, payload: Payload, variables: Variables, memory: int | None) -> Given:
    """What a step gives, streamed where the CPU's `memory` does not hold it."""
    whole = partial(at_once, step, request, payload, variables)
    in_parts = partial(step.streamed, request, payload, variables)
    if step.device == CPU:
        return whole() if memory is None or not step.is_streamed(memory) else [*in_parts(memory)]
    with health().watching(step.device):
        return on_its_device(step, whole, in_parts, memory)


def at_once(step: Step, request: Request, payload: Payload, variables: Variables) -> Given:
    """What a step gives, all in memory."""
    made: Given = [*step.results(request, payload, variables)]
    tick = execution().tick
    if tick is not None:  # what is streamed tells of itself, window by window
        tick(step.bytes_read)
    return made


def on_its_device(step: Step, whole: Whole, in_parts: InParts, memory: int | None) -> Given:
    """The same on a device beside the CPU, in as much of its memory as there is."""
    free, is_held = accelerators().free_bytes(step.device), memory is None or step.holds(memory)
    for room in rooms(step, free, memory):
        try:
            made = whole() if room is None else in_parts(room)
            return [at_home(step, one, is_held=is_held) for one in made]
        except Exception as error:
            if not is_full(error):
                raise
            log.info("%s: %s is out of memory; less of it is tried", step.name, step.device)
    raise full(step, free)


def rooms(step: Step, free: int, memory: int | None) -> Iterator[int | None]:
    """The bytes in which a step is tried on its device, one after the other; None: as a whole. Little room, no try."""
    bound = inf if memory is None else memory
    if step.bytes_in_memory <= min(free, bound):
        yield None
    if step.is_held:
        return
    for share in SHARES:
        room = int(min(free // share, bound))
        if room >= (LEAST_ROOM if step.need is None else step.need.memory):
            yield room


def why_not_whole(step: Step) -> str | None:
    """Why a step is not computed on its device as a whole, where it is told now; None where it is."""
    if step.device == CPU:
        return None
    free = accelerators().free_bytes(step.device)
    if step.bytes_in_memory <= free:
        return None
    takes = f"it takes {megabytes(step.bytes_in_memory)} MB, and {step.device} has {free // 10**6} MB free"
    return f"{takes}: " + ("refused" if next(rooms(step, free, None), None) is None else "computed in parts")


def full(step: Step, free: int) -> OutOfMemoryError:
    """The error of a step that its device has no room for."""
    kind = "as a whole" if step.is_held else "as a whole or in parts"
    return OutOfMemoryError(
        f"{step.name} takes {megabytes(step.bytes_in_memory)} MB of {step.device}, where {free // 10**6} MB are free, and is not "
        f"computed there {kind}; give device=cpu, or send less"
    )


def at_home(step: Step, made: Result | Streamed, *, is_held: bool) -> Result | Streamed:
    """A result of a device in the CPU's memory, or one that comes there as it is written."""
    if isinstance(made, Result):
        return made.at_home()
    streamed = replace(made, pieces=coming(step, made.pieces))
    return streamed.in_memory() if is_held else streamed


def coming(step: Step, pieces: Callable[[], Iterator[Piece]]) -> Callable[[], Iterator[Piece]]:
    """The pieces of a result as a device gives them, in the CPU's memory."""

    def at_home() -> Iterator[Piece]:
        with health().watching(step.device):
            try:
                for piece in pieces():
                    yield replace(piece, values=piece.values.cpu(), mask=piece.mask.cpu())
            except Exception as error:
                if not is_full(error):
                    raise
                raise full(step, accelerators().free_bytes(step.device)) from error

    return at_home
