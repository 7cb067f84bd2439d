"""Losses, layers, products and moves in expressions give what the calls give, bit for bit, as planned from headers alone."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import maskserve as ms
from benchmarks.expressions import held
from maskserve import MaskedTensor, evaluation
from maskserve.answers import explain, run
from maskserve.errors import MaskserveError
from maskserve.evaluation import Declared, declared_of, evaluated, planned
from maskserve.expression import functions, parse
from maskserve.moving import function
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Move
from maskserve.payload.format import BytesPayload, to_bytes
from maskserve.payload.tensors import output
from maskserve.payload.variables import Dims
from maskserve.requests import build
from maskserve.torch_dtypes import dtype_of

Tensors = Mapping[str, MaskedTensor]
CALLS: Mapping[str, Callable[[Any], Any]] = {
    "matmul(q, transpose(k, dim0=-1, dim1=-2))": lambda v: v.q @ v.k.transpose(-1, -2),
    "matmul(x, w)": lambda v: ms.matmul(v.x, v.w),
    "mm(x, t(y))": lambda v: ms.mm(v.x, v.y.t()),
    "bmm(select(q, dim=0, index=0), adjoint(select(k, dim=0, index=-1)))": lambda v: ms.bmm(v.q[0], v.k[-1].adjoint()),
    "mv(x, w)": lambda v: ms.mv(v.x, v.w),
    "dot(w, b, nan=omit)": lambda v: ms.dot(v.w, v.b, nan="omit"),
    "inner(x, y)": lambda v: ms.inner(v.x, v.y),
    "outer(w, b)": lambda v: ms.outer(v.w, v.b),
    "linear(x, y, narrow(b, dim=0, start=0, length=4))": lambda v: ms.linear(v.x, v.y, v.b.narrow(0, 0, 4)),
    "linear(x, y)": lambda v: ms.linear(v.x, v.y),
    "linear(x, w)": lambda v: ms.linear(v.x, v.w),
    "mse_loss(x, y)": lambda v: ms.mse_loss(v.x, v.y),
    "mse_loss(x, w, weight=b, reduction=sum, dim=0)": lambda v: ms.mse_loss(v.x, v.w, v.b, reduction="sum", dim=0),
    "mse_loss(x, y, weight=b)": lambda v: ms.mse_loss(v.x, v.y, v.b),
    "l1_loss(x, 1, reduction=none)": lambda v: ms.l1_loss(v.x, 1, reduction="none"),
    "huber_loss(x, y, delta=0.5, dim=-1, weight=w)": lambda v: ms.huber_loss(v.x, v.y, v.w, delta=0.5, dim=-1),
    "smooth_l1_loss(x, y, beta=2)": lambda v: ms.smooth_l1_loss(v.x, v.y, beta=2),
    "binary_cross_entropy(sigmoid(x), y > 0, reduction=none)": lambda v: ms.binary_cross_entropy(
        ms.sigmoid(v.x), v.y > 0, reduction="none"
    ),
    "binary_cross_entropy_with_logits(x, p, weight=w, pos_weight=p)": lambda v: ms.binary_cross_entropy_with_logits(
        v.x, v.p, v.w, pos_weight=v.p
    ),
    "kl_div(log_softmax(x, dim=1), p, reduction=batchmean)": lambda v: ms.kl_div(
        ms.log_softmax(v.x, 1), v.p, reduction="batchmean"
    ),
    "kl_div(x, y, log_target=True)": lambda v: ms.kl_div(v.x, v.y, log_target=True),
    "soft_margin_loss(x, sign(y))": lambda v: ms.soft_margin_loss(v.x, ms.sign(v.y)),
    "hinge_embedding_loss(x, 1, margin=2, reduction=none)": lambda v: ms.hinge_embedding_loss(
        v.x, 1, 2, reduction="none"
    ),
    "margin_ranking_loss(x, y, sign(w), margin=0.5, dim=1)": lambda v: ms.margin_ranking_loss(
        v.x, v.y, ms.sign(v.w), 0.5, dim=1
    ),
    "poisson_nll_loss(x, abs(y), full=True)": lambda v: ms.poisson_nll_loss(v.x, abs(v.y), full=True),
    "gaussian_nll_loss(x, y, p, eps=0.1)": lambda v: ms.gaussian_nll_loss(v.x, v.y, v.p, eps=0.1),
    "nll_loss(log_softmax(x, dim=1), c, ignore_index=2)": lambda v: ms.nll_loss(
        ms.log_softmax(v.x, 1), v.c, ignore_index=2
    ),
    "cross_entropy(x, c, label_smoothing=.1)": lambda v: ms.cross_entropy(v.x, v.c, label_smoothing=0.1),
    "cross_entropy(x, c, weight=p, reduction=none)": lambda v: ms.cross_entropy(v.x, v.c, v.p, reduction="none"),
    "cross_entropy(x, c, weight=p, label_smoothing=.1)": lambda v: ms.cross_entropy(v.x, v.c, v.p, label_smoothing=0.1),
    "cross_entropy(x, abs(y), reduction=sum)": lambda v: ms.cross_entropy(v.x, abs(v.y), reduction="sum"),
    "cross_entropy(w, select(c, dim=0, index=0))": lambda v: ms.cross_entropy(v.w, v.c[0]),
    "layer_norm(x, w, b, normalized_shape=5)": lambda v: ms.layer_norm(v.x, (5,), v.w, v.b),
    "layer_norm(q, normalized_shape=(3, 4), eps=0.1)": lambda v: ms.layer_norm(v.q, (3, 4), eps=0.1),
    "layer_norm(x, bias=b, normalized_shape=5)": lambda v: ms.layer_norm(v.x, (5,), bias=v.b),
    "prelu(x, w)": lambda v: ms.prelu(v.x, v.w),
    "rms_norm(x, w, normalized_shape=5)": lambda v: ms.rms_norm(v.x, (5,), v.w),
    "group_norm(q, num_groups=2)": lambda v: ms.group_norm(v.q, 2),
    "group_norm(x, w, b, num_groups=5)": lambda v: ms.group_norm(v.x, 5, v.w, v.b),
    "cosine_similarity(x, y)": lambda v: ms.cosine_similarity(v.x, v.y),
    "cosine_similarity(x, w, dim=-1, eps=0.5)": lambda v: ms.cosine_similarity(v.x, v.w, -1, 0.5),
    "scaled_dot_product_attention(q, k, v)": lambda v: ms.scaled_dot_product_attention(v.q, v.k, v.v),
    "scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)": lambda v: ms.scaled_dot_product_attention(
        v.q, v.k, v.v, is_causal=True, scale=0.3
    ),
    "scaled_dot_product_attention(q, k, v, m)": lambda v: ms.scaled_dot_product_attention(v.q, v.k, v.v, attn_mask=v.m),
    "reshape(x, shape=(2, -1))": lambda v: v.x.reshape(2, -1),
    "flatten(q, start_dim=1, end_dim=2)": lambda v: v.q.flatten(1, 2),
    "ravel(x) * 2": lambda v: v.x.ravel() * 2,
    "permute(q, dims=(2, 0, -1, 1))": lambda v: v.q.permute(2, 0, -1, 1),
    "movedim(q, source=(0, 1), destination=(-1, 0))": lambda v: v.q.movedim((0, 1), (-1, 0)),
    "squeeze(unsqueeze(x, dim=1), dim=1)": lambda v: v.x.unsqueeze(1).squeeze(1),
    "squeeze(unsqueeze(x, dim=-1))": lambda v: v.x.unsqueeze(-1).squeeze(),
    "expand(w, size=(3, -1)) + 1": lambda v: v.w.expand(3, -1) + 1,
    "broadcast_to(w, size=(2, 5))": lambda v: v.w.broadcast_to((2, 5)),
    "narrow(x, dim=1, start=-3, length=2)": lambda v: v.x.narrow(1, -3, 2),
    "diagonal(x, offset=1)": lambda v: v.x.diagonal(1),
    "tril(x) - triu(x, diagonal=1)": lambda v: v.x.tril() - v.x.triu(1),
    "flip(x, dims=(0, 1))": lambda v: v.x.flip(0, 1),
    "roll(x, shifts=(1, 2), dims=(0, 1)) - roll(x, shifts=3)": lambda v: v.x.roll((1, 2), (0, 1)) - v.x.roll(3),
    "mean(matmul(x, w) - mse_loss(x, y, dim=1)) / 2": lambda v: (v.x @ v.w - ms.mse_loss(v.x, v.y, dim=1)).mean() / 2,
}
"""Operands come in torch's order, parameters by name; `v` has the variables."""
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.uint16,
    torch.uint64,
)


