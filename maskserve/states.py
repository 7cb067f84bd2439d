"""States of a whole request: what a shard makes of its part of every variable, as a file; and the answer of all shards.

A state says what it belongs to: the request, the inputs, the shard. Those that do not belong together, a shard that is
missing and one that is there twice are refused, so that an answer is never of other cells than it says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from math import prod
from typing import Any, TypeAlias

import torch

from maskserve import answers, execution, regions, sides, sources, streaming
from maskserve.answers import Answer, Prepared
from maskserve.dtypes import boolean
from maskserve.errors import MaskserveError, ParameterError, StateError, TooLargeError
from maskserve.health import health
from maskserve.nodes import HELD_TWICE
from maskserve.ops.rows import Reduction
from maskserve.partials import FIELDS, LIMITS, Partial, check_joins, merged, read_partial
from maskserve.payload.format import Buffer, BytesPayload, Output, Payload, to_bytes
from maskserve.payload.header import TensorInfo, check_name, shown, strict_json
from maskserve.payload.metadata import is_dim_name
from maskserve.payload.tensors import output
from maskserve.payload.variables import answer_mask_name
from maskserve.regions import InPlace
from maskserve.requests import Request
from maskserve.room import budget_of, held
from maskserve.shards import Shard
from maskserve.sides import Payloads
from maskserve.steps import Result, Step, Streamed
from maskserve.told import Told
from maskserve.variable_steps import OfVariable

KEY = "maskserve.state"
MOST_SHARDS = 1 << 24
SOME = 8
"""Missing shards that a message names."""
Said: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifted:
    """A variable's partial, and what its result will be called."""

    name: str
    mask_name: str
    dims: tuple[str, ...] | None
    partial: Partial

    def said(self) -> Said:
        return {"name": self.name, "mask_name": self.mask_name, "dims": self.dims, **self.partial.signature()}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One shard of a request, or several merged: `key` is what must be equal, `shards` which of `n` are in it."""

    key: Said
    shards: tuple[int, ...]
    n: int
    lifted: tuple[Lifted, ...]
    kept: tuple[Result | Streamed, ...]
    """What is not reduced: coordinates, and variables without the dim. The first shard has it."""
    sources: tuple[Payload, ...] = ()
    """What is read while the state is written, or its answer is made."""

    @property
    def metadata(self) -> dict[str, str]:
        said = {
            "key": self.key,
            "shards": [*self.shards],
            "n": self.n,
            "lifted": [lifted.said() for lifted in self.lifted],
            "kept": [kept_said(result) for result in self.kept],
        }
        return {KEY: json.dumps(said, sort_keys=True)}

    def write(self, descriptor: int, name: str, memory: int) -> int:
        """The bytes of the state, once they are in an empty file, which messages call by its name."""
        from maskserve import sinks

        parts = [InState(prefix=f"{i}.", partial=own.partial, budget=budget_of(memory)) for i, own in self.numbered()]
        n_bytes = sinks.write(descriptor, name, [*parts, *self.kept_by_number()], self.metadata)
        self.refuse_changed()
        return n_bytes

    def to_bytes(self) -> bytes:
        """The state as safetensors."""
        parts = [output(f"{i}.{name}", part) for i, own in self.numbered() for name, part in own.partial.named()]
        kept = [result if isinstance(result, Result) else result.in_memory() for result in self.kept_by_number()]
        return to_bytes([*parts, *(out for result in kept for out in result.outputs())], self.metadata)

    def numbered(self) -> Iterator[tuple[int, Lifted]]:
        return enumerate(self.lifted)

    def kept_by_number(self) -> Iterator[Result | Streamed]:
        """What is kept, as it is called in a state."""
        for i, result in enumerate(self.kept):
            yield replace(result, name=f"kept.{i}", mask_name=f"kept.{i}.mask")

    @property
    def n_bytes(self) -> int:
        """The bytes of its tensors."""
        kept = sum(out.n_bytes for result in self.kept for out in result.outputs())
        return kept + sum(own.partial.n_bytes for own in self.lifted)

    def answer(self, memory: int | None = None) -> Answer:
        """The answer of all shards; a result that is larger than its share of `memory` is made while it is written."""
        self.refuse_missing()
        self.refuse_growth()
        results: list[Result | Streamed] = [*(result_of(own, memory) for own in self.lifted), *self.kept]
        streamed = [result for result in results if isinstance(result, Streamed)]
        fits = [True] * len(streamed) if memory is None else [ok for ok, _ in held(sizes_of(streamed), memory)]
        made = {one.name: one.in_memory() if fit else one for one, fit in zip(streamed, fits, strict=True)}
        by_name = {result.name: made.get(result.name, result) for result in results}
        self.refuse_changed()
        in_order = tuple(by_name[name] for name in self.key["order"])
        return Answer(results=in_order, metadata=dict(self.key["metadata"]), sources=self.sources)

    def refuse_changed(self) -> None:
        for source in self.sources:
            source.refuse_changed()

    def refuse_missing(self) -> None:
        n_missing = self.n - len(self.shards)
        if n_missing:
            there = {*self.shards}
            some = ", ".join(map(str, islice((i for i in range(self.n) if i not in there), SOME)))
            more = ", …" if n_missing > SOME else ""
            raise StateError(
                f"shard{'s' if n_missing > 1 else ''} {some}{more} of {self.n} {'are' if n_missing > 1 else 'is'} missing: "
                "give the states of all"
            )

    def refuse_growth(self) -> None:
        """Refuses results out of all proportion to the state: those of no cells have no states, and may be any number."""
        plans = [one.partial.plan for one in self.lifted]
        n_bytes = sum(prod(plan.out_shape) * (plan.result.n_bytes + 1) for plan in plans if not plan.fold[1])
        most = max(answers.SMALL_ANSWER, answers.GROWTH * self.n_bytes)
        if n_bytes > most:
            raise TooLargeError(f"the answer would have {n_bytes} bytes; to this state it may have at most {most}")


def sizes_of(results: Iterable[Streamed | Step]) -> Iterator[int]:
    """The bytes that each takes where it is held."""
    for result in results:
        yield result.told.n_bytes if isinstance(result, Streamed) else result.result.n_bytes


def result_of(lifted: Lifted, memory: int | None) -> Streamed:
    plan = lifted.partial.plan
    told = Told(dtype=plan.result, shape=tuple(plan.out_shape), dims=lifted.dims)
    lifted.partial.refuse_gaps()
    return Streamed(
        name=lifted.name, told=told, mask_name=lifted.mask_name, dims=lifted.dims,
        fold=regions.result_sizes(plan, plan.fold),
        pieces=partial(lifted.partial.pieces, None if memory is None else budget_of(memory)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class InState:
    """A variable's partial, as it lies in a state."""

    prefix: str
    partial: Partial
    budget: int

    def outputs(self) -> Iterator[Output]:
        for out in self.partial.outputs():
            yield replace(out, name=self.prefix + out.name)

    def windows(self) -> Iterator[InPlace]:
        for part in self.partial.windows(self.budget):
            yield part._replace(name=self.prefix + part.name)


