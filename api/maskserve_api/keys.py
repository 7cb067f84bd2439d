"""Who may ask: a file of keys, and the name of the key that a request brings."""

from __future__ import annotations

import hmac
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from starlette.datastructures import Headers

from maskserve.errors import SettingsError
from maskserve.payload.header import shown
from maskserve_api.errors import UnauthorizedError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"[!-~]{16,256}")
MAX_FILE_BYTES = 1 << 20
SEND = "send Authorization: Bearer KEY"


@dataclass(frozen=True, slots=True)
class Key:
    """A key's name and its SHA-256: the key itself is not kept."""

    name: str
    digest: bytes


class Keys:
    """The keys of a file, read when made and at each `reload`; SettingsError where the file will not do."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._keys = read(path)

    def reload(self) -> None:
        """Takes the file as it is now; the keys stay as they were where it is at fault."""
        self._keys = read(self.path)

    def __len__(self) -> int:
        return len(self._keys)

    def name_of(self, headers: Headers) -> str:
        """The name of the request's key; UnauthorizedError without a known one."""
        given = brought(headers)
        if given is None:
            raise UnauthorizedError(f"this service asks for a key: {SEND}", parameter="Authorization")
        digest = sha256(given.encode("latin-1")).digest()
        # all of them, though one was found: the time an answer takes tells nothing of the keys
        found = [key.name for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise UnauthorizedError(f"this key is not known here: {SEND}", parameter="Authorization")
        return found[0]


def brought(headers: Headers) -> str | None:
    """The key in the headers: a bearer token, or X-API-Key."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def read(path: str) -> tuple[Key, ...]:
    """The keys of a file of name:key lines, in which # begins a comment."""
    text = contents(path)
    keys: dict[str, Key] = {}
    for number, line in lines(text):
        name, colon, key = line.partition(":")
        fault = fault_of(name, colon, key)
        digest = sha256(key.encode()).digest()
        if fault is None and name in keys:
            fault = f"the name {name} is there twice"
        if fault is None and any(other.digest == digest for other in keys.values()):
            fault = "this key is there twice; each name needs its own"
        if fault is not None:  # which never holds the key
            raise SettingsError(f"{shown(path)}, line {number}: {fault}", parameter="keys_file")
        keys[name] = Key(name, digest)
    if not keys:
        raise SettingsError(f"{shown(path)} has no key; a line is name:key", parameter="keys_file")
    return tuple(keys.values())


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    for number, line in enumerate(text.split("\n"), 1):
        said = line.strip()
        if said and not said.startswith("#"):
            yield number, said


def fault_of(name: str, colon: str, key: str) -> str | None:
    if not colon:
        return "there is no colon; a line is name:key"
    if not NAME.fullmatch(name):
        return "a name is 1 to 64 letters, digits, dots, dashes and underscores"
    if not KEY.fullmatch(key):
        return "a key is 16 to 256 printable ASCII characters without spaces, such as openssl rand -hex 32 gives"
    return None


def contents(path: str) -> str:
    """The text of a file that only its owner and group may read."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise SettingsError(f"{shown(path)} cannot be read: {reason}", parameter="keys_file") from None
    if mode & stat.S_IRWXO:
        raise SettingsError(
            f"{shown(path)} is open to all users (mode {mode:03o}): chmod 600 {shown(path)}, "
            "or defaultMode: 0440 for a Secret of Kubernetes",
            parameter="keys_file",
        )
    if len(raw) > MAX_FILE_BYTES:
        raise SettingsError(f"{shown(path)} has more than {MAX_FILE_BYTES} bytes", parameter="keys_file")
    return raw.decode("latin-1")  # what is not ASCII is refused with its line
