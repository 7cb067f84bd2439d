"""The service on a port: uvicorn with limits that it does not have by itself, one line when ready, a clean end."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics

from maskserve.cgroup import default_memory
from maskserve.errors import SettingsError
from maskserve.payload.format import DEFAULT_LIMITS, Limits
from maskserve.payload.header import shown
from maskserve_api import logs
from maskserve_api.addresses import BACKLOG, bound, is_awaited, netloc, resolved
from maskserve_api.allocator import bound_arenas
from maskserve_api.app import create_app
from maskserve_api.edge import LOOPBACK_HOSTS, log
from maskserve_api.forms import bounded
from maskserve_api.jobs.desk import Jobs, Options
from maskserve_api.keys import Keys
from maskserve_api.pages import curl
from maskserve_api.protocol import Connections, Protocol
from maskserve_api.verbs import Service
from maskserve_api.work import rehearse

SPARE_FILES = 128
"""What the process opens besides connections."""
MOST_CONNECTIONS = 1 << 14
END_S = 1.0
"""What the process takes of its grace to tell the requests that were too slow, and to end."""
SETTLING_TURNS = 8
"""Turns of the loop from a connection's being accepted to its first request's being read, and some more."""


def serve(
    *,
    host: str,
    port: int,
    max_body: int,
    stores: tuple[str, ...] = (),
    request_timeout: float,
    grace: float,
    queue: int = 512,
    limits: Limits = DEFAULT_LIMITS,
    header_timeout: float = 10.0,
    keep_alive: float = 5.0,
    drain_delay: float = 0.0,
    keys_file: str = "",
    allow_anonymous: bool = False,
    allowed_host: Sequence[str] = (),
    log: str = "json",
    jobs: bool = False,
    jobs_folder: str = "",
    result_ttl: float = 86400.0,
    jobs_running: int = 2,
    jobs_max_body: int = 4 << 30,
    jobs_per_key: int = 1000,
    jobs_queue: int = 10_000,
    jobs_disk: int = 16 << 30,
    memory: int = 0,
) -> int:
    """0 after SIGTERM or SIGINT, once running requests are done, and before `drain_delay` and `grace` have passed.

    SettingsError where the address cannot be bound, or is open to others and neither keys nor anonymous use were given,
    or where jobs are to be kept in a folder that cannot be used.
    """
    bound_arenas()
    addresses = resolved(host, port)
    is_local = all(ipaddress.ip_address(address[0]).is_loopback for _, address in addresses)
    keys = keys_of(host, keys_file, is_local=is_local, allow_anonymous=allow_anonymous)
    own_hosts = {*LOOPBACK_HOSTS, netloc(host.lower()), *(netloc(address[0]) for _, address in addresses)}
    # a second series beside each, with the time of its first value
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types here
    options = Options(
        folder=jobs_folder or default_folder(),
        result_ttl_s=result_ttl,
        n_running=jobs_running,
        max_body=jobs_max_body,
        per_key=jobs_per_key,
        most=jobs_queue,
        most_bytes=jobs_disk,
        memory=memory or default_memory(),
    )
    sockets = [bound(family, address) for family, address in addresses]
    logs.configure(log)
    try:
        desk = Jobs(options, bounded(limits)) if jobs else None
        app = create_app(
            max_body=max_body,
            stores=stores,
            request_timeout=request_timeout,
            queue=queue,
            limits=limits,
            allowed_hosts={*allowed_host, *(own_hosts if is_local else ())} or None,
            keys=keys,
            jobs=desk,
        )
        rehearse()
        if desk is not None:
            say(desk.summary())
        elif jobs_folder:
            say("--jobs-folder says where jobs would live, and this service takes none: add --jobs")
        if not is_local:
            say(f"{shown(host)} is served without TLS: put a proxy that terminates TLS in front (docs/security.md)")
        example_host = None if is_local else next(iter(allowed_host), None)
        server = Server(
            app,
            host,
            grace,
            drain_delay=drain_delay,
            header_timeout=header_timeout,
            keep_alive=keep_alive,
            example_host=example_host,
        )
        server.run(sockets=sockets)
    finally:
        for listener in sockets:
            listener.close()
    return server.exit


def keys_of(host: str, path: str, *, is_local: bool, allow_anonymous: bool) -> Keys | None:
    """The keys that requests must bring, None where they need none; who may reach the service must be let in by word."""
    if path and allow_anonymous:
        raise SettingsError("--keys-file and --allow-anonymous exclude each other: give one", parameter="keys_file")
    if path:
        return Keys(path)
    if not (is_local or allow_anonymous):
        raise SettingsError(
            f"{shown(host)} can be reached from other machines, and no keys are asked for: "
            "give --keys-file FILE, --allow-anonymous to let everyone in, or --host 127.0.0.1",
            parameter="host",
        )
    return None


def default_folder() -> str:
    """Where jobs live on a machine whose user did not say: what is to outlast a start belongs to the state of a user."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return os.path.join(state if os.path.isabs(state) else os.path.expanduser("~/.local/state"), "maskserve", "jobs")


