"""Which job comes next: each key's in the order of submission, and keys in turn, those with the fewest running ones first."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque


class Waiting:
    """The numbers of queued jobs, by owner."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[int]] = OrderedDict()
        self.running: Counter[str] = Counter()

    def add(self, owner: str, seq: int) -> None:
        self._queues.setdefault(owner, deque()).append(seq)

    def put_back(self, owner: str, seq: int) -> None:
        """Comes next of its owner's again."""
        self._queues.setdefault(owner, deque()).appendleft(seq)

    def take(self) -> tuple[str, int] | None:
        """The next one, which counts as running until it is `done`; None where none waits."""
        if not self._queues:
            return None
        owner = min(self._queues, key=lambda name: self.running[name])  # the first of equals: who waits longest
        queue = self._queues[owner]
        seq = queue.popleft()
        if queue:
            self._queues.move_to_end(owner)
        else:
            del self._queues[owner]
        self.running[owner] += 1
        return owner, seq

    def done(self, owner: str) -> None:
        self.running[owner] -= 1
        if not self.running[owner]:
            del self.running[owner]
