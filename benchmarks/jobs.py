"""`python -m benchmarks.jobs`: what it costs to submit a job of 1 kB, beside the synchronous reply to the same request.

Both are asked of one service by turns, with an empty store and with many jobs that have ended; and each turn a bare SQLite
commits as many bytes on the same disk, which is what the promise of a 202 costs there (--folder /dev/shm: nothing). The
service computes no job meanwhile, unless --computing says so.
"""

from __future__ import annotations

import argparse
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from statistics import median, quantiles

from benchmarks.report import cpu, table
from benchmarks.soak import question

PATH = "/v1/reduce?op=mean&dim=0"
CELLS = 200
"""Of float32 with a mask: 1 kB."""
FINISHED = 10_000
HEAD = (
    "jobs that have ended", "synchronous ms", "submitting ms", "ratio", "a bare commit ms", "ratio without it", "p99 ms",
    "p99 ms of submitting",
)  # fmt: skip


@contextmanager
def service(folder: str, *, computing: bool) -> Iterator[tuple[int, str]]:
    """A service of jobs on a free port, in a thread, and the file of its store."""
    from maskserve.payload.format import DEFAULT_LIMITS
    from maskserve_api.app import create_app
    from maskserve_api.jobs.desk import Jobs, Options
    from maskserve_api.server import Server

    options = Options(
        folder=folder, result_ttl_s=86400.0, n_running=2 if computing else 0, max_body=1 << 20, per_key=10**6, most=10**6,
        most_bytes=1 << 40, memory=1 << 28,
    )  # fmt: skip
    jobs = Jobs(options, DEFAULT_LIMITS)
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(create_app(jobs=jobs), "127.0.0.1", 5.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1], jobs.spool.store_path
    finally:
        server.should_exit = True
        thread.join()


def add_finished(store: str, n: int) -> None:
    """Jobs that have ended, as many, beside those that are there."""
    with closing(sqlite3.connect(store, timeout=30)) as db, db:
        (row,) = db.execute("SELECT * FROM jobs LIMIT 1").fetchall()
        names = [name for _, name, *_ in db.execute("PRAGMA table_info(jobs)")]
        given = dict(zip(names, row, strict=True)) | {"status": "succeeded", "ended_s": time.time(), "ended_age_s": 1e9}
        del given["seq"]
        marks = ", ".join("?" * len(given))
        rows = [tuple((given | {"id": f"finished-{i}"}).values()) for i in range(n)]
        db.executemany(f"INSERT INTO jobs ({', '.join(given)}) VALUES ({marks})", rows)


def timed(connection: HTTPConnection, body: bytes, headers: dict[str, str], status: int) -> float:
    """The seconds of one request."""
    start_s = time.perf_counter()
    connection.request("POST", PATH, body, headers)
    response = connection.getresponse()
    response.read()
    took_s = time.perf_counter() - start_s
    assert response.status == status, response.status
    return took_s


@contextmanager
def bare_store(path: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE IF NOT EXISTS bodies (seq INTEGER PRIMARY KEY, data BLOB)")
        yield db


def committed(db: sqlite3.Connection, body: bytes) -> float:
    """The seconds of one commit."""
    start_s = time.perf_counter()
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO bodies (data) VALUES (?)", (body,))
    db.execute("COMMIT")
    return time.perf_counter() - start_s


Times = tuple[list[float], list[float], list[float]]


def by_turns(port: int, bare: str, n: int) -> Times:
    """The seconds of so many synchronous requests, of as many submissions, and of bare commits, by turns."""
    body = question(CELLS)
    with closing(HTTPConnection("127.0.0.1", port)) as connection, bare_store(bare) as db:
        for _ in range(20):
            timed(connection, body, {}, 200)
            timed(connection, body, {"Prefer": "respond-async"}, 202)
        at_once, later, commits = [], [], []
        for _ in range(n):
            at_once.append(timed(connection, body, {}, 200))
            later.append(timed(connection, body, {"Prefer": "respond-async"}, 202))
            commits.append(committed(db, body))
    return at_once, later, commits


def line(n_finished: int, times: Times) -> tuple[str, ...]:
    one, other, bare = map(median, times)
    last = [quantiles(some, n=100)[98] * 1000 for some in times[:2]]
    ratios = other / one, (other - bare) / one
    return (
        f"{n_finished}", f"{one * 1000:.2f}", f"{other * 1000:.2f}", f"{ratios[0]:.2f}", f"{bare * 1000:.2f}",
        f"{ratios[1]:.2f}", *(f"{ms:.2f}" for ms in last),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--folder", default=".", help="where jobs live: the disk is what is measured")
    parser.add_argument("--computing", action="store_true", help="jobs are computed while others are submitted")
    given = parser.parse_args()
    from maskserve_api import logs

    logs.configure("off")
    lines = []
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-", dir=given.folder) as folder,
        service(folder, computing=given.computing) as (port, store),
    ):
        lines.append(line(0, by_turns(port, f"{folder}/bare", given.requests)))
        add_finished(store, FINISHED)
        lines.append(line(FINISHED, by_turns(port, f"{folder}/bare", given.requests)))
    print(f"Submitting a job of 1 kB, {given.requests} by turns, {cpu()}:\n")
    print(table(HEAD, lines))


if __name__ == "__main__":
    main()
