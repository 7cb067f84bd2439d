"""What a job file says: every key as a row, checked before any work. Imports no torch.

`python -m maskserve.batch.job` prints the table of keys in docs/batch.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maskserve.batch.conversion import CONVERT, conversion_words
from maskserve.cgroup import cpus, default_memory
from maskserve.errors import RequestError, SettingsError, nearest
from maskserve.executors import ENGINES, LOCAL
from maskserve.ops import verbs
from maskserve.settings import memory, one_of, whole, word
from maskserve.version import ORDER_VERSION, version

REQUIRED = object()
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a job file; `parse` reads its value, or raises ValueError with what it must be."""

    section: str
    name: str
    default: Any = REQUIRED
    shown: str = ""
    """The default in words, where it is computed."""
    help: str
    parse: Callable[[object], Any]

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def texts(given: object) -> tuple[str, ...]:
    """Words, from one or from a list."""
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("a path or a list of paths")
    return tuple(items)


def limit(given: object) -> int:
    """A count, or -1 for none."""
    if str(given) == "-1":
        return -1
    try:
        return whole(given)
    except ValueError:
        raise ValueError("a whole number, 0 or more, or -1 for no limit") from None


def the_version(given: object) -> int:
    if given is True or given != VERSION:
        raise ValueError(f"{VERSION}: the only version of job files that this maskserve reads")
    return VERSION


