"""What is read in parts, beside what is in memory: seconds, peak memory, and whether the bits are the same.

    python -m benchmarks.streaming                 a file of 1 GB
    python -m benchmarks.streaming --gigabytes 8   and 512 MB of memory

Ratios are of the least of some runs in turn, from the page cache; peak memory is a process's, less that of Python with
torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path

import torch

from maskserve import engine, ops, regions, sources, streaming
from maskserve.blocks import cut
from maskserve.compact import as_bools
from maskserve.dtypes import BY_NAME, DType
from maskserve.execution import backend_of, in_parallel
from maskserve.payload.files import placed
from maskserve.payload.format import Output, open_payload
from maskserve.payload.tensors import load
from maskserve.payload.variables import resolve
from maskserve.payload.writing import places
from maskserve.plan import Plan, plan

COMMAND = [sys.executable, "-m", "maskserve_cli"]
OPS = ("sum", "mean", "amax", "argmax", "var", "logsumexp")
WIDTH = 1000
KEPT = 100
CHUNK = 1 << 22
BUDGETS = tuple(("--memory", size) for size in ("64MB", "512MB", "2GB"))
WORKERS = ("--memory", "512MB", "--workers", "2")
"""The peak is that of the parent."""
MERGEABLE = (["reduce", "--op", "mean", "--dim", "time"], ["reduce", "--op", "var"])
REDUCTIONS = (*MERGEABLE, ["reduce", "--op", "median", "--dim", "time"])


def make(path: Path, gigabytes: float) -> tuple[int, int, int]:
    """A file of random float32 cells (time, 100, 1000), 80 % of them valid, written in parts; its shape."""
    n = max(1, int(gigabytes * 1e9) // (5 * KEPT * WIDTH))
    shape = (n, KEPT, WIDTH)
    outputs = [Output("rain", BY_NAME["f32"], shape, b""), Output("rain.mask", BY_NAME["bool"], shape, b"")]
    header, starts, n_bytes = places(outputs, {"maskserve.dims": '{"rain": ["time", "lat", "lon"]}'})
    cells = n * KEPT * WIDTH

    def write(descriptor: int, _: str) -> None:
        os.pwrite(descriptor, header, 0)
        generator = torch.Generator().manual_seed(5)
        for start in range(0, cells, CHUNK):
            size = min(CHUNK, cells - start)
            data = torch.randn(size, generator=generator)
            mask = torch.rand(size, generator=generator) < 0.8
            os.pwrite(descriptor, data.numpy().data, starts["rain"] + 4 * start)
            os.pwrite(descriptor, mask.numpy().data, starts["rain.mask"] + start)

    placed(path, write, exists="replace")
    assert path.stat().st_size == n_bytes
    settle(path)
    return shape


def settle(path: Path) -> None:
    """The file as any other that was read once: what was written just now lies in the cache in smaller pieces."""
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(CHUNK):
            pass


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start_s = clock()
    run()
    return clock() - start_s


def ratios(path: Path, runs: int, clock: Callable[[], float]) -> Iterator[str]:
    """A line for each op and dim: streamed, beside the same cells in memory."""
    with open_payload(path) as payload:
        variable = resolve(payload.header)["rain"]
        data, held = load(payload, variable)
        mask = as_bools(held)
        source = sources.stored(payload, variable)
        yield f"| {'op':10} | dim | in memory, ms | read alone, ms | streamed, ms | ratio | of both | bits |"
        yield "|---|---|---|---|---|---|---|---|"
        for op in OPS:
            for dim in (None, 0, 1, 2):
                of = planned(op, dim, tuple(data.shape), BY_NAME["f32"])
                memory_s, read_s, streamed_s = [], [], []
                for _ in range(runs):
                    memory_s.append(seconds(lambda of=of: engine.run(of, data, mask), clock))  # type: ignore[misc]
                    read_s.append(seconds(lambda of=of: read_alone(of, source), clock))  # type: ignore[misc]
                    streamed_s.append(seconds(lambda of=of: streaming.run(of, source, None, 512 * 10**6), clock))  # type: ignore[misc]
                same = all(map(torch.equal, engine.run(of, data, mask), streaming.run(of, source, None, 512 * 10**6)))
                a, b, c = (min(took) * 1e3 for took in (memory_s, streamed_s, read_s))
                bits = "same" if same else "DIFFERENT"
                yield f"| {op:10} | {dim} | {a:.0f} | {c:.0f} | {b:.0f} | {b / a:.2f} | {b / (a + c):.2f} | {bits} |"


def read_alone(of: Plan, source: sources.Source) -> None:
    """Blocks of a million cells as a reduction gets them, by as many threads: mapped, their masks looked at, not their cells."""
    cells = regions.lifted_cells(of, source, None, regions.whole(of))
    blocks = cut(of, cells.shape, regions.BLOCK, narrow=regions.WIDE)
    tasks = [partial(cells.block, *(rows, run, columns)) for rows, columns in blocks.tiles for run in blocks.runs]
    in_parallel(backend_of(of), prod(cells.shape), tasks)  # type: ignore[arg-type]  # what they give is dropped


def planned(op: str, dim: int | None, shape: tuple[int, ...], dtype: DType) -> Plan:
    given = () if dim is None else (("dim", dim),)
    return plan(ops.OPS[op], given, shape, dtype, "cpu")  # type: ignore[arg-type]


def peak_mb(words: list[str]) -> tuple[float, float]:
    """(seconds, peak resident megabytes) of a process, looked at often: what the system sums up counts this process too."""
    start_s, peak = time.perf_counter(), 0
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
        time.sleep(0.005)
    assert process.returncode == 0, words
    return time.perf_counter() - start_s, peak * 1024 / 1e6


def commands(path: Path, folder: Path) -> Iterator[str]:
    """A line for each command: seconds, and peak memory beyond that of Python with torch."""
    _, torch_mb = peak_mb([sys.executable, "-c", "import torch"])
    yield f"Python with torch: {torch_mb:.0f} MB. The file: {path.stat().st_size / 1e9:.1f} GB, --memory in the first column."
    yield "| memory | command | seconds | peak beyond torch, MB | bits |"
    yield "|---|---|---|---|---|"
    out = folder / "out.safetensors"
    for words in REDUCTIONS:
        first: bytes | None = None
        for more in (*BUDGETS, WORKERS) if words in MERGEABLE else BUDGETS:
            s, mb = peak_mb([*COMMAND, *words, str(path), *more, "-o", str(out), "--force"])
            found = out.read_bytes()
            first = found if first is None else first
            bits = "same" if found == first else "DIFFERENT"
            yield f"| {more[1]} | {' '.join([*words, *more[2:]])} | {s:.1f} | {mb - torch_mb:.0f} | {bits} |"
    for words in (["softmax", "--dim", "time"], ["eval", "--expr", "(x - mean(x, dim=time)) / std(x, dim=time)"]):
        s, mb = peak_mb([*COMMAND, *words, str(path), "--memory", "512MB", "-o", str(out), "--force"])
        yield f"| 512MB | {' '.join(words)} | {s:.1f} | {mb - torch_mb:.0f} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the file and the outputs go; default: the system's temporary one"
    )
    parser.add_argument("--cpu", action="store_true", help="the time of all threads, where others use the machine too")
    parser.add_argument("--only", choices=("ratios", "commands"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / "rain.safetensors"
        make(path, asked.gigabytes)
        lines = (
            []
            if asked.only == "commands"
            else [ratios(path, asked.runs, time.process_time if asked.cpu else time.perf_counter)]
        )
        for some in [*lines, *([] if asked.only == "ratios" else [commands(path, Path(folder))])]:
            for line in some:
                print(line, flush=True)


if __name__ == "__main__":
    main()
