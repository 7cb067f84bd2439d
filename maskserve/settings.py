"""Every setting as a row, and where its value comes from: flags > MASKSERVE_* > the TOML file > the default.

Plain Python and tomllib: pydantic-settings takes 0.1 s to import, a third of what `maskserve info` may take in all.
`python -m maskserve.settings` prints configs/default.toml.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from maskserve.errors import ParameterError, SettingsError, nearest

PREFIX = "MASKSERVE_"
CONFIG = f"{PREFIX}CONFIG"
NOT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        CONFIG: "the settings file",
        f"{PREFIX}DEBUG": "1 shows the traceback of an internal error",
        f"{PREFIX}ISA": "the compiled variant of the native kernels",
        f"{PREFIX}KEY": "the key that the example clients bring",
        f"{PREFIX}WORKER": "the number of a worker process among its fellows",
    }
)
"""Environment variables that are ours and stand in no file."""

INJECTED = (f"{PREFIX}PORT", f"{PREFIX}SERVICE_")
"""What Kubernetes sets in every pod beside a Service named maskserve starts so, and is not ours."""

UNITS: Mapping[str, int] = MappingProxyType(
    {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
)
Value: TypeAlias = str | int | float | tuple[str, ...]
Given: TypeAlias = Mapping[str, object]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting; `parse` reads what is given, or raises ValueError with what it must be."""

    name: str
    default: Value
    help: str
    parse: Callable[[object], Value]

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A row's value and its source: a flag, a variable, a file or "default"."""

    row: Row
    value: Value
    source: str

    def __str__(self) -> str:
        return ",".join(self.value) if isinstance(self.value, tuple) else str(self.value)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting by name; `unknown` are the variables that look like ours and are not, each with its message."""

    rows: Mapping[str, Setting]
    unknown: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.rows[name].value


def whole(given: object) -> int:
    """A whole number, 0 or more."""
    if isinstance(given, bool) or not isinstance(given, int | str) or not str(given).strip().isdecimal():
        raise ValueError("a whole number, 0 or more")
    return int(given)


def port(given: object) -> int:
    """A TCP port; 0 lets the system choose one."""
    try:
        number = whole(given)
    except ValueError:
        number = -1
    if not 0 <= number < 2**16:
        raise ValueError("a port, 0 to 65535")
    return number


def seconds(given: object) -> float:
    """A finite number of seconds, 0 or more."""
    try:
        number = -1.0 if isinstance(given, bool) else float(str(given))
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError("a number of seconds, 0 or more")
    return number


def above_0(parse: Callable[[object], Number], said: str) -> Callable[[object], Number]:
    """A function that reads as `parse` does, and refuses 0 too, in these words.

    >>> above_0(whole, "1 or more")("3")
    3
    """

    def read(given: object) -> Number:
        with suppress(ValueError):
            if number := parse(given):
                return number
        raise ValueError(said)

    return read


count = above_0(whole, "a whole number, 1 or more")
period = above_0(seconds, "a number of seconds above 0")


def size(given: object) -> int:
    """Bytes from a number or a text with a unit; MB is 10^6, MiB 2^20.

    >>> size("256MiB"), size("1.5 kB"), size(12)
    (268435456, 1500, 12)
    """
    text = "" if isinstance(given, bool) else str(given).strip()
    digits = text.rstrip("kKMGiB ")
    factor = UNITS.get(text[len(digits) :].strip())
    if factor is None or not digits.replace(".", "", 1).isdecimal():
        raise ValueError(f"a size in bytes, plain or with one of {', '.join(unit for unit in UNITS if unit)}")
    return int(float(digits) * factor) if "." in digits else int(digits) * factor


LEAST_MEMORY = 64 * 10**6
"""Below it a slice that is read whole could have other bits than in memory."""


def memory(given: object) -> int:
    """Bytes as `size` reads them, 64 MB or more; 0 leaves them to the machine."""
    try:
        n_bytes = size(given)
    except ValueError:
        n_bytes = 1
    if 0 < n_bytes < LEAST_MEMORY:
        raise ValueError("a size of 64MB or more, such as 512MB or 2GiB; 0 is half of what the machine grants")
    return n_bytes


def word(given: object) -> str:
    """One word."""
    if not isinstance(given, str) or not given or not given.isprintable():
        raise ValueError("a word")
    return given


def device(given: object) -> str:
    """Any text: who opens the device knows which there are, and says so of no text too."""
    if not isinstance(given, str):
        raise ValueError("a word")
    return given


def one_of(*words: str) -> Callable[[object], str]:
    """A reader of one of these words."""

    def parse(given: object) -> str:
        if given not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(given)

    return parse


def switch(given: object) -> bool:
    """true or false, of TOML or as a word; 1 and 0 in the environment."""
    found = {"true": True, "1": True, "false": False, "0": False}.get(str(given).lower())
    if found is None:
        raise ValueError("true or false")
    return found


def file(given: object) -> str:
    """The path of a file; empty for none."""
    return "" if given == "" else word(given)


def hosts(given: object) -> tuple[str, ...]:
    """Names of hosts, from a list or between commas.

    >>> hosts("a.example, [::1]"), hosts([])
    (('a.example', '[::1]'), ())
    """
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(HOSTS)
    found = tuple(name.strip().lower() for name in names if name.strip())
    if not all(HOST.fullmatch(name) for name in found):
        raise ValueError(HOSTS)
    return found


def prefixes(given: object) -> tuple[str, ...]:
    """Prefixes of stores, from a list or between commas, each a folder that ends in / or one object.

    >>> prefixes("s3://bucket/rain/, s3://bucket/one.safetensors"), prefixes([])
    (('s3://bucket/rain/', 's3://bucket/one.safetensors'), ())
    """
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(PREFIXES)
    found = tuple(name.strip() for name in names if name.strip())
    if not all(map(is_prefix, found)):
        raise ValueError(PREFIXES)
    return found


def is_prefix(name: str) -> bool:
    from maskserve.stores.addresses import STORES, parse

    try:
        address = parse(name)
    except ParameterError:
        return False
    return address.scheme in STORES and str(address) == name


PREFIXES = "prefixes of stores that end in /, such as s3://bucket/rain/, or addresses of objects; https:// is not read"
HOST = re.compile(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]")
HOSTS = "names of hosts without ports, such as maskserve.example.org,10.1.2.3"

ROWS = (
    Row(name="device", default="auto", help="where to compute: auto, cpu, cuda or cuda:N", parse=device),
    Row(name="threads", default=0, help="threads to compute with; 0: the CPUs that this process may use", parse=whole),
    Row(
        name="memory", default=0, parse=memory,
        help="bytes that a command, or all running jobs of serve, hold of their data; 0: half of what is granted",
    ),
    Row(
        name="ray_address", default="", parse=file,
        help="the Ray cluster that --engine ray joins: HOST:PORT or auto; empty: $RAY_ADDRESS, else one is started",
    ),
    Row(name="ray_timeout", default=60, help="seconds that a Ray cluster has to start, or to run a first task", parse=period),
    Row(name="header_bytes", default="1MiB", help="largest payload header that is read", parse=size),
    Row(name="max_tensors", default=1024, help="most tensors in a payload that is read", parse=whole),
    Row(name="json_bytes", default="16MiB", help="largest JSON payload that is read", parse=size),
    Row(name="serve_host", default="127.0.0.1", help="address that serve listens on", parse=word),
    Row(name="serve_port", default=8000, help="port that serve listens on; 0 lets the system choose", parse=port),
    Row(name="serve_max_body", default="256MiB", help="largest request body that serve accepts", parse=size),
    Row(
        name="serve_stores", default=(), parse=prefixes,
        help="prefixes such as s3://bucket/rain/ below which requests may name objects (source=); empty: none",
    ),
    Row(name="serve_request_timeout", default=60, help="seconds that a request may take", parse=period),
    Row(name="serve_queue", default=512, help="most requests that wait to be computed", parse=whole),
    Row(name="serve_header_timeout", default=10, help="seconds that a request's headers may take", parse=period),
    Row(name="serve_keep_alive", default=5, help="seconds that an idle connection stays open", parse=period),
    Row(name="serve_drain_delay", default=0, help="seconds that serve listens on after SIGTERM, not ready", parse=seconds),
    Row(name="serve_grace", default=25, help="seconds that running requests get at SIGTERM", parse=seconds),
    Row(
        name="serve_log", default="json", help="a line for each request on stderr: json, text or off",
        parse=one_of("json", "text", "off"),
    ),
    Row(name="serve_keys_file", default="", help="file of name:key lines; one of these keys is asked for", parse=file),
    Row(name="serve_allow_anonymous", default=False, help="serve all who reach a public address, without keys", parse=switch),
    Row(name="serve_jobs", default=False, help="take jobs: requests with Prefer: respond-async, answered later", parse=switch),
    Row(
        name="serve_jobs_folder", default="", parse=file,
        help="local folder that keeps jobs; empty: $XDG_STATE_HOME/maskserve/jobs, or ~/.local/state/maskserve/jobs",
    ),
    Row(name="serve_result_ttl", default=86400, help="seconds that jobs and their results are kept once they end", parse=period),
    Row(name="serve_jobs_running", default=2, help="most jobs that run at once", parse=count),
    Row(name="serve_jobs_max_body", default="4GiB", help="largest body of a job that serve accepts", parse=size),
    Row(name="serve_jobs_per_key", default=1000, help="most jobs of one key that have not ended", parse=count),
    Row(name="serve_jobs_queue", default=10000, help="most jobs of all keys that have not ended", parse=count),
    Row(name="serve_jobs_disk", default="16GiB", help="most bytes of bodies and results that jobs keep on disk", parse=size),
    Row(name="serve_allowed_host", default=(), help="Host names that are served; empty: all, or localhost's own", parse=hosts),
)  # fmt: skip
BY_NAME: Mapping[str, Row] = MappingProxyType({row.name: row for row in ROWS})


def load(
    flags: Given | None = None, config: str | None = None, environment: Mapping[str, str] | None = None
) -> Settings:
    """Every setting, from the first that gives it; SettingsError where a value cannot be.

    `flags` are by name, None where a flag was not given; `config` is the file that --config names.
    """
    environment = os.environ if environment is None else environment
    path = config or environment.get(CONFIG) or None
    said: list[tuple[str, str, object]] = []
    if path is not None:
        said += [(name, f"{path}: {name}", value) for name, value in read_file(path).items()]
    said += [(row.name, row.variable, environment[row.variable]) for row in ROWS if row.variable in environment]
    said += [(name, f"--{_flag(name)}", value) for name, value in (flags or {}).items() if value is not None]
    found = {row.name: Setting(row=row, value=row.parse(row.default), source="default") for row in ROWS}
    for name, source, given in said:
        found[name] = _parsed(BY_NAME[name], given, source)
    return Settings(found, tuple(unknown_variables(environment)))


def _flag(name: str) -> str:
    return name.removeprefix("serve_").replace("_", "-")


def _parsed(row: Row, given: object, source: str) -> Setting:
    try:
        return Setting(row=row, value=row.parse(given), source=source)
    except ValueError as error:
        raise SettingsError(f"{source} is {given!r:.80}; it must be {error}", parameter=row.name) from None


def read_file(path: str) -> dict[str, object]:
    """What a TOML file sets; an unknown key is an error: a slip would otherwise change nothing, in silence."""
    import tomllib

    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror}; --config and {CONFIG} name a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    for name in given:
        if name not in BY_NAME:
            raise SettingsError(
                f"{path}: {name!r:.80} is not a setting{nearest(name, BY_NAME)}", parameter=name, allowed=BY_NAME
            )
    return given


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A line for each variable that looks like ours and sets nothing."""
    known = {*(row.variable for row in ROWS), *NOT_SETTINGS}
    strange = [name for name in environment if name.startswith(PREFIX) and name not in known]
    return [f"{name} is not a setting{nearest(name, known)}" for name in strange if not name.startswith(INJECTED)]


def default_toml() -> str:
    """configs/default.toml: every setting with its default and what it means."""
    lines = [
        "# Every setting of maskserve with its default. Made by python -m maskserve.settings.",
        f"# A flag wins over the environment (MASKSERVE_ and the name), which wins over a file like this ({CONFIG}).",
    ]
    for row in ROWS:
        lines += ["", f"# {row.help}", f"{row.name} = {json.dumps(row.default)}"]  # what JSON writes here is TOML
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(default_toml(), end="")
