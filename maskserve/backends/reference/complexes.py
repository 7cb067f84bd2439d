"""Complex cells by way of real ones: (plan, data, mask, weights, compute) -> (values, mask).

Sums and means are those of the parts; spreads, norms and counts are real from the start. `compute` runs a real plan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from maskserve.backends.reference.cells import canonical, halvings, rounded, select
from maskserve.dtypes import DType, f32, f64
from maskserve.ops.rows import Reduction
from maskserve.plan import Plan
from maskserve.plan import plan as plan_of

Masked = tuple[Tensor, Tensor]
Weights = tuple[Tensor, Tensor | None]
Compute = Callable[[Plan, Tensor, Tensor | None, Weights | None], Masked]


@lru_cache(maxsize=1024)
def real_plan(plan: Plan, shape: tuple[int, ...], dtype: DType) -> Plan:
    """The plan of a complex one's real cells, in float64 where the result is no count."""
    dims: tuple[int, ...] | int = plan.dims if isinstance(plan.row, Reduction) else plan.dims[0]
    said = {name: value for name, value in plan.params.items() if name not in ("dim", "dtype", "nan")}
    if not plan.result.is_integral:
        said["dtype"] = f64
    return plan_of(plan.row, (*said.items(), ("dim", dims)), shape, dtype, plan.device)


def on_parts(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The op on real and imaginary parts, side by side in a new last dim."""
    parts = torch.view_as_real(data.resolve_conj().resolve_neg())
    if weights is not None:
        weights = (weights[0].unsqueeze(-1), None if weights[1] is None else weights[1].unsqueeze(-1))
    real = real_plan(plan, (*plan.shape, 2), f64 if parts.dtype is torch.float64 else f32)
    values, valid = compute(real, parts, None if mask is None else mask.unsqueeze(-1), weights)
    return values, valid[..., 0]


def by_parts(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """Sums and means."""
    values, valid = on_parts(plan, data, mask, weights, compute)
    return finished(plan, torch.view_as_complex(values.contiguous()), valid)


def spread(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The variance: those of the parts added."""
    values, valid = on_parts(plan, data, mask, weights, compute)
    return finished(plan, values.sum(-1), valid)


def root_of_spread(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The standard deviation: the root of those of the parts, squared and added."""
    values, valid = on_parts(plan, data, mask, weights, compute)
    return finished(plan, values.norm(dim=-1), valid)


def magnitude(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The op on absolute values: norms and counts."""
    return finished(plan, *of_magnitudes(plan, data, mask, compute))


def of_magnitudes(plan: Plan, data: Tensor, mask: Tensor | None, compute: Compute) -> Masked:
    return compute(real_plan(plan, plan.shape, f64), data.to(torch.complex128).abs(), mask, None)


def product(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The product, by halving."""
    _, valid = of_magnitudes(plan, data, mask, compute)
    kept = [dim for dim in range(data.ndim) if dim not in plan.dims]
    wide = select(data.to(torch.complex128), None if mask is None else mask.expand(data.shape), 1)
    cells = wide.permute(*kept, *plan.dims).reshape(valid.numel(), plan.n_reduced).clone()
    for h, k in halvings(cells.shape[1]):
        cells[:, :k] *= cells[:, h : h + k]
    return finished(plan, cells[:, 0] if cells.shape[1] else cells.new_ones(valid.numel()), valid)


def running_product(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The running product in complex128."""
    valid = torch.ones(data.shape, dtype=torch.bool, device=data.device) if mask is None else mask.expand(data.shape)
    return finished(plan, torch.cumprod(select(data.to(torch.complex128), valid, 1), plan.dims[0]), valid.clone())


def logsumexp(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """The principal log of the sum of exponentials, in complex128."""
    _, valid = of_magnitudes(plan, data, mask, compute)
    nothing = torch.full((), -torch.inf, dtype=torch.complex128, device=data.device)
    wide = data.to(torch.complex128)
    cells = wide if mask is None else torch.where(mask, wide, nothing)
    return finished(plan, torch.logsumexp(cells, plan.dims), valid)


def normalized(plan: Plan, data: Tensor, mask: Tensor | None, weights: Weights | None, compute: Compute) -> Masked:
    """Cells divided by the norm of their magnitudes: each keeps its angle."""
    scaled, valid = of_magnitudes(plan, data, mask, compute)
    wide = data.to(torch.complex128)
    size = wide.abs()
    return finished(plan, wide * torch.where(size == 0, 0.0, scaled / size), valid)


def finished(plan: Plan, values: Tensor, valid: Tensor) -> Masked:
    """In the result's dtype and shape, hidden cells 0."""
    dtype = getattr(torch, plan.result.torch)
    # torch warns of the imaginary part that a real dtype= leaves behind
    values = canonical(rounded(values.to(torch.float64), dtype)) if plan.result.is_float else values.to(dtype)
    valid = valid.reshape(plan.out_shape)
    return select(values.reshape(plan.out_shape), valid), valid
