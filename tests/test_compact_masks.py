"""The laws of masks that are held as lengths or as bits: the bits of the same mask in bools, for every row."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import maskserve as ms
from maskserve import dtypes, gates
from maskserve.compact import Bits, Compact, Lengths
from maskserve.dtypes import DType
from maskserve.errors import MaskedValueError, MaskError, MaskserveError, ParameterError, ShapeError
from maskserve.execution import using
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED
from maskserve.ops.rows import Elementwise, Loss, MaskRule, Reduction, Row
from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output
from maskserve.tensor import _unpickled
from maskserve_cli.app import main
from tests.http_service import running
from tests.samples import ELEMENTWISE, SLICED, Forged, as_bits, beside_input, cells, needed

SHAPES = ((3, 70), (4, 9, 13), (3, 2, 130, 5))
LONG = (6, 4099, 3)
"""Beyond one block of a small tensor, with leaves that end in it."""


def named(rows: Any) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def lengths_for(shape: tuple[int, ...], seed: int) -> Tensor:
    """Lengths along dim 1, with an empty row and a full one among them."""
    made = torch.randint(0, shape[1] + 1, shape[:1], generator=torch.Generator().manual_seed(seed))
    made[0], made[-1] = 0, shape[1]
    return made


def forms(dtype: DType, shape: tuple[int, ...], seed: int, row: Row | None = None) -> list[ms.MaskedTensor]:
    """One tensor whose mask is held as bools, as lengths and as bits, and one with scattered cells: bools and bits."""
    data = cells(dtype, shape, seed, row=row).data
    prefixes = ms.from_lengths(data, lengths_for(shape, seed), 1)
    return [prefixes.to_mask_layout("bool"), prefixes, prefixes.to_mask_layout("packed")]


def scattered(dtype: DType, shape: tuple[int, ...], seed: int, row: Row | None = None) -> list[ms.MaskedTensor]:
    sample = cells(dtype, shape, seed, 0.6, row=row)
    bools = ms.as_masked_tensor(sample.data, sample.mask)
    return [bools, bools.to_mask_layout("packed")]


def same(found: Any, expected: Any, where: object) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        assert one.dtype is other.dtype, where
        mask = other.get_mask()
        assert torch.equal(one.get_mask(), mask), where
        assert torch.equal(as_bits(one.get_data()) * mask, as_bits(other.get_data()) * mask), (where, one, other)


def given_of(row: Row, dim: Any) -> dict[str, Any]:
    has_dim = dim is not None and any(p.name == "dim" for p in row.callable)
    return needed(row) | ({"dim": dim} if has_dim else {})


def needs_more(row: Elementwise) -> bool:
    """Whether it takes more than tensors of one kind."""
    required = any(p.default is REQUIRED for p in row.parameters) or row.operands[0] != "input"
    return required or bool(row.n_optional) or row.rule is MaskRule.CHOSEN


def dims_of(row: Row, ndim: int) -> list[Any]:
    if not isinstance(row, Reduction):
        return list(range(ndim))
    return [None, *range(ndim), *([(0, 2)] if ndim > 2 else [])]


def of_some_dtypes(rows: Any) -> Any:
    some = [d for d in dtypes.ALL if d.name in ("f32", "i16", "bool", "c64")]
    pairs = [(row, d) for row in rows for d in some if d in row.accepts]
    return pytest.mark.parametrize(("row", "dtype"), pairs, ids=[f"{row.name}-{d.name}" for row, d in pairs])


@of_some_dtypes(SLICED)
def test_an_op_along_dims_gives_the_bits_of_the_mask_in_bools(row: Row, dtype: DType) -> None:
    function = getattr(ms, row.name)
    for seed, shape in enumerate(SHAPES):
        for dim in dims_of(row, len(shape)):
            given = given_of(row, dim)
            for bools, *compact in (forms(dtype, shape, seed, row), scattered(dtype, shape, seed, row)):
                expected = function(bools, **given)
                for tensor in compact:
                    same(function(tensor, **given), expected, (shape, dim, tensor.mask_layout))


@named([row for row in SLICED if dtypes.f32 in row.accepts])
def test_blocks_of_a_long_tensor_read_the_mask_where_it_lies(row: Row) -> None:
    function = getattr(ms, row.name)
    for bools, *compact in (forms(dtypes.f32, LONG, 5, row), scattered(dtypes.f32, LONG, 6, row)):
        for dim in (1, 2):
            given = given_of(row, dim)
            expected = function(bools, **given)
            for tensor in compact:
                with using(block_cells=9000):
                    same(function(tensor, **given), expected, (dim, tensor.mask_layout))


@named([row for row in SLICED if isinstance(row, Reduction) and dtypes.f32 in row.accepts and row.passes])
def test_tiles_that_are_valid_or_masked_as_a_whole_give_the_same_bits(row: Row) -> None:
    function = getattr(ms, row.name)
    for shape, lengths in (
        ((4, 300, 66), [300, 0, 130, 248]),
        ((600, 7, 16), [7, 0] * 300),
        ((3, 8200), [8200, 0, 4096]),
    ):
        data = cells(dtypes.f32, shape, 7, row=row).data
        data[1] = torch.nan  # junk: it is hidden
        prefixes = ms.from_lengths(data, torch.tensor(lengths), 1)
        bools = prefixes.to_mask_layout("bool")
        for dim in dims_of(row, len(shape)):
            expected = function(bools, **given_of(row, dim))
            for tensor in (prefixes, prefixes.to_mask_layout("packed")):
                same(function(tensor, **given_of(row, dim)), expected, (shape, dim, tensor.mask_layout))


@named([row for row in SLICED if dtypes.f32 in row.accepts])
def test_the_reference_and_nan_omit_agree(row: Row) -> None:
    function = getattr(ms, row.name)
    bools, *compact = forms(dtypes.f32, (4, 9, 13), 3, row)
    data = bools.get_data().clone()
    data[:, ::4, ::3] = torch.nan
    for kwargs in ({}, {"nan": "omit"} if "nan" in [p.name for p in row.callable] else {}):
        given = given_of(row, 1) | kwargs
        with using(backend="reference"):
            expected = function(ms.as_masked_tensor(data, bools.get_mask()), **given)
            for tensor in compact:
                own = tensor._view_of(data, tensor._held)
                same(function(own, **given), expected, (kwargs, tensor.mask_layout))


@named([row for row in SLICED if row.vjp and dtypes.f64 in row.accepts])
def test_gradients_along_dims_have_the_bits_of_the_mask_in_bools(row: Row) -> None:
    function = getattr(ms, row.name)
    for of in (forms, scattered):
        for shape, dim in (((4, 9, 13), 1), ((4, 9, 13), 2), ((3, 1500), 1)):
            found = []
            for tensor in of(dtypes.f64, shape, 8, row):
                leaf = tensor.requires_grad_()
                made = function(leaf, **given_of(row, dim))
                (made[0] if isinstance(made, tuple) else made).sum().backward()
                found.append(leaf.grad)
            for other in found[1:]:
                same(other, found[0], (shape, dim))


@named([row for row in ELEMENTWISE if dtypes.f32 in row.accepts and not needs_more(row)])
def test_elementwise_ops_give_the_bits_of_the_mask_in_bools_and_keep_it(row: Elementwise) -> None:
    n = len(row.operands)
    for of in (forms, scattered):
        columns = [of(dtypes.f32, (3, 7, 9), 11 + i if of is scattered else 11) for i in range(n)]
        expected, *results = [getattr(ms, row.name)(*operands) for operands in zip(*columns, strict=True)]
        for operands, result in zip([*zip(*columns, strict=True)][1:], results, strict=True):
            same(result, expected, operands[0].mask_layout)
            assert result.mask_layout == operands[0].mask_layout


def test_operands_of_different_lengths_meet_in_the_shorter_ones() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    made = ms.from_lengths(x, torch.tensor([3, 1]), 1) + ms.from_lengths(x, torch.tensor([2, 2]), 1)
    assert made.mask_layout == "lengths"
    assert made.lengths.tolist() == [2, 1]
    assert made.get_data()[0, 2].tolist() == [0.0] * 4, "what becomes hidden is 0"
    assert (made + x).mask_layout == (1 - made).mask_layout == (made * torch.ones(4)).mask_layout == "lengths"
    bools = torch.ones(2, 3, 4, dtype=torch.bool)
    assert (made + ms.as_masked_tensor(x, bools)).mask_layout == "bool", "a bool one beside it is spread out"
    with ms.policy("union"):
        assert (made + ms.from_lengths(x, torch.tensor([3, 1]), 1)).mask_layout == "bool"


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_a_form_stays_through_what_leaves_cells_valid(layout: str) -> None:
    x = ms.from_lengths(torch.randn(2, 5, 16), torch.tensor([2, 5]), 1).to_mask_layout(layout)
    kept: list[Callable[[Any], Any]] = [
        lambda m: ms.softmax(m, 1), lambda m: ms.log_softmax(m, 2), lambda m: ms.cumsum(m, 1), lambda m: m.clone(),
        lambda m: m.detach(), lambda m: m.double(), lambda m: m[:1], lambda m: m[1], lambda m: m[..., 8:], copy.copy,
        copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.exp(), lambda m: m * m, lambda m: m.to("cpu"),
        lambda m: ms.masked_tensor(m), lambda m: ms.softmax(m.clone().requires_grad_(), 1),
    ]  # fmt: skip
    for i, change in enumerate(kept):
        made, bools = change(x), change(x.to_mask_layout("bool"))
        assert made.mask_layout == layout, i
        assert torch.equal(made.get_mask(), bools.get_mask()), i
    stored = io.BytesIO()
    torch.save(x, stored)
    stored.seek(0)
    assert torch.load(stored, weights_only=True).mask_layout == layout


def test_an_index_that_leaves_no_prefix_or_no_whole_bytes_gives_bools() -> None:
    x = torch.arange(2.0 * 9 * 24).reshape(2, 9, 24)
    of_lengths = ms.from_lengths(x, torch.tensor([4, 9]), 1)
    of_bits, bools = of_lengths.to_mask_layout("packed"), of_lengths.to_mask_layout("bool")
    for index in [(0, 3), (slice(None), 3), (..., slice(None, None, 2)), (slice(None), slice(None, None, 2)), (..., 5),
                  (..., slice(3, 20)), None, torch.tensor([1, 0]), (slice(None), slice(2, 7)), (1, slice(-3, None)),
                  [True, False], torch.tensor(1), ([],), True,
                  (torch.tensor([1]), ...), (torch.tensor([1]), None), torch.ones(2, 9, dtype=torch.bool), (0, [1, 2]),
                  (torch.tensor([[0], [1]]), torch.tensor([2, 3])), np.array([1, 0])]:  # fmt: skip
        for tensor in (of_lengths, of_bits):
            assert torch.equal(tensor[index].get_mask(), bools[index].get_mask()), index
    assert of_lengths[:, 2:7].lengths.tolist() == [2, 5]
    assert of_bits[..., 3:20].mask_layout == of_lengths[..., 2:5].to_mask_layout("packed")[..., 1].mask_layout == "bool"


ROW_MOVES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m.transpose(1, 2), "lengths"), (lambda m: m.transpose(0, 1), "packed"), (lambda m: m.mT.contiguous(), "lengths"),
    (lambda m: m.reshape(6, 9, 4, 4), "lengths"), (lambda m: m.reshape(2, 3, 9, 16), "both"),
    (lambda m: m.flatten(0, 1), "packed"), (lambda m: m.mT.reshape(6, 144), "neither"),
    (lambda m: m.unsqueeze(0).squeeze(0), "both"), (lambda m: m.unsqueeze(1), "both"), (lambda m: m.expand(2, 6, 9, 16), "both"),
    (lambda m: torch.cat([m, m]), "both"), (lambda m: torch.cat([m, m], 1), "packed"), (lambda m: torch.stack([m, m], 1), "both"),
    (lambda m: torch.cat([m, torch.ones(6, 9, 16)]), "both"), (lambda m: torch.vstack([m, m]), "both"),
    (lambda m: torch.cat([m, ms.MaskedTensor(torch.ones(6, 9, 16), True)]), "neither"), (lambda m: m.chunk(3)[1], "both"),
    (lambda m: m.split(4, 1)[1], "both"), (lambda m: m.unbind()[2], "both"), (lambda m: m[torch.tensor([3, 0])], "both"),
    (lambda m: m[torch.tensor([[3, 0], [1, 1]])], "both"), (lambda m: m[[2, 1]], "both"),
    (lambda m: m[torch.arange(6) > 2], "both"), (lambda m: m[torch.tensor([3, 0]), torch.tensor([1, 8])], "packed"),
    (lambda m: m[1:5:2], "both"), (lambda m: m[:, 1::3], "both"), (lambda m: m[:, 3], "both"), (lambda m: m[:, 3:4], "both"),
    (lambda m: m[None, ..., 8:], "both"), (lambda m: m[..., 3], "lengths"),
    (lambda m: m > 0, "both"), (lambda m: ms.sort(m, 1).values, "lengths"), (lambda m: ms.topk(m, 4, 1).indices, "lengths"),
    (lambda m: ms.sort(m, 0).values, "neither"), (lambda m: m.flip(1), "neither"), (lambda m: m.diagonal(0, 0, 1), "neither"),
    (lambda m: m.unfold(1, 3, 2), "neither"), (lambda m: m.reshape(-1), "neither"), (lambda m: m[:0], "neither"),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(ROW_MOVES)))
def test_a_form_stays_through_moves_of_whole_rows(at: int) -> None:
    move, kept_by = ROW_MOVES[at]
    data = torch.randn(6, 9, 16, generator=torch.Generator().manual_seed(at))
    x = ms.from_lengths(data, torch.tensor([4, 0, 9, 2, 7, 1]), 1)
    expected = move(x.to_mask_layout("bool"))
    for tensor in (x, x.to_mask_layout("packed")):
        made = move(tensor)
        same(made, expected, tensor.mask_layout)
        assert made.mask_layout == (tensor.mask_layout if kept_by in (tensor.mask_layout, "both") else "bool")
        for dim in range(made.ndim):
            same(ms.sum(made.double(), dim), ms.sum(expected.double(), dim), (tensor.mask_layout, dim))


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_a_tensor_that_changes_in_place_keeps_its_form(layout: str) -> None:
    x, y = torch.arange(40.0).reshape(2, 5, 4), torch.ones(2, 5, 4)
    other = ms.from_lengths(y, torch.tensor([3, 1]), 1).to_mask_layout(layout)
    same_rows = ms.from_lengths(x, torch.tensor([3, 1]), 1).to_mask_layout(layout).clone()
    longer = ms.from_lengths(x, torch.tensor([4, 5]), 1).to_mask_layout(layout).clone()
    for tensor in (same_rows, longer):
        hidden_before = tensor.get_data()[0, 4].clone()
        tensor += other
        assert tensor.mask_layout == layout
        assert torch.equal(tensor.get_mask(), other.get_mask())
        assert torch.equal(tensor.to_tensor(0.0), (x + y) * other.get_mask())
        assert torch.equal(tensor.get_data()[0, 4], hidden_before), "what is hidden may be another tensor's"
    part = same_rows[:1]
    part += other[:1]
    assert (part.mask_layout, same_rows.mask_layout) == (layout, layout)
    assert torch.equal(same_rows.to_tensor(0.0)[0], (x + 2 * y)[0] * other.get_mask()[0])


def test_lengths_of_a_tensor_with_lengths_are_the_shorter_ones() -> None:
    x = ms.from_lengths(torch.randn(3, 5, 4), torch.tensor([5, 2, 3]), 1)
    assert ms.from_lengths(x, torch.tensor([4, 4, 0]), 1).lengths.tolist() == [4, 2, 0]
    assert ms.from_lengths(ms.as_masked_tensor(torch.randn(3, 5)), torch.tensor([4, 4, 0]), 1).mask_layout == "lengths"
    of_cells = ms.from_lengths(x, torch.full((3, 5), 2), 2)
    assert torch.equal(of_cells.get_mask(), x.get_mask() & (torch.arange(4) < 2))


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_no_byte_of_a_mask_of_every_cell_is_made(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ms.from_lengths(torch.randn(8, 500, 64), torch.arange(8) * 60, 1).to_mask_layout(layout)
    assert x._held is not None
    assert x._held.nbytes == (8 * 8 if layout == "lengths" else 8 * 500 * 8)
    expected = [ms.mean(x.to_mask_layout("bool"), 1), ms.softmax(x.to_mask_layout("bool"), 1)]

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a compact mask became bools")

    for kind in (Lengths, Bits):
        monkeypatch.setattr(kind, "bools", refuse)
        monkeypatch.setattr(kind, "window", refuse)
    found = [ms.mean(x, 1), ms.softmax(x, 1)]
    also = [
        ms.sum(x),
        ms.amax(x, 2),
        ms.std(x, (0, 1)),
        ms.cumsum(x, 2),
        (x + 1) * x,
        ms.median(x, 1),
        ms.normalize(x, 2.0, 1),
    ]
    monkeypatch.undo()
    for one, other in zip(found, expected, strict=True):
        same(one, other, layout)
    assert [made.mask_layout for made in also[3:5]] == [layout, layout]


@pytest.mark.parametrize("shape", [(2, 0), (2, 3, 0), (2, 0, 3), (7, 70), *SHAPES])
def test_bools_of_all_cells_are_those_of_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels, in runs that begin within a row and within a byte of bits."""
    monkeypatch.setattr(gates, "RUN", 13)
    lengths = ms.from_lengths(torch.zeros(shape), lengths_for(shape, 1), 1)
    scattered = ms.as_masked_tensor(torch.zeros(shape), torch.rand(shape) < 0.6).to_mask_layout("packed")
    for tensor in (lengths, lengths.to_mask_layout("packed"), scattered):
        held = tensor._held
        assert isinstance(held, Compact)
        assert torch.equal(gates.expanded(held, shape), held.bools().expand(shape))


