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
    jobs: Annotated[
        bool | None,
        typer.Option("--jobs/--no-jobs", help="take jobs: Prefer: respond-async is answered later", show_default=False),
    ] = None,
    jobs_folder: Annotated[
        str | None,
        typer.Option("--jobs-folder", metavar="DIR", help="keeps jobs; default: ~/.local/state/maskserve/jobs"),
    ] = None,
    result_ttl: Annotated[
        str | None, typer.Option("--result-ttl", metavar="S", help="seconds that results are kept; default: 86400")
    ] = None,
    jobs_running: Annotated[
        str | None, typer.Option("--jobs-running", metavar="N", help="most jobs that run at once; default: 2")
    ] = None,
    jobs_max_body: Annotated[
        str | None, typer.Option("--jobs-max-body", metavar="SIZE", help="largest body of a job; default: 4GiB")
    ] = None,
    jobs_per_key: Annotated[
        str | None, typer.Option("--jobs-per-key", metavar="N", help="most unended jobs of one key; default: 1000")
    ] = None,
    jobs_queue: Annotated[
        str | None, typer.Option("--jobs-queue", metavar="N", help="most unended jobs of all keys; default: 10000")
    ] = None,
    jobs_disk: Annotated[
        str | None, typer.Option("--jobs-disk", metavar="SIZE", help="most bytes that jobs keep; default: 16GiB")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="bytes that running jobs hold of their data; default: half of what is granted",
        ),
    ] = None,
    stores: Annotated[
        list[str] | None,
        typer.Option("--stores", metavar="PREFIX", help="objects below it may be named as source=; may be given again"),
    ] = None,
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
        "serve_stores": stores or None,
        "serve_request_timeout": request_timeout,
        "serve_queue": queue,
        "serve_header_timeout": header_timeout,
        "serve_keep_alive": keep_alive,
        "serve_drain_delay": drain_delay,
        "serve_grace": grace,
        "serve_log": log,
        "serve_keys_file": keys_file,
        "serve_allow_anonymous": allow_anonymous or None,
        "serve_jobs": jobs,
        "serve_jobs_folder": jobs_folder,
        "serve_result_ttl": result_ttl,
        "serve_jobs_running": jobs_running,
        "serve_jobs_max_body": jobs_max_body,
        "serve_jobs_per_key": jobs_per_key,
        "serve_jobs_queue": jobs_queue,
        "serve_jobs_disk": jobs_disk,
        "memory": memory,
        "serve_allowed_host": allowed_host or None,
    }
    settings = settings_of(config, flags)
    from maskserve_api import server

    collect_again()
    given = {name.removeprefix("serve_"): settings[name] for name in flags}
    raise typer.Exit(server.serve(limits=limits_of(settings), **given))
