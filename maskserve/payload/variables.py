"""Which tensor is whose mask: the names of a payload, made into variables. Imports no torch.

The look-up order is: the request names it, the metadata, a suffix, the name `mask`, none. Nothing is guessed: a mask
without an owner and two masks for one tensor are errors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NoReturn

from maskserve.dtypes import boolean, i32, i64, u8
from maskserve.errors import (
    AmbiguousMaskError,
    MaskDtypeError,
    MaskShapeError,
    NotComputableError,
    OrphanMaskError,
    ParameterError,
    TooLargeError,
    UnknownTensorError,
    nearest,
)
from maskserve.payload.header import DEFAULT_LIMITS, Header, TensorInfo, shown, shown_shape
from maskserve.payload.metadata import (
    Dims,
    Means,
    Pairs,
    answer_metadata,
    dim_names,
    mask_means_of,
    mask_pairs,
    orphan,
)
from maskserve.payload.sparse_parts import Stored, seen, stored_in

__all__ = [
    "MaskKind", "MaskSource", "Variable", "Variables", "resolve", "unknown",
    "answer_mask_name", "answer_metadata", "mask_name",
    "Means", "Dims",
]  # fmt: skip

MASK = "mask"
DATA = "data"
GRAD_OUTPUT = "grad_output"


class MaskKind(StrEnum):
    """How a companion says which cells are valid; the value is its suffix."""

    BOOL = "mask"
    LENGTHS = "lengths"
    BITMASK = "bitmask"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSource:
    """The tensor that holds a mask, and how to read it."""

    kind: MaskKind
    info: TensorInfo
    means: Means


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A tensor with its mask; no mask means that all its cells are valid."""

    info: TensorInfo
    mask: MaskSource | None
    dims: Dims | None
    is_coordinate: bool = False
    stored: Stored | None = None
    """The parts of a sparse tensor: its mask is of the stored values, and `info` has its shape and the parts' bytes."""

    @property
    def name(self) -> str:
        return self.info.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Variables:
    """A payload's variables by name: `computed` on, `coordinates` that are kept, `side_inputs` that are only used."""

    computed: Mapping[str, Variable]
    coordinates: Mapping[str, Variable]
    side_inputs: Mapping[str, Variable]

    def __iter__(self) -> Iterator[Variable]:
        return iter(self.computed.values())

    def __len__(self) -> int:
        return len(self.computed)

    def __getitem__(self, name: str) -> Variable:
        for group in (self.computed, self.coordinates, self.side_inputs):
            if name in group:
                return group[name]
        raise unknown(name, self.computed, parameter="tensor")


