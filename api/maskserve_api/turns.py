"""Whose block is computed next: requests share the device by the seconds they have had of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

QUANTUM_S = 0.005
"""A request keeps the device for at least so long, or until it ends: to change over costs a wake-up."""


class Cancelled(Exception):  # noqa: N818  # an end that was asked for, no error
    """The request's client is gone, or its deadline has passed: its next block is not begun."""


class Turns:
    """The device, lent to one request at a time, and at the next block to the one that has had the least of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: Turn | None = None
        self.waiting: list[Turn] = []
        self.clock_s = 0.0
        """The seconds due to a request that was here all along: an equal part of what any has had, ended ones too."""
        self.charged_s = 0.0

    @contextmanager
    def taken(self, turn: Turn) -> Iterator[None]:
        """Waits for the first turn of a request, and gives the last one back."""
        try:
            with self.lock:
                self._charge()
                turn.had_s = self.clock_s  # no credit for coming late; short ones without end starve no long one
                self._queue(turn)
            yield
        finally:
            with self.lock:
                self._leave(turn)

    def checkpoint(self, turn: Turn) -> None:
        """Before each block, in any thread of the request: waits while it is another's turn."""
        if turn.is_cancelled:
            raise Cancelled
        if self.holder is turn and (not self.waiting or time.monotonic() - turn.since_s < QUANTUM_S):
            return  # without the lock: at worst the change comes a block later
        with self.lock:
            if self.holder is turn:
                self._charge()
                if min(other.had_s for other in (*self.waiting, turn)) == turn.had_s:
                    turn.since_s = self.charged_s
                    return
                self.holder = None
                self._queue(turn)
            else:
                self._wait(turn)

    def cancel(self, turn: Turn) -> None:
        """From any thread: the request ends before its next block."""
        with self.lock:
            turn.is_cancelled = True
            turn.changed.notify_all()

    def _queue(self, turn: Turn) -> None:
        self.waiting.append(turn)
        self._choose()
        self._wait(turn)

    def _wait(self, turn: Turn) -> None:
        turn.changed.wait_for(lambda: self.holder is turn or turn.is_cancelled)
        if turn.is_cancelled:
            raise Cancelled

    def _leave(self, turn: Turn) -> None:
        if turn in self.waiting:
            self.waiting.remove(turn)
        if self.holder is turn:
            self._charge()
            self.holder = None
            self._choose()

    def _charge(self) -> None:
        """Counts what the holder has had since the last charge; each that is here was due a part of it."""
        if self.holder is None:
            return
        now_s = time.monotonic()
        had_s = now_s - self.charged_s
        self.charged_s = now_s
        self.holder.had_s += had_s
        self.clock_s += had_s / (1 + len(self.waiting))

    def _choose(self) -> None:
        if self.holder is None and self.waiting:
            self.holder = min(self.waiting, key=lambda turn: turn.had_s)  # the first of equals: who waits longest
            self.waiting.remove(self.holder)
            self.holder.since_s = self.charged_s = time.monotonic()
            self.holder.changed.notify_all()


class Turn:
    """One request's share; `lock` is that of the turns."""

    def __init__(self, lock: threading.Lock) -> None:
        self.had_s = 0.0
        self.since_s = 0.0
        self.is_cancelled = False
        self.changed = threading.Condition(lock)
        """Its own: one for all would wake hundreds of threads at each change, to send all but one back to sleep."""
