"""Objects of a store wherever a file may stand: the same bytes, under every fault too, or a clear error; nothing half-written."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as to_safetensors
from safetensors.numpy import save_file

import maskserve as ms
from maskserve import regions
from maskserve.crews import Share, lifting
from maskserve.errors import (
    InputChangedError,
    InputError,
    InputNotFoundError,
    OutputExistsError,
    ParameterError,
    StoreError,
)
from maskserve.opening import open_any
from maskserve.payload.header import DEFAULT_LIMITS, shown
from maskserve.payload.writing import Encoded
from maskserve.shards import Shard
from maskserve.stores import ahead, calls, client, listing, writing
from maskserve.stores.addresses import is_address, parse
from maskserve.stores.listing import listed
from maskserve.stores.objects import ObjectPayload, spans
from tests.command_line import Maskserve, environment, folder_fixture, maskserve_fixture  # noqa: F401
from tests.store_server import Fault, Stored, running_fixture, stored_fixture  # noqa: F401


def raw(stored: Stored, method: str, key: str) -> None:
    """Does to a key what obstore would change on the way."""
    connection = http.client.HTTPConnection(*stored.proxy.upstream)
    signed = "AWS4-HMAC-SHA256 Credential=test/20261130/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request(method, f"/bucket/{key}", headers={"Content-Length": "0", "Authorization": signed})
    assert connection.getresponse().status in (200, 204)
    connection.close()


SIZE = 700_001
"""Cells of the large sample: some parts of ahead, and a rest."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """7 MB of cells, their mask and a coordinate."""
    random = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("large") / "rain.safetensors"
    cells, mask = random.standard_normal(SIZE * 2).astype("f4"), random.random(SIZE * 2) < 0.7
    save_file({"rain": cells.reshape(2, SIZE), "rain.mask": mask.reshape(2, SIZE)}, path)
    return path.read_bytes()


# -- addresses ----------------------------------------------------------------------------------------------------


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


# -- reading ------------------------------------------------------------------------------------------------------


def cells_of(source: str | bytes) -> list[np.ndarray]:
    loaded = ms.load(source)
    return [part for tensor in loaded.values() for part in (tensor.get_data().numpy(), tensor.get_mask().numpy())]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_small_object_is_one_request_and_every_later_range_is_of_the_first_ones_version(
    stored: Stored, large: bytes, folder: Path
) -> None:
    address = stored.put("small.safetensors", (folder / "rain.safetensors").read_bytes())
    assert_same(cells_of(address), cells_of(str(folder / "rain.safetensors")))
    assert [method for method, _, _ in stored.proxy.log] == ["GET"]
    stored.proxy.log.clear()
    assert_same(cells_of(stored.put("large.safetensors", large)), cells_of(large))
    first, *rest = stored.proxy.requests("GET")
    assert "if-match" not in first
    assert len({headers["if-match"] for headers in rest}) == 1
    assert not stored.proxy.requests("HEAD")


FLEETING = ("truncated", "short", "whole", "elsewhere", "500", "503", "reset", "dripping", "stalled")


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("kind", FLEETING)
def test_a_fault_that_passes_changes_no_byte(
    stored: Stored, large: bytes, kind: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENT_S", 1 if kind == "stalled" else client.SILENT_S)
    client._client.cache_clear()
    address = stored.put("x.safetensors", large)
    fault = Fault(kind, after=after, seconds=2)
    stored.proxy.faults = [fault]
    assert_same(cells_of(address), cells_of(large))
    assert fault.times == 0


@pytest.mark.parametrize("kind", [kind for kind in FLEETING if kind not in ("dripping", "stalled")])
def test_a_fault_that_stays_is_that_the_store_is_down(stored: Stored, large: bytes, kind: str) -> None:
    address = stored.put("x.safetensors", large)
    stored.proxy.faults = [Fault(kind, times=-1)]
    with pytest.raises(StoreError, match=f"{address} cannot be read now: .*; try again later"):
        ms.load(address)
    assert len(stored.proxy.log) == calls.TRIES


@pytest.mark.parametrize("kind", ["retagged", "replaced"])
def test_an_object_that_changes_is_never_mixed_of_two_versions(stored: Stored, large: bytes, kind: str) -> None:
    address = stored.put("x.safetensors", large)
    with open_any(address) as payload:
        if kind == "replaced":
            stored.put("x.safetensors", large[:-1] + bytes([1 - large[-1]]))
        else:
            stored.proxy.faults = [Fault(kind)]
        with pytest.raises(InputChangedError, match="changed while it was read"):
            payload.read("rain")


def test_a_server_that_hears_no_if_match_gives_no_other_version_either(stored: Stored, large: bytes) -> None:
    address = stored.put("x.safetensors", large)
    with open_any(address) as payload:
        stored.put("x.safetensors", large[:-1] + bytes([1 - large[-1]]))
        stored.proxy.faults = [Fault("deaf", times=-1)]
        with pytest.raises(InputChangedError):
            payload.read("rain")


def test_what_has_no_etag_is_read_whole_or_not_at_all(stored: Stored, large: bytes, folder: Path) -> None:
    small = stored.put("small.safetensors", (folder / "rain.safetensors").read_bytes())
    address = stored.put("x.safetensors", large)
    stored.proxy.faults = [Fault("untagged", times=-1)]
    assert_same(cells_of(small), cells_of(str(folder / "rain.safetensors")))
    with pytest.raises(InputError, match="has no ETag"):
        ms.load(address)


def test_a_header_that_lies_about_its_size_costs_no_memory(stored: Stored) -> None:
    head = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    address = stored.put("x.safetensors", len(head).to_bytes(8, "little") + head)
    with pytest.raises(ms.errors.PayloadError):
        ms.load(address)
    with pytest.raises(ms.errors.PayloadError, match="0 bytes are too few"):
        ms.load(stored.put("empty", b""))


def test_the_store_says_no_in_one_line_with_its_exit_code(stored: Stored, maskserve: Maskserve, folder: Path) -> None:
    address = stored.put("x.safetensors", (folder / "rain.safetensors").read_bytes())
    assert maskserve("info", "s3://bucket/nowhere").code == 66
    stored.proxy.faults = [Fault("403", times=-1)]
    denied = maskserve("info", address)
    assert (denied.code, denied.err.count("\n")) == (77, 1)
    stored.proxy.faults = [Fault("503", times=-1)]
    assert maskserve("info", address).code == 75
    stored.proxy.faults = [Fault("500", times=-1)]
    assert maskserve("info", address).code == 69
    assert maskserve("info", "s3://bucket/").code == 2
    assert maskserve("info", "ftp://bucket/x").code == 2


def test_a_store_that_cannot_be_reached_is_69(
    stored: Stored, maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    client._client.cache_clear()
    ran = maskserve("info", "s3://bucket/x")
    assert (ran.code, "no connection" in ran.err) == (69, True)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    client._client.cache_clear()
    ran = maskserve("info", "s3://bucket/x")
    assert (ran.code, "AWS_ALLOW_HTTP" in ran.err) == (78, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_ACCESS_KEY_ID", "key\n"), ("AWS_SESSION_TOKEN", "to\x1bken"), ("AWS_REGION", "a\nb"), ("AWS_ENDPOINT_URL", ""),
     ("AWS_ENDPOINT_URL", "not a url"), ("AWS_ENDPOINT_URL", "http://"), ("AWS_ENDPOINT_URL", "minio:9000")],
)  # fmt: skip
def test_a_variable_that_can_be_no_key_or_no_address_is_named(
    stored: Stored, maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    client._client.cache_clear()
    ran = maskserve("info", "s3://bucket/x")
    assert (ran.code, ran.err.count("\n"), f"{name} in the environment" in ran.err) == (78, 1, True)


def test_a_client_that_breaks_down_is_told_in_a_line(
    stored: Stored, maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://")
    monkeypatch.setattr(client, "check_environment", lambda _: None)
    client._client.cache_clear()
    ran = maskserve("info", "s3://bucket/x")
    assert (ran.code, "AWS_ variables" in ran.err) == (78, True)


# -- in parts -----------------------------------------------------------------------------------------------------


def patterns() -> Iterator[tuple[str, int, list[list[int]]]]:
    """How runs of a tensor of 5.6 MB are read: their bytes, and the places of each read in turn."""
    end = 8 * SIZE - 70_000
    random = np.random.default_rng(5)
    yield "one after the other", 50_000, [[at] for at in range(0, end, 50_000)]
    yield "columns", 3000, [[row * 560_000 + at for row in range(9)] for at in range(0, 60_000, 3000)]
    yield "wide columns", 70_000, [[row * 560_000 + at for row in range(9)] for at in range(0, 280_000, 70_000)]
    yield "here and there", 4096, [sorted(random.choice(end // 5000, 40, replace=False) * 5000) for _ in range(5)]
    yield "single cells", 4, [sorted(random.choice(end // 4, 300, replace=False) * 4) for _ in range(2)]
    yield "touching", 1000, [list(range(start, start + 100_000, 1000)) for start in (0, 2_000_000, 100_000)]


@pytest.mark.parametrize(("n", "reads"), [case[1:] for case in patterns()], ids=[case[0] for case in patterns()])
def test_runs_of_an_object_are_those_of_the_file(
    stored: Stored, large: bytes, tmp_path: Path, n: int, reads: list[list[int]]
) -> None:
    (tmp_path / "x.safetensors").write_bytes(large)
    address = stored.put("x.safetensors", large)
    with open_any(address) as far, open_any(str(tmp_path / "x.safetensors")) as near:
        for starts in reads:
            ours, theirs = bytearray(n * len(starts)), bytearray(n * len(starts))
            far.read_runs("rain", [int(start) for start in starts], memoryview(ours))
            near.read_runs("rain", [int(start) for start in starts], memoryview(theirs))
            assert ours == theirs
    n_runs = sum(map(len, reads))
    assert len(stored.proxy.log) < max(n_runs // 2, 40)


def test_what_is_kept_is_bounded_and_what_was_forgotten_is_fetched_again(stored: Stored, large: bytes) -> None:
    kept = ahead.Ahead(most_bytes=1 << 20)
    with open_any(stored.put("x.safetensors", large)) as payload:
        assert isinstance(payload, ObjectPayload)
        for number in (*range(40), *range(40)):
            start = number << 16
            assert kept.part(payload, (start, start + (1 << 16))).result() == large[start : start + (1 << 16)]
        assert sum(kept.has(payload, (number << 16, (number + 1) << 16)) for number in range(40)) == 16


def test_an_object_that_the_collector_closes_while_parts_are_looked_up_holds_up_nobody(
    stored: Stored, large: bytes
) -> None:
    kept = ahead.Ahead()
    with open_any(stored.put("x.safetensors", large)) as payload:
        assert isinstance(payload, ObjectPayload)
        kept.part(payload, (0, 10)).result()
        with kept._lock:  # where the collector may come
            done = ThreadPoolExecutor(1).submit(kept.forget, payload)
            done.result(timeout=5)
        kept.part(payload, (10, 20)).result()
        assert not kept.has(payload, (0, 10))


def test_threads_may_read_one_object_at_once(stored: Stored, large: bytes) -> None:
    with open_any(stored.put("x.safetensors", large)) as payload, ThreadPoolExecutor(8) as pool:
        cells = payload.read("rain")
        starts = [(i * 37_000) % (8 * SIZE - 9000) for i in range(200)]
        for start, part in zip(starts, pool.map(lambda at: payload.read_range("rain", at, 9000), starts), strict=True):
            assert part == cells[start : start + 9000]


# -- every verb ---------------------------------------------------------------------------------------------------

VERBS: dict[str, list[str]] = {
    "reduce": ["reduce", "--op", "mean", "--dim", "time"],
    "weights": ["reduce", "--op", "sum", "--dim", "time", "--tensor", "rain"],
    "softmax": ["softmax", "--dim", "time"],
    "scan": ["scan", "--op", "cumsum", "--dim", "time"],
    "fill": ["fill", "--op", "ffill", "--dim", "time"],
    "mask": ["mask", "--inside", "1,4"],
    "grad": ["grad", "--op", "mean", "--dim", "time"],
    "eval": ["eval", "--expr", "(rain - mean(rain, dim=time, keepdim=True)) * 2"],
}


@pytest.mark.parametrize("words", VERBS.values(), ids=VERBS)
def test_every_verb_gives_the_same_bytes_from_and_to_a_store(
    stored: Stored, maskserve: Maskserve, folder: Path, words: list[str]
) -> None:
    address = stored.put("in/rain.safetensors", (folder / "rain.safetensors").read_bytes())
    assert maskserve(*words, "rain.safetensors", "-o", "out.safetensors").code == 0
    ran = maskserve(*words, address, "-o", "s3://bucket/out.safetensors")
    assert ran.code == 0, ran.err
    assert "wrote s3://bucket/out.safetensors" in ran.err
    assert stored.get("out.safetensors") == (folder / "out.safetensors").read_bytes()


def test_what_looks_at_payloads_looks_at_objects_too(stored: Stored, maskserve: Maskserve, folder: Path) -> None:
    address = stored.put("rain.safetensors", (folder / "rain.safetensors").read_bytes())
    question = stored.put("question.json", (folder / "question.json").read_bytes())
    for verb in ("head", "validate"):
        assert maskserve(verb, address).text.replace(address, "F") == maskserve(verb, "rain.safetensors").text.replace(
            "rain.safetensors", "F"
        )
    assert maskserve("diff", address, "rain.safetensors").code == 0
    assert maskserve("info", "--json", address).code == 0
    assert maskserve("reduce", "--op", "sum", question, "--json").out == maskserve(
        "reduce", "--op", "sum", "question.json", "--json"
    ).out  # fmt: skip
    assert maskserve("convert", address, "rain.npz").code == 0
    assert maskserve("convert", "rain.npz", "s3://bucket/back.safetensors").code == 0
    assert maskserve("diff", "s3://bucket/back.safetensors", "rain.safetensors").code in (0, 1)
    assert maskserve("convert", "rain.npz", "s3://bucket/x.zarr").code in (73, 78)
    assert maskserve("info", "s3://bucket/x.nc").code == 74


def test_other_payloads_of_a_request_may_be_objects(stored: Stored, maskserve: Maskserve, folder: Path) -> None:
    other = stored.put("rain.safetensors", (folder / "rain.safetensors").read_bytes())
    ours = maskserve("mask", "--and", "rain.safetensors", "rain.safetensors", "-o", "-")
    assert ours.code == 0, ours.err
    assert maskserve("mask", "--and", other, "rain.safetensors", "-o", "-").out == ours.out


# -- many, shards, workers ----------------------------------------------------------------------------------------


@pytest.fixture
def parts(stored: Stored, folder: Path) -> list[str]:
    """Three files of 5,000 rows, in the folder and in the store."""
    random = np.random.default_rng(2)
    for i in range(3):
        cells, mask = random.standard_normal((5000, 7)).astype("f4"), random.random((5000, 7)) < 0.8
        save_file({"rain": cells, "rain.mask": mask}, folder / f"part-{i}.safetensors")
        stored.put(f"rain/part-{i}.safetensors", (folder / f"part-{i}.safetensors").read_bytes())
    return [f"part-{i}.safetensors" for i in range(3)]


def test_a_folder_and_a_pattern_of_a_store_are_one_tensor_in_the_order_of_their_names(
    stored: Stored, maskserve: Maskserve, folder: Path, parts: list[str]
) -> None:
    expected = maskserve("reduce", "--op", "var", "--dim", "0", *parts, "-o", "-").out
    stored.put("other/x.json", b'{"data": [1]}')
    for given in ("s3://bucket/rain/", "s3://bucket/rain/part-*.safetensors"):
        ran = maskserve("reduce", "--op", "var", "--dim", "0", given, "-o", "-")
        assert ran.out == expected
        assert "3 files as one (15000, 7)" in ran.err
    assert maskserve("reduce", "--op", "var", "s3://bucket/nothing/").code == 66


def test_objects_that_only_show_folders_are_passed_over(stored: Stored, maskserve: Maskserve, parts: list[str]) -> None:
    expected = maskserve("reduce", "--op", "var", "--dim", "0", *parts, "-o", "-").out
    folders = ("rain/", "rain/sub/", "rain/empty/")
    for key in folders:
        raw(stored, "PUT", key)
    stored.put("rain/sub/part-9.safetensors", stored.get("rain/part-0.safetensors"))
    ran = maskserve("reduce", "--op", "var", "--dim", "0", "s3://bucket/rain/*", "-o", "-")
    assert ran.out == expected, ran.err
    ran = maskserve("reduce", "--op", "var", "--dim", "0", "s3://bucket/rain/", "-o", "-")
    for key in folders:
        raw(stored, "DELETE", key)
    assert "4 files" in ran.err, ran.err


def test_a_key_that_no_address_spells_is_told_once_and_not_tried_again(
    stored: Stored, maskserve: Maskserve, parts: list[str]
) -> None:
    raw(stored, "PUT", "rain/a//b")
    ran = maskserve("reduce", "--op", "var", "s3://bucket/rain/")
    assert (ran.code, "s3://bucket/rain/ lies a key with an empty part" in ran.err) == (65, True), ran.err
    assert len(stored.proxy.requests("GET")) == 1
    raw(stored, "DELETE", "rain/a//b")
    stored.put("rain/x\u200by", b"x")
    ran = maskserve("reduce", "--op", "var", "s3://bucket/rain/")
    assert (ran.code, "characters that do not print" in ran.err, ran.err.count("s3://")) == (65, True, 2), ran.err


def test_a_list_that_does_not_end_is_given_up(
    stored: Stored, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LISTING_S", -1)
    with pytest.raises(StoreError, match="list does not end"):
        listed(parse("s3://bucket/rain/"))


def test_a_store_that_lists_nothing_is_told_of(stored: Stored) -> None:
    stored.proxy.faults = [Fault("501", times=-1)]
    with pytest.raises(InputError, match="name each object"):
        listed(parse("s3://bucket/rain/"))


class EmptyPages(BaseHTTPRequestHandler):
    """A store whose list has nothing on this page, and always another one."""

    def do_GET(self) -> None:
        body = (
            b"<ListBucketResult><IsTruncated>true</IsTruncated><KeyCount>0</KeyCount>"
            b"<NextContinuationToken>next</NextContinuationToken></ListBucketResult>"
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is said."""


