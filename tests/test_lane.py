"""Requests take turns block by block: no one waits for another's end, and one that is cancelled ends at its next block."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import pytest
import torch
from starlette.types import Message

import maskserve as ms
from maskserve.execution import in_turn, using
from maskserve_api.errors import BusyError
from maskserve_api.lane import Lane
from maskserve_api.turns import Cancelled, Turn, Turns
from tests.http_service import wait_until

BLOCK_S = 0.002


def blocks(n: int, done: list[str], name: str) -> Callable[[], str]:
    """A request of `n` blocks, each of which is noted in `done`."""

    def work() -> str:
        for _ in in_turn(range(n)):
            time.sleep(BLOCK_S)
            done.append(name)
        return name

    return work


def test_a_short_request_overtakes_a_long_one() -> None:
    lane, done = Lane(8), list[str]()
    long = lane.submit(blocks(2000, done, "long"))
    wait_until(lambda: len(done) > 3)
    short = lane.submit(blocks(5, done, "short"))
    assert short.future.result(30) == "short"
    assert not long.future.done()
    long.cancel()
    with pytest.raises(Cancelled):
        long.future.result(30)
    assert done.count("long") < 2000


def test_equal_requests_share_alike() -> None:
    lane, done = Lane(8), list[str]()
    names = ["a", "b", "c"]
    tasks = [lane.submit(blocks(60, done, name)) for name in names]
    assert [task.future.result(60) for task in tasks] == names
    first_half = done[: len(done) // 2]
    assert all(first_half.count(name) >= 10 for name in names)


@pytest.mark.parametrize("n_clients", [1, 3, 6])
def test_short_requests_without_end_starve_no_long_one(n_clients: int) -> None:
    """Each of them ends before its next block, and the next one is there at once."""
    turns, stop = Turns(), threading.Event()
    long = Turn(turns.lock)

    def short_ones() -> None:
        while not stop.is_set():
            with turns.taken(Turn(turns.lock)):
                time.sleep(BLOCK_S)

    def long_one() -> None:
        with turns.taken(long):
            for _ in range(60):
                turns.checkpoint(long)
                time.sleep(BLOCK_S)

    clients = [threading.Thread(target=short_ones, daemon=True) for _ in range(n_clients)]
    for client in clients:
        client.start()
    slow = threading.Thread(target=long_one, daemon=True)
    slow.start()
    slow.join(30)
    is_starved = slow.is_alive()
    stop.set()
    for thread in (*clients, slow):
        thread.join(30)
    assert not is_starved


def test_one_block_at_a_time() -> None:
    lane, inside, most = Lane(64), [0], [0]

    def work() -> None:
        for _ in in_turn(range(5)):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(BLOCK_S)
            inside[0] -= 1

    for task in [lane.submit(work) for _ in range(12)]:
        task.future.result(60)
    assert most == [1]


def test_an_error_gives_the_turn_away() -> None:
    lane = Lane(8)

    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        lane.submit(fail).future.result(30)
    assert lane.submit(lambda: 1).future.result(30) == 1
    assert lane.turns.holder is None


def test_threads_end_after_a_while_without_work_and_new_ones_come() -> None:
    lane = Lane(64, idle_s=0.05)
    threads = set[threading.Thread]()

    def work() -> int:
        threads.add(threading.current_thread())
        return sum(1 for _ in in_turn(range(3)))

    for _ in range(3):
        assert [task.future.result(60) for task in [lane.submit(work) for _ in range(20)]] == [3] * 20
        wait_until(lambda: not any(thread.is_alive() for thread in threads))


def test_work_comes_as_threads_end() -> None:
    """None is lost between a thread that gives up waiting and one that is not begun."""
    lane = Lane(64, idle_s=0.001)
    for _ in range(300):
        assert lane.submit(lambda: 1).future.result(30) == 1
        time.sleep(0.001)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_real_request_ends_at_its_next_block(backend: str, threads: int) -> None:
    """The engine asks before each block, in each of its threads, and drops the rest when it is told to."""
    lane, begun = Lane(8), threading.Event()
    cells = ms.as_masked_tensor(torch.ones(400, 512), torch.ones(400, 512, dtype=torch.bool))

    def work() -> None:
        with using(backend=backend, threads=threads, block_cells=512):
            while True:
                begun.set()
                ms.cumsum(cells, 1)
                ms.sum(cells, 1)

    task = lane.submit(work)
    assert begun.wait(30)
    task.cancel()
    with pytest.raises(Cancelled):
        task.future.result(30)
    assert lane.submit(lambda: ms.sum(cells, 1).shape).future.result(30) == (400,)


def test_requests_with_several_threads_take_turns_too() -> None:
    lane = Lane(16)
    data = torch.randn(300, 512)
    cells = ms.as_masked_tensor(data, data > 0)
    expected = ms.sum(cells, 1).to_tensor(0)

    def work() -> torch.Tensor:
        with using(threads=3, block_cells=512):
            return ms.sum(cells, 1).to_tensor(0)

    for task in [lane.submit(work) for _ in range(12)]:
        assert torch.equal(task.future.result(60), expected)
    assert lane.turns.holder is None
    assert not lane.turns.waiting


def test_where_no_thread_starts_the_request_is_refused_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def never() -> Message:
        return await asyncio.Future()

    lane = Lane(8)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(BusyError, match="no more threads"):
            asyncio.run(lane.run(lambda: 1, never, math.inf))
    assert lane.n_pending == 0
    assert lane.submit(lambda: 2).future.result(30) == 2
