"""Any file as a payload: in one of our own forms, or in the format that its suffix says. Imports no torch."""

from __future__ import annotations

import os

from maskserve.convert.formats import by_suffix
from maskserve.errors import InputError
from maskserve.payload.files import Payload, StrPath
from maskserve.payload.header import DEFAULT_LIMITS, Limits, shown
from maskserve.payload.opening import open_own
from maskserve.stores.addresses import is_address


def open_any(path: StrPath, limits: Limits = DEFAULT_LIMITS) -> Payload:
    """The payload of a file of any format that maskserve reads, or of an object in one of our own."""
    format = by_suffix(os.fspath(path))
    if format is None or format.is_ours:
        return open_own(path, limits)
    if is_address(path):
        raise InputError(
            f"{shown(os.fspath(path))}: objects are read as safetensors or JSON; fetch one of {format.name}, then convert it"
        )
    from maskserve.convert.files import open_foreign  # which most files do without

    return open_foreign(path, limits)
