"""Elementwise rows: torch's values on the valid cells, our masks, and nothing from under them."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve import OPS, MaskedTensor, dtypes
from maskserve.cellwise import broadcast
from maskserve.dtypes import ALL, WIDE, DType, f32, i64, u64
from maskserve.errors import (
    DataError,
    DtypeError,
    IntegerOverflowError,
    MaskError,
    MaskMismatchError,
    NanError,
    ParameterError,
    ShapeError,
    UncoveredFunctionError,
)
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import OTHER, Elementwise, MaskRule
from maskserve.torch_functions import functions_of, table
from tests.samples import ELEMENTWISE, Masked, assert_same_bits, bits, cells, poisoned, torch_dtype

every_row = pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
every_binary_row = pytest.mark.parametrize(
    "row", [row for row in ELEMENTWISE if len(row.operands) == 2 and not row.method], ids=lambda row: row.name
)

HOMES = (torch, torch.special, torch.nn.functional, torch.linalg)


def torchs(row: Elementwise) -> Callable[..., Any]:
    """torch's function of that name, found without our help."""
    found: Callable[..., Any] = next(getattr(home, row.name) for home in HOMES if hasattr(home, row.name))
    return found


def required(row: Elementwise) -> dict[str, Any]:
    """Values for the parameters that have no default."""
    return {p.name: 2 if p.type is Type.COUNT else 0.5 for p in row.parameters if p.default is REQUIRED}


def operands(row: Elementwise, dtype: DType, shape: tuple[int, ...] = (12, 3)) -> list[Any]:
    """Samples for each operand that torch's own function takes: a bool condition, nonzero divisors, one degree."""
    made: list[Any] = [cells(dtype, shape, seed) for seed in range(len(row.operands))]
    if row.rule is MaskRule.CHOSEN:
        made[0] = cells(dtypes.boolean, shape, 9)
    if row.unsafe and dtype.kind in (dtypes.Kind.INT, dtypes.Kind.UINT):
        made[-1] = Masked(
            made[-1].seed,
            torch.where(made[-1].data == 0, 1, made[-1].data.to(torch.int64).abs()).to(torch_dtype(dtype)),
            made[-1].mask,
        )
    if row.operands[0] == "n":
        made[0] = 2
    return made


def data_of(samples: list[Any]) -> list[Any]:
    return [s.data if isinstance(s, Masked) else s for s in samples]


def masked(samples: list[Any], data: list[Any] | None = None) -> list[Any]:
    return [
        ms.masked_tensor(d, s.mask) if isinstance(s, Masked) else s
        for s, d in zip(samples, data or data_of(samples), strict=True)
    ]


def expected_of(row: Elementwise, dtype: DType, data: list[Any]) -> Tensor:
    """torch's result, storage types widened first, u64 (of small cells here) by way of int64."""
    wide = i64 if dtype is u64 else WIDE.get(dtype, dtype)
    if dtype is dtypes.boolean and row.name == "abs":
        return data[0]  # type: ignore[no-any-return]
    is_condition = row.rule is MaskRule.CHOSEN
    widened = [
        d.to(torch_dtype(wide)) if isinstance(d, Tensor) and not (is_condition and i == 0) else d
        for i, d in enumerate(data)
    ]
    result: Tensor = torchs(row)(*widened, **required(row))
    narrow = row.as_stored or (dtype is u64 and result.dtype is torch.int64)
    return result.to(torch_dtype(dtype)) if narrow else result


def taken(row: Elementwise) -> Iterator[tuple[DType, list[Any], Tensor]]:
    """(dtype, samples, torch's result) for the accepted dtypes that torch computes in when all operands have them."""
    n = 0
    for dtype in sorted(row.accepts, key=lambda d: d.name):
        samples = operands(row, dtype)
        try:
            expected = expected_of(row, dtype, data_of(samples))
        except (RuntimeError, NotImplementedError):
            continue
        if expected.dtype in {torch_dtype(d) for d in ALL}:
            n += 1
            yield dtype, samples, expected
    assert n, f"torch computes {row.name} in none of its dtypes"


