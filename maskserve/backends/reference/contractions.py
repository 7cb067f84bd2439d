"""The masked product of batches of matrices: a pair of cells counts where both are valid.

Masked cells are 0 in the product, which leaves no trace of them unless inf or NaN stands on the other side: 0 * inf is
NaN. Where that may have happened, what inf and NaN do is found anew from products of zeros and ones.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from maskserve.backends.reference.cells import select
from maskserve.errors import IntegerOverflowError


def product(a: Tensor, a_mask: Tensor | None, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(batch, i, k) and (batch, k, j), masks of the same shapes -> (batch, i, j): sums over the pairs that are both valid.

    A sum is valid where such a pair is, and 0 elsewhere. Integers and bools give int64, or an IntegerOverflowError.
    """
    a_mask, b_mask = (None if mask is None or is_full(mask) else mask for mask in (a_mask, b_mask))
    valid = met(a, a_mask, b, b_mask)
    cells_a, cells_b = select(a, a_mask), select(b, b_mask)
    if not (a.is_floating_point() or a.is_complex()):
        values = exact(cells_a, cells_b)
    else:
        values = times(cells_a, cells_b)
        if (a_mask is not None or b_mask is not None) and not bool(values.sum().isfinite()):
            values = repaired(values, (cells_a, a_mask), (cells_b, b_mask))
    return select(values, valid), valid


def times(a: Tensor, b: Tensor) -> Tensor:
    """torch's product, in the dtype of the cells."""
    if a.shape[2] == 1:
        # matmul takes each matrix of a batch by itself; and a sum of -0 alone is 0, however few cells it has
        return torch.addcmul(a.new_zeros(()), a, b)
    if torch.is_autocast_enabled(a.device.type):  # it would round cells to a half, and the way back would not know
        with torch.autocast(a.device.type, enabled=False):
            return times(a, b)
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)


# -- masks --------------------------------------------------------------------------------------------------------


def met(a: Tensor, a_mask: Tensor | None, b: Tensor, b_mask: Tensor | None) -> Tensor | None:
    """Where some k has a valid cell on both sides; None where there is one everywhere."""
    shape = (*a.shape[:2], b.shape[2])
    if not a.shape[2]:
        return torch.zeros(shape, dtype=torch.bool, device=a.device)
    masks = [(mask, dim) for mask, dim in ((a_mask, 2), (b_mask, 1)) if mask is not None]
    if len(masks) == 2 and not any(is_same_along(mask, dim) for mask, dim in masks):
        return meet(*[mask for mask, _ in masks])
    sides = [as_bytes(mask).amax(dim, keepdim=True) for mask, dim in masks]
    return reduce(torch.mul, sides).bool().expand(shape).contiguous() if sides else None


def as_bytes(mask: Tensor) -> Tensor:
    """0 and 1: amax and amin of bytes are twenty times faster than any and all."""
    return mask.view(torch.uint8)


def is_full(mask: Tensor) -> bool:
    return not mask.numel() or bool(as_bytes(mask).amin())


def is_same_along(mask: Tensor, dim: int) -> bool:
    """Whether cells along dim are all valid or all masked, as in padded batches."""
    return torch.equal(as_bytes(mask).amin(dim), as_bytes(mask).amax(dim))


# -- inf and NaN --------------------------------------------------------------------------------------------------

Side = tuple[Tensor, Tensor | None]
"""Cells, 0 where masked, and their mask."""


def repaired(values: Tensor, a: Side, b: Side) -> Tensor:
    """The product anew: of the finite cells, plus what inf and NaN make with the valid cells of the other side."""
    odd_a, odd_b = ~a[0].isfinite(), ~b[0].isfinite()
    if not bool(odd_a.any() | odd_b.any()):
        return values  # finite cells whose sum is too large
    values = times(a[0].masked_fill(odd_a, 0), b[0].masked_fill(odd_b, 0))
    rows, columns = (odd.any(met_dim).any(0).nonzero()[:, 0] for odd, met_dim in ((odd_a, 2), (odd_b, 1)))
    values[:, rows] += made_by_odd(a[0][:, rows], b)
    turned = (a[0].mT, None if a[1] is None else a[1].mT)
    values[:, :, columns] += made_by_odd(b[0][:, :, columns].mT, turned).mT
    return values


