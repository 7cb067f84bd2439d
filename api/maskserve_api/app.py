"""The application, built by a function: routes from the op table, one outermost layer, a lane for each device."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from maskserve.errors import UnknownOpError, nearest
from maskserve.health import health
from maskserve.ops import find, verbs
from maskserve.payload.format import DEFAULT_LIMITS, Limits
from maskserve_api import fetching, openapi, pages, swagger, table, v2_models
from maskserve_api.body import Memory
from maskserve_api.edge import LOOPBACK_HOSTS, Edge
from maskserve_api.errors import MethodError, UnknownPathError
from maskserve_api.forms import bounded
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.routes import add_routes
from maskserve_api.keys import Keys
from maskserve_api.lanes import Lanes
from maskserve_api.metrics import Metrics
from maskserve_api.verbs import Service, Verb

MIB = 1 << 20
BODIES_IN_FLIGHT = 4
JOBS = "/v1/jobs"


def create_app(
    *,
    max_body: int = 256 * MIB,
    stores: Collection[str] = (),
    request_timeout: float = 60.0,
    queue: int = 512,
    limits: Limits = DEFAULT_LIMITS,
    allowed_hosts: Collection[str] | None = LOOPBACK_HOSTS,
    keys: Keys | None = None,
    jobs: Jobs | None = None,
) -> FastAPI:
    """The service as an ASGI application; sizes in bytes, times in seconds; `limits` are those of each payload.

    `stores` are prefixes below which requests may name objects. `allowed_hosts` are the Host names served, without ports;
    None serves all. `keys` None asks for none. `jobs` are those of requests that are answered later; None answers all at once.
    `app.state.service` is the Service.
    """
    fetching.refuse_unready(tuple(stores))
    service = Service(
        max_body=max_body,
        stores=tuple(stores),
        request_timeout_s=request_timeout,
        lanes=Lanes(queue),
        memory=Memory(BODIES_IN_FLIGHT * max_body),
        limits=bounded(limits),
        jobs=jobs,
    )
    app = FastAPI(title="maskserve", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.keys = keys
    app.openapi = partial(openapi.document, jobs=jobs is not None, stores=bool(stores))  # type: ignore[method-assign]  # FastAPI's own way to give another document
    app.state.metrics = metrics = Metrics(service.lanes, service.memory, jobs)
    app.add_middleware(Edge, allowed_hosts=allowed_hosts, keys=keys, metrics=metrics)
    app.add_exception_handler(HTTPException, unrouted)
    for verb in verbs():  # first: routes are tried one after the other, at 3 µs each
        app.add_route(f"/v1/{verb}", Verb(verb, service), methods=["POST"])  # type: ignore[arg-type]  # ASGI endpoint
    v2_models.add_routes(app, service)
    if jobs is not None:
        add_routes(app, service, jobs)
    app.add_route("/v1/ops", ops)
    app.add_route("/v1/ops/{name}", op)
    app.add_route("/livez", livez)
    app.add_route("/readyz", readyz)
    app.add_route("/metrics", metered)
    app.add_route("/openapi.json", document)
    app.add_route("/", home)
    app.add_route("/docs", docs)
    app.add_route("/docs/ops", ops_page)
    app.add_route("/docs/errors", errors)
    for name in swagger.FILES:
        app.add_route(f"/docs/{name}", asset)
    return app


async def unrouted(request: Request, error: Exception) -> Response:
    """A path or a method that the router does not know: an error of ours, told where all are."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        hint = "; a job is a POST to /v1/{verb} with Prefer: respond-async" if request.scope["path"] == JOBS else ""
        raise MethodError(f"this path takes {' or '.join(allowed)}{hint}", allowed=allowed) from None
    if request.scope["path"].startswith(JOBS) and request.app.state.service.jobs is None:
        raise UnknownPathError(
            "this service takes no jobs, and answers each request at once: who runs it starts it with --jobs"
        )
    known = [path for route in request.app.routes if "{" not in (path := route.path)]
    raise UnknownPathError(
        f"there is no such path{nearest(request.scope['path'][:64], known)}; "
        f"a request is a POST to {' or '.join(paths())}, and /docs tells more"
    )


def paths() -> list[str]:
    return [f"/v1/{verb}" for verb in verbs()]


async def ops(request: Request) -> Response:
    return JSONResponse(table.ops())


async def op(request: Request) -> Response:
    try:
        row = find(request.path_params["name"][:64])
    except UnknownOpError as error:
        raise UnknownPathError(error.message, parameter="name", allowed=error.allowed) from None
    return JSONResponse(table.described(row))


async def livez(request: Request) -> Response:
    health().refuse_lost()  # which only a new process mends
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    request.app.state.service.refuse_unready()
    return JSONResponse({"status": "ready"})


async def metered(request: Request) -> Response:
    page, media_type = request.app.state.metrics.page(request.headers.get("accept", ""))
    return Response(page, headers={"content-type": media_type})


async def document(request: Request) -> Response:
    return JSONResponse(request.app.openapi())


async def home(request: Request) -> Response:
    """Where a person lands who types the address alone."""
    return RedirectResponse("/docs")


async def docs(request: Request) -> Response:
    return html(swagger.PAGE, swagger.POLICY)


async def asset(request: Request) -> Response:
    name = request.scope["path"].rpartition("/")[2]
    return Response(
        swagger.content(name), media_type=swagger.FILES[name], headers={"cache-control": "public, max-age=3600"}
    )


async def ops_page(request: Request) -> Response:
    base = f"http://{request.headers.get('host', 'localhost')}"
    return html(pages.docs(base, asks_key=request.app.state.keys is not None))


async def errors(request: Request) -> Response:
    return html(pages.errors())


def html(text: str, policy: str = pages.POLICY) -> Response:
    return HTMLResponse(text, headers={"content-security-policy": policy})
