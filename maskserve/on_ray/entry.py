"""What Ray calls in a worker. It travels by value, so that a node without maskserve, or with another one, is told of in words."""

from __future__ import annotations

from typing import Any


def entry(wanted: dict[str, Any], function: bytes, task: bytes, *objects: Any) -> tuple[Any, Any]:
    """(how the task went, what stays in the object store): (word, value, lines for people) and a value or None."""
    import os
    import socket
    import sys

    # before torch is imported, which reads them once
    os.environ["MASKSERVE_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(wanted["threads"])
    # Ray puts the driver's current folder here: a file called random.py in it would otherwise be the library's
    sys.path[:] = [path for path in sys.path if path not in wanted["strangers"]]
    try:
        from maskserve.on_ray import worker
    except ImportError as error:
        line = (
            f"node {socket.gethostname()} cannot import maskserve ({error}); install maskserve {wanted['versions']['maskserve']} "
            f"for {sys.executable} on every node"
        )
        return ("unfit", line, []), None
    return worker.answer(wanted, function, task, objects)
