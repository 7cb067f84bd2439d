"""What a batch survives, on as many files and kills as asked: `python -m tests.batch_faults --kills 50`.

The tests run the same with a handful.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.batch_job import (
    Ended,
    batch,
    check_ledger,
    errors,
    ledger,
    make_inputs,
    outputs,
    payload,
    start,
    summary,
    temps,
)

LIBC = ctypes.CDLL(None)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
CORRUPT: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("empty", lambda data: b""),
    ("short", lambda data: data[:-1]),
    ("long", lambda data: data + b"\0"),
    ("header only", lambda data: data[:8]),
    ("half a header", lambda data: data[:60]),
    ("huge header", lambda data: b"\xff" * 8 + data[8:]),
    ("no header", lambda data: (0).to_bytes(8, "little") + data[8:]),
    ("text", lambda data: b"station,rain\n1,2\n"),
    ("JSON cut off", lambda data: b'{"data": [1, 2'),
    ("zeros", lambda data: bytes(len(data))),
    ("other dtype", lambda data: data.replace(b'"F32"', b'"F99"')),
    ("other shape", lambda data: data.replace(b"[30,30]", b"[31,30]", 1)),
    ("negative shape", lambda data: data.replace(b"[30,30]", b"[-3,30]", 1)),
    ("overlap", lambda data: data.replace(b"[3600,4500]", b"[3599,4499]")),
    ("orphan mask", lambda data: data.replace(b'"rain.mask"', b'"snow.mask"')),
)
"""Ways in which a file is no payload."""


def killed_at_random(folder: Path, n: int, kills: int, seed: int, tell: Callable[[str], None]) -> int:
    """Runs a job that is killed `kills` times while it works, then to its end; the kills that hit work.

    Every output is whole or absent at any time; in the end all are those of an undisturbed run, each made once as far as the
    ledger knew, and no temporary file is left.
    """
    chance = random.Random(seed)
    make_inputs(folder, n)
    assert batch(folder, "--set", "output.to=undisturbed").code == 0
    expected = outputs(folder, "undisturbed")
    n_hits = 0
    for number in range(kills):
        n_before = len(ledger(folder)) if (folder / "out").exists() else 0
        with start(folder, start_new_session=True) as running:
            wait_for_work(running, folder, n_before, chance.random() < 0.8)
            time.sleep(chance.uniform(0, 0.05))
            n_hits += running.poll() is None
            running.send_signal(signal.SIGKILL)
        for name, data in outputs(folder).items() if (folder / "out").exists() else ():
            assert data == expected[name], f"seed {seed}, kill {number}: {name} is half-written"
        if len(expected) == len(outputs(folder)):
            for name in chance.sample(sorted(expected), len(expected) * 3 // 4):
                (folder / "out" / name).unlink()  # else there would be nothing left to kill
                forget_line(folder, name)
        tell(f"kill {number + 1}: {len(outputs(folder))} of {n} outputs, {len(temps(folder))} temporary files")
    ended = batch(folder)
    assert ended.code == 0, ended.err
    assert outputs(folder) == expected
    assert temps(folder) == []
    check_ledger(folder)
    assert summary(folder)["done"] + summary(folder)["skipped"] == n
    assert "0 done, " in batch(folder).err
    return n_hits


def wait_for_work(running: subprocess.Popen[str], folder: Path, n_before: int, has_lines: bool) -> None:
    """Until the run has noted its first outputs, or, without `has_lines`, has begun its ledger."""
    own = folder / "out" / "_maskserve"
    n_parts = len(list(own.glob("part-*"))) if own.exists() else 0
    end_s = time.monotonic() + 60
    while running.poll() is None and time.monotonic() < end_s:
        if (not has_lines and own.exists() and len(list(own.glob("part-*"))) > n_parts) or (
            has_lines and own.exists() and len(ledger(folder)) > n_before
        ):
            return
        time.sleep(0.005)


def forget_line(folder: Path, name: str) -> None:
    """Takes an output out of the ledger, as if it had never been made."""
    for part in (folder / "out" / "_maskserve").glob("part-*"):
        kept = [line for line in part.read_bytes().splitlines(keepends=True) if f"/{name}".encode() not in line]
        part.write_bytes(b"".join(kept))


def bad_among_good(folder: Path, n: int, tell: Callable[[str], None]) -> None:
    """Among `n` good files stand corrupt ones, a FIFO, a dangling link, an unreadable file and a folder: each is named
    with its code, and all the others are done.
    """
    good = make_inputs(folder, n)
    assert batch(folder, "--set", "output.to=clean").code == 0
    clean_s = summary(folder, "clean")["seconds"]
    expected = {}
    for number, (what, spoil) in enumerate(CORRUPT):
        name = f"f{number * n // len(CORRUPT):05d}-{what.replace(' ', '-')}.safetensors"
        (folder / "in" / name).write_bytes(spoil(payload(number)))
        expected[name] = 65
    os.mkfifo(folder / "in" / "fifo.safetensors")
    (folder / "in" / "dangling.safetensors").symlink_to("nowhere")
    (folder / "in" / "folder.safetensors").mkdir()
    (folder / "in" / "unreadable.safetensors").write_bytes(payload(0))
    (folder / "in" / "unreadable.safetensors").chmod(0)
    expected |= {
        "fifo.safetensors": 2,
        "dangling.safetensors": 66,
        "folder.safetensors": 2,
        "unreadable.safetensors": 77,
    }
    ended = bound_by_modes(folder, "--set", "run.retries=1")
    found = errors(folder)
    assert {name: record["exit"] for name, record in found.items()} == expected
    assert ended.code == 65
    for name in ("fifo.safetensors", "folder.safetensors"):  # neither becomes a file by being tried again
        assert found[name]["attempts"] == 1
        os.rename(folder / "in" / name, folder / name)
    assert bound_by_modes(folder).code == 65
    assert errors(folder).keys() == expected.keys() - {"fifo.safetensors", "folder.safetensors"}
    assert outputs(folder) == outputs(folder, "clean")
    assert sorted(outputs(folder)) == good
    assert temps(folder) == []
    check_ledger(folder)
    tell(f"{n} good files among {len(expected)} bad ones; clean {clean_s:.1f} s, {len(found)} named")


def bound_by_modes(folder: Path, *words: str) -> Ended:
    """The command as a user whom file modes bind: root gives up the right to read everything."""
    return batch(folder, *words, preexec_fn=give_up_rights if os.getuid() == 0 else None)


def give_up_rights() -> None:
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--files", type=int, default=10_000, help="good files among the bad ones")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        n_hits = killed_at_random(Path(name), 3_000, given.kills, given.seed, print)
        print(f"{n_hits} of {given.kills} kills hit a run that worked; the outputs are those of an undisturbed run")
    with tempfile.TemporaryDirectory() as name:
        bad_among_good(Path(name), given.files, print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
