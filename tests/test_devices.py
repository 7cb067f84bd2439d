"""Devices: one that is lost is not asked again, what does not fit is computed in parts or refused, copies and computing overlap.

Without a GPU: what torch says of a device is said by a stand-in. `pytest -m gpu` asks a real one.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskserve as ms
from maskserve import answers, devices, dtypes, engine, execution, requests, uploads, warming
from maskserve.backends.triton_tables import interprets, missing
from maskserve.devices import plans, self_test
from maskserve.errors import DeviceLostError, OutOfMemoryError
from maskserve.health import Health, health, is_full, loss
from maskserve.loading import WORKER, device_of
from maskserve.ops import OPS
from maskserve.pages import Pages
from maskserve.payload.files import open_payload
from maskserve.processes import Processes
from maskserve.requests import Request
from maskserve.uploads import Uploads
from maskserve_api.lanes import Lanes
from tests import executor_tasks
from tests.command_line import ROOT, Maskserve, folder_fixture, maskserve_fixture, process  # noqa: F401  # fixtures are found by name
from tests.far_device import FREE, IN_PARTS, answered, sample_payload
from tests.http_service import check_problem, jobs_in, payload, running, wait_until
from tests.samples import assert_same_bits, cells, plan_of
from tests.stand_in import ASSERT, LateCopies, StandIn, standing_in
from tests.test_jobs import ended, submitted
from tests.test_jobs_faults import rows


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in(monkeypatch, StandIn()) as devices:
        yield devices


# -- which device -----------------------------------------------------------------------------------------------------


def test_words_for_devices_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch, StandIn(0)):
        assert [device_of(word) for word in ("auto", "cpu")] == ["cpu", "cpu"]
        with pytest.raises(ms.errors.DeviceError, match="torch sees 0 GPUs"):
            device_of("cuda")
    with standing_in(monkeypatch, StandIn(3)):
        assert [device_of(word) for word in ("auto", "cpu", "cuda", "cuda:2")] == ["cpu:0", "cpu", "cpu:0", "cpu:2"]
        with pytest.raises(ms.errors.DeviceError, match="device cuda:3 is not there: torch sees 3 GPUs"):
            device_of("cuda:3")
        monkeypatch.setenv(WORKER, "4")
        assert [device_of(word) for word in ("auto", "cuda", "cuda:0")] == ["cpu:1", "cpu:1", "cpu:0"], "workers share"


def test_workers_have_numbers_and_a_new_one_has_that_of_the_dead_one(tmp_path: Path) -> None:
    tasks = [(str(tmp_path / str(n)), False) for n in range(6)]
    outcomes = Processes(workers=2, retries=1, tell=lambda line: None).run(executor_tasks.number_on_a_device, tasks)
    assert {outcome.result for outcome in outcomes} <= {0, 1}


def of_device(word: str) -> Request:
    return requests.build("reduce", {"op": "sum", "device": word})


def test_who_asks_for_any_device_gets_the_one_with_the_least_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch, StandIn(3)):
        lanes = Lanes(8)

        def chosen(word: str) -> str:
            lane, request = lanes.placed(of_device(word))
            assert lane is lanes.of_device[device_of(str(request.running["device"]))]
            return next(name for name, one in lanes if one is lane)

        assert [chosen(word) for word in ("cpu", "cuda:2", "cuda:0")] == ["cpu", "cpu:2", "cpu:0"]
        assert {chosen("cuda") for _ in range(3)} == {chosen("auto") for _ in range(3)} == {"cpu:0", "cpu:1", "cpu:2"}
        lanes.of_device["cpu:0"].n_pending = lanes.of_device["cpu:2"].n_pending = 1
        assert {chosen("cuda") for _ in range(4)} == {"cpu:1"}
        health().heard("cpu:1", RuntimeError(ASSERT))
        assert {chosen("auto") for _ in range(4)} == {"cpu:0", "cpu:2"}
        for name in ("cpu:0", "cpu:2"):
            health().heard(name, RuntimeError(ASSERT))
        assert chosen("auto") != "cpu", "who asks for a GPU is told that none is left"
        asked = of_device("cuda")
        monkeypatch.setattr(lanes, "freest", lambda names: "cpu:1")
        assert lanes.placed(asked)[1] is lanes.placed(asked)[1], "a plan is remembered by its request"


def test_devices_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    body, question = payload(data=np.ones((3, 5), np.float32)), "/v1/reduce?op=sum&dim=1"
    with standing_in(monkeypatch, StandIn(2)), running() as service, ThreadPoolExecutor(1) as pool:
        lanes, release = service.service.lanes.of_device, threading.Event()
        lanes["cpu:0"].submit(partial(release.wait, 30))
        waiting = pool.submit(service.post, f"{question}&device=cuda:0", body)
        wait_until(lambda: lanes["cpu:0"].n_pending == 1)
        for device in ("cuda:1", "cuda", "auto", "cpu"):
            assert service.post(f"{question}&device={device}", body).status_code == 200
        assert 'maskserve_queue_depth{lane="cpu:0"} 1.0' in service.http.get("/metrics").text
        assert not waiting.done()
        release.set()
        assert waiting.result(30).status_code == 200


# -- a device that is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "how"),
    [
        (ASSERT, "device-side assert"),
        ("CUDA error: an illegal memory access was encountered", "illegal memory access"),
        ("Triton Error [CUDA]: unspecified launch failure", "unspecified launch failure"),
        ("CUDA error: invalid argument", None),
        ("CUDA error: no kernel image is available for execution on the device", None),
        ("CUDA error: out of memory", None),
        ("an illegal memory access, says somebody who is no device", None),
    ],
)
def test_errors_after_which_every_later_call_fails_are_known(said: str, how: str | None) -> None:
    assert loss(torch.AcceleratorError(said)) == how
    wrapped = ValueError("mine")
    wrapped.__cause__ = RuntimeError(said)
    assert loss(wrapped) == how
    assert is_full(wrapped) == ("CUDA error: out of memory" in said)
    assert loss(ms.errors.DataError(said)) is None, "a message of ours may quote what a client sent"


def test_a_lost_device_is_not_asked_again_and_others_are() -> None:
    known, asked = Health(), list[int]()

    def ask(n: int) -> None:
        with known.watching("cuda:1"):
            asked.append(n)
            raise torch.AcceleratorError(ASSERT)

    for n in range(3):
        with pytest.raises(DeviceLostError, match=r"cuda:1 was lost in this process \(device-side assert\)"):
            ask(n)
    assert asked == [0]
    with known.watching("cuda:0"):
        pass
    known.refuse_lost("cuda:0")
    with pytest.raises(DeviceLostError):
        known.refuse_lost()
    with pytest.raises(ZeroDivisionError), known.watching("cuda:0"):
        _ = 1 / 0


class Failing:
    """A computation that fails as a device does, the first time."""

    def __init__(self, error: Exception) -> None:
        self.error, self.n_calls, self.real = error, 0, engine.computed

    def __call__(self, *args: Any, **words: Any) -> Any:
        self.n_calls += 1
        if self.n_calls == 1:
            raise self.error
        return self.real(*args, **words)


def test_a_service_whose_device_is_lost_is_unready_and_not_wrong(one: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed elsewhere in silence: who asks for the CPU by name still gets it."""
    failing = Failing(torch.AcceleratorError(ASSERT))
    body, question = payload(data=np.ones((3, 5), np.float32)), "/v1/reduce?op=sum&dim=1"
    with running() as service:
        assert service.http.get("/readyz").status_code == 200
        expected = service.post(f"{question}&device=cpu", body).content
        assert service.post(f"{question}&device=cuda", body).content == expected
        monkeypatch.setattr(engine, "computed", failing)
        first = check_problem(service.post(f"{question}&device=cuda:0", body), 503, "device_lost")
        assert "cpu:0 was lost in this process (device-side assert)" in first["detail"]
        for device in ("cuda", "cuda:0", "auto"):
            told = check_problem(service.post(f"{question}&device={device}", body), 503, "device_lost")
            assert told["detail"] == first["detail"]
        assert failing.n_calls == 1
        for path in ("/readyz", "/livez", "/v2/health/ready", "/v2/health/live", "/v2/models/reduce/ready"):
            check_problem(service.http.get(path), 503, "device_lost")
        assert service.post(f"{question}&device=cpu", body).content == expected