# -- one shard ----------------------------------------------------------------------------------------------------


def lift(request: Request, payload: Payload, others: Payloads, shard: Shard, memory: int) -> State:
    """The state of a shard of the request on a payload."""
    if not isinstance(request.row, Reduction) or request.is_gradient:
        raise ParameterError(f"{request.verb} has no states: shards are of reductions", parameter="shard")
    prepared = answers.prepare(request, payload, others)
    steps = [step for step in prepared.steps if isinstance(step, OfVariable)]
    lifted, room = [], budget_of(memory)
    for step in steps:
        refuse_sparse(step)
    for step in steps:
        if not step.passes_through:
            lifted.append(lifted_of(request, step, payload, prepared, shard, memory, room))
            n_held = HELD_TWICE * lifted[-1].partial.n_bytes
            room -= n_held if n_held <= room else 0
    kept = answers.kept(request, payload, prepared, memory)
    for source in (payload, *others.values()):
        source.refuse_changed()
    named = {step.name: step.dims for step in steps if step.dims is not None}
    named |= {result.name: result.dims for result in kept if result.dims is not None}
    key = {
        "request": answers.said_of(request, others),
        "inputs": identity(request, payload, others),
        "order": [*(step.name for step in steps), *(result.name for result in kept if result.is_coordinate)],
        "metadata": answers.metadata_of_dims(request, payload, others, named),
    }
    own = tuple(kept) if shard.index == 0 else ()
    return State(
        key=key, shards=(shard.index,), n=shard.n, lifted=tuple(lifted), kept=own, sources=(payload, *others.values())
    )


def lifted_of(
    request: Request, step: OfVariable, payload: Payload, prepared: Prepared, shard: Shard, memory: int, room: int
) -> Lifted:
    assert step.plan is not None
    source = sources.onto(sources.stored(payload, step.variable, request.common.get("fill_value")), step.device)
    weights = next((sources.onto(sources.of_side(side, source.shape), step.device) for side in step.sides), None)
    with execution.using(backend=request.running.get("backend")), health().watching(step.device):
        found = Partial.of_shard(step.plan, source, weights, shard, budget_of(memory), room)
    mask_name = answer_mask_name(step.variable, prepared.variables)
    return Lifted(name=step.name, mask_name=mask_name, dims=step.dims, partial=found)