@every_row
def test_values_are_torchs_where_every_operand_is_valid(row: Elementwise) -> None:
    for dtype, samples, expected in taken(row):
        got = getattr(ms, row.name)(*masked(samples), **required(row))
        if row.rule is MaskRule.CHOSEN:
            condition, yes, no = samples
            valid = condition.mask & torch.where(condition.data, yes.mask, no.mask)
        else:
            valid = torch.stack([s.mask for s in samples if isinstance(s, Masked)]).all(0)
        said = f"{row.name} {dtype}"
        assert torch.equal(got.get_mask(), valid), said
        hidden = expected.clone().contiguous().view(torch.uint8).reshape(*expected.shape, expected.element_size())
        hidden[~valid] = 0
        assert_same_bits((got.get_data(),), (hidden.flatten().view(expected.dtype).reshape(expected.shape),), said)


@every_row
def test_values_are_those_of_the_valid_cells_alone(row: Elementwise) -> None:
    """On the compressed cells torch may take another vector path: equal up to its rounding."""
    for dtype, samples, _ in taken(row):
        got = getattr(ms, row.name)(*masked(samples), **required(row))
        valid = got.get_mask()
        alone = expected_of(row, dtype, [d[valid] if isinstance(d, Tensor) else d for d in data_of(samples)])
        mine = got.get_data()[valid]
        if (mine.is_floating_point() or mine.is_complex()) and not row.as_stored:
            loose = 4 * torch.finfo(alone.dtype).eps
            torch.testing.assert_close(mine, alone, equal_nan=True, rtol=loose, atol=loose)
        else:
            assert_same_bits((mine,), (alone,), f"{row.name} {dtype}")


@every_row
def test_what_lies_under_the_mask_changes_no_bit(row: Elementwise) -> None:
    for dtype, samples, _ in taken(row):
        tensors = [s for s in samples if isinstance(s, Masked)]
        first: list[bytes] | None = None
        for poisons in zip(
            *[itertools.islice(itertools.cycle([s.data, *poisoned(s)]), 7) for s in tensors], strict=True
        ):
            each = iter(poisons)
            data = [next(each) if isinstance(s, Masked) else s for s in samples]
            got = getattr(ms, row.name)(*masked(samples, data), **required(row))
            now = bits(got.get_data(), got.get_mask())
            assert first is None or now == first, f"{row.name} {dtype}"
            first = now


def computes(row: Elementwise, dtype: DType) -> bool:
    """Whether torch computes the row with an operand of this dtype, alone or beside another dtype."""
    one = torch.ones(3).to(torch_dtype(dtype))
    n = len(row.operands)
    known = {torch_dtype(d) for d in ALL}
    if row.operands[0] == "n":
        tries: list[tuple[Any, ...]] = [(1, one)]
    elif n == 1:
        tries = [(one,)]
    else:
        beside = [one, torch.ones(3), torch.ones(3, dtype=torch.int64)]
        tries = [mix for mix in itertools.product(beside, repeat=n) if any(x is one for x in mix)]
        if row.rule is MaskRule.CHOSEN:
            tries = [(torch.ones(3) > 0, one, one)]
    for arguments in tries:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of half complex numbers
                result = torchs(row)(*arguments, **required(row))
            if result.dtype in known:
                return True
        except (RuntimeError, NotImplementedError, TypeError):
            pass
    return False


@every_row
def test_a_row_accepts_the_dtypes_that_torch_computes_in(row: Elementwise) -> None:
    for dtype in ALL:
        if dtype in WIDE:
            assert (dtype in row.accepts) == (WIDE[dtype] in row.accepts), f"{row.name} {dtype}"
        elif dtype is not u64 and not (row.name == "abs" and dtype is dtypes.boolean):
            assert (dtype in row.accepts) == computes(row, dtype), f"{row.name} {dtype}"


@every_row
def test_every_name_of_torch_reaches_the_row(row: Elementwise) -> None:
    dtype = next(d for d in (dtypes.f32, dtypes.i64, dtypes.c64) if d in row.accepts)
    samples = operands(row, dtype)
    made = masked(samples)
    ours = getattr(ms, row.name)(*made, **required(row))
    assert {theirs for theirs, _ in functions_of(row)} <= set(table())
    for home, name in itertools.product((*HOMES, torch.Tensor), (row.name, *row.torch)):
        theirs = getattr(home, name, None)
        if theirs is None or (home is torch.Tensor and name.startswith("__")):
            continue
        if home is torch.Tensor:
            order = row.method or range(len(made))
            got = getattr(made[order[0]], name)(*[made[i] for i in order[1:]], **required(row))
        else:
            got = theirs(*made, **required(row))
        assert isinstance(got, MaskedTensor)
        assert_same_bits((got.get_data(), got.get_mask()), (ours.get_data(), ours.get_mask()), f"{row.name} {theirs}")


