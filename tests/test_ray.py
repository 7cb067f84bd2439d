"""Real Ray on this machine, several nodes of it: the bits of one process, whatever is killed; one line where there is none."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import maskserve
from maskserve.batch.job import read_job
from maskserve.batch.run import plan
from maskserve.errors import ClusterError, MissingExtraError, SettingsError, WorkerLostError
from maskserve.executors import Limits, Outcome, Queue, Stop
from maskserve.on_ray import cluster as clusters
from maskserve.on_ray import executor as executors
from maskserve.on_ray import reduction
from maskserve.on_ray.cluster import Cluster, Joining, joined
from maskserve.on_ray.entry import entry
from maskserve.on_ray.executor import LostObjectsError, Ray, Stays
from maskserve.on_ray.reduction import Join, Lift, Steps, Tree, n_shards, reduced
from maskserve.payload.format import Limits as HeaderLimits
from maskserve_cli.exits import code_of
from tests import batch_job, executor_tasks, ray_tasks
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    Maskserve,
    folder_fixture,
    maskserve_fixture,
    one_line,
    process,
)
from tests.ray_nodes import Nodes, nodes
from tests.ray_tasks import marks, until

SHAPE = (3000, 4, 50)


@pytest.fixture(name="ray_nodes", scope="module")
def ray_nodes_fixture() -> Iterator[Nodes]:
    """Two nodes of one CPU, and a head without any."""
    with nodes(2) as found:
        yield found


@pytest.fixture(name="ray", scope="module")
def ray_fixture(ray_nodes: Nodes) -> Iterator[Cluster]:
    """The cluster, joined by this process."""
    with joined(Joining(address=ray_nodes.address)) as cluster:
        yield cluster


@pytest.fixture(name="data", scope="module")
def data_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rain in three files, and its mean over time by one process."""
    folder, rng = tmp_path_factory.mktemp("ray"), np.random.default_rng(7)
    for number in range(3):
        mask = rng.random(SHAPE) < 0.8
        rain = np.where(mask, rng.normal(size=SHAPE), np.nan).astype("f4")  # junk under the mask
        save_file({"rain": rain, "rain.mask": mask}, folder / f"{number}.safetensors")
    assert process("reduce", "--op", "var", "--dim", "0", *FILES, "-o", "alone", cwd=folder).code == 0
    return folder


FILES = [f"{number}.safetensors" for number in range(3)]


def results(outcomes: Iterator[Outcome[Any, Any]]) -> list[Any]:
    return sorted(outcome.result for outcome in outcomes if outcome.error is None)


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_every_task_has_one_outcome_in_order_where_asked_and_an_error_is_its_own(ray: Cluster) -> None:
    outcomes = list(Ray(cluster=ray).run(executor_tasks.refuse_odd, range(40), Limits(in_order=True)))
    assert [o.task for o in outcomes] == list(range(40))
    assert [o.result for o in outcomes] == [None if n % 2 else n for n in range(40)]
    assert str(outcomes[3].error) == "3 is odd"


def test_a_worker_is_in_the_commands_folder_with_one_thread_a_cpu_and_what_it_says_is_told(ray: Cluster) -> None:
    (outcome,) = Ray(cluster=ray).run(ray_tasks.place, [0])
    assert outcome.result is not None
    folder, threads, path = outcome.result
    assert (folder, threads) == (os.getcwd(), "1")
    told: list[str] = []
    assert results(Ray(cluster=ray, tell=told.append).run(ray_tasks.complain, [3])) == [3]
    assert told == ["warning: 3 is odd"]
    executor = Ray(cluster=ray)
    executor.__dict__["wanted"] = {**executor.wanted, "strangers": [str(path[0])], "threads": 2}
    (other,) = executor.run(ray_tasks.place, [0])
    assert other.result is not None
    assert str(path[0]) not in other.result[2], "a random.py in the current folder is not the library's"


def test_tasks_are_taken_as_there_is_room_and_a_stop_takes_no_more(ray: Cluster) -> None:
    taken, stop = 0, Stop()

    def counted() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    for _ in Ray(cluster=ray).run(executor_tasks.square, counted(), Limits(stop=stop)):
        stop.ask(grace_s=30)
    assert taken < 10


