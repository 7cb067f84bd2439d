"""Parts of objects that were read just now, or will be next: a reader that goes on from part to part finds them there.

A store takes tens of milliseconds to answer, whatever it is asked for; so whoever reads on is a few parts behind what is
fetched, and computes meanwhile. What is read here and there is fetched as it is asked for, and not kept.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Protocol, TypeAlias

from maskserve.stores.calls import THREADS_OF_ALL, waited

PART, LEAST_PART = 2 << 20, 1 << 16
DEEPEST = 8
"""Parts that are fetched ahead of a reader that has read as many."""
MOST_BYTES = 48 << 20
"""All that is kept or on its way, of all objects."""
REMEMBERED = 64
"""Places of an object that are known to have been read."""


Extent: TypeAlias = tuple[int, int]
"""The first byte of a part, and the one after its last."""


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

    def part(self, of: Ranged, extent: Extent) -> Future[memoryview]:
        """A part of an object, on its way or there."""
        key = (of.serial, *extent)
        with self._lock:
            self._drop_forgotten()
            found = self._parts.get(key)
            if found is None:
                self._bytes += bytes_of(key)
            if found is None or (found.done() and found.exception() is not None):
                found = self._parts[key] = THREADS_OF_ALL.submit(lambda: fetched(of, extent))
            self._parts.move_to_end(key)
            self._drop_oldest()
            return found

    def keep(self, of: Ranged, view: memoryview) -> None:
        """Keeps the first part of an object, which is there; once it is forgotten, it is fetched again."""
        there: Future[memoryview] = Future()
        there.set_result(view)
        with self._lock:
            self._drop_forgotten()
            self._parts[of.serial, 0, view.nbytes] = there
            self._bytes += view.nbytes
            self._drop_oldest()

    def has(self, of: Ranged, extent: Extent) -> bool:
        with self._lock:
            return (of.serial, *extent) in self._parts

    def forget(self, of: Ranged) -> None:
        """Nothing of an object is kept, from the next part on: this may be called by the collector, while the lock is held."""
        self._gone.append(of.serial)

    def _drop_oldest(self) -> None:
        while self._bytes > self.most_bytes:
            self._bytes -= bytes_of(self._parts.popitem(last=False)[0])

    def _drop_forgotten(self) -> None:
        gone = set()
        while self._gone:
            gone.add(self._gone.popleft())
        for key in [key for key in self._parts if key[0] in gone] if gone else ():
            del self._parts[key]
            self._bytes -= bytes_of(key)


def bytes_of(key: tuple[int, int, int]) -> int:
    return key[2] - key[1]


def fetched(of: Ranged, extent: Extent) -> memoryview:
    start, stop = extent
    view = memoryview(bytearray(stop - start))
    of.fetch(start, view)
    return view


AHEAD = Ahead()


class Reader:
    """How one object is read: where a read goes on from one before, whole parts come, and more and more of them ahead."""

    def __init__(self, of: Ranged, ahead: Ahead = AHEAD) -> None:
        self._of, self._ahead = of, ahead
        self._depths: OrderedDict[int, int] = OrderedDict()
        self._expected: tuple[Extent, ...] = ()
        self._lock = Lock()

    def expect(self, start: int, stop: int) -> None:
        """Says that these bytes will be read: they are fetched from the first one on, and none beyond them."""
        with self._lock:
            self._expected = (*self._expected, (start, stop))

    def expects(self, start: int, stop: int) -> bool:
        return any(first <= start and stop <= last for first, last in self._expected)

    def fill(self, start: int, view: memoryview) -> None:
        """Fills `view`, part after part."""
        is_expected, done = self.expects(start, start + view.nbytes), 0
        # as much ahead as is read at a time: a mask's parts would else be forgotten while those of its larger tensor come
        depth = min(-(-view.nbytes // PART), DEEPEST)
        while done < view.nbytes:
            number, inside = divmod(start + done, PART)
            n = min(PART - inside, view.nbytes - done)
            if is_expected:
                self._take(number, start + done, view[done : done + n], depth, self._expected_of)
            else:
                self._from_part(number, start + done, view[done : done + n])
            done += n

    def size_of_parts(self, n_runs: int) -> int:
        """How large parts may be of which so many are read side by side, and some kept for other readers."""
        return max(min(PART, 1 << (self._ahead.most_bytes // (4 * n_runs)).bit_length() - 1), 1)

    def side_by_side(self, starts: Sequence[int], views: Sequence[memoryview], size: int) -> None:
        """Fills views with runs that lie apart, as columns do: of each the part that it is in, which the next runs are in too."""
        is_expected = self.expects(starts[0], starts[-1] + views[-1].nbytes)
        of = self._expected_of if is_expected else self._whole
        wanted = []
        for start, view in zip(starts, views, strict=True):
            for number in range(start // size, (start + view.nbytes - 1) // size + 1):
                extent = of(number, size)
                was_there = self._ahead.has(self._of, extent)
                wanted.append((extent, self._ahead.part(self._of, extent), start, view))
                goes_on = not is_expected and was_there and start + view.nbytes > number * size + size // 2
                if goes_on and (number + 1) * size < self._of.n_bytes:
                    self._ahead.part(self._of, self._whole(number + 1, size))
        for (begin, stop), future, start, view in wanted:
            first, last = max(start, begin), min(start + view.nbytes, stop)
            view[first - start : last - start] = future.result()[first - begin : last - begin]

    def _whole(self, number: int, size: int = PART) -> Extent:
        return number * size, min((number + 1) * size, self._of.n_bytes)

    def _expected_of(self, number: int, size: int = PART) -> Extent:
        """What of a part will be read; nothing of others."""
        start, stop = self._whole(number, size)
        own = [(max(start, first), min(stop, last)) for first, last in self._expected if first < stop and last > start]
        return (min(first for first, _ in own), max(last for _, last in own)) if own else (start, start)

    def _from_part(self, number: int, start: int, into: memoryview) -> None:
        depth, extent = self._depth(number), self._whole(number)
        if depth == 0 and not self._ahead.has(self._of, extent):
            waited(lambda: self._of.fetch(start, into))
            return
        self._take(number, start, into, depth, self._whole)

    def _take(self, number: int, start: int, into: memoryview, depth: int, of: Callable[[int], Extent]) -> None:
        """Fills `into` from what `of` says of a part, and has as much of so many further ones fetched."""
        begin, stop = of(number)
        future = self._ahead.part(self._of, (begin, stop))
        last = -(-self._of.n_bytes // PART) - 1
        for further in range(number + 1, min(number + depth, last) + 1):
            first, end = of(further)
            if end > first:
                self._ahead.part(self._of, (first, end))
        into[:] = future.result()[start - begin : start - begin + into.nbytes]

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
