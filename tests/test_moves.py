"""Move rows: each cell of a result is the cell, and has the validity, that torch's own move of an index tensor says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import maskserve as ms
from maskserve import OPS, MaskedTensor
from maskserve.errors import (
    DimError,
    DtypeError,
    MaskedValueError,
    MaskError,
    MaskserveError,
    ParameterError,
    ShapeError,
    UncoveredFunctionError,
)
from maskserve.ops.rows import Move
from maskserve.torch_functions import table
from tests.samples import ELEMENTWISE, MOVES, assert_same_bits

T, F = True, False
N = torch.nn.functional

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def m(cells: Any, mask: Any = None) -> MaskedTensor:
    return ms.masked_tensor(torch.tensor(cells), None if mask is None else torch.tensor(mask))


@st.composite
def indices(draw: st.DrawFn, shape: Any = shapes) -> tuple[Tensor, Tensor]:
    """A tensor whose cells are 1, 2, 3, ... and a mask: what a move did to them can be read back."""
    sizes = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    n = int(torch.Size(sizes).numel())
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool).reshape(sizes)
    return torch.arange(1, n + 1).reshape(sizes), mask


def flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def assert_moved(result: Any, moved: Any, masks: list[Tensor], *, made: bool | None = None) -> None:
    """`moved` is torch's own move of the indices; cells that it made are 0 there and have validity `made`."""
    validity = torch.cat([torch.tensor([bool(made)]), *[mask.reshape(-1) for mask in masks]])
    assert isinstance(result, tuple) == isinstance(moved, tuple | list)
    assert len(flat(result)) == len(flat(moved))
    for ours, theirs in zip(flat(result), flat(moved), strict=True):
        assert ours.shape == theirs.shape
        valid = validity[theirs]
        assert torch.equal(ours.get_mask(), valid)
        assert torch.equal(ours.get_data()[valid], theirs[valid].to(ours.dtype))
        assert not valid.logical_not().any() or made is None or bool((theirs >= 0).all())


def some_dim(data: st.DataObject, x: Tensor) -> int:
    return data.draw(st.integers(-x.ndim, x.ndim - 1), label="dim")


