"""The Triton kernels in numpy, beside the reference: TRITON_INTERPRET=1 python -m pytest -n 0 tests/triton_interpreted.py

They say what the kernels mean. What a compiler or a device makes of them is for tests/test_triton.py and `pytest -m gpu`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import maskserve as ms
from maskserve import OPS, dtypes, engine, execution
from maskserve.backends.triton_launches import watching
from maskserve.backends.triton_tables import interprets, serves_order
from maskserve.blocks import Cells
from maskserve.dtypes import DType
from maskserve.errors import DataError, IntegerOverflowError
from maskserve.ops.rows import Reduction, Row, Scan
from maskserve.params import names_of
from maskserve.partials import Partial
from maskserve.torch_dtypes import dtype_of
from maskserve_cli.app import main
from tests.samples import as_bits, assert_same_bits, cells, plan_of, poisoned, ulps, with_junk
from tests.triton_rows import OWN, PAIRS, TREES, dims_of, has_own_bits, stages_of_tree, taken, ulps_apart, variables

if not interprets():
    pytest.skip("in a process of its own, by tests/test_triton.py: TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*overflows:RuntimeWarning")

SALES = Path(__file__).parent.parent / "examples" / "sales.json"
every_row = pytest.mark.parametrize("row", OWN, ids=lambda row: row.name)
every_row_of_every_dtype = pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, dtype) for row, dtype in PAIRS if row in OWN],
    ids=[f"{row.name}-{dtype.name}" for row, dtype in PAIRS if row in OWN],
)
ABSOLUTE = 1e-15
"""Beside the reference's exp and log; a result near 0 is a difference of larger numbers."""


def by(backend: str, row: Row, data: Tensor, mask: Tensor | None, **params: Any) -> tuple[Tensor, Tensor]:
    with execution.using(backend=backend):
        return engine.run(plan_of(row, data, **taken(row, **params)), data, mask)


def assert_agrees(row: Row, data: Tensor, mask: Tensor | None, **params: Any) -> None:
    """The reference's bits; with exp or log, one ulp of float32 or less."""
    got, expected = by("triton", row, data, mask, **params), by("reference", row, data, mask, **params)
    if not has_own_bits(row, dtype_of(data)):
        assert_same_bits(got, expected, (row.name, data.dtype, data.shape, params))
        return
    assert_same_bits(got[1:], expected[1:])
    near = (got[0].double() - expected[0].double()).abs() <= ABSOLUTE
    apart = ulps(torch.where(near, expected[0], got[0]), expected[0], got[0].dtype)
    assert apart <= ulps_apart(row, got[0].dtype), (row.name, data.shape, params)


@every_row_of_every_dtype
def test_a_row_gives_what_the_reference_gives(row: Row, dtype: DType) -> None:
    sample = cells(dtype, (33 if isinstance(row, Scan) else 65, 3), 1, row=row)  # a tile and a cell
    assert_agrees(row, with_junk(sample).data, sample.mask, dim=0)


@every_row
def test_inner_outer_and_middle_dims_and_whole_tensors(row: Row) -> None:
    sample = cells(dtypes.f32, (2, 17, 3), 2, row=row)
    for params in dims_of(row, 3):
        assert_agrees(row, with_junk(sample).data, sample.mask, **params)


@every_row
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 2 * 4096 + 1])
def test_sizes_around_a_tile_along_the_last_dim(row: Row, size: int) -> None:
    sample = with_junk(cells(dtypes.f32, (size,), size, row=row))
    assert_agrees(row, sample.data, sample.mask, dim=0)


@every_row
@pytest.mark.parametrize(("size", "beside"), [(0, 3), (2, 33), (63, 3), (64, 3), (65, 3), (132, 2)])
def test_sizes_around_a_tile_along_the_first_dim(row: Row, size: int, beside: int) -> None:
    sample = with_junk(cells(dtypes.f64, (size, beside), size, row=row))
    assert_agrees(row, sample.data, sample.mask, dim=0)


