"""Terms of an expression as sources: what is elementwise is computed window by window, the rest is held, or put into a file.

Nothing elementwise is ever whole: a reduction of an expression reads the variables' windows and computes what it reduces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch

from maskserve import regions, sinks, streaming
from maskserve.accelerators import CPU
from maskserve.blockwise import Cells, Chain, at_once, laid
from maskserve.evaluation import Term, called, is_elementwise, program
from maskserve.expression import Name
from maskserve.payload.files import open_payload
from maskserve.payload.variables import MASK, resolve
from maskserve.regions import Piece
from maskserve.room import Need, beyond, memory_for
from maskserve.sources import Folded, Held, Laid, Masked, Shape, Source, Window, onto, stored
from maskserve.steps import Streamed
from maskserve.temporary import room_for
from maskserve.tensor import MaskedTensor
from maskserve.told import Told

RESULT_SHARE = 8
"""The part of the budget that one result between may take, to be held; a larger one is put into a file."""


class Stage(Source):
    """Adjacent elementwise ops on the windows of their leaves."""

    def __init__(self, term: Term, leaves: Sequence[tuple[Source, Shape]], chain: Chain) -> None:
        self.shape, self.leaves, self.chain = term.shape, leaves, chain
        self.dtype, self.is_masked = term.sample._data.dtype, term.sample._held is not None
        n_cells = max(prod(term.shape), 1)
        self.between = sum(source.cell_bytes for source, _ in leaves) + -(-term.between_bytes // n_cells)

    @property
    def cell_bytes(self) -> int:
        """What a cell of a window takes while it is computed."""
        return self.between

    def window(self, where: Window) -> Masked:
        n_dims, cells = len(where), []
        for of, axes in self.leaves:
            own, valid = part(of, axes, where)
            cells.append(Cells(laid(own, axes, n_dims), None if valid is None else laid(valid, axes, n_dims)))
        data, mask = at_once(self.chain, cells)
        shape = tuple(s.stop - s.start for s in where)
        return data.expand(shape), None if mask is None else mask.expand(shape)

    def folded(self, shape: Shape) -> Source:
        return Folded(self, shape)


def part(leaf: Source, axes: Shape, where: Window) -> Masked:
    """What of a leaf lies in a window; a size 1 lies in each."""
    return leaf.window(tuple(where[dim] if n != 1 else slice(0, n) for n, dim in zip(leaf.shape, axes, strict=True)))


class Terms:
    """The sources of terms, on variables that are sources."""

    def __init__(self, variables: Mapping[str, Source], budget: int, device: str = CPU) -> None:
        self.variables, self.budget, self.device = variables, budget, device

    def source(self, term: Term) -> Source:
        """The cells of a term: computed where they are asked for if it is elementwise, else now."""
        if isinstance(term.node, Name):
            return self.variables[term.node.name] if term.node.name else Held(term.sample._data, term.sample._mask)
        if term.outline is not None:
            return self.called(term)
        return self.stage(term) if is_elementwise(term) else self.kept(term)

    def called(self, term: Term) -> Source:
        """An op that needs its operands whole, such as a product of matrices."""
        if operands_bytes(term) > self.budget:
            raise beyond(need_of(term), self.budget, memory_for(operands_bytes(term)))
        leaves = {leaf: MaskedTensor._of(*self.source(leaf).whole()) for leaf, _ in term.terms}
        made = called(term, leaves)
        return Held(made.get_data(), made._full_mask())

    def stage(self, term: Term) -> Stage:
        made = program(term)
        leaves = [(self.kept(leaf) if is_small(leaf, term) else self.source(leaf), axes) for leaf, axes in made.leaves]
        return Stage(term, leaves, made.chain)

    def kept(self, term: Term) -> Source:
        """The cells of a term, whole: in memory, or in a file."""
        if isinstance(term.node, Name) or term.outline is not None:
            return self.source(term)
        made = Streamed(
            name="data", told=Told(dtype=term.dtype, shape=term.shape, dims=None), mask_name=MASK, dims=None,
            fold=self.fold(term), pieces=lambda: self.pieces(term),
        )  # fmt: skip
        if term.n_bytes <= self.budget // RESULT_SHARE:
            result = made.in_memory()
            return onto(Held(result.data, result.mask), self.device)
        return onto(in_a_file(made), self.device)

    def fold(self, term: Term) -> Shape:
        """The shape that the pieces of a term lie in."""
        return term.shape if term.plan is None else regions.result_sizes(term.plan, term.plan.fold)

    def pieces(self, term: Term) -> Iterator[Piece]:
        """The cells of a term in parts."""
        if term.plan is not None:
            (inputs, _), *sides = term.terms
            source = self.source(inputs)
            weights = next((over(self.source(side), axes, source.shape) for side, axes in sides), None)
            yield from streaming.pieces(term.plan, source, weights, self.budget)
            return
        source = self.source(term)

        def piece(where: Window) -> Piece:
            data, mask = source.window(where)
            valid = torch.ones(data.shape, dtype=torch.bool, device=data.device) if mask is None else mask
            return Piece(where=where, values=data, mask=valid)

        yield from streaming.by_window(source, piece, self.budget)


# -- before a cell is read ----------------------------------------------------------------------------------------


class Unread(Source):
    """What a term will be, without cells."""

    def __init__(self, shape: Shape, cell_bytes: int) -> None:
        self.shape, self.bytes_a_cell = shape, cell_bytes

    @property
    def cell_bytes(self) -> int:
        return self.bytes_a_cell

    def window(self, where: Window) -> Masked:
        raise AssertionError("nothing is read before it runs")

    def folded(self, shape: Shape) -> Source:
        return Unread(shape, self.bytes_a_cell)


class Needs(Terms):
    """The same way through a term, on which nothing is computed: what must be whole is noted."""

    def __init__(self, variables: Mapping[str, Source]) -> None:
        super().__init__(variables, 0)
        self.found: list[Need] = []

    def called(self, term: Term) -> Source:
        self.found.append(need_of(term))
        for leaf, _ in term.terms:
            self.source(leaf)
        return Unread(term.shape, term.dtype.n_bytes + 1)

    def kept(self, term: Term) -> Source:
        if isinstance(term.node, Name) or term.outline is not None:
            return self.source(term)
        self.visit(term)
        return Unread(term.shape, term.dtype.n_bytes + 1)

    def visit(self, term: Term) -> None:
        if term.plan is None:
            self.source(term)
            return
        (inputs, _), *sides = term.terms
        for side, _ in sides:
            self.source(side)
        found = streaming.needs(term.plan, self.source(inputs).cell_bytes)
        self.found += [] if found is None else [found]


def need(term: Term, cell_bytes: Mapping[str, int]) -> Need | None:
    """What of a term must be in memory at once; None where parts of any size will do."""
    leaves = {name: Unread((), n_bytes) for name, n_bytes in cell_bytes.items()}
    needs = Needs(leaves)
    needs.visit(term)
    return max(needs.found, key=lambda found: found.memory, default=None)


def operands_bytes(term: Term) -> int:
    return term.own_bytes + sum(operand.n_bytes for operand, _ in term.terms)


def need_of(term: Term) -> Need:
    """What an op takes that needs its operands whole."""
    return Need(memory=memory_for(operands_bytes(term)), why=f"{term.op} holds its operands whole")


def is_small(leaf: Term, of: Term) -> bool:
    """Whether an elementwise leaf is smaller than what it is an operand of: it is computed once, not for each window."""
    return is_elementwise(leaf) and leaf.shape != of.shape


def over(source: Source, axes: Shape, shape: Shape) -> Source:
    """A source whose dims lie along `axes` of a larger shape."""
    sizes = [1] * len(shape)
    for n, dim in zip(source.shape, axes, strict=True):
        sizes[dim] = n
    order = tuple(sorted(range(len(axes)), key=axes.__getitem__))
    return Laid(source, order, tuple(sizes), shape)


def in_a_file(made: Streamed) -> Source:
    """The cells of a result that does not fit, from a file without a name."""
    with room_for(made.told.n_bytes), tempfile.TemporaryFile() as file:
        sinks.write(file.fileno(), "a temporary file", [made], {})
        payload = open_payload(f"/proc/self/fd/{file.fileno()}")
    return stored(payload, resolve(payload.header)[made.name])
