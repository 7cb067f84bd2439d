"""Devices: what does not fit is refused before it is taken, and a device that runs out of memory is tried in blocks.

Without a GPU: what torch says of a device is said here in its place. `pytest -m gpu` asks a real one.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import maskserve as ms
from maskserve import devices, dtypes, engine, execution
from maskserve.devices import admit, bytes_of, plans, self_test, warm
from maskserve.errors import OutOfMemoryError
from maskserve.ops import OPS
from maskserve.plan import plan
from tests.command_line import Maskserve, folder_fixture, maskserve_fixture  # noqa: F401  # fixtures are found by name
from tests.samples import assert_same_bits, cells, plan_of


def told(monkeypatch: pytest.MonkeyPatch, free: int, kept: int = 0) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 10**10))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: kept)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 0)


def test_a_plan_says_what_it_holds() -> None:
    of = plan(OPS["sum"], (("dim", 1),), (1000, 50), dtypes.f32, "cuda:0")
    assert bytes_of(of, has_mask=True) == 1000 * 50 * 5 + 1000 * 5
    assert bytes_of(of, has_mask=False) == 1000 * 50 * 4 + 1000 * 5


def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, free=4 * 10**6, kept=10**6)
    admit("cuda:0", 5 * 10**6)
    with pytest.raises(OutOfMemoryError, match="take 6 MB of cuda:0, and 5 MB are free there; give device=cpu"):
        admit("cuda:0", 5 * 10**6 + 1)
    admit("cpu", 10**15)


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


def test_the_self_test_asks_every_op_that_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test("cpu") == "ok"
    monkeypatch.setattr(devices.engine, "run", lambda *_: (torch.rand(3), torch.ones(3, dtype=torch.bool)))
    assert self_test("cpu") == "sum along dim 0 is wrong"
    monkeypatch.setattr(devices.engine, "run", lambda *_: 1 / 0)
    assert self_test("cpu") == "failed: ZeroDivisionError: division by zero"


def test_warming_runs_every_op_that_a_verb_serves(maskserve: Maskserve) -> None:
    names = {of.row.name for of in plans(dtypes.f32, (3, 4), "cpu")}
    assert {one.op for one in warm("cpu", (dtypes.f32,))} == names
    assert maskserve("warmup", "--device", "cpu", "--dtypes", "f32").text.startswith(
        f"warm: {len(names)} ops on cpu in "
    )
    said = json.loads(maskserve("warmup", "--device", "cpu", "--dtypes", "f32, i8", "--json").out)
    assert said["device"] == "cpu"
    assert said["backends"] == {"cpu": len(names)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device there is one to tell of")
def test_without_a_gpu_doctor_says_so(maskserve: Maskserve) -> None:
    assert maskserve("warmup", "--device", "cuda").code == 2
    record = json.loads(maskserve("doctor", "--json").out)
    assert record["devices"] == ["cpu"]
    assert record["gpus"] == []
    assert {one["name"] for one in record["backends"]} == {"cpu", "triton", "reference"}
    assert "triton: " in maskserve("doctor").text
