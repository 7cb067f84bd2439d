"""Which objects a folder or a pattern means, sorted. Imports no torch."""

from __future__ import annotations

import errno
from dataclasses import replace
from functools import partial

from maskserve.errors import InputError, InputNotFoundError, ParameterError
from maskserve.payload.header import shown
from maskserve.stores import client
from maskserve.stores.addresses import MOST_CHARS, STORES, Address, parse
from maskserve.stores.calls import THREADS_OF_ALL, TRIES_S, at_once
from maskserve.stores.client import Found, Version, client_of, endless, with_errno


def listed(address: Address) -> dict[str, Version]:
    """The objects that an address means, by their addresses, sorted, each with its version."""
    if address.scheme not in STORES:
        raise ParameterError(
            f"{address}: a web server has no list of what it holds; name each file", parameter="path", allowed=STORES
        )
    every = all_below(address)
    found = without_folders(address, every, [one for one in every if address.matches(one.key)])
    for one in found:
        refuse_unspelled(address, one.key)
    return {str(replace(address, key=one.key)): one.version for one in sorted(found, key=lambda one: one.key)}


def without_folders(address: Address, every: list[Found], found: list[Found]) -> list[Found]:
    """What was found, without the empty objects that consoles make to show folders.

    They end in /, and listings give them without it.
    """
    parents = {one.key[:at] for one in every for at in range(len(one.key)) if one.key[at] == "/"}
    empty = [one for one in found if not one.version.n_bytes and one.key not in parents]
    there = dict(zip((one.key for one in empty), at_once(partial(is_there, address), empty), strict=True))
    return [one for one in found if one.version.n_bytes or there.get(one.key, False)]


def is_there(address: Address, one: Found) -> bool:
    try:
        client_of(address).version(replace(address, key=one.key))
    except InputNotFoundError:
        return False
    return True


def refuse_unspelled(address: Address, key: str) -> None:
    """Raise where no address can spell a key that lies there."""
    text = str(replace(address, key=key))
    if not text.isprintable() or len(text) > MOST_CHARS:
        what = "characters that do not print" if len(text) <= MOST_CHARS else f"more than {MOST_CHARS} characters"
        raise with_errno(InputError(f"below {address} lies {shown(text)}, which has {what}; rename it"), errno.EILSEQ)


def below(folder: str) -> set[str]:
    """The addresses of all objects below a folder."""
    address = parse(folder.rstrip("/") + "/")
    return {str(replace(address, key=one.key)) for one in all_below(address)}


def all_below(address: Address) -> list[Found]:
    """What the store lists. Of pages without objects obstore alone hears, so time is what ends a list of such."""
    listing = THREADS_OF_ALL.submit(lambda: list(client_of(address).listed(address)))
    try:
        return listing.result(client.LISTING_S + TRIES_S)
    except TimeoutError:
        if listing.done():
            raise
        raise endless(address) from None


def meant(path: str) -> list[str]:
    """The objects that an address means, sorted; that of one object as it is spelled."""
    address = parse(path)
    if not address.is_many:
        return [path]
    found = listed(address)
    if not found:
        raise InputNotFoundError(f"{address} means no object: nothing that the store lists is below it, or like it")
    return list(found)
