"""Which objects a folder or a pattern means, sorted. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from maskserve.errors import InputNotFoundError, ParameterError
from maskserve.stores.addresses import STORES, Address, is_address, parse
from maskserve.stores.calls import waited
from maskserve.stores.client import Version, client_of


def listed(address: Address) -> dict[str, Version]:
    """The objects that an address means, by their addresses, sorted, each with its version."""
    if address.scheme not in STORES:
        raise ParameterError(
            f"{address}: a web server has no list of what it holds; name each file", parameter="path", allowed=STORES
        )
    client = client_of(address)
    found = waited(lambda: [one for one in client.listed(address) if address.matches(one.key)])
    return {str(replace(address, key=one.key)): one.version for one in sorted(found, key=lambda one: one.key)}


def below(folder: str) -> set[str]:
    """The addresses of all objects below a folder."""
    address = parse(folder.rstrip("/") + "/")
    client = client_of(address)
    return {str(replace(address, key=one.key)) for one in waited(lambda: list(client.listed(address)))}


def expanded(paths: Sequence[str]) -> list[str]:
    """Paths with each folder or pattern of a store replaced by the objects that it means; files are left as they are."""
    return [found for path in paths for found in meant(path)]


def meant(path: str) -> Iterator[str]:
    if not is_address(path) or not (address := parse(path)).is_many:
        yield path
        return
    found = listed(address)
    if not found:
        raise InputNotFoundError(f"{address} means no object: nothing that the store lists is below it, or like it")
    yield from found
