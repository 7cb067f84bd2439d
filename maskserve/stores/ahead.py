"""Parts of objects that were read just now, or will be next: a reader that goes on from part to part finds them there.

A store takes tens of milliseconds to answer, whatever it is asked for; so whoever reads on is a few parts behind what is
fetched, and computes meanwhile. What is read here and there is fetched as it is asked for, and not kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Protocol

from maskserve.stores.calls import THREADS_OF_ALL, waited

PART, LEAST_PART = 2 << 20, 1 << 16
DEEPEST = 8
"""Parts that are fetched ahead of a reader that has read as many."""
MOST_BYTES = 48 << 20
"""All that is kept or on its way, of all objects."""
REMEMBERED = 64
"""Places of an object that are known to have been read."""


class Ranged(Protocol):
    """What is read through parts."""

    n_bytes: int
    serial: int
    """Another one for each."""

    def fetch(self, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `start` on."""
        ...


class Ahead:
    """Parts of any number of objects, the one used longest ago forgotten first."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._parts: OrderedDict[tuple[int, int, int], Future[memoryview]] = OrderedDict()
        self._bytes = 0
        self._gone: deque[int] = deque()
        self._lock = Lock()

    def part(self, of: Ranged, number: int, size: int = PART) -> Future[memoryview]:
        """A part of an object, of those of this size, on its way or there."""
        key = (of.serial, size, number)
        with self._lock:
            self._drop_forgotten()
            found = self._parts.get(key)
            if found is None:
                self._bytes += size
            if found is None or (found.done() and found.exception() is not None):
                found = self._parts[key] = THREADS_OF_ALL.submit(lambda: fetched(of, number, size))
            self._parts.move_to_end(key)
            while self._bytes > self.most_bytes:
                self._bytes -= self._parts.popitem(last=False)[0][1]
            return found

    def keep(self, of: Ranged, view: memoryview, size: int) -> None:
        """Keeps the first part of an object, which is there; once it is forgotten, it is fetched again."""
        there: Future[memoryview] = Future()
        there.set_result(view)
        with self._lock:
            self._drop_forgotten()
            self._parts[of.serial, size, 0] = there
            self._bytes += size
            while self._bytes > self.most_bytes:
                self._bytes -= self._parts.popitem(last=False)[0][1]

    def has(self, of: Ranged, number: int, size: int = PART) -> bool:
        with self._lock:
            return (of.serial, size, number) in self._parts

    def forget(self, of: Ranged) -> None:
        """Nothing of an object is kept, from the next part on: this may be called by the collector, while the lock is held."""
        self._gone.append(of.serial)

    def _drop_forgotten(self) -> None:
        gone = set()
        while self._gone:
            gone.add(self._gone.popleft())
        for key in [key for key in self._parts if key[0] in gone] if gone else ():
            del self._parts[key]
            self._bytes -= key[1]


def fetched(of: Ranged, number: int, size: int) -> memoryview:
    start = number * size
    view = memoryview(bytearray(min(size, of.n_bytes - start)))
    of.fetch(start, view)
    return view


AHEAD = Ahead()


class Reader:
    """How one object is read: where a read goes on from one before, whole parts come, and more and more of them ahead."""

    def __init__(self, of: Ranged, ahead: Ahead = AHEAD) -> None:
        self._of, self._ahead = of, ahead
        self._depths: OrderedDict[int, int] = OrderedDict()
        self._lock = Lock()

    def fill(self, start: int, view: memoryview) -> None:
        """Fills `view`, which is no longer than a part."""
        done = 0
        while done < view.nbytes:
            number, inside = divmod(start + done, PART)
            n = min(PART - inside, view.nbytes - done)
            self._from_part(number, inside, view[done : done + n])
            done += n

    def size_of_parts(self, n_runs: int) -> int:
        """How large parts may be of which so many are read side by side, and some kept for other readers."""
        return max(min(PART, 1 << (self._ahead.most_bytes // (4 * n_runs)).bit_length() - 1), 1)

    def side_by_side(self, starts: Sequence[int], views: Sequence[memoryview], size: int) -> None:
        """Fills views with runs that lie apart, as columns do: of each the part that it is in, which the next runs are in too."""
        wanted = []
        for start, view in zip(starts, views, strict=True):
            for number in range(start // size, (start + view.nbytes - 1) // size + 1):
                was_there = self._ahead.has(self._of, number, size)
                wanted.append((number, self._ahead.part(self._of, number, size), start, view))
                goes_on = was_there and start + view.nbytes > number * size + size // 2
                if goes_on and (number + 1) * size < self._of.n_bytes:
                    self._ahead.part(self._of, number + 1, size)
        for number, future, start, view in wanted:
            first, last = max(start, number * size), min(start + view.nbytes, (number + 1) * size)
            view[first - start : last - start] = future.result()[first - number * size : last - number * size]

    def _from_part(self, number: int, inside: int, into: memoryview) -> None:
        depth = self._depth(number)
        if depth == 0 and not self._ahead.has(self._of, number):
            waited(lambda: self._of.fetch(number * PART + inside, into))
            return
        future = self._ahead.part(self._of, number)
        last = -(-self._of.n_bytes // PART) - 1
        for further in range(number + 1, min(number + depth, last) + 1):
            self._ahead.part(self._of, further)
        into[:] = future.result()[inside : inside + into.nbytes]

    def _depth(self, number: int) -> int:
        """How many parts to fetch beyond this one; 0 where nothing was read here or just before."""
        with self._lock:
            depths = self._depths
            if number in depths:
                depths[number] = max(depths[number], 1)
            elif number - 1 in depths:
                depths[number] = min(max(2 * depths[number - 1], 1), DEEPEST)
            else:
                depths[number] = 0
            depths.move_to_end(number)
            if len(depths) > REMEMBERED:
                depths.popitem(last=False)
            return depths[number]


def together(calls: list[Callable[[], None]]) -> None:
    """Calls at once; it ends when all have, with the first error."""
    if len(calls) == 1:
        waited(calls[0])
        return
    futures = [THREADS_OF_ALL.submit(call) for call in calls]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
