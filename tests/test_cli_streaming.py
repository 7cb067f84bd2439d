"""The command line on files larger than --memory, in parts, in processes and by shards: the same bytes, within the memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command_line import (  # noqa: F401  # fixtures are found by name
    COMMAND,
    Maskserve,
    environment,
    folder_fixture,
    maskserve_fixture,
    one_line,
    process,
)

MEGABYTE = 10**6
MEMORY = 64 * MEGABYTE
BUFFERS = 128 * MEGABYTE
"""What a process may have beside Python with torch and its memory."""
SHAPE = (24, 600, 1000)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 MB, in a folder of its own."""
    generator = torch.Generator().manual_seed(1)
    rain = torch.randn(SHAPE, generator=generator)
    path = tmp_path_factory.mktemp("large") / "rain.safetensors"
    names = {"maskserve.dims": json.dumps({"rain": ["time", "lat", "lon"], "time": ["time"]})}
    mask = torch.rand(SHAPE, generator=generator) < 0.8
    save_file({"rain": rain, "rain.mask": mask, "time": torch.arange(SHAPE[0])}, path, metadata=names)
    return path


def peak_bytes(words: list[str]) -> int:
    """The most resident memory of a process that ends well, looked at often."""
    peak = 0
    running = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None:
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{running.pid}/status").read_text().splitlines()
            peak = max(peak, 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1]))
        time.sleep(0.005)
    assert running.returncode == 0, words
    return peak


@pytest.fixture(scope="module")
def torch_bytes() -> int:
    return peak_bytes([sys.executable, "-c", "import torch"])