def test_every_alias_is_a_function_of_torch() -> None:
    for row in OPS.values():
        for name in row.torch:
            assert any(hasattr(home, name) for home in (*HOMES, torch.Tensor)), f"{row.name}: {name}"


@every_binary_row
def test_a_number_stands_on_either_side(row: Elementwise) -> None:
    for dtype, samples, _ in taken(row):
        if dtype in WIDE or dtype is u64 or dtype is dtypes.boolean:
            continue
        m, number = masked(samples)[0], 2
        same = torch.full(m.shape, number, dtype=m.dtype)
        for given, full in (((m, number), (m, same)), ((number, m), (same, m))):
            try:
                b = getattr(ms, row.name)(*full)
            except DataError:  # 2 / 0
                continue
            a = getattr(ms, row.name)(*given)
            assert torch.equal(a.get_mask(), samples[0].mask), f"{row.name} {dtype}"
            assert a.dtype == b.dtype, f"{row.name} {dtype}"
            if a.is_floating_point() or a.is_complex():
                torch.testing.assert_close(a.get_data(), b.get_data(), equal_nan=True)
            else:
                assert_same_bits((a.get_data(),), (b.get_data(),), f"{row.name} {dtype}")


def test_a_number_beside_float64_keeps_its_digits() -> None:
    m = ms.masked_tensor(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ms.maximum(m, 0.1).tolist() == [0.1, 1.0]
    assert ms.atan2(0.1, m).tolist()[1] == math.atan2(0.1, 1.0)


@every_row
def test_cells_of_no_dims_no_cells_and_broadcasting(row: Elementwise) -> None:
    dtype, samples, _ = next(taken(row))
    call = getattr(ms, row.name)
    scalars = [MaskedTensor(d.flatten()[0], True) if isinstance(d, Tensor) else d for d in data_of(samples)]
    assert call(*scalars, **required(row)).shape == ()
    assert call(*scalars, **required(row)).get_mask().item() is True
    hidden = [MaskedTensor(s._data, False) if isinstance(s, MaskedTensor) else s for s in scalars]
    assert call(*hidden, **required(row)).tolist() is None
    empty = [
        MaskedTensor(torch.zeros((0, 3), dtype=s.dtype), torch.ones((1, 3), dtype=torch.bool))
        if isinstance(s, MaskedTensor)
        else s
        for s in scalars
    ]
    assert call(*empty, **required(row)).shape == (0, 3)
    mixed = [
        MaskedTensor(s.data[:4, :1] if i % 2 else s.data[:1, :3], s.mask[:4, :1] if i % 2 else s.mask[:1, :3])
        if isinstance(s, Masked)
        else s
        for i, s in enumerate(samples)
    ]
    full = torch.broadcast_shapes(*[m.shape for m in mixed if isinstance(m, MaskedTensor)])
    spread = [
        MaskedTensor(m._data.expand(full).clone(), m._full_mask().expand(full)) if isinstance(m, MaskedTensor) else m
        for m in mixed
    ]
    got, wanted = call(*mixed, **required(row)), call(*spread, **required(row))
    assert torch.equal(got.get_mask(), wanted.get_mask())
    assert torch.allclose(
        got.get_data().to(torch.complex128), wanted.get_data().to(torch.complex128), equal_nan=True
    ), dtype


# -- operators ----------------------------------------------------------------------------------------------------

BINARY: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("+", lambda a, b: a + b), ("-", lambda a, b: a - b), ("*", lambda a, b: a * b), ("/", lambda a, b: a / b),
    ("//", lambda a, b: a // b), ("%", lambda a, b: a % b), ("**", lambda a, b: a**b), ("<", lambda a, b: a < b),
    ("<=", lambda a, b: a <= b), (">", lambda a, b: a > b), (">=", lambda a, b: a >= b), ("==", lambda a, b: a == b),
    ("!=", lambda a, b: a != b), ("&", lambda a, b: a & b), ("|", lambda a, b: a | b), ("^", lambda a, b: a ^ b),
    ("<<", lambda a, b: a << b), (">>", lambda a, b: a >> b),
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
    assert (-m).tolist() == (-m).tolist() == [-1, None]
    assert (+m).tolist() == [1, None]
    assert abs(-m).tolist() == [1, None]
    assert (~(m > 0)).tolist() == [False, None]


def test_operators_in_place_reach_every_tensor_that_shares_the_cells() -> None:
    m = ms.masked_tensor([[1.0, 2.0], [3.0, 4.0]], torch.tensor([[True, False], [True, True]]))
    alias, row = m, m[1]
    m += 1
    row *= 10
    assert alias is m
    assert m.tolist() == [[2, None], [40, 50]]
    m[0] -= ms.masked_tensor([1.0, 1.0], torch.tensor([False, True]))
    assert m.tolist() == [[None, None], [40, 50]]
    m /= torch.tensor([[1.0], [10.0]])
    assert m.tolist() == [[None, None], [4, 5]]


def test_an_operator_in_place_follows_the_policy() -> None:
    m = ms.masked_tensor([1.0, 2.0], torch.tensor([True, False]))
    with ms.policy("union"):
        m += torch.tensor([1.0, 5.0])
    assert m.tolist() == [2, 5]


def test_an_operator_in_place_is_refused_rather_than_lost() -> None:
    m = ms.masked_tensor([1, 2])
    with pytest.raises(DtypeError, match="in place"):
        m += 0.5
    with pytest.raises(ShapeError, match="in place"):
        m += torch.ones(3, 2, dtype=torch.int64)
    whole = MaskedTensor(torch.arange(4.0).reshape(2, 2))
    row = whole[0]
    row += 1.0
    assert whole.tolist() == [[1, 2], [2, 3]]
    with pytest.raises(MaskError, match="would be lost"):
        row += ms.masked_tensor([1.0, 1.0], torch.tensor([True, False]))
    expanded = ms.masked_tensor([1.0], torch.tensor([True])).expand(3)
    with pytest.raises(ShapeError, match="clone"):
        expanded += 1
    plain = torch.ones(2)
    with pytest.raises(MaskError, match="in place"):
        plain += ms.masked_tensor([1.0, 2.0])
    broadcast = MaskedTensor(torch.arange(6.0).reshape(2, 3), torch.tensor([[True, False, True]]))
    view = broadcast[0]
    broadcast[0, 1] = 7.0
    view += 1  # its own mask still hides the cell that is valid now
    assert broadcast.tolist() == [[1, 7, 3], [3, None, 5]]


def test_inplace_true_is_no_secret() -> None:
    m = ms.masked_tensor([-1.0, 2.0], torch.tensor([True, False]))
    for call in (
        torch.nn.functional.relu,
        torch.nn.functional.leaky_relu,
        torch.nn.functional.silu,
        torch.nn.functional.elu,
    ):
        with pytest.raises(UncoveredFunctionError, match="inplace=True"):
            call(m, inplace=True)
        assert call(m, inplace=False).get_mask().tolist() == [True, False]
    assert torch.nn.ReLU()(m).tolist() == [0, None]
    with pytest.raises(AttributeError, match=r"m\[\.\.\.\]"):
        m.add_(1)


# -- masks and policies -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "row", [r for r in ELEMENTWISE if any(i is not None for i in r.identity)], ids=lambda r: r.name
)
def test_under_union_a_missing_operand_changes_nothing(row: Elementwise) -> None:
    """Cell by cell: with one side missing, the op of the identity and the other side; op(x, x) where that is the identity."""
    for dtype, samples, _ in taken(row):
        if dtype in WIDE or len(row.operands) != 2:
            continue
        for missing, identity in enumerate(row.identity):
            if identity is None:
                continue
            x = samples[1 - missing].data
            sides: list[Any] = [x, x]
            sides[missing] = ms.masked_tensor(samples[missing].data, torch.zeros_like(samples[missing].mask))
            got = getattr(ms, row.name)(*sides, policy="union")
            sides[missing] = x if identity == OTHER else torch.full_like(x, identity)  # type: ignore[arg-type]
            wanted = getattr(ms, row.name)(*sides)
            assert got.get_mask().all()
            assert_same_bits((got.get_data(),), (wanted.get_data(),), f"{row.name} {dtype}")


def test_identities_hold_in_mixed_dtypes_and_beside_nan() -> None:
    small = ms.masked_tensor(torch.tensor([5], dtype=torch.int8), torch.tensor([False]))
    assert ms.maximum(small, torch.tensor([-1000]), policy="union").tolist() == [-1000]
    nan = torch.tensor([math.nan])
    assert math.isnan(ms.fmax(ms.masked_tensor([1.0], torch.tensor([False])), nan, policy="union").item())
    assert (
        ms.clamp(ms.masked_tensor([5.0]), min=ms.masked_tensor([9.0], torch.tensor([False])), policy="union").item()
        == 5
    )


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


def test_clamp_takes_numbers_tensors_and_none() -> None:
    m = ms.masked_tensor([-5.0, 0.5, 5.0, 7.0], torch.tensor([True, True, True, False]))
    low = ms.masked_tensor([-1.0, -1.0, 6.0, 0.0], torch.tensor([True, False, True, True]))
    assert ms.clamp(m, -1, 1).tolist() == torch.clip(m, -1, 1).tolist() == m.clip(-1, 1).tolist() == [-1, 0.5, 1, None]
    assert torch.clamp(m, max=1).tolist() == [-5, 0.5, 1, None]
    assert ms.clamp(m, low, 9).tolist() == [-1, None, 6, None]
    with pytest.raises(DataError):
        ms.clamp(m)


# -- NaN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [r for r in ELEMENTWISE if f32 in r.accepts and r.name != "nan_to_num"], ids=lambda row: row.name
)
def test_nan_is_a_value_a_missing_cell_or_an_error(row: Elementwise) -> None:
    samples = operands(row, f32)
    tensors = [i for i, s in enumerate(samples) if isinstance(s, Masked)]
    call, place = getattr(ms, row.name), tensors[-1]
    try:
        expected_of(row, f32, data_of(samples))
    except RuntimeError:  # torch computes it in integers
        return
    valid_cell = tuple(samples[place].mask.nonzero()[0].tolist())
    hidden_cell = tuple((~samples[place].mask).nonzero()[0].tolist())
    samples[place].data[hidden_cell] = math.nan
    calm = call(*masked(samples), **required(row), nan="raise")
    for nan in (None, "propagate", "omit"):
        got = call(*masked(samples), **required(row), nan=nan)
        assert_same_bits((got.get_data(), got.get_mask()), (calm.get_data(), calm.get_mask()), f"{row.name} {nan}")
    samples[place].data[valid_cell] = math.nan
    with pytest.raises(NanError, match="nan=raise"):
        call(*masked(samples), **required(row), nan="raise")
    got = call(*masked(samples), **required(row), nan="omit")
    samples[place].mask[valid_cell] = False
    wanted = call(*masked(samples), **required(row))
    assert_same_bits((got.get_data(), got.get_mask()), (wanted.get_data(), wanted.get_mask()), row.name)


