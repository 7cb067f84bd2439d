"""A safetensors header, read strictly: who may send bytes may also lie about what they are.

The rules are narrower than the safetensors library's, so that whatever is read here, it reads too, and alike. Nothing
is allocated before the header's length is known to be small; no name, number or text is trusted. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from maskserve.dtypes import BY_CODE, DType
from maskserve.errors import NotComputableError, PayloadError, TooLargeError

Buffer: TypeAlias = bytes | bytearray | memoryview
Shape: TypeAlias = tuple[int, ...]

FORMAT_HEADER_BYTES = 100_000_000  # the format's own cap
NOT_A_LENGTH = 2**48  # beyond any file: the first 8 bytes are something else, for example a big-endian number
LARGEST_BYTES = 2**63 - 1  # torch and numpy count bytes and strides in int64
ECHO = 128  # the most that a message repeats of what was sent
KNOWN_BYTES = 2048  # up to which a header is remembered: requests that follow each other mostly have the same
METADATA = "__metadata__"
FIELDS = frozenset({"dtype", "shape", "data_offsets"})

# In the format, but no element of ours: bits per element, to tell a malformed tensor from one we cannot compute on.
TEXT = frozenset(b"\t\n\r" + bytes(range(0x20, 0x7F)))
"""The bytes of plain text; a header's length begins with some, and has a NUL among its 8."""
FOREIGN_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
)
MAGIC: Mapping[bytes, str] = MappingProxyType(
    {
        b"\x1f\x8b": "a gzip stream: unpack it",
        b"\x28\xb5\x2f\xfd": "a zstd stream: unpack it",
        b"PK\x03\x04": "a zip archive (.npz and .pt files are zip archives): convert it",
        b"\x93NUMPY": "a NumPy .npy file: convert it",
        b"\x80\x02": "a Python pickle: never loaded here; convert it where you trust it",
        b"\x80\x03": "a Python pickle: never loaded here; convert it where you trust it",
        b"\x80\x04": "a Python pickle: never loaded here; convert it where you trust it",
        b"\x80\x05": "a Python pickle: never loaded here; convert it where you trust it",
        b"\x89HDF": "an HDF5 or netCDF file: convert it",
        b"CDF": "a netCDF file: convert it",
        b"PAR1": "a Parquet file: convert it",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a reader accepts at most; sizes in bytes of UTF-8 where they measure text."""

    header_bytes: int = 2**20
    metadata_bytes: int = 2**16
    tensors: int = 1024
    dims: int = 32
    name_bytes: int = 256
    dim_size: int = 2**48
    json_bytes: int = 2**24  # a JSON list of empty lists takes some 20 times its text in memory
    json_values: int | None = None  # a list, an object and a key count as four: so much longer takes their parsing


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a payload; `begin` and `end` are bytes from the start of the data."""

    name: str
    dtype: DType
    shape: Shape
    begin: int
    end: int

    @property
    def n_cells(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """All that a payload says about itself: tensors in the order of their bytes, which start at `data_start`."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """What others worked out from the header alone, by what for: as a header is remembered, so is this."""


_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_USER = re.compile(rf"({_SCHEME})(?:[^/?#\s]*@|[^/?#\s:]+:(?!\d{{1,5}}(?:/|$))\S*@)")
"""A secret key may hold a /, so that what comes before an @ is longer than a host."""
_QUERY = re.compile(rf"((?!(?:s3|gs|az)://){_SCHEME}[^?#\s]*)[?#]\S*|((?:s3|gs|az)://[^?\s]*)\?\S*=\S*", re.IGNORECASE)
"""Keys and patterns of stores may have a ? and a #; one that looks like a query of NAME=VALUE is left out too."""


def shown(text: object, limit: int = ECHO) -> str:
    r"""`text` as a message may repeat it: on one line, escaped, and never long.

    >>> shown("rain\x1b[31m")
    'rain\\x1b[31m'

    Nothing is shown as such.

    >>> shown("")
    "''"

    Of an address of the web it leaves out what may be a secret: user, password, and the query of one that is signed.

    >>> shown("https://me:word@host/rain.safetensors?Signature=abc")
    'https://host/rain.safetensors'
    """
    if isinstance(text, str) and "://" in text:
        text = _QUERY.sub(r"\1\2", _USER.sub(r"\1", text))
    if text == "":
        return "''"
    escaped = repr(str(text)[:limit])[1:-1]  # of a member of an enum its word, not its name
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def parse_header(read: Callable[[int, int], Buffer], total_bytes: int, limits: Limits = DEFAULT_LIMITS) -> Header:
    """The header of a payload of `total_bytes`; `read(offset, n)` gives n of its bytes.

    PayloadError where the bytes are malformed, TooLargeError beyond a limit, NotComputableError where they are legal
    and we cannot serve them.
    """
    if total_bytes < 8:
        raise PayloadError(f"{total_bytes} bytes are too few for safetensors, which starts with an 8-byte length")
    first = bytes(read(0, 8))
    n = int.from_bytes(first, "little")
    _check_length(n, first, total_bytes, limits)
    text = bytes(read(8, n))
    return (_known if n <= KNOWN_BYTES else _parsed)(text, total_bytes - 8 - n, limits)


def _parsed(text: bytes, data_bytes: int, limits: Limits) -> Header:
    root = _root(text, limits)
    metadata = check_metadata(root.pop(METADATA, {}), limits)
    if len(root) > limits.tensors:
        raise TooLargeError(f"the payload has {len(root)} tensors; at most {limits.tensors} are read")
    infos = [_tensor(name, entry, limits) for name, entry in root.items()]
    infos.sort(key=lambda info: (info.begin, info.end, info.name))
    _check_coverage(infos, data_bytes)
    return Header(MappingProxyType({info.name: info for info in infos}), MappingProxyType(metadata), 8 + len(text))


_known = lru_cache(maxsize=256)(_parsed)


def is_text(first: bytes) -> bool:
    """Whether bytes that begin so are plain text."""
    return bool(first) and TEXT.issuperset(first)


def _check_length(n: int, first: bytes, total_bytes: int, limits: Limits) -> None:
    """Whether `n` may be a header's length. A lie about the length is malformed, and only then is size the question."""
    if 2 <= n <= min(limits.header_bytes, total_bytes - 8):
        return
    for magic, what in MAGIC.items():
        if first.startswith(magic):
            raise PayloadError(f"these bytes are not safetensors but {what}")
    if n < 2:
        raise PayloadError(f"the header length is {n}; the shortest header, {{}}, has 2 bytes")
    if is_text(first):
        raise PayloadError("these bytes are not safetensors but text")
    if n > NOT_A_LENGTH:
        raise PayloadError(f"these bytes are not safetensors: their first 8 are no little-endian header length ({n})")
    if n <= FORMAT_HEADER_BYTES and n > total_bytes - 8:
        raise PayloadError(f"the header length is {n}, but only {total_bytes - 8} bytes follow: it is cut short")
    raise TooLargeError(f"the header has {n} bytes; at most {limits.header_bytes} are read")


def _root(header: bytes, limits: Limits) -> dict[str, object]:
    if not header.startswith(b"{"):
        raise PayloadError("the header must begin with {, right after its length")
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise PayloadError(f"the header is not UTF-8: bad byte at {error.start}") from None
    root, end = strict_json(text, "the header", max_objects=limits.tensors + 2)
    if text[end:].strip(" "):
        raise PayloadError(f"the header goes on after its closing brace at {end}; only spaces may pad it")
    assert isinstance(root, dict)
    return root


def strict_json(
    text: str, what: str, *, max_objects: int | None = None, numbers: bool = False, constants: bool = False
) -> tuple[object, int]:
    """The first JSON value in `text` and the index after it; duplicate keys, NaN and deep nesting are refused.

    Without `numbers`, only the numbers of a header are legal: whole, not negative, and of at most 20 digits. With
    `constants`, NaN, Infinity and -Infinity are read as the strings that spell them.
    """
    n_objects = 0

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal n_objects
        n_objects += 1
        if max_objects is not None and n_objects > max_objects:
            raise TooLargeError(f"{what} holds more than {max_objects - 2} tensors, the most that are read")
        record = dict(pairs)
        if len(record) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add is None: "not seen before"
            raise PayloadError(f"{what} has the key {shown(twice)} twice")
        return record

    def refuse(word: str) -> NoReturn:
        raise PayloadError(f"{what} holds the number {shown(word, 40)}; expected a whole number from 0 to 2^64 - 1")

    def whole(word: str) -> int:
        return refuse(word) if word.startswith("-") or len(word) > 20 else int(word)

    def constant(word: str) -> NoReturn:
        raise PayloadError(f'{what} holds {word}, which is not JSON; as a value it is the string "{word}"')

    decoder = json.JSONDecoder(
        object_pairs_hook=unique,
        parse_int=None if numbers else whole,
        parse_float=None if numbers else refuse,
        parse_constant=str if constants else constant if numbers else refuse,
    )
    try:
        return decoder.raw_decode(text)
    except RecursionError:
        raise PayloadError(f"{what} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise PayloadError(f"{what} is not JSON: {error.msg} at character {error.pos}") from None
    except PayloadError:
        raise
    except ValueError:  # a number of more digits than int() converts
        raise PayloadError(f"{what} holds a number with too many digits") from None


def check_metadata(value: object, limits: Limits = DEFAULT_LIMITS) -> dict[str, str]:
    """`value` as metadata: strings by string, encodable, and within the limit."""
    if not isinstance(value, dict):
        raise PayloadError(f"{METADATA} must be an object of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise PayloadError(f"{METADATA} must hold strings; {shown(key)} is not one", parameter=shown(key))
        if not (is_encodable(key) and is_encodable(text)):
            raise PayloadError(f"{METADATA} holds a lone surrogate in {shown(key)}", parameter=shown(key))
    n_bytes = metadata_bytes(value)
    if n_bytes > limits.metadata_bytes:
        raise TooLargeError(f"{METADATA} has {n_bytes} bytes; at most {limits.metadata_bytes} are read")
    return value


def metadata_bytes(metadata: Mapping[str, str]) -> int:
    """The size that `Limits.metadata_bytes` bounds: keys and values in UTF-8, without JSON's quotes and escapes."""
    return sum(len(key.encode()) + len(text.encode()) for key, text in metadata.items())


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON's escapes can spell half of a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_name(name: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuses a name that could not stand in a table, a log line or another payload."""
    if not is_encodable(name):
        raise PayloadError(f"a tensor's name holds a lone surrogate: {shown(name)}", parameter=shown(name))
    if len(name.encode()) > limits.name_bytes:
        raise TooLargeError(
            f"a tensor's name has {len(name.encode())} bytes, at most {limits.name_bytes} are read: {shown(name, 40)}",
            parameter=shown(name),
        )
    if not name:
        raise NotComputableError("a tensor has an empty name; give it one")
    if not name.isprintable():
        raise NotComputableError(
            f"a tensor's name holds a character that does not print (a control or bidi character): {shown(name)}",
            parameter=shown(name),
        )


def _tensor(name: str, entry: object, limits: Limits) -> TensorInfo:
    check_name(name, limits)
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        _fail(name, "must be an object with exactly the fields dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_whole(shape):
        _fail(name, "has a shape that is not a list of whole numbers")
    if not (_is_whole(offsets) and len(offsets) == 2):
        _fail(name, "has data_offsets that are not two whole numbers")
    if len(shape) > limits.dims:
        _refuse(name, f"has {len(shape)} dims; at most {limits.dims} are computed on")
    begin, end = offsets
    dtype = _dtype(name, entry["dtype"], shape)
    n_bytes = check_shape(name, dtype, tuple(shape), limits)
    if end - begin != n_bytes:
        _fail(name, f"has {end - begin} bytes; {dtype.code} of shape {shown_shape(shape)} takes {n_bytes}")
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _is_whole(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # a bool is an int, but no size


def _dtype(name: str, code: object, shape: list[int]) -> DType:
    held = BY_CODE.get(code) if isinstance(code, str) else None
    if held is not None:
        return held
    bits = FOREIGN_BITS.get(code) if isinstance(code, str) else None
    if bits is not None and math.prod(shape) * bits % 8:
        _fail(name, f"has {math.prod(shape)} elements of {bits} bits, which do not fill whole bytes")
    raise NotComputableError(
        f"tensor {shown(name)} has dtype {shown(code, 40)}, which is not computed on: give one of {', '.join(BY_CODE)}",
        parameter=shown(name),
        allowed=BY_CODE,
    )


def check_shape(name: str, dtype: DType, shape: Shape, limits: Limits = DEFAULT_LIMITS) -> int:
    """The bytes of a tensor, once its shape is known to be one that torch and numpy can hold."""
    spanned = dtype.n_bytes
    for size in shape:
        spanned *= max(size, 1)  # a size of 0 hides nothing: its strides overflow all the same
        if spanned > LARGEST_BYTES:
            _fail(name, f"has shape {shown_shape(shape)}, whose size overflows 2^63 bytes")
    if max(shape, default=0) > limits.dim_size:
        _refuse(name, f"has a dim of {max(shape)} cells; at most {limits.dim_size} are computed on")
    return math.prod(shape) * dtype.n_bytes


def _check_coverage(infos: list[TensorInfo], data_bytes: int) -> None:
    at = 0
    for info in infos:
        if info.begin != at:
            kind = "a hole before it" if info.begin > at else "an overlap"
            _fail(info.name, f"starts at byte {info.begin} of the data, where {at} is due: {kind}")
        at = info.end
    if at != data_bytes:
        raise PayloadError(f"the tensors take {at} bytes, but {data_bytes} follow the header: they must be the same")


def shown_shape(shape: list[int] | Shape) -> str:
    """A shape as torch prints one, cut where it is long."""
    return shown(str(tuple(shape)))


def _fail(name: str, what: str) -> NoReturn:
    raise PayloadError(f"tensor {shown(name)} {what}", parameter=shown(name))


def _refuse(name: str, what: str) -> NoReturn:
    raise NotComputableError(f"tensor {shown(name)} {what}", parameter=shown(name))
