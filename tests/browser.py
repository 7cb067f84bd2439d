"""A real browser for tests: chromium without a window, driven over its debugging socket."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
WAIT_S = 60


class Tab:
    """A page; `requested` and `complaints` are the URLs it asked for and what its console said."""

    def __init__(self, socket: ClientConnection) -> None:
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._socket, self._ids = socket, count(1)
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (told := json.loads(self._socket.recv(timeout=WAIT_S))).get("id") != number:
            self._hear(told)
        return told["result"]

    def _hear(self, told: dict[str, Any]) -> None:
        if told["method"] == "Network.requestWillBeSent":
            self.requested.append(told["params"]["request"]["url"])
        elif told["method"] in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(told["params"]))

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of `expression` once it is truthy."""
        end = time.monotonic() + WAIT_S
        while not (value := self.value(expression)):
            assert time.monotonic() < end, (expression, self.complaints, self.value("document.body.innerText"))
            time.sleep(0.1)
        return value


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            port = next(found[1] for line in child.stderr if (found := re.search(r"ws://127.0.0.1:(\d+)/", line)))
            pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=WAIT_S).json()
            url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(url, max_size=None, proxy=None, open_timeout=WAIT_S) as socket:
                yield Tab(socket)
        finally:
            child.terminate()