def test_tasks_run_at_once_only_as_the_memory_allows(ray: Cluster, tmp_path: Path) -> None:
    alone = Limits(memory=10, weigh=lambda n: 11)
    assert set(results(Ray(cluster=ray).run(executor_tasks.Overlap(str(tmp_path)), range(6), alone))) == {1}


def test_a_killed_worker_costs_a_retry_and_what_runs_at_the_deadline_of_a_stop_is_ended(
    ray: Cluster, tmp_path: Path
) -> None:
    told: list[str] = []
    outcomes = list(Ray(cluster=ray, tell=told.append).run(executor_tasks.KilledOnce(str(tmp_path)), [0]))
    assert [(o.result, o.attempts) for o in outcomes] == [(0, 2)]
    assert told == ["a worker died while it ran 0; another one takes its place"]
    stop = Stop()
    held = Ray(cluster=ray).run(ray_tasks.Held(str(tmp_path)), range(1), Limits(stop=stop))
    stopper = threading.Thread(target=lambda: (until(lambda: marks(tmp_path)), stop.ask(grace_s=0)))
    stopper.start()
    assert list(held) == []
    ((worker, _),) = marks(tmp_path).values()
    until(lambda: not os.path.exists(f"/proc/{worker}"))
    stopper.join()


def test_of_a_task_in_parts_only_the_part_that_kills_each_worker_is_lost(ray: Cluster) -> None:
    executor = Ray(cluster=ray, retries=1, split=executor_tasks.parts)
    outcomes = list(executor.run(executor_tasks.whole, [(0, 1), (3, 4)]))
    assert sorted(n for o in outcomes if o.result is not None for n in o.result) == [0, 1, 4]
    (lost,) = [o for o in outcomes if o.error]
    assert lost.task == (3,)
    assert isinstance(lost.error, WorkerLostError)
    assert "2 workers died on it" in str(lost.error)


def test_a_node_with_another_version_or_without_the_folder_is_named(ray: Cluster) -> None:
    for wanted, line in (
        ({"versions": {"maskserve": "9.9"}}, "has maskserve 0.1.0, this command 9.9: bits could differ"),
        ({"folder": "/no/such"}, "has no folder /no/such"),
    ):
        executor = Ray(cluster=ray)
        executor.__dict__["wanted"] = {**executor.wanted, **wanted}
        with pytest.raises(SettingsError, match=line):
            list(executor.run(executor_tasks.square, range(3)))


def test_a_cluster_without_what_a_task_takes_is_given_up_and_a_busy_one_is_told_of(
    ray: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match="has had no node with a GPU for 0 s, and each task takes 1"):
        list(Ray(cluster=replace(ray, gpus=1, timeout_s=0.0)).run(executor_tasks.square, [3]))
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        (tmp_path / "go").touch()

    executor = Ray(cluster=replace(ray, timeout_s=0.0), tell=tell)
    assert results(executor.run(ray_tasks.Held(str(tmp_path)), [3])) == [9]
    assert [line.partition(" has ")[2] for line in told] == ["run no task for 0 s: is it busy? waiting for room"]


def test_a_command_whose_own_node_is_lost_ends_and_blames_no_task(ray: Cluster) -> None:
    queue = Queue([3], Limits(), 1)
    job = queue.take()
    assert job is not None
    lost = executors.Crew(Ray(cluster=ray), b"", queue)._buried(
        executors.Flight(job, None), ray.ray.exceptions.LocalRayletDiedError()
    )
    with pytest.raises(ClusterError, match=r"this command's node of the Ray cluster at .* is lost"):
        list(lost)


