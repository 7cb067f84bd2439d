"""Median times of contenders in one run, taken in turn (A B A B), after their results were compared."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import maskserve as ms
from benchmarks import peers
from benchmarks.cases import Cell, Group, fits, sample
from benchmarks.libraries import BOTTLENECK, TORCH_MASKED, Call
from benchmarks.peers import BOUNDS, COPY, OURS, READ
from maskserve.dtypes import DType
from maskserve.plan import SlicedRow

TICK_S = 2e-4
"""A timed stretch is at least this long: a call of a few microseconds is repeated inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure: rounds of all contenders, each of them until it had its budget.

    A contender whose first call took `once_s` is not called again: that call is its time. `among` are the peers that
    take part, None all.
    """

    rounds: int
    budget_s: float
    once_s: float = math.inf
    among: tuple[str, ...] | None = None


QUICK = Effort(rounds=7, budget_s=0.05, once_s=0.2)
FULL = Effort(rounds=7, budget_s=0.5, once_s=1.0)
LARGE = Effort(rounds=5, budget_s=0.25, once_s=0.25, among=(peers.PLAIN, TORCH_MASKED, BOTTLENECK))
LEAST = Effort(rounds=1, budget_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One op on one cell: median seconds by contender; peers that give another result; peers that failed, and why."""

    row: SlicedRow
    cell: Cell
    seconds: Mapping[str, float]
    agreeing: tuple[str, ...]
    differing: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_wrong(self) -> bool:
        """Whether every peer that has the op disagrees: then nothing was timed."""
        return not self.agreeing and bool(self.differing)

    def ratio(self, slower: str, faster: str) -> float | None:
        """The time of one over the time of the other; None where either is missing."""
        if slower not in self.seconds or faster not in self.seconds:
            return None
        return self.seconds[slower] / self.seconds[faster]

    @property
    def reads(self) -> float | None:
        """Our time in reads of the same bytes."""
        return self.ratio(OURS, READ)

    @property
    def copies(self) -> float | None:
        """Our time in copies of the same bytes into fresh memory."""
        return self.ratio(OURS, COPY)

    def lead(self, peer: str) -> float | None:
        """How many times faster than `peer` we are."""
        return self.ratio(peer, OURS)


def measure(row: SlicedRow, cell: Cell, effort: Effort, *, is_small: bool = False) -> Timing:
    """Results compared, then times taken; a contender that fails is left out and named."""
    drawn = sample(row, cell)
    calls = peers.contenders(row, cell, drawn, among=effort.among)
    with quiet():
        results, first, failed = attempt(calls)
        for bound in BOUNDS:
            results.pop(bound, None)
        if OURS in failed:
            raise RuntimeError(f"maskserve cannot compute {row.name} of {cell}: {failed[OURS]}")
        ours = results.pop(OURS)
        agreeing = tuple(name for name, theirs in results.items() if agrees(ours, theirs, cell.dtype))
        differing = tuple(name for name in results if name not in agreeing)
        timed = {name: call for name, call in calls.items() if name not in failed}
        if is_small and (bare := peers.unmasked(row, cell, drawn)):
            timed[peers.UNMASKED] = bare
        wrong = not agreeing and bool(differing)
        seconds = {} if wrong else interleaved(timed, first, effort)
    return Timing(row=row, cell=cell, seconds=seconds, agreeing=agreeing, differing=differing, failed=failed)


def measure_group(group: Group, among: tuple[SlicedRow, ...], effort: Effort) -> Iterator[Timing]:
    """Cell by cell, so that each sample is made once."""
    for cell in group.cells:
        yield from (measure(row, cell, effort, is_small=group.is_small) for row in among if fits(row, cell))


