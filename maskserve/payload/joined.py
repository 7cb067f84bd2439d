"""Many payloads as one: their variables joined along a dim, in the order given, and read where they lie. Imports no torch.

What lacks that dim must be the same in each. Masks that differ in kind, or of which some are missing, are joined as the
bools that they stand for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from maskserve.dtypes import DType, boolean
from maskserve.errors import DimError, MaskserveError, ShapeError, UnknownTensorError, nearest
from maskserve.payload.files import Payload, Spoil, _Ranges
from maskserve.payload.header import DEFAULT_LIMITS, Limits, Shape, check_shape, parse_header, shown, shown_shape
from maskserve.payload.slices import BLOCK_CELLS, validity
from maskserve.payload.variables import Dims, MaskKind, Means, Variable, Variables
from maskserve.payload.writing import Output, encode_header, in_order

if TYPE_CHECKING:
    from maskserve.payload.slices import Validity

Fill: TypeAlias = Callable[[Sequence[int], memoryview], None]
"""Fills a buffer with as many bytes of a tensor from each of some places on."""
WOVEN = 1 << 20
"""Bytes of rows that are laid side by side at a time."""
Expect: TypeAlias = Callable[[int, int], None]
"""Says which bytes of a tensor, from a place on, will be read."""
Map: TypeAlias = Callable[[int, int, Spoil], memoryview | None]
"""The bytes of a tensor from a place on where they lie; None where they must be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One payload, what it is called, and its variables."""

    title: str
    payload: Payload
    variables: Variables


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """A joined tensor: for each index of the dims before, the bytes of each part follow each other."""

    output: Output
    fills: tuple[Fill, ...]
    maps: tuple[Map, ...]
    """How parts show their bytes where they lie; none where they do not hold them as they are wanted."""
    expects: tuple[Expect, ...]
    """How parts are told what will be read of them; none where that is not known."""
    starts: tuple[int, ...]
    """Where each part begins in such a row, and where the last one ends."""

    def runs(self, starts: Sequence[int], view: memoryview) -> None:
        """Fills `view` with runs of equal length; those of one part that follow each other go to it together."""
        n = view.nbytes // len(starts)
        row, done = self.starts[-1], 0
        at: list[int] = []
        whose = -1
        for i, start in enumerate(starts):
            index, rest = divmod(start, row)
            part = bisect_right(self.starts, rest) - 1
            inside = rest - self.starts[part]
            width = self.starts[part + 1] - self.starts[part]
            if inside + n > width:
                self._flush(whose, at, view[done : i * n])
                self._across(start, view[i * n : (i + 1) * n])
                at, whose, done = [], -1, (i + 1) * n
                continue
            if part != whose:
                self._flush(whose, at, view[done : i * n])
                at, whose, done = [], part, i * n
            at.append(index * width + inside)
        self._flush(whose, at, view[done:])

    def mapped(self, start: int, n: int, spoil: Spoil) -> memoryview | None:
        """`n` bytes where they lie, if that is in one part."""
        index, rest = divmod(start, self.starts[-1])
        part = bisect_right(self.starts, rest) - 1
        inside, width = rest - self.starts[part], self.starts[part + 1] - self.starts[part]
        if not self.maps or inside + n > width:
            return None
        return self.maps[part](index * width + inside, n, spoil)

    def expect(self, start: int, n: int) -> None:
        """Tells each part which of its bytes are among the `n` from `start` on."""
        for part, expect in enumerate(self.expects):
            first, last = self._before(part, start), self._before(part, start + n)
            if last > first:
                expect(first, last - first)

    def _before(self, part: int, at: int) -> int:
        """How many bytes of a part lie before a place of the whole."""
        (index, rest), width = divmod(at, self.starts[-1]), self.starts[part + 1] - self.starts[part]
        return index * width + min(max(rest - self.starts[part], 0), width)

    def _flush(self, part: int, at: Sequence[int], view: memoryview) -> None:
        if at:
            self.fills[part](at, view)

    def _across(self, start: int, view: memoryview) -> None:
        """One run that several parts share: whole rows side by side, what is left of a row piece by piece."""
        done, row = 0, self.starts[-1]
        while done < view.nbytes:
            index, rest = divmod(start + done, row)
            n_rows = min(view.nbytes - done, max(WOVEN, row)) // row
            if n_rows > 1 and not rest:
                self._weave(index, view[done : done + n_rows * row])
                done += n_rows * row
                continue
            part = bisect_right(self.starts, rest) - 1
            inside, width = rest - self.starts[part], self.starts[part + 1] - self.starts[part]
            n = min(width - inside, view.nbytes - done)
            self.fills[part]([index * width + inside], view[done : done + n])
            done += n

    def _weave(self, first: int, view: memoryview) -> None:
        """Whole rows from the first of them on: what each part has of them is read at once, and laid beside the others."""
        import numpy as np

        rows = np.frombuffer(view, np.uint8).reshape(-1, self.starts[-1])
        for (begin, end), fill in zip(pairwise(self.starts), self.fills, strict=True):
            if begin == end:
                continue
            own = np.empty((len(rows), end - begin), np.uint8)
            fill([first * (end - begin)], own.data.cast("B"))
            rows[:, begin:end] = own


class JoinedPayload(_Ranges):
    """The parts as one payload; a reader need not know."""

    def __init__(self, parts: Sequence[Part], along: int | str, means: Means, limits: Limits = DEFAULT_LIMITS) -> None:
        self.parts = tuple(parts)
        self.is_far = any(part.payload.is_far for part in parts)
        first = parts[0]
        self.along = Along.of(first.variables, along)
        joined = [piece for name in names(first.variables) for piece in self._joined(name, means)]
        by_name = {piece.output.name: piece for piece in joined}
        outputs = in_order(piece.output for piece in joined)
        head = encode_header(outputs, first.payload.header.metadata)
        self.n_bytes = len(head) + sum(check_shape(o.name, o.dtype, o.shape) for o in outputs)
        self.header = parse_header(lambda offset, n: head[offset : offset + n], self.n_bytes, limits)
        self._pieces = [by_name[output.name] for output in outputs if output.n_bytes]
        self._begins = [self.header.data_start + self.info(piece.output.name).begin for piece in self._pieces]

    def _joined(self, name: str, means: Means) -> list[Pieces]:
        """A variable, and its mask where any part has one."""
        own = [variable_of(part, name, self.parts[0]) for part in self.parts]
        for part, variable in zip(self.parts, own, strict=True):
            with_title(part, partial(check_alike, variable, own[0], self.along, self.parts[0].title))
        dim = self.along.dim(own[0])
        sources = [(part.payload, variable) for part, variable in zip(self.parts, own, strict=True)]
        if dim is None:
            for part, variable in zip(self.parts[1:], own[1:], strict=True):
                refuse_other_cells(part, variable, self.parts[0], own[0])
            sources, own = sources[:1], own[:1]
        fills = [partial(payload.read_runs, name) for payload, _ in sources]
        info, maps = own[0].info, [partial(payload.mapped, name) for payload, _ in sources]
        expects = [partial(payload.expect, name) for payload, _ in sources]
        data = joined(name, info.dtype, [v.info.shape for _, v in sources], dim or 0, fills, maps, expects)
        if all(variable.mask is None for variable in own):
            return [data]
        return [data, self._mask(sources, dim or 0, means)]

    def _mask(self, sources: Sequence[tuple[Payload, Variable]], dim: int, means: Means) -> Pieces:
        masks = [variable.mask for _, variable in sources]
        named = next((mask for mask in masks if mask is not None), None)
        variable = sources[0][1]
        if named is not None and named is masks[0] and all(
            mask is not None and mask.kind is named.kind and can_join(mask.info.shape, named.info.shape, dim, v, mask.kind)
            and mask.info.dtype is named.info.dtype and mask.means == named.means
            for mask, (_, v) in zip(masks, sources, strict=True)
        ):  # fmt: skip
            shapes = [mask.info.shape for mask in masks if mask is not None]
            fills = [partial(p.read_runs, v.mask.info.name) for p, v in sources if v.mask is not None]
            maps = [partial(p.mapped, v.mask.info.name) for p, v in sources if v.mask is not None]
            expects = [partial(p.expect, v.mask.info.name) for p, v in sources if v.mask is not None]
            return joined(named.info.name, named.info.dtype, shapes, dim, fills, maps, expects)
        is_bool = named is not None and named.kind is MaskKind.BOOL
        name = named.info.name if named is not None and is_bool else f"{variable.name}.{MaskKind.BOOL}"
        fills = [partial(fill_validity, validity_of(payload, v), means == "missing") for payload, v in sources]
        return joined(name, boolean, [v.info.shape for _, v in sources], dim, fills, (), ())

    @property
    def described(self) -> str:
        """What was joined: "3 files as one (36, 8) along dim 0"."""
        variable = next(v for v in self.parts[0].variables if self.along.dim(v) is not None)
        shape = shown_shape(self.header.tensors[variable.name].shape)
        return f"{len(self.parts)} files as one {shape} along {self.along}"

    def refuse_changed(self) -> None:
        for part in self.parts:
            part.payload.refuse_changed()

    def identity(self) -> Iterator[tuple[object, ...]]:
        for part in self.parts:
            yield from part.payload.identity()

    def close(self) -> None:
        for part in self.parts:
            part.payload.close()

    def _range(self, offset: int, n: int) -> memoryview:
        view = memoryview(bytearray(n))
        self._fill(offset, view)
        return view

    def mapped(self, name: str, start_byte: int, n_bytes: int, spoil: Spoil) -> memoryview | None:
        offset = self._offset(name, start_byte, n_bytes)
        at = bisect_right(self._begins, offset) - 1
        return self._pieces[at].mapped(offset - self._begins[at], n_bytes, spoil) if n_bytes else None

    def expect(self, name: str, start_byte: int, n_bytes: int) -> None:
        offset = self._offset(name, start_byte, n_bytes)
        at = bisect_right(self._begins, offset) - 1
        if n_bytes:
            self._pieces[at].expect(offset - self._begins[at], n_bytes)

    def _fill(self, offset: int, view: memoryview) -> None:
        if view.nbytes:
            self._fill_runs([offset], view)

    def _fill_runs(self, offsets: Sequence[int], view: memoryview) -> None:
        at = bisect_right(self._begins, offsets[0]) - 1
        begin = self._begins[at]
        self._pieces[at].runs([offset - begin for offset in offsets], view)


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """The dim along which payloads are joined: by name where the first variable's dims have names."""

    number: int
    name: str | None

    @classmethod
    def of(cls, variables: Variables, along: int | str) -> Along:
        every = list(variables)
        if isinstance(along, str):
            found = next((v for v in every if along in (v.dims or ())), None)
            if found is None or found.dims is None:
                have = list(dict.fromkeys(name for v in every for name in v.dims or ()))
                text = (
                    f"the payload's dims are {', '.join(have)}" if have else "the payload names no dims: give a number"
                )
                raise DimError(
                    f"along: no variable has the dim {along[:64]!r}; {text}{nearest(along, have)}", parameter="along"
                )
            return cls(number=found.dims.index(along), name=along)
        n = len(every[0].info.shape)
        if not -n <= along < n:
            raise DimError(
                f"along: dim {along} is out of range for {shown(every[0].name)}, which has {n} dims", parameter="along"
            )
        names = {v.dims[along]: v.name for v in every if v.dims and -len(v.dims) <= along < len(v.dims)}
        if len(names) > 1:
            said = ", ".join(f"{shown(dim)} of {shown(variable)}" for dim, variable in names.items())
            raise DimError(
                f"along: dim {along} is {said}: give the name of the dim that files are joined along (--along NAME), or pick "
                "variables (--tensor)",
                parameter="along",
                allowed=[shown(dim) for dim in names],
            )
        return cls(number=along % n, name=every[0].dims[along] if every[0].dims else None)

    def dim(self, variable: Variable) -> int | None:
        """The variable's dim to join along; None where it lacks it."""
        if self.name is not None and variable.dims is not None:
            return variable.dims.index(self.name) if self.name in variable.dims else None
        return self.number if self.number < len(variable.info.shape) else None

    def __str__(self) -> str:
        return f"dim {self.number}" if self.name is None else self.name


