"""What speed is aimed at, as ratios in one run, and which aims a run misses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.peers import OURS, PEERS, UNMASKED
from benchmarks.timing import BASE, Timing
from maskserve.dtypes import f64

OVERHEAD_S = 10e-6
START_S = 0.3
REDUCE_STARTS = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """At most `reads` times one read of the bytes, and at least `lead` times as fast as torch.masked."""

    ops: tuple[str, ...]
    reads: float
    reads_avx2: float | None = None
    lead: float | None = None
    applies: Callable[[Timing], bool] = lambda timing: timing.cell.dtype is not f64

    def limit(self, isa: str) -> float:
        return self.reads if self.reads_avx2 is None or isa == "avx512" else self.reads_avx2


TARGETS = (
    Target(ops=("sum", "mean", "amin", "amax", "argmin", "argmax"), reads=1.5, lead=15),
    Target(ops=("count", "any", "all"), reads=1.5, applies=lambda _: True),
    Target(ops=("var", "std", "norm", "prod"), reads=2.5, lead=10, applies=lambda _: True),
    Target(ops=("sum", "mean"), reads=2.5, lead=10, applies=lambda timing: timing.cell.dtype is f64),
    Target(ops=("softmax", "log_softmax"), reads=2.5, reads_avx2=4, lead=5),
    Target(ops=("logsumexp",), reads=3.5, reads_avx2=6, lead=5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """An aim that some cells miss: the worst of them, and how many there are."""

    aim: str
    worst: str
    figure: str
    n_missed: int
    n_cells: int


def misses(large: Iterable[Timing], small: Iterable[Timing], isa: str) -> Iterator[Miss]:
    """Every aim that is missed, by op, with today's worst figure."""
    large, small = list(large), list(small)
    for target in TARGETS:
        for op in target.ops:
            cells = [t for t in large if t.row.name == op and target.applies(t)]
            limit = target.limit(isa)
            yield from missed(f"{op}: at most {limit:g} x one read", cells, lambda t: t.reads, at_most=limit)
            if target.lead:
                aim = f"{op}: {target.lead:g} x faster than torch.masked"
                yield from missed(aim, cells, lambda t: t.lead("torch.masked"), at_least=target.lead)
    for op in dict.fromkeys(t.row.name for t in large):
        cells = [t for t in large if t.row.name == op]
        yield from missed(f"{op}: no peer faster", cells, lambda t: fastest_peer(t)[1], at_least=1)
    for op in dict.fromkeys(t.row.name for t in small):
        cells = [t for t in small if t.row.name == op]
        aim = f"{op}: at most {OVERHEAD_S * 1e6:g} us over torch on 1,000 cells"
        yield from missed(aim, cells, overhead_s, at_most=OVERHEAD_S, unit="us")


def missed(
    aim: str,
    cells: list[Timing],
    figure: Callable[[Timing], float | None],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    unit: str = "x",
) -> Iterator[Miss]:
    """The miss of one aim, if any cell misses it."""
    found = [(value, timing) for timing in cells if (value := figure(timing)) is not None]
    below = [pair for pair in found if at_least is not None and pair[0] < at_least]
    above = [pair for pair in found if at_most is not None and pair[0] > at_most]
    if not below and not above:
        return
    value, timing = min(below, key=lambda p: p[0]) if below else max(above, key=lambda p: p[0])
    text = f"{value * 1e6:.0f} us" if unit == "us" else f"{value:.2g} x" if value < 10 else f"{value:.0f} x"
    yield Miss(aim=aim, worst=timing.cell.label, figure=text, n_missed=len(below or above), n_cells=len(found))


def fastest_peer(timing: Timing) -> tuple[str, float | None]:
    """The fastest peer that gives our result, and how many times faster we are."""
    leads = {name: lead for name in PEERS if name in timing.agreeing and (lead := timing.lead(name)) is not None}
    if not leads:
        return "", None
    name = min(leads, key=lambda peer: leads[peer])
    return name, leads[name]


def overhead_s(timing: Timing) -> float | None:
    """Seconds over torch's own op without a mask."""
    if UNMASKED not in timing.seconds or OURS not in timing.seconds:
        return None
    return timing.seconds[OURS] - timing.seconds[UNMASKED]


def start_misses(starts: Mapping[str, float | None]) -> Iterator[Miss]:
    """The aims for processes: those that need no torch within 0.3 s, a small reduce within 1.15 x of torch's import."""
    for name, seconds in starts.items():
        if seconds is None or name == BASE:
            continue
        base = starts[BASE]
        if name == "maskserve reduce":
            if base is not None and seconds > REDUCE_STARTS * base:
                aim, figure = f"{name}: at most {REDUCE_STARTS:g} x {BASE}", f"{seconds / base:.2f} x"
                yield Miss(aim=aim, worst="start", figure=figure, n_missed=1, n_cells=1)
        elif seconds > START_S:
            aim = f"{name}: under {START_S:g} s"
            yield Miss(aim=aim, worst="start", figure=f"{seconds:.2f} s", n_missed=1, n_cells=1)
