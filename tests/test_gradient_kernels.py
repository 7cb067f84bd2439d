"""Gradient kernels beside torch.autograd of plain formulas on the valid cells of each slice, compressed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from maskserve import OPS, dtypes, engine
from maskserve.backends.reference import kernel
from maskserve.backends.reference.gradients import Slices
from maskserve.ops.rows import Normalization, Reduction, Scan, Whole
from maskserve.plan import Plan
from tests.samples import SLICED, needed, plan_of

NOT_DIFFERENTIABLE = {"rank"}
"""Rows of float results that carry no gradient: steps."""

ROWS = [row for row in SLICED if row.vjp]
WHOLES = [row for row in OPS.values() if isinstance(row, Whole) and row.vjp]
COMPLEX = [row for row in ROWS if dtypes.c128 in row.accepts]
WEIGHTED = [row for row in ROWS if isinstance(row, Reduction) and row.vjp_weighted]

INF, NAN = math.inf, math.nan

Params = dict[str, Any]
Oracle = Callable[[Tensor, Tensor, Params], Tensor]
"""(valid cells, mask, params) of one slice -> its valid results; the mask tells where the cells stood."""


# -- what a gradient is, by torch -----------------------------------------------------------------------------------


def first_of(x: Tensor, found: Tensor) -> Tensor:
    """The first cell that equals what was found."""
    return x[(x == found).nonzero()[0, 0]]


def most_frequent(x: Tensor) -> Tensor:
    values, counts = x.detach().unique(return_counts=True)
    return first_of(x, values[counts.argmax()])


def quantiles(x: Tensor, params: Params) -> Tensor:
    return torch.quantile(x, torch.tensor(params["q"], dtype=x.dtype), interpolation=params["interpolation"])


def ranked(x: Tensor, *, largest: bool) -> Tensor:
    return x[x.detach().sort(descending=largest, stable=True).indices]


def filled(x: Tensor, mask: Tensor, limit: int | None, *, back: bool = False) -> Tensor:
    """Each cell that finds a valid one before it, that one."""
    if back:
        return filled(x.flip(0), mask.flip(0), limit).flip(0)
    found, last = [], None
    for place, own in enumerate(mask.tolist()):
        last = place if own else last
        if last is not None and (limit is None or place - last <= limit):
            found.append(int(mask[: last + 1].sum()) - 1)
    return x[found]


def standardized(x: Tensor, params: Params) -> Tensor:
    return (x - x.mean()) / x.std(correction=params["correction"])


def length(x: Tensor, params: Params) -> Tensor:
    """The norm; that of complex cells is of their sizes, where torch's own warns of the imaginary part it drops."""
    return torch.linalg.vector_norm(x.abs() if x.is_complex() else x, params["ord"])


ORACLES: dict[str, Oracle] = {
    "sum": lambda x, m, p: x.sum(),
    "mean": lambda x, m, p: x.mean(),
    "var": lambda x, m, p: x.var(correction=p["correction"]),
    "std": lambda x, m, p: x.std(correction=p["correction"]),
    "amax": lambda x, m, p: x.amax(),
    "amin": lambda x, m, p: x.amin(),
    "logsumexp": lambda x, m, p: x.logsumexp(0),
    "median": lambda x, m, p: x.quantile(0.5),
    "quantile": lambda x, m, p: quantiles(x, p),
    "prod": lambda x, m, p: x.prod(),
    "norm": lambda x, m, p: length(x, p),
    "max": lambda x, m, p: x.max() if p["dim"] is None else first_of(x, x.max()),
    "min": lambda x, m, p: x.min() if p["dim"] is None else first_of(x, x.min()),
    "mode": lambda x, m, p: most_frequent(x),
    "first": lambda x, m, p: x[0],
    "last": lambda x, m, p: x[-1],
    "ptp": lambda x, m, p: x.amax() - x.amin(),
    "softmax": lambda x, m, p: x.softmax(0),
    "log_softmax": lambda x, m, p: x.log_softmax(0),
    "softmin": lambda x, m, p: torch.nn.functional.softmin(x, 0),
    "normalize": lambda x, m, p: x / length(x, p).clamp(min=p["eps"]),
    "standardize": lambda x, m, p: standardized(x, p),
    "cumsum": lambda x, m, p: x.cumsum(0),
    "cumprod": lambda x, m, p: x.cumprod(0),
    "cummax": lambda x, m, p: x.cummax(0).values,
    "cummin": lambda x, m, p: x.cummin(0).values,
    "logcumsumexp": lambda x, m, p: x.logcumsumexp(0),
    "fill": lambda x, m, p: torch.full(m.shape, p["value"], dtype=x.dtype).masked_scatter(m, x),
    "ffill": lambda x, m, p: filled(x, m, p["limit"]),
    "bfill": lambda x, m, p: filled(x, m, p["limit"], back=True),
    "sort": lambda x, m, p: ranked(x, largest=p["descending"]),
    "topk": lambda x, m, p: ranked(x, largest=p["largest"])[: p["k"]],
}

