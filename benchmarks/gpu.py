"""python -m benchmarks.gpu: the Triton kernels on a CUDA device, as shares of the bandwidth of a copy within its memory.

Needs a CUDA device and triton. `--write` puts the table into docs/performance.md; nothing is estimated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median

import torch

from benchmarks.report import PAGE, rewrite
from maskserve import devices, dtypes, engine
from maskserve.backends import choose
from maskserve.backends.triton_plans import stages_of
from maskserve.dtypes import DType
from maskserve.errors import DeviceError
from maskserve.loading import device_of
from maskserve.ops.rows import Reduction
from maskserve.plan import Plan

TARGET = 0.85
"""The share of a copy's bandwidth that is aimed at."""
SHAPES = (((8192, 8192), 1), ((8192, 8192), 0), ((64, 1024, 1024), 1), ((1 << 26,), 0), ((1 << 22, 16), 1))
DTYPES = (dtypes.f32, dtypes.bf16, dtypes.f64, dtypes.i32)
ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """An op on cells of a shape: what it has to move, and how long that took."""

    of: Plan
    backend: str
    launches: int
    n_bytes: int
    seconds: float


def least_bytes(of: Plan) -> int:
    """Cells and mask read once, results and their mask written once."""
    reads = of.stored.n_bytes if not of.passes or of.passes[0].reads_cells else 0
    return prod(of.shape) * (reads + 1) + prod(of.out_shape) * (of.result.n_bytes + 1)


def plans(device: str, wanted: Sequence[str]) -> Iterator[Plan]:
    """Every op that the kernels serve, on every shape and dtype."""
    for dtype in DTYPES:
        for shape, dim in SHAPES:
            for of in devices.plans(dtype, shape, (dim,), device):
                if (not wanted or of.row.name in wanted) and choose(of).backend.name == "triton":
                    yield of


def seconds(call: Callable[[], object]) -> float:
    """The median of some runs, by the device's own clock."""
    call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(median(times))


def timed(of: Plan) -> Timed:
    cells = sample(of.stored, of.shape, of.device)
    mask = torch.rand(of.shape, device=of.device) < 0.7
    return Timed(
        of=of,
        backend=choose(of).backend.name,
        launches=len(stages_of(of.fold, of.leaf)) if isinstance(of.row, Reduction) else 0,
        n_bytes=least_bytes(of),
        seconds=seconds(lambda: engine.run(of, cells, mask)),
    )


def sample(dtype: DType, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Cells whose products stay in range."""
    kind = getattr(torch, dtype.torch)
    return (
        torch.ones(shape, dtype=kind, device=device) if dtype.is_integral else torch.rand(shape, device=device).to(kind)
    )


def report(device: str, wanted: Sequence[str]) -> Iterator[str]:
    """The table, a line as it is measured."""
    about = devices.examined(device)
    copied = about.copied_bytes_per_s
    yield f"`python -m benchmarks.gpu` on {about.model}, {devices.driver()}, torch {torch.__version__}, "
    yield f"triton {devices.triton_version()}; a copy within its memory moves {copied / 1e9:.0f} GB/s; 70 % of the cells valid.\n"
    yield f"Aimed at: {TARGET:.0%} of that.\n"
    yield "| op | shape | dim | cells | launches | ms | GB/s | of a copy |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |"
    for of in plans(device, wanted):
        one = timed(of)
        speed = one.n_bytes / one.seconds
        yield (
            f"| {of.row.name} | {of.shape} | {of.dims[0]} | {of.stored} | {one.launches or ''} | {one.seconds * 1e3:.3g} "
            f"| {speed / 1e9:.0f} | {speed / copied:.0%} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--op", action="append", default=[], help="an op to time; all where none is given")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    given = parser.parse_args(arguments)
    try:
        device = device_of(given.device)
    except DeviceError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    lines = []
    for line in report(device, given.op):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        PAGE.write_text(rewrite(PAGE.read_text(), "\n".join(lines), "gpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
