"""The process at the other end of maskserve.processes: takes tasks from a socket, answers, and ends when its parent does."""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import NoReturn

from maskserve.errors import DeviceLostError, MaskserveError

PR_SET_PDEATHSIG = 1
LOST = "lost"
"""What a worker says at last whose device is lost."""


def main(fd: int, parent: int, is_tied: bool) -> NoReturn:
    """Runs tasks until there are no more. Ctrl-C reaches the whole group: the parent decides what it means."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(fd, parent, is_tied)
    connection = Connection(fd)
    try:
        function = pickle.loads(connection.recv_bytes())
        getattr(function, "prepare", lambda: None)()
    except Exception as error:
        connection.send(("broken", portable(error)))
        os._exit(1)
    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = ("result", function(pickle.loads(message)))
        except DeviceLostError as error:  # every later task would fail here, and none in a new process
            answer = (LOST, error)
        except Exception as error:
            answer = ("error", portable(error))
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)
        except Exception as error:
            connection.send(("error", portable(error)))
        if answer[0] == LOST:
            os._exit(1)


def end_with(fd: int, parent: int, is_tied: bool) -> None:
    """Have this process end as soon as its parent is gone, whatever it is doing.

    The kernel's own way fires when the *thread* that made us ends, so that it serves only where that is the main one;
    a thread that waits for the other end of the socket to close serves everywhere, once it gets the interpreter.
    """
    if is_tied:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=watch, args=(fd,), daemon=True).start()
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)


def watch(fd: int) -> NoReturn:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    while not poll.poll():
        pass
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error as one that can be sent; what nobody expected keeps its traceback as a note."""
    if not isinstance(error, MaskserveError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
