"""The Open Inference Protocol v2: an unmodified tritonclient works; test_doors has that answers are those of /v1."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from maskserve.ops import OPS, verbs
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Row
from maskserve.payload.format import BytesPayload
from maskserve_api import work
from maskserve_api.v2_tensors import DTYPES
from tests.http_service import (
    BINARY,
    JSON,
    MAX_BODY,
    Running,
    check_problem,
    lane_blocked,
    payload,
    running,
    wait_until,
)

DATA = np.arange(12, dtype=np.float32).reshape(3, 4)
MASK = DATA % 5 != 1
LARGE = np.random.default_rng(3).normal(size=(300, 400)).astype(np.float32)
MEAN = {"op": "mean", "dim": 0}
INFER = "/v2/models/reduce/infer"


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(service.netloc, concurrency=4) as it:
        yield it


def tensor(name: str, cells: np.ndarray, *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(cells.shape), np_to_triton_dtype(cells.dtype))
    given.set_data_from_numpy(cells, binary_data=binary)
    return given


def expected(service: Running, verb: str, words: Mapping[str, Any], question: bytes) -> dict[str, np.ndarray]:
    """The answer of /v1 by the name of each tensor."""
    response = service.http.post(f"/v1/{verb}", params=words, content=question)
    assert response.status_code == 200, response.text
    answer = BytesPayload(response.content)
    return {
        name: np.frombuffer(answer.read(name), info.dtype.torch).reshape(info.shape)
        for name, info in answer.header.tensors.items()
    }


def same(result: triton.InferResult, answer: Mapping[str, np.ndarray]) -> None:
    """Each output has the bytes, dtype and shape of /v1's."""
    assert [out["name"] for out in result.get_response()["outputs"]] != []
    assert {out["name"] for out in result.get_response()["outputs"]} == set(answer)
    for name, due in answer.items():
        found = result.as_numpy(name)
        assert (found.dtype, found.shape, found.tobytes()) == (due.dtype, due.shape, due.tobytes())


def entry(name: str, shape: list[int], datatype: str = "FP32", **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, **rest}


def asking(inputs: list[Any], parameters: Any = MEAN, **rest: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": parameters, **rest}


def ask(service: Running, question: object, binary: bytes = b"", path: str = INFER, **headers: str) -> httpx.Response:
    """A request as it is sent without a client; with `binary`, the length of its JSON is told."""
    text = question if isinstance(question, bytes) else json.dumps(question).encode()
    if binary:
        headers.setdefault("inference_header_content_length", str(len(text)))
    return service.post(path, text + binary, **headers)


# -- what tritonclient asks beside tensors ------------------------------------------------------------------------


def test_health_metadata_and_index_are_told(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    told = client.get_server_metadata()
    assert told["name"] == "maskserve"
    assert "binary_tensor_data" in told["extensions"]
    index = client.get_model_repository_index()
    assert [model["name"] for model in index] == list(verbs())
    assert {model["state"] for model in index} == {"READY"}


@pytest.mark.parametrize("verb", verbs())
@pytest.mark.parametrize("version", ["", "1"])
def test_every_verb_is_a_model(client: triton.InferenceServerClient, verb: str, version: str) -> None:
    assert client.is_model_ready(verb, version)
    metadata, config = client.get_model_metadata(verb, version), client.get_model_config(verb, version)
    assert metadata["versions"] == ["1"]
    for told, of, kind in (("inputs", "input", "datatype"), ("outputs", "output", "datatype")):
        assert {t[kind] for t in metadata[told]} <= set(DTYPES)
        assert [t["name"] for t in metadata[told]] == [t["name"] for t in config[of]]
    named = config["parameters"]["op"]["string_value"].split(",")
    assert named == [row.name for row in OPS.values() if verb in row.verbs]


NEEDED = {Type.DIM: 0, Type.EXPRESSION: "exp(x)"}


def first(verb: str) -> Row:
    """A row of the verb that needs no more than a dim or an expression."""
    return next(
        row
        for row in OPS.values()
        if verb in row.verbs and all(p.type in NEEDED for p in row.requestable if p.default is REQUIRED)
    )


def words_for(row: Row) -> dict[str, Any]:
    return {"op": row.name} | {p.name: NEEDED[p.type] for p in row.requestable if p.default is REQUIRED}


@pytest.mark.parametrize("verb", verbs())
def test_a_model_gives_the_outputs_of_its_metadata(client: triton.InferenceServerClient, verb: str) -> None:
    told = client.get_model_metadata(verb)
    result = client.infer(verb, [tensor("data", DATA), tensor("mask", MASK)], parameters=words_for(first(verb)))
    assert [out["name"] for out in told["outputs"]] == [out["name"] for out in result.get_response()["outputs"]]


@pytest.mark.parametrize("model", ["maen", "a/b", "../v1/ops", "réduce", "", "x" * 3000])
def test_a_model_that_is_not_there_is_a_404(client: triton.InferenceServerClient, model: str) -> None:
    assert not client.is_model_ready(model)
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor("data", DATA)], parameters=MEAN)
    assert caught.value.status() in ("404", "405")
    with pytest.raises(InferenceServerException, match=r"\[404\] reduce has no version 2; give 1"):
        client.get_model_metadata("reduce", "2")
    with pytest.raises(InferenceServerException, match=r"\[404\] .* did you mean reduce\?"):
        client.infer("reduc", [tensor("data", DATA)], parameters=MEAN)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.get_inference_statistics(),
        lambda c: c.get_inference_statistics("reduce"),
        lambda c: c.load_model("reduce"),
        lambda c: c.unload_model("reduce"),
        lambda c: c.get_trace_settings(),
        lambda c: c.update_trace_settings("reduce", {}),
        lambda c: c.get_log_settings(),
        lambda c: c.get_system_shared_memory_status(),
        lambda c: c.register_system_shared_memory("a", "b", 1),
        lambda c: c.unregister_cuda_shared_memory(),
    ],
)
def test_what_is_left_out_says_so(
    client: triton.InferenceServerClient, call: Callable[[triton.InferenceServerClient], object]
) -> None:
    with pytest.raises(InferenceServerException, match=r"\[501\] this service has no shared memory"):
        call(client)


