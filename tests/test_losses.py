"""Losses: torch's own on the compressed cells, values and gradients, and torch's own where nothing is masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # as torch's own documentation writes it

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import DataError, MaskserveError, ParameterError
from maskserve.ops import OPS
from maskserve.ops.rows import Loss

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
nan, inf = torch.nan, torch.inf
JUNK = (nan, inf, -1e300)
REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class Case:
    """A loss of cells: how inputs and targets are drawn, and its options."""

    name: str
    draw: Callable[[Tensor], Tensor] = lambda cells: cells
    target: Callable[[Tensor], Tensor] = lambda cells: cells
    options: dict[str, Any] = field(default_factory=dict)
    takes_weight: bool = False
    constant_target: bool = False
    """Whether torch has no gradient by the target."""


CASES = [
    Case("mse_loss", takes_weight=True),
    Case("l1_loss", takes_weight=True),
    Case("huber_loss", options={"delta": 0.4}, takes_weight=True),
    Case("smooth_l1_loss", options={"beta": 0.4}),
    Case("binary_cross_entropy", torch.sigmoid, torch.sigmoid, takes_weight=True, constant_target=True),
    Case("binary_cross_entropy_with_logits", target=torch.sigmoid, takes_weight=True, constant_target=True),
    Case("kl_div", lambda x: x.log_softmax(-1), lambda x: x.softmax(-1)),
    Case("kl_div", lambda x: x.log_softmax(-1), lambda x: x.log_softmax(-1), {"log_target": True}),
    Case("soft_margin_loss", target=torch.sign, constant_target=True),
    Case("hinge_embedding_loss", target=torch.sign, options={"margin": 0.4}, constant_target=True),
    Case("poisson_nll_loss", target=torch.abs, options={"full": True}),
    Case("poisson_nll_loss", torch.exp, torch.abs, {"log_input": False, "eps": 1e-3}),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{'-'.join(case.options)}")


def drawn(case: Case, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input, target, mask of the input, mask of the target)."""
    generator = torch.Generator().manual_seed(3)
    cells = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    masks = [torch.rand(shape, generator=generator) > 0.3 for _ in range(2)]
    masks[0][0] = False  # a row without any
    return case.draw(cells[0]), case.target(cells[1]), *masks


def leaf(cells: Tensor, mask: Tensor | None = None, junk: float = nan) -> MaskedTensor:
    data = cells if mask is None else torch.where(mask, cells, junk)
    return ms.masked_tensor(data, mask, requires_grad=True)


def gradient(loss: Any, *by: Any) -> tuple[Any, ...]:
    return torch.autograd.grad([loss], [*by], [torch.ones(loss.shape, dtype=torch.float64)])


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_it_is_torchs_loss_of_the_cells_where_both_are_valid(case: Case, reduction: str, junk: float) -> None:
    given, target, own, others = drawn(case, 5, 7)
    both = own & others
    function = getattr(F, case.name)
    x, y = leaf(given, own, junk), leaf(target, others, junk)
    loss = function(x, y, reduction=reduction, **case.options)
    plain = [given[both].clone().requires_grad_(), target[both].clone().requires_grad_(not case.constant_target)]
    expected = function(*plain, reduction=reduction, **case.options)
    leaves, plain_leaves = ([x], plain[:1]) if case.constant_target else ([x, y], plain)
    got = loss.get_data()[both] if reduction == "none" else loss.get_data()
    if reduction == "none":
        assert torch.equal(loss.get_mask(), both)
    close(got.detach(), expected.detach())
    for ours, theirs in zip(gradient(loss, *leaves), gradient(expected, *plain_leaves), strict=True):
        assert torch.equal(ours.get_mask(), both)
        close(ours.get_data()[both], theirs)


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_is_torchs_loss_where_nothing_is_masked(case: Case, reduction: str) -> None:
    given, target, *_ = drawn(case, 4, 6)
    function = getattr(F, case.name)
    x, plain = leaf(given), given.clone().requires_grad_()
    loss, expected = (function(a, target, reduction=reduction, **case.options) for a in (x, plain))
    assert bool(loss.get_mask().all())
    assert torch.equal(loss.get_data().detach(), expected.detach()) or reduction != "none"
    close(loss.get_data().detach(), expected.detach())
    close(gradient(loss, x)[0].get_data(), gradient(expected, plain)[0])


