"""Pooling in torch's words: the largest or the mean of the valid cells of each window, and cells repeated or left out.

A window without a valid cell is masked; torch's padding is of no cells, or of zeros that the mean counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from maskserve.errors import ParameterError, ShapeError
from maskserve.functions import public
from maskserve.making import operand
from maskserve.room import check_room
from maskserve.tensor import MaskedTensor

Sizes = int | Sequence[int]
NO_PLACES = "give return_indices=False: where a window's largest cell stands, argmax of a slice of the tensor tells"


def max_pool(
    n: int, input: Any, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> MaskedTensor:  # fmt: skip
    """The largest valid cell of each window along the last `n` dims."""
    op = f"max_pool{n}d"
    refuse_places(op, return_indices)
    x = operand(input)
    seen = windowed(x, windows(op, sizes_of(op, n, x), kernel_size, stride, padding, dilation, ceil_mode))
    made: MaskedTensor = public("amax")(seen, last(n))
    return made


def avg_pool(
    n: int, input: Any, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> MaskedTensor:  # fmt: skip
    """The mean of the valid cells of each window along the last `n` dims; zeros of the padding count, as in torch."""
    op = f"avg_pool{n}d"
    if divisor_override is not None:
        raise ParameterError(f"{op}: divisor_override fixes what the valid cells are counted for: leave it out")
    x = operand(input)
    along = windows(op, sizes_of(op, n, x), kernel_size, stride, padding, 1, ceil_mode)
    seen = windowed(x, along)
    made: MaskedTensor = public("mean")(seen, last(n))
    if not count_include_pad or not any(window.pad for window in along):
        return made
    n_zeros = product(along, Windows.n_padded) - product(along, Windows.n_within)
    n_valid = seen.get_mask().sum(last(n))
    counted = n_valid + n_zeros.to(x.device)
    share: MaskedTensor = public("mul")(made, n_valid.to(x.dtype) / counted.clamp(min=1).to(x.dtype))
    return share


class Windows(NamedTuple):
    """`n` windows of `kernel` cells, `step` apart, along a dim of `size` cells, to which `pad` are added at either end."""

    size: int
    kernel: int
    stride: int
    pad: int
    step: int
    n: int

    @property
    def span(self) -> int:
        return self.step * (self.kernel - 1) + 1

    @property
    def beyond(self) -> int:
        """How far the last window reaches behind the cells."""
        return max((self.n - 1) * self.stride + self.span - self.pad - self.size, 0)

    def starts(self) -> Tensor:
        return torch.arange(self.n) * self.stride - self.pad

    def n_within(self) -> Tensor:
        """(n,): the cells of each window, without what is added."""
        return ((self.starts() + self.span).clamp(max=self.size) - self.starts().clamp(min=0)).clamp(min=0)

    def n_padded(self) -> Tensor:
        """(n,): the cells of each window, with what is added at either end and no more."""
        return (self.starts() + self.span).clamp(max=self.size + self.pad) - self.starts()

    def cells(self) -> tuple[Tensor, Tensor]:
        """(n, as many as are in the dim at most) which cells each window has, and whether it has so many."""
        starts = self.starts()
        first = (-(starts // self.step)).clamp(min=0)
        at = first[:, None] + torch.arange(min(self.kernel, -(-self.size // self.step)))
        places = starts[:, None] + at * self.step
        return places, (at < self.kernel) & (places < self.size)


def product(along: Sequence[Windows], counts: Callable[[Windows], Tensor]) -> Tensor:
    """(n along each dim): the cells of each box, whose sides are those of the windows."""
    made = torch.ones((), dtype=torch.int64)
    for window in along:
        made = made[..., None] * counts(window)
    return made


def windows(
    op: str, sizes: Sequence[int], kernel_size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes,
    ceil_mode: bool,
) -> list[Windows]:  # fmt: skip
    """Those along each dim."""
    n = len(sizes)
    kernel = several(op, "kernel_size", kernel_size, n, repeat=True)
    strides = several(op, "stride", kernel if stride is None or stride in ((), []) else stride, n, repeat=True)
    pads = several(op, "padding", padding, n, repeat=True, least=0)
    steps = several(op, "dilation", dilation, n, repeat=True)
    if any(2 * pad > size for pad, size in zip(pads, kernel, strict=True)):
        raise ParameterError(f"{op}: padding {pads} must be at most half of the kernel {kernel}", parameter="padding")
    along = []
    for size, k, by, pad, step in zip(sizes, kernel, strides, pads, steps, strict=True):
        n_places = places(size + 2 * pad - step * (k - 1) - 1, by, ceil_mode, size + pad)
        if n_places < 1:
            raise ShapeError(f"{op}: the kernel {kernel} is larger than the input's {tuple(sizes)}, padded by {pads}")
        along.append(Windows(size, k, by, pad, step, n_places))
    return along


def windowed(x: MaskedTensor, along: Sequence[Windows]) -> MaskedTensor:
    """(..., windows along each of the last dims, cells of each of the dims of a window)."""
    first = x.ndim - len(along)
    are_wide = [window.pad + window.beyond > window.size for window in along]  # of which most cells would be added ones
    for dim, (window, is_wide) in enumerate(zip(along, are_wide, strict=True), first):
        if window.pad + window.beyond and not is_wide:  # new cells are masked
            x = public("pad")(x, [0, 0] * (x.ndim - 1 - dim) + [window.pad, window.beyond])
    for dim, (window, is_wide) in enumerate(zip(along, are_wide, strict=True), first):
        slid = gathered(x, dim, *window.cells()) if is_wide else x.unfold(dim, window.span, window.stride)
        x = slid if is_wide else slid[..., :: window.step]
    return x


def gathered(x: MaskedTensor, dim: int, index: Tensor, valid: Tensor) -> MaskedTensor:
    """(..., windows, ..., cells of a window), by the cells (windows, cells) that each has along `dim`, where it has one."""
    x = x.index_select(dim, torch.where(valid, index, 0).flatten().to(x.device))
    if not bool(valid.all()):
        shape = [-1 if d == dim else 1 for d in range(x.ndim)]
        x = public("mask")(x, valid=valid.view(shape).to(x.device))
    made: MaskedTensor = x.unfold(dim, index.shape[1], index.shape[1])
    return made


def places(room: int, stride: int, ceil_mode: bool, end: int) -> int:
    """How many windows there are; the last one starts within the cells or the padding before them."""
    if room < 0 and not ceil_mode:
        return 0
    n = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return n - 1 if ceil_mode and (n - 1) * stride >= end else n


def several(
    op: str, name: str, said: Any, n: int, *, repeat: bool = False, kind: type = Integral, least: int = 1
) -> tuple[Any, ...]:
    """What was said for each of n dims, or once for all of them; `repeat`: also as a list of one, as torch's kernels."""
    given: tuple[Any, ...] = tuple(said) if isinstance(said, list | tuple) else (said,) * n
    given = given * n if repeat and len(given) == 1 else given
    if len(given) != n or not all(is_one(value, kind) and value >= least for value in given):
        word = "a whole number" if kind is Integral else "a finite number"
        many = "" if n == 1 else f", or {n} of them, one for each dim"
        raise ParameterError(f"{op}: {name} is {said!r:.80}; it must be {word} from {least} on{many}", parameter=name)
    return given


