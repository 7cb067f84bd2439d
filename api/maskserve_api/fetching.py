"""A question that lies in a store: source=s3://BUCKET/KEY in the query instead of a body, where whoever runs it allows that.

What is read is named by the client, so it must begin, as it is spelled, with a prefix that was allowed. Only stores are read: a
web server could send the service on to another place.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar
from urllib.parse import parse_qsl

from maskserve.errors import InputChangedError, InputError, InputNotFoundError, ParameterError, PayloadError, StoreError
from maskserve.payload.format import Buffer
from maskserve.payload.header import shown
from maskserve.payload.opening import LENGTH_BYTES, is_json
from maskserve.stores.addresses import STORES, Address, is_address, parse
from maskserve.stores.ahead import PART
from maskserve.stores.calls import Threads
from maskserve.stores.client import Version, client_of
from maskserve.stores.objects import HEAD_BYTES, refuse_without_tag
from maskserve_api.body import Claim, aligned, too_large
from maskserve_api.errors import SourceError, SourceNotFoundError
from maskserve_api.forms import Form
from maskserve_api.query import MAX_FIELDS

T = TypeVar("T")
NAME = "source"
NAME_BYTES = NAME.encode()
AT_ONCE = 4
"""Parts of one object that are on their way: a large one leaves threads for others."""
FIRSTS, PARTS = Threads(32), Threads(64)
"""Threads that wait for the first answer of an object, and for its parts: objects that are slow to come hold up no small one."""


def refuse_unready(prefixes: Sequence[str]) -> None:
    """Raise at the start, and not at a request, where nothing says how to reach what is allowed."""
    for prefix in prefixes:
        client_of(parse(prefix))


def split(query: bytes) -> tuple[str | None, bytes]:
    """The source that a query names, and the query without it."""
    if NAME_BYTES not in query:  # nearly all
        return None, query
    fields = query.split(b"&", MAX_FIELDS)
    ours = [field for field in fields if field.partition(b"=")[0] == NAME_BYTES]
    if not ours:
        return None, query
    if len(ours) > 1:
        raise ParameterError(f"the query gives {NAME} twice; give it once", parameter=NAME)
    pairs = parse_qsl(ours[0].decode("latin-1"), keep_blank_values=True, errors="replace")
    return pairs[0][1], b"&".join(field for field in fields if field not in ours)


def allowed(source: str, prefixes: Sequence[str], n_bytes: int | None, *, is_coded: bool = False) -> Address:
    """The address that a request names; raises where it is none, or not to be read, or a body came too.

    `is_coded`: the request says how its body is packed.
    """
    if not prefixes:
        raise SourceError(
            "this service reads no stores: send the payload as the body; who runs it allows prefixes with --stores",
            parameter=NAME,
        )
    if n_bytes != 0:
        raise ParameterError(f"{NAME} goes without a body, and one was sent: leave one out", parameter=NAME)
    if is_coded:
        raise ParameterError(
            f"{NAME} goes without Content-Encoding, which says how a body is packed: leave it out", parameter=NAME
        )
    address = spelled(source)
    is_plain = address.scheme in STORES and not address.is_folder and str(address) == source
    if not is_plain or not any(within(source, prefix) for prefix in prefixes):
        raise SourceError(
            f"{shown(source)} is not below a prefix that this service may read; it begins with one of those that who runs it "
            "allows, spelled alike",
            parameter=NAME,
        )
    return address


def spelled(source: str) -> Address:
    """The address that a request spells; ParameterError of `source` where it is none."""
    what = f"give the address of an object in a store, such as {' or '.join(f'{scheme}://BUCKET/KEY' for scheme in STORES)}"
    if not source:
        raise ParameterError(f"{NAME} is empty: {what}", parameter=NAME, allowed=STORES)
    if not source.isprintable() or "\\" in source:
        raise ParameterError(f"{NAME} has characters that no address has here", parameter=NAME)
    if not is_address(source):
        raise ParameterError(f"{NAME} is {shown(source)}, which is no address: {what}", parameter=NAME, allowed=STORES)
    try:
        return parse(source)
    except ParameterError as error:
        raise ParameterError(f"{NAME}: {error.message}", parameter=NAME) from None


def within(source: str, prefix: str) -> bool:
    """Whether an address is below a prefix that ends in /, or is the very object that it names."""
    return source.startswith(prefix) if prefix.endswith("/") else source == prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An object whose first bytes have come."""

    address: Address
    head: memoryview
    version: Version

    @property
    def form(self) -> Form:
        return Form.JSON if is_json(bytes(self.head[:LENGTH_BYTES])) else Form.SAFETENSORS

    async def body(self, claim: Claim) -> Buffer:
        """All its bytes, counted as a body's are."""
        n_bytes, n_head = self.version.n_bytes, self.head.nbytes
        claim.add(n_bytes)
        body = aligned(n_bytes, 0)
        body[:n_head] = self.head
        with told():
            starts = range(n_head, n_bytes, PART)
            await one_after_another(self._filled(claim, start, body[start : start + PART]) for start in starts)
        return body

    async def pieces(self, claim: Claim) -> AsyncGenerator[memoryview, None]:
        """The same one after the other, and no more of them in memory than are on their way."""
        yield self.head
        n_bytes = self.version.n_bytes
        starts = iter(range(self.head.nbytes, n_bytes, PART))
        claim.add(min(AT_ONCE * PART, n_bytes - self.head.nbytes))
        coming: deque[asyncio.Future[memoryview]] = deque()
        try:
            with told():
                while True:
                    for start in islice(starts, AT_ONCE - len(coming)):
                        view = memoryview(bytearray(min(PART, n_bytes - start)))
                        coming.append(asyncio.ensure_future(self._filled(claim, start, view)))
                    if not coming:
                        return
                    yield await coming.popleft()
        finally:
            for part in coming:
                part.cancel()

    async def _filled(self, claim: Claim, start: int, view: memoryview) -> memoryview:
        await in_thread(PARTS, claim, lambda: client_of(self.address).fill(self.address, self.version, start, view))
        return view


