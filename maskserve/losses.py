"""Losses over valid cells: the loss of each cell or sample, then its sum or mean over those that are valid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskserve.backends.reference import kernel
from maskserve.dtypes import WIDENED
from maskserve.errors import DataError, DtypeError, ShapeError
from maskserve.functions import elementwise, public
from maskserve.making import as_masked_tensor, operand
from maskserve.ops.parameters import Params
from maskserve.ops.rows import Elementwise, Loss
from maskserve.params import accept, resolve
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of


def compute(row: Loss, operands: tuple[Any, ...], said: dict[str, Any]) -> MaskedTensor:
    """The loss, or the losses."""
    tensors = {name: value for name, value in said.items() if isinstance(value, Tensor | MaskedTensor)}
    params = resolve(row, {name: value for name, value in said.items() if name not in tensors and value is not None})
    weight = tensors.get("weight")
    if row.cells is not None:
        third = (tensors.get(row.third),) if row.third else ()
        losses = of_cells(row.cells, (*laid(row, operands), *third), params)
    else:
        losses, weight = kernel(row.samples)(row, operands, weight, params)
    if weight is None or not row.weighs_mean or params["reduction"] != "mean":
        losses = losses if weight is None else times(losses, weight)
        weight = None
    if row.is_mean_of_classes:
        losses = public("mean")(losses, -1)
    return reduced(losses, weight, params["reduction"], params["dim"])


def laid(row: Loss, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands as tensors and numbers: an own value for each row has a last dim of size 1."""
    given: list[Any] = [each if isinstance(each, int | float | Tensor) else operand(each) for each in operands]
    if row.each_row:
        at = row.operands.index(row.each_row)
        if is_one_a_row(given[at], given[0]):
            given[at] = given[at].unsqueeze(-1)
    return tuple(given)


def is_one_a_row(rows: Any, cells: Any) -> bool:
    """Whether an operand lacks the last dim: of tensors, and of what is known of them before."""
    return not isinstance(rows, int | float) and rows.shape != cells.shape and rows.shape == cells.shape[:-1]


def of_cells(cells: Elementwise, operands: tuple[Any, ...], params: Params) -> MaskedTensor:
    """The loss of each cell."""
    first, *others = operands
    others = [of_number(other, first) if isinstance(other, int | float) else other for other in others]
    return elementwise(cells, (first, *others), None, None, {p.name: params[p.name] for p in cells.parameters})


def of_number(target: int | float, given: MaskedTensor) -> Tensor:
    """A number beside cells: in their dtype, or in that of both together where they are whole and it is not."""
    cells = given._data
    dtype = torch.result_type(cells, target)
    if isinstance(target, float):
        return torch.tensor(target, dtype=torch.float64, device=cells.device).to(dtype)
    if not (dtype.is_floating_point or dtype_of(cells).holds(target)):
        raise DtypeError(
            f"the target {target} does not fit {dtype_of(cells).name}; convert the input first, to a dtype that holds it"
        )
    return torch.tensor(float(target) if dtype.is_floating_point else target, dtype=dtype, device=cells.device)


def reduced(losses: MaskedTensor, weight: Any, reduction: str, dim: Any) -> MaskedTensor:
    """The losses, or their sum or mean over the valid ones."""
    made: MaskedTensor
    if reduction == "none":
        return losses
    if reduction == "mean":
        made = public("mean")(losses, dim, weights=None if weight is None else spread(weight, losses))
        return made
    made = public("sum")(losses, dim)
    if reduction == "batchmean":
        mask = losses.get_mask()
        rows = mask.flatten(1).any(1).sum() if losses.ndim > 1 else mask.sum()
        made = public("div")(made, max(int(rows), 1))
    return made


def spread(weight: Any, losses: MaskedTensor) -> MaskedTensor:
    made: MaskedTensor = operand(weight).expand(losses.shape)
    return made


# -- of classes ---------------------------------------------------------------------------------------------------


def of_classes(
    row: Loss, operands: tuple[Any, ...], weight: Any, params: dict[str, Any]
) -> tuple[MaskedTensor, MaskedTensor | None]:
    """The loss of each sample, and what it counts for in the mean."""
    given, target = operands
    accept(row, dtype_of(given._data))
    if not given.ndim:
        raise ShapeError(f"{row.name} takes classes along dim 1, or along the only dim; the input has no dim")
    dim = min(given.ndim - 1, 1)
    logs: MaskedTensor = public("log_softmax")(given, dim) if row.of_logits else given
    wanted = operand(target)
    per_class = None if weight is None else of_each_class(row, weight, logs, dim)
    smoothing = params.get("label_smoothing", 0.0)
    if wanted._data.is_floating_point():
        return of_probabilities(row, logs, wanted, per_class, dim, smoothing), None
    right = indices(row, logs, wanted, dim, params["ignore_index"])
    losses: MaskedTensor = -public("gather")(logs, dim, right).squeeze(dim)
    counts = None
    if per_class is not None:
        counts = as_masked_tensor(per_class.expand(logs.shape).gather(dim, right.to_tensor(0)).squeeze(dim))
    if not smoothing:
        return losses, counts
    share = smoothing / logs.get_mask().sum(dim).clamp(min=1).to(logs.dtype)
    weighed = logs if per_class is None else times(logs, per_class)
    evenly = times(-public("sum")(weighed, dim), share)
    own = losses if counts is None else times(losses, counts)
    smooth: MaskedTensor = public("add")(times(own, 1 - smoothing), evenly)
    return (smooth, None) if counts is None else (public("div")(smooth, counts), counts)


def times(tensor: MaskedTensor, other: Any) -> MaskedTensor:
    made: MaskedTensor = public("mul")(tensor, other)
    return made


