"""The request of a job that converts files: the words of `maskserve convert`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from maskserve.errors import ParameterError, nearest
from maskserve.payload.metadata import MEANS
from maskserve.requests import parse_number
from maskserve.settings import one_of, word

CONVERT = "convert"


def names(given: object) -> tuple[str, ...]:
    """Names, from a text with commas or a list."""
    items = given.split(",") if isinstance(given, str) else given
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("a name or a list of names")
    return tuple(items)


WORDS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {"columns": names, "tensor": names, "mask": word, "mask_means": one_of(*MEANS), "fill_value": parse_number}
)


def conversion_words(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The words as values, or an error that names the one at fault."""
    for name in asked:
        if name not in WORDS:
            raise ParameterError(
                f"{CONVERT} has no parameter {name[:64]!r}; it takes {', '.join(WORDS)}{nearest(name, WORDS)}",
                parameter=name,
                allowed=WORDS,
            )
    found = {}
    for name, given in asked.items():
        try:
            found[name] = WORDS[name](given)
        except ValueError as error:
            raise ParameterError(f"{CONVERT}: {name} is {given!r:.60}; it must be {error}", parameter=name) from None
    return found
