"""What a container may ask of the command: any uid, no environment, a read-only tree, and signals to pid 1."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from maskserve_cli import __main__ as begin
from maskserve_cli import exits
from tests.container_box import BIN, ENVIRONMENT, TMP_BYTES, UID, Box, Boxed, box_fixture, limited  # noqa: F401  # a fixture
from tests.http_service import wait_until

REDUCE = ("reduce", "--op", "mean", "--dim", "0", "rain.json")
SERVE = ("serve", "--host", "0.0.0.0", "--port", "8000", "--allow-anonymous", "--log", "off")


def test_the_box_is_one(box: Box) -> None:
    script = (
        'echo "$$ $(id -u) $(id -G)"; grep -E "^(CapPrm|CapBnd|NoNewPrivs)" /proc/self/status; whoami; '
        f"touch {BIN}/x /usr/x; touch /tmp/x made; df -B1 --output=size /tmp | tail -1"
    )
    ran = box.run(script, shell=True)
    first, *status, size = ran.stdout.splitlines()
    assert first == f"1 {UID} {UID}"
    assert [line.split()[1].strip("0") for line in status[:3]] == ["", "", "1"]
    assert int(size) <= TMP_BYTES
    assert ran.stderr.count("Read-only file system") == 2
    assert "cannot find name for user ID" in ran.stderr
    assert (box.folder / "made").exists()


@pytest.mark.parametrize("environment", [ENVIRONMENT, ()], ids=["as the image", "PATH alone"])
def test_a_result_is_computed_and_written_by_a_uid_without_a_name(box: Box, environment: tuple[str, ...]) -> None:
    ran = box.run(*REDUCE, "-o", "mean.json", environment=environment)
    assert (ran.returncode, ran.stdout) == (0, "")
    assert ran.stderr == "maskserve: wrote mean.json: data f64 (3), 1 of 3 masked, 27 bytes\n"
    assert json.loads((box.folder / "mean.json").read_text()) == {"data": [2.5, 4.0, None]}
    assert (box.folder / "mean.json").stat().st_uid == UID


@pytest.mark.parametrize(
    "words",
    ["info rain.json", "head rain.json", "validate rain.json", "ops", "doctor", "--help", "convert rain.json rain.npy",
     "eval --expr 'exp(x) / mean(x, dim=0)' rain.json", "grad --op mean rain.json", "softmax --dim 1 rain.json",
     "scan --op cumsum --dim 0 rain.json", "fill --op ffill --dim 1 rain.json", "mask --equal 2 rain.json"],
)  # fmt: skip
def test_each_command_works_and_leaves_tmp_empty(box: Box, words: str) -> None:
    ran = box.run(
        f"ls -A /tmp > before; maskserve {words} > out; code=$?; ls -A /tmp | diff before - && exit $code", shell=True
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Read-only" not in ran.stderr


def test_a_home_that_cannot_be_written_is_no_hindrance(box: Box) -> None:
    ran = box.run(*REDUCE, environment=("HOME=/nonexistent", "LANG=C", "TERM=dumb"))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "2.5\n4.0\n--\n", "")


def test_an_output_on_the_read_only_tree_is_refused_in_a_line(box: Box) -> None:
    ran = box.run(*REDUCE, "-o", "/usr/mean.json")
    assert ran.returncode in (73, 77)
    assert ran.stderr.startswith("maskserve: /usr/mean.json")
    assert ran.stderr.count("\n") == 1


def test_a_folder_of_someone_else_is_77(box: Box) -> None:
    os.chown(box.folder, 0, 0)
    box.folder.chmod(0o755)
    ran = box.run(*REDUCE, "-o", "mean.json")
    assert (ran.returncode, ran.stderr.count("\n")) == (77, 1), ran.stderr


def test_what_is_piped_in_and_out_needs_no_disk(box: Box) -> None:
    script = "maskserve scan --op cumsum --dim 0 - -o - < rain.json | maskserve reduce --op max - -o - | maskserve info - --json"
    ran = box.run(script, shell=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [variable["shape"] for variable in json.loads(ran.stdout)["variables"]] == [[]]


def test_stdout_and_stderr_may_be_closed(box: Box) -> None:
    ran = box.run("maskserve reduce --op mean rain.json -o mean.json >&- 2>&-; echo $?", shell=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")
    assert json.loads((box.folder / "mean.json").read_text()) == {"data": 3.25}


@pytest.mark.parametrize("words", [REDUCE, ("eval", "--expr", "exp(x) / mean(x)", "rain.json")], ids=["reduce", "eval"])
def test_a_command_runs_in_half_a_gigabyte(box: Box, words: tuple[str, ...]) -> None:
    """What docs/containers.md counts for torch; what is computed comes on top."""
    group = limited(1 << 29)
    try:
        script = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        ran = subprocess.run(
            ["sh", "-c", script, "sh", *box.words(*words)], capture_output=True, text=True, timeout=120
        )
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
    assert (ran.returncode, ran.stderr) == (0, "")


# -- signals to pid 1 -------------------------------------------------------------------------------------------------


def waiting(box: Box) -> tuple[str, ...]:
    """A command that reads a pipe which never ends, so that it runs until it is told to end."""
    os.mkfifo(box.folder / "pipe")
    os.chown(box.folder / "pipe", UID, UID)
    return ("reduce", "--op", "sum", "pipe", "-o", "out.safetensors")


def test_a_sigterm_to_pid_1_ends_a_job_with_143_and_nothing_half_written(box: Box) -> None:
    with box.running(*waiting(box)) as boxed, open(box.folder / "pipe", "wb") as pipe:  # opens once it is read
        pipe.write((1000).to_bytes(8, "little") + b"{" + b" " * 91)  # a header that goes on
        pipe.flush()
        boxed.terminate()
        code = boxed.outer.wait(10)
        assert boxed.outer.stderr is not None
        assert (code, boxed.outer.stderr.read()) == (143, "maskserve: terminated\n")
    assert sorted(os.listdir(box.folder)) == ["pipe", "rain.json"]


def test_a_sigterm_sent_twice_at_once_is_one(box: Box) -> None:
    with box.running(*waiting(box)) as boxed, open(box.folder / "pipe", "wb"):
        for _ in range(3):
            boxed.terminate()
        code = boxed.outer.wait(10)
        assert boxed.outer.stderr is not None
        assert (code, boxed.outer.stderr.read()) == (143, "maskserve: terminated\n")


@pytest.mark.parametrize("after_s", [0, 0.1, 0.3, 0.8])
def test_a_sigterm_is_heard_while_the_process_starts(box: Box, after_s: float) -> None:
    """Pid 1 gets no signal that it does not handle: before the handler is there, it would be lost."""
    with box.running(*waiting(box)) as boxed:
        wait_until(lambda: hears_sigterm(boxed))
        time.sleep(after_s)
        boxed.terminate()
        assert boxed.outer.wait(10) == 143


def test_the_handler_of_sigterm_is_there_before_anything_is_imported() -> None:
    assert begin.TERMINATED == exits.TERMINATED
    code = (
        "import signal, sys\nfrom maskserve_cli import __main__ as begin\nset_handler = signal.signal\n"
        "def spy(*given):\n"
        "    print('typer' in sys.modules, 'maskserve' in sys.modules)\n    return set_handler(*given)\n"
        "signal.signal = spy\nsys.argv[1:] = ['--version']\nbegin.main()"
    )
    ran = subprocess.run([BIN / "python", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[0] == "False False"


def test_a_command_that_does_not_come_to_its_end_ends_at_a_second_sigterm() -> None:
    """The first one unwinds, which may take long; who asks again more than a second later does not want to wait."""
    code = (
        "import os, signal, time\nfrom maskserve_cli import app\nwith app.prepared():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n    finally: print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([BIN / "python", "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.2)
        child.terminate()
        assert child.wait(5) == 143


def hears_sigterm(boxed: Boxed) -> bool:
    """Whether pid 1 has become the command, after all that makes the box, and handles SIGTERM."""
    try:
        process = Path(f"/proc/{boxed.pid}")
        caught = re.search(r"^SigCgt:\s*(\w+)", (process / "status").read_text(), re.MULTILINE)
        return b"maskserve\0reduce" in (process / "cmdline").read_bytes() and bool(
            caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1
        )
    except (FileNotFoundError, IndexError):
        return False


def asked(boxed: Boxed, path: str) -> int:
    """The status of a GET, sent from inside the box's network; 0 where nobody listens."""
    code = (
        "import sys, urllib.request as r, urllib.error as e\n"
        "try: print(r.urlopen('http://127.0.0.1:8000' + sys.argv[1], timeout=5).status)\n"
        "except e.HTTPError as error: print(error.code)\nexcept OSError: print(0)"
    )
    ran = subprocess.run(
        ["nsenter", f"--net=/proc/{boxed.pid}/ns/net", str(BIN / "python"), "-I", "-c", code, path],
        capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    return int(ran.stdout)


def up(box: Box, *more: str) -> list[str]:
    """The words that bring up loopback in the box's new network, then serve."""
    words = box.words(*SERVE, *more)
    at = words.index("sh")
    return [*words[:at], "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words[at:]]


def test_a_service_as_pid_1_turns_not_ready_then_ends_with_0_within_its_grace(box: Box) -> None:
    words = up(box, "--drain-delay", "3", "--grace", "5")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as outer:
        boxed = Boxed(outer)
        try:
            assert outer.stderr is not None
            first = [outer.readline() for outer in [outer.stderr] for _ in range(2)]
            assert "listens on http://0.0.0.0:8000" in first[1], first
            assert [asked(boxed, path) for path in ("/livez", "/readyz", "/v1/ops")] == [200, 200, 200]
            assert boxed.children() == []
            begin = time.monotonic()
            boxed.terminate()
            wait_until(lambda: asked(boxed, "/readyz") == 503, timeout_s=2)
            assert asked(boxed, "/livez") == 200
            assert outer.wait(10) == 0
            assert 3 <= time.monotonic() - begin < 8
            assert outer.stderr.read() == ""
        finally:
            outer.kill()


def test_a_second_sigterm_ends_a_service_that_drains(box: Box) -> None:
    with subprocess.Popen(up(box, "--drain-delay", "60"), stderr=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stderr is not None
            assert [outer.stderr.readline() for _ in range(2)][1].startswith("maskserve listens")
            os.kill(Boxed(outer).pid, signal.SIGTERM)
            time.sleep(0.5)
            os.kill(Boxed(outer).pid, signal.SIGTERM)
            outer.wait(2)
        finally:
            outer.kill()
