"""Layers: torch's own where nothing is masked, and on the compressed cells; what lies under a mask changes no bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # as torch's own documentation writes it

import maskserve as ms
from maskserve import MaskedTensor, fused, layers
from maskserve.attending import longest
from maskserve.errors import MaskserveError
from maskserve.fused import FORWARD
from maskserve.gates import rows_alike, valid_first

nan, inf = torch.nan, torch.inf


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3


def leaf(cells: Tensor, mask: Tensor | None = None, junk: float = nan) -> MaskedTensor:
    data = cells if mask is None else torch.where(mask, cells, junk)
    return ms.masked_tensor(data, mask, requires_grad=True)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=tolerance, atol=tolerance)


W, B = drawn(6, seed=1), drawn(6, seed=2)
PLAIN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "layer_norm": (lambda x: F.layer_norm(x, (6,), W, B), (drawn(4, 5, 6),)),
    "layer_norm of two dims": (lambda x: F.layer_norm(x, (5, 6)), (drawn(4, 5, 6),)),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), W), (drawn(4, 5, 6),)),
    "group_norm": (lambda x: F.group_norm(x, 3, W, B), (drawn(4, 6, 5),)),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, W, B, training=True), (drawn(4, 6, 5),)),
    "batch_norm as trained": (lambda x: F.batch_norm(x, W, B.exp(), W, B), (drawn(4, 6, 5),)),
    "prelu": (lambda x: F.prelu(x, W), (drawn(4, 6, 5),)),
    "prelu of one slope": (lambda x: torch.prelu(x, W[:1]), (drawn(4, 6),)),
    "prelu of slopes that train": (F.prelu, (drawn(4, 6), drawn(6, seed=1))),
    "rrelu": (F.rrelu, (drawn(4, 6),)),
    "glu": (F.glu, (drawn(4, 6),)),
    "glu along a dim": (lambda x: F.glu(x, dim=0), (drawn(4, 5),)),
    "cosine_similarity": (F.cosine_similarity, (drawn(4, 6), drawn(4, 6, seed=5))),
    "pairwise_distance": (
        lambda x, y: F.pairwise_distance(x, y, p=3.0, keepdim=True),
        (drawn(4, 6), drawn(4, 6, seed=5)),
    ),
    "cdist": (torch.cdist, (drawn(2, 4, 6), drawn(2, 3, 6, seed=5))),
    "cdist of sums": (lambda x, y: torch.cdist(x, y, p=1.0), (drawn(4, 6), drawn(3, 6, seed=5))),
    "attention": (
        F.scaled_dot_product_attention,
        (drawn(2, 3, 5, 6), drawn(2, 3, 7, 6, seed=5), drawn(2, 3, 7, 4, seed=6)),
    ),
    "causal attention": (
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
        (drawn(2, 5, 6), drawn(2, 5, 6, seed=5), drawn(2, 5, 4, seed=6)),
    ),
    "attention with a mask": (
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=masks(5, 7) | torch.eye(5, 7).bool()),
        (drawn(2, 3, 5, 6), drawn(2, 3, 7, 6, seed=5), drawn(2, 3, 7, 4, seed=6)),
    ),
    "attention with a bias": (
        lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=drawn(5, 7, seed=8), scale=0.3),
        (drawn(2, 3, 5, 6), drawn(2, 3, 7, 6, seed=5), drawn(2, 3, 7, 4, seed=6)),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_torchs_layer_where_nothing_is_masked(name: str) -> None:
    function, inputs = PLAIN[name]
    ours, theirs = [leaf(x) for x in inputs], [x.clone().requires_grad_() for x in inputs]
    made, expected = function(*ours), function(*theirs)
    assert isinstance(made, MaskedTensor)
    assert bool(made.get_mask().all())
    close(made.get_data(), expected)
    above = drawn(*expected.shape, seed=11)
    for got, wanted in zip(
        torch.autograd.grad([made], ours, [above]), torch.autograd.grad([expected], theirs, [above]), strict=True
    ):
        close(got.to_tensor(), wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_what_lies_under_a_mask_changes_no_bit(name: str) -> None:
    function, inputs = PLAIN[name]
    own = [masks(*x.shape, seed=i) for i, x in enumerate(inputs)]
    results = []
    for junk in (nan, inf, -1e300):
        leaves = [leaf(x, mask, junk) for x, mask in zip(inputs, own, strict=True)]
        made = function(*leaves)
        gradients = torch.autograd.grad([made], leaves, [torch.ones(made.shape, dtype=torch.float64)])
        results.append([made.detach(), *gradients])
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one.get_mask(), other.get_mask())
        assert torch.equal(one.to_tensor(0), other.to_tensor(0))
        assert bool(one.to_tensor(0).isfinite().all())


def test_norms_are_torchs_on_the_valid_cells_of_a_slice() -> None:
    x, mask = drawn(5, 6), masks(5, 6)
    mask[0] = False
    for function in (F.layer_norm, F.rms_norm):
        made = function(leaf(x, mask), (6,))
        assert torch.equal(made.get_mask(), mask)
        for i in range(1, 5):
            kept = mask[i]
            close(made.get_data()[i][kept], function(x[i][kept], (int(kept.sum()),)))
    batch, own = drawn(4, 6, 5), masks(4, 6, 5)
    made = F.group_norm(leaf(batch, own), 3)
    for n in range(4):
        for g in range(3):
            kept = own[n, 2 * g : 2 * g + 2]
            cells = batch[n, 2 * g : 2 * g + 2][kept]
            close(made.get_data()[n, 2 * g : 2 * g + 2][kept], F.layer_norm(cells, cells.shape))


def test_running_statistics_move_by_the_valid_cells_and_stay_where_there_are_none() -> None:
    x, mask = drawn(4, 3, 5), masks(4, 3, 5)
    mask[:, 2] = False
    norm = nn.BatchNorm1d(3).double()
    made = norm(ms.masked_tensor(x, mask))
    assert torch.equal(made.get_mask(), mask)
    for c in range(2):
        cells = x[:, c][mask[:, c]]
        close(made.get_data()[:, c][mask[:, c]], F.layer_norm(cells, cells.shape))
        close(norm.running_mean[c], 0.1 * cells.mean())
        close(norm.running_var[c], 0.9 + 0.1 * cells.var())
    assert (float(norm.running_mean[2]), float(norm.running_var[2])) == (0, 1)


def test_distances_are_over_the_cells_that_are_valid_in_both() -> None:
    x, y, own, others = drawn(4, 6), drawn(3, 6, seed=5), masks(4, 6), masks(3, 6, seed=1)
    own[2] = False
    given = leaf(x, own), leaf(y, others, inf)
    made, plain = torch.cdist(*given), [x.clone().requires_grad_(), y.clone().requires_grad_()]
    total = torch.tensor(0.0, dtype=torch.float64)
    for i, j in itertools.product(range(4), range(3)):
        both = own[i] & others[j]
        assert bool(made.get_mask()[i, j]) == bool(both.any())
        if both.any():
            wanted = F.pairwise_distance(plain[0][i, both], plain[1][j, both], eps=0.0)
            close(made.get_data()[i, j], wanted)
            close(F.pairwise_distance(given[0][i], given[1][j], eps=0.0).get_data(), wanted)
            total = total + wanted
    got = torch.autograd.grad([made.sum()], given, [torch.ones((), dtype=torch.float64)])
    for ours, theirs in zip(got, torch.autograd.grad(total, plain), strict=True):
        close(ours.to_tensor(0.0), theirs)


def test_cosines_are_over_the_cells_that_are_valid_in_both() -> None:
    x, y, own, others = drawn(5, 8), drawn(5, 8, seed=4), masks(5, 8), masks(5, 8, seed=3)
    made = F.cosine_similarity(leaf(x, own), leaf(y, others))
    for i in range(5):
        both = own[i] & others[i]
        close(made.get_data()[i], F.cosine_similarity(x[i][both], y[i][both], dim=0))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_of_padded_sequences_is_that_of_each_alone(is_causal: bool) -> None:
    q, k, v = (drawn(3, 2, 6, 4, seed=i) for i in range(3))
    lengths = [6, 3, 0]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    rows = valid[:, None, :, None].expand(q.shape)
    made = F.scaled_dot_product_attention(*(leaf(x, rows, junk) for x, junk in zip((q, k, v), (nan, inf, -inf), strict=True)),
                                          is_causal=is_causal)  # fmt: skip
    assert torch.equal(made.get_mask(), rows), "a masked query, and one that meets no key, is masked"
    for i, n in enumerate(lengths[:2]):
        alone = F.scaled_dot_product_attention(*(x[i, :, :n] for x in (q, k, v)), is_causal=is_causal)
        close(made.get_data()[i, :, :n], alone)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_heads", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_padded_sequences_are_computed_without_their_padding(
    dtype: torch.dtype, n_heads: int | None, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of each alone, and what is below the mask changes no bit of them."""
    lengths = [512, 0, 31, 31, 100]
    shape = (5, 512, 64) if n_heads is None else (5, n_heads, 512, 64)
    inputs = [drawn(*shape, seed=i).to(dtype) for i in range(4)]
    rows = (torch.arange(512) < torch.tensor(lengths)[:, None]).view(5, *[1] * (len(shape) - 3), 512, 1).expand(shape)
    called: list[int] = []

    def counted(q: Tensor, *args: Any, **params: Any) -> Any:
        called.append(q.shape[2])
        return FORWARD(q, *args, **params)

    monkeypatch.setattr(fused, "FORWARD", counted)

    def found(*junk: float) -> list[MaskedTensor]:
        leaves = [leaf(x, rows, below) for x, below in zip(inputs[:3], junk, strict=True)]
        made = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
        return [made.detach(), *torch.autograd.grad([made], leaves, [inputs[3]])]

    ours, others = found(nan, inf, -inf), found(0, 0, 0)
    assert set(called) == {512, 31, 100}
    for one, other in zip(ours, others, strict=True):
        assert torch.equal(one.get_mask(), rows)
        assert torch.equal(one.to_tensor(0), other.to_tensor(0))
    for i, n in enumerate(lengths):
        alone = [x[i, ..., :n, :].clone().requires_grad_() for x in inputs[:3]]
        expected = F.scaled_dot_product_attention(*alone, is_causal=is_causal)
        both = [expected, *torch.autograd.grad(expected, alone, inputs[3][i, ..., :n, :])] if n else []
        for one, other in zip(ours, both, strict=False):
            close(one.get_data()[i, ..., :n, :], other, 1e-5 if dtype is torch.float32 else 3e-2)