def made_by_odd(cells: Tensor, other: Side) -> Tensor:
    """(batch, i, k) and (batch, k, j) -> (batch, i, j): inf, -inf or NaN where inf and NaN of `cells` meet valid cells."""
    partner, mask = other
    valid = torch.ones_like(partner, dtype=torch.bool) if mask is None else mask
    made = torch.zeros((*cells.shape[:2], partner.shape[2]), dtype=cells.dtype, device=cells.device)
    if cells.is_complex():
        return made.masked_fill_(meet(~cells.isfinite(), valid), torch.nan)
    up, down = partner > 0, partner < 0
    positive, negative = cells == torch.inf, cells == -torch.inf
    made.masked_fill_(meet(positive, up) | meet(negative, down), torch.inf)
    made[meet(positive, down) | meet(negative, up)] -= torch.inf
    return made.masked_fill_(meet(cells.isnan(), valid) | meet(positive | negative, valid & ~up & ~down), torch.nan)


def meet(a: Tensor, b: Tensor) -> Tensor:
    """Whether both are true for some k."""
    return times(a.float(), b.float()) > 0


# -- integers -----------------------------------------------------------------------------------------------------

EXACT_BITS = 53
"""Whole numbers below 2**53 are exact in float64, and torch multiplies matrices of those well on every device."""
LIMB_BITS = 20
LIMB = (1 << LIMB_BITS) - 1
RUN = 1 << EXACT_BITS - 2 * LIMB_BITS
"""Products of two limbs that float64 sums exactly."""


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product of whole numbers in int64; IntegerOverflowError where it does not fit."""
    bits_a, bits_b = n_bits(a), n_bits(b)
    if bits_a + bits_b + a.shape[2].bit_length() <= EXACT_BITS:
        return times(a.double(), b.double()).long()
    n_a, n_b = (-(-max(bits, 1) // LIMB_BITS) for bits in (bits_a, bits_b))
    n_digits, shape = max(n_a + n_b - 1, 4), (*a.shape[:2], b.shape[2])
    digits = [torch.zeros(shape, dtype=torch.int64, device=a.device) for _ in range(n_digits)]
    for run_a, run_b in zip(a.split(RUN, 2), b.split(RUN, 1), strict=True):
        limbs_b = limbs(run_b, n_b)
        for i, limb_a in enumerate(limbs(run_a, n_a)):
            for j, limb_b in enumerate(limbs_b):
                digits[i + j] += times(limb_a, limb_b).long()
        carry(digits)
    return in_int64(digits)


def n_bits(cells: Tensor) -> int:
    """Bits of the largest absolute value."""
    if not cells.numel() or cells.dtype is torch.bool:
        return 1
    low, high = cells.aminmax()
    return max(abs(int(low)), abs(int(high))).bit_length()


def limbs(cells: Tensor, n: int) -> list[Tensor]:
    """Cells as sums of limb[i] * 2**(20 i) in float64, limbs from 0 to 2**20 - 1, the last one with the sign."""
    whole = cells.long()
    return [(whole >> LIMB_BITS * i & (LIMB if i < n - 1 else -1)).double() for i in range(n)]


def carry(digits: list[Tensor]) -> None:
    """Digits brought to 0 ... 2**20 - 1, the last one with the sign and what is left."""
    for digit, following in pairwise(digits):
        following += digit >> LIMB_BITS
        digit &= LIMB


def in_int64(digits: list[Tensor]) -> Tensor:
    """The numbers that carried digits stand for."""
    *rest, high = digits
    for digit in reversed(rest[3:]):
        high = (high.clamp(-16, 16) << LIMB_BITS) + digit  # beyond 8 it is too large, whatever follows
    if bool(((high < -8) | (high > 7)).any()):
        raise IntegerOverflowError(
            "a sum of products does not fit int64: convert to torch.float64 first, which rounds, or divide the data first"
        )
    return (high << 3 * LIMB_BITS) + (rest[2] << 2 * LIMB_BITS) + (rest[1] << LIMB_BITS) + rest[0]
