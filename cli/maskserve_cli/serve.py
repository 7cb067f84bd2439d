"""`serve`: the one command, and the one module, that touches the service."""

from __future__ import annotations

from typing import Annotated

import typer

from maskserve_cli.command import Config, collect_again, settings_of


def serve(
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="where to listen; default: 127.0.0.1")
    ] = None,
    port: Annotated[str | None, typer.Option("--port", metavar="N", help="default: 8000; 0 takes a free one")] = None,
    max_body: Annotated[
        str | None, typer.Option("--max-body", metavar="SIZE", help="largest request body; default: 256MiB")
    ] = None,
    request_timeout: Annotated[
        str | None, typer.Option("--request-timeout", metavar="S", help="seconds a request may take; default: 60")
    ] = None,
    grace: Annotated[
        str | None, typer.Option("--grace", metavar="S", help="seconds for running requests at SIGTERM; default: 25")
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="FORM", help="a line for each request: json (default), text or off")
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option("--allow-anonymous", help="serve everyone who can reach a public address", show_default=False),
    ] = False,
    config: Config = None,
) -> None:
    flags: dict[str, object] = {
        "serve_host": host,
        "serve_port": port,
        "serve_max_body": max_body,
        "serve_request_timeout": request_timeout,
        "serve_grace": grace,
        "serve_log": log,
    }
    settings = settings_of(config, flags)
    from maskserve_api import server

    collect_again()
    code = server.serve(
        host=settings["serve_host"],
        port=settings["serve_port"],
        max_body=settings["serve_max_body"],
        request_timeout=settings["serve_request_timeout"],
        grace=settings["serve_grace"],
        log=settings["serve_log"],
        allow_anonymous=allow_anonymous,
    )
    raise typer.Exit(code)
