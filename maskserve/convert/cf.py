"""What is missing in a netCDF variable, by the conventions (CF 2.5.1 and 8.1, NUG appendix B), decided on packed values.

Libraries decide it on unpacked floats, where an int64 loses digits and a fill value may be rounded onto data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maskserve.convert.dataset import Array, DataVariable, variable_of
from maskserve.convert.fills import as_cell
from maskserve.payload.header import shown

FILL, MISSING, UNSIGNED = "_FillValue", "missing_value", "_Unsigned"
RANGE, LEAST, MOST = "valid_range", "valid_min", "valid_max"
SCALE, OFFSET = "scale_factor", "add_offset"
OF_PACKING = (FILL, MISSING, UNSIGNED, RANGE, LEAST, MOST, SCALE, OFFSET)
"""Attributes that say how cells are stored: true of the packed file alone, so they are kept apart and not written again."""

PACKING = "packing"
BOOL = "maskserve_dtype"
DEFAULT_FILLS: Mapping[str, int | float] = {
    "i2": -32767, "u2": 65535, "i4": -2147483647, "u4": 4294967295, "i8": -9223372036854775806,
    "u8": 18446744073709551614, "f4": 9.969209968386869e36, "f8": 9.969209968386869e36,
}  # fmt: skip
"""What the netCDF library writes where nothing was written, less the types of one byte, where every value is data (NUG)."""

NAT = np.int64(np.iinfo(np.int64).min)
"""What xarray and pandas store for a time that is missing, without a _FillValue."""


@dataclass(slots=True)
class Packed:
    """One variable as it is stored, while it is decided what is missing in it."""

    name: str
    cells: Array
    attributes: Mapping[str, Any]
    hidden: Array = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        word = str(self.attributes.get(UNSIGNED, "")).lower()
        sign = {"true": "iu", "false": "ui"}.get(word, "")
        if sign and self.cells.dtype.kind == sign[0]:
            self.cells = self.cells.view(of_other_sign(self.cells.dtype))
        self.hidden = np.zeros(self.cells.shape, np.bool_)

    def note(self, what: str) -> None:
        self.notes.append(f"{shown(self.name)}: {what}")

    def hide_value(self, value: Any) -> int:
        """Hides the cells that are `value`; how many are."""
        cells = np.isnan(self.cells) if value != value else self.cells == value
        self.hidden |= cells
        return int(np.count_nonzero(cells))

    def as_packed(self, value: Any) -> Any:
        """`value` of an attribute in the dtype of the cells; None where it does not fit. Its sign goes with _Unsigned."""
        if not isinstance(value, np.number) or isinstance(value, np.complexfloating):
            return None
        dtype = self.cells.dtype
        cell = as_cell(value.item(), dtype)
        if cell is None and UNSIGNED in self.attributes and isinstance(value, np.integer):
            signed = as_cell(value.item(), of_other_sign(dtype))
            cell = (
                None if signed is None else dtype.type(np.asarray(signed).astype(dtype))
            )  # wraps, as its bits are meant
        return cell


def of_other_sign(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The integers of the same width and byte order, but with a sign where `dtype` has none, or without."""
    return np.dtype(f"{dtype.byteorder}{'i' if dtype.kind == 'u' else 'u'}{dtype.itemsize}")


def variable_from(
    name: str, cells: Array, attributes: Mapping[str, Any], dims: tuple[str, ...], *, has_defaults: bool
) -> tuple[DataVariable, list[str]]:
    """The variable that packed `cells` with these attributes mean, and lines about what was decided.

    `has_defaults`: what was never written holds a default of the netCDF library.
    """
    packed = Packed(name, cells, attributes)
    if packed.cells.dtype.kind in "iuf":
        hide_fills(packed, has_defaults=has_defaults)
        hide_outside(packed)
    unpacked = scaled(packed)
    said_bool = "bool" in (attributes.get(BOOL), attributes.get("dtype"))
    if said_bool and unpacked.dtype.kind in "iu" and np.isin(unpacked[~packed.hidden], (0, 1)).all():
        unpacked = unpacked == 1
    kept = {key: value for key, value in attributes.items() if key not in (*OF_PACKING, BOOL)}
    storage = {key: value for key, value in attributes.items() if key in OF_PACKING}
    if storage:
        kept[PACKING] = {"dtype": packed.cells.dtype.name, **storage}
    valid = ~packed.hidden if packed.hidden.any() else None
    variable = variable_of(name, unpacked, valid, dims=dims if len(set(dims)) == len(dims) else None, attributes=kept)
    assert variable is not None, "integers, floats and bools are types of ours"
    return variable.hidden_as_zero(), packed.notes


