"""148 hostile and odd payloads, made by code, each with the verdict it must get.

A: container, B: JSON, C: offsets, D: shapes and dtypes, E: names, F: amplification, G: cells and masks. Large ones are
described, not built: a Source gives any range of its bytes, and counts what was asked of it.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from maskserve.errors import (
    MaskDtypeError,
    MaskShapeError,
    NotComputableError,
    OrphanMaskError,
    PayloadError,
    TooLargeError,
)

ACCEPTED = None
Verdict: TypeAlias = type[Exception] | None


class Source:
    """`head`, then `unit` `times` over, then `tail`, made range by range; `largest` is the longest range asked for."""

    def __init__(self, head: bytes, unit: bytes = b"", times: int = 0, tail: bytes = b"") -> None:
        self.head, self.unit, self.times, self.tail = head, unit, times, tail
        self.total = len(head) + len(unit) * times + len(tail)
        self.largest = 0

    def read(self, offset: int, n: int) -> bytes:
        self.largest = max(self.largest, n)
        middle = len(self.head) + len(self.unit) * self.times
        parts = [self.head[offset : offset + n]]
        if self.unit:
            start, stop = max(offset, len(self.head)), min(offset + n, middle)
            first, last = (start - len(self.head)) // len(self.unit), -(-(stop - len(self.head)) // len(self.unit))
            skip = (start - len(self.head)) % len(self.unit)
            parts.append((self.unit * max(last - first, 0))[skip : skip + max(stop - start, 0)])
        parts.append(self.tail[max(offset - middle, 0) : max(offset + n - middle, 0)])
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    what: str
    must: Verdict
    make: Callable[[], bytes | Source]

    def source(self) -> Source:
        made = self.make()
        return made if isinstance(made, Source) else Source(made)


def container(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """Header length, header and data; `header` is text, bytes or what json.dumps makes of it."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(dtype: Any, shape: Any, n_bytes: int, *, begin: Any = 0, end: Any = None, body: int | None = None) -> bytes:
    """A payload of one tensor, x."""
    end = n_bytes if end is None else end
    return container({"x": entry(dtype, shape, begin, end)}, bytes(n_bytes if body is None else body))


def raw(text: str | bytes, body: int = 1) -> bytes:
    return container(text, bytes(body))


def fields(text: str, body: int = 1) -> bytes:
    """A payload of one tensor, x, whose fields are spelled out."""
    return raw('{"x":{' + text + "}}", body)


def offsets(text: str, body: int = 1) -> bytes:
    return fields('"dtype":"U8","shape":[1],"data_offsets":' + text, body)


def shape(text: str, body: int = 1) -> bytes:
    return fields(f'"dtype":"U8","shape":{text},"data_offsets":[0,{body}]', body)


def dtype(text: str, n_bytes: int = 4, cells: int = 1) -> bytes:
    return fields(f'"dtype":{text},"shape":[{cells}],"data_offsets":[0,{n_bytes}]', n_bytes)


def named(name: str) -> bytes:
    return raw('{"' + name + '":' + GOOD + "}")


