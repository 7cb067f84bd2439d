"""Partial: the mergeable state of a part of a reduction, and its bytes.

A Partial holds the states of aligned power-of-two subtrees of the reduced index (docs/order.md), not one state: merge
joins siblings only, so parts lifted anywhere and merged in any order finalize to the bits of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from maskserve import dtypes, engine, execution, masks, region_states
from maskserve.backends import Parts, choose
from maskserve.backends.reference import kernel
from maskserve.errors import MaskserveError, OutOfMemoryError, StateError
from maskserve.ops import find
from maskserve.ops.parameters import Type
from maskserve.ops.rows import Reduction
from maskserve.payload.format import DEFAULT_LIMITS, Buffer, BytesPayload, Limits, Payload, TensorInfo, to_bytes
from maskserve.payload.header import strict_json
from maskserve.payload.tensors import load_tensor, output
from maskserve.plan import Plan, plan
from maskserve.region_states import lifts, most_states, state, state_bytes, unit_of
from maskserve.regions import Piece, of_sizes, result_sizes
from maskserve.requests import spelled
from maskserve.shards import Shard
from maskserve.sources import Source
from maskserve.streaming import assembled, block_cells
from maskserve.torch_dtypes import dtype_of
from maskserve.trees import subtrees
from maskserve.version import ORDER_VERSION, version

PREFIX = "maskserve.state."
HELD_TWICE = 2
"""How many times a state is held while its parts are put together."""


LIMITS = Limits(tensors=1 << 20, header_bytes=1 << 26, metadata_bytes=1 << 20)
"""What is read of a state: it has a tensor for each part of each subtree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The state of a subtree, for `n_rows` indices of the first kept group from `row` on.

    The subtree is `n_units` units of the first reduced group from `start` on (leaves, where it is the only one); parts have
    the shape (n_rows, all other kept groups).
    """

    row: int
    n_rows: int
    start: int
    n_units: int
    parts: Parts

    @property
    def stop(self) -> int:
        return self.start + self.n_units

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.n_rows)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name, part in self.parts.items():
            yield f"{self.row}.{self.n_rows}.{self.start}.{self.n_units}.{name}", part


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
            nodes.append(Node(row=0, n_rows=outer, start=unit, n_units=n_units, parts=parts))
        return cls(plan=plan, backend=execution.backend_of(plan).name, nodes=tuple(nodes))

    @classmethod
    def of_shard(cls, plan: Plan, source: Source, weights: Source | None, shard: Shard, budget: int) -> Partial:
        """The states of a range of all rows' units, read where they lie."""
        check_joins(plan)
        most, nodes = most_states(plan, budget), []
        refuse_many(plan, shard, budget)
        with execution.using(block_cells=block_cells(plan, source, budget)):
            for rows, start, n_units in rectangles(plan, shard):
                unit = unit_of(plan, 1)
                cells = slice(start * unit, min((start + n_units) * unit, plan.fold[1]))
                region = (rows, cells, *(slice(0, n) for n in plan.fold[2:]))
                parts = shifted(plan, state(plan, source, weights, region, most), start * unit)
                nodes.append(
                    Node(row=rows.start, n_rows=rows.stop - rows.start, start=start, n_units=n_units, parts=parts)
                )
        return cls(plan=plan, backend=execution.backend_of(plan).name, nodes=tuple(nodes))

    def merge(self, other: Partial) -> Partial:
        """The states of both, siblings joined; they must come from one plan and back end, and not overlap."""
        return merged([self, other])

    def joined(self, left: Node, right: Node) -> Node:
        with execution.using(backend=self.backend):
            merge = execution.backend_of(self.plan).merge(self.plan)
        return replace(left, n_units=left.n_units + right.n_units, parts=merge(left.parts, right.parts))

    def finalize(self) -> tuple[Tensor, Tensor]:
        """(values, mask) of the whole; what is left over joins from the right. The whole index must be covered."""
        shape = result_sizes(self.plan, self.plan.fold)
        values, mask = assembled(shape, getattr(torch, self.plan.result.torch), self.pieces())
        return values.view(self.plan.out_shape), mask.view(self.plan.out_shape)

    def pieces(self) -> Iterator[Piece]:
        """The result, some rows at a time."""
        self.refuse_gaps()
        fold = self.plan.fold
        if not fold[1]:
            yield from self.finished(slice(0, fold[0]), engine.identity(self.plan, prod(fold[::2])))
        for _, group in groupby(self.nodes, key=lambda node: node.row):
            *nodes, last = group
            for node in reversed(nodes):
                last = self.joined(node, last)
            yield from self.finished(last.rows, last.parts)

    def finished(self, rows: slice, parts: Parts) -> Iterator[Piece]:
        fold = self.plan.fold
        below = of_sizes(self.plan, (rows.stop - rows.start, *fold[1:]))
        with execution.using(backend=self.backend):
            values, mask = engine.finish(below, parts)
        yield Piece(where=(rows, *(slice(0, n) for n in fold[2::2])), values=values, mask=mask)

    def refuse_gaps(self) -> None:
        """Raise where a row or a part of one is missing."""
        n_units, row, unit = units(self.plan), 0, 0
        for node in self.nodes if n_units else ():
            if (node.row, node.start) != (row, unit):
                break
            row, unit = (row, node.stop) if node.stop < n_units else (node.row + node.n_rows, 0)
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
        tensors = [output(name, part) for node in self.nodes for name, part in node.named()]
        return to_bytes(tensors, {PREFIX + key: json.dumps(value) for key, value in self.signature().items()})

    @classmethod
    def from_bytes(cls, buffer: Buffer) -> Partial:
        """The Partial that `to_bytes` wrote; StateError where the bytes are anything else."""
        payload = BytesPayload(buffer, LIMITS)
        return read_partial(_said(payload.header.metadata), payload, payload.header.tensors)


