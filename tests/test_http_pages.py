"""What the service says of itself is what the op table and the error tree say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI

import maskserve_api
from maskserve import requests
from maskserve.errors import MaskserveError, WorkerLostError
from maskserve.ops import OPS, verbs
from maskserve_api import pages, problems, v2_models
from maskserve_api.app import create_app
from maskserve_api.edge import OPEN
from tests.http_service import Running, check_problem, jobs_in, payload, running

SOURCES = sorted(Path(maskserve_api.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(jobs=jobs_in(tmp_path_factory.mktemp("jobs"))) as it:
        yield it


def ours() -> list[type[MaskserveError]]:
    return [kind for kind in problems.classes() if kind.__module__.startswith("maskserve")]


def test_every_error_class_has_a_status_of_its_own() -> None:
    assert {kind.__name__ for kind in ours()} == {kind.__name__ for kind in problems.STATUS}


def test_docs_errors_md_is_the_generated_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    assert page == pages.errors_markdown(), "run python -m maskserve_api.pages > docs/errors.md"
    for kind in ours():
        assert f"| `{kind.code}` | {problems.STATUS[kind]} |" in page


def test_every_code_is_of_one_class() -> None:
    codes = [kind.code for kind in ours()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", ours(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("word", ["short", "x" * 100_000, "\x00\x1b" * 9000, "\U0001f4a9" * 9000, "\ud800" * 9000])
def test_a_problem_is_small_whatever_it_tells_of(kind: type[MaskserveError], word: str) -> None:
    status, headers, body = problems.problem(kind(word, parameter=word, allowed=[word, "a"] * 500), "i" * 128)
    assert len(body) <= problems.MAX_BYTES
    assert dict(headers)[b"content-length"] == str(len(body)).encode()
    if status == 500 and kind is not WorkerLostError:  # its message is the service's own
        assert word[:9].encode("utf-8", "backslashreplace") not in body


def test_the_openapi_document_is_valid_and_names_every_verb_and_parameter(service: Running) -> None:
    document = service.http.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    for verb in verbs():
        operation = document["paths"][f"/v1/{verb}"]["post"]
        given = {p["name"]: p for p in operation["parameters"] if p["in"] == "query"}
        assert given.keys() == {"op", *(p.name for p in requests.parameters(verb))}
        assert all(p["description"] for p in given.values())
        assert set(given["op"]["schema"]["enum"]) >= {row.name for row in requests.rows(verb)}
        of_others = {"404", "405", "409", "410", "416"}
        assert {"200", "202", *map(str, problems.STATUS.values())} - of_others == operation["responses"].keys()
        problem_forms = [
            told["content"].keys() for status, told in operation["responses"].items() if int(status) >= 400
        ]
        assert all(forms == {"application/problem+json"} for forms in problem_forms)
    assert set(document["components"]["schemas"]["Problem"]["required"]) == set(
        document["components"]["schemas"]["Problem"]["properties"]
    )


def test_the_document_has_every_path_of_v2_that_is_offered(service: Running) -> None:
    routes = [getattr(route, "path", "") for route in create_app().routes]
    of_models = {path for path in routes if path.startswith("/v2") and "/versions/" not in path}
    offered = of_models - set(v2_models.NOT_OFFERED) - {f"/v2/models/{verb}/infer" for verb in verbs()}
    document = service.http.get("/openapi.json").json()["paths"]
    assert {path for path in document if path.startswith("/v2")} == offered
    operation = document["/v2/models/{model}/infer"]["post"]
    model = next(p["schema"]["default"] for p in operation["parameters"] if p["name"] == "model")
    example = operation["requestBody"]["content"]["application/json"]["example"]
    assert service.http.post(f"/v2/models/{model}/infer", json=example).status_code == 200


def test_every_path_of_the_document_is_served(service: Running) -> None:
    question, later = payload(data=np.ones(3, np.float32)), {"prefer": "respond-async"}
    for path, operations in service.http.get("/openapi.json").json()["paths"].items():
        for method in operations:
            id = service.http.post("/v1/reduce?op=sum", content=question, headers=later).json()["id"]
            service.http.get(f"/v1/jobs/{id}?wait=30")
            named = path.replace("{name}", next(iter(OPS))).replace("{model}", verbs()[0]).replace("{id}", id)
            response = service.http.request(method, named)
            assert response.status_code not in (404, 405, 500), path


def test_a_service_without_jobs_has_neither_their_paths_nor_their_header() -> None:
    document = create_app().openapi()
    assert not [path for path in document["paths"] if path.startswith("/v1/jobs")]
    assert not [p for p in document["paths"]["/v1/reduce"]["post"]["parameters"] if p["name"] == "Prefer"]
    with running() as service:
        check_problem(service.http.get("/v1/jobs"), 404, "unknown_path")
        assert service.post("/v1/reduce?op=sum", payload(data=np.ones(3)), prefer="respond-async").status_code == 200


def test_every_path_of_the_document_says_whether_it_asks_for_a_key(service: Running) -> None:
    for path, operations in service.http.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) == (path not in OPEN), path


def test_v1_ops_names_every_row_with_its_exact_schema(service: Running) -> None:
    told = {op["name"]: op for op in service.http.get("/v1/ops").json()["ops"]}
    assert list(told) == list(OPS)
    for name, row in OPS.items():
        assert told[name]["verb"] == row.verb
        assert told[name]["summary"] == row.summary
        assert [p["name"] for p in told[name]["parameters"]] == [p.name for p in row.requestable]
        assert told[name]["schema"] == (requests.schema(row) if row.verb else None)
        for word in (name, *row.aliases) if row.verb else ():
            assert service.http.get(f"/v1/ops/{word}").json() == told[name]


def test_an_op_that_is_not_there_is_a_404(service: Running) -> None:
    told = check_problem(service.http.get("/v1/ops/maen"), 404, "unknown_path")
    assert "did you mean mean?" in told["detail"]


def test_the_pages_are_whole_without_a_network(service: Running) -> None:
    for path in ("/docs/ops", "/docs/errors"):
        response = service.http.get(path)
        assert response.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"<script|<link|src=|url\(", response.text)
    page = service.http.get("/docs/ops").text
    for row in OPS.values():
        assert row.verb is None or f"<code>{row.name}</code>" in page


def test_the_type_of_every_problem_leads_somewhere(service: Running) -> None:
    page = service.http.get("/docs/errors").text
    assert {kind.code for kind in ours()} <= set(re.findall(r'id="([a-z_]+)"', page))


def test_every_error_says_when_it_is_raised_and_what_to_do(service: Running) -> None:
    page = service.http.get("/docs/errors").text
    for kind in ours():
        assert kind.__doc__, f"{kind.__name__} has no docstring"
        assert escape(pages.advice(kind)) in page


def test_a_host_in_a_page_is_escaped() -> None:
    with running(allowed_hosts=None) as service:
        assert "<b>" not in service.http.get("/docs/ops", headers={"host": "<b>'\"&"}).text


def test_head_is_answered_where_get_is(service: Running) -> None:
    response = service.http.head("/livez")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_op_and_no_parameter_is_named_in_the_service(path: Path) -> None:
    rows = [row for row in OPS.values() if row.verb]
    names = {word for row in rows for word in (row.name, *row.aliases)}
    names |= {p.name for verb in verbs() for p in requests.parameters(verb)} | set(verbs())
    names -= {"method", "limit"}  # HTTP's own word, and how long a page of a list is
    constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    words = {word for text in constants if isinstance(text, str) for word in (text, *re.findall(r"[?&=/](\w+)", text))}
    assert not words & names


def test_the_application_is_built_by_a_function_and_by_nothing_else() -> None:
    for path in SOURCES:
        calls = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Expr | ast.Assign)]
        assert not any("FastAPI(" in ast.unparse(node) for node in calls)