async def begun(address: Address, max_body: int, claim: Claim) -> Source:
    """The object, which can be a body; none of it is counted yet."""
    with told():
        head, version = await in_thread(FIRSTS, claim, lambda: client_of(address).begin(address, HEAD_BYTES))
        if not version.n_bytes:
            raise PayloadError(f"{address} is empty: an object holds a payload, safetensors or JSON")
        if version.n_bytes > max_body:
            raise too_large(max_body)
        refuse_without_tag(address, head, version)
    return Source(address=address, head=head, version=version)


async def one_after_another(parts: Iterator[Awaitable[object]]) -> None:
    """Waits for all of them, AT_ONCE at a time, or for the first error."""

    async def some() -> None:
        for part in parts:
            await part

    lanes = [asyncio.ensure_future(some()) for _ in range(AT_ONCE)]
    try:
        await asyncio.gather(*lanes)
    finally:
        for lane in lanes:
            lane.cancel()


async def in_thread(threads: Threads, claim: Claim, call: Callable[[], T]) -> T:
    """What `call` gives, in a thread that waits for stores; the claim lasts as long as it runs."""

    def held() -> T:
        with claim.held():
            return call()

    return await asyncio.wrap_future(threads.submit(held))


@contextmanager
def told() -> Iterator[None]:
    """Errors of a store as a client of the service may know them: files are the service's own, sources are not."""
    try:
        yield
    except InputNotFoundError as error:
        raise SourceNotFoundError(error.message, parameter=NAME) from None
    except InputChangedError as error:
        raise StoreError(error.message, parameter=NAME) from None
    except InputError as error:
        if error.errno == errno.EACCES:
            raise SourceError("the store does not let this service read it", parameter=NAME) from None
        raise SourceNotFoundError(error.message, parameter=NAME) from None
