"""`serve`: the one command, and the one module, that touches the service."""

from __future__ import annotations

from typing import Annotated

import typer

from maskserve_cli.command import Config, collect_again, settings_of
from maskserve_cli.inputs import limits_of


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
    queue: Annotated[
        str | None, typer.Option("--queue", metavar="N", help="most requests that wait to be computed; default: 512")
    ] = None,
    header_timeout: Annotated[
        str | None, typer.Option("--header-timeout", metavar="S", help="seconds headers may take; default: 10")
    ] = None,
    keep_alive: Annotated[
        str | None, typer.Option("--keep-alive", metavar="S", help="seconds an idle connection stays; default: 5")
    ] = None,
    drain_delay: Annotated[
        str | None,
        typer.Option("--drain-delay", metavar="S", help="seconds to listen on after SIGTERM, not ready; default: 0"),
    ] = None,
    grace: Annotated[
        str | None, typer.Option("--grace", metavar="S", help="seconds for running requests at SIGTERM; default: 25")
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="FORM", help="a line for each request: json (default), text or off")
    ] = None,
    keys_file: Annotated[
        str | None, typer.Option("--keys-file", metavar="FILE", help="name:key lines; ask for one of these keys")
    ] = None,
    allow_anonymous: Annotated[
        bool,
        typer.Option("--allow-anonymous", help="serve everyone who can reach a public address", show_default=False),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="a Host name that is served; may be given again"),
    ] = None,
    config: Config = None,
) -> None:
    flags: dict[str, object] = {
        "serve_host": host,
        "serve_port": port,
        "serve_max_body": max_body,
        "serve_request_timeout": request_timeout,
        "serve_queue": queue,
        "serve_header_timeout": header_timeout,
        "serve_keep_alive": keep_alive,
        "serve_drain_delay": drain_delay,
        "serve_grace": grace,
        "serve_log": log,
        "serve_keys_file": keys_file,
        "serve_allow_anonymous": allow_anonymous or None,
        "serve_allowed_host": allowed_host or None,
    }
    settings = settings_of(config, flags)
    from maskserve_api import server

    collect_again()
    given = {name.removeprefix("serve_"): settings[name] for name in flags}
    raise typer.Exit(server.serve(limits=limits_of(settings), **given))
