"""Devices: whether they compute right, how fast they read, and that what they run first is compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from maskserve import engine, execution
from maskserve.accelerators import accelerators
from maskserve.backends import backends
from maskserve.dtypes import BY_TORCH, DType, f32
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.plan import Plan, SlicedRow, plan

DRIVER = Path("/proc/driver/nvidia/version")
COPIED = 1 << 28
"""Bytes that say how fast a device's memory is."""
ROUNDS = 10
TESTED = (3, 5000)
WARMED = ((64, 128), (2, 9000), (9000, 2), (600, 64))
"""Shapes whose slices, along either dim, lie in one tile and in several, beside each other and one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What is told of one device."""

    name: str
    model: str
    capability: str
    memory_bytes: int
    free_bytes: int
    self_test: str
    copied_bytes_per_s: float


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
    """A device after its self-test."""
    about = accelerators().about(name)
    return Device(
        name=name,
        model=about.model,
        capability=about.capability,
        memory_bytes=about.memory_bytes,
        free_bytes=accelerators().free_bytes(name),
        self_test=self_test(name),
        copied_bytes_per_s=copy_speed(name),
    )


# -- whether it computes right, and how fast ------------------------------------------------------------------------


def plans(dtype: DType, shape: tuple[int, ...], device: str) -> Iterator[Plan]:
    """A plan along each dim of every op that needs no parameter but that."""
    for row in OPS.values():
        if isinstance(row, SlicedRow) and row.verb and dtype in row.accepts:
            needed = [p for p in row.requestable if p.default is REQUIRED]
            if all(p.type is Type.DIM for p in needed):
                for dim in range(len(shape)):
                    yield plan(row, (("dim", dim),), shape, dtype, device)


def self_test(device: str) -> str:
    """ "ok", or the first op that gives other results there than on the CPU."""
    cells = torch.randn(TESTED, generator=torch.Generator().manual_seed(0))
    mask = cells > -1
    try:
        for there in plans(f32, TESTED, device):
            if served_by_kernels(there):
                here = plan(there.row, (("dim", there.dims[0]),), TESTED, f32, "cpu")
                values, valid = engine.run(there, cells.to(device), mask.to(device))
                expected, own = engine.run(here, cells, mask)
                same = torch.equal(valid.cpu(), own)
                if not (same and torch.allclose(values.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)):
                    return f"{there.row.name} along dim {there.dims[0]} is wrong"
    except (
        Exception
    ) as error:  # whatever a device or its compiler can say: it is reported, and nothing is computed there
        return f"failed: {type(error).__name__}: {str(error)[:200]}"
    return "ok"


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


# -- before the first request -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """One op that has run, by whom, and how long its first runs took."""

    op: str
    dtype: str
    backend: str
    seconds: float


def warm(device: str, dtypes: tuple[DType, ...]) -> Iterator[Warmed]:
    """Every op once on small cells, so that what is compiled at first use is compiled and kept on disk."""
    for dtype in dtypes:
        for shape in WARMED:
            cells = torch.ones(shape, device=device).to(getattr(torch, dtype.torch))
            assert BY_TORCH[str(cells.dtype).removeprefix("torch.")] is dtype
            mask = torch.ones(shape, dtype=torch.bool, device=device)
            for of in plans(dtype, shape, device):
                start = time.perf_counter()
                engine.run(of, cells, mask)
                yield Warmed(
                    op=of.row.name,
                    dtype=dtype.name,
                    backend=execution.backend_of(of).name,
                    seconds=time.perf_counter() - start,
                )