KINDS = (
    "rows",
    "cells",
    "values of other rows",
    "inf",
    "junk",
    "large",
    "none",
    "padded",
    "padded inf",
    "padded large",
)


def attention_case(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values, and their masks."""
    inputs = [drawn(3, 2, 6, 8, seed=i).to(dtype) for i in range(3)]
    own = [masks(3, 2, 6, 1, seed=0).expand(3, 2, 6, 8) for _ in range(3)]
    if kind == "none":
        own = [torch.ones(3, 2, 6, 8, dtype=torch.bool)] * 3
    if kind == "cells":
        own[1] = masks(3, 2, 6, 8, seed=4)
    if kind == "values of other rows":
        own[2] = masks(3, 2, 6, 1, seed=5).expand(3, 2, 6, 8)
        inputs[2] = torch.where(own[2], inputs[2], 1e6)
    if kind.startswith("padded"):
        lengths = torch.tensor([[6, 2, 0], [4, 5, 6]])[:, :, None, None, None]
        queries, keys = (torch.arange(6)[:, None] < lengths).expand(2, 3, 2, 6, 8)
        own = [queries, keys, keys]
    if kind.endswith("inf"):
        inputs[2][0, 0, 3, 1] = inf
    if kind in ("junk", "padded"):
        inputs = [torch.where(m, x, junk) for x, m, junk in zip(inputs, own, (nan, inf, -inf), strict=True)]
    if kind.endswith("large"):
        inputs[0] = inputs[0] * torch.finfo(dtype).max / 8
        inputs[1] = inputs[1] * torch.finfo(dtype).tiny
    return inputs, own


@pytest.mark.parametrize("met", [None, masks(6, 6), masks(3, 1, 6, 6)], ids=["all", "some", "of each sequence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_kernel_gives_what_the_rows_give(
    met: Tensor | None, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, and which cells have one, where results are masked once more by words and by cells."""
    inputs, own = attention_case(kind, dtype)
    monkeypatch.setattr(fused, "PAYS", -math.inf)  # sequences as short as these too
    above = drawn(3, 2, 6, 8, seed=9).to(dtype)
    asked = [torch.ones(1, dtype=torch.bool), masks(3, 2, 6, 1, seed=7), masks(3, 2, 6, 8, seed=8)]
    tolerance = 1e-11 if dtype is torch.float64 else 1e-4

    def found() -> list[MaskedTensor]:
        plain = [ms.masked_tensor(x, m) for x, m in zip(inputs, own, strict=True)]
        values = [F.scaled_dot_product_attention(*plain, attn_mask=met)]
        for seen in asked:
            leaves = [leaf(x, m) for x, m in zip(inputs, own, strict=True)]
            made = F.scaled_dot_product_attention(*leaves, attn_mask=met)
            values += [made, *torch.autograd.grad([ms.mask(made, valid=seen.expand(made.shape))], leaves, [above])]
        return values

    by_kernel = found()
    monkeypatch.setattr(layers, "attended", lambda *args: None)
    for one, other in zip(by_kernel, found(), strict=True):
        assert torch.equal(one.get_mask(), other.get_mask())
        torch.testing.assert_close(
            one.detach().to_tensor(0), other.detach().to_tensor(0), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("kind", ["none", "rows", "junk"])
def test_attention_can_be_differentiated_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, own = attention_case(kind, torch.float64)
    met = masks(6, 6)

    def found() -> list[Tensor]:
        leaves = [leaf(x, m) for x, m in zip(inputs, own, strict=True)]
        made = F.scaled_dot_product_attention(*leaves, attn_mask=met).to_tensor(0)
        plain = [x._data for x in leaves]
        first = torch.autograd.grad(made, plain, made.detach().square(), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), plain)
        return [*first, *second]

    fused = found()
    monkeypatch.setattr(layers, "attended", lambda *args: None)
    for one, other in zip(fused, found(), strict=True):
        assert bool(one.isfinite().all())
        close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("junk", [1.0, 30.0, 1e9, 1e12, 1e30, 1e38, inf, nan])
def test_junk_in_a_masked_word_changes_no_bit_of_a_gradient(junk: float, dtype: torch.dtype) -> None:
    """A kernel that finds weights again from junk finds inf; and 0 times inf is NaN."""
    for n in (2, 17, 20, 33):
        x, valid = drawn(1, 2, n, 5, seed=n).to(dtype), (torch.arange(n) < n - 1).view(1, 1, n, 1)
        found = []
        for below in (0.0, junk):
            leaves = [leaf(x + i, valid.expand(x.shape), below) for i in range(3)]
            made = F.scaled_dot_product_attention(*leaves)
            found.append([made.detach(), *torch.autograd.grad([made.sum()], leaves)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one.to_tensor(0), other.to_tensor(0))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("layout", ["dense", "broadcast", "strided"])
def test_rows_of_a_mask_are_alike_or_not(n: int, layout: str) -> None:
    first = masks(3, 5, 1)
    mask = first.expand(3, 5, n) if layout == "broadcast" else first.expand(3, 5, n).clone()
    mask = mask.permute(1, 2, 0).contiguous().permute(2, 0, 1) if layout == "strided" else mask
    found = rows_alike(mask)
    assert found is not None
    assert torch.equal(found, first[..., 0])
    for at in (0, n - 1) if n > 1 else ():
        spoilt = mask.clone()
        spoilt[2, 4, at] ^= True
        assert rows_alike(spoilt) is None


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_lengths_are_told_where_all_heads_agree(n: int) -> None:
    lengths = [n, 0, n // 2]
    mask = (torch.arange(n) < torch.tensor(lengths)[:, None])[:, None].expand(3, 2, n)
    assert valid_first(mask) == valid_first(mask[:, 0]) == lengths
    for i, head in ((0, 1), (1, 0)):  # the last cell of a full row, and of an empty one
        other = mask.clone()
        other[i, head, -1] ^= True
        assert valid_first(other) is None


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (4, 16), (2, 3, 33), (5, 400_000), (2, 40_000, 33)], ids=str)
def test_only_valid_words_are_measured(shape: tuple[int, ...], together: bool) -> None:
    x, valid = drawn(*shape), masks(*shape[:-1])
    junk = torch.where(valid.unsqueeze(-1), x, nan)
    expected = float(x.norm(dim=-1)[valid].amax())
    for laid in (junk, junk.float(), junk.movedim(0, -2).contiguous().movedim(-2, 0), junk.half()):
        found = longest(laid, valid, together=together)
        assert found == pytest.approx(expected, rel=1e-3) or (together and expected < found <= float(x.norm()) * 1.001)
    junk[tuple(valid.nonzero()[-1])] = nan
    assert not longest(junk, valid, together=together) < inf
    assert longest(junk, torch.zeros_like(valid), together=together) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 3, 7), (4, 16), (2, 3, 33), (5, 400_000)], ids=str)