def is_one(value: Any, kind: type) -> bool:
    is_number: bool = isinstance(value, int | float | kind) and isinstance(value, kind) and not isinstance(value, bool)
    return is_number and (kind is Integral or math.isfinite(value))


def sizes_of(op: str, n: int, x: MaskedTensor) -> tuple[int, ...]:
    """The sizes of the last n dims."""
    if x.ndim < n:
        raise ShapeError(f"{op} takes at least {n} dims; the input has shape {tuple(x.shape)}")
    return tuple(x.shape[x.ndim - n :])


def last(n: int) -> tuple[int, ...]:
    return tuple(range(-n, 0))


def refuse_places(op: str, return_indices: bool) -> None:
    if return_indices:
        raise ParameterError(f"{op}: {NO_PLACES}", parameter="return_indices")


# -- to a size ----------------------------------------------------------------------------------------------------


def adaptive_max_pool(n: int, input: Any, output_size: Any, return_indices: bool = False) -> MaskedTensor:
    """(..., output_size): the largest valid cell of windows that cover the last `n` dims."""
    refuse_places(f"adaptive_max_pool{n}d", return_indices)
    return adapted(f"adaptive_max_pool{n}d", "amax", n, operand(input), output_size)


def adaptive_avg_pool(n: int, input: Any, output_size: Any) -> MaskedTensor:
    """(..., output_size): the mean of the valid cells of windows that cover the last `n` dims."""
    return adapted(f"adaptive_avg_pool{n}d", "mean", n, operand(input), output_size)


def adapted(op: str, reduction: str, n: int, x: MaskedTensor, output_size: Any) -> MaskedTensor:
    sizes = sizes_of(op, n, x)
    if isinstance(output_size, list | tuple) and len(output_size) == n:
        output_size = [own if size is None else size for own, size in zip(sizes, output_size, strict=True)]
    wanted = sizes if output_size is None else several(op, "output_size", output_size, n)
    return averaged(op, reduction, x, wanted)


