"""torch's fused attention kernels, forward and back: on all sequences at once, or on the valid words of each alone.

A padded sequence is computed as it would be without its padding: no product with what is masked, and no look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from maskserve.gates import valid_first
from maskserve.gradients import Cells

FORWARD: Callable[..., tuple[Tensor, Tensor]] = torch._scaled_dot_product_flash_attention_for_cpu
BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What torch's own function calls; that does not hand out the logarithms of sums which the way back needs."""
PAYS = 1 << 21
"""Products that take as long as one more call: 70 us on two cores."""


class Piece(NamedTuple):
    """Sequences whose valid words come first, as many in each."""

    sequences: slice
    n_queries: int
    n_keys: int

    def queries(self, x: Tensor) -> Tensor:
        return x[self.sequences, ..., : self.n_queries, :]

    def keys(self, x: Tensor) -> Tensor:
        return x[self.sequences, ..., : self.n_keys, :]

    def operands(self, of: Cells) -> Cells:
        return self.queries(of[0]), self.keys(of[1]), self.keys(of[2])

    def pairs(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.queries(bias)[..., : self.n_keys]

    def sums(self, of: Tensor) -> Tensor:
        return self.queries(of.unsqueeze(-1)).squeeze(-1)


def pieces_of(queries: Tensor, keys: Tensor, n_cells: int) -> Sequence[Piece]:
    """(sequences[, heads], words) of each: where words are valid; their pieces, none where all at once takes less.

    >>> queries, keys = torch.ones(2, 512, dtype=torch.bool), torch.ones(2, 512, dtype=torch.bool)
    >>> queries[1, 300:] = False
    >>> [(piece.n_queries, piece.n_keys) for piece in pieces_of(queries, keys, 64)]
    [(512, 512), (300, 512)]
    """
    lengths = [valid_first(valid) for valid in (queries, keys)]
    if lengths[0] is None or lengths[1] is None:
        return []
    pieces, start, left = [], 0, 0
    for (n_queries, n_keys), alike in groupby(zip(*lengths, strict=True)):
        stop = start + len(list(alike))
        if n_queries and n_keys:
            pieces.append(Piece(slice(start, stop), n_queries, n_keys))
        left += (stop - start) * n_queries * n_keys
        start = stop
    saved = (start * queries.shape[-1] * keys.shape[-1] - left) * prod(queries.shape[1:-1]) * n_cells
    return pieces if saved > PAYS * len(pieces) else []


def forward(
    operands: Cells, bias: Tensor | None, scale: float, pieces: Sequence[Piece]
) -> tuple[Tensor, Tensor | None]:
    """The means, and on a CPU the logarithm of what each query's weights are divided by, (..., i); 0 outside of pieces."""
    q, k, v = operands
    if q.device.type != "cpu":
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    if not pieces:
        made, sums = FORWARD(*map(of_heads, operands), 0.0, False, attn_mask=of_heads(bias), scale=scale)
        return made.view(q.shape), sums.view(q.shape[:-1])
    made, sums = torch.zeros(q.shape, dtype=q.dtype), torch.empty(q.shape[:-1], dtype=wide(q))
    met = None if bias is None else bias.expand(*q.shape[:-1], k.shape[-2])
    for piece in pieces:
        values, logarithms = forward(piece.operands(operands), piece.pairs(met), scale, ())
        assert logarithms is not None  # on a CPU
        piece.queries(made).copy_(values)
        piece.sums(sums).copy_(logarithms)
    return made, sums


def back(
    g: Tensor, operands: Cells, made: Tensor, sums: Tensor | None, bias: Tensor | None, scale: float,
    pieces: Sequence[Piece],
) -> Cells:  # fmt: skip
    """The gradients by queries, keys and values; 0 outside of pieces."""
    if sums is None:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in operands]
            again, _ = forward(tuple(leaves), bias, scale, ())
        return torch.autograd.grad(again, leaves, g)
    if not pieces:
        cells = map(of_heads, (g, *operands, made))
        logarithms = sums if sums.ndim == 3 else sums.unsqueeze(0)
        found = BACK(*cells, logarithms, 0.0, False, attn_mask=of_heads(bias), scale=scale)
        return tuple(part.view(x.shape) for part, x in zip(found, operands, strict=True))
    gradients = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in operands)
    met = None if bias is None else bias.expand(*made.shape[:-1], operands[1].shape[-2])
    for piece in pieces:
        above, values = piece.queries(g), piece.queries(made)
        parts = back(above, piece.operands(operands), values, piece.sums(sums), piece.pairs(met), scale, ())
        for whole, part in zip(piece.operands(gradients), parts, strict=True):
            whole.copy_(part)
    return gradients


def of_heads(x: Tensor | None) -> Tensor | None:
    """(sequences, heads, words, cells), each word's cells side by side."""
    if x is None:
        return None
    whole = x if x.stride(-1) == 1 else x.contiguous()
    return whole if whole.ndim == 4 else whole.unsqueeze(0)


def wide(x: Tensor) -> torch.dtype:
    """What kernels add up in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32
