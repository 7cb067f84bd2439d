"""Where the service listens: a name's addresses, and sockets bound to them."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable

from maskserve.errors import SettingsError
from maskserve.payload.header import shown

BACKLOG = 1024


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


def netloc(host: str, port: int | None = None) -> str:
    """ "host:port", or the host alone, as a URL writes it.

    >>> netloc("::1", 80), netloc("::1")
    ('[::1]:80', '[::1]')
    """
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def is_awaited(listeners: Iterable[socket.socket]) -> bool:
    """Whether a connection stands in the system's queue, not yet accepted."""
    poll = select.poll()
    for listener in listeners:
        poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))