def names(variables: Variables) -> list[str]:
    return [
        *variables.computed,
        *variables.coordinates,
        *(n for n in variables.side_inputs if n not in variables.coordinates),
    ]


def variable_of(part: Part, name: str, first: Part) -> Variable:
    extra = [known for known in part.variables.computed if known not in first.variables.computed]
    for group in (part.variables.computed, part.variables.coordinates, part.variables.side_inputs):
        if name in group and not extra:
            return group[name]
    wrong, has, lacks = (extra[0], part, first) if extra else (name, first, part)
    raise UnknownTensorError(
        f"{lacks.title} has no {shown(wrong)}, which {has.title} has: files that are joined have the same variables; "
        "tensor (--tensor) picks some",
        parameter="tensor",
    )


def with_title(part: Part, check: Callable[[], None]) -> None:
    try:
        check()
    except MaskserveError as error:
        error.message = f"{part.title}: {error.message}"
        raise


def check_alike(variable: Variable, first: Variable, along: Along, title: str) -> None:
    """Raise where a variable differs from the first part's in more than its size along the dim."""
    mine, theirs = variable.info, first.info
    dim = along.dim(first)
    if mine.dtype is not theirs.dtype:
        raise ShapeError(
            f"{shown(variable.name)} is {mine.dtype.name}, in {title} {theirs.dtype.name}; joined files agree"
        )
    if variable.dims != first.dims:
        raise ShapeError(
            f"{shown(variable.name)} has {dims_text(variable.dims)}, in {title} {dims_text(first.dims)}; joined files agree in "
            "the names of dims (maskserve.dims in the metadata), or have none"
        )
    own, others = [*mine.shape], [*theirs.shape]
    if dim is not None and dim < min(len(own), len(others)):
        own[dim] = others[dim] = 0
    if own != others:
        raise ShapeError(
            f"{shown(variable.name)} has shape {shown_shape(mine.shape)}, in {title} {shown_shape(theirs.shape)}; files that "
            f"are joined along {along} agree in all other dims"
        )


