"""A request on a payload becomes an answer: the one door behind every front end. Knows no files, no terminal, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch

from maskserve import sides, sources, streaming, variable_steps
from maskserve.admission import given
from maskserve.errors import TooLargeError
from maskserve.gates import expanded
from maskserve.ops.rows import Formula
from maskserve.payload.format import Encoded, Output, Payload, encode
from maskserve.payload.header import shown
from maskserve.payload.held import refuse_other_masks
from maskserve.payload.metadata import KEY_SHAPES, with_shapes
from maskserve.payload.tensors import load
from maskserve.payload.variables import Dims, Variable, Variables, answer_mask_name, answer_metadata, resolve
from maskserve.requests import Request
from maskserve.room import RESULT_SHARE, Need, beyond, enough, held
from maskserve.sides import Payloads
from maskserve.steps import Result, SparseResult, Step, Streamed
from maskserve.told import Told
from maskserve.version import version

NOTHING: Payloads = MappingProxyType({})
SMALL_ANSWER = 1 << 20
REMEMBERED = 8
"""Requests whose steps one header remembers."""
LEAST_SHARE = 4
"""The part of the memory that streaming always has."""
GROWTH = 9
"""An i64 and its mask for each byte: what an answer may be of a question without dims of size 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The variables that a request gives, in the order of the question, and the payload's metadata."""

    results: tuple[Result | Streamed, ...]
    metadata: dict[str, str]
    sources: tuple[Payload, ...] = ()
    """What a streamed answer is read from while it is written."""

    @property
    def is_streamed(self) -> bool:
        """Whether some of it does not fit into memory, and is computed while it is written."""
        return any(isinstance(result, Streamed) for result in self.results)

    @property
    def held(self) -> tuple[Result, ...]:
        """The variables that are in memory: all of them, where nothing is streamed."""
        return tuple(result for result in self.results if isinstance(result, Result))

    def write(self, descriptor: int, name: str) -> int:
        """The bytes of the answer, once they are in an empty file, which messages call by its name."""
        from maskserve import sinks

        n_bytes = sinks.write(descriptor, name, self.results, self.metadata)
        for source in self.sources:
            source.refuse_changed()
        return n_bytes

    def spread_out(self) -> Answer:
        """The same with each sparse variable strided: other forms than safetensors have no sparse ones."""
        results = tuple(r.spread_out() if isinstance(r, SparseResult) else r for r in self.results)
        metadata = {key: text for key, text in self.metadata.items() if key != KEY_SHAPES}
        return replace(self, results=results, metadata=metadata)

    def outputs(self) -> list[Output]:
        return [out for result in self.results for out in result.outputs()]

    def encoded(self) -> Encoded:
        """The answer as safetensors: its size, and its bytes in pieces."""
        assert not self.is_streamed, "a streamed answer is written to a file"
        return encode(self.outputs(), self.metadata)

    def to_bytes(self) -> bytes:
        return b"".join(self.encoded().chunks)


def explain(request: Request, payload: Payload, others: Payloads = NOTHING) -> tuple[Step, ...]:
    """What the request does with each variable, decided from the header alone."""
    return steps(request, resolved(request, payload, others), payload, others)


def steps(request: Request, variables: Variables, payload: Payload, others: Payloads) -> tuple[Step, ...]:
    """A step for each variable, or one for an expression."""
    if isinstance(request.row, Formula):
        from maskserve import formulas  # 20 ms that no other verb needs

        return formulas.steps(request, variables, payload, others)
    return variable_steps.steps(request, variables, payload, others)


def run(
    request: Request,
    payload: Payload,
    others: Payloads = NOTHING,
    admit: Callable[[int], None] | None = None,
    memory: int | None = None,
) -> Answer:
    """Every variable of the payload computed on, or passed through where it lacks the named dim.

    `others` are payloads by the word that the request has for them in place of a tensor's name; `admit` hears the bytes
    of the answer, and of what is held beside it, before they are computed, and may raise. `memory` is how many bytes may be
    held at once: what is more is read, and where it has to be written, in parts, with the same bits.
    """
    prepared = prepare(request, payload, others)
    planned = prepared.steps
    if admit:
        admit(prepared.bytes_held)
    results = computed(request, payload, prepared, memory)
    if not request.is_gradient:
        room = None if memory is None else [*shares(planned, memory)][-1]
        results += alive(payload, prepared, {r.name for r in results}, room)
        results += labels(planned, {r.name for r in results})
    sources = (payload, *others.values())
    for source in sources:
        source.refuse_changed()
    if prepared.metadata is None:
        prepared.metadata = metadata_of(request, payload, others, results)
    shapes = {r.name: r.shape for r in results if isinstance(r, SparseResult)}
    return Answer(results=tuple(results), metadata=with_shapes(prepared.metadata, shapes), sources=sources)


