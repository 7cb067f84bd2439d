"""What --explain says on stderr: who computes each variable, and what became of the cells that a gradient is by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskserve.answers import Answer
    from maskserve.steps import Step, Work


def of_plans(steps: tuple[Step, ...]) -> Iterator[str]:
    """A line for each op of a step: who computes it, and why those before in the list do not."""
    from maskserve.admission import why_not_whole  # with torch, which is there where steps are

    for step in steps:
        if step.passes_through:
            yield f"{step.name}: passes through, it has no such dim"
        for work in step.works:
            refused = "; ".join(f"not {name}: {reason}" for name, reason in work.refused.items())
            back = f", its gradient by {work.gradient}" if work.gradient else ""
            what = f"{work.op} of {work.cells.name} on {step.device}"
            yield f"{step.name}: {what} by {work.backend}{' (' + refused + ')' if refused else ''}{back}"
        if (why := why_not_whole(step)) is not None:
            yield f"{step.name}: not as a whole: {why}"


def of_gradients(answer: Answer) -> Iterator[str]:
    """A line for each gradient: what became of the cells."""
    for result in answer.results:
        if result.gradient is not None:
            n, tally = result.data.numel(), result.gradient.tally
            yield (
                f"{result.name}: {n} cells: {tally.nonzero} not 0, {tally.zero} are 0, {tally.masked} masked as in the input, "
                f"{tally.unreached} masked because no path reached them"
            )


def record(steps: tuple[Step, ...], answer: Answer | None) -> dict[str, Any]:
    """The same as data; a dry run has no answer."""
    gradients = {} if answer is None else {r.name: asdict(r.gradient.tally) for r in answer.results if r.gradient}
    told = [planned(step, work) for step in steps for work in step.works or (None,)]
    return {"variables": told, **({"gradients": gradients} if gradients else {})}


def planned(step: Step, work: Work | None) -> dict[str, Any]:
    from maskserve.admission import why_not_whole

    why = why_not_whole(step)
    return {
        "name": step.name,
        "passes_through": step.passes_through,
        "op": work.op if work else None,
        "cells": work.cells.name if work else None,
        "device": step.device,
        "backend": work.backend if work else None,
        "refused": dict(work.refused) if work else {},
        **({"not_as_a_whole": why} if why else {}),
        **({"gradient": work.gradient} if work and work.gradient else {}),
    }
