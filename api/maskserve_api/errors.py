"""What only the service can refuse, each class with a stable `code`: these are about HTTP, which the engine knows not.

    ServiceError
    ├── InternalError        internal
    ├── ProtocolError        bad_http
    ├── HeadersTooLargeError headers_too_large
    ├── FramingError         bad_framing
    ├── UnauthorizedError    unauthorized
    ├── HostError            host_not_allowed
    ├── CrossSiteError       cross_site
    ├── UnknownPathError     unknown_path
    ├── MethodError          method_not_allowed
    ├── NotAcceptableError   not_acceptable
    ├── BodyTimeoutError     body_timeout
    ├── MediaTypeError       unsupported_media_type
    ├── BusyError            busy
    ├── DrainingError        draining
    ├── DeadlineError        deadline_exceeded
    └── NotOfferedError      not_offered

Their status stands in the one table, in problems.py.
"""

from __future__ import annotations

from maskserve.errors import MaskserveError


class ServiceError(MaskserveError):
    """What only the service can refuse."""

    code = "service_error"


class InternalError(ServiceError):
    """The service failed; its log has the reason under `request_id`: report it."""

    code = "internal"


class ProtocolError(ServiceError):
    """The bytes are not HTTP/1.1: look at the client, and at what stands between."""

    code = "bad_http"


class HeadersTooLargeError(ServiceError):
    """The headers have more than 16 KiB, or are more than 128: send fewer, or a shorter query."""

    code = "headers_too_large"


class FramingError(ServiceError):
    """The length of the body can be read in two ways: send one Content-Length, or chunks."""

    code = "bad_framing"


class UnauthorizedError(ServiceError):
    """The service asks for a key, and there is none or an unknown one: send Authorization: Bearer KEY."""

    code = "unauthorized"


class HostError(ServiceError):
    """The Host header is none of the service's names: ask by its own name, or serve with --allowed-host."""

    code = "host_not_allowed"


class CrossSiteError(ServiceError):
    """A page of another origin asked, through a browser: serve the page and the service behind one name."""

    code = "cross_site"


class UnknownPathError(ServiceError):
    """There is no such path, op or model: /docs has those that are."""

    code = "unknown_path"


class MethodError(ServiceError):
    """The path does not take this method: `allowed` and the Allow header have those that it takes."""

    code = "method_not_allowed"


class NotAcceptableError(ServiceError):
    """The answer cannot have the form that Accept asks for: ask for one of `allowed`."""

    code = "not_acceptable"


class BodyTimeoutError(ServiceError):
    """The body was not there in time: send it faster, or less of it."""

    code = "body_timeout"


class MediaTypeError(ServiceError):
    """The body has a Content-Encoding that is not read: send gzip, deflate or none."""

    code = "unsupported_media_type"


class BusyError(ServiceError):
    """As many requests, or bytes of them, are at work as may be: try again after Retry-After."""

    code = "busy"


class DrainingError(ServiceError):
    """The service is shutting down: try another replica, or again after Retry-After."""

    code = "draining"


class DeadlineError(ServiceError):
    """The result was not there before the deadline: ask for more time (X-Request-Timeout, --request-timeout), or send less."""

    code = "deadline_exceeded"


class NotOfferedError(ServiceError):
    """A part of a protocol that this service leaves out: do without."""

    code = "not_offered"


class Disconnected(Exception):  # noqa: N818  # no error: nobody is left to be told
    """The client went away."""
