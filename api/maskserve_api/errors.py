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
    ├── SourceError          source_not_allowed
    ├── SourceNotFoundError  source_not_found
    ├── MethodError          method_not_allowed
    ├── NotAcceptableError   not_acceptable
    ├── BodyTimeoutError     body_timeout
    ├── MediaTypeError       unsupported_media_type
    ├── BusyError            busy
    ├── DrainingError        draining
    ├── DeadlineError        deadline_exceeded
    ├── NotOfferedError      not_offered
    ├── UnknownJobError      unknown_job
    ├── JobNotFinishedError  job_not_finished
    ├── JobExpiredError      job_expired
    ├── JobCancelledError    job_cancelled
    ├── JobLimitError        too_many_jobs
    ├── IdempotencyError     idempotency_mismatch
    ├── RangeError           range_not_satisfiable
    ├── SpoolError           spool_failed
    └── NoSpaceError         no_space

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


class SourceError(ServiceError):
    """`source` names what this service may not read: send the payload as the body, or ask who runs it."""

    code = "source_not_allowed"


class SourceNotFoundError(ServiceError):
    """`source` names no object that can be read: look at its address."""

    code = "source_not_found"


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


class UnknownJobError(ServiceError):
    """There is no such job of this key: it was forgotten, or never was; GET /v1/jobs lists those that are."""

    code = "unknown_job"


class JobNotFinishedError(ServiceError):
    """The job has not ended, so there is no result: ask again after Retry-After, or wait with ?wait=30 on the job."""

    code = "job_not_finished"


class JobExpiredError(ServiceError):
    """The result was kept as long as results are (--result-ttl), and is gone: submit it again, under a new Idempotency-Key."""

    code = "job_expired"


class JobCancelledError(ServiceError):
    """The job was cancelled, so there is no result: submit it again, with a new Idempotency-Key."""

    code = "job_cancelled"


class JobLimitError(ServiceError):
    """As many jobs of this key have not ended as may be: wait for some, or cancel them."""

    code = "too_many_jobs"


class IdempotencyError(ServiceError):
    """The Idempotency-Key was used before, for another request: take a new key for each request."""

    code = "idempotency_mismatch"


class RangeError(ServiceError):
    """The result has no byte of the range: Content-Range says how many it has."""

    code = "range_not_satisfiable"
    n_bytes = 0


class SpoolError(ServiceError):
    """The folder in which the service keeps its jobs cannot be used: try again after Retry-After, or tell who runs it."""

    code = "spool_failed"


class NoSpaceError(ServiceError):
    """The disk of the service is full, or the jobs of all keys keep what they may: forget some, or try again later."""

    code = "no_space"


class Disconnected(Exception):  # noqa: N818  # no error: nobody is left to be told
    """The client went away."""