def test_the_longest_word_bounds_all_of_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = drawn(*shape).to(dtype)
    expected = float(x.double().norm(dim=-1).amax())
    for laid in (x, x.transpose(-1, -2).contiguous().transpose(-1, -2), x.movedim(0, -2).contiguous().movedim(-2, 0)):
        assert longest(laid) == pytest.approx(expected, rel=1e-3)
    assert longest(x[..., :1].expand(*shape[:-1], 9)) == pytest.approx(
        3 * float(x[..., 0].double().abs().amax()), rel=1e-3
    )
    for odd in (nan, inf, -inf):
        x[(0,) * len(shape)], x[(-1,) * len(shape)] = odd, 1
        assert not longest(x) < inf


@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e4, 1e5])
def test_gradients_of_attention_hold_where_scores_are_large(size: float) -> None:
    """Queries meet keys that are all alike: each weighs as much, however large the scores are."""
    q, v = drawn(1, 1, 17, 5).float() * size, drawn(1, 1, 17, 5, seed=2).float()
    k = (drawn(1, 1, 1, 5, seed=1).float() * size).expand(q.shape).contiguous()
    leaves = [leaf(x) for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad([F.scaled_dot_product_attention(*leaves).sum()], leaves)
    above = torch.autograd.grad(F.scaled_dot_product_attention(*exact).sum(), exact)
    torch.testing.assert_close(found[2].to_tensor(), above[2].float(), rtol=1e-4, atol=1e-4)
    assert all(bool(g.to_tensor().isfinite().all()) for g in found)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_widens_what_other_products_widen(dtype: torch.dtype) -> None:
    x = drawn(2, 4, 8).to(dtype)
    made = F.scaled_dot_product_attention(*[ms.masked_tensor(x)] * 3)
    torch.testing.assert_close(made.get_data(), F.scaled_dot_product_attention(*[x.float()] * 3), rtol=1e-5, atol=1e-5)


def test_attention_of_what_has_no_cells_of_its_own_is_refused() -> None:
    sparse = ms.masked_tensor(drawn(2, 4, 8).to_sparse(), torch.ones(2, 4, 8).bool().to_sparse())
    for x in (ms.masked_tensor(torch.empty(2, 4, 8, device="meta")), sparse):
        with pytest.raises(MaskserveError, match="strided"):
            F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("shapes", [((2, 0, 8), (2, 3, 8)), ((2, 3, 8), (2, 0, 8)), ((0, 3, 8), (0, 3, 8))], ids=str)
def test_attention_of_no_words_has_a_gradient(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    leaves = [leaf(drawn(*shapes[0])), *(leaf(drawn(*shapes[1])) for _ in range(2))]
    made = F.scaled_dot_product_attention(*leaves)
    found = torch.autograd.grad([made], leaves, [torch.ones(made.shape, dtype=torch.float64)])
    assert [g.shape for g in found] == [x.shape for x in leaves]
    assert not any(bool(g.get_mask().any()) for g in found)


def test_an_infinite_gradient_spoils_only_what_its_query_met() -> None:
    q, k, v = (leaf(drawn(1, 4, 8, seed=i)) for i in range(3))
    above = torch.zeros(1, 4, 8, dtype=torch.float64)
    above[0, 1] = inf
    found = torch.autograd.grad([F.scaled_dot_product_attention(q, k, v, is_causal=True)], [q, k, v], [above])
    spoilt = [~x.to_tensor(0).isfinite().all(-1)[0] for x in found]
    assert [x.tolist() for x in spoilt[1:]] == [[True, True, False, False]] * 2
    assert spoilt[0].tolist() == [False, True, False, False]


def test_a_valid_nan_is_not_hidden_and_one_that_no_query_meets_is() -> None:
    q, k, v = (drawn(3, 4, seed=i) for i in range(3))
    k[2, 0] = nan
    made = F.scaled_dot_product_attention(ms.masked_tensor(q), k, v)
    assert bool(made.get_data().isnan().all())
    made = F.scaled_dot_product_attention(ms.masked_tensor(q), k, v, is_causal=True)
    assert made.get_data().isnan().any(1).tolist() == [False, False, True]
    assert bool(made.get_mask().all())


def test_a_query_that_meets_no_key_is_masked() -> None:
    q = ms.masked_tensor(drawn(2, 4))
    met = torch.tensor([[True, False], [False, False]])
    made = F.scaled_dot_product_attention(q, drawn(2, 4, seed=1), drawn(2, 4, seed=2), attn_mask=met)
    assert made.get_mask().all(1).tolist() == [True, False]
    assert not made.get_mask()[1].any()


def test_embeddings_of_masked_indices_are_masked_and_train_nothing() -> None:
    table = nn.Embedding(5, 3).double()
    index = ms.masked_tensor(torch.tensor([[1, 10**6], [4, 1]]), torch.tensor([[True, False], [True, True]]))
    made = table(index)
    assert torch.equal(made.get_mask()[..., 0], index.get_mask())
    close(made.get_data()[0, 0], table.weight[1])
    made.sum().backward()
    assert table.weight.grad.sum(1).tolist() == [0, 6, 0, 0, 3]


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        nn.GroupNorm(2, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 2),
        nn.CosineSimilarity(dim=0),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_of_torch_take_them(module: nn.Module) -> None:
    x = drawn(4, 6)
    inputs = (x, x + 1) if isinstance(module, nn.CosineSimilarity) else (x,)
    expected = module.double()(*inputs)
    close(module(*(ms.masked_tensor(cells) for cells in inputs)).to_tensor(), expected)


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_multihead_attention_is_torchs(options: dict[str, Any], is_padded: bool) -> None:
    attention = nn.MultiheadAttention(6, 2, batch_first=True).double().train()
    x = drawn(3, 5, 6)
    padding = (torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]) if is_padded else None
    causal = torch.ones(5, 5).tril() == 0
    expected, weights = attention(x, x, x, key_padding_mask=padding, attn_mask=causal, **options)
    made, told = attention(*[ms.masked_tensor(x)] * 3, key_padding_mask=padding, attn_mask=causal, **options)
    close(made.to_tensor(), expected)
    assert (told is None) == (weights is None)
    if weights is not None:
        close(told.to_tensor(0), weights)


def test_multihead_attention_takes_padding_as_masks() -> None:
    attention = nn.MultiheadAttention(6, 2).double()
    x = drawn(5, 3, 6)
    valid = (torch.arange(5)[:, None] < torch.tensor([5, 3, 0]))[..., None].expand(x.shape)
    made, _ = attention(*[leaf(x, valid)] * 3)
    assert torch.equal(made.get_mask(), valid)
    for i, n in enumerate((5, 3)):
        close(made.get_data()[:n, i], attention(*[x[:n, i]] * 3)[0])
    alone, _ = attention(*[ms.masked_tensor(x[:, 0])] * 3)
    close(alone.to_tensor(), made.get_data()[:, 0])


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_a_word_that_all_queries_meet_is_joined_by_hand(option: str) -> None:
    x = ms.masked_tensor(torch.randn(2, 3, 4))
    with pytest.raises(MaskserveError, match=r"make the module without add_bias_kv .*: key = maskserve\.cat"):
        nn.MultiheadAttention(4, 2, batch_first=True, **{option: True})(x, x, x)
    word = torch.zeros(4, requires_grad=True)
    key = ms.cat([x, word.expand(len(x), 1, -1)], 1)  # what the message says
    made, weights = nn.MultiheadAttention(4, 2, batch_first=True)(x, key, key)
    assert weights.shape == (2, 3, 4)
    made.sum().backward()
    assert word.grad is not None


def test_dropout_is_torchs() -> None:
    x, mask = drawn(50, 40), masks(50, 40)
    torch.manual_seed(1)
    made = F.dropout(ms.masked_tensor(x, mask), 0.3)
    torch.manual_seed(1)
    assert torch.equal(made.to_tensor(0), torch.where(mask, F.dropout(x, 0.3), 0))
    assert F.dropout(made, 0.3, training=False).tolist() == made.tolist()


@pytest.mark.parametrize("is_training", [True, False])
def test_torchs_encoder_takes_them(is_training: bool) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().train(is_training)
    x, lengths = drawn(3, 5, 8), [5, 3, 1]
    valid = (torch.arange(5) < torch.tensor(lengths)[:, None])[..., None].expand(x.shape)
    made = encoder(leaf(x, valid))
    assert torch.equal(made.get_mask(), valid)
    for i, n in enumerate(lengths):
        close(made.get_data()[i, :n], encoder(x[i : i + 1, :n])[0])


class Block(nn.Module):
    """A transformer's block, with an embedding before and classes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.wide, self.narrow, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        y = self.norms[0](x)
        x = x + self.heads(y, y, y, need_weights=False)[0]
        x = x + self.narrow(torch.relu(self.wide(self.norms[1](x))))
        return self.out(x)


def test_a_padded_block_trains_as_on_sequences_one_by_one() -> None:
    """Six steps of Adam; the parameters agree to 1e-10. What stands in the padding is junk."""
    torch.manual_seed(2)
    padded, alone = Block().double(), Block().double()
    alone.load_state_dict(padded.state_dict())
    lengths = [7, 3, 1, 5]
    tokens, classes = torch.randint(11, (4, 7)), torch.randint(4, (4, 7))
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    batch = ms.masked_tensor(torch.where(valid, tokens, 10**9), valid)
    targets = ms.masked_tensor(torch.where(valid, classes, -7), valid)
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in (padded, alone)]
    for _ in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(padded(batch).transpose(1, 2), targets)
        loss.backward()
        parts = [
            F.cross_entropy(alone(tokens[i : i + 1, :n])[0], classes[i, :n], reduction="sum")
            for i, n in enumerate(lengths)
        ]
        expected = torch.stack(parts).sum() / sum(lengths)
        expected.backward()
        torch.testing.assert_close(loss.to_tensor(), expected, rtol=1e-10, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(padded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


HEADS = nn.MultiheadAttention(6, 2, batch_first=True).double()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: F.layer_norm(x, (5,)), r"normalized_shape \(5,\) must be the end of the input's shape \(4, 6\)"),
        (lambda x: F.group_norm(x, 4), "4 groups do not divide the channels"),
        (lambda x: F.batch_norm(x, None, None), "running_mean and running_var are needed"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4).bool(), is_causal=True), "not both"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(3, 4).bool()), r"attn_mask has shape \(3, 4\)"),
        (
            lambda x: F.scaled_dot_product_attention(x[None], x[None, :, :4], x[None]),
            r"as many cells.*query \(1, 4, 6\), key \(1, 4, 4\), value \(1, 4, 6\)",
        ),
        (
            lambda x: F.scaled_dot_product_attention(x, x, x[:3]),
            r"as many words: query \(4, 6\), key \(4, 6\), value \(3, 6\)",
        ),
        (
            lambda x: F.scaled_dot_product_attention(x[0], x, x),
            r"attention: query has shape \(6,\); .* at least 2 dims",
        ),
        (lambda x: F.scaled_dot_product_attention(x, x.float(), x), "attention: key is f32, query f64"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=2.0), "dropout_p is 2.0; it must be .* 0 to 1"),
        (
            lambda x: F.scaled_dot_product_attention(x, x, x, enable_gqa=True),
            r"query has shape \(4, 6\), key \(4, 6\); with enable_gqa",
        ),
        (
            lambda x: F.scaled_dot_product_attention(
                x.expand(3, 4, 6), x.expand(2, 4, 6), x.expand(2, 4, 6), enable_gqa=True
            ),
            "with enable_gqa the heads .* are a multiple",
        ),
        (lambda x: F.pairwise_distance(x, x[:3]), r"pairwise_distance: shapes \(4, 6\) and \(3, 6\) do not broadcast"),
        (lambda x: HEADS(x[None], x[None].float(), x[None]), "multi_head_attention_forward: key is f32, query f64"),
        (
            lambda x: HEADS(x[None], x[None], x[None, :3]),
            r"query \(4, 1, 6\), key \(4, 1, 6\), value \(3, 1, 6\): they must",
        ),
        (lambda x: HEADS(x[:, None], x[:2, None].expand(2, 2, 6), x[:2, None].expand(2, 2, 6)), "of as many samples"),
        (lambda x: F.dropout(x, 1.5), "dropout: p is 1.5; it must be a number from 0 to 1"),
        (
            lambda x: F.layer_norm(x, (6,), torch.ones(5)),
            r"layer_norm: weight has shape \(5,\); it must be normalized_shape",
        ),
        (lambda x: F.layer_norm(x, (6,), torch.ones(1).double()), r"layer_norm: weight has shape \(1,\)"),
        (lambda x: F.layer_norm(x, (6,), None, torch.ones(4, 1)), r"layer_norm: bias has shape \(4, 1\)"),
        (lambda x: F.layer_norm(x, (6,), torch.ones(4, 6)), r"layer_norm: weight has shape \(4, 6\)"),
        (lambda x: F.layer_norm(x, (6,), torch.ones(6)), "layer_norm: weight is f32, input f64; they must be the same"),
        (lambda x: F.rms_norm(x, (6,), torch.ones(1)), r"rms_norm: weight has shape \(1,\)"),
        (
            lambda x: F.group_norm(x, 2, torch.ones(1)),
            r"group_norm: weight has shape \(1,\); it must be one a channel, \(6,\)",
        ),
        (lambda x: F.batch_norm(x, None, None, torch.ones(1), training=True), r"batch_norm: weight has shape \(1,\)"),
        (
            lambda x: nn.BatchNorm1d(5).double()(x),
            r"batch_norm: running_mean has shape \(5,\); it must be one a channel",
        ),
        (lambda x: F.instance_norm(x[None], weight=torch.ones(1)), r"instance_norm: weight has shape \(1,\)"),
        (
            lambda x: F.cosine_similarity(x, x, eps=-1.0),
            "cosine_similarity: eps is -1.0; it must be a number from 0 on",
        ),
        (lambda x: F.batch_norm(x, None, None, training=True, eps=0.0), "eps is 0.0; in training it must be above 0"),
        (lambda x: ms.where(x, x, 0), "^where: condition is f64; it must be bool"),
        (
            lambda x: F.prelu(x, torch.ones(5).double()),
            r"prelu: weight has shape \(5,\); it must be \(1,\), or one a channel",
        ),
        (lambda x: F.prelu(x, torch.ones(6)), "prelu: weight is f32, input f64; they must be the same"),
        (lambda x: F.glu(x[:3], 0), "glu: dim 0 has size 3, which must be even"),
        (lambda x: F.rrelu(x, 0.5, 0.1), "rrelu: lower is 0.5, and upper 0.1"),
        (lambda x: F.cosine_similarity(x, torch.ones(3, 6)), r"cosine_similarity: shapes \(4, 6\) and \(3, 6\) do not"),
        (lambda x: F.embedding((x * 0).long() + 9, torch.ones(5, 2)), "an index is 9; the table has 5 rows"),
    ],
)
def test_a_slip_has_one_clear_line(call: Callable[[MaskedTensor], Any], says: str) -> None:
    with pytest.raises(MaskserveError, match=says):
        call(ms.masked_tensor(drawn(4, 6)))


def test_slopes_drawn_in_training_are_those_between_the_ends() -> None:
    x = ms.masked_tensor(
        torch.tensor([-1.0, -1.0, -2.0, 3.0]), torch.tensor([True, False, True, True]), requires_grad=True
    )
    made = nn.RReLU(0.2, 0.4).train()(x)
    slopes = (made / x.detach()).tolist()
    assert slopes[1] is None
    assert slopes[3] == 1
    assert all(0.2 <= slopes[i] <= 0.4 for i in (0, 2))
    made.sum().backward()
    assert x.grad.tolist() == pytest.approx([slopes[0], None, slopes[2], 1.0])


def test_slopes_train_by_the_valid_cells_alone() -> None:
    module = nn.PReLU(2)
    x = ms.masked_tensor(torch.tensor([[-1.0, -nan], [-3.0, 5.0]]), torch.tensor([[True, False], [True, True]]))
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [-4.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_whole_numbers_are_no_mask_of_attention(dtype: torch.dtype) -> None:
    """Added to the scores they would say something plausible and wrong."""
    x, met = ms.masked_tensor(drawn(1, 2, 4)), torch.tensor([[1, 0], [1, 1]]).to(dtype)
    with pytest.raises(MaskserveError, match=r"attn_mask is .*; it must be bool, or f64 as the others") as of_python:
        F.scaled_dot_product_attention(x, x, x, attn_mask=met)
    with pytest.raises(MaskserveError) as of_eval:
        ms.eval("scaled_dot_product_attention(x, x, x, m)", x=x, m=met)
    assert of_eval.value.message == f"column 1: {of_python.value.message}"
    module = nn.MultiheadAttention(4, 2, batch_first=True).double()
    with pytest.raises((MaskserveError, AssertionError), match="attn_mask"):  # torch's own module refuses ints itself
        module(x, x, x, attn_mask=met)
    with pytest.raises((MaskserveError, AssertionError), match="key_padding_mask"):
        module(x, x, x, key_padding_mask=met[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_scaled_by_weights_of_float32_as_in_torch(dtype: torch.dtype) -> None:
    x, w = drawn(4, 6).to(dtype), W.float()
    m = ms.masked_tensor(x)
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda x: F.layer_norm(x, (6,), w, w),
        lambda x: F.group_norm(x, 2, w, w),
        lambda x: F.batch_norm(x, None, None, w, w, training=True),
        lambda x: F.batch_norm(x, w, w.exp(), w, w),
    )
    for call in calls:
        torch.testing.assert_close(call(m).get_data(), call(x), rtol=2e-2, atol=2e-2)  # dtypes too
    made = ms.eval("layer_norm(x, w, w, normalized_shape=6)", x=m, w=w)
    assert torch.equal(made.get_data(), F.layer_norm(m, (6,), w, w).get_data())
    assert made.dtype is dtype
    with pytest.raises(MaskserveError, match="weight is f32, input f64"):
        ms.eval("layer_norm(x, w, w, normalized_shape=6)", x=m.double(), w=w)
    assert ms.eval("rms_norm(x, w, normalized_shape=6)", x=m.float(), w=w.double()).dtype is torch.float32
    assert F.rms_norm(m.float(), (6,), w.double()).dtype is torch.float32


HALF = torch.tensor([[True, False, True, True]])
UNDER_A_POLICY: dict[str, Callable[[MaskedTensor], Any]] = {
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], torch.zeros(1, 1)),
    "avg_pool": lambda x: F.avg_pool1d(x, 2, 1, 1),
    "layer_norm": lambda x: F.layer_norm(x, (4,), torch.ones(4), torch.ones(4)),
    "instance_norm": lambda x: F.instance_norm(x[None], weight=torch.ones(1), bias=torch.ones(1)),
    "embedding_bag": lambda x: F.embedding_bag(
        ms.masked_tensor(torch.tensor([[0, 1]]), HALF[:, :2]), torch.ones(3, 2), mode="sum",
        per_sample_weights=torch.tensor([[2.0, 5.0]]),
    ),
    "diff": torch.diff,
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x, torch.ones(1, 4), torch.full((4,), 3.0)),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.tensor([0]), torch.arange(1.0, 5.0)),
}  # fmt: skip


@pytest.mark.parametrize("call", UNDER_A_POLICY.values(), ids=UNDER_A_POLICY.keys())
def test_a_layer_keeps_its_own_mask_rule_under_a_policy(call: Callable[[MaskedTensor], Any]) -> None:
    x = ms.masked_tensor(torch.tensor([[0.5, nan, 0.25, 1.0]]), HALF)
    wanted = call(x).tolist()
    for policy in ("union", "strict"):
        with ms.policy(policy):
            assert call(x).tolist() == wanted, policy