def resolve(
    header: Header,
    *,
    mask: str | Pairs | None = None,
    mask_means: Means | None = None,
    side_inputs: Collection[str] = (),
    tensors: Collection[str] | None = None,
) -> Variables:
    """The variables of a payload, each with its mask, in the order of their bytes.

    `mask` names the mask of every variable, or of each by name; `side_inputs` name what a request uses beside
    grad_output: a mask that is one stays its tensor's, and a coordinate that is one a coordinate; `tensors` picks the
    variables to compute on.
    """
    stored = stored_in(header)
    header = seen(header, stored)
    names = header.tensors
    _check_known(side_inputs, names, parameter="side_inputs")
    _check_known(tensors or (), names, parameter="tensor")
    _check_asked(mask, names)
    roles = _roles(header, mask, frozenset(side_inputs) | {GRAD_OUTPUT}, tensors)
    means = mask_means_of(header.metadata, mask_means)
    found = [
        _variable(name, roles, names, means, stored.get(name))
        for name in (*roles.computed, *roles.coordinates, *roles.sides)
    ]
    by_name = {variable.name: variable for variable in found}
    if not roles.computed:
        taken = f"; {shown(mask)} was taken as the mask, as the request says" if isinstance(mask, str) else ""
        raise NotComputableError(
            f"the payload has no tensor to compute on: masks, coordinates and side inputs are none{taken}"
        )
    return Variables(
        computed=_picked(by_name, roles.computed),
        coordinates=_picked(by_name, roles.coordinates),
        side_inputs=_picked(by_name, roles.sides),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Roles:
    """Who is what, by name alone; `explicit`, `suffixed` and `by_word` are the three ways to have a mask."""

    computed: Collection[str]
    coordinates: Collection[str]
    sides: Collection[str]
    dims: Mapping[str, Dims]
    explicit: Pairs
    suffixed: Mapping[str, list[str]]
    by_word: str | None


def _roles(header: Header, mask: str | Pairs | None, sides: Collection[str], tensors: Collection[str] | None) -> _Roles:
    names, dims, named = header.tensors, dim_names(header), mask_pairs(header)
    asked = dict(mask) if isinstance(mask, Mapping) else {}
    masks = {*named.values(), *asked.values(), *([mask] if isinstance(mask, str) else [])}
    owners = dict.fromkeys(name for name in names if name not in masks and name != MASK and _owner(name) is None)
    variables = [name for name in owners if name not in sides]
    inner = dict.fromkeys(name for name in variables if dims.get(name) != (name,))
    used_masks = [name for name in names if name in sides and name not in owners]
    if wrong := [name for name in tensors or () if name not in inner]:
        raise UnknownTensorError(
            f"{shown(wrong[0])} is not computed on: it is a mask, a coordinate or a side input", parameter="tensor"
        )
    computed = [name for name in inner if tensors is None or name in tensors]
    if isinstance(mask, str):
        asked = dict.fromkeys(computed, mask)
    explicit = {**named, **asked}
    if homeless := [name for name in explicit if name not in owners]:
        raise orphan(explicit[homeless[0]], homeless[0])
    return _Roles(
        computed=computed,
        coordinates=[name for name in owners if dims.get(name) == (name,) and name != GRAD_OUTPUT],
        sides=[*(name for name in owners if name in sides), *used_masks],
        dims=dims,
        explicit=explicit,
        suffixed=_suffixed(names, masks, owners, sides),
        by_word=_owner_of_the_word(names, masks, list(inner), sides),
    )


def _suffixed(
    names: Collection[str], masks: Collection[str], owners: Collection[str], sides: Collection[str]
) -> dict[str, list[str]]:
    """The companions of each owner by suffix, less those that were named as some tensor's mask."""
    companions: dict[str, list[str]] = {}
    for name in names:
        owner = _owner(name)
        if name in masks or owner is None:
            continue
        if owner not in owners:
            if name in sides:
                continue
            raise orphan(name, owner)
        companions.setdefault(owner, []).append(name)
    return companions


def _owner_of_the_word(
    names: Collection[str], masks: Collection[str], inner: list[str], sides: Collection[str]
) -> str | None:
    """The one variable that a tensor called `mask` stands beside; coordinates are not computed on and do not count."""
    if MASK not in names or MASK in masks:
        return None
    if len(inner) == 1 or MASK in sides:
        return inner[0] if len(inner) == 1 else None
    raise OrphanMaskError(
        f"the tensor mask stands beside {len(inner)} variables, and is a mask only beside exactly one: "
        f"call it NAME.mask, or name its variable in the request",
        parameter=MASK,
    )


def _owner(name: str) -> str | None:
    """The tensor whose companion `name` is by its suffix, if it has one."""
    owner, dot, suffix = name.rpartition(".")
    return owner if dot and owner and suffix in tuple(MaskKind) else None


def _variable(
    name: str, roles: _Roles, names: Mapping[str, TensorInfo], means: Means, stored: Stored | None
) -> Variable:
    mask = _mask_of(name, roles)
    info = names[name]
    source = None
    if mask is not None:
        source = _source(names[mask], means)
        if stored is not None and source.kind is not MaskKind.BOOL:
            _bad_dtype(source.info, "the mask of a sparse tensor is BOOL, one for each stored value")
        _check_mask(info if stored is None else stored.values, source)
    return Variable(
        info=info, mask=source, dims=roles.dims.get(name), is_coordinate=name in roles.coordinates, stored=stored
    )


def _mask_of(name: str, roles: _Roles) -> str | None:
    if name in roles.explicit:
        return roles.explicit[name]
    candidates = [*roles.suffixed.get(name, ()), *([MASK] if roles.by_word == name else [])]
    if len(candidates) > 1:
        raise AmbiguousMaskError(
            f"{shown(name)} has {len(candidates)} masks: {', '.join(shown(c) for c in candidates)}; "
            f"keep one, or name it in the request",
            parameter=shown(name),
        )
    return candidates[0] if candidates else None


def _source(info: TensorInfo, means: Means) -> MaskSource:
    suffix = info.name.rpartition(".")[2] if _owner(info.name) else MASK
    kind = MaskKind(suffix)
    return MaskSource(kind=kind, info=info, means="valid" if kind is MaskKind.LENGTHS else means)  # a count says itself


def _check_mask(of: TensorInfo, mask: MaskSource) -> None:
    if mask.kind is MaskKind.LENGTHS:
        _check_lengths(of, mask.info)
    elif mask.kind is MaskKind.BITMASK:
        _check_bitmask(of, mask.info)
    else:
        _check_bool(of, mask.info)


def _check_bool(of: TensorInfo, mask: TensorInfo) -> None:
    if mask.dtype not in (boolean, u8):
        _bad_dtype(mask, "a mask is BOOL, or U8 of 0 and 1; write true and false (mask.bool() in torch)")
    if len(mask.shape) != len(of.shape):
        _bad_shape(of, mask, "a mask has as many dims as its tensor; write size 1 where it broadcasts")
    if any(m not in (n, 1) for m, n in zip(mask.shape, of.shape, strict=True)):
        _bad_shape(of, mask, "a mask must broadcast to its tensor")


def _check_lengths(of: TensorInfo, mask: TensorInfo) -> None:
    if mask.dtype not in (i32, i64):
        _bad_dtype(mask, "lengths are I32 or I64")
    k = len(mask.shape)
    if k >= len(of.shape) or mask.shape != of.shape[:k]:
        _bad_shape(of, mask, "lengths have the shape of the dims before the one they count along")


def _check_bitmask(of: TensorInfo, mask: TensorInfo) -> None:
    if mask.dtype is not u8:
        _bad_dtype(mask, "a bitmask is U8, one bit a cell, lowest bit first")
    if not of.shape or mask.shape != (*of.shape[:-1], -(-of.shape[-1] // 8)):
        _bad_shape(of, mask, "a bitmask packs the last dim, ceil(n / 8) bytes a row")


def _bad_dtype(mask: TensorInfo, rule: str) -> NoReturn:
    raise MaskDtypeError(f"{shown(mask.name)} is {mask.dtype.code}; {rule}", parameter=shown(mask.name))


def _bad_shape(of: TensorInfo, mask: TensorInfo, rule: str) -> NoReturn:
    raise MaskShapeError(
        f"{shown(mask.name)} has shape {shown_shape(mask.shape)}, {shown(of.name)} {shown_shape(of.shape)}; {rule}",
        parameter=shown(mask.name),
    )


def unknown(name: str, names: Collection[str], *, parameter: str) -> UnknownTensorError:
    """The error of a name that no tensor has."""
    allowed = [shown(known) for known in names]
    if not {f"{name}.{part}" for part in ("coo_values", "crow_indices")}.isdisjoint(names):
        raise UnknownTensorError(
            f"{shown(name)} is sparse, and {parameter} takes a tensor with every cell: to_dense() makes one",
            parameter=parameter,
        )
    some = ", ".join(allowed[:8]) + (", …" if len(allowed) > 8 else "")
    return UnknownTensorError(
        f"there is no tensor {shown(name)}; the payload has {some or 'none'}{nearest(name, allowed)}",
        parameter=parameter,
        allowed=allowed,
    )


def _check_known(asked: Iterable[str], names: Collection[str], *, parameter: str) -> None:
    for name in asked:
        if name not in names:
            raise unknown(name, names, parameter=parameter)


def _check_asked(mask: str | Pairs | None, names: Collection[str]) -> None:
    if isinstance(mask, str):
        _check_known([mask], names, parameter="mask")
    elif mask is not None:
        _check_known([*mask, *mask.values()], names, parameter="mask")
        if own := [name for name in mask if mask[name] == name]:
            raise ParameterError(f"{shown(own[0])} cannot be its own mask", parameter="mask")


def _picked(by_name: Mapping[str, Variable], names: Iterable[str]) -> Mapping[str, Variable]:
    return MappingProxyType({name: by_name[name] for name in names})


def answer_mask_name(variable: Variable, variables: Variables) -> str:
    """What the mask of `variable` is called in an answer: it comes in the form of its question."""
    alone = len(variables.computed) == 1
    said_mask = variable.mask is not None and variable.mask.info.name == MASK
    return MASK if alone and (said_mask or variable.name == DATA) else mask_name(variable.name)


def mask_name(name: str) -> str:
    """What a mask beside the tensor `name` is called; TooLargeError where that is too long for a name."""
    mask, most = f"{name}.{MASK}", DEFAULT_LIMITS.name_bytes
    n_bytes, n_mask = len(name.encode()), len(mask.encode())
    if n_mask > most:
        raise TooLargeError(
            f"a tensor's name has {n_bytes} bytes; at most {most - (n_mask - n_bytes)} leave room for that of its mask, "
            f"NAME.mask: {shown(name, 40)}",
            parameter=shown(name),
        )
    return mask
