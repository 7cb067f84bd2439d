"""Contractions: pairs of valid cells count, a pair with a masked side adds nothing, a sum of no pair is masked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve import contracting, dtypes
from maskserve.backends.reference import moves
from maskserve.dtypes import DType
from maskserve.errors import (
    DataError,
    DimError,
    DtypeError,
    IntegerOverflowError,
    MaskMismatchError,
    MaskserveError,
    NanError,
    ParameterError,
    ShapeError,
    UncoveredFunctionError,
)
from maskserve.ops import OPS
from maskserve.ops.rows import Contraction
from tests.samples import Masked, assert_same_bits, cells, poisoned, torch_dtype

inf, nan = math.inf, math.nan
T, F = True, False
N = torch.nn.functional
ROWS = [row for row in OPS.values() if isinstance(row, Contraction)]
FLOATS = (dtypes.f64, dtypes.f32, dtypes.f16, dtypes.bf16)
WHOLE = (dtypes.i64, dtypes.i32, dtypes.i16, dtypes.i8, dtypes.u8, dtypes.u16, dtypes.u32, dtypes.boolean)
COMPLEX = (dtypes.c64, dtypes.c128)
FP8 = (dtypes.f8_e4m3, dtypes.f8_e5m2)
ROUNDING = {dtypes.f64: 2**-52, dtypes.f32: 2**-23, dtypes.c128: 2**-50, dtypes.c64: 2**-21}
ROUNDING |= {dtypes.f16: 2**-10, dtypes.bf16: 2**-7, dtypes.f8_e4m3: 2**-23, dtypes.f8_e5m2: 2**-23}
"""Of each product and sum; halves are rounded once more, at the end."""


def m(values: Any, mask: Any = None, dtype: torch.dtype | None = None) -> ms.MaskedTensor:
    made = ms.masked_tensor(values, None if mask is None else torch.tensor(mask))
    return made if dtype is None else made.to(dtype)


def by_name(name: str, **params: Any) -> Callable[[Any], Callable[..., Any]]:
    """`name` in torch or in maskserve."""
    return lambda home: lambda *tensors: (getattr(home, name, None) or getattr(N, name))(*tensors, **params)


def words(equation: str) -> Callable[[Any], Callable[..., Any]]:
    return lambda home: lambda *tensors: home.einsum(equation, *tensors)


CALLS: list[tuple[str, Callable[[Any], Callable[..., Any]], tuple[tuple[int, ...], ...]]] = [
    *[("matmul", by_name("matmul"), shapes) for shapes in (
        ((3, 4), (4, 5)), ((4,), (4,)), ((4,), (4, 5)), ((3, 4), (4,)), ((2, 3, 4), (4,)), ((4,), (2, 4, 5)),
        ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((1, 3, 4), (5, 4, 2)),
        ((6, 2, 3, 4), (6, 2, 4, 3)), ((3, 0), (0, 2)), ((0, 4), (4, 2)), ((0,), (0,)), ((2, 0, 4), (2, 4, 3)),
        ((0, 3, 4), (4, 5)), ((1, 1), (1, 1)), ((3, 1), (1, 5)), ((2, 3, 1), (2, 1, 5)),
    )],
    ("mm", by_name("mm"), ((3, 4), (4, 5))), ("bmm", by_name("bmm"), ((2, 3, 4), (2, 4, 5))),
    ("mv", by_name("mv"), ((3, 4), (4,))), ("dot", by_name("dot"), ((4,), (4,))), ("outer", by_name("outer"), ((4,), (3,))),
    *[("inner", by_name("inner"), shapes) for shapes in (
        ((4,), (4,)), ((3, 4), (4,)), ((2, 3, 4), (5, 4)), ((), (3, 4)), ((2,), ()), ((), ()),
    )],
    *[("tensordot", by_name("tensordot", dims=dims), shapes) for dims, shapes in (
        (2, ((2, 3, 4), (3, 4, 5))), (0, ((2, 3), (4,))), (1, ((3, 4), (4, 5))), (([0, -1], [2, 0]), ((2, 3, 4), (4, 5, 2))),
        (((1,), (0,)), ((2, 1), (3, 4))), (3, ((2, 3, 4), (2, 3, 4))), (([], []), ((2,), (3,))),
    )],
    *[("linear", by_name("linear"), shapes) for shapes in (
        ((2, 3), (4, 3)), ((2, 3), (4, 3), (4,)), ((5, 2, 3), (4, 3), (4,)), ((3,), (4, 3), (4,)), ((2, 3), (3,)),
        ((2, 3), (4, 3), (1,)), ((0, 3), (4, 3), (4,)),
    )],
    *[(f"einsum {equation}", words(equation), shapes) for equation, shapes in (
        ("ij,jk", ((3, 4), (4, 5))), ("ij,jk->ki", ((3, 4), (4, 5))), ("ii", ((3, 3),)), ("ii->i", ((3, 3),)),
        ("ij->ji", ((2, 3),)), ("ij->", ((2, 3),)), ("...ij->...ji", ((2, 3, 4),)), ("i,j", ((2,), (3,))),
        ("b...i,...ij->b...j", ((2, 5, 3), (5, 3, 4))), ("bij,bij->b", ((2, 3, 4), (2, 3, 4))),
        ("ij,ij->ij", ((2, 3), (2, 3))), ("ij,jk,kl->il", ((2, 3), (3, 4), (4, 5))), ("iij,jk->k", ((3, 3, 4), (4, 2))),
        ("ij,kj->", ((2, 3), (4, 3))), ("...,...", ((2, 3), (3,))), ("bhqd,bhkd->bhqk", ((2, 2, 3, 4), (2, 2, 5, 4))),
        ("ij,jk", ((2, 1), (3, 4))), ("", ((),)), ("Ba,aC", ((2, 3), (3, 4))), ("...i->i", ((2, 4, 3),)),
        (" i j , j -> i ", ((2, 3), (3,))), ("i,i,i->i", ((3,), (3,), (3,))),
        ("ijij->ij", ((2, 3, 2, 3),)), ("ij,j->i", ((0, 3), (3,))),
    )],
]  # fmt: skip
many = settings(max_examples=max(300, settings().max_examples))
every_call = pytest.mark.parametrize(("call", "shapes"), [c[1:] for c in CALLS], ids=[f"{c[0]} {c[2]}" for c in CALLS])


def samples(dtype: DType, shapes: Sequence[tuple[int, ...]], share: float = 0.6) -> list[Masked]:
    return [cells(dtype, shape, seed=7 + i, share=share) for i, shape in enumerate(shapes)]


def masked(sample: Masked) -> ms.MaskedTensor:
    return ms.MaskedTensor(sample.data, sample.mask)


def zero_filled(data: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, data, torch.zeros((), dtype=data.dtype))


def test_every_contraction_is_called() -> None:
    assert {row.name for row in ROWS} == {name.split()[0] for name, _, _ in CALLS}


# -- laws over every call -----------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("dtype", [dtypes.f64, dtypes.f32, dtypes.c128], ids=str)
def test_a_full_mask_gives_torchs_shape_dtype_and_values(call: Any, shapes: Any, dtype: DType) -> None:
    given = samples(dtype, shapes)
    expected = call(torch)(*[s.data for s in given])
    for tensors in ([ms.MaskedTensor(s.data, T) for s in given], [s.data for s in given]):
        got = call(ms)(*tensors)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.is_contiguous()
        assert got.get_mask().all() or not all(size for shape in shapes for size in shape)
        torch.testing.assert_close(got.get_data(), expected, rtol=16 * ROUNDING[dtype], atol=256 * ROUNDING[dtype])


@pytest.mark.parametrize(("call", "shapes"), [c[1:] for c in CALLS if len(c[2]) < 3 or "linear" not in c[0]])
@pytest.mark.parametrize("share", [0.6, 0.15])
def test_finite_cells_give_the_product_of_zero_filled_ones_valid_where_masks_meet(
    call: Any, shapes: Any, share: float
) -> None:
    given = samples(dtypes.f64, shapes, share)
    got = call(ms)(*[masked(s) for s in given])
    assert torch.equal(got.get_mask(), call(torch)(*[s.mask.double() for s in given]) > 0)
    expected = call(torch)(*[zero_filled(s.data, s.mask) for s in given])
    torch.testing.assert_close(got.get_data(), expected, rtol=1e-12, atol=1e-12)
    assert not got.get_data()[~got.get_mask()].any()


@every_call
def test_a_plain_tensor_is_valid_everywhere(call: Any, shapes: Any) -> None:
    given = samples(dtypes.f64, shapes)
    for plain in range(len(given)):
        mixed = [s.data if i == plain else masked(s) for i, s in enumerate(given)]
        full = [ms.MaskedTensor(s.data, T) if i == plain else masked(s) for i, s in enumerate(given)]
        a, b = call(ms)(*mixed), call(ms)(*full)
        assert_same_bits((a.get_data(), a.get_mask()), (b.get_data(), b.get_mask()))


@every_call
@pytest.mark.parametrize("dtype", [dtypes.f64, dtypes.f16, dtypes.f8_e4m3, dtypes.i8, dtypes.c64], ids=str)
def test_junk_under_the_mask_changes_no_bit(call: Any, shapes: Any, dtype: DType) -> None:
    given = samples(dtype, shapes)
    clean = call(ms)(*[ms.as_masked_tensor(s.data, s.mask) for s in given])
    for poisons in zip(*[list(poisoned(s)) for s in given], strict=True):
        dirty = call(ms)(*[ms.as_masked_tensor(p, s.mask) for p, s in zip(poisons, given, strict=True)])
        assert_same_bits((dirty.get_data(), dirty.get_mask()), (clean.get_data(), clean.get_mask()), given)


@every_call
def test_strides_and_broadcast_masks_change_nothing_but_rounding(call: Any, shapes: Any) -> None:
    given = samples(dtypes.f64, shapes)
    turned = [ms.MaskedTensor(*(t.movedim(0, -1).contiguous().movedim(-1, 0) if t.ndim else t for t in (s.data, s.mask)))
              for s in given]  # fmt: skip
    a, b = call(ms)(*turned), call(ms)(*[masked(s) for s in given])
    assert torch.equal(a.get_mask(), b.get_mask())
    torch.testing.assert_close(a.get_data(), b.get_data(), rtol=1e-12, atol=1e-12)
    narrow = [s.mask.narrow(0, 0, min(1, len(s.mask))) if s.mask.ndim else s.mask for s in given]
    a = call(ms)(*[ms.MaskedTensor(s.data, n) for s, n in zip(given, narrow, strict=True)])
    b = call(ms)(*[ms.MaskedTensor(s.data, n.expand(s.data.shape)) for s, n in zip(given, narrow, strict=True)])
    assert_same_bits((a.get_data(), a.get_mask()), (b.get_data(), b.get_mask()))


# -- any equation, against every choice of cells ------------------------------------------------------------------

Term = tuple[str, tuple[int, ...]]
"""A letter for each dim, capital ones for those that "..." covers, and the shape."""


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[Term], str]:
    """(words, terms, result): 1 to 3 operands of at most 3 letters, sizes 0 to 3, 1 where they broadcast."""
    sizes = {letter: draw(st.integers(0, 3) if letter == "a" else st.integers(1, 3)) for letter in "abcdXY"}
    terms, said = [], []
    for _ in range(draw(st.integers(1, 3))):
        letters = draw(st.text("abcd", max_size=3))
        covered = "XY"[draw(st.integers(0, 2)) :] if draw(st.booleans()) else None
        at = draw(st.integers(0, len(letters)))
        own = {letter: 1 if draw(st.integers(0, 4)) == 0 else size for letter, size in sizes.items()}
        said.append(letters if covered is None else f"{letters[:at]}...{letters[at:]}")
        labels = letters[:at] + (covered or "") + letters[at:]
        terms.append((labels, tuple(own[label] for label in labels)))
    used = "".join(labels for labels, _ in terms)
    covered = "XY"[-max((sum(c in labels for c in "XY") for labels, _ in terms)) :] if set("XY") & set(used) else ""
    if draw(st.booleans()):
        once = "".join(sorted(c for c in set(used) - set("XY") if used.count(c) == 1))
        return ",".join(said), terms, covered + once
    chosen = "".join(draw(st.permutations(sorted(set(used) - set("XY")))))[: draw(st.integers(0, 3))]
    dots, at = draw(st.booleans()), draw(st.integers(0, len(chosen)))
    words = f"{','.join(said)} -> {chosen[:at]}{'...' if dots else ''}{chosen[at:]}"
    return words, terms, chosen[:at] + (covered if dots else "") + chosen[at:]


def brute_force(terms: Sequence[Term], operands: Sequence[Masked], result: str) -> dict[tuple[int, ...], Any]:
    """Each result cell from every choice of an index for each letter; None where no choice has valid cells alone."""
    sizes: dict[str, int] = {}
    for labels, shape in terms:
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
    lists = [(s.data.tolist(), s.mask.tolist()) for s in operands]
    found: dict[tuple[int, ...], Any] = dict.fromkeys(itertools.product(*[range(sizes[label]) for label in result]))
    for choice in itertools.product(*map(range, sizes.values())):
        at = dict(zip(sizes, choice, strict=True))
        product: Any = 1
        for (labels, shape), (data, mask) in zip(terms, lists, strict=True):
            for label, size in zip(labels, shape, strict=True):
                data, mask = (part[at[label] if size > 1 else 0] for part in (data, mask))
            product = product * data if mask and product is not None else None
        if product is not None:
            place = tuple(at[label] for label in result)
            found[place] = product if found[place] is None else found[place] + product
    return found


@given(equation=equations(), dtype=st.sampled_from([dtypes.f64, dtypes.f16, dtypes.i8, dtypes.i64, dtypes.c64]),
       seed=st.integers(0, 99))  # fmt: skip
@many
def test_einsum_sums_over_every_choice_of_valid_cells(equation: Any, dtype: DType, seed: int) -> None:
    words, terms, result = equation
    operands = []
    for i, (_, shape) in enumerate(terms):
        sample = cells(dtype, shape, seed=seed + i, share=0.6)
        rounded = (
            sample.data.real.clamp(-4, 4).round() if dtype.is_float or dtype in COMPLEX else sample.data.clamp(-4, 4)
        )
        operands.append(Masked(seed, rounded.to(sample.data.dtype), sample.mask))
    tensors = [masked(s) for s in operands]
    got = torch.einsum(words, *tensors)
    for at, expected in brute_force(terms, operands, result).items():
        assert got[at].tolist() == expected, (words, at)
    assert not got.get_data()[~got.get_mask()].any()
    full = [s.data.double() if dtype not in COMPLEX else s.data for s in operands]
    theirs, ours = torch.einsum(words, *full), ms.einsum(words, *full)
    assert ours.shape == theirs.shape
    assert torch.equal(ours.get_data(), theirs)


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8], ids=str)
@pytest.mark.parametrize("k", [1, 7, 400])
def test_floats_are_within_their_rounding_of_the_exact_sum(dtype: DType, k: int) -> None:
    a, b = samples(dtype, [(3, k), (k, 2)])
    got = masked(a) @ masked(b)
    assert got.dtype is (torch.float32 if dtype in FP8 else torch_dtype(dtype))
    computed = ROUNDING[dtypes.f64 if dtype is dtypes.f64 else dtypes.f32]
    for i, j in itertools.product(range(3), range(2)):
        pairs = [
            (Fraction(x), Fraction(y))
            for x, y, is_x, is_y in zip(a.data[i].tolist(), b.data[:, j].tolist(), a.mask[i], b.mask[:, j], strict=True)
            if is_x and is_y
        ]
        if not pairs:
            assert got[i, j].tolist() is None
            continue
        exact, reach = sum(x * y for x, y in pairs), sum(abs(x * y) for x, y in pairs)
        once = ROUNDING[dtype] if dtype in (dtypes.f16, dtypes.bf16) else 0.0
        assert abs(Fraction(got[i, j].item()) - exact) <= computed * (k + 1) * reach + Fraction(once) * abs(exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_once_whatever_joins(dtype: torch.dtype) -> None:
    small = 2.0**-9 if dtype is torch.float16 else 2.0**-6
    a = m([[1.0, small / 2, small / 2]], dtype=dtype)
    assert (a @ torch.ones(3, dtype=dtype)).tolist() == [1 + small]
    three = torch.einsum("ij,k,l->i", a, a[0], torch.ones(1, dtype=dtype))
    assert three.tolist() == [torch.tensor((1 + small) ** 2).to(dtype).item()]
    with_bias = N.linear(a[:, :2], torch.ones(1, 2, dtype=dtype), torch.tensor([small / 2], dtype=dtype))
    assert with_bias.tolist() == [[1 + small]]


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_integers_and_bools_give_int64(dtype: DType) -> None:
    kind = torch_dtype(dtype)
    most = 1 if dtype is dtypes.boolean else min(torch.iinfo(kind).max, 2**30)
    a = m(torch.tensor([[most, most], [1, 0]]).to(kind), [[T, T], [T, F]])
    got = a @ a
    assert got.dtype is torch.int64
    assert got.tolist() == [[most * most + most, most * most], [most, most]]
    assert (a @ a[0]).tolist() == [2 * most * most, most]
    assert torch.einsum("ij->ji", a).tolist() == [[most, 1], [most, None]]


LARGE = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-(2**33), 2**33), st.integers(-9, 9),
    st.sampled_from([-(2**63), 2**63 - 1, 2**62, -(2**62), 2**31, 2**32, 0, 1, -1]),
)  # fmt: skip


@given(data=st.data(), n=st.integers(1, 4), batch=st.integers(1, 2))
@many
def test_integers_are_exact_or_an_error(data: Any, n: int, batch: int) -> None:
    def drawn(cells: Any) -> Any:
        return data.draw(st.lists(cells, min_size=batch * n, max_size=batch * n))

    sides = [(drawn(LARGE), drawn(st.integers(0, 3))) for _ in range(2)]
    a, b = (m(torch.tensor(x).view(batch, n), (torch.tensor(valid) > 0).view(batch, n).tolist()) for x, valid in sides)
    true: list[Any] = []
    for row in range(batch):
        at = [i for i in range(row * n, row * n + n) if sides[0][1][i] and sides[1][1][i]]
        true.append(sum(sides[0][0][i] * sides[1][0][i] for i in at) if at else None)
    if all(value is None or -(2**63) <= value < 2**63 for value in true):
        assert torch.einsum("bi,bi->b", a, b).tolist() == true
    else:
        with pytest.raises(IntegerOverflowError, match="float64"):
            torch.einsum("bi,bi->b", a, b)


@pytest.mark.parametrize("k", [8191, 8192, 8193, 20000])
def test_long_sums_of_large_integers_are_exact(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randint(-(2**24), 2**24, (2, k), generator=generator) for _ in range(2))
    a[:, 0], b[:, 0] = 2**40 - 1, -(2**22)
    valid = torch.rand((2, k), generator=generator) < 0.5
    expected = [[sum(x * y for x, y, v in zip(a[i].tolist(), b[j].tolist(), valid[i].tolist(), strict=True) if v) for j in (0, 1)]
                for i in (0, 1)]  # fmt: skip
    assert (ms.MaskedTensor(a, valid) @ b.T).tolist() == expected


# -- inf and NaN --------------------------------------------------------------------------------------------------

BESIDE: list[tuple[str, Any, Any, Any]] = [
    ("masked beside inf", [[None, 2.0]], [[inf], [3.0]], [[6]]),
    ("masked beside NaN", [[None, 2.0]], [[nan], [3.0]], [[6]]),
    ("inf beside masked", [[-inf, 2.0]], [[None], [3.0]], [[6]]),
    ("only masked beside inf", [[None, None]], [[inf], [nan]], [[None]]),
    ("inf beside masked alone", [[inf, None]], [[None], [inf]], [[None]]),
    ("inf beside 0", [[inf, None]], [[0.0], [1.0]], [["nan"]]),
    ("inf beside -2", [[inf, None]], [[-2.0], [1.0]], [[-inf]]),
    ("inf and -inf", [[inf, -inf, None]], [[1.0], [1.0], [1.0]], [["nan"]]),
    ("inf and -inf from two sides", [[inf, 1.0, None]], [[1.0], [-inf], [nan]], [["nan"]]),
    ("inf and inf from two sides", [[inf, 1.0, None]], [[1.0], [inf], [nan]], [[inf]]),
    ("inf beside inf", [[inf, None]], [[-inf], [1.0]], [[-inf]]),
    ("inf beside NaN", [[inf, None]], [[nan], [1.0]], [["nan"]]),
    ("one row alone", [[nan, 1.0], [None, 1.0]], [[1.0, None], [1.0, 2.0]], [["nan", 2], [1, 2]]),
    ("one column alone", [[1.0, None], [None, 1.0]], [[inf, 1.0], [1.0, 1.0]], [[inf, 1], [1, 1]]),
]


def shown(result: ms.MaskedTensor) -> Any:
    """Nested lists with "nan" for NaN, which equals itself."""
    return [[("nan" if cell is not None and cell != cell else cell) for cell in row] for row in result.tolist()]


@pytest.mark.parametrize(("a", "b", "expected"), [case[1:] for case in BESIDE], ids=[case[0] for case in BESIDE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inf_and_nan_count_beside_valid_cells_only(a: Any, b: Any, expected: Any, dtype: torch.dtype) -> None:
    x, y = m(a, dtype=dtype), m(b, dtype=dtype)
    assert shown(x @ y) == expected
    assert shown((y.T @ x.T).T) == expected
    assert shown(torch.einsum("ij,jk,->ik", x, y, m(1.0, dtype=dtype))) == expected
    assert shown((torch.stack([x * 0, x]) @ torch.stack([y, y]))[1]) == expected


CELLS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.0, inf, -inf, nan, None, None])


@given(data=st.data(), i=st.integers(1, 3), k=st.integers(1, 4), j=st.integers(1, 3), batch=st.integers(1, 2))
@many
def test_any_cells_give_what_pythons_floats_give_pair_by_pair(data: Any, i: int, k: int, j: int, batch: int) -> None:
    def drawn(rows: int, columns: int) -> Any:
        return [data.draw(st.lists(st.lists(CELLS, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
                for _ in range(batch)]  # fmt: skip

    a, b = drawn(i, k), drawn(k, j)
    got = (m(a, dtype=torch.float64) @ m(b, dtype=torch.float64)).tolist()
    for n, row, column in itertools.product(range(batch), range(i), range(j)):
        pairs = [(a[n][row][at], b[n][at][column]) for at in range(k)]
        products = [x * y for x, y in pairs if x is not None and y is not None]
        expected = sum(products) if products else None
        assert got[n][row][column] == expected or (expected != expected and got[n][row][column] != got[n][row][column])


def test_complex_cells_that_meet_no_inf_are_exact() -> None:
    a = m([[complex(inf, 1), 2j], [3j, 1]], [[T, T], [T, T]])
    b = m([[1j, 1], [1, 2]], [[F, T], [T, T]])
    got = a @ b
    assert got[0, 0].item() == 2j
    assert not cmath_finite(got[0, 1].item())
    assert got[1].tolist() == [1, 2 + 3j]


def cmath_finite(value: complex) -> bool:
    return math.isfinite(value.real) and math.isfinite(value.imag)


def test_finite_cells_that_overflow_give_inf_as_in_torch() -> None:
    a = m([[1e300, None], [1.0, 1.0]])
    assert (a @ (a * 1e10)).tolist() == [[inf, None], [inf, 1e10]]
    b = m([[1e308, 1e308]])
    assert ms.inner(b, m([[1.0, 1.0]])).tolist() == [[inf]]


def test_nan_may_be_masked_or_refused() -> None:
    a, b = m([[1.0, nan]]), m([[2.0], [3.0]])
    assert ms.matmul(a, b, nan="omit").tolist() == [[2]]
    assert ms.einsum("ij,jk", a, b, nan="omit").tolist() == [[2]]
    assert N.linear(a, b.T, m([1.0])).isnan().all().item()
    assert ms.linear(m([[1.0]]), m([[2.0], [2.0]]), m([nan, 1.0]), nan="omit").tolist() == [[None, 3]]
    with pytest.raises(NanError, match="matmul"):
        ms.matmul(a, b, nan="raise")
    assert ms.matmul(m([[1.0, nan]], [[T, F]]), b, nan="raise").tolist() == [[2]]
    with pytest.raises(ParameterError, match="nan"):
        ms.matmul(a, b, nan="drop")


# -- torch's spellings --------------------------------------------------------------------------------------------

A = m([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[T, F, T], [T, T, F]])
B = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
AB = [[301, 602], [54, 108]]
BA = [[9, 10, 3], [90, 100, 30], [900, 1000, 300]]
V = torch.tensor([1.0, 10.0, 100.0])

SPELLED: list[tuple[str, Callable[[], Any], Any]] = [
    ("@", lambda: A @ B, AB),
    ("@ of a plain one", lambda: B @ A, BA),
    ("@ of an array", lambda: B.numpy() @ A, BA),
    ("@ an array", lambda: A @ B.numpy(), AB),
    ("@ numpy.ma", lambda: A @ np.ma.masked_equal(B.numpy(), 1), [[300, 602], [50, 108]]),
    ("__matmul__", lambda: torch.Tensor.__matmul__(B, A), BA),
    ("__rmatmul__", lambda: torch.Tensor.__rmatmul__(B, A), AB),
    ("m.matmul", lambda: A.matmul(B), AB),
    ("tensor.matmul", lambda: B.matmul(A), BA),
    ("torch.matmul", lambda: torch.matmul(input=A, other=B), AB),
    ("linalg.matmul", lambda: torch.linalg.matmul(A, B), AB),
    ("mm", lambda: torch.mm(A, B), AB),
    ("tensor.mm", lambda: B.mm(A), BA),
    ("bmm", lambda: torch.bmm(A[None], B[None])[0], AB),
    ("mv", lambda: torch.mv(A, V), [301, 54]),
    ("m.mv", lambda: A.mv(V), [301, 54]),
    ("dot", lambda: torch.dot(A[0], V), 301),
    ("m.dot", lambda: A[0].dot(V), 301),
    ("inner", lambda: torch.inner(A, V), [301, 54]),
    ("outer", lambda: torch.outer(A[0], V[:2]), [[1, 10], [None, None], [3, 30]]),
    ("ger", lambda: torch.ger(A[0], V[:2]), [[1, 10], [None, None], [3, 30]]),
    ("tensordot", lambda: torch.tensordot(A, B, dims=1), AB),
    ("tensordot of named dims", lambda: torch.tensordot(A, B, ([1], [0])), AB),
    ("tensordot of a tensor of dims", lambda: torch.tensordot(A, B, torch.tensor([[1], [0]])), AB),
    ("einsum", lambda: torch.einsum("ij,jk", A, B), AB),
    ("einsum of a plain one", lambda: torch.einsum("ij,jk", B, A), BA),
    ("einsum of a list", lambda: ms.einsum("ij,jk", [A, B]), AB),
    ("einsum's sublists, a plain one first", lambda: torch.einsum(B, [0, 1], A, [1, 2], [0, 2]), BA),
    ("linear", lambda: N.linear(A, B.T), AB),
    ("linear of a plain input", lambda: N.linear(B, A.T), BA),
    ("linear and bias", lambda: N.linear(A, B.T, torch.tensor([1.0, 2.0])), [[302, 604], [55, 110]]),
    ("linear and bias by name", lambda: N.linear(A, weight=B.T, bias=None), AB),
]


@pytest.mark.parametrize(("call", "expected"), [case[1:] for case in SPELLED], ids=[case[0] for case in SPELLED])
def test_torchs_spellings_reach_the_row(call: Callable[[], Any], expected: Any) -> None:
    got = call()
    assert isinstance(got, ms.MaskedTensor)
    assert got.tolist() == expected


def test_a_layer_takes_a_masked_tensor() -> None:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(B.T)
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
        assert layer(A).tolist() == [[302, 604], [55, 110]]


def test_a_masked_bias_masks_as_a_masked_sum_does() -> None:
    bias, weight = m([1.0, None]), m([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert N.linear(A, weight, bias).tolist() == (A @ weight.T + bias).tolist() == [[5, None], [10, None]]
    none = m([[None, None, None]], dtype=torch.float32)
    assert N.linear(none, weight, torch.ones(2)).tolist() == [[None, None]]
    with ms.policy("union"):
        assert N.linear(none, weight, bias).tolist() == [[1, None]]
    with ms.policy("strict"):
        assert N.linear(A, weight, torch.ones(2)).tolist() == [[5, 5], [10, 10]]
        with pytest.raises(MaskMismatchError):
            N.linear(A, weight, bias)


def test_the_values_are_numpy_mas() -> None:
    generator = np.random.default_rng(3)
    for i, k, j in ((4, 6, 5), (1, 3, 1), (7, 2, 7)):
        a, b = (np.ma.MaskedArray(generator.normal(size=s), generator.random(s) < 0.5) for s in ((i, k), (k, j)))
        theirs, ours = np.ma.dot(a, b, strict=False), (m(a) @ m(b)).numpy()
        assert np.array_equal(np.ma.getmaskarray(theirs), ours.mask)
        np.testing.assert_allclose(theirs.filled(0), ours.filled(0), rtol=1e-12, atol=1e-12)


def test_a_result_shares_no_memory() -> None:
    a = m([[1.0, None], [3.0, 4.0]])
    turned = torch.einsum("ij->ji", a)
    turned[0, 0] = 7
    turned[1, 0] = 8
    once = a @ torch.eye(2)
    once[0] = None
    assert a.tolist() == [[1, None], [3, 4]]
    assert turned.tolist() == [[7, 3], [8, 4]]
    rows = m([[1.0], [2.0]], [[T], [F]]) @ torch.ones(1, 3)
    rows[1, 1] = 5
    assert rows.tolist() == [[1, 1, 1], [None, 5, None]]
    a @= torch.eye(2)
    assert a.tolist() == [[1, 0], [3, 4]]


def test_conjugates_and_views_are_read_as_they_are_seen() -> None:
    a = m([[1 + 1j, None], [2j, 3]])
    assert (a.mH @ a).tolist() == (a.mH.clone() @ a).tolist() == [[6, -6j], [6j, 9]]
    assert (a.real.T @ torch.ones(2)).tolist() == [1, 3]


REFUSED: list[tuple[str, Callable[[], Any], type[MaskserveError], str]] = [
    ("inner sizes", lambda: A @ A, ShapeError, r"matmul: dim 0 of other has size 2, dim 1 of input 3; .* \(2, 3\) and \(2, 3\)"),
    ("inner size 1", lambda: A @ B[:1], ShapeError, "must be equal"),
    ("batches", lambda: torch.ones(2, 2, 3) @ torch.stack([A, A, A]).mT, ShapeError, "must be equal or 1"),
    ("no dims", lambda: A.matmul(torch.tensor(1.0)), ShapeError, "other has no dims"),
    ("mm of a vector", lambda: torch.mm(A, V), ShapeError, "mat2 has shape .3,.; it must have 2 dims"),
    ("mm of batches", lambda: torch.mm(A[None], B), ShapeError, "input has shape"),
    ("bmm's batches", lambda: torch.bmm(A[None], torch.ones(2, 3, 2)), ShapeError, "must be equal"),
    ("mv", lambda: torch.mv(A, B), ShapeError, "vec has shape"),
    ("dot", lambda: A[0].dot(V[:2]), ShapeError, "must be equal"),
    ("dot of size 1", lambda: A[0].dot(V[:1]), ShapeError, "must be equal"),
    ("outer", lambda: torch.outer(A, V), ShapeError, "it must have 1 dim"),
    ("inner", lambda: torch.inner(A, B), ShapeError, "must be equal"),
    ("linear's weight", lambda: N.linear(A, B), ShapeError, "weight"),
    ("linear's weights", lambda: N.linear(A, B[None]), ShapeError, "2 dims"),
    ("linear's bias", lambda: N.linear(A, B.T, torch.ones(3)), ShapeError, "bias has shape"),
    ("linear's bias grows", lambda: N.linear(A[0], B.T, torch.ones(2, 2)), ShapeError, "bias has shape"),
    ("dtypes", lambda: A @ B.double(), DtypeError, r"input is f32, other f64; .* float_power\(input, 1\) in an expression"),
    ("a bias's dtype", lambda: N.linear(A, B.T, torch.ones(2, dtype=torch.float64)), DtypeError, "bias f64"),
    ("integer widths", lambda: A.int() @ B.long(), DtypeError, "input is i32, other i64"),
    ("u64", lambda: A @ torch.ones(3, dtype=torch.uint64), DtypeError, "matmul does not take u64"),
    ("tensordot's dims", lambda: torch.tensordot(A, B, 3), ParameterError, "dims is 3"),
    ("tensordot's sizes", lambda: torch.tensordot(A, B, 2), ShapeError, "must be equal or 1"),
    ("tensordot's dim", lambda: torch.tensordot(A, B, ([2], [0])), DimError, "dim 2 is out of range for a"),
    ("tensordot's dim twice", lambda: torch.tensordot(A, B, ([1, -1], [0, 1])), ParameterError, "twice"),
    ("tensordot's sides", lambda: torch.tensordot(A, B, ([1], [0, 1])), ParameterError, "1 dims of a and 2 of b"),
    ("tensordot's words", lambda: ms.tensordot(A, B, "ij"), ParameterError, "dims is 'ij'"),
    ("einsum's letters", lambda: torch.einsum("ij,j1", A, B), ParameterError, "'j1' is not a letter for each dim"),
    ("einsum's dots", lambda: torch.einsum("i..,jk", A, B), ParameterError, "at most one"),
    ("einsum's arrow", lambda: torch.einsum("ij->j->i", A), ParameterError, "is not a letter"),
    ("einsum's result", lambda: torch.einsum("ij->ik", A), ParameterError, "no tensor has the result's k"),
    ("einsum's result twice", lambda: torch.einsum("ij->ii", A), ParameterError, "i twice"),
    ("einsum's tensors", lambda: torch.einsum("ij,jk", A), ParameterError, "names 2 tensors, and 1 are given"),
    ("einsum's dims", lambda: torch.einsum("ijk", A), ShapeError, "operand 0 has shape .2, 3.; it must have 3 dims"),
    ("einsum's dims beside dots", lambda: torch.einsum("...ijk", A), ShapeError, "must have 3 dims"),
    ("einsum's sizes", lambda: torch.einsum("ij,jk", A, A), ShapeError, "dim 0 of operand 1 has size 2, dim 1 of operand 0 3"),
    ("einsum's diagonal", lambda: torch.einsum("ii", A), ShapeError, "must be equal"),
    ("einsum's diagonal of size 1", lambda: torch.einsum("i,ii", m(V), B[:, :1].T), ShapeError, "must be equal .shapes"),
    ("einsum's sublists", lambda: ms.einsum(A, [0, 1]), ParameterError, "equation is a MaskedTensor"),
    ("None", lambda: ms.matmul(A, None), DtypeError, "NoneType is no tensor"),
    ("None among others", lambda: ms.einsum("ij,jk", A, None), DtypeError, "NoneType is no tensor"),
    ("einsum of nothing", lambda: ms.einsum("ij"), ParameterError, "0 are given"),
    ("no equation", lambda: ms.einsum(), ParameterError, "needs equation"),
    ("out=", lambda: torch.matmul(A, B, out=torch.ones(2, 2)), UncoveredFunctionError, "out="),
    ("addmm", lambda: torch.addmm(A, A, B), UncoveredFunctionError, "addmm"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "said"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_does_not_fit_is_said_in_a_line(call: Callable[[], Any], kind: type[MaskserveError], said: str) -> None:
    with pytest.raises(kind, match=said) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_an_operator_leaves_what_is_no_tensor_to_python() -> None:
    for other in (3, 2.0, "x", None, [1.0, 2.0, 3.0]):
        with pytest.raises(TypeError, match="unsupported operand"):
            A @ other
        with pytest.raises(TypeError, match="unsupported operand"):
            other @ A


def test_two_devices_are_an_error() -> None:
    with pytest.raises(DtypeError, match="on meta"):
        A @ torch.ones(3, 2, device="meta")
    row = next(row for row in ROWS if row.operator)
    sides = [moves.Masked(torch.ones(2, 2, device=device), None) for device in ("cpu", "meta")]
    with pytest.raises(DataError, match=r"matmul: the tensors are on cpu and meta; move them to one device"):
        contracting.computable(row, sides)


def test_equal_ways_to_say_it_agree() -> None:
    a, b = samples(dtypes.f64, [(5, 6), (6, 7)])
    x, y = masked(a), masked(b)
    said: Iterator[ms.MaskedTensor] = iter([
        x @ y, torch.mm(x, y), torch.bmm(x[None], y[None])[0], torch.inner(x, y.T), torch.tensordot(x, y, 1), N.linear(x, y.T),
        torch.einsum("ij,jk", x, y), torch.stack([torch.mv(x, y[:, i]) for i in range(7)], 1), (y.T @ x.T).T,
    ])  # fmt: skip
    first = next(said)
    products = torch.stack([torch.outer(x[:, i], y[i]) for i in range(6)]).sum(0)
    for other in (*said, products):
        assert torch.equal(first.get_mask(), other.get_mask())
        torch.testing.assert_close(first.get_data(), other.get_data(), rtol=1e-12, atol=1e-12)
