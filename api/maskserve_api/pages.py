"""The pages that people read, /docs/ops and /docs/errors: generated, and whole without a network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from http import HTTPStatus

from maskserve import requests
from maskserve.errors import MaskserveError
from maskserve.ops import verb_summary, verbs
from maskserve.ops.parameters import Parameter
from maskserve.ops.rows import Row
from maskserve_api.problems import classes, status_of, title
from maskserve_api.work import EXAMPLE, example_row

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{background:#f3f3f3;padding:.1rem .3rem}pre{padding:.8rem;overflow:auto}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}"
)


def curl(base: str) -> str:
    """A command that works, from the table."""
    row = example_row()
    return f"curl -H 'Content-Type: application/json' -d '{EXAMPLE.decode()}' '{base}/v1/{row.verb}?op={row.name}'"


def docs(base: str) -> str:
    """/docs/ops: every verb with its ops and their parameters."""
    body = [
        "<p>A payload in, a payload out: safetensors under any Content-Type, or JSON as application/json; "
        "the op and its parameters stand in the query.</p>",
        f"<pre>{escape(curl(base))}</pre>",
        '<p><a href="/openapi.json">/openapi.json</a> <a href="/v1/ops">/v1/ops</a> '
        '<a href="/docs/errors">/docs/errors</a></p>',
        *(part for verb in verbs() for part in verb_section(verb)),
    ]
    return page("maskserve", body)


def verb_section(verb: str) -> Iterable[str]:
    yield f'<h2 id="{escape(verb)}">POST /v1/{escape(verb)}</h2>'
    yield f"<p>{escape(verb_summary(verb))}</p>"
    yield table(("op", "what it gives", "parameters"), (op_cells(row) for row in requests.rows(verb)))
    yield table(("parameter", "what it says"), (parameter_cells(p) for p in requests.parameters(verb)))


def op_cells(row: Row) -> tuple[str, ...]:
    names = " or ".join(code(word) for word in (row.name, *row.aliases))
    return names, escape(row.summary), " ".join(code(p.name) for p in row.requestable)


def parameter_cells(p: Parameter) -> tuple[str, ...]:
    choices = f" ({', '.join(code(word) for word in p.choices)})" if p.choices else ""
    return code(p.name), escape(p.help) + choices


def errors() -> str:
    """/docs/errors: each code of the error tree, where a problem's `type` leads."""
    body = ["<p>The <code>code</code> of a problem is stable; its <code>detail</code> is for people.</p>"]
    for kind in classes():
        body.append(f'<h2 id="{escape(kind.code)}">{code(kind.code)}</h2>')
        body.append(f"<p>{described(kind)}</p>")
    return page("maskserve errors", body)


def described(kind: type[MaskserveError]) -> str:
    status = status_of(kind)
    text = f"{escape(title(kind))}: status {status} {HTTPStatus(status).phrase}"
    parent = next((base for base in kind.__bases__ if issubclass(base, MaskserveError)), None)
    return text if parent is None else f'{text}. A kind of <a href="#{parent.code}">{code(parent.code)}</a>.'


def code(word: str) -> str:
    return f"<code>{escape(word)}</code>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells of `rows` are HTML already."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def page(name: str, body: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body><h1>{escape(name)}</h1>{''.join(body)}</body></html>"
