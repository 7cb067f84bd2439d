"""Addresses of a store: what is one, what a pattern of keys means, and that no message shows a secret."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

import pytest

import maskserve as ms
from maskserve.errors import (
    ParameterError,
)
from maskserve.payload.header import shown
from maskserve.stores.addresses import is_address, parse
from maskserve.stores.objects import spans
from tests.command_line import Maskserve, environment, folder_fixture, maskserve_fixture  # noqa: F401
from tests.store_server import Fault, Stored, running_fixture, stored_fixture  # noqa: F401


@pytest.mark.parametrize(
    "text",
    ["ftp://host/x", "file:///x", "s3://", "s3:///x", "s3://b/a//b", "s3://b/a/../b", "s3://b/./x", "s3://b:1/x", "s3://u@b/x",
     "https://user:hunter2@host/x", "https://host/a%2Fb", "https://host/%2e%2e/x", "https://host/a#b", "https://ho st/x",
     "https://host/%ff", "https://host\\@evil/x", "s3://b/a\nb"],
)  # fmt: skip
def test_what_clients_would_read_in_two_ways_is_no_address(text: str) -> None:
    assert is_address(text)
    with pytest.raises(ParameterError) as caught:
        parse(text)
    assert "hunter2" not in caught.value.message


def test_an_address_has_parts_and_shows_no_secret() -> None:
    found = parse("https://Host.example:8443/a%20b/rain.safetensors?X-Amz-Signature=secret")
    assert (found.host, found.key, found.name) == ("host.example:8443", "a b/rain.safetensors", "rain.safetensors")
    assert "secret" not in str(found)
    assert shown("look: https://me:pw@host/x?sig=secret now") == "look: https://host/x now"
    assert parse("s3://b/odd?key").key == "odd?key"


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [("s3://b/", ["a.st", "d/b.st", "d/e/c.st", "d/x[1].st"]), ("s3://b/d/", ["d/b.st", "d/e/c.st", "d/x[1].st"]),
     ("s3://b/*.st", ["a.st"]), ("s3://b/**/*.st", ["a.st", "d/b.st", "d/e/c.st", "d/x[1].st"]), ("s3://b/d/?.st", ["d/b.st"]),
     ("s3://b/d/x[1].st", ["d/x[1].st"]), ("s3://b/[!d]*", ["a.st"]), ("s3://b/d/**", ["d/b.st", "d/e/c.st", "d/x[1].st"])],
)  # fmt: skip
def test_folders_and_patterns_mean_what_they_mean_for_files(pattern: str, keys: list[str]) -> None:
    every = ["a.st", "d/b.st", "d/e/c.st", "d/x[1].st", ".hidden", "d/.hidden/x"]
    assert [key for key in every if parse(pattern).matches(key)] == keys


def test_runs_are_fetched_together_where_they_lie_near_and_apart_where_not() -> None:
    found = list(spans([0, 100, 5000, 5100], 100, most=4000, gap=500))
    assert [(span.start, span.end, len(span.runs)) for span in found] == [(0, 200, 1), (5000, 5200, 1)]
    found = list(spans([0, 300, 900], 100, most=4000, gap=250))
    assert [(span.start, span.end, span.runs) for span in found] == [
        (0, 400, ((0, 0, 100), (300, 100, 100))), (900, 1000, ((900, 200, 100),))
    ]  # fmt: skip


def test_without_obstore_a_line_says_what_to_install(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ms.errors.MissingExtraError, match=r"pip install 'maskserve\[store\]'"):
        ms.load("s3://bucket/x")


@pytest.mark.parametrize("pattern",
    ["[z-a]", "[a-]", "[[a]", "[]a]", "[!]a]x", "[a&&b]", "[a||b]*", "[~~]", "[^a]", "[z-ab-c]", "[--a]", "[!z-a]"],
)  # fmt: skip
def test_classes_of_patterns_mean_what_fnmatch_says(pattern: str) -> None:
    for key in "abcz&|~[]^-!\\":
        for name in (key, key + "x"):
            assert parse(f"s3://b/{pattern}").matches(name) == fnmatchcase(name, pattern)
    assert not parse(f"s3://b/x{pattern}y").matches("x/y")


@pytest.mark.parametrize(
    "text",
    ["s3://KEY:hunter2@bucket/a", "s3://KEY:hun/hunter2@bucket/a", "ftp://h/b?X-Amz-Signature=hunter2",
     "https://me:hunter2@host/a", "gs+x://h/b#hunter2", "s3://bucket/a?X-Amz-Signature=hunter2"],
)  # fmt: skip
def test_no_message_shows_the_secret_of_an_address(text: str, maskserve: Maskserve) -> None:
    assert "hunter2" not in shown(f"look: {text} now")
    assert "hunter2" not in maskserve("info", text).err


def test_a_parsed_address_is_printed_without_its_query() -> None:
    assert "hunter2" not in f"{parse('https://host/a?sig=hunter2')!r}"
    assert parse("s3://bucket/year=2024/part-?.st").is_many


def test_keys_and_patterns_are_shown_as_they_are() -> None:
    for text in ("s3://b/a?.st", "s3://b/a#b", "s3://b/a@b", "https://host:80/a@b"):
        assert shown(text) == text
    assert shown("s3://b/a?X-Amz-Signature=secret") == "s3://b/a"
