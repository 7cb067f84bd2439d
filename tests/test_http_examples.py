"""The clients of examples/http, each run as its first line says, against a real service: all print the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from maskserve_api.keys import Keys
from tests.http_service import jobs_in, running

FOLDER = Path(__file__).parent.parent / "examples" / "http"
PRINTED = "station 1: 2\nstation 2: 1\nstation 3: no data\nrefused: unknown_op: op 'maen' is not known to reduce: "


@pytest.mark.parametrize(
    ("command", "needs"), [("sh mean.sh", "curl"), ("node mean.mjs", "node"), ("go run mean.go", "go")]
)
def test_a_client_prints_the_masked_means_and_meets_a_problem(command: str, needs: str) -> None:
    if shutil.which(needs) is None:
        pytest.skip(f"{needs} is not installed")
    with running() as service:
        ran = subprocess.run(
            [*command.split(), f"http://{service.netloc}/"], cwd=FOLDER, capture_output=True, text=True, timeout=120
        )
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert ran.stdout.startswith(PRINTED)
    assert ran.stdout.endswith("; did you mean mean?\n")


every_job_client = pytest.mark.parametrize(("command", "needs"), [("sh job.sh", "curl"), ("node job.mjs", "node")])
DONE = 'job: succeeded\n{"rain": [2.0, 1.0]}\n'
KEY = "a-key-of-the-test-of-examples"


def ask(command: str, needs: str, port: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the client did at this port, with a key in its environment where one is given."""
    if shutil.which(needs) is None:
        pytest.skip(f"{needs} is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "MASKSERVE_KEY"} | variables
    return subprocess.run(
        [*command.split(), f"http://127.0.0.1:{port}/"],
        cwd=FOLDER, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip


@every_job_client
def test_a_client_submits_a_job_waits_for_it_and_forgets_it(command: str, needs: str, tmp_path: Path) -> None:
    with running(jobs=jobs_in(tmp_path)) as service:
        ran = ask(command, needs, service.port)
        assert (ran.stdout, ran.stderr, ran.returncode) == (DONE, "", 0)
        assert service.http.get("/v1/jobs").json()["jobs"] == []


@every_job_client
def test_a_client_sends_its_key_and_says_why_it_is_refused_without_one(
    command: str, needs: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{KEY}\n")
    keys.chmod(0o600)
    with running(jobs=jobs_in(tmp_path / "jobs"), keys=Keys(str(keys))) as service:
        refused = ask(command, needs, service.port)
        detail = service.post("/v1/reduce?op=mean").json()["detail"]
        ran = ask(command, needs, service.port, MASKSERVE_KEY=KEY)
    assert refused.returncode != 0
    assert f"refused: {detail}\n" in refused.stderr
    assert (ran.stdout, ran.stderr, ran.returncode) == (DONE, "", 0)


@every_job_client
def test_a_client_of_a_service_without_jobs_says_what_to_do(command: str, needs: str) -> None:
    with running() as service:
        ran = ask(command, needs, service.port)
    assert (ran.stdout, ran.returncode) == ("", 1)
    assert ran.stderr == "this service takes no jobs: start it with --jobs\n"


class Busy(BaseHTTPRequestHandler):
    """A service that is busy first: every request is a 503 once, and answered as its path is when it comes again."""

    sent: ClassVar[list[tuple[str, str | None]]] = []
    answers: ClassVar[dict[str, tuple[int, bytes]]] = {
        "POST": (202, b'{"status":"queued","links":{"self":"/v1/jobs/1","result":"/v1/jobs/1/result"}}'),
        "GET": (200, b'{"status":"succeeded","ended":"2026-01-01T00:00:00Z"}'),
        "DELETE": (204, b""),
    }

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = (f"{self.command} {self.path}", self.headers["Idempotency-Key"])
        status, body = self.answers[self.command] if request in self.sent else (503, b'{"detail": "busy"}')
        self.sent.append(request)
        self.send_response(status)
        for name, value in {"Retry-After": "1", "Location": "/v1/jobs/1", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET = do_DELETE = answer  # noqa: N815  (the names that http.server looks for)

    def log_message(self, *_: object) -> None:
        """Nothing: the test looks at `sent`."""


@contextmanager
def busy_once() -> Iterator[int]:
    """The port of a service that is busy first; what it was asked stands in Busy.sent."""
    Busy.sent = []
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@every_job_client
def test_a_client_asks_a_busy_service_again_with_the_same_idempotency_key(command: str, needs: str) -> None:
    with busy_once() as port:
        ran = ask(command, needs, port)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("job: succeeded\n")
    asked = [request for request, _ in Busy.sent]
    assert asked[::2] == asked[1::2], "each of them twice"
    (first, second) = (key for request, key in Busy.sent if request.startswith("POST"))
    assert first == second
    assert first
