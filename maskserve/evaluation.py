"""An expression on tensors: every term's shape, dtype and names of dims before a cell is read, then its cells, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import ceil, prod
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, TypeAlias

import torch

from maskserve import blockwise, engine
from maskserve.alignment import dim_numbers, laid_over, laid_together
from maskserve.backends import Choice, choose
from maskserve.blockwise import (
    Cells,
    Chain,
    Op,
    Slot,
    at_once,
    by_kernel,
    by_torch,
    in_blocks,
    laid,
    lies_along,
    of_few,
    op,
)
from maskserve.compact import Compact, common
from maskserve.dim_names import result_dims
from maskserve.dtypes import DType
from maskserve.engine import run_held
from maskserve.errors import DtypeError, MaskserveError, nearest
from maskserve.execution import block_cells, execution, n_threads, within_memory
from maskserve.expression import CONSTANTS, MOST_INT, Call, Name, Node, Number, brief, parse, placed, refusal
from maskserve.functions import Pair, public, side_input, unwrap
from maskserve.gates import hidden
from maskserve.making import masked_tensor
from maskserve.masks import Policy, parse_policy
from maskserve.ops.rows import Elementwise, MaskRule
from maskserve.outlines import Outline, outline
from maskserve.payload.variables import Dims
from maskserve.plan import Plan, plan
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of, known
from maskserve.tracing import are_followed

Shape: TypeAlias = tuple[int, ...]
Index: TypeAlias = tuple[slice, ...]

GROWTH, SMALL = 4, 1 << 16
"""A term may have this many times the cells of the largest variable, or this many: sizes 1 that broadcast make outer products."""
BETWEEN = 16
"""How many times as many the largest tensor in between may have that an op makes for itself: the scores of an attention."""
MOST_PRODUCTS = 1 << 40
"""Pairs of cells that an expression may multiply in products of matrices: half a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A variable, from a header alone."""

    shape: Shape
    dtype: DType
    dims: Dims | None = None
    is_masked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """A node, and what it will give."""

    node: Name | Call
    shape: Shape
    dims: Dims | None
    sample: MaskedTensor
    """The result for variables without cells: its dtype, and whether it has a mask."""
    operands: Mapping[str, Term | int | float] = field(default_factory=dict)
    axes: Mapping[str, Shape] = field(default_factory=dict)
    """Which dim of the result each dim of an operand lies along."""
    params: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    """Of an op along dims."""
    choice: Choice | None = None
    """Who computes that."""
    outline: Outline | None = None
    """Of an op that is made of others, or moves cells."""
    leaves: Mapping[Term, Shape] = field(init=False)
    """What must be there before this term's blocks are computed; kept, as each term of a long sum asks those inside."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", leaves_of(self))

    @property
    def dtype(self) -> DType:
        return dtype_of(self.sample._data)

    @property
    def n_bytes(self) -> int:
        """Its cells' bytes and its mask's."""
        return prod(self.shape) * (self.sample._data.itemsize + (self.sample._held is not None))

    @property
    def terms(self) -> Iterator[tuple[Term, Shape]]:
        """The operands that are tensors, and which dim of this one each of their dims lies along."""
        return ((term, self.axes[word]) for word, term in self.operands.items() if isinstance(term, Term))

    @property
    def op(self) -> str:
        assert isinstance(self.node, Call)
        return self.node.row.name

    def n_dims_of(self, word: str) -> int:
        """The dims of what an operand is laid over."""
        if is_elementwise(self):
            return len(self.shape)
        if self.outline is not None:
            return self.outline.n_dims if word in self.outline.axes else len(self.axes[word])
        return len(self.axes["input"])

    @property
    def peak_bytes(self) -> int:
        """The most bytes that hold at once what is computed: the result, and what is between; variables not counted."""
        if not isinstance(self.node, Call):
            return 0
        held = peak = 0
        for leaf in self.leaves:
            if isinstance(leaf.node, Call):
                peak = max(peak, held + leaf.peak_bytes)
                held += leaf.n_bytes
        return max(peak, held + self.own_bytes)

    @property
    def own_bytes(self) -> int:
        """The result's bytes, and those of what is held while it is computed from its leaves."""
        if self.plan is not None and self.choice is not None:
            widths = self.choice.backend.widths_held * self.plan.dtype.n_bytes
            return (
                self.n_bytes
                + widths * prod(self.plan.shape)
                + engine.picking_width(self.plan) * prod(self.plan.out_shape)
            )
        if self.outline is not None:
            return self.n_bytes + self.outline.held_bytes
        n_cells = prod(self.shape)
        if n_cells <= blockwise.SMALL:
            return self.between_bytes
        in_work = min(n_cells, blockwise.BLOCK * n_threads())
        return self.n_bytes + ceil(self.between_bytes * in_work / n_cells)

    @property
    def room_bytes(self) -> int:
        """The bytes of copies that threads sort, which the allocator keeps until the end."""
        if self.plan is None or self.choice is None or not self.plan.sorted_width:
            return 0
        n_cells, backend = prod(self.plan.shape), self.choice.backend
        tile = max(self.plan.slice_cells, block_cells(backend, self.plan.shape))
        return self.plan.sorted_width * min(n_cells, n_threads() * tile)

    @property
    def between_bytes(self) -> int:
        """The bytes that adjacent elementwise ops hold at once at their common shape, the result's among them."""
        held = peak = 0
        for term, _ in self.terms:
            if is_elementwise(term) and term not in self.leaves:
                peak = max(peak, held + term.between_bytes)
                held += term.n_bytes
        return max(peak, held + self.n_bytes)


