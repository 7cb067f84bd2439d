"""The OpenAPI document against the service: what schemathesis makes of it is answered as it says, and never by a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from schemathesis import openapi
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from maskserve_api.openapi import document
from maskserve_api.v2_openapi import example
from tests.http_service import BINARY, SAFETENSORS, Running, jobs_in, payload, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
QUESTION = payload(data=np.arange(6, dtype=np.float32).reshape(2, 3), mask=np.arange(6).reshape(2, 3) % 4 > 0)
openapi.media_type(SAFETENSORS, st.binary(max_size=64) | st.just(QUESTION))
openapi.media_type(BINARY, st.binary(max_size=64) | st.just(json.dumps(example()).encode()))
schema = openapi.from_dict(document(jobs=True))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(jobs=jobs_in(tmp_path_factory.mktemp("jobs"))) as it:
        yield it


@schema.parametrize()
@settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_one_that_the_document_has(case: schemathesis.Case, service: Running) -> None:
    case.call_and_validate(base_url=f"http://{service.netloc}", checks=CHECKS)