@pytest.mark.parametrize("case", [case for case in CASES if case.takes_weight], ids=lambda case: case.name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_count_only_where_cells_do(case: Case, reduction: str) -> None:
    given, target, own, others = drawn(case, 5, 7)
    weight = torch.rand(5, 7, dtype=torch.float64)
    both = own & others
    theirs = getattr(F, case.name)
    ours = ms.l1_loss if case.name == "l1_loss" else theirs  # F.l1_loss hands no weight on
    loss = ours(leaf(given, own), leaf(target, others), weight=weight, reduction=reduction, **case.options)
    expected = theirs(given[both], target[both], weight=weight[both], reduction=reduction, **case.options)
    close((loss.get_data()[both] if reduction == "none" else loss.get_data()).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0, 3, 0.5, 1e300, nan])
def test_a_number_is_a_target_as_it_stands(dtype: torch.dtype, target: float) -> None:
    """Beside whole cells 0.5 is 0.5, and what overflows is inf."""
    x = torch.tensor([1, 2, 7]).to(dtype)
    wide = x.dtype if dtype.is_floating_point else torch.float32
    expected = (
        ((x.double() - torch.tensor(target, dtype=torch.float64).to(wide).double()) ** 2).to(wide).double().mean()
    )
    torch.testing.assert_close(ms.mse_loss(ms.masked_tensor(x), target).get_data().double(), expected, equal_nan=True)
    assert ms.eval(f"mse_loss(x, {target!r})" if target == target else "mse_loss(x, asin(2))", x=x).get_mask().all()


def test_a_number_that_the_cells_cannot_hold_is_no_target() -> None:
    with pytest.raises(MaskserveError, match="300 does not fit u8"):
        ms.mse_loss(ms.masked_tensor(torch.ones(3, dtype=torch.uint8)), 300)


def test_pos_weight_is_torchs() -> None:
    x, t, p = torch.randn(4, 3).double(), torch.rand(4, 3).double(), torch.tensor([0.5, 2, 3]).double()
    mask = torch.rand(4, 3) > 0.3
    expected = F.binary_cross_entropy_with_logits(x, t, pos_weight=p, reduction="none")[mask].mean()
    close(F.binary_cross_entropy_with_logits(ms.masked_tensor(x, mask), t, pos_weight=p).get_data(), expected)


@every_case
def test_a_loss_per_row_and_one_of_no_cells(case: Case) -> None:
    given, target, own, others = drawn(case, 5, 7)
    loss = getattr(ms, case.name)(leaf(given, own), leaf(target, others), dim=1, **case.options)
    assert loss.get_mask().tolist() == [False, *[bool(row.any()) for row in (own & others)[1:]]]
    for i in range(1, 5):
        both = (own & others)[i]
        close(
            loss.get_data()[i].detach(),
            getattr(F, case.name)(given[i][both], target[i][both], reduction="mean", **case.options),
        )
    nothing = getattr(ms, case.name)(leaf(given, own & False), target, **case.options)
    assert nothing.tolist() is None


@pytest.mark.parametrize("n", [0, 4])
def test_batchmean_of_one_dim_is_by_its_cells(n: int) -> None:
    x, y = torch.randn(n), torch.rand(n)
    mask = torch.arange(n) != 1
    made = ms.kl_div(ms.masked_tensor(x, mask), y, reduction="batchmean")
    if n:
        torch.testing.assert_close(made.get_data(), F.kl_div(x[mask], y[mask], reduction="batchmean"))
    assert bool(made.get_mask()) == bool(n)


def test_batchmean_is_by_the_rows_that_have_cells() -> None:
    given, target, own, others = drawn(CASES[6], 5, 7)
    loss = F.kl_div(leaf(given, own), leaf(target, others), reduction="batchmean")
    both = own & others
    close(loss.get_data().detach(), F.kl_div(given[both], target[both], reduction="sum") / 4)


# -- of three operands, and of vectors ----------------------------------------------------------------------------


def signs(cells: Tensor) -> Tensor:
    return torch.where(cells > 0, 1.0, -1.0).double()


