"""Every error that maskserve raises on purpose, each class with a stable `code`.

    MaskserveError
    ├── RequestError (ValueError)          what was asked for is wrong
    │   ├── UnknownOpError                 unknown_op
    │   ├── ParameterError                 bad_parameter
    │   ├── DimError (IndexError)          dim_out_of_range
    │   ├── DtypeError (TypeError)         dtype_not_accepted
    │   ├── UnknownTensorError             unknown_tensor
    │   ├── ExpressionError                bad_expression
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
    │   ├── InputNotFoundError (FileNotFoundError)   input_not_found
    │   └── InputChangedError              changed_during_read
    ├── StoreError (OSError)               store_unavailable
    ├── OutputError (OSError)              output_not_writable
    │   └── OutputExistsError (FileExistsError)      output_exists
    ├── SettingsError (ValueError)         bad_setting
    ├── MissingExtraError (ImportError)    extra_not_installed
    ├── WorkerLostError (RuntimeError)     worker_lost
    ├── ClusterError (RuntimeError)        cluster_unavailable
    ├── DeviceLostError (RuntimeError)     device_lost
    └── OutOfMemoryError (MemoryError)     out_of_memory

The command line maps classes to exit codes and the service to HTTP status, each in one table of its own.
A message says what was given, what is allowed and what to do; it never holds a tensor's contents.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

    def __reduce__(self) -> tuple[object, ...]:
        """With its errno, by which exit codes are told: OSError's own way to another process leaves it behind."""
        number = {"errno": self.errno} if isinstance(self, OSError) else {}
        return type(self), (self.message,), {**self.__dict__, **number}


class RequestError(MaskserveError, ValueError):
    """What is asked for is wrong, the data aside: correct the request."""

    code = "bad_request"


class UnknownOpError(RequestError):
    """The verb has no op of this name: take one of `allowed`; `maskserve ops` and /v1/ops list them."""

    code = "unknown_op"


class ParameterError(RequestError):
    """The op has no such parameter, or not with this value, or needs one: `parameter` names it, `allowed` what it may be."""

    code = "bad_parameter"


class DimError(RequestError, IndexError):
    """The tensor has no such dim, or it was given twice: dims are numbers from 0, from -1 backwards, or the payload's names."""

    code = "dim_out_of_range"


class DtypeError(RequestError, TypeError):
    """The op does not take cells of this dtype: convert them, or ask for another with `dtype`."""

    code = "dtype_not_accepted"


class UnknownTensorError(RequestError):
    """The payload has no tensor, or no variable, of the name that a parameter gives: take a name that it has."""

    code = "unknown_tensor"


class ExpressionError(RequestError):
    """The text is no expression over the payload's variables, or a term of it has too many cells: the message says where."""

    code = "bad_expression"


class UncoveredFunctionError(RequestError, TypeError):
    """A torch function has no rule for masks: the message names a way out, such as to_tensor(fill)."""

    code = "function_not_covered"


class GradientError(RequestError, RuntimeError):
    """The op has no gradient for these cells or parameters: the message says which have."""

    code = "gradient_not_available"


class DeviceError(RequestError):
    """The device is not there, or not fit for this: leave `device` out, or give cpu."""

    code = "device_unavailable"


class BackendError(RequestError):
    """The back end that was asked for cannot compute this: leave `backend` out, and another will."""

    code = "backend_cannot_serve"


class DataError(MaskserveError, ValueError):
    """The request is fine and the cells are not what it needs: the message says which must change."""

    code = "bad_data"


class ShapeError(DataError):
    """The shapes of two tensors do not go together, or the op does not take this one: reshape what the message names."""

    code = "shape_mismatch"


class MaskError(DataError):
    """The mask cannot be used so: the message says how."""

    code = "bad_mask"


class MaskShapeError(MaskError):
    """A mask has another shape than its tensor: as many dims, each of the same size or 1."""

    code = "mask_shape"


class MaskDtypeError(MaskError, TypeError):
    """A mask is not bool: send BOOL, true = valid."""

    code = "mask_dtype"


