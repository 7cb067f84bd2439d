"""Payloads from Python: variables of a file as MaskedTensors, and whole requests as the other doors run them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from maskserve.answers import Answer, run
from maskserve.compact import Bits, Compact, Lengths
from maskserve.engine import hidden_as_zero
from maskserve.errors import ConversionWarning, OutputError, ParameterError, UnknownOpError, nearest
from maskserve.gates import hidden
from maskserve.making import as_masked_tensor
from maskserve.opening import open_any
from maskserve.ops import verbs
from maskserve.payload.files import EXISTS, Exists, StrPath
from maskserve.payload.format import Buffer, BytesPayload, Encoded, Output, Payload, encode, encode_header, parse_header
from maskserve.payload.format import save as save_bytes
from maskserve.payload.held import refuse_other_masks
from maskserve.payload.metadata import KEY_DIMS, KEY_MASKS, KEY_MEANS, KEY_SHAPES, Means, answer_metadata, with_shapes
from maskserve.payload.tensors import load as load_parts
from maskserve.payload.tensors import load_sparse, output, sparse_outputs
from maskserve.payload.variables import MASK, MaskKind, Variable, resolve, unknown
from maskserve.payload.writing import in_order
from maskserve.requests import build
from maskserve.sparse import SparseTensor
from maskserve.tensor import MaskedTensor
from maskserve.version import version

COMPANIONS = {Lengths.layout: MaskKind.LENGTHS, Bits.layout: MaskKind.BITMASK}
"""What the masks of a payload are called, by how they are held."""

Source = StrPath | bytes | bytearray | memoryview
Dims = Mapping[str, Sequence[str]]


class Variables(dict[str, MaskedTensor]):
    """Tensors by name, as `load` gives them, with the names of their dims and the file's metadata: `save` keeps both."""

    dims: dict[str, tuple[str, ...]]
    metadata: dict[str, str]


def opened(source: Source) -> Payload:
    """The payload of a file, by path (in a format that docs/convert.md lists), or of safetensors bytes.

    What was left out or decided while a file of another format was read is a ConversionWarning.
    """
    if isinstance(source, Buffer):
        return BytesPayload(source)
    if not isinstance(source, str | os.PathLike):
        raise ParameterError(
            f"a payload is read from a path or from bytes; given a {type(source).__name__}: call it for each payload",
            parameter="source",
        )
    payload = open_any(source)
    for note in getattr(payload, "notes", ()):
        warnings.warn(f"{os.fspath(source)}: {note}", ConversionWarning, stacklevel=3)
    return payload


def load(source: Source, *, mask: str | None = None, mask_means: Means | None = None) -> Variables:
    """Every variable and coordinate of a payload by name, each with its mask; `.dims` has the names of their dims."""
    with opened(source) as payload:
        refuse_other_masks(payload, mask, mask_means)
        variables = resolve(payload.header, mask=mask, mask_means=mask_means)
        every = (*variables, *variables.coordinates.values())
        loaded = Variables({v.name: loaded_tensor(payload, v) for v in every})
        loaded.dims = {v.name: v.dims for v in every if v.dims is not None}
        ours = (KEY_DIMS, KEY_MASKS, KEY_MEANS, KEY_SHAPES)
        loaded.metadata = {key: text for key, text in payload.header.metadata.items() if key not in ours}
        return loaded


def loaded_tensor(payload: Payload, variable: Variable) -> MaskedTensor:
    if variable.stored is None:
        return MaskedTensor._of(*load_parts(payload, variable))
    pattern, values, mask = load_sparse(payload, variable)
    return SparseTensor._on(pattern, MaskedTensor._of(values, mask))


def save(
    tensors: Mapping[str, Any],
    path: StrPath,
    *,
    dims: Dims | None = None,
    metadata: Mapping[str, str] | None = None,
    exists: Exists = "error",
) -> bool:
    """Write tensors as safetensors, each with its mask as NAME.mask; hidden cells are written as 0.

    A mask that is held as lengths or as bits is written so, as NAME.lengths or NAME.bitmask, and comes back so.
    dims: names of the dims of each tensor, {"rain": ("time", "lat")}; a 1-D tensor named like its dim is a coordinate.
    exists: what to do where the file is there already: "error", "replace" or "skip" (then the result is False).
    """
    check_save(tensors, path, exists)
    named = named_dims(tensors, dims)
    outputs: list[Output] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name, given in tensors.items():
        tensor = as_masked_tensor(given)
        check_dims(name, tensor, named.get(name))
        if isinstance(tensor, SparseTensor):
            shapes[name], cells = tuple(tensor.shape), tensor._cells
            own = cells._full_mask()
            values = hidden_as_zero(cells.get_data().detach(), own)
            outputs += sparse_outputs(name, f"{name}.{MASK}", tensor._pattern, values, own)
            continue
        outputs += tensor_outputs(name, tensor, is_coordinate=named.get(name) == (name,))
    kept = dict(metadata if metadata is not None else getattr(tensors, "metadata", {}))
    written = with_shapes(answer_metadata(kept, named, None, version()), shapes)
    return save_bytes(path, readable(outputs, written), exists=exists)


