"""What speed is aimed at, as ratios in one run, and which aims a run misses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.libraries import TORCH_MASKED
from benchmarks.peers import OURS, PEERS, UNMASKED
from benchmarks.timing import BASE, REDUCE, Timing
from maskserve.dtypes import f64

OVERHEAD_US = 10
START_S = 0.3
REDUCE_STARTS = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """At most `reads` times one read of the bytes, and at least `lead` times as fast as torch.masked."""

    title: str
    ops: tuple[str, ...]
    reads: float
    reads_avx2: float | None = None
    lead: float | None = None
    applies: Callable[[Timing], bool] = lambda timing: timing.cell.dtype is not f64

    def limit(self, isa: str) -> float:
        return self.reads if self.reads_avx2 is None or isa == "avx512" else self.reads_avx2


TARGETS = (
    Target(title="sum to argmax", ops=("sum", "mean", "amin", "amax", "argmin", "argmax"), reads=1.5, lead=15),
    Target(title="count, any, all", ops=("count", "any", "all"), reads=1.5, applies=lambda _: True),
    Target(
        title="var, std, norm, prod", ops=("var", "std", "norm", "prod"), reads=2.5, lead=10, applies=lambda _: True
    ),
    Target(
        title="sum, mean of f64",
        ops=("sum", "mean"),
        reads=2.5,
        lead=10,
        applies=lambda timing: timing.cell.dtype is f64,
    ),
    Target(title="softmax, log_softmax", ops=("softmax", "log_softmax"), reads=2.5, reads_avx2=4, lead=5),
    Target(title="logsumexp", ops=("logsumexp",), reads=3.5, reads_avx2=6, lead=5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """An aim that some cells miss: the ops they are of, and the worst of them."""

    aim: str
    ops: tuple[str, ...]
    worst: str
    where: str
    n_missed: int
    n_cells: int


def misses(large: Sequence[Timing], small: Sequence[Timing], isa: str) -> Iterator[Miss]:
    """Every aim that is missed, with today's worst figure."""
    for target in TARGETS:
        cells = [t for t in large if t.row.name in target.ops and target.applies(t)]
        limit = target.limit(isa)
        yield from missed(f"{target.title}: at most {limit:g} x one read", cells, lambda t: t.reads, at_most=limit)
        if target.lead:
            aim = f"{target.title}: {target.lead:g} x faster than torch.masked"
            with_mask = [t for t in cells if t.cell.mask != "none"]  # without one it is torch's own op
            yield from missed(aim, with_mask, lambda t: t.lead(TORCH_MASKED), at_least=target.lead)
    yield from missed("no peer faster", large, lambda t: fastest_peer(t)[1], at_least=1)
    aim = f"at most {OVERHEAD_US:g} us over torch on 1,000 cells"
    yield from missed(aim, small, overhead_us, at_most=OVERHEAD_US, unit="us")


def missed(
    aim: str,
    cells: Iterable[Timing],
    figure: Callable[[Timing], float | None],
    *,
    at_most: float = math.inf,
    at_least: float = 0,
    unit: str = "x",
) -> Iterator[Miss]:
    """The miss of one aim, if any cell misses it."""
    found = [(value, timing) for timing in cells if (value := figure(timing)) is not None]
    beyond = [pair for pair in found if not at_least <= pair[0] <= at_most]
    if beyond:
        value, timing = max(beyond, key=lambda p: p[0] if at_least == 0 else -p[0])
        yield Miss(
            aim=aim,
            ops=tuple(dict.fromkeys(t.row.name for _, t in beyond)),
            worst=f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}",
            where=f"{timing.row.name}, {timing.cell.label}",
            n_missed=len(beyond),
            n_cells=len(found),
        )


def fastest_peer(timing: Timing) -> tuple[str, float | None]:
    """The fastest peer that gives our result, and how many times faster we are."""
    leads = {name: lead for name in PEERS if name in timing.agreeing and (lead := timing.lead(name)) is not None}
    if not leads:
        return "", None
    name = min(leads, key=lambda peer: leads[peer])
    return name, leads[name]


def overhead_us(timing: Timing) -> float | None:
    """Microseconds over torch's own op without a mask; less than nothing counts as nothing."""
    if UNMASKED not in timing.seconds or OURS not in timing.seconds:
        return None
    return max(0.0, timing.seconds[OURS] - timing.seconds[UNMASKED]) * 1e6


def start_misses(starts: Mapping[str, float | None]) -> Iterator[Miss]:
    """The aims for processes: those that need no torch within 0.3 s, a small reduce within 1.15 x of torch's import."""
    base = starts.get(BASE)
    late = {name: s for name, s in starts.items() if s is not None and name not in (BASE, REDUCE) and s > START_S}
    if late:
        where = max(late, key=lambda name: late[name])
        n = len([name for name in starts if name not in (BASE, REDUCE)])
        yield start_miss(f"commands without torch: under {START_S:g} s", f"{late[where]:.2f} s", where, len(late), n)
    seconds = starts.get(REDUCE)
    if seconds is not None and base is not None and seconds > REDUCE_STARTS * base:
        yield start_miss(f"{REDUCE}: at most {REDUCE_STARTS:g} x {BASE}", f"{seconds / base:.2f} x", REDUCE, 1, 1)


def start_miss(aim: str, worst: str, where: str, n_missed: int, n_cells: int) -> Miss:
    return Miss(aim=aim, ops=(), worst=worst, where=where, n_missed=n_missed, n_cells=n_cells)
