"""What a request computes on, as tensors on its device: variables, side inputs, the gradient from above."""

from __future__ import annotations

import os
import re
from typing import Any, TypeVar

import torch
from torch import Tensor

from maskserve.above import Above
from maskserve.accelerators import CPU, accelerators
from maskserve.compact import Mask, as_bools
from maskserve.dtypes import DType
from maskserve.errors import DataError, DeviceError
from maskserve.payload.format import Payload
from maskserve.payload.tensors import load
from maskserve.payload.variables import GRAD_OUTPUT
from maskserve.requests import AUTO
from maskserve.sides import Side
from maskserve.torch_dtypes import dtype_of
from maskserve.uploads import uploaded

M = TypeVar("M", bound=Mask)


def on_device(parts: tuple[Tensor, M | None], device: str) -> tuple[Tensor, Any]:
    """Cells and mask in the memory of the device; what lies there already is not copied."""
    data, mask = parts
    if device == CPU:
        return parts
    return uploaded(data, device), uploaded(mask, device) if isinstance(mask, Tensor) else mask and mask.to(device)


def loaded(side: Side, device: str) -> tuple[Tensor, Tensor | None]:
    """The cells of a side input and its mask, laid over its variable: of as many dims, size 1 where they broadcast."""
    data, held = on_device(load(side.payload, side.variable), device)
    mask = as_bools(held)
    if mask is not None:
        mask = mask.expand(data.shape).permute(side.order).reshape(side.shape)
    return data.permute(side.order).reshape(side.shape), mask


def loaded_above(payload: Payload, above: Above, device: str, dtype: DType) -> tuple[Tensor, Tensor | None]:
    """The gradient from above and its mask, of the result's shape and in its dtype."""
    data, held = on_device(load(payload, above.variable), device)
    mask = as_bools(held)
    own = None if mask is None else mask.expand(data.shape)
    cells = data.to(getattr(torch, dtype.torch))
    if cells.dtype is not data.dtype and dtype.is_float:
        beyond = data.double().isfinite() & ~cells.double().isfinite()
        if (beyond if own is None else beyond & own).any():
            raise DataError(
                f"{GRAD_OUTPUT} has finite cells that {dtype.name}, the result's dtype, cannot hold; dtype=f64 gives a wider "
                "result",
                parameter=GRAD_OUTPUT,
            )
    return cells.permute(above.order), None if own is None else own.permute(above.order)


def without_fill(data: Tensor, mask: M | None, fill: float | None) -> M | Tensor | None:
    """The mask, less the cells that hold the fill value; a value that the dtype cannot hold is in no cell."""
    dtype = dtype_of(data)
    if fill is None or not dtype.holds(fill):
        return mask
    valid = data != (int(fill) if dtype.is_integral else float(fill))  # torch has no int beyond 64 bits
    own = as_bools(mask)
    return valid if own is None else valid & own


DEVICE = re.compile(r"cpu|cuda(:(0|[1-9][0-9]?))?")
"""Words for devices; torch wraps an index to 8 bits, and would take cuda:256 for the first GPU."""
ANY = "cuda"
WORKER = "MASKSERVE_WORKER"
"""The variable by which a worker process knows its number among its fellows: they share the GPUs."""


def worker_number() -> int:
    """The number of this worker among its fellows; 0 in a process that is none, whatever else the variable holds."""
    said = os.environ.get(WORKER, "")
    return int(said) if re.fullmatch("[0-9]{1,9}", said) else 0


def device_of(word: str) -> str:
    """A device torch can compute on, by its own name: "cuda" is any GPU, "auto" too, or the CPU where there is none.

    That is the first GPU, and of several each worker process has the next one.

    >>> device_of("cpu")
    'cpu'
    """
    names = accelerators().names()
    if word == AUTO and not names:
        return CPU
    if word == CPU or word in names:
        return word
    if word != AUTO and not DEVICE.fullmatch(word):
        raise DeviceError(f"device {word[:64]!r} is not known: give auto, cpu, cuda or cuda:N", parameter="device")
    index = int(word.partition(":")[2] or worker_number() % max(len(names), 1))
    if index >= len(names):
        raise DeviceError(
            f"device {word} is not there: torch sees {len(names)} GPUs; give auto or cpu", parameter="device"
        )
    return names[index]
