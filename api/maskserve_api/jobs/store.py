"""The rows of jobs: SQLite, read by the loop and written by one thread, which commits what has come together at once."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import fields, replace
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

from maskserve.errors import SettingsError
from maskserve.payload.header import shown
from maskserve_api.errors import NoSpaceError, ServiceError, SpoolError
from maskserve_api.forms import Form
from maskserve_api.jobs.clock import Mark
from maskserve_api.jobs.job import ENDED, OPEN, Job, Result, Status

T = TypeVar("T")
Change: TypeAlias = Callable[[sqlite3.Connection], T]
EDITION = 1
"""Of the tables below; a store of another one is refused."""
MOST_TOGETHER = 256
BUSY_S = 10.0
LITTLE_BYTES = 1 << 16
"""Of free disk: below it a failed write is taken for one of a full disk, whatever SQLite calls it."""
COLUMNS = ", ".join(column.name for column in fields(Job))
HAS_ENDED = f"status IN ({', '.join(repr(str(status)) for status in ENDED)})"
HAS_EXPIRED = f"status = '{Status.EXPIRED}'"
"""Spelled out, and not as parameters: so SQLite sees that an index has them."""
TABLES = f"""
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, idempotency TEXT,
    asked_sha256 TEXT NOT NULL, verb TEXT NOT NULL, query BLOB NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL,
    request TEXT NOT NULL, op TEXT NOT NULL, request_id TEXT NOT NULL, status TEXT NOT NULL, attempts INTEGER NOT NULL,
    created_s REAL NOT NULL, started_s REAL, ended_s REAL, ended_age_s REAL, body_bytes INTEGER NOT NULL,
    is_inline INTEGER NOT NULL, n_blocks INTEGER NOT NULL, n_done INTEGER NOT NULL, result_bytes INTEGER,
    result_sha256 TEXT, result_type TEXT, problem TEXT, UNIQUE (owner, idempotency)
);
CREATE INDEX by_owner ON jobs (owner, id);
CREATE INDEX by_status ON jobs (status, seq);
CREATE INDEX by_end ON jobs (ended_age_s) WHERE {HAS_ENDED};
CREATE INDEX by_expiry ON jobs (ended_age_s) WHERE {HAS_EXPIRED};
CREATE TABLE bodies (seq INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE results (seq INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE clock (one INTEGER PRIMARY KEY CHECK (one = 1), mark TEXT NOT NULL);
"""


class Store:
    """The jobs of one spool; SettingsError where its file cannot be used.

    Reads are of one thread at a time; `write` may be called from any.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.fault: str | None = None
        """Why the last write failed, where that was no full disk; None once one succeeds."""
        try:
            self._writing, self._reading = connection(path), connection(path)
            create(self._writing, path)
        except sqlite3.Error as error:
            raise SettingsError(
                f"{shown(path)} cannot be used: {error}; give another --jobs-folder", parameter="serve_jobs_folder"
            ) from None
        self._asked: SimpleQueue[Asked[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_on, name="maskserve-jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends once all that was asked for is written."""
        self._asked.put(None)
        self._thread.join()
        for of in (self._writing, self._reading):
            of.close()

    # -- writing --------------------------------------------------------------------------------------------------

    def write(self, change: Change[T]) -> Future[T]:
        """What `change` gives, once it is on disk."""
        asked = Asked(change)
        self._asked.put(asked)
        return asked.future

    def _write_on(self) -> None:
        while (first := self._asked.get()) is not None:
            together, is_last = [first], False
            while len(together) < MOST_TOGETHER:
                try:
                    further = self._asked.get_nowait()
                except Empty:
                    break
                if further is None:
                    is_last = True
                    break
                together.append(further)
            self._commit(together)
            if is_last:
                return

    def _commit(self, together: list[Asked[Any]]) -> None:
        """One transaction, and so one fsync, for all of them: all are done, or none is."""
        try:
            self._writing.execute("BEGIN IMMEDIATE")
            given = [asked.change(self._writing) for asked in together]
            self._writing.execute("COMMIT")
        except Exception as error:  # whatever it is, those who wait must hear of it, and the thread serves all
            self._undo()
            failure = self.translated(error) if isinstance(error, sqlite3.Error) else error
            self.fault = failure.message if isinstance(failure, SpoolError) else self.fault
            for asked in together:
                asked.future.set_exception(failure)
            return
        self.fault = None
        for asked, value in zip(together, given, strict=True):
            asked.future.set_result(value)

    def _undo(self) -> None:
        try:
            if self._writing.in_transaction:
                self._writing.execute("ROLLBACK")
        except sqlite3.Error as error:
            self.fault = f"the store of jobs cannot be written: {error}"

    def translated(self, error: sqlite3.Error) -> ServiceError:
        """The failure of a read or a write as one of ours; its message names no path."""
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_FULL or free_bytes(os.path.dirname(self._path)) < LITTLE_BYTES:
            return NoSpaceError("the disk of the service is full; try again later")
        return SpoolError(f"the store of jobs cannot be used: {error}")

    # -- reading --------------------------------------------------------------------------------------------------

    def job(self, owner: str, id: str) -> Job | None:
        return self._one(f"SELECT {COLUMNS} FROM jobs WHERE id = ? AND owner = ?", (id, owner))

    def by_seq(self, seq: int) -> Job | None:
        return self._one(f"SELECT {COLUMNS} FROM jobs WHERE seq = ?", (seq,))

    def by_idempotency(self, owner: str, key: str) -> Job | None:
        return self._one(f"SELECT {COLUMNS} FROM jobs WHERE owner = ? AND idempotency = ?", (owner, key))

    def page(self, owner: str, statuses: Iterable[Status], n: int, after: str) -> list[Job]:
        """At most `n` jobs of an owner, in the order in which their submission began, from behind the id `after`."""
        wanted = tuple(statuses)
        marks = ", ".join("?" * len(wanted))
        text = f"SELECT {COLUMNS} FROM jobs WHERE owner = ? AND id > ? AND status IN ({marks}) ORDER BY id LIMIT ?"
        return [as_job(row) for row in self._rows(text, (owner, after, *wanted, n))]

    def of_status(self, *statuses: Status) -> list[Job]:
        marks = ", ".join("?" * len(statuses))
        text = f"SELECT {COLUMNS} FROM jobs WHERE status IN ({marks}) ORDER BY seq"
        return [as_job(row) for row in self._rows(text, statuses)]

    def body(self, seq: int) -> bytes:
        return self._data("bodies", seq)

    def result(self, seq: int) -> bytes | None:
        """The bytes of a result; None where they are a file."""
        found = self._rows("SELECT data FROM results WHERE seq = ?", (seq,))
        return bytes(found[0][0]) if found else None

    def numbers(self) -> list[tuple[str, Status, int, int]]:
        """For each owner and status: how many jobs there are, and how many bytes of bodies or results they keep."""
        text = (
            "SELECT owner, status, COUNT(*), SUM(CASE WHEN status IN (?, ?) THEN body_bytes ELSE COALESCE(result_bytes, 0) END) "
            "FROM jobs GROUP BY owner, status"
        )
        return [(owner, Status(status), n, n_bytes) for owner, status, n, n_bytes in self._rows(text, OPEN)]

    def files(self) -> set[str]:
        """The ids of jobs whose results are files."""
        text = "SELECT id FROM jobs WHERE status = ? AND seq NOT IN (SELECT seq FROM results)"
        return {id for (id,) in self._rows(text, (Status.SUCCEEDED,))}

    def refuse_edited(self) -> None:
        """SpoolError where a table is not there, or ids, requests or problems of jobs are what nobody here has written."""
        for name in ("bodies", "results", "clock"):
            self._rows(f"SELECT 1 FROM {name} LIMIT 1", ())
        text = (
            "SELECT COUNT(*) FROM jobs WHERE length(id) != 32 OR id GLOB '*[^0-9a-f]*' OR json_type(request) IS NOT 'object' "
            "OR (problem IS NOT NULL AND json_type(problem, '$.code') IS NOT 'text')"
        )
        ((n,),) = self._rows(text, ())
        if n:
            raise SpoolError("the store of jobs is not as maskserve has left it")

    def last_id(self) -> str:
        """The largest id of those that are here; empty without one."""
        ((id,),) = self._rows("SELECT COALESCE(MAX(id), '') FROM jobs", ())
        return str(id)

    def oldest(self) -> tuple[float | None, float | None]:
        """The age of the spool when the first of the jobs that have ended did so, and the first of the expired ones."""
        first = [f"(SELECT MIN(ended_age_s) FROM jobs WHERE {which})" for which in (HAS_ENDED, HAS_EXPIRED)]
        ended_s, expired_s = self._rows(f"SELECT {', '.join(first)}", ())[0]
        return ended_s, expired_s

    def mark(self) -> Mark | None:
        found = self._rows("SELECT mark FROM clock", ())
        return Mark(**json.loads(found[0][0])) if found else None

    def _data(self, of: str, seq: int) -> bytes:
        found = self._rows(f"SELECT data FROM {of} WHERE seq = ?", (seq,))
        if not found:
            raise SpoolError("the store of jobs lacks what it should have")
        return bytes(found[0][0])

    def _one(self, text: str, given: tuple[object, ...]) -> Job | None:
        found = self._rows(text, given)
        return as_job(found[0]) if found else None

    def _rows(self, text: str, given: Iterable[object]) -> list[tuple[Any, ...]]:
        try:
            return self._reading.execute(text, tuple(given)).fetchall()
        except sqlite3.Error as error:
            raise self.translated(error) from None


class Asked(Generic[T]):
    """A change that was asked for, and its outcome."""

    __slots__ = ("change", "future")

    def __init__(self, change: Change[T]) -> None:
        self.change, self.future = change, Future[T]()


def connection(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    return db


def create(db: sqlite3.Connection, path: str) -> None:
    """The tables, where the file is new; SettingsError where they are of another edition."""
    (edition,) = db.execute("PRAGMA user_version").fetchone()
    if edition == 0:
        db.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {EDITION}; COMMIT;")
    elif edition != EDITION:
        raise SettingsError(
            f"{shown(path)} was written by another version of maskserve (its edition is {edition}, this one's {EDITION}): "
            "run that version until its jobs are done, or give another --jobs-folder",
            parameter="serve_jobs_folder",
        )
    db.execute("BEGIN IMMEDIATE")  # a read-only file is met here, and not at the first job
    db.execute(f"PRAGMA user_version = {EDITION}")
    db.execute("COMMIT")


def as_job(row: tuple[Any, ...]) -> Job:
    given = dict(zip(Job.__slots__, row, strict=True))
    for name, kind in (("status", Status), ("question", Form), ("answer", Form), ("is_inline", bool)):
        given[name] = kind(given[name])
    return Job(**given)


def free_bytes(folder: str) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return LITTLE_BYTES
    return found.f_bavail * found.f_frsize


# -- changes ----------------------------------------------------------------------------------------------------------


def insert(job: Job, body: bytes | None) -> Change[tuple[Job, bool]]:
    """The job as it stands, and whether it is new: who comes second with an idempotency key gets the first one's job."""
    names = [name for name in Job.__slots__ if name != "seq"]
    marks = ", ".join("?" * len(names))
    text = f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks}) ON CONFLICT (owner, idempotency) DO NOTHING"
    values = [getattr(job, name) for name in names]

    def change(db: sqlite3.Connection) -> tuple[Job, bool]:
        done = db.execute(text, values)
        if done.rowcount == 1:
            if body is not None:
                db.execute("INSERT INTO bodies (seq, data) VALUES (?, ?)", (done.lastrowid, body))
            return replace(job, seq=done.lastrowid or 0), True
        first = f"SELECT {COLUMNS} FROM jobs WHERE owner = ? AND idempotency = ?"
        return as_job(db.execute(first, (job.owner, job.idempotency)).fetchone()), False

    return change


def begin(seq: int, now_s: float) -> Change[bool]:
    """Whether the job was queued, and now runs."""

    def change(db: sqlite3.Connection) -> bool:
        text = "UPDATE jobs SET status = ?, attempts = attempts + 1, started_s = ? WHERE seq = ? AND status = ?"
        return db.execute(text, (Status.RUNNING, now_s, seq, Status.QUEUED)).rowcount == 1

    return change


def put_back(seq: int, *, counts: bool) -> Change[bool]:
    """Whether the job ran, and now is queued again; an attempt that does not count was ended by the service itself."""

    def change(db: sqlite3.Connection) -> bool:
        text = "UPDATE jobs SET status = ?, attempts = attempts - ?, started_s = NULL WHERE seq = ? AND status = ?"
        return db.execute(text, (Status.QUEUED, 0 if counts else 1, seq, Status.RUNNING)).rowcount == 1

    return change


def end(
    job: Job, status: Status, *, now_s: float, age_s: float, n_done: int, result: Result | None = None, problem: str | None = None
) -> Change[Job | None]:  # fmt: skip
    """The job, ended; None where it had ended otherwise before."""
    found = (None, None, None) if result is None else (result.n_bytes, result.sha256, result.media_type)

    def change(db: sqlite3.Connection) -> Job | None:
        text = (
            "UPDATE jobs SET status = ?, ended_s = ?, ended_age_s = ?, n_done = ?, result_bytes = ?, result_sha256 = ?, "
            "result_type = ?, problem = ? WHERE seq = ? AND status IN (?, ?)"
        )
        values = (status, now_s, age_s, n_done, *found, problem, job.seq, *OPEN)
        if db.execute(text, values).rowcount == 0:
            return None
        db.execute("DELETE FROM bodies WHERE seq = ?", (job.seq,))
        if result is not None and result.data is not None:
            db.execute("INSERT INTO results (seq, data) VALUES (?, ?)", (job.seq, result.data))
        return as_job(db.execute(f"SELECT {COLUMNS} FROM jobs WHERE seq = ?", (job.seq,)).fetchone())

    return change


def forget(seq: int) -> Change[Job | None]:
    """The job as it stood, and is no more; None where it has not ended, or was forgotten before."""

    def change(db: sqlite3.Connection) -> Job | None:
        text = f"SELECT {COLUMNS} FROM jobs WHERE seq = ? AND status NOT IN (?, ?)"
        row = db.execute(text, (seq, *OPEN)).fetchone()
        if row is None:
            return None
        db.execute("DELETE FROM results WHERE seq = ?", (seq,))
        db.execute("DELETE FROM jobs WHERE seq = ?", (seq,))
        return as_job(row)

    return change


def expire(mark: Mark, kept_s: float, most: int) -> Change[tuple[list[Job], list[Job]]]:
    """At most so many of the jobs that ended `kept_s` ago, as they were before they lost their results; and those that, having
    expired, are gone altogether after as long again. Notes the age of the spool."""
    old = f"SELECT {COLUMNS} FROM jobs WHERE ended_age_s <= ? AND {HAS_ENDED} LIMIT ?"
    older = f"SELECT {COLUMNS} FROM jobs WHERE ended_age_s <= ? AND {HAS_EXPIRED} LIMIT ?"
    lose = (
        "UPDATE jobs SET status = ?, result_bytes = NULL, result_sha256 = NULL, result_type = NULL, problem = NULL "
        "WHERE seq = ?"
    )

    def change(db: sqlite3.Connection) -> tuple[list[Job], list[Job]]:
        db.execute("INSERT OR REPLACE INTO clock (one, mark) VALUES (1, ?)", (json.dumps(mark.as_dict()),))
        gone = [as_job(r) for r in db.execute(older, (mark.age_s - 2 * kept_s, most)).fetchall()]
        expired = [as_job(r) for r in db.execute(old, (mark.age_s - kept_s, most)).fetchall()]
        db.executemany("DELETE FROM jobs WHERE seq = ?", [(job.seq,) for job in gone])
        db.executemany("DELETE FROM results WHERE seq = ?", [(job.seq,) for job in expired])
        db.executemany(lose, [(Status.EXPIRED, job.seq) for job in expired])
        return expired, gone

    return change
