"""Every op that has a gradient, called on small samples, and which cells a result cell depends on, by the definitions.

The oracle of a gradient's mask is brute force: loops over cells, no tensor arithmetic, none of the code under test.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import maskserve as ms
from maskserve import OPS, MaskedTensor, dtypes
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Contraction, Elementwise, MaskRule, Normalization, Reach, Reduction, Row, Scan, Whole
from tests.samples import ELEMENTWISE, SLICED, needed

HOMES = (torch, torch.special, torch.nn.functional)
Masks = Sequence[Tensor]
Uses = Callable[[Masks, Tensor], list[Tensor]]
"""(masks of the operands, which result cells are reached) -> which cells of each operand have a gradient."""


@dataclass(frozen=True)
class Case:
    """An op as a function of the tensors that it is differentiated by."""

    name: str
    row: Row
    op: Callable[..., Any]
    data: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    uses: Uses
    plain: Callable[..., Tensor] | None = None
    """torch's own function of the data; where there is none, None."""

    def __str__(self) -> str:
        return self.name

    def leaves(self, data: Sequence[Tensor] | None = None, masks: Masks | None = None) -> list[MaskedTensor]:
        return [
            ms.masked_tensor(cells, mask, requires_grad=True)
            for cells, mask in zip(data or self.data, masks or self.masks, strict=True)
        ]

    def closure(self, *data: Tensor) -> Tensor:
        """The op of plain tensors, which come and go by it."""
        masked = [ms.as_masked_tensor(cells, mask) for cells, mask in zip(data, self.masks, strict=True)]
        made: Tensor = self.op(*masked).to_tensor(0)
        return made

    def followed(self) -> tuple[Tensor, ...]:
        return tuple(cells.clone().requires_grad_() for cells in self.data)

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, data=tuple(cells.to(dtype) for cells in self.data))


def seeded(*said: Any) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(said).encode()))


def loss(result: MaskedTensor) -> MaskedTensor:
    """The sum of cells, or of both parts of complex ones."""
    if result.is_complex():
        return result.real.sum() + result.imag.sum()
    return result.sum()


def masked_slices(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A random mask; the first row is fully masked, the second has a single valid cell."""
    mask = torch.rand(shape, generator=generator) < 0.7
    if len(shape) > 1 and shape[0] > 2:
        mask[0] = False
        mask[1] = False
        mask[1, 1] = True
    return mask


def random_mask(case: Case, result: MaskedTensor, salt: int) -> Tensor:
    return torch.rand(result.shape, generator=seeded(case.name, salt)) < 0.5


def expected_masks(case: Case, masks: Masks, reached: Tensor) -> list[Tensor]:
    return case.uses(masks, reached)


# -- elementwise ----------------------------------------------------------------------------------------------------

RANGES = ((-0.9, 0.9), (0.15, 0.9), (1.2, 1.9))
POSITIVE = ("polar",)
"""Rows whose derivative torch has wrong below 0, where a size cannot be."""
"""Where torch's function may be smooth: the first that has finite values and derivatives."""


def torchs(row: Elementwise) -> Callable[..., Any]:
    found: Callable[..., Any] = next(getattr(home, row.name) for home in HOMES if hasattr(home, row.name))
    return found


def required(row: Row) -> dict[str, Any]:
    return {p.name: 2 if p.type is Type.COUNT else 0.3 for p in row.parameters if p.default is REQUIRED}


def draw(shape: tuple[int, ...], span: tuple[float, float], *said: Any) -> Tensor:
    """Cells of a range, no two equal, none near a multiple of 1/10, where some op has a corner."""
    generator, (low, high) = seeded(span, *said), span
    steps = torch.arange(int(low * 40), int(high * 40), dtype=torch.float64)
    steps = steps[steps % 4 != 0]
    chosen = steps[torch.randperm(len(steps), generator=generator)[: int(torch.Size(shape).numel())]]
    return (chosen.reshape(shape) + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)) / 40


