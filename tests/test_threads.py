"""One pool for all callers: the same bits from any number of threads, and nobody waits for somebody else's work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from maskserve import dtypes, engine, execution
from maskserve.backends.cpu import CpuBackend
from maskserve.ops.rows import Row
from tests.samples import NATIVE, assert_same_bits, cells, plan_of

MANY = 1 << 20
WAIT_S = 60


@pytest.mark.parametrize("row", NATIVE, ids=lambda row: row.name)
def test_one_two_and_seven_threads_give_the_same_bits(row: Row) -> None:
    dtype = dtypes.f32 if dtypes.f32 in row.accepts else dtypes.i64
    for shape, dim in (((70_001, 3), 0), ((5, 20_011), 1), ((300, 401), 0)):
        sample = cells(dtype, shape, 3, row=row)
        plan = plan_of(row, sample.data, dim=dim)
        found = []
        for threads in (1, 2, 7):
            with execution.using(threads=threads, block_cells=1 << 15):
                found.append(engine.run(plan, sample.data, sample.mask))
        for other in found[1:]:
            assert_same_bits(other, found[0], (row.name, shape))


def blocked_by(release: threading.Event, started: threading.Semaphore) -> Callable[[], None]:
    def task() -> None:
        started.release()
        assert release.wait(WAIT_S)

    return task


def test_a_call_ends_while_the_pool_is_full_of_another_ones_work() -> None:
    backend, release, started = CpuBackend(), threading.Event(), threading.Semaphore(0)
    with execution.using(threads=2), ThreadPoolExecutor(1) as caller:
        waiting = [blocked_by(release, started) for _ in range(8)]
        held = caller.submit(lambda: in_two_threads(backend, waiting))
        try:
            for _ in range(2):
                assert started.acquire(timeout=WAIT_S)
            done: list[int] = []
            in_two_threads(backend, [lambda: done.append(1)] * 5)
            assert len(done) == 5
            assert not held.done()
        finally:
            release.set()
        held.result(WAIT_S)


def in_two_threads(backend: CpuBackend, tasks: list[Callable[[], None]]) -> None:
    with execution.using(threads=2):
        execution.in_parallel(backend, MANY, tasks)


def test_an_error_ends_its_own_call_alone() -> None:
    backend, done = CpuBackend(), []

    def fails() -> None:
        raise ArithmeticError("this one")

    with pytest.raises(ArithmeticError, match="this one"):
        in_two_threads(backend, [fails] * 4)
    in_two_threads(backend, [lambda: done.append(1)] * 6)
    assert len(done) == 6


def test_sixteen_callers_share_the_pool_and_get_their_own_results() -> None:
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(16, 300, 1000, generator=generator)
    mask = torch.rand(16, 300, 1000, generator=generator) < 0.7
    rows = [row for row in NATIVE if dtypes.f32 in row.accepts][:16]
    work = [(rows[k % len(rows)], data[k], mask[k]) for k in range(16)]

    def run(of: tuple[Row, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        row, own, valid = of
        with execution.using(threads=3):
            return engine.run(plan_of(row, own, dim=1), own, valid)

    expected = [run(of) for of in work]
    pool_size = len([t for t in threading.enumerate() if t.name.startswith("maskserve_")])
    with ThreadPoolExecutor(16) as callers:
        for _ in range(3):
            for of, got, wanted in zip(work, callers.map(run, work), expected, strict=True):
                assert_same_bits(got, wanted, of[0].name)
    assert len([t for t in threading.enumerate() if t.name.startswith("maskserve_")]) <= max(pool_size, 3)
