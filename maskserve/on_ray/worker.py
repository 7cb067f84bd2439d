"""A task on a node of a cluster: the worker is looked at and made ready once, then runs what it is given."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from maskserve.errors import DeviceLostError
from maskserve.version import ORDER_VERSION, version
from maskserve.worker import portable

Answer = tuple[tuple[str, Any, list[str]], Any]
"""(word, value, lines for people), and what stays in the object store."""


class UnfitError(Exception):
    """Why this node cannot do what is asked."""


def versions() -> dict[str, str]:
    """What the bits of a result depend on, which must be the same on every node."""
    from importlib.metadata import version as installed

    return {"maskserve": version(), "order": str(ORDER_VERSION), "torch": installed("torch")}


def answer(wanted: Mapping[str, Any], function: bytes, task: bytes, objects: Sequence[Any]) -> Answer:
    """How the task went, once this worker is ready; what it says on stderr goes along."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        word, value = outcome(wanted, function, task, objects)
    lines = said.getvalue().splitlines()
    if word == "result" and wanted["stays"]:
        return (word, getattr(value, "nbytes", 0), lines), value
    return (word, value, lines), None


def outcome(wanted: Mapping[str, Any], function: bytes, task: bytes, objects: Sequence[Any]) -> tuple[str, Any]:
    try:
        run = ready(tuple(wanted["versions"].items()), wanted["folder"], function)
    except UnfitError as unfit:
        return "unfit", str(unfit)
    except Exception as error:
        return "broken", portable(error)
    try:
        return "result", run(pickle.loads(task), *objects)
    except DeviceLostError as error:  # Ray keeps its workers, and this one can do nothing more
        print(f"maskserve: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)
    except Exception as error:
        return "error", portable(error)


@cache
def ready(asked: tuple[tuple[str, str], ...], folder: str, function: bytes) -> Callable[..., Any]:
    """The function, prepared, in the folder of the command, in a worker whose versions are those of the driver."""
    here = versions()
    for name, wanted in asked:
        if here[name] != wanted:
            raise UnfitError(
                f"node {socket.gethostname()} has {name} {here[name]}, this command {wanted}: bits could differ; install the "
                "same versions on every node"
            )
    try:
        os.chdir(folder)
    except OSError as error:
        raise UnfitError(
            f"node {socket.gethostname()} has no folder {folder} ({error.strerror}), where this command runs; mount it there, or "
            "start the command in a folder that every node has, such as /"
        ) from None
    found: Callable[..., Any] = pickle.loads(function)
    getattr(found, "prepare", lambda: None)()
    return found