class Draws:
    """The same arguments for torch's tensor and for ours: what was drawn once is drawn again."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.drawn, self.at = data, [], 0  # type: ignore[var-annotated]  # anything that is drawn

    def anew(self) -> Any:
        self.at = 0
        return self

    def draw(self, strategy: Any, label: str = "") -> Any:
        if self.at == len(self.drawn):
            self.drawn.append(self.data.draw(strategy, label=label))
        self.at += 1
        return self.drawn[self.at - 1]


def in_a_form(x: Tensor, mask: Tensor, layout: str) -> tuple[MaskedTensor, Tensor]:
    """The tensor and its mask: as bits, or as lengths along its middle dim, as many as the mask has there."""
    if layout == "packed":
        return MaskedTensor(x, mask).to_mask_layout("packed"), mask
    dim = x.ndim // 2
    lengths = mask.reshape(*x.shape[:dim], -1).sum(-1).clamp(max=x.shape[dim])
    made = ms.from_lengths(x, lengths, dim)
    return made, made.get_mask()


# One line a row: how it is called on a tensor. A move without a line fails the test below.
ONE: dict[str, Callable[[Any, st.DataObject], Any]] = {
    "reshape": lambda x, d: x.reshape(-1),
    "reshape_as": lambda x, d: x.reshape_as(torch.ones(x.numel())),
    "view": lambda x, d: x.view(-1, 1),
    "view_as": lambda x, d: x.view_as(torch.ones(x.numel(), 1)),
    "flatten": lambda x, d: torch.flatten(x, d.draw(st.integers(0, x.ndim - 1), label="start")),
    "ravel": lambda x, d: torch.ravel(x),
    "unflatten": lambda x, d: torch.unflatten(x, some_dim(d, x), (1, -1)),
    "transpose": lambda x, d: torch.transpose(x, some_dim(d, x), some_dim(d, x)),
    "swapaxes": lambda x, d: torch.swapaxes(x, axis0=some_dim(d, x), axis1=0),
    "t": lambda x, d: x.reshape(-1).t(),
    "adjoint": lambda x, d: torch.adjoint(x.reshape(1, -1)),
    "permute": lambda x, d: torch.permute(x, d.draw(st.permutations(range(x.ndim)), label="dims")),
    "movedim": lambda x, d: torch.movedim(x, some_dim(d, x), some_dim(d, x)),
    "squeeze": lambda x, d: torch.squeeze(x, some_dim(d, x)),
    "unsqueeze": lambda x, d: torch.unsqueeze(x, some_dim(d, x)),
    "expand": lambda x, d: x.expand(2, *x.shape),
    "expand_as": lambda x, d: x.expand_as(torch.ones(2, *x.shape)),
    "broadcast_to": lambda x, d: torch.broadcast_to(x, (3, *x.shape)),
    "repeat": lambda x, d: x.repeat(2, *([2] * x.ndim)),
    "tile": lambda x, d: torch.tile(x, (2,)),
    "repeat_interleave": lambda x, d: torch.repeat_interleave(x, 2, some_dim(d, x)),
    "narrow": lambda x, d: torch.narrow(x, some_dim(d, x), 0, 1),
    "select": lambda x, d: torch.select(x, some_dim(d, x), -1),
    "unfold": lambda x, d: x.unfold(some_dim(d, x), 1, 1),
    "diagonal": lambda x, d: torch.diagonal(x.unsqueeze(0), d.draw(st.integers(0, 1), label="offset")),
    "flip": lambda x, d: torch.flip(x, (some_dim(d, x),)),
    "fliplr": lambda x, d: torch.fliplr(x.unsqueeze(0)),
    "flipud": lambda x, d: torch.flipud(x),
    "rot90": lambda x, d: torch.rot90(x.unsqueeze(0), d.draw(st.integers(-3, 3), label="k"), (0, 1)),
    "roll": lambda x, d: torch.roll(x, d.draw(st.integers(-3, 3), label="shift"), some_dim(d, x)),
    "combinations": lambda x, d: torch.combinations(x.reshape(-1)[:5], 2),
    "unbind": lambda x, d: torch.unbind(x, some_dim(d, x)),
    "split": lambda x, d: torch.split(x, d.draw(st.integers(1, 3), label="size"), some_dim(d, x)),
    "split_with_sizes": lambda x, d: torch.split_with_sizes(x, [1, x.shape[0] - 1], 0),
    "chunk": lambda x, d: torch.chunk(x, d.draw(st.integers(1, 3), label="chunks"), some_dim(d, x)),
    "tensor_split": lambda x, d: torch.tensor_split(x, d.draw(st.integers(1, 3), label="n"), some_dim(d, x)),
    "hsplit": lambda x, d: torch.hsplit(x, [1]),
    "vsplit": lambda x, d: torch.vsplit(x.unsqueeze(0), [1]),
    "dsplit": lambda x, d: torch.dsplit(x.reshape(1, 1, -1), [1]),
    "gather": lambda x, d: torch.gather(x, 0, torch.zeros((2, *x.shape[1:]), dtype=torch.int64)),
    "take_along_dim": lambda x, d: torch.take_along_dim(x, torch.tensor([x.numel() - 1, 0])),
    "index_select": lambda x, d: torch.index_select(x, some_dim(d, x), torch.tensor([0, 0])),
    "take": lambda x, d: torch.take(x, torch.tensor([[0, x.numel() - 1]])),
    "masked_select": lambda x, d: torch.masked_select(x, torch.arange(x.shape[-1]) % 2 == 0),
    "real": lambda x, d: torch.real(x),
    "conj": lambda x, d: torch.conj(x),
    "resolve_conj": lambda x, d: torch.resolve_conj(x),
    "resolve_neg": lambda x, d: torch.resolve_neg(x),
    "pixel_shuffle": lambda x, d: N.pixel_shuffle(x.reshape(-1)[: x.numel() // 4 * 4].reshape(-1, 4, 1, 1), 2),
    "pixel_unshuffle": lambda x, d: N.pixel_unshuffle(x.reshape(-1)[: x.numel() // 4 * 4].reshape(-1, 1, 2, 2), 2),
    "channel_shuffle": lambda x, d: torch.channel_shuffle(x.reshape(-1)[: x.numel() // 4 * 4].reshape(-1, 4, 1, 1), 2),
    "clone": lambda x, d: torch.clone(x),
    "contiguous": lambda x, d: torch.transpose(x, 0, -1).contiguous(),
    "detach": lambda x, d: torch.detach(x),
}  # fmt: skip
ZEROS: dict[str, Callable[[Any, st.DataObject], Any]] = {
    "diag": lambda x, d: torch.diag(x.reshape(-1), d.draw(st.integers(-1, 1), label="diagonal")),
    "diagflat": lambda x, d: torch.diagflat(x),
    "diag_embed": lambda x, d: torch.diag_embed(x),
    "tril": lambda x, d: torch.tril(x.unsqueeze(0), d.draw(st.integers(-1, 1), label="diagonal")),
    "triu": lambda x, d: torch.triu(x.unsqueeze(0), d.draw(st.integers(-1, 1), label="diagonal")),
    "block_diag": lambda x, d: torch.block_diag(x.reshape(1, -1), x.reshape(-1, 1)),
}  # fmt: skip
MANY: dict[str, Callable[[Any, Any], Any]] = {
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b], -1),
    "hstack": lambda a, b: torch.hstack([a, b]),
    "vstack": lambda a, b: torch.vstack([a, b]),
    "dstack": lambda a, b: torch.dstack((a, b)),
    "column_stack": lambda a, b: torch.column_stack((a, b)),
    "atleast_1d": lambda a, b: torch.atleast_1d(a, b),
    "atleast_2d": lambda a, b: torch.atleast_2d([a, b]),
    "atleast_3d": lambda a, b: torch.atleast_3d(a, b),
    "broadcast_tensors": lambda a, b: torch.broadcast_tensors(a, b.unsqueeze(0)),
    "meshgrid": lambda a, b: torch.meshgrid(a.reshape(-1), b.reshape(-1), indexing="ij"),
    "cartesian_prod": lambda a, b: torch.cartesian_prod(a.reshape(-1), b.reshape(-1)),
    "select_scatter": lambda a, b: torch.select_scatter(a, torch.select(b, 0, 0), 0, 0),
    "slice_scatter": lambda a, b: torch.slice_scatter(a, torch.narrow(b, 0, 0, 1), 0, 0, 1),
    "diagonal_scatter": lambda a, b: torch.diagonal_scatter(a.reshape(1, -1), torch.diagonal(b.reshape(1, -1))),
    "scatter": lambda a, b: torch.scatter(a, 0, torch.zeros(b.shape, dtype=torch.int64), b),
    "index_copy": lambda a, b: torch.index_copy(a, 0, torch.zeros(b.shape[0], dtype=torch.int64), b),
    "masked_scatter": lambda a, b: torch.masked_scatter(a, torch.arange(a.shape[-1]) % 2 == 0, b),
}  # fmt: skip
OWN = {"pad", "masked_fill", "index_fill", "imag", "view_as_real", "view_as_complex"}
"""Rows with a test of their own below."""


def test_every_move_has_a_test() -> None:
    assert {row.name for row in MOVES} == {*ONE, *ZEROS, *MANY, *OWN}
    assert {row.name for row in MOVES if row.zeros} == set(ZEROS)


@pytest.mark.parametrize("name", ONE)
@given(cells=indices(), data=st.data())
def test_a_move_of_one_tensor_takes_each_cell_with_its_validity(
    name: str, cells: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    x, mask = cells
    again = Draws(data)
    moved = ONE[name](x, again.anew())
    assert_moved(ONE[name](MaskedTensor(x, mask), again.anew()), moved, [mask])
    whole = ONE[name](MaskedTensor(x), again.anew())
    assert all(part._mask is None for part in flat(whole))
    broadcast = mask.narrow(0, 0, 1)
    assert_moved(ONE[name](MaskedTensor(x, broadcast), again.anew()), moved, [broadcast.expand(x.shape)])
    compact, own = in_a_form(x, mask, data.draw(st.sampled_from(["lengths", "packed"])))
    assert_moved(ONE[name](compact, again.anew()), moved, [own])


@pytest.mark.parametrize("name", ZEROS)
@given(cells=indices(), data=st.data())
def test_the_zeros_that_a_move_makes_are_valid(name: str, cells: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    x, mask = cells
    again = Draws(data)
    assert_moved(ZEROS[name](MaskedTensor(x, mask), again.anew()), ZEROS[name](x, again.anew()), [mask], made=True)


@pytest.mark.parametrize("name", MANY)
@given(shape=shapes, data=st.data())
def test_a_move_of_several_tensors_takes_each_cell_with_its_validity(
    name: str, shape: tuple[int, ...], data: st.DataObject
) -> None:
    a, a_mask = data.draw(indices(shape))
    b, b_mask = data.draw(indices(shape))
    b = b + a.numel()
    moved = MANY[name](a, b)
    assert_moved(MANY[name](MaskedTensor(a, a_mask), MaskedTensor(b, b_mask)), moved, [a_mask, b_mask])
    plain = torch.ones(shape, dtype=torch.bool)
    assert_moved(MANY[name](MaskedTensor(a, a_mask), b), moved, [a_mask, plain])
    assert_moved(MANY[name](a, MaskedTensor(b, b_mask)), moved, [plain, b_mask])
    assert all(part._mask is None for part in flat(MANY[name](MaskedTensor(a), b)))
    layout = data.draw(st.sampled_from(["lengths", "packed"]))
    (one, own), (other, others) = in_a_form(a, a_mask, layout), in_a_form(b, b_mask, layout)
    assert_moved(MANY[name](one, other), moved, [own, others])
    assert_moved(MANY[name](a, other), moved, [plain, others])


# -- what lies under the mask, who owns a mask --------------------------------------------------------------------


def test_copies_have_zero_under_the_mask_and_views_keep_what_was_there() -> None:
    x = m([[1.0, 666.0], [3.0, 4.0]], [[T, F], [T, T]])
    for copy in (
        torch.cat([x, x]),
        torch.stack([x]),
        x.flip(0),
        x.roll(1),
        x.repeat(2, 1),
        x.tril(),
        x.clone(),
        x.T.reshape(4),
        x[:1].tile(2),
    ):
        assert not copy.get_data()[~copy.get_mask()].any()
        assert not (copy.get_data() == 666).any()
    assert (x.T.get_data() == 666).any()


@pytest.mark.parametrize(
    "move",
    [
        lambda x: torch.cat([x]), lambda x: x.flip(0), lambda x: x.roll(0), lambda x: x.repeat(1, 1), lambda x: x.tril(9),
        lambda x: x.clone(), lambda x: torch.hstack([x]), lambda x: x.index_select(0, torch.tensor([0, 1])),
        lambda x: x.gather(0, torch.zeros(2, 2, dtype=torch.int64)), lambda x: ms.pad(x, (0, 0)),
        lambda x: x.masked_fill(x == 9, 0),
        lambda x: x.scatter(0, torch.zeros(0, 2, dtype=torch.int64), 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mask", [[[T, F], [T, T]], [[T, F]], None])
def test_assigning_into_a_copy_leaves_its_source_as_it_was(move: Callable[[Any], Any], mask: Any) -> None:
    x = MaskedTensor(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None if mask is None else torch.tensor(mask))
    before = x.tolist()
    copied = move(x)
    copied[0] = None
    copied[0, 1] = 7.0
    assert x.tolist() == before


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T, lambda x: x.mT, lambda x: x.unbind(0)[0], lambda x: x.split(1)[0],
        lambda x: torch.broadcast_tensors(x)[0],
        lambda x: torch.atleast_3d(x), lambda x: x.diagonal(), lambda x: x.unfold(0, 1, 1), lambda x: x.ravel(),
        lambda x: x.hsplit(2)[0],
        lambda x: x.conj(), lambda x: x.mH, lambda x: x.swapaxes(0, 1), lambda x: x.moveaxis(0, 1),
        lambda x: x.view_as(x), lambda x: x.expand_as(x),
    ],
)  # fmt: skip
def test_assigning_through_a_view_reaches_its_source_or_is_refused(view: Callable[[Any], Any]) -> None:
    x = MaskedTensor(torch.arange(4.0).reshape(2, 2), torch.ones(2, 2, dtype=torch.bool))
    corner = view(x)
    corner[(0,) * corner.ndim] = None
    assert x.tolist() == [[None, 1], [2, 3]]
    corner[(0,) * corner.ndim] = 9.0
    assert x.tolist() == [[9, 1], [2, 3]]
    for mask in (None, torch.tensor([[T, F]])):
        x = MaskedTensor(torch.arange(4.0).reshape(2, 2), mask)
        corner, before = view(x), x.tolist()
        with pytest.raises(MaskError, match="would be lost"):
            corner[(0,) * corner.ndim] = None
        assert x.tolist() == before


def test_a_part_of_a_complex_cell_is_a_view_that_makes_no_hidden_cell_valid() -> None:
    z = ms.masked_tensor(torch.tensor([1 + 2j, 3 + 4j]), torch.tensor([T, F]))
    assert (z.real.tolist(), z.imag.tolist()) == ([1, None], [2, None])
    with pytest.raises(MaskError, match="would be lost"):
        z.real[1] = 7.0
    whole = ms.masked_tensor(torch.tensor([1 + 2j]))
    whole.real[0] = 7.0
    assert whole.tolist() == [7 + 2j]
    pairs = torch.view_as_real(z)
    assert pairs.tolist() == [[1, 2], [None, None]]
    assert torch.view_as_complex(m([[1.0, 2.0], [3.0, 4.0]], [[T, F], [T, T]])).tolist() == [None, 3 + 4j]
    assert z.unsqueeze(0).H.tolist() == [[1 - 2j], [None]]
    assert torch.imag(z).dtype is torch.float32


# -- new cells ----------------------------------------------------------------------------------------------------


def test_padding_without_a_value_is_masked_and_with_one_is_valid() -> None:
    x = m([1, 2], [T, F])
    assert N.pad(x, (1, 2)).tolist() == [None, 1, None, None, None]
    assert N.pad(x, (1, 0), value=7).tolist() == [7, 1, None]
    assert ms.pad(m([1, 2]), (1, 0)).tolist() == [None, 1, 2]
    assert ms.pad(m([1, 2]), (1, 0), value=0)._mask is None
    assert ms.pad(x, (0, -1)).tolist() == [1]
    with pytest.raises(DtypeError, match="does not fit"):
        ms.pad(x, (1, 0), value=0.5)
    with pytest.raises(ParameterError, match="constant"):
        ms.pad(x, (1, 0), mode="reflect", value=1)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float32, torch.complex64])
def test_the_other_paddings_copy_cells_with_their_validity(mode: str, dtype: torch.dtype) -> None:
    index = torch.arange(1, 25).reshape(1, 2, 3, 4)
    mask = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    moved = N.pad(index.double(), (1, 2, 2, 0), mode=mode).long()
    got = N.pad(MaskedTensor(index.to(dtype), mask), (1, 2, 2, 0), mode=mode)
    valid = torch.cat([torch.tensor([F]), mask.reshape(-1)])[moved]
    assert torch.equal(got.get_mask(), valid)
    assert_same_bits((got.get_data()[valid],), (moved.to(dtype)[valid],), mode)


def test_a_masked_fill_makes_cells_valid_unless_the_condition_or_the_value_is_masked() -> None:
    x = m([1.0, 2.0, 3.0], [T, F, T])
    assert x.masked_fill(torch.tensor([T, T, F]), 9).tolist() == [9, 9, 3]
    assert x.masked_fill(m([T, T, F], [F, T, F]), 9).tolist() == [None, 9, None]
    assert x.masked_fill(torch.tensor([T, F, F]), m(9.0, F)).tolist() == [None, None, 3]
    assert m([1, 2]).masked_fill(m([T, F]), 9)._mask is None
    assert m([[1, 2], [3, 4]]).masked_fill(m([T, F], [T, F]), 9).tolist() == [[9, None], [9, None]]
    with pytest.raises(MaskserveError):
        m([1, 2]).masked_fill(torch.tensor([T, F]), 0.5)


def test_an_index_fill_makes_cells_valid() -> None:
    x = m([[1, 2, 3]], [[F, F, T]])
    assert x.index_fill(1, torch.tensor([0]), 7).tolist() == [[7, None, 3]]
    assert x.index_fill(1, torch.tensor([2]), m(0, F)).tolist() == [[None, None, None]]
    with pytest.raises(MaskedValueError, match="index"):
        x.index_fill(1, m([0, 1], [T, F]), 7)


# -- indices that are masked --------------------------------------------------------------------------------------


def test_a_masked_index_gives_a_masked_cell() -> None:
    x, at = m([[10, 20, 30], [40, 50, 60]], [[T, F, T], [T, T, T]]), m([2, 99, 1], [T, F, T])
    assert torch.index_select(x, 1, at).tolist() == [[30, None, None], [60, None, 50]]
    assert torch.index_select(torch.tensor([1, 2, 3]), 0, at).tolist() == [3, None, 2]
    assert torch.take(x, at).tolist() == [30, None, None]
    both = m([[2, -5, 0], [99, 1, 1]], [[T, F, T], [F, T, T]])
    assert torch.gather(x, 1, both).tolist() == [[30, None, 10], [None, 50, 50]]
    assert torch.take_along_dim(x, both, 1).tolist() == [[30, None, 10], [None, 50, 50]]
    assert torch.take_along_dim(x, m([[0], [7]], [[T], [F]]), 1).tolist() == [[10], [None]]
    assert torch.take_along_dim(x, at).tolist() == [30, None, None]
    assert torch.masked_select(x, m([T, T, F], [T, F, T])).tolist() == [10, 40]


def test_where_validity_would_have_to_be_guessed_it_is_asked_for() -> None:
    x = m([1, 2])
    hidden = m([1, 1], [T, F])
    for call in (
        lambda: torch.repeat_interleave(x, hidden), lambda: x.scatter(0, hidden, x), lambda: x.index_copy(0, hidden, x),
        lambda: x.tensor_split(hidden), lambda: x.masked_scatter(hidden == 1, x),
    ):  # fmt: skip
        with pytest.raises(MaskedValueError):
            call()
    assert torch.repeat_interleave(x, m([1, 2])).tolist() == [1, 2, 2]
    with pytest.raises(UncoveredFunctionError, match="reduce"):
        x.scatter(0, torch.tensor([0]), x, reduce="add")


def test_data_and_mask_agree_on_who_wins_where_an_index_names_a_cell_twice() -> None:
    n = 20_000
    source = MaskedTensor(torch.arange(1, n + 1), torch.arange(n) % 3 == 0)
    at = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(3))
    target = ms.masked_tensor(torch.zeros(50, dtype=torch.int64))
    for got in (target.scatter(0, at, source), target.index_copy(0, at, source)):
        data, mask = got.get_data(), got.get_mask()
        assert (((data - 1) % 3 == 0) & (data > 0)).equal(mask)


# -- several tensors ----------------------------------------------------------------------------------------------


def test_several_tensors_are_promoted_as_torch_does() -> None:
    a, b = m([1, 2], [T, F]), torch.tensor([0.5])
    assert (torch.cat([a, b]).dtype, torch.cat([a, b]).tolist()) == (torch.float32, [1, None, 0.5])
    assert ms.cat((a, b), dim=0).tolist() == [1, None, 0.5]
    assert torch.concatenate([a, b], axis=0).tolist() == [*torch.concat([b, a]).tolist()[1:], 0.5]
    assert ms.stack([a, a], dim=1).tolist() == [[1, 1], [None, None]]
    assert torch.row_stack([a, a]).tolist() == [[1, None], [1, None]]
    for call in (lambda: ms.cat(a), lambda: ms.cat([a, m([[1]])]), lambda: ms.cat([])):
        with pytest.raises(MaskserveError):
            call()
    with pytest.raises(UncoveredFunctionError, match="out="):
        ms.cat([a, a], out=torch.empty(0))
    assert not hasattr(a, "cat")


def test_bad_arguments_are_errors_of_our_own() -> None:
    x = m([[1.0, 2.0]])
    with pytest.raises(DimError):
        x.transpose(0, 5)
    with pytest.raises(ShapeError):
        x.reshape(7)
    with pytest.raises(ShapeError):
        x.split([1, 1])
    with pytest.raises(DtypeError):
        x.view(torch.int32)


def test_a_name_that_means_two_things_in_torch_reaches_the_move_alone() -> None:
    with pytest.raises(UncoveredFunctionError):
        N.unfold(m([[[[1.0]]]]), 1)
    assert m([1, 2, 3]).unfold(0, 2, 1).tolist() == [[1, 2], [2, 3]]


# -- attributes ---------------------------------------------------------------------------------------------------


def test_what_users_of_torch_ask_a_tensor() -> None:
    x = m([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[T, F, T], [T, T, T]])
    assert (x.itemsize, x.element_size(), x.nbytes, x.stride(), x.stride(0)) == (4, 4, 24, (3, 1), 3)
    assert (x.is_cuda, x.is_contiguous(), x.is_complex(), x.type()) == (F, T, F, "torch.FloatTensor")
    assert (
        x.T.tolist() == x.mT.tolist() == x.H.tolist() == x.mH.tolist() == x.t().tolist() == [[1, 4], [None, 5], [3, 6]]
    )
    for name, dtype in (
        ("half", torch.float16), ("bfloat16", torch.bfloat16), ("int", torch.int32), ("long", torch.int64), ("bool", torch.bool),
        ("double", torch.float64), ("float", torch.float32), ("short", torch.int16),
    ):  # fmt: skip
        converted = getattr(x, name)()
        assert (converted.dtype, converted.get_mask().tolist()) == (dtype, x.get_mask().tolist())
    assert x.type(torch.int64).tolist() == x.type_as(torch.ones(1).long()).tolist() == [[1, None, 3], [4, 5, 6]]
    with pytest.raises(ShapeError, match="mH"):
        _ = x.unsqueeze(0).H


def test_a_conversion_to_another_dtype_has_0_under_its_mask() -> None:
    data = torch.tensor([[1, torch.nan, 3e38], [torch.inf, torch.nan, -1]])
    by_lengths = ms.from_lengths(data, torch.tensor([1, 0]), 1)
    by_cells = ms.MaskedTensor(data, torch.tensor([[True, False, False], [False, False, True]]))
    for x in (
        by_lengths,
        by_lengths.to_mask_layout("packed"),
        by_cells,
        by_cells.T,
        by_cells.detach().requires_grad_(),
    ):
        assert x.float() is x
        assert x.cpu() is x
        for dtype in (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex128, torch.float8_e4m3fn):
            for converted in (x.to(dtype), x.type(dtype)):
                assert not converted.get_data().to(torch.complex128)[~x.get_mask()].any()
                assert converted.mask_layout == x.mask_layout


# -- nothing forgotten --------------------------------------------------------------------------------------------

REASONS = {
    "reads or writes memory that no cell stands for": "as_strided as_strided_scatter",
    "m[index] = value says the same": "index_put put",
    "m[index] says the same": "index embedding",
    "chosen by value: a reduction, a scan or an order, with a rule of its own": (
        "max min amax amin aminmax median nanmedian mode kthvalue sort msort topk unique unique_consecutive cummax cummin "
        "quantile nanquantile max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool1d_with_indices "
        "max_pool2d_with_indices adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices"
    ),
    "arithmetic that leaves these cells as they are by chance": (
        "cumprod logcumsumexp prod nanmean nansum norm frobenius_norm norm_except_dim normalize diff kron einsum chain_matmul "
        "avg_pool1d avg_pool2d adaptive_avg_pool1d lp_pool2d interpolate local_response_norm embedding_bag hinge_embedding_loss"
    ),
    "random": "alpha_dropout feature_alpha_dropout dropout dropout1d dropout2d dropout3d rrelu",
    "torch's own, for compiled graphs": (
        "alias_copy detach_copy expand_copy permute_copy squeeze_copy unsqueeze_copy transpose_copy t_copy view_copy "
        "diagonal_copy select_copy slice_copy unbind_copy unfold_copy split_copy narrow_copy "
        "split_with_sizes_copy view_as_real_copy view_as_complex_copy slice_inverse "
        "unsafe_split unsafe_chunk unsafe_split_with_sizes native_channel_shuffle"
    ),
    "a method of MaskedTensor, or no use": (
        "to cpu cuda float double type type_as to_dense item tolist numpy data size dequantize pin_memory share_memory "
        "module_load sym_sum"
    ),
    "names and memory": "new_tensor resize resize_as refine_names align_to align_as rename",
}  # fmt: skip
NOT_MOVED = {name for names in REASONS.values() for name in names.split()}
"""Functions of torch that move cells, or seem to, and have no row; each with the reason."""


def arguments(x: Tensor) -> list[tuple[Any, ...]]:
    one, index = torch.ones_like(x), torch.zeros(x.shape, dtype=torch.int64)
    return [
        (x,), (x, 0), (x, 1), (x, 0, 1), (x, (0,)), (x, (0, 1)), (x, [1, 1]), (x, 0, 0, 1), (x, (12,)), (x, x), ([x, x],),
        (x, 0, index), (x, index), (x, 0, torch.tensor([0])), (x, (2, 3, 4)), (x, 0, (1, 2)), (x, one > 0), (x, one > 0, x),
        (x, 1, [1, 1]), (x, 2), (x, 2, 0), (x, 0, 2, 1),
        (x, [1]), (x, (1, 1), "replicate"), (x, (torch.tensor([0]),), x[0]), (x, index, x[0, 0]), (x, x[0], 0, 0),
    ]  # fmt: skip


def only_moves(function: Callable[..., Any]) -> bool:
    """Whether some call gives cells of its argument, all from there, and at least two of them."""
    x = torch.tensor([[0.37, 0.11, 0.83, 0.29], [0.71, 0.53, 0.13, 0.97], [0.59, 0.43, 0.19, 0.67]])
    for given_x in (x, x.unsqueeze(0), x[0]):
        for args in arguments(given_x) if given_x.ndim > 1 else [(given_x,), (given_x, 2), ([given_x, given_x],)]:
            try:
                parts = flat(function(*args))
            except Exception:  # it takes other arguments
                continue
            tensors = [
                p for p in parts if isinstance(p, Tensor) and p.dtype is torch.float32 and p.layout is torch.strided
            ]
            if tensors and sum(p.numel() for p in tensors) > 2 and all(torch.isin(p, x).all() for p in tensors):
                return True
    return False


def test_every_move_of_torch_has_a_row_or_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overridable = torch.overrides.get_overridable_functions()
    forgotten = set()
    computed = {name for row in ELEMENTWISE for name in (row.name, *row.torch)}
    for home in (torch, torch.Tensor, torch.nn.functional):
        for function in overridable[home]:
            name = getattr(function, "__name__", "_")
            if function in table() or name.startswith("_") or name.endswith("_") or name in computed | set(OPS):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if only_moves(function):
                    forgotten.add(name)
    assert forgotten <= NOT_MOVED, sorted(forgotten - NOT_MOVED)
    assert not {row.name for row in MOVES} & NOT_MOVED
    for function in (torch.cat, torch.gather, torch.roll, torch.tensor_split, torch.take, N.pad, torch.Tensor.unfold):
        assert only_moves(function), "a test that finds no move finds none that was forgotten"


@pytest.mark.parametrize("row", MOVES, ids=lambda row: row.name)
def test_every_name_of_torch_reaches_the_row(row: Move) -> None:
    for name in (row.name, *row.torch):
        homes = [home for home in (torch, N) if callable(getattr(home, name, None))]
        theirs = [
            getattr(home, name) for home in homes if f"{home.__name__}.{name}".removeprefix("torch.") not in row.unlike
        ]
        assert theirs or hasattr(torch.Tensor, name), name
        assert all(function in table() for function in theirs), name
        if row.is_method:
            assert callable(getattr(m([1.0]), name)), name
