"""Gradients as MaskedTensors: backward and grad in torch's words, and the transforms grad, value_and_grad, vjp and jvp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from maskserve.backends.reference.cells import select
from maskserve.compiling import uncompiled
from maskserve.errors import GradientError
from maskserve.gates import DTYPE, as_cotangent, kept
from maskserve.making import tensor_of
from maskserve.reach import Cross, applied, channel, narrowed
from maskserve.sparse import SparseTensor, aligned
from maskserve.tensor import MaskedTensor
from maskserve.tracing import in_transform, is_followed

Function = Callable[..., Any]


# -- torch.autograd's words ---------------------------------------------------------------------------------------


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """torch.autograd.backward, of MaskedTensors and plain tensors alike."""
    outputs = listed(tensors)
    given = grad_tensors if grad_tensors is not None else grad_variables
    cotangents = [None] * len(outputs) if given is None else listed(given)
    roots, seeds = seeded(outputs, cotangents)
    leaves = None if inputs is None else [part for leaf in listed(inputs) for part in followed_parts(leaf)]
    walked_back(roots, seeds, leaves, retain_graph=retain_graph, create_graph=create_graph, into_leaves=True)


def grad_by(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """torch.autograd.grad: a MaskedTensor for each MaskedTensor among the inputs, a dense tensor for each plain one."""
    if is_grads_batched:
        raise GradientError("is_grads_batched is not for MaskedTensors: call torch.func.vmap over maskserve.vjp")
    wanted, sources = listed(outputs), listed(inputs)
    roots, seeds = seeded(wanted, [None] * len(wanted) if grad_outputs is None else listed(grad_outputs))
    parts = [followed_parts(source) for source in sources]
    flat = [part for own in parts for part in own]
    found = iter(walked_back(roots, seeds, flat, retain_graph=retain_graph, create_graph=create_graph))
    made = [gradient_of(source, [next(found) for _ in own]) for source, own in zip(sources, parts, strict=True)]
    return tuple(
        checked_use(
            source, gradient, allow_unused=bool(allow_unused or materialize_grads), materialize=materialize_grads
        )
        for source, gradient in zip(sources, made, strict=True)
    )


def walked_back(
    roots: Sequence[Tensor], seeds: Sequence[Tensor], leaves: Sequence[Tensor] | None, *, retain_graph: bool | None,
    create_graph: bool, into_leaves: bool = False,
) -> Sequence[Tensor | None]:  # fmt: skip
    """The gradients by `leaves`, None where one is not used; `into_leaves`: added to their grad, by default of all there are.

    By torch's engine itself: torch's functions check the seeds' shapes, as `seeded` did, and import sympy for that, 0.7 s.
    """
    engine = getattr(torch.autograd.graph, "_engine_run_backward", None)
    tensors = [*roots, *seeds, *(leaves or ())]
    if engine is None or in_transform() or leaves == [] or torch.overrides.has_torch_function(tensors):
        if not into_leaves:
            return torch.autograd.grad(
                roots, leaves or (), seeds, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
            )
        torch.autograd.backward(roots, seeds, retain_graph=retain_graph, create_graph=create_graph, inputs=leaves)
        return ()
    keeps = create_graph if retain_graph is None else retain_graph
    found: Sequence[Tensor | None] = engine(
        tuple(roots), tuple(seeds), keeps, create_graph, tuple(leaves or ()), True, accumulate_grad=into_leaves
    )
    return found


def listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, MaskedTensor | Tensor) else list(value)


def seeded(outputs: Sequence[Any], cotangents: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(roots, their cotangents): data and reach of each output."""
    roots: list[Tensor] = []
    seeds: list[Tensor] = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        for root, seed in pairs(output, cotangent):
            roots.append(root)
            seeds.append(seed)
    return roots, seeds


