"""What the OpenAPI document of a service with jobs says of them."""

from __future__ import annotations

from maskserve_api.jobs.headers import ASYNC, IDEMPOTENCY
from maskserve_api.jobs.job import Status
from maskserve_api.jobs.routes import AFTER, LIMIT, MOST_PAGE, MOST_WAIT_S, PAGE, STATUS, WAITED
from maskserve_api.operations import failures, in_header, in_path
from maskserve_api.table import Json

TIME: Json = {"type": ["string", "null"], "format": "date-time"}
TEXT: Json = {"type": "string"}
COMMON: Json = {
    "id": TEXT,
    STATUS: {"type": "string", "enum": [status.value for status in Status]},
    "verb": TEXT,
    "request": {"type": "object"},
    "created": TEXT | {"format": "date-time"},
}


def closed(properties: Json) -> Json:
    return {"type": "object", "required": [*properties], "additionalProperties": False, "properties": properties}


COUNT: Json = {"type": "integer", "exclusiveMinimum": -1}
SCHEMAS: Json = {
    "AcceptedJob": closed({**COMMON, "links": closed({"self": TEXT, "result": TEXT})}),
    "Job": closed(
        {
            **COMMON,
            "progress": closed({"done": COUNT, "total": COUNT, "unit": {"const": "blocks"}}),
            "started": TIME,
            "ended": TIME,
            "expires": TIME,
            "result": {
                "anyOf": [closed({"bytes": COUNT, "sha256": TEXT, "content_type": TEXT}), {"type": "null"}],
            },
            "problem": {"anyOf": [{"$ref": "#/components/schemas/Problem"}, {"type": "null"}]},
        }
    ),
    "Jobs": closed(
        {
            "jobs": {"type": "array", "items": {"$ref": "#/components/schemas/Job"}},
            "next": {"type": ["string", "null"]},
        }
    ),
}
HEADERS = (
    in_header("Prefer", f"{ASYNC}: answer later, by a job", "string"),
    in_header(IDEMPOTENCY, "of a job: who sends the same request with the same key again gets the same job", "string"),
)


STATUSES = frozenset({429, 507})
"""Of problems that only who submits a job meets."""


def content(name: str) -> Json:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


ACCEPTED: Json = {
    "description": "the request is on disk, and is answered by the job that Location names",
    "headers": {name: {"schema": TEXT} for name in ("Location", "Retry-After", "Preference-Applied")},
    "content": content("AcceptedJob"),
}
BYTES: Json = {
    kind: {"schema": {}} for kind in ("application/vnd.safetensors", "application/json")
}  # of whichever form was asked for


def in_query(name: str, text: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema}


def paths() -> Json:
    """The paths of jobs."""
    id = in_path("id")
    whole = {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": MOST_PAGE + 1, "default": PAGE}
    page = [
        in_query(STATUS, "those that are so far", COMMON[STATUS]),
        in_query(LIMIT, "most jobs of an answer", whole),
        in_query(AFTER, "the `next` of the answer before", TEXT),
    ]
    wait = in_query(
        WAITED, f"seconds to wait for the end, at most {MOST_WAIT_S:g}", {"type": "number", "exclusiveMinimum": 0}
    )
    told = {"200": {"description": "the job", "content": content("Job")}}
    ended = {"202": {"description": "cancelled", "content": content("Job")}, "204": {"description": "forgotten"}}
    whole_result = {"200": {"description": "what the synchronous answer would be", "content": BYTES}}
    parts = {
        "206": {"description": "the Range of it", "content": BYTES},
        "304": {"description": "as If-None-Match has it"},
    }
    return {
        "/v1/jobs": {
            "get": {
                "operationId": "jobs",
                "summary": "the jobs of this key, the first submitted first",
                "parameters": page,
                "responses": {"200": {"description": "a page", "content": content("Jobs")}}
                | failures(401, 403, 404, 422, 503, 507),
            }
        },
        "/v1/jobs/{id}": {
            "get": {
                "operationId": "job",
                "summary": "how far a job is",
                "parameters": [id, wait],
                "responses": told | failures(401, 403, 404, 422, 503, 507),
            },
            "delete": {
                "operationId": "forget",
                "summary": "cancel a job, or forget one that has ended",
                "parameters": [id],
                "responses": ended | failures(401, 403, 404, 422, 503, 507),
            },
        },
        "/v1/jobs/{id}/result": {
            "get": {
                "operationId": "result",
                "summary": "what a job gave, or the problem that it ended with",
                "parameters": [id],
                "responses": whole_result
                | parts
                | failures(400, 401, 403, 404, 406, 409, 410, 413, 416, 422, 500, 503, 507),
            }
        },
    }
