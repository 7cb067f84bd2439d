"""What the operations of the OpenAPI document are made of: parameters, and the problems that an answer may be."""

from __future__ import annotations

from maskserve_api.problems import CONTENT_TYPE, STATUS
from maskserve_api.table import Json

PROBLEM: Json = {
    "type": "object",
    "description": "RFC 9457; `error` repeats `detail`",
    "required": ["type", "title", "status", "code", "detail", "error", "parameter", "allowed", "request_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "error": {"type": "string"},
        "parameter": {"type": ["string", "null"]},
        "allowed": {"type": "array", "items": {"type": "string"}},
        "request_id": {"type": "string"},
    },
}


def failures(*statuses: int) -> Json:
    """The problems with these statuses, by the codes that they may have."""
    codes = {status: ", ".join(kind.code for kind, its in STATUS.items() if its == status) for status in statuses}
    content = {CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): {"description": text, "content": content} for status, text in codes.items()}


def in_path(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def in_header(name: str, text: str, kind: str, **bounds: float) -> Json:
    return {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": kind} | bounds}


HEADERS = (
    in_header("X-Request-Id", "kept if it is 1 to 128 letters, digits, dots, dashes and underscores", "string"),
    in_header("X-Request-Timeout", "seconds after which the request is given up", "number", exclusiveMinimum=0),
)


def getter(name: str, text: str, *statuses: int) -> Json:
    ok: Json = {"description": "as said", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"operationId": name, "summary": text, "responses": {"200": ok} | failures(*statuses)}
