"""The laws of sparse tensors, for every row that takes them: the values of the strided tensor, gradients included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import maskserve as ms
from maskserve import dtypes, sparse_slices
from maskserve.backends.cpu import CpuBackend
from maskserve.dtypes import DType
from maskserve.errors import MaskMismatchError, MaskserveError
from maskserve.ops import OPS
from maskserve.ops.rows import Contraction, Elementwise, Fill, MaskRule, Move, Ordering, Reduction, Row
from tests.samples import ELEMENTWISE, MOVES, SLICED, as_bits, cells, needed, plan_of

LAYOUTS = ["coo", "csr"]
SHAPES = (((70, 3), 0.3), ((4097,), 0.02), ((2, 4500), 0.02), ((4, 5, 6), 0.3))
KEPT = [row for row in SLICED if not isinstance(row, Fill | Ordering)]


def named(rows: Any) -> Any:
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def stored(dense: ms.MaskedTensor, layout: str) -> Any:
    """The tensor in a layout, with some of its masked cells stored as such."""
    if layout == "csr" and dense.ndim == 2:
        return dense.to_sparse_csr()
    return dense.to_sparse()


def with_masked_entries(dense: ms.MaskedTensor, seed: int, layout: str) -> Any:
    """The tensor in a layout, which stores more cells than are valid: junk under the mask of the others."""
    extra = torch.rand(dense.shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    wide = dense.get_mask() | extra
    sparse = stored(ms.MaskedTensor(dense.get_data(), wide), layout)
    own = stored(ms.MaskedTensor(dense.get_mask(), wide), layout)
    return ms.as_masked_tensor(sparse, own)


def dims_of(row: Row, ndim: int) -> list[Any]:
    if not isinstance(row, Reduction):
        return list(range(ndim))
    return [None, *range(ndim), *([(0, 2)] if ndim == 3 else [])]


def same(found: Any, expected: Any, where: object) -> None:
    """Values, places and masks, bit by bit; a sparse result has masked cells where the strided one has."""
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        dense = one.to_dense()
        assert dense.dtype is other.dtype, where
        assert torch.equal(dense.get_mask(), other.get_mask()), where
        assert torch.equal(bits(dense), bits(other)), (where, dense, other)


def bits(tensor: ms.MaskedTensor) -> torch.Tensor:
    """The cells as integers, 0 under the mask."""
    return as_bits(tensor.get_data()) * tensor.get_mask()


def given_of(row: Row, dim: Any) -> dict[str, Any]:
    return needed(row) | ({} if dim is None else {"dim": dim})


def of_some_dtypes(rows: Any) -> Any:
    """Each row with the dtypes whose kernels differ, where it takes them."""
    some = [d for d in dtypes.ALL if d.name in ("f32", "f64", "f16", "i64", "u64", "bool", "f8_e4m3", "c64")]
    pairs = [(row, d) for row in rows for d in some if d in row.accepts]
    return pytest.mark.parametrize(("row", "dtype"), pairs, ids=[f"{row.name}-{d.name}" for row, d in pairs])


def crowded_from(n_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are spread out where one cell of so many is stored."""
    monkeypatch.setattr(sparse_slices, "CROWD", n_cells)
    monkeypatch.setattr(sparse_slices, "CROWD_OF_FEWER", n_cells)


