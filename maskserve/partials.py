"""Partial: the mergeable state of a part of a reduction, and its bytes.

A Partial holds the states of aligned power-of-two subtrees of the reduced index (docs/order.md), not one state: merge
joins siblings only, so parts lifted anywhere and merged in any order finalize to the bits of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from maskserve import dtypes, engine, execution, masks
from maskserve.backends import Parts, choose
from maskserve.errors import MaskserveError, ParameterError, StateError
from maskserve.nodes import (
    Lifting,
    Node,
    Place,
    are_siblings,
    by_place,
    held,
    holds,
    rectangles,
    refuse_overlap,
    shifted,
    stored_nodes,
    tiles,
    units,
)
from maskserve.ops import find
from maskserve.ops.parameters import Type
from maskserve.ops.rows import Reduction
from maskserve.payload.format import DEFAULT_LIMITS, Buffer, BytesPayload, Limits, Output, Payload, TensorInfo, to_bytes
from maskserve.payload.header import shown, strict_json
from maskserve.payload.tensors import output
from maskserve.plan import Plan, plan
from maskserve.region_states import lifts, state_bytes
from maskserve.regions import InPlace, Piece, Region, moved, of_sizes, result_sizes, sizes_of
from maskserve.requests import spelled
from maskserve.shards import Shard
from maskserve.sources import Source, Window
from maskserve.streaming import assembled
from maskserve.torch_dtypes import dtype_of
from maskserve.trees import subtrees
from maskserve.version import ORDER_VERSION, version

PREFIX = "maskserve.state."
LIMITS = Limits(tensors=1 << 20, header_bytes=1 << 26, metadata_bytes=1 << 20)
"""What is read of a state: it has a tensor for each part of each subtree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """States of one plan's subtrees, row by row and in the order of the index. `plan` is the plan of the whole."""

    plan: Plan
    backend: str
    nodes: tuple[Node, ...]

    @classmethod
    def lift(cls, plan: Plan, data: Tensor, mask: Tensor | None = None, *, start: int = 0) -> Partial:
        """The state of cells `start`, start + 1, ... of the plan's reduced index: data is (outer, n, inner).

        `start` is a multiple of the plan's leaf; n is too, or reaches the end of the index.
        """
        check_joins(plan)
        if len(plan.fold) != 3 or plan.weighted:
            raise StateError(
                f"{plan.row.name} over dims {plan.dims}: cells of adjacent dims, without weights, are lifted"
            )
        if dtype_of(data) is not plan.stored or data.device.type != "cpu":
            raise StateError(
                f"a partial of {plan.stored.name} cells in CPU memory was given {data.dtype} on {data.device}"
            )
        mask = masks.checked(data, mask)
        mask = None if mask is None else mask.expand(data.shape)
        outer, n_whole, inner = plan.fold
        n = data.shape[1]
        if data.shape != (outer, n, inner) or start % plan.leaf or (n % plan.leaf and start + n != n_whole):
            raise StateError(
                f"a partial of {plan.row.name} takes cells ({outer}, n, {inner}) from a multiple of {plan.leaf} on, "
                f"n a multiple too unless it reaches the end, {n_whole}; given {tuple(data.shape)} from {start}"
            )
        first = start // plan.leaf
        nodes = []
        for unit, n_units in subtrees(first, first + -(-n // plan.leaf)):
            cells = slice((unit - first) * plan.leaf, min((unit - first + n_units) * plan.leaf, n))
            block = data[:, cells]
            own = None if mask is None else mask[:, cells]
            below = replace(plan, shape=tuple(block.shape), fold=tuple(block.shape))
            parts = shifted(plan, engine.state(below, block, own), unit * plan.leaf)
            nodes.append(held(plan, Place(row=0, n_rows=outer, start=unit, n_units=n_units), parts))
        return cls(plan=plan, backend=execution.backend_of(plan).name, nodes=tuple(nodes))

    @classmethod
    def of_shard(
        cls, plan: Plan, source: Source, weights: Source | None, shard: Shard, budget: int, room: int | None = None
    ) -> Partial:
        """The states of a range of all rows' units, read where they lie: held where they fit into `room`, else when due."""
        check_joins(plan)
        name = execution.backend_of(plan).name
        lifting = Lifting(plan=plan, source=source, weights=weights, budget=budget, backend=name)
        nodes = [lifting.node(*rectangle) for rectangle in rectangles(plan, shard)]
        for node in nodes:
            source.expect(*node.place.cells(plan))
        is_held = holds(plan, nodes, budget if room is None else room)
        return cls(plan=plan, backend=name, nodes=tuple(n.held(plan) if is_held else n for n in nodes))

    def merge(self, other: Partial) -> Partial:
        """The states of both, siblings joined; they must come from one plan and back end, and not overlap."""
        return merged([self, other])

    def joined(self, left: Node, right: Node) -> Node:
        """Two halves of a subtree, joined where they are read."""

        def read(where: Window) -> Parts:
            return self.together(left.read(where), right.read(where))

        return Node(place=replace(left.place, n_units=left.place.n_units + right.place.n_units), read=read)

    def together(self, left: Parts, right: Parts) -> Parts:
        with execution.using(backend=self.backend):
            return execution.backend_of(self.plan).merge(self.plan)(left, right)

    def finalize(self) -> tuple[Tensor, Tensor]:
        """(values, mask) of the whole; what is left over joins from the right. The whole index must be covered."""
        shape = result_sizes(self.plan, self.plan.fold)
        values, mask = assembled(shape, getattr(torch, self.plan.result.torch), self.pieces())
        return values.view(self.plan.out_shape), mask.view(self.plan.out_shape)

    def pieces(self, budget: int | None = None) -> Iterator[Piece]:
        """The result, as many cells of it at a time as their states fit; all of some rows where there is no bound."""
        self.refuse_gaps()
        for rows, nodes in self.by_rows():
            region = (rows, *(slice(0, n) for n in self.plan.fold[1:]))
            for tile in tiles(self.plan, region, budget):
                yield self.finished(tile, self.state(nodes, tile[::2]))

    def by_rows(self) -> Iterator[tuple[slice, Sequence[Node]]]:
        """The nodes that make up some rows of results together."""
        if not self.plan.fold[1]:  # nothing was reduced, so no state says anything
            yield slice(0, self.plan.fold[0]), ()
        for _, group in groupby(self.nodes, key=lambda node: node.place.row):
            nodes = [*group]
            yield nodes[0].place.rows, nodes

    def state(self, nodes: Sequence[Node], where: Window) -> Parts:
        """The state of a window of results."""
        if not nodes:
            return engine.identity(self.plan, prod(sizes_of(where)))
        *before, last = nodes
        own = (moved(where[0], -last.place.row), *where[1:])
        parts = last.read(own)
        for node in reversed(before):
            parts = self.together(node.read(own), parts)
        return parts

    def finished(self, tile: Region, parts: Parts) -> Piece:
        with execution.using(backend=self.backend):
            values, mask = engine.finish(of_sizes(self.plan, sizes_of(tile)), parts)
        return Piece(where=tile[::2], values=values, mask=mask)

    @property
    def n_bytes(self) -> int:
        """The bytes of all its states."""
        return sum(prod(node.place.shape(self.plan)) for node in self.nodes) * state_bytes(self.plan)

    def outputs(self) -> Iterator[Output]:
        """Its tensors, without bytes yet."""
        for node in self.nodes:
            n_rows, *others = node.place.shape(self.plan)
            for part in self.plan.passes[0].parts(self.plan.dtype):
                yield Output(f"{node.place}.{part.name}", part.dtype, (n_rows, prod(others)), ())

    def windows(self, budget: int) -> Iterator[InPlace]:
        """Its cells, as many results at a time as the budget holds."""
        for node in self.nodes:
            for where, parts in node.windows(self.plan, budget):
                for name, part in parts.items():
                    yield InPlace(f"{node.place}.{name}", node.place.shape(self.plan), where, part)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, whole, by what they are called in a state."""
        for node in self.nodes:
            for name, part in node.parts(self.plan).items():
                yield f"{node.place}.{name}", part

    def refuse_gaps(self) -> None:
        """Raise where a row or a part of one is missing."""
        n_units, row, unit = units(self.plan), 0, 0
        for node in self.nodes if n_units else ():
            at = node.place
            if (at.row, at.start) != (row, unit):
                break
            row, unit = (row, at.stop) if at.stop < n_units else (at.row + at.n_rows, 0)
        if n_units and row != self.plan.fold[0]:
            raise StateError(f"the state of leaf {unit} of {n_units} of row {row} is missing; merge every shard first")

    def signature(self) -> dict[str, Any]:
        """What two states must share to be merged."""
        p = self.plan
        params = {name: spelled(value) for name, value in sorted(p.params.items()) if value is not None}
        return {
            "op": p.row.name,
            "params": params,
            "dtype": p.stored.name,
            "shape": list(p.shape),
            "backend": self.backend,
            "order": ORDER_VERSION,
            "version": version(),
        }

    def to_bytes(self) -> bytes:
        """The state as a safetensors file: one tensor a part of each subtree, what it belongs to in the metadata."""
        tensors = [output(name, part) for name, part in self.named()]
        return to_bytes(tensors, {PREFIX + key: json.dumps(value) for key, value in self.signature().items()})

    @classmethod
    def from_bytes(cls, buffer: Buffer) -> Partial:
        """The Partial that `to_bytes` wrote; StateError where the bytes are anything else."""
        payload = BytesPayload(buffer, LIMITS)
        return read_partial(said_of(payload.header.metadata), payload, payload.header.tensors)


def read_partial(
    said: Mapping[str, Any], payload: Payload, names: Mapping[str, TensorInfo], title: str | None = None
) -> Partial:
    """The Partial that `said` tells of; `names` has each tensor of the payload by what it is called in a state.

    Its cells are read when they are due; errors then name the payload by its `title`.
    """
    if said["order"] != ORDER_VERSION or said["version"] != version():
        raise StateError(
            f"the state is of order {shown(said['order'])} and version {shown(said['version'])}, this is order "
            f"{ORDER_VERSION} and version {version()}; states of different versions are never merged"
        )
    try:
        whole = plan_of(said)
    except MaskserveError as error:
        why = (
            error.message if len(error.message) <= LONG else f"{error.message[:LONG]}…"
        )  # it repeats what a state says
        raise error if isinstance(error, StateError) else StateError(f"the bytes are no state: {why}") from error
    nodes = sorted(stored_nodes(whole, payload, names, title), key=by_place)
    refuse_overlap(nodes)
    return Partial(plan=whole, backend=said["backend"], nodes=tuple(nodes))


def merged(partials: Sequence[Partial]) -> Partial:
    """The states of all, siblings joined."""
    first = partials[0]
    for other in partials[1:]:
        if first.signature() != other.signature():
            raise StateError(
                f"states do not belong together: one is {json.dumps(first.signature())[:200]}, "
                f"the other {json.dumps(other.signature())[:200]}"
            )
    nodes = sorted((node for partial in partials for node in partial.nodes), key=by_place)
    refuse_overlap(nodes)
    joined: list[Node] = []
    for node in nodes:
        joined.append(node)
        while len(joined) > 1 and are_siblings(joined[-2].place, joined[-1].place):
            right, left = joined.pop(), joined.pop()
            joined.append(first.joined(left, right))
    return replace(first, nodes=tuple(joined))


def check_joins(plan: Plan) -> None:
    if not lifts(plan):
        raise ParameterError(
            f"{plan.row.name} of {plan.stored.name} has no state that can be merged: its slices are needed whole; reduce all "
            "at once, without --workers, --engine ray, --shard and --state",
            parameter="op",
        )


LONG = 300
"""Characters of an error on what a state says, which may be long."""
FIELDS = {"op": str, "params": dict, "dtype": str, "shape": list, "backend": str, "order": int, "version": str}
"""What a state says of itself, each field as JSON of this type."""


def said_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    said = {}
    for name, kind in FIELDS.items():
        text = metadata.get(PREFIX + name)
        if text is None:
            raise StateError(f"the bytes are no state of a reduction: their metadata has no {PREFIX}{name}")
        try:
            value, end = strict_json(text, PREFIX + name, numbers=True)
        except MaskserveError as error:
            raise StateError(f"the bytes are no state of a reduction: {error}") from error
        if type(value) is not kind or text[end:].strip():
            raise StateError(f"the bytes are no state of a reduction: {PREFIX}{name} is no {kind.__name__}")
        said[name] = value
    return said


def unspelled(value: Any) -> Any:
    """A parameter's value of its JSON form."""
    if isinstance(value, list):
        return tuple(unspelled(item) for item in value)
    return float(value) if value in ("inf", "-inf") else value


def plan_of(said: Mapping[str, Any]) -> Plan:
    row = find(said["op"])
    if not isinstance(row, Reduction):
        raise StateError(f"{row.name} is no reduction")
    params = {name: unspelled(value) for name, value in said["params"].items()}
    for parameter in row.parameters:
        if parameter.type is Type.TENSOR and isinstance(params.get(parameter.name), str):
            params[parameter.name] = dtypes.parse(params[parameter.name])
    shape = said["shape"]
    if len(shape) > DEFAULT_LIMITS.dims or any(
        type(n) is not int or not 0 <= n <= DEFAULT_LIMITS.dim_size for n in shape
    ):
        raise StateError("the bytes are no state of a reduction: the shape is no list of sizes")
    whole = plan(row, tuple(params.items()), tuple(shape), dtypes.parse(said["dtype"]), "cpu")
    check_joins(whole)
    choose(whole, said["backend"])
    return whole
