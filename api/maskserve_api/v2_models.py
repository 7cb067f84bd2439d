"""What the Open Inference Protocol v2 tells of a service: each verb is a model. The index and metadata are the op table."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maskserve import requests
from maskserve.dtypes import boolean, f32
from maskserve.errors import nearest
from maskserve.health import health
from maskserve.ops import verbs
from maskserve.ops.rows import GRAD
from maskserve.payload.header import shown
from maskserve.payload.variables import DATA, GRAD_OUTPUT, MASK
from maskserve.steps import VALUE
from maskserve.version import version
from maskserve_api.errors import NotOfferedError, UnknownPathError
from maskserve_api.forms import Form
from maskserve_api.table import Json
from maskserve_api.v2_answer import CODES, VERSION
from maskserve_api.verbs import Service, Verb

PLATFORM = "maskserve"
EXTENSIONS = ("binary_tensor_data", "parameters", "model_configuration")
MODELS = "/v2/models/{model}"
NOT_OFFERED = (
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/repository/models/{rest:path}",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/models/stats",
    f"{MODELS}/stats",
    f"{MODELS}/versions/{{version}}/stats",
    f"{MODELS}/trace/setting",
)
"""What tritonclient can ask for and this service has not."""


def add_routes(app: FastAPI, service: Service) -> None:
    app.add_route("/v2", server)
    app.add_route("/v2/health/live", live)
    app.add_route("/v2/health/ready", ready)
    app.add_route("/v2/repository/index", index, methods=["POST"])
    for path in NOT_OFFERED:
        app.add_route(path, not_offered, methods=["GET", "POST"])
    for verb in verbs():
        infer = Verb(verb, service, Form.V2)
        for model in (f"/v2/models/{verb}", f"/v2/models/{verb}/versions/{VERSION}"):
            app.add_route(f"{model}/infer", infer, methods=["POST"])  # type: ignore[arg-type]  # ASGI endpoint
    for model in (MODELS, f"{MODELS}/versions/{{version}}"):
        app.add_route(model, metadata)
        app.add_route(f"{model}/ready", model_ready)
        app.add_route(f"{model}/config", config)
        app.add_route(f"{model}/infer", infer_unknown, methods=["POST"])


async def server(request: Request) -> Response:
    return JSONResponse({"name": PLATFORM, "version": version(), "extensions": EXTENSIONS})


async def live(request: Request) -> Response:
    health().refuse_lost()  # which only a new process mends
    return JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    request.app.state.service.refuse_unready()
    return JSONResponse({"ready": True})


async def index(request: Request) -> Response:
    return JSONResponse([{"name": verb, "version": VERSION, "state": "READY", "reason": ""} for verb in verbs()])


async def metadata(request: Request) -> Response:
    verb = model_of(request)
    return JSONResponse(
        {"name": verb, "versions": [VERSION], "platform": PLATFORM}
        | {
            kind: [tensor(name) for name in names]
            for kind, names in (("inputs", inputs(verb)), ("outputs", outputs(verb)))
        }
    )


async def model_ready(request: Request) -> Response:
    verb = model_of(request)
    request.app.state.service.refuse_unready()
    return JSONResponse({"name": verb, "ready": True})


async def config(request: Request) -> Response:
    """Triton's own words for a model; its ops are a parameter of it."""
    verb = model_of(request)
    ops = ",".join(row.name for row in requests.rows(verb))
    return JSONResponse(
        {
            "name": verb,
            "platform": PLATFORM,
            "max_batch_size": 0,
            "input": [configured(name) for name in inputs(verb)],
            "output": [configured(name) for name in outputs(verb)],
            "parameters": {"op": {"string_value": ops}},
        }
    )


async def infer_unknown(request: Request) -> Response:
    model_of(request)
    raise AssertionError("a verb has a route of its own")


async def not_offered(request: Request) -> Response:
    raise NotOfferedError("this service has no shared memory, tracing, statistics or loading of models")


def inputs(verb: str) -> tuple[str, ...]:
    """The usual names: any others do, and a request may have more."""
    return (DATA, MASK, GRAD_OUTPUT) if verb == GRAD else (DATA, MASK)


def outputs(verb: str) -> tuple[str, ...]:
    """What the usual inputs give."""
    results = (VALUE, f"{DATA}.{GRAD}") if verb == GRAD else ()
    return tuple(name for result in results for name in (result, f"{result}.{MASK}")) or (DATA, MASK)


def tensor(name: str) -> Json:
    """A tensor as metadata tells of it: the protocol has no words for any dtype and any number of dims."""
    dtype = boolean if name.rpartition(".")[2] == MASK else f32
    return {"name": name, "datatype": CODES[dtype], "shape": [-1]}


def configured(name: str) -> Json:
    told = tensor(name)
    return {"name": name, "data_type": f"TYPE_{told['datatype']}", "dims": told["shape"]}


def model_of(request: Request) -> str:
    """The verb that the path names as a model, in the one version that there is."""
    name, asked = request.path_params["model"], request.path_params.get("version", VERSION)
    if name not in verbs():
        raise UnknownPathError(
            f"there is no model {shown(name, 64)}; give one of {', '.join(verbs())}{nearest(name[:64], verbs())}",
            parameter="model",
            allowed=verbs(),
        )
    if asked != VERSION:
        raise UnknownPathError(
            f"{name} has no version {shown(asked, 64)}; give {VERSION}, or none", parameter="version"
        )
    return str(name)
