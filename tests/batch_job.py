"""Jobs for the tests of batch: folders of small files, job files, and the command as a process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.command_line import COMMAND, environment

JOB = """
version = 1
[request]
verb = "reduce"
op = "mean"
dim = 0
[input]
paths = ["in/*"]
[output]
to = "out"
[run]
workers = 2
"""
FEW = 10
Record = dict[str, Any]


def payload(number: int) -> bytes:
    """A file of 4 KiB: 900 cells, a tenth of them masked, junk under the mask."""
    rng = np.random.default_rng(number)
    mask = rng.random((30, 30)) < 0.9
    return save({"rain": np.where(mask, rng.random((30, 30)), np.nan).astype("f4"), "rain.mask": mask})


def make_inputs(folder: Path, n: int) -> list[str]:
    """`n` files in a new folder `in`, and a job file beside it; the names of the files.

    A few are one worker's: a second one takes longer to start than they do.
    """
    (folder / "in").mkdir()
    names = [f"f{number:05d}.safetensors" for number in range(n)]
    for number, name in enumerate(names):
        (folder / "in" / name).write_bytes(payload(number))
    (folder / "job.toml").write_text(JOB if n > FEW else JOB.replace("workers = 2", "workers = 1"))
    return names


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def start(folder: Path, *words: str, env: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
    """The command, running."""
    said = {**environment(), "MASKSERVE_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        [*COMMAND, "batch", "job.toml", *words], cwd=folder, env=said, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **more,
    )  # fmt: skip


def batch(folder: Path, *words: str, env: Mapping[str, str] | None = None, **more: Any) -> Ended:
    """The command, run to its end; a traceback is never right."""
    with start(folder, *words, env=env, **more) as running:
        out, err = running.communicate(timeout=300)
        assert "Traceback" not in err, err
        return Ended(running.returncode, out, err)


def ledger(folder: Path, to: str = "out") -> list[Record]:
    """Every whole line of every part, oldest part first."""
    parts = sorted((folder / to / "_maskserve").glob("part-*.jsonl"), key=lambda path: path.name.rpartition("-")[2])
    lines = [line for part in parts for line in part.read_bytes().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def errors(folder: Path, to: str = "out") -> dict[str, Record]:
    """The listed failures by the name of their input."""
    lines = (folder / to / "_maskserve" / "errors.jsonl").read_text().splitlines()
    return {os.path.basename(record["uri"]): record for record in map(json.loads, lines)}


def summary(folder: Path, to: str = "out") -> Record:
    found: Record = json.loads((folder / to / "_maskserve" / "summary.json").read_text())
    return found


def outputs(folder: Path, to: str = "out") -> dict[str, bytes]:
    """What stands in the output folder, by name."""
    return {path.name: path.read_bytes() for path in (folder / to).iterdir() if path.is_file() and path.name[0] != "."}


def temps(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".maskserve-*") if path.is_file()]


def check_ledger(folder: Path, to: str = "out") -> None:
    """Each line's output stands, whole; no input was done twice."""
    lines = ledger(folder, to)
    assert len({line["uri"] for line in lines}) == len(lines), "an input was done twice"
    for line in lines:
        data = (folder / line["output"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == line["output_sha256"], line["output"]