def read_partial(said: Mapping[str, Any], payload: Payload, names: Mapping[str, str | TensorInfo]) -> Partial:
    """The Partial that `said` tells of; `names` has the name of each tensor in the payload by what it is called in a state."""
    if said["order"] != ORDER_VERSION or said["version"] != version():
        raise StateError(
            f"the state is of order {said['order']} and version {said['version']}, this is order {ORDER_VERSION} "
            f"and version {version()}; states of different versions are never merged"
        )
    try:
        whole = _plan_of(said)
    except MaskserveError as error:
        raise error if isinstance(error, StateError) else StateError(f"the bytes are no state: {error}") from error
    nodes = sorted(_nodes(whole, payload, names), key=lambda node: (node.row, node.start))
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
    nodes = sorted((node for partial in partials for node in partial.nodes), key=lambda node: (node.row, node.start))
    refuse_overlap(nodes)
    joined: list[Node] = []
    for node in nodes:
        joined.append(node)
        while len(joined) > 1 and are_siblings(joined[-2], joined[-1]):
            right, left = joined.pop(), joined.pop()
            joined.append(first.joined(left, right))
    return replace(first, nodes=tuple(joined))


def units(plan: Plan) -> int:
    """The units of the first reduced group."""
    return -(-plan.fold[1] // unit_of(plan, 1))


def rectangles(plan: Plan, shard: Shard) -> Iterator[tuple[slice, int, int]]:
    """(rows, start, n_units) of a shard: the end of a row, whole rows, and the begin of one.

    Shards are equal parts of all rows' units, so that each reads what lies in one piece.
    """
    n_units = units(plan)
    total = plan.fold[0] * n_units
    first, last = (i * total // shard.n for i in (shard.index, shard.index + 1))
    while first < last:
        row, unit = divmod(first, n_units)
        if unit == 0 and last - first >= n_units:
            n_rows = (last - first) // n_units
            yield slice(row, row + n_rows), 0, n_units
            first += n_rows * n_units
            continue
        stop = min(n_units, unit + last - first)
        for start, n in subtrees(unit, stop):
            yield slice(row, row + 1), start, n
        first += stop - unit


def refuse_many(plan: Plan, shard: Shard, budget: int) -> None:
    """Raise where the states of a shard, which are held until they are written, do not fit; few always do."""
    n = sum(rows.stop - rows.start for rows, _, _ in rectangles(plan, shard)) * prod(plan.fold[2::2])
    needed = HELD_TWICE * n * state_bytes(plan)
    if n > region_states.MOST_STATES and needed > budget:
        raise OutOfMemoryError(
            f"{plan.row.name}: shard {shard} holds {n} states at once: that takes {needed} bytes, and {budget} are allowed; "
            "give more memory (--memory), or more shards"
        )


def check_joins(plan: Plan) -> None:
    if not lifts(plan):
        raise StateError(
            f"{plan.row.name} of {plan.stored.name} has no state that can be merged: its slices are needed whole; reduce all "
            "at once, or take a row with passes"
        )


def shifted(plan: Plan, parts: Parts, start: int) -> Parts:
    """Places count from the start of the slice: `start` is in indices of the first reduced group."""
    shift = getattr(kernel(plan.passes[0].reference), "shift", None)
    return shift(parts, start * prod(plan.fold[3::2])) if shift else parts


def are_siblings(left: Node, right: Node) -> bool:
    """Whether the two are the halves of one aligned subtree."""
    n = left.n_units
    is_half = n == right.n_units and left.stop == right.start and not n & (n - 1) and left.start % (2 * n) == 0
    return is_half and left.rows == right.rows


def refuse_overlap(nodes: Sequence[Node]) -> None:
    for left, right in pairwise(nodes):
        if right.row < left.row + left.n_rows and (left.rows != right.rows or right.start < left.stop):
            raise StateError(f"two states cover leaf {right.start} of row {right.row}; merge each shard once")


FIELDS = {"op": str, "params": dict, "dtype": str, "shape": list, "backend": str, "order": int, "version": str}
"""What a state says of itself, each field as JSON of this type."""


def _said(metadata: Mapping[str, str]) -> dict[str, Any]:
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


def _plan_of(said: Mapping[str, Any]) -> Plan:
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


def _nodes(whole: Plan, payload: Payload, names: Mapping[str, str | TensorInfo]) -> Iterator[Node]:
    """The nodes, each with exactly the parts that the plan's pass has, in their dtypes and shape."""
    others = prod(whole.fold[2::2])
    wanted = MappingProxyType({part.name: part.dtype for part in whole.passes[0].parts(whole.dtype)})
    found: dict[tuple[int, int, int, int], Parts] = {}
    for name, of in names.items():
        row, n_rows, start, n_units, part = _node_name(name)
        info = payload.header.tensors[of] if isinstance(of, str) else of
        if info.dtype is not wanted.get(part) or info.shape != (n_rows, others):
            raise StateError(f"{name[:64]} is no part of this state: {info.dtype} {info.shape}")
        found.setdefault((row, n_rows, start, n_units), {})[part] = load_tensor(payload, info)
    for (row, n_rows, start, n_units), parts in found.items():
        node = Node(row=row, n_rows=n_rows, start=start, n_units=n_units, parts=parts)
        check_node(whole, node, wanted.keys())
        yield node


_NODE = re.compile(r"(0|[1-9][0-9]{0,15})\.([1-9][0-9]{0,15})\.(0|[1-9][0-9]{0,15})\.([1-9][0-9]{0,15})\.([a-z0-9_]+)")


def _node_name(name: str) -> tuple[int, int, int, int, str]:
    """(row, n_rows, start, n_units, part) of "0.1.4.2.total"; each number in its one spelling."""
    found = _NODE.fullmatch(name)
    if found is None:
        raise StateError(f"{name[:64]!r} names no part of a state")
    row, n_rows, start, n_units = (int(word) for word in found.groups()[:4])
    return row, n_rows, start, n_units, found[5]


def check_node(whole: Plan, node: Node, wanted: Collection[str]) -> None:
    """An aligned subtree inside the index (only the last may be smaller, or all units), whole, with counts that it can have."""
    n, n_units, first, size, unit = whole.fold[1], units(whole), node.start, node.n_units, unit_of(whole, 1)
    aligned = (not size & (size - 1) and first % size == 0) or (first == 0 and size == n_units)
    fits = node.stop <= n_units and node.row + node.n_rows <= whole.fold[0]
    if node.parts.keys() != set(wanted) or not aligned or not fits:
        raise StateError(f"the state of leaves {first} to {first + size} is incomplete, unaligned or outside the index")
    cells = (min((first + size) * unit, n) - first * unit) * prod(whole.fold[3::2])
    count = node.parts["count"]
    if count.numel() and not 0 <= int(count.min()) <= int(count.max()) <= cells:
        raise StateError(f"the state of leaves {first} to {first + size} counts cells that it cannot have")
