"""README and docs say what happens: every console and Python block is run, and the doors agree byte for byte."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

import maskserve as ms
from tests.documents import BLOCK, PAGES, ROOT, environment, rewritten
from tests.http_service import jobs_in, running

README = (ROOT / "README.md").read_text()
HTTP = (ROOT / "docs" / "http.md").read_text()
MASKSERVE = str(Path(sys.executable).parent / "maskserve")


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_console_blocks_print_what_the_page_says(page: Path) -> None:
    assert page.read_text() == rewritten(page), "stale: run `python -m tests.documents`"


def test_the_python_block_gives_what_its_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for line in block.group(1).splitlines():
        code, _, said = line.partition("  # ")
        if said.strip().startswith(("masked_tensor(", "tensor(", "torch.Size(")):
            assert repr(eval(code, names)) == said.strip()
        else:
            exec(code, names)
    assert ms.load("rain.safetensors").dims == {"rain": ("year", "month")}


def test_the_tables_of_the_first_screen_are_true() -> None:
    cells = [[12, 15, None, 11], [20, None, 24, 25], [None] * 4, [7, 9, 8, 12]]
    data = torch.tensor([[0 if c is None else c for c in row] for row in cells])
    mask = torch.tensor([[c is not None for c in row] for row in cells])
    means = ms.mean(data, 1, mask=mask).tolist()
    assert means == [pytest.approx(38 / 3), 23.0, None, 9.0]


def test_the_first_commands_output_is_the_readmes() -> None:
    install = re.search(
        r"```sh\n(python3 -m venv .*? && (\.venv/bin/maskserve .*?))\n```\n\n```\n(.*?)```", README, re.DOTALL
    )
    assert install
    command = install.group(2).replace(".venv/bin/maskserve", MASKSERVE)
    shown = subprocess.run(
        ["bash", "-c", f"{command} --format table"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line.rstrip() for line in shown.stdout.splitlines()]
    assert said == install.group(3).rstrip().splitlines()


@pytest.mark.parametrize("text", [README, HTTP], ids=["README", "http"])
def test_the_curl_lines_work_verbatim_but_for_the_port(text: str, tmp_path: Path) -> None:
    block = re.search(r"# HTTP\n\n```sh\n(.*?)```", text, re.DOTALL)
    assert block
    serve, *curls = block.group(1).splitlines()
    assert serve.startswith("maskserve serve &")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with running() as service:
        answers = [
            subprocess.run(
                ["bash", "-c", line.replace("localhost:8000", service.netloc)],
                cwd=tmp_path,
                env=environment(),
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for line in curls
        ]
    assert ms.load(tmp_path / "mean.safetensors")["co2"].shape == (44,)
    assert answers[-1] in ('{"data": [1.5, 4.0]}\n', '{"data": 1.5}\n')


def but_for_its_own(job: dict[str, Any]) -> dict[str, Any]:
    """A job, with "…" for what each has of its own, its id and its times, and the names of what its result has."""
    own = dict.fromkeys(("id", "created", "started", "ended", "expires"), "…")
    return job | own | {"result": sorted(job["result"])}


def test_the_lines_about_jobs_work_verbatim_but_for_the_port(tmp_path: Path) -> None:
    block = re.search(r"## Jobs\n.*?```sh\n(.*?)```", HTTP, re.DOTALL)
    assert block
    serve, _, *lines = block.group(1).splitlines()
    assert serve == "maskserve serve --jobs &"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with running(jobs=jobs_in(tmp_path / "jobs")) as service:
        script = "set -e\n" + "\n".join(lines).replace("localhost:8000", service.netloc)
        ran = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
        )
        assert service.http.get("/v1/jobs").json()["jobs"] == []
    sample = re.search(r"## Jobs\n.*?```json\n(.*?)```", HTTP, re.DOTALL)
    assert sample
    assert but_for_its_own(json.loads(ran.stdout)) == but_for_its_own(json.loads(sample[1]))
    assert ms.load(tmp_path / "weeks.safetensors")["co2"].shape == (44,)


def test_dims_have_names_in_both_forms_as_the_page_says() -> None:
    curl = re.search(r"^curl .*\"dims\".*$", HTTP, re.MULTILINE)
    header = re.search(r"```json\n(\{\"__metadata__\".*?)```", HTTP, re.DOTALL)
    assert curl
    assert header
    with running() as service:
        command = curl[0].replace("localhost:8000", service.netloc)
        told = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=True)
        text = header[1].strip().encode()
        cells = np.array([1, 2, 0, 4], "<f4").tobytes() + bytes([1, 1, 0, 1])
        body = struct.pack("<Q", len(text)) + text + cells
        sent = service.post("/v1/reduce?op=mean&dim=lat", body, accept="application/json")
    for answer in (json.loads(told.stdout), sent.json()):
        assert answer.get("rain") == {"dtype": "F32", "shape": [2], "dims": ["lon"], "values": [1.0, 3.0]}
        assert "maskserve.history" in answer["__metadata__"]


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("reduce", {"op": "mean", "dim": "week"}),
        ("reduce", {"op": "median", "dim": "0", "keepdim": "true"}),
        ("reduce", {"op": "max"}),
        ("softmax", {"op": "log_softmax", "dim": "week"}),
        ("scan", {"op": "cumsum", "dim": "year", "dtype": "f32"}),
    ],
)
def test_python_command_line_and_http_give_the_same_bytes(verb: str, words: dict[str, str]) -> None:
    file = ROOT / "examples" / "co2.safetensors"
    python = ms.compute(verb, file, **words).to_bytes()
    flags = [
        part for name, value in words.items() for part in ((f"--{name}",) if value == "true" else (f"--{name}", value))
    ]
    shell = subprocess.run(
        [MASKSERVE, verb, *flags, str(file), "-o", "-"], env=environment(), capture_output=True, check=True
    )
    with running() as service:
        http = service.post(f"/v1/{verb}?{urlencode(words)}", file.read_bytes())
    assert http.status_code == 200
    assert python == shell.stdout == http.content
