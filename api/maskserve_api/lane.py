"""One worker thread behind a bounded queue: computing never blocks the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from starlette.types import Receive

from maskserve_api.errors import BusyError, DeadlineError, Disconnected

T = TypeVar("T")


class Lane:
    """Runs work one after the other. Work that is queued can be cancelled; work that runs goes on to its end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_pending = 0
        self._tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, work: Callable[[], T], receive: Receive, deadline_s: float) -> T:
        """What `work` gives, unless the loop's clock reaches `deadline_s` or the client goes away before."""
        if self.n_pending >= self.limit:
            raise BusyError(f"{self.limit} requests are waiting, as many as may; try again")
        self.n_pending += 1
        done: asyncio.Future[T] = asyncio.wrap_future(self._submit(work))
        gone = asyncio.ensure_future(receive())
        try:
            left_s = deadline_s - asyncio.get_running_loop().time()
            waiting: set[asyncio.Future[Any]] = {done, gone}
            await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            if gone.done():
                raise Disconnected
            raise DeadlineError("the deadline passed before the result was there; ask for more time, or send less")
        finally:
            self.n_pending -= 1
            done.cancel()
            gone.cancel()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        if self._thread is None:
            # a daemon: what still runs when the grace is over must not keep the process
            self._thread = threading.Thread(target=self._work, name="maskserve-lane", daemon=True)
            self._thread.start()
        task = Task(work)
        self._tasks.put(task)
        return task.future

    def _work(self) -> None:
        while True:
            self._tasks.get().run()  # bound to no name: while it waits, this thread holds no request's memory


class Task(Generic[T]):
    """Work to be done once; cancelled, it lets go of what it holds at once, though it still stands in the queue."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._work: Callable[[], T] | None = work
        self.future.add_done_callback(self._forget)

    def _forget(self, future: Future[T]) -> None:
        self._work = None

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        assert self._work is not None
        try:
            self.future.set_result(self._work())
        except BaseException as error:  # the thread serves all requests: whatever one raises is that one's
            self.future.set_exception(error)