# -- losses and attention -----------------------------------------------------------------------------------------


@named([row for row in OPS.values() if isinstance(row, Loss)])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_losses_have_the_bits_of_the_mask_in_bools(row: Loss, wants_gradient: bool) -> None:
    others = beside_input(row, (4, 9, 5))
    third = {row.third: torch.rand(4, 9, 5)} if row.third else {}
    found = []
    for tensor in forms(dtypes.f64, (4, 9, 5), 3):
        leaf = as_probabilities(tensor).requires_grad_(wants_gradient)
        made = getattr(ms, row.name)(leaf, *others, **third)
        if wants_gradient:
            made.backward()
        found.append(leaf.grad if wants_gradient else made)
    for other in found[1:]:
        same(other, found[0], row.name)


def as_probabilities(tensor: ms.MaskedTensor) -> ms.MaskedTensor:
    """Cells between 0 and 1, as some losses take them, under the same mask; no history."""
    return tensor._view_of(torch.sigmoid(tensor.get_data()), tensor._held)


@pytest.mark.parametrize("layout", ["lengths", "packed"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_reads_which_words_are_valid_and_keeps_the_form(
    layout: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = [torch.randn(3, 17, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    bools = [ms.from_lengths(cells, torch.tensor([17, 4, 9]), 1).to_mask_layout("bool") for cells in x]
    compact = [tensor.to_mask_layout(layout) for tensor in bools]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return ms.scaled_dot_product_attention(q, k, v, is_causal=causal)

    expected = attend(*bools)
    gradients = [attended_back(attend, tensors) for tensors in (bools, compact)]
    for one, other in zip(*gradients, strict=True):
        same(one, other, (layout, "gradient"))
    if layout == "packed":  # lengths make bools of words, never of their cells
        monkeypatch.setattr(Bits, "bools", lambda _: pytest.fail("bits became bools"))
    made = attend(*compact)
    assert made.mask_layout == layout
    monkeypatch.undo()
    same(made, expected, layout)


def attended_back(attend: Callable[..., Any], tensors: list[ms.MaskedTensor]) -> list[Any]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    attend(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


# -- payloads -----------------------------------------------------------------------------------------------------

REQUESTS = (
    ("reduce", {"op": "mean", "dim": "1"}), ("reduce", {"op": "median"}), ("softmax", {"op": "softmax", "dim": "1"}),
    ("scan", {"op": "cumsum", "dim": "1"}), ("fill", {"op": "ffill", "dim": "1"}), ("mask", {"equal": "0"}),
    ("eval", {"expr": "x * 2 + mean(x, dim=2, keepdim=True)"}), ("grad", {"op": "logsumexp", "dim": "1"}),
)  # fmt: skip


@pytest.mark.parametrize(("layout", "companion", "n_bytes"), [("lengths", "lengths", 24), ("packed", "bitmask", 120)])
def test_save_writes_a_mask_in_the_form_in_which_it_is_held(
    layout: str, companion: str, n_bytes: int, tmp_path: Path
) -> None:
    made = ms.from_lengths(torch.full((3, 20, 11), torch.nan), torch.tensor([20, 0, 7]), 1).to_mask_layout(layout)
    junk = made._held.cells.clone()
    if layout == "packed":
        junk[..., -1] |= 0xF8  # beyond the last cell of a row
    tensors = {
        "x": made._view_of(made._data, made._held.holding(junk)),
        "line": ms.from_lengths(torch.ones(4), torch.tensor(2), 0),
    }
    for name in ("a.safetensors", "b.safetensors"):
        ms.save(tensors, tmp_path / name, dims={"line": ("line",)})
        tensors = ms.load(tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tensors["x"].mask_layout, tensors["line"].mask_layout) == (layout, "bool")
    assert torch.equal(tensors["x"].get_mask(), made.get_mask())
    assert not tensors["x"].get_data()[~made.get_mask()].any(), "what is hidden is not written"
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {"x", f"x.{companion}", "line", "line.mask"}
        assert file.get_tensor(f"x.{companion}").nbytes == n_bytes


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, Path]:
    return written(tmp_path, 20)


def written(folder: Path, longest: int) -> dict[str, Path]:
    """One variable, with the same mask in bools, lengths and bits."""
    m = ms.from_lengths(torch.randn(3, longest, 11), torch.tensor([longest, 0, 7]), 1)
    lengths, bits = m._held, m.to_mask_layout("packed")._held
    assert isinstance(lengths, Lengths)
    assert isinstance(bits, Bits)
    companions = {"mask": m.get_mask(), "lengths": lengths.lengths, "bitmask": bits.packed}
    for name, companion in companions.items():
        sent = to_bytes([output("x", m.get_data()), output(f"x.{name}", companion)], {})
        (folder / f"{name}.safetensors").write_bytes(sent)
    return {name: folder / f"{name}.safetensors" for name in companions}


@pytest.mark.parametrize(("verb", "words"), REQUESTS, ids=[" ".join(words.values()) for _, words in REQUESTS])
def test_a_request_gives_the_same_bytes_whatever_the_form(
    verb: str, words: dict[str, str], questions: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    of = {name: ms.compute(verb, path, **words).to_bytes() for name, path in questions.items()}
    assert of["lengths"] == of["mask"]
    assert of["bitmask"] == of["mask"]
    for name, path in questions.items():
        out = path.with_name("out.safetensors")
        options = [word for option, value in words.items() for word in (f"--{option}", value)]
        assert main([verb, *options, str(path), "-o", str(out), "--force"]) == 0
        assert out.read_bytes() == of[name]
    capsys.readouterr()


def test_masks_of_a_payload_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = written(tmp_path, 2000)  # more than one call computes at once, for which a few bools are made
    found = {name: ms.load(path)["x"].mask_layout for name, path in questions.items()}
    assert found == {"mask": "bool", "lengths": "lengths", "bitmask": "packed"}
    for kind in (Lengths, Bits):
        monkeypatch.setattr(kind, "window", lambda *_: pytest.fail("a compact mask became bools"))
    for name in ("lengths", "bitmask"):
        ms.compute("reduce", questions[name], op="mean", dim="1").to_bytes()


def test_the_service_takes_every_form(questions: dict[str, Path]) -> None:
    with running() as service:
        for verb, words in (REQUESTS[0], REQUESTS[6]):
            replies = [
                service.http.post(f"/v1/{verb}", params=words, content=p.read_bytes()) for p in questions.values()
            ]
            assert [reply.status_code for reply in replies] == [200] * 3
            assert len({reply.content for reply in replies}) == 1


HOSTILE = {
    "too long": ("lengths", torch.tensor([1, 21, 0])),
    "negative": ("lengths", torch.tensor([1, -1, 0])),
    "the smallest int": ("lengths", torch.tensor([1, torch.iinfo(torch.int64).min, 0])),
    "the largest int": ("lengths", torch.tensor([1, torch.iinfo(torch.int64).max, 0])),
    "too few lengths": ("lengths", torch.tensor([1, 2])),
    "floats": ("lengths", torch.tensor([1.0, 2.0, 3.0])),
    "of every dim": ("lengths", torch.zeros(3, 20, 11, dtype=torch.int64)),
    "too few bytes": ("bitmask", torch.zeros(3, 20, 1, dtype=torch.uint8)),
    "too many bytes": ("bitmask", torch.zeros(3, 20, 3, dtype=torch.uint8)),
    "no bytes": ("bitmask", torch.zeros(3, 20, 2, dtype=torch.int16)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_mask_is_one_line_and_no_crash(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, companion = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_bytes([output("x", torch.zeros(3, 20, 11)), output(f"x.{name}", companion)], {}))
    with pytest.raises(MaskserveError) as caught:
        ms.compute("reduce", path, op="mean", dim="1").to_bytes()
    assert "\n" not in str(caught.value)
    with pytest.raises(MaskserveError):
        ms.load(path)
    assert main(["softmax", "--dim", "1", str(path)]) == 65
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "mask",
    [
        Lengths(torch.tensor([1, 2]), 1, torch.Size((3, 4))),
        Lengths(torch.tensor([1, 2, 5]), 1, torch.Size((3, 4))),
        Lengths(torch.tensor([1, 2, -1]), 1, torch.Size((3, 4))),
        Lengths(torch.tensor([1, 2, 3]), 7, torch.Size((3, 4))),
        Lengths(torch.tensor([1, 2, 3]), 1, torch.Size((3, 9))),
        Bits(torch.zeros(3, 0, dtype=torch.uint8), torch.Size((3, 4))),
        Bits(torch.zeros(3, 1), torch.Size((3, 4))),
    ],
    ids=["too few", "too long", "negative", "no such dim", "another shape", "no bytes", "floats"],
)
def test_a_pickle_whose_mask_does_not_fit_is_refused(mask: Compact) -> None:
    function, (data, _, wants) = ms.masked_tensor(torch.zeros(3, 4)).__reduce__()
    with pytest.raises(MaskError, match="does not fit its cells"):
        function(data, mask, wants)


# -- from one form to another -------------------------------------------------------------------------------------


def test_layouts_are_told_and_changed() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    m = ms.from_lengths(x, torch.tensor([4, 0, 2], dtype=torch.int32), 1)
    assert (m.mask_layout, ms.masked_tensor(x).mask_layout) == ("lengths", "none")
    assert m.lengths.tolist() == [4, 0, 2]
    for layout in ("bool", "lengths", "packed"):
        for again in ("bool", "lengths", "packed"):
            made = m.to_mask_layout(layout).to_mask_layout(again)
            assert made.mask_layout == again
            assert torch.equal(made.get_mask(), m.get_mask())
    assert m[:1].to_mask_layout("none").mask_layout == "none"
    assert ms.masked_tensor(x).to_mask_layout("lengths").lengths.tolist() == [4, 4, 4]
    columns = ms.masked_tensor(x, torch.tensor([[True], [True], [False]])).to_mask_layout("lengths", dim=0)
    assert columns.lengths.tolist() == 2
    shared = m.to_mask_layout("packed")
    assert shared.get_data().data_ptr() == x.data_ptr(), "the cells are not copied"


def test_what_a_form_cannot_say_is_refused_in_one_line() -> None:
    x = torch.zeros(2, 3)
    holes = ms.masked_tensor(x, torch.tensor([[True, False, True], [True, True, True]]))
    cases: list[tuple[type[Exception], Callable[[], Any], str]] = [
        (MaskError, lambda: holes.to_mask_layout("lengths"), "no prefix along dim 1"),
        (MaskError, lambda: holes.lengths, "held as bool"),
        (MaskError, lambda: ms.masked_tensor(torch.tensor(1.0)).to_mask_layout("packed"), "without dims"),
        (MaskedValueError, lambda: holes.to_mask_layout("none"), "1 of 6 cells"),
        (ParameterError, lambda: holes.to_mask_layout("jagged"), "one of none, bool, lengths, packed"),
        (ParameterError, lambda: holes.to_mask_layout("packed", dim=0), "dim is of layout 'lengths'"),
        (MaskError, lambda: holes.to_nested(), "no prefix"),
        (ShapeError, lambda: ms.masked_tensor(torch.zeros(3)).to_nested(), "(batch, time, ...)"),
        (MaskError, lambda: ms.from_lengths(x, torch.tensor([0, 3]), 1).to_packed_sequence(), "at 0 is"),
    ]
    for kind, call, said in cases:
        with pytest.raises(kind) as caught:
            call()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_assignment_makes_a_mask_of_bools_and_reaches_no_other_tensor() -> None:
    for layout in ("lengths", "packed"):
        m = ms.from_lengths(torch.zeros(2, 8), torch.tensor([2, 8]), 1).to_mask_layout(layout).clone()
        other = m + 1
        m[0, 5] = 7
        assert m.mask_layout == "bool"
        assert m[0].tolist() == [0, 0, None, None, None, 7, None, None]
        assert other.mask_layout == layout
        assert other[0].tolist()[:3] == [1, 1, None]
        with pytest.raises(MaskError, match="through a view"):
            other[0][1] = 3


# -- torch's forms ------------------------------------------------------------------------------------------------


def sequences(*lengths: int) -> list[Tensor]:
    return [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_nested_tensors_come_in_and_go_out(layout: torch.layout) -> None:
    parts = sequences(2, 5, 1)
    m = ms.masked_tensor(torch.nested.nested_tensor(parts, layout=layout))
    assert m.shape == (3, 5, 3)
    assert m.mask_layout == "lengths"
    assert m.lengths.tolist() == [2, 5, 1]
    for row, part in zip(m, parts, strict=True):
        assert torch.equal(row.get_data()[: len(part)], part)
    back = (m * 2).to_nested()
    assert back.layout is torch.jagged
    for one, part in zip(back.unbind(), parts, strict=True):
        assert torch.equal(one, part * 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_gradients_go_through_nested_tensors_both_ways() -> None:
    given = torch.nested.nested_tensor(sequences(2, 4), layout=torch.jagged, requires_grad=True)
    m = ms.as_masked_tensor(given)
    ms.mean(m, 1).sum().backward()
    for grad, n in zip(given.grad.unbind(), (2, 4), strict=True):  # type: ignore[union-attr]
        assert torch.allclose(grad, torch.full((n, 3), 1 / n))
    leaf = ms.from_lengths(torch.randn(2, 4, 3), torch.tensor([2, 4]), 1).requires_grad_()
    leaf.to_nested().values().sum().backward()  # type: ignore[operator]
    assert torch.equal(leaf.grad.get_mask(), leaf.get_mask())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_tensor_that_is_ragged_elsewhere_is_refused() -> None:
    wide = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(2, 5)])
    with pytest.raises(ShapeError, match="differ along their first dim alone"):
        ms.masked_tensor(wide)
    turned = torch.nested.nested_tensor(sequences(2, 5), layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ShapeError, match="here it is dim 2"):
        ms.masked_tensor(turned)


@pytest.mark.parametrize("lengths", [(5, 3, 1), (1, 5, 3)], ids=["sorted", "unsorted"])
def test_packed_sequences_come_in_and_go_out(lengths: tuple[int, ...]) -> None:
    parts = sequences(*lengths)
    packed = pack_sequence(parts, enforce_sorted=lengths == (5, 3, 1))
    m = ms.masked_tensor(packed)
    assert m.mask_layout == "lengths"
    assert m.lengths.tolist() == list(lengths)
    for row, part in zip(m, parts, strict=True):
        assert torch.equal(row.get_data()[: len(part)], part)
    back = m.to_packed_sequence()
    assert torch.equal(back.data, packed.data)
    assert torch.equal(back.batch_sizes, packed.batch_sizes)
    same(ms.mean(packed, 1), ms.mean(m, 1), "a packed sequence as an operand")


def test_a_compact_mask_stands_for_its_shape_alone() -> None:
    mask: Compact = Lengths(torch.tensor([1, 3]), 1, torch.Size((2, 3, 4)))
    assert mask.expanded(torch.Size((2, 3, 9))) is not None
    assert mask.expanded(torch.Size((2, 2, 4))) is None
    assert mask.met(Bits(torch.zeros(2, 3, 1, dtype=torch.uint8), torch.Size((2, 3, 4)))) is None


# -- tensors of no cells, transforms, copies ----------------------------------------------------------------------


@named([row for row in SLICED if dtypes.f32 in row.accepts])
def test_tensors_of_no_cells_have_the_results_of_bools(row: Row) -> None:
    for shape in ((0, 2), (3, 0, 2), (0, 1, 2), (2, 3, 0)):
        data, lengths = torch.zeros(shape), torch.zeros(shape[:1], dtype=torch.int64)
        prefixes = ms.from_lengths(data, lengths, 1)
        for dim in (0, 1):
            found: list[Any] = []
            for form in (prefixes.to_mask_layout("bool"), prefixes, prefixes.to_mask_layout("packed")):
                try:
                    found.append(getattr(ms, row.name)(form, **given_of(row, dim)))
                except MaskserveError as error:
                    found.append(str(error))
            for one in found[1:]:
                if isinstance(found[0], str):
                    assert one == found[0]
                else:
                    same(one, found[0], (shape, dim))


@pytest.mark.parametrize("layout", ["bool", "lengths", "packed"])
def test_transforms_that_look_on_read_every_form(layout: str) -> None:
    x = torch.randn(2, 9)
    masked = ms.from_lengths(x, torch.tensor([3, 9]), 1).to_mask_layout(layout)
    gradient = torch.func.grad(lambda z: ms.sum(masked * z).to_tensor(0))(x)
    assert torch.equal(gradient, masked.to_tensor(0.0))


def test_a_dim_of_no_cells_behind_has_any_lengths() -> None:
    empty = ms.from_lengths(torch.zeros(2, 3, 0), torch.zeros(2, dtype=torch.int64), 1)
    again = empty.to_mask_layout("packed").to_mask_layout("lengths", dim=1)
    assert again.mask_layout == "lengths"
    assert again.lengths.shape == (2,)


def test_a_pickle_of_a_slice_of_bits_has_its_bits_alone() -> None:
    whole = ms.masked_tensor(torch.randn(1000, 1000)).to_mask_layout("packed")
    assert len(pickle.dumps(whole[0:1])) < 8000


@pytest.mark.parametrize("layout", ["lengths", "packed"])
def test_a_copy_of_no_cells_is_no_view(layout: str) -> None:
    made = ms.from_lengths(torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), 1).to_mask_layout(layout).clone()
    made[...] = None
    assert made.shape == (1, 0)


@pytest.mark.parametrize(
    ("lengths", "dim", "message"),
    [
        (torch.tensor([1, 2], dtype=torch.uint8), 1, "lengths are u8; they must be i32 or i64"),
        (torch.tensor([1.0, 2.0]), 1, "lengths are f32; they must be i32 or i64"),
        (torch.tensor([1, 2]), True, "lengths are whole numbers and dim is one dim number"),
        (torch.tensor([1, 4]), 1, "lengths must be whole numbers from 0 to 3"),
    ],
)
def test_lengths_that_are_none_are_refused_in_one_line(lengths: Tensor, dim: int, message: str) -> None:
    with pytest.raises(MaskserveError, match=message):
        ms.from_lengths(torch.zeros(2, 3), lengths, dim)


def test_a_forged_pickle_is_refused_in_one_line() -> None:
    data, lengths = torch.ones(2, 3), torch.ones(2, dtype=torch.int64)
    masks = [
        5, "x", torch.ones(2, 3), torch.ones(5, dtype=torch.bool), torch.ones(1, 2, 3, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.bool, device="meta"), torch.eye(2, 3, dtype=torch.bool).to_sparse(),
        Lengths(lengths.to("meta"), 1, data.shape), Lengths([1, 2], 1, data.shape), Lengths(None, 1, data.shape),
        Lengths(lengths.float(), 1, data.shape), Lengths(lengths + 3, 1, data.shape), Lengths(lengths, "1", data.shape),
        Lengths(lengths, 1, (2, 3)), Lengths(lengths, 1, None), Lengths(lengths.to_sparse(), 1, data.shape),
        Lengths(ms.as_masked_tensor(lengths), 1, data.shape), Bits([1], data.shape), Bits(torch.ones(2, 1), data.shape),
        Bits(torch.ones(2, 1, dtype=torch.uint8, device="meta"), data.shape), Bits(torch.ones(2, 1, dtype=torch.uint8), "ab"),
    ]  # fmt: skip
    forged = [(data, mask) for mask in masks] + [
        (part, None) for part in (3, None, data.to_sparse(), ms.as_masked_tensor(data))
    ]
    for parts in forged:
        with pytest.raises(MaskError, match="it was not written by maskserve"):
            pickle.loads(pickle.dumps(Forged(_unpickled, *parts)))


def test_a_tensor_with_lengths_is_loaded_to_the_meta_device(tmp_path: Path) -> None:
    torch.save(ms.from_lengths(torch.randn(2, 5), torch.tensor([2, 5]), 1), tmp_path / "x")
    made = torch.load(tmp_path / "x", map_location="meta", weights_only=True)
    assert (made.is_meta, made.mask_layout, made.shape) == (True, "lengths", (2, 5))
