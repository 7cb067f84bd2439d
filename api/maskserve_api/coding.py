"""Content codings, gzip and deflate: bodies that expand as they come, never faster than they are read; and replies."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from enum import StrEnum

from starlette.datastructures import Headers

from maskserve.errors import PayloadError
from maskserve.payload.format import Buffer
from maskserve_api.errors import MediaTypeError

PIECE_BYTES = 1 << 18
"""At most so many bytes are expanded at once, in about 1 ms: a chunk of 256 KiB may hold 256 MiB."""
LEVEL = 1
"""Above it, zlib writes fewer bytes a second than most networks carry, for a tenth less of them."""


class Coding(StrEnum):
    """A coding by its name in HTTP; deflate there is zlib's format."""

    GZIP = "gzip"
    DEFLATE = "deflate"

    @property
    def explained(self) -> str:
        """The name, and what it leaves open: many take deflate for the stream without zlib's header."""
        return self + (" (zlib's format, RFC 1950)" if self is Coding.DEFLATE else "")

    @property
    def window_bits(self) -> int:
        """What zlib calls the format."""
        return zlib.MAX_WBITS | (16 if self is Coding.GZIP else 0)


def of_body(headers: Headers) -> Coding | None:
    """The coding of a request's body; MediaTypeError where it is none of ours, or more than one."""
    lines = headers.getlist("content-encoding")
    words = [
        word for line in lines for part in line.split(",") if (word := part.strip().lower()) not in ("", "identity")
    ]
    if not words:
        return None
    if len(words) > 1 or words[0] not in tuple(Coding):
        raise MediaTypeError(
            f"the body's Content-Encoding must be {' or '.join(Coding)}, once, or left out",
            parameter="Content-Encoding",
            allowed=list(Coding),
        )
    return Coding(words[0])


def of_reply(headers: Headers) -> Coding | None:
    """The coding that Accept-Encoding names alone: who lists several may be a proxy that speaks for nobody."""
    word = headers.get("accept-encoding", "").strip().lower()
    return Coding(word) if word in tuple(Coding) else None


class Stream:
    """One compressed stream, expanded piece by piece."""

    def __init__(self, coding: Coding) -> None:
        self.coding = coding
        self._zlib = zlib.decompressobj(coding.window_bits)

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """What `chunk` expands to."""
        left = chunk
        while left:
            if self._zlib.eof:
                raise self._bad("ends before the body does: send one stream")
            try:
                piece = self._zlib.decompress(left, PIECE_BYTES)
            except zlib.error:
                raise self._bad(f"is broken, or is no {self.coding.explained}") from None
            left = self._zlib.unconsumed_tail or self._zlib.unused_data
            if piece:
                yield piece

    def end(self) -> Iterator[bytes]:
        """The last bytes; PayloadError where the stream is cut short."""
        if rest := self._zlib.flush():
            yield rest
        if not self._zlib.eof:
            raise self._bad("is cut short")

    def _bad(self, what: str) -> PayloadError:
        return PayloadError(f"the body's {self.coding} stream {what}", parameter="Content-Encoding")


def compressed(chunks: Iterable[Buffer], coding: Coding) -> list[bytes]:
    """`chunks` as one stream."""
    stream = zlib.compressobj(LEVEL, wbits=coding.window_bits)
    return [piece for chunk in chunks if (piece := stream.compress(chunk))] + [stream.flush()]