def masked(x: bytes, mask_dtype: str, mask_shape: list[int], mask: bytes) -> bytes:
    """Float32 x and its mask, as two tensors."""
    header = {
        "x": entry("F32", [len(x) // 4], 0, len(x)),
        "mask": entry(mask_dtype, mask_shape, len(x), len(x) + len(mask)),
    }
    return container(header, x + mask)


def two(x: tuple[Any, ...], y: tuple[Any, ...], body: int, names: str = "xy") -> bytes:
    return container({names[0]: entry(*x), names[1]: entry(*y)}, bytes(body))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(6))
    return file.getvalue()[:128]


def padded(pad: bytes) -> bytes:
    return container(HEADER + pad, BODY)


def long_header(head: bytes, unit: bytes, times: int, tail: bytes, body: bytes = b"") -> Source:
    """A payload whose header repeats `unit`: described, not built."""
    n = len(head) + len(unit) * times + len(tail)
    return Source(struct.pack("<Q", n) + head, unit, times, tail + body)


GOOD = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
GOOD_X = '"x":' + GOOD
HEADER = json.dumps(
    {"x": entry("F32", [2, 2], 0, 16), "mask": entry("BOOL", [2, 2], 16, 20)}, separators=(",", ":")
).encode()
BODY = floats(1, 2, 3, 4) + b"\1\0\1\1"
VALID = container(HEADER, BODY)
DUPLICATE = '"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"%s":{"dtype":"I8","shape":%s,"data_offsets":[%s]}'
META = '{"__metadata__":%s,' + GOOD_X + "}"


CASES: tuple[Case, ...] = (
    Case("A00", "valid control", ACCEPTED, lambda: VALID),
    Case("A01", "empty file", PayloadError, lambda: b""),
    Case("A02", "1 byte", PayloadError, lambda: b"\2"),
    Case("A03", "7 bytes", PayloadError, lambda: bytes(7)),
    Case("A04", "8 zero bytes", PayloadError, lambda: bytes(8)),
    Case("A05", "N = 0, then a body", PayloadError, lambda: container(b"", BODY)),
    Case("A06", "N = 1", PayloadError, lambda: container("{")),
    Case("A07", "no tensors", NotComputableError, lambda: container("{}")),
    Case("A08", "no tensors, but a body", PayloadError, lambda: container("{}", BODY)),
    Case("A09", "header cut", PayloadError, lambda: VALID[:40]),
    Case("A10", "N = file size", PayloadError, lambda: container(HEADER, BODY, len(VALID))),
    Case("A11", "N one too large", PayloadError, lambda: container(HEADER, BODY, len(HEADER) + 1)),
    Case("A12", "N one too small", PayloadError, lambda: container(HEADER, BODY, len(HEADER) - 1)),
    Case("A13", "N = 2^63", PayloadError, lambda: container("{}", length=2**63)),
    Case("A14", "N = 2^64 - 1", PayloadError, lambda: container("{}", length=2**64 - 1)),
    Case("A15", "N = 2^64 - 8, so that 8 + N wraps", PayloadError, lambda: container("{}", length=2**64 - 8)),
    Case("A16", "N beyond the format's cap", TooLargeError, lambda: container("{}", length=100_000_001)),
    Case("A17", "N at the format's cap, file short", PayloadError, lambda: container("{}", length=100_000_000)),
    Case("A18", "big-endian N", PayloadError, lambda: struct.pack(">Q", 2) + b"{}"),
    Case("A19", "body short by 1", PayloadError, lambda: VALID[:-1]),
    Case("A20", "no body", PayloadError, lambda: container(HEADER)),
    Case("A21", "1 byte too many", PayloadError, lambda: VALID + b"\0"),
    Case("A22", "1 MiB too many", PayloadError, lambda: Source(VALID, b"\0", 2**20)),
    Case("A23", "two files in one", PayloadError, lambda: VALID + VALID),
    Case("A24", "byte order mark", PayloadError, lambda: container(b"\xef\xbb\xbf" + HEADER, BODY)),
    Case("A25", "leading space", PayloadError, lambda: container(b" " + HEADER, BODY)),
    Case("A26", "NULs after the header", PayloadError, lambda: padded(b"\0\0\0")),
    Case("A27", "tabs and newlines after the header", PayloadError, lambda: padded(b"\t\n\r ")),
    Case("A28", "8 MiB of spaces", TooLargeError, lambda: long_header(HEADER, b" ", 2**23, b"", BODY)),
    Case("A29", "gzip", PayloadError, lambda: gzip.compress(VALID, mtime=1_700_000_000)),
    Case("A30", "zip", PayloadError, lambda: b"PK\3\4" + bytes(60)),
    Case("A31", "pickle", PayloadError, lambda: pickle.dumps({"x": 1}, protocol=4)),
    Case("A32", "npy", PayloadError, npy),
    Case("B01", "header is a list", PayloadError, lambda: container("[]")),
    Case("B02", "header is null", PayloadError, lambda: container("null")),
    Case("B03", "header is a number", PayloadError, lambda: container("1234")),
    Case("B04", "header is a string", PayloadError, lambda: container('"abc"')),
    Case("B05", "not JSON", PayloadError, lambda: container("{hello}")),
    Case("B06", "single quotes", PayloadError, lambda: container("{'x':1}")),
    Case("B07", "trailing comma", PayloadError, lambda: raw("{" + GOOD_X + ",}")),
    Case("B08", "comment", PayloadError, lambda: container("{/*hi*/}")),
    Case("B09", "invalid UTF-8", PayloadError, lambda: raw(b'{"\xff":' + GOOD.encode() + b"}")),
    Case("B10", "lone surrogate", PayloadError, lambda: named("\\ud800")),
    Case("B11", "overlong UTF-8", PayloadError, lambda: raw(b'{"\xc0\x80":' + GOOD.encode() + b"}")),
    Case("B12", "100,000 levels", PayloadError, lambda: raw('{"x":' + "[" * 100_000 + "]" * 100_000 + "}")),
    Case("B13", "100,000 levels in an unknown field", PayloadError,
         lambda: fields(GOOD[1:-1] + ',"y":' + "[" * 100_000 + "]" * 100_000)),
    Case("B14", "unknown field", PayloadError, lambda: fields(GOOD[1:-1] + ',"y":1')),
    Case("B15", "no dtype", PayloadError, lambda: fields('"shape":[1],"data_offsets":[0,1]')),
    Case("B16", "no shape", PayloadError, lambda: fields('"dtype":"U8","data_offsets":[0,1]')),
    Case("B17", "no data_offsets", PayloadError, lambda: fields('"dtype":"U8","shape":[1]')),
    Case("B18", "tensor is null", PayloadError, lambda: raw('{"x":null}')),
    Case("B19", "tensor is a list", PayloadError, lambda: raw('{"x":["U8",[1],[0,1]]}')),
    Case("B20", "a name twice, same bytes", PayloadError,
         lambda: raw("{" + DUPLICATE % ("x", "[1,2]", "0,2") + "}", 2)),
    Case("B21", "a name twice, other bytes", PayloadError, lambda: raw("{" + DUPLICATE % ("x", "[2]", "2,4") + "}", 4)),
    Case("B22", "a name twice, once escaped", PayloadError,
         lambda: raw("{" + DUPLICATE % ("\\u0078", "[2]", "0,2") + "}", 2)),
    Case("B23", "a field twice", PayloadError, lambda: fields('"dtype":"U8",' + GOOD[1:-1])),
    Case("B24", "__metadata__ twice", PayloadError,
         lambda: raw('{"__metadata__":{},"__metadata__":{},' + GOOD_X + "}")),
    Case("B25", "a metadata key twice", PayloadError, lambda: raw(META % '{"a":"1","a":"2"}')),
    Case("B26", "metadata is a number", PayloadError, lambda: raw(META % '{"a":1}')),
    Case("B27", "metadata is nested", PayloadError, lambda: raw(META % '{"a":{"b":"c"}}')),
    Case("B28", "metadata is a list", PayloadError, lambda: raw(META % "[1]")),
    Case("B29", "metadata is null", PayloadError, lambda: raw(META % "null")),
    Case("B30", "10 MiB of metadata", TooLargeError,
         lambda: long_header(b'{"__metadata__":{"a":"', b"a", 10 * 2**20, ('"},' + GOOD_X + "}").encode(), b"\0")),
    Case("C01", "overlap, same range", PayloadError, lambda: two(("U8", [4], 0, 4), ("U8", [4], 0, 4), 4)),
    Case("C02", "overlap in part", PayloadError, lambda: two(("U8", [4], 0, 4), ("U8", [4], 2, 6), 6)),
    Case("C03", "hole between", PayloadError, lambda: two(("U8", [4], 0, 4), ("U8", [4], 8, 12), 12)),
    Case("C04", "hole at the start", PayloadError, lambda: one("U8", [4], 4, begin=4, end=8, body=8)),
    Case("C05", "begin after end", PayloadError, lambda: offsets("[1,0]")),
    Case("C06", "negative begin", PayloadError, lambda: offsets("[-4,0]")),
    Case("C07", "end beyond the file", PayloadError, lambda: one("U8", [100], 100, body=4)),
    Case("C08", "offset 2^63", PayloadError, lambda: offsets(f"[{2**63},{2**63 + 1}]")),
    Case("C09", "offset 2^64 - 1", PayloadError, lambda: offsets(f"[0,{2**64 - 1}]")),
    Case("C10", "offset 2^64", PayloadError, lambda: offsets(f"[0,{2**64}]")),
    Case("C11", "float offsets", PayloadError, lambda: offsets("[0.0,1.0]")),
    Case("C12", "offsets with exponents", PayloadError, lambda: offsets("[0,1e0]")),
    Case("C13", "string offsets", PayloadError, lambda: offsets('["0","1"]')),
    Case("C14", "3 offsets", PayloadError, lambda: offsets("[0,1,1]")),
    Case("C15", "1 offset", PayloadError, lambda: offsets("[0]")),
    Case("C16", "offsets as an object", PayloadError, lambda: offsets('{"0":0,"1":1}')),
    Case("C17", "leading zeros", PayloadError, lambda: offsets("[00,01]")),
    Case("C18", "offset -0", PayloadError, lambda: offsets("[-0,1]")),
    Case("C19", "zero-size at the same offset", ACCEPTED, lambda: two(("U8", [4], 0, 4), ("F32", [0], 0, 0), 4)),
    Case("C20", "zero-size inside another", PayloadError, lambda: two(("U8", [4], 0, 4), ("F32", [0], 2, 2), 4)),
    Case("C21", "zero-size at the end", ACCEPTED, lambda: two(("U8", [4], 0, 4), ("F32", [0], 4, 4), 4)),
    Case("C22", "header in another order", ACCEPTED, lambda: two(("U8", [1], 1, 2), ("U8", [1], 0, 1), 2)),
    Case("D01", "too few bytes", PayloadError, lambda: one("F32", [2], 4)),
    Case("D02", "too many bytes", PayloadError, lambda: one("F32", [2], 16)),
    Case("D03", "product wraps to 0", PayloadError, lambda: one("U8", [2**32, 2**32], 0)),
    Case("D04", "product wraps to 4", PayloadError, lambda: one("U8", [2**63 + 2, 2], 4)),
    Case("D05", "bytes wrap", PayloadError, lambda: one("F32", [2**62], 0)),
    Case("D07", "overflow, then 0", PayloadError, lambda: one("U8", [2**63, 2**63, 0], 0)),
    Case("D09", "a huge dim of nothing", NotComputableError, lambda: one("U8", [0, 2**62], 0)),
    Case("D10", "a large dim of nothing", ACCEPTED, lambda: one("F32", [2**31, 0], 0)),
    Case("D11", "dim -1", PayloadError, lambda: shape("[-1]")),
    Case("D12", "dims -2, -2", PayloadError, lambda: shape("[-2,-2]", 4)),
    Case("D13", "float dim", PayloadError, lambda: shape("[1.0]")),
    Case("D14", "dim 1e400", PayloadError, lambda: shape("[1e400]")),
    Case("D15", "dim NaN", PayloadError, lambda: shape("[NaN]")),
    Case("D16", "dim true", PayloadError, lambda: shape("[true]")),
    Case("D17", "shape is a number", PayloadError, lambda: shape("1")),
    Case("D18", "shape is null", PayloadError, lambda: shape("null")),
    Case("D19", "nested shape", PayloadError, lambda: shape("[[1]]")),
    Case("D20", "0-d", ACCEPTED, lambda: one("F32", [], 4)),
    Case("D21", "0-d without bytes", PayloadError, lambda: one("F32", [], 0)),
    Case("D22", "64 dims", NotComputableError, lambda: one("U8", [1] * 64, 1)),
    Case("D23", "65 dims", NotComputableError, lambda: one("U8", [1] * 65, 1)),
    Case("D24", "1,000,000 dims: the header's cap comes first", TooLargeError, lambda: one("U8", [1] * 1_000_000, 1)),
    Case("D25", "unknown dtype", NotComputableError, lambda: dtype('"Q7"')),
    Case("D26", "lower-case dtype", NotComputableError, lambda: dtype('"f32"')),
    Case("D27", "dtype null", NotComputableError, lambda: dtype("null")),
    Case("D28", "dtype 1", NotComputableError, lambda: dtype("1")),
    Case("D29", "F4, odd count", PayloadError, lambda: dtype('"F4"', 2, 3)),
    Case("D30", "F4, even count", NotComputableError, lambda: dtype('"F4"', 2, 4)),
    Case("D31", "F6_E2M3", NotComputableError, lambda: dtype('"F6_E2M3"', 3, 4)),
    Case("D32", "F8_E8M0", NotComputableError, lambda: dtype('"F8_E8M0"', 2, 2)),
    Case("D33", "F8_E4M3", ACCEPTED, lambda: dtype('"F8_E4M3"', 2, 2)),
    Case("D34", "C64", ACCEPTED, lambda: dtype('"C64"', 8)),
    Case("D35", "U64 beyond 2^63", ACCEPTED, lambda: container({"x": entry("U64", [1], 0, 8)}, b"\xff" * 8)),
    Case("D36", "C128", NotComputableError, lambda: dtype('"C128"', 16)),
    Case("E01", "empty name", NotComputableError, lambda: named("")),
    Case("E02", "10 MiB name: the header's cap comes first", TooLargeError,
         lambda: long_header(b'{"', b"a", 10 * 2**20, ('":' + GOOD + "}").encode(), b"\0")),
    Case("E03", "NUL in a name", NotComputableError, lambda: named("a\\u0000b")),
    Case("E04", "newline and ANSI escape in a name", NotComputableError, lambda: named("a\\n\\u001b[31mERR")),
    Case("E05", "raw control character in a name", PayloadError, lambda: named("a\1b")),
    Case("E06", "a path as name", ACCEPTED, lambda: named("../../etc/passwd")),
    Case("E07", "only metadata", NotComputableError, lambda: container('{"__metadata__":{"a":"b"}}')),
    Case("E08", "composed and decomposed name", ACCEPTED,
         lambda: two(("U8", [1], 0, 1), ("U8", [1], 1, 2), 2, names=["\u00e9", "e\u0301"])),  # type: ignore[arg-type]
    Case("E09", "right-to-left override", NotComputableError, lambda: named("\\u202egnp.x")),
    Case("F01", "100,000 tensors of a byte", TooLargeError, lambda: many(100_000, 1)),
    Case("F02", "1,000,000 tensors of a byte", TooLargeError, lambda: many(1_000_000, 1)),
    Case("F03", "1,000,000 tensors of nothing", TooLargeError, lambda: many(1_000_000, 0)),
    Case("F04", "99 MB of spaces", TooLargeError, lambda: long_header(HEADER, b" ", 98_999_890, b"", BODY)),
    Case("F05", "a number of 90 MB", TooLargeError,
         lambda: long_header(b'{"x":{"dtype":"U8","shape":[', b"0", 90_000_000, b'],"data_offsets":[0,1]}}', b"\0")),
    Case("F06", "45 million dims: the header's cap comes first", TooLargeError,
         lambda: long_header(b'{"x":{"dtype":"U8","shape":[', b"1,", 45_000_000, b'1],"data_offsets":[0,1]}}', b"\0")),
    Case("F07", "3 million pairs of metadata", TooLargeError,
         lambda: long_header(b'{"__metadata__":{', b'"k1234":"v",', 3_000_000, b'"k":"v"}}')),
    Case("F08", "a list of 40 million in an unknown field", TooLargeError,
         lambda: long_header(b'{"x":{' + GOOD[1:-1].encode() + b',"y":[', b"1,", 44_999_980, b"1]}}", b"\0")),
    Case("G01", "BOOL byte 2", MaskDtypeError, lambda: masked(floats(1, 2, 3, 4), "BOOL", [4], b"\1\2\0\1")),
    Case("G02", "NaN and inf", ACCEPTED,
         lambda: container({"x": entry("F32", [4], 0, 16)}, floats(math.nan, math.inf, -math.inf, 1))),
    Case("G03", "signalling NaN", ACCEPTED, lambda: container({"x": entry("F32", [1], 0, 4)}, b"\1\0\xa0\x7f")),
    Case("G04", "all masked", ACCEPTED, lambda: masked(floats(1, 2, 3, 4), "BOOL", [4], bytes(4))),
    Case("G05", "F64 at an odd offset", ACCEPTED, lambda: two(("U8", [1], 0, 1), ("F64", [2], 1, 17), 17)),
    Case("G06", "odd header length", ACCEPTED, lambda: odd_header()),
    Case("G07", "mask U8 of 0 and 1", ACCEPTED, lambda: masked(floats(1, 2), "U8", [2], b"\1\0")),
    Case("G08", "mask F32", MaskDtypeError, lambda: masked(floats(1, 2), "F32", [2], floats(1, 0))),
    Case("G09", "mask of another shape", MaskShapeError, lambda: masked(floats(1, 2), "BOOL", [3], b"\1\0\1")),
    Case("G10", "mask that broadcasts", ACCEPTED, lambda: masked(floats(1, 2), "BOOL", [1], b"\1")),
    Case("G11", "no mask", ACCEPTED, lambda: one("F32", [2], 8)),
    Case("G12", "only a mask", OrphanMaskError, lambda: container({"mask": entry("BOOL", [2], 0, 2)}, b"\1\0")),
)  # fmt: skip


def many(n: int, n_bytes: int) -> Source:
    """About `n` tensors of `n_bytes`; the same name over and over, since nobody may get as far as reading them."""
    unit = b'"t0000000":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]},' % (n_bytes, n_bytes)
    return long_header(b"{", unit, n - 1, unit[:-1] + b"}", bytes(n_bytes * n))


def odd_header() -> bytes:
    text = json.dumps({"x": entry("F64", [2], 0, 16)}, separators=(",", ":"))
    return container(text + " " * (1 - len(text) % 2), floats(*[1.0] * 4))


@contextmanager
def at_most(n_bytes: int, seconds: float) -> Iterator[None]:
    """Fails when the block allocates or lasts more."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        yield
        peak, spent = tracemalloc.get_traced_memory()[1], time.perf_counter() - started
    finally:
        tracemalloc.stop()
    assert peak <= n_bytes, f"{peak} bytes allocated"
    assert spent <= seconds, f"{spent:.2f} s"