def variables(dtype: torch.dtype, junk: float = 0.0, seed: int = 0) -> dict[str, MaskedTensor]:
    """x and y (4, 5), w, b and p (5), c classes (4), q, k and v (2, 4, 3, 4), m bools (3, 3); p is of probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, of: torch.dtype = dtype, positive: bool = False) -> MaskedTensor:
        data = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
        mask = torch.rand(shape, generator=generator) > 0.25
        data = data.abs() / 10 if positive else data
        data = data.round() if not (of.is_floating_point or of.is_complex) else data
        data = data.abs() if of in (torch.uint8, torch.uint16, torch.uint64) else data
        hidden = torch.full((), junk if of.is_floating_point or of.is_complex else 1.0, dtype=torch.float64)
        return MaskedTensor(torch.where(mask, data, hidden).to(of), mask)

    def whole(tensor: MaskedTensor) -> MaskedTensor:
        return ms.masked_tensor(tensor.to_tensor(True if dtype is torch.bool else 1))

    x, y, w, b = made(4, 5), made(4, 5), made(5), made(5)
    p = whole(made(5, positive=True))
    c = MaskedTensor(torch.tensor([0, 4, 7, 2]), torch.tensor([True, True, False, True]))
    q, k, v = (made(2, 4, 3, 4) for _ in range(3))
    m = MaskedTensor(torch.rand((3, 3), generator=generator) > 0.3, None)
    return {"x": x, "y": y, "w": w, "b": b, "p": p, "c": c, "q": q, "k": k, "v": v, "m": m}


class Named:
    """Variables as attributes."""

    def __init__(self, tensors: Tensors) -> None:
        self.__dict__.update(tensors)


def readable(tensor: MaskedTensor) -> torch.Tensor:
    """The cells in a dtype that torch compares."""
    data = tensor.get_data()
    wide = {torch.float8_e4m3fn: torch.float32, torch.uint16: torch.int32}
    return data.view(torch.int64) if data.dtype is torch.uint64 else data.to(wide.get(data.dtype, data.dtype))


def assert_same(one: MaskedTensor, other: MaskedTensor) -> None:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    mask = one.get_mask()
    assert torch.equal(mask, other.get_mask())
    a, b = (torch.where(mask, readable(t), torch.zeros((), dtype=readable(t).dtype)) for t in (one, other))
    kinds = (a.isnan(), b.isnan()) if a.dtype.is_floating_point or a.dtype.is_complex else (a != a, b != b)
    assert torch.equal(*kinds)
    assert torch.equal(a.masked_fill(kinds[0], 0), b.masked_fill(kinds[0], 0))


def rows_named(text: str) -> set[str]:
    return {name for name in functions() if f"{name}(" in text}


def test_every_row_with_an_outline_is_called_here() -> None:
    called = set().union(*map(rows_named, CALLS))
    assert {row.name for row in OPS.values() if row.outline} <= called
    assert len([row for row in OPS.values() if row.outline]) > 35


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("text", CALLS)
def test_a_call_has_the_bits_of_the_functions(text: str, dtype: torch.dtype) -> None:
    values = variables(dtype)
    term = planned(parse(text).root, {name: declared_of(value) for name, value in values.items()})
    made = evaluated(term, values)
    assert (tuple(made.shape), dtype_of(made._data)) == (term.shape, term.dtype)
    assert_same(made, CALLS[text](Named(values)))


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("text", CALLS)
def test_other_dtypes_have_those_bits_or_are_refused_at_a_column(text: str, dtype: torch.dtype) -> None:
    values, refused = variables(dtype), None
    try:
        term = planned(parse(text).root, {name: declared_of(value) for name, value in values.items()})
        made = evaluated(term, values)
    except MaskserveError as error:
        refused = error.message
    if refused is not None:
        assert refused.startswith("column ")
    else:
        assert (tuple(made.shape), dtype_of(made._data)) == (term.shape, term.dtype)
        assert_same(made, CALLS[text](Named(values)))


@pytest.mark.parametrize("text", CALLS)
def test_what_lies_under_a_mask_never_matters(text: str) -> None:
    results = [ms.eval(text, **variables(torch.float64, junk)) for junk in (0.0, math.nan, math.inf, -1e300)]
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("text", [text for text in CALLS if not text.startswith("binary_cross_entropy(")])
def test_gradients_go_through_calls(text: str) -> None:
    """Those of the functions, by each variable of floats in the text."""
    values = variables(torch.float64)
    names = [name for name in parse(text).names if values[name].dtype is torch.float64]
    found = []
    for compute in (lambda leaves: ms.eval(text, **leaves), lambda leaves: CALLS[text](Named(leaves))):
        leaves = dict(values)
        for name in names:
            leaves[name] = ms.masked_tensor(values[name].get_data(), values[name].get_mask(), requires_grad=True)
        compute(leaves).sum().backward()
        found.append([leaves[name].grad for name in names])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other)


SIZES = (0, 1, 2, 3)
SHAPES = [shape for n in range(4) for shape in itertools.product(SIZES, repeat=n)]
MOVES = [row for row in OPS.values() if isinstance(row, Move) and row.outline]


def sampled(kind: Type, shape: tuple[int, ...], rng: random.Random) -> Any:
    """A value of a parameter, now and then one that cannot be."""
    most = max(len(shape), 1)
    if kind is Type.DIM:
        return rng.randrange(-most - 1, most + 1)
    if kind is Type.DIMS:
        return (
            tuple(rng.sample(range(most), rng.randrange(most + 1))) if rng.random() < 0.8 else (rng.randrange(-5, 5),)
        )
    if kind is Type.WHOLE:
        return rng.randrange(-4, 5)
    sizes = [rng.choice((-1, *shape, 0, 1, 2, 6)) for _ in range(rng.randrange(4))]
    return tuple(rng.choice((sizes, shape, (*shape, 1), (math.prod(shape),))))


@pytest.mark.parametrize("row", MOVES, ids=lambda row: row.name)
def test_a_layout_is_what_torch_makes_of_the_shape(
    row: Move, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    assert row.layout is not None
    monkeypatch.setattr(warnings, "filters", [("error", None, UserWarning, None, 0)])  # what torch warns of is refused
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    request.addfinalizer(lambda: torch.set_warn_always(always))
    rng, n_computed = random.Random(7), 0
    for shape in SHAPES * 8:
        given = {
            p.name: sampled(p.type, shape, rng) for p in row.parameters if p.default is REQUIRED or rng.random() < 0.7
        }
        try:
            theirs: tuple[int, ...] | None = tuple(function(row)(torch.empty(shape), **given).shape)
        except (RuntimeError, IndexError, TypeError, UserWarning):
            theirs = None
        try:
            ours: tuple[int, ...] | None = tuple(place.size for place in row.layout(shape, given))
        except MaskserveError:
            ours = None
        assert ours == theirs, (row.name, shape, given)
        n_computed += ours is not None
    assert n_computed > 40


NAMED: list[tuple[str, tuple[int, ...], Dims | None]] = [
    ("transpose(x, dim0=lat, dim1=time)", (3, 2), ("lat", "time")),
    ("permute(x, dims=(lat, time))", (3, 2), ("lat", "time")),
    ("t(x) - mean(x, dim=lat)", (3, 2), ("lat", "time")),
    ("select(x, dim=time, index=0)", (3,), ("lat",)),
    ("x - select(x, dim=time, index=0)", (2, 3), ("time", "lat")),
    ("narrow(x, dim=lat, start=1, length=2)", (2, 2), ("time", "lat")),
    ("squeeze(mean(x, dim=lat, keepdim=True), dim=lat)", (2,), ("time",)),
    ("unsqueeze(x, dim=0)", (1, 2, 3), None),
    ("flatten(x)", (6,), None),
    ("reshape(x, shape=(2, 3, 1))", (2, 3, 1), None),
    ("reshape(x, shape=(-1, 3))", (2, 3), ("time", "lat")),
    ("mse_loss(x, y, reduction=none)", (2, 3), ("time", "lat")),
    ("mse_loss(y, x, dim=lat)", (2,), ("time",)),
    ("mse_loss(x, x, weight=s, dim=time)", (3,), ("lat",)),
    ("cosine_similarity(x, s, dim=time)", (3,), ("lat",)),
    ("layer_norm(x, y, normalized_shape=3)", (2, 3), ("time", "lat")),
    ("cross_entropy(x, c, reduction=none)", (2,), ("time",)),
    ("matmul(x, t(x))", (2, 2), None),
    ("mv(x, y)", (2,), ("time",)),
    ("outer(s, y)", (2, 3), ("time", "lat")),
    ("linear(x, w)", (2, 4), ("time", "out")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shape", "dims"), NAMED, ids=[text for text, *_ in NAMED])
def test_dims_keep_their_names(text: str, shape: tuple[int, ...], dims: Dims | None) -> None:
    f32, i64 = (dtype_of(torch.empty(0, dtype=dtype)) for dtype in (torch.float32, torch.int64))
    given = {"x": ("time", "lat"), "y": ("lat",), "s": ("time",), "c": ("time",), "w": ("out", "lat")}
    sizes = {"time": 2, "lat": 3, "out": 4}
    declared = {
        name: Declared(shape=tuple(sizes[d] for d in names), dtype=i64 if name == "c" else f32, dims=names)
        for name, names in given.items()
    }
    term = planned(parse(text).root, declared)
    assert (term.shape, term.dims) == (shape, dims)


REFUSED = [
    ("1 + matmul(x, y)", 5, "they must be equal"),
    ("mv(w, x)", 1, "it must have 2 dims"),
    ("matmul(x, c)", 1, "other i64"),
    ("linear(x, y, b)", 1, "must broadcast to the result"),
    ("reshape(x, shape=(7, -1))", 1, "has 20 cells, which do not fill (7, -1)"),
    ("reshape(x, shape=y)", 18, "give a whole number"),
    ("reshape(x, shape=(2.5, 8))", 18, "give a whole number"),
    ("transpose(x, dim0=0, dim1=time)", 1, "there is no dim 'time'"),
    ("select(x, dim=0, index=4)", 1, "index 4 is out of range for dim 0, which has size 4"),
    ("select(x, dim=0, index=0.5)", 24, "give a whole number"),
    ("expand(w, size=(1000000, 5))", 1, "a term may have at most"),
    ("expand(x, size=(9007199254740992, 9007199254740992, 4, 5))", 1, "more cells than there can be"),
    ("outer(expand(w, size=(200, 5)), w)", 1, "must have 1 dim"),
    ("mse_loss(x, w, weight=c)", 1, "weight has shape (4,), the data (4, 5): it cannot be laid over it"),
    ("mse_loss(x, y, weight=1)", 23, "is a variable"),
    ("mse_loss(x, y, reduction=batchmean)", 26, "give none, mean or sum"),
    ("mse_loss(x, y, dim=2)", 1, "out of range"),
    ("cross_entropy(x, y > 0)", 1, "not bool"),
    ("cross_entropy(x, w)", 1, "target has shape (5,)"),
    ("cross_entropy(x, 1)", 1, "target is the number 1"),
    ("cross_entropy(x, c, weight=c)", 1, "there are 5 classes: give one for each"),
    ("layer_norm(x, normalized_shape=4)", 1, "must be the end of the input's shape (4, 5)"),
    ("layer_norm(x)", 1, "layer_norm needs normalized_shape"),
    ("layer_norm(x, y, normalized_shape=5)", 1, "weight has shape (4, 5); it must be normalized_shape"),
    ("rms_norm(c, normalized_shape=4)", 1, "input is i64, and must be of floats: divide it by 1"),
    ("group_norm(x, num_groups=3)", 1, "3 groups do not divide the channels"),
    ("cosine_similarity(x, w, dim=3)", 1, "out of range"),
    ("scaled_dot_product_attention(q, x, q)", 1, "must have as many cells"),
    ("scaled_dot_product_attention(w, w, w)", 1, "must have at least 2 dims"),
    ("scaled_dot_product_attention(q, k, v, m, is_causal=True)", 1, "not both"),
    ("scaled_dot_product_attention(q, k, v, x)", 1, "attn_mask has shape (4, 5), the scores (2, 4, 3, 3)"),
    ("scaled_dot_product_attention(q, k, v, c)", 1, "attn_mask is i64"),
    ("einsum(x, y)", 1, "einsum is not for expressions: maskserve.einsum in Python"),
    ("dropout(x)", 1, "dropout is not for expressions: maskserve.dropout in Python"),
    ("cat(x, y)", 1, "cat is not for expressions: maskserve.cat in Python"),
]


@pytest.mark.parametrize(("text", "column", "says"), REFUSED, ids=[text for text, *_ in REFUSED])
def test_what_cannot_be_is_refused_at_its_column_before_a_cell_is_read(text: str, column: int, says: str) -> None:
    declared = {name: declared_of(value) for name, value in variables(torch.float32).items()}
    with pytest.raises(MaskserveError) as raised:
        planned(parse(text).root, declared)
    assert raised.value.message.startswith(f"column {column}: ")
    assert says in raised.value.message


def test_products_of_matrices_are_bounded() -> None:
    f32 = dtype_of(torch.empty(0))
    large = {"x": Declared(shape=(1 << 14, 1 << 14), dtype=f32), "s": Declared(shape=(1 << 16, 2), dtype=f32)}
    with pytest.raises(MaskserveError, match=r"column 1: mm: 4398046511104 pairs of cells would be multiplied"):
        planned(parse("mm(x, x)").root, large)
    with pytest.raises(MaskserveError, match="scaled_dot_product_attention would have 4294967296 cells in between"):
        planned(parse("scaled_dot_product_attention(s, s, s)").root, {"s": large["s"]})


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 4), (2, 0, 4), (0, 0, 0)], ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "scaled_dot_product_attention(x, x, x)",
        "layer_norm(x, normalized_shape={n})",
        "rms_norm(x, normalized_shape={n})",
        "group_norm(x, num_groups=1)",
        "cosine_similarity(x, x)",
        "mse_loss(x, x)",
        "matmul(x, transpose(x, dim0=-1, dim1=-2))",
        "flatten(x) + 1",
    ],
)
def test_dims_of_size_0_are_computed_on(text: str, shape: tuple[int, ...]) -> None:
    x = ms.masked_tensor(torch.ones(shape))
    term = planned(parse(text.format(n=shape[-1])).root, {"x": declared_of(x)})
    made = evaluated(term, {"x": x})
    assert tuple(made.shape) == term.shape
    assert not made.get_mask().any() or "+ 1" in text


def test_each_term_of_a_long_row_finds_its_leaves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each term asks what those inside it are made of: to find that anew took seconds."""
    found, asked = evaluation.leaves_of, []
    monkeypatch.setattr(evaluation, "leaves_of", lambda term: asked.append(term) or found(term))
    x = ms.masked_tensor([1.0, None, 3.0])
    term = planned(parse(" + ".join(["abs(x)"] * 64)).root, {"x": declared_of(x)})
    assert term.peak_bytes > 0
    assert len(asked) == 64 + 64 + 63
    assert ms.eval(" + ".join(["abs(x)"] * 64), x=x).tolist() == [64.0, None, 192.0]


