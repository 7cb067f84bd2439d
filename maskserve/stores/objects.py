"""Payloads in objects: read by ranges of one version, the one that the first answer had. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from maskserve.errors import InputError, OutOfMemoryError
from maskserve.payload.files import BytesPayload, Payload, _Ranges
from maskserve.payload.header import DEFAULT_LIMITS, Limits, parse_header
from maskserve.payload.opening import LENGTH_BYTES, decoded, is_json
from maskserve.stores.addresses import Address, object_at
from maskserve.stores.ahead import AHEAD, LEAST_PART, PART, Reader, together
from maskserve.stores.calls import waited
from maskserve.stores.client import Client, Version, client_of

HEAD_BYTES = 1 << 16
"""What the first request asks for: most headers, and small objects whole."""
GAP_BYTES = 1 << 17
"""Bytes between two runs that are read through: another request takes as long as a megabyte."""
LONG_RUN, LONG_RUN_SHARE = 1 << 15, 8
"""Runs that are worth a request of their own: no more than a share of them is read through between them, since what lies there
is often read too, when the next columns are."""
_SERIALS = count()


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that one request fetches, and which of them are wanted: each (start, where in the buffer it goes, how many)."""

    start: int
    end: int
    runs: tuple[tuple[int, int, int], ...]


class ObjectPayload(_Ranges):
    """A payload in an object; threads may read at once. What it reads is of one version, or an error."""

    is_far = True

    def __init__(
        self, address: Address, client: Client, head: memoryview, version: Version, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        """`head` is what the first answer brought of the object, `version` what it said of it."""
        self.address, self.of, self.n_bytes, self.title = address, version, version.n_bytes, address.name
        self.version = version
        self.serial = next(_SERIALS)
        self._client, self._head = client, head
        self._reader = Reader(self)
        refuse_without_tag(address, head, version)
        self.header = parse_header(self._range, self.n_bytes, limits)
        if version.etag:  # of a million small objects not all can be kept
            self._head = head[:0]
            if head.nbytes == self.n_bytes:
                AHEAD.keep(self, head)

    def expect(self, name: str, start_byte: int, n_bytes: int) -> None:
        if self.n_bytes > HEAD_BYTES:
            offset = self._offset(name, start_byte, n_bytes)
            self._reader.expect(offset, offset + n_bytes)

    def fetch(self, start: int, view: memoryview) -> None:
        """Fills `view` from the store, in this thread."""
        self._client.fill(self.address, self.of, start, view)

    def _range(self, offset: int, n: int) -> memoryview:
        try:
            view = memoryview(bytearray(n))
        except (MemoryError, OverflowError) as cause:
            raise OutOfMemoryError(f"{n} bytes of {self.address} do not fit into memory; read it in ranges") from cause
        self._fill(offset, view)
        return view

    def _fill(self, offset: int, view: memoryview) -> None:
        if view.nbytes:
            self._fill_runs([offset], view)

    def _fill_runs(self, offsets: Sequence[int], view: memoryview) -> None:
        n = view.nbytes // len(offsets)
        if not n:
            return
        if offsets[-1] + n <= self._head.nbytes:
            for i, offset in enumerate(offsets):
                view[i * n : (i + 1) * n] = self._head[offset : offset + n]
            return
        if self.n_bytes <= HEAD_BYTES:
            self._reader.side_by_side(offsets, [view[i * n : (i + 1) * n] for i in range(len(offsets))], HEAD_BYTES)
            return
        is_one = offsets[-1] + n - offsets[0] == view.nbytes
        if is_one and (view.nbytes <= PART or self._reader.expects(offsets[0], offsets[0] + view.nbytes)):
            self._reader.fill(offsets[0], view)
            return
        if n < LONG_RUN and self._reader.expects(offsets[0], offsets[-1] + n):  # what lies between is read too
            self._reader.side_by_side(offsets, [view[i * n : (i + 1) * n] for i in range(len(offsets))], PART)
            return
        found = list(spans(offsets, n, gap=GAP_BYTES if n < LONG_RUN else n // LONG_RUN_SHARE))
        size = self._reader.size_of_parts(len(found))
        longest = max(span.end - span.start for span in found)
        if size >= max(LEAST_PART, 2 * longest):
            runs = [run for span in found for run in span.runs]
            self._reader.side_by_side([start for start, _, _ in runs], [view[at : at + n] for _, at, n in runs], size)
            return
        together([partial(self._span, span, view) for span in found])

    def _span(self, span: Span, view: memoryview) -> None:
        """Fills what a span holds of `view`."""
        if len(span.runs) == 1:
            _, at, n = span.runs[0]
            self.fetch(span.start, view[at : at + n])
            return
        held = memoryview(bytearray(span.end - span.start))
        self.fetch(span.start, held)
        for start, at, n in span.runs:
            view[at : at + n] = held[start - span.start : start - span.start + n]

    def close(self) -> None:
        AHEAD.forget(self)

    def __del__(self) -> None:
        if hasattr(self, "serial"):
            self.close()


def refuse_without_tag(address: Address, head: memoryview, version: Version) -> None:
    """What is read in parts needs a tag: parts of two versions would make a third."""
    if not version.etag and head.nbytes < version.n_bytes:
        raise InputError(
            f"{address} has no ETag that tells one version from the next, so that it cannot be read in parts; fetch it first"
        )


def spans(offsets: Sequence[int], n: int, most: int = PART, gap: int = GAP_BYTES) -> Iterator[Span]:
    """Runs of `n` bytes, in rising order, as ranges to fetch: near ones together, and none longer than `most`.

    >>> [(s.start, s.end) for s in spans([0, 10, 100], 10, most=50, gap=20)], [s.end for s in spans([0], 120, most=50)]
    ([(0, 20), (100, 110)], [50, 100, 120])
    """
    held: list[tuple[int, int, int]] = []
    for start, at, length in cut(offsets, n, most):
        if held:
            end = held[-1][0] + held[-1][2]
            if start - end > gap or start + length - held[0][0] > most:
                yield Span(held[0][0], end, tuple(held))
                held = []
        held.append((start, at, length))
    if held:
        yield Span(held[0][0], held[-1][0] + held[-1][2], tuple(held))


def cut(offsets: Sequence[int], n: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Runs as (start, where they go, how many bytes): those that touch are one, and long ones several."""
    first = last = 0
    while first < len(offsets):
        last = first + 1
        while last < len(offsets) and offsets[last] == offsets[last - 1] + n:
            last += 1
        total = (last - first) * n
        for done in range(0, total, most):
            yield offsets[first] + done, first * n + done, min(most, total - done)
        first = last


# -- by their addresses -------------------------------------------------------------------------------------------


def open_object(path: str, limits: Limits = DEFAULT_LIMITS) -> Payload:
    """The payload at an address, safetensors or JSON, told by its bytes."""
    address = object_at(path)
    client = client_of(address)
    head, version = waited(lambda: client.begin(address, HEAD_BYTES))
    if not is_json(bytes(head[:LENGTH_BYTES])):
        return ObjectPayload(address, client, head, version, limits)
    payload = decoded(text_of(address, client, head, version, limits.json_bytes + 1), limits)
    assert isinstance(payload, BytesPayload), "JSON is decoded into memory"
    payload.version = version
    return payload


def text_of(address: Address, client: Client, head: memoryview, version: Version, most: int) -> bytes:
    """The bytes of an object, of a large one the first `most`."""
    refuse_without_tag(address, head, version)
    n = min(version.n_bytes, most)
    if n <= head.nbytes:
        return bytes(head[:n])
    text = memoryview(bytearray(n))
    text[: head.nbytes] = head
    waited(lambda: client.fill(address, version, head.nbytes, text[head.nbytes :]))
    return bytes(text)


def read_object(path: str) -> bytes:
    """All bytes of a small object."""
    address = object_at(path)
    client = client_of(address)
    head, version = waited(lambda: client.begin(address, HEAD_BYTES))
    return text_of(address, client, head, version, version.n_bytes)


def version_of(path: str) -> Version:
    """The version of the object at an address; InputNotFoundError where there is none."""
    address = object_at(path)
    return waited(lambda: client_of(address).version(address))
