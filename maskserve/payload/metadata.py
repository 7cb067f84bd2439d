"""What a payload's metadata says of its tensors, and what an answer's metadata says. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, TypeAlias

from maskserve.errors import OrphanMaskError, ParameterError, PayloadError, TooLargeError
from maskserve.payload.header import (
    DEFAULT_LIMITS,
    Header,
    Limits,
    is_encodable,
    metadata_bytes,
    shown,
    strict_json,
)

Means: TypeAlias = Literal["valid", "missing"]
Dims: TypeAlias = tuple[str, ...]
Pairs: TypeAlias = Mapping[str, str]

MEANS: tuple[Means, ...] = ("valid", "missing")
KEY_MASKS, KEY_MEANS, KEY_DIMS = "maskserve.masks", "maskserve.mask_means", "maskserve.dims"
KEY_SHAPES = "maskserve.shapes"
KEY_HISTORY, KEY_VERSION = "maskserve.history", "maskserve.version"


def mask_means_of(metadata: Pairs, asked: str | None) -> Means:
    """What True means in the masks of this payload: the request says it, else the metadata."""
    for given in MEANS:
        if given == (metadata.get(KEY_MEANS, "valid") if asked is None else asked):
            return given
    if asked is None:
        raise PayloadError(
            f"{KEY_MEANS} is {shown(metadata[KEY_MEANS])}; it may be valid or missing", parameter=KEY_MEANS
        )
    raise ParameterError(
        f"mask_means is {shown(asked)}; it may be valid or missing", parameter="mask_means", allowed=MEANS
    )


def mask_pairs(header: Header) -> dict[str, str]:
    """The explicit pairs of the metadata; pairs of tensors that are both gone say nothing about this payload."""
    pairs: dict[str, str] = {}
    for owner, mask in _json_object(header.metadata, KEY_MASKS).items():
        if not isinstance(mask, str) or mask == owner:
            raise PayloadError(f"{KEY_MASKS} must pair the names of tensors and masks", parameter=KEY_MASKS)
        if owner in header.tensors and mask not in header.tensors:
            raise PayloadError(
                f"{KEY_MASKS} says that the mask of {shown(owner)} is {shown(mask)}, which is not in the payload",
                parameter=KEY_MASKS,
            )
        if owner not in header.tensors and mask in header.tensors:
            raise orphan(mask, owner)
        if owner in header.tensors:
            pairs[owner] = mask
    return pairs


def dim_names(header: Header) -> dict[str, Dims]:
    """The names of dims by tensor, as the metadata gives them."""
    dims: dict[str, Dims] = {}
    for name, words in _json_object(header.metadata, KEY_DIMS).items():
        if not isinstance(words, list) or not all(is_dim_name(word) for word in words):
            raise PayloadError(f"{KEY_DIMS} of {shown(name)} must be a list of names", parameter=KEY_DIMS)
        if len(set(words)) < len(words):
            raise PayloadError(f"{KEY_DIMS} of {shown(name)} has a name twice", parameter=KEY_DIMS)
        if name not in header.tensors:
            continue
        info = header.tensors[name]
        if len(words) != len(info.shape):
            raise PayloadError(
                f"{KEY_DIMS} gives {len(words)} names for {shown(name)}, which has {len(info.shape)} dims",
                parameter=KEY_DIMS,
            )
        dims[name] = tuple(words)
    return dims


def shapes_of(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of sparse tensors by name, as the metadata gives them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sizes in _json_object(header.metadata, KEY_SHAPES).items():
        if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
            raise PayloadError(f"{KEY_SHAPES} of {shown(name)} must be a list of whole numbers", parameter=KEY_SHAPES)
        shapes[name] = tuple(sizes)
    return shapes


def with_shapes(metadata: Pairs, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The metadata, and the shapes of the sparse tensors beside it."""
    return dict(metadata) | ({KEY_SHAPES: _compact({k: list(v) for k, v in shapes.items()})} if shapes else {})


def is_dim_name(word: object) -> bool:
    """Whether it is a text that could stand in a table or a log line."""
    printable = isinstance(word, str) and bool(word) and word.isprintable()
    return printable and len(str(word).encode()) <= DEFAULT_LIMITS.name_bytes


def _json_object(metadata: Pairs, key: str) -> dict[str, object]:
    text = metadata.get(key)
    if text is None:
        return {}
    text = text.strip(" \t\r\n")
    try:
        value, end = strict_json(text, key)
    except PayloadError as error:
        raise PayloadError(error.message, parameter=key) from None
    if not isinstance(value, dict) or text[end:].strip():
        raise PayloadError(f"{key} must be one JSON object", parameter=key)
    if not all(is_encodable(name) for name in value):
        raise PayloadError(f"{key} holds a lone surrogate", parameter=key)
    return value


def answer_metadata(
    metadata: Pairs,
    dims: Mapping[str, Dims],
    history_line: Mapping[str, object] | None,
    version: str,
    limits: Limits = DEFAULT_LIMITS,
) -> dict[str, str]:
    """The metadata of an answer: the question's, less what was said of its masks, plus one line of history.

    The oldest lines go where it would outgrow what a reader accepts.
    """
    ours = (KEY_MASKS, KEY_MEANS, KEY_DIMS, KEY_SHAPES, KEY_HISTORY, KEY_VERSION)
    answer = {key: text for key, text in metadata.items() if key not in ours}
    answer[KEY_VERSION] = version
    if dims:
        answer[KEY_DIMS] = _compact({name: list(words) for name, words in dims.items()})
    n_bytes = metadata_bytes(answer)
    if n_bytes > limits.metadata_bytes:
        raise TooLargeError(f"the answer's metadata has {n_bytes} bytes; at most {limits.metadata_bytes} can be read")
    lines = [line for line in metadata.get(KEY_HISTORY, "").split("\n") if line]
    lines += [] if history_line is None else [_compact(history_line)]
    history = _newest(lines, limits.metadata_bytes - n_bytes - len(KEY_HISTORY))
    return answer | ({KEY_HISTORY: history} if history else {})


def _newest(lines: list[str], n_bytes: int) -> str:
    """The last of `lines` that fit into `n_bytes`, one a line."""
    kept: list[str] = []
    for line in reversed(lines):
        n_bytes -= len(line.encode()) + bool(kept)
        if n_bytes < 0:
            break
        kept.append(line)
    return "\n".join(reversed(kept))


def _compact(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def orphan(name: str, owner: str) -> OrphanMaskError:
    """The error of a mask whose owner is not there."""
    return OrphanMaskError(
        f"{shown(name)} belongs to a variable {shown(owner)}, which is not in the payload; rename it or remove it",
        parameter=shown(name),
    )
