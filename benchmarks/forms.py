"""The fastest formulations in plain torch that we know: form(x, m, dim, *parameters) gives values, or (values, valid).

`m` is the mask in the shape of `x`, or None where every cell is valid; what lies under it may be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# -- cells --------------------------------------------------------------------------------------------------------


def zeroed(x: Tensor, m: Tensor | None) -> Tensor:
    """`x` with 0 where masked, by an integer AND: about twice as fast as torch.where."""
    if m is None:
        return x
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return m.to(bits).neg_().bitwise_and_(x.view(bits)).view(x.dtype)


def filled(x: Tensor, m: Tensor | None, fill: float) -> Tensor:
    return x if m is None else torch.where(m, x, fill)


def lowest(x: Tensor) -> float:
    return -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


def highest(x: Tensor) -> float:
    return torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).max


def floated(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


def accumulator(x: Tensor) -> torch.dtype:
    """half and bfloat16 overflow on the way."""
    return torch.float32 if x.element_size() < 4 and x.is_floating_point() else floated(x[:0]).dtype


def places(x: Tensor, dim: int) -> Tensor:
    """0, 1, 2, ... along `dim`, in as many dims as `x`."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return torch.arange(x.shape[dim]).view(shape)


# -- reductions ---------------------------------------------------------------------------------------------------


def count(x: Tensor, m: Tensor | None, dim: int) -> Tensor:
    """How many are valid: an int32 sum of bytes is faster than a sum of bools; in 1-D count_nonzero beats both."""
    if m is None:
        return torch.full((), x.shape[dim]).expand(x.select(dim, 0).shape)
    return m.count_nonzero() if m.ndim == 1 else m.view(torch.uint8).sum(dim, dtype=torch.int32)


def some(x: Tensor, m: Tensor | None, dim: int) -> Tensor:
    """Whether any is valid: the maximum of bytes is faster than any() of bools."""
    return count(x, m, dim) > 0 if m is None else m.view(torch.uint8).amax(dim).view(torch.bool)


def mean(x: Tensor, m: Tensor | None, dim: int) -> Any:
    n = count(x, m, dim)
    return (zeroed(x, m).sum(dim, dtype=accumulator(x)) / n).to(floated(x[:0]).dtype), n > 0


def var(x: Tensor, m: Tensor | None, dim: int) -> Any:
    n = count(x, m, dim)
    if m is None:
        return floated(x).var(dim), n > 1
    center = zeroed(x, m).sum(dim, keepdim=True, dtype=accumulator(x)) / n.unsqueeze(dim)
    squares = zeroed(x - center, m).square_().sum(dim)
    return (squares / (n - 1)).to(floated(x[:0]).dtype), n > 1


def std(x: Tensor, m: Tensor | None, dim: int) -> Any:
    values, valid = var(x, m, dim)
    return values.sqrt(), valid


