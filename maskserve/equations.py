"""Equations: which dims of some tensors meet in a contraction, from einsum's words or from shapes. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_letters
from typing import Any, NoReturn

from maskserve.errors import DimError, ParameterError, ShapeError
from maskserve.ops.rows import Contraction

Label = str | int
"""A letter, or for a dim that "..." covers its place from the last of them on: -1, -2."""
Labels = tuple[Label, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """A label for each dim of each operand and of the result; what the result lacks is summed over.

    A dim of size 1 broadcasts to the others of its label, unless the label is among the `exact` ones.
    """

    operands: tuple[Labels, ...]
    result: Labels
    exact: frozenset[Label] = frozenset()


def checked(row: Contraction, equation: Equation, shapes: Sequence[Shape]) -> Equation:
    """The equation; ShapeError where the shapes do not fit it."""
    met: dict[Label, tuple[int, int, int]] = {}  # label -> its size, the operand and the dim it was found in
    for i, (labels, shape) in enumerate(zip(equation.operands, shapes, strict=True)):
        if len(labels) != len(shape):
            said = f"{name_of(row, i)} has shape {shape}; it must have {len(labels)} dim{'s' * (len(labels) != 1)}"
            raise ShapeError(f"{row.name}: {said}")
        own: dict[Label, int] = {}  # a diagonal broadcasts nothing
        for dim, (label, size) in enumerate(zip(labels, shape, strict=True)):
            first = own.setdefault(label, dim)
            known, other, other_dim = met.setdefault(label, (size, i, dim))
            if shape[first] != size:
                known, other, other_dim = shape[first], i, first
            elif known == 1 and label not in equation.exact:
                met[label] = size, i, dim
                continue
            elif size == known or (size == 1 and label not in equation.exact):
                continue
            raise ShapeError(
                f"{row.name}: dim {dim} of {name_of(row, i)} has size {size}, dim {other_dim} of {name_of(row, other)} {known}; "
                f"they must be equal{'' if label in equation.exact or other == i else ' or 1'} "
                f"(shapes {' and '.join(map(str, shapes))})"
            )
    return equation


def name_of(row: Contraction, i: int) -> str:
    return f"operand {i}" if row.takes_any_number else row.operands[i]


# -- from shapes --------------------------------------------------------------------------------------------------


def matmul(row: Contraction, shapes: Sequence[Shape], params: Mapping[str, Any]) -> Equation:
    """Matrices in the last two dims, vectors where there is one; the dims before broadcast."""
    a, b = (at_least_one(row, i, shape) for i, shape in enumerate(shapes))
    batch = range(2 - max(a, b), 0)
    left: Labels = (*range(2 - a, 0), "i", "k")[-a:]
    right: Labels = ("k",) if b == 1 else (*range(2 - b, 0), "k", "j")
    result = (*batch, *(["i"] if a > 1 else []), *(["j"] if b > 1 else []))
    return Equation(operands=(left, right), result=result, exact=frozenset("ikj"))


def inner(row: Contraction, shapes: Sequence[Shape], params: Mapping[str, Any]) -> Equation:
    """The last dims meet; a tensor of no dims multiplies each cell."""
    a, b = (tuple(f"{side}{dim}" for dim in range(len(shape))) for side, shape in zip("ab", shapes, strict=True))
    if not a or not b:
        return Equation(operands=(a, b), result=a + b)
    return Equation(operands=((*a[:-1], "k"), (*b[:-1], "k")), result=a[:-1] + b[:-1], exact=frozenset("k"))


def linear(row: Contraction, shapes: Sequence[Shape], params: Mapping[str, Any]) -> Equation:
    """The last dims meet; the weight is (out, in), or (in,) for one output."""
    batch = range(1 - at_least_one(row, 0, shapes[0]), 0)
    if len(shapes[1]) not in (1, 2):
        raise ShapeError(
            f"{row.name}: weight has shape {shapes[1]}; it must have 2 dims, outputs and inputs, or inputs alone"
        )
    outputs: Labels = ("j",)[: len(shapes[1]) - 1]
    return Equation(operands=((*batch, "k"), (*outputs, "k")), result=(*batch, *outputs), exact=frozenset("jk"))


def at_least_one(row: Contraction, i: int, shape: Shape) -> int:
    if not shape:
        raise ShapeError(
            f"{row.name}: {name_of(row, i)} has no dims; it must have at least 1 (mul multiplies by one number)"
        )
    return len(shape)


def tensordot(row: Contraction, shapes: Sequence[Shape], params: Mapping[str, Any]) -> Equation:
    """The last dims of a with the first of b, or those that are named, meet; the others follow in their order."""
    dims, (a, b) = params["dims"], map(len, shapes)
    if isinstance(dims, int):
        if dims > min(a, b):
            raise ParameterError(
                f"{row.name}: dims is {dims}, and the shapes are {shapes[0]} and {shapes[1]}; it is at most the dims of each",
                parameter="dims",
            )
        dims = tuple(range(a - dims, a)), tuple(range(dims))
    if len(dims[0]) != len(dims[1]):
        raise ParameterError(
            f"{row.name}: dims names {len(dims[0])} dims of a and {len(dims[1])} of b", parameter="dims"
        )
    left: list[Label] = [f"a{dim}" for dim in range(a)]
    right: list[Label] = [f"b{dim}" for dim in range(b)]
    for labels, side, name in ((left, dims[0], "a"), (right, dims[1], "b")):
        for n, dim in enumerate(side):
            if not -len(labels) <= dim < len(labels):
                raise DimError(f"{row.name}: dim {dim} is out of range for {name}, which has {len(labels)} dims")
            if isinstance(labels[dim], int):
                raise ParameterError(f"{row.name}: dims names dim {dim} of {name} twice", parameter="dims")
            labels[dim] = n
    free = tuple(label for label in (*left, *right) if isinstance(label, str))
    return Equation(operands=(tuple(left), tuple(right)), result=free)


# -- from words ---------------------------------------------------------------------------------------------------


def of_row(row: Contraction) -> Equation:
    """The row's own equation; no dim of it broadcasts."""
    found = parsed(row, row.equation, (0,) * len(row.operands))
    return Equation(operands=found.operands, result=found.result, exact=frozenset(row.equation))


