"""Adjacent elementwise ops as one kernel: what their rows' arithmetic says, as source that triton compiles, and its launch."""

from __future__ import annotations

import linecache
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskserve.backends.triton_launches import launch, mask_operand
from maskserve.backends.triton_tables import kernels, missing
from maskserve.dtypes import FLOATING, INTEGRAL, DType, bf16, boolean, f16
from maskserve.ops.arithmetic import Arithmetic
from maskserve.ops.rows import MaskRule
from maskserve.torch_dtypes import DTYPES

if TYPE_CHECKING:
    from maskserve.blockwise import Cells, Op
    from maskserve.compact import Compact

SERVED = FLOATING | INTEGRAL
HALVES = frozenset({f16, bf16})
TILE = 1024
LONG = 2**31 - 1 - TILE
"""Cells, and places in an operand, that are counted in 32 bits."""
WORDS: Mapping[str, str] = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "int1",
}  # fmt: skip
"""What triton calls the dtypes."""


# -- limits -------------------------------------------------------------------------------------------------------


def why_not(ops: Sequence[Op]) -> str | None:
    """The first op of a tree that no kernel has the bits of torch for; None where one kernel computes all."""
    for step in ops:
        reason = why_not_op(step)
        if reason is not None:
            return f"it has no kernel for {step.row.name}{reason}"
    return missing()


def why_not_op(step: Op) -> str | None:
    how = step.row.arithmetic
    if how is None:
        return ""
    result = DTYPES[step.result]
    beyond = next((kind for kind in (*step.kinds, result) if kind not in SERVED), None)
    if beyond is not None:
        return f" of {beyond}"
    if step.params:
        return f" with {next(iter(step.params))}"
    if how.conditions and step.kinds[0] is not boolean:
        return f" by {step.kinds[0]}"
    if how.compares and len({*step.kinds}) > 1:
        return f" of {step.kinds[0]} beside {step.kinds[1]}"
    computed = computed_in(step)
    if computed not in how.of:
        return f" in {computed}"
    other = next((kind for kind in step.kinds[len(how.conditions) :] if kind is not computed), None)
    if computed in HALVES and other is not None:  # torch may not round a tensor without dims before it computes
        return f" of {other} beside {computed}"
    return why_not_numbers(step, how, computed)


def why_not_numbers(step: Op, how: Arithmetic, computed: DType) -> str | None:
    """Numbers that torch may round otherwise on its way to a device, or compute something else for."""
    for word, operand in numbered(step):
        if word in how.conditions or operand is None:
            return " with a number"
        fits = how.only.get(word)
        if fits is not None and not fits(operand):
            return f" by this {word}"
        if word not in how.numbers and not is_held(operand, computed):
            return f" with a number that {computed} does not hold"
    if any(word not in dict(numbered(step)) for word in how.numbers):
        return f" by a tensor as {next(iter(how.numbers))}"
    return None


def numbered(step: Op) -> Iterator[tuple[str, int | float | None]]:
    """The operands that are numbers, by their words."""
    for word, operand in zip(step.row.operands, step.operands, strict=True):
        if operand is None or isinstance(operand, int | float):
            yield word, operand


def is_held(number: float, dtype: DType) -> bool:
    """Whether it is one number in the dtype, however it comes there."""
    if dtype.is_integral:
        return isinstance(number, int) and dtype.holds(number)
    if not math.isfinite(number) or (isinstance(number, int) and abs(number) > 2**53):
        return False
    return dtype not in HALVES or float(torch.tensor(number, dtype=getattr(torch, dtype.torch))) == number


def computed_in(step: Op) -> DType:
    how = step.row.arithmetic
    return step.kinds[0] if how is not None and how.compares else DTYPES[step.result]


# -- source -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A function of (data, masks, numbers), and the numbers that it is given."""

    text: str
    numbers: tuple[int, ...]
    is_masked: bool
    """Whether the last op's cells have a mask."""


def source_of(ops: Sequence[Op], masked: Sequence[bool]) -> Source:
    """What the ops compute of leaves, of which some are masked: (the last op's cells, where they are valid).

    A leaf is given as it is computed, and so is each op's result: `computed` of what it would be in memory.
    """
    places = [n for n, is_masked in enumerate(masked) if is_masked]
    lines = [f"v{n} = data[{n}]" for n in range(len(masked))]
    lines += [f"m{n} = masks[{i}]" for i, n in enumerate(places)]
    numbers: list[int] = []
    valid = [f"m{n}" if is_masked else None for n, is_masked in enumerate(masked)]
    for n, step in enumerate(ops, len(masked)):
        lines.append(f"v{n} = {line(step, numbers)}")
        joined = validity(step, valid)
        if joined is not None:
            lines.append(f"m{n} = {joined}")
        valid.append(None if joined is None else f"m{n}")
    last = len(valid) - 1
    lines.append(f"return v{last}, {valid[last] or 'data[0]'}")
    return Source("\n    ".join(lines), tuple(numbers), valid[last] is not None)


