"""What an address is, its parts, and which objects a pattern means. Imports neither obstore nor torch."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias
from urllib.parse import unquote

from maskserve.errors import InputError, ParameterError, nearest

STORES = ("s3", "gs", "az")
"""Schemes of stores: their objects can be listed, and written."""
WEB = ("https", "http")
SCHEMES = (*STORES, *WEB)
MOST_CHARS = 4096
_BEGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,253}")
_HOST = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_QUERY = re.compile(r"\?[^/]*=")
"""What is a query rather than a pattern."""
_MAGIC = re.compile(r"[*?[]")
StrPath: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An object, or with a `key` that is empty or ends in / what lies below it. As text it has no query: that may be a secret."""

    scheme: str
    host: str
    """The bucket or container; of the web the host, with its port."""
    key: str
    query: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.key}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        return not self.key or self.key.endswith("/")

    @property
    def is_many(self) -> bool:
        """Whether it means objects that are to be listed."""
        return self.is_folder or (self.scheme in STORES and _MAGIC.search(self.key) is not None)

    @property
    def prefix(self) -> str:
        """The folder below which all lies that it means, without a / at its end."""
        if self.is_folder:
            return self.key.rstrip("/")
        found = _MAGIC.search(self.key)
        return (self.key if found is None else self.key[: found.start()]).rpartition("/")[0]

    def matches(self, key: str) -> bool:
        """Whether it means the object at `key`; names that begin with a dot are meant only where they are spelled so."""
        if self.is_folder:
            rest = key.removeprefix(self.key)
            return key.startswith(self.key) and not any(part.startswith(".") for part in rest.split("/"))
        return key == self.key or compiled(self.key).fullmatch(key) is not None


def is_address(path: object) -> bool:
    """Whether a path is an address, of whatever scheme.

    >>> is_address("s3://bucket/rain.safetensors"), is_address("./s3:/rain"), is_address(b"s3://")
    (True, False, False)
    """
    return isinstance(path, str) and _BEGIN.match(path) is not None


def parse(text: str) -> Address:
    """The address that is spelled; ParameterError where it is none.

    >>> parse("s3://bucket/rain/2024.safetensors")
    Address(scheme='s3', host='bucket', key='rain/2024.safetensors')
    """
    from maskserve.payload.header import shown

    begin = _BEGIN.match(text)
    scheme = begin[1].lower() if begin else ""
    if begin is None or scheme not in SCHEMES:
        raise ParameterError(
            f"{shown(text)}: there are addresses of {', '.join(f'{known}://' for known in SCHEMES)}; a file has a path"
            f"{nearest(scheme, SCHEMES)}",
            parameter="path",
            allowed=SCHEMES,
        )
    if len(text) > MOST_CHARS:
        raise wrong(text, f"it has {len(text)} characters, and an address at most {MOST_CHARS}")
    if not text.isprintable():
        raise wrong(text, "it has characters that do not print")
    host, _, rest = text[begin.end() :].partition("/")
    return _web(scheme, host, rest, text) if scheme in WEB else _stored(scheme, host, rest, text)


def _stored(scheme: str, host: str, key: str, text: str) -> Address:
    if not _BUCKET.fullmatch(host):
        raise wrong(text, f"an address is {scheme}://BUCKET/KEY, and credentials come from the environment")
    if _QUERY.search(key):
        raise wrong(
            text, "it has a query, as signed addresses have, and those begin with https://; ? in a key is any character"
        )
    check_key(key, text)
    return Address(scheme=scheme, host=host, key=key)


def _web(scheme: str, host: str, rest: str, text: str) -> Address:
    """A key of the web is decoded: clients encode it again."""
    host = host.lower()
    if "@" in host:
        raise wrong(text, "an address holds no user and password")
    if not _HOST.fullmatch(host):
        raise wrong(text, f"an address is {scheme}://HOST/PATH")
    path, _, query = rest.partition("?")
    if "#" in rest:
        raise wrong(text, "an address of a file has no #; spell it %23")
    parts = [unquote(part, errors="strict") for part in path.split("/")] if is_decodable(path) else ["\0"]
    if any("/" in part or not part.isprintable() for part in parts):
        raise wrong(text, "its path has %2F or characters that do not print")
    key = "/".join(parts)
    check_key(key, text)
    return Address(scheme=scheme, host=host, key=key, query=query)


def is_decodable(path: str) -> bool:
    try:
        unquote(path, errors="strict")
    except UnicodeDecodeError:
        return False
    return True


def check_key(key: str, text: str) -> None:
    """Raise where a key has parts that clients would change on the way."""
    if any(part in ("", ".", "..") for part in key.removesuffix("/").split("/")) and key:
        raise wrong(text, "its parts between two / are not empty, and not . or ..")


def wrong(text: str, what: str) -> ParameterError:
    from maskserve.payload.header import shown

    return ParameterError(f"{shown(text)} cannot be: {what}", parameter="path")


def object_at(path: str) -> Address:
    """The address of one object, to be read or written."""
    found = parse(path)
    if found.is_folder:
        raise is_a_folder(f"{found} is a folder of objects")
    return found


def is_a_folder(said: str) -> InputError:
    """The error of a folder where one file is read."""
    error = InputError(
        f"{said}, and one file is read here: name one of it; commands that read several files take a folder"
    )
    error.errno = errno.EISDIR
    return error


def expression(pattern: str) -> str:
    """The regular expression of a pattern: * and ? within a name, ** over folders, [ ] for one character of several.

    >>> bool(re.fullmatch(expression("a/*.st"), "a/b.st")), bool(re.fullmatch(expression("a/*.st"), "a/b/c.st"))
    (True, False)
    >>> [bool(re.fullmatch(expression("a/**/c.st"), key)) for key in ("a/c.st", "a/b/d/c.st", "a/.b/c.st")]
    [True, True, False]
    """
    parts = pattern.split("/")
    made = []
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if part == "**":
            made.append(r"(?!\.)[^/]+(?:/(?!\.)[^/]+)*" if is_last else r"(?:(?!\.)[^/]+/)*")
        else:
            made.append(_part(part) + ("" if is_last else "/"))
    return "".join(made)


@lru_cache(64)
def compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(expression(pattern))


def _part(part: str) -> str:
    made = r"(?!\.)" if part[:1] in ("*", "?", "[") else ""
    at = 0
    while at < len(part):
        char, at = part[at], at + 1
        if char == "*":
            made += "[^/]*"
        elif char == "?":
            made += "[^/]"
        elif char == "[" and (end := part.find("]", at + 1 + (part[at : at + 1] == "!"))) > 0:
            # fnmatch knows which ranges are empty; what it gives stands within (?s: and )\Z
            made += "(?!/)" + fnmatch.translate(part[at - 1 : end + 1])[len("(?s:") : -len(")\\Z")]
            at = end + 1
        else:
            made += re.escape(char)
    return made