OF_THREE: list[tuple[str, Callable[[Tensor], Tensor], dict[str, Any]]] = [
    ("margin_ranking_loss", signs, {"margin": 0.3}), ("gaussian_nll_loss", torch.exp, {"full": True}),
    ("triplet_margin_loss", torch.sin, {"swap": True}), ("triplet_margin_loss", torch.sin, {"p": 1, "margin": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "third", "options"), OF_THREE, ids=lambda value: value if type(value) is str else "")
def test_a_loss_of_three_is_torchs_where_all_are_valid(
    name: str, third: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(11)
    cells = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.rand(3, 5, 7, generator=generator) > 0.2
    cells[2] = third(cells[2])
    masks[0, 0] = False
    both, function, is_of_vectors = masks.all(0), getattr(F, name), name.startswith("triplet")
    plain = [c.clone().requires_grad_() for c in cells]
    expected = torch.stack(
        [
            function(
                *[(c[i : i + 1] if is_of_vectors else c[i])[..., both[i]] for c in plain], reduction="sum", **options
            )
            for i in range(1, 5)
        ]
    )
    wanted = gradient(expected, *plain)
    for junk in JUNK:
        given = [leaf(c, m, junk) for c, m in zip(cells, masks, strict=True)]
        loss = function(*given, reduction="none", **options)
        a_row = loss if is_of_vectors else loss.sum(1)
        assert a_row.get_mask().tolist() == [False, *[True] * 4]
        close(a_row.get_data()[1:].detach(), expected.detach())
        total = function(*given, reduction="sum", **options)
        for ours, theirs in zip(gradient(total, *given), wanted, strict=True):
            assert torch.equal(ours.get_mask(), both)
            close(ours.to_tensor(0.0)[both], theirs[both])
    close(function(ms.masked_tensor(cells[0]), *cells[1:], **options).get_data(), function(*cells, **options))


def test_the_embedding_loss_of_cosines_is_over_cells_that_are_valid_in_both() -> None:
    generator = torch.Generator().manual_seed(11)
    x, y = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 4, 6, generator=generator) > 0.2
    target, both = torch.tensor([1, -1, 1, -1]), masks[0] & masks[1]
    given, plain = [leaf(x, masks[0], inf), leaf(y, masks[1])], [x.clone().requires_grad_(), y.clone().requires_grad_()]
    loss = F.cosine_embedding_loss(*given, target, margin=-0.5)
    each = [
        F.cosine_embedding_loss(*[p[i][both[i]] for p in plain], target[i], margin=-0.5, reduction="sum")
        for i in range(4)
    ]
    expected = torch.stack(each).mean()
    close(loss.get_data().detach(), expected.detach())
    for ours, theirs in zip(gradient(loss, *given), gradient(expected, *plain), strict=True):
        assert torch.equal(ours.get_mask(), both)
        close(ours.get_data()[both], theirs[both])
    one = ms.masked_tensor(torch.tensor([1, 1, -1, -1]), torch.tensor([True, False, True, False]))
    made = F.cosine_embedding_loss(ms.masked_tensor(x), y, one, reduction="none")
    assert made.get_mask().tolist() == [True, False, True, False]


def test_a_sample_of_labels_is_the_mean_over_its_valid_ones() -> None:
    x, target, mask = torch.randn(4, 3).double(), (torch.rand(4, 3) > 0.5).double(), torch.rand(4, 3) > 0.3
    mask[2], weight = False, torch.tensor([1.0, 2, 0.5]).double()
    given, plain = leaf(x, mask), x.clone().requires_grad_()
    loss = F.multilabel_soft_margin_loss(given, target, weight=weight)
    each = [
        F.multilabel_soft_margin_loss(plain[i : i + 1, mask[i]], target[i : i + 1, mask[i]], weight=weight[mask[i]])
        for i in range(4)
        if mask[i].any()
    ]
    close(loss.get_data().detach(), torch.stack(each).mean().detach())
    close(gradient(loss, given)[0].to_tensor(0.0), gradient(torch.stack(each).mean(), plain)[0])
    close(
        F.multilabel_soft_margin_loss(ms.masked_tensor(x), target).get_data(), F.multilabel_soft_margin_loss(x, target)
    )


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 4), None], ids=str)
def test_a_variance_may_be_one_a_row_as_in_torch(shape: tuple[int, ...] | None) -> None:
    x, target, var = torch.randn(4, 4), torch.randn(4, 4), 0.5 if shape is None else torch.rand(shape) + 0.1
    wanted = F.gaussian_nll_loss(x, target, var, reduction="none")
    made = F.gaussian_nll_loss(ms.masked_tensor(x), target, var, reduction="none")
    torch.testing.assert_close(made.get_data(), wanted)
    said = ms.eval("gaussian_nll_loss(x * 1, t, v, reduction=none) + 0", x=x, t=target, v=torch.as_tensor(var))
    torch.testing.assert_close(said.get_data(), wanted)