def is_elementwise(term: Term) -> bool:
    return isinstance(term.node, Call) and isinstance(term.node.row, Elementwise)


def leaves_of(term: Term) -> Mapping[Term, Shape]:
    if not is_elementwise(term):
        return dict(term.terms)
    found: dict[Term, Shape] = {}
    for operand, axes in term.terms:
        if (
            is_elementwise(operand) and operand.shape == term.shape
        ):  # a smaller one is computed once, not for each block
            found |= {leaf: tuple(axes[dim] for dim in inner) for leaf, inner in operand.leaves.items()}
        else:
            found[operand] = axes
    return found


def stages(term: Term) -> Iterator[Term]:
    """The terms that are held whole, in the order in which they are computed."""
    for leaf in term.leaves:
        yield from stages(leaf)
    if isinstance(term.node, Call):
        yield term


def fused(stage: Term) -> Iterator[Term]:
    """The terms that are computed together, block by block, with a term that is held whole: it comes last."""
    if is_elementwise(stage):
        for term, _ in stage.terms:
            if is_elementwise(term) and term not in stage.leaves:
                yield from fused(term)
    yield stage


# -- before a cell is read ----------------------------------------------------------------------------------------


def planned(node: Node, variables: Mapping[str, Declared], device: str = "cpu", backend: str | None = None) -> Term:
    """What the tree will give on these variables; an error says at which column it cannot be computed."""
    largest = max((prod(v.shape) for v in variables.values()), default=0)
    return as_term(Planner(variables, max(SMALL, GROWTH * largest), device, backend).of(node))


