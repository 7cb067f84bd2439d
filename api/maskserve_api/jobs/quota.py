"""How many jobs there may be, and how many bytes they may keep: a client's share, and the service's whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from maskserve_api.errors import BusyError, JobLimitError, NoSpaceError
from maskserve_api.jobs.job import Job

ROW_BYTES = 1 << 10
"""What a job takes beside its body and its result."""


class Quota:
    """Counts jobs that have not ended, by owner, and the bytes that all jobs keep. Used by the loop's thread alone."""

    def __init__(self, *, per_key: int, most: int, most_bytes: int) -> None:
        self.per_key, self.most, self.most_bytes = per_key, most, most_bytes
        self.n_open: Counter[str] = Counter()
        self.n_bytes = 0

    @contextmanager
    def place(self, owner: str, n_bytes: int) -> Iterator[Place]:
        """Room for one job more of an owner, given back unless it is kept; what its body says to have must fit now.

        Bytes are counted as they come: a promise alone blocks nobody.
        """
        if self.n_open[owner] >= self.per_key:
            raise JobLimitError(
                f"{self.per_key} jobs of yours have not ended, as many as may: wait for some, or cancel them"
            )
        if self.n_open.total() >= self.most:
            raise BusyError(f"{self.most} jobs have not ended, as many as may; try again")
        self.refuse(ROW_BYTES + n_bytes)
        place = Place(self, owner)
        self.n_open[owner] += 1
        try:
            place.add(ROW_BYTES)
            yield place
        finally:
            if not place.is_kept:
                self.end(owner)
                self.n_bytes -= place.n_bytes

    def add(self, n_bytes: int) -> None:
        self.refuse(n_bytes)
        self.n_bytes += n_bytes

    def refuse(self, n_bytes: int) -> None:
        """Raises where so many bytes more are too many."""
        if self.n_bytes + n_bytes > self.most_bytes:
            raise NoSpaceError(
                f"the jobs of all keys would keep more than {self.most_bytes} bytes: forget some (DELETE), or try again later"
            )

    def end(self, owner: str) -> None:
        """One job less that has not ended."""
        self.n_open[owner] -= 1
        if not self.n_open[owner]:
            del self.n_open[owner]  # or each key that ever was would stay

    def ended(self, job: Job) -> None:
        """The job has ended: its body is gone, and its result, counted before, is there."""
        self.end(job.owner)
        self.n_bytes -= job.body_bytes

    def lost(self, job: Job, *, row: bool) -> None:
        """The job's result is gone, and perhaps its row."""
        self.n_bytes -= (job.result_bytes or 0) + (ROW_BYTES if row else 0)


class Place:
    """Room for a job."""

    def __init__(self, quota: Quota, owner: str) -> None:
        self.quota, self.owner, self.n_bytes, self.is_kept = quota, owner, 0, False

    def add(self, n_bytes: int) -> None:
        self.quota.add(n_bytes)
        self.n_bytes += n_bytes

    def keep(self) -> None:
        self.is_kept = True
