"""A step of a request: what it reads and gives, told from the header alone, and then its results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskserve import execution
from maskserve.accelerators import CPU
from maskserve.dtypes import DType, boolean
from maskserve.errors import TooLargeError
from maskserve.loading import loaded_above
from maskserve.ops.rows import GRAD
from maskserve.patterns import Pattern
from maskserve.payload.format import Output, Payload
from maskserve.payload.header import Shape
from maskserve.payload.tensors import output, sparse_outputs
from maskserve.payload.variables import MASK, Dims, MaskKind, Variable, Variables
from maskserve.requests import Request
from maskserve.room import RESULT_SHARE, Need
from maskserve.sparse import densified
from maskserve.tensor import MaskedTensor
from maskserve.told import Told
from maskserve.torch_dtypes import dtype_of

if TYPE_CHECKING:
    from maskserve.above import Above
    from maskserve.pullbacks import Gradient, Leaves, Masked
    from maskserve.regions import InPlace, Piece

VALUE = "value"
"""What an answer calls the result that gradients are of."""
MOST_SPREAD = 1 << 24
"""Bytes of a sparse result with every cell, where the form of an answer has no sparse ones."""
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

    @property
    def shape(self) -> Shape:
        return tuple(self.data.shape)

    @property
    def n_cells(self) -> int:
        return self.data.numel()

    @property
    def has_mask(self) -> bool:
        return self.mask is not None

    @property
    def n_masked(self) -> int:
        return 0 if self.mask is None else self.mask.numel() - int(self.mask.count_nonzero())

    @property
    def n_nan(self) -> int:
        """The valid NaN: what is hidden is 0."""
        return n_nan(self.data)

    def at_home(self) -> Result:
        """The same in the CPU's memory."""
        gradient = None if self.gradient is None else self.gradient.at_home()
        return replace(
            self, data=self.data.cpu(), mask=None if self.mask is None else self.mask.cpu(), gradient=gradient
        )

    def stored_at(self, pattern: Pattern) -> SparseResult:
        """The sparse variable whose stored cells these are."""
        return SparseResult(
            name=self.name, data=self.data, mask=self.mask, mask_name=self.mask_name, dims=self.dims, pattern=pattern,
            passed_through=self.passed_through,
        )  # fmt: skip

    def outputs(self) -> Iterator[Output]:
        yield output(self.name, self.data)
        if self.mask is not None:
            yield output(self.mask_name, self.mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseResult(Result):
    """A sparse variable of an answer: `data` and `mask` are those of the stored cells."""

    pattern: Pattern

    def at_home(self) -> Result:
        """The same in the CPU's memory."""
        return replace(Result.at_home(self), pattern=self.pattern.to(torch.device(CPU)))  # type: ignore[call-arg]  # of this class

    @property
    def shape(self) -> Shape:
        return tuple(self.pattern.shape)

    @property
    def n_cells(self) -> int:
        return self.pattern.numel

    @property
    def n_masked(self) -> int:
        assert self.mask is not None
        return self.n_cells - int(self.mask.count_nonzero())

    def outputs(self) -> Iterator[Output]:
        assert self.mask is not None
        yield from sparse_outputs(self.name, self.mask_name, self.pattern, self.data, self.mask)

    def spread_out(self) -> Result:
        """The strided variable, for a form that has no sparse ones."""
        n_bytes = self.n_cells * (self.data.element_size() + 1)
        if n_bytes > MOST_SPREAD:
            raise TooLargeError(
                f"{self.name} is sparse, and with every cell it has {n_bytes} bytes, where at most {MOST_SPREAD} are spread "
                "out; safetensors holds it as it is"
            )
        dense = densified(self.pattern, MaskedTensor._of(self.data, self.mask))
        return Result(
            name=self.name, data=dense._data, mask=dense._mask, mask_name=self.mask_name, dims=self.dims,
            passed_through=self.passed_through,
        )  # fmt: skip


def n_nan(cells: Tensor) -> int:
    if not cells.is_floating_point():
        return 0
    return int((cells.float() if cells.element_size() == 1 else cells).isnan().count_nonzero())  # no isnan of every fp8


@dataclass(slots=True, kw_only=True)
class Streamed:
    """A variable of an answer that is computed while it is written, since it does not fit into memory."""

    name: str
    told: Told
    mask_name: str
    dims: Dims | None
    fold: Shape
    """The shape that pieces lie in; its cells are the result's, in the same order."""
    pieces: Callable[[], Iterator[Piece]]
    passed_through: bool = False
    n_masked: int = 0
    n_nan: int = 0
    """Counted while it is written."""
    is_coordinate: bool = False
    has_mask: bool = True
    n_masked_before: int | None = None
    gradient: None = None

    @property
    def dtype(self) -> DType:
        return self.told.dtype

    @property
    def shape(self) -> Shape:
        return self.told.shape

    @property
    def n_cells(self) -> int:
        return prod(self.shape)

    def counted(self) -> Iterator[Piece]:
        """The pieces, with what is masked and what is NaN counted on the way."""
        for piece in self.pieces():
            self.n_masked += piece.mask.numel() - int(piece.mask.count_nonzero())
            self.n_nan += n_nan(piece.values)
            if self.n_masked_before is not None:
                self.n_masked_before += piece.n_masked_before
            yield piece

    def windows(self) -> Iterator[InPlace]:
        """Its cells and its mask, as they are computed."""
        from maskserve.regions import InPlace

        for piece in self.counted():
            yield InPlace(self.name, self.fold, piece.where, piece.values)
            if self.has_mask:
                yield InPlace(self.mask_name, self.fold, piece.where, piece.mask)

    def in_memory(self) -> Result:
        """The variable, computed now."""
        from maskserve.streaming import assembled

        data, mask = assembled(self.fold, getattr(torch, self.dtype.torch), self.counted())
        return Result(
            name=self.name, data=data.view(self.shape), mask=mask.view(self.shape) if self.has_mask else None,
            mask_name=self.mask_name, dims=self.dims, is_coordinate=self.is_coordinate, passed_through=self.passed_through,
            n_masked_before=self.n_masked_before,
        )  # fmt: skip

    def outputs(self) -> Iterator[Output]:
        """Its cells and its mask, without bytes yet."""
        yield Output(self.name, self.dtype, self.shape, ())
        if self.has_mask:
            yield Output(self.mask_name, boolean, self.shape, ())


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

    @property
    def bytes_in_memory(self) -> int:
        """The bytes that are held where all is in memory: what is read, and what is held beside it."""
        return self.bytes_read + sum(unpacked_bytes(v) for v in self.inputs) + self.bytes_held

    @abstractmethod
    def results(self, request: Request, payload: Payload, variables: Variables) -> Iterator[Result]:
        """What it gives."""

    @abstractmethod
    def streamed(
        self, request: Request, payload: Payload, variables: Variables, memory: int
    ) -> Iterator[Result | Streamed]:
        """The same, with as many bytes in memory as are allowed at once."""

    def passes(self, memory: int) -> int:
        """How many times what is read is read, at most, where it is read in parts; 0: as often as its cells decide."""
        return 1

    def is_streamed(self, memory: int) -> bool:
        """Whether it is read in parts."""
        return self.bytes_in_memory > memory

    @property
    @abstractmethod
    def is_held(self) -> bool:
        """Whether it is computed in memory alone, and never in parts."""

    @property
    def need(self) -> Need | None:
        """What must be in memory at once; None where it is read in parts of any size."""
        return Need(memory=self.bytes_in_memory, why=f"{self.name}: all is held in memory")

    @property
    def result(self) -> Told:
        """What it gives first."""
        return self.written[0]

    def holds(self, memory: int) -> bool:
        """Whether its result is held, and not written as it is computed."""
        return not self.is_streamed(memory) or len(self.written) > 1 or self.result.n_bytes <= memory // RESULT_SHARE


def unpacked_bytes(variable: Variable) -> int:
    """The bytes of a mask that is made of bits or lengths."""
    if variable.mask is None or variable.mask.kind is MaskKind.BOOL:
        return 0
    if variable.mask.kind is MaskKind.BITMASK:
        return variable.info.n_cells
    return prod(variable.info.shape[: len(variable.mask.info.shape) + 1])


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
