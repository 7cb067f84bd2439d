"""Computing beside the event loop: a bounded number of requests, each in a thread, that take turns block by block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from starlette.types import Receive

from maskserve.execution import using
from maskserve_api.errors import BusyError, DeadlineError, Disconnected
from maskserve_api.turns import Turn, Turns

T = TypeVar("T")
IDLE_S = 10.0
"""After so long without work a thread ends: a burst leaves none behind."""


class Lane:
    """Runs at most `limit` requests. One that is cancelled ends before its next block, and counts until then."""

    def __init__(self, limit: int, idle_s: float = IDLE_S) -> None:
        self.limit, self.idle_s = limit, idle_s
        self.n_pending = 0
        self.turns = Turns()
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._n_idle = 0

    async def run(self, work: Callable[[], T], receive: Receive, deadline_s: float) -> T:
        """What `work` gives, unless the loop's clock reaches `deadline_s` or the client goes away before."""
        if self.n_pending >= self.limit:
            raise BusyError(f"{self.limit} requests are waiting, as many as may; try again")
        task = self.submit(work)
        with self._lock:
            self.n_pending += 1
        task.future.add_done_callback(self._ended)
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
            done.cancel()
            task.cancel()
            gone.cancel()
            del done, task, either  # an error holds this frame: in a cycle, bodies would wait for the collector

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self.n_pending -= 1

    def submit(self, work: Callable[[], T]) -> Task[T]:
        """Has `work` done by a thread that is idle, or by a new one; BusyError where the system starts no more."""
        task = Task(work, self.turns)
        with self._lock:
            if self._n_idle:
                self._n_idle -= 1
            else:
                self._start()
            self._tasks.put(task)
        return task

    def _start(self) -> None:
        # a daemon: what still runs when the grace is over must not keep the process
        thread = threading.Thread(target=self._work, name="maskserve-lane", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise BusyError("the system starts no more threads; try again") from None

    def _work(self) -> None:
        while True:
            try:
                self._tasks.get(timeout=self.idle_s).run()  # bound to no name: an idle thread holds no request's memory
            except Empty:
                with self._lock:
                    if not self._n_idle:  # work is there for this thread: it comes between the two
                        continue
                    self._n_idle -= 1
                return
            with self._lock:
                self._n_idle += 1


class Task(Generic[T]):
    """Work to be done once; cancelled, it lets go of what it holds at once, though it still stands in the queue."""

    def __init__(self, work: Callable[[], T], turns: Turns) -> None:
        self.future: Future[T] = Future()
        self.turns, self.turn = turns, Turn(turns.lock)
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
