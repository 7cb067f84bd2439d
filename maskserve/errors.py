"""Every error that maskserve raises on purpose, each class with a stable `code`.

    MaskserveError
    ├── RequestError (ValueError)          what was asked for is wrong
    │   ├── UnknownOpError                 unknown_op
    │   ├── ParameterError                 bad_parameter
    │   ├── DimError (IndexError)          dim_out_of_range
    │   ├── DtypeError (TypeError)         dtype_not_accepted
    │   ├── UnknownTensorError             unknown_tensor
    │   ├── UncoveredFunctionError (TypeError)   function_not_covered
    │   ├── GradientError                  gradient_not_available
    │   ├── DeviceError                    device_unavailable
    │   └── BackendError                   backend_cannot_serve
    ├── DataError (ValueError)             the request is fine, the cells are not
    │   ├── ShapeError                     shape_mismatch
    │   ├── MaskError                      bad_mask
    │   │   ├── MaskShapeError             mask_shape
    │   │   ├── MaskDtypeError (TypeError) mask_dtype
    │   │   └── MaskMismatchError          masks_differ
    │   ├── MaskedValueError               masked_value
    │   ├── EmptySliceError                empty_slice
    │   ├── NanError                       nan_found
    │   └── IntegerOverflowError (OverflowError)   integer_overflow
    ├── PayloadError (ValueError)          the bytes are not a payload: malformed_payload
    │   ├── TooLargeError                  too_large
    │   ├── NotComputableError             not_computable
    │   ├── OrphanMaskError                orphan_mask
    │   ├── AmbiguousMaskError             ambiguous_mask
    │   └── StateError                     bad_state
    ├── InputError (OSError)               input_not_readable
    │   └── InputNotFoundError (FileNotFoundError)   input_not_found
    ├── OutputError (OSError)              output_not_writable
    │   └── OutputExistsError (FileExistsError)      output_exists
    ├── SettingsError (ValueError)         bad_setting
    ├── MissingExtraError (ImportError)    extra_not_installed
    └── OutOfMemoryError (MemoryError)     out_of_memory

The command line maps classes to exit codes and the service to HTTP status, each in one table of its own.
A message says what was given, what is allowed and what to do; it never holds a tensor's contents.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MaskserveError(Exception):
    """The root of the tree; `parameter` names the argument at fault and `allowed` what it may be, where that helps."""

    code: ClassVar[str] = "maskserve_error"

    def __init__(self, message: str, *, parameter: str | None = None, allowed: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.allowed = tuple(allowed)

    def __str__(self) -> str:
        return self.message


class RequestError(MaskserveError, ValueError):
    code = "bad_request"


class UnknownOpError(RequestError):
    code = "unknown_op"


class ParameterError(RequestError):
    code = "bad_parameter"


class DimError(RequestError, IndexError):
    code = "dim_out_of_range"


class DtypeError(RequestError, TypeError):
    code = "dtype_not_accepted"


class UnknownTensorError(RequestError):
    code = "unknown_tensor"


class UncoveredFunctionError(RequestError, TypeError):
    code = "function_not_covered"


class GradientError(RequestError, RuntimeError):
    code = "gradient_not_available"


class DeviceError(RequestError):
    code = "device_unavailable"


class BackendError(RequestError):
    code = "backend_cannot_serve"


class DataError(MaskserveError, ValueError):
    code = "bad_data"


class ShapeError(DataError):
    code = "shape_mismatch"


class MaskError(DataError):
    code = "bad_mask"


class MaskShapeError(MaskError):
    code = "mask_shape"


class MaskDtypeError(MaskError, TypeError):
    code = "mask_dtype"


class MaskMismatchError(MaskError):
    code = "masks_differ"


class MaskedValueError(DataError):
    code = "masked_value"


class EmptySliceError(DataError):
    code = "empty_slice"


class NanError(DataError):
    code = "nan_found"


class IntegerOverflowError(DataError, OverflowError):
    code = "integer_overflow"


class PayloadError(MaskserveError, ValueError):
    code = "malformed_payload"


class TooLargeError(PayloadError):
    code = "too_large"


class NotComputableError(PayloadError):
    code = "not_computable"


class OrphanMaskError(PayloadError):
    code = "orphan_mask"


class AmbiguousMaskError(PayloadError):
    code = "ambiguous_mask"


class StateError(PayloadError):
    code = "bad_state"


class InputError(MaskserveError, OSError):
    code = "input_not_readable"


class InputNotFoundError(InputError, FileNotFoundError):
    code = "input_not_found"


class OutputError(MaskserveError, OSError):
    code = "output_not_writable"


class OutputExistsError(OutputError, FileExistsError):
    code = "output_exists"


class SettingsError(MaskserveError, ValueError):
    code = "bad_setting"


class MissingExtraError(MaskserveError, ImportError):
    code = "extra_not_installed"


class OutOfMemoryError(MaskserveError, MemoryError):
    code = "out_of_memory"


class ConversionWarning(UserWarning):
    """What was left out or decided while a file of another format was read."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """ '; did you mean "mean"?', or nothing when no allowed word is close.

    >>> nearest("maen", ["mean", "sum"])
    '; did you mean mean?'
    """
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {close[0]}?" if close else ""
