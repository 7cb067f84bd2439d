"""The outermost layer: request ids, who may ask, where errors become problems, and what is recorded. Pure ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskserve.errors import MaskserveError
from maskserve_api import logs
from maskserve_api.errors import (
    CrossSiteError,
    Disconnected,
    DrainingError,
    FramingError,
    HeadersTooLargeError,
    HostError,
)
from maskserve_api.keys import Keys
from maskserve_api.metrics import Metrics
from maskserve_api.problems import problem, status_of, translated
from maskserve_api.record import KEY, RECORD, Record
from maskserve_api.trace import trace_of

log = logging.getLogger("maskserve.api")

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""A kubelet probes by IP and has no key, Prometheus too: no guard stands before these, and a 200 of theirs is no news."""
MAX_HEADERS = 128
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DISCARDED_BYTES = 1 << 16
LINGER_S = 2.0


class Edge:
    """Wraps an application; `allowed_hosts` None allows all, `keys` None asks for none."""

    def __init__(
        self, app: ASGIApp, allowed_hosts: Collection[str] | None, keys: Keys | None, metrics: Metrics
    ) -> None:
        self.app = app
        self.allowed_hosts = allowed_hosts
        self.keys = keys
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        try:
            check_framing(scope["http_version"], exchange.headers)
            if scope["path"] not in OPEN:  # the path that the router reads, too
                self.admit(scope, exchange.headers)
            await self.app(scope, exchange.receive, exchange.send)
        except Disconnected:
            exchange.record.code = "disconnected"
        except asyncio.CancelledError:  # the grace of a shutdown is over, and with it the time to linger
            await exchange.fail(DrainingError("the service is shutting down; try again"), lingers=False)
        except Exception as error:
            await exchange.fail(error)
        finally:
            self.ended(scope, exchange.record)

    def ended(self, scope: Scope, record: Record) -> None:
        """The one place where a request is counted and logged."""
        seconds = record.seconds()
        self.metrics.count(record, seconds)
        if logs.requests.isEnabledFor(logging.INFO) and not (scope["path"] in OPEN and record.status == 200):
            logs.tell(record, record.event(scope, seconds))

    def admit(self, scope: Scope, headers: Headers) -> None:
        """Refuses, before a byte of the body is read, who may not ask."""
        check_host(headers, self.allowed_hosts)
        check_origin(scope["method"], headers)
        if self.keys is not None:
            scope[KEY] = self.keys.name_of(headers)


class Exchange:
    """One request and its response: names it, and knows how far both have come."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        self.record = scope[RECORD] = Record(self.request_id, trace_of(self.headers))
        self.is_started = False
        self._receive, self._send = receive, send
        self._is_read = "transfer-encoding" not in self.headers and self.headers.get("content-length", "0") == "0"

    async def receive(self) -> Message:
        message = await self._receive()
        self.record.bytes_in += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._is_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            self.record.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
                *self.record.trace.headers(),
            ]
        else:
            self.record.bytes_out += memoryview(message.get("body", b"")).nbytes
        await self._send(message)

    async def fail(self, error: Exception, *, lingers: bool = True) -> None:
        """Tells of `error`, if it is not too late."""
        if self.is_started:  # the client sees a body that is too short
            self.record.code = "broke_off"
            log.warning("request %s: the reply broke off: %s", self.request_id, type(error).__name__)
            return
        known = translated(error)
        self.record.code = known.code
        if status_of(type(known)) == 500:
            log.error("request %s failed: %s", self.request_id, logs.traced(error))
        status, headers, body = problem(known, self.request_id)
        must_close = self._must_close(known)
        if must_close:
            headers.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        lingers = lingers and must_close
        await self.send({"type": "http.response.body", "body": body, "more_body": lingers})
        if lingers:
            await self._linger()
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def _must_close(self, error: MaskserveError) -> bool:
        """Whether the rest of the body is more than the server should read for nothing."""
        if isinstance(error, FramingError):
            return True
        return not self._is_read and int(self.headers.get("content-length", DISCARDED_BYTES + 1)) > DISCARDED_BYTES

    async def _linger(self) -> None:
        """Reads on for a moment: closed at once, the connection would be reset and take the problem with it."""
        try:
            async with asyncio.timeout(LINGER_S):
                while not self._is_read:
                    await self.receive()
        except TimeoutError:
            return


def check_framing(http_version: str, headers: Headers) -> None:
    """Refuses what a proxy may have read as another request than this one: the stuff of request smuggling."""
    if len(headers) > MAX_HEADERS:
        raise HeadersTooLargeError(f"the request has {len(headers)} headers; at most {MAX_HEADERS} are read")
    if "transfer-encoding" not in headers:
        return
    if "content-length" in headers:
        raise FramingError("the request has Content-Length and Transfer-Encoding; send one of them")
    if http_version != "1.1":
        raise FramingError("Transfer-Encoding belongs to HTTP/1.1; send a Content-Length")


def check_host(headers: Headers, allowed: Collection[str] | None) -> None:
    """Refuses a Host that is not ours: a page whose name was made to point here must not reach a local service."""
    if allowed is None:
        return
    host = without_port(headers.get("host", "").lower())
    if host not in allowed:
        raise HostError(
            f"this Host is not served here: use {', '.join(sorted(allowed))}; who runs the service adds others by --allowed-host",
            parameter="Host",
        )


def without_port(netloc: str) -> str:
    """The host of "host:port".

    >>> without_port("[::1]:8000"), without_port("localhost")
    ('[::1]', 'localhost')
    """
    return re.sub(r":[0-9]*$", "", netloc)


def check_origin(method: str, headers: Headers) -> None:
    """Refuses what a page of another site makes a browser send; following a link here is no such thing."""
    site = headers.get("sec-fetch-site", "none")
    is_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    origin = headers.get("origin")
    is_foreign = origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()
    if is_foreign or (site not in ("none", "same-origin") and not is_link):
        raise CrossSiteError(
            "a page of another site may not use this service: serve it from the service's own host (--allowed-host names more)",
            parameter="Origin",
        )
