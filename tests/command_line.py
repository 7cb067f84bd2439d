"""The command line as tests run it: in this process on a folder of samples, as a process, or on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskserve_cli.app import main

ROOT = Path(__file__).parent.parent
PATHS = [str(ROOT), str(ROOT / "cli"), str(ROOT / "api"), os.environ.get("PYTHONPATH", "")]
COMMAND = [sys.executable, "-m", "maskserve_cli"]


class Ran(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


Maskserve = Callable[..., Ran]


@pytest.fixture(name="maskserve")
def maskserve_fixture(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Maskserve:
    """Runs the command line in this process, in a folder with samples."""
    monkeypatch.chdir(folder)

    def run(*argv: str) -> Ran:
        code = main(argv)
        out, err = capfdbinary.readouterr()
        return Ran(code, out, err.decode())

    return run


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path) -> Path:
    """rain (2, 3) with dims and coordinates, plain (1-D, all valid), several, an orphan mask, NaN, and JSON."""
    rain = np.array([[1, 2, 3], [4, 5, 6]], "f4")
    valid = np.array([[True, False, True], [True, False, True]])
    rain[~valid] = np.nan  # junk under the mask
    dims = {"rain": ["time", "lat"], "lat": ["lat"], "time": ["time"]}
    save_file(
        {"rain": rain, "rain.mask": valid, "lat": np.array([-10.0, 0, 10.5]), "time": np.array([2001, 2002], "i4")},
        tmp_path / "rain.safetensors",
        metadata={"maskserve.dims": json.dumps(dims)},
    )
    save_file({"data": np.arange(4.0)}, tmp_path / "plain.safetensors")
    save_file({"a": np.arange(3), "b": np.array([True, False])}, tmp_path / "several.safetensors")
    save_file({"a": np.arange(3), "b.mask": np.array([True])}, tmp_path / "orphan.safetensors")
    save_file({"data": np.array([1.0, np.nan, np.inf])}, tmp_path / "nan.safetensors")
    (tmp_path / "question.json").write_text('{"data": [[1, 2, null], [4, 5.5, 6]]}')
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that finds the packages of this checkout."""
    return {**os.environ, "PYTHONPATH": ":".join(PATHS), **more}


def process(*argv: str, cwd: Path, stdin: bytes | None = None, **variables: str) -> Ran:
    """Runs the command line as a process of its own."""
    env = environment(**variables)
    done = subprocess.run([*COMMAND, *argv], cwd=cwd, env=env, input=stdin, capture_output=True, timeout=60)
    return Ran(done.returncode, done.stdout, done.stderr.decode())


def one_line(ran: Ran) -> str:
    assert ran.err.count("\n") == 1, ran.err
    return ran.err.strip()


def on_a_terminal(folder: Path, *argv: str, **variables: str) -> Ran:
    """Runs with stdout on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    env = environment(COLUMNS="80", TERM="xterm", **variables)
    with subprocess.Popen([*COMMAND, *argv], cwd=folder, env=env, stdout=theirs, stderr=subprocess.PIPE) as running:
        os.close(theirs)
        out = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                out += chunk
        except OSError:  # how a pseudo-terminal ends
            pass
        os.close(ours)
        assert running.stderr is not None
        return Ran(running.wait(30), out.replace(b"\r\n", b"\n"), running.stderr.read().decode())
