"""Pooling, other sizes, bags and differences: torch's own where nothing is masked, and over the valid cells where some are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # as torch's own documentation writes it

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import MaskserveError

nan, inf = torch.nan, torch.inf
SHAPES = {1: (2, 3, 9), 2: (2, 2, 7, 6), 3: (1, 2, 5, 4, 6)}
WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True},
]  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-12, atol=1e-12)


PLAIN: dict[str, tuple[Callable[..., Any], Tensor]] = {
    **{
        f"{kind}{n} {options}": (
            lambda x, kind=kind, n=n, o=options: getattr(F, f"{kind}{n}d")(x, **o),
            drawn(*SHAPES[n]),
        )
        for kind in ("max_pool", "avg_pool")
        for n in (1, 2, 3)
        for options in WINDOWS
    },
    "max_pool dilated": (lambda x: F.max_pool2d(x, (2, 3), 1, dilation=2), drawn(2, 7, 8)),
    "avg_pool without its padding": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), drawn(2, 7, 8)),
    **{
        f"adaptive_{kind}{n}": (
            lambda x, kind=kind, n=n: getattr(F, f"adaptive_{kind}_pool{n}d")(x, (3, 2, 4)[:n]),
            drawn(*SHAPES[n]),
        )
        for kind in ("max", "avg")
        for n in (1, 2, 3)
    },
    "global": (nn.AdaptiveAvgPool2d((1, None)), drawn(2, 3, 4, 5)),
    "nearest": (lambda x: F.interpolate(x, (5, 13)), drawn(2, 3, 7, 6)),
    "nearest by a factor": (lambda x: F.interpolate(x, scale_factor=(2.0, 0.7)), drawn(2, 3, 7, 6)),
    "Upsample": (nn.Upsample(scale_factor=2), drawn(2, 3, 3, 4)),
    "nearest-exact": (lambda x: F.interpolate(x, 5, mode="nearest-exact"), drawn(2, 3, 7)),
    "area": (lambda x: F.interpolate(x, scale_factor=0.5, mode="area"), drawn(2, 3, 7, 6)),
    "instance_norm": (lambda x: F.instance_norm(x, weight=drawn(3)), drawn(2, 3, 7, 6)),
    "diff": (lambda x: torch.diff(x, n=2, dim=0, prepend=drawn(1, 6)), drawn(7, 6)),
    "diff as a method": (lambda x: x.diff(dim=-1), drawn(7, 6)),
}


@pytest.mark.parametrize(("function", "given"), PLAIN.values(), ids=PLAIN.keys())
def test_it_is_torchs_where_nothing_is_masked(function: Callable[..., Any], given: Tensor) -> None:
    x, plain = ms.masked_tensor(given, requires_grad=True), given.clone().requires_grad_()
    made, wanted = function(x), function(plain)
    assert isinstance(made, MaskedTensor)
    assert bool(made.get_mask().all())
    close(made.get_data(), wanted)
    (ours,) = torch.autograd.grad([made.sum()], [x], [torch.ones((), dtype=torch.float64)])
    (theirs,) = torch.autograd.grad(wanted.sum(), plain)
    close(ours.to_tensor(0.0), theirs)


@pytest.mark.parametrize("junk", [nan, inf, 3e300], ids=str)
@pytest.mark.parametrize(("name", "op"), [("max_pool2d", Tensor.amax), ("avg_pool2d", Tensor.mean)])
def test_a_window_is_over_its_valid_cells(name: str, op: Callable[[Tensor], Tensor], junk: float) -> None:
    cells, own = drawn(3, 6, 8), masks(3, 6, 8)
    own[0, :3, :4] = False
    x = ms.masked_tensor(torch.where(own, cells, junk), own, requires_grad=True)
    made, plain = getattr(F, name)(x, (3, 4)), cells.clone().requires_grad_()
    wanted = []
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).tolist():
        a, i, j = place
        box = (a, slice(3 * i, 3 * i + 3), slice(4 * j, 4 * j + 4))
        assert bool(made.get_mask()[a, i, j]) == bool(own[box].any())
        if own[box].any():
            wanted.append(op(plain[box][own[box]]))
            close(made.get_data()[a, i, j], wanted[-1])
    (ours,) = torch.autograd.grad([made.sum()], [x], [torch.ones((), dtype=torch.float64)])
    assert torch.equal(ours.get_mask(), own)
    close(ours.to_tensor(0.0), torch.autograd.grad(torch.stack(wanted).sum(), plain)[0])


def test_what_lies_under_the_mask_changes_no_bit() -> None:
    for name, (function, given) in PLAIN.items():
        cells, own = given, masks(*given.shape)
        found = set()
        for junk in (nan, inf, -1e300):
            x = ms.masked_tensor(torch.where(own, cells, junk), own, requires_grad=True)
            made = function(x)
            (by,) = torch.autograd.grad([made.sum()], [x], [torch.ones((), dtype=torch.float64)])
            parts = (made.get_data(), made.get_mask(), by.get_data(), by.get_mask())
            found.add(tuple(part.detach().numpy().tobytes() for part in parts))
        assert len(found) == 1, name


def test_zeros_of_the_padding_count_beside_a_valid_cell_only() -> None:
    x = ms.masked_tensor([[4.0, None, None, None]])
    made = F.avg_pool1d(x, 2, 2, 1)
    assert made.tolist() == [[2, None, None]]


def test_the_nearest_cell_may_be_a_masked_one() -> None:
    x = ms.masked_tensor([[[1.0, None, 3.0]]])
    assert F.interpolate(x, 6).tolist() == [[[1, 1, None, None, 3, 3]]]


def test_a_difference_needs_both_cells() -> None:
    assert torch.diff(ms.masked_tensor([1.0, 3.0, None, 7.0, 9.0])).tolist() == [2, None, None, 2]
    assert ms.diff(ms.masked_tensor([True, None, False])).tolist() == [None, None]


def test_counts_are_of_the_valid_cells() -> None:
    cells, mask = torch.tensor([3, 1, -7, 1, 1000]), torch.tensor([True, True, False, True, False])
    assert torch.bincount(ms.masked_tensor(cells, mask), minlength=6).tolist() == [0, 2, 0, 1, 0, 0]
    x = ms.masked_tensor(torch.tensor([0.5, nan, 2.5, 9.0, -1.0]), torch.tensor([True, False, True, True, True]))
    for options in ({"bins": 4}, {"bins": 3, "min": 0, "max": 3}):
        assert x.histc(**options).tolist() == torch.histc(x.get_data()[x.get_mask()], **options).tolist()


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_a_bag_is_of_its_valid_indices(mode: str) -> None:
    bags, mask = (
        torch.tensor([[1, 2, 4], [3, 0, 9], [9, 9, 9]]),
        torch.tensor([[True] * 3, [True, True, False], [False] * 3]),
    )
    module, rows = nn.EmbeddingBag(5, 2, mode=mode).double(), [[1, 2, 4], [3, 0]]
    made = module(ms.masked_tensor(bags, mask))
    assert made.get_mask().tolist() == [[True] * 2, [True] * 2, [False] * 2]
    wanted = torch.cat([module(torch.tensor([row])) for row in rows])
    close(made.get_data()[:2], wanted)
    (ours,) = torch.autograd.grad(made.sum().to_tensor(), module.weight)
    close(ours, torch.autograd.grad(wanted.sum(), module.weight)[0])


def test_a_bag_without_padding_and_with_weights_is_torchs() -> None:
    table, bags, weights = drawn(5, 2), torch.tensor([[1, 2, 4], [3, 0, 4]]), drawn(2, 3)
    for options in ({"padding_idx": -1, "mode": "mean"}, {"per_sample_weights": weights, "mode": "sum"}):
        close(
            F.embedding_bag(ms.masked_tensor(bags), table, **options).get_data(),
            F.embedding_bag(bags, table, **options),
        )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "return_indices=False"),
        (lambda x: F.max_pool2d(x, 9), "larger than the input"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
        (lambda x: F.interpolate(x[None], 3, mode="bilinear"), "nearest, nearest-exact or area"),
        (lambda x: F.interpolate(x), "size or scale_factor"),
        (lambda x: torch.diff(x, n=-1), "at least 0"),
        (lambda x: torch.bincount(x.long() - 9), "return_counts=True"),
        (lambda x: torch.histc(x / 0), "give min and max"),
        (lambda x: F.conv2d(x, torch.rand(2, 2, 1, 1)), r"convolve m.to_tensor\(0\)"),
        (lambda x: nn.LSTM(4, 2)(x), "to_packed_sequence"),
        (lambda x: torch.zeros(2, 4, 4).index_add(0, torch.tensor([0, 1]), x), r"source.to_tensor\(0\)"),
        (lambda x: F.one_hot(x.long()), r"m.get_mask\(\).unsqueeze\(-1\)"),
        (lambda x: F.embedding_bag(x.long().flatten(), torch.rand(9, 2), torch.tensor([0])), "from_lengths"),
        (lambda x: F.interpolate(x[None], (2,)), "size is .2,.; it must be a whole number from 1 on, or 2"),
        (lambda x: F.interpolate(x[None], (2, 2, 3)), "or 2 of them"),
        (lambda x: F.interpolate(x[None], scale_factor=(2,)), "scale_factor is .2,.; it must be a finite number"),
        *((lambda x, by=by: F.interpolate(x[None], scale_factor=by), "finite number from 0 on") for by in (-1, nan, inf)),
        (lambda x: F.interpolate(x[None], scale_factor=0.1), "leaves no cell"),
        (lambda x: F.interpolate(x[None], 2, mode="nearest", align_corners=False), "align_corners is for modes that mix"),
        (lambda x: F.interpolate(x[None], 2, mode="area", antialias=True), "antialias is for modes that mix"),
        (lambda x: F.interpolate(x[None], 2, recompute_scale_factor=True), "where size is given"),
        (lambda x: F.interpolate(x[None][..., :0], 2, mode="area"), "no cells along the last 2"),
        (lambda x: F.interpolate(x[None], 10**8), "the memory here holds"),
        (lambda x: F.adaptive_avg_pool2d(x, (3,)), "output_size is .3,."),
        (lambda x: F.adaptive_avg_pool2d(x, (3, 4, 5)), "or 2 of them"),
        (lambda x: F.adaptive_avg_pool2d(x, 10**8), "the memory here holds"),
        (lambda x: F.max_pool2d(x, (2, 2, 2)), "kernel_size is"),
        (lambda x: F.max_pool2d(x, ()), "kernel_size is"),
        (lambda x: F.max_pool2d(x, 2.5), "kernel_size is 2.5"),
        (lambda x: F.max_pool2d(x, 2, (1, 2, 3)), "stride is"),
        (lambda x: F.max_pool2d(x, 2, padding=-1), "padding is -1; it must be a whole number from 0"),
        (lambda x: F.avg_pool2d(x, 2, padding=2), "at most half"),
        (lambda x: torch.bincount(x.long() + 2**50), "the memory here holds"),
        (lambda x: torch.bincount(x.long(), minlength=2**50), "the memory here holds"),
        (lambda x: torch.histc(x, 10**13), "give fewer bins"),
        (lambda x: torch.diff(x, dim=3), "dim 3 is out of range"),
        *((lambda x, at=at: F.embedding_bag(x[0].long(), torch.rand(7, 2), padding_idx=at), "padding_idx is")
          for at in (7, -8)),
        (lambda x: F.embedding(x[0].long(), torch.rand(7, 2), padding_idx=7), "padding_idx is 7"),
        (lambda x: F.embedding_bag(x[0].long(), torch.rand(0, 2), padding_idx=0), "the table has 0 rows"),
        (lambda x: F.embedding_bag(x[0].long(), torch.rand(7, 2), mode="sum", per_sample_weights=[1.0]), "give one for each"),
        (lambda x: torch.cdist(x, x, compute_mode="bogus"), "compute_mode=bogus must be one of"),
        (lambda x: torch.cdist(x, x, p=-1.0), "at least 0"),
        (lambda x: F.triplet_margin_loss(x, x, x, margin=-1.0), "above 0"),
    ],
)  # fmt: skip
def test_what_has_no_rule_says_what_to_do(call: Callable[[MaskedTensor], Any], says: str) -> None:
    with pytest.raises(MaskserveError, match=says):
        call(ms.masked_tensor(torch.rand(2, 4, 4)))


SCALES: list[dict[str, Any]] = [
    *({"size": n} for n in (1, 5, 7, 10, 63, 990)),
    *(
        {"scale_factor": by, "recompute_scale_factor": again}
        for by in (0.3, 0.7, 1.1, 2.0, 2.3, 3)
        for again in (None, True)
    ),
]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.uint8], ids=str)
def test_the_nearest_cell_is_torchs_for_every_size_and_dtype(dtype: torch.dtype, mode: str) -> None:
    for n in (4, 7, 100):
        for shape, scales in (((n,), SCALES), ((n, 4), SCALES[6:10])):
            for options in scales:
                cells = (torch.arange(torch.Size(shape).numel()) % 199).to(dtype).view(1, 1, *shape)
                wanted = F.interpolate(cells, mode=mode, **options)
                made = F.interpolate(ms.masked_tensor(cells), mode=mode, **options)
                assert torch.equal(made.get_data(), wanted), (shape, options)


def test_windows_of_many_sizes_are_torchs_and_made_at_once() -> None:
    for shape, sizes in (((1, 5, 7), ((5, 7), (3, 2), (11, 4), (1, 14), (600, 500))), ((2, 3, 4, 5), ((2, 6, 5),))):
        x = drawn(*shape)
        n = len(sizes[0])
        for size in sizes:
            for name in ("max", "avg"):
                pool = getattr(F, f"adaptive_{name}_pool{n}d")
                close(pool(ms.masked_tensor(x), size).get_data(), pool(x, size))
    x = drawn(1, 1, 5, 7)
    close(
        F.interpolate(ms.masked_tensor(x), (600, 500), mode="area").get_data(),
        F.interpolate(x, (600, 500), mode="area"),
    )
    one = ms.masked_tensor([[1.0, None, 4.0]])
    assert F.adaptive_max_pool1d(one, 5).tolist() == [[1, 1, None, 4, 4]]
    assert F.adaptive_avg_pool1d(one, 2).tolist() == [[1, 4]]


def test_a_kernel_far_larger_than_the_cells_holds_no_more_than_those() -> None:
    x = drawn(1, 4, 5)
    options = {"kernel_size": 100_001, "stride": 1, "padding": 50_000}
    close(F.max_pool2d(ms.masked_tensor(x), **options).get_data(), F.max_pool2d(x, **options))
    for n in (9, 10):
        for options in (
            {"kernel_size": n, "stride": 2, "padding": n // 2},
            {"kernel_size": n, "stride": 3, "padding": n // 2, "ceil_mode": True},
        ):
            for name in ("max", "avg"):
                pool = getattr(F, f"{name}_pool2d")
                close(pool(ms.masked_tensor(x), **options).get_data(), pool(x, **options))
    dilated = {"kernel_size": 9, "stride": 1, "padding": 4, "dilation": (1, 1)}
    close(F.max_pool2d(ms.masked_tensor(x), **dilated).get_data(), F.max_pool2d(x, **dilated))


def test_no_difference_is_a_copy_of_the_input_alone() -> None:
    x = ms.masked_tensor([1.0, None, 4.0])
    made = torch.diff(x, 0, prepend=torch.ones(1))
    made[0] = 9.0
    assert (made.tolist(), x.tolist()) == ([9, None, 4], [1, None, 4])


def test_masked_indices_need_no_table() -> None:
    none = ms.masked_tensor(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool))
    assert F.embedding_bag(none, torch.rand(0, 3)).tolist() == [[None] * 3]
