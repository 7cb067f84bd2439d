"""Pooling in torch's words: the largest or the mean of the valid cells of each window, and cells repeated or left out.

A window without a valid cell is masked; torch's padding is of no cells, or of zeros that the mean counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskserve.errors import ParameterError, ShapeError
from maskserve.functions import public
from maskserve.making import operand
from maskserve.tensor import MaskedTensor

Sizes = int | Sequence[int]
NO_PLACES = "give return_indices=False: where a window's largest cell stands, argmax of a slice of the tensor tells"


def max_pool(
    n: int, input: Any, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> MaskedTensor:  # fmt: skip
    """The largest valid cell of each window along the last `n` dims."""
    refuse_places(f"max_pool{n}d", return_indices)
    made: MaskedTensor = public("amax")(
        windows(f"max_pool{n}d", n, operand(input), kernel_size, stride, padding, dilation, ceil_mode), last(n)
    )
    return made


def avg_pool(
    n: int, input: Any, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> MaskedTensor:  # fmt: skip
    """The mean of the valid cells of each window along the last `n` dims; zeros of the padding count, as in torch."""
    name = f"avg_pool{n}d"
    if divisor_override is not None:
        raise ParameterError(f"{name}: divisor_override fixes what the valid cells are counted for: leave it out")
    x = operand(input)
    given = windows(name, n, x, kernel_size, stride, padding, 1, ceil_mode)
    made: MaskedTensor = public("mean")(given, last(n))
    if not count_include_pad or not any(several(padding, n)):
        return made
    ones = torch.ones(x.shape[-n:], dtype=torch.bool, device=x.device)
    edges = windows(name, n, operand(ones), kernel_size, stride, padding, 1, ceil_mode, padding_is_valid=True)
    n_zeros = (edges.get_mask() & ~edges.get_data()).sum(last(n))
    n_valid = given.get_mask().sum(last(n))
    share: MaskedTensor = public("mul")(made, n_valid.to(x.dtype) / (n_valid + n_zeros).clamp(min=1).to(x.dtype))
    return share


def windows(
    name: str, n: int, x: MaskedTensor, kernel_size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes,
    ceil_mode: bool, *, padding_is_valid: bool = False,
) -> MaskedTensor:  # fmt: skip
    """(..., places along each of the last n dims, cells of each of the n dims of a window)."""
    if x.ndim < n:
        raise ShapeError(f"{name} takes at least {n} dims; the input has shape {tuple(x.shape)}")
    kernel, pads, steps = several(kernel_size, n), several(padding, n), several(dilation, n)
    strides = kernel if stride is None or stride == () or stride == [] else several(stride, n)
    if min(*kernel, *strides, *steps) < 1 or any(
        pad < 0 or 2 * pad > size for pad, size in zip(pads, kernel, strict=True)
    ):
        raise ParameterError(
            f"{name}: kernel {kernel}, stride {strides}, dilation {steps} must be at least 1, padding {pads} at most half of "
            "the kernel"
        )
    sizes = tuple(x.shape[-n:])
    spans = [step * (size - 1) + 1 for size, step in zip(kernel, steps, strict=True)]
    if any(pads):
        edges = [pad for pad in reversed(pads) for _ in range(2)]
        x = public("pad")(x, edges, value=0 if padding_is_valid else None)
    for at in range(n):
        n_places = places(sizes[at] + 2 * pads[at] - spans[at], strides[at], ceil_mode, sizes[at] + pads[at])
        if n_places < 1:
            raise ShapeError(f"{name}: the kernel {kernel} is larger than the input's {sizes}, padded by {pads}")
        beyond = (n_places - 1) * strides[at] + spans[at] - x.shape[at - n]
        if beyond > 0:  # new cells are masked
            x = public("pad")(x, [0, 0] * (n - 1 - at) + [0, beyond])
    first = x.ndim - n
    for at in range(n):
        x = x.unfold(first + at, spans[at], strides[at])
        x = x[..., :: steps[at]]
    return x


def places(room: int, stride: int, ceil_mode: bool, end: int) -> int:
    """How many windows there are; the last one starts within the cells or the padding before them."""
    if room < 0 and not ceil_mode:
        return 0
    n = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    return n - 1 if ceil_mode and (n - 1) * stride >= end else n


def several(sizes: Sizes, n: int) -> tuple[int, ...]:
    given = (sizes,) * n if isinstance(sizes, int) else tuple(sizes)
    return given * n if len(given) == 1 else given


def last(n: int) -> tuple[int, ...]:
    return tuple(range(-n, 0))


def refuse_places(name: str, return_indices: bool) -> None:
    if return_indices:
        raise ParameterError(f"{name}: {NO_PLACES}", parameter="return_indices")


# -- to a size ----------------------------------------------------------------------------------------------------


def adaptive_max_pool(n: int, input: Any, output_size: Any, return_indices: bool = False) -> MaskedTensor:
    """(..., output_size): the largest valid cell of windows that cover the last `n` dims."""
    refuse_places(f"adaptive_max_pool{n}d", return_indices)
    return adapted(f"adaptive_max_pool{n}d", "amax", n, operand(input), output_size)


def adaptive_avg_pool(n: int, input: Any, output_size: Any) -> MaskedTensor:
    """(..., output_size): the mean of the valid cells of windows that cover the last `n` dims."""
    return adapted(f"adaptive_avg_pool{n}d", "mean", n, operand(input), output_size)


def adapted(name: str, op: str, n: int, x: MaskedTensor, output_size: Any) -> MaskedTensor:
    if x.ndim < n:
        raise ShapeError(f"{name} takes at least {n} dims; the input has shape {tuple(x.shape)}")
    sizes = x.shape[-n:]
    wanted = [own if size is None else size for own, size in zip(sizes, as_list(output_size, n), strict=True)]
    if min(wanted) < 1:
        raise ParameterError(f"{name}: output_size {tuple(wanted)} must be at least 1", parameter="output_size")
    cuts = [list(parts(own, size)) for own, size in zip(sizes, wanted, strict=True)]
    made = [public(op)(x[(..., *box)], last(n)) for box in itertools.product(*cuts)]
    joined: MaskedTensor = public("stack")(made, -1).reshape(*x.shape[:-n], *wanted)
    return joined


def as_list(said: Any, n: int) -> list[Any]:
    """What was said for each of n dims, or once for all."""
    return list(said) if isinstance(said, list | tuple) else [said] * n


def parts(n: int, n_parts: int) -> Iterable[slice]:
    """torch's windows: they may overlap by a cell."""
    return (slice(i * n // n_parts, -(-(i + 1) * n // n_parts)) for i in range(n_parts))


def interpolate(
    input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> MaskedTensor:  # fmt: skip
    """The nearest cell, masked or valid, at each place of another size; or the mean of the valid cells of each area."""
    x = operand(input)
    n = x.ndim - 2
    if n < 1:
        raise ShapeError(f"interpolate takes (batch, channels, ...); the input has shape {tuple(x.shape)}")
    if (size is None) == (scale_factor is None):
        raise ParameterError("interpolate takes size or scale_factor, one of the two", parameter="size")
    if mode == "area":
        shape = resized(torch.zeros(x.shape[2:], device="meta")[None, None], size, scale_factor, "nearest").shape[2:]
        return adaptive_avg_pool(n, x, shape)
    if mode not in ("nearest", "nearest-exact"):
        raise ParameterError(
            f"interpolate: mode={mode} mixes valid cells and masked ones: give nearest, nearest-exact or area, or fill the "
            "masked cells first",
            parameter="mode",
        )
    for at in range(n):
        own = torch.arange(x.shape[2 + at], dtype=torch.float64)[None, None]
        own_size, factor = (None if given is None else as_list(given, n)[at] for given in (size, scale_factor))
        index = resized(own, own_size, factor, mode)[0, 0].long().to(x.device)
        x = x.index_select(2 + at, index)
    return x


def resized(cells: Tensor, size: Any, scale_factor: Any, mode: str) -> Tensor:
    made: Tensor = functional.interpolate(cells, size, scale_factor, mode)
    return made


max_pool1d, max_pool2d, max_pool3d = (partial(max_pool, n) for n in (1, 2, 3))
avg_pool1d, avg_pool2d, avg_pool3d = (partial(avg_pool, n) for n in (1, 2, 3))
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = (partial(adaptive_max_pool, n) for n in (1, 2, 3))
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = (partial(adaptive_avg_pool, n) for n in (1, 2, 3))
