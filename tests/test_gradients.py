"""The laws that the gradient of every op obeys, by the table: values by torch's own checks, masks by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import maskserve as ms
from maskserve import MaskedTensor, dtypes
from maskserve.errors import GradientError, MaskserveError
from maskserve.ops import OPS
from maskserve.ops.rows import Contraction, Elementwise, MaskRule, Whole
from tests.gradient_samples import (
    CASES,
    EACH_CELL,
    FLOAT_ELEMENTWISE,
    PAIRS,
    PRODUCTS,
    SLICES,
    Case,
    arguments,
    bool_condition,
    loss,
    random_mask,
    required,
    sampled,
    seeded,
    torchs,
)
from tests.samples import MOVES, SLICED, assert_same_bits, bits, torch_dtype
from tests.test_moves import MANY, ONE, ZEROS, Draws, flat, indices, shapes

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
    ),  # torch's own, in forward mode
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # of torch's vmap
]

NO_SECOND_DERIVATIVE = {"hardsigmoid"}
"""Rows whose second derivative torch lacks."""
NO_FORWARD_MODE = {"gammainc", "gammaincc", "zeta"}
"""Rows whose forward-mode derivative torch lacks."""

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_row_with_a_derivative_is_here() -> None:
    here = {case.row.name for case in CASES}
    for row in OPS.values():
        if isinstance(row, Contraction) or (isinstance(row, Whole) and row.vjp):
            assert row.name in here
    assert {row.name for row in SLICED if row.vjp} <= here
    assert {case.row.name for case in FLOAT_ELEMENTWISE if case.row.is_differentiable} <= here  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", [case.row for case in FLOAT_ELEMENTWISE], ids=lambda row: row.name)
def test_the_table_says_by_which_operands_torch_has_no_derivative(row: Elementwise) -> None:
    data = sampled(row)
    assert data is not None
    cells = dict(zip(row.operands, arguments(row, data, plain=True), strict=True))
    for name, value in cells.items():
        if name in ("condition", "n"):
            continue
        leaf = value.clone().requires_grad_()
        made = torchs(row)(*[leaf if other == name else cells[other] for other in cells], **required(row))
        made = made.real if made.is_complex() else made
        try:
            torch.autograd.grad(made.sum(), leaf)
            known = True
        except RuntimeError:  # NotImplementedError too
            known = False
        assert known == (row.is_differentiable and name not in row.no_gradient_by), name


@pytest.mark.parametrize("name", ["bessel_j0", "airy_ai", "floor_divide", "heaviside"])
def test_a_row_without_a_derivative_leaves_no_history(name: str) -> None:
    x = ms.masked_tensor([0.5, 2.0], torch.tensor([True, False]), requires_grad=True)
    made = getattr(ms, name)(*[x] * len(OPS[name].operands))  # type: ignore[attr-defined]
    assert not made.requires_grad
    with pytest.raises(GradientError, match="no history"):
        made.sum().backward()
    (made * x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [made.tolist()[0], None]


@pytest.mark.parametrize("name", ["gammainc", "gammaincc", "zeta"])
def test_an_operand_without_a_derivative_counts_as_a_constant(name: str) -> None:
    x = ms.masked_tensor([1.5, 2.0], torch.tensor([True, False]), requires_grad=True)
    y = ms.masked_tensor([0.5, 0.7], torch.tensor([True, True]), requires_grad=True)
    getattr(ms, name)(x, y).sum().backward()
    assert x.grad is None
    assert y.grad is not None
    assert y.grad.get_mask().tolist() == [True, False]
    assert not getattr(ms, name)(x, y.detach()).requires_grad
    assert torch.func.grad(lambda cells: getattr(ms, name)(ms.as_masked_tensor(cells), 0.5).sum().to_tensor())(
        torch.tensor([1.5])
    ).tolist() == [0]


# -- values ---------------------------------------------------------------------------------------------------------


@every_case
def test_a_first_derivative_is_that_of_finite_differences(case: Case) -> None:
    assert gradcheck(case.closure, case.followed())


@every_case
def test_forward_mode_agrees(case: Case) -> None:
    if case.row.name in NO_FORWARD_MODE:
        with pytest.raises(ms.errors.DataError, match="has not been implemented"):
            gradcheck(case.closure, case.followed(), check_forward_ad=True, check_backward_ad=False)
    else:
        assert gradcheck(case.closure, case.followed(), check_forward_ad=True, check_backward_ad=False)


@every_case
def test_a_second_derivative_is_that_of_finite_differences(case: Case) -> None:
    if case.row.name in NO_SECOND_DERIVATIVE:
        with pytest.raises(RuntimeError, match="not implemented"):
            gradgradcheck(case.closure, case.followed())
    else:
        assert gradgradcheck(case.closure, case.followed(), atol=1e-4)


@pytest.mark.parametrize("case", EACH_CELL, ids=str)
def test_an_elementwise_gradient_is_torchs_of_the_valid_cells_alone(case: Case) -> None:
    assert case.plain is not None
    leaves = case.leaves()
    result = case.op(*leaves)
    valid = result.get_mask()
    weight = torch.randn(result.shape, generator=seeded(case.name), dtype=torch.float64)
    loss(result * weight).backward()
    plain = [cells.expand(result.shape)[valid].requires_grad_() for cells in case.data]
    row = case.row
    assert isinstance(row, Elementwise)
    condition = [bool_condition().get_data()[valid]] if row.rule is MaskRule.CHOSEN else []
    made = torchs(row)(*condition, *plain, **required(row)) if condition else case.plain(*plain)
    made = made * weight[valid]
    (made.real.sum() + made.imag.sum() if made.is_complex() else made.sum()).backward()
    for leaf, cells in zip(leaves, plain, strict=True):
        back = torch.zeros(result.shape, dtype=torch.float64)
        back[valid] = cells.grad if cells.grad is not None else 0
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.to_tensor(0), back.sum_to_size(leaf.shape), rtol=1e-12, atol=1e-12)


# -- masks ----------------------------------------------------------------------------------------------------------


def gradient_mask(leaf: MaskedTensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=torch.bool) if leaf.grad is None else leaf.grad.get_mask()


@every_case
def test_a_gradient_is_specified_where_a_path_of_valid_cells_leads_back(case: Case) -> None:
    for salt in range(4):
        leaves = case.leaves()
        result = case.op(*leaves)
        mask = random_mask(case, result, salt)
        loss(ms.as_masked_tensor(result, mask)).backward()
        expected = case.uses(case.masks, result.get_mask() & mask)
        for leaf, specified in zip(leaves, expected, strict=True):
            assert torch.equal(gradient_mask(leaf), specified), salt
            assert leaf.grad is None or leaf.grad.get_data().isfinite().all()


@every_case
def test_a_fully_masked_tensor_has_a_fully_masked_gradient_and_a_plain_leaf_exactly_0(case: Case) -> None:
    hidden = [torch.zeros_like(mask) for mask in case.masks]
    leaves, factor = case.leaves(masks=hidden), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss(case.op(*[leaf * factor for leaf in leaves])).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.get_mask().any()
        assert_same_bits((leaf.grad.get_data(),), (torch.zeros_like(leaf.get_data()),), case.name)
    assert factor.grad is not None
    assert_same_bits((factor.grad,), (torch.zeros_like(factor),), case.name)


JUNK = (0.0, -0.0, math.nan, math.inf, -math.inf, 3e38)


@every_case
def test_what_lies_under_the_mask_changes_no_bit_of_a_gradient(case: Case) -> None:
    first = None
    for junk in JUNK:
        data = [torch.where(mask, cells, junk) for cells, mask in zip(case.data, case.masks, strict=True)]
        leaves = case.leaves(data)
        factor = torch.tensor(1.03, dtype=torch.float64, requires_grad=True)
        result = case.op(*[leaf * factor for leaf in leaves])
        loss(result).backward()
        assert factor.grad is not None
        parts = [result.get_data().detach(), result.get_mask(), factor.grad]
        for leaf in leaves:
            if leaf.grad is not None:
                parts += [leaf.grad.get_data(), leaf.grad.get_mask()]
        assert all(part.isfinite().all() for part in parts)
        assert first in (None, bits(*parts)), junk
        first = bits(*parts)


@pytest.mark.parametrize("case", [case for case in EACH_CELL if len(case.data) > 1], ids=str)
def test_a_plain_operand_has_a_dense_gradient_and_no_junk_in_it(case: Case) -> None:
    """The last operand is a plain leaf that is broadcast."""
    first = None
    for junk in JUNK:
        data = [torch.where(mask, cells, junk) for cells, mask in zip(case.data, case.masks, strict=True)]
        leaves = case.leaves(data)[:-1]
        plain = case.data[-1].reshape(-1)[0].clone().requires_grad_()
        result = case.op(*leaves, plain)
        loss(result).backward()
        assert plain.grad is not None
        assert plain.grad.isfinite()
        assert first in (None, bits(plain.grad)), junk
        first = bits(plain.grad)


# -- transforms -----------------------------------------------------------------------------------------------------


def real_parts(cells: Tensor) -> Tensor:
    return torch.view_as_real(cells) if cells.is_complex() else cells


@every_case
def test_the_transforms_of_torch_agree_with_backward(case: Case) -> None:
    """jacrev, jacfwd and vmap(grad), by the first operand, of a closure with plain tensors in and out."""
    first, *rest = case.data

    def function(cells: Tensor) -> Tensor:
        return real_parts(case.closure(cells, *rest)).sin()

    expected = torch.autograd.functional.jacobian(function, first)
    torch.testing.assert_close(torch.func.jacrev(function)(first), expected)
    if case.row.name not in NO_FORWARD_MODE:
        torch.testing.assert_close(torch.func.jacfwd(function)(first), expected)
    batch = torch.stack([first, first * 0.99, first * 1.01])
    gradient = torch.func.grad(lambda cells: function(cells).sum())
    alone = torch.stack([gradient(cells) for cells in batch])
    torch.testing.assert_close(torch.func.vmap(gradient)(batch), alone)
    torch.testing.assert_close(alone[0], expected.reshape(-1, *first.shape).sum(0))


@every_case
def test_the_hessian_is_the_jacobian_of_the_gradient(case: Case) -> None:
    if case.row.name in NO_SECOND_DERIVATIVE | NO_FORWARD_MODE:
        pytest.skip("torch lacks a derivative that it takes")
    first, *rest = case.data

    def function(cells: Tensor) -> Tensor:
        return real_parts(case.closure(cells, *rest)).sin().sum()

    expected = torch.autograd.functional.hessian(function, first)
    for transform in (torch.func.hessian(function), torch.func.jacfwd(torch.func.jacfwd(function))):
        torch.testing.assert_close(transform(first), expected, rtol=1e-6, atol=1e-9)


@every_case
def test_our_transforms_agree_with_backward(case: Case) -> None:
    leaves = case.leaves()
    result = case.op(*leaves)
    above = ms.as_masked_tensor(torch.ones_like(result.get_data().detach()), random_mask(case, result, 9))
    result.backward(above)
    value, pull = ms.vjp(case.op, *case.leaves())
    assert_same_bits((value.get_data().detach(), value.get_mask()), (result.get_data().detach(), result.get_mask()))
    for leaf, gradient in zip(leaves, pull(above), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(gradient.get_data(), leaf.grad.get_data())
        assert torch.equal(gradient.get_mask(), leaf.grad.get_mask())


@every_case
def test_a_second_derivative_of_a_part_is_that_of_the_same_cells_beside_zeros(case: Case) -> None:
    """A loss that reaches some results only, differentiated twice: as the closure's, whose loss reaches all of them."""
    if case.row.name in NO_SECOND_DERIVATIVE:
        pytest.skip("torch lacks it")
    leaves, plain = case.leaves(), case.followed()
    result = case.op(*leaves)
    mask = random_mask(case, result, 5)
    direction = [torch.randn(cells.shape, generator=seeded(case.name, 6), dtype=torch.float64) for cells in plain]

    def twice(total: Any, inputs: Any) -> Any:
        first = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        along = [(one * other).sum() for one, other in zip(first, direction, strict=True)]
        along = [one if isinstance(one, Tensor) else one.to_tensor(0) for one in along]
        return torch.autograd.grad(sum(along[1:], along[0]), inputs, materialize_grads=True)

    zero = sum(leaf.to_tensor(0).sum() * 0 for leaf in leaves)  # so that there is always a second derivative
    found = twice(loss(ms.as_masked_tensor(result, mask)) ** 2 + zero**2, leaves)
    parts = real_parts(case.closure(*plain) * mask)
    expected = twice(parts.sum() ** 2 + sum((cells**2).sum() * 0 for cells in plain), plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to_tensor(0), other, rtol=1e-8, atol=1e-10)


