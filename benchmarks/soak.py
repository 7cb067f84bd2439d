"""`python -m benchmarks.soak --minutes 10`: a real service under full load; memory and descriptors end where they began.

Sizes from 100 bytes to megabytes, every op of every verb, requests that are wrong, clients that vanish. It began when all
is warm: after 2 minutes, or a quarter of a shorter run. A line for each look goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np

try:
    import httpx
except ModuleNotFoundError:
    raise SystemExit("the service's benchmarks need httpx: pip install -e '.[test]'") from None

from benchmarks.report import table
from maskserve import requests
from maskserve.dtypes import boolean, f32
from maskserve.errors import RequestError
from maskserve.ops import verbs
from maskserve.payload.format import Output, to_bytes

ROOT = Path(__file__).parent.parent
CELLS = (8, 8, 8, 2_000, 2_000, 50_000, 500_000)
"""Sizes to draw from: most requests are small."""
CLIENTS = 8
RSS_GROWTH_BYTES = 32 << 20
MIB = 1 << 20
LOOK_S = 30.0
SETTLE_S = 30.0
VANISHED = 0
"""Stands for the status of who did not wait for one."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the process holds at a moment."""

    seconds: float
    rss_bytes: int
    descriptors: int
    n_requests: int

    def __str__(self) -> str:
        rss, descriptors = f"{self.rss_bytes / MIB:.0f} MiB RSS", f"{self.descriptors} descriptors"
        return f"{self.seconds:.0f} s: {self.n_requests} requests, {rss}, {descriptors}"