@of_some_dtypes(KEPT)
def test_an_op_along_dims_gives_the_bits_of_the_strided_tensor(
    row: Row, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, (shape, share) in enumerate(SHAPES):
        sample = cells(dtype, shape, 31, share=share, row=row)
        dense = ms.MaskedTensor(sample.data, sample.mask)
        sparse = with_masked_entries(dense, 32, LAYOUTS[i % 2])
        function = getattr(ms, row.name)
        for dim in dims_of(row, len(shape)):
            given = given_of(row, dim)
            for crowd in (0, 200):  # on stored cells alone, and in blocks
                crowded_from(crowd, monkeypatch)
                same(function(sparse, **given), function(dense, **given), (row.name, dtype, shape, dim, crowd, sample))


@named([row for row in KEPT if row.name in ("sum", "var", "argmax", "softmax", "normalize", "logsumexp", "norm")])
@pytest.mark.parametrize(("crowd", "block"), [(0, 1 << 20), (1000, 1 << 20), (1000, 1 << 14)])
def test_leaves_that_are_crowded_or_empty_give_the_same_bits(
    row: Row, crowd: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded_from(crowd, monkeypatch)
    monkeypatch.setattr(sparse_slices, "BLOCK_CELLS", block)
    for shape, share in (((3, 9000), 0.003), ((3, 9000), 0.4), ((9000, 3), 0.003), ((5000, 2), 0.6), ((5, 3000), 0.01)):
        sample = cells(dtypes.f64, shape, 33, share=share, row=row)
        dense = ms.MaskedTensor(sample.data, sample.mask)
        function = getattr(ms, row.name)
        for dim in dims_of(row, 2):
            given = given_of(row, dim)
            same(function(stored(dense, "csr"), **given), function(dense, **given), (shape, share, dim, sample))


def at_edges(shape: tuple[int, ...]) -> torch.Tensor:
    """A mask of the cells on both sides of each leaf's edge in any dim, and of the first and last cells."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for dim, size in enumerate(shape):
        index = torch.arange(size)
        shown = (index % 64 == 0) | (index % 64 == 63) | (index == size - 1)
        mask |= shown.view([-1 if d == dim else 1 for d in range(len(shape))])
    return mask


@of_some_dtypes([row for row in KEPT if isinstance(row, Reduction) and row.passes])
def test_stored_cells_spread_out_in_small_blocks_give_the_bits_of_the_strided_tensor(
    row: Row, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded_from(1 << 20, monkeypatch)
    function = getattr(ms, row.name)
    for shape, dim in (((3, 8200), 1), ((150, 70), 0), ((3, 70, 6), 1)):
        sample, given = cells(dtype, shape, 38, share=0.2, row=row), given_of(row, dim)
        for mask, backend in ((sample.mask, None), (at_edges(shape), None), (at_edges(shape), "reference")):
            if backend and dtype is not dtypes.f64:
                continue
            dense = ms.MaskedTensor(sample.data, mask)
            sparse = with_masked_entries(dense, 39, LAYOUTS[len(shape) % 2])
            with ms.using(backend=backend):
                expected = function(dense, **given)
            for block in (1, 1 << 13):
                monkeypatch.setattr(sparse_slices, "SPREAD_CELLS", block)
                monkeypatch.setattr(sparse_slices, "BLOCK_CELLS", block)
                with ms.using(backend=backend, threads=2, block_cells=2 * block):
                    found = function(sparse, **given)
                same(found, expected, (row.name, dtype, shape, dim, block, backend, sample))


def test_kernels_write_only_where_blocks_are_whatever_the_positions_say() -> None:
    def lifted(positions: list[int], size: tuple[int, int, int] = (2, 5, 1)) -> torch.Tensor:
        parts = {"count": torch.full((4, 1, 1), 7), "total": torch.full((4, 1, 1), 7.0, dtype=torch.float64)}
        cells = torch.arange(1.0, len(positions) + 1)
        below = plan_of(OPS["sum"], torch.zeros(2, 5), dim=1)
        blocks = range(1)
        CpuBackend().lift_stored(below, size, torch.tensor(positions), cells, None, blocks, parts)
        return parts["total"].view(-1)

    assert lifted([0, 4, 5]).tolist() == [3, 3, 7, 7]
    far = [-(1 << 63), -1, 0, 4, 5, 10, (1 << 63) - 1]
    assert lifted(far).tolist() == [7, 5, 7, 7]
    lifted([(1 << 63) - 1, 9, -1, 3, 1 << 40, -(1 << 63)])
    for size in ((3, 5, 1), (2, 6, 1), (2, 4, 1), (2, 5, 0), (0, 5, 1), (1, 3, 1), (1 << 62, 5, 1)):
        with pytest.raises(ValueError, match="blocks are"):
            lifted([0], size)


def close(found: ms.MaskedTensor, expected: ms.MaskedTensor, where: object) -> None:
    assert torch.equal(found.get_mask(), expected.get_mask()), where
    torch.testing.assert_close(found.to_tensor(0), expected.to_tensor(0), rtol=1e-10, atol=1e-12, equal_nan=True)


@named([row for row in KEPT if row.vjp])
def test_a_gradient_is_that_of_the_strided_tensor_in_the_same_pattern(row: Row) -> None:
    sample = cells(dtypes.f64, (6, 8), 34, share=0.4, row=row)
    dense = ms.MaskedTensor(sample.data, sample.mask)
    function = getattr(ms, row.name)
    for layout, dim in itertools.product(LAYOUTS, dims_of(row, 2)):
        sparse = with_masked_entries(dense, 35, layout)
        leaf, strided = ms.masked_tensor(sparse, requires_grad=True), ms.masked_tensor(dense, requires_grad=True)
        made, expected = function(leaf, **given_of(row, dim)), function(strided, **given_of(row, dim))
        made, expected = (made[0], expected[0]) if isinstance(expected, tuple) else (made, expected)
        same(made.detach(), expected.detach(), (row.name, dim, "values of a tensor that is followed"))
        (made.to_dense() * 1.5).sum().backward()
        (expected * 1.5).sum().backward()
        assert leaf.grad.layout is leaf.layout
        assert torch.equal(leaf.grad.indices(), leaf.indices())
        close(leaf.grad.to_dense(), strided.grad, (row.name, dim, layout))
        by_transform = ms.grad(lambda x, dim=dim: (first_of(function(x, **given_of(row, dim))).to_dense() * 1.5).sum())(
            sparse
        )
        close(by_transform.to_dense(), strided.grad, (row.name, dim, layout, "torch.func"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@named([row for row in KEPT if row.indices])
def test_a_transform_sees_values_and_places_as_outside_it(row: Row) -> None:
    sample = cells(dtypes.f64, (6, 8), 36, share=0.4, row=row)
    dense = ms.MaskedTensor(sample.data, sample.mask)
    sparse, function = with_masked_entries(dense, 37, "coo"), getattr(ms, row.name)
    for dim in (0, 1):

        def both(x: Any, dim: int = dim) -> Any:
            made = function(x, dim)
            return ms.sum(made[0]), made

        same(ms.value_and_grad(both, has_aux=True)(sparse)[0][1], function(dense, dim), (row.name, dim))
        same(ms.jvp(both, (sparse,), (sparse,), has_aux=True)[2], function(dense, dim), (row.name, dim, "jvp"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@named([row for row in KEPT if not row.vjp and dtypes.f64 in row.accepts])
def test_a_row_without_a_gradient_is_computed_inside_transforms(row: Row) -> None:
    sample = cells(dtypes.f64, (6, 8), 38, share=0.4, row=row)
    dense = ms.MaskedTensor(sample.data, sample.mask)
    sparse = with_masked_entries(dense, 39, "coo")

    def both(x: Any) -> Any:
        return ms.sum(x), getattr(ms, row.name)(x, **given_of(row, 1))

    expected = both(dense)[1]
    same(ms.value_and_grad(both, has_aux=True)(sparse)[0][1], expected, row.name)
    same(ms.jvp(both, (sparse,), (sparse,), has_aux=True)[2], expected, (row.name, "jvp"))

    def of_cells(x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = (
            both(sparse._like(ms.as_masked_tensor(x, sparse._cells.get_mask())))[1].to_dense().get_data()
        )
        return made

    data = sparse._cells.get_data()
    batch = torch.stack([data, data.flip(0)])
    assert torch.equal(torch.func.vmap(of_cells)(batch), torch.stack(list(map(of_cells, batch))))


@named([row for row in KEPT if row.vjp])
def test_a_tensor_that_stores_nothing_is_followed_all_the_same(row: Row) -> None:
    dense = ms.MaskedTensor(torch.full((2, 3), torch.nan), False)
    for layout, dim in zip(itertools.cycle(LAYOUTS), dims_of(row, 2), strict=False):
        leaf = ms.masked_tensor(stored(dense, layout), requires_grad=True)

        def total(x: Any, dim: Any = dim) -> ms.MaskedTensor:
            return ms.sum(first_of(getattr(ms, row.name)(x, **given_of(row, dim))))

        total(leaf).backward()
        value, gradient = ms.value_and_grad(total)(leaf.detach())
        assert value.tolist() == total(dense).tolist()
        for found in (leaf.grad, gradient):
            assert found.layout is leaf.layout
            assert found.nnz == 0


def test_what_meets_a_tensor_that_stores_nothing_has_gradients_of_zero() -> None:
    dense = ms.MaskedTensor(torch.full((2, 3), torch.nan), False)
    for layout in LAYOUTS:
        weight = torch.ones(3, 2, requires_grad=True)
        empty = stored(dense, layout)
        ms.sum(empty @ weight).backward()
        ms.sum(empty * weight.mT).backward()
        ms.sum(ms.add(empty, weight.mT, policy="intersect")).backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [[0, 0]] * 3
    one, other = (
        ms.masked_tensor(ms.masked_tensor(given).to_sparse(), requires_grad=True)
        for given in ([1.0, None], [None, 1.0])
    )
    ms.sum(one + other).backward()  # no cell is common
    ms.sum(ms.add(one[1:], other[1:], policy="union")).backward()
    assert (one.grad.tolist(), other.grad.tolist()) == ([None, None], [None, 1])


def first_of(made: Any) -> Any:
    return made[0] if isinstance(made, tuple) else made


@named([row for row in ELEMENTWISE if dtypes.f64 in row.accepts and not row.parameters])
def test_an_elementwise_op_is_that_of_the_strided_tensors_by_every_policy(row: Elementwise) -> None:
    operands = []
    for i, _ in enumerate(row.operands):
        sample = cells(dtypes.f64, (6, 8), 40 + i, share=0.4)
        data = sample.data > 0 if row.rule is MaskRule.CHOSEN and not i else sample.data.abs().clamp(0.1, 0.9)
        operands.append(ms.MaskedTensor(data, sample.mask))
    function = getattr(ms, row.name)
    for layout, policy in itertools.product(LAYOUTS, ("intersect", "union", "strict")):
        sparse = [with_masked_entries(operand, 50 + i, layout) for i, operand in enumerate(operands)]
        expected = outcome(function, operands, policy)
        given = [(sparse, True)]
        if len(operands) > 1:
            given += [([sparse[0], *operands[1:]], policy != "union"), ([*operands[:-1], sparse[-1]], False)]
        for mixed, keeps in given:
            made = outcome(function, mixed, policy)
            if isinstance(expected, type):
                assert made is expected, (row.name, policy)
                continue
            assert not keeps or row.rule is MaskRule.CHOSEN or made.layout is sparse[0].layout, (row.name, policy)
            dense = made.to_dense()
            assert torch.equal(dense.get_mask(), expected.get_mask()), (row.name, policy)
            # torch's functions differ by an ulp between the middle and the end of a vector
            torch.testing.assert_close(dense.get_data(), expected.get_data(), equal_nan=True)


def outcome(function: Any, operands: Any, policy: str) -> Any:
    try:
        return function(*operands, policy=policy)
    except MaskserveError as error:
        return type(error)


@named([row for row in OPS.values() if isinstance(row, Contraction) and row.operator])
def test_a_product_with_a_strided_matrix_is_that_of_the_strided_tensors(row: Contraction) -> None:
    for dtype in (dtypes.f64, dtypes.i64, dtypes.f16):
        a, b = (cells(dtype, shape, seed, share=0.4) for shape, seed in (((6, 8), 60), ((8, 5), 61)))
        x, y = ms.MaskedTensor(a.data, a.mask), ms.MaskedTensor(b.data, b.mask)
        expected = getattr(ms, row.name)(x, y)
        for layout in LAYOUTS:
            for made in (getattr(ms, row.name)(stored(x, layout), y), getattr(ms, row.name)(x, stored(y, layout))):
                assert torch.equal(made.get_mask(), expected.get_mask())
                torch.testing.assert_close(made.to_tensor(0), expected.to_tensor(0))
    leaf, strided = (
        ms.masked_tensor(stored(x.double(), "csr"), requires_grad=True),
        ms.masked_tensor(x.double(), requires_grad=True),
    )
    (leaf @ y.double()).sum().backward()
    (strided @ y.double()).sum().backward()
    close(leaf.grad.to_dense(), strided.grad, "product")


def test_a_product_whose_terms_are_all_minus_zero_is_zero_in_every_layout() -> None:
    """A sum begins at 0; torch's own of a single term does not."""
    for dtype, (n, n_valid) in itertools.product((torch.float64, torch.float32), ((1, 1), (4, 1), (4, 3))):
        valid = (torch.arange(n) < n_valid).expand(2, n)
        dense = ms.MaskedTensor(torch.where(valid, -0.0, torch.nan).to(dtype), valid)
        for tensor in (dense, *[stored(dense, layout) for layout in LAYOUTS]):
            assert not (tensor @ torch.ones(n, 3, dtype=dtype)).to_tensor().signbit().any()


CALLS = {
    "reshape": ((4, 12),), "view": ((48,),), "flatten": (), "ravel": (), "unflatten": (1, (2, 4)), "squeeze": (),
    "unsqueeze": (1,),
    "transpose": (0, 1), "swapaxes": (0, 1), "t": (), "permute": ((1, 0),), "movedim": (0, 1), "conj": (), "resolve_conj": (),
    "resolve_neg": (), "clone": (), "contiguous": (), "detach": (), "select": (1, -2), "narrow": (1, 2, 3),
    "index_select": (1, torch.tensor([5, 0, 5])), "cat": (1,), "stack": (1,),
}  # fmt: skip


@named(MOVES)
def test_a_move_takes_the_cells_along_or_says_to_make_the_tensor_strided(row: Move) -> None:
    sample = cells(dtypes.f32, (6, 8), 70, share=0.4)
    dense = ms.MaskedTensor(sample.data, sample.mask)
    for layout in LAYOUTS:
        sparse = with_masked_entries(dense, 71, layout)
        if not row.on_patterns:
            with pytest.raises(MaskserveError, match=r"to_dense\(\)"):
                getattr(ms, row.name)([sparse] if row.cells == "list" else sparse)
            continue
        one, other = ([sparse, sparse], [dense, dense]) if row.cells == "list" else (sparse, dense)
        made = getattr(ms, row.name)(one, *CALLS[row.name])
        assert made.layout in (torch.sparse_coo, sparse.layout)
        same(made, getattr(ms, row.name)(other, *CALLS[row.name]), (row.name, layout))


@named([row for row in SLICED if isinstance(row, Fill | Ordering)])
def test_what_is_valid_where_nothing_is_stored_is_refused(row: Row) -> None:
    sparse = ms.masked_tensor([[1.0, None], [2.0, 3.0]]).to_sparse()
    given = given_of(row, None if row.name == "fill" else 1)
    with pytest.raises(MaskserveError, match=r"to_dense\(\)"):
        getattr(ms, row.name)(sparse, **given)
    with pytest.raises(MaskserveError, match=r"to_dense\(\)"):
        ms.grad(lambda x: ms.sum(first_of(getattr(ms, row.name)(x, **given))))(sparse)


def test_policy_strict_compares_valid_cells_and_not_patterns() -> None:
    dense = ms.masked_tensor([[1.0, None], [2.0, 3.0]])
    wide = with_masked_entries(dense, 3, "coo")
    assert ms.add(dense.to_sparse(), wide, policy="strict").nnz == 3
    with pytest.raises(MaskMismatchError, match="strict"):
        ms.add(dense.to_sparse(), dense.to_sparse()[:, :1], policy="strict")
