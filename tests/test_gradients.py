"""The laws that the gradient of every op obeys, by the table: values by torch's own checks, masks by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import GradientError
from maskserve.ops import OPS
from maskserve.ops.rows import Contraction, Elementwise, MaskRule, Whole
from tests.gradient_samples import (
    CASES,
    EACH_CELL,
    FLOAT_ELEMENTWISE,
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
from tests.samples import SLICED, assert_same_bits, bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's own, in forward mode
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
