"""/docs: Swagger UI over /openapi.json, from files that come with the service; no browser asks another host for a thing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES: Mapping[str, str] = MappingProxyType(
    {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "start.js": "text/javascript"}
)
PAGE = """<!doctype html><html lang=en><head><meta charset="utf-8"><title>maskserve</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="/docs/swagger-ui.css"></head>
<body><p><a href="/docs/ops">/docs/ops</a> has the same without scripts, <a href="/docs/errors">/docs/errors</a>
every error.</p><div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></body></html>
"""


def content(name: str) -> bytes:
    """One of FILES."""
    return resources.files(__package__).joinpath("static", name).read_bytes()
