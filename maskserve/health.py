"""What a device's own errors mean: it is out of memory for now, or it is lost for as long as this process lives.

After some errors every later call of CUDA fails in the process, and only a new process can use the device again. So what was
lost is remembered here, and whoever asks for the device is told so at once. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType

from maskserve.errors import DeviceLostError, MaskserveError

log = logging.getLogger("maskserve")
SPEAKS = "CUDA"
"""What torch, Triton and the libraries below them put before a device's own error."""
LOSSES = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "unknown error",
)
"""After these, CUDA's documentation says, the process must be ended; the last is what a driver says that has lost a device."""
FULL = "out of memory"


def causes(error: BaseException) -> Iterator[RuntimeError]:
    """The errors of libraries that `error` is, or was raised from; ours say what they mean by themselves."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, RuntimeError) and not isinstance(at, MaskserveError):
            yield at
        at = at.__cause__


def loss(error: BaseException) -> str | None:
    """How a device was lost, in CUDA's words; None where it was not.

    >>> loss(RuntimeError("CUDA error: device-side assert triggered")), loss(RuntimeError("CUDA error: invalid argument"))
    ('device-side assert', None)
    """
    said = [str(cause) for cause in causes(error)]
    return next((words for text in said if SPEAKS in text for words in LOSSES if words in text), None)


def is_full(error: BaseException) -> bool:
    """Whether a device was out of memory: torch's allocator says so by a class, CUDA and Triton by words."""
    return any(
        type(cause).__name__ == "OutOfMemoryError" or (SPEAKS in str(cause) and FULL in str(cause))
        for cause in causes(error)
    )


def is_of_device(error: BaseException) -> bool:
    """Whether an error is a device's own, and says nothing of what was asked for."""
    return is_full(error) or loss(error) is not None


class Health:
    """The devices that were lost, and how."""

    def __init__(self) -> None:
        self._lost: dict[str, str] = {}

    @property
    def lost(self) -> Mapping[str, str]:
        return MappingProxyType(self._lost)

    def refuse_lost(self, device: str | None = None) -> None:
        """Raise where this device was lost, or any."""
        for name in [*self._lost] if device is None else [device]:
            if name in self._lost:
                raise self._refusal(name)

    def heard(self, device: str, error: Exception) -> DeviceLostError | None:
        """What `error`, raised where the device computes, means: that it is lost, which is remembered, or nothing of it."""
        how = loss(error)
        if how is None:
            return None
        if device not in self._lost:
            self._lost[device] = how
            log.error("%s is lost: %s", device, how)
        return self._refusal(device)

    def _refusal(self, device: str) -> DeviceLostError:
        return DeviceLostError(
            f"{device} was lost in this process ({self._lost[device]}), and only a new process can use it: start it anew, or "
            "give device=cpu",
            parameter="device",
        )

    @contextmanager
    def watching(self, device: str) -> Iterator[None]:
        """What is inside computes on the device: not at all where that was lost, and if it is lost there, that is remembered."""
        self.refuse_lost(device)
        try:
            yield
        except Exception as error:
            lost = self.heard(device, error)
            if lost is None:
                raise
            raise lost from error


@cache
def health() -> Health:
    """That of this process's devices."""
    return Health()
