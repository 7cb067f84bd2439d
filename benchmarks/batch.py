"""`python -m benchmarks.batch`: thousands of small files by `maskserve batch`, against a bare loop over them.

The loop is one process that opens each file with the safetensors library and sums its cells: no mask, no output. Rates are
files a second of whole commands, and without what each takes to start (importing torch), which is measured on one file.
The two take turns, so that a busy machine slows both; what is printed is the median of the ratios.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from benchmarks.report import table

LOOP = """
import sys, pathlib
from safetensors import safe_open
total = 0.0
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with safe_open(path, "pt") as file:
        total += float(file.get_tensor("rain").sum())
"""
JOB = """
version = 1
[request]
verb = "reduce"
op = "mean"
dim = 0
[input]
paths = ["in/"]
[output]
to = "out"
"""
BATCH = [sys.executable, "-m", "maskserve_cli", "batch", "job.toml"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix="benchmark-") as name:
        folder = Path(name)
        make(folder / "in", given.files)
        make(folder / "one" / "in", 1)
        for where in (folder, folder / "one"):
            (where / "job.toml").write_text(JOB)
        rounds = [one_round(folder, given.workers, number) for number in range(given.rounds)]
        print(report(rounds, given.files, given.workers))


def make(folder: Path, n: int) -> None:
    """Files of 4 KiB: 30 x 27 cells, a tenth of them masked."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(n):
        cells = {"rain": rng.random((30, 27), dtype="f4"), "rain.mask": rng.random((30, 27)) < 0.9}
        save_file(cells, folder / f"f{number:05d}.safetensors")


class Took(NamedTuple):
    """Seconds of a command: by the clock, and of all its processes on their CPUs, which a busy machine changes less."""

    clock_s: float
    cpu_s: float


def one_round(folder: Path, workers: int, number: int) -> dict[str, Took]:
    """What the loop and batch took on all files and on one, and what a batch that finds all done."""
    # into a new folder: ext4 takes 0.4 ms to make a file for seconds after many were deleted or replaced
    words = [*BATCH, "--workers", str(workers), "--set", f"output.to=out{number}"]
    return {
        "loop": took([sys.executable, "-c", LOOP, "in"], folder),
        "batch": took(words, folder),
        "loop, one file": took([sys.executable, "-c", LOOP, "in"], folder / "one"),
        "batch, one file": took(words, folder / "one"),
        "batch, all done": took(words, folder),
    }


def took(words: list[str], folder: Path) -> Took:
    start_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(time.perf_counter() - start_s, cpu_s)


def report(rounds: list[dict[str, Took]], n: int, workers: int) -> str:
    """The seconds of each, and the ratios of rates."""
    whole = median(r["loop"].clock_s / r["batch"].clock_s for r in rounds)
    warm = median(
        (r["loop"].clock_s - r["loop, one file"].clock_s) / (r["batch"].clock_s - r["batch, one file"].clock_s)
        for r in rounds
    )
    head, lines = ["what", "seconds", "files a second", "CPU seconds"], []
    for what in rounds[0]:
        clock_s, cpu_s = median(r[what].clock_s for r in rounds), median(r[what].cpu_s for r in rounds)
        lines.append([what, f"{clock_s:.2f}", f"{n / clock_s:,.0f}" if "," not in what else "", f"{cpu_s:.2f}"])
    return (
        f"{n} files of 4 KiB, {workers} workers, {len(rounds)} rounds\n\n{table(head, lines)}\n\n"
        f"batch runs at {whole:.0%} of the loop's rate, whole commands; at {warm:.0%} without starting"
    )


if __name__ == "__main__":
    main()
