"""What is asked of a store: a range, a whole object, a listing; its errors as ours. The one module that knows obstore.

Nothing is believed: a range must be the one that was asked for, of the version that was asked for, and as long as it says.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from maskserve.errors import (
    InputChangedError,
    InputError,
    InputNotFoundError,
    MaskserveError,
    MissingExtraError,
    OutputError,
    SettingsError,
    StoreError,
)
from maskserve.stores.addresses import STORES, Address
from maskserve.stores.calls import PassingError, tried

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

T = TypeVar("T")
E = TypeVar("E", bound=OSError)
CONNECT_S = 5
SILENT_S = 10
"""Seconds without a byte after which a request is given up, and tried again."""
REQUEST_S, UPLOAD_S = 120, 3600
"""Seconds for a range of a few megabytes, and for an upload of a few gigabytes."""
LISTING_S = 600
"""Seconds for a list of some million objects, after which the store is taken to send one without an end."""
PIECE = 1 << 20
CLIENTS = 64
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
"""How the environment's variables begin that obstore reads for a scheme."""
THROTTLED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one version of an object from the next."""

    n_bytes: int
    etag: str
    """Empty where the server gives none that could tell."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object of a listing."""

    key: str
    version: Version


class MisfitError(Exception):
    """An answer that is not to what was asked."""