ANY_OF_EQUAL = ("median", "quantile")
"""Rows whose gradient may go to any of equal cells."""

VARIANTS: dict[str, list[Params]] = {
    "var": [{"correction": 0}, {"correction": 2.5}],
    "std": [{"correction": 0}, {"correction": 2}],
    "standardize": [{"correction": 0}],
    "norm": [{"ord": ord} for ord in (1, 3, 1.5, 0.5, 12, 0, -1, -2.5, math.inf, -math.inf)],
    "normalize": [{"ord": ord} for ord in (1, 3, 0.5, -1, math.inf)] + [{"eps": 2.5}],
    "quantile": [{"q": 0.3}] + [{"interpolation": how} for how in ("lower", "higher", "midpoint", "nearest")],
    "ffill": [{"limit": 1}],
    "bfill": [{"limit": 1}],
    "sort": [{"descending": True}],
    "topk": [{"k": 3, "largest": False}],
}
"""What is said beside the defaults."""

SMOOTH = ("sum", "mean", "var", "std", "logsumexp", "prod", "norm", "softmax", "log_softmax", "softmin", "normalize",
          "standardize", "cumsum", "cumprod", "logcumsumexp")  # fmt: skip
"""Rows with a second derivative."""


# -- samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row, its params and what it is given; the mask leaves one slice without a cell and one with a single one."""

    plan: Plan
    data: Tensor
    mask: Tensor | None
    out: Tensor
    valid: Tensor
    indices: Tensor | None
    g: Tensor

    @property
    def slices(self) -> Slices:
        return Slices(self.data, self.mask, self.out, self.indices)


def layouts(row: Reduction | Normalization | Scan) -> list[Params]:
    """Inner, outer and middle dims; for reductions several, apart or all."""
    words = {p.name for p in row.parameters}
    if "dim" not in words:
        return [{}]
    single: list[Params] = [{"dim": dim} for dim in (0, 1, 2)]
    if "keepdim" not in words:
        return single
    return [
        *single,
        {"dim": (0, 2), "keepdim": True},
        {"dim": (1, 2)},
        {"dim": (0, 1, 2)},
        {"dim": (1,), "keepdim": True},
    ]


def spoken(row: Reduction | Normalization | Scan) -> list[Params]:
    """Every layout with the defaults, and every variant in two."""
    variants = [
        layout | variant for variant in VARIANTS.get(row.name, []) for layout in (layouts(row)[1], layouts(row)[-1])
    ]
    return layouts(row) + variants