def test_a_draining_service_is_live_and_not_ready() -> None:
    with running() as service, triton.InferenceServerClient(service.netloc) as client:
        service.service.draining = True
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("reduce")
        with pytest.raises(InferenceServerException, match=r"\[503\] the service is shutting down"):
            client.infer("reduce", [tensor("data", DATA)], parameters=MEAN)
        assert int(ask(service, {}).headers["retry-after"]) > 0


def test_health_is_told_to_any_host(service: Running) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert service.http.get(path, headers={"host": "10.1.2.3"}).status_code == 200
    check_problem(service.http.get("/v2", headers={"host": "10.1.2.3"}), 403, "host_not_allowed")


# -- tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("data", [DATA, LARGE[:40]], ids=["small", "large"])
def test_inputs_may_be_bytes_or_json(
    service: Running, client: triton.InferenceServerClient, data: np.ndarray, binary: tuple[bool, bool]
) -> None:
    mask = data > -0.5
    inputs = [tensor("data", data, binary=binary[0]), tensor("mask", mask, binary=binary[1])]
    result = client.infer("reduce", inputs, parameters=MEAN, request_id="r-1")
    same(result, expected(service, "reduce", MEAN, payload(data=data, mask=mask)))
    told = result.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == ("reduce", "1", "r-1")


def test_outputs_come_as_asked_for_and_in_that_order(client: triton.InferenceServerClient) -> None:
    inputs = [tensor("x", DATA), tensor("x.mask", MASK)]
    wanted = [triton.InferRequestedOutput("x.mask", binary_data=False), triton.InferRequestedOutput("x")]
    told = client.infer("reduce", inputs, outputs=wanted, parameters=MEAN).get_response()["outputs"]
    assert [out["name"] for out in told] == ["x.mask", "x"]
    assert told[0]["data"] == [True] * 4
    assert told[1]["parameters"] == {"binary_data_size": 16}
    one = client.infer("reduce", inputs, outputs=wanted[:1], parameters=MEAN)
    assert [out["name"] for out in one.get_response()["outputs"]] == ["x.mask"]
    with pytest.raises(InferenceServerException, match=r"\[422\] there is no output y; the answer has x, x.mask"):
        client.infer("reduce", inputs, outputs=[triton.InferRequestedOutput("y")], parameters=MEAN)