def pairs(output: Any, cotangent: Any) -> list[tuple[Tensor, Tensor]]:
    data = plain_of(output)
    if not data.requires_grad:
        raise GradientError(
            "the tensor has no history: make a leaf with masked_tensor(..., requires_grad=True), or take a plain tensor that has "
            "one into as_masked_tensor(data, mask), and compute from it, outside torch.no_grad()"
        )
    if cotangent is None:
        if output.numel() != 1:
            raise GradientError(
                f"a gradient comes from one cell, and the tensor has shape {tuple(output.shape)}: reduce it first, or give "
                "the gradient from above, of its shape"
            )
        cotangent = torch.ones(output.shape, dtype=data.dtype, device=data.device)
    ((_, above),) = paired("the tensor", [output], "the gradient from above", [cotangent])
    return list(zip(followed_parts(output), seeds_of(output, above), strict=False))  # an output may have no reach


def seeds_of(output: Any, above: Any) -> list[Tensor]:
    """The cotangents of an output's data and reach, where `above` is what comes from above."""
    if isinstance(output, SparseTensor):
        output, above = output._cells, aligned(above, output._pattern)
    mask = mask_of(above)
    data = plain_of(above).to(output.dtype)
    if not isinstance(output, MaskedTensor):
        return [kept(data, mask)]
    reached = output._full_mask() if mask is None else output._full_mask() & mask
    return [kept(data, reached), as_cotangent(reached)]


def followed_parts(source: Any) -> list[Tensor]:
    """What autograd knows of a tensor: its data and, of a MaskedTensor, its reach."""
    if not isinstance(source, MaskedTensor):
        return [source]
    cells = source._cells
    return [cells._data] if cells._reach is None else [cells._data, cells._reach]


def gradient_of(source: Any, found: Sequence[Tensor | None]) -> Any:
    """The gradient by a tensor, from those by its parts; None where it was not used."""
    data, *reach = found
    if not isinstance(source, MaskedTensor):
        return data
    if data is None:
        return None
    cells = source._cells
    reached = cells._full_mask() if not reach else torch.zeros_like(cells._data, dtype=torch.bool)
    if reach and reach[0] is not None:
        reached = reach[0] > 0
    again = None
    if is_followed(data) and cells._reach is not None:
        again = applied(Cross, reached, cells._reach)
    return source._like(MaskedTensor._of(select(data, reached), reached, again))


def checked_use(source: Any, gradient: Any, *, allow_unused: bool, materialize: bool) -> Any:
    if gradient is not None:
        return gradient
    if not allow_unused:
        raise GradientError("an input was not used in the computation; allow_unused=True gives None for it")
    if not materialize:
        return None
    if not isinstance(source, MaskedTensor):
        return torch.zeros_like(source)
    cells = source._cells
    return source._like(
        MaskedTensor._of(torch.zeros_like(cells._data), torch.zeros_like(cells._data, dtype=torch.bool))
    )


# -- torch.func's words -------------------------------------------------------------------------------------------