def random_cells(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal cells; one in five is 0 or one of a few values that come again."""
    cells = torch.randn(shape, generator=generator, dtype=dtype)
    again = torch.tensor([0.0, 0.0, 0.5, -1.0], dtype=dtype)[torch.randint(4, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, again, cells)


def by_slice(plan: Plan, cells: Tensor) -> Tensor:
    """(slices, cells of one): the kept dims in order, then the reduced ones."""
    kept = [dim for dim in range(len(plan.shape)) if dim not in plan.dims]
    moved = cells.permute([*kept, *plan.dims])
    return moved.reshape(math.prod(plan.shape[dim] for dim in kept), math.prod(moved.shape[len(kept) :]))


def results(plan: Plan, cells: Tensor) -> Tensor:
    """(slices, results of one)."""
    if plan.labels is not None:
        return torch.cat([by_slice(plan, one) for one in cells.unbind(0)], 1)
    return by_slice(plan, cells)


def with_dims_kept(plan: Plan, cells: Tensor) -> Tensor:
    if not isinstance(plan.row, Reduction):
        return cells
    kept = [1 if dim in plan.dims else size for dim, size in enumerate(plan.shape)]
    return cells.reshape([len(plan.labels or ())] * (plan.labels is not None) + kept)


def masked_case(
    row: Reduction | Normalization | Scan, params: Params, *, dtype: torch.dtype = torch.float64,
    shape: tuple[int, ...] = (3, 5, 4), masked: bool = True, salt: str = "",
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(zlib.crc32(f"{row.name}{params}{salt}".encode()))
    data = random_cells(shape, dtype, generator)
    plan = plan_of(row, data, **params)
    mask = torch.rand(shape, generator=generator) < 0.7
    places = by_slice(plan, torch.arange(data.numel()).view(shape))
    mask.view(-1)[places[-1, -2:]] = True
    if len(places) > 2:
        mask.view(-1)[places[0]] = False
        mask.view(-1)[places[1]] = torch.arange(places.shape[1]) == 1
    return case_of(plan, torch.where(mask, data, 0.0) if masked else data, mask if masked else None, generator)


def case_of(plan: Plan, data: Tensor, mask: Tensor | None, generator: torch.Generator) -> Case:
    if plan.row.picks:
        out, valid, indices = engine.run_with_indices(plan, data, mask)
    else:
        (out, valid), indices = engine.run(plan, data, mask), torch.empty(0)
    out, valid = with_dims_kept(plan, out), with_dims_kept(plan, valid)
    g = torch.where(valid, torch.randn(out.shape, generator=generator, dtype=out.dtype), 0.0)
    at = with_dims_kept(plan, indices) if plan.row.picks else None
    return Case(plan, data, mask, out, valid, at, g)


def computed(case: Case, **given: Any) -> Tensor:
    slices = case.slices._replace(**{name: value for name, value in given.items() if name != "g"})
    found: Tensor = kernel(case.plan.row.vjp)(case.plan, slices, given.get("g", case.g))
    return found.expand(case.plan.shape)


def assert_close(got: Tensor, expected: Tensor, said: object, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape, said
    undefined = expected.isnan()
    assert (got.isnan() == undefined).all(), f"{said}: {got} is not {expected}"
    got, expected = torch.where(undefined, 0.0, got), torch.where(undefined, 0.0, expected)
    scale = expected.abs().max().clamp(min=0.01) if got.numel() else 1.0
    assert ((got - expected).abs() <= tolerance * scale).all(), f"{said}: {got} is not {expected}"


def pooled(cells: Tensor, found: Tensor) -> Tensor:
    """The gradients of equal cells added up."""
    values, at = cells.detach().unique(return_inverse=True)
    return torch.zeros_like(values).scatter_add(0, at, found)


def assert_as_torchs(case: Case) -> None:
    """The gradient at the valid cells of each slice that has a result."""
    plan, mask = case.plan, torch.ones_like(case.data, dtype=torch.bool) if case.mask is None else case.mask
    got, masks, data = (by_slice(plan, cells) for cells in (computed(case), mask, case.data))
    gs, valids = results(plan, case.g), results(plan, case.valid)
    for at in range(len(data)):
        if not valids[at].any():
            continue
        own = data[at][masks[at]].requires_grad_()
        value = ORACLES[plan.row.name](own, masks[at], dict(plan.params)).reshape(-1)
        (expected,) = grad(value, own, gs[at][valids[at]], materialize_grads=True)
        found = got[at][masks[at]]
        if plan.row.name in ANY_OF_EQUAL:
            found, expected = pooled(own, found), pooled(own, expected)
        assert_close(found, expected, f"{plan.row.name} {dict(plan.params)}, slice {at}")


# -- the table ------------------------------------------------------------------------------------------------------


def test_every_row_of_float_results_has_a_gradient() -> None:
    for row in SLICED:
        data = torch.zeros(2, 3)
        params = {"dim": 1} if "dim" in {p.name for p in row.parameters} else {}
        is_float = plan_of(row, data, **params).result.is_float
        assert bool(row.vjp) == (is_float and row.name not in NOT_DIFFERENTIABLE), row.name
    assert {row.name for row in WHOLES} == {"cov", "corrcoef"}


def test_weights_have_a_gradient_wherever_they_are_taken() -> None:
    for row in SLICED:
        if isinstance(row, Reduction):
            assert bool(row.vjp_weighted) == bool(row.weighted), row.name


def test_every_gradient_has_an_oracle() -> None:
    assert set(ORACLES) == {row.name for row in ROWS}


# -- first derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_gradient_is_torchs_of_the_valid_cells(row: Reduction | Normalization | Scan) -> None:
    for params in spoken(row):
        for salt in "ab":
            assert_as_torchs(masked_case(row, params, salt=salt))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_without_a_mask_too(row: Reduction | Normalization | Scan) -> None:
    for params in layouts(row):
        assert_as_torchs(masked_case(row, params, masked=False))


@pytest.mark.parametrize("row", COMPLEX, ids=lambda row: row.name)
def test_a_complex_gradient_is_torchs(row: Reduction | Normalization | Scan) -> None:
    for params in layouts(row) + [layouts(row)[1] | variant for variant in VARIANTS.get(row.name, [])]:
        assert_as_torchs(masked_case(row, params, dtype=torch.complex128))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_single_cells_and_no_cells(row: Reduction | Normalization | Scan, shape: tuple[int, ...]) -> None:
    given = needed(row) | ({"dim": -1} if "dim" in {p.name for p in row.parameters} else {})
    if "k" in given and 0 in shape[-1:]:
        given["k"] = 0
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(shape, generator=generator, dtype=torch.float64)
    case = case_of(plan_of(row, data, **given), data, torch.ones(shape, dtype=torch.bool), generator)
    assert computed(case).shape == shape
    assert_as_torchs(case)


# -- weights --------------------------------------------------------------------------------------------------------


def weighted(name: str, x: Tensor, w: Tensor) -> Tensor:
    """The op with cells that count for their weights, from its definition."""
    mean = (w * x).sum() / w.sum()
    var = (w * (x - mean).abs().square()).sum() / w.sum()
    return {"sum": (w * x).sum(), "mean": mean, "var": var, "std": var.sqrt()}[name]


def weighted_case(row: Reduction, layout: Params, dtype: torch.dtype) -> tuple[Case, Slices]:
    """A case of weights from 0.1 to 1.1, and what its kernel is given."""
    said = layout | ({"correction": 0} if row.needs else {})
    case = masked_case(row, said, dtype=dtype, shape=(3, 4, 2))
    assert case.mask is not None
    weights = torch.rand(case.data.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    weights = torch.where(case.mask, weights, 0.0)
    out, _ = engine.run(plan_of(row, case.data, **said, weights=dtypes.f64), case.data, case.mask, (weights, None))
    return case, case.slices._replace(out=with_dims_kept(case.plan, out), weights=weights)


def gradients(case: Case, slices: Slices, g: Tensor) -> tuple[Tensor, ...]:
    assert isinstance(case.plan.row, Reduction)
    return tuple(part.expand(case.plan.shape) for part in kernel(case.plan.row.vjp_weighted)(case.plan, slices, g))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("row", WEIGHTED, ids=lambda row: row.name)
def test_gradients_by_data_and_by_weights(row: Reduction, dtype: torch.dtype) -> None:
    for layout in layouts(row):
        case, slices = weighted_case(row, layout, dtype)
        assert slices.mask is not None
        assert slices.weights is not None
        got = [by_slice(case.plan, part) for part in gradients(case, slices, case.g)]
        for at, own in enumerate(by_slice(case.plan, slices.mask)):
            x, w = (by_slice(case.plan, cells)[at][own].requires_grad_() for cells in (case.data, slices.weights))
            if (x == x[:1]).all():  # the spread of equal cells is 0, and torch's root of it has no derivative
                continue
            value = weighted(row.name, x, w)
            for part, expected in zip(got, grad(value, (x, w), results(case.plan, case.g)[at][0]), strict=True):
                assert part.dtype == expected.dtype
                assert_close(part[at][own], expected, f"{row.name} {layout}, slice {at}")


# -- second derivatives and vmap ------------------------------------------------------------------------------------


class Op(torch.autograd.Function):
    """An op whose only derivative is its kernel."""

    @staticmethod
    def forward(ctx: Any, case: Case, data: Tensor) -> Tensor:
        out = with_dims_kept(case.plan, engine.run(case.plan, data.detach(), case.mask)[0])
        ctx.case = case
        ctx.save_for_backward(data, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[None, Tensor]:
        data, out = ctx.saved_tensors
        g = torch.where(ctx.case.valid, gs[0], 0.0)
        return None, torch.where(reached(ctx.case), computed(ctx.case, data=data, out=out, g=g), 0.0)


def smooth_case(row: Reduction | Normalization | Scan, params: Params, dtype: torch.dtype = torch.float64) -> Case:
    """Few cells; none is 0 where the row's second derivative is infinite there for some order."""
    case = masked_case(row, params, dtype=dtype, shape=(2, 4, 2))
    if row.name not in ("norm", "normalize"):
        return case
    data = torch.where(case.data == 0, 0.3, case.data)
    data = data if case.mask is None else torch.where(case.mask, data, 0.0)
    return case_of(case.plan, data, case.mask, torch.Generator().manual_seed(5))


def reached(case: Case) -> Tensor:
    """The valid cells of slices with a result."""
    mask = torch.ones_like(case.data, dtype=torch.bool) if case.mask is None else case.mask
    return mask & (case.valid if case.valid.shape == case.data.shape else case.valid.expand(case.data.shape))


def hidden_as_zero(case: Case, cells: Tensor) -> Tensor:
    return cells if case.mask is None else torch.where(case.mask, cells, 0.0)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, torch.float64) for row in ROWS if row.name in SMOOTH] + [(row, torch.complex128) for row in COMPLEX],
    ids=lambda of: getattr(of, "name", of),
)
def test_a_gradient_has_the_derivatives_that_its_differences_show(
    row: Reduction | Normalization | Scan, dtype: torch.dtype
) -> None:
    for params in [layouts(row)[1], *[layouts(row)[-1] | variant for variant in VARIANTS.get(row.name, [])]]:
        case = smooth_case(row, params, dtype)
        if case.out.isnan().any():  # a single cell, divided by its deviation of 0
            assert params == {"dim": 2, "correction": 0}
            continue
        data = case.data.clone().requires_grad_()
        assert gradgradcheck(partial(Op.apply, case), (data,), (case.g.clone().requires_grad_(),), atol=1e-6), params


