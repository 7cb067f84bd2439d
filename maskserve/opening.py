"""Any file as a payload: in one of our own forms, or in the format that its suffix says. Imports no torch."""

from __future__ import annotations

import os

from maskserve.convert.formats import by_suffix
from maskserve.payload.files import Payload, StrPath
from maskserve.payload.header import DEFAULT_LIMITS, Limits
from maskserve.payload.opening import open_own


def open_any(path: StrPath, limits: Limits = DEFAULT_LIMITS) -> Payload:
    """The payload of a file of any format that maskserve reads."""
    format = by_suffix(os.fspath(path))
    if format is None or format.is_ours:
        return open_own(path, limits)
    from maskserve.convert.files import open_foreign  # which most files do without

    return open_foreign(path, limits)
