"""What --explain says on stderr: who computes each variable, and what became of the cells that a gradient is by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskserve.answers import Answer, Step

TORCH = "torch"
"""Who computes what no back end has a kernel for."""
CPU = "cpu"


def of_plans(steps: tuple[Step, ...]) -> Iterator[str]:
    """A line for each variable: who computes it, and why those before in the list do not."""
    for step in steps:
        if step.plan is None or step.choice is None:
            by = (
                "passes through, it has no such dim"
                if step.passes_through
                else f"a new mask on {step.device} by {TORCH}"
            )
            yield f"{step.variable.name}: {by}"
            continue
        plan, choice = step.plan, step.choice
        refused = "; ".join(f"not {name}: {reason}" for name, reason in choice.refusals)
        what = f"{plan.row.name} of {plan.dtype.name} on {plan.device}"
        back = f", its gradient by {who_pulls_back(step)}" if step.is_gradient else ""
        yield f"{step.variable.name}: {what} by {choice.backend.name}{' (' + refused + ')' if refused else ''}{back}"


def who_pulls_back(step: Step) -> str:
    """The back end with a kernel for the gradient, where none was asked for by name that has none."""
    from maskserve.backends.pulls import launch  # it imports torch

    plan, choice = step.plan, step.choice
    is_free = choice is not None and (choice.backend.name == CPU or bool(choice.refusals))
    return CPU if plan is not None and is_free and launch(plan) is not None else TORCH


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
    return {"variables": [planned(step) for step in steps], **({"gradients": gradients} if gradients else {})}


def planned(step: Step) -> dict[str, Any]:
    plan, choice = step.plan, step.choice
    return {
        "name": step.variable.name,
        "passes_through": step.passes_through,
        "op": plan.row.name if plan else None,
        "cells": plan.dtype.name if plan else None,
        "device": step.device,
        "backend": choice.backend.name if choice else None if step.passes_through else TORCH,
        "refused": dict(choice.refusals) if choice else {},
        **({"gradient": who_pulls_back(step)} if step.is_gradient else {}),
    }