def test_a_nan_number_and_a_plain_tensor_follow_the_policy_too() -> None:
    m, plain = ms.masked_tensor([1.0, 2.0]), torch.tensor([math.nan, 1.0])
    assert ms.add(m, math.nan, nan="omit").tolist() == [None, None]
    assert ms.add(m, plain, nan="omit").tolist() == [None, 3.0]
    assert ms.add(m, plain, nan="omit", policy="union").tolist() == [1.0, 3.0]
    assert ms.add(torch.tensor([1, 2]), 1, nan="raise").tolist() == [2, 3]
    with pytest.raises(NanError):
        ms.exp(torch.complex(plain, plain), nan="raise")
    with pytest.raises(ParameterError, match="nan"):
        ms.exp(m, nan="never")
    assert ms.nan_to_num(ms.masked_tensor(plain), 7.0).tolist() == [7, 1]
    assert torch.nan_to_num(m / 0, posinf=math.inf).tolist() == [math.inf, math.inf]


# -- dtypes -------------------------------------------------------------------------------------------------------


def u64s(*values: int) -> MaskedTensor:
    return MaskedTensor(torch.tensor(values, dtype=torch.uint64))


def test_u64_is_compared_as_it_is() -> None:
    a, b = u64s(2**64 - 1, 5, 2**63), u64s(1, 5, 2**63 - 1)
    assert (a > b).tolist() == [True, False, True]
    assert (a <= b).tolist() == [False, True, False]
    assert (a == 2**64 - 1).tolist() == [True, False, False]
    assert (a >= torch.tensor(7, dtype=torch.uint8)).tolist() == [True, False, True]
    assert ms.maximum(a, b).tolist() == [2**64 - 1, 5, 2**63]
    assert ms.minimum(a, b).tolist() == [1, 5, 2**63 - 1]
    assert torch.where(torch.tensor([True, False, True]), a, b).tolist() == [2**64 - 1, 5, 2**63]
    assert ms.where(torch.tensor([True, False, True]), a, 3).tolist() == [2**64 - 1, 3, 2**63]
    hidden = MaskedTensor(a._data, torch.tensor([True, False, True]))
    assert ms.maximum(hidden, b).tolist() == [2**64 - 1, None, 2**63]
    assert ms.minimum(hidden, b, policy="union").tolist() == [1, 5, 2**63 - 1]


