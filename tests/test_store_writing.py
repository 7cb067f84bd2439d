"""Objects are written whole or not at all, over others only where that was asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import maskserve as ms
from maskserve.errors import (
    OutputExistsError,
    StoreError,
)
from maskserve.payload.writing import Encoded
from maskserve.stores import writing
from tests.command_line import Maskserve, environment, folder_fixture, maskserve_fixture  # noqa: F401
from tests.store_server import Fault, Stored, large_fixture, running_fixture, stored_fixture  # noqa: F401


def encoded(data: bytes) -> Encoded:
    return Encoded(len(data), iter([memoryview(data)]))


@pytest.mark.parametrize("size", [10, 20 << 20], ids=["small", "large"])
def test_an_object_is_written_over_another_only_where_that_was_asked_for(stored: Stored, size: int) -> None:
    one, other = bytes(size), b"1" * size
    address = "s3://bucket/out"
    assert writing.save(address, encoded(one))
    with pytest.raises(OutputExistsError):
        writing.save(address, encoded(other))
    assert not writing.save(address, encoded(other), exists="skip")
    assert stored.get("out") == one
    assert writing.save(address, encoded(other), exists="replace")
    assert stored.get("out") == other
    assert stored.n_uploads() == 0


def test_of_two_writers_at_once_the_store_itself_refuses_one(stored: Stored) -> None:
    def make(fd: int, _: str) -> None:
        stored.put("out", b"theirs")
        os.write(fd, b"ours")

    with pytest.raises(OutputExistsError):
        writing.placed("s3://bucket/out", make)
    assert stored.get("out") == b"theirs"


def test_a_write_whose_answer_is_lost_is_known_as_ones_own(stored: Stored) -> None:
    stored.proxy.faults = [Fault("lost", "PUT")]
    assert writing.save("s3://bucket/out", encoded(b"ours"))
    assert stored.get("out") == b"ours"


def test_a_write_that_meets_another_one_is_tried_again_and_not_taken_for_one_that_stands(stored: Stored) -> None:
    stored.proxy.faults = [Fault("409", "PUT", times=2)]
    assert writing.save("s3://bucket/out", encoded(b"ours"), exists="skip")
    assert stored.get("out") == b"ours"
    stored.proxy.faults = [Fault("409", "PUT", times=-1)]
    with pytest.raises(StoreError, match=r"409 \(ConditionalRequestConflict\); try again later"):
        writing.save("s3://bucket/other", encoded(b"ours"), exists="skip")


def test_what_would_be_read_as_a_pattern_or_not_at_all_is_not_written(
    stored: Stored, maskserve: Maskserve, folder: Path
) -> None:
    for name in ("p*.safetensors", "p?.safetensors", "p[1].safetensors"):
        ran = maskserve("reduce", "--op", "sum", "rain.safetensors", "-o", f"s3://bucket/{name}")
        assert (ran.code, "leave them out" in ran.err) == (73, True), ran.err
    ran = maskserve("convert", "rain.safetensors", "s3://bucket/x.npz")
    assert (ran.code, "npz cannot be read from a store" in ran.err) == (73, True), ran.err
    assert stored.keys() == []


@pytest.mark.parametrize("size", [10, 17 << 20], ids=["small", "large"])
def test_a_store_without_writes_of_new_objects_says_at_once_what_to_do(stored: Stored, size: int) -> None:
    stored.proxy.faults = [Fault("501", "PUT", times=-1)]
    with pytest.raises(ms.errors.OutputError, match="say replace"):
        writing.save("s3://bucket/out", encoded(bytes(size)))
    assert len(stored.proxy.requests("PUT")) == 1
    stored.proxy.faults.append(Fault("501", "POST", times=-1))  # an upload in parts begins so
    with pytest.raises(ms.errors.OutputError, match=r"\(501\); write to another one, or to a file"):
        writing.save("s3://bucket/out", encoded(bytes(size)), exists="replace")


@pytest.mark.parametrize("exists", ["error", "replace"])
@pytest.mark.parametrize("kind", ["500", "503", "reset", "403"])
def test_a_write_that_fails_leaves_nothing(stored: Stored, kind: str, exists: str) -> None:
    address = "s3://bucket/out"
    stored.proxy.faults = [Fault(kind, "PUT", times=-1, after=0 if exists == "error" else 1)]
    with pytest.raises((StoreError, ms.errors.OutputError)):
        writing.save(address, encoded(bytes((1 if exists == "error" else 17) << 20)), exists=exists)  # type: ignore[arg-type]  # one of the words
    assert stored.keys() == []
    assert stored.n_uploads() == 0


def test_what_is_given_up_in_the_middle_of_an_upload_leaves_no_parts(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(
        "from maskserve.stores import writing\n"
        "from maskserve_cli.app import main\n"
        "import signal\n"
        "def end(*_): raise SystemExit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('begun', flush=True)\n"
        "writing.put('s3://bucket/out', memoryview(bytes(160 << 20)), 'replace')\n"
    )
    stored.proxy.delay_s = 0.4
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "big.py")], env=environment(**stored.environment), stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    running.stdout.readline()
    while stored.n_uploads() == 0:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 143
    running.stdout.close()
    deadline = time.monotonic() + 5
    while stored.n_uploads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stored.n_uploads() == 0
    assert stored.keys() == []


def test_what_is_given_up_while_parts_are_on_their_way_says_why(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        """What a signal raises."""

    def stopped(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr(writing, "wait", lambda *_, **__: None)  # as where the store takes longer than is waited
    monkeypatch.setattr(Future, "result", stopped)
    stored.proxy.delay_s = 0.2
    with pytest.raises(Stop):
        writing.placed("s3://bucket/out", lambda fd, _: os.ftruncate(fd, 40 << 20), exists="replace")
    deadline = time.monotonic() + 5
    while not stored.keys() and time.monotonic() < deadline:  # it had been sent whole by then
        time.sleep(0.02)


def test_an_answer_that_does_not_fit_into_memory_goes_to_a_store(
    stored: Stored, maskserve: Maskserve, folder: Path
) -> None:
    random = np.random.default_rng(3)
    save_file({"x": random.standard_normal((17, 1_000_000)).astype("f4")}, folder / "wide.safetensors")
    words = ["softmax", "--dim", "0", "--memory", "64MB"]
    assert maskserve(*words, "wide.safetensors", "-o", "out.safetensors").code == 0
    ran = maskserve(*words, "wide.safetensors", "-o", "s3://bucket/out.safetensors")
    assert ran.code == 0, ran.err
    assert stored.get("out.safetensors") == (folder / "out.safetensors").read_bytes()
