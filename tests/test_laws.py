"""The laws that every row of the table obeys, back end by back end, on samples with junk under every mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskserve import dtypes, engine, execution
from maskserve.backends import backends, choose
from maskserve.backends.reference import kernel
from maskserve.dtypes import DType
from maskserve.ops.rows import Reduction, Row
from maskserve.params import names_of
from maskserve.partials import Partial
from maskserve.plan import as_floats
from tests.samples import (
    MERGEABLE,
    REDUCTIONS,
    SIZES,
    SLICED,
    as_bits,
    assert_same_bits,
    cells,
    plan_of,
    poisoned,
    run,
    torch_dtype,
    ulps,
)

SEEDS = st.integers(0, 2**32 - 1)
SPLIT_ULPS = {dtypes.f64: 8, dtypes.f32: 1, dtypes.f16: 1, dtypes.bf16: 1}
"""How far a result may move when the order changes, in ulps of its dtype; integers and exact rows do not move.

8 for the variance of bools: equal cells have equal rounding errors in their squares, which add up where others cancel.
"""


def named(rows: Any) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


every_sliced_row = named(SLICED)
every_mergeable_row = named(MERGEABLE)


def of_every_dtype(rows: Any) -> Callable[[Callable[..., None]], Callable[[Row], None]]:
    """A law of a row and a dtype, as a test a row of all that it accepts; a note on the failure names the dtype.

    A test for each pair costs 2 ms of the runner's, thousands of times. Complex cells have tests of their own.
    """

    def of_rows(law: Callable[..., None]) -> Callable[[Row], None]:
        def check(row: Row) -> None:
            for dtype in dtypes.ALL:
                if dtype not in row.accepts or dtype.kind is dtypes.Kind.COMPLEX:
                    continue
                try:
                    law(row=row, dtype=dtype)
                except BaseException as error:
                    error.add_note(f"{row.name} of {dtype.name}")
                    raise

        check.__name__, check.__doc__ = law.__name__, law.__doc__
        checked: Callable[[Row], None] = named(rows)(check)
        return checked

    return of_rows


every_sliced_row_of_every_dtype = of_every_dtype(SLICED)
every_reduction_of_every_dtype = of_every_dtype(REDUCTIONS)
every_mergeable_row_of_every_dtype = of_every_dtype(MERGEABLE)
every_backend = pytest.mark.parametrize("backend", [b.name for b in backends()])


def dims_of(row: Row, ndim: int) -> list[int | None]:
    """Whole and by dim where the row reduces; one dim at a time where it needs one."""
    if "dim" not in names_of(row):
        return [None]
    return [None, *range(ndim)] if isinstance(row, Reduction) else list(range(ndim))


def along(dim: int | None) -> dict[str, Any]:
    return {} if dim is None else {"dim": dim}


def serves(backend: str, row: Row, data: torch.Tensor, **params: Any) -> bool:
    plan = plan_of(row, data, **params)
    return next(b for b in backends() if b.name == backend).why_not(plan) is None


def gives_places(row: Reduction) -> bool:
    """Whether the results are places within the slice."""
    return bool(row.passes) and not row.picks and hasattr(kernel(row.passes[0].reference), "shift")


def is_exact(row: Row, dtype: DType) -> bool:
    """Whether the row's result does not depend on the order of its cells."""
    if not isinstance(row, Reduction) or not row.passes:
        return False
    of = kernel(row.passes[0].reference)
    return of.exact or (row.passes[0].name == "total" and dtype.is_integral)


@every_sliced_row_of_every_dtype
def test_what_lies_under_the_mask_changes_no_bit(row: Row, dtype: DType) -> None:
    for shape, seed in (((5, 130), 1), ((4097,), 2), ((70, 3), 3)):
        sample = cells(dtype, shape, seed, row=row)
        for dim in dims_of(row, len(shape)):
            results = [run(row, data, sample.mask, **along(dim)) for data in poisoned(sample)]
            for other in results[1:]:
                assert_same_bits(other, results[0], (row.name, dim, sample))


@every_sliced_row_of_every_dtype
def test_hidden_cells_of_a_result_are_zero(row: Row, dtype: DType) -> None:
    sample = cells(dtype, (40, 3), 4, share=0.03, row=row)
    for data, dim in itertools.product(poisoned(sample), dims_of(row, 2)):
        values, valid = run(row, data, sample.mask, **along(dim))
        assert not as_bits(values)[~valid].any(), (row.name, dim, sample)


