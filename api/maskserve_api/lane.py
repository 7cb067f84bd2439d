"""Computing beside the event loop: a bounded number of requests, each in a thread, that take turns block by block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from starlette.types import Receive

from maskserve.execution import using
from maskserve_api.errors import BusyError, DeadlineError, Disconnected
from maskserve_api.turns import Turn, Turns

T = TypeVar("T")


class Lane:
    """Runs at most `limit` requests. One that is cancelled ends before its next block, and gives the device away."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_pending = 0
        self.turns = Turns()
        self._tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._idle = threading.Semaphore(0)

    async def run(self, work: Callable[[], T], receive: Receive, deadline_s: float) -> T:
        """What `work` gives, unless the loop's clock reaches `deadline_s` or the client goes away before."""
        if self.n_pending >= self.limit:
            raise BusyError(f"{self.limit} requests are waiting, as many as may; try again")
        self.n_pending += 1
        task = self.submit(work)
        done = asyncio.wrap_future(task.future)
        gone = asyncio.ensure_future(receive())
        either: list[asyncio.Future[Any]] = [done, gone]
        try:
            left_s = deadline_s - asyncio.get_running_loop().time()
            await asyncio.wait(either, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            if gone.done():
                raise Disconnected
            raise DeadlineError("the deadline passed before the result was there; ask for more time, or send less")
        finally:
            self.n_pending -= 1
            done.cancel()
            task.cancel()
            gone.cancel()
            del done, task, either  # an error holds this frame: in a cycle, bodies would wait for the collector

    def submit(self, work: Callable[[], T]) -> Task[T]:
        task = Task(work, self.turns)
        self._tasks.put(task)
        if not self._idle.acquire(blocking=False):
            # a daemon: what still runs when the grace is over must not keep the process
            threading.Thread(target=self._work, name="maskserve-lane", daemon=True).start()
        return task

    def _work(self) -> None:
        while True:
            self._tasks.get().run()  # bound to no name: while it waits, this thread holds no request's memory
            self._idle.release()


class Task(Generic[T]):
    """Work to be done once; cancelled, it lets go of what it holds at once, though it still stands in the queue."""

    def __init__(self, work: Callable[[], T], turns: Turns) -> None:
        self.future: Future[T] = Future()
        self.turns, self.turn = turns, Turn()
        self._work: Callable[[], T] | None = work

    def cancel(self) -> None:
        if self.future.cancel():
            self._work = None
        self.turns.cancel(self.turn)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        assert self._work is not None
        work, self._work = self._work, None
        future, turns, turn = self.future, self.turns, self.turn
        try:
            with turns.taken(turn), using(checkpoint=lambda: turns.checkpoint(turn)):
                result = work()
            future.set_result(result)
        except BaseException as error:  # the thread serves all requests: whatever one raises is that one's
            future.set_exception(error)
            del self, future  # as in Lane.run: the error holds this frame