def check_steps(steps: Iterable[Step]) -> None:
    """Raise where a step has no state that can be merged."""
    for step in steps:
        if isinstance(step, OfVariable) and step.plan is not None:
            check_joins(step.plan)
            refuse_sparse(step)


def refuse_sparse(step: OfVariable) -> None:
    if step.variable.stored is not None and not step.passes_through:
        raise StateError(
            f"{shown(step.variable.name)} is sparse, and states are made of strided tensors: reduce it at once, without "
            "--workers, --engine ray, --shard and --state"
        )


def identity(request: Request, payload: Payload, others: Payloads) -> str:
    """What tells inputs of one job from those of another: names, sizes, headers; not their folders, which differ by machine."""
    digest = hashlib.sha256()
    words = [str(request.params.get(p.name)) for p in sides.parameters(request.row)]
    for source in (payload, *(others[word] for word in words if word in others)):
        for line in source.identity():
            digest.update(json.dumps(line).encode())
    return digest.hexdigest()


# -- all shards ---------------------------------------------------------------------------------------------------


def merge(states: Sequence[tuple[str, State]]) -> State:
    """The states of several shards as one; each comes with its title, for errors."""
    (title, first), *others = states
    for other_title, other in others:
        if why := differs(first, other):
            raise StateError(f"{other_title} does not belong to {title}: {why}")
    owners: dict[int, str] = {}
    for name, one in states:
        for shard in one.shards:
            if shard in owners:
                raise StateError(
                    f"shard {shard} of {first.n} is there twice, in {owners[shard]} and {name}; merge each once"
                )
            owners[shard] = name
    lifted = tuple(
        Lifted(
            name=own.name, mask_name=own.mask_name, dims=own.dims,
            partial=merged([one.lifted[i].partial for _, one in states]),
        )
        for i, own in enumerate(first.lifted)
    )  # fmt: skip
    kept = next((one.kept for _, one in states if 0 in one.shards), ())
    sources = tuple(source for _, one in states for source in one.sources)
    return State(key=first.key, shards=tuple(sorted(owners)), n=first.n, lifted=lifted, kept=kept, sources=sources)


def differs(a: State, b: State) -> str | None:
    """What keeps two states from being merged."""
    if a.key["request"] != b.key["request"]:
        return f"its request is {json.dumps(b.key['request'])[:200]}, the other's {json.dumps(a.key['request'])[:200]}"
    if a.n != b.n:
        return f"it is of {b.n} shards, the other of {a.n}"
    if a.key["inputs"] != b.key["inputs"]:
        return "it is of other inputs"
    if a.key != b.key or [one.said() for one in a.lifted] != [one.said() for one in b.lifted]:
        return "it is of other variables, or of another back end"
    return None


def kept_said(result: Result | Streamed) -> Said:
    return {
        "name": result.name,
        "mask_name": result.mask_name,
        "dims": result.dims,
        "is_coordinate": result.is_coordinate,
        "passed_through": result.passed_through,
        "has_mask": result.has_mask,
    }


# -- bytes to states ----------------------------------------------------------------------------------------------


def from_bytes(buffer: Buffer) -> State:
    """The State that `to_bytes` wrote; StateError where the bytes are anything else."""
    return read(BytesPayload(buffer, LIMITS))


def read(payload: Payload, title: str | None = None) -> State:
    """The state in a payload, which was opened with the limits of states, and stays open while the state is used.

    Its cells are read when they are due; what is wrong with them then is told with the `title`.
    """
    said = said_of(payload)
    lifted_said: list[Said] = said["lifted"]
    by_variable: list[dict[str, TensorInfo]] = [{} for _ in lifted_said]
    for name, info in payload.header.tensors.items():
        first, _, rest = name.partition(".")
        if first == "kept":
            continue
        if not (first.isascii() and first.isdecimal() and int(first) < len(by_variable)):
            raise StateError(f"{name[:64]!r} names no part of a state")
        by_variable[int(first)][rest] = info
    lifted = tuple(lifted_from(one, payload, names, title) for one, names in zip(lifted_said, by_variable, strict=True))
    kept = tuple(kept_from(i, one, payload) for i, one in enumerate(said["kept"]))
    check_key(said, lifted, kept)
    return State(
        key=said["key"], shards=tuple(said["shards"]), n=said["n"], lifted=lifted, kept=kept, sources=(payload,)
    )


