"""Adjacent elementwise ops of an expression, block by block on plain tensors: hidden cells are set to 0 once, at the end.

The bits are those of the calls one by one: what is hidden in between is looked at by no op that could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from maskserve import cellwise
from maskserve.backends import backends, choose_fuser
from maskserve.blocks import spans
from maskserve.compact import Compact
from maskserve.dtypes import WIDE, DType, u64
from maskserve.errors import MaskserveError
from maskserve.execution import execution, in_parallel
from maskserve.expression import placed
from maskserve.gates import hide_few, kept, kept_in_place
from maskserve.masks import Policy, parse_policy
from maskserve.ops.rows import Beyond, Elementwise, MaskRule
from maskserve.reach import Operand
from maskserve.tensor import MaskedTensor
from maskserve.tracing import lies_in, same_memory

T = TypeVar("T", Tensor, MaskedTensor)
Shape: TypeAlias = tuple[int, ...]
Index: TypeAlias = tuple[slice, ...]

SMALL = 1 << 21
"""Cells up to which a stage is computed at once: its temporaries are small, and torch's own threads are faster than ours."""
BLOCK = 1 << 18
"""Cells of a block of a larger one: what is in between stays in the cache, and threads seldom wait for the interpreter."""

FEW = 1 << 13
"""Cells below which new memory costs nothing."""
NO_DIMS = torch.Size()
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Cells(NamedTuple):
    """A tensor and its mask."""

    data: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an operand is found: the n-th leaf, or after them the n-th result."""

    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A row with its operands: slots, and numbers. `function` is None where cells are converted before torch may see them.

    `between` are the slots of results among the operands. `reuses` is the dtype of operands into whose memory `function`
    may write its result; None where it cannot. `is_plain`: the cells are `function` of the operands' cells, and valid
    where all operands are.
    """

    row: Elementwise
    operands: tuple[Slot | int | float | None, ...]
    given: Mapping[str, Any]
    kinds: Sequence[DType]
    column: int
    result: torch.dtype
    function: Callable[..., Tensor] | None
    params: Mapping[str, Any]
    between: tuple[int, ...]
    reuses: torch.dtype | None
    is_plain: bool

    def run(self, cells: Sequence[Cells], policy: Policy, spare: Sequence[Tensor]) -> Cells:
        """`spare` are operands that nobody needs any more."""
        values = [cells[o.n].data if type(o) is Slot else o for o in self.operands]
        masks = [cells[o.n].mask if type(o) is Slot else None for o in self.operands]
        function = self.function if policy is Policy.INTERSECT else None
        if function is not None and self.is_plain:
            return Cells(self.called(values, spare), together(masks))
        parts = [
            Operand(value, mask, None, isinstance(o, Slot))
            for value, mask, o in zip(values, masks, self.operands, strict=True)
        ]
        if function is None:
            return Cells(*cellwise.compute(self.row, parts, self.given, policy)[:2])
        values, mask = cellwise.flow(self.row, parts, masks, policy)
        return Cells(function(*values, **self.params), mask)

    def called(self, values: Sequence[Any], spare: Sequence[Tensor]) -> Tensor:
        """The function's result, in spare memory where it may lie there."""
        assert self.function is not None
        return self.function(*values, **self.params, **(self.room(values, spare) if spare else NOTHING))

    def room(self, values: Sequence[Any], spare: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Where the result may lie, if it would lie so by itself: new memory takes longer to get than a cheap op to compute."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not all(tensor.is_contiguous() for tensor in tensors):
            return NOTHING
        for own in spare:
            if own.dtype is self.reuses and all(tensor.shape in (own.shape, NO_DIMS) for tensor in tensors):
                return {"out": own}
        return NOTHING

    def refused(self, error: Exception) -> MaskserveError:
        own = error if isinstance(error, MaskserveError) else cellwise.refused(self.row, error, self.kinds)
        return placed(own, self.column)


def together(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Valid where all are; a mask that comes twice is joined once."""
    joined: Tensor | None = None
    for mask in masks:
        if mask is not None and mask is not joined:
            joined = mask if joined is None else joined & mask
    return joined


def op(
    row: Elementwise, operands: tuple[Any, ...], given: Mapping[str, Any], kinds: Sequence[DType], column: int,
    result: torch.dtype, n_leaves: int,
) -> Op:  # fmt: skip
    """The op on operands of these dtypes, with a result of that one; slots from `n_leaves` on are results."""
    ints = [o for o in operands if type(o) is int]
    fits = row.beyond is Beyond.TORCHS or any(not kind.is_integral for kind in kinds)
    fits = fits or all(kind.holds(n) for kind in kinds for n in ints)
    function: Callable[..., Tensor] | None = None
    if fits and not any(kind in WIDE or kind is u64 for kind in kinds):
        takes = isinstance(operands[0], Slot) and not row.tensors_only
        function = cellwise.function(row) if takes else partial(with_tensors, row)
    params = cellwise.resolve(row, given) if row.parameters else {}
    is_safe = not row.unsafe_floats and (not row.unsafe or result.is_floating_point or result.is_complex)
    is_plain = row.rule is MaskRule.ALL and is_safe
    between = tuple(o.n for o in operands if type(o) is Slot and o.n >= n_leaves)
    reuses = result if is_plain and function and writes_into(function, operands, kinds, params, result) else None
    return Op(
        row=row, operands=operands, given=given, kinds=kinds, column=column, result=result, function=function, params=params,
        between=between, reuses=reuses, is_plain=is_plain,
    )  # fmt: skip


def writes_into(
    function: Callable[..., Tensor], operands: Sequence[Any], kinds: Sequence[DType], params: Mapping[str, Any],
    result: torch.dtype,
) -> bool:  # fmt: skip
    """Whether torch's function takes `out`: tried without a cell."""
    of = iter(kinds)
    values = [torch.empty(0, dtype=getattr(torch, next(of).torch)) if isinstance(o, Slot) else o for o in operands]
    try:
        function(*values, **params, out=torch.empty(0, dtype=result))
    except (RuntimeError, TypeError, MaskserveError):
        return False
    return True


def with_tensors(row: Elementwise, *values: Any, **params: Any) -> Tensor:
    return cellwise.called(row, list(values), params)


# -- all ops of a stage -------------------------------------------------------------------------------------------

REFUSALS = (RuntimeError, TypeError, ValueError, OverflowError, MaskserveError)


class Chain(NamedTuple):
    """The ops of a stage. `is_plain`: all are, so that the last one's cells are valid where those of all leaves are."""

    ops: tuple[Op, ...]
    is_plain: bool
    calls: Callable[..., Tensor] | None
    """Where it is plain, the last op's cells of those of the leaves: one call of torch after the other."""
    makes_new: bool
    """Whether the result is no view: the last function takes `out`. It may be a leaf as it is: conj_physical of real cells."""

    @staticmethod
    def of(ops: Sequence[Op], n_leaves: int) -> Chain:
        is_plain = all(step.is_plain and step.function for step in ops)
        calls = calls_of(ops, n_leaves) if is_plain else None
        return Chain(tuple(ops), is_plain, calls, makes_new=ops[-1].reuses is not None)


def calls_of(ops: Sequence[Op], n_leaves: int) -> Callable[..., Tensor]:
    """The calls as a function of the leaves' cells, whose lines are made here: no word of a request is in them."""
    names: dict[str, Any] = {}

    def told(operand: Slot | int | float | None) -> str:
        if isinstance(operand, Slot):
            return f"cells{operand.n}"
        names[number := f"number{len(names)}"] = operand
        return number

    lines = [f"def calls({', '.join(f'cells{n}' for n in range(n_leaves))}):"]
    for n, step in enumerate(ops):
        names[f"function{n}"] = (
            partial(step.function, **step.params) if step.function and step.params else step.function
        )
        lines.append(f"    cells{n_leaves + n} = function{n}({', '.join(map(told, step.operands))})")
    exec("\n".join([*lines, f"    return cells{n_leaves + len(ops) - 1}"]), names)
    calls: Callable[..., Tensor] = names["calls"]
    return calls


def run(chain: Chain, leaves: Sequence[Cells]) -> Cells:
    """The last op's cells, those that are hidden as they came out."""
    policy = parse_policy(None)
    are_many = max([leaf.data.numel() for leaf in leaves]) >= FEW
    if chain.is_plain and policy is Policy.INTERSECT:
        return Cells(values_of(chain.ops, leaves, are_many), together([leaf.mask for leaf in leaves]))
    cells: list[Any] = [*leaves]
    for step in chain.ops:
        try:
            between = [cells[n].data for n in step.between]
            made = step.run(cells, policy, spare(step, between, leaves) if are_many else ())
        except REFUSALS as error:
            raise step.refused(error) from error
        for n in step.between:
            cells[n] = None  # each result is used once
        cells.append(made)
    last: Cells = cells[-1]
    return last


def values_of(ops: Sequence[Op], leaves: Sequence[Cells], are_many: bool) -> Tensor:
    """The same where all ops are plain: cells without a look at masks, in half the time where there are few."""
    values: list[Any] = [leaf.data for leaf in leaves]
    for step in ops:
        try:
            given = [values[o.n] if type(o) is Slot else o for o in step.operands]
            room = spare(step, [values[n] for n in step.between], leaves) if are_many else ()
            made = step.called(given, room)
        except REFUSALS as error:
            raise step.refused(error) from error
        for n in step.between:
            values[n] = None
        values.append(made)
    last: Tensor = values[-1]
    return last


def spare(step: Op, between: Sequence[Tensor], leaves: Sequence[Cells]) -> list[Tensor]:
    """Results of many cells that this op is the only one to use, in memory of their own."""
    if step.reuses is None:
        return []
    return [x for x in between if x.numel() >= FEW and not any(same_memory(x, leaf.data) for leaf in leaves)]


def of_few(chain: Chain, data: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Cells | None:
    """The cells of a plain stage that makes new ones; None where they are a leaf's, or an op refuses: at_once knows what then.

    Where cells are few, what stands between the calls counts.
    """
    assert chain.calls is not None
    try:
        made = chain.calls(*data)
    except REFUSALS:
        return None
    for own in data:
        if made.data_ptr() == own.data_ptr():
            return None
    mask = together(masks)
    if mask is None:
        return Cells(made, None)
    made = hide_few(made, mask)
    for given in masks:
        if mask is given:
            return Cells(made, mask.clone())
    return Cells(made, mask)


def at_once(chain: Chain, leaves: Sequence[Cells]) -> Cells:
    """The cells of a stage, in memory of their own."""
    data, mask = run(chain, leaves)
    is_own = not lies_in(data, [leaf.data for leaf in leaves])
    if mask is None:
        return Cells(data if is_own else data.clone(), None)
    full = mask if mask.shape == data.shape else mask.expand(data.shape)
    data = kept_in_place(data, full) if is_own else kept(data.contiguous(), full)
    own = [leaf.mask for leaf in leaves if leaf.mask is not None]
    return Cells(data, mask.clone() if lies_in(mask, own) else mask)


def by_torch(leaf: Tensor) -> bool:
    """Whether no kernel is asked: on a CPU, unless one is by name."""
    return leaf.is_cpu and execution().backend is None


def by_kernel(chain: Chain, leaves: Sequence[Cells], shape: Shape, kept: Compact | None) -> Cells | None:
    """The same by one kernel, where the back end of the leaves' device has it; None where torch computes op by op.

    `kept` is the mask of all, where it is a compact one; the leaves then have none.
    """
    if by_torch(leaves[0].data):  # before anything that takes time: here are small expressions
        return None
    devices = {str(leaf.data.device) for leaf in leaves}
    if len(devices) > 1 or not prod(shape) or parse_policy(None) is not Policy.INTERSECT:
        return None
    fuser = choose_fuser(chain.ops, devices.pop(), execution().backend).fuser
    return None if fuser is None else Cells(*fuser.fused(chain.ops, leaves, shape, kept))


def in_blocks(chain: Chain, leaves: Sequence[Cells], shape: Shape, sample: Cells) -> Cells:
    """The same without temporaries of its size, on our threads: torch's own wait for each other after each op."""
    empty = partial(torch.empty, shape, device=leaves[0].data.device)
    data, mask = empty(dtype=sample.data.dtype), None if sample.mask is None else empty(dtype=torch.bool)

    def task(index: Index) -> Callable[[], None]:
        def compute_block() -> None:
            cells, valid = run(chain, [part(leaf, index) for leaf in leaves])
            if mask is not None:
                mask[index] = True if valid is None else valid
            data[index] = cells if valid is None else kept(cells, valid.expand(cells.shape))

        return partial(copy_context().run, compute_block)

    in_parallel(backends()[0], prod(shape), [task(index) for index in blocks(shape)])
    return Cells(data, mask)


def blocks(shape: Shape) -> Iterator[Index]:
    """Cuts a tensor along its first dims into pieces of about BLOCK cells.

    >>> [[(s.start, s.stop) for s in index] for index in blocks((2, 300_000))][:2]
    [[(0, 1), (0, 262144)], [(0, 1), (262144, 300000)]]
    """
    rest, steps = BLOCK, []
    for size in reversed(shape):
        steps.append(min(size, max(rest, 1)))
        rest //= max(size, 1)
    return product(*[spans(size, step) for size, step in zip(shape, reversed(steps), strict=True)])


def part(leaf: Cells, index: Index) -> Cells:
    """What of a leaf lies in a block; its dims lie along the last ones, and a size 1 lies in each."""

    def cut(tensor: Tensor) -> Tensor:
        own = index[len(index) - tensor.ndim :]
        return tensor[tuple(slice(None) if n == 1 else s for n, s in zip(tensor.shape, own, strict=True))]

    return Cells(cut(leaf.data), None if leaf.mask is None else cut(leaf.mask))


def lies_along(axes: Shape, n_dims: int) -> bool:
    """Whether dims along `axes` are the last ones of `n_dims`, in order."""
    return axes == tuple(range(n_dims - len(axes), n_dims))


def laid(tensor: T, axes: Shape, n_dims: int) -> T:
    """The tensor with its dims along `axes` of `n_dims`; torch broadcasts what lies along the last ones as it is."""
    if lies_along(axes, n_dims):
        return tensor
    order = sorted(range(len(axes)), key=axes.__getitem__)
    turned: T = tensor.permute(order)[tuple(slice(None) if dim in axes else None for dim in range(n_dims))]
    return turned
