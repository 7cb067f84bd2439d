"""What the service tells its operators: metrics that no client can grow, a line for each request, traces that go on."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as metrics

from maskserve.ops import OPS, verbs
from maskserve_api import logs
from maskserve_api.jobs.job import Status
from maskserve_api.trace import STATE_BYTES
from tests.http_service import JSON, Running, payload, running, wait_until
from tests.test_http_limits import head, process

QUESTION = payload(data=np.array([1, 1e9, 3], np.float32), mask=np.array([True, False, True]))
LARGE = payload(data=np.ones(1 << 18, np.float32))
STAGES = {"read", "queue", "decode", "compute", "encode", "send", "total"}


@pytest.fixture
def service() -> Iterator[Running]:
    with running() as it:
        yield it


def samples(service: Running, name: str, **labels: str) -> float:
    """The sum of the samples with these labels."""
    families = metrics(service.http.get("/metrics").text)
    found = (s for family in families for s in family.samples if s.name == name)
    return sum(s.value for s in found if labels.items() <= s.labels.items())


def test_every_request_is_counted_once_with_its_bytes_stages_and_cells(service: Running) -> None:
    sizes = [len(service.post("/v1/scan?op=cumsum&dim=0", question).content) for question in (QUESTION, LARGE)]
    asked = {"verb": "scan", "op": "cumsum", "status": "200"}
    wait_until(lambda: samples(service, "maskserve_requests_total", **asked) == 2)
    families = {family.name: family for family in metrics(service.http.get("/metrics").text)}
    stages = {
        s.labels["stage"] for s in families["maskserve_request_duration_seconds"].samples if s.labels["op"] == "cumsum"
    }
    assert stages == STAGES
    assert samples(service, "maskserve_request_bytes_total") == len(QUESTION) + len(LARGE)
    assert samples(service, "maskserve_reply_bytes_total") > sum(sizes)
    assert samples(service, "maskserve_elements_total", state="valid") == 2 + (1 << 18)
    assert samples(service, "maskserve_elements_total", state="masked") == 1
    assert samples(service, "maskserve_queue_depth") == samples(service, "maskserve_held_bytes") == 0
    assert samples(service, "process_resident_memory_bytes") > 0


def test_no_client_can_make_up_a_label(service: Running) -> None:
    for path in ("/v1/reduce?op=zork", "/v1/reduce?op=sum&zork=1", "/zork", "/v1/zork?op=sum", "/v1/ops/zork"):
        assert service.post(path, QUESTION).status_code >= 400
    service.http.request("ZORK", "/v1/reduce")
    page = service.http.get("/metrics").text
    assert "zork" not in page.lower()
    assert set(re.findall(r'op="(\w+)"', page)) <= {*OPS, "other"}
    assert set(re.findall(r'verb="(\w+)"', page)) <= {*verbs(), "other"}


def test_two_applications_count_apart(service: Running) -> None:
    service.post("/v1/reduce?op=sum", QUESTION)
    with running() as other:
        assert samples(other, "maskserve_requests_total", op="sum") == 0


def test_openmetrics_is_there_for_who_asks(service: Running) -> None:
    response = service.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert any(family.name == "maskserve_requests" for family in openmetrics(response.text))


def test_metrics_are_told_to_any_host(service: Running) -> None:
    assert service.http.get("/metrics", headers={"host": "10.1.2.3:8000"}).status_code == 200


def test_who_goes_away_is_counted_as_gone(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "maskserve")
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head(service, "Content-Length: 100000") + b"abc")
    wait_until(lambda: samples(service, "maskserve_requests_total", verb="reduce", op="sum", status="499") == 1)
    assert any(getattr(record, "code", None) == "disconnected" for record in caplog.records)


# -- the log ------------------------------------------------------------------------------------------------------


def events(text: str) -> list[dict[str, object]]:
    """The lines after the one that tells where the service listens."""
    return [json.loads(line) for line in text.splitlines()]


def test_each_request_is_one_line_of_json_without_cells_or_query(tmp_path: Path) -> None:
    with process() as (child, line):
        base = re.search(r"http://[0-9.:]+", line)
        assert base
        with httpx.Client(base_url=base[0], timeout=30) as http:
            http.post("/v1/reduce?op=sum", content=b'{"data": [123454321, null]}', headers={"content-type": JSON})
            http.get("/v1/ops/secret%0D%0A%1B[31m" + "x" * 300, headers={"x-request-id": "mine"})
            http.post("/v1/reduce?op=secret&dim=%0D%0A", content=QUESTION)
            http.get("/livez")
        child.terminate()
        assert child.wait(20) == 0
        assert child.stderr is not None
        text = child.stderr.read()
    done, path, unknown = events(text)
    assert list(done)[:3] == ["time", "level", "event"]
    assert (done["verb"], done["op"], done["status"], done["code"]) == ("reduce", "sum", 200, None)
    assert (done["bytes_in"], done["key"]) == (27, None)
    assert isinstance(done["ms"], dict)
    assert done["ms"].keys() == STAGES - {"queue"}
    assert (path["verb"], path["op"], path["status"], path["request_id"]) == ("other", "other", 404, "mine")
    assert len(str(path["path"])) <= 128
    assert (unknown["op"], unknown["code"]) == ("other", "unknown_op")
    for word in ("12345432", "\x1b", "op=secret"):
        assert word not in text


@pytest.mark.parametrize("form", ["json", "text", "off"])
def test_what_a_form_of_the_log_tells(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, ours = logging.getLogger(), logging.getLogger("maskserve")
    before = root.handlers[:], root.level, ours.level
    try:
        root.handlers = []
        logs.configure(form)
        logs.requests.info("request", extra={"path": "\x1b[31m", "ms": {"read": 1}})
        logging.getLogger("uvicorn.error").error("careful")
        ours.getChild("api").error("request %s failed", "a", exc_info=ValueError("why"))
    finally:
        root.handlers, root.level, ours.level = before
        logs.requests.disabled = False
    told = capsys.readouterr().err
    assert ("path" in told) == (form != "off")
    assert "careful" in told
    assert "ValueError: why" in told
    assert "\x1b" not in told
    if form == "json":
        assert [event["level"] for event in events(told)] == ["info", "error", "error"]


# -- traces -------------------------------------------------------------------------------------------------------

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def traced(service: Running, **headers: str) -> tuple[str, str, str, str]:
    given = {name: value for name, value in headers.items() if value}
    parts = service.http.get("/livez", headers=given).headers["traceparent"].split("-")
    assert [len(part) for part in parts] == [2, 32, 16, 2]
    assert parts[2] != SPAN
    return tuple(parts)


def test_a_trace_goes_on_with_a_span_of_our_own(service: Running) -> None:
    for given in (f"00-{TRACE}-{SPAN}-01", f"01-{TRACE}-{SPAN}-01-more"):
        edition, trace_id, _, flags = traced(service, traceparent=given)
        assert (edition, trace_id, flags) == ("00", TRACE, "01")


@pytest.mark.parametrize(
    "given",
    ["", "x", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}-01-x",
     f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}"],
)  # fmt: skip
def test_a_trace_that_is_none_is_replaced(service: Running, given: str) -> None:
    one, other = (traced(service, traceparent=given)[1] for _ in range(2))
    assert TRACE not in (one, other)
    assert one != other


def test_tracestate_is_passed_on_and_bounded(service: Running) -> None:
    parent = f"00-{TRACE}-{SPAN}-00"
    kept = service.http.get("/livez", headers={"traceparent": parent, "tracestate": "a=1, b=2"})
    assert kept.headers["tracestate"] == "a=1,b=2"
    long = ",".join(f"k{i}={'v' * 90}" for i in range(20))
    cut = service.http.get("/livez", headers={"traceparent": parent, "tracestate": long}).headers["tracestate"]
    assert len(cut) <= STATE_BYTES
    assert long.startswith(cut)
    assert "tracestate" not in service.http.get("/livez", headers={"tracestate": "a=1"}).headers


def test_a_problem_is_traced_too(service: Running) -> None:
    response = service.post("/v1/reduce?op=zork", QUESTION, traceparent=f"00-{TRACE}-{SPAN}-01")
    assert response.headers["traceparent"].startswith(f"00-{TRACE}-")


def test_a_text_log_has_the_word_of_a_status() -> None:
    assert logs.escaped(None, "info", {"status": Status.SUCCEEDED}) == {"status": "succeeded"}
