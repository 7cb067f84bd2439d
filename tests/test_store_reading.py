"""Objects of a store are read as files are: the same bytes under every fault, or a clear error; whole, in parts, from the web."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import maskserve as ms
from maskserve.errors import (
    InputChangedError,
    InputError,
    StoreError,
)
from maskserve.opening import open_any
from maskserve.stores import ahead, calls, client
from maskserve.stores.objects import ObjectPayload
from tests.command_line import Maskserve, environment, folder_fixture, maskserve_fixture  # noqa: F401
from tests.store_server import SIZE, Fault, Stored, large_fixture, running_fixture, stored_fixture  # noqa: F401


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
    assert maskserve("info", "s3://bucket/").code == 69
    stored.proxy.faults = []
    assert maskserve("info", "s3://bucket/").lines[0].startswith(address), "the only object"
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
