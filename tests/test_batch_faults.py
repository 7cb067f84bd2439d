"""A batch that is killed, loses its disk or reads what changes: what stands is whole, and what is missing is named."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskserve.errors import InputChangedError
from tests import batch_faults
from tests.batch_job import Ended, batch, check_ledger, errors, ledger, make_inputs, outputs, start, summary, temps
from tests.command_line import COMMAND, environment
from tests.test_executors import children

SOURCE = Path(__file__).parent / "failing.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to make system calls fail")


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    assert batch_faults.killed_at_random(tmp_path, n=400, kills=2, seed=7, tell=quiet) > 0


def test_bad_files_are_named_and_the_others_done(tmp_path: Path) -> None:
    batch_faults.bad_among_good(tmp_path, n=60, tell=quiet)


def test_temporary_files_of_a_live_run_are_left_alone(tmp_path: Path) -> None:
    """A second shard sweeps the folder that the first one writes to."""
    make_inputs(tmp_path, 2000)
    with start(tmp_path, "--shard", "0/2") as running:
        end_s = time.monotonic() + 60
        while not (tmp_path / "out" / "_maskserve").exists() and time.monotonic() < end_s:
            time.sleep(0.01)
        assert batch(tmp_path, "--shard", "1/2").code == 0
        assert running.wait(timeout=120) == 0
    check_ledger(tmp_path)
    assert len(outputs(tmp_path)) == 2000
    assert temps(tmp_path) == []


def test_a_dead_runs_temporary_files_go_and_those_of_others_stay(tmp_path: Path) -> None:
    make_inputs(tmp_path, 2)
    (tmp_path / "out").mkdir()
    dead = tmp_path / "out" / ".maskserve-0of1-20200101T000000.000000Z-0123456789abcdef"
    foreign = tmp_path / "out" / ".maskserve-0123456789abcdef"
    dead.touch()
    foreign.touch()
    ran = batch(tmp_path)
    assert "removed 1 temporary file" in ran.err
    assert temps(tmp_path) == [foreign]


def test_a_torn_last_line_of_the_ledger_is_no_line(tmp_path: Path) -> None:
    make_inputs(tmp_path, 3)
    assert batch(tmp_path).code == 0
    part = next((tmp_path / "out" / "_maskserve").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-20])
    assert batch(tmp_path).code == 0
    assert (summary(tmp_path)["done"], summary(tmp_path)["skipped"]) == (1, 2)
    check_ledger(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_costs_a_retry(tmp_path: Path, number: int) -> None:
    make_inputs(tmp_path, 1500)
    with start(tmp_path) as running:
        end_s = time.monotonic() + 60
        while not (tmp_path / "out" / "_maskserve").exists() or not ledger(tmp_path):
            assert time.monotonic() < end_s
            time.sleep(0.005)
        os.kill(children(running.pid)[0], number)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert f"was killed by {signal.Signals(number).name}" in err
    check_ledger(tmp_path)
    assert len(outputs(tmp_path)) == 1500
    assert temps(tmp_path) == []


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="small_disk")
def small_disk_fixture(tmp_path: Path) -> Iterator[Path]:
    """An output folder on a disk of 1 MiB."""
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "out")], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.decode().strip()}")
    yield tmp_path / "out"
    subprocess.run(["umount", "-l", str(tmp_path / "out")], check=True)


def test_a_full_disk_ends_the_job_and_the_next_start_goes_on(tmp_path: Path, small_disk: Path) -> None:
    make_inputs(tmp_path, 400)
    ran = batch(tmp_path)
    assert ran.code == 74, ran.err
    assert "No space left on device" in ran.err
    assert temps(tmp_path) == []
    n_done = len(outputs(tmp_path))
    assert 0 < n_done < 400
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert batch(tmp_path).code == 0
    check_ledger(tmp_path)
    assert len(outputs(tmp_path)) == 400


def test_a_disk_that_turns_read_only_ends_the_job(tmp_path: Path, small_disk: Path) -> None:
    make_inputs(tmp_path, 20)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert batch(tmp_path, "--shard", "0/2").code == 0
    before = outputs(tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ran = batch(tmp_path)
    assert ran.code == 73
    assert "Read-only file system" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert outputs(tmp_path) == before


@pytest.fixture(name="failing", scope="module")
def failing_fixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that makes calls fail."""
    library = tmp_path_factory.mktemp("failing") / "failing.so"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return str(library)