@pytest.mark.parametrize(
    "words",
    [
        ["reduce", "--op", "mean", "--dim", "time"], ["reduce", "--op", "median", "--dim", "lon"],
        ["softmax", "--dim", "time"], ["mask", "--greater", "1"],
        ["eval", "--expr", "(x - mean(x, dim=time)) / std(x)"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_memory_holds_and_changes_no_byte(words: list[str], large: Path, tmp_path: Path, torch_bytes: int) -> None:
    out = [str(tmp_path / name) for name in ("whole", "parts")]
    command = [*COMMAND, *words, str(large), "-o"]
    subprocess.run([*command, out[0], "--memory", "8GB"], env=environment(), check=True, capture_output=True)
    peak = peak_bytes([*command, out[1], "--memory", "64MB"])
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes()
    assert peak - torch_bytes <= MEMORY + BUFFERS, f"{(peak - torch_bytes) / MEGABYTE:.0f} MB beyond torch"


LONG = 24 * MEGABYTE
DIMS = {"maskserve.dims": json.dumps({"rain": ["time", "x"], "time": ["time"], "still": ["cell"]})}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"rain": (LONG, 2), "time": (LONG,)}, ["reduce", "--op", "sum", "--dim", "x"]),
        ({"rain": (LONG, 2), "time": (LONG,)}, ["reduce", "--op", "sum", "--dim", "x", "--weights", "FILE"]),
        ({"rain": (LONG // 2, 7), "rain.lengths": (LONG // 2,)}, ["reduce", "--op", "sum", "--dim", "x"]),
        ({"rain": (2, 5 * LONG), "rain.lengths": (2,)}, ["reduce", "--op", "sum", "--dim", "time"]),
        ({"rain": (2, 8 * LONG), "rain.mask": (1, 8 * LONG)}, ["reduce", "--op", "any", "--dim", "x"]),
        ({"rain": (3, 2), "still": (2 * LONG,)}, ["reduce", "--op", "sum", "--dim", "time", "--along", "time", "FILE"]),
    ],
    ids=["coordinate", "coordinates that are compared", "many lengths", "long rows", "a broadcast mask", "alike in two files"],
)  # fmt: skip
def test_what_stands_beside_the_cells_is_within_the_memory_too(
    tensors: dict[str, tuple[int, ...]], words: list[str], tmp_path: Path, torch_bytes: int
) -> None:
    dtypes = {"time": torch.float64, "rain.lengths": torch.int64, "rain.mask": torch.bool, "still": torch.float32}
    path = tmp_path / "rain.safetensors"
    made = {name: torch.ones(shape, dtype=dtypes.get(name, torch.int8)) for name, shape in tensors.items()}
    save_file(made, path, metadata=DIMS)
    del made
    said = [str(path) if word == "FILE" else word for word in words]
    peak = peak_bytes([*COMMAND, *said, str(path), "-o", str(tmp_path / "out"), "--memory", "64MB"])
    assert peak - torch_bytes <= MEMORY + BUFFERS, f"{(peak - torch_bytes) / MEGABYTE:.0f} MB beyond torch"


def test_stdin_that_is_larger_than_the_memory_is_read_in_parts(large: Path) -> None:
    words = ["reduce", "--op", "mean", "--dim", "lat,lon", "--memory", "64MB"]
    with open(large, "rb") as file:
        piped = subprocess.run([*COMMAND, *words, "-"], stdin=file, env=environment(), capture_output=True, check=True)
    assert piped.stdout == process(*words, str(large), cwd=large.parent).out
    assert len(piped.stdout.splitlines()) == SHAPE[0]


def test_a_report_on_what_does_not_fit_says_so(maskserve: Maskserve, large: Path) -> None:
    ran = maskserve("mask", "--greater", "1", "--edges", str(large), "--memory", "64MB")
    assert ran.code == 75
    assert one_line(ran).endswith("does not fit into --memory as text; give --memory 144MB or more")


def test_processes_and_shards_give_the_same_bytes(large: Path, tmp_path: Path) -> None:
    words = ["reduce", "--op", "std", "--dim", "time", str(large)]
    assert process(*words, "-o", "whole", cwd=tmp_path).code == 0
    assert process(*words, "--workers", "2", "-o", "workers", cwd=tmp_path).code == 0
    for i in range(3):
        ran = process(*words, "--shard", "auto/3", "--state", f"{i}.state", cwd=tmp_path, JOB_COMPLETION_INDEX=str(i))
        assert one_line(ran).startswith(f"maskserve: wrote {i}.state: the state of shard {i}/3")
    assert process("merge", "2.state", "0.state", "1.state", "-o", "merged", cwd=tmp_path).code == 0
    whole = (tmp_path / "whole").read_bytes()
    assert (tmp_path / "workers").read_bytes() == whole
    assert (tmp_path / "merged").read_bytes() == whole
    ran = process("merge", "2.state", "0.state", "-o", "no", cwd=tmp_path)
    assert (ran.code, one_line(ran)) == (65, "maskserve: shard 1 of 3 is missing: give the states of all")
    assert not (tmp_path / "no").exists()


WIDE_SHAPE = (4, 2000, 2, 1000)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 MB of which a variance has 2 million results: 64 MB of states in each of 4 shards."""
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("wide") / "rain.safetensors"
    mask = torch.rand(WIDE_SHAPE, generator=generator) < 0.8
    save_file({"rain": torch.randn(WIDE_SHAPE, generator=generator), "rain.mask": mask}, path)
    return path


@pytest.mark.slow
def test_shards_and_merges_hold_no_more_than_the_memory(wide: Path, tmp_path: Path, torch_bytes: int) -> None:
    words = [*COMMAND, "reduce", "--op", "var", "--dim", "0,2", str(wide), "--memory"]
    subprocess.run([*words, "8GB", "-o", str(tmp_path / "whole")], env=environment(), check=True, capture_output=True)
    found = [str(tmp_path / f"{i}.state") for i in range(4)]
    peaks = {i: peak_bytes([*words, "64MB", "--shard", f"{i}/4", "--state", path]) for i, path in enumerate(found)}
    assert sum(os.path.getsize(path) for path in found) >= 4 * MEMORY
    more = {"merge": [*COMMAND, "merge", *found, "--memory", "64MB"], "workers": [*words, "64MB", "--workers", "2"]}
    for name, command in more.items():
        peaks[name] = peak_bytes([*command, "-o", str(tmp_path / name)])
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole").read_bytes()
    beyond = {name: (peak - torch_bytes) / MEGABYTE for name, peak in peaks.items()}
    assert max(beyond.values()) * MEGABYTE <= MEMORY + BUFFERS, f"MB beyond torch: {beyond}"


def nameless_bytes(pid: int, folder: Path) -> int:
    """The bytes of the files without a name that a process has open in a folder."""
    n_bytes = 0
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith(f"{folder}/") and target.endswith(" (deleted)"):
                    n_bytes += os.stat(entry.path).st_size
    return n_bytes


def stopped_while_it_writes(words: list[str], folder: Path, number: int, **variables: str) -> tuple[int, bytes]:
    """The exit code and the words of a command that got a signal once a file without a name in the folder had bytes."""
    command = [*COMMAND, *words, "--memory", "64MB"]
    running = subprocess.Popen(command, env=environment(**variables), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while running.poll() is None and not nameless_bytes(running.pid, folder):
        time.sleep(0.002)
    running.send_signal(number)
    _, told = running.communicate(timeout=30)
    return running.returncode, told


def test_sigterm_ends_a_streamed_answer_with_nothing_left(large: Path, tmp_path: Path) -> None:
    words = ["softmax", "--dim", "lon", str(large), "-o", str(tmp_path / "out")]
    assert stopped_while_it_writes(words, tmp_path, signal.SIGTERM) == (143, b"maskserve: terminated\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["softmax", "--dim", "0", "-o", "OUT"], ["softmax", "--dim", "0", "--force", "-o", "OUT"],
        ["reduce", "--op", "var", "--dim", "0,2", "--state", "OUT", "--force"],
        ["reduce", "--op", "var", "--dim", "0,2", "--workers", "2"], ["softmax", "--dim", "0", "-o", "-"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_kill_leaves_no_file_of_ours(words: list[str], wide: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    out = tmp_path / ("old" if "--force" in words else "new")
    said = [str(out) if word == "OUT" else word for word in words]
    code, _ = stopped_while_it_writes([*said, str(wide)], tmp_path, signal.SIGKILL, TMPDIR=str(tmp_path))
    assert code == -signal.SIGKILL
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old", b"old")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_met_before_the_work(large: Path, small_disk: Path) -> None:
    (small_disk / "out").write_bytes(b"old")
    words = ["softmax", "--dim", "lon", "--memory", "64MB", "--force", str(large), "-o", str(small_disk / "out")]
    ran = process(*words, cwd=small_disk)
    assert ran.code == 74
    assert one_line(ran).endswith("out cannot be written: No space left on device")
    assert [(path.name, path.read_bytes()) for path in small_disk.iterdir()] == [("out", b"old")]


@pytest.mark.parametrize(
    "words",
    [
        ["reduce", "--op", "var", "--dim", "0,2", "--workers", "2", "FILE"], ["softmax", "--dim", "0", "-o", "-", "FILE"],
        ["eval", "--expr", "mean(x - cumsum(x, dim=1))", "FILE"], ["reduce", "--op", "sum", "-"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_folder_for_temporary_files_that_is_too_small_is_named(
    words: list[str], wide: Path, small_disk: Path
) -> None:
    said = [str(wide) if word == "FILE" else word for word in words]
    with open(wide, "rb") as piped:
        ran = subprocess.run(
            [*COMMAND, *said, "--memory", "64MB"],
            env=environment(TMPDIR=str(small_disk)),
            stdin=piped,
            capture_output=True,
        )
    assert ran.returncode == 74
    told = rf"maskserve: (\S+: )?\d+ MB do not fit into a temporary file in {small_disk}: No space left on device; set TMPDIR to "
    assert re.fullmatch(told + "a folder that has room\n", ran.stderr.decode())


def test_an_answer_that_does_not_fit_is_no_table(large: Path) -> None:
    ran = process("softmax", "--dim", "lon", "--memory", "64MB", str(large), cwd=large.parent)
    assert ran.code == 75
    assert "rain (time 24, lat 600, lon 1000) does not fit into --memory as text; give -o OUT.safetensors" in one_line(
        ran
    )
    dry = process("softmax", "--dim", "lon", "--memory", "64MB", str(large), "--dry-run", cwd=large.parent)
    assert (dry.code, dry.out, dry.err) == (75, ran.out, ran.err), "a dry run says nothing before it is refused"
    piped = process("softmax", "--dim", "lon", "--memory", "64MB", str(large), "-o", "-", cwd=large.parent)
    assert (piped.code, len(piped.out)) == (
        0,
        os.path.getsize(large) + len(piped.out) % 1000 - os.path.getsize(large) % 1000,
    )


@pytest.mark.parametrize(
    "words",
    [
        "softmax --dim lon", "scan --op rank --dim time --json", "scan --op cumprod --dim time -o out", "eval --expr x+1",
        "grad --expr sum(x)", "eval --expr rank(flatten(x),dim=0) -o out", "eval --expr mean(matmul(x,transpose(x,1,2)))",
        "reduce --op mode", "reduce --op median", "reduce --op mean --dim time", "reduce --op median --workers 2",
        "reduce --op mean --dim lat,lon --workers 2", "mask --greater 1", "grad --op var",
        "mask --greater 1 --edges",
    ],
)  # fmt: skip
def test_a_dry_run_ends_as_the_run_does(words: str, maskserve: Maskserve, large: Path) -> None:
    command = [*words.split(), str(large), "--memory", "64MB"]
    dry, ran = maskserve(*command, "--dry-run"), maskserve(*command)
    refusals = [line for line in ran.err.splitlines() if "wrote" not in line]
    assert (dry.code, dry.err.splitlines()) == (ran.code, refusals)
    if dry.code == 75:
        assert "would be read in parts" not in dry.text
        told = next(word for word in dry.err.split() if word.endswith("MB") and word[0].isdecimal())
        output = () if {"--json", "--edges"} & {*command} else ("-o", "out.safetensors")
        assert maskserve(*command[:-1], told, "--dry-run", "--force", *output).code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("reduce --op sum rain.safetensors --memory 1MB", 78, "--memory is '1MB'; it must be a size of 64MB or more"),
        ("reduce --op sum rain.safetensors --shard 0/2", 2, "--shard needs --state OUT"),
        ("reduce --op sum rain.safetensors --state s --shard 2/2", 2, "shards of 2 are 0/2 to 1/2"),
        ("reduce --op sum rain.safetensors --state s --shard auto/2", 78, "none of JOB_COMPLETION_INDEX"),
        ("reduce --op sum rain.safetensors --state s -o out", 2, "--state writes a state, and no answer"),
        ("reduce --op sum rain.safetensors --state no/folder", 73, "there is no folder no"),
        ("reduce --op median rain.safetensors --state s", 2, "median of f32 has no state that can be merged"),
        ("reduce --op sum - --workers 2", 2, "--workers reads files"),
        ("reduce --op sum rain.safetensors --workers -1 --dry-run", 2, "workers is -1"),
        ("reduce --op sum - -", 2, "reduce reads stdin (-) once"),
        ("reduce --op sum rain.safetensors missing.safetensors", 66, "missing.safetensors cannot be opened"),
        ("reduce --op sum rain.safetensors rain.safetensors --along level", 2, "no variable has the dim 'level'"),
        ("merge", 2, "merge needs a FILE"),
        ("merge rain.safetensors", 65, "rain.safetensors: it is no state of a shard"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line_and_its_exit_code(maskserve: Maskserve, words: str, code: int, said: str) -> None:
    for name in ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID", "AWS_BATCH_JOB_ARRAY_INDEX"):
        os.environ.pop(name, None)
    ran = maskserve(*words.split())
    assert (ran.code, said in one_line(ran)) == (code, True), ran.err


def test_weights_of_no_cells_go_to_processes(maskserve: Maskserve) -> None:
    dims = {"maskserve.dims": json.dumps({"x": ["t", "y", "z"], "w": ["y"]})}
    save_file({"x": torch.ones(4, 0, 3), "w": torch.ones(0)}, "none.safetensors", metadata=dims)
    command = ["reduce", "--op", "sum", "--dim", "t", "--weights", "w", "none.safetensors"]
    assert maskserve(*command, "-o", "whole.safetensors").code == 0
    assert maskserve(*command, "--workers", "2", "-o", "parts.safetensors").code == 0
    assert Path("parts.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_file_that_changes_between_two_processes_is_told(
    how: str, maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them reads one version, whole."""
    from maskserve import crews

    run = crews.Processes.run

    def late(*args: object, **words: object) -> Iterator[object]:
        if how == "replaced":
            save_file({"x": torch.full((2, 3), 5.0)}, "moved.safetensors")
            os.replace("moved.safetensors", "x.safetensors")
        else:
            save_file({"x": torch.full((2, 3), 5.0)}, "x.safetensors")
        yield from run(*args, **words)  # type: ignore[arg-type]

    save_file({"x": torch.ones(2, 3)}, "x.safetensors")
    monkeypatch.setattr(crews.Processes, "run", late)
    ran = maskserve("reduce", "--op", "sum", "x.safetensors", "--workers", "1", "-o", "sum.safetensors")
    assert (ran.code, "changed" in one_line(ran)) == (75, True), ran.err
    assert not Path("sum.safetensors").exists()


def test_files_are_one_along_a_dim(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "sum", "--dim", "time", "rain.safetensors", "rain.safetensors", "--json")
    assert ran.err == "maskserve: 2 files as one (4, 3) along time\n"
    assert json.loads(ran.text)["rain"]["values"] == [10.0, None, 18.0]
