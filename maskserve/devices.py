"""Devices: what they are, whether they compute right, and how fast they read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskserve import engine, execution
from maskserve.accelerators import CPU, About, accelerators
from maskserve.backends import backends
from maskserve.dtypes import DType, f32
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Reduction, Row
from maskserve.plan import Plan, SlicedRow, plan

Shape = tuple[int, ...]
Dims = tuple[int, ...]

DRIVER = Path("/proc/driver/nvidia/version")
COPIED = 1 << 28
"""Bytes that say how fast a device's memory is."""
ROUNDS = 10
TESTED = (3, 5000)
OK = "ok"
"""What a self-test says that found nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(About):
    """What is told of one device."""

    name: str
    free_bytes: int
    self_test: str
    copied_bytes_per_s: float

    @property
    def is_well(self) -> bool:
        return self.self_test == OK


def driver() -> str | None:
    """The version of NVIDIA's driver, in its own words; None where there is none."""
    try:
        return DRIVER.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return None


def triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def examined(name: str) -> Device:
    """A device after its self-test; of one that fails that, no more is asked."""
    about, found = accelerators().about(name), self_test(name)
    is_well = found == OK
    return Device(
        **asdict(about),
        name=name,
        free_bytes=accelerators().free_bytes(name) if is_well else 0,
        self_test=found,
        copied_bytes_per_s=copy_speed(name) if is_well else 0.0,
    )


# -- whether it computes right, and how fast ------------------------------------------------------------------------


def plans(dtype: DType, shape: Shape, dims: Dims, device: str, rows: Iterable[Row] = ()) -> Iterator[Plan]:
    """A plan along these dims of every op of `rows`, or of all, that takes the dtype and needs nothing but dims or a cell."""
    for row in rows or OPS.values():
        if isinstance(row, SlicedRow) and row.verb and dtype in row.accepts:
            values = {Type.DIM: dims[0], Type.DIMS: dims if len(dims) > 1 else dims[0], Type.CELL: 1}
            given = {
                p.name: values.get(p.type) for p in row.requestable if p.default is REQUIRED or p.type is Type.DIMS
            }
            if None not in given.values() and (len(dims) == 1 or isinstance(row, Reduction)):
                yield plan(row, tuple(given.items()), shape, dtype, device)


def self_test(device: str) -> str:
    """ "ok", or the first op that gives other results there than on the CPU."""
    cells = torch.randn(TESTED, generator=torch.Generator().manual_seed(0))
    mask = cells > -1
    try:
        for dim in range(len(TESTED)):
            for here, there in zip(*(plans(f32, TESTED, (dim,), where) for where in (CPU, device)), strict=True):
                if served_by_kernels(there) and not is_right(here, there, cells, mask):
                    return f"{there.row.name} along dim {dim} is wrong"
    except (
        Exception
    ) as error:  # whatever a device or its compiler can say: it is reported, and nothing is computed there
        return f"failed: {type(error).__name__}: {str(error)[:200]}"
    return OK


def is_right(here: Plan, there: Plan, cells: Tensor, mask: Tensor) -> bool:
    """Whether a plan gives on its device what it gives here."""
    values, valid = engine.run(there, cells.to(there.device), mask.to(there.device))
    expected, own = engine.run(here, cells, mask)
    return torch.equal(valid.cpu(), own) and torch.allclose(
        values.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True
    )


def served_by_kernels(of: Plan) -> bool:
    return execution.backend_of(of).name != backends()[-1].name


def copy_speed(device: str) -> float:
    """Bytes a second, read and written, of a copy within a device's memory; 0 where there is no room to try."""
    if accelerators().free_bytes(device) < 3 * COPIED:
        return 0.0
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(ROUNDS):
        accelerators().synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        accelerators().synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * COPIED / best
