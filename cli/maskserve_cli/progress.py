"""A progress bar, or a note, for what takes more than two seconds, on a terminal only."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from maskserve_cli.exits import say

PATIENCE_S = 2.0


@contextmanager
def progress(what: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A function that hears how many of `total` bytes, or of another unit, were done; the bar appears after PATIENCE_S."""
    if total == 0 or sys.stderr is None or not sys.stderr.isatty():
        yield lambda n: None
        return
    bar = Bar(what, total, unit)
    try:
        yield bar.tick
    finally:
        bar.close()


@contextmanager
def patience(what: str) -> Iterator[None]:
    """A line on stderr after PATIENCE_S, for what cannot say how far it is."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(PATIENCE_S, say, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Bar:
    """A bar of rich's, made when it is needed."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.start_s = time.monotonic()
        self.close: Callable[[], None] = lambda: None
        self.show: Callable[[int], None] = lambda done: None

    def tick(self, n: int) -> None:
        self.done += n
        if self.start_s and time.monotonic() - self.start_s > PATIENCE_S:
            self.start_s = 0.0
            self.open()
        self.show(self.done)

    def open(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        rate = TextColumn("{task.speed:.0f} " + f"{self.unit}/s")
        counts = [DownloadColumn()] if self.unit == "bytes" else [MofNCompleteColumn(), rate]
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        task = bar.add_task(self.what, total=self.total)
        bar.start()
        self.close = bar.stop
        self.show = lambda done: bar.update(task, completed=done)
