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
    code = "service_error"


class InternalError(ServiceError):
    code = "internal"


class ProtocolError(ServiceError):
    code = "bad_http"


class HeadersTooLargeError(ServiceError):
    code = "headers_too_large"


class FramingError(ServiceError):
    code = "bad_framing"


class UnauthorizedError(ServiceError):
    code = "unauthorized"


class HostError(ServiceError):
    code = "host_not_allowed"


class CrossSiteError(ServiceError):
    code = "cross_site"


class UnknownPathError(ServiceError):
    code = "unknown_path"


class MethodError(ServiceError):
    """`allowed` is what the Allow header says."""

    code = "method_not_allowed"


class NotAcceptableError(ServiceError):
    code = "not_acceptable"


class BodyTimeoutError(ServiceError):
    code = "body_timeout"


class MediaTypeError(ServiceError):
    code = "unsupported_media_type"


class BusyError(ServiceError):
    code = "busy"


class DrainingError(ServiceError):
    code = "draining"


class DeadlineError(ServiceError):
    code = "deadline_exceeded"


class NotOfferedError(ServiceError):
    """A part of a protocol that this service leaves out."""

    code = "not_offered"


class Disconnected(Exception):  # noqa: N818  # no error: nobody is left to be told
    """The client went away."""
