"""Sequences of different lengths in torch's own forms: nested tensors of layout jagged, and PackedSequence, both ways.

Ours are (batch, time, ...), with the lengths as the mask. All keep the history of their cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from maskserve.compact import Lengths, as_lengths
from maskserve.errors import MaskError, ShapeError
from maskserve.tensor import MaskedTensor


def from_nested(given: Tensor) -> MaskedTensor:
    """(batch, longest, ...), of a nested tensor whose sequences differ along their first dim."""
    if given.layout is not torch.jagged:
        given = jagged(given)
    if given._ragged_idx != 1:  # type: ignore[attr-defined]  # of nested tensors
        raise ShapeError(
            f"a nested tensor is taken where dim 1 is the ragged one, and here it is dim {given._ragged_idx}: "  # type: ignore[attr-defined]
            "transpose it first"
        )
    lengths = given.offsets().diff()  # type: ignore[attr-defined]  # of nested tensors
    if (without_holes := given.lengths()) is not None:  # type: ignore[attr-defined]
        lengths, given = without_holes, given.contiguous()
    return of_lengths(torch.nested.to_padded_tensor(given, 0), lengths)


def jagged(given: Tensor) -> Tensor:
    """A nested tensor of the older layout in layout jagged, which says what may differ."""
    parts = given.unbind()
    if not parts or parts[0].ndim == 0 or any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise ShapeError(
            "a nested tensor is taken where its sequences differ along their first dim alone; these differ along others"
        )
    made: Tensor = torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)
    return made


def from_packed_sequence(given: PackedSequence) -> MaskedTensor:
    """(batch, longest, ...), in the order in which the sequences were before they were sorted."""
    padded, lengths = pad_packed_sequence(given, batch_first=True)
    return of_lengths(padded, lengths)


def of_lengths(padded: Tensor, lengths: Tensor) -> MaskedTensor:
    lengths = lengths.to(device=padded.device, dtype=torch.int64, copy=True)
    return MaskedTensor._of(padded, Lengths(lengths, 1, padded.shape))


def to_nested(tensor: MaskedTensor) -> Tensor:
    """The valid prefixes along dim 1."""
    lengths, offsets = lengths_of(tensor, "a nested tensor"), torch.zeros(len(tensor) + 1, dtype=torch.int64)
    offsets = offsets.to(tensor.device)
    offsets[1:] = lengths.cumsum(0)
    longest = tensor.shape[1]
    made: Tensor = torch.nested.nested_tensor_from_jagged(
        tensor.get_data()[rows_of(lengths, longest)],
        offsets,
        min_seqlen=int(lengths.min()),
        max_seqlen=int(lengths.max()),
    )
    return made


def rows_of(lengths: Tensor, longest: int) -> Tensor:
    """(batch, time): which rows are there."""
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(-1)


def to_packed_sequence(tensor: MaskedTensor) -> PackedSequence:
    """The valid prefixes along dim 1, longest first; it knows the order in which they came."""
    lengths = lengths_of(tensor, "a PackedSequence")
    if not bool(lengths.all()):
        raise MaskError(
            f"a PackedSequence has no empty sequence, and that at {int((lengths == 0).nonzero()[0])} is: leave it out first"
        )
    return pack_padded_sequence(tensor.get_data(), lengths.cpu(), batch_first=True, enforce_sorted=False)


def lengths_of(tensor: MaskedTensor, what: str) -> Tensor:
    """(batch,), of a tensor that has a batch of sequences and prefixes along dim 1."""
    if tensor.layout is not torch.strided or tensor.ndim < 2 or not len(tensor):
        raise ShapeError(
            f"{what} is made of (batch, time, ...) with one sequence at least, not of {tuple(tensor.shape)}"
        )
    held = tensor._held
    valid = torch.ones((1,) * tensor.ndim, dtype=torch.bool, device=tensor.device) if held is None else held
    return as_lengths(valid, 1, tensor.shape).lengths
