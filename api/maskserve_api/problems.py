"""Errors as RFC 9457 problems: the one table from error class to status, and a body that is small whatever was sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from maskserve import errors
from maskserve.errors import MaskserveError
from maskserve_api import errors as service

CONTENT_TYPE = "application/problem+json"
MAX_BYTES = 8192
DETAIL_BYTES, PARAMETER_BYTES, ALLOWED_BYTES = 2048, 512, 3072  # as JSON; the detail stands in a problem twice
RETRY_AFTER_S: Mapping[int, int] = MappingProxyType({409: 1, 429: 1, 503: 1, 507: 10})
"""Statuses that may pass, and the seconds after which it is worth to ask again."""
FAILED = "the service failed; its log has the reason under this request_id"
Headers = list[tuple[bytes, bytes]]

STATUS: Mapping[type[MaskserveError], int] = MappingProxyType(
    {
        errors.MaskserveError: 500,
        errors.RequestError: 422,
        errors.UnknownOpError: 422,
        errors.ParameterError: 422,
        errors.DimError: 422,
        errors.DtypeError: 422,
        errors.UnknownTensorError: 422,
        errors.ExpressionError: 422,
        errors.UncoveredFunctionError: 422,
        errors.GradientError: 422,
        errors.DeviceError: 422,
        errors.BackendError: 422,
        errors.DataError: 422,
        errors.ShapeError: 422,
        errors.MaskError: 422,
        errors.MaskShapeError: 422,
        errors.MaskDtypeError: 422,
        errors.MaskMismatchError: 422,
        errors.MaskedValueError: 422,
        errors.EmptySliceError: 422,
        errors.NanError: 422,
        errors.IntegerOverflowError: 422,
        errors.PayloadError: 400,
        errors.TooLargeError: 413,
        errors.NotComputableError: 422,
        errors.OrphanMaskError: 422,
        errors.AmbiguousMaskError: 422,
        errors.StateError: 400,
        errors.InputError: 500,  # files are the service's own: no request names one
        errors.InputNotFoundError: 500,
        errors.InputChangedError: 500,
        errors.StoreError: 503,
        errors.OutputError: 500,
        errors.OutputExistsError: 500,
        errors.SettingsError: 500,
        errors.MissingExtraError: 500,
        errors.WorkerLostError: 500,
        errors.ClusterError: 500,  # the service computes by itself
        errors.DeviceLostError: 503,
        errors.OutOfMemoryError: 503,
        service.ServiceError: 500,
        service.InternalError: 500,
        service.ProtocolError: 400,
        service.HeadersTooLargeError: 431,
        service.FramingError: 400,
        service.UnauthorizedError: 401,
        service.HostError: 403,
        service.CrossSiteError: 403,
        service.UnknownPathError: 404,
        service.SourceError: 403,
        service.SourceNotFoundError: 404,
        service.MethodError: 405,
        service.NotAcceptableError: 406,
        service.BodyTimeoutError: 408,
        service.MediaTypeError: 415,
        service.BusyError: 503,
        service.DrainingError: 503,
        service.DeadlineError: 504,
        service.NotOfferedError: 501,
        service.UnknownJobError: 404,
        service.JobNotFinishedError: 409,
        service.JobExpiredError: 410,
        service.JobCancelledError: 410,
        service.JobLimitError: 429,
        service.IdempotencyError: 422,
        service.RangeError: 416,
        service.SpoolError: 503,
        service.NoSpaceError: 507,
    }
)


def status_of(error: type[MaskserveError]) -> int:
    """The status of an error class: its own, or the nearest parent's."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


def classes(root: type[MaskserveError] = MaskserveError) -> Iterator[type[MaskserveError]]:
    """The tree of errors, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def title(error: type[MaskserveError]) -> str:
    """The code as words.

    >>> title(errors.DimError)
    'Dim out of range'
    """
    return error.code.replace("_", " ").capitalize()


def translated(error: Exception) -> MaskserveError:
    """`error` as one of the tree: what nobody foresaw says nothing of its insides."""
    if isinstance(error, MaskserveError):
        return error
    # torch has no class for a failed allocation on the CPU, only this text
    if isinstance(error, MemoryError) or "alloc_cpu.cpp" in str(error) or type(error).__name__ == "OutOfMemoryError":
        return errors.OutOfMemoryError("the request needs more memory than is free now; try again, or send less")
    return service.InternalError(FAILED)


def problem(error: MaskserveError, request_id: str) -> tuple[int, Headers, bytes]:
    """The status, headers and body that tell of `error`."""
    kind = type(error)
    status = status_of(kind)
    if (
        status == 500 and kind is not errors.WorkerLostError
    ):  # it may name settings and paths, which are nobody's business
        error = service.InternalError(FAILED)
    detail = clipped(error.message, DETAIL_BYTES)
    body = encoded(
        {
            "type": f"/docs/errors#{kind.code}",
            "title": title(kind),
            "status": status,
            "code": kind.code,
            "detail": detail,
            "error": detail,
            "parameter": error.parameter and clipped(error.parameter, PARAMETER_BYTES),
            "allowed": few(error.allowed),
            "request_id": request_id,
        }
    )
    assert len(body) <= MAX_BYTES
    return status, headers(error, status, len(body)), body


def headers(error: MaskserveError, status: int, n_bytes: int) -> Headers:
    given = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", str(n_bytes).encode())]
    if status in RETRY_AFTER_S:
        given.append((b"retry-after", str(RETRY_AFTER_S[status]).encode()))
    if isinstance(error, service.UnauthorizedError):
        given.append((b"www-authenticate", b'Bearer realm="maskserve"'))
    if isinstance(error, service.RangeError):
        given.append((b"content-range", f"bytes */{error.n_bytes}".encode()))
    if isinstance(error, service.MethodError):
        given.append((b"allow", ", ".join(error.allowed).encode("ascii", "replace")))
    return given


def encoded(value: Any) -> bytes:
    """`value` as JSON in UTF-8; half a surrogate pair, which UTF-8 lacks, stays JSON's own escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def clipped(text: str, n_bytes: int) -> str:
    """`text`, or a beginning of it that takes at most `n_bytes` as JSON.

    >>> clipped("a" * 20, 10)
    'aaa…'
    """
    text = text if len(text) <= n_bytes else text[:n_bytes] + "…"
    while (size := len(encoded(text))) > n_bytes:
        text = text[: max(0, (len(text) - 1) * (n_bytes - 5) // size)] + "…"
    return text


def few(words: Iterable[str]) -> list[str]:
    """The first of `words`, as many as a problem has room for."""
    kept: list[str] = []
    room = ALLOWED_BYTES
    for word in words:
        room -= len(encoded(word)) + 2
        if room < 0:
            break
        kept.append(word)
    return kept