def test_u64_arithmetic_names_what_to_do() -> None:
    for call in (lambda: u64s(1) + 1, lambda: ms.exp(u64s(1))):
        with pytest.raises(DtypeError, match=r"torch\.int64 where"):
            call()
    for other in (torch.tensor([1]), -1, 0.5, 2**64):
        with pytest.raises(DtypeError, match="holds both"):
            _ = u64s(1) < other


def test_storage_types_are_widened_first() -> None:
    eights = MaskedTensor(torch.tensor([448.0, 2.0]).to(torch.float8_e4m3fn), torch.tensor([True, False]))
    assert ((eights + eights).dtype, (eights + eights).tolist()) == (torch.float32, [896, None])
    sixteens = MaskedTensor(torch.tensor([65535, 1], dtype=torch.uint16))
    assert ((sixteens * 65535).dtype, (sixteens * 65535).tolist()) == (torch.int64, [65535**2, 65535])
    assert (sixteens + torch.tensor([0.5, 0.5])).tolist() == [65535.5, 1.5]
    assert ms.where(torch.tensor([True, False]), eights, eights).dtype is torch.float8_e4m3fn
    assert ms.where(torch.tensor([True, False]), sixteens, torch.tensor([-1])).tolist() == [65535, -1]


def test_complex_cells() -> None:
    z = ms.masked_tensor(torch.tensor([3 + 4j, 1j]), torch.tensor([True, False]))
    assert (abs(z).dtype, abs(z).tolist()) == (torch.float32, [5, None])
    assert (z == 3 + 4j).tolist() == [True, None]
    assert (z * z).tolist() == [-7 + 24j, None]
    assert ms.angle(z).get_mask().tolist() == [True, False]
    assert (z.conj() + 0).tolist() == [3 - 4j, None]
    assert ms.complex(ms.masked_tensor([1.0]), ms.masked_tensor([2.0])).tolist() == [1 + 2j]
    with pytest.raises(DtypeError, match="lt does not take c64"):
        _ = z < z
    assert (z + torch.ones(2, dtype=torch.float64)).dtype is torch.complex128


