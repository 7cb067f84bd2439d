"""Ray clusters of several nodes on this machine, which can be ended one by one."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STORE_BYTES = 100 << 20
NOTICED = {"period_ms": "500", "timeout_ms": "5000", "failure_threshold": "3", "initial_delay_ms": "1000"}
"""How soon Ray notices a node that is gone: in some seconds, where it takes its time otherwise."""


@dataclass
class Nodes:
    """A head without CPUs, where drivers are, and nodes of one CPU each."""

    cluster: Any
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False)

    def raylets(self) -> list[int]:
        """The processes of the nodes that run tasks."""
        return [node.all_processes["raylet"][0].process.pid for node in self.cluster.worker_nodes]

    def kill(self, raylet: int) -> None:
        """Ends a node as a power cut would: its raylet, whose workers end with it."""
        os.kill(raylet, signal.SIGKILL)
        gone = [n for n in self.cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet]
        self.cluster.worker_nodes.difference_update(gone)
        for node in gone:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


@contextmanager
def nodes(n: int) -> Iterator[Nodes]:
    """A cluster of n nodes with one CPU each, behind a token."""
    environment = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),
    }  # fmt: skip
    environment |= {f"RAY_health_check_{name}": value for name, value in NOTICED.items()}
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        from ray.cluster_utils import Cluster

        os.makedirs(os.path.join(environment["RAY_TMPDIR"], "ray"))
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        found = Nodes(cluster, {**environment, "RAY_ADDRESS": cluster.address})
        try:
            for _ in range(n):
                found.add()
            yield found
        finally:
            cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)