def largest(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """With its index, as torch.max; a tensor as a whole has none."""
    cells = filled(x, m, lowest(x))
    return cells.amax() if x.ndim == 1 else cells.max(dim).values, some(x, m, dim)


def smallest(x: Tensor, m: Tensor | None, dim: int) -> Any:
    cells = filled(x, m, highest(x))
    return cells.amin() if x.ndim == 1 else cells.min(dim).values, some(x, m, dim)


def ptp(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return filled(x, m, lowest(x)).amax(dim) - filled(x, m, highest(x)).amin(dim), some(x, m, dim)


def prod(x: Tensor, m: Tensor | None, dim: int) -> Any:
    if not x.is_floating_point():
        return filled(x, m, 1).prod(dim), some(x, m, dim)
    return filled(x, m, 1).prod(dim, dtype=accumulator(x)).to(x.dtype), some(x, m, dim)


def norm(x: Tensor, m: Tensor | None, dim: int, ord: float) -> Any:
    """vector_norm, but for slices of a million cells: of 3 million in float32 it gives less than four digits."""
    cells = zeroed(floated(x), m)
    if x.shape[dim] >= 1 << 20:
        return cells.abs().pow_(ord).sum(dim).pow(1 / ord), some(x, m, dim)
    return torch.linalg.vector_norm(cells, ord, dim), some(x, m, dim)


def first(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """The largest of a mask's bytes stands first where the first cell is valid."""
    if m is None:
        return x.select(dim, 0), None
    place = m.view(torch.uint8).argmax(dim, keepdim=True)
    return x.gather(dim, place).squeeze(dim), m.gather(dim, place).squeeze(dim)


def last(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return first(x.flip(dim), None if m is None else m.flip(dim), dim)


# -- normalizations and scans -------------------------------------------------------------------------------------


def softmax(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return zeroed(filled(floated(x), m, -torch.inf).softmax(dim), m), m


def log_softmax(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return zeroed(filled(floated(x), m, -torch.inf).log_softmax(dim), m), m


def softmin(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return zeroed(functional.softmin(filled(floated(x), m, torch.inf), dim), m), m


def normalize(x: Tensor, m: Tensor | None, dim: int, ord: float) -> Any:
    return functional.normalize(zeroed(floated(x), m), ord, dim), m


def standardize(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """Centred twice: what rounding leaves of the first mean is as large as the spread of two cells that nearly agree."""
    n = count(x, m, dim).unsqueeze(dim)
    cells = zeroed(floated(x), m)
    centred = zeroed(cells - cells.sum(dim, keepdim=True, dtype=accumulator(x)) / n, m)
    centred = zeroed(centred - centred.sum(dim, keepdim=True) / n, m)
    spread = torch.linalg.vector_norm(centred, 2, dim, keepdim=True) / (n - 1).to(accumulator(x)).sqrt()
    return (centred / spread).to(cells.dtype), n > 1 if m is None else m & (n > 1)


def ffill(x: Tensor, m: Tensor | None, dim: int) -> Any:
    if m is None:
        return x.clone(), None
    latest = torch.where(m, places(x, dim), -1).cummax(dim).values
    return x.gather(dim, latest.clamp(min=0)), latest >= 0


def bfill(x: Tensor, m: Tensor | None, dim: int) -> Any:
    if m is None:
        return x.clone(), None
    n = x.shape[dim]
    following = torch.where(m, places(x, dim), n).flip(dim).cummin(dim).values.flip(dim)
    return x.gather(dim, following.clamp(max=n - 1)), following < n


# -- what sorts ---------------------------------------------------------------------------------------------------


def ordered(x: Tensor, m: Tensor | None, dim: int) -> Tensor:
    """The cells in order, masked ones last."""
    return filled(x, m, highest(x)).sort(dim).values


def valid_first(x: Tensor, m: Tensor | None, dim: int) -> Tensor | None:
    """Whether a cell is one of the first as many as are valid."""
    return None if m is None else places(x, dim) < count(x, m, dim).unsqueeze(dim)


def median(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """The mean of the two middle cells, by sorting: nanmedian gives the lower, and nanquantile stops at 2**24 cells."""
    cells = ordered(floated(x), m, dim)
    n = count(x, m, dim).unsqueeze(dim).long()
    middle = cells.gather(dim, (n - 1).clamp(min=0) // 2) + cells.gather(dim, (n // 2).clamp(max=x.shape[dim] - 1))
    return middle.squeeze(dim) / 2, n.squeeze(dim) > 0


def quantile(x: Tensor, m: Tensor | None, dim: int, q: float) -> Any:
    cells = ordered(floated(x), m, dim)
    n = count(x, m, dim).unsqueeze(dim)
    at = q * (n - 1).clamp(min=0).double()
    below, above = (cells.gather(dim, place.long()) for place in (at.floor(), at.ceil()))
    return below.lerp(above, at.frac().to(below.dtype)).squeeze(dim), n.squeeze(dim) > 0


def mode(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """The longest run of the cells in order, the first of several: torch.mode has no cell that it would not count."""
    cells = ordered(x, m, dim)
    at = places(x, dim)
    begins = torch.where(cells != cells.roll(1, dim), at, 0).cummax(dim).values
    lengths = at - begins if m is None else torch.where(at < count(x, m, dim).unsqueeze(dim), at - begins, -1)
    return cells.gather(dim, lengths.argmax(dim, keepdim=True)).squeeze(dim), some(x, m, dim)


def count_distinct(x: Tensor, m: Tensor | None, dim: int) -> Any:
    cells = ordered(x, m, dim)
    new = cells.narrow(dim, 1, x.shape[dim] - 1) != cells.narrow(dim, 0, x.shape[dim] - 1)
    return new.sum(dim) + (count(x, m, dim) == x.shape[dim])  # masked cells are a run, the last


def rank(x: Tensor, m: Tensor | None, dim: int) -> Any:
    """The mean place of equal cells: searched from both sides in the sorted slice."""
    cells = filled(x, m, highest(x)).movedim(dim, -1).contiguous()
    in_order = cells.sort(-1).values
    below, not_above = (torch.searchsorted(in_order, cells, right=right, out_int32=True) for right in (False, True))
    return ((below + not_above + 1).double() / 2).movedim(-1, dim), m


def argsort(x: Tensor, m: Tensor | None, dim: int) -> Any:
    return filled(x, m, highest(x)).sort(dim=dim, stable=True).indices, valid_first(x, m, dim)


def topk(x: Tensor, m: Tensor | None, dim: int, k: int) -> Any:
    valid = valid_first(x, m, dim)
    return filled(x, m, lowest(x)).topk(k, dim).values, None if valid is None else valid.narrow(dim, 0, k)


Form = Callable[..., Any]
FORMS: dict[str, Form] = {
    "sum": lambda x, m, dim: (zeroed(x, m).sum(dim), some(x, m, dim)),
    "mean": mean,
    "var": var,
    "std": std,
    "amax": lambda x, m, dim: (filled(x, m, lowest(x)).amax(dim), some(x, m, dim)),
    "amin": lambda x, m, dim: (filled(x, m, highest(x)).amin(dim), some(x, m, dim)),
    "argmax": lambda x, m, dim: (filled(x, m, lowest(x)).argmax(dim), some(x, m, dim)),
    "argmin": lambda x, m, dim: (filled(x, m, highest(x)).argmin(dim), some(x, m, dim)),
    "count": lambda x, m, dim: count(x, m, dim),
    "any": lambda x, m, dim: ((x != 0 if m is None else m & (x != 0)).any(dim), some(x, m, dim)),
    "all": lambda x, m, dim: ((x != 0 if m is None else ~m | (x != 0)).all(dim), some(x, m, dim)),
    "logsumexp": lambda x, m, dim: (filled(floated(x), m, -torch.inf).logsumexp(dim), some(x, m, dim)),
    "median": median,
    "quantile": quantile,
    "prod": prod,
    "norm": norm,
    "max": largest,
    "min": smallest,
    "mode": mode,
    "first": first,
    "last": last,
    "ptp": ptp,
    "count_distinct": count_distinct,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "softmin": softmin,
    "normalize": normalize,
    "standardize": standardize,
    "cumsum": lambda x, m, dim: (zeroed(zeroed(x, m).cumsum(dim), m), m),
    "cumprod": lambda x, m, dim: (filled(x, m, 1).cumprod(dim), m),
    "cummax": lambda x, m, dim: (filled(x, m, lowest(x)).cummax(dim).values, m),
    "cummin": lambda x, m, dim: (filled(x, m, highest(x)).cummin(dim).values, m),
    "logcumsumexp": lambda x, m, dim: (filled(floated(x), m, -torch.inf).logcumsumexp(dim), m),
    "rank": rank,
    "fill": lambda x, m, dim, value: x.clone() if m is None else filled(x, m, value),
    "ffill": ffill,
    "bfill": bfill,
    "sort": lambda x, m, dim: (ordered(x, m, dim), valid_first(x, m, dim)),
    "argsort": argsort,
    "topk": topk,
}
NAN_FORMS: dict[str, Form] = {
    "sum": lambda x, m, dim: x.nansum(dim),
    "mean": lambda x, m, dim: x.nanmean(dim),
}