def einsum(row: Contraction, shapes: Sequence[Shape], params: Mapping[str, Any]) -> Equation:
    """What the caller's words say."""
    return parsed(row, params["equation"], tuple(map(len, shapes)))


TERM = re.compile(r"[a-zA-Z]*(?:\.\.\.[a-zA-Z]*)?")


@lru_cache(1024)
def parsed(row: Contraction, words: str, n_dims: tuple[int, ...]) -> Equation:
    """An equation in torch's words. "..." covers the dims that have no letter, counted from the last of them.

    >>> from maskserve.ops import OPS
    >>> parsed(OPS["einsum"], "...ij, jk", (3, 2))
    Equation(operands=((-1, 'i', 'j'), ('j', 'k')), result=(-1, 'i', 'k'), exact=frozenset())
    """
    left, arrow, right = words.replace(" ", "").partition("->")
    terms = left.split(",")
    for term in (*terms, right):
        if not TERM.fullmatch(term):
            wrong(row, words, f"{term!r:.80} is not a letter for each dim, and at most one ... for the others")
    if len(terms) != len(n_dims):
        wrong(row, words, f"it names {len(terms)} tensors, and {len(n_dims)} are given")
    covered = [max(n - letters(term), 0) if "..." in term else 0 for term, n in zip(terms, n_dims, strict=True)]
    operands = tuple(labels(term, n) for term, n in zip(terms, covered, strict=True))
    known = [label for operand in operands for label in operand]
    if not arrow:
        once = sorted(label for label in known if isinstance(label, str) and known.count(label) == 1)
        return Equation(operands=operands, result=(*range(-max(covered), 0), *once))
    for letter in right.replace("...", ""):
        if right.count(letter) > 1:
            wrong(row, words, f"the result has {letter} twice")
        if letter not in known:
            wrong(row, words, f"no tensor has the result's {letter}")
    return Equation(operands=operands, result=labels(right, max(covered)))


def letters(term: str) -> int:
    return sum(letter in ascii_letters for letter in term)


def labels(term: str, covered: int) -> Labels:
    before, dots, after = term.partition("...")
    return (*before, *(range(-covered, 0) if dots else ()), *after)


def wrong(row: Contraction, words: str, why: str) -> NoReturn:
    raise ParameterError(f"{row.name}: equation {words!r:.80}: {why}", parameter="equation")
