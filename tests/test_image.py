"""What docs/containers.md promises of the image, asked of a real one that the variable IMAGE names, with ENGINE or docker."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tests.http_service import wait_until

IMAGE = os.environ.get("IMAGE", "")
ENGINE = shlex.split(os.environ.get("ENGINE", "docker"))
CONFINED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")
pytestmark = pytest.mark.skipif(not IMAGE, reason="IMAGE names no image to ask")


def run(*words: str, options: Sequence[str] = CONFINED) -> subprocess.CompletedProcess[str]:
    """A container's end, and all it said."""
    return subprocess.run(
        [*ENGINE, "run", "--rm", *options, IMAGE, *words], capture_output=True, text=True, timeout=120
    )


def shell(script: str, options: Sequence[str] = ()) -> str:
    """What a script prints in the image's shell."""
    words = [*ENGINE, "run", "--rm", *CONFINED, *options, "--entrypoint=/bin/sh", IMAGE, "-c", script]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


@contextmanager
def running(*words: str, options: Sequence[str]) -> Iterator[str]:
    """The name of a container that runs in the background."""
    name = f"maskserve-test-{uuid4().hex[:8]}"
    subprocess.run(
        [*ENGINE, "run", "-d", f"--name={name}", *CONFINED, *options, IMAGE, *words], check=True, capture_output=True
    )
    try:
        yield name
    finally:
        subprocess.run([*ENGINE, "rm", "-f", name], capture_output=True)


def ended(name: str) -> int:
    """The exit code of a container that is told to stop, which takes no kill."""
    begin = time.monotonic()
    subprocess.run([*ENGINE, "stop", "-t", "20", name], check=True, capture_output=True)
    assert time.monotonic() - begin < 15
    told = subprocess.run([*ENGINE, "inspect", name, "--format={{.State.ExitCode}}"], check=True, capture_output=True)
    return int(told.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that anybody may write to, with rain.json."""
    (tmp_path / "rain.json").write_text(json.dumps({"data": [[1, 2, None], [4, 6, None]]}))
    tmp_path.chmod(0o777)
    return tmp_path


@pytest.mark.parametrize("user", ["65532", "12345:54321", "0"])
def test_any_user_computes_and_writes_into_what_is_mounted(folder: Path, user: str) -> None:
    options = (*CONFINED, f"--user={user}", f"--volume={folder}:/work")
    ran = run("reduce", "--op", "mean", "--dim", "0", "rain.json", "-o", "mean.json", options=options)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    assert json.loads((folder / "mean.json").read_text()) == {"data": [2.5, 4.0, None]}
    assert (folder / "mean.json").stat().st_uid == int(user.split(":")[0])


def test_the_exit_code_is_the_commands() -> None:
    assert run("reduce", "--op", "mean", "none.safetensors").returncode == 66
    assert run("reduce", "--op", "meen", "none.safetensors").returncode == 2
    assert run("serve", "--host", "0.0.0.0").returncode == 78
    assert run().stdout.startswith("Examples:")


def test_without_a_mount_nothing_can_be_written_and_a_line_says_so() -> None:
    ran = run("fill", "--op", "value", "-", "-o", "out.json")
    assert ran.returncode != 0
    assert ran.stderr.count("\n") == 1


def test_nothing_is_left_of_what_built_it() -> None:
    script = "for tool in gcc g++ cc make cmake ninja; do command -v $tool; done; ls -A /opt/maskserve/bin /root/.cache /wheel"
    found = shell(f"({script}) 2>/dev/null || true").split()
    assert {"maskserve", "python"} <= set(found)
    assert not {"pip", "gcc", "g++", "cc", "make", "cmake", "ninja"} & set(found)
    assert not [name for name in found if name.endswith(".whl")]


def test_byte_code_is_there_for_every_module_that_is_imported_and_does_not_go_by_times() -> None:
    code = """
import importlib.util, sys
import maskserve_api.server, maskserve_cli.app, maskserve_cli.verbs, torch
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
ours = [file for file in files if file.startswith("/opt/") and file.endswith(".py")]
headers = [open(importlib.util.cache_from_source(file), "rb").read(8) for file in ours]
print(len(ours), [file for file, header in zip(ours, headers) if header[4:] != b"\\3\\0\\0\\0"])
"""
    n, bad = shell(f"python -c {shlex.quote(code)}").split(" ", 1)
    assert int(n) > 500
    assert bad == "[]\n"


def test_a_job_that_is_stopped_ends_with_143(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "pipe").chmod(0o666)
    with running("reduce", "--op", "sum", "pipe", "-o", "out.json", options=[f"--volume={folder}:/work"]) as name:
        time.sleep(3)
        assert ended(name) == 143
    assert sorted(os.listdir(folder)) == ["pipe", "rain.json"]


def test_a_service_that_is_stopped_ends_with_0() -> None:
    words = ("serve", "--host", "0.0.0.0", "--allow-anonymous")
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/readyz').status)"
    with running(*words, options=["--memory=2g", "--cpus=1"]) as name:
        asked = [*ENGINE, "exec", name, "python", "-c", code]
        wait_until(lambda: subprocess.run(asked, capture_output=True).stdout == b"200\n", timeout_s=60)
        processes = subprocess.run([*ENGINE, "exec", name, "cat", "/proc/1/cmdline"], check=True, capture_output=True)
        assert processes.stdout.split(b"\0")[1:3] == [b"/opt/maskserve/bin/maskserve", b"serve"]
        assert ended(name) == 0
