"""Payloads in files: what is not a file, files that change, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskserve.dtypes import f32, u8
from maskserve.errors import (
    InputError,
    InputNotFoundError,
    OutOfMemoryError,
    OutputError,
    OutputExistsError,
    ParameterError,
    PayloadError,
    UnknownTensorError,
)
from maskserve.payload import drafts, files
from maskserve.payload.format import (
    BytesPayload,
    FilePayload,
    Output,
    encode,
    open_payload,
    save,
    to_bytes,
)
from maskserve.payload.tensors import load
from maskserve.payload.variables import resolve
from tests.payload_cases import BODY, VALID, at_most, container, entry

MIB = 2**20
CELLS = {"x": BODY[:16], "mask": BODY[16:]}


# --- reading


def test_ranges_of_a_tensor_can_be_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    with open_payload(path) as file:
        for payload in (BytesPayload(VALID), file):
            assert bytes(payload.read_range("x", 4, 8)) == bytes(payload.read("x"))[4:12]
            assert bytes(payload.read_range("x", 16, 0)) == b""
            with pytest.raises(ParameterError):
                payload.read_range("x", 12, 8)
            with pytest.raises(UnknownTensorError, match="did you mean mask"):
                payload.read("mask1")


def written(folder: Path, payload: bytes = VALID) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(payload)
    return path


def test_a_file_reads_as_its_bytes_and_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open_payload(written(tmp_path)) as file:
        assert file.n_bytes == len(VALID)
        assert {n: bytes(file.read(n)) for n in file.header.tensors} == CELLS
    with pytest.raises(PayloadError):
        open_payload(written(tmp_path, VALID[:-1]))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with at_most(MIB, seconds=1), pytest.raises(InputError, match="is a FIFO"):
        open_payload(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("path", "says"),
    [("/", "is a folder"), ("/dev/null", "character device"), ("/dev/zero", "character device"),
     ("/dev/urandom", "character device"), ("/proc/self/mem", "has no size"), ("/proc/cpuinfo", "has no size")],
)  # fmt: skip
def test_what_is_not_a_regular_file_is_refused(path: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        open_payload(path)
    assert not isinstance(caught.value, FileNotFoundError)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(InputError):
            open_payload("s")


def test_what_cannot_be_found_says_why(tmp_path: Path) -> None:
    os.symlink("loop", tmp_path / "loop")
    written(tmp_path)
    reasons = {
        tmp_path / "none": "No such file",
        tmp_path / "loop": "symbolic links",
        tmp_path / "x.safetensors" / "y": "Not a directory",
        Path("a" * 5000): "File name too long",
        Path("a\0b"): "no file name can hold",
    }
    for path, reason in reasons.items():
        with pytest.raises(InputNotFoundError, match=reason) as caught:
            open_payload(path)
        assert len(str(caught.value)) < 300
        assert isinstance(caught.value.__cause__, OSError | ValueError)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.os, "open", denied)  # a test may run as root, who may read everything
    with pytest.raises(InputError, match="Permission denied") as caught:
        open_payload(tmp_path / "x")
    assert caught.value.errno == errno.EACCES
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_terabyte_that_is_only_claimed_costs_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, container({"x": entry("U8", [2**40], 0, 2**40)}))
    with pytest.raises(PayloadError, match="must be the same"):
        open_payload(path)
    os.truncate(path, path.stat().st_size + 2**40)
    with at_most(MIB, seconds=2), open_payload(path) as file:
        assert file.header.tensors["x"].n_cells == 2**40
        assert bytes(file.read_range("x", 2**39, 5)) == bytes(5)


def test_a_tensor_beyond_memory_is_an_error_of_ours(tmp_path: Path) -> None:
    path = written(tmp_path, container({"x": entry("U8", [2**43], 0, 2**43)}))
    os.truncate(path, path.stat().st_size + 2**43)
    with open_payload(path) as file, pytest.raises(OutOfMemoryError):
        file.read("x")


def test_a_file_that_shrinks_is_an_error_and_what_was_read_stays(tmp_path: Path) -> None:
    path = written(tmp_path)
    with open_payload(path) as file:
        kept = file.read("x")
        os.truncate(path, 130)
        assert bytes(kept) == CELLS["x"]
        with pytest.raises(InputError, match="changed while it was read"):
            file.read("mask")


def test_what_is_read_from_a_file_is_aligned_and_ours_to_change(tmp_path: Path) -> None:
    path = written(tmp_path, container({"a": entry("U8", [1], 0, 1), "x": entry("F64", [2], 1, 17)}, bytes(17)))
    with open_payload(path) as file:
        tensor = load(file, resolve(file.header)["x"])[0]
        assert tensor.data_ptr() % 8 == 0
        file.read("x")[0] = 1
        assert bytes(file.read("x")) == bytes(16)


def test_threads_may_read_one_file_at_once(tmp_path: Path) -> None:
    big = os.urandom(MIB)
    path = written(tmp_path, to_bytes([Output("a", u8, (MIB,), big), Output("b", u8, (MIB,), big[::-1])], {}))
    wrong: list[str] = []

    def read(file: FilePayload, name: str, expected: bytes) -> None:
        wrong.extend(name for _ in range(20) if bytes(file.read(name)) != expected)

    with open_payload(path) as file:
        threads = [threading.Thread(target=read, args=(file, *pair)) for pair in (("a", big), ("b", big[::-1])) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# --- saving

NEW = [Output("x", f32, (2,), bytes(8))]


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(files.TEMP_PREFIX)]


def test_a_file_is_written_whole_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        assert save(tmp_path / "x", encode(NEW, {})) is True
    finally:
        os.umask(old)
    assert (tmp_path / "x").read_bytes() == to_bytes(NEW, {})
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").stat().st_nlink == 1


def test_exists_says_what_happens_to_a_file_that_stands(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(OutputExistsError) as caught:
        save(path, encode(NEW, {}), exists="error")
    assert caught.value.errno == errno.EEXIST
    assert save(path, encode(NEW, {}), exists="skip") is False
    assert path.read_bytes() == b"old"
    assert save(path, encode(NEW, {}), exists="replace") is True
    assert path.read_bytes() == to_bytes(NEW, {})
    with pytest.raises(ParameterError):
        save(path, encode(NEW, {}), exists="resume")  # type: ignore[arg-type]
    assert leftovers(tmp_path) == []


every_file_system = pytest.mark.parametrize("has_nameless", [True, False], ids=["nameless files", "named files"])


@every_file_system
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("exists", ["error", "skip"])
def test_a_file_that_appears_while_we_write_is_not_overwritten(
    tmp_path: Path, exists: files.Exists, links: bool, has_nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    with_nameless(monkeypatch, has_nameless)
    monkeypatch.setattr(files, "_stands", lambda *_: False)  # the race: it appears after the last look
    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path.write_bytes(b"theirs")
    if exists == "skip":
        assert save(path, encode(NEW, {}), exists=exists) is False
    else:
        with pytest.raises(OutputExistsError):
            save(path, encode(NEW, {}), exists=exists)
    assert path.read_bytes() == b"theirs"
    assert leftovers(tmp_path) == []


def unsupported(*_: object, **__: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def with_nameless(monkeypatch: pytest.MonkeyPatch, has_nameless: bool) -> None:
    """Takes files without a name away; where they are to be there, the file system of the test must have them."""
    if has_nameless:
        fd = drafts.nameless("/dev/shm")
        assert fd != drafts.NAMELESS, "a tmpfs has files without a name"
        os.close(fd)
    else:
        monkeypatch.setattr(drafts, "nameless", lambda _: drafts.NAMELESS)


@every_file_system
@pytest.mark.parametrize("exists", files.EXISTS)
def test_a_file_system_without_links_will_do(
    tmp_path: Path, exists: files.Exists, has_nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nameless(monkeypatch, has_nameless)
    monkeypatch.setattr(os, "link", unsupported)
    large = [Output("x", f32, (MIB,), bytes(4 * MIB))]
    assert save(tmp_path / "x", encode(large, {}), exists=exists) is True
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == to_bytes(large, {})
    assert (tmp_path / "x").stat().st_nlink == 1


@every_file_system
def test_no_descriptor_is_left_open(tmp_path: Path, has_nameless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nameless(monkeypatch, has_nameless)
    before = os.listdir("/proc/self/fd")
    for exists in files.EXISTS:
        save(tmp_path / exists, encode(NEW, {}), exists=exists)
        with pytest.raises(InputError):
            files.placed(tmp_path / exists, lambda *_: raised(InputError("no")), exists="replace")
    assert os.listdir("/proc/self/fd") == before
    assert sorted(os.listdir(tmp_path)) == sorted(files.EXISTS)


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("exists", files.EXISTS)
def test_only_regular_files_are_replaced(tmp_path: Path, exists: files.Exists) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mkdir(tmp_path / "folder")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("fifo", tmp_path / "to_fifo")
    before = {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)}
    for name in [*(tmp_path / name for name in before), Path("/dev/null")]:
        with pytest.raises(OutputError, match="only a regular file"):
            save(name, encode(NEW, {}), exists=exists)
    assert {name: os.lstat(tmp_path / name).st_ino for name in os.listdir(tmp_path)} == {
        name: info.st_ino for name, info in before.items()
    }
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_symbolic_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "there")
    (tmp_path / "there" / "x").write_bytes(b"old")
    os.symlink("there/x", tmp_path / "link")
    save(tmp_path / "link", encode(NEW, {}), exists="replace")
    assert os.readlink(tmp_path / "link") == "there/x"
    assert (tmp_path / "there" / "x").read_bytes() == to_bytes(NEW, {})


@every_file_system
@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), InputError("the input went away")])
def test_a_failure_half_way_leaves_the_old_file_and_no_other(
    tmp_path: Path, failure: BaseException, has_nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    with_nameless(monkeypatch, has_nameless)

    def chunks() -> Iterator[bytes]:
        yield bytes(4)
        assert len(leftovers(tmp_path)) == (0 if has_nameless else 1)
        raise failure

    with pytest.raises(type(failure)) as caught:
        save(path, encode([Output("x", f32, (2,), chunks())], {}), exists="replace")
    assert caught.value is failure
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_an_output_error_with_its_number(tmp_path: Path) -> None:
    def write_past_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    code = (
        "import sys; from maskserve.payload.format import *; from maskserve.dtypes import u8\n"
        "try: save(sys.argv[1], encode([Output('x', u8, (2**22,), bytes(2**22))], {}), exists='replace')\n"
        "except Exception as e: print(type(e).__name__, e.errno, type(e.__cause__).__name__)"
    )
    path = tmp_path / "x"
    path.write_bytes(b"old")
    ran = subprocess.run(
        [sys.executable, "-c", code, path], preexec_fn=write_past_the_limit, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["OutputError", str(errno.EFBIG), "OSError"]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(("path", "number"), [("none/x", errno.ENOENT), ("x" * 300, errno.ENAMETOOLONG)])
def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path, path: str, number: int) -> None:
    with pytest.raises(OutputError) as caught:
        save(tmp_path / path, encode(NEW, {}))
    assert caught.value.errno == number
    assert isinstance(caught.value.__cause__, OSError)
    assert leftovers(tmp_path) == []


@every_file_system
def test_a_kill_leaves_the_old_file_whole_and_no_other_or_one_of_known_name(tmp_path: Path, has_nameless: bool) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    code = (
        "import os, sys; from maskserve.payload.format import *; from maskserve.dtypes import u8\n"
        "from maskserve.payload import drafts\n"
        f"if not {has_nameless}: drafts.nameless = lambda _: drafts.NAMELESS\n"
        "def chunks():\n  yield bytes(2**20)\n  os.kill(os.getpid(), 9)\n"
        "save(sys.argv[1], encode([Output('x', u8, (2**21,), chunks())], {}), exists='replace')"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [*leftovers(tmp_path), "x"]
    assert len(leftovers(tmp_path)) == (0 if has_nameless else 1)
