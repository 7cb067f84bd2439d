"""Requests that act on each variable alone: the row's plan for it, or a new mask, or the variable as it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from maskserve import engine, execution, gates, masking, regions, sides, sources, sparse_ops, sparse_slices, streaming
from maskserve.above import Above, above_of, differentiable, refuse_several
from maskserve.backends import Choice, Puller, choose
from maskserve.backends.reference import ReferenceBackend
from maskserve.compact import Mask, as_bools
from maskserve.dim_names import numbers_of, result_dims
from maskserve.dtypes import DType
from maskserve.errors import BackendError, DimError, DtypeError, nearest
from maskserve.loading import device_of, loaded, on_device, without_fill
from maskserve.ops.rows import Fill, Masking, Normalization, Reduction, Scan
from maskserve.payload.format import Payload
from maskserve.payload.header import Shape
from maskserve.payload.tensors import load, load_sparse
from maskserve.payload.variables import Dims, Variable, Variables, answer_mask_name
from maskserve.plan import Plan, plan
from maskserve.regions import Piece
from maskserve.requests import Request
from maskserve.room import Need, budget_of
from maskserve.sides import Payloads, Side
from maskserve.sources import Source, Window
from maskserve.sparse import SparseTensor
from maskserve.steps import TORCH, Result, Step, Streamed, Work, gradient_results
from maskserve.tensor import MaskedTensor
from maskserve.told import Told

NEW_MASK = "a new mask"
STATE_BYTES = 56
"""The bytes of the widest state of a result cell."""
ENTRY_BYTES = 96
"""The bytes that a stored cell takes while slices are found and joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfVariable(Step):
    """What a request does with one variable: the plan where it has one; a new mask has none."""

    variable: Variable
    dims: Dims | None
    plan: Plan | None = None
    choice: Choice | None = None
    sides: tuple[Side, ...] = ()
    device: str = "cpu"
    passes_through: bool = False
    is_gradient: bool = False
    has_fill: bool = False
    """Whether cells that equal a number are masked."""
    above: Above | None = None
    """The gradient from above, where the payload has one and the request asks for a gradient."""

    @property
    def name(self) -> str:
        return self.variable.name

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return (
            self.variable, *(side.variable for side in self.sides), *([self.above.variable] if self.above else [])
        )  # fmt: skip

    @property
    def dims_alive(self) -> Dims:
        """The named dims that are not reduced; keepdim leaves the name of one that is, and not its cells."""
        reduced = self.plan.dims if self.plan and isinstance(self.plan.row, Reduction) else ()
        return tuple(name for dim, name in enumerate(self.variable.dims or ()) if dim not in reduced)

    @property
    def written(self) -> tuple[Told, ...]:
        """The result; then, where it is asked for, the gradient."""
        own = self.variable.info
        if self.keeps_pattern:
            dtype = own.dtype if self.plan is None else self.plan.result
            return (Told(dtype=dtype, shape=own.shape, dims=self.dims, stored_bytes=self.stored_bytes(dtype)),)
        if self.plan is None:
            return (Told(dtype=own.dtype, shape=own.shape, dims=self.dims),)
        result = Told(dtype=self.plan.result, shape=self.plan.out_shape, dims=self.dims)
        gradient = Told(dtype=self.plan.stored, shape=own.shape, dims=self.variable.dims)
        return (result, gradient) if self.is_gradient else (result,)

    @property
    def takes_stored(self) -> bool:
        """Whether it computes on what a sparse variable stores."""
        is_taken = self.plan is not None and not self.is_gradient and not isinstance(self.plan.row, Fill)
        return self.variable.stored is not None and (is_taken or self.passes_through)

    @property
    def keeps_pattern(self) -> bool:
        """Whether its result is stored where the variable is."""
        return self.takes_stored and not (self.plan is not None and isinstance(self.plan.row, Reduction))

    def stored_bytes(self, result: DType) -> int:
        """The bytes of a sparse result: values, their mask and their places."""
        assert self.variable.stored is not None
        *places, values = self.variable.stored.parts
        return values.n_cells * (result.n_bytes + 1) + sum(8 * part.n_cells for part in places)

    @property
    def bytes_held(self) -> int:
        if not self.takes_stored:
            return self.bytes_written
        stored = self.variable.stored
        assert stored is not None
        states = 0 if self.keeps_pattern or self.plan is None else STATE_BYTES * prod(self.plan.out_shape)
        block = ENTRY_BYTES * min(sparse_slices.BLOCK_CELLS, self.variable.info.n_cells)
        return self.bytes_written + states + block + ENTRY_BYTES * stored.values.n_cells

    @property
    def works(self) -> tuple[Work, ...]:
        if self.passes_through:
            return ()
        if self.plan is None or self.choice is None:
            return (Work(op=NEW_MASK, cells=self.variable.info.dtype, backend=TORCH),)
        gradient = puller(self.plan, self.choice) if self.is_gradient else None
        return (work_of(self.plan, self.choice, gradient),)

    @property
    def labels(self) -> tuple[float, ...] | None:
        return self.plan.labels if self.plan else None

    def results(self, request: Request, payload: Payload, variables: Variables) -> Iterator[Result]:
        if self.takes_stored:
            yield self.of_stored(request, payload, variables)
            return
        data, held = on_device(load(payload, self.variable), self.device)
        held = without_fill(data, held, request.common.get("fill_value"))
        if self.is_gradient:
            yield from self.gradients(request, payload, data, held)
            return
        n_masked_before, mask = None, None if self.plan is not None else as_bools(held)
        if self.plan is not None:
            laid = tuple(loaded(side, self.device) for side in self.sides)  # at most one: (cells, mask or None)
            with execution.using(backend=request.running.get("backend")):
                data, held = engine.run_held(self.plan, data, held, *laid)
            mask = gates.expanded(held, data.shape)
        elif isinstance(request.row, Masking) and not self.passes_through:
            n_masked_before = n_masked(data, mask)
            others = {
                side.parameter.name: masking.validity(*loaded(side, self.device), side.means) for side in self.sides
            }
            data, mask = new_mask(request, others, data, mask)
        elif mask is None:
            mask = all_valid(data)
        else:
            mask = mask.expand(data.shape)
            data = engine.hidden_as_zero(data, mask)
        yield Result(
            name=self.name, data=data, mask=mask, mask_name=answer_mask_name(self.variable, variables), dims=self.dims,
            passed_through=self.passes_through, n_masked_before=n_masked_before,
        )  # fmt: skip

    def of_stored(self, request: Request, payload: Payload, variables: Variables) -> Result:
        """The result for a sparse variable: strided of a reduction, else stored where the variable is."""
        pattern, data, mask = load_sparse(payload, self.variable)
        pattern, (data, mask) = pattern.to(torch.device(self.device)), on_device((data, mask), self.device)
        mask = without_fill(data, mask, request.common.get("fill_value"))
        made: MaskedTensor = SparseTensor._on(pattern, MaskedTensor._of(data, mask))
        if self.plan is not None:
            weights = [MaskedTensor._of(*loaded(side, self.device)) for side in self.sides]  # at most one
            with execution.using(backend=request.running.get("backend")):
                made = sparse_ops.computed(self.plan, made, weights[0] if weights else None)
        valid = made._cells._full_mask()
        result = Result(
            name=self.name, data=engine.hidden_as_zero(made._cells._data, valid), mask=valid, dims=self.dims,
            mask_name=answer_mask_name(self.variable, variables), passed_through=self.passes_through,
        )  # fmt: skip
        return result.stored_at(pattern) if self.keeps_pattern else result

    def streamed(
        self, request: Request, payload: Payload, variables: Variables, memory: int
    ) -> Iterator[Result | Streamed]:
        if self.is_held:
            yield from self.results(request, payload, variables)
            return
        fill = request.common.get("fill_value")
        mask_name = answer_mask_name(self.variable, variables)
        source = sources.onto(sources.stored(payload, self.variable, fill), self.device)
        (told,) = self.written
        pieces, fold = self.pieces(request, source, memory)
        made = Streamed(
            name=self.name, told=told, mask_name=mask_name, dims=self.dims, fold=fold, pieces=pieces,
            passed_through=self.passes_through, n_masked_before=0 if isinstance(request.row, Masking) else None,
        )  # fmt: skip
        yield made.in_memory() if self.holds(memory) else made

    def pieces(self, request: Request, source: Source, memory: int) -> tuple[Callable[[], Iterator[Piece]], Shape]:
        """The result in parts, and the shape that they lie in."""
        budget = budget_of(memory)
        laid = {
            side.parameter.name: (sources.onto(sources.of_side(side, source.shape), self.device), side.means)
            for side in self.sides
        }
        backend = request.running.get("backend")
        if self.plan is not None:
            planned = self.plan
            weights = next((of for of, _ in laid.values()), None)
            fold = regions.result_sizes(planned, planned.fold)

            def planned_pieces() -> Iterator[Piece]:
                with execution.using(backend=backend):
                    yield from streaming.pieces(planned, source, weights, budget)

            return planned_pieces, fold

        def piece(where: Window) -> Piece:
            data, mask = source.window(where)
            if self.passes_through:
                valid = all_valid(data) if mask is None else mask.expand(data.shape)
                return Piece(where=where, values=engine.hidden_as_zero(data, valid), mask=valid)
            masks = {name: masking.validity(*of.window(where), means) for name, (of, means) in laid.items()}
            values, new = new_mask(request, masks, data, mask)
            return Piece(where=where, values=values, mask=new, n_masked_before=n_masked(data, mask))

        return (lambda: streaming.by_window(source, piece, budget)), source.shape

    @property
    def is_held(self) -> bool:
        """Whether it is computed in memory alone, and never in parts."""
        return self.is_gradient or self.variable.stored is not None

    @property
    def need(self) -> Need | None:
        if self.is_held:
            what = "the gradient" if self.is_gradient else "a sparse tensor"
            return Need(memory=self.bytes_in_memory, why=f"{self.name}: {what} holds all in memory")
        if self.plan is None or self.choice is None:
            return None
        with execution.using(backend=self.choice.backend.name):
            found = streaming.needs(self.plan, cell_bytes(self.variable, self.has_fill))
        return found and replace(found, why=f"{self.name}: {found.why}", memory=min(found.memory, self.bytes_in_memory))

    def passes(self, memory: int) -> int:
        if self.plan is None or self.choice is None or self.is_held:
            return 1
        with execution.using(backend=self.choice.backend.name):
            return streaming.n_passes(self.plan, cell_bytes(self.variable, self.has_fill), budget_of(memory))

    def gradients(self, request: Request, payload: Payload, data: Tensor, mask: Mask | None) -> Iterator[Result]:
        """The value, and the gradient by the variable."""
        from maskserve import pullbacks  # 20 ms that no other verb needs

        assert self.plan is not None
        function = pullbacks.of_plan(self.plan, self.name, *(loaded(side, self.device) for side in self.sides))
        leaf = (data.to(getattr(torch, self.plan.stored.torch)), mask)
        yield from gradient_results(request, payload, self, function, {self.name: leaf}, self.above)