def dims_text(dims: Dims | None) -> str:
    return "no names of dims" if dims is None else f"the dims {', '.join(map(shown, dims))}"


def refuse_other_cells(part: Part, variable: Variable, first: Part, own: Variable) -> None:
    """Raise where what lacks the dim is not the same in two payloads; they are compared some cells at a time."""
    here, there = cells_of(part, variable), cells_of(first, own)
    n_cells = variable.info.n_cells
    if any(here(at, n) != there(at, n) for at, n in counted_out(n_cells, BLOCK_CELLS)):
        raise ShapeError(
            f"{part.title}: {shown(variable.name)} differs from {first.title}'s, and lacks the dim that files are joined "
            "along: its cells must be the same in each"
        )


def counted_out(n: int, step: int) -> Iterator[tuple[int, int]]:
    """Where each part begins of n cells, and how many it has.

    >>> [*counted_out(5, 2)]
    [(0, 2), (2, 2), (4, 1)]
    """
    return ((start, min(step, n - start)) for start in range(0, n, step))


def cells_of(part: Part, variable: Variable) -> Callable[[int, int], tuple[memoryview, bytes]]:
    """Some cells as they lie, and which are valid, a byte each, in whatever form the mask is: no mask is one that is true."""
    valid, width = validity_of(part.payload, variable), variable.info.dtype.n_bytes

    def some(start: int, n: int) -> tuple[memoryview, bytes]:
        found = bytearray(n)
        fill_validity(valid, False, [start], memoryview(found))
        return part.payload.read_range(variable.name, start * width, n * width), bytes(found)

    return some