KEYS = (
    Key(section="", name="version", help=f"{VERSION}, the version of the job file's form", parse=the_version),
    Key(section="input", name="paths", default=(), help="files, folders that end in /, and patterns with * ? [ ] and ** "
        "(relative to the current directory); s3://BUCKET/KEY, folders and patterns of a store too", parse=texts),
    Key(section="input", name="list", default="", help="a file with one path a line, beside or instead of paths", parse=word),
    Key(section="output", name="to", help="the folder for outputs, made where it is missing; or s3://BUCKET/PREFIX", parse=word),
    Key(section="output", name="name", default="{stem}.safetensors", parse=word,
        help="an output's name, from {stem} and {name} (the input's file name without and with its suffix), {path} (its "
        "path) and {index:06d} (its place among all inputs)"),
    Key(section="output", name="exists", default="resume", parse=one_of("resume", "replace", "error"),
        help="resume: do what is missing; replace: do all again; error: stop where an output stands"),
    Key(section="run", name="workers", default=0, parse=whole,
        help="processes that compute; 0: the CPUs that the cgroup grants, with ray those of the cluster"),
    Key(section="run", name="engine", default=LOCAL, parse=one_of(*ENGINES),
        help="local: processes of this machine; ray: tasks of a Ray cluster (ray.md)"),
    Key(section="run", name="memory", default=None, shown="half of what the cgroup, or the cluster, grants",
        help="bytes that all workers together may hold, as 2GiB; at least 64MB for each of them", parse=memory),
    Key(section="run", name="retries", default=2, help="how often what may pass (exits 69, 74, 75) is tried again", parse=whole),
    Key(section="run", name="max_errors", default=-1, parse=limit,
        help="inputs that may fail before the job stops; -1: no limit; 0: stop at the first, as --fail-fast"),
    Key(section="run", name="summary", default="", shown="_maskserve/summary.json in the output folder",
        help="where the summary is written", parse=word),
)  # fmt: skip
SECTIONS = ("request", *dict.fromkeys(key.section for key in KEYS if key.section))
BY_PATH: Mapping[str, Key] = {key.path: key for key in KEYS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checked job file."""

    verb: str
    words: Mapping[str, Any]
    request: Mapping[str, Any]
    """The request as history keeps it: the same for the same meaning."""
    paths: tuple[str, ...]
    list: str
    to: str
    name: str
    exists: str
    workers: int
    """0: as many as the cluster has CPUs, which is known once it is joined."""
    engine: str
    memory: int | None
    """None: what the cluster grants."""
    retries: int
    max_errors: int
    summary: str

    @property
    def request_sha256(self) -> str:
        text = json.dumps(self.request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def numeric_version(self) -> str:
        """What the bits of a result depend on besides the request."""
        return f"{version()} order {ORDER_VERSION}"


def read_job(path: str, overrides: Iterable[str] = ()) -> Job:
    """The job that a TOML file describes, with `section.key=value` words that go before what it says."""
    import tomllib

    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}; give a job file (TOML)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    for text in overrides:
        override(given, text)
    return checked(given, path)


def override(given: dict[str, Any], text: str) -> None:
    """Puts `run.retries=0` into what a file says; the value is TOML, or a plain word."""
    import tomllib

    name, is_there, value = text.partition("=")
    section, _, key = name.strip().rpartition(".")
    if not is_there or not key or (section and section not in SECTIONS):
        raise SettingsError(
            f"--set {text[:80]!r}: give SECTION.KEY=VALUE, such as request.op=max; the sections are {', '.join(SECTIONS)}"
        )
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    table = given.setdefault(section, {}) if section else given
    if not isinstance(table, dict):
        raise SettingsError(f"{section} is a section: write [{section}] above its keys")
    table[key] = parsed


def checked(given: Mapping[str, Any], path: str) -> Job:
    """The job, or an error that names the key at fault."""
    refuse_unknown(given, path)
    values = {key.name: value_of(key, given, path) for key in KEYS}
    if not values["paths"] and not values["list"]:
        raise SettingsError(f"{path}: [input] says neither paths nor list: nothing would be read", parameter="paths")
    asked = dict(given.get("request", {}))
    verb = asked.pop("verb", None)
    known = (*verbs(), CONVERT)
    if verb not in known:
        said = "has no verb" if verb is None else f"has the verb {verb!r:.40}"
        raise SettingsError(
            f"{path}: [request] {said}; it is one of {', '.join(known)}{nearest(str(verb), known)}", parameter="verb"
        )
    words, request = request_of(verb, asked, path)
    if verb == CONVERT:
        request = {**request, "to": os.path.splitext(values["name"])[1]}
    del values["version"]
    if values["engine"] == LOCAL:
        values["workers"] = values["workers"] or cpus()
        values["memory"] = values["memory"] or default_memory()
    return Job(verb=verb, words=words, request=request, **values)


def refuse_unknown(given: Mapping[str, Any], path: str) -> None:
    tops = [*SECTIONS, *(key.name for key in KEYS if not key.section)]
    for name, value in given.items():
        if name not in tops:
            moved = next((key.path for key in KEYS if key.name == name), None)
            hint = f"; it belongs to [{moved.split('.')[0]}]" if moved else nearest(name, tops)
            raise SettingsError(f"{path}: {name!r:.80} is not a key of a job file{hint}", parameter=name, allowed=tops)
        if name in SECTIONS and not isinstance(value, dict):
            raise SettingsError(f"{path}: {name} is a section: write [{name}] above its keys", parameter=name)
        if name in SECTIONS and name != "request":
            known = [key.name for key in KEYS if key.section == name]
            for key in value:
                if key not in known:
                    raise SettingsError(
                        f"{path}: {key!r:.80} is not a key of [{name}], which has {', '.join(known)}{nearest(key, known)}",
                        parameter=key,
                        allowed=known,
                    )


def value_of(key: Key, given: Mapping[str, Any], path: str) -> Any:
    table = given.get(key.section, {}) if key.section else given
    if key.name not in table:
        if key.default is REQUIRED:
            raise SettingsError(f"{path}: {key.path} is missing: {key.help}", parameter=key.name)
        return key.default
    try:
        return key.parse(table[key.name])
    except ValueError as error:
        said = table[key.name]
        raise SettingsError(f"{path}: {key.path} is {said!r:.80}; it must be {error}", parameter=key.name) from None


def request_of(verb: str, asked: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The words of a request, and what it is as data. What an input's shape decides is checked with each input."""
    from maskserve import requests

    try:
        if verb == CONVERT:
            words = conversion_words(asked)
            return words, {"verb": verb, **words}
        return asked, requests.build(verb, asked).canonical()
    except RequestError as error:
        raise SettingsError(
            f"{path}: [request] {error.message}", parameter=error.parameter, allowed=error.allowed
        ) from None


def reference() -> str:
    """Every key with its default and what it means, as a table of Markdown."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key in KEYS:
        default = "required" if key.default is REQUIRED else key.shown or f"`{json.dumps(key.default)}`"
        lines.append(f"| `{key.path}` | {default} | {key.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
