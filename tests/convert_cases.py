"""Variables with masks for the tests of `convert`: every dtype, extremes, junk under the mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np

import maskserve as ms
from maskserve.convert.files import open_foreign
from maskserve.dtypes import BY_TORCH
from maskserve.payload.format import Output, to_bytes

INTS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")
SPECIAL = {"f": (0.0, -0.0, np.inf, -np.inf, 5e-324, 1e-45, 9.969209968386869e36, -9999.0, 0.1)}

Array = np.ndarray[Any, np.dtype[Any]]
Variable = tuple[Array, Array]


def cells(dtype: str, shape: tuple[int, ...], *, nan: bool) -> st.SearchStrategy[Array]:
    """Cells of any value, extremes and zeros of both signs among them."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        any_float = st.floats(width=8 * kind.itemsize, allow_nan=nan, allow_subnormal=True)
        with np.errstate(all="ignore"):
            special = st.sampled_from([float(kind.type(value)) for value in SPECIAL["f"]])
        return arrays.arrays(kind, shape, elements=special | any_float)
    if kind.kind == "b":
        return arrays.arrays(kind, shape)
    bounds = np.iinfo(kind)
    extremes = st.sampled_from([int(bounds.min), int(bounds.max), 0, 1])
    return arrays.arrays(kind, shape, elements=extremes | st.integers(int(bounds.min), int(bounds.max)))


@st.composite
def variables(draw: Any, dtype: str, shapes: st.SearchStrategy[tuple[int, ...]], *, nan: bool = True) -> Variable:
    """(cells, valid); where masked, the cells are junk."""
    shape = draw(shapes)
    data = draw(cells(dtype, shape, nan=nan))
    valid = draw(arrays.arrays(np.bool_, shape))
    if np.dtype(dtype).kind == "f":
        data = np.where(valid, data, np.asarray(np.nan, dtype))
    return data, valid


def payload(named: dict[str, Variable], dims: dict[str, list[str]] | None = None, **metadata: str) -> bytes:
    """safetensors bytes of the variables with their masks."""
    outputs = []
    for name, (data, valid) in named.items():
        outputs.append(Output(name, BY_TORCH[data.dtype.name], data.shape, data.tobytes()))
        outputs.append(Output(f"{name}.mask", BY_TORCH["bool"], data.shape, valid.tobytes()))
    return to_bytes(outputs, metadata | ({"maskserve.dims": json.dumps(dims)} if dims else {}))


def there_and_back(folder: Path, suffix: str, given: bytes, **words: Any) -> ms.inout.Variables:  # type: ignore[name-defined]  # the package's stub lists public names
    """The variables after a conversion to the format and back."""
    source, other, back = folder / "in.safetensors", folder / f"out.{suffix}", folder / "back.safetensors"
    source.write_bytes(given)
    ms.convert_file(source, other, exists="replace", **words)
    ms.convert_file(other, back, exists="replace")
    return ms.load(back)


def assert_same(found: ms.MaskedTensor, data: Array, valid: Array) -> None:
    """The same dtype, shape and mask; the same bits where valid, a NaN being a NaN; 0 where masked."""
    cells, mask = found.get_data().numpy(), found.get_mask().numpy()
    assert cells.dtype == data.dtype
    assert cells.shape == data.shape
    np.testing.assert_array_equal(mask, valid)
    np.testing.assert_array_equal(cells[valid], data[valid])
    if data.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(cells[valid]), np.signbit(data[valid]))
    assert not cells[~valid].any()


def read(path: Path) -> dict[str, tuple[Array, Array]]:
    """(cells, valid) of each variable of a file."""
    with open_foreign(path):
        loaded = ms.load(path)
    return {name: (of.get_data().numpy(), of.get_mask().numpy()) for name, of in loaded.items()}