def bytes_to_read(request: Request, payload: Payload, others: Payloads = NOTHING, *, memory: int) -> int:
    """How many bytes `execution.using(tick=...)` will hear of where so many may be held: at most, as far as cells decide."""
    planned = rooms(prepare(request, payload, others).steps, memory)
    return sum(step.bytes_read * (max(step.passes(room), 1) if step.is_streamed(room) else 1) for step, room in planned)


def alive(payload: Payload, prepared: Prepared, taken: set[str], room: int | None) -> Iterator[Result | Streamed]:
    """The coordinates of the dims that live on; those that `room` has no place for are read while they are written."""
    found = [coordinate for coordinate in prepared.coordinates if coordinate.name not in taken]
    fits = [True] * len(found) if room is None else [is_held for is_held, _ in held(map(coordinate_bytes, found), room)]
    for coordinate, is_held in zip(found, fits, strict=True):
        yield (as_it_came if is_held else as_it_lies)(payload, coordinate, prepared.variables)


def kept(request: Request, payload: Payload, prepared: Prepared, memory: int) -> list[Result | Streamed]:
    """What a reduction does not reduce: the variables without the dim, and the coordinates."""
    passed = [step for step in prepared.steps if step.passes_through]
    results = [made for step in passed for made in step.streamed(request, payload, prepared.variables, memory)]
    return [*results, *alive(payload, prepared, {step.name for step in prepared.steps}, memory)]


def computed(request: Request, payload: Payload, prepared: Prepared, memory: int | None) -> list[Result | Streamed]:
    """What each step gives; where memory is bounded, what does not fit is streamed."""
    give = partial(given, request=request, payload=payload, variables=prepared.variables)
    if memory is None:
        return [made for step in prepared.steps for made in give(step, memory=None)]
    refuse_beyond(prepared.steps, memory)
    return [made for step, room in rooms(prepared.steps, memory) for made in give(step, memory=room)]


def rooms(planned: Sequence[Step], memory: int) -> Iterator[tuple[Step, int]]:
    """Each step with the memory that it has beside the results that are held of those before it."""
    return zip(planned, shares(planned, memory), strict=False)


