"""What a back end compiles at first use, compiled before: by running it on its device, or ahead for a kind of device.

A kernel is compiled once for each tile that slices are cut into, so for some sizes of slices, not for each shape: the kinds here
have the tiles that most shapes have, and a shape that is known can be given.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskserve import engine, execution
from maskserve.accelerators import CPU
from maskserve.backends import Puller
from maskserve.backends.triton import TritonBackend
from maskserve.backends.triton_ahead import check_capability, compile_ahead
from maskserve.backends.triton_launches import Call, recording
from maskserve.backends.triton_tables import missing
from maskserve.cgroup import cpus
from maskserve.devices import Dims, Shape, plans
from maskserve.dtypes import DType, parse
from maskserve.errors import BackendError
from maskserve.ops import find
from maskserve.ops.rows import Row
from maskserve.plan import Plan
from maskserve.processes import Processes

KINDS: tuple[tuple[Shape, Dims], ...] = (
    ((64, 128), (1,)),
    ((2, 9000), (1,)),
    ((128, 64), (0,)),
    ((9000, 40), (0,)),
    ((6, 300, 40), (1,)),
    ((6, 300, 40), (0, 1, 2)),
)
"""Slices that are short and long, one after the other and beside each other, between other dims, and a whole tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One use of an op: a plan along these dims, and whether its cells have a mask, which kernels are told when compiled."""

    plan: Plan
    dims: Dims
    is_masked: bool

    def cells(self) -> tuple[Tensor, Tensor | None]:
        """Cells and mask for it, on its device."""
        of = self.plan
        data = torch.ones(of.shape, device=of.device).to(getattr(torch, of.stored.torch))
        return data, torch.ones(of.shape, dtype=torch.bool, device=of.device) if self.is_masked else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """One use that has run or was compiled, by whom, how many kernels were compiled ahead, and the seconds that it took."""

    op: str
    dtype: str
    backend: str
    seconds: float
    kernels: int = 0


def uses(device: str, dtypes: Iterable[DType], rows: Iterable[Row] = (), shapes: Sequence[Shape] = ()) -> list[Use]:
    """Every op of `rows`, or of all, in each dtype, with and without a mask, along dims of each kind or of the shapes given."""
    given: list[tuple[Shape, Dims]] = [(shape, (dim,)) for shape in shapes for dim in range(len(shape))]
    given += [(shape, tuple(range(len(shape)))) for shape in shapes if len(shape) > 1]
    return [
        Use(plan=of, dims=dims, is_masked=is_masked)
        for dtype in dtypes
        for shape, dims in given or KINDS
        for of in plans(dtype, shape, dims, device, rows)
        for is_masked in (True, False)
    ]


def run(use: Use) -> Warmed:
    """The use, run on its device: what is compiled is kept on disk."""
    start, backend = time.perf_counter(), execution.backend_of(use.plan)
    data, mask = use.cells()
    engine.run(use.plan, data, mask)
    if isinstance(backend, Puller) and backend.pulls(use.plan):
        pulled(backend, use.plan, data, mask)
    seconds = time.perf_counter() - start
    return Warmed(op=use.plan.row.name, dtype=use.plan.stored.name, backend=backend.name, seconds=seconds)


def pulled(backend: Puller, of: Plan, data: Tensor, mask: Tensor | None) -> None:
    """A gradient of it, both with and without where it reaches."""
    gate = torch.ones(of.shape, dtype=torch.bool, device=data.device)
    for reach in (None, torch.empty(of.shape, dtype=torch.bfloat16, device=data.device)):
        backend.pull(of, data, mask, data, data, gate, torch.empty_like(data), reach)


# -- without a device -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """A use whose kernels are compiled for devices of a compute capability, in words, which a worker is sent."""

    op: str
    dtype: str
    shape: Shape
    dims: Dims
    is_masked: bool
    capability: int

    def use(self) -> Use:
        (of,) = plans(parse(self.dtype), self.shape, self.dims, CPU, [find(self.op)])
        return Use(plan=of, dims=self.dims, is_masked=self.is_masked)


def in_words(use: Use, capability: int) -> Ahead:
    of = use.plan
    return Ahead(
        op=of.row.name,
        dtype=of.stored.name,
        shape=of.shape,
        dims=use.dims,
        is_masked=use.is_masked,
        capability=capability,
    )


def compiled(task: Ahead) -> Warmed:
    """The kernels of a use, in the folder where a process looks that has such a device."""
    start = time.perf_counter()
    made = compile_ahead(launches(task.use()), task.capability)
    seconds = time.perf_counter() - start
    return Warmed(op=task.op, dtype=task.dtype, backend=TritonBackend.name, seconds=seconds, kernels=len(made))


def ahead(uses: Sequence[Use], capability: int) -> Iterator[Warmed]:
    """Those of all the uses as they are done, in as many processes as there are CPUs: one compiles a kernel at a time."""
    tasks = [in_words(use, capability) for use in uses]
    for outcome in Processes(workers=min(cpus(), max(len(tasks), 1))).run(compiled, tasks):
        if outcome.error is not None:
            raise outcome.error
        assert outcome.result is not None
        yield outcome.result


def launches(use: Use) -> list[Call]:
    """What the use would launch on a device."""
    backend = TritonBackend()
    data, mask = use.cells()
    with recording() as calls:
        backend.run(use.plan, data, mask)
        if backend.pulls(use.plan):
            pulled(backend, use.plan, data, mask)
    return calls


def with_kernels(found: Iterable[Use], capability: int) -> list[Use]:
    """Those of the uses that such a device has kernels for; BackendError where no triton is there to compile them."""
    check_capability(capability)
    reason = missing()
    if reason is not None:
        raise BackendError(f"nothing can be compiled ahead: {reason}", parameter="backend")
    return [use for use in found if TritonBackend().why_not(replace(use.plan, device="cuda")) is None]


def cache_folder() -> str:
    """Where Triton keeps what it has compiled."""
    from triton import knobs

    return str(knobs.cache.dir)