def test_a_list_of_empty_pages_without_an_end_is_given_up(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LISTING_S", 0.5)
    monkeypatch.setattr(listing, "TRIES_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyPages) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        client._client.cache_clear()
        with pytest.raises(StoreError, match="list does not end"):
            listed(parse("s3://bucket/rain/"))
        server.shutdown()


def test_states_in_a_store_merge_to_the_bits_of_one_process(
    stored: Stored, maskserve: Maskserve, folder: Path, parts: list[str]
) -> None:
    expected = maskserve("reduce", "--op", "var", "--dim", "0", *parts, "-o", "-").out
    for i in range(3):
        ran = maskserve(
            "reduce", "--op", "var", "--dim", "0", "s3://bucket/rain/", "--shard", f"{i}/3", "--state", f"s3://bucket/s/{i}.state"
        )  # fmt: skip
        assert ran.code == 0, ran.err
    assert maskserve("merge", "s3://bucket/s/", "-o", "s3://bucket/merged.safetensors").code == 0
    assert stored.get("merged.safetensors") == expected
    again = maskserve(
        "reduce", "--op", "var", "--dim", "0", *parts, "--shard", "0/3", "--state", "s3://bucket/s/0.state"
    )
    assert again.code == 73


def test_workers_read_their_own_objects(stored: Stored, maskserve: Maskserve, parts: list[str]) -> None:
    expected = maskserve("reduce", "--op", "mean", "--dim", "0", *parts, "-o", "-").out
    ran = maskserve("reduce", "--op", "mean", "--dim", "0", "--workers", "2", "s3://bucket/rain/", "-o", "-")
    assert ran.out == expected, ran.err


@pytest.mark.parametrize(
    ("shape", "fetched", "memory"),
    [((4000, 500), 1 << 24, 1 << 28), ((128, 10_000), 1 << 22, 1 << 26), ((700, 2000), 1 << 20, 1 << 24)],
    ids=["tall", "wider than what is fetched at once", "many parts"],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_ask_for_each_byte_once(
    stored: Stored,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    fetched: int,
    memory: int,
    dim: int,
) -> None:
    monkeypatch.setattr(regions, "FETCHED", fetched)
    rng = np.random.default_rng(3)
    data = to_safetensors({"rain": rng.normal(size=shape), "rain.mask": rng.random(shape) < 0.8})
    (tmp_path / "rain.safetensors").write_bytes(data)
    address = stored.put("rain.safetensors", data)
    for i in range(3):
        states = []
        for path in (address, str(tmp_path / "rain.safetensors")):
            share = Share(
                verb="reduce", words={"op": "var", "dim": dim}, paths=(path,), along="0", shard=Shard(i, 3),
                limits=DEFAULT_LIMITS, memory=memory, file="",
            )  # fmt: skip
            with lifting(share) as state:
                states.append(state.to_bytes())
        assert states[0] == states[1]
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", headers["range"]) for headers in stored.proxy.requests("GET")]
    assert sum(int(found[2]) - int(found[1]) + 1 for found in asked if found) <= 1.1 * len(data)


# -- writing ------------------------------------------------------------------------------------------------------


def encoded(data: bytes) -> Encoded:
    return Encoded(len(data), iter([memoryview(data)]))


@pytest.mark.parametrize("size", [10, 20 << 20], ids=["small", "large"])
def test_an_object_is_written_over_another_only_where_that_was_asked_for(stored: Stored, size: int) -> None:
    one, other = bytes(size), b"1" * size
    address = "s3://bucket/out"
    assert writing.save(address, encoded(one))
    with pytest.raises(OutputExistsError):
        writing.save(address, encoded(other))
    assert not writing.save(address, encoded(other), exists="skip")
    assert stored.get("out") == one
    assert writing.save(address, encoded(other), exists="replace")
    assert stored.get("out") == other
    assert stored.n_uploads() == 0


def test_of_two_writers_at_once_the_store_itself_refuses_one(stored: Stored) -> None:
    def make(fd: int, _: str) -> None:
        stored.put("out", b"theirs")
        os.write(fd, b"ours")

    with pytest.raises(OutputExistsError):
        writing.placed("s3://bucket/out", make)
    assert stored.get("out") == b"theirs"


def test_a_write_whose_answer_is_lost_is_known_as_ones_own(stored: Stored) -> None:
    stored.proxy.faults = [Fault("lost", "PUT")]
    assert writing.save("s3://bucket/out", encoded(b"ours"))
    assert stored.get("out") == b"ours"


def test_a_write_that_meets_another_one_is_tried_again_and_not_taken_for_one_that_stands(stored: Stored) -> None:
    stored.proxy.faults = [Fault("409", "PUT", times=2)]
    assert writing.save("s3://bucket/out", encoded(b"ours"), exists="skip")
    assert stored.get("out") == b"ours"
    stored.proxy.faults = [Fault("409", "PUT", times=-1)]
    with pytest.raises(StoreError, match=r"409 \(ConditionalRequestConflict\); try again later"):
        writing.save("s3://bucket/other", encoded(b"ours"), exists="skip")


def test_what_would_be_read_as_a_pattern_or_not_at_all_is_not_written(
    stored: Stored, maskserve: Maskserve, folder: Path
) -> None:
    for name in ("p*.safetensors", "p?.safetensors", "p[1].safetensors"):
        ran = maskserve("reduce", "--op", "sum", "rain.safetensors", "-o", f"s3://bucket/{name}")
        assert (ran.code, "leave them out" in ran.err) == (73, True), ran.err
    ran = maskserve("convert", "rain.safetensors", "s3://bucket/x.npz")
    assert (ran.code, "npz cannot be read from a store" in ran.err) == (73, True), ran.err
    assert stored.keys() == []


@pytest.mark.parametrize("size", [10, 17 << 20], ids=["small", "large"])
def test_a_store_without_writes_of_new_objects_says_at_once_what_to_do(stored: Stored, size: int) -> None:
    stored.proxy.faults = [Fault("501", "PUT", times=-1)]
    with pytest.raises(ms.errors.OutputError, match="say replace"):
        writing.save("s3://bucket/out", encoded(bytes(size)))
    assert len(stored.proxy.requests("PUT")) == 1
    stored.proxy.faults.append(Fault("501", "POST", times=-1))  # an upload in parts begins so
    with pytest.raises(ms.errors.OutputError, match=r"\(501\); write to another one, or to a file"):
        writing.save("s3://bucket/out", encoded(bytes(size)), exists="replace")


@pytest.mark.parametrize("exists", ["error", "replace"])
@pytest.mark.parametrize("kind", ["500", "503", "reset", "403"])
def test_a_write_that_fails_leaves_nothing(stored: Stored, kind: str, exists: str) -> None:
    address = "s3://bucket/out"
    stored.proxy.faults = [Fault(kind, "PUT", times=-1, after=0 if exists == "error" else 1)]
    with pytest.raises((StoreError, ms.errors.OutputError)):
        writing.save(address, encoded(bytes((1 if exists == "error" else 17) << 20)), exists=exists)  # type: ignore[arg-type]  # one of the words
    assert stored.keys() == []
    assert stored.n_uploads() == 0


def test_what_is_given_up_in_the_middle_of_an_upload_leaves_no_parts(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(
        "from maskserve.stores import writing\n"
        "from maskserve_cli.app import main\n"
        "import signal\n"
        "def end(*_): raise SystemExit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('begun', flush=True)\n"
        "writing.put('s3://bucket/out', memoryview(bytes(160 << 20)), 'replace')\n"
    )
    stored.proxy.delay_s = 0.4
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "big.py")], env=environment(**stored.environment), stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    running.stdout.readline()
    while stored.n_uploads() == 0:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 143
    running.stdout.close()
    deadline = time.monotonic() + 5
    while stored.n_uploads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stored.n_uploads() == 0
    assert stored.keys() == []


def test_what_is_given_up_while_parts_are_on_their_way_says_why(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        """What a signal raises."""

    def stopped(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr(writing, "wait", lambda *_, **__: None)  # as where the store takes longer than is waited
    monkeypatch.setattr(Future, "result", stopped)
    stored.proxy.delay_s = 0.2
    with pytest.raises(Stop):
        writing.placed("s3://bucket/out", lambda fd, _: os.ftruncate(fd, 40 << 20), exists="replace")
    deadline = time.monotonic() + 5
    while not stored.keys() and time.monotonic() < deadline:  # it had been sent whole by then
        time.sleep(0.02)


def test_an_answer_that_does_not_fit_into_memory_goes_to_a_store(
    stored: Stored, maskserve: Maskserve, folder: Path
) -> None:
    random = np.random.default_rng(3)
    save_file({"x": random.standard_normal((17, 1_000_000)).astype("f4")}, folder / "wide.safetensors")
    words = ["softmax", "--dim", "0", "--memory", "64MB"]
    assert maskserve(*words, "wide.safetensors", "-o", "out.safetensors").code == 0
    ran = maskserve(*words, "wide.safetensors", "-o", "s3://bucket/out.safetensors")
    assert ran.code == 0, ran.err
    assert stored.get("out.safetensors") == (folder / "out.safetensors").read_bytes()


class Web(BaseHTTPRequestHandler):
    """A web server that knows ranges and tags, and one signature."""

    data = b""

    def log_message(self, *_: object) -> None:
        """Nothing is said."""

    def do_GET(self) -> None:
        if not self.path.startswith("/a%20b/x.safetensors?sig=hunter2"):
            self.send_error(404)
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = self.data[first : last + 1]
        self.send_response(206)
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 12:00:00 GMT")
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def web(large: bytes) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Web,), {"data": large}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_web_is_read_with_its_signed_address_which_nobody_is_told(
    stored: Stored, maskserve: Maskserve, web: str, large: bytes, folder: Path
) -> None:
    (folder / "x.safetensors").write_bytes(large)
    ran = maskserve("reduce", "--op", "mean", "--dim", "1", f"{web}/a%20b/x.safetensors?sig=hunter2", "-o", "-")
    assert ran.out == maskserve("reduce", "--op", "mean", "--dim", "1", "x.safetensors", "-o", "-").out
    for path in ("a%20b/x.safetensors?sig=hunter3", "nowhere?sig=hunter2"):
        ran = maskserve("info", f"{web}/{path}")
        assert (ran.code, "hunter" in ran.err) == (66, False)
    shown_at = maskserve("info", f"{web}/a%20b/x.safetensors?sig=hunter2")
    assert (shown_at.code, "hunter" in shown_at.text) == (0, False)
    assert maskserve("reduce", "--op", "sum", "rain.safetensors", "-o", f"{web}/x?sig=hunter2").code == 73
    assert maskserve("reduce", "--op", "sum", f"{web}/folder/").code == 2


def test_python_loads_and_saves(stored: Stored, folder: Path) -> None:
    loaded = ms.load(str(folder / "rain.safetensors"))
    assert ms.save(loaded, "s3://bucket/again.safetensors")
    ms.save(loaded, folder / "again.safetensors")
    assert stored.get("again.safetensors") == (folder / "again.safetensors").read_bytes()
    with pytest.raises(OutputExistsError):
        ms.save(loaded, "s3://bucket/again.safetensors")
    with pytest.raises(InputNotFoundError):
        ms.load("s3://bucket/nothing")
