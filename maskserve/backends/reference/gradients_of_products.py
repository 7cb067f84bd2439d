"""Gradients of products and of running products. Nothing is divided by a cell, so a 0 among them is right in every derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from maskserve.backends.reference.gradients import Slices, flattened, restored, shown, wide
from maskserve.plan import Plan


def factors(plan: Plan, slices: Slices) -> Tensor:
    """The cells in torch's convention, flattened and wide, hidden ones 1."""
    cells = wide(slices.data).conj()
    return flattened(plan, cells if slices.mask is None else torch.where(slices.mask, cells, 1.0))


def prod(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The product of the other cells."""
    return g * restored(plan, others(factors(plan, slices)))


def others(cells: Tensor) -> Tensor:
    """The product of all cells of the last dim but each one: halves are multiplied up a tree, and their siblings down it."""
    n = cells.shape[-1]
    if n < 2:
        return torch.ones_like(cells)
    half = (n + 1) // 2
    left, right = cells[..., :half], cells[..., half:]
    if n % 2:
        right = torch.cat([right, torch.ones_like(right[..., :1])], -1)
    above = others(left * right)
    return torch.cat([above * right, above * left], -1)[..., :n]


def cumprod(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """The product of the cells before each one, times what follows it: g, and the next cell times what follows that."""
    cells = factors(plan, slices)
    g = flattened(plan, wide(g))
    return restored(plan, times(before(cells), following(g, shifted(cells, 1))))


def before(cells: Tensor) -> Tensor:
    """The product of the cells of the last dim before each one."""
    products, n, step = torch.cat([torch.ones_like(cells[..., :1]), cells[..., :-1]], -1), cells.shape[-1], 1
    while step < n:
        products = torch.cat([products[..., :step], products[..., step:] * products[..., : n - step]], -1)
        step *= 2
    return products


def following(g: Tensor, factor: Tensor) -> Tensor:
    """s with s[i] = g[i] + factor[i] * s[i + 1] along the last dim, 0 beyond its end, by doubling (Hillis & Steele, 1986)."""
    sums, step = g, 1
    while step < g.shape[-1]:
        sums = sums + times(factor, shifted(sums, step))
        factor = factor * shifted(factor, step)
        step *= 2
    return sums


def shifted(cells: Tensor, step: int) -> Tensor:
    """The cells `step` further on along the last dim, 0 beyond its end."""
    return torch.cat([cells[..., step:], torch.zeros_like(cells[..., :step])], -1)


def times(factor: Tensor, g: Tensor) -> Tensor:
    """factor * g; a g of 0 counts for nothing beside a factor that is inf or NaN, where no path may have led."""
    return torch.where(~factor.isfinite() & (g == 0), 0.0, factor) * g


def logcumsumexp(plan: Plan, slices: Slices, g: Tensor) -> Tensor:
    """exp(cell - result), times what follows: g, and what follows the next cell less what that adds to the result."""
    mask = None if slices.mask is None else flattened(plan, slices.mask)
    so_far = latest(flattened(plan, slices.out), mask)
    after = torch.cat([so_far[..., 1:], so_far[..., -1:]], -1)
    sums = following(flattened(plan, g), raised(so_far, after))
    share = shown(slices, raised(slices.data, slices.out))
    return restored(plan, times(flattened(plan, share), sums))


def latest(out: Tensor, mask: Tensor | None) -> Tensor:
    """The result at the last valid cell up to each one; -inf before the first."""
    if mask is None:
        return out
    places = torch.arange(out.shape[-1], device=out.device)
    last = torch.where(mask, places, -1).cummax(-1).values
    return torch.where(last < 0, -torch.inf, out.gather(-1, last.clamp(min=0)))


def raised(a: Tensor, b: Tensor) -> Tensor:
    """exp(a - b) of a <= b: 0 where a is -inf, 1 where both are inf."""
    finite = a.isfinite()
    ends = torch.where(a.isnan(), a, (a > 0).to(a.dtype))
    return torch.where(finite, torch.where(finite, a - b, 0.0).exp(), ends)
