"""Every row that a verb serves, through three doors: the same request gives the same bytes, and the same refusal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import maskserve as ms
from maskserve.errors import MaskserveError
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Row
from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output
from maskserve_cli.app import main
from tests.http_service import Running, running

SERVED = [row for row in OPS.values() if row.verb]
WORDS = {Type.NUMBERS: "0.25,0.5", Type.CELL: "3", Type.DIM: "year", Type.DIMS: "year"}
"""What a request says for a parameter of this type, as text."""

every_served_row = pytest.mark.parametrize("row", SERVED, ids=lambda row: f"{row.verb}-{row.name}")


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variables with junk under their masks, one without the dim, weights and a coordinate."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand((5, 7), generator=generator) < 0.6
    mask[0] = False
    rain = torch.where(mask, torch.rand((5, 7), generator=generator) * 4, torch.nan)
    depth = torch.randint(0, 9, (5, 7), generator=generator)
    tensors = {"rain": rain, "rain.mask": mask, "depth": depth, "area": torch.arange(1.0, 8.0), "year": torch.arange(7)}
    dims = '{"rain": ["site", "year"], "depth": ["site", "year"], "area": ["year"], "year": ["year"]}'
    path = tmp_path_factory.mktemp("doors") / "question.safetensors"
    path.write_bytes(to_bytes([output(name, t) for name, t in tensors.items()], {"maskserve.dims": dims}))
    return path


def words_of(row: Row) -> dict[str, str]:
    """A request of the row: all that it needs, and the dim where it takes one."""
    wanted = [p for p in row.requestable if p.default is REQUIRED or p.name == "dim"]
    return {"op": row.name, **{p.name: WORDS[p.type] for p in wanted}}


def doors(verb: str, words: dict[str, Any], question: Path, service: Running) -> tuple[bytes, bytes, bytes]:
    """The answers of Python, the command line and HTTP."""
    python = ms.compute(verb, question, **words).to_bytes()
    out = question.with_name("answer.safetensors")
    options = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main([verb, *options, str(question), "-o", str(out), "--force"]) == 0
    reply = service.http.post(f"/v1/{verb}", params=words, content=question.read_bytes())
    assert reply.status_code == 200, reply.text
    return python, out.read_bytes(), reply.content


@every_served_row
def test_the_same_bytes_through_every_door(row: Row, question: Path, service: Running) -> None:
    assert row.verb
    python, terminal, http = doors(row.verb, words_of(row), question, service)
    assert python == terminal == http
    answer = ms.load(python)
    assert {"rain", "depth"} <= set(answer)
    assert not answer["rain"].get_data()[~answer["rain"].get_mask()].any()


@pytest.mark.parametrize("op", ["sum", "mean", "var", "std"])
def test_weights_come_through_every_door(op: str, question: Path, service: Running) -> None:
    words = {"op": op, "dim": "year", "weights": "area", **({"correction": "0"} if op in ("var", "std") else {})}
    python, terminal, http = doors("reduce", words, question, service)
    assert python == terminal == http
    answer, asked = ms.load(python), ms.load(question)
    assert set(answer) == {"rain", "depth"}, "weights are no variable of the answer"
    given = {"correction": 0} if op in ("var", "std") else {}
    expected = getattr(ms, op)(asked["rain"], 1, weights=asked["area"], **given)
    assert torch.equal(answer["rain"].get_mask(), expected.get_mask())
    assert torch.equal(answer["rain"].get_data(), expected.get_data())


@every_served_row
def test_the_same_refusal_through_every_door(row: Row, question: Path, service: Running, capsys: Any) -> None:
    assert row.verb
    words = {**words_of(row), "nonsense": "1"}
    with pytest.raises(MaskserveError) as refused:
        ms.compute(row.verb, question, **words)
    reply = service.http.post(f"/v1/{row.verb}", params=words, content=question.read_bytes())
    assert (reply.status_code, reply.json()["code"]) == (422, refused.value.code)
    assert main([row.verb, "--op", row.name, "--nonsense", "1", str(question)]) == 2
    assert "no option --nonsense" in capsys.readouterr().err