def test_json_is_the_default_and_an_outputs_own_word_wins(service: Running) -> None:
    inputs = [entry("data", [2], data=[1, 2])]
    plain = ask(service, asking(inputs))
    assert plain.headers["content-type"] == JSON
    assert "inference-header-content-length" not in plain.headers
    assert plain.json()["outputs"] == [entry("data", [], data=[1.5]), entry("mask", [], "BOOL", data=[True])]
    both = asking(
        inputs,
        MEAN | {"binary_data_output": True},
        outputs=[{"name": "mask", "parameters": {"binary_data": False}}, {"name": "data"}],
    )
    mixed = ask(service, both)
    assert mixed.headers["content-type"] == BINARY
    n = int(mixed.headers["inference-header-content-length"])
    assert mixed.content[n:] == np.float32(1.5).tobytes()
    assert json.loads(mixed.content[:n])["outputs"][0]["data"] == [True]


def test_null_is_masked_and_nested_lists_are_flat_ones(service: Running) -> None:
    for data in ([1.0, None, 3.0, None], [[1.0, None], [3.0, None]]):
        told = ask(service, asking([entry("data", [2, 2], data=data)])).json()["outputs"]
        assert told == [entry("data", [2], data=[2.0, 0.0]), entry("mask", [2], "BOOL", data=[True, False])]
    both = asking([entry("x", [2], data=[1.0, None]), entry("x.mask", [2], "BOOL", data=[True, True])])
    check_problem(ask(service, both), 400, "malformed_payload")
    means = asking([entry("x", [2], data=[1.0, None])], MEAN | {"mask_means": "missing"})
    check_problem(ask(service, means), 422, "bad_parameter")


def test_what_is_not_finite_comes_in_as_a_word_and_goes_out_as_null(service: Running) -> None:
    text = json.dumps(asking([entry("data", [3], data=[float("nan"), float("inf"), 1.0])], {"op": "cumsum", "dim": 0}))
    assert "NaN" in text
    told = ask(service, text.encode(), path="/v2/models/scan/infer").json()["outputs"]
    assert told[0]["data"] == [None, None, None]
    assert told[1]["data"] == [True] * 3
    check_problem(ask(service, text.replace("NaN", "1e400").encode()), 400, "malformed_payload")


def test_whole_numbers_keep_every_digit(service: Running, client: triton.InferenceServerClient) -> None:
    big = np.array([2**63 - 1, -(2**63), 2**53 + 1])
    inputs, wanted = [tensor("x", big, binary=False)], [triton.InferRequestedOutput("x", binary_data=False)]
    result = client.infer("fill", inputs, outputs=wanted, parameters={"op": "ffill", "dim": 0})
    assert result.get_response()["outputs"][0]["data"] == big.tolist()
    assert np.array_equal(result.as_numpy("x"), big)


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 3), (2, 3)])
def test_every_dtype_and_shape_goes_both_ways(
    client: triton.InferenceServerClient, code: str, shape: tuple[int, ...]
) -> None:
    data = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(triton_to_np_dtype(code))
    verb, words = ("fill", {"op": "ffill", "dim": 0}) if shape else ("reduce", {"op": "first"})
    for binary in (True, False) if code != "BF16" else (True,):
        wanted = [triton.InferRequestedOutput("data", binary_data=binary)]
        result = client.infer(verb, [tensor("data", data, binary=binary)], outputs=wanted, parameters=words)
        found = result.as_numpy("data")
        assert (found.dtype, found.shape, found.tobytes()) == (data.dtype, data.shape, data.tobytes())


def test_bf16_has_no_json(service: Running) -> None:
    asked = asking([entry("x", [1], "BF16", data=[1.0])])
    assert "binary" in check_problem(ask(service, asked), 400, "malformed_payload")["detail"]
    sent = asking([entry("x", [1], "BF16", parameters={"binary_data_size": 2})])
    assert "binary_data" in check_problem(ask(service, sent, b"\x80\x3f"), 406, "not_acceptable")["detail"]
    assert ask(service, sent | {"parameters": MEAN | {"binary_data_output": True}}, b"\x80\x3f").status_code == 200


