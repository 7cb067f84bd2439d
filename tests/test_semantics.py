"""The cases that a result must satisfy (values and validity), and where existing systems are silently wrong."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import (
    DimError,
    DtypeError,
    EmptySliceError,
    MaskedValueError,
    MaskError,
    MaskserveError,
    MaskShapeError,
    NanError,
    ParameterError,
)

T, F, nan = True, False, math.nan


def b(*cells: object) -> torch.Tensor:
    return torch.tensor(cells, dtype=torch.bool)


def near(got: MaskedTensor, expected: object, digits: float = 5e-5) -> bool:
    """Whether the nested lists agree, None with None, numbers to four digits."""

    def same(a: object, e: object) -> bool:
        if isinstance(e, list):
            return isinstance(a, list) and len(a) == len(e) and all(map(same, a, e))
        if e is None or a is None:
            return a is e
        return math.isclose(float(a), float(e), rel_tol=digits, abs_tol=digits)  # type: ignore[arg-type]

    return same(got.tolist(), expected)


# -- from the MaskedTensor overview and its companions ------------------------------------------------------------


def test_o1_indexing_and_slicing() -> None:
    cells = torch.arange(24.0).reshape(2, 3, 4)
    m = ms.masked_tensor(cells, cells % 2 == 0)
    assert m[0].tolist() == [[0, None, 2, None], [4, None, 6, None], [8, None, 10, None]]
    assert m[:, :, 2:4].tolist() == [
        [[2, None], [6, None], [10, None]],
        [[14, None], [18, None], [22, None]],
    ]


def test_o2_the_value_of_where_exp() -> None:
    x = torch.tensor([-10.0, -5, 0, 5, 10, 50, 60, 70, 80, 90, 100])
    whole = ms.masked_tensor(x)
    assert near(ms.where(whole < 0, ms.exp(whole), 1).sum(), 9.0068)
    negative, ones = ms.masked_tensor(x, x < 0), ms.masked_tensor(torch.ones(11), x >= 0)
    assert near(ms.where(x < 0, ms.exp(negative), ones).sum(), 9.0068)


def test_o6_softmax_over_valid_cells() -> None:
    data = torch.full((3, 3), nan)
    data[0, 0], data[1, 0], data[1, 2] = 0.7036, -0.1679, -0.4656
    got = ms.softmax(ms.masked_tensor(data, ~data.isnan()), 0)
    assert near(got, [[0.7051, None, None], [0.2949, None, 1], [None, None, None]])


def test_o7_o8_o9_mean_argmin_and_nothing_valid() -> None:
    x = torch.arange(16.0)
    y = x * (x % 4)
    m = ms.masked_tensor(y, y != 0)
    assert near(m.mean(), 16.6667)
    assert (m.argmin().tolist(), m.argmin().dtype) == (1, torch.int64)
    assert ms.masked_tensor(torch.full((16,), nan), b(*[F] * 16)).mean().tolist() is None


def test_a3_reductions_over_dim_1() -> None:
    m = ms.masked_tensor(torch.arange(12.0).reshape(3, 4), b([T, F, T, T], [F, F, F, F], [F, T, T, F]))
    assert m.sum(1).tolist() == [5, None, 19]
    assert near(m.mean(1), [1.6667, None, 9.5])
    assert m.amin(1).tolist() == [0, None, 9]
    assert m.amax(1).tolist() == [3, None, 10]


def test_a4_the_order_of_sum_and_plus_matters() -> None:
    d0 = torch.arange(10.0).reshape(2, 5)
    k0, k1 = b([T, T, F, F, F], [F, F, F, T, T]), b([F, F, F, T, T], [T, T, F, F, F])
    n0, n1 = ms.masked_tensor(d0, ~k0), ms.masked_tensor(d0 + 10, ~k1)
    assert (n0 + n1).sum(0).tolist() == [None, None, 38, None, None]
    assert (n0.sum(0) + n1.sum(0)).tolist() == [15, 17, 38, 21, 23]


# -- where existing systems are silently wrong --------------------------------------------------------------------


def test_1_assignments_have_an_effect() -> None:
    m = ms.masked_tensor(torch.zeros(2, 2), b([T, F], [F, T]))
    m[0] = torch.tensor([3.0, 4.0])
    m[1, 0] = 5
    assert m.tolist() == [[3, 4], [5, 0]]
    m[0] = ms.masked_tensor([7.0, 8.0], b(F, T))
    assert m.tolist() == [[None, 8], [5, 0]]
    m[1][0] = 9
    assert m.tolist() == [[None, 8], [9, 0]]
    m[m > 8.5] = -1
    assert m.tolist() == [[None, 8], [-1, 0]]


def test_an_assignment_that_would_be_lost_is_refused() -> None:
    whole = ms.masked_tensor(torch.zeros(2, 2))
    whole[0][1] = 3.0
    assert whole.tolist() == [[0, 3], [0, 0]]
    with pytest.raises(MaskError, match="would be lost"):
        whole[0][1] = ms.masked_tensor(1.0, torch.tensor(F))
    broadcast = ms.masked_tensor(torch.zeros(2, 2), b([T], [F]))
    with pytest.raises(MaskError, match="would be lost"):
        broadcast[1][0] = 3.0
    broadcast[1, 0] = 3.0
    assert broadcast.tolist() == [[0, 0], [3, None]]
    whole[0, 1] = ms.masked_tensor(1.0, torch.tensor(F))
    assert whole.tolist() == [[0, None], [0, 0]]


def test_2_comparisons_honour_both_masks() -> None:
    a, c = ms.masked_tensor([1, 2, 3], b(T, F, T)), ms.masked_tensor([2, 2, 2], b(T, T, F))
    assert (a < c).tolist() == [True, None, None]
    assert (a > c).tolist() == [False, None, None]


def test_3_copying_never_makes_an_invalid_cell_valid() -> None:
    target, source = ms.masked_tensor([1.0, 2.0], b(T, T)), ms.masked_tensor([3.0, nan], b(T, F))
    assert target.copy_(source).tolist() == [3, None]


def test_4_negative_dims_of_a_fully_masked_slab() -> None:
    mask = torch.zeros(3, 3, 3, dtype=torch.bool)
    mask[0] = True
    got = ms.masked_tensor(torch.arange(27.0).reshape(3, 3, 3), mask).sum(dim=(-2, -1))
    assert got.tolist() == [36, None, None]


def test_6_vars_third_positional_argument_is_torchs() -> None:
    m = ms.masked_tensor([[1.0, 2.0, 3.0]])
    assert torch.var(m, 1, False).tolist() == torch.var(m.get_data(), 1, False).tolist()
    assert ms.var(m, 1, False, True).tolist() == [m.var(1, correction=0).tolist()]
    assert torch.std(m, dim=1, correction=0, keepdim=True).shape == (1, 1)


def test_7_a_function_given_a_masked_tensor_uses_its_mask() -> None:
    m = ms.masked_tensor([1.0, 2.0, 6.0], b(T, T, F))
    assert ms.mean(m).item() == torch.mean(m).item() == m.mean().item() == 1.5
    assert ms.mean(m, mask=b(F, T, T)).item() == 2.0


def test_9_median_over_all_dims_is_global() -> None:
    data = torch.tensor([[1.0, 100.0], [2.0, 3.0]])
    assert ms.median(data).item() == 2.5
    assert ms.median(data, dim=(0, 1)).item() == 2.5
    assert ms.median(data.reshape(2, 1, 2).expand(2, 3, 2), dim=(0, 2)).tolist() == [2.5] * 3


def test_10_softmax_without_a_dim_is_an_error() -> None:
    m = ms.masked_tensor([[1.0, 2.0]])
    for call in (
        lambda: ms.softmax(m),
        lambda: torch.nn.functional.softmax(m, dim=None),
        lambda: ms.softmax(m, (0, 1)),
    ):
        with pytest.raises(ParameterError, match="dim"):
            call()


def test_12_half_precision_means_and_deviations() -> None:
    assert ms.mean(torch.full((100_000,), 1000.0, dtype=torch.float16)).item() == 1000
    assert ms.std(torch.tensor([6e4, 1, 6e4, 1], dtype=torch.float16)).item() == 34656


def test_14_extremes_that_look_like_identities_are_found() -> None:
    assert ms.argmax(torch.tensor([9.0, -math.inf, 9.0]), mask=b(F, T, F)).item() == 1
    biggest = torch.iinfo(torch.int64).max
    assert ms.argmin(torch.tensor([0, biggest, 0]), mask=b(F, T, F)).item() == 1
    assert ms.amax(torch.tensor([9.0, -math.inf]), mask=b(F, T)).item() == -math.inf


def test_17_a_fill_that_does_not_fit_is_an_error() -> None:
    m = ms.masked_tensor([1, 2], b(T, F))
    assert m.to_tensor(7).tolist() == [1, 7]
    for fill in (0.5, math.nan, 2**70):
        with pytest.raises(DtypeError):
            m.to_tensor(fill)
    with pytest.raises(DtypeError, match="does not fit int8"):
        ms.masked_tensor([1, 2], b(T, F)).to(torch.int8).to_tensor(300)


def test_18_integer_logsumexp_is_a_float() -> None:
    assert ms.logsumexp(torch.tensor([1, 2]), 0).dtype == torch.float64


def test_19_float64_variance_of_a_billion_and_small_values() -> None:
    assert ms.var(torch.tensor([4.0, 7, 13, 16], dtype=torch.float64) + 1e9).item() == 30


# -- parameters ---------------------------------------------------------------------------------------------------


def test_min_count_empty_and_keepdim() -> None:
    m = ms.masked_tensor([[1.0, 2.0], [3.0, 4.0]], b([T, F], [F, F]))
    assert ms.sum(m, 1, min_count=2).tolist() == [None, None]
    assert ms.sum(m, 1, min_count=0).tolist() == [1, 0]
    assert ms.all(m, 1, min_count=0).tolist() == [True, True]
    assert ms.logsumexp(m, 1, min_count=0).tolist() == [1, -math.inf]
    with pytest.raises(ParameterError, match="identity"):
        ms.mean(m, 1, min_count=0)
    assert ms.mean(m, 1, empty=-1).tolist() == [1, -1]
    with pytest.raises(EmptySliceError):
        ms.mean(m, 1, empty="raise")
    with pytest.raises(ParameterError, match="does not fit"):
        ms.argmax(m, 1, empty=0.5)
    assert ms.sum(m, 1, keepdim=True).shape == (2, 1)
    assert ms.sum(m, axis=1, keepdims=True).tolist() == [[1], [None]]


def test_nan_is_a_value_unless_asked() -> None:
    m = ms.masked_tensor([1.0, nan, 3.0], b(T, T, T))
    assert ms.mean(m).get_data().isnan()
    assert ms.mean(m, nan="omit").item() == 2
    assert ms.count(m).item() == 3
    assert ms.count(m, nan="omit").item() == 2
    with pytest.raises(NanError, match="nan=omit"):
        ms.mean(m, nan="raise")
    assert ms.mean(ms.masked_tensor([1.0, nan], b(T, F)), nan="raise").item() == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: ms.sum(m, 5), DimError, "give -2 to 1"),
        (lambda m: ms.sum(m, (0, 0)), DimError, "twice"),
        (lambda m: ms.sum(m, (0, -2)), DimError, "twice"),
        (lambda m: ms.sum(m, 0.5), ParameterError, "dim"),
        (lambda m: ms.sum(m, "time"), ParameterError, "dim"),
        (lambda m: ms.sum(m, True), ParameterError, "dim"),
        (lambda m: ms.sum(m, keepdim=1), ParameterError, "True or False"),
        (lambda m: ms.sum(m, dtype="f65"), DtypeError, "f64"),
        (lambda m: ms.sum(m, dtype=torch.int64), DtypeError, "cannot give i64"),
        (lambda m: ms.sum(m, min_count=-1), ParameterError, "from 0 to"),
        (lambda m: ms.sum(m, nan="drop"), ParameterError, "propagate, omit, raise"),
        (lambda m: ms.sum(m, dim=slice(1)), ParameterError, "dim"),
        (lambda m: ms.amax(m.to(torch.complex64)), DtypeError, "does not take c64"),
        (lambda m: ms.masked_tensor(m.get_data(), b(T, F)), MaskShapeError, "unsqueeze"),
        (lambda m: ms.masked_tensor(m.get_data(), torch.ones(2, 7).bool()), MaskShapeError, "broadcast"),
        (lambda m: ms.from_lengths(m.get_data(), [1, 2, 3], 1), ParameterError, "must be equal"),
        (lambda m: ms.from_lengths(m.get_data(), [1, 9], 1), ParameterError, "from 0 to 3"),
    ],
)
def test_bad_arguments_get_one_clear_line(call: object, error: type[MaskserveError], words: str) -> None:
    m = ms.masked_tensor(torch.ones(2, 3), b([T, F, T], [T, T, T]))
    with pytest.raises(error, match=words) as caught:
        call(m)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_cached_plan_does_not_take_true_for_one() -> None:
    m = ms.masked_tensor(torch.ones(2, 3))
    assert ms.sum(m, 1).tolist() == [3, 3]
    with pytest.raises(ParameterError):
        ms.sum(m, True)


# -- the tensor ---------------------------------------------------------------------------------------------------


def test_conversions_refuse_masked_cells_and_keep_the_rest() -> None:
    m = ms.masked_tensor([[1.0, nan], [3.0, 4.0]], b([T, F], [T, T]))
    for call in (
        lambda: m[0, 1].item(),
        lambda: float(m[0, 1]),
        lambda: bool(m[0, 1]),
        m.to_tensor,
        lambda: np.asarray(m),
    ):
        with pytest.raises(MaskedValueError):
            call()
    assert (m[1, 1].item(), float(m[1, 0]), int(m[1, 0]), bool(m[0, 0])) == (4.0, 3.0, 3, True)
    assert m.tolist() == [[1, None], [3, 4]]
    assert m.numpy().tolist() == [[1, None], [3, 4]]
    assert ms.masked_tensor(m.numpy()).tolist() == m.tolist()
    assert m.to_tensor(0).tolist() == [[1, 0], [3, 4]]
    assert m[1].to_tensor().tolist() == [3, 4]
    assert np.asarray(m[1]).tolist() == [3, 4]
    assert [row.tolist() for row in m] == [[1, None], [3, 4]]
    assert len(m) == 2


def test_torch_masked_comes_in() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.masked.masked_tensor(torch.tensor([1.0, 2.0]), b(T, F))
        assert ms.as_masked_tensor(theirs).tolist() == [1, None]


def test_copies_pickles_and_devices() -> None:
    m = ms.masked_tensor([[1.0, nan], [3.0, 4.0]], b([T, F], [T, T]))
    for other in (copy.copy(m), copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m.clone(), m.to("cpu"), m.double()):
        assert other.tolist() == m.tolist()
    clone = m.clone()
    clone[0, 0] = 9
    assert m.tolist()[0] == [1, None]
    mask = m.get_mask()
    mask[...] = False
    assert m.tolist() == [[1, None], [3, 4]]
    given = b(T, F)
    made = ms.masked_tensor([1.0, 2.0], given)
    given[...] = True
    assert made.tolist() == [1, None]


def test_as_masked_tensor_shares_data_and_intersects_masks() -> None:
    data = torch.tensor([1.0, 2.0, 3.0])
    m = ms.as_masked_tensor(data, b(T, T, F))
    data[0] = 7
    assert ms.as_masked_tensor(m, b(T, F, T)).tolist() == [7, None, None]
    leaf = torch.ones(2, requires_grad=True)
    assert (ms.as_masked_tensor(leaf * 2, b(T, F)).requires_grad) is True
    ms.as_masked_tensor(leaf * 2, b(T, F)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [2, 0]


def test_from_lengths_serves_b_t_and_b_t_d() -> None:
    assert ms.from_lengths(torch.ones(2, 3), [1, 3], 1).tolist() == [[1, None, None], [1, 1, 1]]
    deep = ms.from_lengths(torch.ones(2, 3, 2), torch.tensor([0, 2]), 1)
    assert deep.sum((1, 2)).tolist() == [None, 4]


def test_the_repr_shows_masked_cells_as_dashes() -> None:
    m = ms.masked_tensor([[1.0, nan], [3.0, 4.0]], b([T, F], [T, T]))
    assert repr(m) == "masked_tensor([[1.0000,     --],\n               [3.0000, 4.0000]])"
    assert repr(ms.masked_tensor(1, torch.tensor(F))) == "masked_tensor(--)"
    assert repr(ms.masked_tensor(torch.zeros(0, 3))) == "masked_tensor([], dtype=torch.float32, size=(0, 3))"
    assert "..." in repr(ms.masked_tensor(torch.zeros(5000)))


def test_zero_dims_and_zero_sizes() -> None:
    scalar = ms.masked_tensor(3.0)
    assert scalar.sum().item() == scalar.sum(0).item() == scalar.sum(-1).item() == 3
    empty = ms.masked_tensor(torch.zeros(0, 3))
    assert empty.sum(0).tolist() == [None] * 3
    assert empty.sum(1).tolist() == []
    assert empty.amax(0).tolist() == empty.argmax(0).tolist() == empty.median(0).tolist() == [None] * 3
    assert ms.softmax(empty, 0).shape == ms.cumsum(empty, 1).shape == (0, 3)
    assert ms.exp(empty).shape == (0, 3)


@pytest.mark.parametrize(
    "move",
    [
        lambda t: t.reshape(4, 3), lambda t: t.transpose(0, 1), lambda t: t.permute(1, 0), lambda t: t.t(),
        lambda t: t.unsqueeze(0), lambda t: t.unsqueeze(0).squeeze(0), lambda t: t.flatten(), lambda t: t[None].expand(2, 3, 4),
        lambda t: torch.movedim(t, 0, 1), lambda t: torch.transpose(t, 0, 1), lambda t: t.narrow(1, 1, 2),
        lambda t: t.select(0, 1), lambda t: t.unflatten(1, (2, 2)), lambda t: t.view(2, 6), lambda t: t[:, [0, 2]],
        lambda t: t[..., -1], lambda t: t[torch.tensor([True, False, True])],
    ],
)  # fmt: skip
def test_moves_take_the_mask_along(move: object) -> None:
    data = torch.arange(12.0).reshape(3, 4)
    mask = data % 3 != 0
    got = move(ms.masked_tensor(data, mask))  # type: ignore[operator]
    assert torch.equal(got.get_data(), move(data))  # type: ignore[operator]
    assert torch.equal(got.get_mask(), move(mask))  # type: ignore[operator]


def test_nn_functional_and_special_reach_the_rows() -> None:
    m = ms.masked_tensor([[0.5, nan, 1.5]], b([T, F, T]))
    assert torch.nn.functional.softmax(m, dim=1).tolist() == ms.softmax(m, 1).tolist()
    assert torch.nn.functional.log_softmax(m, dim=-1).tolist() == ms.log_softmax(m, 1).tolist()
    assert torch.special.logsumexp(m, 1).tolist() == ms.logsumexp(m, 1).tolist()
    assert torch.nn.Softmax(dim=1)(m).tolist() == ms.softmax(m, 1).tolist()