@every_reduction_of_every_dtype
@given(size=st.sampled_from(SIZES), seed=SEEDS)
def test_masked_equals_compressed_then_plain(row: Reduction, dtype: DType, size: int, seed: int) -> None:
    sample = cells(dtype, (size,), seed, row=row)
    for data in itertools.islice(poisoned(sample), 1):
        values, valid = run(row, data, sample.mask)
        plain, plain_valid = run(row, data[sample.mask])
        assert torch.equal(valid, plain_valid), sample
        if not valid.all():
            continue
        if gives_places(row):
            plain = sample.mask.nonzero().flatten()[plain]
        if is_exact(row, dtype) or not values.is_floating_point():
            assert_same_bits((values,), (plain,), sample)
        else:
            assert ulps(values, plain, values.dtype) <= SPLIT_ULPS[dtypes.BY_TORCH[str(values.dtype)[6:]]], sample


@every_reduction_of_every_dtype
def test_a_fully_masked_slice_is_masked(row: Reduction, dtype: DType) -> None:
    for shape in ((3, 100), (100, 3), (4097,), (2, 0), (0, 2)):
        sample = cells(dtype, shape, 5, share=0, row=row)
        for dim in dims_of(row, len(shape)):
            values, valid = run(row, sample.data, sample.mask, **along(dim))
            assert valid.all() == row.never_masked or not valid.numel(), (row.name, dim, shape)
            assert row.never_masked or not as_bits(values).any()


@every_mergeable_row_of_every_dtype
def test_an_all_masked_block_is_the_identity(row: Reduction, dtype: DType) -> None:
    sample = cells(dtype, (2, 4096, 3), 6, row=row)
    plan = plan_of(row, sample.data, dim=1)
    merge = kernel(row.passes[0].reference).merge
    some = engine.state(plan, sample.data, sample.mask)
    for data in poisoned(cells(dtype, (2, 4096, 3), 7, share=0, row=row)):
        nothing = engine.state(plan, data, torch.zeros_like(sample.mask))
        for merged in (merge(some, nothing), merge(nothing, some)):
            assert_same_bits(tuple(merged[k] for k in some), tuple(some.values()), row.name)


