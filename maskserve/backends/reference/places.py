"""Where cells stand: the first and last valid one, the extent, running extremes, and masked cells that are filled.

A row that picks has kernels that give places within the slice; the engine takes the cells that stand there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.cells import Parts, counted, select
from maskserve.backends.reference.reductions import Largest, Smallest
from maskserve.backends.reference.scans import Scanned
from maskserve.errors import IntegerOverflowError
from maskserve.plan import Plan

CELLS = 2


class First:
    """(count, best): the first valid cell."""

    exact = True

    @classmethod
    def lift(cls, plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        count = counted(data, mask, CELLS)
        n = data.shape[CELLS]
        if not n:
            return {"count": count, "best": torch.zeros(count.shape, dtype=data.dtype, device=data.device)}
        if mask is None:
            return {"count": count, "best": data.select(CELLS, cls.plain(n)).clone()}
        best = data.gather(CELLS, cls.place(mask).unsqueeze(CELLS)).squeeze(CELLS)
        return {"count": count, "best": select(best, count > 0)}

    @classmethod
    def merge(cls, a: Parts, b: Parts) -> Parts:
        return {"count": a["count"] + b["count"], "best": torch.where(a["count"] > 0, a["best"], b["best"])}

    @staticmethod
    def plain(n: int) -> int:
        """The place where every cell is valid."""
        return 0

    @staticmethod
    def place(mask: Tensor) -> Tensor:
        return mask.view(torch.uint8).argmax(CELLS)  # the first of equal ones


class Last(First):
    """(count, best): the last valid cell."""

    @classmethod
    def merge(cls, a: Parts, b: Parts) -> Parts:
        return First.merge(b, a)

    @staticmethod
    def plain(n: int) -> int:
        return n - 1

    @staticmethod
    def place(mask: Tensor) -> Tensor:
        return mask.shape[CELLS] - 1 - mask.flip(CELLS).view(torch.uint8).argmax(CELLS)


class Extent:
    """(count, low, high): the smallest and the largest valid cell."""

    exact = True

    @staticmethod
    def lift(plan: Plan, data: Tensor, mask: Tensor | None) -> Parts:
        low, high = Smallest.lift(plan, data, mask), Largest.lift(plan, data, mask)
        return {"count": low["count"], "low": low["best"], "high": high["best"]}

    @staticmethod
    def merge(a: Parts, b: Parts) -> Parts:
        low, high = (
            kind.merge({"count": a["count"], "best": a[part]}, {"count": b["count"], "best": b[part]})
            for kind, part in ((Smallest, "low"), (Largest, "high"))
        )
        return {"count": low["count"], "low": low["best"], "high": high["best"]}


def finalize_ptp(plan: Plan, parts: Parts) -> Tensor:
    low, high = parts["low"], parts["high"]
    if plan.dtype.is_float:
        return high.double() - low.double()
    extent = high.long() - low.long()
    if ((extent < 0) | (extent > torch.iinfo(getattr(torch, plan.result.torch)).max)).any():
        raise IntegerOverflowError(
            f"{plan.row.name}: a range does not fit {plan.result.name}; convert the data to a wider dtype first",
            parameter="dtype",
        )
    return extent


class CumulativeLargest:
    """The place of the largest valid cell so far, the last of equal ones; NaN wins."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        cells = select(data, mask, Largest.worst(data.dtype))
        return torch.cummax(plain_order(cells), 1).indices, mask


class CumulativeSmallest:
    """The place of the smallest valid cell so far, the last of equal ones; NaN wins."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        cells = select(data, mask, Smallest.worst(data.dtype))
        return torch.cummin(plain_order(cells), 1).indices, mask


def plain_order(cells: Tensor) -> Tensor:
    """Cells that torch can order: bools as bytes."""
    return cells.view(torch.uint8) if cells.dtype is torch.bool else cells


class Filled:
    """Masked cells become the value."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        value = plan.params["value"]
        if not plan.flipped:
            return select(data, mask, value), None
        sign = torch.iinfo(torch.int64).min
        return (select(data, mask, int(value) + sign) ^ sign).view(torch.uint64), None


class FilledForward:
    """The place of the last valid cell up to here."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        places = torch.arange(data.shape[1], device=data.device).view(1, -1, 1).expand(data.shape)
        if mask is None:
            return places, None
        latest = torch.where(mask, places, -1).cummax(1).values
        valid = latest >= 0
        if (limit := plan.params["limit"]) is not None:
            valid &= places - latest <= limit
        return latest.clamp(min=0), valid


class FilledBackward:
    """The place of the next valid cell from here on."""

    @staticmethod
    def scan(plan: Plan, data: Tensor, mask: Tensor | None) -> Scanned:
        places, valid = FilledForward.scan(plan, data.flip(1), None if mask is None else mask.flip(1))
        return data.shape[1] - 1 - places.flip(1), None if valid is None else valid.flip(1)