# -- moves ----------------------------------------------------------------------------------------------------------


def assert_moved_back(call: Callable[..., Any], index: list[Tensor], masks: list[Tensor]) -> None:
    """Each gradient is what came to the places that its cell went to, by torch's own move of an index tensor."""
    leaves = [ms.masked_tensor(at.double(), mask, requires_grad=True) for at, mask in zip(index, masks, strict=True)]
    parts, places = flat(call(*leaves)), flat(call(*index))
    if not sum(part.numel() for part in parts):
        return  # torch has a wrong shape for pixel_shuffle there
    validity = torch.cat([torch.tensor([True]), *[mask.reshape(-1) for mask in masks]])
    reached, back = torch.zeros(len(validity), dtype=torch.bool), torch.zeros(len(validity), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for i, (part, at) in enumerate(zip(parts, places, strict=True)):
        generator = seeded(i, at.shape)
        weight = torch.randn(at.shape, generator=generator, dtype=torch.float64)
        kept = torch.rand(at.shape, generator=generator) < 0.6
        total = total + (ms.as_masked_tensor(part, kept) * weight).sum().to_tensor(0.0)
        counts = kept & validity[at]
        reached.index_put_((at[counts],), torch.tensor(True))
        back.index_put_((at[counts],), weight[counts], accumulate=True)
    total.backward()
    start = 1
    for leaf in leaves:
        n = leaf.numel()
        expected = reached[start : start + n].reshape(leaf.shape)
        assert torch.equal(gradient_mask(leaf), expected)
        if leaf.grad is not None:
            values = torch.where(expected, back[start : start + n].reshape(leaf.shape), 0.0)
            torch.testing.assert_close(leaf.grad.get_data(), values)
        start += n


NO_HISTORY = {"detach"}


@pytest.mark.parametrize("name", [name for name in {**ONE, **ZEROS} if name not in NO_HISTORY])
@given(cells=indices(), data=st.data())
def test_a_gradient_takes_the_way_of_its_cell_back(
    name: str, cells: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    again = Draws(data)
    assert_moved_back(lambda x: {**ONE, **ZEROS}[name](x, again.anew()), [cells[0]], [cells[1]])


@pytest.mark.parametrize("name", MANY)
@given(shape=shapes, data=st.data())
def test_a_gradient_takes_the_way_of_its_cell_back_to_each_of_several(
    name: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    a, a_mask = data.draw(indices(shape))
    b, b_mask = data.draw(indices(shape))
    assert_moved_back(MANY[name], [a, b + a.numel()], [a_mask, b_mask])


T, F = True, False
X = torch.arange(1, 7, dtype=torch.float64).reshape(2, 3)
X_MASK = torch.tensor([[T, F, T], [T, T, T]])
PLACES = torch.tensor([[0, 2], [2, 0]])
OWN_MOVES: dict[str, Callable[[Any], Any]] = {
    "pad": lambda x: torch.nn.functional.pad(x, (1, 1)),
    "pad value": lambda x: ms.pad(x, (1, 0), value=3.0),
    "pad replicate": lambda x: ms.pad(x, (1, 2), mode="replicate"),
    "masked_fill": lambda x: x.masked_fill(torch.tensor([T, F, F]), 9),
    "masked_fill masked": lambda x: x.masked_fill(ms.masked_tensor([T, F, F], [F, T, T]), 9),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0]), 9),
    "gather masked": lambda x: torch.gather(x, 1, ms.masked_tensor(PLACES, torch.tensor([[T, F], [T, T]]))),
    "index_select masked": lambda x: torch.index_select(x, 1, ms.masked_tensor([0, 2, 2], [F, T, T])),
    "take masked": lambda x: torch.take(x, ms.masked_tensor([0, 5, 5], [F, T, T])),
    "scatter value": lambda x: x.scatter(1, PLACES, 7.0),
    "real": lambda x: torch.complex(x, x * 2).real,
    "imag": lambda x: torch.complex(x, x * 2).imag,
    "conj": lambda x: torch.complex(x, x * 2).conj().imag,
    "view_as_real": lambda x: torch.view_as_real(torch.complex(x, x * 2)),
    "view_as_complex": lambda x: torch.view_as_complex(ms.stack([x, x * 2], -1)),
    "view_as_complex masked": lambda x: torch.view_as_complex(x[:, 1:].contiguous()),
    "indexing": lambda x: x[:, [0, 0, 2]],
    "boolean indexing": lambda x: x[X > 2],
    "iteration": lambda x: ms.stack([row * 2 for row in x]),
}  # fmt: skip


