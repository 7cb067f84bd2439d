"""Executors: every task has an outcome, whatever happens to who runs it; nothing outlives the parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maskserve.errors import OutputError, ParameterError, WorkerLostError
from maskserve.executors import Executor, Limits, Outcome, Serial, Stop, Threads
from maskserve.processes import Processes
from tests import executor_tasks as tasks

ROOT = Path(__file__).parent.parent
every_executor = pytest.mark.parametrize(
    "executor", [Serial(), Threads(workers=3), Processes(workers=2)], ids=["serial", "threads", "processes"]
)


def results(outcomes: Iterator[Outcome[Any, Any]]) -> list[Any]:
    found = []
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        found.append(outcome.result)
    return found


@every_executor
def test_every_task_has_one_outcome(executor: Executor) -> None:
    outcomes = list(executor.run(tasks.square, range(100)))
    assert {o.task: o.result for o in outcomes} == {n: n * n for n in range(100)}
    assert sorted(o.index for o in outcomes) == list(range(100))


@every_executor
def test_outcomes_keep_the_order_of_tasks_where_asked(executor: Executor) -> None:
    assert results(executor.run(tasks.late_squares, range(20), Limits(in_order=True))) == [n * n for n in range(20)]


@every_executor
def test_an_error_is_an_outcome_of_its_task_alone(executor: Executor) -> None:
    outcomes = {o.task: o for o in executor.run(tasks.refuse_odd, range(6))}
    assert [n for n, o in sorted(outcomes.items()) if o.error] == [1, 3, 5]
    assert str(outcomes[3].error) == "3 is odd"
    assert outcomes[4].result == 4


@every_executor
def test_an_error_of_the_system_keeps_its_number(executor: Executor) -> None:
    (outcome,) = executor.run(tasks.full_disk, ["out"])
    assert isinstance(outcome.error, OutputError)
    assert (outcome.error.errno, str(outcome.error), outcome.error.parameter) == (errno.ENOSPC, "out is full", "out")


@every_executor
def test_tasks_are_taken_as_there_is_room(executor: Executor) -> None:
    taken = 0

    def counted() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    outcomes = iter(executor.run(tasks.square, counted()))
    next(outcomes)
    assert taken < 50


@pytest.mark.parametrize("executor", [Threads(workers=4), Processes(workers=3)], ids=["threads", "processes"])
def test_tasks_run_at_once_only_as_the_memory_allows(executor: Executor, tmp_path: Path) -> None:
    alone = Limits(memory=10, weigh=lambda n: 11)
    assert set(results(executor.run(tasks.Overlap(str(tmp_path)), range(6), alone))) == {1}
    two = Limits(memory=10, weigh=lambda n: 5)
    assert max(results(executor.run(tasks.Overlap(str(tmp_path)), range(12), two))) == 2


@every_executor
def test_a_stop_takes_no_more_tasks(executor: Executor) -> None:
    stop = Stop()
    n_outcomes = 0
    for _ in executor.run(tasks.square, range(10_000), Limits(stop=stop)):
        n_outcomes += 1
        stop.ask(grace_s=10)
    assert 0 < n_outcomes < 20


def test_what_runs_at_the_deadline_of_a_stop_is_dropped() -> None:
    stop = Stop()
    stop.ask(grace_s=60)
    first = stop.deadline_s
    stop.ask(grace_s=600)
    assert stop.deadline_s == first, "a later request cannot postpone the end"

    late = Stop()
    outcomes = Processes(workers=1).run(tasks.wait_long, Late(late), Limits(stop=late))
    start_s = time.monotonic()
    assert list(outcomes) == []
    assert time.monotonic() - start_s < 10


class Late:
    """One task, and then the request to stop."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def __iter__(self) -> Iterator[int]:
        yield 1
        self.stop.ask(grace_s=1)
        yield 2


def test_killed_workers_cost_a_retry_each_and_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    executor = Processes(workers=2, tell=told.append)
    outcomes = {o.task: o for o in executor.run(tasks.KilledOnce(str(tmp_path)), range(5))}
    assert [outcomes[n].result for n in range(5)] == [0, 1, 2, 3, 4]
    assert [outcomes[n].attempts for n in range(5)] == [2] * 5
    assert len(told) == 5
    assert all("was killed by SIGKILL (out of memory?) while it ran" in line for line in told)


def test_a_task_that_kills_every_worker_fails_alone() -> None:
    told: list[str] = []
    outcomes = {o.task: o for o in Processes(workers=2, retries=1, tell=told.append).run(tasks.crash, range(8))}
    error = outcomes.pop(3).error
    assert isinstance(error, WorkerLostError)
    assert "2 workers died on it, the last one was killed by SIGSEGV" in str(error)
    assert {n: o.result for n, o in outcomes.items()} == {n: n for n in range(8) if n != 3}
    assert len(told) == 2


def test_of_a_task_in_parts_only_the_part_at_fault_is_lost() -> None:
    executor = Processes(workers=1, retries=1, split=tasks.parts, tell=lambda line: None)
    outcomes = list(executor.run(tasks.whole, [(0, 1, 2), (3, 4, 5), (6,)]))
    assert sorted(n for o in outcomes if o.result is not None for n in o.result) == [0, 1, 2, 4, 5, 6]
    assert [o.task for o in outcomes if o.error] == [(3,)]


def test_workers_that_never_start_end_the_run_with_one_error() -> None:
    with pytest.raises(WorkerLostError, match="workers cannot start: 3 in a row died"):
        list(Processes(workers=1, tell=lambda line: None).run(tasks.NeverReady(), range(3)))


def test_workers_share_the_cpus_as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskserve.processes.cpus", lambda: 8)
    assert set(results(Processes(workers=2).run(tasks.threads, range(4)))) == {"4"}


def test_a_function_of_main_is_refused_in_words() -> None:
    def local(n: int) -> int:
        return n

    with pytest.raises(ParameterError, match="put it into a module"):
        list(Processes(workers=1).run(local, [1]))


def test_neither_parent_nor_worker_imports_torch_by_itself() -> None:
    code = (
        "import sys; from maskserve.processes import Processes; from tests.executor_tasks import no_torch;"
        "assert [o.result for o in Processes(workers=1).run(no_torch, [1])] == [True]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "other thread"])
def test_workers_end_with_a_parent_that_is_killed(in_thread: bool) -> None:
    code = (
        "import threading; from maskserve.processes import Processes; from tests.executor_tasks import wait_long\n"
        "def work(): list(Processes(workers=2).run(wait_long, [1, 2]))\n"
        + ("t = threading.Thread(target=work); t.start(); t.join()" if in_thread else "work()")
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    workers = wait_for(lambda: children(parent.pid), 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: [] if any(is_alive(pid) for pid in workers) else [0], 1)


def test_a_stopped_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskserve.processes.HEALTH_S", 0.0)
    monkeypatch.setattr("maskserve.processes.STOPPED_CHECKS", 3)
    told: list[str] = []
    outcomes = Processes(workers=1, tell=told.append).run(tasks.pid, range(40))
    first = next(outcomes).result
    os.kill(first, signal.SIGSTOP)
    pids = {o.result for o in outcomes}
    assert len(pids - {first}) == 1
    assert "has been stopped" in told[0]


def wait_for(look: Any, n: int) -> list[int]:
    """What `look` finds, once it is `n` things."""
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        found: list[int] = look()
        if len(found) == n:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{n} were waited for, the last look found {look()}")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or by_parent(pid)
    except OSError:
        return by_parent(pid)


def by_parent(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
