"""The native kernels of gradients beside the formulas that they stand for, and the bits that nothing may change."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import maskserve as ms
from maskserve import OPS, dtypes, engine, execution, gates, pulling
from maskserve.backends.pulls import launch
from maskserve.backends.reference import kernel
from maskserve.backends.reference.cells import select
from maskserve.backends.reference.gradients import Slices
from maskserve.dtypes import DType
from maskserve.ops.rows import Normalization, Reduction, Scan
from maskserve.pulling import Pulled, pulled
from tests.instruction_sets import assert_same_bits_by_every_set
from tests.samples import SLICED, assert_same_bits, bits, plan_of
from tests.test_native_sum import layouts, sample

FLOATS = sorted(dtypes.FLOATING, key=lambda dtype: dtype.name)
SHAPES = (
    (3, 1, 1), (300, 3, 1), (290, 7, 3), (99, 64, 1), (40, 65, 3), (5, 513, 1), (2, 4095, 1), (3, 4097, 1),
    (2, 12289, 1), (2, 130, 2), (3, 70, 17), (2, 131, 256), (1, 65, 300), (1, 4200, 3), (1, 3, 5000),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row, and what it is given beside dim."""

    row: Reduction | Normalization | Scan
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.row.name, *(str(value) for _, value in self.params)])

    def given(self, dim: Any = 1) -> dict[str, Any]:
        return {"dim": None if self.row.name in ("max", "min") else dim, **dict(self.params)}

    def is_native(self) -> bool:
        words = {p.name for p in self.row.parameters}
        if not self.row.vjp or "dim" not in words:
            return False
        return launch(plan_of(self.row, torch.zeros(2, 3), **self.given())) is not None


ORDERS = (1, 3, 0.5, -1, -2, math.inf, -math.inf)
CASES = [Case(row) for row in SLICED] + [Case(OPS["norm"], (("ord", ord),)) for ord in ORDERS]  # type: ignore[arg-type]  # a sliced row
NATIVE = [case for case in CASES if case.is_native()]
REDUCTIONS = [case for case in NATIVE if isinstance(case.row, Reduction)]
every_case = pytest.mark.parametrize("case", NATIVE, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=repr)


