"""The clients of examples/http, each run as its first line says, against a real service: all print the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("command", "needs"), [("sh job.sh", "curl"), ("node job.mjs", "node")])
def test_a_client_submits_a_job_waits_for_it_and_forgets_it(command: str, needs: str, tmp_path: Path) -> None:
    if shutil.which(needs) is None:
        pytest.skip(f"{needs} is not installed")
    with running(jobs=jobs_in(tmp_path)) as service:
        ran = subprocess.run(
            [*command.split(), f"http://{service.netloc}/"], cwd=FOLDER, capture_output=True, text=True, timeout=120
        )
        assert (ran.stderr, ran.returncode) == ("", 0)
        assert ran.stdout == 'job: succeeded\n{"rain": [2.0, 1.0]}\n'
        assert service.http.get("/v1/jobs").json()["jobs"] == []
