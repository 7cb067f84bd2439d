"""Calls of a store: in threads of their own, so that a signal is heard meanwhile, and again where another try may serve.

A thread that waits inside a client's library hears no signal until the store answers. The threads are daemons: a process that
ends does not wait for a store that is silent.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

A = TypeVar("A")
T = TypeVar("T")
THREADS = 16
TRIES = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 3.0
"""Between tries: a random time up to the first, doubled with each, up to the longest, so that clients do not all come at once."""
TRIES_S = 60.0
"""Seconds after which there is no further try."""


_here = threading.local()
"""Says of a thread whether it is one of those below: what is called there waits itself, since they might all wait for one."""


class Threads:
    """Threads that wait for stores; they are made when they are first needed."""

    def __init__(self, most: int = THREADS) -> None:
        self._most = most
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._n = self._n_busy = 0

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """What `call` gives, once it does."""
        future: Future[T] = Future()
        with self._lock:
            self._n_busy += 1
            if self._n < min(self._n_busy, self._most):
                self._n += 1
                threading.Thread(target=self._work, name=f"maskserve-store-{self._n}", daemon=True).start()
        self._queue.put((future, call))
        return future

    def _work(self) -> None:
        _here.is_one_of_them = True
        while True:
            future, call = self._queue.get()
            try:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(call())
                    except BaseException as error:  # whoever waits for it raises it
                        future.set_exception(error)
            finally:
                del future, call
                with self._lock:
                    self._n_busy -= 1


THREADS_OF_ALL = Threads()


def waited(call: Callable[[], T]) -> T:
    """What `call` gives, while this thread hears signals."""
    if getattr(_here, "is_one_of_them", False):
        return call()
    return THREADS_OF_ALL.submit(call).result()


def at_once(call: Callable[[A], T], of: Iterable[A]) -> list[T]:
    """What `call` gives of each, several waiting at a time; the first error where there is one."""
    futures = [THREADS_OF_ALL.submit(partial(call, one)) for one in of]
    return [future.result() for future in futures]


class PassingError(Exception):
    """What went wrong may be right at the next try; `error` is what to raise where it is not."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def tried(call: Callable[[int], T]) -> T:
    """What `call(n)` gives at its n-th try, from 0; it raises PassingError where another try may serve."""
    start_s = time.monotonic()
    n = 0
    while True:
        try:
            return call(n)
        except PassingError as passing:
            n += 1
            wait_s = random.uniform(0, min(FIRST_WAIT_S * 2**n, LONGEST_WAIT_S))
            if n >= TRIES or time.monotonic() + wait_s - start_s > TRIES_S:
                raise passing.error from None
        time.sleep(wait_s)