def cell_bytes(variable: Variable, has_fill: bool) -> int:
    """The bytes of a cell and its mask, as a source has them."""
    return variable.info.dtype.n_bytes + (variable.mask is not None or has_fill)


def work_of(planned: Plan, choice: Choice, gradient: str | None = None) -> Work:
    return Work(
        op=planned.row.name, cells=planned.dtype, backend=choice.backend.name, refused=dict(choice.refusals),
        gradient=gradient,
    )  # fmt: skip


def puller(planned: Plan, choice: Choice) -> str:
    """The back end with a kernel for the gradient, where none was asked for by name that has none."""
    from maskserve.backends.pulls import launch

    if isinstance(choice.backend, Puller):
        return choice.backend.name if choice.backend.pulls(planned) else TORCH
    is_free = choice.backend.name == "cpu" or bool(choice.refusals)
    return "cpu" if is_free and launch(planned) is not None else TORCH


# -- before a cell is read ----------------------------------------------------------------------------------------


def steps(request: Request, variables: Variables, payload: Payload, others: Payloads) -> tuple[OfVariable, ...]:
    """A step for each variable; a named dim that none of them has is an error."""
    device = device_of(request.device)
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


def step(
    request: Request, variable: Variable, device: str, over: Callable[[Variable], tuple[Side, ...]], hint: str
) -> OfVariable:
    """The plan for one variable; names of dims become numbers here and nowhere else."""
    params = {name: value for name, value in request.params.items() if name not in named_tensors(request)}
    asked = params.get("dim")
    if asked is not None:
        numbers = numbers_of(asked if isinstance(asked, tuple) else (asked,), variable.dims or ())
        if numbers is None:
            return OfVariable(variable=variable, dims=variable.dims, passes_through=True)
        params["dim"] = numbers if isinstance(asked, tuple) else numbers[0]
    row, laid = request.row, over(variable)
    if isinstance(row, Masking):
        refuse_backend(request)
        try:
            masking.check(row, variable.info.dtype, params)
        except DtypeError as error:
            error.message = f"{variable.name}: {error.message}{hint}"
            raise
        return OfVariable(variable=variable, dims=variable.dims, sides=laid, device=device)
    assert isinstance(row, Reduction | Normalization | Scan)
    params |= {side.parameter.name: side.variable.info.dtype for side in laid}  # a plan knows its side inputs' dtypes
    dtype = differentiable(variable) if request.is_gradient else variable.info.dtype
    try:
        planned = plan(row, tuple(params.items()), variable.info.shape, dtype, device)
    except DimError as error:
        message = f"{variable.name}: {error.message}{hint}"
        raise DimError(message, parameter="dim", allowed=error.allowed) from None
    choice = choose(planned, request.running.get("backend"))
    dims = result_dims(planned, variable.dims)
    return OfVariable(
        variable=variable, dims=dims, plan=planned, choice=choice, sides=laid, device=device,
        has_fill=request.common.get("fill_value") is not None,
    )  # fmt: skip


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


def with_gradient(step: OfVariable, variables: Variables) -> OfVariable:
    """The step, of which the gradient is asked for too."""
    if step.plan is None:
        return step
    (result,) = step.written
    return replace(step, is_gradient=True, above=above_of(variables, step.plan.row.name, result))


# -- cells --------------------------------------------------------------------------------------------------------


def new_mask(
    request: Request, masks: Mapping[str, Tensor | None], data: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cells under the mask that a request makes; `masks` are what each side input says of validity."""
    assert isinstance(request.row, Masking)
    params = {name: value for name, value in request.params.items() if name not in masks}
    return masking.compute(request.row, data, mask, params, masks)


def all_valid(data: Tensor) -> Tensor:
    """A mask of its shape, where it lies."""
    return torch.ones(data.shape, dtype=torch.bool, device=data.device)


def n_masked(data: Tensor, mask: Tensor | None) -> int:
    """How many cells are masked, without a mask of full size."""
    return 0 if mask is None else int((~mask).sum()) * (data.numel() // max(mask.numel(), 1))
