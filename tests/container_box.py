"""What a container is to the process in it, made of namespaces: a read-only tree, a small /tmp, a uid without a name, pid 1."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
UID = 65532
TMP_BYTES = 64 << 20
ENVIRONMENT = ("HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1", "TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor")
"""As the Dockerfile sets them; PATH is always there."""

SETUP = r"""
set -e
root=$1 tmp_bytes=$2 n_covers=$3
shift 3
mount --make-rprivate /
mount --rbind / "$root"
mount -o remount,bind,ro "$root"
for _ in $(seq "$n_covers"); do
  mount -t tmpfs -o "size=$tmp_bytes,mode=$2" tmpfs "$root$1"
  shift 2
done
while [ "$1" != -- ]; do
  mkdir -p "$root$1"
  mount --bind "$1" "$root$1"
  mount -o "remount,bind,$2" "$root$1"
  shift 2
done
shift
exec chroot "$root" "$@"
"""
"""A copy of this machine's tree with tmpfs over the covers (path, mode) and binds upon them (path, ro or rw)."""


def covers(kept: Sequence[Path]) -> dict[str, str]:
    """What lies under a fresh tmpfs, with its mode: /tmp, and folders on the way to what is kept that only root may enter."""
    closed = [folder for path in kept for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001]
    return {"/tmp": "1777"} | {str(folder): "755" for folder in closed if not folder.is_relative_to("/tmp")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Runs commands in `folder`, the one place beside /tmp that takes files."""

    folder: Path
    root: Path
    """Where the tree is put together; empty outside."""
    uid: int = UID

    def words(self, *argv: str, environment: Sequence[str] = ENVIRONMENT, shell: bool = False) -> list[str]:
        """The command that runs `maskserve` with these words as pid 1 of a new box; `shell` takes a script instead."""
        kept = {ROOT: "ro", Path(sys.prefix): "ro", Path(sys.base_prefix): "ro", self.folder: "rw"}
        over = covers(list(kept))
        begin = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--net", "--kill-child"]
        setup = ["sh", "-c", SETUP, "sh", str(self.root), str(TMP_BYTES), str(len(over))]
        who = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
               "--inh-caps=-all"]  # fmt: skip
        what = ["sh", "-c", *argv] if shell else [str(BIN / "maskserve"), *argv]
        return [
            *begin, *setup, *(word for cover in over.items() for word in cover),
            *(word for path, how in kept.items() for word in (str(path), how)), "--",
            *who, "env", "-i", "-C", str(self.folder), f"PATH={BIN}:/usr/bin:/bin", *environment, *what,
        ]  # fmt: skip

    def run(self, *argv: str, shell: bool = False, **more: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """What the command said and how it ended."""
        return subprocess.run(self.words(*argv, shell=shell, **more), capture_output=True, text=True, timeout=120)

    @contextmanager
    def running(self, *argv: str, **more: Sequence[str]) -> Iterator[Boxed]:
        """The command as it runs; it is ended at the end."""
        pipe = subprocess.PIPE
        with subprocess.Popen(self.words(*argv, **more), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as outer:
            try:
                yield Boxed(outer)
            finally:
                outer.kill()  # and with it, by --kill-child, all that is in the box


@dataclass(frozen=True, slots=True)
class Boxed:
    """A running box: `outer` waits for its pid 1 and ends as that does."""

    outer: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        """Pid 1 of the box, by its number outside."""
        return int(Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children").read_text().split()[0])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def children(self) -> list[int]:
        return [int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


@cache
def why_no_box() -> str | None:
    """Why no box can be made here, None where one can."""
    if not all(map(shutil.which, ("unshare", "setpriv", "chroot", "mount"))):
        return "needs unshare, setpriv, chroot and mount"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--net", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True, text=True,
    )  # fmt: skip
    return None if tried.returncode == 0 else f"needs the right to make namespaces: {tried.stderr.strip()[:80]}"


def limited(bytes_: int) -> Path:
    """A new control group that grants so much memory, of v2 or v1; what joins its cgroup.procs is bound by it."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    above, limit = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    group = above / f"maskserve-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(bytes_))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"needs a control group of its own: {error}")
    return group


@pytest.fixture(name="box")
def box_fixture(tmp_path: Path) -> Box:
    """A box whose folder holds rain.json and belongs to its uid."""
    reason = why_no_box()
    if reason is not None:
        pytest.skip(reason)
    folder, root = tmp_path / "work", tmp_path / "root"
    folder.mkdir(mode=0o700)
    root.mkdir()
    (folder / "rain.json").write_text(json.dumps({"data": [[1, 2, None], [4, 6, None]]}))
    for path in (folder, folder / "rain.json"):
        os.chown(path, UID, UID)
    return Box(folder=folder, root=root)