def say(line: str) -> None:
    print(f"maskserve: {line}", file=sys.stderr, flush=True)


def file_limit() -> int:
    """How many files this process may have open, once it has asked for as many as it may ask for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says "unlimited" and does not grant it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS + SPARE_FILES if soft == resource.RLIM_INFINITY else soft


BY_SIGNAL = 128
"""What a shell adds to the number of a signal that ended a process."""


class Server(uvicorn.Server):
    """uvicorn, except that a signal it has heeded is not raised again: a drained service ends with 0."""

    def __init__(
        self,
        app: FastAPI,
        host: str,
        grace: float,
        *,
        drain_delay: float = 0.0,
        header_timeout: float = 10.0,
        keep_alive: float = 5.0,
        most_connections: int = MOST_CONNECTIONS,
        example_host: str | None = None,
    ) -> None:
        """`example_host` is the name that the first line asks by, where the address itself is refused."""
        most = max(1, min(most_connections, file_limit() - SPARE_FILES))
        connections = Connections(most=most, header_timeout_s=header_timeout)
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Protocol, connections),  # type: ignore[arg-type]  # called as the class is
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # its warnings are a line for each broken request, with nothing in it
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # asyncio takes any number of seconds
                timeout_graceful_shutdown=max(grace - END_S, grace / 2),  # type: ignore[arg-type]  # the same
                backlog=BACKLOG,
            )
        )
        self.host, self.example_host = host, example_host
        self.connections = connections
        self.drain_delay_s = drain_delay
        self.service: Service = app.state.service
        self.keys: Keys | None = app.state.keys
        self.loop: asyncio.AbstractEventLoop | None = None
        self.listeners: Sequence[socket.socket] = ()
        self.draining: asyncio.Task[None] | None = None
        self.is_signalled = False
        self.exit = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop, self.listeners = asyncio.get_running_loop(), sockets or ()
        if self.service.jobs is not None:
            self.service.jobs.start(self.service.lanes)
        if self.keys is not None and threading.current_thread() is threading.main_thread():
            self.loop.add_signal_handler(signal.SIGHUP, self.reload_keys, self.keys)
        await super().startup(sockets=sockets)
        if self.started and sockets:
            base = f"http://{netloc(self.host, sockets[0].getsockname()[1])}"
            command = curl(base, asks_key=self.keys is not None, host=self.example_host)
            print(f"maskserve listens on {base}; try: {command}", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            transports = [connection.transport for connection in self.server_state.connections]
            self.connections.drop_stuck(transports, asyncio.get_running_loop().time(), self.service.request_timeout_s)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        if self.service.jobs is not None:
            await self.service.jobs.close()

    def reload_keys(self, keys: Keys) -> None:
        try:
            keys.reload()
        except SettingsError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            say(f"the keys were read again, {len(keys)} in all")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second does not wait, and is no clean end."""
        if self.is_signalled or self.loop is None:
            self.force_exit, self.should_exit = self.is_signalled, True
            self.exit = BY_SIGNAL + sig if self.is_signalled else 0
            return
        self.is_signalled = True
        self.loop.call_soon_threadsafe(self.begin_drain, self.drain_delay_s if sig == signal.SIGTERM else 0.0)

    def begin_drain(self, delay_s: float) -> None:
        self.draining = asyncio.ensure_future(self.drain(delay_s))

    async def drain(self, delay_s: float) -> None:
        """Refuses work from here on, except what was sent before the signal, and listens for `delay_s` more."""
        await self.settle()
        self.service.draining = True
        if self.service.jobs is not None:
            self.service.jobs.stop()
        await asyncio.sleep(delay_s)
        self.should_exit = True

    async def settle(self) -> None:
        """Takes in what the system holds: the requests that were sent before this call have begun when it returns."""
        for _ in range(BACKLOG):  # uvloop accepts one connection a turn
            if not is_awaited(self.listeners):
                break
            await asyncio.sleep(0)
        for _ in range(SETTLING_TURNS):
            await asyncio.sleep(0)