@pytest.mark.parametrize("code", ["BYTES", "F8_E4M3", "FP8", "C64", "", None, 3, ["FP32"]])
def test_a_dtype_without_a_name_is_sent_elsewhere(service: Running, code: object) -> None:
    sent = asking([entry("x", [1], code, parameters={"binary_data_size": 1})])  # type: ignore[arg-type]
    assert "/v1" in check_problem(ask(service, sent, b"1"), 422, "not_computable")["detail"]
    narrow = asking([entry("x", [1], data=[1.0])], {"op": "cumsum", "dim": 0, "dtype": "c64"})
    assert ask(service, narrow, path="/v2/models/scan/infer").status_code in (406, 422)


@pytest.mark.parametrize("dim", [[0, 1], "0,1", ["0", 1], [-1, 0]])
def test_dims_may_be_a_list_or_a_text(service: Running, client: triton.InferenceServerClient, dim: object) -> None:
    result = client.infer("reduce", [tensor("x", DATA)], parameters={"op": "sum", "dim": dim, "keepdim": True})
    assert result.as_numpy("x").tolist() == [[DATA.sum()]]


def test_parameters_may_stand_in_the_query_too(service: Running, client: triton.InferenceServerClient) -> None:
    result = client.infer("reduce", [tensor("x", DATA)], query_params={"op": "sum"}, parameters={"dim": 0})
    assert result.as_numpy("x").tolist() == DATA.sum(0).tolist()
    with pytest.raises(InferenceServerException, match="op stands in the query and in the body"):
        client.infer("reduce", [tensor("x", DATA)], query_params={"op": "sum"}, parameters=MEAN)


def test_a_raw_body_is_one_tensor(service: Running) -> None:
    response = service.post(f"{INFER}?op=sum", DATA.tobytes(), inference_header_content_length="0")
    n = int(response.headers["inference-header-content-length"])
    assert response.content[n:] == DATA.sum().tobytes() + b"\x01"
    odd = service.post(f"{INFER}?op=sum", b"12345", inference_header_content_length="0")
    check_problem(odd, 400, "malformed_payload")


def test_reserved_parameters_are_nothing_to_an_op(client: triton.InferenceServerClient) -> None:
    result = client.infer(
        "reduce", [tensor("x", DATA)], parameters=MEAN, sequence_id=7, sequence_start=True, priority=2, timeout=0
    )
    assert result.as_numpy("x").shape == (4,)


# -- ways to ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
@pytest.mark.parametrize("data", [DATA, LARGE], ids=["small", "large"])
def test_both_ways_may_be_compressed(
    service: Running, client: triton.InferenceServerClient, data: np.ndarray, packing: str
) -> None:
    words = {"op": "softmax", "dim": 1}
    result = client.infer(
        "softmax",
        [tensor("data", data)],
        parameters=words,
        request_compression_algorithm=packing,
        response_compression_algorithm=packing,
    )
    same(result, expected(service, "softmax", words, payload(data=data)))


@pytest.mark.parametrize(
    ("accepted", "packing"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("gzip, deflate", None), ("br", None), ("*", None), ("identity", None)],
)
def test_a_reply_is_compressed_for_one_who_takes_nothing_else(
    service: Running, accepted: str, packing: str | None
) -> None:
    asked = asking([entry("x", [2], data=[1, 2])])
    response = ask(service, asked, accept_encoding=accepted)
    assert response.headers.get("content-encoding") == packing
    assert response.json() == ask(service, asked, accept_encoding="identity").json()
    refused = ask(service, asking([entry("x", [2], data=[1])]), accept_encoding=accepted)
    check_problem(refused, 400, "malformed_payload")
    assert "content-encoding" not in refused.headers


def test_the_length_of_a_compressed_reply_is_that_of_its_plain_json(service: Running) -> None:
    asked = asking([entry("x", [2], data=[1, 2])], MEAN | {"binary_data_output": True})
    with service.http.stream("POST", INFER, json=asked, headers={"accept-encoding": "gzip"}) as response:
        packed = b"".join(response.iter_raw())
        n = int(response.headers["inference-header-content-length"])
    assert int(response.headers["content-length"]) == len(packed)
    plain = gzip.decompress(packed)
    assert json.loads(plain[:n])["outputs"][0]["parameters"] == {"binary_data_size": 4}
    assert plain[n:] == np.float32(1.5).tobytes() + b"\x01"


