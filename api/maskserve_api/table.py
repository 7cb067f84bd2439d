"""The op table as data for clients: what GET /v1/ops gives, and the parameters that OpenAPI lists."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from maskserve import requests
from maskserve.dtypes import DType
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Parameter
from maskserve.ops.rows import Row

Json = dict[str, Any]


@cache
def described(row: Row) -> Json:
    """All that a client can know of a row; no schema where no verb serves it."""
    return {
        "name": row.name,
        "verb": row.verb,
        "verbs": list(row.verbs),
        "aliases": list(row.aliases),
        "summary": row.summary,
        "parameters": [parameter(p) for p in row.requestable],
        "schema": requests.schema(row) if row.verb else None,
    }


def parameter(p: Parameter) -> Json:
    return {"name": p.name, "help": p.help, "required": p.default is REQUIRED, "schema": value_schema(p)}


def value_schema(p: Parameter) -> Json:
    """The JSON schema of a parameter's value, its default included where it has one that is a value."""
    schema = TypeAdapter[Any](requests.annotation(p)).json_schema()
    if "anyOf" in schema:  # to leave a parameter out is the only way to say null in a query
        schema["anyOf"] = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
    if p.default is REQUIRED or p.default is None or isinstance(p.default, DType):
        return schema
    return schema | {"default": p.default}


def ops() -> Json:
    return {"ops": [described(row) for row in OPS.values()]}