class Client:
    """One bucket, or one web server. Calls wait for answers, and may come from any thread."""

    def __init__(self, root: Address) -> None:
        self.root = root
        self._requests = built(root, 0, REQUEST_S)
        self._uploads = built(root, 0, UPLOAD_S)
        self._parts = built(root, 5, UPLOAD_S)

    def begin(self, address: Address, n: int) -> tuple[memoryview, Version]:
        """The first `n` bytes of an object, or all that it has, and its version."""
        return tried(lambda _: self._asked(address, lambda: self._begin(address, n)))

    def fill(self, address: Address, version: Version, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `start` on, of this version; InputChangedError where there is another."""
        tried(lambda _: self._asked(address, lambda: self._fill(address, version, start, view)))

    def version(self, address: Address) -> Version:
        """The version of an object, which must be there."""
        import obstore

        found = tried(lambda _: self._asked(address, lambda: obstore.head(self._requests, address.key)))
        return Version(found["size"], strong(found["e_tag"]))

    def listed(self, address: Address) -> Iterator[Found]:
        """The objects that lie below the prefix of an address, in no order."""
        import obstore

        def every() -> list[Any]:
            found: list[Any] = []
            seen, end_s = set[str](), time.monotonic() + LISTING_S
            for page in obstore.list(self._requests, prefix=address.prefix or None, chunk_size=1000):
                found += page
                is_again = page[0]["path"] in seen
                seen.add(page[0]["path"])
                if is_again or time.monotonic() > end_s:
                    raise endless(address)
            return found

        for one in tried(lambda _: self._asked(address, every)):
            yield Found(one["path"], Version(one["size"], strong(quoted(one["e_tag"]))))

    def put(self, address: Address, data: memoryview, *, is_new: bool) -> bool:
        """Whether the object is written, in one request; False where `is_new` and another stands there."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        store = self._requests if data.nbytes <= PIECE * 16 else self._uploads

        def once(n: int) -> bool:
            try:
                self._asked(
                    address,
                    lambda: obstore.put(
                        store, address.key, data, mode="create" if is_new else "overwrite", use_multipart=False
                    ),
                    is_output=True,
                    is_new=is_new,
                    passes=(AlreadyExistsError, PreconditionError),
                )
            except (AlreadyExistsError, PreconditionError) as error:
                if is_conflict(error):
                    raise_ours(error, address, is_output=True)
                # a try before this one may have been heard, and only its answer lost
                return n > 0 and self.holds(address, data)
            return True

        return tried(once)

    def put_parts(self, address: Address, chunks: Iterator[memoryview], n_bytes: int) -> None:
        """Writes an object in parts; where `chunks` raises, nothing is left of it."""
        import obstore

        def send() -> None:
            obstore.put(
                self._parts,
                address.key,
                chunks,
                use_multipart=True,
                chunk_size=part_bytes(n_bytes),
                max_concurrency=4,
            )

        try:
            self._asked(address, send, is_output=True)
        except PassingError as passing:
            raise passing.error from None

    def holds(self, address: Address, data: memoryview) -> bool:
        """Whether an object has exactly these bytes."""
        version = self.version(address)
        if version.n_bytes != data.nbytes:
            return False
        held = memoryview(bytearray(min(PIECE * 4, data.nbytes)))
        for start in range(0, data.nbytes, PIECE * 4):
            part = held[: min(PIECE * 4, data.nbytes - start)]
            self.fill(address, version, start, part)
            if part != data[start : start + part.nbytes]:
                return False
        return True

    def delete(self, address: Address) -> None:
        """The object is not there any more."""
        import obstore

        def once(_: int) -> None:
            try:
                self._asked(address, lambda: obstore.delete(self._requests, address.key), is_output=True)
            except InputNotFoundError:
                return

        tried(once)

    def _begin(self, address: Address, n: int) -> tuple[memoryview, Version]:
        import obstore

        try:
            answer = obstore.get(self._requests, address.key, options={"range": (0, n)})
        except Exception as error:
            if status_of(error) == 416:  # what has no bytes has no first one
                return memoryview(b""), Version(0, "")
            raise
        version = Version(answer.meta["size"], strong(answer.meta["e_tag"]))
        n_there = min(n, version.n_bytes)
        if answer.range != (0, n_there):
            raise MisfitError(f"bytes {answer.range[0]} to {answer.range[1]} came for 0 to {n_there}")
        view = memoryview(bytearray(n_there))
        received(answer.stream(PIECE), view)
        return view.toreadonly(), version

    def _fill(self, address: Address, version: Version, start: int, view: memoryview) -> None:
        import obstore

        end = start + view.nbytes
        answer = obstore.get(self._requests, address.key, options={"range": (start, end), "if_match": version.etag})
        came = Version(answer.meta["size"], strong(answer.meta["e_tag"]))
        if not came.etag:
            raise MisfitError("a part without an ETag came")
        if came != version:
            raise changed(address)
        if answer.range != (start, end):
            raise MisfitError(f"bytes {answer.range[0]} to {answer.range[1]} came for {start} to {end}")
        received(answer.stream(PIECE), view)

    def _asked(
        self,
        address: Address,
        call: Callable[[], T],
        *,
        is_output: bool = False,
        is_new: bool = False,
        passes: tuple[type[Exception], ...] = (),
    ) -> T:
        """What `call` gives; its errors as ours, inside PassingError where another try may serve."""
        try:
            return call()
        except Exception as error:
            if isinstance(error, (MaskserveError, *passes)):
                raise
            raise_ours(error, address, is_output=is_output, is_new=is_new)
        except BaseException as error:
            refuse_panic(error, address)
            raise


def received(stream: Any, view: memoryview) -> None:
    """Fills `view` with what comes, which must be exactly as much; more is not waited for."""
    done = 0
    for chunk in stream:
        end = done + len(chunk)
        if end > view.nbytes:
            raise MisfitError(f"more than the {view.nbytes} bytes that were asked for came")
        view[done:end] = chunk
        done = end
    if done < view.nbytes:
        raise MisfitError(f"{done} of {view.nbytes} bytes came")


def quoted(etag: str | None) -> str | None:
    """A tag of a list as headers spell it: Azure's lists leave the quotes out.

    >>> quoted("0x8D"), quoted('"0x8D"')
    ('"0x8D"', '"0x8D"')
    """
    return etag if etag is None or etag.endswith('"') else f'"{etag}"'


def strong(etag: str | None) -> str:
    """A tag that tells one version from the next; a weak one does not."""
    return "" if etag is None or etag.startswith("W/") else etag


def part_bytes(n_bytes: int) -> int:
    """The size of a part of an upload: a store takes 10,000 parts of 5 MB or more."""
    return max(PIECE * 16, -(-n_bytes // 9000))


# -- errors -------------------------------------------------------------------------------------------------------


MARKS = {
    "169.254.169.254": "there are no credentials in the environment, and no role of the machine answers",
    "NotPartial": "the whole came where a part was asked for",
    "UnexpectedRange": "another part came than was asked for",
    "kind: Connect": "no connection",
    "TimedOut": "no answer in time",
    "kind: Timeout": "no answer in time",
    "kind: Interrupted": "the connection broke",
    "kind: Request": "the connection broke",
}
"""What obstore's errors have in them, and what it means."""


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of obstore tells of, in its text alone."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def is_conflict(error: Exception) -> bool:
    """Whether a write met another one, of which nobody knows yet how it ends: the store says 409, and try again.

    obstore takes it for an object that stands there. Azure says so of one that does, with a code of its own.
    """
    code = _CODE.search(str(error))
    return status_of(error) == 409 and (code is None or code[1] != "BlobAlreadyExists")


def reason_of(error: Exception) -> str:
    """What went wrong in a few words: never the text of obstore, which has whole addresses and answers in it."""
    text = str(error)
    if isinstance(error, MisfitError):
        return text
    status, code = status_of(error), _CODE.search(text)
    if status is not None:
        return f"it answers {status}{f' ({code[1]})' if code else ''}"
    known = next((words for mark, words in MARKS.items() if mark in text), None)
    return known or "what came is no answer"


def raise_ours(error: Exception, address: Address, *, is_output: bool, is_new: bool = False) -> NoReturn:
    """Raises what an error of obstore means."""
    from obstore import exceptions as theirs

    kind = OutputError if is_output else InputError
    status = status_of(error)
    verb = "written" if is_output else "read"
    if isinstance(error, FileNotFoundError) or status == 404:
        why = "there is no such bucket" if "NoSuchBucket" in str(error) else "there is no such object"
        message = f"{address} cannot be {verb}: {why}"
        if is_output:
            raise with_errno(OutputError(message), errno.ENOENT) from None
        raise with_errno(InputNotFoundError(message), errno.ENOENT) from None
    if isinstance(error, theirs.PreconditionError):
        raise changed(address) from None
    if isinstance(error, theirs.PermissionDeniedError | theirs.UnauthenticatedError) or status in (401, 403):
        said = f"the store does not allow it ({reason_of(error)}); look at the credentials in the environment"
        raise with_errno(kind(f"{address} cannot be {verb}: {said}"), errno.EACCES) from None
    if isinstance(error, theirs.NotSupportedError) or status == 501:
        raise with_errno(
            kind(f"{address} cannot be {verb}: {unsupported(address, is_output, is_new)}"), errno.ENOTSUP
        ) from None
    if isinstance(error, theirs.InvalidPathError):
        raise with_errno(InputError(f"below {address} {UNREADABLE_KEY}"), errno.EILSEQ) from None
    if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
        raise kind(f"{address} cannot be {verb}: {reason_of(error)}") from None
    if "BadScheme" in str(error):
        name = f"{PREFIXES[address.scheme]}_ALLOW_HTTP"
        raise SettingsError(
            f"{address}: the endpoint in the environment is no https://; {name}=true allows what goes in the clear"
        ) from None
    if "incorrectly configured region" in str(error):
        raise SettingsError(f"{address}: the bucket is in another region; AWS_REGION says which") from None
    failed = StoreError(f"{address} cannot be {verb} now: {reason_of(error)}; try again later")
    raise PassingError(with_errno(failed, errno.EAGAIN) if status in THROTTLED else failed) from None


UNREADABLE_KEY = (
    "lies a key with an empty part (//), or one that is . or .., so that nothing there can be listed; rename it, or name "
    "objects one by one"
)


def refuse_panic(error: BaseException, address: Address) -> None:
    """Raise where obstore itself broke down, which is no Exception: what it was given of the environment is to blame."""
    if type(error).__name__ == "PanicException":
        raise SettingsError(
            f"{address}: obstore cannot work with what the environment's {PREFIXES.get(address.scheme, 'AWS')}_ variables say; "
            "docs/stores.md has them"
        ) from None


def unsupported(address: Address, is_output: bool, is_new: bool) -> str:
    if is_new:
        return "the store cannot do that (501), or not of new objects only: say replace (--exists replace)"
    if is_output:
        return "the store cannot do that (501); write to another one, or to a file"
    if address.is_many:
        return "the store lists nothing (501); name each object"
    return "the server does not send parts of files; fetch the file first"


def endless(address: Address) -> StoreError:
    return StoreError(f"{address} cannot be listed: the store's list does not end; name fewer objects")


def changed(address: Address) -> InputChangedError:
    return InputChangedError(f"{address} changed while it was read; run again once it is written")


def with_errno(error: E, number: int) -> E:
    error.errno = number
    return error


# -- how a client is made -----------------------------------------------------------------------------------------


def client_of(address: Address) -> Client:
    """The client for an address, which others of its bucket or server share."""
    return _client(Address(scheme=address.scheme, host=address.host, key="", query=address.query))


@lru_cache(CLIENTS)
def _client(root: Address) -> Client:
    return Client(root)


def built(root: Address, retries: int, request_s: int) -> ObjectStore:
    """obstore's own store, with what the environment says of it."""
    try:
        from obstore import store
        from obstore.exceptions import BaseError
    except ImportError as cause:
        raise MissingExtraError(f"{root} needs obstore: pip install 'maskserve[store]'") from cause
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "read_timeout": timedelta(seconds=SILENT_S),
        "timeout": timedelta(seconds=request_s),
    }
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=60)}
    if root.scheme in STORES:
        check_environment(root.scheme)
    try:
        if root.scheme in STORES:
            # obstore leaves the variable aside where it is given options of a client
            options["allow_http"] = os.environ.get(f"{PREFIXES[root.scheme]}_ALLOW_HTTP", "").lower() in ("true", "1")
            kinds: dict[str, Any] = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
            made: ObjectStore = kinds[root.scheme](root.host, client_options=options, retry_config=retry)
            return made
        options["allow_http"] = root.scheme == "http"
        url = f"{root.scheme}://{root.host}/{'?' + root.query if root.query else ''}"
        return store.HTTPStore(url, client_options=options, retry_config=retry)
    except (BaseError, ValueError) as error:
        raise SettingsError(
            f"{root}: the environment does not say how to reach it: {shown_reason(error)}; docs/stores.md has the variables"
        ) from None
    except BaseException as error:
        refuse_panic(error, root)
        raise