def test_a_plan_is_remembered_for_its_text_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[object] = []
    monkeypatch.setattr(evaluation, "planned", lambda *args: counted.append(args) or planned(*args))
    evaluation.remembered.cache_clear()
    one, two = ms.masked_tensor(torch.ones(3)), ms.masked_tensor(torch.ones(3).double())
    for x in (one, one, two, one, two):
        assert ms.eval("x + 2.5", x=x).dtype is x.dtype
    assert len(counted) == 2
    assert ms.eval("x", x=one) is not one, "a result is a tensor of its own"


WIDTHS = [
    ("eval", "x"),
    ("eval", "exp(-(x * x)) / y + 1"),
    ("eval", "(x - mean(x, dim=0)) / std(x, dim=0)"),
    ("eval", "mse_loss(x, y, weight=w)"),
    ("eval", "cross_entropy(x, c, label_smoothing=.1)"),
    ("eval", "layer_norm(x, w, w, normalized_shape=512)"),
    ("eval", "cosine_similarity(x, y)"),
    ("eval", "linear(x, w)"),
    ("eval", "flatten(t(x)) + 1"),
    ("eval", "roll(x, shifts=(1, 2), dims=(0, 1))"),
    ("eval", "mm(x, t(y))"),
    ("eval", "scaled_dot_product_attention(q, q, q)"),
    ("grad", "mse_loss(x, y)"),
    ("grad", "sum(cosine_similarity(x, y))"),
    ("grad", "sum(scaled_dot_product_attention(q, q, q))"),
]