CONDITION = (
    torch.rand(3, 4, generator=seeded("condition")) < 0.5, torch.rand(3, 4, generator=seeded("its mask")) < 0.8,
)  # fmt: skip


def bool_condition() -> MaskedTensor:
    return ms.masked_tensor(*CONDITION)


SHAPES = ((3, 4), (1, 4), (3, 1))
"""Of the operands of an elementwise op."""


def arguments(row: Elementwise, cells: Sequence[Any], *, plain: bool = False) -> list[Any]:
    """The operands before and after those that have a gradient."""
    if row.rule is MaskRule.CHOSEN:
        condition = bool_condition()
        return [condition.get_data() if plain else condition, *cells]
    if row.no_gradient_by:
        return [torch.tensor(1.3, dtype=cells[0].dtype), *cells]
    return [1, *cells] if row.operands[0] == "n" else list(cells)


def wanted(row: Elementwise) -> list[str]:
    """The operands that may have a gradient."""
    return [name for name in row.operands if name not in ("condition", "n", *row.no_gradient_by)]


def sampled(row: Elementwise) -> tuple[Tensor, ...] | None:
    """Cells where the row is smooth; None where its results are no floats."""
    for span in RANGES[row.name in POSITIVE :]:
        data = tuple(
            draw(shape, span, row.name, i).requires_grad_()
            for i, shape in zip(range(len(wanted(row))), SHAPES, strict=False)
        )
        result = torchs(row)(*arguments(row, data, plain=True), **required(row))
        if not (result.is_floating_point() or result.is_complex()):
            return None
        if result.detach().isfinite().all():
            return tuple(cells.detach() for cells in data)
    raise AssertionError(f"{row.name} is finite nowhere")


def elementwise_case(row: Elementwise, policy: str = "intersect") -> Case | None:
    data = sampled(row) if dtypes.f64 in row.accepts else None
    if data is None:
        return None
    masks = [masked_slices((3, 4), seeded(row.name, policy, i)) for i in range(len(data))]
    masks = [mask.narrow(0, 2, 1) if cells.shape[0] == 1 else mask for mask, cells in zip(masks, data, strict=True)]
    masks = [mask.narrow(1, 1, 1) if cells.shape[1] == 1 else mask for mask, cells in zip(masks, data, strict=True)]
    if policy == "strict":
        data = tuple(cells.expand(3, 4).clone() for cells in data)
        masks = [masks[0]] * len(data)

    def uses(masks: Masks, reached: Tensor) -> list[Tensor]:
        found = [torch.zeros_like(mask) for mask in masks]
        chosen = bool_condition().get_data()
        for place in itertools.product(*map(range, reached.shape)):
            for i, mask in enumerate(masks):
                at = tuple(0 if size == 1 else index for size, index in zip(mask.shape, place, strict=True))
                if row.rule is MaskRule.CHOSEN and bool(chosen[place]) != (i == 0):
                    continue
                found[i][at] |= reached[place] & mask[at]
        return found

    params = required(row)
    said = {} if policy == "intersect" else {"policy": policy}
    return Case(
        f"{row.name}" if policy == "intersect" else f"{row.name}-{policy}", row,
        lambda *cells: getattr(ms, row.name)(*arguments(row, cells), **params, **said),
        data, tuple(masks), uses,
        lambda *cells: torchs(row)(*arguments(row, cells, plain=True), **params),
    )  # fmt: skip


FLOAT_ELEMENTWISE = [case for row in ELEMENTWISE if (case := elementwise_case(row)) is not None]
"""Rows of float results."""
EACH_CELL = [case for case in FLOAT_ELEMENTWISE if isinstance(case.row, Elementwise) and case.row.is_differentiable]
POLICIES = [
    case
    for of in EACH_CELL
    if isinstance(of.row, Elementwise)
    for policy in ("union", "strict")
    if len(of.data) > 1 and of.row.rule is MaskRule.ALL and (policy == "strict" or None not in of.row.identity[:2])
    if (policy == "strict" or len(of.row.identity) == len(of.data))
    if (case := elementwise_case(of.row, policy)) is not None
]