def of_probabilities(
    row: Loss, logs: MaskedTensor, wanted: MaskedTensor, per_class: Tensor | None, dim: int, smoothing: float
) -> MaskedTensor:
    """The cross entropies with targets that are probabilities, one for each class."""
    if not row.of_logits:
        raise DtypeError(
            f"{row.name} takes targets that are classes, whole numbers; cross_entropy takes probabilities too"
        )
    if wanted.shape != logs.shape:
        raise ShapeError(
            f"{row.name}: targets that are probabilities have the input's shape {tuple(logs.shape)}, not {tuple(wanted.shape)}"
        )
    if smoothing:
        share = smoothing / logs.get_mask().sum(dim, keepdim=True).clamp(min=1).to(logs.dtype)
        wanted = public("add")(times(wanted, 1 - smoothing), share)
    terms = times(logs, wanted)
    made: MaskedTensor = -public("sum")(terms if per_class is None else times(terms, per_class), dim)
    return made


def of_each_class(row: Loss, weight: Any, logs: MaskedTensor, dim: int) -> Tensor:
    """One weight a class, along their dim."""
    made = operand(weight)
    if made.shape != (logs.shape[dim],):
        raise ShapeError(
            f"{row.name}: weight has shape {tuple(made.shape)}, and there are {logs.shape[dim]} classes: give one for each"
        )
    if made._held is not None and not bool(made._full_mask().all()):
        raise DataError(f"{row.name}: the weight of a class is masked: give one for each")
    wide = WIDENED.get(dtype_of(made._data))
    cells = made._data if wide is None else made._data.to(getattr(torch, wide.torch))
    return cells.reshape([-1 if d == dim else 1 for d in range(logs.ndim)])


def indices(row: Loss, logs: MaskedTensor, wanted: MaskedTensor, dim: int, ignored: int) -> MaskedTensor:
    """The target classes along a dim of size 1, masked where they are ignored."""
    if wanted._data.dtype is torch.bool or wanted._data.is_complex():
        raise DtypeError(f"{row.name}: targets are classes, whole numbers, not {dtype_of(wanted._data).name}")
    shape = tuple(n for d, n in enumerate(logs.shape) if d != dim)
    if wanted.shape != shape:
        raise ShapeError(
            f"{row.name}: targets have shape {tuple(wanted.shape)}, the samples {shape}; they must be equal"
        )
    cells = wanted._data.long()
    valid = wanted._full_mask() & (cells != int(ignored))
    n_classes = logs.shape[dim]
    wrong = valid & ((cells < 0) | (cells >= n_classes))
    if bool(wrong.any()):
        raise DataError(
            f"{row.name}: a target is class {int(cells[wrong][0])}; there are {n_classes}, from 0: mask it, or give ignore_index"
        )
    safe = torch.where(valid, cells, 0)
    made: MaskedTensor = MaskedTensor._of(safe, valid).unsqueeze(dim)
    return made


# -- of vectors ---------------------------------------------------------------------------------------------------


def of_triplets(row: Loss, operands: tuple[Any, ...], weight: Any, params: dict[str, Any]) -> tuple[MaskedTensor, None]:
    """How much farther than margin allows the anchor is from the positive one than from the negative one.

    Distances are compared, so all are over the coordinates that are valid in the three vectors.
    """
    anchor, positive, negative = seen_together(row, operands)
    measure = {name: params[name] for name in ("p", "eps")}
    near, far = (public("pairwise_distance")(anchor, other, **measure) for other in (positive, negative))
    if params["swap"]:
        far = public("minimum")(far, public("pairwise_distance")(positive, negative, **measure))
    return above_0(public("add")(public("sub")(near, far), params["margin"])), None


def of_angles(row: Loss, operands: tuple[Any, ...], weight: Any, params: dict[str, Any]) -> tuple[MaskedTensor, None]:
    """1 less the cosine of two vectors where target is 1, and the cosine beyond margin where it is -1."""
    wanted = operand(operands[2])
    one, other = seen_together(row, operands[:2])
    if wanted.ndim != one.ndim - 1:
        raise ShapeError(
            f"{row.name}: target has shape {tuple(wanted.shape)}, the vectors {tuple(one.shape)}: give one a vector"
        )

    squares = [public("add")(public("sum")(times(x, x), -1), LEAST_SQUARE) for x in (one, other)]
    cosine = public("div")(public("sum")(times(one, other), -1), public("sqrt")(times(*squares)))
    apart = public("where")(public("eq")(wanted, -1), above_0(public("sub")(cosine, params["margin"])), 0)
    return public("where")(public("eq")(wanted, 1), public("rsub")(cosine, 1), apart), None


LEAST_SQUARE = 1e-12
"""What torch adds to the squares of lengths."""


def seen_together(row: Loss, vectors: tuple[Any, ...]) -> list[MaskedTensor]:
    """The vectors in one shape, each masked where one of them is."""
    made = [operand(vector) for vector in vectors]
    try:
        shape = torch.broadcast_shapes(*[vector.shape for vector in made])
    except RuntimeError:
        shapes = ", ".join(str(tuple(vector.shape)) for vector in made)
        raise ShapeError(f"{row.name}: shapes {shapes} do not broadcast; sizes must be equal or 1") from None
    if not shape:
        raise ShapeError(f"{row.name} takes vectors, which lie along a dim; its operands have none")
    spread_out: list[MaskedTensor] = [vector.expand(shape) for vector in made]
    valid = spread_out[0].get_mask()
    for vector in spread_out[1:]:
        valid = valid & vector.get_mask()
    return [public("mask")(vector, valid=valid) for vector in spread_out]


def above_0(tensor: MaskedTensor) -> MaskedTensor:
    made: MaskedTensor = public("clamp")(tensor, min=0)
    return made