def shares(planned: Sequence[Step], memory: int) -> Iterator[int]:
    """The memory that each step has, and what is left at last."""
    room = memory
    for step in planned:
        yield room
        room -= step.bytes_written if step.holds(room) else 0
        room = max(room, memory // LEAST_SHARE)  # a part is for what is read, however many results are held
    yield room


def refuse_beyond(planned: Sequence[Step], memory: int) -> None:
    """Raise, before anything is read, where a step does not fit: with the memory in which all would."""
    for need, _ in lacking(planned, memory):
        raise beyond(need, memory, enough(lambda more: first_lack(lacking(planned, more)), memory))


def lacking(planned: Sequence[Step], memory: int) -> Iterator[tuple[Need, int]]:
    """What does not fit, and how many bytes more would let it."""
    for step, room in rooms(planned, memory):
        need = step.need if step.is_streamed(room) else None
        if need is not None and need.memory > room:
            yield need, need.memory - room


def memory_to_hold(planned: Sequence[Step], memory: int, beside: Sequence[int] = ()) -> int | None:
    """The memory in which all fits and every result is held, and what has so many bytes `beside`; None where this one does."""

    def more(memory: int) -> int:
        room = [*shares(planned, memory)][-1]
        return (
            first_lack(lacking(planned, memory))
            or first_lack(unheld(planned, memory))
            or next((short for is_held, short in held(beside, room) if not is_held), 0)
        )

    least = enough(more, memory)
    return None if least == memory else least


def bytes_beside(request: Request, payload: Payload, others: Payloads = NOTHING) -> list[int]:
    """The sizes of the coordinates that an answer has beside its results."""
    return [*map(coordinate_bytes, prepare(request, payload, others).coordinates)]


def unheld(planned: Sequence[Step], memory: int) -> Iterator[tuple[Step, int]]:
    """The steps whose results are not held, but written as they are computed; and how many bytes more would let each."""
    for step, room in rooms(planned, memory):
        if not step.holds(room):
            yield step, min(step.bytes_in_memory, RESULT_SHARE * step.result.n_bytes) - room


def first_lack(found: Iterator[tuple[object, int]]) -> int:
    return next((n_bytes for _, n_bytes in found), 0)


def metadata_of(
    request: Request, payload: Payload, others: Payloads, results: Sequence[Result | Streamed]
) -> dict[str, str]:
    """What an answer says of itself: a line of history, and the names of dims."""
    return metadata_of_dims(request, payload, others, {r.name: r.dims for r in results if r.dims is not None})


def metadata_of_dims(request: Request, payload: Payload, others: Payloads, named: Mapping[str, Dims]) -> dict[str, str]:
    line = {"maskserve": version(), **said_of(request, others)}
    return answer_metadata(payload.header.metadata, named, line, version())


def said_of(request: Request, others: Payloads) -> dict[str, object]:
    """The request in its one spelling, without paths: one file has many."""
    elsewhere = {p.name: sides.ELSEWHERE for p in sides.parameters(request.row) if request.params.get(p.name) in others}
    return {**request.canonical(), **elsewhere}


@dataclass(slots=True, kw_only=True)
class Prepared:
    """All of an answer that its question's header decides."""

    variables: Variables
    steps: tuple[Step, ...]
    coordinates: tuple[Variable, ...]
    """Those of the dims that live on."""
    bytes_held: int
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
    names = set() if request.is_gradient else {dim for step in planned for dim in step.dims_alive}
    prepared = Prepared(
        variables=variables,
        steps=planned,
        coordinates=tuple(own for own in variables.coordinates.values() if own.name in names),
        bytes_held=sum(step.bytes_held for step in planned),
    )
    # a side input holds its payload, which no memo may
    if not others and not sides.names(request.row, request.params, payload, others):
        if len(memo) >= REMEMBERED:
            memo.clear()
        memo[request] = prepared
    return prepared


def labels(planned: tuple[Step, ...], taken: set[str]) -> Iterator[Result]:
    """A coordinate for each new dim that has labels, where its name is free: the quantiles that were asked for."""
    for step in planned:
        dims = step.written[0].dims
        if step.labels is None or not dims or dims[0] in taken:
            continue
        name = dims[0]
        taken.add(name)
        data = torch.tensor(step.labels, dtype=torch.float64)
        yield Result(name=name, data=data, mask=None, mask_name=f"{name}.mask", dims=(name,), is_coordinate=True)


def refuse_growth(planned: tuple[Step, ...], payload: Payload) -> None:
    """Refuses an answer out of all proportion to its question: a dim of size 0 lets 70 bytes ask for terabytes."""
    sparse = next((v.name for step in planned for v in step.inputs if v.stored is not None), None)
    is_empty = not all(info.n_bytes for info in payload.header.tensors.values())
    if not (sparse is not None or is_empty or any(step.labels for step in planned)):
        return  # no dim has size 0 and none is new, so no answer has more cells than its question has bytes
    n_bytes = sum(step.bytes_written for step in planned)
    most = max(SMALL_ANSWER, GROWTH * payload.n_bytes)
    if n_bytes > most:
        why = "" if sparse is None else f": {shown(sparse)} is sparse, and the answer has every cell"
        raise TooLargeError(f"the answer would have {n_bytes} bytes{why}; to this question it may have at most {most}")


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


def coordinate_bytes(coordinate: Variable) -> int:
    return coordinate.info.n_bytes + (coordinate.info.n_cells if coordinate.mask else 0)


def as_it_came(payload: Payload, coordinate: Variable, variables: Variables) -> Result:
    """A coordinate, in memory."""
    data, mask = load(payload, coordinate)
    return Result(
        name=coordinate.name,
        data=data,
        mask=None if mask is None else expanded(mask, data.shape),
        mask_name=answer_mask_name(coordinate, variables),
        dims=coordinate.dims,
        is_coordinate=True,
    )


def as_it_lies(payload: Payload, coordinate: Variable, variables: Variables) -> Streamed:
    """A coordinate, to be read while it is written."""
    info = coordinate.info
    source = sources.stored(payload, coordinate)
    return Streamed(
        name=coordinate.name,
        told=Told(dtype=info.dtype, shape=info.shape, dims=coordinate.dims),
        mask_name=answer_mask_name(coordinate, variables),
        dims=coordinate.dims,
        fold=info.shape,
        pieces=partial(streaming.copied, source),
        is_coordinate=True,
        has_mask=coordinate.mask is not None,
    )
