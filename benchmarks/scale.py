"""What a reduction of much data costs: a model of four numbers, measured here, checked here, and asked for what is not here.

    python -m benchmarks.scale                     measures with up to 3 GB, and checks with 4 GB and 16 shards
    python -m benchmarks.scale --gigabytes 8       checks with 8 GB

docs/scale.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.streaming import COMMAND, KEPT, WIDTH, make, planned
from maskserve.dtypes import BY_NAME
from maskserve.region_states import state_bytes

OP, DIM = "mean", 0
# files that fit into the memory would be loaded, not streamed
SIZES_GB, COUNTS, SHARDS = (1.0, 3.0), (4, 20), 16
RUNS = 5
RESULTS = KEPT * WIDTH
NETWORKS = (("a disk of 0.5 GB/s a machine", 0.5e9), ("an object store of 1.2 GB/s a machine", 1.2e9))
MACHINES = (1, 10, 100, 1000)
SIZES = (("1 TB", 1e12), ("1 PB", 1e15))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`start_s`: a command that does nothing else; `rate`: bytes a second, read and lifted; `merge_rate`: of states."""

    start_s: float
    rate: float
    state_bytes: int
    merge_start_s: float
    merge_rate: float

    def reduce_s(self, n_bytes: float, storage: float = float("inf")) -> float:
        """One process; `storage` is how many bytes a second it is given."""
        return self.start_s + n_bytes / min(self.rate, storage)

    def merge_s(self, shards: int, results: int = RESULTS) -> float:
        return self.merge_start_s + shards * results * self.state_bytes / self.merge_rate

    def machines_s(self, n_bytes: float, machines: int, storage: float) -> float:
        """Shards on machines, a state each, and the merge."""
        return self.reduce_s(n_bytes / machines, storage) + self.merge_s(machines)


def run_s(words: Sequence[str]) -> float:
    """The least seconds of some runs."""
    took = []
    for _ in range(RUNS):
        start_s = time.perf_counter()
        subprocess.run([*COMMAND, *words], check=True, capture_output=True)
        took.append(time.perf_counter() - start_s)
    return min(took)


def reduction(path: Path, *more: str) -> list[str]:
    return ["reduce", "--op", OP, "--dim", str(DIM), str(path), "--memory", "512MB", *more]


def states(path: Path, folder: Path, n: int) -> list[str]:
    """The states of n shards."""
    found = [str(folder / f"{n}-{i}.state") for i in range(n)]
    for i, state in enumerate(found):
        words = reduction(path, "--shard", f"{i}/{n}", "--state", state)
        subprocess.run([*COMMAND, *words], check=True, capture_output=True)
    return found


def measured(folder: Path) -> Model:
    """The model's numbers, each pair from two sizes: of files, and of counts of states."""
    files = [folder / "small.safetensors", folder / "medium.safetensors"]
    for path, gigabytes in zip(files, SIZES_GB, strict=True):
        make(path, gigabytes)
    out = ["-o", str(folder / "out"), "--force"]
    start_s, rate = line([path.stat().st_size for path in files], [run_s(reduction(path, *out)) for path in files])
    size = state_bytes(planned(OP, DIM, (1000, KEPT, WIDTH), BY_NAME["f32"]))
    some = [states(files[0], folder, n) for n in COUNTS]
    merge_start_s, merge_rate = line([n * RESULTS * size for n in COUNTS], [run_s(["merge", *of, *out]) for of in some])
    return Model(start_s=start_s, rate=rate, state_bytes=size, merge_start_s=merge_start_s, merge_rate=merge_rate)


def line(n_bytes: Sequence[float], took_s: Sequence[float]) -> tuple[float, float]:
    """(seconds of nothing, bytes a second) of the line through two measurements."""
    rate = (n_bytes[1] - n_bytes[0]) / max(took_s[1] - took_s[0], 1e-3)
    return took_s[0] - n_bytes[0] / rate, rate


def checked(model: Model, folder: Path, gigabytes: float) -> Iterator[str]:
    """What the model says of a larger file and of more shards, and what they took."""
    large = folder / "large.safetensors"
    make(large, gigabytes)
    out = ["-o", str(folder / "out"), "--force"]
    some = states(large, folder, SHARDS)
    rows = (
        (f"reduce {gigabytes:g} GB", model.reduce_s(large.stat().st_size), run_s(reduction(large, *out))),
        (
            f"a shard of {SHARDS}",
            model.reduce_s(large.stat().st_size / SHARDS),
            run_s(reduction(large, "--shard", f"3/{SHARDS}", "--state", str(folder / "one.state"), "--force")),
        ),
        (f"merge {SHARDS} states", model.merge_s(SHARDS), run_s(["merge", *some, *out])),
    )
    yield "| what | model, s | measured, s | measured / model |"
    yield "|---|---|---|---|"
    for what, said, took in rows:
        yield f"| {what} | {said:.2f} | {took:.2f} | {took / said:.2f} |"


def predicted(model: Model) -> Iterator[str]:
    """Hours and minutes of what does not fit here."""
    yield "| data | machines | " + " | ".join(name for name, _ in NETWORKS) + " | of it merge |"
    yield "|---|---|---|---|---|"
    for name, n_bytes in SIZES:
        for machines in MACHINES:
            times = [text(model.machines_s(n_bytes, machines, storage)) for _, storage in NETWORKS]
            yield f"| {name} | {machines} | {' | '.join(times)} | {text(model.merge_s(machines))} |"


def text(seconds: float) -> str:
    """A time for people.

    >>> text(42), text(3000), text(90_000), text(900_000)
    ('42 s', '50 min', '25 h', '10 days')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where files go; default: the system's temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        model = measured(folder)
        cores = len(os.sched_getaffinity(0))
        print(
            f"{OP} over dim {DIM} of float32 with a bool mask, {RESULTS:,} results, {cores} cores: start {model.start_s:.2f} s, "
            f"rate {model.rate / 1e9:.2f} GB/s, {model.state_bytes} bytes a state; merge: start "
            f"{model.merge_start_s:.2f} s, {model.merge_rate / 1e9:.2f} GB/s of states\n"
        )
        for lines in (checked(model, folder, asked.gigabytes), predicted(model)):
            for line in lines:
                print(line, flush=True)
            print()


if __name__ == "__main__":
    main()
