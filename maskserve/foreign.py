"""Tensors of other libraries as ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskserve.errors import DtypeError
from maskserve.tensor import SPARSE, MaskedTensor

OURS = frozenset({MaskedTensor, int, float, complex, bool, type(None)})


def from_foreign(value: Any) -> Any:
    """numpy arrays (numpy.ma with its mask), xarray, pandas, torch.masked, sparse tensors of torch and scipy as ours.

    So are torch's nested tensors and PackedSequences. Anything else stays as it is.
    NaN is how xarray and pandas say missing, and there it is masked.
    """
    kind, home = type(value), type(value).__module__
    if kind in OURS:
        return value
    if kind is Tensor and not value.is_nested:
        return value if value.layout not in SPARSE else MaskedTensor(value)
    if isinstance(value, Tensor) and value.is_nested:
        from maskserve.jagged import from_nested

        return from_nested(value)
    if kind.__name__ == "PackedSequence" and home == "torch.nn.utils.rnn":
        from maskserve.jagged import from_packed_sequence

        return from_packed_sequence(value)
    if home.startswith("numpy"):
        import numpy as np

        if isinstance(value, np.ma.MaskedArray):
            return MaskedTensor._of(plain_tensor(value.data), torch.as_tensor(~np.ma.getmaskarray(value)))
        return value.item() if isinstance(value, np.generic) else plain_tensor(value)
    if home.startswith("torch.masked"):
        if value.layout in SPARSE:
            return MaskedTensor(value.get_data(), value.get_mask())
        return MaskedTensor._of(value.get_data(), value.get_mask().clone())
    if home.startswith("scipy.sparse"):
        return MaskedTensor(sparse_tensor(value))
    if home.startswith("xarray") and hasattr(kind, "to_masked_array"):
        return from_foreign(value.to_masked_array(copy=False))
    if home.startswith("pandas") and hasattr(kind, "isna") and hasattr(kind, "to_numpy"):
        return MaskedTensor._of(plain_tensor(pandas_cells(value)), plain_tensor(~value.isna()))
    return value


def pandas_cells(value: Any) -> Any:
    """The array of a pandas object, 0 where a cell is missing: numbers that may be missing keep their own dtype."""
    import numpy as np

    dtypes = list(value.dtypes) if value.ndim > 1 else [value.dtype]
    own = [getattr(dtype, "numpy_dtype", dtype) for dtype in dtypes]
    if not own or any(not isinstance(dtype, np.dtype) or dtype.kind not in "biufc" for dtype in own):
        return value.to_numpy()
    return value.to_numpy(dtype=np.result_type(*own), na_value=0)


def sparse_tensor(matrix: Any) -> Tensor:
    """torch's tensor of a sparse matrix or array of scipy: CSR of CSR, else COO; cells that stand twice are added, as there."""
    import numpy as np

    if matrix.format == "csr" and matrix.ndim == 2:
        if not matrix.has_canonical_format:
            matrix = matrix.copy()
            matrix.sum_duplicates()
        rows, columns = (plain_tensor(part).long() for part in (matrix.indptr, matrix.indices))
        made: Tensor = torch.sparse_csr_tensor(
            rows, columns, plain_tensor(matrix.data), matrix.shape, check_invariants=False
        )
        return made
    coo = matrix.tocoo(copy=True)
    coo.sum_duplicates()
    places = plain_tensor(np.stack(coo.coords) if hasattr(coo, "coords") else np.stack([coo.row, coo.col])).long()
    return torch.sparse_coo_tensor(places, plain_tensor(coo.data), coo.shape, check_invariants=False)


def plain_tensor(array: Any) -> Tensor:
    """A tensor on an array's memory, or of a copy where torch cannot see it: other byte orders, strides below 0."""
    import numpy as np

    array = np.asarray(array)
    if array.dtype.kind not in "biufc":
        raise DtypeError(f"a numpy array of {array.dtype} is no tensor: convert it to numbers first")
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.as_tensor(array)