def test_a_dtype_that_torch_has_no_kernel_for_is_a_dtype_error() -> None:
    whole = ms.masked_tensor([1, 2])
    with pytest.raises(DtypeError, match="convert to a float"):
        ms.logaddexp(whole, whole)


def test_an_int_beyond_its_partners_dtype_is_compared_as_it_is() -> None:
    """torch wraps it: torch.tensor([5], dtype=torch.uint8) < -1 is True there."""
    small = ms.masked_tensor(torch.tensor([5, 200], dtype=torch.uint8), torch.tensor([True, True]))
    for number in (-1, 300, 2**40):
        for operator in (lambda a, b: a < b, lambda a, b: a >= b, lambda a, b: a == b, lambda a, b: a != b):
            assert operator(small, number).tolist() == [operator(5, number), operator(200, number)]
            assert operator(number, small).tolist() == [operator(number, 5), operator(number, 200)]
    for call in (
        lambda: ms.maximum(small, -1), lambda: ms.clamp(small, -1, 3), lambda: ms.clamp_min(small, -1), lambda: small % 300,
        lambda: small // 300, lambda: ms.div(small, 300, rounding_mode="floor"), lambda: small == 2**70,
    ):  # fmt: skip
        with pytest.raises(DtypeError, match="does not fit"):
            call()
    assert (small + -1).tolist() == [4, 199]
    assert (small / 500).tolist() == (torch.tensor([5.0, 200.0]) / 500).tolist()