def joined(
    name: str, dtype: DType, shapes: Sequence[Shape], dim: int, fills: Sequence[Fill], maps: Sequence[Map],
    expects: Sequence[Expect],
) -> Pieces:  # fmt: skip
    inner = [prod(shape[dim:]) * dtype.n_bytes for shape in shapes]
    shape = shapes[0] if len(shapes) == 1 else (*shapes[0][:dim], sum(s[dim] for s in shapes), *shapes[0][dim + 1 :])
    output, starts = Output(name, dtype, shape, ()), (0, *accumulate(inner))
    return Pieces(output=output, fills=tuple(fills), maps=tuple(maps), expects=tuple(expects), starts=starts)


def can_join(shape: Shape, first: Shape, dim: int, variable: Variable, kind: MaskKind) -> bool:
    """Whether masks of one kind lie side by side as their tensors do."""
    if dim >= len(shape) or (kind is MaskKind.BITMASK and dim == len(shape) - 1):
        return False
    return shape[dim] == variable.info.shape[dim] and [*shape[:dim], *shape[dim + 1 :]] == [
        *first[:dim],
        *first[dim + 1 :],
    ]


def validity_of(payload: Payload, variable: Variable) -> Validity | None:
    return None if variable.mask is None else validity(payload, variable.info, variable.mask)


def fill_validity(valid: Validity | None, is_inverted: bool, starts: Sequence[int], view: memoryview) -> None:
    """Bytes that say which cells are valid, or which are missing."""
    import numpy as np

    n, into = view.nbytes // len(starts), np.frombuffer(view, np.bool_)
    for i, start in enumerate(starts):
        own = into[i * n : (i + 1) * n]
        own[:] = True if valid is None else valid(start, n)
    if is_inverted:
        np.logical_not(into, out=into)
