"""Attention by torch's fused kernels, forward and back: they hold no scores, and take a fifth of the time of the rows.

They know masks of whole words alone, and to them 0 times NaN is NaN: so words must be valid or masked whole, and no product
of cells may overflow. What else there is, layers.py computes by rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from maskserve import fused, gradients
from maskserve.backends import backends
from maskserve.backends.reference.cells import select
from maskserve.compact import Compact, Mask
from maskserve.execution import in_parallel
from maskserve.fused import Piece, pieces_of, wide
from maskserve.gates import MEASURED, as_cotangent, hidden, hide_rows, kept, longest_row, once, repeated, rows_alike
from maskserve.gradients import Above, Cells, Given, Masks, Operation, Result
from maskserve.operations import OfProduct
from maskserve.reach import Operand
from maskserve.tensor import MaskedTensor
from maskserve.tracing import are_followed, in_transform, is_followed

SERVED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
NOT_MASKED = (None, None, None)
STEADY = 2.0**-16
"""How far rounding may move a score: the way back raises e to the difference of a score and the sum that was kept."""


class Words(NamedTuple):
    """(..., words, cells), and which words are valid, (..., words)."""

    cells: Tensor
    valid: Tensor


def attended(
    q: MaskedTensor, k: MaskedTensor, v: MaskedTensor, masks: Sequence[Tensor | None], scale: float
) -> MaskedTensor | None:
    """(..., i, d), (..., j, d), (..., j, d) -> (..., i, d); None where the kernels could not be right.

    `masks` are True where a query meets a key, and broadcast to (..., i, j).
    """
    given = (q, k, v)
    if in_transform() or not is_served(*(x._data for x in given)):
        return None
    words = [Words(x._data, valid) for x in given if (valid := whole_words(x)) is not None]
    if len(words) < len(given) or (met := meetings(words, masks)) is None:
        return None
    pieces: Sequence[Piece] = ()
    lengths = None
    if are_alike := torch.equal(words[1].valid, words[2].valid):
        keys = met.squeeze(-2) if met.shape[-2] == 1 else words[1].valid
        pieces = pieces_of(words[0].valid, keys, q.shape[-1])
        shown = (words[0].valid, *[keys.expand(words[1].valid.shape)] * 2) if pieces else NOT_MASKED
        lengths = bounded([of.cells for of in words], scale, shown)
    if lengths is None and pieces:
        return None
    if lengths is None:
        words = [Words(without_junk(x), of.valid) for x, of in zip(given, words, strict=True)]
        lengths = bounded([of.cells for of in words], scale)
        if lengths is None:
            return None
    queries, keys, values = (of.valid for of in words)
    how = OfAttention(met, scale, (queries, keys, keys if are_alike else values), lengths, pieces)
    if not any(is_followed(of.cells) for of in words):
        made = how.compute(tuple(of.cells for of in words), ())
        return MaskedTensor._of(made.values, held_as(q, words[0], made.valid[..., :1]))
    operands = [Operand(of.cells, None, x._reach) for x, of in zip(given, words, strict=True)]  # `how` knows the masks
    result = gradients.apply(how, *operands)[0]
    return MaskedTensor._of(result.value, held_as(q, words[0], result.mask), result.reach)


def held_as(q: MaskedTensor, words: Words, valid: Tensor) -> Mask:
    """The mask of the result: that of the queries where it is compact and each of them met a key."""
    held = q._held
    return held if isinstance(held, Compact) and torch.equal(valid[..., 0], words.valid) else valid


def is_served(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.dtype not in SERVED or any(x.layout is not torch.strided or x.is_meta for x in (q, k, v)):
        return False
    alike = q.dtype is k.dtype is v.dtype and q.device == k.device == v.device
    alike = alike and q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and q.shape[-1] == k.shape[-1]
    return alike and k.shape == v.shape and q.ndim in (3, 4) and 0 not in (*q.shape, *k.shape)


def whole_words(x: MaskedTensor) -> Tensor | None:
    """Which words are valid, where each is valid or masked as a whole."""
    shape, mask = x._data.shape[:-1], x._held
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=x._data.device)
    valid = mask.rows() if isinstance(mask, Compact) else rows_alike(mask)
    return None if valid is None else valid.expand(shape)


def meetings(words: Sequence[Words], masks: Sequence[Tensor | None]) -> Tensor | None:
    """(..., i or 1, j), which keys a query meets; None where a mask does not broadcast to that."""
    q, keys = words[0].cells, words[1].valid
    scores = (*q.shape[:-1], keys.shape[-1])
    given = [mask for mask in masks if mask is not None]
    if given and keys.ndim == 3 and torch.equal(keys, keys[:, :1].expand(keys.shape)):
        keys = keys[:, :1]  # the same for all heads
    met = keys.unsqueeze(-2)
    for mask in given:
        sizes = zip(mask.shape[::-1], scores[::-1], strict=False)
        if mask.ndim > len(scores) or any(n not in (1, m) for n, m in sizes):
            return None
        met = met & mask
    return met


def without_junk(x: MaskedTensor) -> Tensor:
    if isinstance(x._held, Compact):
        return hidden(x._data, x._held, in_place=False)
    return x._data if x._held is None else kept(x._data, x._full_mask())


class Lengths(NamedTuple):
    """No less than those of the longest query, key and value, valid or not: what bounds all that kernels compute of them."""

    q: float
    k: float
    v: float

    def are_bounded(self, like: Tensor, scale: float, n_words: int) -> bool:
        """Whether no score and no mean can be inf or NaN: by Cauchy and Schwarz."""
        return self.q * self.k * max(abs(scale), 1) < most(like) and self.v * n_words < most(like)

    def allow_back(self, g: Tensor, scale: float) -> bool:
        """Whether scores that are found again are the same, and nothing that is multiplied with `g` overflows."""
        if not self.q * self.k * abs(scale) * torch.finfo(wide(g)).eps <= STEADY:
            return False
        return longest(g) * g.shape[-2] * max(self.v, 1) < most(g)


def bounded(operands: Sequence[Tensor], scale: float, shown: Sequence[Tensor | None] = NOT_MASKED) -> Lengths | None:
    """The lengths of words that are shown, where they bound what is computed: where that will do, of words taken together."""
    for together in (False,) if are_followed(operands) else (True, False):
        lengths = Lengths(*of_each(partial(longest, together=together), operands, shown))
        if lengths.are_bounded(operands[0], scale, operands[1].shape[-2]):
            return lengths
    return None


def of_each(
    measure: Callable[[Tensor, Tensor | None], float], operands: Sequence[Tensor], shown: Sequence[Tensor | None]
) -> list[float]:
    """The measure of each operand, on our threads where kernels take it: what lasts is to fetch the cells."""
    found = [0.0] * len(operands)

    def task(i: int) -> Callable[[], None]:
        return lambda: found.__setitem__(i, measure(operands[i], shown[i]))

    n_cells = sum(x.numel() for x in operands) if operands[0].is_cpu and operands[0].dtype in MEASURED else 0
    in_parallel(backends()[0], n_cells, [task(i) for i in range(len(operands))])
    return found


def longest(x: Tensor, valid: Tensor | None = None, *, together: bool = False) -> float:
    """The length of the longest valid word; NaN where any is. Inf where its square is more than kernels can add up in.

    `together`: or of several as one, than which none is longer.
    """
    x, n = x.detach(), 0 if valid is not None else repeated(x)
    if n:
        return longest(once(x, n)) * math.sqrt(x.shape[-1])
    found = longest_row(x, valid, together=together)
    if found is None:
        lengths = torch.linalg.vector_norm(x, dim=-1, dtype=wide(x))
        return float((lengths if valid is None else select(lengths, valid)).amax())
    return math.inf if found > torch.finfo(wide(x)).max else math.sqrt(found)


def most(x: Tensor) -> float:
    return torch.finfo(wide(x)).max / 4


@dataclass(frozen=True, eq=False)
class OfAttention(Operation):
    """Attention of whole words; `met` is (..., i or 1, j), `words` say which words of each operand are valid.

    Where there are `pieces`, `lengths` are those of the words in them.
    """

    met: Tensor
    scale: float
    words: Cells
    lengths: Lengths
    pieces: Sequence[Piece]

    def batched(self, n: int) -> OfAttention:
        return self

    def compute(self, operands: Cells, masks: Masks) -> Result:
        bias = self.bias(operands[0])
        made, sums = fused.forward(operands, bias, self.scale, self.pieces)
        queries, keys, values = self.words
        met = self.met if values is keys else self.met & values.unsqueeze(-2)
        valid = met.any(-1) & queries
        if bias is not None:
            hide_rows(made, valid)
        return Result(made, valid.unsqueeze(-1).expand(made.shape), sums)

    def bias(self, like: Tensor) -> Tensor | None:
        """What is added to the scores: -inf where a query does not meet a key; None where pieces say it all."""
        if self.pieces and self.met.shape[-2] == 1:
            return None
        return torch.zeros(self.met.shape, dtype=like.dtype, device=like.device).masked_fill_(~self.met, -math.inf)

    # -- the way back ----------------------------------------------------------------------------------------------

    def gradients(self, given: Given, above: Above, reached: Cells) -> Cells:
        """By the fused kernel, which gives exactly 0 where nothing is reached; by the formula where it is followed."""
        if any(map(is_followed, (*given.operands, above.g))):
            return super().gradients(given, above, reached)
        g, bias, operands = kept(above.g, above.gate), self.bias(above.g), given.operands
        made, _, sums = given.result
        if not self.lengths.allow_back(g, self.scale):
            if self.pieces:
                return super().gradients(given, above, reached)
            # perhaps for the junk of masked words alone
            operands = tuple(
                kept(x, at.unsqueeze(-1).expand(x.shape)) for x, at in zip(operands, self.words, strict=True)
            )
            if not Lengths(*map(longest, operands)).allow_back(g, self.scale):
                return super().gradients(given, above, reached)
            made, sums = fused.forward(operands, bias, self.scale, ())
        return fused.back(g, operands, made, sums, bias, self.scale, self.pieces)

    def pull(self, given: Given, above: Above) -> Cells:
        """W = softmax(s QK'), dV = W'G, dS = W (GV' - sum(W GV')) s, dQ = dS K, dK = dS'Q, over the pairs that meet."""
        shown = zip(given.operands, self.words, strict=True)
        q, k, v = (Operand(x, valid.unsqueeze(-1).expand(x.shape)) for x, valid in shown)
        g, pairs = Operand(*above), self.met.expand(*q.value.shape[:-1], k.value.shape[-2])
        pairs = pairs & above.gate.any(-1, keepdim=True)
        scores = times(q, turned(k)) * self.scale
        weights = Operand(select(torch.softmax(torch.where(pairs, scores, -math.inf), -1), pairs), pairs)
        to_weights = select(times(g, turned(v)), pairs)
        change = to_weights - (weights.value * to_weights).sum(-1, keepdim=True)
        to_scores = Operand(weights.value * change * self.scale, pairs)
        return times(to_scores, k), times(turned(to_scores), q), times(turned(weights), g)

    def reached(self, given: Given, gate: Tensor) -> Cells:
        q, k, v = given.operands
        whole = None if in_transform() else rows_alike(gate)
        asked = gate.any(-1) if whole is None else whole
        if self.met.shape[-2] == 1:
            is_met = self.met.squeeze(-2) & asked.any(-1, keepdim=True)
        else:
            is_met = (self.met & asked.unsqueeze(-1)).any(-2)
        by_cell = is_met.unsqueeze(-1)
        if whole is None:
            pairs = self.met.expand(*gate.shape[:-1], k.shape[-2])
            by_cell = pairs.mT.to(torch.float32) @ gate.to(torch.float32) > 0
        found = (asked.unsqueeze(-1), is_met.unsqueeze(-1), by_cell & self.words[2].unsqueeze(-1))
        return tuple(at.expand(x.shape) for at, x in zip(found, (q, k, v), strict=True))

    def back(self, given: Given, reach: Tensor) -> Cells:
        return tuple(as_cotangent(at) for at in self.reached(given, reach > 0))


def turned(x: Operand) -> Operand:
    return Operand(x.value.mT, None if x.mask is None else x.mask.mT)


def times(a: Operand, b: Operand) -> Tensor:
    made: Tensor = gradients.apply(OfProduct(), a, b)[0].value
    return made