def test_it_is_told_once_that_no_task_ends_where_others_did(
    ray: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "HANGS_TIMES", 0)  # the first one took as long as its worker's start
    told: list[str] = []

    def tell(line: str) -> None:
        if "busy" not in line:
            told.append(line)
            (tmp_path / "go").touch()

    executor = Ray(cluster=replace(ray, timeout_s=0.2), tell=tell)
    held = executor.run(ray_tasks.HeldFrom(str(tmp_path), first=1), [0, 1])
    assert sorted(outcome.result for outcome in held) == [0, 1]
    assert [line.partition(" for ")[0] for line in told] == ["no task has ended"]
    assert told[0].endswith("On the cluster are 1; killing that worker has its task run elsewhere")


def test_a_node_without_maskserve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSERVE_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delattr("maskserve.on_ray.worker", raising=False)
    monkeypatch.setitem(sys.modules, "maskserve.on_ray.worker", None)
    wanted = {"threads": 1, "strangers": [], "versions": {"maskserve": "0.1.0"}}
    (word, line, _), _ = entry(wanted, b"", b"")
    assert word == "unfit"
    assert "cannot import maskserve" in line
    assert "install maskserve 0.1.0" in line


# -- the tree of states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("n_bytes", [10, 1 << 20], ids=["small", "large"])
def test_states_are_joined_in_a_tree_whatever_the_order_and_whatever_is_lost(n: int, n_bytes: int) -> None:
    """A ref stands for the shards that are in its state."""
    for seed in range(5):
        chance = random.Random(seed)
        tree, running, n_losses = Tree(n, memory=1 << 20, store=1 << 26), [*()], 0
        while True:
            running += [(task, tree.objects(task)) for task in tree]
            if not running:
                break
            task, objects = running.pop(chance.randrange(len(running)))
            if isinstance(task, Join) and n_losses < 5 and chance.random() < 0.2:
                n_losses += 1
                lost = LostObjectsError(frozenset({chance.randrange(len(objects))}))
                tree.add(Outcome(index=0, task=task, error=lost))
                continue
            assert len(objects) <= tree.fan_in or isinstance(task, Lift)
            ref = (task.shard,) if isinstance(task, Lift) else tuple(i for some in objects for i in some)
            tree.add(Outcome(index=0, task=task, result=Stays(ref=ref, n_bytes=n_bytes)))
        assert [i for piece in tree.top.values() for i in piece.ref] == list(range(n)), f"seed {seed}"
        assert len(tree.top) == 1 or sum(piece.n_bytes for piece in tree.top.values()) <= 1 << 18


def test_a_state_that_is_lost_for_ever_ends_the_reduction() -> None:
    tree = Tree(2, memory=0, store=1 << 26)

    def run() -> None:
        for task in tree:
            is_lift = isinstance(task, Lift)
            error = None if is_lift else LostObjectsError(frozenset({0}))
            tree.add(Outcome(index=0, task=task, error=error, result=Stays(ref=None, n_bytes=1) if is_lift else None))

    with pytest.raises(WorkerLostError, match="the state of shard 0 was lost 10 times"):
        run()


def test_shards_are_a_power_of_two_some_for_each_worker() -> None:
    assert [n_shards(workers, 0) for workers in (1, 2, 3, 1000)] == [4, 8, 16, 4096]


# -- whole commands -----------------------------------------------------------------------------------------------------


