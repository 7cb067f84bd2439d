"""Files and objects in our own two forms, by what they hold: safetensors, or JSON. Imports no torch."""

from __future__ import annotations

import os
import stat

from maskserve.payload.files import Payload, StrPath, open_payload
from maskserve.payload.header import DEFAULT_LIMITS, Limits
from maskserve.stores.addresses import is_address

LENGTH_BYTES = 8


def open_own(path: StrPath, limits: Limits = DEFAULT_LIMITS) -> Payload:
    """The payload of a file, or of the object at an address, in either form; a large one is read where it lies."""
    if is_address(path):
        from maskserve.stores.objects import open_object

        return open_object(os.fspath(path), limits)
    text = json_text(path, limits)
    return open_payload(path, limits) if text is None else decoded(text, limits)


def is_json(first: bytes) -> bool:
    """Whether a payload that begins with these 8 bytes is JSON.

    The length that safetensors begins with has a NUL as its last byte, and JSON text holds none: a header of 123 bytes,
    whose length begins with a brace, is told apart.
    """
    start = first.lstrip(b" \t\r\n\xef\xbb\xbf")
    return b"\0" not in first and (start[:1] in (b"{", b"[") or (not start and bool(first)))


def json_text(path: StrPath, limits: Limits) -> bytes | None:
    """The text of a JSON file; None for any other file, and where the one who opens it says better what is wrong."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb", buffering=0) as file:  # a buffer would read 8 kB to look at 8 bytes
            first = file.read(LENGTH_BYTES)
            return first + file.read(limits.json_bytes + 1 - len(first)) if is_json(first) else None
    except (OSError, ValueError):
        return None


def decoded(text: bytes, limits: Limits) -> Payload:
    from maskserve.payload.json import decode

    return decode(text, limits)
