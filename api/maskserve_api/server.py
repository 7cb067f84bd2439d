"""The service on a port: uvicorn with limits that it does not have by itself, one line when ready, a clean end."""

from __future__ import annotations

import ipaddress
import math
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics

from maskserve.errors import SettingsError
from maskserve.payload.header import shown
from maskserve_api import logs
from maskserve_api.app import create_app
from maskserve_api.edge import LOOPBACK_HOSTS
from maskserve_api.pages import curl
from maskserve_api.protocol import MAX_HEADER_BYTES, Protocol
from maskserve_api.verbs import Service
from maskserve_api.work import rehearse

KEEP_ALIVE_S = 5
BACKLOG = 1024


def serve(
    *,
    host: str,
    port: int,
    max_body: int,
    request_timeout: float,
    grace: float,
    log: str = "json",
    allow_anonymous: bool = False,
) -> int:
    """0 after SIGTERM or SIGINT, once running requests are done or `grace` seconds have passed.

    SettingsError where the address cannot be bound, or is open to others and anonymous use was not allowed.
    """
    addresses = resolved(host, port)
    is_local = all(ipaddress.ip_address(address[0]).is_loopback for _, address in addresses)
    if not (is_local or allow_anonymous):
        raise SettingsError(
            f"{shown(host)} can be reached from other machines, and this service asks for no keys: "
            "give --allow-anonymous to let everyone in, or --host 127.0.0.1",
            parameter="host",
        )
    # a second series beside each, with the time of its first value
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types here
    app = create_app(
        max_body=max_body, request_timeout=request_timeout, allowed_hosts=LOOPBACK_HOSTS if is_local else None
    )
    sockets = [bound(family, address) for family, address in addresses]
    logs.configure(log)
    try:
        rehearse()
        Server(app, host, grace).run(sockets=sockets)
    finally:
        for listener in sockets:
            listener.close()
    return 0


class Server(uvicorn.Server):
    """uvicorn, except that a signal it has heeded is not raised again: a drained service ends with 0."""

    def __init__(self, app: FastAPI, host: str, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, math.ceil(grace)),
                backlog=BACKLOG,
            )
        )
        self.host = host
        self.service: Service = app.state.service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and sockets:
            base = f"http://{netloc(self.host, sockets[0].getsockname()[1])}"
            print(f"maskserve listens on {base}; try: {curl(base)}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second does not wait."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.service.draining = True


def resolved(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """The addresses of `host`, each once."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as cause:
        raise SettingsError(f"{shown(host)}:{port} is not an address to listen on", parameter="host") from cause
    addresses = {(family, (str(address[0]), int(address[1]))) for family, _, _, _, address in found}
    return sorted(addresses, key=lambda item: (item[0], item[1]))


def bound(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as cause:
        where = netloc(*address)
        raise SettingsError(
            f"{where} cannot be listened on: {(cause.strerror or 'no such port').lower()}; "
            "stop what uses it, or give another --port (0 picks a free one)",
            parameter="port",
        ) from cause


def netloc(host: str, port: int) -> str:
    """ "host:port" as a URL writes it.

    >>> netloc("::1", 80)
    '[::1]:80'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