@every_backend
@every_mergeable_row
@given(size=st.sampled_from(SIZES), inner=st.sampled_from((1, 3)), seed=SEEDS, data=st.data())
def test_a_split_at_leaf_borders_changes_no_bit(
    row: Reduction, backend: str, size: int, inner: int, seed: int, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(sorted(row.accepts - dtypes.COMPLEX, key=lambda d: d.name)))
    sample = cells(dtype, (1, size, inner), seed, row=row)
    if not serves(backend, row, sample.data, dim=1):
        backend = "reference"
    plan = plan_of(row, sample.data, dim=1)
    n_leaves = -(-size // plan.leaf)
    cuts = data.draw(st.sets(st.integers(1, max(1, n_leaves - 1)), max_size=3))
    borders = sorted({0, size, *(min(c * plan.leaf, size) for c in cuts)})
    with execution.using(backend=backend):
        whole = engine.run(plan, sample.data, sample.mask)
        folded = sample.data.reshape(plan.fold), sample.mask.reshape(plan.fold)
        parts = [
            Partial.from_bytes(Partial.lift(plan, *(t[:, a:b] for t in folded), start=a).to_bytes())
            for a, b in itertools.pairwise(borders)
        ]
    for part in data.draw(st.permutations(parts[1:])):
        parts[0] = parts[0].merge(part)
    assert_same_bits(parts[0].finalize(), whole, (sample, borders))


@every_mergeable_row_of_every_dtype
@given(size=st.sampled_from(SIZES), seed=SEEDS, share=st.floats(0.05, 0.95))
def test_a_split_anywhere_stays_within_the_rows_ulps(
    row: Reduction, dtype: DType, size: int, seed: int, share: float
) -> None:
    sample = cells(dtype, (1, size, 1), seed, row=row)
    cut = int(size * share)
    of = kernel(row.passes[0].reference)
    whole = plan_of(row, sample.data, dim=1)
    states = []
    for a, b in ((0, cut), (cut, size)):
        state = engine.state(plan_of(row, sample.data[:, a:b], dim=1), sample.data[:, a:b], sample.mask[:, a:b])
        states.append(of.shift(state, a) if hasattr(of, "shift") else state)
    got = engine.finish(whole, of.merge(*states))
    expected = engine.run(whole, sample.data, sample.mask)
    assert torch.equal(got[1], expected[1]), sample
    if is_exact(row, dtype) or not got[0].is_floating_point():
        assert_same_bits(got, expected, sample)
    else:
        assert ulps(got[0], expected[0], got[0].dtype) <= SPLIT_ULPS[dtypes.BY_TORCH[str(got[0].dtype)[6:]]], sample


@every_mergeable_row
@given(seed=SEEDS, sizes=st.tuples(*[st.integers(0, 300)] * 3))
def test_merge_is_associative_within_the_rows_ulps(row: Reduction, seed: int, sizes: tuple[int, int, int]) -> None:
    of = kernel(row.passes[0].reference)
    states, start = [], 0
    for i, size in enumerate(sizes):
        sample = cells(dtypes.f64, (1, size, 1), seed + i, row=row)
        state = engine.state(plan_of(row, sample.data, dim=1), sample.data, sample.mask)
        states.append(of.shift(state, start) if hasattr(of, "shift") else state)
        start += size
    a, b, c = states
    plan = plan_of(row, torch.zeros(1, start, 1, dtype=torch.float64), dim=1)
    left, right = engine.finish(plan, of.merge(of.merge(a, b), c)), engine.finish(plan, of.merge(a, of.merge(b, c)))
    assert torch.equal(left[1], right[1])
    if is_exact(row, dtypes.f64):
        assert_same_bits(left, right)
    elif left[1].all():
        spread = float(left[0].double().abs().max()) or 1.0
        assert float((left[0].double() - right[0].double()).abs().max()) <= 1e-13 * max(1.0, spread), (seed, sizes)


@every_sliced_row_of_every_dtype
def test_threads_blocks_and_strides_change_no_bit(row: Row, dtype: DType) -> None:
    for shape in ((9000,), (3, 4500), (1500, 3), (17, 20, 13), (2, 70, 3, 5)):
        assert_threads_blocks_and_strides_change_no_bit(row, dtype, shape)


def assert_threads_blocks_and_strides_change_no_bit(row: Row, dtype: DType, shape: tuple[int, ...]) -> None:
    sample = cells(dtype, shape, 8, row=row)
    turned = list(range(len(shape)))[::-1]
    other = (
        sample.data.permute(turned).contiguous().permute(turned),
        sample.mask.permute(turned).contiguous().permute(turned),
    )
    pairs = [(0, len(shape) - 1)] if isinstance(row, Reduction) and len(shape) > 2 else []
    for dim in (*dims_of(row, len(shape)), *pairs):
        expected = run(row, sample.data, sample.mask, **along(dim))
        for threads, block_cells in ((1, 700), (2, 5000), (1, 1 << 22)):
            with execution.using(threads=threads, block_cells=block_cells):
                said = (shape, dim, threads, block_cells)
                assert_same_bits(run(row, sample.data, sample.mask, **along(dim)), expected, said)
                assert_same_bits(run(row, *other, **along(dim)), expected, (*said, "transposed"))


@every_sliced_row
def test_blocks_of_one_cell_change_no_bit(row: Row) -> None:
    sample = cells(dtypes.f64, (3, 70), 19, row=row)
    for dim in dims_of(row, 2):
        expected = run(row, sample.data, sample.mask, **along(dim))
        with execution.using(block_cells=1):
            assert_same_bits(run(row, sample.data, sample.mask, **along(dim)), expected, (row.name, dim))


@every_sliced_row_of_every_dtype
def test_the_number_of_torch_threads_changes_no_bit(row: Row, dtype: DType) -> None:
    sample = cells(dtype, (300, 500), 9, row=row)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([run(row, sample.data, sample.mask, **along(dim)) for dim in dims_of(row, 2)])
    finally:
        torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two, row.name)


@every_mergeable_row_of_every_dtype
@given(size=st.sampled_from(SIZES), inner=st.sampled_from((1, 2, 17)), seed=SEEDS, masked=st.booleans())
def test_every_back_end_gives_the_references_bits(
    row: Reduction, dtype: DType, size: int, inner: int, seed: int, masked: bool
) -> None:
    sample = cells(dtype, (3, size, inner), seed, row=row)
    mask = sample.mask if masked else None
    plan = plan_of(row, sample.data, dim=1)
    with execution.using(backend="reference"):
        expected = engine.state(plan, sample.data, mask)
    chosen = choose(plan).backend.name
    with execution.using(backend=chosen):
        got = engine.state(plan, sample.data, mask)
    exact = [k for k in expected if row.passes[0].exact_bits or k != "total"]
    assert_same_bits(tuple(got[k] for k in exact), tuple(expected[k] for k in exact), (chosen, sample))
    for part in expected.keys() - set(exact):
        assert ulps(got[part], expected[part], torch.float64) <= 4, (chosen, sample)


@every_mergeable_row_of_every_dtype
def test_masked_cells_added_at_the_end_change_no_bit(row: Reduction, dtype: DType) -> None:
    for size, more in ((1, 1), (64, 3), (4096, 1), (5000, 9000)):
        sample = cells(dtype, (size,), 10, row=row)
        expected = run(row, sample.data, sample.mask)
        for tail in poisoned(cells(dtype, (more,), 11, share=0, row=row)):
            data = torch.cat([sample.data, tail])
            mask = torch.cat([sample.mask, torch.zeros(more, dtype=torch.bool)])
            assert_same_bits(run(row, data, mask), expected, (row.name, size, more))