@needs_compiler
@pytest.mark.parametrize(
    ("call", "number"),
    [("write", errno.ENOSPC)]
    + [pytest.param(call, errno.EIO, marks=pytest.mark.slow) for call in ("fsync", "open")]
    + [pytest.param("rename", errno.EROFS, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("which", ["first, middle and last", pytest.param("each", marks=pytest.mark.slow)])
def test_whichever_call_fails_what_stood_is_whole_and_nothing_is_half_written(
    tmp_path: Path, failing: str, call: str, number: int, which: str
) -> None:
    """One input has an output that stands, and one has none."""
    make_inputs(tmp_path, 2)
    assert batch(tmp_path, "--set", "output.to=right").code == 0
    right = outputs(tmp_path, "right")

    def run(nth: int) -> tuple[Ended, int]:
        """How a run ended whose `nth` call failed, and how many calls it made."""
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "f00001.safetensors").write_bytes(b"old")
        count = tmp_path / f"count-{call}-{nth}"
        env = {"LD_PRELOAD": failing, "FAIL_CALL": call, "FAIL_NTH": str(nth), "FAIL_ERRNO": str(number),
               "FAIL_PATH": "/out", "FAIL_COUNT": str(count)}  # fmt: skip
        ran = batch(tmp_path, "--set", "run.retries=0", "--workers", "1", env=env)
        for name, data in outputs(tmp_path).items():
            assert data == right[name] or (name, data) == ("f00001.safetensors", b"old"), (call, nth, name)
        assert temps(tmp_path) == [], (call, nth)
        check_ledger(tmp_path)
        return ran, count.stat().st_size

    ran, n_calls = run(1_000_000)
    assert ran.code == 0, "no call failed"
    assert outputs(tmp_path) == right
    codes = set()
    middle = n_calls // 2
    for nth in range(1, n_calls + 1) if which == "each" else sorted({1, middle, n_calls}):
        ran, n_reached = run(nth)
        assert n_reached >= nth, "the call that fails is reached"
        assert ran.code in (73, 74) or outputs(tmp_path) == right, (call, nth, ran)
        codes.add(ran.code)
        if nth == middle:
            assert batch(tmp_path, "--workers", "1").code == 0
            assert outputs(tmp_path) == right
    assert codes & {73, 74}


@needs_compiler
def test_one_failed_write_is_tried_again(tmp_path: Path, failing: str) -> None:
    make_inputs(tmp_path, 4)
    env = {"LD_PRELOAD": failing, "FAIL_CALL": "rename", "FAIL_NTH": "2", "FAIL_ERRNO": str(errno.EIO),
           "FAIL_PATH": "/f0", "FAIL_COUNT": str(tmp_path / "count")}  # fmt: skip
    ran = batch(tmp_path, "--workers", "1", env=env)
    assert (ran.code, len(outputs(tmp_path))) == (0, 4), ran.err
    assert sorted(line["attempts"] for line in ledger(tmp_path)) == [1, 1, 1, 2]


# -- inputs that change -----------------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_is_reported_and_never_mixed(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 60)
    changing = tmp_path / "in" / names[30]
    one, other = (tmp_path / "in" / names[1]).read_bytes(), (tmp_path / "in" / names[2]).read_bytes()
    # a version too, which stands where the writer is interrupted between its calls
    (tmp_path / "in" / names[3]).write_bytes(other[:3000].ljust(len(other), b"\0"))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for data in (one, other[:3000], other):
                with open(changing, "r+b") as file:
                    file.truncate(len(data))
                    file.write(data)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        ran = batch(tmp_path, "--set", "run.retries=0")
    finally:
        stop.set()
        changer.join()
    made = outputs(tmp_path)
    assert len(made.keys() - {names[30]}) == 59
    if names[30] in made:
        assert made[names[30]] in (made[names[1]], made[names[2]], made[names[3]])
        assert ran.code == 0
    else:
        assert errors(tmp_path)[names[30]]["code"] in (InputChangedError.code, "malformed_payload")
        assert ran.code in (65, 75)


# -- the order on disk ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace to see the system calls with")
@pytest.mark.parametrize(("n", "sync"), [(8, "fsync"), (24, "syncfs")])
def test_outputs_are_on_disk_before_their_names_and_names_before_the_ledger(tmp_path: Path, n: int, sync: str) -> None:
    make_inputs(tmp_path, n)
    calls = "trace=write,fsync,syncfs,rename,renameat,renameat2"
    words = [
        "strace",
        "-f",
        "-y",
        "-s",
        "20000",
        "-e",
        calls,
        "-o",
        str(tmp_path / "trace"),
        *COMMAND,
        "batch",
        "job.toml",
        "--workers",
        "1",
    ]
    subprocess.run(words, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    seen: dict[str, list[int]] = {}
    trace = (tmp_path / "trace").read_text().splitlines()
    for number, line in enumerate(trace):
        for what, pattern in ORDER.items():
            if re.search(pattern, line):
                seen.setdefault(what, []).append(number)
    assert len(seen["rename"]) == n
    first = seen["rename"][0]
    assert seen["write"][0] < min(seen[sync]) < first
    assert len([number for number in seen[sync] if number < first]) == (
        2 if sync == "fsync" else 1
    )  # blocks of 2 and of 6
    assert len([number for number in seen["write"] if number < min(seen[sync])]) == n // 4
    for line in seen["ledger"]:  # the folder is synced between the names that a line speaks of and the line
        names = set(re.findall(r"/(f\d+)\.safetensors", trace[line]))
        renamed = [number for number in seen["rename"] if any(f"/{name}." in trace[number] for name in names)]
        assert len(renamed) == len(names) > 0
        assert any(max(renamed) < number < line for number in seen["folder"])


ORDER = {
    "write": r"write\(\d+<[^>]*/out/\.maskserve-",
    "fsync": r"fsync\(\d+<[^>]*/out/\.maskserve-",
    "syncfs": r"syncfs\(\d+<[^>]*/out/\.maskserve-",
    "rename": r'rename.*"[^"]*/out/f\d+\.safetensors"',
    "folder": r"fsync\(\d+<[^>]*/out>",
    "ledger": r"write\(\d+<[^>]*/part-",
}