def said_of(payload: Payload) -> Said:
    text = payload.header.metadata.get(KEY)
    if text is None:
        raise StateError(
            f"it is no state of a shard: its metadata has no {KEY}; reduce --shard i/N --state OUT writes one"
        )
    try:
        said, end = strict_json(text, KEY, numbers=True)
    except MaskserveError as error:
        raise StateError(f"it is no state of a shard: {error}") from error
    kinds = {"key": dict, "shards": list, "n": int, "lifted": list, "kept": list}
    if not isinstance(said, dict) or text[end:].strip() or {k: type(v) for k, v in said.items()} != kinds:
        raise StateError(f"it is no state of a shard: {KEY} says other things than {', '.join(kinds)}")
    shards, n = said["shards"], said["n"]
    if not 0 < n <= MOST_SHARDS or not shards or not all(type(i) is int and 0 <= i < n for i in shards):
        raise StateError("it is no state of a shard: which shards of how many it holds makes no sense")
    if any(b <= a for a, b in pairwise(shards)):
        raise StateError("it is no state of a shard: its shards are not in order")
    return said


def lifted_from(said: object, payload: Payload, names: Mapping[str, TensorInfo], title: str | None) -> Lifted:
    named = {"name": str, "mask_name": str}
    if not isinstance(said, dict) or any(type(said.get(k)) is not kind for k, kind in {**FIELDS, **named}.items()):
        raise StateError("it is no state of a shard: what it says of a variable is incomplete")
    found = read_partial(said, payload, names, title)
    dims = dims_from(said.get("dims"), len(found.plan.out_shape))
    return Lifted(name=said["name"], mask_name=said["mask_name"], dims=dims, partial=found)


def kept_from(i: int, said: object, payload: Payload) -> Streamed:
    """A coordinate, or a variable without the dim, to be read while it is written."""
    kinds = {"name": str, "mask_name": str, "is_coordinate": bool, "passed_through": bool, "has_mask": bool}
    tensors = payload.header.tensors
    wanted = [f"kept.{i}", f"kept.{i}.mask"]
    if not isinstance(said, dict) or any(type(said.get(k)) is not kind for k, kind in kinds.items()):
        raise StateError("it is no state of a shard: what it says of a variable that is kept is incomplete")
    if any(name not in tensors for name in wanted[: 1 + said["has_mask"]]):
        raise StateError(f"it is no state of a shard: {wanted[0]} is missing")
    data, mask = tensors[wanted[0]], tensors[wanted[1]] if said["has_mask"] else None
    if mask is not None and (mask.dtype is not boolean or mask.shape != data.shape):
        raise StateError(f"it is no state of a shard: {wanted[1]} is no mask")
    dims = dims_from(said.get("dims"), len(data.shape))
    valid = None if mask is None else partial(sources.read_cells, payload, mask)
    dtype, read = getattr(torch, data.dtype.torch), partial(sources.read_cells, payload, data)
    return Streamed(
        name=said["name"], told=Told(dtype=data.dtype, shape=data.shape, dims=dims), mask_name=said["mask_name"], dims=dims,
        fold=data.shape, pieces=partial(streaming.copied, sources.Stored(read, valid, dtype, data.shape)),
        passed_through=said["passed_through"], is_coordinate=said["is_coordinate"], has_mask=said["has_mask"],
    )  # fmt: skip


def dims_from(said: object, n_dims: int) -> tuple[str, ...] | None:
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != n_dims or not all(map(is_dim_name, said)):
        raise StateError("it is no state of a shard: its names of dims are none, or do not fit its shapes")
    return tuple(said)


def check_key(said: Said, lifted: Sequence[Lifted], kept: Sequence[Result | Streamed]) -> None:
    """What the answer will be made of must be there, and nothing else."""
    key = said["key"]
    kinds = {"request": dict, "inputs": str, "order": list, "metadata": dict}
    if {k: type(v) for k, v in key.items()} != kinds or not all(isinstance(v, str) for v in key["metadata"].values()):
        raise StateError("it is no state of a shard: what it belongs to is incomplete")
    for one in (*lifted, *kept):
        for name in (one.name, one.mask_name):
            check_name(name)
    own = [one.name for one in lifted]
    names = own + [result.name for result in kept]
    fits = (
        sorted(map(str, key["order"])) == sorted(names)
        if 0 in said["shards"]
        else set(own) <= set(map(str, key["order"]))
    ) and all(isinstance(name, str) for name in key["order"])
    if not fits or len({*names}) < len(names):
        raise StateError("it is no state of a shard: its variables are others than it says")