def added_parts(cells: Tensor) -> Tensor:
    return cells.real + cells.imag if cells.is_complex() else cells


@pytest.mark.parametrize("name", OWN_MOVES)
def test_moves_that_make_cells_or_have_masked_indices_carry_gradients(name: str) -> None:
    """By finite differences, and the mask by the Jacobian: a cell is reached if it moves a valid result cell."""

    def function(cells: Tensor) -> Tensor:
        made: Tensor = OWN_MOVES[name](ms.as_masked_tensor(cells, X_MASK)).to_tensor(0.0)
        return made

    assert gradcheck(function, (X.clone().requires_grad_(),), check_forward_ad=True)
    assert gradgradcheck(function, (X.clone().requires_grad_(),))
    leaf = ms.masked_tensor(X, X_MASK, requires_grad=True)
    result = OWN_MOVES[name](leaf)
    moves = torch.func.jacfwd(lambda cells: added_parts(function(cells)))(X).reshape(-1, 6)
    for salt in range(3):
        leaf.grad = None
        kept = torch.rand(result.shape, generator=seeded(name, salt)) < 0.6
        reached = (result.get_mask() & kept).reshape(-1)
        loss(ms.as_masked_tensor(result, kept)).backward(retain_graph=True)
        assert torch.equal(gradient_mask(leaf), (moves[reached] != 0).any(0).reshape(2, 3))


