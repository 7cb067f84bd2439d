"""The Ray cluster that tasks run on: one that is there, or one that lives as long as the command; or why there is none."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any

from maskserve import cgroup
from maskserve.errors import ClusterError, MissingExtraError, ParameterError, SettingsError
from maskserve.settings import LEAST_MEMORY

AUTO = "auto"
GPU_WORD = "cuda"
ADDRESS = "RAY_ADDRESS"
END_S = 3.0
"""Seconds that processes of a cluster of our own have to end by themselves."""
FOLDER = "msr-"
"""What the temporary folder of a cluster of ours is called, shortly: the names of sockets below it are long."""
OWNER = "owner"
"""A file in that folder, locked by the command as long as it lives."""
SOCKET_BYTES = 64
"""What Ray puts behind its temporary folder to name a socket."""
MOST_SOCKET_BYTES = 107
PRIVATE: Mapping[str, str] = MappingProxyType({"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"})
"""What a cluster of our own is started with, beside a token that nobody else has."""
LOOK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """Which cluster, and how long to wait for it."""

    address: str = ""
    """HOST:PORT, "auto" for the one of this machine; empty: $RAY_ADDRESS, else one is started."""
    timeout_s: float = 60.0

    def resolved(self) -> str:
        """The address to join; empty where a cluster is started."""
        address = self.address or os.environ.get(ADDRESS, "")
        if address == AUTO:
            address = os.environ.get(ADDRESS, "") or AUTO
        if "://" in address:
            raise ParameterError(
                f"ray_address is {shown_address(address)}: the command runs on a node of the cluster and joins it by "
                f"HOST:PORT or {AUTO}; from elsewhere, submit it as a Ray job (docs/ray.md)",
                parameter="ray_address",
            )
        return "" if address == "local" else address

    def __str__(self) -> str:
        address = self.resolved()
        return f"the Ray cluster at {address}" if address else "a Ray cluster that is started for it"


def shown_address(address: str) -> str:
    """An address for messages, without a user or password.

    >>> shown_address("me:secret@head:6379"), shown_address("ray://me:secret@head:10001")
    ('...@head:6379', 'ray://...@head:10001')
    """
    begin, mark, rest = address.partition("://") if "://" in address else ("", "", address)
    user, at, host = rest.rpartition("@")
    return f"{begin}{mark}{'...' if user else ''}{at}{host}"[:80]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node offers."""

    name: str
    cpus: int
    gpus: float
    memory: int
    store: int
    """The bytes of its object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster that this process has joined, as it was then. Nodes that come later are used too."""

    ray: Any
    where: str
    nodes: tuple[Node, ...]
    workers: int
    """How many tasks run at once: as asked, else the cluster's CPUs, or its GPUs where each takes one."""
    threads: int
    """The threads of a task."""
    gpus: int
    """The GPUs of a task."""
    timeout_s: float

    @property
    def is_wide(self) -> bool:
        """Whether there are no more CPUs than workers: then tasks may wait on the cluster without more of them running."""
        return self.workers >= sum(node.cpus for node in self.nodes)

    @property
    def memory(self) -> int:
        """What all tasks together may hold where nobody says: the same part of the nodes' memory as of a machine's."""
        return sum(node.memory for node in self.nodes) // cgroup.MEMORY_SHARE

    def share(self, memory: int) -> int:
        """The bytes of data that one task may hold."""
        return max(memory // self.workers, LEAST_MEMORY)

    @property
    def largest_memory(self) -> int:
        return max(node.memory for node in self.nodes)

    @property
    def smallest_store(self) -> int:
        return min(node.store for node in self.nodes)


@contextmanager
def joined(
    joining: Joining, *, workers: int = 0, device: str = "cpu", tell: Callable[[str], None] = lambda line: None
) -> Iterator[Cluster]:
    """The cluster, as long as the block lasts. One that was started ends with it, one that was joined stays as it was."""
    if workers < 0:
        raise ParameterError(
            f"workers is {workers}; give how many tasks run at once, or 0 for all CPUs of the cluster",
            parameter="workers",
        )
    gpus, address = gpus_of(device), joining.resolved()
    with joining_of(address, joining.timeout_s) if address else started(workers, gpus, joining.timeout_s, tell) as ray:
        yield described(ray, address, workers, gpus, joining.timeout_s)


def gpus_of(device: str) -> int:
    """The GPUs of a task on this device; Ray says which."""
    if device.startswith(f"{GPU_WORD}:"):
        raise ParameterError(
            f"device is {device}: on a Ray cluster Ray says which GPU a task has; give {GPU_WORD}", parameter="device"
        )
    return 1 if device == GPU_WORD else 0


def fixed(device: str) -> str:
    """The device of every task, the same on all nodes: what auto finds would differ from node to node, and so would bits."""
    return "cpu" if device == AUTO else device


def imported() -> Any:
    """The library, which says nothing to its makers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a task without GPUs sees none; unset warns
    try:
        import ray
    except ImportError as cause:
        raise MissingExtraError("--engine ray needs ray: pip install 'maskserve[ray]'") from cause
    return ray


@contextmanager
def joining_of(address: str, timeout_s: float) -> Iterator[Any]:
    ray = imported()
    if address != AUTO:
        check_listens(address, min(timeout_s, 10.0))
    with connected(ray, timeout_s, f"the Ray cluster at {address}", address=address):
        yield ray


@contextmanager
def started(workers: int, gpus: int, timeout_s: float, tell: Callable[[str], None]) -> Iterator[Any]:
    """A cluster of this machine, which nobody else can use: without a dashboard, behind a token of its own."""
    with private_environment():
        ray = imported()
        renew_token(ray)
        clear()
        folder = tempfile.mkdtemp(prefix=FOLDER)
        try:
            check_length(folder)
            owner = owned(folder)
            tell("starting a Ray cluster on this machine (ray_address or RAY_ADDRESS joins one)")
            words: dict[str, Any] = {
                "num_cpus": workers or cgroup.cpus(),
                "num_gpus": None if gpus else 0,
                "include_dashboard": False,
            }
            words |= {"address": "local", "_temp_dir": folder, "_memory": cgroup.memory_limit()}
            with connected(ray, timeout_s, "a Ray cluster on this machine", **words):
                yield ray
            owner.close()
        finally:
            remove(folder)


def owned(folder: str) -> IO[str]:
    """A file that is locked, and under its name only then, until it is closed or this process ends, however it does."""
    path = os.path.join(folder, OWNER)
    file = open(f"{path}.new", "w", encoding="utf-8")  # noqa: SIM115 - whoever asked closes it
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(file.name, path)
    return file


def clear() -> None:
    """Removes the folders of clusters whose commands were killed, and so could not."""
    for folder in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), f"{FOLDER}*")):
        with suppress(OSError):
            if os.path.islink(folder) or os.stat(folder).st_uid != os.geteuid():
                continue
            with open(os.path.join(folder, OWNER), encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)


def remove(folder: str) -> None:
    """Removes the folder of a cluster that has ended: some of its processes outlive it by moments, and would make it again."""
    end_s = time.monotonic() + END_S
    while processes_of(folder) and time.monotonic() < end_s:
        time.sleep(0.05)
    for pid in processes_of(folder):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: str) -> list[int]:
    """The processes that were started with a word in which the folder is."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if os.fsencode(folder) in file.read() and int(pid) != os.getpid():
                found.append(int(pid))
    return found


@contextmanager
def private_environment() -> Iterator[None]:
    """The variables that only this process and the cluster below it have."""
    said = {**PRIVATE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in (*said, ADDRESS)}
    os.environ.update(said)
    os.environ.pop(ADDRESS, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def renew_token(ray: Any) -> None:
    """Has Ray look at the variables again: it remembers them from its import."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def check_length(folder: str) -> None:
    over = len(os.fsencode(folder)) + SOCKET_BYTES - MOST_SOCKET_BYTES
    if over > 0:
        least = len(os.fsencode(os.path.dirname(folder))) - over
        raise SettingsError(
            f"{os.path.dirname(folder)} is too long a folder for Ray's sockets; set TMPDIR to one of at most {least} bytes",
            parameter="TMPDIR",
        )


def check_listens(address: str, timeout_s: float) -> None:
    """Raise at once where nothing listens; Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or "@" in host or not (port.isdecimal() and 0 < int(port[:6]) < 1 << 16):
        raise SettingsError(
            f"the Ray cluster's address is {shown_address(address)!r}; give HOST:PORT, as ray start printed it, or {AUTO}",
            parameter="ray_address",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"the Ray cluster at {address} does not answer: {getattr(error, 'strerror', None) or error}; is it running, is that "
            "the port of ray start (6379), and does the network let this machine there?"
        ) from None


@contextmanager
def connected(ray: Any, timeout_s: float, name: str, **words: Any) -> Iterator[Any]:
    """Joins or starts, within a time, and leaves in the end.

    A thread does it, since Ray may wait for what never comes. It lives on with the block: the kernel ends what Ray starts
    when the thread that started it ends.
    """
    if ray.is_initialized():
        raise ClusterError("this process has joined a Ray cluster already: end that with ray.shutdown() first")
    failed: list[Exception] = []
    is_in, is_over = threading.Event(), threading.Event()

    def work() -> None:
        try:
            ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **words)
        except Exception as error:
            failed.append(error)
        is_in.set()
        is_over.wait()

    silence(ray)
    with signals_kept(), stderr_held() as said:
        threading.Thread(target=work, daemon=True, name="maskserve-ray").start()
        end_s = time.monotonic() + timeout_s
        while not is_in.wait(LOOK_S) and time.monotonic() < end_s and not is_refused(said):
            pass
        has_answered, was_refused = is_in.is_set(), is_refused(said)
    try:
        if was_refused and not has_answered:
            raise token_refused(name)
        if not has_answered:
            raise ClusterError(
                f"{name} has not answered for {timeout_s:g} s (ray_timeout); look at its load and at `ray status` on its head"
            )
        if failed:
            raise diagnosed(failed[0], name) from failed[0]
        yield ray
    finally:
        if has_answered:
            ray.shutdown()
        is_over.set()


@contextmanager
def signals_kept() -> Iterator[None]:
    """What SIGTERM and SIGINT do stays as it was: Ray brings handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stderr_held() -> Iterator[IO[bytes]]:
    """What is written to stderr meanwhile, kept away from there: the library of Ray writes a line for each thing it tries."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        before = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)


def is_refused(said: IO[bytes]) -> bool:
    """Whether Ray tells of a token that is not the cluster's; it would try it again for a minute."""
    return b"InvalidAuthToken" in os.pread(said.fileno(), 1 << 16, 0)


def silence(ray: Any) -> None:
    """Ray prints a paragraph for each worker that dies, whatever log_to_driver says; the executor tells of it in a line."""
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def diagnosed(error: Exception, name: str) -> ClusterError | SettingsError:
    """What keeps us from the cluster, in a line that says what to do."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "Version mismatch" in text:
        return SettingsError(
            f"{name} has other versions than this command: {text.partition('Version mismatch:')[2].strip()[:300]}; install the "
            "same ray and Python on both"
        )
    if kind == "AuthenticationError" or "authentication" in text.lower() or "UNAUTHENTICATED" in text:
        return token_refused(name)
    if "Could not find any running Ray instance" in text:
        return ClusterError(
            f"there is no Ray cluster on this machine; start one (ray start --head), or leave {ADDRESS} and ray_address out"
        )
    return ClusterError(f"{name} cannot be used: {kind}: {text[:300]}")


def token_refused(name: str) -> ClusterError:
    return ClusterError(
        f"{name} does not take this command's token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to "
        "the cluster's"
    )


def described(ray: Any, address: str, workers: int, gpus: int, timeout_s: float) -> Cluster:
    """The cluster and what it has, once it has a node with a CPU."""
    end_s = time.monotonic() + timeout_s
    while not (nodes := nodes_of(ray)) and time.monotonic() < end_s:
        time.sleep(LOOK_S)
    if not nodes:
        raise ClusterError(
            f"the Ray cluster at {address} has no node with a CPU after {timeout_s:g} s; see `ray status` there"
        )
    n_cpus = sum(node.cpus for node in nodes)
    n_gpus = int(sum(node.gpus for node in nodes))
    asked = workers or (n_gpus or 1 if gpus else n_cpus)
    threads = 1 if address else max(1, cgroup.cpus() // asked)
    where = f"the Ray cluster at {address}" if address else "the Ray cluster of this command"
    return Cluster(
        ray=ray, where=where, nodes=nodes, workers=asked, threads=threads, gpus=gpus, timeout_s=timeout_s,
    )  # fmt: skip


def nodes_of(ray: Any) -> tuple[Node, ...]:
    """The nodes that live and can run tasks."""
    found = []
    for node in ray.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("CPU", 0) >= 1:
            found.append(
                Node(
                    name=node["NodeManagerHostname"], cpus=int(has["CPU"]), gpus=has.get("GPU", 0.0),
                    memory=int(has.get("memory", 0)), store=int(has.get("object_store_memory", 0)),
                )
            )  # fmt: skip
    return tuple(found)


def strangers() -> list[str]:
    """Folders that Ray adds to a worker's path, and that are not on ours: the current one."""
    return [folder for folder in (os.getcwd(),) if folder not in map(os.path.abspath, sys.path)]