def readable(outputs: Sequence[Output], metadata: Mapping[str, str]) -> Encoded:
    """The payload of the outputs, none that a reader would refuse: its own rules are applied before a byte is written."""
    made, head = encode(outputs, metadata), encode_header(in_order(outputs), metadata)
    resolve(parse_header(lambda offset, n: head[offset : offset + n], made.n_bytes))
    return made


def tensor_outputs(name: str, tensor: MaskedTensor, *, is_coordinate: bool) -> list[Output]:
    """The tensor with what it hides as 0, and its mask in the form in which it is held."""
    data, held = tensor.get_data().detach().resolve_conj().resolve_neg(), tensor._held
    if isinstance(held, Compact) and not is_coordinate:
        return [
            output(name, hidden(data, held, in_place=False)),
            output(f"{name}.{COMPANIONS[held.layout]}", held.written()),
        ]
    whole = output(name, hidden_as_zero(data, None if held is None else tensor._full_mask()))
    if is_coordinate and held is None:  # it has a mask only if it needs one
        return [whole]
    return [whole, output(f"{name}.{MASK}", tensor.get_mask())]


def check_save(tensors: Mapping[str, Any], path: StrPath, exists: Exists) -> None:
    if not isinstance(tensors, Mapping):
        raise ParameterError(
            f"save takes tensors by name, then the path: save({{'x': tensor}}, 'x.safetensors'); given a "
            f"{type(tensors).__name__}",
            parameter="tensors",
        )
    if exists not in EXISTS:
        raise ParameterError(f"exists is {exists!r}; it must be one of {', '.join(EXISTS)}", parameter="exists")
    if os.path.splitext(os.fspath(path))[1] not in ("", ".safetensors"):
        raise OutputError(
            f"{os.fspath(path)}: save writes safetensors; name it .safetensors, and convert_file makes others of it"
        )
    for name in tensors:
        if not isinstance(name, str):
            raise ParameterError(
                f"tensors has the name {name!r}, a {type(name).__name__}; a name is a str", parameter="tensors"
            )
        if name == MASK or name.rpartition(".")[2] in tuple(MaskKind):
            raise ParameterError(
                f"{name!r} is the name of a mask in a payload; call the tensor something else", parameter="tensors"
            )


def named_dims(tensors: Mapping[str, Any], dims: Dims | None) -> dict[str, tuple[str, ...]]:
    """The names of dims by tensor, as they are given, else as `load` found them."""
    if dims is None:
        return {name: words for name, words in getattr(tensors, "dims", {}).items() if name in tensors}
    for name, words in dims.items():
        if name not in tensors:
            raise unknown(str(name), tensors, parameter="dims")
        if isinstance(words, str) or not isinstance(words, Sequence):
            raise ParameterError(
                f"dims of {name} is {words!r}; give a name for each dim, such as ('time', 'lat')", parameter="dims"
            )
    return {name: tuple(words) for name, words in dims.items()}


def check_dims(name: str, tensor: MaskedTensor, words: tuple[str, ...] | None) -> None:
    if words is not None and len(words) != tensor.ndim:
        raise ParameterError(f"{name} has {tensor.ndim} dims, and dims names {len(words)}: {words}", parameter="dims")


def compute(verb: str, source: Source, *, sides: Mapping[str, Source] | None = None, **words: Any) -> Answer:
    """The answer of `maskserve VERB --word ... SOURCE`; `.to_bytes()` is what the command line and the service give.

    sides: payloads by the word that stands for them, where a parameter names a tensor: {"and": "m"} with {"m": path}.

    >>> compute("reduce", "rain.safetensors", op="mean", dim="time")  # doctest: +SKIP
    >>> compute("mask", "rain.safetensors", valid_range=(0, 100), **{"and": "quality"})  # doctest: +SKIP
    """
    if verb not in verbs():
        raise UnknownOpError(
            f"verb {verb!r} is not known: give one of {', '.join(verbs())}{nearest(verb, verbs())}",
            parameter="verb",
            allowed=verbs(),
        )
    with ExitStack() as stack:
        payload = stack.enter_context(opened(source))
        others = {word: stack.enter_context(opened(side)) for word, side in (sides or {}).items()}
        return run(build(verb, words), payload, others)