def drawn(case: Case, dtype: DType, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Normal cells, some of them equal, with junk under the mask; a slice of norm 0 is not among them."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randn(shape, generator=generator, dtype=torch.float64)
    data, mask = sample(dtype, shape, seed=seed)
    again = torch.rand(shape, generator=generator) < 0.2
    return torch.where(mask, torch.where(again, 0.5, cells).to(data.dtype), data), mask


class Asked:
    """A plan, its result, and what comes from above."""

    def __init__(self, case: Case, data: Tensor, mask: Tensor | None, params: dict[str, Any], seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.plan, self.params = plan_of(case.row, data, **params), params
        self.data, self.mask = data, mask
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a result that overflows
            self.values, valid = engine.run(self.plan, data, mask)
        self.gate = valid & (torch.rand(valid.shape, generator=generator) < 0.8)
        g = torch.randn(valid.shape, generator=generator, dtype=torch.float64).to(self.values.dtype)
        self.g = torch.where(self.gate, g, torch.nan)  # what has not been reached is junk too

    def native(self, data: Tensor | None = None, mask: Tensor | None = None) -> Pulled:
        data, mask = self.data if data is None else data, self.mask if mask is None else mask
        made = pulled(self.plan, data, mask, self.values, self.g, self.gate, wants_reach=True)
        assert made is not None, self.plan.row.name
        return made

    def formula(self) -> tuple[Tensor, Tensor]:
        """The gradient in double precision, and where it has reached."""
        plan = plan_of(self.plan.row, self.data.double(), **self.params)
        kept = [1 if dim in plan.dims else size for dim, size in enumerate(plan.shape)]
        reduces = isinstance(plan.row, Reduction)
        out, g, gate = (
            cells.reshape(kept) if reduces else cells for cells in (self.values.double(), self.g.double(), self.gate)
        )
        own = torch.ones_like(self.data, dtype=torch.bool) if self.mask is None else self.mask.expand(plan.shape)
        slices = Slices(select(self.data.double(), own), own, out)
        found = kernel(plan.row.vjp)(plan, slices, select(g, gate)).expand(plan.shape)
        if not reduces and plan.row.reach == "slice":
            gate = gate.any(plan.dims[0], keepdim=True)
        elif not reduces:
            gate = gate.flip(plan.dims[0]).cumsum(plan.dims[0]).flip(plan.dims[0]) > 0
        reached = gate.expand(plan.shape) & own
        return torch.where(reached, found, 0.0), reached


def assert_is_the_formulas(asked: Asked, said: object) -> None:
    gradient, reach = asked.native()
    expected, reached = asked.formula()
    assert gradient.dtype == asked.data.dtype
    assert reach is not None
    assert torch.equal(reach > 0, reached), said
    assert torch.equal(reach, reached.to(reach.dtype)), said
    undefined = expected.isnan()
    assert torch.equal(gradient.isnan(), undefined), said
    got, expected = (torch.where(undefined, 0.0, cells.double()) for cells in (gradient, expected.to(gradient.dtype)))
    scale = max(float(expected[expected.isfinite()].abs().max()), 1.0) if got.numel() else 1.0
    tolerance = 1e-12 if gradient.dtype is torch.float64 else torch.finfo(gradient.dtype).eps
    near = (got == expected) | ((got - expected).abs() <= tolerance * scale)
    assert near.all(), f"{said}: {got[~near]} is not {expected[~near]}"


@every_dtype
@every_case
def test_every_gradient_is_the_formulas(case: Case, dtype: DType) -> None:
    for shape in SHAPES:
        data, mask = drawn(case, dtype, shape, seed=shape[1])
        assert_is_the_formulas(Asked(case, data, mask, case.given()), (shape, "masked"))
        plain = torch.where(mask, data, 0.75)
        assert_is_the_formulas(Asked(case, plain, None, case.given()), (shape, "no mask"))


@pytest.mark.parametrize("dim", [(0, 2), None, (1, 2), (0, 1), (2,)], ids=str)
@pytest.mark.parametrize("case", REDUCTIONS, ids=lambda case: case.name)
def test_several_dims(case: Case, dim: tuple[int, ...] | None) -> None:
    for shape in ((7, 5, 3), (70, 2, 33), (1, 9, 2), (6, 0, 2)):
        data, mask = drawn(case, dtypes.f32, shape, seed=2)
        assert_is_the_formulas(Asked(case, data, mask, case.given(dim)), shape)


@pytest.mark.parametrize("cell", [math.nan, math.inf, -math.inf, 1e300, -0.0], ids=str)
@every_case
def test_special_cells(case: Case, cell: float) -> None:
    if abs(cell) == 1e300 and case.row.name in ("norm", "normalize", "var", "std", "standardize", "prod"):
        return  # the formula overflows on the way
    for n in (1, 3, 70, 5000):
        data = torch.linspace(-1, 1, 4 * n, dtype=torch.float64).reshape(4, n)
        data[:2, n // 2] = cell
        data[0, 0] = cell
        mask = torch.ones_like(data, dtype=torch.bool)
        mask[:, n // 3 :: 7] = False
        for own in (mask, torch.ones_like(mask)):
            asked = Asked(case, data, own, case.given())
            if pulled(asked.plan, data, own, asked.values, asked.g, asked.gate, wants_reach=False) is not None:
                assert_is_the_formulas(asked, n)


@pytest.mark.parametrize("shape", [(3, 130, 17), (17, 70, 1), (2, 3, 5), (5, 4100, 1), (1, 65, 300)], ids=str)
@every_case
def test_strides_change_no_bit(case: Case, shape: tuple[int, int, int]) -> None:
    data, mask = drawn(case, dtypes.f32, shape, seed=5)
    asked = Asked(case, data, mask, case.given())
    expected = asked.native()
    assert expected.reach is not None
    masks = layouts(mask)
    for name, strided in layouts(data).items():
        for mask_name in {name, "dense", "every second"}:
            got = asked.native(strided, masks[mask_name])
            assert got.reach is not None
            assert_same_bits((got.gradient, got.reach), (expected.gradient, expected.reach), (name, mask_name))


@every_case
def test_blocks_and_threads_change_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((40, 900, 3), (3, 70, 600), (2, 70000, 1)):
        data, mask = drawn(case, dtypes.f32, shape, seed=6)
        asked = Asked(case, data, mask, case.given())
        expected = asked.native()
        for block, group, threads in ((1 << 12, 1 << 20, 1), (1 << 13, 1, 3), (1 << 30, 1 << 30, 2)):
            monkeypatch.setattr(pulling, "BLOCK_CELLS", block)
            monkeypatch.setattr(pulling, "GROUP_CELLS", group)
            with execution.using(threads=threads):
                got = asked.native()
            assert got.reach is not None
            assert expected.reach is not None
            assert_same_bits((got.gradient, got.reach), (expected.gradient, expected.reach), (shape, block))


def test_the_gradient_of_a_sum_of_results_is_read_without_memory_of_its_own() -> None:
    for case in NATIVE:
        data, mask = drawn(case, dtypes.f64, (7, 65, 3), seed=7)
        asked = Asked(case, data, mask, case.given())
        asked.g = torch.tensor(1.5, dtype=torch.float64).expand(asked.g.shape)
        expected, asked.g = asked.native(), asked.g.clone()
        got = asked.native()
        assert_same_bits((got.gradient,), (expected.gradient,), case.name)


@pytest.mark.parametrize("size", [1e-200, 1e200], ids=str)
def test_a_norm_beyond_the_range_of_its_square_is_the_formulas(size: float) -> None:
    for name in ("norm", "normalize"):
        data = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64) * size
        asked = Asked(Case(OPS[name]), data, None, {"dim": 1} | ({"eps": 0.0} if name == "normalize" else {}))
        assert pulled(asked.plan, data, None, asked.values, asked.g, asked.gate, wants_reach=False) is None
    x = ms.masked_tensor(torch.tensor([3.0, 4.0], dtype=torch.float64) * size, requires_grad=True)
    ms.norm(x).backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.get_data(), torch.tensor([0.6, 0.8], dtype=torch.float64))


@every_dtype
@pytest.mark.parametrize("group", [1, 1 << 20])
def test_a_lone_zero_takes_the_product_of_the_others(dtype: DType, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "GROUP_CELLS", group)
    case = Case(OPS["prod"])  # type: ignore[arg-type]  # a sliced row
    for shape in ((6, 5, 1), (6, 70, 3), (6, 4097, 1)):
        data, mask = drawn(case, dtype, shape, seed=11)
        data = torch.where(mask, 1 + data / 64, data)
        data[:3, shape[1] // 2], mask[:3, shape[1] // 2] = 0.0, True
        data[:2, 1], mask[0, 1], mask[1, 1] = -0.0, True, False
        assert_is_the_formulas(Asked(case, data, mask, case.given()), shape)
        assert_is_the_formulas(Asked(case, torch.where(mask, data, 1.5), None, case.given()), shape)


def test_the_gradient_of_a_product_is_right_where_it_is_in_range() -> None:
    case = Case(OPS["prod"])  # type: ignore[arg-type]  # a sliced row
    generator = torch.Generator().manual_seed(12)
    sizes = torch.tensor([1e-300, 1e300, 1e-160, 1e170, 3e-10, 5e-324, 1e308], dtype=torch.float64)
    for n in (2, 7, 120):
        data = torch.randn(1, n, generator=generator, dtype=torch.float64)
        data[0, : len(sizes)] *= sizes[:n]
        asked = Asked(case, data, None, case.given())
        asked.g, asked.gate = torch.full_like(asked.g, 1.25), torch.ones_like(asked.gate)
        factors = [Fraction(cell) for cell in data[0].tolist()]
        for k, got in enumerate(asked.native().gradient[0].tolist()):
            exact = Fraction(1.25) * math.prod(factors[:k] + factors[k + 1 :])
            if abs(exact) >= Fraction(2) ** 1024:
                assert math.isinf(got)
            else:
                assert abs(Fraction(got) - exact) <= 2 * Fraction(math.ulp(float(exact))), (n, k)


# -- gates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool], ids=str
)
@pytest.mark.parametrize("n", [0, 1, 63, 2047, 2049, (1 << 20) + 5])
def test_a_gate_is_a_selection(kind: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(8)
    cells = (torch.randn(n, generator=generator, dtype=torch.float64) * 9).to(kind)
    if kind.is_floating_point:
        cells[::5] = torch.nan
    mask = torch.rand(n, generator=generator) < 0.5
    reach = gates.as_cotangent(mask)
    assert torch.equal(reach, mask.to(torch.bfloat16))
    assert torch.equal(gates.is_reached(reach * 3), mask)
    expected = select(cells, mask)
    assert_same_bits((gates.kept(cells, mask), gates.kept_where_reached(cells, reach)), (expected, expected), n)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 1, 1), (3, 1, 1, 1), (1, 1, 1, 1), (3, 4, 5, 1), (3, 4, 5, 6)], ids=str)
