"""Elementwise rows: torch's values on the valid cells, our masks, and nothing from under them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import maskserve as ms
from maskserve import MaskedTensor, cellwise, dtypes
from maskserve.dtypes import DType
from maskserve.errors import (
    DataError,
    IntegerOverflowError,
    MaskMismatchError,
    ParameterError,
    ShapeError,
    UncoveredFunctionError,
)
from maskserve.ops.rows import Elementwise, MaskRule
from maskserve.torch_functions import table
from tests.samples import ELEMENTWISE, Masked, assert_same_bits, cells, poisoned

every_row = pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
every_dtype = pytest.mark.parametrize("dtype", sorted(dtypes.NUMERIC, key=lambda d: d.name), ids=lambda d: d.name)


def operands(row: Elementwise, dtype: DType, shape: tuple[int, ...] = (40, 3)) -> list[Masked]:
    """Samples for each operand that torch's own function takes: a bool condition, nonzero divisors."""
    made = [cells(dtype, shape, seed) for seed in range(len(row.operands))]
    if row.rule is MaskRule.CHOSEN:
        made[0] = cells(dtypes.boolean, shape, 9)
    if row.unsafe and dtype is not dtypes.boolean:
        made[-1].data[made[-1].data == 0] = 1
        made[-1].data.abs_()
    return made


def torch_takes(row: Elementwise, samples: list[Masked]) -> bool:
    try:
        cellwise.function(row)(*[s.data for s in samples])
    except (RuntimeError, NotImplementedError):
        return False
    return True


def taken(row: Elementwise, dtype: DType) -> Iterator[list[Masked]]:
    samples = operands(row, dtype)
    if dtype in row.accepts and torch_takes(row, samples):
        yield samples


@every_dtype
@every_row
def test_values_are_torchs_where_every_operand_is_valid(row: Elementwise, dtype: DType) -> None:
    for samples in taken(row, dtype):
        got = getattr(ms, row.name)(*[ms.masked_tensor(s.data, s.mask) for s in samples])
        expected = cellwise.function(row)(*[s.data for s in samples])
        if row.rule is MaskRule.CHOSEN:
            condition, yes, no = samples
            valid = condition.mask & torch.where(condition.data, yes.mask, no.mask)
        else:
            valid = torch.stack([s.mask for s in samples]).all(0)
        assert torch.equal(got.get_mask(), valid)
        assert_same_bits((got.get_data()[valid],), (expected[valid],), row.name)
        assert not got.get_data()[~valid].any()


@every_dtype
@every_row
def test_what_lies_under_the_mask_changes_no_bit(row: Elementwise, dtype: DType) -> None:
    for samples in taken(row, dtype):
        results = []
        for poisons in itertools.zip_longest(*[poisoned(s) for s in samples]):
            data = [s.data if p is None else p for s, p in zip(samples, poisons, strict=True)]
            made = [ms.masked_tensor(d, s.mask) for d, s in zip(data, samples, strict=True)]
            results.append(getattr(ms, row.name)(*made))
        for other in results[1:]:
            assert_same_bits(
                (other.get_data(), other.get_mask()), (results[0].get_data(), results[0].get_mask()), row.name
            )


@every_row
def test_torchs_function_of_that_name_reaches_the_row(row: Elementwise) -> None:
    samples = operands(row, dtypes.i64 if dtypes.f32 not in row.accepts else dtypes.f32)
    made = [ms.masked_tensor(s.data, s.mask) for s in samples]
    ours = getattr(ms, row.name)(*made)
    for name in (row.name, *row.torch):
        function = getattr(torch, name, None)
        if function is not None:
            theirs = function(*made)
            assert isinstance(theirs, MaskedTensor)
            assert_same_bits((theirs.get_data(), theirs.get_mask()), (ours.get_data(), ours.get_mask()), name)


BINARY: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("+", lambda a, b: a + b), ("-", lambda a, b: a - b), ("*", lambda a, b: a * b), ("/", lambda a, b: a / b),
    ("//", lambda a, b: a // b), ("%", lambda a, b: a % b), ("**", lambda a, b: a**b), ("<", lambda a, b: a < b),
    ("<=", lambda a, b: a <= b), (">", lambda a, b: a > b), (">=", lambda a, b: a >= b), ("==", lambda a, b: a == b),
    ("!=", lambda a, b: a != b), ("&", lambda a, b: a & b), ("|", lambda a, b: a | b), ("^", lambda a, b: a ^ b),
]  # fmt: skip


@pytest.mark.parametrize(("symbol", "operator"), BINARY, ids=[symbol for symbol, _ in BINARY])
def test_operators_take_plain_tensors_and_numbers_on_either_side(
    symbol: str, operator: Callable[[Any, Any], Any]
) -> None:
    data, mask = torch.tensor([7, 2, 5]), torch.tensor([True, False, True])
    m, plain = ms.masked_tensor(data, mask), torch.tensor([2, 3, 1])
    for left, right in ((m, plain), (plain, m), (m, 3), (3, m), (m, m)):
        got = operator(left, right)
        parts = [side.get_data() if isinstance(side, MaskedTensor) else side for side in (left, right)]
        expected = torch.div(*parts) if symbol == "/" else operator(*parts)  # 3 / tensor is 3 * reciprocal in torch
        assert isinstance(got, MaskedTensor), symbol
        assert torch.equal(got.get_mask(), mask), symbol
        assert_same_bits((got.get_data()[mask],), (expected[mask],), symbol)


