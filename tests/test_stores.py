"""Objects of a store wherever a file may stand: the same bytes, under every fault too, or a clear error; nothing half-written."""

from __future__ import annotations

import http.client
import re
import threading
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
    InputError,
    InputNotFoundError,
    OutputExistsError,
    StoreError,
)
from maskserve.payload.header import DEFAULT_LIMITS
from maskserve.shards import Shard
from maskserve.stores import client, listing
from maskserve.stores.addresses import parse
from maskserve.stores.listing import listed
from tests.command_line import Maskserve, environment, folder_fixture, maskserve_fixture  # noqa: F401
from tests.store_server import Fault, Stored, running_fixture, stored_fixture  # noqa: F401


def raw(stored: Stored, method: str, key: str) -> None:
    """Does to a key what obstore would change on the way."""
    connection = http.client.HTTPConnection(*stored.proxy.upstream)
    signed = "AWS4-HMAC-SHA256 Credential=test/20261130/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request(method, f"/bucket/{key}", headers={"Content-Length": "0", "Authorization": signed})
    assert connection.getresponse().status in (200, 204)
    connection.close()


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


def test_python_loads_and_saves(stored: Stored, folder: Path) -> None:
    loaded = ms.load(str(folder / "rain.safetensors"))
    assert ms.save(loaded, "s3://bucket/again.safetensors")
    ms.save(loaded, folder / "again.safetensors")
    assert stored.get("again.safetensors") == (folder / "again.safetensors").read_bytes()
    with pytest.raises(OutputExistsError):
        ms.save(loaded, "s3://bucket/again.safetensors")
    with pytest.raises(InputNotFoundError):
        ms.load("s3://bucket/nothing")
