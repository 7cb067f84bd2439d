"""Kernels compiled for a kind of device, without one: what `recording` saw, as a launch would compile it, to machine code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from maskserve.backends.triton_launches import LAUNCH, Call
from maskserve.backends.triton_tables import interprets, named
from maskserve.errors import BackendError, ParameterError

CAPABILITIES = (80, 90)
"""A100 and its kin, H100 and its kin."""
COMPILED_FOR = (70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
"""Those for which Triton 3.7 made machine code of a sum; for a kind that it does not know, its compiler ends the process."""


class StandIn:
    """What the compiler asks of a driver, answered for a device that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each target: what was compiled is remembered by it."""
        return int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def instead_of_a_device(capability: int) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = driver._active  # reset_active() would look for a device
    driver.set_active(StandIn(GPUTarget("cuda", capability, 32)))
    try:
        yield
    finally:
        driver.set_active(before)


def check_capability(capability: int) -> None:
    """Raises ParameterError where no machine code can be made for it."""
    if capability not in COMPILED_FOR:
        known = ", ".join(f"{of // 10}.{of % 10}" for of in COMPILED_FOR)
        raise ParameterError(
            f"capability is {capability // 10}.{capability % 10}, for which nothing is compiled; it must be one of {known}",
            parameter="capability",
        )


def compile_ahead(calls: Iterable[Call], capability: int) -> list[Any]:
    """The compiled kernel of each call, for CUDA devices of this compute capability."""
    if interprets():
        raise BackendError("with TRITON_INTERPRET=1 nothing is compiled; unset it", parameter="backend")
    with instead_of_a_device(capability):
        return [
            named(call.kernel).warmup(*call.args, grid=(call.programs,), **call.constants, **LAUNCH) for call in calls
        ]
