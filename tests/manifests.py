"""The files that run the image, read: what Kubernetes and compose start, and the commands that the documents show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "kubernetes"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
COMPOSE = ROOT / "compose.yaml"
IMAGE = re.compile(r"maskserve(:[\w.]+)?")
SHELL = ["/bin/sh", "-c"]
VARIABLE = re.compile(r"\$\{?\w+(?::-([^}]*))?\}?")


@cache
def objects(path: Path) -> list[dict[str, Any]]:
    """What a manifest describes."""
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    """Every object of these kinds in configs/kubernetes."""
    return [found for path in FILES for found in objects(path) if found["kind"] in kinds]


def named(kind: str, name: str) -> dict[str, Any]:
    """The object of this kind and name."""
    return next(found for found in of_kind(kind) if found["metadata"]["name"] == name)


@dataclass(frozen=True, slots=True)
class Started:
    """A container: where it is described, what the file says of it, of its pod, and of what makes the pod."""

    where: str
    container: dict[str, Any]
    pod: dict[str, Any]
    owner: dict[str, Any]

    def __str__(self) -> str:
        return self.where

    @property
    def command(self) -> list[str]:
        """The words of `maskserve`, as the image gets them or a shell hands them on."""
        args = [str(word) for word in self.container["args"]]
        if "command" not in self.container:
            return args
        assert self.container["command"] == SHELL, "the image's own entry point, or a shell that gives way to it"
        (script,) = args
        assert "exec maskserve " in script, "exec: else the shell is pid 1, and SIGTERM never reaches maskserve"
        return shlex.split(script.split("exec maskserve ")[1])


def started() -> list[Started]:
    """Every container of the manifests."""
    found = []
    for path in FILES:
        for owner in objects(path):
            pod = owner.get("spec", {}).get("template", {}).get("spec", {})
            found += [Started(f"{path.name}", container, pod, owner) for container in pod.get("containers", [])]
    return found


def compose() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml, with the defaults of its variables filled in."""
    text = VARIABLE.sub(lambda variable: variable[1] or "", COMPOSE.read_text())
    services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return services


def shown(page: Path) -> Iterator[str]:
    """The lines of a page's sh blocks, continued ones joined, without comments."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if command := line.split(" # ")[0].strip():
                yield command


def commands(line: str) -> Iterator[list[str]]:
    """The words of each `maskserve` in a line, alone or in a container of that image."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    for is_between, part in groupby(lexer, key=lambda word: not set(word) - set("|&;")):
        words = [] if is_between else [*dropwhile(re.compile(r"\w+=").match, part)]
        if words[:1] == ["maskserve"]:
            yield words[1:]
        elif words[:2] == ["docker", "run"]:
            at = next(i for i, word in enumerate(words) if IMAGE.fullmatch(word))
            yield words[at + 1 :]
