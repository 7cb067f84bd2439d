"""Memory that cells are read into."""

from __future__ import annotations

from math import prod
from threading import get_ident

import torch
from torch import Tensor


class Pages:
    """Memory for windows, each in memory of its own."""

    def empty(self, name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype)


class KeptPages(Pages):
    """Memory that each thread reads its next window into, over the last one: fresh pages cost as much as copying into them."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str], Tensor] = {}

    def empty(self, name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        n_bytes, whose = prod(sizes) * dtype.itemsize, (get_ident(), name)
        kept = self.kept.get(whose)
        if kept is None or kept.numel() < n_bytes:
            kept = self.kept[whose] = torch.empty(n_bytes, dtype=torch.uint8)
        return kept[:n_bytes].view(dtype).view(sizes)