def test_a_hidden_variance_below_0_raises_nothing() -> None:
    x, mask = torch.randn(2), torch.tensor([True, False])
    var = torch.tensor([0.5, -1.0])
    assert F.gaussian_nll_loss(ms.masked_tensor(x, mask), x, var, reduction="none").get_mask().tolist() == [True, False]
    with pytest.raises(MaskserveError, match="negative"):
        F.gaussian_nll_loss(ms.masked_tensor(x), x, var)


# -- of classes ---------------------------------------------------------------------------------------------------

SHAPES = [(6, 4), (3, 4, 5), (4,), (2, 4, 3, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def classes(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(7)
    dim = min(len(shape) - 1, 1)
    samples = tuple(n for d, n in enumerate(shape) if d != dim)
    return torch.randn(shape, generator=generator).double(), torch.randint(4, samples, generator=generator), dim


OPTIONS: list[dict[str, Any]] = [
    {}, {"weight": torch.tensor([0.5, 2, 1, 3]).double()}, {"label_smoothing": 0.1}, {"ignore_index": 2},
    {"weight": torch.tensor([0.5, 2, 1, 3]).double(), "label_smoothing": 0.2, "ignore_index": 1},
]  # fmt: skip


@every_shape
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_is_torchs_where_nothing_is_masked(
    shape: tuple[int, ...], options: dict[str, Any], reduction: str
) -> None:
    given, target, _ = classes(shape)
    x, plain = leaf(given), given.clone().requires_grad_()
    loss, expected = (F.cross_entropy(a, target, reduction=reduction, **options) for a in (x, plain))
    valid = loss.get_mask()
    if reduction == "none":
        assert torch.equal(valid, target != options.get("ignore_index", -100))
    elif not bool(valid):
        pytest.skip("the only sample is ignored: masked here, NaN or 0 in torch")
    close(loss.to_tensor(0.0).detach(), expected.detach())
    close(gradient(loss, x)[0].to_tensor(0.0), gradient(expected, plain)[0])


@every_shape
@pytest.mark.parametrize("junk", JUNK, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda options: "-".join(options) or "plain")
def test_a_masked_class_is_no_choice_and_a_masked_target_no_sample(
    shape: tuple[int, ...], junk: float, options: dict[str, Any]
) -> None:
    given, target, dim = classes(shape)
    own, wanted = torch.rand(shape) > 0.3, torch.rand(target.shape) > 0.2
    x = leaf(given, own, junk)
    targets = ms.masked_tensor(torch.where(wanted, target, 10**6), wanted)
    loss = ms.cross_entropy(x, targets, reduction="none", **options)
    expected = torch.full(target.shape, nan).double()
    for at in torch.cartesian_prod(*map(torch.arange, target.shape)).reshape(-1, target.ndim) if target.ndim else [[]]:
        place = [int(i) for i in at]
        index = (*place[:dim], slice(None), *place[dim:])
        kept, right = own[index], int(target[tuple(place)])
        if bool(wanted[tuple(place)]) and bool(kept[right]):
            weight = options.get("weight")
            own_options = options | ({"weight": weight[kept]} if weight is not None else {})
            new = int(kept[:right].sum())
            expected[tuple(place)] = F.cross_entropy(
                given[index][kept], torch.tensor(new), reduction="sum", **own_options
            )
    close(loss.to_tensor(nan).detach().nan_to_num(9e9), expected.nan_to_num(9e9))


@every_shape
def test_targets_may_be_probabilities(shape: tuple[int, ...]) -> None:
    given, _, dim = classes(shape)
    target = torch.rand(shape).double().softmax(dim)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": OPTIONS[1]["weight"]}):
        expected = F.cross_entropy(given, target, **options)
        close(F.cross_entropy(ms.masked_tensor(given), target, **options).get_data(), expected)


@every_shape
def test_nll_loss_is_torchs(shape: tuple[int, ...]) -> None:
    given, target, dim = classes(shape)
    logs = given.log_softmax(dim)
    for reduction in REDUCTIONS:
        for weight in (None, OPTIONS[1]["weight"]):
            expected = F.nll_loss(logs, target, weight=weight, reduction=reduction)
            # torch multiplies each loss by its weight, with reduction="none" too
            close(F.nll_loss(ms.masked_tensor(logs), target, weight=weight, reduction=reduction).get_data(), expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: F.cross_entropy(x, torch.tensor([0, 4])), "a target is class 4; there are 4, from 0"),
        (lambda x: F.cross_entropy(x, torch.tensor([0, 1, 2])), r"targets have shape \(3,\), the samples \(2,\)"),
        (lambda x: F.cross_entropy(x, torch.tensor([0, 1]), weight=torch.ones(3)), "give one for each"),
        (lambda x: F.nll_loss(x, torch.rand(2, 4)), "cross_entropy takes probabilities too"),
        (lambda x: F.mse_loss(x, x, reduction="average"), "one of none, mean, sum"),
        (lambda x: F.binary_cross_entropy(x + 9, x), "between 0 and 1"),
        (lambda x: F.cross_entropy(x, torch.tensor([0, 1]), label_smoothing=2.0), "must be a number from 0 to 1"),
        (lambda x: F.cross_entropy(x, torch.tensor([0, 1]), label_smoothing=-1.0), r"label_smoothing is -1\.0"),
        (lambda x: F.huber_loss(x, x, delta=0.0), "^huber_loss: delta is 0.0; it must be a number above 0$"),
        (lambda x: F.smooth_l1_loss(x, x, beta=-1.0), "beta is -1.0; it must be a number from 0 on"),
        (lambda x: F.triplet_margin_loss(x, x, x, margin=0.0), "margin is 0.0; it must be a number above 0"),
        (lambda x: F.mse_loss(x, torch.ones(3)), "do not broadcast"),
        (lambda x: F.triplet_margin_loss(x, x, torch.ones(3)), "do not broadcast"),
        (lambda x: F.cosine_embedding_loss(x, x, torch.ones(2, 4)), "give one a vector"),
    ],
)  # fmt: skip
def test_a_slip_has_one_clear_line(call: Callable[[MaskedTensor], Any], says: str) -> None:
    with pytest.raises(MaskserveError, match=says):
        call(ms.masked_tensor(torch.rand(2, 4)))


@pytest.mark.parametrize("row", [row for row in OPS.values() if isinstance(row, Loss)], ids=lambda row: row.name)
def test_dims_are_refused_where_each_loss_is_given(row: Loss) -> None:
    x = ms.masked_tensor(torch.rand(2, 4))
    with pytest.raises(ParameterError, match="dim says what losses are reduced over") as raised:
        getattr(ms, row.name)(*[x] * len(row.operands), dim=1, reduction="none")
    assert raised.value.parameter == "dim"
    if row.in_expressions:
        with pytest.raises(ParameterError, match=r"column 1: .*dim says what losses are reduced over"):
            ms.eval(f"{row.name}({', '.join('x' * len(row.operands))}, dim=1, reduction=none)", x=x)


@pytest.mark.parametrize("said", ["2", "-1"])
def test_a_range_is_the_same_in_expressions(said: str) -> None:
    x, t = ms.masked_tensor(torch.rand(2, 4)), torch.tensor([0, 1])
    with pytest.raises(ParameterError) as of_python:
        ms.cross_entropy(x, t, label_smoothing=int(said))
    with pytest.raises(ParameterError) as of_eval:
        ms.eval(f"cross_entropy(x, t, label_smoothing={said})", x=x, t=t)
    assert of_eval.value.message == f"column 1: {of_python.value.message}"


def test_a_target_may_be_a_number() -> None:
    assert ms.mse_loss(ms.masked_tensor([1.0, None, 3.0]), 0).tolist() == 5


def test_a_hidden_probability_above_1_raises_nothing() -> None:
    x = ms.masked_tensor(torch.tensor([0.5, 7.0]), torch.tensor([True, False]))
    close(F.binary_cross_entropy(x, torch.tensor([1.0, -3.0])).get_data(), torch.tensor(0.5).log().neg())
    with pytest.raises(DataError):
        F.binary_cross_entropy(ms.masked_tensor(torch.tensor([0.5, 7.0])), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize(
    "module", [nn.MSELoss(), nn.L1Loss(reduction="sum"), nn.HuberLoss(), nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(),
     nn.SoftMarginLoss(), nn.PoissonNLLLoss(), nn.HingeEmbeddingLoss()],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_modules_of_torch_take_them(module: nn.Module) -> None:
    x, t, mask = torch.randn(4, 3).double(), torch.rand(4, 3).double(), torch.rand(4, 3) > 0.4
    close(module(ms.masked_tensor(x, mask), t).get_data(), module(x[mask], t[mask]))
    logits, target = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 1])
    close(nn.CrossEntropyLoss()(ms.masked_tensor(logits), target).get_data(), nn.CrossEntropyLoss()(logits, target))