class Planner:
    """Terms for nodes, from the leaves up."""

    def __init__(self, variables: Mapping[str, Declared], most_cells: int, device: str, backend: str | None) -> None:
        self.variables, self.most_cells, self.device, self.backend = variables, most_cells, device, backend
        self.n_products = 0

    def of(self, node: Node) -> Term | int | float:
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Name):
            declared = self.variables.get(node.name)
            if declared is None:
                raise refusal(unknown(node.name, tuple(self.variables)), node.column)
            sample = sample_of(declared.shape, declared.dtype, declared.is_masked)
            return Term(node=node, shape=declared.shape, dims=declared.dims, sample=sample)
        words = node.row.operands
        operands = {
            word: self.of(operand) for word, operand in zip(words, node.operands, strict=True) if operand is not None
        }
        with at(node):
            if isinstance(node.row, Elementwise):
                term = self.elementwise(node, operands)
            else:
                term = self.outlined(node, operands) if node.row.outline else self.sliced(node, operands)
            if isinstance(term, Term):
                self.check_size(term)
        return term

    def check_size(self, term: Term) -> None:
        """ExpressionError where a term, or what it is made of, is out of all proportion to the variables."""
        if prod(term.shape) > self.most_cells:
            raise refusal(
                f"{term.op} would give {prod(term.shape)} cells, of shape {term.shape}; a term may have at most "
                f"{self.most_cells}",
                None,
            )
        if term.outline is None:
            return
        if term.outline.n_between > BETWEEN * self.most_cells:
            raise refusal(
                f"{term.op} would have {term.outline.n_between} cells in between; there may be at most "
                f"{BETWEEN * self.most_cells}",
                None,
            )
        self.n_products += term.outline.n_products
        if self.n_products > MOST_PRODUCTS:
            raise refusal(
                f"{term.op}: {self.n_products} pairs of cells would be multiplied; an expression may multiply {MOST_PRODUCTS}",
                None,
            )

    def elementwise(self, node: Call, operands: Mapping[str, Term | int | float]) -> Term | int | float:
        terms = {word: term for word, term in operands.items() if isinstance(term, Term)}
        if not terms:
            return of_numbers(node, operands)
        shape, dims, axes = laid_together(node.row.name, terms)
        samples = {
            word: laid(term.sample, axes[word], len(shape)) if isinstance(term, Term) else term
            for word, term in operands.items()
        }
        sample = public(node.row.name)(**samples, **node.params)
        return Term(node=node, shape=shape, dims=dims, sample=sample, operands=operands, axes=axes, params=node.params)

    def sliced(self, node: Call, operands: Mapping[str, Term | int | float]) -> Term:
        (given,) = operands.values()
        inputs = as_term(given)
        row, params, called, axes = node.row, {}, {}, {"input": tuple(range(len(inputs.shape)))}
        made: dict[str, Term] = {"input": inputs}
        for name, value in node.params.items():
            if name == "dim" and value is not None:
                value = dim_numbers(row.name, inputs.dims, value)
            if isinstance(value, Name):
                side = self.of(value)
                assert isinstance(side, Term)
                made[name], axes[name] = side, laid_over(name, side, inputs)
                called[name] = side.dtype
            else:
                params[name] = called[name] = value
        decided = plan(row, tuple(called.items()), inputs.shape, inputs.dtype, self.device)  # type: ignore[arg-type]
        sample = sample_of(tuple(decided.out_shape), decided.result, True)
        return Term(
            node=node, shape=tuple(decided.out_shape), dims=result_dims(decided, inputs.dims), sample=sample,
            operands=made, axes=axes, params=MappingProxyType(params), plan=decided, choice=choose(decided, self.backend),
        )  # fmt: skip

    def outlined(self, node: Call, operands: Mapping[str, Term | int | float]) -> Term:
        """An op that says from headers alone what it gives; a number is a tensor where the row takes no numbers."""
        row = node.row
        given = {word: o if word in row.numbers else as_term(o) for word, o in operands.items()}
        sides = {name: self.of(value) for name, value in node.params.items() if isinstance(value, Name)}
        params = {name: value for name, value in node.params.items() if name not in sides}
        found = outline(row, {**given, **sides}, params)
        return Term(
            node=node, shape=found.shape, dims=found.dims, sample=sample_of(found.shape, found.dtype, True),
            operands={**given, **sides}, axes=axes_of(found, {**given, **sides}), params=found.params, outline=found,
        )  # fmt: skip


def axes_of(found: Outline, given: Mapping[str, Term | int | float]) -> Mapping[str, Shape]:
    """The dims that operands lie along: what is not laid beside others stays as it is."""
    return {
        word: found.axes.get(word, tuple(range(len(term.shape))))
        for word, term in given.items()
        if isinstance(term, Term)
    }


@contextmanager
def at(node: Call) -> Iterator[None]:
    """What goes wrong inside stands at the node's column."""
    try:
        yield
    except MaskserveError as error:
        placed(error, node.column)
        raise


def sample_of(shape: Shape, dtype: DType, is_masked: bool) -> MaskedTensor:
    """A tensor that broadcasts as one of `shape` does, and has at most one cell."""
    sizes = tuple(1 if n == 1 else 0 for n in shape)
    mask = torch.ones(sizes, dtype=torch.bool) if is_masked else None
    return MaskedTensor._of(torch.ones(sizes).to(getattr(torch, dtype.torch)), mask)


def unknown(name: str, known: tuple[str, ...]) -> str:
    name = brief(name)
    have = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    instead = f"; write {CONSTANTS[name]}" if name in CONSTANTS else nearest(name, known)
    return f"{name} is no variable; there {'are ' + have if have else 'is none'}{instead}"


def as_term(given: Term | int | float) -> Term:
    """A number is a tensor without dims, where an op has dims."""
    if isinstance(given, Term):
        return given
    sample = masked_tensor(constant(given))
    return Term(node=Name(""), shape=(), dims=None, sample=sample)


def constant(value: int | float) -> torch.Tensor:
    dtype = torch.float64 if isinstance(value, float) else torch.bool if isinstance(value, bool) else torch.int64
    return torch.tensor(value, dtype=dtype)