@uncompiled
def grad(function: Function, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Function:
    """A function that gives the gradient of `function`, whose result is one cell, by its arguments `argnums`.

    As torch.func.grad: a MaskedTensor for each MaskedTensor, a plain tensor for each plain one; with has_aux,
    (gradient, what else the function gave). It nests, and composes with torch.func's transforms.
    """
    both = value_and_grad(function, argnums, has_aux)

    @uncompiled
    @wraps(function)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, found = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


@uncompiled
def value_and_grad(function: Function, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Function:
    """A function that gives (value, gradient); with has_aux ((value, what else the function gave), gradient)."""
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @uncompiled
    @wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        if any(not -len(args) <= place < len(args) for place in places):
            raise GradientError(f"argnums is {argnums}, and {len(args)} positional arguments are given")

        def of_some(*some: Any) -> Any:
            given = list(args)
            for place, arg in zip(places, some, strict=True):
                given[place] = arg
            return function(*given, **kwargs)

        value, pull, *aux = vjp(of_some, *[args[place] for place in places], has_aux=has_aux)
        if not isinstance(value, MaskedTensor | Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
            raise GradientError(
                f"grad is of a function that gives one cell, and this one gives {what}; vjp takes any, and has_aux=True a pair "
                "of the cell and something else"
            )
        found = pull(torch.ones(value.shape, dtype=value.dtype, device=value.device))
        gradient = found[0] if isinstance(argnums, int) else found
        return ((value, *aux), gradient) if has_aux else (value, gradient)

    return both


@uncompiled
def vjp(function: Function, *primals: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """(what the function gives, a function from gradients of that to gradients by each primal), as torch.func.vjp.

    primals: MaskedTensors, plain tensors, and lists, tuples or dicts of them; so the gradients. With has_aux the
    function gives a pair, and what else it gave comes third.
    """
    opened = Opened(function, primals, has_aux)
    made: tuple[Any, ...] = torch.func.vjp(opened, *opened.flat(channel), has_aux=True)
    flat, pull, extra = made
    value, aux = opened.closed(flat, extra)

    @uncompiled
    def pulled(cotangents: Any) -> tuple[Any, ...]:
        leaves = paired(
            "what the function gives", tree_leaves(value), "the gradient from above", tree_leaves(cotangents)
        )
        return opened.gradients(pull(tuple(seed for out, above in leaves for seed in seeds_of(out, above))))

    return (value, pulled, aux) if has_aux else (value, pulled)


@uncompiled
def jvp(
    function: Function, primals: tuple[Any, ...], tangents: tuple[Any, ...], *, has_aux: bool = False
) -> tuple[Any, ...]:
    """(what the function gives, how it changes along the tangents), as torch.func.jvp.

    A masked cell of a tangent adds nothing. A cell of the change is specified where it is valid and a path of valid
    cells leads to it from a specified cell of a tangent.
    """
    if not isinstance(primals, tuple | list) or not isinstance(tangents, tuple | list):
        raise GradientError("jvp takes a tuple of primals and a tuple of tangents, one each: jvp(f, (x,), (t,))")
    opened = Opened(function, tuple(primals), has_aux)
    pairs = paired("a primal", opened.leaves, "its tangent", tree_leaves(tangents))
    given = [seeds_of(leaf, t) for leaf, t in pairs]
    flat = opened.flat(lambda data: torch.zeros(data.shape, dtype=DTYPE, device=data.device))
    flat = tuple(part.contiguous() for part in flat)  # torch writes tangents in the layout of their tensor
    made: tuple[Any, ...] = torch.func.jvp(opened, flat, tuple(t for seeds in given for t in seeds), has_aux=True)
    values, changes, extra = made
    value, aux = opened.closed(values, extra)
    change = opened.changes(changes, values, extra)
    return (value, change, aux) if has_aux else (value, change)


def paired(one: str, ones: Sequence[Any], other: str, others: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The two by two, as tensors of equal shapes."""
    if len(ones) != len(others):
        raise GradientError(f"{one}: {len(ones)} tensors, {other}: {len(others)}; they go in pairs")
    pairs = [(a, tensor_of(b)) for a, b in zip(ones, others, strict=True)]
    for a, b in pairs:
        if a.shape != b.shape:
            raise GradientError(f"{other} has shape {tuple(b.shape)}, {one} {tuple(a.shape)}; they must be equal")
    return pairs


class Opened:
    """A function of MaskedTensors as one of plain tensors: data and reach of each, and the masks beside."""

    def __init__(self, function: Function, primals: tuple[Any, ...], has_aux: bool) -> None:
        self.function, self.has_aux = function, has_aux
        self.leaves, self.shape = tree_flatten(primals)
        for leaf in self.leaves:
            if not isinstance(leaf, MaskedTensor | Tensor):
                raise GradientError(f"a gradient is by tensors, and an argument has a {type(leaf).__name__}")
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise GradientError(
                    f"a gradient is by floats, and an argument is {leaf.dtype}; convert it first: .double()"
                )

    def flat(self, reach_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """The leaves' parts; `reach_of(data)` where nobody asked so far."""
        return tuple(part for leaf in self.leaves for part in opened_parts(leaf, reach_of))

    def __call__(self, *flat: Tensor) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """(the parts of what the function gives, the masks and what else it gave: these carry no derivative)."""
        parts = iter(flat)
        arguments = [
            leaf._like(MaskedTensor._of(next(parts), leaf._cells._mask, next(parts)))
            if isinstance(leaf, MaskedTensor)
            else next(parts)
            for leaf in self.leaves
        ]
        made = self.function(*tree_unflatten(arguments, self.shape))
        value, aux = made if self.has_aux else (made, None)
        outputs, self.value_shape = tree_flatten(value)
        others, self.aux_shape = tree_flatten(aux)
        for output in outputs:
            if not isinstance(output, MaskedTensor | Tensor):
                raise GradientError(f"the function gives a {type(output).__name__} where a tensor has a gradient")
        self.outputs, self.others = [like_of(output) for output in outputs], [like_of(other) for other in others]
        beside = [
            [mask_of(output) for output in outputs],
            *zip(*[(plain_of(o), mask_of(o)) for o in others], strict=True),
        ]
        self.beside = [[None if isinstance(part, Tensor) else (part,) for part in parts] for parts in beside]
        return (
            tuple(part for output in outputs for part in opened_parts(output, channel)),
            tuple(part for parts in beside for part in parts if isinstance(part, Tensor)),
        )

    def unpacked(self, extra: tuple[Tensor, ...]) -> list[list[Any]]:
        """The masks, the other things and their masks, with what is no tensor back in its place."""
        tensors = iter(extra)
        return [[next(tensors) if kept is None else kept[0] for kept in parts] for parts in self.beside]

    def closed(self, flat: tuple[Tensor, ...], extra: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """(what the function gave, what else)."""
        masks, *others = self.unpacked(extra)
        parts = iter(flat)
        made = [
            next(parts) if mask is None else like(followed_tensor(next(parts), mask, next(parts)))
            for mask, like in zip(masks, self.outputs, strict=True)
        ]
        aux = [
            other if mask is None else like(MaskedTensor._of(other, mask))
            for other, mask, like in zip(*others, self.others, strict=True)
        ]
        return tree_unflatten(made, self.value_shape), tree_unflatten(aux, self.aux_shape)

    def gradients(self, found: tuple[Tensor, ...]) -> tuple[Any, ...]:
        parts = iter(found)
        made = [
            gradient_of(leaf, [next(parts), next(parts)]) if isinstance(leaf, MaskedTensor) else next(parts)
            for leaf in self.leaves
        ]
        gradients: tuple[Any, ...] = tree_unflatten(made, self.shape)
        return gradients

    def changes(self, flat: tuple[Tensor, ...], values: tuple[Tensor, ...], extra: tuple[Tensor, ...]) -> Any:
        """How what the function gave changes: by paths from the cells that the values themselves come from."""
        parts = iter(zip(flat, values, strict=True))
        made: list[Any] = []
        for mask, like in zip(self.unpacked(extra)[0], self.outputs, strict=True):
            data, _ = next(parts)
            if mask is None:
                made.append(data)
                continue
            reach, own = next(parts)
            specified = (reach > 0) & mask
            made.append(like(followed_tensor(select(data, specified), specified, narrowed(own, specified))))
        return tree_unflatten(made, self.value_shape)


def opened_parts(value: MaskedTensor | Tensor, reach_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    if not isinstance(value, MaskedTensor):
        return [value]
    cells = value._cells
    return [cells._data, reach_of(cells._data) if cells._reach is None else cells._reach]


def like_of(value: Any) -> Callable[[MaskedTensor], MaskedTensor]:
    """How cells become a tensor that stores them where this one does."""
    return value._like if isinstance(value, MaskedTensor) else lambda cells: cells


def followed_tensor(data: Tensor, mask: Tensor, reach: Tensor | None) -> MaskedTensor:
    """A tensor that an outer transform, or backward(), may follow."""
    return MaskedTensor._of(data, mask, reach if is_followed(data) else None)


def mask_of(value: Any) -> Tensor | None:
    return value._cells._full_mask() if isinstance(value, MaskedTensor) else None


def plain_of(value: Any) -> Any:
    return value._cells._data if isinstance(value, MaskedTensor) else value