@pytest.mark.parametrize("row", WEIGHTED, ids=lambda row: row.name)
def test_gradients_by_weights_have_derivatives(row: Reduction) -> None:
    case, slices = weighted_case(row, {"dim": 1}, torch.float64)
    assert slices.mask is not None
    several = reached(case) & (slices.mask.sum(1, keepdim=True) > 1)  # a root has no second derivative at 0

    def both(g: Tensor, data: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        shown = slices._replace(data=hidden_as_zero(case, data), weights=hidden_as_zero(case, weights))
        return tuple(
            torch.where(several, part, 0.0) for part in gradients(case, shown, torch.where(case.valid, g, 0.0))
        )

    assert slices.weights is not None
    assert gradcheck(both, [cells.clone().requires_grad_() for cells in (case.g, case.data, slices.weights)])


def test_second_derivatives_where_a_formula_has_a_branch() -> None:
    """At 0 of an order 2, at zeros of a product, at equal cells of a spread: torch's, or 0 where torch's is NaN."""
    x = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert_close(hessian("norm", x)[1], torch.tensor([0, 0.2, 0], dtype=torch.float64), "norm")
    twice_zero = torch.tensor([0.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda x: x.prod(), twice_zero)
    assert_close(hessian("prod", twice_zero), expected, "prod")
    for name, cells in (("std", x * 0 + 1.5), ("norm", x * 0), ("logsumexp", x - math.inf)):
        assert not hessian(name, cells).any(), name


def hessian(name: str, data: Tensor) -> Tensor:
    """The second derivatives of the results of one slice, 1, 2, 3, ... times each, by way of the row's kernel alone."""
    case = case_of(plan_of(OPS[name], data, dim=0), data, None, torch.Generator().manual_seed(0))
    g = torch.arange(1.0, case.out.numel() + 1, dtype=data.dtype).view(case.out.shape)
    found: Tensor = torch.autograd.functional.hessian(lambda x: (Op.apply(case, x) * g).sum(), data)
    return found


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax", "softmin", "logcumsumexp"])
@pytest.mark.parametrize("cells", [[-INF, 3, 2], [1, -INF, 2], [-INF, -INF, 1], [2, 1, -INF]], ids=str)
def test_minus_infinity_weighs_nothing_in_a_second_derivative(name: str, cells: list[float]) -> None:
    """They are those of a slice in which it is a number far below the others."""
    data = torch.tensor(cells, dtype=torch.float64)
    sign = -1 if name == "softmin" else 1
    far = torch.where(data == -INF, -600.0 - 50 * torch.arange(3, 0, -1), data)
    assert_close(hessian(name, sign * data), hessian(name, sign * far), name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_gradient_is_linear_in_g_at_0_too(row: Reduction | Normalization | Scan) -> None:
    """So forward derivatives can be taken from it: those by g, times a tangent."""
    for params in spoken(row):
        case = masked_case(row, params)
        tangent = hidden_as_zero(case, torch.randn(case.data.shape, dtype=torch.float64))
        case = replace(case, g=torch.where(case.out.isnan(), 0.0, case.g))
        zero = torch.zeros_like(case.g).requires_grad_()
        (by_g,) = grad((hidden_as_zero(case, computed(case, g=zero)) * tangent).sum(), zero)
        forward, backward = (by_g * case.g).nansum(), (hidden_as_zero(case, computed(case)) * tangent).nansum()
        assert (forward - backward).abs() <= 1e-12 * (forward.abs() + tangent.abs().sum()), params


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_kernel_runs_under_vmap(row: Reduction | Normalization | Scan) -> None:
    for params in (layouts(row)[-1], layouts(row)[0]):
        case = masked_case(row, params)
        gs = torch.stack([case.g, 2 * case.g])
        found = torch.func.vmap(lambda g, case=case: computed(case, g=g))(gs)
        assert torch.equal(found.nan_to_num(), torch.stack([computed(case, g=g) for g in gs]).nan_to_num())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_kernel_runs_under_vmap_over_everything(row: Reduction | Normalization | Scan) -> None:
    case = masked_case(row, layouts(row)[-1])
    cells = [case.g, case.data, case.mask, case.out, *([] if case.indices is None else [case.indices])]

    def gradient(g: Tensor, data: Tensor, mask: Tensor, out: Tensor, indices: Tensor | None = None) -> Tensor:
        return computed(case, g=g, data=data, mask=mask, out=out, indices=indices)

    found = torch.func.vmap(gradient)(*[torch.stack([each, each]) for each in cells if each is not None])
    assert torch.equal(found[1].nan_to_num(), computed(case).nan_to_num())


# -- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["var", "std", "norm", "normalize", "standardize", "softmax", "log_softmax", "logsumexp"]
)
def test_float32_gradients_are_those_of_float64_rounded(name: str) -> None:
    row = OPS[name]
    assert isinstance(row, Reduction | Normalization)
    narrow = masked_case(row, {"dim": 1}, dtype=torch.float32, shape=(2, 400, 3))
    data = hidden_as_zero(narrow, narrow.data + 100)
    plan, generator = plan_of(row, data.double(), dim=1), torch.Generator().manual_seed(2)
    exact = case_of(plan, data.double(), narrow.mask, generator)
    narrow = case_of(narrow.plan, data, narrow.mask, generator)
    got, expected = (computed(case, g=exact.g.float().to(case.data.dtype)) for case in (narrow, exact))
    scale = torch.where(reached(exact), expected, 0.0).abs().amax(1, keepdim=True)
    error = torch.where(reached(exact), (got.double() - expected).abs(), 0.0)
    assert (error <= 4 * torch.finfo(torch.float32).eps * scale).all(), error.max()


# -- infinities, NaN, equal cells -----------------------------------------------------------------------------------


def of(name: str, cells: list[float], g: list[float] | float = 1.0, **params: Any) -> list[float]:
    """The gradient of one slice, all valid, by way of the op's own result."""
    data = torch.tensor(cells, dtype=torch.float64)
    plan = plan_of(OPS[name], data, dim=0, **params)
    case = case_of(plan, data, None, torch.Generator().manual_seed(0))
    found: list[float] = computed(case, g=torch.tensor(g, dtype=torch.float64).expand(case.out.shape)).tolist()
    return found


def test_minus_infinity_weighs_nothing() -> None:
    assert of("logsumexp", [-INF, -INF]) == [0, 0]
    assert of("logsumexp", [-INF, 3]) == [0, 1]
    assert of("softmax", [-INF, 3, 3], [1, 2, 4]) == [0, -0.5, 0.5]
    assert of("log_softmax", [-INF, 3], [1, 2]) == [1, -1]
    assert of("logcumsumexp", [-INF, -INF, 0, 0], [1, 1, 0, 2]) == [0, 0, 1, 1]


def test_equal_extremes_share_evenly_and_nan_with_nan() -> None:
    assert of("amax", [2, 1, 2]) == [0.5, 0, 0.5]
    assert of("amin", [0.0, -0.0, 1]) == [0.5, 0.5, 0]
    assert of("amax", [NAN, 1, NAN]) == [0.5, 0, 0.5]
    assert of("ptp", [2, 2]) == [0, 0]
    assert of("ptp", [2, 1, 2]) == [0.5, -1, 0.5]
    assert of("norm", [-3, 0, 3], ord=INF) == [-0.5, 0, 0.5]
    assert of("median", [NAN, 1, 2]) == [1, 0, 0]


def test_the_spread_of_equal_cells_and_the_norm_of_zeros_move_nothing() -> None:
    assert of("std", [5, 5, 5]) == [0, 0, 0]
    for ord in (2, 1, 0.5, INF, 0, -1):
        assert of("norm", [0, 0], ord=ord) == [0, 0]
    assert of("normalize", [0, 0], [1, 2], eps=0.5) == [2, 4]


def test_what_comes_later_adds_nothing_where_none_of_it_is_asked_for() -> None:
    """A later NaN, infinity or overflow stands in results that no path leads from."""
    for later in (NAN, INF):
        assert of("cumprod", [2, 3, later, 5], [1, 1, 0, 0])[:2] == [4, 2]
        assert of("logcumsumexp", [0, 0, later, 1], [0, 2, 0, 0])[:2] == [1, 1]
    assert of("cumprod", [1e200, 1e200, 1e200, 2], [1, 0, 0, 0])[:1] == [1]


def test_the_variance_of_large_cells_keeps_the_small_digits() -> None:
    small = [0.0, 0.25, 1.0, 3.5]
    assert of("var", [1e9 + cell for cell in small]) == of("var", small)


# -- covariances ----------------------------------------------------------------------------------------------------


def pairwise(name: str, data: Tensor, mask: Tensor, params: Params) -> Tensor:
    """Each pair by torch.cov over the columns where both are valid."""
    if data.ndim < 2:
        return pairwise(name, data.unsqueeze(0), mask.unsqueeze(0), params)[0, 0]

    def of_pair(i: int, j: int) -> Tensor:
        both = mask[i] & mask[j]
        if both.sum() < 2:
            return data.sum() * 0
        pair = data[[i, j]][:, both]
        return torch.cov(pair, **params)[0, 1] if name == "cov" else torch.corrcoef(pair)[0, 1] * (i != j)

    return torch.stack([torch.stack([of_pair(i, j) for j in range(len(data))]) for i in range(len(data))])


@pytest.mark.parametrize(("name", "params"), [("cov", {"correction": 1}), ("cov", {"correction": 0}), ("corrcoef", {})])
@pytest.mark.parametrize("shape", [(4, 9), (1, 5), (6,)], ids=str)
def test_gradients_of_pairs_of_rows(name: str, params: Params, shape: tuple[int, ...]) -> None:
    row = OPS[name]
    assert isinstance(row, Whole)
    generator = torch.Generator().manual_seed(11)
    data = torch.randn(shape, generator=generator, dtype=torch.float64) + 10
    mask = torch.rand(shape, generator=generator) < 0.7
    if shape == (4, 9):
        mask[3] = False
    data = torch.where(mask, data, 0.0).requires_grad_()
    ((out, valid),) = kernel(row.function)(data.detach(), mask, params)
    g = torch.where(valid, torch.randn(out.shape, generator=generator, dtype=torch.float64), 0.0).requires_grad_()
    got = kernel(row.vjp)(params, data, mask, out, g)
    (expected,) = grad(pairwise(row.name, data, mask, params), data, g.detach())
    assert_close(torch.where(mask, got, 0.0), expected, row.name)

    def gradient(g: Tensor, data: Tensor) -> Tensor:
        found = kernel(row.vjp)(params, torch.where(mask, data, 0.0), mask, out, torch.where(valid, g, 0.0))
        return torch.where(mask, found, 0.0)

    assert gradcheck(gradient, (g, data), atol=1e-6)
    stacked = torch.func.vmap(lambda g: gradient(g, data.detach()))(torch.stack([g.detach()] * 2))
    assert_close(stacked[1], torch.where(mask, got, 0.0).detach(), "vmap")


@pytest.mark.parametrize("row", WHOLES, ids=lambda row: row.name)
def test_a_nan_spoils_the_pairs_that_it_stands_in(row: Whole) -> None:
    data = torch.tensor([[1.0, 2, 4, 3], [2, 1, NAN, 5], [3, 3, 5, 1]], dtype=torch.float64)
    params = {"correction": 1} if row.name == "cov" else {}
    ((out, _),) = kernel(row.function)(data, None, params)
    g = torch.zeros(3, 3, dtype=torch.float64)
    g[0, 2] = 1
    found = kernel(row.vjp)(params, data, None, out, g)
    alone = kernel(row.vjp)(params, data[[0, 2]], None, out[[0, 2]][:, [0, 2]], g[[0, 2]][:, [0, 2]])
    assert_close(found[[0, 2]], alone, row.name)
    g[0, 1] = 1
    found = kernel(row.vjp)(params, data, None, out, g)
    assert found[:2].isnan().all()
    assert found[2].isfinite().all()
