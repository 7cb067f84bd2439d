"""A step of a request: what it reads and gives, told from the header alone, and then its results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from maskserve import execution
from maskserve.dtypes import DType
from maskserve.loading import loaded_above
from maskserve.ops.rows import GRAD
from maskserve.payload.format import Output, Payload
from maskserve.payload.tensors import output
from maskserve.payload.variables import MASK, Dims, Variable, Variables
from maskserve.requests import Request
from maskserve.told import Told
from maskserve.torch_dtypes import dtype_of

if TYPE_CHECKING:
    from maskserve.above import Above
    from maskserve.pullbacks import Gradient, Leaves, Masked
    from maskserve.tensor import MaskedTensor

VALUE = "value"
"""What an answer calls the result that gradients are of."""
TORCH = "torch"
"""Who computes what no back end has a kernel for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One variable of an answer; a coordinate has a mask only if it came with one."""

    name: str
    data: Tensor
    mask: Tensor | None
    mask_name: str
    dims: Dims | None
    is_coordinate: bool = False
    passed_through: bool = False
    """Whether it lacks the named dim and is as it came."""
    n_masked_before: int | None = None
    """How many cells of the question were masked, where the request is about masks."""
    gradient: Gradient | None = None
    """The gradient that it is, where it is one."""

    @property
    def dtype(self) -> DType:
        return dtype_of(self.data)

    def outputs(self) -> Iterator[Output]:
        yield output(self.name, self.data)
        if self.mask is not None:
            yield output(self.mask_name, self.mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An op of a step: who computes it, and why those before in the list do not."""

    op: str
    cells: DType
    backend: str
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    gradient: str | None = None
    """Who computes its gradient, where one is asked for."""


class Step(ABC):
    """One result of a request: what a request does with one variable, or with all that an expression names."""

    device: str
    passes_through: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Variable, ...]:
        """What is read."""

    @property
    @abstractmethod
    def written(self) -> tuple[Told, ...]:
        """What is given."""

    @property
    @abstractmethod
    def works(self) -> tuple[Work, ...]:
        """The ops, in the order in which they are computed."""

    @property
    @abstractmethod
    def dims_alive(self) -> Dims:
        """The named dims of the result that have the cells that they had."""

    @property
    def bytes_read(self) -> int:
        return sum(v.info.n_bytes + (v.mask.info.n_bytes if v.mask else 0) for v in self.inputs)

    @property
    def bytes_written(self) -> int:
        return sum(tensor.n_bytes for tensor in self.written)

    @property
    def bytes_held(self) -> int:
        """The most bytes that are held at once beside what is read."""
        return self.bytes_written

    @property
    def labels(self) -> tuple[float, ...] | None:
        """The labels of the result's first dim, where it is a new one that has some."""
        return None

    @abstractmethod
    def results(self, request: Request, payload: Payload, variables: Variables) -> Iterator[Result]:
        """What it gives."""


def gradient_results(
    request: Request, payload: Payload, step: Step, function: Callable[[Leaves], MaskedTensor],
    inputs: Mapping[str, Masked], above: Above | None,
) -> Iterator[Result]:  # fmt: skip
    """The value of a function, and its gradients by `inputs`: these alone."""
    from maskserve import pullbacks  # 20 ms that no other verb needs

    told, *by = step.written
    seed = None if above is None else loaded_above(payload, above, step.device, told.dtype)
    with execution.using(backend=request.running.get("backend")):
        value, gradients = pullbacks.pulled_back(function, inputs, seed)
    dims = None if told.dims == (VALUE,) else told.dims  # a tensor named like its only dim is a coordinate
    yield Result(name=VALUE, data=value[0], mask=value[1], mask_name=f"{VALUE}.{MASK}", dims=dims)
    for (name, gradient), own in zip(gradients.items(), by, strict=True):
        yield Result(
            name=f"{name}.{GRAD}", data=gradient.data, mask=gradient.reached, mask_name=f"{name}.{GRAD}.{MASK}",
            dims=own.dims, gradient=gradient,
        )  # fmt: skip