def test_many_at_once_by_async_infer(client: triton.InferenceServerClient) -> None:
    asked = [client.async_infer("reduce", [tensor("x", DATA + i)], parameters=MEAN) for i in range(8)]
    for i, one in enumerate(asked):
        assert one.get_result(timeout=60).as_numpy("x").tolist() == (DATA + i).mean(0).tolist()
    with pytest.raises(InferenceServerException, match=r"\[422\] "):
        client.async_infer("reduce", [tensor("x", DATA)], parameters={"op": "nope"}).get_result(timeout=60)


async def by_aio(netloc: str) -> list[Any]:
    async with triton_aio.InferenceServerClient(netloc) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("reduce")
        assert (await client.get_model_metadata("reduce"))["name"] == "reduce"
        data = LARGE[:40]
        inputs = [tensor("x", data), tensor("x.mask", data > 0, binary=False)]
        wanted = [triton.InferRequestedOutput("x", binary_data=False), triton.InferRequestedOutput("x.mask")]
        packings = (None, "gzip", "deflate")
        results = await asyncio.gather(
            *(
                client.infer(
                    "reduce",
                    inputs,
                    outputs=wanted,
                    parameters={"op": "sum", "dim": [0]},
                    request_compression_algorithm=there,
                    response_compression_algorithm=back,
                )
                for there in packings
                for back in packings
            )
        )
        with pytest.raises(InferenceServerException, match=r"\[422\] .* did you mean mean\?"):
            await client.infer("reduce", inputs, parameters={"op": "maen"})
        return [[result.as_numpy("x").tolist(), result.as_numpy("x.mask").tolist()] for result in results]


def test_the_aio_client_works(service: Running) -> None:
    answer = expected(service, "reduce", {"op": "sum", "dim": "0"}, payload(x=LARGE[:40], x__mask=LARGE[:40] > 0))
    assert asyncio.run(by_aio(service.netloc)) == [[answer["x"].tolist(), answer["x.mask"].tolist()]] * 9


@pytest.mark.parametrize("binary", [True, False], ids=["bytes", "json"])
def test_timeout_is_a_deadline_in_microseconds(
    service: Running, client: triton.InferenceServerClient, monkeypatch: pytest.MonkeyPatch, binary: bool
) -> None:
    inputs = [tensor("x", LARGE[:40], binary=binary)]
    release = threading.Event()
    monkeypatch.setattr(work.answers, "run", lambda *_, **__: release.wait(60))
    with pytest.raises(InferenceServerException, match=r"\[504\] the deadline passed"):
        client.infer("reduce", inputs, parameters=MEAN, timeout=200_000)
    monkeypatch.undo()
    release.set()
    assert client.infer("reduce", inputs, parameters=MEAN, timeout=2**70).as_numpy("x").shape == (400,)
    wait_until(lambda: service.service.lanes.cpu.n_pending == 0)


def test_the_lane_is_for_what_is_not_small(service: Running, client: triton.InferenceServerClient) -> None:
    with lane_blocked(service):
        assert client.infer("reduce", [tensor("x", DATA)], parameters=MEAN).as_numpy("x").shape == (4,)
        for binary in (True, False):
            with pytest.raises(InferenceServerException, match=r"\[504\] the deadline passed"):
                client.infer(
                    "reduce",
                    [tensor("x", LARGE[:40], binary=binary)],
                    parameters=MEAN,
                    headers={"X-Request-Timeout": "0.3"},
                )


# -- the page -----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "v2.md").read_text()


