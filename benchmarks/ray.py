"""What a Ray cluster costs and gives on this machine, and, by simulation from what was measured, on a thousand workers.

    python -m benchmarks.ray                       all of it, in some six minutes
    python -m benchmarks.ray --only efficiency     two workers of Ray beside two processes, on a job of about a minute

Times of whole commands are by the clock, and of the CPUs that they and all that they start were given: other people's work
on the same machine changes the second less.
"""

from __future__ import annotations

import argparse
import heapq
import operator
import os
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.report import table
from benchmarks.streaming import COMMAND, make
from maskserve.crews import Share
from maskserve.executors import Limits, Outcome
from maskserve.on_ray.cluster import Cluster, Joining, joined
from maskserve.on_ray.executor import Ray, Stays
from maskserve.on_ray.reduction import LEAST_FAN_IN, MOST_FAN_IN, Lift, Steps, Task, Tree, joined_states, top
from maskserve.payload.format import Limits as HeaderLimits
from maskserve.processes import Processes
from maskserve.shards import WHOLE

TASKS, STATES, WORKERS = 2000, 10_000, 2
ROUNDS = 3
SIMULATED = (1, 2, 10, 100, 300, 1000)
SHARDS_A_WORKER, SHARD_GB = 4, (1, 4)


class Costs(NamedTuple):
    """Seconds of each step of a reduction."""

    task_s: float
    """Of the driver, for a task."""
    lift_s: float
    """Of a worker, for a shard of 1 GB."""
    join_s: float
    """Of a worker, for MOST_FAN_IN states."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("overhead", "merge", "efficiency", "simulation"))
    parser.add_argument("--folder", type=Path, help="where files go; default: the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=3, help="of the job of about a minute")
    parser.add_argument("--gigabytes", type=float, default=300.0, help="what the job of about a minute reads")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        for line in lines(Path(name), asked.only, asked.gigabytes, asked.rounds):
            print(line, flush=True)


def lines(folder: Path, only: str | None, gigabytes: float, n_rounds: int) -> Iterator[str]:
    file = folder / "small.safetensors"
    make(file, 1.0)
    if only in (None, "efficiency"):
        yield from efficiency(file, gigabytes, n_rounds)
    if only == "efficiency":
        return
    costs = None
    with joined(Joining(), workers=WORKERS) as cluster:
        task_s, said = overhead(cluster)
        if only in (None, "overhead", "simulation"):
            yield said
        if only in (None, "merge"):
            yield merge(cluster, file)
    costs = measured(file, task_s)
    if only in (None, "simulation"):
        yield from simulation(costs)


# -- measured ---------------------------------------------------------------------------------------------------------


def overhead(cluster: Cluster) -> tuple[float, str]:
    """The seconds that a task which does nothing takes, by Ray, by processes, and by Ray alone without our accounting."""
    remote = cluster.ray.remote(max_retries=0)(lambda number: number)

    def alone() -> None:
        cluster.ray.get([remote.remote(number) for number in range(TASKS)])

    def run(executor: Ray | Processes) -> Callable[[], None]:
        return lambda: consume(executor.run(operator.index, range(TASKS)))

    ways = {
        "Ray, with retries and limits": run(Ray(cluster=cluster)),
        "Ray alone": alone,
        "processes": run(Processes(workers=WORKERS)),
    }
    took = {name: seconds(way) / TASKS for name, way in ways.items()}
    rows = [[name, f"{1e3 * each:.2f}"] for name, each in took.items()]
    return took["Ray, with retries and limits"], table(["a task that does nothing", "ms"], rows) + "\n"


def seconds(way: Callable[[], None]) -> float:
    """The median of some runs, after one that starts workers."""
    took = []
    for _ in range(ROUNDS + 1):
        start_s = time.perf_counter()
        way()
        took.append(time.perf_counter() - start_s)
    return median(took[1:])


def consume(outcomes: Iterator[object]) -> None:
    for _ in outcomes:
        pass


def merge(cluster: Cluster, file: Path) -> str:
    """What it takes to make 10,000 states, and to merge them up the tree of tasks."""
    steps, tree = steps_of([file], STATES), Tree(STATES, memory=0, store=cluster.smallest_store)
    start_s = time.perf_counter()
    states = list(Ray(cluster=cluster, stays=True).run(steps, list(tree), Limits()))
    lifted_s = time.perf_counter()
    for outcome in states:
        tree.add(outcome)
    (found,) = top(cluster, steps, tree, print)
    end_s = time.perf_counter()
    return (
        f"{STATES:,} states of {file.name}: made in {lifted_s - start_s:.1f} s, merged in {end_s - lifted_s:.1f} s; the last "
        f"one has {found.nbytes:,} bytes\n"
    )


def steps_of(files: Sequence[Path], n: int) -> Steps:
    words = {"op": "mean", "dim": "0", "device": "cpu"}
    whole = Share(
        verb="reduce", words=words, paths=tuple(map(str, files)), along=None, shard=WHOLE, limits=HeaderLimits(),
        memory=512 << 20, file="",
    )  # fmt: skip
    return Steps(whole=whole, n=n)


def measured(file: Path, task_s: float) -> Costs:
    """What a shard of one gigabyte and a join of 16 states take in this process, on one thread as in a worker."""
    from maskserve import execution

    whole, parts = steps_of([file], 1), steps_of([file], MOST_FAN_IN)
    with execution.using(threads=1):
        lift_s = seconds(lambda: consume(iter([whole.lifted(Lift(0))])))
        states = [parts.lifted(Lift(i)) for i in range(MOST_FAN_IN)]
        join_s = seconds(lambda: consume(iter([joined_states(states, 512 << 20)])))
    return Costs(task_s, lift_s, join_s)


class Took(NamedTuple):
    """Seconds by the clock, and of all CPUs."""

    clock_s: float
    cpu_s: float


def efficiency(file: Path, gigabytes: float, n_rounds: int) -> Iterator[str]:
    """Two workers of Ray beside two processes, in turn."""
    files = [str(file)] * max(1, round(gigabytes))
    command = [
        *COMMAND,
        "reduce",
        "--op",
        "var",
        "--dim",
        "0",
        *files,
        "--memory",
        "1GiB",
        "-o",
        str(file.with_name("answer")),
        "--force",
    ]
    ways = {
        "2 processes": ["--workers", "2"],
        "2 workers of Ray, started by the command": ["--engine", "ray", "--workers", "2"],
    }
    one = [
        *COMMAND,
        "reduce",
        "--op",
        "sum",
        "--dim",
        "0",
        str(small(file)),
        "-o",
        str(file.with_name("one")),
        "--force",
    ]
    starts = {name: took([*one, *words]) for name, words in ways.items()}
    rounds = [{name: took([*command, *words]) for name, words in ways.items()} for _ in range(n_rounds)]
    rows = []
    for name in ways:
        clock_s, cpu_s = median(r[name].clock_s for r in rounds), median(r[name].cpu_s for r in rounds)
        rows.append(
            [name, f"{clock_s:.1f}", f"{cpu_s:.1f}", f"{starts[name].clock_s:.1f}", f"{starts[name].cpu_s:.1f}"]
        )
    head = ["var over dim 0", "seconds", "CPU seconds", "start, seconds", "start, CPU seconds"]
    yield f"{len(files)} GB of float32 and masks from the page cache, {n_rounds} rounds, {len(os.sched_getaffinity(0))} cores\n"
    yield table(head, rows) + "\n"
    first, second = ways
    whole = median(r[first].clock_s / r[second].clock_s for r in rounds)
    bare = median(
        (r[first].clock_s - starts[first].clock_s) / (r[second].clock_s - starts[second].clock_s) for r in rounds
    )
    by_cpu = median((r[first].cpu_s - starts[first].cpu_s) / (r[second].cpu_s - starts[second].cpu_s) for r in rounds)
    yield f"Ray's efficiency: {whole:.0%}; without starts {bare:.0%}, and {by_cpu:.0%} by CPU time\n"


def small(file: Path) -> Path:
    """A file of a few cells, for what a command takes to start."""
    path = file.with_name("few.safetensors")
    if not path.exists():
        make(path, 0.001)
    return path


def took(words: Sequence[str]) -> Took:
    """What a command and all that it started took; the CPU time of a process is as it was seen last."""
    start_s, seen, is_over = time.perf_counter(), dict[int, float](), threading.Event()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        watcher = threading.Thread(target=watch, args=(running.pid, seen, is_over))
        watcher.start()
        code = running.wait()
        is_over.set()
        watcher.join()
    assert code == 0, words
    return Took(time.perf_counter() - start_s, sum(seen.values()))


def watch(parent: int, seen: dict[int, float], is_over: threading.Event) -> None:
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    while not is_over.wait(0.1):
        family = {parent}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            found[int(folder.name)] = (int(words[1]), (int(words[11]) + int(words[12])) * tick_s)
        while more := {pid for pid, (above, _) in found.items() if above in family} - family:
            family |= more
        seen.update({pid: found[pid][1] for pid in family & found.keys()})


# -- simulated --------------------------------------------------------------------------------------------------------


def simulated_s(costs: Costs, workers: int, shards: int) -> float:
    """When the last join is done: one driver hands out and hears of tasks one by one, workers take what is there."""
    tree, free, running = Tree(shards, memory=0, store=1 << 40), workers, list[tuple[float, int, Task]]()
    now_s = end_s = 0.0
    number, waiting = 0, deque[Task]()
    while True:
        waiting += [] if waiting else list(tree)
        while waiting and free:
            task = waiting.popleft()
            now_s += costs.task_s
            free -= 1
            number += 1
            cost_s = costs.lift_s if isinstance(task, Lift) else costs.join_s
            heapq.heappush(running, (now_s + cost_s, number, task))
        if not running:
            return max(now_s, end_s)
        end_s, _, task = heapq.heappop(running)
        now_s = max(now_s, end_s)
        free += 1
        tree.add(Outcome(index=0, task=task, result=Stays(ref=None, n_bytes=1)))


def simulation(costs: Costs) -> Iterator[str]:
    """Shards of some sizes, four for each worker: as much data as there are workers for."""
    yield (
        f"simulated from {1e3 * costs.task_s:.2f} ms a task at the driver, {costs.lift_s:.2f} s a shard of 1 GB, "
        f"{costs.join_s:.3f} s a join of {MOST_FAN_IN} states (at least {LEAST_FAN_IN} where they are large)\n"
    )
    rows = []
    for workers in SIMULATED:
        row, shards = [f"{workers:,}"], SHARDS_A_WORKER * workers
        for size in SHARD_GB:
            scaled = costs._replace(lift_s=size * costs.lift_s)
            whole_s, alone_s = simulated_s(scaled, workers, shards), SHARDS_A_WORKER * scaled.lift_s
            row += [f"{size * shards:,} GB", f"{whole_s:.1f}", f"{alone_s / whole_s:.0%}"]
        rows.append(row)
    yield table(["workers", *("data", "seconds", "efficiency") * len(SHARD_GB)], rows)


if __name__ == "__main__":
    main()
