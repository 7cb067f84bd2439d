"""Gradients of norms and of cells divided by them; a cell of 0 takes none but for the second derivative of order 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskserve.backends.reference.gradients import Slices, along, counting, inner, ratio, wide
from maskserve.plan import Plan


def norm(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """g along the direction in which the norm grows fastest; 0 where the norm is 0, and for order 0."""
    return g * direction(plan, slices, size(plan, slices))


def normalize(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """What is left of g, divided by the norm, without what turns into a larger norm; g / eps where the norm is smaller."""
    length, eps = size(plan, slices), plan.params["eps"]
    divisor = length.clamp(min=eps)
    g = wide(g)
    grown = along(plan, inner(g, wide(slices.data) / divisor)) / divisor
    return g / divisor - torch.where(length >= eps, grown, 0.0) * direction(plan, slices, length)


def size(plan: Plan, slices: Slices) -> Tensor:
    """The norms in float64, twice differentiable; scaled by the cell that counts most, which changes no derivative."""
    ord = float(plan.params["ord"])
    if not slices.data.numel():
        return along(plan, slices.data.abs().double())
    cells = wide(slices.data)
    counts = counting(slices) & (cells != 0)
    lengths = torch.where(counts, torch.where(counts, cells, 1.0).abs(), 0.0)
    if ord == 0:
        return along(plan, counts.double())
    if math.isinf(ord):
        return most(plan, slices, lengths, ord)
    reach = most(plan, slices, lengths.detach(), ord)
    scale = torch.where(reach.isfinite() & (reach != 0), reach, 1.0)
    powers = torch.where(counts, torch.where(counts, lengths / scale, 1.0).pow(ord), 0.0)
    total = along(plan, powers)
    nothing = (total == 0) | (reach == 0)
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, total).pow(1 / ord) * scale)


def most(plan: Plan, slices: Slices, lengths: Tensor, ord: float) -> Tensor:
    """The largest |cell|, or for a negative order the smallest."""
    if ord > 0:
        return lengths.amax(plan.dims, keepdim=True)
    return torch.where(counting(slices), lengths, math.inf).amin(plan.dims, keepdim=True)


def direction(plan: Plan, slices: Slices, length: Tensor) -> Tensor:
    """The derivative of the norm by each cell: its sign times (|cell| / norm)^(ord - 1)."""
    ord, cells = float(plan.params["ord"]), wide(slices.data)
    if ord == 2:
        return ratio(cells, length)
    good = counting(slices) & (cells != 0) & (length != 0)
    cells = torch.where(good, cells, 1.0)
    if math.isinf(ord):
        furthest = good & (cells.abs() == length)
        share = furthest.double() / along(plan, furthest).clamp(min=1)
    else:
        share = (cells.abs() / torch.where(good, length, 1.0)).pow(ord - 1) * (ord != 0)
    return torch.where(good, cells.sgn() * share, 0.0)
