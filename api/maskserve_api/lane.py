"""One worker thread behind a bounded queue: computing never blocks the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from starlette.types import Receive

from maskserve_api.errors import BusyError, DeadlineError, Disconnected

T = TypeVar("T")
Task = tuple["Future[Any]", Callable[[], Any]]


class Lane:
    """Runs work one after the other. Work that is queued can be cancelled; work that runs goes on to its end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_pending = 0
        self._tasks: SimpleQueue[Task] = SimpleQueue()
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
            await asyncio.wait({done, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
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
        future: Future[T] = Future()
        self._tasks.put((future, work))
        return future

    def _work(self) -> None:
        while True:
            run(*self._tasks.get())  # in a call of its own: while it waits, this thread holds no request's memory


def run(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # the thread serves all requests: whatever one raises is that one's
        future.set_exception(error)