@dataclass(slots=True)
class Outcome:
    """What was answered, and what the process held from the end of the warm-up on."""

    statuses: Counter[int] = field(default_factory=Counter)
    held: list[Held] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        first, last = self.held[0], self.held[-1]
        found = [f"{n} times status {status}" for status, n in sorted(self.statuses.items()) if status >= 500]
        # a leak lifts every look; what is in use for a moment lifts one
        grown_bytes = min(held.rss_bytes for held in self.held[-3:]) - first.rss_bytes
        if grown_bytes > RSS_GROWTH_BYTES:
            found.append(
                f"memory grew by {grown_bytes / MIB:.0f} MiB from {first.seconds:.0f} s to the least of the last three looks; "
                f"at most {RSS_GROWTH_BYTES // MIB} are allowed: /proc/PID/smaps says where (anonymous maps of 64 MiB are "
                "malloc's arenas)"
            )
        if last.descriptors != first.descriptors:
            found.append(f"descriptors went from {first.descriptors} to {last.descriptors}")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was held and answered; 1 where something leaked or failed."""
    given = parser().parse_args(arguments)
    seconds = given.seconds or given.minutes * 60
    warm_up_s = given.warm_up or min(120.0, seconds / 4)
    left_s = max(1.0, seconds - warm_up_s)
    outcome = soaked(left_s, warm_up_s=warm_up_s, looks=max(3, round(left_s / LOOK_S)))
    print(report(outcome))
    return 1 if outcome.faults else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole run; default: 10")
    parser.add_argument("--seconds", type=float, help="in place of minutes")
    parser.add_argument("--warm-up", type=float, help="seconds before the first look; default: a quarter, at most 120")
    return parser


def soaked(seconds: float, *, warm_up_s: float, looks: int) -> Outcome:
    """A service under load for `seconds` after the warm-up; each look at it is taken when nobody asks."""
    outcome = Outcome()
    with service() as (child, base):
        began = time.monotonic()
        tell(f"the service has process id {child.pid}; the first look is after {warm_up_s:.0f} s")
        loaded(base, warm_up_s, outcome, seed=0)
        outcome.held.append(rested(child.pid, began, outcome))
        tell(str(outcome.held[-1]))
        for look in range(1, looks + 1):
            loaded(base, seconds / looks, outcome, seed=look)
            outcome.held.append(rested(child.pid, began, outcome, like=outcome.held[0]))
            tell(str(outcome.held[-1]))
    return outcome


def tell(line: str) -> None:
    print(f"soak: {line}", file=sys.stderr, flush=True)


@contextmanager
def service() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its URL."""
    command = [sys.executable, "-m", "maskserve_cli", "serve", "--port", "0", "--log", "off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            found = re.search(r"http://[0-9.:]+", line)
            if found is None:
                raise RuntimeError(f"the service did not start: {line}")
            yield child, found[0]
        finally:
            child.terminate()


def loaded(base: str, seconds: float, outcome: Outcome, *, seed: int) -> None:
    """All clients ask for `seconds`; then none has a connection any longer."""
    end = time.monotonic() + seconds
    counts = [Counter[int]() for _ in range(CLIENTS)]
    threads = [
        threading.Thread(target=client, args=(base, end, random.Random(f"{seed} {i}"), count))
        for i, count in enumerate(counts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.statuses += sum(counts, Counter[int]())


def client(base: str, end_s: float, chance: random.Random, statuses: Counter[int]) -> None:
    """One after the other: mostly right requests, some wrong ones, and some whose answer nobody awaits."""
    asked = list(paths())
    with httpx.Client(base_url=base, timeout=120) as http:
        while time.monotonic() < end_s:
            path, body = chance.choice(asked), question(chance.choice(CELLS))
            kind = chance.random()
            if kind < 0.05:
                vanish(base, path, body, chance)
                statuses[VANISHED] += 1
                continue
            if kind < 0.10:
                path = path.replace("op=", "op=no_such_")
            elif kind < 0.15:
                body = body[: chance.randrange(len(body))]
            statuses[http.post(path, content=body).status_code] += 1


def paths() -> Iterator[str]:
    """A path for each op of each verb that needs no more than a dim."""
    for verb in verbs():
        for row in requests.rows(verb):
            for words in ({"op": row.name, "dim": "0"}, {"op": row.name}):
                try:
                    requests.build(verb, words)
                except RequestError:
                    continue
                yield f"/v1/{verb}?{urlencode(words)}"
                break


def question(n_cells: int) -> bytes:
    """`n_cells` of float32, a third of them masked, in 8 columns."""
    shape = (n_cells // 8, 8)
    data = np.linspace(-1, 1, n_cells, dtype=np.float32)
    mask = np.arange(n_cells) % 3 > 0
    return to_bytes([Output("x", f32, shape, data.tobytes()), Output("x.mask", boolean, shape, mask.tobytes())], {})


def vanish(base: str, path: str, body: bytes, chance: random.Random) -> None:
    """Sends a part or all of a request, and is gone."""
    where = urlsplit(base)
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with closing(socket.create_connection((where.hostname or "", where.port or 0), timeout=60)) as connection:
        connection.sendall(head + body[: chance.choice((0, len(body) // 2, len(body)))])


def rested(pid: int, began_s: float, outcome: Outcome, *, like: Held | None = None) -> Held:
    """What the process holds once its connections are closed: as many descriptors as in `like`, or after SETTLE_S."""
    end = time.monotonic() + SETTLE_S
    time.sleep(0.5)
    while like and len(os.listdir(f"/proc/{pid}/fd")) != like.descriptors and time.monotonic() < end:
        time.sleep(0.1)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Held(
        seconds=time.monotonic() - began_s,
        rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        n_requests=outcome.statuses.total(),
    )


def report(outcome: Outcome) -> str:
    lines = [
        [f"{held.seconds:.0f}", str(held.n_requests), f"{held.rss_bytes / MIB:.0f}", str(held.descriptors)]
        for held in outcome.held
    ]
    names = {VANISHED: "vanished"}
    answered = [[names.get(status, str(status)), str(n)] for status, n in sorted(outcome.statuses.items())]
    return "\n\n".join(
        (
            table(["seconds", "requests", "RSS in MiB", "descriptors"], lines),
            table(["status", "requests"], answered),
            "; ".join(outcome.faults) or "Nothing leaked.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
