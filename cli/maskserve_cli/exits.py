"""What the shell is told: one exit code for every error, in one table, and one line that says what went wrong.

The codes are those of sysexits, so that a scheduler can tell what to try again.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType

from maskserve import errors
from maskserve.errors import MaskserveError

DONE = 0
DIFFERENT = 1
"""What `diff` found; no error has this code."""
USAGE = 2
BAD_DATA = 65
NO_INPUT = 66
UNAVAILABLE = 69
INTERNAL = 70
CANNOT_CREATE = 73
IO_ERROR = 74
TRY_AGAIN = 75
NO_PERMISSION = 77
BAD_CONFIGURATION = 78
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

MEANINGS: Mapping[int, str] = MappingProxyType(
    {
        DONE: "done",
        DIFFERENT: "diff found a difference",
        USAGE: "wrong words, or a request that cannot be computed",
        BAD_DATA: "bad data",
        NO_INPUT: "no such input",
        UNAVAILABLE: "a service or store is down",
        INTERNAL: "internal error",
        CANNOT_CREATE: "the output cannot be made, or exists",
        IO_ERROR: "input or output failed",
        TRY_AGAIN: "try again: no memory, a lost GPU, an input being written",
        NO_PERMISSION: "not permitted",
        BAD_CONFIGURATION: "bad configuration",
        INTERRUPTED: "interrupted",
        BROKEN_PIPE: "nobody reads the output",
        TERMINATED: "terminated",
    }
)
"""What the codes say; `maskserve --help` lists them."""

BY_CLASS: Mapping[type[MaskserveError], int] = MappingProxyType(
    {
        errors.RequestError: USAGE,
        errors.DataError: BAD_DATA,
        errors.PayloadError: BAD_DATA,
        errors.InputError: IO_ERROR,
        errors.InputNotFoundError: NO_INPUT,
        errors.InputChangedError: TRY_AGAIN,
        errors.StoreError: UNAVAILABLE,
        errors.OutputError: CANNOT_CREATE,
        errors.SettingsError: BAD_CONFIGURATION,
        errors.MissingExtraError: BAD_CONFIGURATION,  # not 69: trying again installs nothing
        errors.WorkerLostError: INTERNAL,  # not 75: it has been tried again by then
        errors.ClusterError: UNAVAILABLE,
        errors.DeviceLostError: TRY_AGAIN,  # by a new process
        errors.OutOfMemoryError: TRY_AGAIN,
    }
)
"""The exit code of a class and of those below it."""

BY_ERRNO: Mapping[int, int] = MappingProxyType(
    {
        errno.EACCES: NO_PERMISSION,
        errno.EPERM: NO_PERMISSION,
        errno.ENOSPC: IO_ERROR,
        errno.EDQUOT: IO_ERROR,
        errno.EIO: IO_ERROR,
        errno.EAGAIN: TRY_AGAIN,
        errno.EISDIR: USAGE,
        errno.ESPIPE: USAGE,  # a pipe or a device where only a file is read
        errno.EILSEQ: BAD_DATA,  # a name in a store that no address has
    }
)
"""What the system said is more exact than that a file could not be read or written."""


class Terminated(BaseException):
    """SIGTERM, raised where the program stands so that nothing half-written stays behind."""


def code_of(error: BaseException) -> int:
    """The exit code of `error`; INTERNAL for one that nobody expected."""
    if isinstance(error, OSError) and error.errno is not None and error.errno in BY_ERRNO:
        return BY_ERRNO[error.errno]
    for kind in type(error).__mro__:
        if kind in BY_CLASS:
            return BY_CLASS[kind]
    if is_out_of_memory(error):
        return TRY_AGAIN
    return IO_ERROR if isinstance(error, OSError) else INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on either kind of device, ran out of memory; torch is not imported to tell."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explained(error: BaseException) -> str:
    """What the line says of `error`."""
    if isinstance(error, MaskserveError):
        return error.message
    if is_out_of_memory(error):
        return "out of memory; give a smaller file, or try again where more memory is free"
    if isinstance(error, OSError):
        return f"{error.filename or 'stdout'}: {error.strerror or error}"
    return f"internal error: {type(error).__name__}: {error}; MASKSERVE_DEBUG=1 shows where"


def report(error: BaseException) -> int:
    """The exit code of `error`, after its line on stderr, or its traceback where MASKSERVE_DEBUG asks for one."""
    code = code_of(error)
    if code == INTERNAL and os.environ.get("MASKSERVE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    say(explained(error))
    return code


def say(words: str) -> None:
    """One line on stderr; what does not print is escaped, and a closed stderr is no reason to fail."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(words.splitlines()))
    write_line(f"maskserve: {line}")


def say_data(record: Mapping[str, object]) -> None:
    """One line of JSON on stderr, for programs."""
    write_line(json.dumps(record))


def write_line(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return