# -- slices ---------------------------------------------------------------------------------------------------------


def slices_of(shape: tuple[int, ...], dims: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """(place of the kept dims, the places of the slice in order)."""
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    places = list(itertools.product(*map(range, shape)))
    for at in itertools.product(*[range(shape[dim]) for dim in kept]):
        yield at, [place for place in places if tuple(place[dim] for dim in kept) == at]


def sliced_case(row: Reduction | Normalization | Scan, dims: tuple[int, ...], **params: Any) -> Case:
    words, shape = {p.name for p in row.parameters}, (3, 4)
    given = needed(row) | params
    if "dim" in words and len(dims) == 1:
        given["dim"] = dims[0]
    said = f"{row.name}-{dims}{params or ''}"
    mask = masked_slices(shape, seeded(said))
    data = draw(shape, (0.2, 1.9) if row.name in ("prod", "cumprod", "norm", "normalize") else (-0.9, 0.9), row.name)

    def uses(masks: Masks, reached: Tensor) -> list[Tensor]:
        (own,) = masks
        found = torch.zeros_like(own)
        for at, places in slices_of(shape, dims):
            for i, place in enumerate(places):
                if isinstance(row, Reduction):
                    results = reached.reshape(-1, *[shape[d] for d in range(2) if d not in dims])
                    is_used = any(bool(one[at]) for one in results)
                elif row.reach is Reach.SLICE:
                    sizes = reached.shape[dims[0]]
                    is_used = any(bool(reached[later]) for later in places[:sizes])
                elif row.reach is Reach.BEFORE:
                    is_used = any(bool(reached[later]) for later in places[i:])
                elif row.reach is Reach.OWN:
                    is_used = bool(reached[place])
                else:  # a fill: the places whose nearest valid cell on the side that it looks to is this one
                    order = places if row.name == "ffill" else places[::-1]
                    start = order.index(place)
                    is_used = bool(reached[place])
                    for later in order[start + 1 :]:
                        if own[later]:
                            break
                        is_used |= bool(reached[later])
                found[place] = own[place] and is_used
        return [found]

    def op(cells: MaskedTensor) -> Any:
        made = getattr(ms, row.name)(cells, **given)
        return made if isinstance(made, MaskedTensor) else made.values

    return Case(said, row, op, (data,), (mask,), uses)


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "norm": [{"ord": 1}, {"ord": 3}, {"ord": -2}, {"ord": float("inf")}],
    "normalize": [{"ord": 1}, {"eps": 5.0}],
    "var": [{"correction": 0}],
    "std": [{"correction": 0}],
    "quantile": [{"q": 0.3, "interpolation": "lower"}],
    "ffill": [{"limit": 3}],
}
DIFFERENTIABLE_SLICED = [row for row in SLICED if row.vjp]
SLICES = [
    sliced_case(row, dims, **params)
    for row in DIFFERENTIABLE_SLICED
    for params in [{}, *VARIANTS.get(row.name, [])]
    for dims in ([(1,), (0,), (0, 1)] if isinstance(row, Reduction) and not params else [(1,), (0,)] if not params else [(1,)])
]  # fmt: skip


def weighted_case(row: Reduction) -> Case:
    """By data and by weights, one for each row of cells."""
    shape = (3, 4)
    masks = masked_slices(shape, seeded(row.name)), torch.tensor([[True], [True], [True]])
    given = {"correction": 0} if row.needs else {}

    def uses(masks: Masks, reached: Tensor) -> list[Tensor]:
        both = [torch.zeros_like(mask) for mask in masks]
        for i, j in itertools.product(range(3), range(4)):
            is_used = bool(reached[j] & masks[0][i, j] & masks[1][i, 0])
            both[0][i, j] |= is_used
            both[1][i, 0] |= is_used
        return both

    return Case(
        f"{row.name}-weighted", row, lambda cells, weights: getattr(ms, row.name)(cells, 0, weights=weights, **given),
        (draw(shape, (-0.9, 0.9), row.name), draw((3, 1), (0.15, 0.9), row.name)), masks, uses,
    )  # fmt: skip


