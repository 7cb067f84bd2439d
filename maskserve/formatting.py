"""Masked tensors as text and as nested lists: `--` and None for a masked cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskserve.tracing import in_transform

EDGE = 3
SUMMARIZED = 1000


def nested(data: Tensor, mask: Tensor | None) -> Any:
    """Nested lists of Python numbers, None where masked."""
    if mask is None:
        return data.tolist()
    return _with_none(data.tolist(), mask.expand(data.shape).tolist())


def _with_none(values: Any, valid: Any) -> Any:
    if isinstance(valid, list):
        return [_with_none(v, m) for v, m in zip(values, valid, strict=True)]
    return values if valid else None


def text_of(data: Tensor, mask: Tensor | None) -> str:
    """Like torch's own text, with `--` for masked cells; long dims show their edges.

    >>> print(text_of(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])))
    masked_tensor([[1.0000,     --]])
    """
    if in_transform():  # whose tensors have no cells to show
        return f"masked_tensor({data}, mask={mask})"
    valid = torch.ones(data.shape, dtype=torch.bool) if mask is None else mask.expand(data.shape)
    cells = data.detach()
    brief = cells.numel() > SUMMARIZED
    words = _words(cells, valid, brief)
    width = max((len(word) for word in _flat(words)), default=0)
    body = _joined(words, width, len("masked_tensor(")) if cells.ndim else _flat(words)[0]
    default = cells.dtype in (torch.get_default_dtype(), torch.int64, torch.bool)
    extras = "" if default and cells.numel() else f", dtype={cells.dtype}"
    extras += "" if cells.device.type == "cpu" else f", device='{cells.device}'"
    extras += f", size={tuple(cells.shape)}" if not cells.numel() else ""
    extras += ", requires_grad=True" if data.requires_grad else ""
    return f"masked_tensor({body}{extras})"


def _words(cells: Tensor, valid: Tensor, brief: bool) -> Any:
    if not cells.ndim:
        return _word(cells, valid)
    n = len(cells)
    if brief and n > 2 * EDGE:
        shown = [*range(EDGE), *range(n - EDGE, n)]
        words = [_words(cells[i], valid[i], brief) for i in shown]
        return [*words[:EDGE], "...", *words[EDGE:]]
    return [_words(cells[i], valid[i], brief) for i in range(n)]


def _word(cell: Tensor, valid: Tensor) -> str:
    if not valid:
        return "--"
    value = cell.item()
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-4 <= abs(value) < 1e6 or value != value else f"{value:.4e}"


def _flat(words: Any) -> list[str]:
    return [words] if isinstance(words, str) else [word for row in words for word in _flat(row)]


def _joined(words: Any, width: int, indent: int) -> str:
    if all(isinstance(word, str) for word in words):
        return "[" + ", ".join(word.rjust(width) for word in words) + "]"
    rows = [row if isinstance(row, str) else _joined(row, width, indent + 1) for row in words]
    return "[" + (",\n" + " " * (indent + 1)).join(rows) + "]"


def text_of_stored(indices: Tensor, cells: Any, extras: str) -> str:
    """The stored cells of a sparse tensor of many cells by their indices, the first and the last of them."""
    n = indices.shape[1]
    shown = list(range(n)) if n <= 2 * EDGE else [*range(EDGE), *range(n - EDGE, n)]
    data, valid = cells._data.detach(), cells._full_mask()
    words = [f"{tuple(indices[:, i].tolist())}: {_word(data[i], valid[i])}" for i in shown]
    if n > len(shown):
        words.insert(EDGE, "...")
    grad = ", requires_grad=True" if cells.requires_grad else ""
    return f"masked_tensor({{{', '.join(words)}}}, {extras}, nnz={n}, dtype={data.dtype}{grad})"