def line(step: Op, numbers: list[int]) -> str:
    """One op's cells, rounded as its result is."""
    how = step.row.arithmetic
    assert how is not None
    computed, result = (f"tl.{WORDS[dtype.name]}" for dtype in (computed_in(step), DTYPES[step.result]))
    words = {}
    for word, operand in zip(step.row.operands, step.operands, strict=True):
        if isinstance(operand, int | float):
            words[word] = f"number(numbers[{len(numbers)}], {isinstance(operand, float)}, {computed})"
            numbers.append(bits_of(operand))
        else:
            assert operand is not None, "refused"
            words[word] = f"v{operand.n}" if word in how.conditions else f"cast(v{operand.n}, {computed})"
    return f"cast({how.text.format(**words)}, {result})"


def bits_of(number: float) -> int:
    """A float by the bits of its float64: triton takes floats for float32."""
    return int(np.float64(number).view(np.int64)) if isinstance(number, float) else number


def validity(step: Op, valid: Sequence[str | None]) -> str | None:
    """Where an op's cells are valid, in the masks of its operands; None: everywhere."""
    slots = [None if operand is None or isinstance(operand, int | float) else operand.n for operand in step.operands]
    own = [None if n is None else valid[n] for n in slots]
    if step.row.rule is MaskRule.CHOSEN:
        condition, yes, no = own
        own = [condition, chosen(f"v{slots[0]}", yes, no)]
    joined = list(dict.fromkeys(mask for mask in own if mask))
    return " & ".join(joined) or None


def chosen(condition: str, yes: str | None, no: str | None) -> str | None:
    """Where the chosen branch is valid."""
    if yes is None:
        return None if no is None else f"({condition} | {no})"
    return f"(~{condition} | {yes})" if no is None else f"tl.where({condition}, {yes}, {no})"


@lru_cache(maxsize=256)
def compiled(text: str) -> Any:
    """The source as a step of kernels; triton reads it from where Python keeps the lines of what has no file."""
    import triton

    name = f"tree_{sha256(text.encode()).hexdigest()[:12]}"
    code, file = f"def {name}(data, masks, numbers):\n    {text}\n", f"<maskserve {name}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    space = dict(vars(kernels("trees")))
    exec(compile(code, file, "exec"), space)  # of the formulas of rows and of slots alone
    return triton.jit(space[name])


# -- launch -------------------------------------------------------------------------------------------------------


def collapsed(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The shape with as few dims as the operands' strides allow, and their strides in it.

    >>> collapsed((2, 3, 4), [(12, 4, 1), (0, 0, 1)])
    ((6, 4), [(4, 1), (0, 1)])
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            continue
        if sizes and all(own[dim] == made[-1] * sizes[-1] for own, made in zip(strides, steps, strict=True)):
            sizes[-1] *= shape[dim]
            continue
        sizes.append(shape[dim])
        for own, made in zip(strides, steps, strict=True):
            made.append(own[dim])
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return tuple(reversed(sizes)), [tuple(reversed(made)) for made in steps]


def run(
    ops: Sequence[Op], leaves: Sequence[Cells], shape: tuple[int, ...], kept: Compact | None
) -> tuple[Tensor, Tensor | None]:
    """(cells, where they are valid) of the last op, hidden cells 0: one launch. A compact mask of all is not written."""
    device = leaves[0].data.device
    source = source_of(ops, [leaf.mask is not None for leaf in leaves])
    data = [leaf.data.expand(shape) for leaf in leaves]
    masks = [leaf.mask.expand(shape) for leaf in leaves if leaf.mask is not None]
    result = torch.empty(shape, dtype=ops[-1].result, device=device)
    valid = torch.empty(shape, dtype=torch.bool, device=device) if source.is_masked else None
    sizes, strides = collapsed(shape, [own.stride() for own in (*data, *masks)])
    flat = [sum(own, ()) for own in (strides[: len(data)], strides[len(data) :])]
    reach = max(sum(step * (size - 1) for step, size in zip(own, sizes, strict=True)) for own in strides)
    own = mask_operand(None if kept is None else kept.part((1, result.numel(), 1)), result)
    launch(
        "trees:tree_kernel", -(-result.numel() // TILE), device, tuple(data), tuple(masks), own.cells, result,
        result if valid is None else valid, own.place, sizes, *flat, source.numbers, result.numel(),
        COMPUTE=compiled(source.text), IS_MASKED=valid is not None, **own.constants, N=TILE,
        IS_LONG=max(reach, result.numel()) > LONG,
    )  # fmt: skip
    return result, valid
