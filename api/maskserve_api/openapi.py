"""The OpenAPI document, built from the op table: each verb with the union of its ops' parameters."""

from __future__ import annotations

import json

from fastapi.openapi.models import OpenAPI

from maskserve import requests
from maskserve.ops import default, verb_summary, verbs
from maskserve.ops.parameters import REQUIRED
from maskserve.payload.json import EXPLICIT_FIELDS, REQUIRED_FIELDS
from maskserve.version import version
from maskserve_api import jobs_openapi, v2_openapi
from maskserve_api.fetching import NAME
from maskserve_api.forms import Form
from maskserve_api.operations import HEADERS, PROBLEM, failures, getter, in_path
from maskserve_api.problems import STATUS
from maskserve_api.table import Json, value_schema
from maskserve_api.work import EXAMPLE

TENSOR: Json = {
    "description": "nested lists, null where a cell is masked; or an object that names the dtype",
    "anyOf": [
        {"type": ["array", "number", "boolean", "string", "null"]},
        {
            "type": "object",
            "required": sorted(REQUIRED_FIELDS),
            "additionalProperties": False,
            "properties": {field: {} for field in sorted(EXPLICIT_FIELDS)},
        },
    ],
}
SOURCE: Json = {
    "name": NAME,
    "in": "query",
    "required": False,
    "description": "an object that is read instead of a body, s3://BUCKET/KEY, where the service allows its prefix",
    "schema": {"type": "string", "pattern": "^(s3|gs|az)://"},
}
NO_VERB = frozenset({404, 405, 409, 410, 416})
"""Statuses of paths that are not there, and of results of jobs."""
OF_SOURCES = frozenset({404})
KEY: Json = {"type": "http", "scheme": "bearer", "description": "where the service was given a file of keys"}


def document(*, jobs: bool = False, stores: bool = False) -> Json:
    """The whole document, of a service with jobs and stores or without, checked against FastAPI's models of OpenAPI."""
    api = OpenAPI.model_validate(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "maskserve",
                "version": version(),
                "description": "Computes on tensors with missing values: a payload in, a payload out.",
            },
            "paths": {
                **{f"/v1/{verb}": {"post": operation(verb, jobs=jobs, stores=stores)} for verb in verbs()},
                "/v1/ops": {"get": getter("ops", "every op with its parameters and their exact JSON schema", 401, 403)},
                "/v1/ops/{name}": {"get": getter("op", "one op", 401, 403, 404) | {"parameters": [in_path("name")]}},
                "/livez": {"get": getter("livez", "200 while the process lives")},
                "/readyz": {"get": getter("readyz", "200 while requests are taken, else 503", 503)},
                **(jobs_openapi.paths() if jobs else {}),
                **v2_openapi.paths(),
            },
            "components": {
                "schemas": {
                    "Problem": PROBLEM,
                    "Tensor": TENSOR,
                    **(jobs_openapi.SCHEMAS if jobs else {}),
                    **v2_openapi.SCHEMAS,
                },
                "securitySchemes": {"key": KEY},
            },
            "security": [{"key": []}, {}],
        }
    )
    written: Json = api.model_dump(mode="json", by_alias=True, exclude_none=True)
    return written


def operation(verb: str, *, jobs: bool, stores: bool) -> Json:
    rows = requests.rows(verb)
    statuses = (
        {*STATUS.values()} - (NO_VERB - OF_SOURCES if stores else NO_VERB) - (set() if jobs else jobs_openapi.STATUSES)
    )
    payload = {
        Form.JSON: {  # first: the form that a page can show and send
            "schema": {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Tensor"}},
            "example": json.loads(EXAMPLE),
        },
        Form.SAFETENSORS: {"schema": {"type": "string", "format": "binary"}},
    }
    return {
        "operationId": verb,
        "summary": f"{verb}: {', '.join(row.name for row in rows)}",
        "description": verb_summary(verb),
        "parameters": [
            op(verb),
            *(in_query(verb, p.name) for p in requests.parameters(verb)),
            *((SOURCE,) if stores else ()),
            *HEADERS,
            *(jobs_openapi.HEADERS if jobs else ()),
        ],
        "requestBody": {"required": not stores, "content": payload},
        "responses": {"200": {"description": "the answer", "content": payload}}
        | ({"202": jobs_openapi.ACCEPTED} if jobs else {})
        | failures(*sorted(statuses)),
    }


def op(verb: str) -> Json:
    rows = requests.rows(verb)
    words = [word for row in rows for word in (row.name, *row.aliases)]
    text = "; ".join(f"{row.name}: {row.summary}" for row in rows)
    own = default(verb)
    schema: Json = {"enum": words} | ({} if own is None else {"default": own.name})
    return {"name": "op", "in": "query", "required": own is None, "description": text, "schema": schema}


def in_query(verb: str, name: str) -> Json:
    """A parameter of the union; required only if each op of the verb requires it.

    Its default is told in words: a page would send one that the schema has, also to ops without the parameter.
    """
    p = next(p for p in requests.parameters(verb) if p.name == name)
    own = [next((q for q in row.requestable if q.name == name), None) for row in requests.rows(verb)]
    is_required = all(q is not None and q.default is REQUIRED for q in own)
    schema = value_schema(p)
    default = schema.pop("default", None)
    text = p.help if default is None else f"{p.help}; default: {json.dumps(default)}"
    return {"name": name, "in": "query", "required": is_required, "description": text, "schema": schema}
