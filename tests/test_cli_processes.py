"""The command line as a process: pipes, signals, terminals, and what is imported."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskserve.payload import files
from maskserve_cli import app, exits, outputs, table
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    COMMAND,
    environment,
    folder_fixture,
    on_a_terminal,
    process,
)

# -- as processes -----------------------------------------------------------------------------------------------------


def test_pipes_compose_and_say_nothing(folder: Path) -> None:
    first = process("scan", "--op", "cumsum", "--dim", "time", "-", "-o", "-", cwd=folder,
                    stdin=(folder / "rain.safetensors").read_bytes())  # fmt: skip
    assert (first.code, first.err) == (0, "")
    second = process("reduce", "--op", "mean", "--dim", "lat", "-", cwd=folder, stdin=first.out)
    assert (second.code, second.text, second.err) == (0, "2.0\n7.0\n", "")


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["reduce", "--help"], ["info", "rain.safetensors"], ["info", "--stats", "rain.safetensors"],
     ["validate", "rain.safetensors"], ["head", "rain.safetensors"], ["ops"], ["ops", "mean", "--json"], ["--version"]],
)  # fmt: skip
def test_what_needs_no_torch_imports_none(folder: Path, argv: list[str]) -> None:
    code = (
        "import sys\nfrom maskserve_cli.app import main\ncode = main(sys.argv[1:])\n"
        "sys.exit(code or ('torch' in sys.modules) * 99)"
    )
    env = environment()
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=folder, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nobody_reading_is_no_error_to_speak_of(folder: Path) -> None:
    save_file({"data": np.zeros((2000, 500), "f4")}, folder / "wide.safetensors")
    env = environment()
    argv = [*COMMAND, "scan", "--op", "cumsum", "--dim", "0", "wide.safetensors"]
    with subprocess.Popen(argv, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        assert (running.wait(60), running.stderr.read()) == (141, b"")


def test_all_of_a_long_answer_arrives_though_the_process_ends_at_once(folder: Path) -> None:
    save_file({"data": np.ones((3000, 100))}, folder / "many.safetensors")
    ran = process("scan", "--op", "cumsum", "--dim", "0", "many.safetensors", cwd=folder)
    assert (len(ran.lines), ran.lines[-1]) == (3000, "\t".join(["3000.0"] * 100))


def test_a_full_disk_behind_stdout_is_74(folder: Path) -> None:
    env = environment()
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "ops"], cwd=folder, env=env, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (74, b"maskserve: stdout: No space left on device\n")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGTERM, 143, b"maskserve: terminated\n"), (signal.SIGINT, 130, b"maskserve: interrupted\n")],
)
def test_a_signal_ends_in_its_code_with_nothing_half_written(folder: Path, number: int, code: int, line: bytes) -> None:
    os.mkfifo(folder / "pipe")
    env = environment()
    argv = [*COMMAND, "reduce", "--op", "sum", "pipe", "-o", "out.safetensors"]
    heeded = functools.partial(
        signal.signal, number, signal.SIG_DFL
    )  # a background job of a shell starts with SIGINT ignored
    with subprocess.Popen(argv, cwd=folder, env=env, stderr=subprocess.PIPE, preexec_fn=heeded) as running:
        writer = os.open(folder / "pipe", os.O_WRONLY)  # waits until it reads
        time.sleep(0.1)
        running.send_signal(number)
        assert running.stderr is not None
        assert (running.wait(30), running.stderr.read()) == (code, line)
        os.close(writer)
    assert not [name for name in os.listdir(folder) if name.startswith(("out", files.TEMP_PREFIX))]


@pytest.mark.parametrize(("end", "code"), [(exits.Terminated, 143), (KeyboardInterrupt, 130)])
def test_a_signal_that_comes_while_an_error_is_told_ends_in_its_code(
    end: type[BaseException], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(error: Exception) -> int:
        raise end

    monkeypatch.setattr(app, "report", report)
    assert app.outcome(["info", "no such file"]) == code


def test_a_terminal_gets_the_table_with_colors_unless_it_wants_none(folder: Path) -> None:
    assert on_a_terminal(folder, "head", "rain.safetensors").text.startswith("\x1b[1mrain\x1b[0m  f32")
    assert "\x1b" not in on_a_terminal(folder, "head", "rain.safetensors", NO_COLOR="1").text


def test_a_terminal_gets_the_table_and_never_safetensors(folder: Path) -> None:
    ran = on_a_terminal(folder, "reduce", "--op", "sum", "plain.safetensors", NO_COLOR="1")
    assert ran.text == "data  f64 ()  0 of 1 masked (true = valid)\n  6\n"
    ran = on_a_terminal(folder, "reduce", "--op", "sum", "plain.safetensors", "-o", "-")
    assert (ran.code, ran.text, ran.err) == (
        2, "", "maskserve: safetensors is not for a terminal: give -o FILE, or pipe it on\n",
    )  # fmt: skip


def test_the_shell_can_complete(folder: Path) -> None:
    ran = process(cwd=folder, _MASKSERVE_COMPLETE="complete_bash", COMP_WORDS="maskserve val", COMP_CWORD="1")
    assert ran.text.split() == ["validate"]


def test_the_table_s_columns_fit_from_both_ends() -> None:
    columns = [[str(i) * 3] for i in range(10)]
    assert table.fitting(columns, 100, from_the_left=False) == columns
    kept = [column[0] for column in table.fitting(columns, 28, from_the_left=False)]
    assert kept == ["000", "111", "222", "…", "888", "999"]
    assert outputs.bytes_text(2500) == "2.5 kB"