def averaged(op: str, reduction: str, x: MaskedTensor, wanted: Sequence[int]) -> MaskedTensor:
    """The reduction over windows that cover the last dims, as many as are wanted; they may overlap by a cell."""
    n, first = len(wanted), x.ndim - len(wanted)
    sizes = sizes_of(op, n, x)
    if 0 in sizes:
        raise ShapeError(f"{op}: the input has shape {tuple(x.shape)}, and no cells along the last {n} dims")
    check_room(op, math.prod(x.shape[:first]) * math.prod(wanted), "ask for a smaller size")
    for dim, (size, n_windows) in enumerate(zip(sizes, wanted, strict=True), first):
        if size % n_windows == 0:
            x = x.unfold(dim, size // n_windows, size // n_windows)
            continue
        at = torch.arange(n_windows)
        starts, ends = at * size // n_windows, -(-(at + 1) * size // n_windows)
        index = starts[:, None] + torch.arange(int((ends - starts).max()))
        x = gathered(x, dim, index, index < ends[:, None])
    made: MaskedTensor = public(reduction)(x, last(n))
    return made


def interpolate(
    input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> MaskedTensor:  # fmt: skip
    """The nearest cell, masked or valid, at each place of another size; or the mean of the valid cells of each area."""
    op, x = "interpolate", operand(input)
    n = x.ndim - 2
    if n < 1:
        raise ShapeError(f"interpolate takes (batch, channels, ...); the input has shape {tuple(x.shape)}")
    if (size is None) == (scale_factor is None):
        raise ParameterError("interpolate takes size or scale_factor, one of the two", parameter="size")
    if mode not in MODES:
        raise ParameterError(
            f"interpolate: mode={mode} mixes valid cells and masked ones: give {', '.join(MODES[:2])} or {MODES[2]}, or fill "
            "the masked cells first",
            parameter="mode",
        )
    if align_corners is not None or antialias:
        name = "antialias" if align_corners is None else "align_corners"
        raise ParameterError(
            f"interpolate: {name} is for modes that mix cells, not {mode}: leave it out", parameter=name
        )
    if size is not None and recompute_scale_factor:
        raise ParameterError(
            "interpolate: recompute_scale_factor is for a scale_factor; leave it out where size is given",
            parameter="recompute_scale_factor",
        )
    factors = None if scale_factor is None else several(op, "scale_factor", scale_factor, n, kind=Real, least=0)
    sizes = sizes_of(op, n, x)
    if factors is None:
        wanted = several(op, "size", size, n)
    else:
        wanted = tuple(math.floor(float(own) * factor) for own, factor in zip(sizes, factors, strict=True))
        if 0 in wanted:
            raise ParameterError(
                f"interpolate: scale_factor {scale_factor} leaves no cell of {sizes}", parameter="scale_factor"
            )
    if mode == "area" or 0 in sizes:
        return averaged(op, "mean", x, wanted)
    check_room(op, math.prod(x.shape[:2]) * math.prod(wanted), "ask for a smaller size")
    if n == 2 and mode == "nearest" and tuple(wanted) == sizes:  # torch copies then, whatever the factors are
        same: MaskedTensor = x.clone()
        return same
    wide = x.dtype if x.dtype is torch.float64 else torch.float32
    for at in range(n):
        said = (
            {"size": wanted[at]}
            if factors is None
            else {"scale_factor": float(factors[at]), "recompute_scale_factor": recompute_scale_factor}
        )
        x = x.index_select(2 + at, nearest(sizes[at], wide, mode, said).to(x.device))
    return x


MODES = ("nearest", "nearest-exact", "area")
"""Those that mix no valid cell with a masked one."""
DIGIT = 1 << 12
"""Whose square float32 holds: an index is moved as two digits, and so exact in any dim."""


def nearest(n: int, dtype: torch.dtype, mode: str, said: dict[str, Any]) -> Tensor:
    """Which of n cells torch takes for each place: its own function of the indices, as the scale is rounded to the dtype."""
    at = torch.arange(n)
    digits = torch.stack([at // DIGIT, at % DIGIT]).to(dtype)
    moved = functional.interpolate(digits[None], mode=mode, **said)[0].long()
    index: Tensor = moved[0] * DIGIT + moved[1]
    return index


max_pool1d, max_pool2d, max_pool3d = (partial(max_pool, n) for n in (1, 2, 3))
avg_pool1d, avg_pool2d, avg_pool3d = (partial(avg_pool, n) for n in (1, 2, 3))
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = (partial(adaptive_max_pool, n) for n in (1, 2, 3))
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = (partial(adaptive_avg_pool, n) for n in (1, 2, 3))