def of_numbers(node: Call, operands: Mapping[str, Any]) -> int | float:
    """An op of numbers alone, in float64; a whole result of whole numbers stays whole where float64 is exact.

    Never in Python's integers: 9**9**9 is infinite, and at once.
    """
    cells = {word: torch.tensor(float(value), dtype=torch.float64) for word, value in operands.items()}
    row = node.row
    assert isinstance(row, Elementwise)  # others have taken a number as a tensor
    if row.rule is MaskRule.CHOSEN:
        condition, *_ = row.operands
        cells[condition] = cells[condition] != 0
    value = public(row.name)(**cells, **node.params).item()
    if isinstance(value, complex):
        raise DtypeError(f"{row.name} of numbers alone is complex, and a number of an expression is real")
    is_whole = all(isinstance(v, int) for v in operands.values()) and row.operator != "truediv"
    if is_whole and isinstance(value, float) and abs(value) <= MOST_INT and value == int(value):
        return int(value)
    number: int | float = value
    return number


# -- cells --------------------------------------------------------------------------------------------------------


def of_tensors(text: str, variables: Mapping[str, MaskedTensor]) -> MaskedTensor:
    """The value of an expression on tensors by name; where any of them is followed, so is the result."""
    headers = [(name, header_of(x)) for name, x in variables.items()]
    return evaluated(remembered(text, torch.get_default_dtype(), *headers), variables)


@lru_cache(maxsize=256)
def remembered(text: str, _default: torch.dtype, *headers: tuple[str, tuple[torch.Size, torch.dtype, bool]]) -> Term:
    """The plan of a text on variables of such names, shapes, dtypes and masks: the same as long as torch's default dtype is."""
    return planned(parse(text).root, {name: declared(*header) for name, header in headers})


def declared(shape: torch.Size, dtype: torch.dtype, is_masked: bool) -> Declared:
    return Declared(shape=tuple(shape), dtype=known(dtype), is_masked=is_masked)


def declared_of(tensor: MaskedTensor) -> Declared:
    return declared(*header_of(tensor))


def header_of(tensor: MaskedTensor) -> tuple[torch.Size, torch.dtype, bool]:
    """Shape, dtype, and whether there is a mask, as there is where cells are stored by their places."""
    cells = tensor._cells
    return tensor.shape, cells._data.dtype, cells is not tensor or cells._held is not None


def evaluated(term: Term, variables: Mapping[str, MaskedTensor]) -> MaskedTensor:
    """The cells of the term."""
    if isinstance(term.node, Name):
        return variables[term.node.name] if term.node.name else term.sample
    made = program(term) if is_elementwise(term) else None
    inputs = made.leaves if made else tuple(term.terms)
    names = made.names if made else ()
    values = [variables[name] for name in names] if names else [evaluated(leaf, variables) for leaf, _ in inputs]
    if made and made.are_few and (few := quickly(made, values)) is not None:
        return few
    if any(value._cells is not value for value in values) or are_followed([value._data for value in values]):
        known = {leaf_key(leaf, axes): value for (leaf, axes), value in zip(inputs, values, strict=True)}
        return called(term, {leaf: known[leaf_key(leaf, axes)] for leaf, axes in term.leaves.items()})
    if term.outline is not None:
        return called(term, dict(zip((leaf for leaf, _ in inputs), values, strict=True)))
    return elementwise(term, made, values) if made else sliced(term, values)


def called(term: Term, leaves: Mapping[Term, MaskedTensor]) -> MaskedTensor:
    """The term of its leaves by the public functions, which leave a trace for autograd and know sparse tensors."""
    assert isinstance(term.node, Call)
    operands: dict[str, Any] = {}
    for word, operand in term.operands.items():
        if isinstance(operand, Term):
            value = leaves[operand] if operand in leaves else called(operand, leaves)
            operands[word] = laid(value, term.axes[word], term.n_dims_of(word))
        else:
            operands[word] = operand
    first = () if is_elementwise(term) else (operands.pop(term.node.row.operands[0]),)
    with at(term.node):
        made = public(term.op)(*first, **operands, **term.params)
    return made.values if isinstance(made, Pair) else made


def sliced(term: Term, values: Sequence[MaskedTensor]) -> MaskedTensor:
    """An op along dims, by its plan."""
    assert isinstance(term.node, Call)
    assert term.plan is not None
    made = dict(zip(term.operands, values, strict=True))
    cells, *weights = made.pop("input"), *(laid(made[word], term.axes[word], len(term.axes["input"])) for word in made)
    with at(term.node):
        data = unwrap(term.node.row, cells, None, compact=True)
        weighed = tuple(side_input(term.node.row, w, data.value)[:2] for w in weights)
        return MaskedTensor._of(*run_held(term.plan, *data[:2], *weighed))


