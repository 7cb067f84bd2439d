"""Adding an op is adding a row: with the one row of tests/rms_row.py, rms is found everywhere with no other edit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

EVERYWHERE = """
import tests.rms_row
tests.rms_row.add()
import json, math, sys
import torch
import maskserve
from maskserve import describe
from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output

m = maskserve.masked_tensor([3.0, math.nan, 4.0], torch.tensor([True, False, True]))
found = {
    "function": maskserve.rms(m).item(),
    "method": m.rms(dim=0).item(),
    "stub": "def rms(input" in describe.stub(),
    "docs": "| `rms` | root of the mean square" in describe.ops_page(),
}

from maskserve_api.app import create_app
from starlette.testclient import TestClient

client = TestClient(create_app(), base_url="http://localhost")
ops = client.get("/v1/ops").text
found["/v1/ops"] = '"rms"' in ops
found["OpenAPI"] = "rms" in client.get("/openapi.json").text
body = to_bytes([output("x", m.get_data()), output("x.mask", m.get_mask())], {})
reply = client.post("/v1/reduce?op=rms", content=body)
found["HTTP"] = maskserve.load(reply.content)["x"].item()

import io, contextlib
from maskserve_cli.app import main

def said(*argv):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code
    assert not code, (argv, code)
    return text.getvalue()

found["CLI help"] = "rms" in said("reduce", "--help") or "rms" in said("ops")
found["CLI ops"] = "root of the mean square" in said("ops")
print(json.dumps(found))
"""


def test_a_row_is_found_in_python_command_line_service_and_docs() -> None:
    path = f"{ROOT}:{ROOT / 'cli'}:{ROOT / 'api'}"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERYWHERE],
        cwd=ROOT, env={**__import__("os").environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    rms = (12.5) ** 0.5
    for name, value in found.items():
        assert value is True or abs(value - rms) < 1e-6, (name, value)


def test_the_laws_take_the_new_row_up() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.rms_row", "tests/test_laws.py", "-k", "rms", "--no-header"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    n_passed = int(run.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert n_passed > 20, "a test a law, which takes every dtype of the row"