# -- where torch raises, or worse ---------------------------------------------------------------------------------


def test_a_hidden_zero_divides_nothing_and_a_valid_one_raises() -> None:
    divisor = ms.masked_tensor([2, 0], torch.tensor([True, False]))
    assert (6 // divisor).tolist() == [3, None]
    assert ms.fmod(6, divisor).tolist() == [0, None]
    with pytest.raises(DataError, match="ZeroDivisionError"):
        6 // ms.masked_tensor([2, 0])


def test_abs_of_the_smallest_int_is_an_error_unless_it_is_hidden() -> None:
    data = torch.tensor([-(2**63), -3])
    with pytest.raises(IntegerOverflowError, match="does not fit int64"):
        ms.abs(ms.masked_tensor(data))
    assert ms.abs(ms.masked_tensor(data, torch.tensor([False, True]))).tolist() == [None, 3]


SMALLEST = """
import itertools, torch, maskserve as ms
for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
    lowest = torch.iinfo(dtype).min
    some = torch.tensor([lowest, lowest + 1, -3, -1, 1, 3, -lowest - 1], dtype=dtype).repeat(20)
    for other in (-1, 1, 3, lowest, -7):
        by = torch.full_like(some, other)
        for call in (ms.floor_divide, ms.remainder, ms.fmod, ms.gcd, ms.lcm, ms.pow,
                     ms.bitwise_left_shift, ms.bitwise_right_shift,
                     lambda a, b: ms.div(a, b, rounding_mode="trunc"), lambda a, b: ms.div(a, b, rounding_mode="floor")):
            for pair in ((some, by), (by, some)):
                try:
                    call(*pair)
                except ms.MaskserveError:
                    pass
    assert ms.div(some, -1, rounding_mode="trunc").tolist()[:4] == [lowest, -lowest - 1, 3, 1]
print("alive")
"""


def test_the_smallest_ints_do_not_end_the_process() -> None:
    """torch.div(smallest, -1, rounding_mode="trunc") and torch.lcm of it are a SIGFPE."""
    run = subprocess.run([sys.executable, "-c", SMALLEST], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "alive\n"), run.stderr


def test_lcm_is_numpys() -> None:
    some = torch.arange(-12, 13)
    a, b = torch.meshgrid(some, some, indexing="ij")
    assert torch.equal(ms.lcm(a, b).get_data(), torch.as_tensor(np.lcm(a.numpy(), b.numpy())))


# -- other people's answers ---------------------------------------------------------------------------------------

NUMPY = {
    "sin": "sin", "cos": "cos", "exp": "exp", "atan": "arctan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh",
    "asinh": "arcsinh", "floor": "floor", "ceil": "ceil", "abs": "absolute", "neg": "negative", "logical_not": "logical_not",
    "add": "add", "sub": "subtract", "mul": "multiply", "hypot": "hypot", "atan2": "arctan2", "eq": "equal", "ne": "not_equal",
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
    "logical_and": "logical_and", "logical_or": "logical_or", "logical_xor": "logical_xor",
    "maximum": "maximum", "minimum": "minimum",
    "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or", "bitwise_xor": "bitwise_xor", "conj_physical": "conjugate",
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_ma_gives_the_same_values_and_mask(name: str) -> None:
    """Where numpy.ma does not mask what it thinks outside the domain."""
    row = ms.OPS[name]
    assert isinstance(row, Elementwise)
    for dtype in (dtypes.f64, dtypes.i64):
        if dtype not in {taken_dtype for taken_dtype, _, _ in taken(row)}:
            continue
        samples = operands(row, dtype)
        theirs = getattr(np.ma, NUMPY[name])(*[np.ma.array(s.data.numpy(), mask=~s.mask.numpy()) for s in samples])
        ours = getattr(ms, name)(*masked(samples))
        if ours.dtype is torch.float32:  # torch's floats of integers are float32
            ours, theirs = ours.double(), theirs.astype(np.float32)
        assert np.array_equal(~np.ma.getmaskarray(theirs), ours.get_mask().numpy()), name
        np.testing.assert_allclose(
            ours.numpy().compressed(), theirs.compressed(), rtol=1e-6 if dtype is dtypes.i64 else 1e-14
        )


def test_what_numpy_ma_hides_is_a_value_here() -> None:
    """P14: log of 0 and -1, and 1/0, are values of valid cells; numpy.ma masks them without a word."""
    got = ms.log(ms.masked_tensor([0.0, -1.0, 1.0])).get_data()
    assert got[0] == -math.inf
    assert got[1].isnan()
    assert (ms.masked_tensor([1.0, 0.0]) / 0).get_data()[0] == math.inf


# -- what no row covers -------------------------------------------------------------------------------------------


def test_a_function_without_a_row_raises_and_names_a_way_out() -> None:
    m = ms.masked_tensor([1.0, 2.0], torch.tensor([True, False]))
    for call in (torch.fft.fft, torch.max, torch.zeros_like):
        if call in table():
            continue
        with pytest.raises(UncoveredFunctionError, match=r"get_data|maskserve|to_tensor"):
            call(m)
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


NOT_COVERED = {
    **dict.fromkeys(("max", "min"), "of two tensors they are maximum and minimum; of one they select"),
    **dict.fromkeys(("to", "cpu", "double", "float", "bool", "type_as", "to_dense", "dequantize"), "a method, or no use"),
    "empty_like": "what lies in memory, which may be what another function left there",
    **dict.fromkeys(("zeros_like", "ones_like"), "makes cells from a shape: give it m.get_data()"),
    **dict.fromkeys(("alias_copy", "detach_copy", "slice_copy", "squeeze_copy", "slice_inverse"), "for compiled graphs"),
    **dict.fromkeys(("module_load", "resize_as", "sym_sum"), "no computation on cells"),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout", "binomial"), "random"),
    "hinge_embedding_loss": "a loss, with a reduction",
    **dict.fromkeys(
        [f"{family}_{kind}" for family in ("chebyshev_polynomial", "shifted_chebyshev_polynomial") for kind in "tuvw"]
        + ["hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"],
        "torch loops up to the degree, and a degree of 1e18 under the mask would never end",
    ),
    "chain_matmul": "a contraction; of one matrix it is that matrix",
}  # fmt: skip
"""Elementwise functions of torch without a row, each with the reason."""


def is_elementwise(function: Callable[..., Any], n: int) -> bool:
    """Whether a function of n tensors works cell by cell: a permutation and a part of the cells go through it."""
    x = [torch.linspace(0.11, 0.93, 12).roll(i).reshape(3, 4) for i in range(n)]
    order = torch.tensor([2, 0, 1])

    def call(*tensors: Tensor) -> Tensor:
        result: Tensor = function(*[t.clone() for t in tensors])
        return result

    try:
        whole, turned, part = call(*x), call(*[t[order] for t in x]), call(*[t[:2, 1:] for t in x])
        again = call(*x)
    except Exception:  # it takes other arguments
        return False
    if not all(isinstance(r, Tensor) and r.layout is torch.strided for r in (whole, turned, part, again)):
        return False
    if whole.shape != x[0].shape or whole.dtype not in (torch.float32, torch.float64, torch.bool):
        return False
    pairs = ((whole, again), (whole[order], turned), (whole[:2, 1:], part))
    return all(torch.allclose(a.double(), b.double(), equal_nan=True) for a, b in pairs)


def test_every_elementwise_function_of_torch_has_a_row_or_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overridable = torch.overrides.get_overridable_functions()
    missing = set()
    for home in (torch, torch.Tensor, torch.nn.functional, torch.special):
        for function in overridable[home]:
            name = getattr(function, "__name__", "")
            if function in table() or name.startswith("_") or name.endswith("_"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if is_elementwise(function, 1) or is_elementwise(function, 2):
                    missing.add(name.removeprefix("special_"))
    assert missing <= set(NOT_COVERED), sorted(missing - set(NOT_COVERED))
    assert not {row.name for row in ELEMENTWISE} & set(NOT_COVERED)


@hypothesis.given(shapes=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=3))
@hypothesis.settings(max_examples=300)
def test_shapes_are_broadcast_as_torch_does(shapes: list[list[int]]) -> None:
    try:
        expected = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        with pytest.raises(ValueError, match=r"\["):
            broadcast(*shapes)
    else:
        assert broadcast(*shapes) == expected
