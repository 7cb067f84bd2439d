"""The installed version, in one place for metadata, --version and /metrics."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version as installed

ORDER_VERSION = 1
"""The version of the order of arithmetic (docs/order.md): states of another one are never merged."""


@cache
def version() -> str:
    """maskserve's version."""
    return installed("maskserve")
