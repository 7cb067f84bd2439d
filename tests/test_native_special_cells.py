"""Special cells, and rows of exp and log, by native kernels: torch's and exact values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch

from maskserve import OPS, dtypes, engine
from maskserve.dtypes import DType
from maskserve.ops.rows import Row
from tests.samples import assert_same_bits, plan_of, ulps
from tests.test_native_passes import SERVED, assert_agree, both
from tests.test_native_sum import layouts

FLOATS = [dtype for dtype in SERVED if dtype.is_float]
EXTREMES = [OPS[name] for name in ("amax", "amin", "argmax", "argmin")]


@pytest.mark.parametrize("dtype", FLOATS, ids=repr)
@pytest.mark.parametrize("row", EXTREMES, ids=lambda row: row.name)
def test_extremes_of_special_cells(row: Row, dtype: DType) -> None:
    """NaN wins and the first one is the index; +0 is larger than -0; a valid -inf is found among masked cells."""
    kind = getattr(torch, dtype.torch)
    special = ((math.nan, 5.0), (0.0, -0.0), (-0.0, 0.0), (-math.inf, 0.0), (math.inf, 0.0))
    sizes = [(n, inner) for inner in (1, 3, 70) for n in (1, 3, 64, 65, 300 if inner == 70 else 5000)]
    for (n, inner), (cell, others) in itertools.product(sizes, special):
        for places in ((0,), (n - 1,), (n // 3, n // 2)):
            data = torch.full((2, n, inner), others, dtype=kind)
            mask = torch.ones(data.shape, dtype=torch.bool)
            data[:, list(places)] = torch.tensor(cell, dtype=kind)
            got, expected = both(row, data, mask, dim=1)
            assert_same_bits(got, expected, (n, inner, cell, places))
            mask[:] = False
            mask[:, list(places)] = True
            data[~mask] = math.inf if cell < 0 else -math.inf
            got, expected = both(row, data, mask, dim=1)
            assert_same_bits(got, expected, (n, inner, cell, places, "only"))


def test_a_nan_is_canonical_whatever_its_payload() -> None:
    for bit_pattern in (0x7F800001, -1, -0x3FFFFF):
        data = torch.tensor([1, bit_pattern, 2], dtype=torch.int32).view(torch.float32)
        for row in EXTREMES[:2]:
            values, _ = engine.run(plan_of(row, data), data, None)
            assert values.view(torch.int32).item() == 0x7FC00000


@pytest.mark.parametrize("dtype", [d for d in SERVED if d.is_integral], ids=repr)
def test_extreme_integers_are_data(dtype: DType) -> None:
    kind = getattr(torch, dtype.torch)
    limits = (False, True) if kind is torch.bool else (torch.iinfo(kind).min, torch.iinfo(kind).max)
    for row in EXTREMES:
        for limit in limits:
            data = torch.full((70, 9), limit, dtype=kind)
            mask = torch.arange(9).expand(70, 9) > 4
            got, expected = both(row, data, mask, dim=1)
            assert_same_bits(got, expected, (row.name, limit))


@pytest.mark.parametrize("n", [3, 64, 4097])
def test_moments_of_i64_keep_the_low_bits(n: int) -> None:
    for high in (2**62, -(2**62), 2**53 + 1):
        data = torch.arange(n).repeat(2, 1) % 7 + high
        got, expected = both(OPS["var"], data, None, dim=1)
        assert_same_bits(got, expected, high)
        assert float(got[0][0]) < 10


@pytest.mark.parametrize("cells", [[1.7e308, 1.7e308, 1.6e308], [1e308] * 70, [math.inf, 1.0], [math.nan, 1.0], [-0.0]])
def test_f64_means_survive_sums_that_overflow(cells: list[float]) -> None:
    data = torch.tensor([cells], dtype=torch.float64)
    for row in (OPS["mean"], OPS["sum"], OPS["var"]):
        got, expected = both(row, data, None, dim=1, **({"correction": 0} if row.name == "var" else {}))
        assert_same_bits(got, expected, row.name)


# -- exp and log ---------------------------------------------------------------------------------------------------


def ulps_of(value: float, exact: Any) -> float:
    """Distance from the exact value in units in the last place of a double."""
    return float(abs(mpmath.mpf(value) - exact) / mpmath.mpf(math.ulp(float(exact))))


def test_softmax_of_f64_is_within_two_ulps_down_to_subnormals() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([
        -torch.rand(400, generator=generator, dtype=torch.float64),
        -torch.rand(300, generator=generator, dtype=torch.float64) * 40,
        -torch.rand(300, generator=generator, dtype=torch.float64) * 745,
        torch.tensor([-745.0, -708.5, -1e-300, -5e-324, -0.5 * math.log(2), -math.log(2)], dtype=torch.float64),
    ])  # fmt: skip
    data = torch.stack([x, torch.zeros_like(x)], 1)
    values, _ = engine.run(plan_of(OPS["softmax"], data, dim=1), data, None)
    with mpmath.workprec(200):
        for cell, value in zip(x.tolist(), values[:, 0].tolist(), strict=True):
            raised = mpmath.exp(mpmath.mpf(cell))
            assert ulps_of(value, raised / (1 + raised)) <= 2, cell


def test_logsumexp_of_f64_is_within_two_ulps() -> None:
    generator = torch.Generator().manual_seed(2)
    data = torch.randn((300, 5), generator=generator, dtype=torch.float64) * 8 + 30
    values, _ = engine.run(plan_of(OPS["logsumexp"], data, dim=1), data, None)
    with mpmath.workprec(200):
        for cells, value in zip(data.tolist(), values.tolist(), strict=True):
            assert ulps_of(value, mpmath.log(sum(mpmath.exp(mpmath.mpf(c)) for c in cells))) <= 2, cells


@pytest.mark.parametrize("inner", [1, 3, 9])
@pytest.mark.parametrize("kind", ["random", "rising", "falling", "far", "huge", "i64"])
def test_running_logsumexp_is_within_two_ulps(kind: str, inner: int) -> None:
    n = 5000
    generator = torch.Generator().manual_seed(24)
    data = torch.randn((1, n, inner), generator=generator, dtype=torch.float64)
    at = torch.arange(n, dtype=torch.float64).view(1, -1, 1)
    data = {
        "random": data * 8 + 30,
        "rising": data + at * 0.3,
        "falling": 5000 - at * 0.3 + data,
        "far": data * 400 + 9,
        "huge": 1e15 + (data * 8).round() / 8,
        "i64": (data * 8).long() + 90,
    }[kind]
    mask = torch.rand(data.shape, generator=generator) < 0.7
    values, _ = engine.run(plan_of(OPS["logcumsumexp"], data, dim=1), data, mask)
    near, _ = engine.run(plan_of(OPS["logcumsumexp"], data, dim=1, dtype=dtypes.f32), data, mask)
    with mpmath.workprec(160):
        total = mpmath.mpf(0)
        for at_row in range(n):
            if not mask[0, at_row, 0]:
                continue
            total += mpmath.exp(mpmath.mpf(data[0, at_row, 0].item()))
            if at_row % 50 < 3 and abs(exact := mpmath.log(total)) > 0.5:
                assert ulps_of(values[0, at_row, 0].item(), exact) <= 2, (kind, at_row)
                assert near[0, at_row, 0] == pytest.approx(float(exact), rel=2.0**-23)


def test_special_cells_of_a_running_logsumexp_are_torchs() -> None:
    inf, nan = math.inf, math.nan
    for cells in ([-inf, -inf, 1, 2], [-inf, inf, 1, -inf], [1, inf, 2000, -5], [3, nan, inf], [inf, nan, 1],
                  [-1e308, 1e308, 1.7e308, -1.7e308], [1e308, -1e308], [-0.0], [0.0, -inf], [2000, 3000, inf, 4000]):  # fmt: skip
        for dtype in (torch.float64, torch.float32):
            wide = torch.tensor(cells, dtype=torch.float64).view(1, -1, 1)
            data = torch.where(wide.isinf() | (dtype is torch.float64), wide, wide.clamp(-3e38, 3e38)).to(dtype)
            for given in (data, data.expand(1, -1, 9).contiguous(), torch.cat([data] * 40, 1)):
                values, _ = engine.run(plan_of(OPS["logcumsumexp"], given, dim=1), given, None)
                torch.testing.assert_close(values, torch.logcumsumexp(given, 1), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("row", [OPS["softmax"], OPS["log_softmax"]], ids=lambda row: row.name)
@pytest.mark.parametrize("shape", [(50, 33), (2, 9000)], ids=str)
def test_f32_normalizations_are_within_one_ulp_of_f64(row: Row, shape: tuple[int, int]) -> None:
    data = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 4
    values, _ = engine.run(plan_of(row, data, dim=1), data, None)
    exact = getattr(torch, row.name)(data.double(), 1)
    assert ulps(values, exact, torch.float32) <= 1


@pytest.mark.parametrize("cells", [[math.inf, 1], [-math.inf, -math.inf], [math.nan, 1], [-math.inf, 3], [800, -800]])
def test_special_cells_are_torchs(cells: list[float]) -> None:
    data = torch.tensor([cells], dtype=torch.float64)
    for name in ("softmax", "log_softmax", "logsumexp"):
        got, expected = both(OPS[name], data, None, dim=1)
        assert_agree(OPS[name], got, expected, name)
        assert torch.equal(got[0].isnan(), getattr(torch, name)(data, 1).isnan())


@pytest.mark.parametrize(
    "shape", [(5, 3, 1), (150, 64, 1), (40, 64, 3), (1, 700, 3), (1, 9000, 1), (2, 200, 70)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax", "softmin"])
def test_special_cells_spoil_no_other_slice_wherever_they_lie(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Largest cells are found with NaN passed over, and inf hides it: each has to come out as in the reference."""
    generator = torch.Generator().manual_seed(31)
    data = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.8
    lanes = data.transpose(1, 2).reshape(-1, shape[1])
    for k, cells in enumerate(
        ([math.inf, 1], [math.nan, 1], [math.inf, math.nan], [-math.nan, -math.inf], [20000, -20000])
    ):
        lanes[2 * k % len(lanes), [k % shape[1], -1 - k % shape[1]]] = torch.tensor(cells, dtype=dtype)
    lanes[-1] = -math.inf
    special = lanes.view(shape[0], shape[2], shape[1]).transpose(1, 2)
    for cells in (data, special.contiguous()):
        for valid in (None, mask, torch.zeros_like(mask)):
            got, expected = both(OPS[name], cells, valid, dim=1)
            assert_agree(OPS[name], got, expected, name)
            for strided in layouts(cells).values():
                again = engine.run(plan_of(OPS[name], strided, dim=1), strided, valid)
                assert_same_bits(again, got, name)