@contextmanager
def lent(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster


def test_the_command_gives_the_bits_of_one_process_and_leaves_the_cluster_as_it_was(
    ray_nodes: Nodes, data: Path
) -> None:
    ran = process(
        "reduce", "--op", "var", "--dim", "0", "--engine", "ray", *FILES, "-o", "ray", cwd=data, **ray_nodes.environment
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.err.splitlines()[1:] == ["maskserve: wrote ray: rain f32 (4, 50), 0 of 200 masked, 1.3 kB"]
    assert (data / "ray").read_bytes() == (data / "alone").read_bytes()
    assert all(os.path.exists(f"/proc/{raylet}") for raylet in ray_nodes.raylets())


def test_a_worker_and_a_node_that_die_in_the_middle_of_a_reduction_change_no_bit(
    ray_nodes: Nodes, ray: Cluster, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two nodes is lost while each runs a shard, then the worker of the other one."""
    monkeypatch.chdir(data)
    monkeypatch.setattr(reduction, "joined", lambda *_, **__: lent(ray))
    monkeypatch.setattr(reduction, "Steps", held_steps(tmp_path))
    told: list[str] = []

    def kill() -> None:
        ran = until(lambda: len(found := marks(tmp_path)) == 2 and found)
        (_, raylet), (worker, _) = ran.values()
        ray_nodes.kill(raylet)
        os.kill(worker, signal.SIGKILL)
        until(lambda: len(told) == 2)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    words = {"op": "var", "dim": "0", "device": "cpu"}
    with reduced(
        "reduce", words, FILES, None, joining=Joining(), workers=0, limits=HeaderLimits(), memory=1 << 30, n_bytes=0,
        tell=told.append,
    ) as answer:  # fmt: skip
        assert answer.to_bytes() == (data / "alone").read_bytes()
    killer.join()
    ray_nodes.add()
    assert sorted(line.partition(" while")[0] for line in told) == ["a worker died", "a worker was lost with its node"]


def held_steps(folder: Path) -> Any:
    """Steps of which shards 0 and 1 wait."""

    def made(**words: Any) -> Steps:
        return ray_tasks.HeldSteps(folder=str(folder), waiting=(0, 1), **words)

    return made


@pytest.mark.slow
def test_a_batch_whose_driver_is_killed_goes_on_with_the_same_bytes(ray_nodes: Nodes, tmp_path: Path) -> None:
    batch_job.make_inputs(tmp_path, 300)
    words = ("--engine", "ray", "--workers", "0")
    with batch_job.start(tmp_path, *words, env=ray_nodes.environment) as running:
        until(lambda: (tmp_path / "out").exists() and batch_job.ledger(tmp_path))
        running.kill()
    n_done = len(batch_job.ledger(tmp_path))
    ran = batch_job.batch(tmp_path, *words, env=ray_nodes.environment)
    assert ran.code == 0, ran.err
    assert batch_job.summary(tmp_path)["skipped"] == n_done
    batch_job.check_ledger(tmp_path)
    assert batch_job.temps(tmp_path) == []
    alone = {
        path.name: maskserve.compute("reduce", path, op="mean", dim=0).to_bytes()
        for path in (tmp_path / "in").iterdir()
    }
    assert batch_job.outputs(tmp_path) == alone


@pytest.mark.slow
def test_an_input_that_kills_each_worker_fails_alone(
    ray: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_job.make_inputs(tmp_path, 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("maskserve.batch.engines.joined", lambda *_, **__: lent(ray))
    told: list[str] = []
    runner = ray_tasks.PoisonedRunner(exit_of=code_of, tell=told.append)
    summary = runner.run(plan(read_job("job.toml", ["run.engine=ray", "run.retries=1"])))
    assert (summary.done, summary.failed, summary.exit) == (7, 1, 65)
    (failed,) = batch_job.errors(tmp_path).values()
    assert (failed["code"], failed["exit"]) == ("worker_lost", 70)
    assert 2 <= len(told) <= 3


def homes_of(ray: Cluster, refs: list[Any]) -> list[str]:
    """The nodes that hold objects, as far as they have said so."""
    places = ray.ray.experimental.get_object_locations(refs).values()
    return [next(iter(found["node_ids"])) for found in places if found["node_ids"]]


def test_results_that_are_lost_with_their_node_are_named(ray_nodes: Nodes, ray: Cluster) -> None:
    made = list(Ray(cluster=ray, stays=True).run(ray_tasks.large, range(2)))
    refs = [outcome.result.ref for outcome in made if outcome.result is not None]
    homes = until(lambda: len(found := homes_of(ray, refs)) == len(refs) and found)
    node = next(n for n in ray_nodes.cluster.worker_nodes if n.node_id == homes[0])
    ray_nodes.kill(node.all_processes["raylet"][0].process.pid)
    (outcome,) = Ray(cluster=ray, objects=lambda task: refs).run(ray_tasks.total, [0])
    assert isinstance(outcome.error, LostObjectsError)
    assert outcome.error.which <= {i for i, home in enumerate(homes) if home == homes[0]}


# -- one line where there is no cluster ---------------------------------------------------------------------------------


def test_a_dry_run_says_the_engine_and_starts_nothing(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "sum", "rain.safetensors", "--engine", "ray", "--dry-run")
    assert "tasks of a Ray cluster that is started for it would each read a part, once" in ran.text
    assert ran.code == 0


@pytest.mark.parametrize(
    ("words", "variables", "code", "line"),
    [
        (["--engine", "spark"], {}, 2, "--engine is 'spark'; give one of local, ray"),
        (["--engine", "ray"], {"RAY_ADDRESS": "ray://head:10001"}, 2, "submit it as a Ray job"),
        (["--engine", "ray"], {"MASKSERVE_RAY_ADDRESS": "head"}, 78, "give HOST:PORT"),
        (["--engine", "ray"], {"MASKSERVE_RAY_ADDRESS": "me:secret@head:6379"}, 78, "'...@head:6379'; give HOST:PORT"),
        (["--engine", "ray"], {"MASKSERVE_RAY_ADDRESS": "127.0.0.1:99999"}, 78, "give HOST:PORT"),
        (["--engine", "ray"], {"MASKSERVE_RAY_ADDRESS": "127.0.0.1:1"}, 69, "127.0.0.1:1 does not answer: Connection refused"),
        (["--engine", "ray", "--device", "cuda:1"], {}, 2, "Ray says which GPU a task has; give cuda"),
        (["--engine", "ray", "--workers", "-1"], {}, 2, "workers is -1"),
        (["--engine", "ray", "--shard", "0/2", "--state", "s"], {}, 2, "--engine ray goes with an answer, not with --state"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(
    words: list[str], variables: dict[str, str], code: int, line: str, maskserve: Maskserve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = maskserve("reduce", "--op", "sum", "rain.safetensors", *words)
    assert ran.code == code, ran.err
    assert line in one_line(ran)


def test_a_server_that_never_answers_is_left_after_the_time_out(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ran = process(
            "reduce", "--op", "sum", "rain.safetensors", "--engine", "ray", cwd=folder, MASKSERVE_RAY_ADDRESS=address,
            MASKSERVE_RAY_TIMEOUT="1",
        )  # fmt: skip
    assert ran.code == 69
    assert "has not answered for 1 s (ray_timeout)" in one_line(ran)


def test_a_wrong_token_is_named(ray_nodes: Nodes, folder: Path) -> None:
    variables = {**ray_nodes.environment, "RAY_AUTH_TOKEN": secrets.token_hex(32), "MASKSERVE_RAY_TIMEOUT": "20"}
    ran = process("reduce", "--op", "sum", "rain.safetensors", "--engine", "ray", cwd=folder, **variables)
    assert ran.code == 69
    assert "does not take this command's token: set RAY_AUTH_MODE=token" in one_line(ran)


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskserve\[ray\]'"), joined(Joining()):
        pass


def test_the_folder_of_a_cluster_whose_command_was_killed_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lives, gone, unknown = (tmp_path / f"{clusters.FOLDER}{name}" for name in ("lives", "gone", "unknown"))
    for folder in (lives, gone, unknown):
        folder.mkdir()
    with clusters.owned(str(lives)):
        clusters.owned(str(gone)).close()
        clusters.clear()
        assert sorted(tmp_path.iterdir()) == [lives, unknown]


def test_a_temporary_folder_that_is_too_long_for_sockets_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / ("x" * (40 - min(len(str(tmp_path)), 39)))
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with (
        pytest.raises(
            SettingsError, match="too long a folder for Ray's sockets; set TMPDIR to one of at most 30 bytes"
        ),
        joined(Joining()),
    ):
        pass
    assert list(place.iterdir()) == []


def test_versions_that_differ_are_told_as_such() -> None:
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n This process: Ray: 2.60.0")
    found = clusters.diagnosed(error, "the Ray cluster at a:1")
    assert isinstance(found, SettingsError)
    assert str(found).startswith("the Ray cluster at a:1 has other versions than this command: The cluster was started")