@every_row
def test_what_lies_under_the_mask_changes_no_bit(row: Row) -> None:
    sample = cells(dtypes.f32, (3, 20), 3, row=row)
    first, *others = (by("triton", row, data, sample.mask, dim=1) for data in list(poisoned(sample))[::2])
    for other in others:
        assert_same_bits(other, first, row.name)
    assert not first[0][~first[1]].any()


@every_row
def test_all_masked_slices_are_masked_and_two_runs_give_the_same_bits(row: Row) -> None:
    sample = cells(dtypes.f32, (5, 20), 4, row=row)
    mask = sample.mask.clone()
    mask[2] = False
    assert_agrees(row, sample.data, mask, dim=1)
    assert_same_bits(by("triton", row, sample.data, mask, dim=1), by("triton", row, sample.data, mask, dim=1))


@every_row
def test_broadcast_masks_and_strides_change_no_bit(row: Row) -> None:
    sample = cells(dtypes.f32, (4, 30, 6), 5, row=row)
    turned = sample.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for data, mask in ((sample.data, sample.mask[:1]), (turned, sample.mask[:, :1]), (turned, sample.mask[:, :, :1])):
        assert_agrees(row, data, mask, dim=1)


def tails(shape: tuple[int, ...], dim: int) -> ms.MaskedTensor:
    """Cells whose mask is lengths along `dim`, with an empty row and a full one."""
    n_rows = math.prod(shape[:dim])
    lengths = (torch.arange(n_rows) * 7 % (shape[dim] + 1)).reshape(shape[:dim])
    return ms.from_lengths(torch.randn(shape, generator=torch.Generator().manual_seed(1)).exp(), lengths, dim)


