"""The laws of sparse tensors, for every row that takes them: the values of the strided tensor, gradients included."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import maskserve as ms
from maskserve import dtypes
from maskserve.dtypes import DType
from maskserve.errors import MaskserveError
from maskserve.ops.rows import Contraction, Elementwise, Fill, Normalization, Ordering, Reduction, Row, Scan
from maskserve.params import names_of
from tests.samples import ELEMENTWISE, SLICED, as_bits, cells, needed

LAYOUTS = ["coo", "csr"]
SHAPES = ((5, 130), (70, 3), (4097,), (3, 4500), (700, 2), (4, 5, 6))
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
        assert torch.equal(as_bits(dense.get_data()), as_bits(other.get_data())), (where, dense, other)


def of_every_dtype(rows: Any) -> Any:
    pairs = [(row, d) for row in rows for d in dtypes.ALL if d in row.accepts and d.code]
    return pytest.mark.parametrize(("row", "dtype"), pairs, ids=[f"{row.name}-{d.name}" for row, d in pairs])


@of_every_dtype(KEPT)
def test_an_op_along_dims_gives_the_bits_of_the_strided_tensor(row: Row, dtype: DType) -> None:
    for (shape, share), layout in itertools.product(zip(SHAPES, itertools.cycle((0.02, 0.3)), strict=False), LAYOUTS):
        sample = cells(dtype, shape, 31, share=share, row=row)
        dense = ms.MaskedTensor(sample.data, sample.mask)
        sparse = with_masked_entries(dense, 32, layout)
        for dim in dims_of(row, len(shape)):
            given = needed(row) | ({} if dim is None else {"dim": dim})
            function = getattr(ms, row.name)
            same(function(sparse, **given), function(dense, **given), (row.name, dtype, shape, dim, layout, sample))
