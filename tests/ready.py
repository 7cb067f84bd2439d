"""The command line in processes that are forked from one that has imported it: a tenth of the time of one that begins anew.

For tests of what a command says, many in a row; what is about a process of its own starts one (tests.command_line).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
MOST = 1 << 20
CALLER = f"""#!{sys.executable} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as to:
    to.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "ready"))
    said = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(to, [said.encode()], [0, 1, 2])
    sys.exit(int(to.recv(9) or 70))
"""


@contextmanager
def ready(folder: Path) -> Iterator[Path]:
    """A folder in which `maskserve` is a command that is ready at once: put it in front of PATH."""
    caller = folder / "maskserve"
    caller.write_text(CALLER)
    caller.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "ready"))
        listener.listen()
        words = [sys.executable, "-m", "tests.ready", str(listener.fileno())]
        with subprocess.Popen(words, cwd=ROOT, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL) as server:
            try:
                yield folder
            finally:
                server.terminate()


def serve(listener: socket.socket) -> NoReturn:
    """Runs each command that is called, those of a pipe side by side."""
    for module in ("maskserve.answers", "maskserve_cli.render", "maskserve_cli.work"):  # what every verb imports
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    while True:
        to, _ = listener.accept()
        with to:
            if not os.fork():
                listener.close()
                answer(to)
                os._exit(0)


def answer(to: socket.socket) -> None:
    """Runs a command in a process of its own, and tells its caller the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, descriptors, *_ = socket.recv_fds(to, MOST, 3)
    child = os.fork()
    if not child:
        to.close()
        os._exit(run(*json.loads(said), descriptors))
    for descriptor in descriptors:
        os.close(descriptor)
    with suppress(BrokenPipeError):
        to.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def run(words: list[str], folder: str, variables: dict[str, str], descriptors: list[int]) -> int:
    """The exit code of a command in this process, which has become the caller's."""
    from maskserve_cli.__main__ import main

    for own, descriptor in enumerate(descriptors):
        os.dup2(descriptor, own)
        os.close(descriptor)
    # new ones: those of the start know what their descriptors were
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115  # as long as the process
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv[1:] = words
    try:
        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