def test_detach_ends_the_history() -> None:
    x = ms.masked_tensor(X, X_MASK, requires_grad=True)
    assert not x.detach().requires_grad
    assert not torch.detach(x).requires_grad
    assert x.detach()._reach is None
    (x.detach() * x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.get_data(), torch.where(X_MASK, X, 0.0))


def test_every_move_has_a_gradient_law() -> None:
    assert {row.name for row in MOVES} <= {*ONE, *ZEROS, *MANY, *[name.split()[0] for name in OWN_MOVES]}


# -- dtypes ---------------------------------------------------------------------------------------------------------

NOT_IN_TORCH = {
    **{(name, dtype): "backward" for name in ("i1", "i1e") for dtype in (dtypes.f16, dtypes.bf16)},
    **{("zeta", dtype): "not defined" for dtype in (dtypes.f16, dtypes.bf16)},
    **{(name, dtype): "automatic" for name in ("silu", "nan_to_num") for dtype in (dtypes.c64, dtypes.c128)},
}
"""Dtypes that torch has the values in, or those beside another dtype, and no derivative; with a word of its error."""
OTHER_DTYPES = (dtypes.f32, dtypes.f16, dtypes.bf16, dtypes.c64, dtypes.c128)


@pytest.mark.parametrize("case", [*EACH_CELL, *SLICES, *PRODUCTS, *PAIRS], ids=str)
def test_a_gradient_has_the_dtype_of_its_tensor_and_no_nan(case: Case) -> None:
    for dtype in OTHER_DTYPES:
        if dtype in case.row.accepts:
            assert_gradient_has_its_dtype_and_no_nan(case, dtype)


def assert_gradient_has_its_dtype_and_no_nan(case: Case, dtype: dtypes.DType) -> None:
    narrow = case.to(torch_dtype(dtype))
    if (said := NOT_IN_TORCH.get((case.row.name, dtype))) is not None:
        with pytest.raises((NotImplementedError, MaskserveError), match=said):
            loss(narrow.op(*narrow.leaves())).backward()
        return
    leaves = narrow.leaves()
    result = narrow.op(*leaves)
    if not result.requires_grad:
        assert result.dtype not in (torch.float32, torch.float16, torch.bfloat16), dtype
        return
    loss(result).backward()
    for leaf, mask in zip(leaves, case.uses(case.masks, result.get_mask()), strict=True):
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype, dtype
            assert not leaf.grad.get_data().isnan().any(), dtype
        assert torch.equal(gradient_mask(leaf), mask), dtype