def test_jobs_of_a_lost_device_wait_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt that lost it counts, as if the process had died of it; those that came too late lose nothing."""
    body = payload(data=np.ones((3, 5), np.float32))
    with standing_in(monkeypatch, StandIn()), running(jobs=jobs_in(tmp_path, n_running=1)) as service:
        with monkeypatch.context() as patched:
            patched.setattr(engine, "computed", Failing(torch.AcceleratorError(ASSERT)))
            words = [f"/v1/reduce?op=sum&dim=1&device={device}" for device in ("cuda", "auto", "cpu")]
            paths = [submitted(service, path, body) for path in words]
            assert ended(service, paths[2])["status"] == "succeeded"
        wait_until(lambda: service.http.get(paths[1]).json()["status"] == "queued")
        assert service.http.get(paths[0]).json()["status"] == "running"
    assert rows(tmp_path, "SELECT status, attempts FROM jobs ORDER BY seq")[:2] == [("running", 1), ("queued", 0)]
    with standing_in(monkeypatch, StandIn()), running(jobs=jobs_in(tmp_path)) as service:
        assert [ended(service, path)["status"] for path in paths] == ["succeeded"] * 3


def test_in_python_too_the_first_error_says_what_the_device_is_worth(
    one: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "computed", Failing(torch.AcceleratorError(ASSERT)))
    with pytest.raises(DeviceLostError, match="cpu was lost in this process"):
        ms.sum(torch.ones(3))
    assert dict(health().lost) == {"cpu": "device-side assert"}


def test_a_worker_whose_device_is_lost_is_replaced(tmp_path: Path) -> None:
    """Another process does what it had begun; what ends each of them is an error of its own task."""
    told: list[str] = []
    executor = Processes(workers=1, retries=1, tell=told.append)
    tasks = [(str(tmp_path / name), name == "worst") for name in ("a", "b", "worst", "c")]
    outcomes = {outcome.task[0][-1]: outcome for outcome in executor.run(executor_tasks.on_a_device, tasks)}
    assert [outcomes[name].result is not None for name in "abc"] == [True] * 3
    assert len({outcome.result for outcome in outcomes.values() if outcome.result}) >= 2
    assert "the last one lost its device (cuda:0 was lost" in str(outcomes["t"].error)
    assert len(told) == 5, "a, b and c once each, the worst one twice"
    assert all("lost its device" in line and "another one takes its place" in line for line in told)


# -- what fits --------------------------------------------------------------------------------------------------------


def test_requests_on_a_device_with_memory_of_its_own_have_the_bits_of_the_cpu() -> None:
    """In a process of its own: torch keeps the device that stands in there."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/far_device.py"]
    one_thread = {"OMP_NUM_THREADS": "1", "MASKSERVE_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | one_thread, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_where_memory_runs_out_all_the_same_less_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device says that it has free is not there: the whole is tried, then parts of a half, an eighth and so on."""
    monkeypatch.setattr(uploads, "LEAST_BYTES", 0)
    for verb, words in (of for of in IN_PARTS if of[1].get("op") in (None, "normalize")):
        expected = answered(verb, words, "cpu")
        with standing_in(monkeypatch, StandIn(free=20 * FREE, room=FREE // 2)):
            assert answered(verb, words, "cuda") == expected


def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is computed as a whole: refused by its bytes, with nothing copied, and the device still works."""
    monkeypatch.setattr(uploads, "LEAST_BYTES", 0)
    with standing_in(monkeypatch, StandIn(free=1000)) as small:
        with pytest.raises(
            OutOfMemoryError, match="x takes 2 MB of cpu:0, where 0 MB are free, and is not computed there as"
        ):
            answered("grad", {"op": "mean", "dim": 1, "tensor": ["x"]}, "cuda")
        small.copies_of["cpu:0"].room = 10
        with pytest.raises(OutOfMemoryError, match="as a whole or in parts; give device=cpu"):
            answered("reduce", {"op": "mean", "dim": 1}, "cuda")
        assert not health().lost
        small.free["cpu:0"] = small.copies_of["cpu:0"].room = 10**12
        verb, words = IN_PARTS[0]
        assert answered(verb, words, "cuda") == answered(verb, words, "cpu")


def test_a_full_device_refuses_at_once_what_could_be_read_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A room of a few bytes would be a call for each cell: minutes for what the CPU does in a second."""
    for free in (0, 1000, 100_000):
        for verb, words in (("mask", {"inside": "-1,1"}), ("reduce", {"op": "sum", "dim": "1"})):
            with (
                standing_in(monkeypatch, StandIn(free=free)),
                pytest.raises(OutOfMemoryError, match="as a whole or in parts; give device=cpu"),
            ):
                answered(verb, words | {"tensor": ["x"]}, "cuda")


def test_a_device_without_room_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch, StandIn(free=1000, room=10)), running(max_body=8 << 20) as service:
        check_problem(service.post("/v1/reduce?op=median&dim=1&device=cuda", sample_payload()), 503, "out_of_memory")
        assert service.http.get("/readyz").status_code == 200


def test_explain_says_why_a_step_is_not_computed_as_a_whole(
    maskserve: Maskserve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "x.safetensors").write_bytes(sample_payload())
    words = [
        "--op",
        "sum",
        "--tensor",
        "y",
        "--device",
        "cuda",
        "--explain",
        "--dim",
        "1",
        "x.safetensors",
        "-o",
        "out",
    ]
    with standing_in(monkeypatch, StandIn(free=FREE)):
        parts, refused = maskserve("reduce", *words), maskserve("grad", *words, "--force")
        as_data = maskserve("reduce", *words[:-2], "--json")
    assert "y: not as a whole: it takes 1 MB, and cpu:0 has 0 MB free: computed in parts\n" in parts.err
    assert "y: not as a whole: it takes 2 MB, and cpu:0 has 0 MB free: refused\n" in refused.err
    assert json.loads(as_data.err)["variables"][0]["not_as_a_whole"].endswith("computed in parts")
    assert (parts.code, refused.code) == (0, 75)


class Full:
    """A computation on a device that has room for blocks of so many cells, and not for a whole tensor."""

    def __init__(self, room: int) -> None:
        self.room, self.asked, self.real = room, list[int | None](), engine.computed

    def __call__(self, *args: Any, **words: Any) -> Any:
        asked = execution.execution().block_cells
        self.asked.append(asked)
        if asked is None or asked > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.real(*args, **words)


def test_a_device_out_of_memory_is_tried_again_in_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = cells(dtypes.f32, (3, 9000), 1)
    of = plan_of(OPS["var"], sample.data, dim=1)
    expected = engine.run(of, sample.data, sample.mask)
    full = Full(room=1 << 20)
    monkeypatch.setattr(engine, "computed", full)
    assert_same_bits(engine.run(of, sample.data, sample.mask), expected)
    assert full.asked == [None, 1 << 24, 1 << 20]


def test_a_device_without_room_for_a_block_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "computed", Full(room=0))
    with pytest.raises(
        OutOfMemoryError, match="sum: cpu is out of memory, in blocks of 1048576 cells too; give device"
    ):
        ms.sum(torch.ones(3))


@pytest.mark.parametrize("call", [lambda x: ms.exp(x), lambda x: ms.roll(x, 1)], ids=["exp", "roll"])
def test_an_op_does_not_blame_the_cells_for_a_full_device(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **words: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("cellwise.called", "moving.by_torch", "moving.by_kernel"):
        monkeypatch.setattr(f"maskserve.{name}", full)
    with pytest.raises(torch.OutOfMemoryError):
        call(ms.masked_tensor(torch.ones(3), torch.tensor([True, False, True])))


# -- copies beside computing ----------------------------------------------------------------------------------------


def send_blocks(copies: LateCopies, n: int, *, growing: bool = True) -> list[torch.Tensor]:
    """Blocks of a cell more each, whose cells are their number, as they arrive on the device."""
    to = Uploads(copies)

    def read(pages: Pages, i: int) -> tuple[torch.Tensor, None]:
        return pages.empty("data", (100 + i * growing,), torch.float32).fill_(i), None

    return [to.block(partial(read, i=i))[0] for i in range(n)]


def test_no_buffer_is_written_before_its_copy_is_done() -> None:
    copies = LateCopies()
    blocks = send_blocks(copies, 5)
    assert all(torch.equal(data, torch.full((100 + i,), float(i))) for i, data in enumerate(blocks))
    waits = [said for said in copies.log if said != "joined"]
    assert waits[:3] == ["copy", "computed", "copy"], "the second block is sent while the first is computed on"
    assert waits[3:] == ["computed", "waited until copied", "waited until computed", "copy"] * 3
    assert copies.n_pinned == 5, "blocks that grow take new memory"


def test_the_stand_in_would_see_a_buffer_that_is_written_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.stand_in.Late.synchronize", lambda late: None)
    with pytest.raises(AssertionError, match="written before its copy was done"):
        send_blocks(LateCopies(), 4, growing=False)


def test_a_tensor_goes_to_a_device_a_buffer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "CHUNK_BYTES", 64)
    copies = LateCopies()
    for data in (torch.arange(1000.0), torch.randn(30, 7)[:, ::2], torch.rand(5, 9) > 0.5, torch.arange(3).byte()):
        assert torch.equal(Uploads(copies).whole(data), data)
    assert copies.log.count("copy") > 60


def test_a_file_is_read_by_two_buffers_however_many_blocks_it_has(one: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(sample_payload())
    one.free["cpu:0"] = FREE // 2
    request = requests.build(
        "reduce", {"op": "sum", "dim": 0, "device": "cuda", "tensor": ["x"], "backend": "reference"}
    )
    expected = answered("reduce", {"op": "sum", "dim": 0, "tensor": ["x"]}, "cpu")
    with execution.using(threads=1), open_payload(str(path)) as file:
        assert answers.run(request, file).to_bytes() == expected
    copies = one.copies_of["cpu:0"]
    assert copies.log.count("copy") > 4
    assert copies.n_pinned == 4, "cells and masks, twice each"


# -- whether it computes right, and how fast ------------------------------------------------------------------------


def test_the_self_test_asks_every_op_that_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test("cpu") == "ok"
    monkeypatch.setattr(devices.engine, "run", lambda *_: (torch.rand(3), torch.ones(3, dtype=torch.bool)))
    assert self_test("cpu") == "sum along dim 0 is wrong"
    monkeypatch.setattr(devices.engine, "run", lambda *_: 1 / 0)
    assert self_test("cpu") == "failed: ZeroDivisionError: division by zero"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device there is one to tell of")
def test_without_a_gpu_doctor_says_so(maskserve: Maskserve) -> None:
    assert maskserve("warmup", "--device", "cuda").code == 2
    record = json.loads(maskserve("doctor", "--json").out)
    assert record["devices"] == ["cpu"]
    assert record["gpus"] == []
    assert {one["name"] for one in record["backends"]} == {"cpu", "triton", "reference"}
    assert "triton: " in maskserve("doctor").text


def test_doctor_tells_of_each_device_and_its_exit_code_of_one_that_computes_wrong(
    maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "COPIED", 1 << 12)
    with standing_in(monkeypatch, StandIn(2)):
        ran = maskserve("doctor")
        assert ran.code == 0
        for line in ("cpu:1: a stand-in, compute capability 9.0", "cpu:0: self-test ok", "NVIDIA driver: none"):
            assert line in ran.lines
        assert all(gpu["copied_bytes_per_s"] > 0 for gpu in json.loads(maskserve("doctor", "--json").out)["gpus"])
        monkeypatch.setattr(devices, "self_test", lambda device: f"{device} is wrong")
        ran = maskserve("doctor")
        assert (ran.code, "cpu:0: self-test cpu:0 is wrong" in ran.lines) == (70, True)


# -- before the first request ---------------------------------------------------------------------------------------


def test_warming_runs_every_op_that_a_verb_serves(maskserve: Maskserve) -> None:
    names = {of.row.name for of in plans(dtypes.f32, (3, 4), (0,), "cpu")}
    assert maskserve("warmup", "--device", "cpu", "--dtypes", "f32").text.startswith(
        f"warm: {len(names)} ops on cpu in "
    )
    said = json.loads(maskserve("warmup", "--device", "cpu", "--dtypes", "f32, i8", "--json").out)
    assert said["device"] == "cpu"
    assert said["backends"] == {"cpu": len(names)}


def test_warming_takes_ops_and_shapes_by_name(maskserve: Maskserve) -> None:
    words = ("warmup", "--device", "cpu", "--dtypes", "f32", "--ops", "sum,softmax", "--json")
    assert json.loads(maskserve(*words, "--shapes", "3x4x5").out)["seconds"].keys() == {"sum", "softmax"}
    for words, says in (
        (("--ops", "summ"), "did you mean sum?"),
        (("--shapes", "3x0"), "such as 8192x8192"),
        (("--capability", "hopper"), "such as 9.0"),
        *[(("--capability", of), f"capability is {of}, for which nothing") for of in ("1.0", "8.8", "9.1", "99.9")],
    ):
        ran = maskserve("warmup", *words)
        assert (ran.code, says in ran.err) == (2, True), ran.err


def test_a_worker_number_that_is_none_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in(monkeypatch, StandIn(2)):
        for said, device in (("1", "cpu:1"), ("two", "cpu:0"), ("-1", "cpu:0"), ("", "cpu:0")):
            monkeypatch.setenv("MASKSERVE_WORKER", said)
            assert device_of("cuda") == device


def test_uses_have_every_kind_of_slices_with_a_mask_and_without() -> None:
    found = warming.uses("cpu", [dtypes.f32, dtypes.i8], [OPS["sum"], OPS["softmax"]])
    folds = {use.plan.fold for use in found if use.plan.row is OPS["sum"]}
    assert {(64, 128, 1), (2, 9000, 1), (1, 128, 64), (1, 9000, 40), (6, 300, 40), (1, 72000, 1)} == folds
    assert len(found) == 4 * len(folds) + 4 * (len(folds) - 1), "softmax takes one dim"
    own = warming.uses("cpu", [dtypes.f32], [OPS["sum"]], [(3, 4)])
    assert {(use.plan.fold, use.is_masked) for use in own} == set(
        product([(1, 3, 4), (3, 4, 1), (1, 12, 1)], [True, False])
    )


def test_a_use_that_a_worker_is_sent_in_words_is_the_same() -> None:
    for use in warming.uses("cpu", [dtypes.f32, dtypes.i8]):
        again = pickle.loads(pickle.dumps(warming.in_words(use, 90))).use()
        assert [getattr(again.plan, word) for word in ("row", "params", "fold", "stored", "out_shape")] == [
            getattr(use.plan, word) for word in ("row", "params", "fold", "stored", "out_shape")
        ]


@pytest.mark.skipif(missing() is not None or interprets(), reason="only triton compiles ahead")
def test_kernels_are_compiled_ahead_into_tritons_own_folder(
    maskserve: Maskserve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process finds them there: none is compiled again."""
    words = ("warmup", "--capability", "9.0", "--dtypes", "f32", "--ops", "count", "--shapes", "64", "--json")
    cache = str(tmp_path / "triton")
    first = json.loads(process(*words, cwd=tmp_path, TRITON_CACHE_DIR=cache).out)
    assert (first["device"], first["folder"], first["backends"]) == ("sm_90", cache, {"triton": 1})
    assert first["kernels"] > 0
    made = {path.name: path.stat().st_mtime_ns for path in Path(cache).rglob("*.cubin")}
    assert made
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    again = json.loads(maskserve(*words).out)
    assert again["kernels"] == first["kernels"]
    assert {path.name: path.stat().st_mtime_ns for path in Path(cache).rglob("*.cubin")} == made