def quickly(made: Program, values: Sequence[MaskedTensor]) -> MaskedTensor | None:
    """Adjacent plain ops on few cells, where what is asked before takes as long; None where the long way has to ask more."""
    data: list[torch.Tensor] = []
    masks: list[Any] = []
    for value in values:
        # isinstance of a Compact, which is abstract, takes longer than the types
        if type(value) is not MaskedTensor or type(mask := value._held) not in FULL:
            return None
        data.append(value._data)
        masks.append(mask)
    if are_followed(data) or not by_torch(data[0]) or parse_policy(None) is not Policy.INTERSECT:
        return None
    found = of_few(made.chain, data, masks)
    return None if found is None else MaskedTensor._of(*found)


def elementwise(term: Term, made: Program, values: Sequence[MaskedTensor]) -> MaskedTensor:
    """Adjacent elementwise ops: by one kernel, or block by block where there are many cells."""
    kept = None
    if made.chain.is_plain and made.lie_along and parse_policy(None) is Policy.INTERSECT:
        masks: list[Any] = [v._held for v in values]
        if any(isinstance(mask, Compact) for mask in masks):
            kept = common(masks, torch.Size(term.shape))
    cells = [Cells(v._data, v._mask if kept is None else None) for v in values]
    if not made.lie_along:
        n_dims = len(term.shape)
        cells = [
            Cells(laid(data, axes, n_dims), None if mask is None else laid(mask, axes, n_dims))
            for (data, mask), (_, axes) in zip(cells, made.leaves, strict=True)
        ]
    compute = partial(stage, term, made, cells, kept)
    data, mask = compute() if made.is_small else within_memory(term.op, str(cells[0].data.device), compute)
    if kept is None:
        return MaskedTensor._of(data, mask)
    return MaskedTensor._of(hidden(data, kept, in_place=True), kept)


def stage(term: Term, made: Program, cells: Sequence[Cells], kept: Compact | None) -> Cells:
    """The cells of adjacent elementwise ops; on a device all at once, unless that was too much."""
    is_whole = execution().block_cells is None
    by_one = by_kernel(made.chain, cells, term.shape, kept) if is_whole else None
    if by_one is not None:
        return by_one
    if made.is_small or (is_whole and not all(leaf.data.is_cpu for leaf in cells)):
        return at_once(made.chain, cells)
    return in_blocks(made.chain, cells, term.shape, Cells(term.sample._data, term.sample._mask))


FULL = (NoneType, torch.Tensor)
"""What holds masks that are not compact."""


class Program(NamedTuple):
    """A stage as ops on its leaves, each of which lies along some dims of it; variables that come twice are one leaf."""

    leaves: tuple[tuple[Term, Shape], ...]
    names: tuple[str, ...]
    """Of its leaves, where all are variables."""
    chain: Chain
    lie_along: bool
    """Whether torch broadcasts all leaves as they are."""
    is_small: bool
    are_few: bool
    """Whether its cells are few, and made anew by plain ops of leaves as they lie."""


@lru_cache(maxsize=256)
def program(stage: Term) -> Program:
    found: dict[object, tuple[Term, Shape]] = {}
    for leaf, axes in stage.leaves.items():
        found.setdefault(leaf_key(leaf, axes), (leaf, axes))
    slots = {key: Slot(n) for n, key in enumerate(found)}
    ops: list[Op] = []

    def slot_of(term: Term, axes: Shape) -> Slot:
        if term in stage.leaves:
            return slots[leaf_key(term, axes)]
        assert isinstance(term.node, Call)
        assert isinstance(term.node.row, Elementwise)
        operands: list[Slot | int | float | None] = []
        for word in term.node.row.operands:
            operand = term.operands.get(word)
            if isinstance(operand, Term):
                operands.append(slot_of(operand, tuple(axes[dim] for dim in term.axes[word])))
            else:
                operands.append(operand)
        kinds, result = [operand.dtype for operand, _ in term.terms], term.sample._data.dtype
        ops.append(op(term.node.row, tuple(operands), term.params, kinds, term.node.column, result, len(slots)))
        return Slot(len(slots) + len(ops) - 1)

    slot_of(stage, tuple(range(len(stage.shape))))
    leaves = tuple(found.values())
    chain, n_cells = Chain.of(ops, len(slots)), prod(stage.shape)
    names = tuple(leaf.node.name for leaf, _ in leaves if isinstance(leaf.node, Name) and leaf.node.name)
    lie_along = all(lies_along(axes, len(stage.shape)) for _, axes in leaves)
    return Program(
        leaves, names if len(names) == len(leaves) else (), chain, lie_along, n_cells <= blockwise.SMALL,
        n_cells < blockwise.FEW and chain.makes_new and chain.is_plain and lie_along,
    )  # fmt: skip


def leaf_key(leaf: Term, axes: Shape) -> object:
    return (leaf.node.name, axes) if isinstance(leaf.node, Name) and leaf.node.name else (leaf, axes)