ENDPOINTS = ("_ENDPOINT", "_ENDPOINT_URL", "_ENDPOINT_URL_S3", "_BASE_URL")
"""How the names of variables end that hold the address of a store."""
_ENDPOINT = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-~]*)?")
WORDS = ("_ID", "_KEY", "_SECRET", "_TOKEN", "_REGION", "_NAME")
"""How those end that go into a header as they are; obstore ends the process's call with a panic where they cannot."""


def check_environment(scheme: str) -> None:
    """Raise SettingsError, with the name of the variable, where a value can be no address or no header."""
    prefix = f"{PREFIXES[scheme]}_"
    for name, value in os.environ.items():
        if not name.startswith(prefix):
            continue
        if name.endswith(ENDPOINTS) and not _ENDPOINT.fullmatch(value):
            raise SettingsError(f"{name} in the environment is no address of a store: give https://HOST, or unset it")
        # a service account's key is JSON, of several lines
        if name.endswith(WORDS) and not value.isprintable() and name != "GOOGLE_SERVICE_ACCOUNT_KEY":
            raise SettingsError(
                f"{name} in the environment has characters that do not print, such as the end of a line; take them out"
            )


def shown_reason(error: Exception) -> str:
    from maskserve.payload.header import shown

    return shown(str(error).split("\n")[0], 200)