@pytest.mark.parametrize(("verb", "text"), WIDTHS, ids=lambda word: word)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark of memory is Linux'")
def test_no_call_holds_more_than_its_estimate_and_a_tenth(verb: str, text: str) -> None:
    """Valid NaN and inf beside masked cells: products then hold the most."""

    def question(n: int) -> BytesPayload:
        x, y = torch.randn(n, 512), torch.randn(n, 512)
        x.view(-1)[::37] = math.nan
        y.view(-1)[5::41] = math.inf
        q = x.view(-1)[: n // 2 * 64].view(1, 1, n // 2, 64)
        parts = {"x": x, "y": y, "w": torch.rand(512), "c": torch.randint(0, 512, (n,)), "q": q}
        masks = {f"{name}.mask": torch.rand(part.shape) > 0.3 for name, part in parts.items()}
        return BytesPayload(to_bytes([output(name, part) for name, part in {**parts, **masks}.items()], {}))

    request, payload = build(verb, {"expr": text}), question(2048)
    run(request, question(8))  # imports
    told = sum(step.bytes_held for step in explain(request, payload))
    assert held(lambda: run(request, payload)) <= told * 1.1 + (1 << 21)  # what the allocator keeps


@pytest.mark.parametrize("offset", [0, 2, 3, -9007199254740992])
def test_a_few_cells_of_many_are_written(offset: int) -> None:
    """One cell, or none, has any stride."""
    body = to_bytes([output("x", torch.arange(12.0).reshape(4, 3))], {})
    answer = ms.load(ms.compute("eval", body, expr=f"diagonal(x, offset={offset})").to_bytes())
    assert answer["data"].tolist() == torch.arange(12.0).reshape(4, 3).diagonal(offset).tolist()


@pytest.mark.parametrize(
    "text", ["x", "t(x)", "flip(x, dims=0)", "squeeze(x)", "select(x, dim=0, index=1)", "expand(x, size=(2, 4, 3))"]
)
def test_what_is_masked_is_written_as_0(text: str) -> None:
    mask = torch.rand(4, 3) > 0.5
    body = to_bytes([output("x", torch.full((4, 3), math.nan).masked_fill(mask, 1.0)), output("x.mask", mask)], {})
    answer = ms.load(ms.compute("eval", body, expr=text).to_bytes())["data"]
    assert torch.equal(answer.get_data(), answer.get_mask().float())
    value = ms.load(ms.compute("grad", body, expr=text).to_bytes())["value"]
    assert torch.equal(value.get_data(), value.get_mask().float())


def test_a_condition_may_be_a_number() -> None:
    x = ms.masked_tensor(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    for text, chosen in (("where(1 > 0, x, x + 1)", x), ("where(exp(-1) > 1, x, x + 1)", x + 1)):
        found = ms.eval(text, x=x)
        assert torch.equal(found.get_data(), chosen.get_data() * x.get_mask())
        assert torch.equal(found.get_mask(), x.get_mask())
    assert torch.equal(ms.where(True, x, x + 1).get_mask(), x.get_mask())
    assert ms.eval("where(1 > 0, 3, x / x)", x=x).get_mask().all()
