"""What commands on a Ray cluster survive, as often as asked: `python -m tests.ray_faults --kills 20`, some 20 s a kill.

A cluster of three nodes; workers, nodes and drivers are killed at random while reductions and batch jobs run, by their command
lines. Every answer must have the bits of one process, every batch end whole. The tests do the same once or twice.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests import batch_job
from tests.command_line import COMMAND, environment, process
from tests.ray_nodes import Nodes, nodes
from tests.ray_tasks import until

N_FILES, N_REPEATED = 2000, 300
REDUCE = ["reduce", "--op", "var", "--dim", "0", *["rain.safetensors"] * N_REPEATED]
AFTER_S = 12.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, nodes(3) as cluster:
        folder, chance = Path(name), random.Random(given.seed)
        prepare(folder)
        for number in range(given.kills):
            start_s = time.monotonic()
            way = WAYS[number % len(WAYS)]
            said = way(folder, cluster, chance)
            print(f"{number + 1}: {way.__name__}: {said}, {time.monotonic() - start_s:.0f} s", flush=True)


def prepare(folder: Path) -> None:
    """Inputs, and what one process makes of them."""
    rng = np.random.default_rng(5)
    mask = rng.random((2000, 5, 400)) < 0.8
    save_file({"rain": rng.normal(size=mask.shape).astype("f4"), "rain.mask": mask}, folder / "rain.safetensors")
    ran = process(*REDUCE, "-o", "alone", cwd=folder)
    assert ran.code == 0, ran.err
    batch_job.make_inputs(folder, N_FILES)
    assert batch_job.batch(folder, "--set", "output.to=undisturbed").code == 0


def running(words: list[str], folder: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words], cwd=folder, env=environment(**variables), stderr=subprocess.PIPE, text=True
    )


def children(parents: list[int]) -> list[int]:
    """The workers of some raylets that run a task."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            above = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
            if above in parents and (place / "cmdline").read_bytes().startswith(b"ray::maskserve"):
                found.append(int(place.name))
        except (OSError, ValueError):
            continue
    return found


def a_worker_dies_in_a_reduction(folder: Path, cluster: Nodes, chance: random.Random) -> str:
    with running([*REDUCE, "--engine", "ray", "-o", "ray", "--force"], folder, cluster.environment) as command:
        workers = until(lambda: children(cluster.raylets()))
        time.sleep(chance.uniform(0, 1))
        worker = chance.choice(children(cluster.raylets()) or workers)
        kill(worker)
        return whole(folder, command)


def a_node_dies_in_a_reduction(folder: Path, cluster: Nodes, chance: random.Random) -> str:
    with running([*REDUCE, "--engine", "ray", "-o", "ray", "--force"], folder, cluster.environment) as command:
        until(lambda: children(cluster.raylets()))
        time.sleep(chance.uniform(0, 1))
        cluster.kill(chance.choice(cluster.raylets()))
        said = whole(folder, command)
    cluster.add()
    return said


def whole(folder: Path, command: subprocess.Popen[str]) -> str:
    _, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    assert (folder / "ray").read_bytes() == (folder / "alone").read_bytes()
    return f"same bits; {err.count('died') + err.count('lost')} deaths told"


def a_node_and_a_worker_die_in_a_batch(folder: Path, cluster: Nodes, chance: random.Random) -> str:
    forget(folder)
    with batch_job.start(folder, "--engine", "ray", "--workers", "0", env=cluster.environment) as command:
        until(lambda: (folder / "out").exists() and batch_job.ledger(folder))
        cluster.kill(chance.choice(cluster.raylets()))
        for worker in children(cluster.raylets())[:1]:
            kill(worker)
        _, err = command.communicate(timeout=300)
        assert command.returncode == 0, err
    cluster.add()
    return complete(folder)


def the_driver_dies_in_a_batch(folder: Path, cluster: Nodes, chance: random.Random) -> str:
    forget(folder)
    with batch_job.start(folder, "--engine", "ray", "--workers", "0", env=cluster.environment) as command:
        until(lambda: (folder / "out").exists() and batch_job.ledger(folder))
        time.sleep(chance.uniform(0, 1))
        command.kill()
    n_done = len(batch_job.ledger(folder))
    ran = batch_job.batch(folder, "--engine", "ray", "--workers", "0", env=cluster.environment)
    assert ran.code == 0, ran.err
    assert batch_job.summary(folder)["skipped"] == n_done
    return f"{n_done} were done; {complete(folder)}"


def a_batch_is_told_to_end(folder: Path, cluster: Nodes, chance: random.Random) -> str:
    """SIGTERM or SIGINT: 143 or 130, nothing half-written, the cluster as it was, and the next start goes on."""
    forget(folder)
    number = chance.choice([signal.SIGTERM, signal.SIGINT])
    with batch_job.start(folder, "--engine", "ray", "--workers", "0", env=cluster.environment) as command:
        until(lambda: (folder / "out").exists() and batch_job.ledger(folder))
        command.send_signal(number)
        _, err = command.communicate(timeout=60)
        assert command.returncode == 128 + number, err
    assert batch_job.temps(folder) == []
    assert "the same command goes on" in err
    until(lambda: not children(cluster.raylets()))
    assert all(os.path.exists(f"/proc/{raylet}") for raylet in cluster.raylets())
    assert batch_job.batch(folder, "--engine", "ray", "--workers", "0", env=cluster.environment).code == 0
    return f"ended with {128 + number}; {complete(folder)}"


def a_cluster_of_its_own_is_told_to_end(folder: Path, cluster: Nodes, chance: random.Random) -> str:
    """A signal to the whole group, as from a terminal, ends a command and the cluster that it started."""
    number = chance.choice([signal.SIGTERM, signal.SIGINT])
    with subprocess.Popen(
        [*COMMAND, *REDUCE, "--engine", "ray", "-o", "own", "--force"], cwd=folder, env=environment(),
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as command:  # fmt: skip
        time.sleep(chance.uniform(1, AFTER_S))
        os.killpg(command.pid, number)
        _, err = command.communicate(timeout=60)
    assert command.returncode in (128 + number, 0), err
    until(lambda: not of_session(command.pid))
    return f"ended with {command.returncode}, nothing left"


def of_session(session: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(words[3]) == session and words[0] != "Z":
            found.append(int(place.name))
    return found


def forget(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "out", ignore_errors=True)


def complete(folder: Path) -> str:
    batch_job.check_ledger(folder)
    assert batch_job.temps(folder) == []
    assert batch_job.outputs(folder) == batch_job.outputs(folder, "undisturbed")
    return f"{N_FILES} outputs, same bytes"


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


WAYS: tuple[Callable[[Path, Nodes, random.Random], str], ...] = (
    a_worker_dies_in_a_reduction,
    a_node_dies_in_a_reduction,
    a_node_and_a_worker_die_in_a_batch,
    the_driver_dies_in_a_batch,
    a_batch_is_told_to_end,
    a_cluster_of_its_own_is_told_to_end,
)

if __name__ == "__main__":
    main()