def hide_fills(packed: Packed, *, has_defaults: bool) -> None:
    """Hides cells that hold _FillValue or a missing_value; two that differ are both taken, and said."""
    fills, missing = list(numbers(packed, FILL)), list(numbers(packed, MISSING))
    for value in (*fills, *missing):
        packed.hide_value(value)
    differ = [v for v in missing if fills and not any(v == f or (v != v and f != f) for f in fills)]
    if differ:
        packed.note(f"{FILL} {fills[0]} and {MISSING} {differ[0]} differ; both are masked")
    if is_time(packed.attributes) and packed.cells.dtype.kind == "i" and packed.cells.dtype.itemsize == NAT.itemsize:
        packed.hide_value(NAT)
    default = DEFAULT_FILLS.get(packed.cells.dtype.str[1:])
    if (
        has_defaults and packed.cells.ndim and FILL not in packed.attributes and default is not None
    ):  # scalars hold maps' names
        n = packed.hide_value(packed.cells.dtype.type(default))
        if n:
            packed.note(f"{n} of its cells hold netCDF's default fill value, {default}, as never written: masked")


def is_time(attributes: Mapping[str, Any]) -> bool:
    """Whether the cells count from a moment, or are lengths of time of xarray."""
    return " since " in str(attributes.get("units", "")) or str(attributes.get("dtype", "")).startswith("timedelta64")


def numbers(packed: Packed, key: str) -> Iterator[Any]:
    """The numbers of an attribute in the dtype of the cells; a line for each that it cannot hold."""
    if key not in packed.attributes:
        return
    for value in np.asarray(packed.attributes[key]).reshape(-1):
        cell = packed.as_packed(value)
        if cell is None:
            packed.note(
                f"{key} {shown(str(value), 40)} is no {packed.cells.dtype.name}, so no cell can hold it; ignored"
            )
        else:
            yield cell


def hide_outside(packed: Packed) -> None:
    """Hides cells outside valid_min, valid_max or valid_range; a NaN is not outside."""
    least, most = packed.attributes.get(LEAST), packed.attributes.get(MOST)
    if RANGE in packed.attributes:
        ends = np.atleast_1d(np.asarray(packed.attributes[RANGE]))
        if len(ends) != 2 or ends.dtype.kind not in "iuf":
            packed.note(f"{RANGE} is not two numbers; ignored")
            return
        least, most = ends
    for end, is_beyond in ((least, np.less), (most, np.greater)):
        if end is None:
            continue
        limit = np.asarray(end).reshape(-1)
        if limit.size != 1 or limit.dtype.kind not in "iuf":
            packed.note(f"{LEAST} or {MOST} is not a number; ignored")
            continue
        if is_of_unpacked(packed, limit.dtype):
            of = scaled(packed)
            bound = as_cell(limit[0].item(), of.dtype)
        else:
            of, bound = packed.cells, packed.as_packed(limit[0])
        # in the dtype of the cells where that holds it: the float32 of 0.1 is not beyond a limit of 0.1
        packed.hidden |= is_beyond(of, limit[0] if bound is None else bound)


def is_of_unpacked(packed: Packed, dtype: np.dtype[Any]) -> bool:
    """Whether a limit of this dtype is one of unpacked values: NUG says so where it is wider than the packed ones."""
    return is_scaled(packed) and dtype.kind == "f" and packed.cells.dtype.kind in "iu"


def is_scaled(packed: Packed) -> bool:
    return bool(factors(packed))


def factors(packed: Packed) -> dict[str, Any]:
    """scale_factor and add_offset, those that are there and numbers."""
    found = {key: np.asarray(packed.attributes[key]).reshape(-1) for key in (SCALE, OFFSET) if key in packed.attributes}
    return {key: value[0] for key, value in found.items() if value.size == 1 and value.dtype.kind in "iuf"}


def scaled(packed: Packed) -> Array:
    """The unpacked cells: packed * scale_factor + add_offset, in the type of these two (CF 8.1), or as they are."""
    by = factors(packed)
    if not by or packed.cells.dtype.kind not in "iuf":
        return packed.cells
    dtype = np.result_type(np.float32, *(value.dtype for value in by.values()))
    if packed.cells.dtype.kind == "f" or packed.cells.dtype.itemsize > 2:
        dtype = np.result_type(dtype, packed.cells.dtype)  # int32 and float32 give float64
    with np.errstate(all="ignore"):  # what lies under a mask may overflow
        cells = packed.cells.astype(dtype)
        cells *= dtype.type(by.get(SCALE, 1))
        cells += dtype.type(by.get(OFFSET, 0))
    return cells
