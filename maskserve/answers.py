"""A request on a payload becomes an answer: the one door behind every front end. Knows no files, no terminal, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from maskserve import engine, execution, masking, sides
from maskserve.above import Above, above_of, differentiable, refuse_several
from maskserve.backends import Choice, choose
from maskserve.backends.reference import ReferenceBackend
from maskserve.dtypes import DType
from maskserve.errors import BackendError, DimError, DtypeError, TooLargeError, nearest
from maskserve.loading import device_of, loaded, loaded_above, on_device, without_fill
from maskserve.ops.rows import GRAD, Masking, Normalization, Reduction, Scan
from maskserve.payload.format import Encoded, Output, Payload, encode
from maskserve.payload.held import refuse_other_masks
from maskserve.payload.tensors import load, output
from maskserve.payload.variables import MASK, Dims, Variable, Variables, answer_mask_name, answer_metadata, resolve
from maskserve.plan import Plan, plan
from maskserve.requests import Request
from maskserve.sides import Payloads, Side
from maskserve.torch_dtypes import dtype_of
from maskserve.version import version

if TYPE_CHECKING:
    from maskserve.pullbacks import Gradient

VALUE = "value"
"""What an answer calls the result that gradients are of."""
NOTHING: Payloads = MappingProxyType({})
SMALL_ANSWER = 1 << 20
REMEMBERED = 8
"""Requests whose steps one header remembers."""
GROWTH = 9
"""An i64 and its mask for each byte: what an answer may be of a question without dims of size 0."""


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
class Answer:
    """The variables that a request gives, in the order of the question, and the payload's metadata."""

    results: tuple[Result, ...]
    metadata: dict[str, str]

    def outputs(self) -> list[Output]:
        return [out for result in self.results for out in result.outputs()]

    def encoded(self) -> Encoded:
        """The answer as safetensors: its size, and its bytes in pieces."""
        return encode(self.outputs(), self.metadata)

    def to_bytes(self) -> bytes:
        return b"".join(self.encoded().chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A tensor of an answer, from the header alone."""

    dtype: DType
    shape: tuple[int, ...]
    dims: Dims | None

    @property
    def n_bytes(self) -> int:
        """Its bytes and its mask's."""
        return prod(self.shape) * (self.dtype.n_bytes + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a request does with one variable: the plan where it has one; a new mask has none."""

    variable: Variable
    dims: Dims | None
    plan: Plan | None = None
    choice: Choice | None = None
    sides: tuple[Side, ...] = ()
    device: str = "cpu"
    passes_through: bool = False
    is_gradient: bool = False
    above: Above | None = None
    """The gradient from above, where the payload has one and the request asks for a gradient."""

    @property
    def bytes_read(self) -> int:
        others = [side.variable for side in self.sides] + ([self.above.variable] if self.above else [])
        return sum(bytes_of(variable) for variable in (self.variable, *others))

    @property
    def dims_alive(self) -> Dims:
        """The named dims that are not reduced; keepdim leaves the name of one that is, and not its cells."""
        reduced = self.plan.dims if self.plan and isinstance(self.plan.row, Reduction) else ()
        return tuple(name for dim, name in enumerate(self.variable.dims or ()) if dim not in reduced)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.plan.out_shape if self.plan else self.variable.info.shape

    @property
    def written(self) -> tuple[Written, ...]:
        """The result; then, where it is asked for, the gradient."""
        own = self.variable.info
        result = Written(dtype=self.plan.result if self.plan else own.dtype, shape=self.out_shape, dims=self.dims)
        gradient = Written(dtype=self.plan.stored if self.plan else own.dtype, shape=own.shape, dims=self.variable.dims)
        return (result, gradient) if self.is_gradient else (result,)

    @property
    def bytes_written(self) -> int:
        return sum(tensor.n_bytes for tensor in self.written)


def bytes_of(variable: Variable) -> int:
    return variable.info.n_bytes + (variable.mask.info.n_bytes if variable.mask else 0)


def explain(request: Request, payload: Payload, others: Payloads = NOTHING) -> tuple[Step, ...]:
    """What the request does with each variable, decided from the header alone."""
    return steps(request, resolved(request, payload, others), payload, others)


def steps(request: Request, variables: Variables, payload: Payload, others: Payloads) -> tuple[Step, ...]:
    """A step for each variable; a named dim that none of them has is an error."""
    device = device_of(str(request.running.get("device", "auto")))
    if request.is_gradient:
        refuse_several(variables)

    def over(variable: Variable) -> tuple[Side, ...]:
        means = request.common.get("mask_means")
        return tuple(sides.of_variable(request.row, request.params, variable, variables, payload, others, means))

    for variable in variables:
        answer_mask_name(variable, variables)  # refuses a name that leaves no room for it, before anything is computed
    hint = "; tensor (--tensor) picks the variables to compute on" if len(variables) > 1 else ""
    planned = tuple(step(request, variable, device, over, hint) for variable in variables)
    if request.is_gradient:
        planned = tuple(with_gradient(s, variables) for s in planned)
    dims = request.params.get("dim")
    if dims is not None and all(s.passes_through for s in planned):
        raise no_such_dim(request, variables)
    return planned


def run(
    request: Request, payload: Payload, others: Payloads = NOTHING, admit: Callable[[int], None] | None = None
) -> Answer:
    """Every variable of the payload computed on, or passed through where it lacks the named dim.

    `others` are payloads by the word that the request has for them in place of a tensor's name; `admit` hears the bytes
    of the answer before they are computed, and may raise.
    """
    prepared = prepare(request, payload, others)
    variables, planned = prepared.variables, prepared.steps
    if admit:
        admit(prepared.bytes_written)
    if request.is_gradient:
        results = [r for step in planned for r in gradient_results(request, payload, step)]
    else:
        results = [result(request, payload, variables, step) for step in planned]
        alive = {dim for step in planned for dim in step.dims_alive}
        results += [coordinate(payload, c, variables) for c in variables.coordinates.values() if c.name in alive]
        results += labels(planned, {r.name for r in results})
    if prepared.metadata is None:
        prepared.metadata = metadata_of(request, payload, others, results)
    return Answer(results=tuple(results), metadata=dict(prepared.metadata))


def metadata_of(request: Request, payload: Payload, others: Payloads, results: list[Result]) -> dict[str, str]:
    """What an answer says of itself: a line of history, and the names of dims."""
    named = {r.name: r.dims for r in results if r.dims is not None}
    elsewhere = {p.name: sides.ELSEWHERE for p in sides.parameters(request.row) if request.params.get(p.name) in others}
    line = {"maskserve": version(), **request.canonical(), **elsewhere}
    return answer_metadata(payload.header.metadata, named, line, version())


@dataclass(slots=True, kw_only=True)
class Prepared:
    """All of an answer that its question's header decides."""

    variables: Variables
    steps: tuple[Step, ...]
    bytes_written: int
    metadata: dict[str, str] | None = None
    """None until the first answer is there, which names its dims."""


def prepare(request: Request, payload: Payload, others: Payloads) -> Prepared:
    """What a request does, remembered with the header: it would be the same again."""
    refuse_other_masks(payload, request.common.get("mask"), request.common.get("mask_means"))
    memo = payload.header.memo
    known: Prepared | None = memo.get(request)
    if known is not None and not others:
        return known
    variables = resolved(request, payload, others)
    planned = steps(request, variables, payload, others)
    refuse_growth(planned, payload)
    bytes_written = sum(step.bytes_written for step in planned)
    prepared = Prepared(variables=variables, steps=planned, bytes_written=bytes_written)
    if not others and not any(step.sides for step in planned):  # a side holds its payload
        if len(memo) >= REMEMBERED:
            memo.clear()
        memo[request] = prepared
    return prepared


def labels(planned: tuple[Step, ...], taken: set[str]) -> Iterator[Result]:
    """A coordinate for each new dim that has labels, where its name is free: the quantiles that were asked for."""
    for step in planned:
        said = step.plan.labels if step.plan else None
        if said is None or not step.dims or step.dims[0] in taken:
            continue
        name = step.dims[0]
        taken.add(name)
        data = torch.tensor(said, dtype=torch.float64)
        yield Result(name=name, data=data, mask=None, mask_name=f"{name}.mask", dims=(name,), is_coordinate=True)


def refuse_growth(planned: tuple[Step, ...], payload: Payload) -> None:
    """Refuses an answer out of all proportion to its question: a dim of size 0 lets 70 bytes ask for terabytes."""
    if all(info.n_bytes for info in payload.header.tensors.values()) and not any(
        s.plan and s.plan.labels for s in planned
    ):
        return  # no dim has size 0 and none is new, so no answer has more cells than its question has bytes
    n_bytes = sum(step.bytes_written for step in planned)
    most = max(SMALL_ANSWER, GROWTH * payload.n_bytes)
    if n_bytes > most:
        raise TooLargeError(f"the answer would have {n_bytes} bytes; to this question it may have at most {most}")


def resolved(request: Request, payload: Payload, others: Payloads) -> Variables:
    common = request.common
    refuse_other_masks(payload, common.get("mask"), common.get("mask_means"))
    return resolve(
        payload.header,
        side_inputs=sides.names(request.row, request.params, payload, others),
        mask=common.get("mask"),
        mask_means=common.get("mask_means"),
        tensors=common.get("tensor"),
    )


def step(
    request: Request, variable: Variable, device: str, over: Callable[[Variable], tuple[Side, ...]], hint: str
) -> Step:
    """The plan for one variable; names of dims become numbers here and nowhere else."""
    params = {name: value for name, value in request.params.items() if name not in named_tensors(request)}
    asked = params.get("dim")
    if asked is not None:
        numbers = dim_numbers(variable, asked if isinstance(asked, tuple) else (asked,))
        if numbers is None:
            return Step(variable=variable, dims=variable.dims, passes_through=True)
        params["dim"] = numbers if isinstance(asked, tuple) else numbers[0]
    row, laid = request.row, over(variable)
    if isinstance(row, Masking):
        refuse_backend(request)
        try:
            masking.check(row, variable.info.dtype, params)
        except DtypeError as error:
            error.message = f"{variable.name}: {error.message}{hint}"
            raise
        return Step(variable=variable, dims=variable.dims, sides=laid, device=device)
    assert isinstance(row, Reduction | Normalization | Scan)
    params |= {side.parameter.name: side.variable.info.dtype for side in laid}  # a plan knows its side inputs' dtypes
    dtype = differentiable(variable) if request.is_gradient else variable.info.dtype
    try:
        planned = plan(row, tuple(params.items()), variable.info.shape, dtype, device)
    except DimError as error:
        message = f"{variable.name}: {error.message}{hint}"
        raise DimError(message, parameter="dim", allowed=error.allowed) from None
    choice = choose(planned, request.running.get("backend"))
    dims = answer_dims(planned, variable)
    return Step(variable=variable, dims=dims, plan=planned, choice=choice, sides=laid, device=device)


def refuse_backend(request: Request) -> None:
    """A mask is made by torch, as the reference back end is."""
    name = request.running.get("backend")
    if name not in (None, ReferenceBackend.name):
        raise BackendError(
            f"back end {str(name)[:64]!r} cannot serve {request.row.name}: give {ReferenceBackend.name}, or none",
            parameter="backend",
            allowed=[ReferenceBackend.name],
        )


def named_tensors(request: Request) -> frozenset[str]:
    return frozenset(p.name for p in sides.parameters(request.row))


def dim_numbers(variable: Variable, asked: tuple[int | str, ...]) -> tuple[int, ...] | None:
    """The dims by number; None where the variable has none of a named dim and so passes through."""
    names = variable.dims or ()
    numbers = []
    for dim in asked:
        if isinstance(dim, int):
            numbers.append(dim)
        elif dim in names:
            numbers.append(names.index(dim))
        else:
            return None
    return tuple(numbers)


def no_such_dim(request: Request, variables: Variables) -> DimError:
    """No variable has the named dims: more likely a slip than a wish."""
    names = list(dict.fromkeys(name for variable in variables for name in variable.dims or ()))
    dims = request.params["dim"]
    given = [dim for dim in (dims if isinstance(dims, tuple) else (dims,)) if isinstance(dim, str)]
    missing = next((dim for dim in given if dim not in names), given[0])
    have = f"the payload's dims are {', '.join(names)}" if names else "the payload names no dims: give a number"
    return DimError(
        f"{request.row.name}: no variable has the dim {missing[:64]!r}; {have}{nearest(missing, names)}",
        parameter="dim",
        allowed=names,
    )


def answer_dims(planned: Plan, variable: Variable) -> Dims | None:
    """The names of the dims that live on."""
    row, params = planned.row, planned.params
    if variable.dims is None or not isinstance(row, Reduction):
        return variable.dims
    kept = tuple(name for dim, name in enumerate(variable.dims) if params["keepdim"] or dim not in planned.dims)
    return kept if planned.labels is None else (new_dim(row.leading_dim, kept), *kept)


def new_dim(name: str, taken: Dims) -> str:
    """`name`, with an underscore for each dim that has it already."""
    while name in taken:
        name += "_"
    return name


def with_gradient(step: Step, variables: Variables) -> Step:
    """The step, of which the gradient is asked for too."""
    if step.plan is None:
        return step
    return replace(step, is_gradient=True, above=above_of(variables, step.plan, step.dims))


def gradient_results(request: Request, payload: Payload, step: Step) -> Iterator[Result]:
    """The value, and the gradient by the variable: these alone."""
    from maskserve import pullbacks  # 20 ms that no other verb needs

    assert step.plan is not None
    name = step.variable.name
    data, mask = on_device(load(payload, step.variable), step.device)
    mask = without_fill(data, mask, request.common.get("fill_value"))
    data = data.to(getattr(torch, step.plan.stored.torch))
    function = pullbacks.of_plan(step.plan, name, *(loaded(side, step.device) for side in step.sides))
    above = None if step.above is None else loaded_above(payload, step.above, step.device, step.plan.result)
    with execution.using(backend=request.running.get("backend")):
        value, gradients = pullbacks.pulled_back(function, {name: (data, mask)}, above)
    dims = None if step.dims == (VALUE,) else step.dims  # a tensor named like its only dim is a coordinate
    yield Result(name=VALUE, data=value[0], mask=value[1], mask_name=f"{VALUE}.{MASK}", dims=dims)
    for by, gradient in gradients.items():
        yield Result(
            name=f"{by}.{GRAD}",
            data=gradient.data,
            mask=gradient.reached,
            mask_name=f"{by}.{GRAD}.{MASK}",
            dims=step.variable.dims,
            gradient=gradient,
        )


def result(request: Request, payload: Payload, variables: Variables, step: Step) -> Result:
    data, mask = on_device(load(payload, step.variable), step.device)
    mask = without_fill(data, mask, request.common.get("fill_value"))
    n_masked_before = None
    if step.plan is not None:
        laid = tuple(loaded(side, step.device) for side in step.sides)  # at most one: (cells, mask or None)
        with execution.using(backend=request.running.get("backend")):
            data, mask = engine.run(step.plan, data, mask, *laid)
    elif isinstance(request.row, Masking) and not step.passes_through:
        n_masked_before = n_masked(data, mask)
        data, mask = new_mask(request, step, data, mask)
    elif mask is None:
        mask = torch.ones(data.shape, dtype=torch.bool)
    else:
        mask = mask.expand(data.shape)
        data = engine.hidden_as_zero(data, mask)
    return Result(
        name=step.variable.name,
        data=data,
        mask=mask,
        mask_name=answer_mask_name(step.variable, variables),
        dims=step.dims,
        passed_through=step.passes_through,
        n_masked_before=n_masked_before,
    )


def new_mask(request: Request, step: Step, data: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cells under the mask that a request makes; each side input is a mask, or stands for its own."""
    assert isinstance(request.row, Masking)
    masks = {side.parameter.name: masking.validity(*loaded(side, step.device), side.means) for side in step.sides}
    params = {name: value for name, value in request.params.items() if name not in masks}
    return masking.compute(request.row, data, mask, params, masks)


def n_masked(data: Tensor, mask: Tensor | None) -> int:
    """How many cells are masked, without a mask of full size."""
    return 0 if mask is None else int((~mask).sum()) * (data.numel() // max(mask.numel(), 1))


def coordinate(payload: Payload, variable: Variable, variables: Variables) -> Result:
    """A coordinate as it came."""
    data, mask = load(payload, variable)
    return Result(
        name=variable.name,
        data=data,
        mask=mask,
        mask_name=answer_mask_name(variable, variables),
        dims=variable.dims,
        is_coordinate=True,
    )