class MaskMismatchError(MaskError):
    """The masks differ under the policy strict: ask for intersect or union."""

    code = "masks_differ"


class MaskedValueError(DataError):
    """A value is needed where a cell is masked: fill it first."""

    code = "masked_value"


class EmptySliceError(DataError):
    """A slice has no valid cell and `empty` is raise: leave `empty` out for a masked result."""

    code = "empty_slice"


class NanError(DataError):
    """There is a NaN and `nan` is raise: omit counts NaN as masked, propagate as a value."""

    code = "nan_found"


class IntegerOverflowError(DataError, OverflowError):
    """An exact integer result does not fit into 64 bits: ask for a float `dtype`."""

    code = "integer_overflow"


class PayloadError(MaskserveError, ValueError):
    """The bytes are no payload, neither safetensors nor JSON: the message says where they go wrong."""

    code = "malformed_payload"


class TooLargeError(PayloadError):
    """The body, its header or the number of its tensors is beyond a limit: send less, or raise the limit where it runs."""

    code = "too_large"


class NotComputableError(PayloadError):
    """A payload that can be read and holds what cannot be computed on, or be written in this form: the message names it."""

    code = "not_computable"


class OrphanMaskError(PayloadError):
    """A mask has no tensor that it belongs to: call it X.mask beside X, or mask beside one variable."""

    code = "orphan_mask"


class AmbiguousMaskError(PayloadError):
    """Two tensors could be the mask of one: keep one, or name it with `mask`."""

    code = "ambiguous_mask"


class StateError(PayloadError):
    """What should be merged is no state of a reduction, or states do not belong together: make them anew from one plan."""

    code = "bad_state"


class InputError(MaskserveError, OSError):
    """A file cannot be read: the message has the reason."""

    code = "input_not_readable"


class InputNotFoundError(InputError, FileNotFoundError):
    """There is no such file: look at its path."""

    code = "input_not_found"


class InputChangedError(InputError):
    """The file changed while it was read, so that the result would be of no one version: try again once it is written."""

    code = "changed_during_read"


class StoreError(MaskserveError, OSError):
    """A store of objects does not answer, or answers with an error of its own: try again later."""

    code = "store_unavailable"


class OutputError(MaskserveError, OSError):
    """A file cannot be written: the message has the reason."""

    code = "output_not_writable"


class OutputExistsError(OutputError, FileExistsError):
    """The file is there already: allow that it is replaced, or take another name."""

    code = "output_exists"


class SettingsError(MaskserveError, ValueError):
    """A flag, a variable or a line of the settings file cannot be: the message says what it must be."""

    code = "bad_setting"


class MissingExtraError(MaskserveError, ImportError):
    """A library is missing that is not installed by default: install the extra that is named."""

    code = "extra_not_installed"


class WorkerLostError(MaskserveError, RuntimeError):
    """The processes that computed it died, again and again: give it more memory, or look at what the message names."""

    code = "worker_lost"


class ClusterError(MaskserveError, RuntimeError):
    """The Ray cluster does not answer, or has not what the tasks need: the message says what to look at; try again later."""

    code = "cluster_unavailable"


class DeviceLostError(MaskserveError, RuntimeError):
    """A device failed so that this process cannot use it any more: try again once a new one runs, or give another `device`."""

    code = "device_lost"


class OutOfMemoryError(MaskserveError, MemoryError):
    """Less memory is free than the request needs: try again later, or send less."""

    code = "out_of_memory"


class ConversionWarning(UserWarning):
    """What was left out or decided while a file of another format was read."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """'; did you mean "mean"?', or nothing when no allowed word is close.

    >>> nearest("maen", ["mean", "sum"])
    '; did you mean mean?'
    """
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def about(title: str) -> Iterator[None]:
    """Errors of the block say which file they are about, unless they name one already."""
    try:
        yield
    except (RequestError, DataError, PayloadError) as error:
        error.message = f"{title}: {error.message}"
        raise