WEIGHTED = [weighted_case(row) for row in DIFFERENTIABLE_SLICED if isinstance(row, Reduction) and row.vjp_weighted]


# -- products -------------------------------------------------------------------------------------------------------


def product_case(name: str, said: str, *shapes: tuple[int, ...], biased: bool = False, **params: Any) -> Case:
    """The row, and the same as an einsum."""
    row = OPS[name]
    data = tuple(draw(shape, (-0.9, 0.9), name, i) for i, shape in enumerate(shapes))
    masks = tuple(masked_slices(shape, seeded(name, i)) for i, shape in enumerate(shapes))

    def uses(masks: Masks, reached: Tensor) -> list[Tensor]:
        inputs, result = said.split("->")
        letters = inputs.split(",")
        found = [torch.zeros_like(mask) for mask in masks]
        sizes: dict[str, int] = {}
        for labels, mask in zip(letters, masks, strict=False):
            sizes |= zip(labels, mask.shape, strict=True)
        for place in itertools.product(*[range(size) for size in sizes.values()]):
            at = dict(zip(sizes, place, strict=True))
            cells = [tuple(at[label] for label in labels) for labels in letters]
            if bool(reached[tuple(at[label] for label in result)]) and all(
                bool(mask[cell]) for mask, cell in zip(masks, cells, strict=False)
            ):
                for one, cell in zip(found, cells, strict=False):
                    one[cell] = True
        if biased:
            found[-1] |= masks[-1] & reached.reshape(-1, reached.shape[-1]).any(0)
        return found

    def op(*cells: Any) -> Any:
        return getattr(ms, name)(*params.values(), *cells) if name == "einsum" else getattr(ms, name)(*cells, **params)

    assert isinstance(row, Contraction)
    return Case(f"{name}-{said}{'+' if biased else ''}", row, op, data, masks, uses)


PRODUCTS = [
    product_case("matmul", "ik,kj->ij", (3, 4), (4, 2)),
    product_case("matmul", "bik,kj->bij", (2, 3, 2), (2, 2)),
    product_case("mm", "ik,kj->ij", (3, 2), (2, 3)),
    product_case("bmm", "bik,bkj->bij", (2, 2, 3), (2, 3, 2)),
    product_case("mv", "ik,k->i", (3, 4), (4,)),
    product_case("dot", "k,k->", (4,), (4,)),
    product_case("inner", "ik,jk->ij", (3, 4), (2, 4)),
    product_case("outer", "i,j->ij", (3,), (4,)),
    product_case("tensordot", "abc,bcd->ad", (2, 3, 2), (3, 2, 2)),
    product_case("einsum", "ij,jk,kl->il", (2, 3), (3, 2), (2, 2), equation="ij,jk,kl->il"),
    product_case("einsum", "ijj->i", (2, 3, 3), equation="ijj->i"),
    product_case("linear", "ik,jk->ij", (3, 4), (2, 4)),
    product_case("linear", "ik,jk->ij", (3, 4), (2, 4), (2,), biased=True),
]


# -- pairs of rows --------------------------------------------------------------------------------------------------


def pairs_case(row: Whole) -> Case:
    shape = (3, 6)
    data = draw(shape, (-0.9, 0.9), row.name)
    mask = torch.rand(shape, generator=seeded(row.name, 2)) < 0.8

    def uses(masks: Masks, reached: Tensor) -> list[Tensor]:
        (own,) = masks
        found = torch.zeros_like(own)
        for i, j, k in itertools.product(range(3), range(3), range(6)):
            if bool(reached[i, j] & own[i, k] & own[j, k]):
                found[i, k] = found[j, k] = True
        return [found]

    return Case(row.name, row, getattr(ms, row.name), (data,), (mask,), uses)


PAIRS = [pairs_case(row) for row in OPS.values() if isinstance(row, Whole) and row.vjp]

CASES = [*EACH_CELL, *POLICIES, *SLICES, *WEIGHTED, *PRODUCTS, *PAIRS]
