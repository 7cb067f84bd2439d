"""Partial: the mergeable state of a part of a reduction, and its bytes.

A Partial holds the states of aligned power-of-two subtrees of the reduced index (docs/order.md), not one state: merge
joins siblings only, so parts lifted anywhere and merged in any order finalize to the bits of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any

from torch import Tensor

from maskserve import dtypes, engine, execution, masks
from maskserve.backends import Parts, choose
from maskserve.backends.reference import kernel
from maskserve.dtypes import Kind
from maskserve.errors import MaskserveError, StateError
from maskserve.ops import find
from maskserve.ops.rows import Reduction
from maskserve.payload.format import DEFAULT_LIMITS, Buffer, BytesPayload, to_bytes
from maskserve.payload.header import strict_json
from maskserve.payload.tensors import load_tensor, output
from maskserve.plan import Plan, plan
from maskserve.requests import spelled
from maskserve.torch_dtypes import dtype_of
from maskserve.version import ORDER_VERSION, version

PREFIX = "maskserve.state."


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The state of `n_units` leaves from `start` on (both in leaves): parts of shape (outer, inner)."""

    start: int
    n_units: int
    parts: Parts

    @property
    def stop(self) -> int:
        return self.start + self.n_units


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """States of one plan's subtrees, in the order of the index. `plan` is the plan of the whole."""

    plan: Plan
    backend: str
    nodes: tuple[Node, ...]

    @classmethod
    def lift(cls, plan: Plan, data: Tensor, mask: Tensor | None = None, *, start: int = 0) -> Partial:
        """The state of cells `start`, start + 1, ... of the plan's reduced index: data is (outer, n, inner).

        `start` is a multiple of the plan's leaf; n is too, or reaches the end of the index.
        """
        check_sliceable(plan)
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
            parts = engine.state(below, block, own)
            shift = getattr(kernel(plan.passes[0].reference), "shift", None)
            nodes.append(Node(start=unit, n_units=n_units, parts=shift(parts, unit * plan.leaf) if shift else parts))
        return cls(plan=plan, backend=execution.backend_of(plan).name, nodes=tuple(nodes))

    def merge(self, other: Partial) -> Partial:
        """The states of both, siblings joined; they must come from one plan and back end, and not overlap."""
        if self.signature() != other.signature():
            raise StateError(
                f"states do not belong together: one is {json.dumps(self.signature())[:200]}, "
                f"the other {json.dumps(other.signature())[:200]}"
            )
        nodes = sorted((*self.nodes, *other.nodes), key=lambda node: node.start)
        refuse_overlap(nodes)
        merged: list[Node] = []
        for node in nodes:
            merged.append(node)
            while len(merged) > 1 and are_siblings(merged[-2], merged[-1]):
                right, left = merged.pop(), merged.pop()
                merged.append(self.joined(left, right))
        return replace(self, nodes=tuple(merged))

    def joined(self, left: Node, right: Node) -> Node:
        with execution.using(backend=self.backend):
            merge = execution.backend_of(self.plan).merge(self.plan)
        return Node(start=left.start, n_units=left.n_units + right.n_units, parts=merge(left.parts, right.parts))

    def finalize(self) -> tuple[Tensor, Tensor]:
        """(values, mask) of the whole; what is left over joins from the right. The whole index must be covered."""
        n_units = -(-self.plan.fold[1] // self.plan.leaf)
        expected = 0
        for node in self.nodes:
            if node.start != expected:
                break
            expected = node.stop
        if expected != n_units:
            raise StateError(f"the state of leaf {expected} of {n_units} is missing; merge every shard first")
        if not self.nodes:
            return engine.finish(self.plan, engine.identity(self.plan, prod(self.plan.out_shape)))
        last = self.nodes[-1]
        for node in reversed(self.nodes[:-1]):
            last = self.joined(node, last)
        with execution.using(backend=self.backend):
            return engine.finish(self.plan, last.parts)

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
        tensors = [
            output(f"{node.start}.{node.n_units}.{name}", part)
            for node in self.nodes
            for name, part in node.parts.items()
        ]
        return to_bytes(tensors, {PREFIX + key: json.dumps(value) for key, value in self.signature().items()})

    @classmethod
    def from_bytes(cls, buffer: Buffer) -> Partial:
        """The Partial that `to_bytes` wrote; StateError where the bytes are anything else."""
        payload = BytesPayload(buffer)
        said = _said(payload.header.metadata)
        if said["order"] != ORDER_VERSION or said["version"] != version():
            raise StateError(
                f"the state is of order {said['order']} and version {said['version']}, this is order {ORDER_VERSION} "
                f"and version {version()}; states of different versions are never merged"
            )
        try:
            whole = _plan_of(said)
        except MaskserveError as error:
            raise error if isinstance(error, StateError) else StateError(f"the bytes are no state: {error}") from error
        nodes = sorted(_nodes(whole, payload), key=lambda node: node.start)
        refuse_overlap(nodes)
        return cls(plan=whole, backend=said["backend"], nodes=tuple(nodes))


def check_sliceable(plan: Plan) -> None:
    row = plan.row
    whole = not isinstance(row, Reduction) or bool(row.select) or row.picks or plan.weighted
    if whole or plan.stored.kind is Kind.COMPLEX or len(plan.fold) != 3:
        raise StateError(
            f"{plan.row.name} over dims {plan.dims} has no state that can be merged: "
            "take a row with passes, over dims that stand side by side"
        )


def subtrees(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The aligned power-of-two ranges (start, n) that make up start..stop, left to right.

    >>> list(subtrees(0, 7)), list(subtrees(3, 8))
    ([(0, 4), (4, 2), (6, 1)], [(3, 1), (4, 4)])
    """
    while start < stop:
        n = 1 << (stop - start).bit_length() - 1
        while start % n:
            n >>= 1
        yield start, n
        start += n


def are_siblings(left: Node, right: Node) -> bool:
    """Whether the two are the halves of one aligned subtree."""
    n = left.n_units
    return n == right.n_units and left.stop == right.start and not n & (n - 1) and left.start % (2 * n) == 0


def refuse_overlap(nodes: list[Node]) -> None:
    for left, right in pairwise(nodes):
        if right.start < left.stop:
            raise StateError(f"two states cover leaf {right.start} of the index; merge each shard once")


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


def _plan_of(said: dict[str, Any]) -> Plan:
    row = find(said["op"])
    if not isinstance(row, Reduction):
        raise StateError(f"{row.name} is no reduction")
    params = {name: unspelled(value) for name, value in said["params"].items()}
    shape = said["shape"]
    if len(shape) > DEFAULT_LIMITS.dims or any(
        type(n) is not int or not 0 <= n <= DEFAULT_LIMITS.dim_size for n in shape
    ):
        raise StateError("the bytes are no state of a reduction: the shape is no list of sizes")
    whole = plan(row, tuple(params.items()), tuple(shape), dtypes.parse(said["dtype"]), "cpu")
    check_sliceable(whole)
    choose(whole, said["backend"])
    return whole


def _nodes(whole: Plan, payload: BytesPayload) -> Iterator[Node]:
    """The nodes, each with exactly the parts that the plan's pass has, in their dtypes and shape."""
    outer, _, inner = whole.fold
    wanted = MappingProxyType({part.name: part.dtype for part in whole.passes[0].parts(whole.dtype)})
    found: dict[tuple[int, int], Parts] = {}
    for name, info in payload.header.tensors.items():
        start, n_units, part = _node_name(name)
        if info.dtype is not wanted.get(part) or info.shape != (outer, inner):
            raise StateError(f"{name[:64]} is no part of this state: {info.dtype} {info.shape}")
        found.setdefault((start, n_units), {})[part] = load_tensor(payload, info)
    for (first, size), parts in found.items():
        check_node(whole, first, size, parts, wanted.keys())
        yield Node(start=first, n_units=size, parts=parts)


def _node_name(name: str) -> tuple[int, int, str]:
    """(start, n_units, part) of "4.2.total"; each number in its one spelling."""
    found = re.fullmatch(r"(0|[1-9][0-9]{0,15})\.([1-9][0-9]{0,15})\.([a-z0-9_]+)", name)
    if found is None:
        raise StateError(f"{name[:64]!r} names no part of a state")
    return int(found[1]), int(found[2]), found[3]


def check_node(whole: Plan, first: int, size: int, parts: Parts, wanted: Collection[str]) -> None:
    """An aligned subtree inside the index (only the last may be smaller), whole, with counts that it can have."""
    n = whole.fold[1]
    n_units = -(-n // whole.leaf)
    aligned = not size & (size - 1) and first % size == 0
    if parts.keys() != set(wanted) or not aligned or first + size > n_units:
        raise StateError(f"the state of leaves {first} to {first + size} is incomplete, unaligned or outside the index")
    cells = min((first + size) * whole.leaf, n) - first * whole.leaf
    count = parts["count"]
    if count.numel() and not 0 <= int(count.min()) <= int(count.max()) <= cells:
        raise StateError(f"the state of leaves {first} to {first + size} counts cells that it cannot have")
