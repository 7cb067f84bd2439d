"""`python -m tests.jobs_faults --kills 20 --jobs 1000`: a service of jobs that is killed at random points.

What must be true afterwards: no acknowledged job is lost, none that had ended ran again, every result is whole and right,
and the store is sound.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np

from maskserve import answers, requests
from maskserve.payload.format import BytesPayload
from tests.http_service import payload
from tests.jobs_process import LIVES, Process, left, said_soon, served, spawned

Tell = Callable[[str], None]
CLIENTS = 4
LIFE_S = 0.7
KINDS: tuple[tuple[str, dict[str, str], int], ...] = (
    ("reduce", {"op": "mean", "dim": "0"}, 8),
    ("softmax", {"op": "softmax", "dim": "1"}, 192),  # more than a store keeps: body and result are files
    ("scan", {"op": "cumsum", "dim": "0"}, 64),
    ("reduce", {"op": "median"}, 160),
)


def question(number: int) -> tuple[str, dict[str, str], bytes]:
    """The verb, the words and the body of a job: no two are the same."""
    verb, words, n = KINDS[number % len(KINDS)]
    cells = np.random.default_rng(number).normal(size=(n, n)).astype(np.float32)
    return verb, words, payload(data=cells, mask=cells < 1)


def expected(number: int) -> str:
    """The SHA-256 of the answer, computed here."""
    verb, words, body = question(number)
    return sha256(answers.run(requests.build(verb, words), BytesPayload(body)).to_bytes()).hexdigest()


@dataclass(slots=True)
class Seen:
    """What clients know of the jobs, whatever becomes of the service."""

    acknowledged: dict[int, str] = field(default_factory=dict)
    final: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was told of each job that had ended."""

    def look(self, process: Process) -> None:
        """Looks through all jobs; fails where one that had ended is told of otherwise."""
        after: dict[str, str] = {}
        while True:
            page = process.http.get("/v1/jobs", params={"limit": "1000"} | after).json()
            for job in page["jobs"]:
                told = {name: value for name, value in job.items() if name != "expires"}
                if job["ended"]:
                    assert self.final.setdefault(job["id"], told) == told, "a job that had ended has changed"
                else:
                    assert job["id"] not in self.final, "a job that had ended is not ended any more"
            if page["next"] is None:
                return
            after = {"after": page["next"]}


def submit(process: Process, seen: Seen, stop: Event, number: int) -> None:
    """Submits a job once; a service that dies meanwhile has it submitted again in its next life, with the same key."""
    if stop.is_set() or number in seen.acknowledged:
        return
    verb, words, body = question(number)
    url = httpx.URL(f"/v1/{verb}", params=words)
    try:
        response = process.submit(str(url), body, idempotency_key=f"job {number}")
    except httpx.TransportError:
        return
    assert response.status_code == 202, response.text
    seen.acknowledged[number] = response.json()["id"]


def one_life(process: Process, seen: Seen, numbers: list[int], life_s: float) -> None:
    """Clients submit and look until the service is killed."""
    stop = Event()
    with ThreadPoolExecutor(CLIENTS) as threads:
        asked: list[Future[None]] = [threads.submit(submit, process, seen, stop, number) for number in numbers]
        end_s = time.monotonic() + life_s
        while time.monotonic() < end_s:
            seen.look(process)
            time.sleep(0.05)
        process.kill()
        stop.set()
        for future in asked:
            future.result()


def killed_at_random(folder: Path, *, n: int, kills: int, seed: int, tell: Tell) -> Counter[str]:
    """Kills the service again and again while jobs are submitted and done; how often what happened."""
    chance, seen, spool = random.Random(seed), Seen(), folder / "jobs"
    logs = [folder / f"life-{life}.log" for life in range(kills + 1)]
    flags = ("--jobs-per-key", str(n), "--jobs-running", "3")
    for life in range(kills):
        if chance.random() < 0.15:  # while it takes up what the one before has left
            child = spawned(spool, logs[life], *flags)
            said_soon(child, logs[life], LIVES)
            child.kill()
            child.wait(30)
            continue
        with served(spool, logs[life], *flags) as process:
            numbers = [*range(min(n, n * (life + 2) // kills))]  # more than there is time for
            one_life(process, seen, numbers, LIFE_S * chance.random())
        tell(f"life {life + 1} of {kills}: {len(seen.acknowledged)} acknowledged, {len(seen.final)} seen to have ended")
    with served(spool, logs[-1], *flags) as process:
        check_all(process, seen, n)
        assert process.end() == 0
    return check_left(spool, logs, seen, n)


def check_all(process: Process, seen: Seen, n: int) -> None:
    """Every job ends, and every result is what is computed here."""
    for number in range(n):
        known = seen.acknowledged.get(number)
        seen.acknowledged.pop(number, None)
        submit(process, seen, Event(), number)
        assert known in (None, seen.acknowledged[number]), "an acknowledged job was lost"
    for number, id in seen.acknowledged.items():
        told = process.ended(f"/v1/jobs/{id}")
        assert told["status"] == "succeeded", told
        result = process.http.get(f"/v1/jobs/{id}/result")
        assert sha256(result.content).hexdigest() == expected(number)
        assert result.headers["etag"].strip('"') == expected(number)
    seen.look(process)
    assert seen.final.keys() == set(seen.acknowledged.values()), "there is a job that nobody submitted"


def check_left(spool: Path, logs: list[Path], seen: Seen, n: int) -> Counter[str]:
    """The store is sound, nothing was left behind, and no log tells of two ends of a job."""
    db = sqlite3.connect(spool / "jobs.sqlite3")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    rows = db.execute("SELECT attempts, status FROM jobs").fetchall()
    db.close()
    assert len(rows) == n
    assert left(spool) == []
    ends = Counter(event["job"] for log in logs for event in events(log) if event.get("event") == "job")
    assert set(ends.values()) <= {1}, "a job has ended twice"
    return Counter(
        {"jobs": len(rows), "tried again": sum(attempts > 1 for attempts, _ in rows), "ends in logs": len(ends)}
    )


def events(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that are whole."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{") and line.endswith("}"):
            found.append(json.loads(line))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory(prefix="maskserve-jobs-") as folder:
        found = killed_at_random(
            Path(folder), n=given.jobs, kills=given.kills, seed=given.seed, tell=partial(print, flush=True)
        )
    print(", ".join(f"{n} {what}" for what, n in found.items()))


if __name__ == "__main__":
    main()