def block(language: str, service: Running) -> str:
    """The one block of the page in a language, with the service's port."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found).replace("localhost:8000", service.netloc)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_of_the_page_prints_what_it_says(service: Running) -> None:
    serve, _, curl = block("sh", service).partition("\n")
    assert serve.startswith("maskserve serve &")
    shown = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == block("json", service).strip()


def test_the_python_of_the_page_prints_what_it_says(service: Running, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python", service)
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.rpartition("  # ")[2].strip()


# -- errors -------------------------------------------------------------------------------------------------------

X = entry("x", [2], data=[1.0, 2.0])
RAW = entry("x", [2], parameters={"binary_data_size": 8})


def sized(shape: Any, n_bytes: Any) -> dict[str, Any]:
    return asking([entry("x", shape, parameters={"binary_data_size": n_bytes})])


@pytest.mark.parametrize(
    ("question", "binary", "status", "code"),
    [
        (b"", b"", 400, "malformed_payload"),
        (b"{", b"", 400, "malformed_payload"),
        (b"[]", b"", 400, "malformed_payload"),
        (b"\xff\xfe{}", b"", 400, "malformed_payload"),
        (b'{"inputs": [], "inputs": []}', b"", 400, "malformed_payload"),
        (b"[" * 100_000, b"", 400, "malformed_payload"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", b"", 400, "malformed_payload"),
        (asking([]), b"", 400, "malformed_payload"),
        (asking([3]), b"", 400, "malformed_payload"),
        ({"inputs": {}}, b"", 400, "malformed_payload"),
        (asking([X], [1]), b"", 400, "malformed_payload"),
        (asking([X] * 1025), b"", 413, "too_large"),
        (asking([X, X]), b"", 400, "malformed_payload"),
        (asking([X | {"name": 3}]), b"", 400, "malformed_payload"),
        (asking([X | {"name": "a\x1b[31m"}]), b"", 422, "not_computable"),
        (asking([X | {"name": "\ud800"}]), b"", 400, "malformed_payload"),
        (asking([X | {"name": "y" * 999}]), b"", 413, "too_large"),
        (asking([X | {"name": "__metadata__"}]), b"", 422, "not_computable"),
        (asking([X | {"shape": [3]}]), b"", 400, "malformed_payload"),
        (asking([X | {"shape": [-1, -2]}]), b"", 400, "malformed_payload"),
        (asking([X | {"shape": 2}]), b"", 400, "malformed_payload"),
        (asking([X | {"shape": None}]), b"", 400, "malformed_payload"),
        (asking([X | {"shape": [True, 2]}]), b"", 400, "malformed_payload"),
        (asking([X | {"shape": [1] * 33}]), b"", 422, "not_computable"),
        (asking([X | {"shape": [2**40, 2**40]}]), b"", 400, "malformed_payload"),
        (asking([X | {"shape": [2**40, 0]}]), b"", 400, "malformed_payload"),
        (asking([X | {"data": [1.0, "2"]}]), b"", 400, "malformed_payload"),
        (asking([X | {"data": [[1.0], 2.0]}]), b"", 400, "malformed_payload"),
        (asking([X | {"data": {"a": 1}}]), b"", 400, "malformed_payload"),
        (asking([X | {"data": [1.0, 1e39]}]), b"", 400, "malformed_payload"),
        (asking([X | {"datatype": "UINT8", "data": [1, 256]}]), b"", 400, "malformed_payload"),
        (asking([X | {"datatype": "BOOL", "data": [1, 0]}]), b"", 400, "malformed_payload"),
        (asking([X | {"parameters": {"binary_data_size": 8}}]), bytes(8), 400, "malformed_payload"),
        (asking([{"name": "x", "shape": [2], "datatype": "FP32"}]), b"", 400, "malformed_payload"),
        (asking([X]), b"12345678", 400, "malformed_payload"),
        (asking([RAW]), b"1234567", 400, "malformed_payload"),
        (asking([RAW]), b"123456789", 400, "malformed_payload"),
        (sized([2], 4), b"1234", 400, "malformed_payload"),
        (sized([2], -8), b"1234", 400, "malformed_payload"),
        (sized([2], "8"), b"1234", 400, "malformed_payload"),
        (sized([2], True), b"1234", 400, "malformed_payload"),
        (sized([2**62], 2**64), b"1234", 400, "malformed_payload"),
        (sized([2**40, 2**40], 0), b"1234", 400, "malformed_payload"),
        (sized([2**30], 2**32), b"1234", 400, "malformed_payload"),
        (asking([RAW | {"datatype": "BOOL", "shape": [8]}]), b"\x02" * 8, 400, "malformed_payload"),
        (asking([X | {"parameters": {"shared_memory_region": "a"}}]), b"", 501, "not_offered"),
        (asking([X], outputs=[{"name": "x", "parameters": {"classification": 3}}]), b"", 501, "not_offered"),
        (asking([X], outputs=[{"name": "x", "parameters": {"shared_memory_region": "a"}}]), b"", 501, "not_offered"),
        (asking([X], outputs=[{"name": "x"}, {"name": "x"}]), b"", 400, "malformed_payload"),
        (asking([X], outputs=[{"name": "z"}]), b"", 422, "unknown_tensor"),
        (asking([X], outputs=[{"name": "x", "parameters": {"binary_data": 1}}]), b"", 422, "bad_parameter"),
        (asking([X], outputs="x"), b"", 400, "malformed_payload"),
        (asking([X], id=7), b"", 400, "malformed_payload"),
        (asking([X], id="i" * 257), b"", 400, "malformed_payload"),
        (asking([X], {}), b"", 422, "unknown_op"),
        (asking([X], {"op": ["sum"]}), b"", 422, "unknown_op"),
        (asking([X], {"op": "x" * 8000}), b"", 422, "unknown_op"),
        (asking([X], {"op": "x" * 9000}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"dim": [0] * 9000}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"dim": {"a": 1}}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"dim": [[0]]}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"dim": 7}), b"", 422, "dim_out_of_range"),
        (asking([X], MEAN | {"dim": 10**4000}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"tensor": 5}), b"", 422, "unknown_tensor"),
        (asking([X], MEAN | {"keepdim": "maybe"}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"keepdim": [True]}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"nope": 1}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"n\ud800": 1}), b"", 400, "malformed_payload"),
        (asking([X], {"op": "n\ud800"}), b"", 400, "malformed_payload"),
        (asking([X], MEAN | {"timeout": -1}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"timeout": "1"}), b"", 422, "bad_parameter"),
        (asking([X], MEAN | {"binary_data_output": "yes"}), b"", 422, "bad_parameter"),
        (asking([entry("x.mask", [1], "BOOL", data=[True])]), b"", 422, "orphan_mask"),
        (asking([X, entry("mask", [3], "BOOL", data=[True] * 3)]), b"", 422, "mask_shape"),
        (asking([X, entry("mask", [2], data=[1, 0])]), b"", 422, "mask_dtype"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_told_and_the_next_request_works(
    service: Running, question: object, binary: bytes, status: int, code: str
) -> None:
    told = check_problem(ask(service, question, binary), status, code)
    assert isinstance(told["error"], str)
    assert ask(service, asking([X])).status_code == 200


def test_a_size_that_is_not_the_shapes_is_told_with_both_numbers(service: Running) -> None:
    detail = check_problem(ask(service, sized([2, 3], 25), bytes(25)), 400, "malformed_payload")["detail"]
    assert "25" in detail
    assert "24" in detail


@pytest.mark.parametrize("length", ["-1", "1e3", "", "9" * 40, "1_0", "7 8", "٣", "99999", "3"])
def test_a_length_that_cannot_be_is_refused(service: Running, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length.encode()}
    response = service.http.post(INFER, content=json.dumps(asking([X])), headers=headers)
    check_problem(response, 400, "malformed_payload")


def test_a_body_that_expands_is_bounded_here_too(service: Running) -> None:
    check_problem(ask(service, gzip.compress(bytes(MAX_BODY + 1)), content_encoding="gzip"), 413, "too_large")
    packed = zlib.compress(json.dumps(asking([X])).encode())
    assert ask(service, packed, content_encoding="deflate").status_code == 200
    check_problem(ask(service, packed, content_encoding="br"), 415, "unsupported_media_type")


def test_an_answer_whose_text_is_too_long_for_json_is_sent_as_bytes_alone(service: Running) -> None:
    data = np.full((1900, 1900), 100, np.int8)
    inputs = [entry("x", [1900, 1900], "INT8", parameters={"binary_data_size": data.size})]
    asked = asking(inputs, words_for(first("fill")))
    told = ask(service, asked, data.tobytes(), path="/v2/models/fill/infer")
    assert "bytes of JSON" in check_problem(told, 406, "not_acceptable")["detail"]
    asked["parameters"]["binary_data_output"] = True
    assert ask(service, asked, data.tobytes(), path="/v2/models/fill/infer").status_code == 200


def test_an_answer_too_large_for_json_is_sent_as_bytes_alone(service: Running) -> None:
    data = np.ones(1 << 21 | 1, np.int8)
    asked = asking(
        [entry("x", [data.size], "INT8", parameters={"binary_data_size": data.size})], {"op": "cumsum", "dim": 0}
    )
    path = "/v2/models/scan/infer"
    assert (
        "binary_data" in check_problem(ask(service, asked, data.tobytes(), path=path), 406, "not_acceptable")["detail"]
    )
    asked["parameters"]["binary_data_output"] = True
    assert ask(service, asked, data.tobytes(), path=path).status_code == 200