@pytest.mark.parametrize("name", ["argmax", "softmax", "cumsum"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_compact_masks_are_read_where_they_lie(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a mask within the columns, of several runs of them, and of several slices."""
    prefixes = tails((3, 4, 13), (dim + 1) % 3)
    scattered = ms.as_masked_tensor(prefixes.get_data(), cells(dtypes.f32, (3, 4, 13), 6).mask)
    for tensor in (prefixes, *(mask.to_mask_layout("packed") for mask in (prefixes, scattered))):
        expected = by("triton", OPS[name], tensor.get_data(), tensor.get_mask(), dim=dim)
        monkeypatch.setattr(type(tensor._held), "window", lambda *_: pytest.fail("a compact mask became bools"))
        with execution.using(backend="triton"):
            values, mask = engine.run_held(
                plan_of(OPS[name], tensor.get_data(), dim=dim), tensor.get_data(), tensor._held
            )
        monkeypatch.undo()
        mask = mask if isinstance(mask, Tensor) else mask.bools().expand(values.shape)
        assert_same_bits((values, mask), expected, (name, dim, tensor.mask_layout))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_blocks_of_a_compact_mask_begin_where_they_lie(dim: int) -> None:
    for layout in ("lengths", "packed"):
        tensor = tails((3, 70, 13), (dim + 1) % 3)
        tensor = tensor if layout == "lengths" else tensor.to_mask_layout(layout)
        of = plan_of(OPS["argmax"], tensor.get_data(), dim=dim)
        with execution.using(backend="triton", block_cells=400):
            whole = engine.run(of, tensor.get_data(), tensor.get_mask())
            parts = engine.lift_all(
                of, Cells(of, tensor.get_data(), tensor._held, policy="propagate", reads_compact=True)
            )
            assert_same_bits(engine.finish(of, parts), whole, (dim, layout))


@every_row
def test_nan_that_is_omitted_is_masked(row: Row) -> None:
    sample = cells(dtypes.f32, (4, 70), 6, row=row)
    data = sample.data.clone()
    data[::2, ::3] = math.nan
    for params in ({"nan": "omit"}, {}) if "nan" in names_of(row) else ({},):
        assert_agrees(row, data, sample.mask, dim=1, **params)


@every_row
def test_infinities_and_zeros_of_both_signs_are_data(row: Row) -> None:
    odd = torch.tensor(
        [[math.inf, -math.inf, 1], [-0.0, 0.0, -0.0], [-math.inf] * 3, [math.nan, 2, 1], [0.0, -0.0, 0.0]]
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if not (dtype is torch.float64 and has_own_bits(row, dtypes.f64) and isinstance(row, Scan)):
            assert_agrees(row, odd.to(dtype), None, dim=1)


@pytest.mark.parametrize("name", ["cumsum", "cumprod"])
def test_running_states_of_infinities_are_torchs(name: str) -> None:
    data = torch.tensor([[math.inf, 2, -math.inf], [0.0, -0.0, 3], [3, math.nan, 1]], dtype=torch.float64)
    with execution.using(backend="triton"):
        got = getattr(ms, name)(data, 1).get_data()
    assert torch.equal(got.nan_to_num(7, 8, 9), getattr(torch, name)(data, 1).nan_to_num(7, 8, 9))


def test_a_running_sum_that_overflows_on_the_way_comes_out_right() -> None:
    data = torch.tensor([1.7e308, 1.7e308, -1.7e308, 1.0], dtype=torch.float64)
    with execution.using(backend="triton"):
        assert ms.cumsum(data, 0).tolist() == [1.7e308, math.inf, 1.7e308, 1.7e308]


def test_a_running_sum_of_exponentials_is_near_the_exact_one() -> None:
    data = cells(dtypes.f64, (1025,), 1).data
    with execution.using(backend="triton"):
        got = ms.logcumsumexp(data, 0).get_data()
    exact = np.logaddexp.accumulate(data.numpy().astype(np.longdouble))
    assert np.abs(got.numpy() - exact).max() <= 2e-15


@pytest.mark.parametrize("ord", [2, 1, 0, 0.5, -1, -2, 3, -3, 5, 7, -8, math.inf, -math.inf, 1.5, -2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_of_every_order_that_is_served(ord: float, dtype: torch.dtype) -> None:
    """To the bit, but for roots of which float64 would show how they are taken."""
    sample = cells(dtypes.f64, (300, 3), 7)
    data = (sample.data * (1e200 if dtype is torch.float64 else 1.0)).to(dtype)
    if not serves_order(plan_of(OPS["norm"], data, dim=0, ord=ord)):
        assert (dtype, ord % 1) == (torch.float64, 0.5)
    elif dtype is torch.float32 or abs(ord) <= 2 or math.isinf(ord):
        assert_agrees(OPS["norm"], data, sample.mask, dim=0, ord=ord)
    else:
        got, expected = (by(name, OPS["norm"], data, sample.mask, dim=0, ord=ord) for name in ("triton", "reference"))
        assert ulps(got[0], expected[0], dtype) <= 2


def test_a_range_that_does_not_fit_is_an_error() -> None:
    with execution.using(backend="triton"), pytest.raises(IntegerOverflowError, match="a range does not fit i8"):
        ms.ptp(torch.tensor([-100, 100], dtype=torch.int8), 0)


@pytest.mark.parametrize("name", ["first", "last", "ptp"])
def test_zeros_keep_their_sign_and_places_are_those_of_valid_cells(name: str) -> None:
    data = torch.tensor([[9.0, -0.0, 7.0], [math.nan, 0.0, -0.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[False, True, False], [True, True, True], [False, False, False]])
    assert_agrees(OPS[name], data, mask, dim=1)


def test_cells_of_u64_beyond_2_63_are_counted_as_they_are() -> None:
    """Sums beside 2**63 and 2**64, which the integers of Python know."""
    cells_ = torch.tensor([2**64 - 1, 2**63 + 5, 3], dtype=torch.uint64)
    with execution.using(backend="triton"):
        assert ms.sum(cells_, 0, dtype=torch.float64).item() == float(2**64 - 1 + 2**63 + 5 + 3)
        assert ms.sum(cells_[2:], 0).item() == 3
        assert ms.mean(cells_, 0).item() == (2**64 - 1 + 2**63 + 5 + 3) / 3
        assert ms.amax(cells_, 0).item() == 2**64 - 1
        assert ms.amin(cells_, 0).item() == 3
        assert ms.last(cells_, 0).item() == 3
        assert ms.argmin(cells_, 0).item() == 2
        assert not ms.any(torch.zeros(3, dtype=torch.uint64), 0).item()
        with pytest.raises(IntegerOverflowError):
            ms.sum(cells_, 0)


def test_a_widened_dtype_keeps_a_compact_mask() -> None:
    """What is computed wide is written in parts, and its mask is not."""
    lengths = ms.from_lengths(torch.arange(12).to(torch.uint16).view(3, 4), torch.tensor([0, 4, 2]), 1)
    with execution.using(backend="triton"):
        got = ms.cumsum(lengths, 1)
    assert got.tolist() == [[None] * 4, [4, 9, 15, 22], [8, 17, None, None]]


@pytest.mark.parametrize("row", [row for row in OWN if "weights" in names_of(row)], ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [dtypes.f64, dtypes.f32, dtypes.i64])
def test_cells_count_for_their_weights(row: Row, dtype: DType) -> None:
    sample, weights = with_junk(cells(dtype, (3, 70, 5), 11)), with_junk(cells(dtypes.f32, (70, 1), 12))
    weighed = ms.as_masked_tensor(weights.data.abs(), weights.mask)
    tensor = ms.as_masked_tensor(sample.data, sample.mask)
    given = {"correction": 0} if "correction" in names_of(row) else {}
    for dim, w in ((0, weighed), (1, weighed), ((0, 2), weighed), (2, weighed * 0)):
        made = []
        for backend in ("reference", "triton"):
            with execution.using(backend=backend):
                result = getattr(ms, row.name)(tensor, dim, weights=w, **given)
            made.append((result.get_data() * result.get_mask(), result.get_mask()))
        assert_same_bits(made[1], made[0], (row.name, dtype, dim))


@pytest.mark.parametrize("name", ["var", "std"])
def test_a_weight_that_is_negative_is_an_error(name: str) -> None:
    with execution.using(backend="triton"), pytest.raises(DataError, match="a weight is negative"):
        getattr(ms, name)(torch.ones(3), 0, correction=0, weights=torch.tensor([1.0, -1.0, 2.0]))


def test_a_weighted_sum_that_overflows_on_the_way_comes_out_right() -> None:
    data = torch.tensor([1.7e308, 1.7e308, -1.7e308], dtype=torch.float64)
    with execution.using(backend="triton"):
        assert ms.mean(data, 0, weights=torch.tensor([1.0, 2.0, 2.0])).item() == pytest.approx(1.7e308 / 5)


def test_a_float64_sum_that_overflows_on_the_way_comes_out_right() -> None:
    data = torch.tensor([[1.7e308, 1.7e308, -1.7e308], [1.7e308, 1.7e308, 1.7e308]], dtype=torch.float64)
    for name in ("sum", "mean"):
        assert_agrees(OPS[name], data, None, dim=1)


def test_results_that_overflow_half_precision_warn_as_the_references_do() -> None:
    data = torch.full((2, 100), 6e4, dtype=torch.float16)
    with execution.using(backend="triton"), pytest.warns(RuntimeWarning, match="sum: a finite result overflows f16"):
        assert ms.sum(data, 1).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("name", ["sum", "prod", "cumsum"])
def test_integers_that_do_not_fit_are_an_error(name: str) -> None:
    data = torch.full((2, 5), 2**62, dtype=torch.int64)
    with execution.using(backend="triton"), pytest.raises(IntegerOverflowError):
        getattr(ms, name)(data, 1)


@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax"])
@pytest.mark.parametrize(("shape", "dim"), [((4, 70), 1), ((70, 5), 0), ((2, 4100), 1), ((300, 2), 0)])
def test_gradients_are_those_of_the_cpu_kernels(name: str, shape: tuple[int, ...], dim: int) -> None:
    sample = with_junk(cells(dtypes.f32, shape, 8))
    later, above = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6, cells(dtypes.f32, shape, 9).data

    def gradient(backend: str) -> ms.MaskedTensor:
        with execution.using(backend=backend):
            x = ms.masked_tensor(sample.data.clone(), sample.mask, requires_grad=True)
            x = x.to_mask_layout("packed") if backend == "triton" and dim else x
            ms.as_masked_tensor(getattr(ms, name)(x, dim), later).backward(above)
        assert x.grad is not None
        return x.grad

    got, expected = gradient("triton"), gradient("cpu")
    assert torch.equal(got.get_mask(), expected.get_mask())
    near = (got.get_data() - expected.get_data()).abs() <= 1e-9
    assert ulps(torch.where(near, expected.get_data(), got.get_data()), expected.get_data(), torch.float32) <= 1


@pytest.mark.parametrize("row", [row for row in OWN if isinstance(row, Reduction)], ids=lambda row: row.name)
@pytest.mark.parametrize("inner", [1, 3])
def test_states_of_parts_give_the_whole_ones_bits(row: Reduction, inner: int) -> None:
    size = 9000 if inner == 1 else 300
    sample = cells(dtypes.f32, (1, size, inner), 10, row=row)
    plan = plan_of(row, sample.data, dim=1)
    cut = plan.leaf
    data, mask = sample.data.reshape(plan.fold), sample.mask.reshape(plan.fold)
    with execution.using(backend="triton"):
        whole = engine.run(plan, sample.data, sample.mask)
        first = Partial.lift(plan, data[:, :cut], mask[:, :cut], start=0)
        second = Partial.lift(plan, data[:, cut:], mask[:, cut:], start=cut)
        assert_same_bits(first.merge(second).finalize(), whole, row.name)


# -- trees of elementwise ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TREES)
def test_a_tree_in_one_kernel_is_the_same_calls_in_torch(text: str) -> None:
    given = variables(TREES[text])
    expected = ms.eval(text, **given)
    with execution.using(backend="triton"), watching() as calls:
        got = ms.eval(text, **given)
    n_stages = len(stages_of_tree(text, given))
    assert [call.name for call in calls] == ["tree_kernel"] * n_stages, "a term that broadcasts is computed once"
    assert got.dtype is expected.dtype
    assert torch.equal(got.get_mask(), expected.get_mask())
    same = as_bits(got.get_data()) == as_bits(expected.get_data())
    both = torch.isnan(got.get_data()) & torch.isnan(expected.get_data())
    assert bool((same | both | ~got.get_mask()).all()), (got, expected)
    assert not got.get_data()[~got.get_mask()].any()


@pytest.mark.parametrize("dtype", [dtypes.f64, dtypes.f32, dtypes.f16, dtypes.i16], ids=lambda dtype: dtype.name)
def test_a_root_is_rounded_once(dtype: DType) -> None:
    """As numpy's is; torch's on a CPU is MKL's."""
    data = cells(dtype, (3, 700), 1).data.abs()
    with execution.using(backend="triton"), watching() as calls:
        got = ms.eval("sqrt(x) * 1", x=ms.as_masked_tensor(data)).get_data()
    assert len(calls) == 1
    expected = np.sqrt(data.to(torch.float32 if dtype in (dtypes.i16, dtypes.f16) else data.dtype).numpy())
    assert torch.equal(got, torch.from_numpy(expected).to(got.dtype))


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_a_tree_of_one_compact_mask_keeps_it_and_reads_no_bools(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tails((3, 4, 13), 1)
    x = x if layout == "lengths" else x.to_mask_layout(layout)
    expected = ms.eval("(x * 2 - 1) / x", x=x)
    for words in ("window", "bools"):
        monkeypatch.setattr(type(x._held), words, lambda *_: pytest.fail("a compact mask became bools"))
    with execution.using(backend="triton"), watching() as calls:
        got = ms.eval("(x * 2 - 1) / x", x=x)
    assert len(calls) == 1
    assert got._held is not None
    assert got._held.equals(x._held)
    assert torch.equal(got.get_data(), expected.get_data()), "hidden cells are 0 in both"


def test_explain_says_who_computes_a_tree_and_which_op_keeps_torch_at_it(capfd: pytest.CaptureFixture[str]) -> None:
    for text, said in (("x * 2 - 1", "mul, sub of i64 on cpu by triton"), ("exp(x) - 1", "it has no kernel for exp")):
        assert main(["eval", "--expr", text, "--backend", "triton", "--explain", str(SALES)]) == 0
        assert said in capfd.readouterr().err
