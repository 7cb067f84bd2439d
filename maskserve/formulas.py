"""Requests that compute an expression over a payload's variables: its value, or its gradients by some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from maskserve import execution, sources
from maskserve.above import Above, above_of, differentiable
from maskserve.backends import choose_fuser, refuse_unknown
from maskserve.dtypes import boolean
from maskserve.errors import GradientError, ParameterError, nearest
from maskserve.evaluation import Declared, Term, evaluated, fused, is_elementwise, planned, program, stages
from maskserve.expression import Expression, Name
from maskserve.gates import kept, kept_in_place
from maskserve.loading import device_of, on_device, without_fill
from maskserve.payload.format import Payload
from maskserve.payload.header import shown
from maskserve.payload.tensors import load
from maskserve.payload.variables import DATA, MASK, Dims, Variable, Variables, unknown
from maskserve.pullbacks import Leaves
from maskserve.regions import Piece
from maskserve.requests import Request
from maskserve.room import Need, budget_of
from maskserve.sides import Payloads
from maskserve.steps import TORCH, Result, Step, Streamed, Work, gradient_results
from maskserve.tensor import MaskedTensor
from maskserve.told import Told
from maskserve.tracing import is_followed, same_memory
from maskserve.variable_steps import cell_bytes, puller, work_of

ONLY = "x"
"""What an expression may call a payload's only variable."""
REACH = 2
"""Bytes a cell, beside itself and its mask, that a term keeps for the way back."""
WIDTHS = 13
"""How many times the bytes of a term's cells its way back may hold at once: float_power and gammaincc do, most hold a third."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfExpression(Step):
    """What a request does with all variables of its expression."""

    expression: Expression
    term: Term
    sources: Mapping[str, Variable]
    """The variable that each name of the expression stands for."""
    wrt: tuple[str, ...] = ()
    device: str = "cpu"
    backend: str | None = None
    above: Above | None = None
    has_fill: bool = False
    """Whether cells that equal a number are masked."""

    @property
    def name(self) -> str:
        return str(self.expression)

    @property
    def inputs(self) -> tuple[Variable, ...]:
        above = [self.above.variable] if self.above else []
        return tuple({v.name: v for v in (*self.sources.values(), *above)}.values())

    @property
    def result(self) -> Told:
        return Told(dtype=self.term.dtype, shape=self.term.shape, dims=self.term.dims)

    @property
    def written(self) -> tuple[Told, ...]:
        """The value; then the gradients."""
        own = [(self.sources[name], differentiable(self.sources[name])) for name in self.wrt]
        return (self.result, *(Told(dtype=dtype, shape=v.info.shape, dims=v.dims) for v, dtype in own))

    @property
    def bytes_held(self) -> int:
        if not self.wrt:
            room = max((stage.room_bytes for stage in stages(self.term)), default=0)
            return max(self.term.peak_bytes, self.bytes_written) + room
        terms = [term for stage in stages(self.term) for term in fused(stage)]
        saved = sum(term.n_bytes + REACH * prod(term.shape) for term in terms)
        saved += sum(term.outline.held_bytes for term in terms if term.outline is not None)
        sizes = [prod(t.shape) * t.dtype.n_bytes for term in terms for t in (term, *(o for o, _ in term.terms))]
        return self.bytes_written + saved + WIDTHS * max(sizes, default=0)

    @property
    def works(self) -> tuple[Work, ...]:
        return tuple(self.work(stage) for stage in stages(self.term))

    def work(self, stage: Term) -> Work:
        """Who computes a term: a back end, or torch block by block what is elementwise."""
        if stage.plan is None or stage.choice is None:
            return self.torchs(stage)
        gradient = puller(stage.plan, stage.choice) if self.wrt else None
        return work_of(stage.plan, stage.choice, gradient)

    def torchs(self, stage: Term) -> Work:
        """What torch computes, or a kernel in its place where no gradient is asked for."""
        ops = ", ".join(term.op for term in fused(stage))
        if self.wrt or not is_elementwise(stage):
            return Work(op=ops, cells=stage.dtype, backend=TORCH, gradient=TORCH if self.wrt else None)
        chosen = choose_fuser(program(stage).chain.ops, self.device, self.backend)
        backend = TORCH if chosen.fuser is None else chosen.fuser.name
        return Work(op=ops, cells=stage.dtype, backend=backend, refused=dict(chosen.refusals))

    @property
    def dims_alive(self) -> Dims:
        """The dims of the result that have as many cells as in the variable that they come from."""
        sizes = {(dim, n) for v in self.sources.values() for dim, n in zip(v.dims or (), v.info.shape, strict=False)}
        return tuple(dim for dim, n in zip(self.term.dims or (), self.term.shape, strict=False) if (dim, n) in sizes)

    def results(self, request: Request, payload: Payload, variables: Variables) -> Iterator[Result]:
        fill = request.common.get("fill_value")
        given = {variable.name: self.loaded(payload, variable, fill) for variable in self.sources.values()}
        tensors = {name: given[variable.name] for name, variable in self.sources.items()}
        if self.wrt:
            yield from self.gradients(request, payload, tensors)
            return
        with execution.using(backend=self.backend):
            value = evaluated(self.term, tensors)
        dims = None if self.term.dims == (DATA,) else self.term.dims  # a tensor named like its only dim is a coordinate
        data = without_junk(self.term, value, given.values())
        yield Result(name=DATA, data=data, mask=value._full_mask(), mask_name=MASK, dims=dims)

    def streamed(
        self, request: Request, payload: Payload, variables: Variables, memory: int
    ) -> Iterator[Result | Streamed]:
        if self.is_held:
            yield from self.results(request, payload, variables)
            return
        from maskserve.streamed_terms import Terms  # which few expressions need

        fill = request.common.get("fill_value")
        given = {name: sources.onto(sources.stored(payload, v, fill), self.device) for name, v in self.sources.items()}
        terms = Terms(given, budget_of(memory), self.device)

        def pieces() -> Iterator[Piece]:
            with execution.using(backend=self.backend):
                yield from terms.pieces(self.term)

        dims = None if self.term.dims == (DATA,) else self.term.dims
        made = Streamed(
            name=DATA, told=self.result, mask_name=MASK, dims=dims, fold=terms.fold(self.term), pieces=pieces,
        )  # fmt: skip
        yield made.in_memory() if self.holds(memory) else made

    @property
    def is_held(self) -> bool:
        """Whether it is computed in memory alone, and never in parts."""
        return bool(self.wrt) or isinstance(self.term.node, Name)

    @property
    def need(self) -> Need | None:
        if self.is_held:
            what = "the gradient" if self.wrt else "a variable as it is"
            return Need(memory=self.bytes_in_memory, why=f"{self.name}: {what} holds all in memory")
        from maskserve.streamed_terms import need  # which few expressions need

        with execution.using(backend=self.backend):
            found = need(self.term, {name: cell_bytes(v, self.has_fill) for name, v in self.sources.items()})
        return found and replace(found, memory=min(found.memory, self.bytes_in_memory))

    def passes(self, memory: int) -> int:
        if self.is_held:
            return 1
        return 1 + sum(stage.plan is not None for stage in stages(self.term))  # at most: each reads what lies below it

    def loaded(self, payload: Payload, variable: Variable, fill: float | None) -> MaskedTensor:
        data, mask = on_device(load(payload, variable), self.device)
        return MaskedTensor._of(data, without_fill(data, mask, fill))

    def gradients(self, request: Request, payload: Payload, tensors: Mapping[str, MaskedTensor]) -> Iterator[Result]:
        """The value, and the gradient by each variable that is asked for; all names of one are the same leaf."""
        words = {self.sources[name].name: name for name in self.wrt}
        leaf_of = {name: words[v.name] for name, v in self.sources.items() if v.name in words}

        def function(leaves: Leaves) -> MaskedTensor:
            value = evaluated(self.term, {**tensors, **{name: leaves[word] for name, word in leaf_of.items()}})
            if not is_followed(value._data):
                raise GradientError(
                    f"expr: no op with a gradient leads from {' or '.join(self.wrt)} to the result", parameter="expr"
                )
            return value

        dtypes = {name: getattr(torch, differentiable(self.sources[name]).torch) for name in self.wrt}
        inputs = {name: (tensors[name]._data.to(dtype), tensors[name]._held) for name, dtype in dtypes.items()}
        yield from gradient_results(request, payload, self, function, inputs, self.above)


def without_junk(term: Term, value: MaskedTensor, given: Iterable[MaskedTensor]) -> Tensor:
    """Cells that are 0 where masked: a variable, and what is moved of one, have what the payload had there."""
    data, mask = value._data, value._full_mask()
    if is_elementwise(term) or term.plan is not None:
        return data
    return (
        kept(data.contiguous(), mask) if any(same_memory(data, x._data) for x in given) else kept_in_place(data, mask)
    )


# -- before a cell is read ----------------------------------------------------------------------------------------


def steps(request: Request, variables: Variables, payload: Payload, others: Payloads) -> tuple[OfExpression, ...]:
    """The one step of an expression."""
    expression: Expression = request.params["expr"]
    known = visible(request, variables)
    device = device_of(request.device)
    sources = {name: known[name] for name in expression.names if name in known}
    wrt = asked(request, expression, sources) if request.is_gradient else ()
    leaves = {sources[name].name for name in wrt}
    declared = {name: declared_of(variable, is_leaf=variable.name in leaves) for name, variable in known.items()}
    backend = request.running.get("backend")
    refuse_unknown(backend)
    term = planned(expression.root, declared, device, backend)
    step = OfExpression(
        expression=expression, term=term, sources=sources, wrt=wrt, device=device, backend=backend,
        above=above_of(variables, "the expression", told_of(term)) if wrt else None,
        has_fill=request.common.get("fill_value") is not None,
    )  # fmt: skip
    if wrt and (term.dtype is boolean or term.dtype.is_integral):
        raise GradientError(
            f"the expression gives {term.dtype.name}, and a gradient is of numbers that change a little",
            parameter="expr",
        )
    return (step,)


def told_of(term: Term) -> Told:
    return Told(dtype=term.dtype, shape=term.shape, dims=term.dims)


def visible(request: Request, variables: Variables) -> Mapping[str, Variable]:
    """What an expression may name: variables, coordinates, what `let` calls otherwise, and an only variable as x."""
    known = {**variables.computed, **variables.coordinates}
    found = dict(known)
    for pair in request.params.get("let") or ():
        name, _, tensor = pair.partition("=")
        if tensor not in known:
            raise unknown(tensor, known, parameter="let")
        if name in known and name != tensor:
            raise ParameterError(
                f"let: the payload has a tensor {shown(name)} already: take another name", parameter="let"
            )
        found[name] = known[tensor]
    if len(variables) == 1 and ONLY not in found:
        (found[ONLY],) = variables
    return found


def asked(request: Request, expression: Expression, sources: Mapping[str, Variable]) -> tuple[str, ...]:
    """The names to give gradients by: those that are said, or each variable of numbers in the expression, once."""
    given: tuple[str, ...] | None = request.params.get("wrt")
    for name in given or ():
        if name not in sources:
            have = ", ".join(expression.names) or "none"
            raise ParameterError(
                f"wrt: {name[:64]} does not stand in the expression; its variables are {have}"
                f"{nearest(name, expression.names)}",
                parameter="wrt",
                allowed=expression.names,
            )
        differentiable(sources[name])
    if given is None:
        inner = {v.name: name for name, v in sources.items() if not v.is_coordinate and v.info.dtype is not boolean}
        given = tuple(inner.values())
        if not given:
            raise ParameterError("the expression has no variable of numbers to give a gradient by", parameter="wrt")
    if len({sources[name].name for name in given}) < len(given):
        raise ParameterError(f"wrt: {', '.join(given)} name one tensor twice; name it once", parameter="wrt")
    return given


def declared_of(variable: Variable, *, is_leaf: bool) -> Declared:
    dtype = differentiable(variable) if is_leaf else variable.info.dtype
    return Declared(shape=variable.info.shape, dtype=dtype, dims=variable.dims, is_masked=variable.mask is not None)