def test_a_gate_of_what_repeats_gives_what_its_copy_gives(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    cells = torch.randn(shape, generator=generator).to(kind).expand(3, 4, 5, 6)[::2]
    mask = (torch.rand(shape, generator=generator) < 0.5).expand(3, 4, 5, 6)[::2]
    reach = gates.as_cotangent(mask)
    found = (gates.kept(cells, mask), gates.kept_where_reached(cells, reach), reach, gates.is_reached(reach))
    expected = select(cells.contiguous(), mask.contiguous())
    assert_same_bits(
        tuple(part.contiguous() for part in found),
        (expected, expected, mask.to(torch.bfloat16), mask.contiguous()),
        shape,
    )


@pytest.mark.parametrize("dim", [None, 1, (0, 2), (1, 2), 2], ids=str)
@pytest.mark.parametrize("kept_dims", [(3, 4, 1), (3, 1, 1), (1, 1, 1), None], ids=str)
def test_a_sum_under_a_mask_that_repeats_has_the_gradient_of_any_other(
    dim: Any, kept_dims: tuple[int, ...] | None
) -> None:
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(3, 4, 5, generator=generator)
    mask = None if kept_dims is None else (torch.rand(kept_dims, generator=generator) < 0.6).expand(3, 4, 5)
    plan = plan_of(OPS["sum"], data, dim=dim)
    values = torch.zeros(plan.out_shape)
    g, gate = torch.randn(plan.out_shape, generator=generator), torch.rand(plan.out_shape, generator=generator) < 0.7
    found, expected = (
        pulled(plan, data, own, values, select(g, gate), gate, wants_reach=True)
        for own in (mask, torch.ones(3, 4, 5, dtype=torch.bool) if mask is None else mask.contiguous())
    )
    assert found is not None
    assert expected is not None
    assert_same_bits([part.contiguous() for part in found if part is not None], expected, dim)


# -- instruction sets ---------------------------------------------------------------------------------------------------


def print_bits() -> None:
    """The bits of every gradient on a few samples, for a process to compare with another's."""
    from maskserve.backends import _native

    print(_native.isa())
    for case in NATIVE:
        for dtype in FLOATS:
            for shape in ((99, 3, 1), (40, 64, 1), (2, 4100, 1), (3, 131, 3), (2, 131, 70)):
                made = Asked(case, *drawn(case, dtype, shape, seed=3), case.given()).native()
                assert made.reach is not None
                print(case.name, dtype, shape, [part.hex() for part in bits(made.gradient, made.reach)])
    cells = torch.randn(5000, generator=torch.Generator().manual_seed(9))
    print([part.hex() for part in bits(gates.kept(cells, cells > 0), gates.is_reached(gates.as_cotangent(cells > 0)))])


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits() -> None:
    assert_same_bits_by_every_set("tests.test_native_pulls")


def test_what_is_native() -> None:
    assert {case.name for case in NATIVE} >= {
        "sum", "mean", "var", "std", "logsumexp", "amax", "amin", "max", "min", "norm", "softmax", "softmin",
        "log_softmax", "normalize", "standardize", "cumsum", "ptp", "prod",
        "cumprod", "logcumsumexp", "norm-1", "norm-3", "norm-inf",
    }  # fmt: skip
    assert launch(plan_of(OPS["norm"], torch.zeros(2, 3), ord=2.5)) is None
    assert launch(plan_of(OPS["max"], torch.zeros(2, 3), dim=1)) is None