def test_unary_operators_keep_the_mask() -> None:
    m = ms.masked_tensor([1, -2], torch.tensor([True, False]))
    assert (-m).tolist() == [-1, None]
    assert abs(-m).tolist() == [1, None]
    assert (~(m > 0)).tolist() == [False, None]


def test_policies_of_case_a1() -> None:
    data, mask = torch.arange(5), torch.tensor([True, True, False, True, False])
    a, b = ms.masked_tensor(data, mask), ms.masked_tensor(data, ~mask)
    assert (a + b).tolist() == [None] * 5
    with pytest.raises(MaskMismatchError, match="strict"):
        ms.add(a, b, policy="strict")
    assert ms.add(a, b, policy="union").tolist() == [0, 1, 2, 3, 4]
    with ms.policy("union"):
        assert (a + b).tolist() == [0, 1, 2, 3, 4]
    assert ms.add(a, a, policy="strict").tolist() == [0, 2, None, 6, None]
    with pytest.raises(ParameterError, match="has no identity"):
        ms.sub(a, b, policy="union")
    with pytest.raises(ParameterError, match="policy is 'onion'"):
        ms.add(a, b, policy="onion")


def test_masks_broadcast_as_data_do() -> None:
    rows = ms.masked_tensor([[1.0], [2.0]], torch.tensor([[True], [False]]))
    columns = ms.masked_tensor([10.0, 20.0, 30.0], torch.tensor([True, True, False]))
    assert (rows + columns).tolist() == [[11.0, 21.0, None], [None, None, None]]
    with pytest.raises(ShapeError, match="do not broadcast"):
        rows + torch.ones(3, 3, 7)


def test_where_takes_validity_from_the_chosen_branch() -> None:
    condition = ms.masked_tensor([True, False, True, False], torch.tensor([True, True, False, True]))
    yes = ms.masked_tensor([1.0, 2.0, 3.0, 4.0], torch.tensor([True, False, True, False]))
    assert torch.where(condition, yes, -1.0).tolist() == [1.0, -1.0, None, -1.0]
    assert torch.where(torch.tensor([True, False, True, False]), 0.5, yes).tolist() == [0.5, None, 0.5, None]


def test_a_hidden_zero_divides_nothing_and_a_valid_one_raises() -> None:
    divisor = ms.masked_tensor([2, 0], torch.tensor([True, False]))
    assert (6 // divisor).tolist() == [3, None]
    with pytest.raises(DataError, match="ZeroDivisionError"):
        6 // ms.masked_tensor([2, 0])


def test_abs_of_the_smallest_int_is_an_error_unless_it_is_hidden() -> None:
    data = torch.tensor([-(2**63), -3])
    with pytest.raises(IntegerOverflowError, match="does not fit int64"):
        ms.abs(ms.masked_tensor(data))
    assert ms.abs(ms.masked_tensor(data, torch.tensor([False, True]))).tolist() == [None, 3]


def test_what_numpy_ma_hides_is_a_value_here() -> None:
    """P14: log of 0 and -1, and 1/0, are values of valid cells; numpy.ma masks them without a word."""
    got = ms.log(ms.masked_tensor([0.0, -1.0, 1.0])).get_data()
    assert got[0] == -math.inf
    assert got[1].isnan()
    assert (ms.masked_tensor([1.0, 0.0]) / 0).get_data()[0] == math.inf


def test_a_function_without_a_row_raises_and_names_a_way_out() -> None:
    m = ms.masked_tensor([1.0, 2.0], torch.tensor([True, False]))
    for call in (torch.fft.fft, torch.max, torch.erf, torch.nn.functional.gelu, torch.zeros_like, torch.cat):
        if call in table():
            continue
        with pytest.raises(UncoveredFunctionError, match=r"get_data|maskserve|to_tensor"):
            call([m, m] if call is torch.cat else m)
    with pytest.raises(UncoveredFunctionError, match=r"maskserve\.median"):
        torch.median(m)
    with pytest.raises(UncoveredFunctionError, match=r"out="):
        torch.exp(m, out=torch.empty(2))


def test_no_function_of_torch_gives_a_plain_tensor_without_asking() -> None:
    """Whatever torch offers of one tensor: a MaskedTensor comes back, or an error."""
    m = ms.masked_tensor([[0.5, 0.25], [0.125, 0.75]], torch.tensor([[True, False], [True, True]]))
    for name in dir(torch):
        function = getattr(torch, name)
        if isinstance(function, type(torch.sum)) and not name.startswith("_"):
            try:
                result = function(m)
            except Exception:  # any error will do
                continue
            results = result if isinstance(result, tuple | list) else [result]
            assert not any(isinstance(r, Tensor) for r in results), name