@every_sliced_row_of_every_dtype
def test_inputs_are_not_written_to(row: Row, dtype: DType) -> None:
    sample = cells(dtype, (7, 4500), 12, row=row)
    before = sample.data.clone(), sample.mask.clone()
    for dim in dims_of(row, 2):
        run(row, sample.data, sample.mask, **along(dim))
        run(row, sample.data, None, **along(dim))
    assert_same_bits((sample.data, sample.mask), before, row.name)


@every_reduction_of_every_dtype
def test_a_single_valid_cell_is_found_whatever_its_value(row: Reduction, dtype: DType) -> None:
    """The identity of a max is -inf, of an int max its smallest value: as data they count like any other."""
    for value in poisoned(cells(dtype, (1,), 13, share=0, row=row)):
        data = torch.cat([value.new_zeros(70), value, value.new_zeros(9)])
        mask = torch.arange(80) == 70
        params = (
            {"correction": 0}
            if row.needs
            else {"dtype": dtypes.f64}
            if dtype is dtypes.u64 and row.name == "sum"
            else {}
        )
        values, valid = run(row, data, mask, **params)
        plain, _ = run(row, value, None, **params)
        assert valid.all(), (row.name, value)
        if gives_places(row):
            plain = plain + 70
        assert_same_bits((values,), (plain,), (row.name, value))


@every_reduction_of_every_dtype
def test_keepdim_and_several_dims_agree_with_one_reshaped_dim(row: Reduction, dtype: DType) -> None:
    sample = cells(dtype, (4, 5, 6), 14, row=row)
    values, valid = run(row, sample.data, sample.mask, dim=(-1, 1))
    flat, flat_valid = run(row, sample.data.reshape(4, 30), sample.mask.reshape(4, 30), dim=1)
    assert_same_bits((values, valid), (flat, flat_valid), row.name)
    kept, kept_valid = run(row, sample.data, sample.mask, dim=(1, 2), keepdim=True)
    assert kept.shape == kept_valid.shape == (*values.shape, 1, 1)
    assert_same_bits((kept.reshape(values.shape), kept_valid.reshape(values.shape)), (values, valid), row.name)


@every_sliced_row_of_every_dtype
def test_an_absent_mask_equals_a_mask_of_trues(row: Row, dtype: DType) -> None:
    sample = cells(dtype, (3, 4500), 15, row=row)
    for dim in dims_of(row, 2):
        full = run(row, sample.data, torch.ones_like(sample.mask), **along(dim))
        assert_same_bits(run(row, sample.data, None, **along(dim)), full, (row.name, dim))


@every_sliced_row_of_every_dtype
def test_a_broadcast_mask_equals_its_expansion(row: Row, dtype: DType) -> None:
    sample = cells(dtype, (30, 200), 16, row=row)
    for mask, dim in itertools.product((sample.mask[:, :1], sample.mask[:1]), dims_of(row, 2)):
        full = run(row, sample.data, mask.expand(30, 200).clone(), **along(dim))
        assert_same_bits(run(row, sample.data, mask, **along(dim)), full, (row.name, dim))


@every_sliced_row
def test_the_result_dtype_is_the_rows(row: Row) -> None:
    for dtype in row.accepts:
        sample = cells(dtype, (3, 4), 17, row=row)
        values, _ = run(row, sample.data, sample.mask, **along(dims_of(row, 2)[-1]))
        assert values.dtype == torch_dtype(row.result(as_floats(dtype), {}))


@named([row for row in SLICED if "nan" in names_of(row)])
def test_nan_omit_equals_masking_the_nan_cells(row: Row) -> None:
    floats = [dtype for dtype in (dtypes.f64, dtypes.f32, dtypes.f16, dtypes.bf16) if dtype in row.accepts]
    for dtype, shape in itertools.product(floats, ((20, 300), (3, 4200), (150, 30))):
        sample = cells(dtype, shape, 18, row=row)
        data = sample.data.clone()
        data[::3, ::5] = torch.nan
        turned = data.t().contiguous().t()
        for dim, mask in itertools.product(dims_of(row, 2), (sample.mask, sample.mask[:1], None)):
            expected = run(row, data, ~data.isnan() if mask is None else mask & ~data.isnan(), **along(dim))
            for held in (data, turned):
                found = run(row, held, mask, nan="omit", **along(dim))
                assert_same_bits(found, expected, (row.name, dim, dtype.name, shape))