def attempt(calls: Mapping[str, Call]) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """Results by name, the seconds they took, and for calls that raise the error: peers do not take every dtype."""
    results, seconds, failed = {}, {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            results[name] = call()
            seconds[name] = time.perf_counter() - start
        except Exception as error:  # whatever a peer raises
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    return results, seconds, failed


def interleaved(calls: Mapping[str, Call], first: Mapping[str, float], effort: Effort) -> dict[str, float]:
    """Median seconds of each call over rounds in which each has its turn; `first` holds the seconds of first calls."""
    slow = {name: first[name] for name in calls if first.get(name, 0) > effort.once_s}
    calls = {name: call for name, call in calls.items() if name not in slow}
    repeats = {name: repeats_of(call, first.get(name, 0.0)) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(effort.rounds):
        for name, call in calls.items():
            if not taken[name] or sum(taken[name]) * repeats[name] < effort.budget_s:
                taken[name].append(stretch(call, repeats[name]))
    return {name: median(times) for name, times in taken.items()} | slow


def repeats_of(call: Call, first_s: float) -> int:
    """How many calls fill a stretch; a first call, which warms caches, tells only that one is enough."""
    return 1 if first_s > 10 * TICK_S else max(1, math.ceil(TICK_S / stretch(call, 1)))


def stretch(call: Call, repeats: int) -> float:
    """Seconds a call, over `repeats` of them."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection and no warnings while peers run: both belong to them, and take time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if was_enabled:
            gc.enable()


# -- agreement ----------------------------------------------------------------------------------------------------

RTOL = {"f64": 1e-9, "f32": 1e-4, "f16": 5e-3, "bf16": 4e-2}
"""Wide enough for a peer's own rounding over 67 million cells: this finds wrong answers, not lost digits."""


def agrees(ours: ms.MaskedTensor | tuple[ms.MaskedTensor, ...], theirs: Any, dtype: DType) -> bool:
    """Whether a peer's values are ours where ours are valid and, where it tells, valid in the same cells.

    Of (values, indices) the values are compared: among equal cells torch is free to point at any.
    """
    ours = ours[0] if isinstance(ours, tuple) else ours
    values, valid = parts(theirs)
    our_values, our_valid = ours.get_data().double(), ours.get_mask()
    if tuple(values.shape) != tuple(our_values.shape):
        return False
    if valid is not None and not torch.equal(valid.expand(our_valid.shape), our_valid):
        return False
    rtol = RTOL.get(dtype.name, RTOL["f64"])
    return torch.allclose(values.double()[our_valid], our_values[our_valid], rtol=rtol, atol=rtol, equal_nan=True)


def parts(result: Any) -> tuple[Tensor, Tensor | None]:
    """(values, valid) of a peer's result; valid None where it does not tell."""
    if isinstance(result, tuple) and type(result) is tuple:
        return result
    if isinstance(result, Tensor):
        return result, None
    if result is np.ma.masked:
        return torch.zeros(()), torch.zeros((), dtype=torch.bool)
    if isinstance(result, np.ma.MaskedArray):
        valid = ~np.ma.getmaskarray(result)
        return torch.as_tensor(result.filled(0)), torch.as_tensor(valid)
    return torch.as_tensor(np.asarray(result)), None


# -- processes ----------------------------------------------------------------------------------------------------

BASE, REDUCE = "python -c 'import torch'", "maskserve reduce"
BEST_OF = 5


def command_lines(path: Path) -> dict[str, list[str]]:
    """What is started, by name: the commands that must not wait for torch, and one that computes."""
    program = str(Path(sys.executable).with_name("maskserve"))
    return {
        BASE: [sys.executable, "-c", "import torch"],
        "maskserve --help": [program, "--help"],
        "maskserve info": [program, "info", str(path)],
        "maskserve validate": [program, "validate", str(path)],
        "maskserve ops": [program, "ops"],
        REDUCE: [program, "reduce", "--op", "mean", "--dim", "week", str(path)],
    }


def start_times(commands: Mapping[str, list[str]], best_of: int = BEST_OF) -> dict[str, float | None]:
    """The best seconds of each command, in turn; None where it is not installed or fails."""
    best: dict[str, float | None] = dict.fromkeys(commands)
    for _ in range(best_of):
        for name, command in commands.items():
            seconds = finished(command)
            if seconds is not None:
                best[name] = min(seconds, best[name] or math.inf)
    return best


def finished(command: list[str]) -> float | None:
    """Seconds that `command` takes; None where it is not there or its exit status is not 0."""
    start = time.perf_counter()
    try:
        status = subprocess.run(command, capture_output=True).returncode
    except OSError:
        return None
    return time.perf_counter() - start if status == 0 else None
