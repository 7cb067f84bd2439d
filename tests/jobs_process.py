"""A process that serves jobs of a folder, for tests that kill it, take its disk away or turn its clock."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import httpx

from tests.command_line import COMMAND, environment

READY = re.compile(r"listens on http://127\.0\.0\.1:(\d+)")
LIVES = re.compile("jobs live in")
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(slots=True, kw_only=True)
class Process:
    """A service that runs; what it says goes to a file."""

    child: subprocess.Popen[bytes]
    log: Path
    http: httpx.Client

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(30)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code, after a signal."""
        self.child.send_signal(number)
        return self.child.wait(60)

    def submit(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(path, content=body, headers={"prefer": "respond-async"} | given)

    def ended(self, path: str) -> dict[str, object]:
        """The job, once it has ended."""
        for _ in range(4):
            told: dict[str, object] = self.http.get(f"{path}?wait=30").json()
            if told["ended"]:
                return told
        raise AssertionError(f"{path} does not end: {told}")


def spawned(folder: Path, log: Path, *flags: str, env: Mapping[str, str] = NOTHING) -> subprocess.Popen[bytes]:
    words = ["serve", "--port", "0", "--jobs", "--jobs-folder", str(folder), "--grace", "5", *flags]
    with log.open("wb") as file:
        return subprocess.Popen([*COMMAND, *words], stderr=file, env=environment() | env)


def said_soon(
    child: subprocess.Popen[bytes], log: Path, word: re.Pattern[str], *, timeout_s: float = 60
) -> re.Match[str]:
    end_s = time.monotonic() + timeout_s
    while not (found := word.search(log.read_text(errors="replace"))):
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < end_s, "the service does not start"
        time.sleep(0.01)
    return found


@contextmanager
def served(folder: Path, log: Path, *flags: str, env: Mapping[str, str] = NOTHING) -> Iterator[Process]:
    """A process that takes requests; killed at the end, if it still runs."""
    child = spawned(folder, log, *flags, env=env)
    try:
        port = said_soon(child, log, READY)[1]
        limits = httpx.Limits(max_connections=100)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as http:
            yield Process(child=child, log=log, http=http)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(30)


def left(folder: Path) -> list[str]:
    """The files of bodies, and what a process that died would have left behind."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and (path.parent.name == "bodies" or path.name.startswith(".maskserve-"))
    )
