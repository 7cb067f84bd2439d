"""What the tensors of a layer must be to each other: asked of tensors and of headers alike, and refused in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from maskserve.alignment import Shape, described, laid_together
from maskserve.dtypes import WIDENED, DType, bf16, boolean, f16, f32
from maskserve.errors import DtypeError, ParameterError, ShapeError
from maskserve.making import operand
from maskserve.ops.rows import Layer, Row
from maskserve.params import accept
from maskserve.payload.metadata import Dims
from maskserve.torch_dtypes import known


class Header(Protocol):
    """What is asked of a tensor."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dims(self) -> Dims | None: ...

    @property
    def dtype(self) -> DType: ...


class Seen(NamedTuple):
    """The header of a tensor."""

    shape: Shape
    dtype: DType
    dims: Dims | None = None


class Spread(NamedTuple):
    """A shape alone, such as that which a weight is laid over."""

    shape: Shape
    dims: Dims | None = None


Headers = Mapping[str, Header]


def headers(**given: Any) -> dict[str, Header]:
    """Those of the tensors that are there, by name, in the dtypes that storage types are widened to."""
    made = {word: x if isinstance(x, Tensor) else operand(x) for word, x in given.items() if x is not None}
    return {word: Seen(tuple(x.shape), WIDENED.get(dtype := known(x.dtype), dtype)) for word, x in made.items()}


# -- dtypes -------------------------------------------------------------------------------------------------------

AS_F64 = "float_power(x, 1) makes f64 of a term"
"""How an expression widens cells."""
CONVERT = f"convert one; in an expression {AS_F64}"


def check_floats(row: Row, given: Headers) -> None:
    """All are of dtypes that the row takes."""
    for word, g in given.items():
        if g.dtype.is_integral:
            raise DtypeError(
                f"{row.name}: {word} is {g.dtype.name}, and must be of floats: divide it by 1, as in x / 1"
            )
        accept(row, g.dtype)


def one_dtype(row: Row, given: Headers) -> DType:
    """The dtype that all operands are computed in."""
    check_floats(row, given)
    name, first = next(iter(given.items()))
    for word, g in given.items():
        if g.dtype is not first.dtype:
            raise DtypeError(
                f"{row.name}: {word} is {g.dtype.name}, {name} {first.dtype.name}; they must be the same: {CONVERT}"
            )
    return first.dtype


def check_scales(row: Layer, given: Headers) -> None:
    """Weights have the input's dtype, or all of them that in which torch scales halves; the result has the input's."""
    check_floats(row, given)
    if row.scales_by_any_float:
        return
    source, *others = given.values()
    wide = source.dtype in (f16, bf16) and others and all(g.dtype is f32 for g in others)
    if not wide:
        one_dtype(row, given)


# -- norms --------------------------------------------------------------------------------------------------------


def check_normalized(row: Layer, given: Headers, shape: Shape) -> None:
    """Weights have the shape of the last dims, which are normalized."""
    source, *_ = given.values()
    if not shape or source.shape[-len(shape) :] != shape:
        raise ShapeError(
            f"{row.name}: normalized_shape {shape} must be the end of the input's shape {described(source)}"
        )
    check_shapes(row, given, shape, "normalized_shape, ")
    check_scales(row, given)


def check_channels(row: Layer, given: Headers) -> None:
    """Weights, and running statistics, have one cell a channel, which lie along dim 1."""
    source, *_ = given.values()
    check_shapes(row, given, source.shape[1:2], "one a channel, ")
    check_scales(row, given)


def check_shapes(row: Row, given: Headers, shape: Shape, why: str) -> None:
    for word, g in list(given.items())[1:]:
        if g.shape != shape:
            raise ShapeError(f"{row.name}: {word} has shape {g.shape}; it must be {why}{shape}")


def check_slopes(row: Layer, given: Headers) -> None:
    """Slopes have one cell for all, or one a channel."""
    source, slope = given.values()
    n = source.shape[1] if len(source.shape) > 1 else 1
    if slope.shape not in ((), (1,), (n,)):
        raise ShapeError(f"{row.name}: weight has shape {slope.shape}; it must be (1,), or one a channel, ({n},)")
    one_dtype(row, given)


def check_groups(row: Layer, given: Headers, n: int) -> None:
    source, *_ = given.values()
    if len(source.shape) < 2 or n < 1 or source.shape[1] % n:
        raise ShapeError(f"{row.name}: {n} groups do not divide the channels (dim 1) of shape {described(source)}")
    check_channels(row, given)


# -- attention ----------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    """What attention makes of its tensors."""

    dtype: DType
    scores: Shape
    mixed: Shape


def of_attention(row: Row, given: Headers, is_causal: bool) -> Attention:
    """(..., queries, cells), (..., keys, cells), (..., keys, other cells), and what the scores are met by."""
    own = {word: g for word, g in given.items() if word != "attn_mask"}
    dtype = one_dtype(row, own)
    q, k, v = own.values()
    for word, g in own.items():
        if len(g.shape) < 2:
            raise ShapeError(
                f"{row.name}: {word} has shape {described(g)}; it must have at least 2 dims, words and their cells"
            )
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        shapes = ", ".join(f"{word} {described(g)}" for word, g in own.items())
        raise ShapeError(
            f"{row.name}: queries and keys must have as many cells, keys and values as many words: {shapes}"
        )
    scores = (*over_each_other(row, q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
    if "attn_mask" in given:
        if is_causal:
            raise ParameterError(f"{row.name}: give attn_mask or is_causal, not both", parameter="is_causal")
        check_met(row, "attn_mask", given["attn_mask"], dtype, scores)
    mixed = (*over_each_other(row, scores[:-2], v.shape[:-2]), q.shape[-2], v.shape[-1])
    return Attention(dtype, scores, mixed)


def check_met(row: Row, word: str, met: Header, dtype: DType, scores: Shape) -> None:
    """Bools say which keys are met, floats are added to the scores; whole numbers are neither."""
    if met.dtype is not boolean and met.dtype is not dtype:
        raise DtypeError(
            f"{row.name}: {word} is {met.dtype.name}; it must be bool, or {dtype.name} as the others", parameter=word
        )
    if len(met.shape) > len(scores) or any(
        n not in (1, m) for n, m in zip(met.shape[::-1], scores[::-1], strict=False)
    ):
        raise ShapeError(
            f"{row.name}: {word} has shape {described(met)}, the scores {scores}: it must broadcast to them"
        )


def over_each_other(row: Row, one: Shape, other: Shape) -> Shape:
    """The shape that two broadcast to."""
    return laid_together(row.name, {"one": Spread(one), "other": Spread(other)})[0]
