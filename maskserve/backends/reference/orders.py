"""Slices in order, masked cells last; equal cells keep their order, and NaN is beyond inf, as in torch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from maskserve.backends.reference.cells import counted, has_nan, select
from maskserve.backends.reference.scans import Scanned
from maskserve.plan import Plan


def in_order(data: Tensor, mask: Tensor | None, *, descending: bool = False) -> tuple[Tensor, Tensor]:
    """(cells, places) of (outer, n, inner) sorted along n, valid ones first."""
    cells = data.view(torch.uint8).short() if data.dtype is torch.bool else data
    filler = last_of(cells.dtype, descending=descending)
    ordered, places = select(cells, mask, filler).sort(dim=1, descending=descending, stable=True)
    if mask is None:
        return ordered, places
    same = cells.isnan() if filler != filler else cells == filler
    if (same & mask).any():  # a valid cell looks like the filler: valid ones come first
        late = (~mask).gather(1, places).view(torch.uint8).sort(dim=1, stable=True).indices
        ordered, places = ordered.gather(1, late), places.gather(1, late)
    return ordered, places


def cells_in_order(data: Tensor, mask: Tensor | None) -> Tensor:
    """The cells of `in_order` without their places, -0 as 0: whichever of equal cells comes first, the bits are the same."""
    cells = data.view(torch.uint8).short() if data.dtype is torch.bool else data
    cells = select(cells, mask, last_of(cells.dtype, descending=False))
    if cells.is_floating_point():
        cells = cells + 0.0
    if cells.device.type != "cpu" or cells.dtype is torch.bfloat16:
        return cells.sort(dim=1).values
    ordered = np.sort(cells.movedim(1, 2).contiguous().numpy(), axis=2)  # several times faster than a sort with places
    return torch.from_numpy(ordered).movedim(2, 1)


def last_of(dtype: torch.dtype, *, descending: bool) -> float | int:
    """The value that sorts last."""
    if dtype.is_floating_point:
        return -math.inf if descending else math.nan
    info = torch.iinfo(dtype)
    return info.min if descending else info.max


def valid_first(data: Tensor, mask: Tensor | None) -> Tensor:
    """(outer, n, inner) bool: the first `count` places of each slice."""
    return torch.arange(data.shape[1], device=data.device).view(1, -1, 1) < counted(data, mask, 1).unsqueeze(1)


class Sorted:
    """Where the cells in order stand."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        _, places = in_order(data, mask, descending=plan.params["descending"])
        return places, valid_first(data, mask)


class Top:
    """Where the k largest or smallest cells stand."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        k, largest = plan.params["k"], plan.params["largest"]
        if data.element_size() == 8:  # no room for a place beside the value
            places = in_order(data, mask, descending=largest)[1][:, :k]
        else:
            places = keyed(data, mask, largest=largest).topk(k, 1, largest=largest, sorted=True).indices
        return places, valid_first(data, mask)[:, :k]


def keyed(data: Tensor, mask: Tensor | None, *, largest: bool) -> Tensor:
    """int64 keys in the order of cells of at most 32 bits, each with its place: torch's topk may take any of equal keys."""
    if data.is_floating_point():
        bits = (data.float() + 0.0).view(torch.int32)  # -0 is 0
        bits = torch.where(data.isnan(), torch.iinfo(torch.int32).max, bits ^ ((bits >> 31) & 0x7FFF_FFFF))
    else:
        bits = data
    places = torch.arange(data.shape[1], device=data.device).view(1, -1, 1)
    keys = (bits.long() << 31) | (places.flip(1) if largest else places)  # 31: no key is what stands for a masked cell
    info = torch.iinfo(torch.int64)
    return select(keys, mask, info.min if largest else info.max)


def runs(ordered: Tensor) -> Tensor:
    """(outer, n, inner) bool: where a run of equal cells begins; NaN equals NaN."""
    change = ordered[:, 1:] != ordered[:, :-1]
    if ordered.is_floating_point():
        change &= ~(ordered[:, 1:].isnan() & ordered[:, :-1].isnan())
    first = torch.ones_like(ordered[:, :1], dtype=torch.bool)
    return torch.cat([first, change], 1)


def run_starts(ordered: Tensor) -> Tensor:
    """(outer, n, inner): where the run that each cell belongs to begins."""
    places = torch.arange(ordered.shape[1], device=ordered.device).view(1, -1, 1)
    return torch.where(runs(ordered), places, 0).cummax(1).values


class Rank:
    """The rank of each valid cell from 1, by scipy.stats.rankdata's methods; a slice with a valid NaN is NaN."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        ordered, places = in_order(data, mask)
        n = ordered.shape[1]
        at = torch.arange(n, device=data.device).view(1, -1, 1).expand(ordered.shape)
        begins = bounded(runs(ordered), data, mask)
        first = torch.where(begins, at, 0).cummax(1).values
        ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], 1)
        last = torch.where(ends, at, n).flip(1).cummin(1).values.flip(1)
        match plan.params["method"]:
            case "average":
                ranks = (first + last + 2).double() / 2
            case "min":
                ranks = (first + 1).double()
            case "max":
                ranks = (last + 1).double()
            case "dense":
                ranks = begins.cumsum(1).double()
            case _:
                ranks = (at + 1).double()
        result = torch.empty_like(ranks).scatter_(1, places, ranks)
        if data.is_floating_point():
            result = torch.where(has_nan(data, mask, 1), torch.nan, result)
        return result, mask


def bounded(begins: Tensor, data: Tensor, mask: Tensor | None) -> Tensor:
    """Runs that end with the last valid cell, even where a masked filler equals it."""
    if mask is None:
        return begins
    valid = valid_first(data, mask)
    border = torch.cat([torch.zeros_like(valid[:, :1]), valid[:, :-1] & ~valid[:, 1:]], 1)
    return begins | border
