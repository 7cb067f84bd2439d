"""The Open Inference Protocol v2 in the OpenAPI document: what v2_models serves, with the verbs as models."""

from __future__ import annotations

import json

from maskserve.dtypes import f32
from maskserve.ops import verbs
from maskserve_api.forms import Form
from maskserve_api.operations import HEADERS, failures, getter, in_header
from maskserve_api.problems import STATUS
from maskserve_api.table import Json
from maskserve_api.v2_answer import CODES
from maskserve_api.v2_models import MODELS
from maskserve_api.v2_question import LENGTH
from maskserve_api.v2_tensors import DTYPES
from maskserve_api.work import EXAMPLE, example_row

METHOD_STATUS = 405
"""Of no path with the method that it lists."""
NAMED: Json = {"name": {"type": "string"}, "parameters": {"type": "object"}}
TENSOR: Json = {
    "type": "object",
    "description": "its cells as data, or behind the JSON, as many bytes as the parameter binary_data_size says",
    "required": ["name", "shape", "datatype"],
    "properties": {
        **NAMED,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"enum": list(DTYPES)},
        "data": {"type": "array", "description": "flat or nested, null where a cell is masked"},
    },
}
TENSORS: Json = {"type": "array", "items": {"$ref": "#/components/schemas/V2Tensor"}}
QUESTION: Json = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": TENSORS | {"minItems": 1},
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"], "properties": NAMED}},
        "parameters": {"type": "object", "description": "the op and what it takes, by the words of the /v1 query"},
    },
}
ANSWER: Json = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": TENSORS,
    },
}
SCHEMAS: Json = {"V2Tensor": TENSOR, "V2Question": QUESTION, "V2Answer": ANSWER}


def paths() -> Json:
    """All but what is not offered, and but the same under /versions/1."""
    model = {"parameters": [a_model()]}
    return {
        "/v2": {"get": getter("v2", "the server and its extensions", 401, 403)},
        "/v2/health/live": {"get": getter("v2_live", "200 while the process lives")},
        "/v2/health/ready": {"get": getter("v2_ready", "200 while requests are taken, else 503", 503)},
        "/v2/repository/index": {"post": listed("v2_index", "the models, which are the verbs")},
        MODELS: {"get": getter("v2_metadata", "a model's usual inputs and outputs", 401, 403, 404) | model},
        f"{MODELS}/ready": {
            "get": getter("v2_model_ready", "whether a model takes requests", 401, 403, 404, 503) | model
        },
        f"{MODELS}/config": {
            "get": getter("v2_config", "a model in Triton's words, its ops among them", 401, 403, 404) | model
        },
        f"{MODELS}/infer": {"post": infer()},
    }


def a_model() -> Json:
    schema = {"enum": list(verbs()), "default": example_row().verb}
    return {"name": "model", "in": "path", "required": True, "description": "the verb", "schema": schema}


def listed(name: str, text: str) -> Json:
    answer = {
        "description": "as said",
        "content": {Form.JSON: {"schema": {"type": "array", "items": {"type": "object"}}}},
    }
    return {"operationId": name, "summary": text, "responses": {"200": answer} | failures(401, 403)}


def infer() -> Json:
    binary: Json = {"schema": {"type": "string", "format": "binary"}}
    length = in_header(LENGTH, "how many bytes of the body are JSON; all where it is left out", "integer")
    return {
        "operationId": "v2_infer",
        "summary": "the answer to a request of the Open Inference Protocol v2, with tensors in JSON or as bytes behind it",
        "parameters": [a_model(), length, *HEADERS],
        "requestBody": {
            "required": True,
            "content": {Form.JSON: {"schema": reference("V2Question"), "example": example()}, Form.V2: binary},
        },
        "responses": {
            "200": {
                "description": "the answer",
                "content": {Form.JSON: {"schema": reference("V2Answer")}, Form.V2: binary},
            }
        }
        | failures(*sorted(set(STATUS.values()) - {METHOD_STATUS})),
    }


def reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def example() -> Json:
    """The example of /v1 as a request of v2."""
    ((name, cells),) = json.loads(EXAMPLE).items()
    tensor = {"name": name, "shape": [len(cells)], "datatype": CODES[f32], "data": cells}
    return {"inputs": [tensor], "parameters": {"op": example_row().name}}
