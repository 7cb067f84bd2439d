"""The query string as words for a request: which may come more than once is the type's to say."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any
from urllib.parse import parse_qsl

from maskserve import requests
from maskserve.errors import ParameterError
from maskserve.ops import OPS
from maskserve.ops.parameters import REPEATED, Type
from maskserve.payload.header import shown
from maskserve.requests import Request

MAX_FIELDS = 256
KNOWN_BYTES = 512
"""Up to which a query is remembered with the request that it spells: most clients ask the same again and again."""


@cache
def repeatable_of(verb: str, n_ops: int) -> frozenset[str]:
    """The parameters that may come more than once, in the table of `n_ops` rows: rows are only ever added."""
    return frozenset(p.name for p in requests.parameters(verb) if p.type in REPEATED)


@cache
def flags_of(verb: str, n_ops: int) -> frozenset[str]:
    """The parameters that may come bare, as on the command line."""
    return frozenset(p.name for p in requests.parameters(verb) if p.type is Type.FLAG)


def request_of(verb: str, query: bytes) -> Request:
    """The checked request that a query spells."""
    return (_known if len(query) <= KNOWN_BYTES else _request)(verb, query, len(OPS))


def _request(verb: str, query: bytes, n_ops: int) -> Request:
    return requests.build(verb, words_of(verb, query))


_known = lru_cache(maxsize=256)(_request)


def words_of(verb: str, query: bytes) -> dict[str, Any]:
    """Each name with its text, or with a list of texts where its type takes several."""
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="replace")
    except ValueError:
        raise ParameterError(f"the query has more than {MAX_FIELDS} parameters") from None
    repeatable, flags = repeatable_of(verb, len(OPS)), flags_of(verb, len(OPS))
    words: dict[str, Any] = {}
    for name, text in pairs:
        if name in repeatable:
            words.setdefault(name, []).append(text)
        elif name in words:
            raise ParameterError(f"the query gives {shown(name, 64)} twice; give it once", parameter=shown(name, 64))
        else:
            is_bare = text == "" and name in flags and name.encode() in query.split(b"&")
            words[name] = "true" if is_bare else text
    return words
