"""Every row that a verb serves, through four doors: the same request gives the same bytes, and the same refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import maskserve as ms
from maskserve import dtypes, requests
from maskserve.errors import MaskserveError, ParameterError
from maskserve.ops import OPS, served
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import GRAD, Formula, Row
from maskserve.payload.format import BytesPayload, to_bytes
from maskserve.payload.tensors import output
from maskserve_api.v2_tensors import DTYPES
from maskserve_cli.app import UsageError, main, prepared, run
from tests.http_service import Running, check_problem, running
from tests.samples import cells
from tests.test_v2 import ask, asking, entry

SERVED = [row for row in OPS.values() if row.verb]
DIFFERENTIABLE = [row for row in served(GRAD) if not isinstance(row, Formula)]
WORDS = {
    Type.NUMBERS: "0.25,0.5",
    Type.CELL: "3",
    Type.DIM: "year",
    Type.DIMS: "year",
    Type.EXPRESSION: "rain - mean(depth)",
}
"""What a request says for a parameter of this type, as text."""

every_served_row = pytest.mark.parametrize("row", SERVED, ids=lambda row: f"{row.verb}-{row.name}")
every_differentiable_row = pytest.mark.parametrize("row", DIFFERENTIABLE, ids=lambda row: row.name)


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
    names = {"data"} if isinstance(row, Formula) else {"rain", "depth"}
    assert names <= set(answer)
    assert not any(answer[name].get_data()[~answer[name].get_mask()].any() for name in names)


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


# -- gradients ----------------------------------------------------------------------------------------------------

PYTHON_WORDS = {Type.NUMBERS: (0.25, 0.5), Type.CELL: 3, Type.DIM: 1, Type.DIMS: 1}
"""The same as WORDS, as values."""
FROM_ABOVE = ("ones", "given", "masked")


def asked_for(row: Row, above: str, question: Path) -> tuple[Path, Any]:
    """The question with a gradient from above, of the shape of the row's result, with junk under its mask; and that gradient."""
    if above == "ones":
        return question, None
    shape = ms.load(ms.compute(row.verb or "", question, **words_of(row)).to_bytes())["rain"].shape
    generator = torch.Generator().manual_seed(11)
    mask = torch.rand(shape, generator=generator) < (0.7 if above == "masked" else 2)
    cells = torch.where(mask, torch.randn(shape, generator=generator), torch.inf)
    asked = ms.load(question)
    tensors = {
        "rain": asked["rain"].get_data(),
        "rain.mask": asked["rain"].get_mask(),
        "depth": asked["depth"].get_data(),
    }
    tensors |= {"grad_output": cells} | ({"grad_output.mask": mask} if above == "masked" else {})
    path = question.with_name("above.safetensors")
    dims = '{"rain": ["site", "year"], "depth": ["site", "year"]}'
    path.write_bytes(to_bytes([output(name, t) for name, t in tensors.items()], {"maskserve.dims": dims}))
    return path, ms.masked_tensor(cells, mask)


@pytest.mark.parametrize("above", FROM_ABOVE)
@every_differentiable_row
def test_the_same_gradient_through_every_door(row: Row, above: str, question: Path, service: Running) -> None:
    path, given = asked_for(row, above, question)
    words = {**words_of(row), "tensor": "rain"}
    python, terminal, http = doors("grad", words, path, service)
    assert python == terminal == http
    answer = ms.load(python)
    assert set(answer) == {"value", "rain.grad"}
    assert not answer["rain.grad"].get_data()[~answer["rain.grad"].get_mask()].any()

    asked = ms.load(path)["rain"]
    rain = ms.masked_tensor(asked.get_data(), asked.get_mask(), requires_grad=True)
    keywords = {p.name: PYTHON_WORDS[p.type] for p in row.requestable if p.default is REQUIRED or p.name == "dim"}
    made = getattr(ms, row.name)(rain, **keywords)
    made = getattr(made, "values", made)
    (expected,) = torch.autograd.grad([made], [rain], [torch.ones(made.shape) if given is None else given])
    for got, wanted in ((answer["value"], made.detach()), (answer["rain.grad"], expected)):
        assert torch.equal(got.get_mask(), wanted.get_mask())
        assert torch.equal(got.to_tensor(0), wanted.to_tensor(0))

    assert row.verb
    own = ms.load(ms.compute(row.verb, path, **words).to_bytes())["rain"]
    assert torch.equal(own.get_mask(), answer["value"].get_mask()), "the value is what the row's own verb gives"
    assert own.get_data().numpy().tobytes() == answer["value"].get_data().numpy().tobytes()


@pytest.mark.parametrize("op", ["sum", "mean", "var", "std"])
def test_a_gradient_with_weights_comes_through_every_door(op: str, question: Path, service: Running) -> None:
    given = {"correction": "0"} if op in ("var", "std") else {}
    words = {"op": op, "dim": "year", "weights": "area", "tensor": "rain", **given}
    python, terminal, http = doors("grad", words, question, service)
    assert python == terminal == http
    answer, asked = ms.load(python), ms.load(question)
    assert set(answer) == {"value", "rain.grad"}, "none by the weights"
    rain = ms.masked_tensor(asked["rain"].get_data(), asked["rain"].get_mask(), requires_grad=True)
    made = getattr(ms, op)(rain, 1, weights=asked["area"], **({"correction": 0} if given else {}))
    made.backward(torch.ones(5))
    assert torch.equal(answer["rain.grad"].get_mask(), rain.grad.get_mask())
    assert torch.equal(answer["rain.grad"].get_data(), rain.grad.to_tensor(0))


@pytest.mark.parametrize(
    ("words", "above", "code", "said"),
    [
        ({"op": "count", "tensor": "rain"}, None, "gradient_not_available", "count has no gradient: no small change of a cell"),
        ({"op": "mask", "tensor": "rain"}, None, "gradient_not_available", "mask has no gradient: it changes which cells"),
        ({"op": "exp", "tensor": "rain"}, None, "unknown_op", "exp is for Python"),
        ({"op": "mean"}, None, "bad_parameter", "the payload has 2 variables: depth, rain; tensor (--tensor) picks one"),
        ({"op": "mean", "dim": "1", "tensor": "rain"}, torch.ones(4), "shape_mismatch",
         "grad_output has shape (4,), the result of mean (5,); they must be equal"),
        ({"op": "mean", "dim": "1", "tensor": "rain"}, torch.ones(5, 1), "shape_mismatch", "has shape (5, 1)"),
        ({"op": "mean", "tensor": "rain"}, torch.ones(1), "shape_mismatch", "the result of mean ()"),
        ({"op": "sum", "dim": "1", "tensor": "rain"}, torch.ones(5, dtype=torch.bool), "dtype_not_accepted",
         "grad_output is bool"),
        ({"op": "sum", "dim": "1", "tensor": "rain"}, torch.ones(5, dtype=torch.complex64), "dtype_not_accepted",
         "grad_output is c64"),
        ({"op": "sum", "dim": "week", "tensor": "rain"}, None, "dim_out_of_range", "no variable has the dim 'week'"),
    ],
)  # fmt: skip
def test_a_gradient_that_is_not_there_is_the_same_refusal_through_every_door(
    words: dict[str, str],
    above: torch.Tensor | None,
    code: str,
    said: str,
    question: Path,
    service: Running,
    capsys: Any,
) -> None:
    asked = ms.load(question)
    tensors = {"rain": asked["rain"].get_data(), "depth": asked["depth"].get_data(), "year": asked["year"].get_data()}
    tensors |= {} if above is None else {"grad_output": above}
    path = question.with_name("refused.safetensors")
    path.write_bytes(
        to_bytes(
            [output(name, t) for name, t in tensors.items()],
            {"maskserve.dims": '{"rain": ["site", "year"], "depth": ["site", "year"], "year": ["year"]}'},
        )
    )
    with pytest.raises(MaskserveError) as refused:
        ms.compute("grad", path, **words)
    assert refused.value.code == code
    assert said in refused.value.message
    reply = service.http.post("/v1/grad", params=words, content=path.read_bytes())
    assert (reply.status_code, reply.json()["code"], reply.json()["detail"]) == (422, code, refused.value.message)
    options = [word for name, value in words.items() for word in (f"--{name}", value)]
    expected = 65 if code == "shape_mismatch" else 2
    assert main(["grad", *options, str(path)]) == expected
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert refused.value.message in line


# -- the law ------------------------------------------------------------------------------------------------------

ASKED = [(verb, row) for row in OPS.values() for verb in row.verbs]
CODES = {dtype: code for code, dtype in DTYPES.items()}
TEXTS: dict[Type, tuple[str, ...]] = {
    Type.DIMS: ("0", "1", "-1", "0,1", "1,0", *["0", "-1"] * 5, "0,0", "9", "time", "", "1.0"),
    Type.DIM: ("0", "-1", "1", *["0", "-1"] * 5, "9", "time", "0,1", ""),
    Type.FLAG: ("true", "false", "maybe"),
    Type.COUNT: ("0", "1", "3", "-1", "two"),
    Type.NUMBER: ("0", "1", "0.5", "nan", "x"),
    Type.REAL: ("2", "0.5", "inf", "-inf", "1e999"),
    Type.CELL: ("3", "1", "0.5", "-1", "inf", "x"),
    Type.NUMBERS: ("0.25,0.5", "0.5", "0", "2", "0.5,", ""),
    Type.RANGE: ("0,1", "-inf,0.5", "1,0", "3", "x,y"),
    Type.DTYPE: ("f64", "f32", "i64", "f99"),
    Type.WORD: ("x", "nope"),
    Type.WORDS: ("x", "nope"),
    Type.TENSOR: ("x", "nope"),
    Type.NAMES: ("x", "x,x", "y", "x y", ""),
    Type.PAIRS: ("y=x", "y=nope", "y", "=x"),
    Type.EXPRESSION: (
        "x",
        "x * 2 + 1",
        "mean(x, dim=0) - x",
        "sum(where(x < 0, exp(x), 1))",
        "cumsum(x, dim=-1) / y",
        "x > 1",
        "count(x)",
        "softmax(x, dim=1, nan=omit)",
        "1 / 0",
        "median(x",
        "mena(x)",
        "x.real",
        "9**9**9",
        "",
    ),
}
"""What a request may say for a parameter of a type, right and wrong."""
MASKS = ("none", *["mask", "x.mask"] * 3, "wrong shape", "orphan", "wrong dtype")


@st.composite
def requests_of(draw: st.DrawFn, verb: str, row: Row) -> dict[str, str]:
    """Words for a row: all that it needs, some of what it takes, and now and then what it does not."""
    words = {"op": row.name}
    for p in (*row.requestable, *requests.COMMON):
        is_wanted = p.default is REQUIRED or p.name == "dim" or draw(st.integers(0, 9)) == 0
        if is_wanted:
            words[p.name] = draw(st.sampled_from((*p.choices, *TEXTS.get(p.type, ("3", "nope")))))
    slip = draw(st.sampled_from([{}] * 18 + [{"op": "nope"}, {"nonsense": "1"}]))
    return words | slip


@st.composite
def tensors_of(draw: st.DrawFn, row: Row) -> dict[str, torch.Tensor]:
    """x with a mask, or with what is none."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    sample = cells(
        dtype, draw(st.sampled_from([(3, 4), (2, 0), (), (5, 3, 2), (130, 70)])), draw(st.integers(0, 99)), row=row
    )
    match draw(st.sampled_from(MASKS)):
        case "none":
            return {"x": sample.data}
        case "wrong shape":
            return {"x": sample.data, "mask": torch.ones(7, 7) > 0}
        case "orphan":
            return {"x": sample.data, "y.mask": sample.mask}
        case "wrong dtype":
            return {"x": sample.data, "x.mask": sample.mask.int()}
        case name:
            return {"x": sample.data, name: sample.mask}


def option(row: Row, name: str, text: str) -> list[str]:
    """A parameter as the command line spells it."""
    flag = f"--{name.replace('_', '-')}"
    kind = next((p.type for p in (*row.requestable, *requests.COMMON) if p.name == name), None)
    if kind is Type.FLAG and text in ("true", "false"):
        return [flag] if text == "true" else []
    return [flag, text]


def by_python(verb: str, words: Mapping[str, str], question: Path) -> bytes | str:
    """The answer, or the code of the refusal; so by each door."""
    try:
        return ms.compute(verb, question, **words).to_bytes()
    except MaskserveError as error:
        return error.code


def by_terminal(verb: str, row: Row, words: Mapping[str, str], question: Path) -> bytes | str:
    out = question.with_name("law.answer.safetensors")
    options = [word for name, text in words.items() for word in option(row, name, text)]
    try:
        with prepared():
            assert run([verb, *options, str(question), "-o", str(out), "--force"]) == 0
        return out.read_bytes()
    except MaskserveError as error:
        return error.code
    except UsageError:  # typer's own, of an option that no op of the verb has
        return ParameterError.code


def by_http(reply: httpx.Response) -> bytes | str:
    if reply.status_code == 200:
        return reply.content
    told = check_problem(reply, reply.status_code, reply.json()["code"])
    assert reply.status_code < 500
    return str(told["code"])


def v2_question(tensors: Mapping[str, torch.Tensor], words: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    outputs = [output(name, cells) for name, cells in tensors.items()]
    data = [bytes(out.chunks) for out in outputs]  # type: ignore[arg-type]  # one buffer each
    inputs = [
        entry(out.name, list(out.shape), CODES[out.dtype], parameters={"binary_data_size": len(part)})
        for out, part in zip(outputs, data, strict=True)
    ]
    return asking(inputs, {**words, "binary_data_output": True}), b"".join(data)


def v2_outputs(response: httpx.Response) -> dict[str, tuple[str, list[int], bytes]]:
    at = n = int(response.headers["inference-header-content-length"])
    found = {}
    for out in json.loads(response.content[:n])["outputs"]:
        size = out["parameters"]["binary_data_size"]
        found[out["name"]] = (out["datatype"], out["shape"], response.content[at : at + size])
        at += size
    assert at == len(response.content)
    return found


def outputs_of(answer: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    payload = BytesPayload(answer)
    return {
        name: (CODES[info.dtype], list(info.shape), bytes(payload.read(name)))
        for name, info in payload.header.tensors.items()
    }


def check_law(
    verb: str, row: Row, words: dict[str, str], tensors: dict[str, torch.Tensor], folder: Path, service: Running
) -> None:
    path = folder / "law.safetensors"
    path.write_bytes(to_bytes([output(name, t) for name, t in tensors.items()], {}))
    python = by_python(verb, words, path)
    assert by_terminal(verb, row, words, path) == python
    v1 = service.http.post(f"/v1/{verb}", params=words, content=path.read_bytes())
    assert by_http(v1) == python
    v2 = ask(service, *v2_question(tensors, words), path=f"/v2/models/{verb}/infer")
    if isinstance(python, bytes) and v2.status_code == 200:
        assert v2_outputs(v2) == outputs_of(python)
    else:
        assert by_http(v2) == python
        assert (v2.json()["parameter"], v2.json()["detail"]) == (v1.json()["parameter"], v1.json()["detail"])


@given(asked=st.sampled_from(ASKED), data=st.data())
@settings(max_examples=int(os.environ.get("EXAMPLES", "40")))
def test_one_law_at_every_door(
    asked: tuple[str, Row], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, service: Running
) -> None:
    """The same request has the same bytes or the same refusal by Python, the command line, /v1 and /v2."""
    words, tensors = data.draw(requests_of(*asked)), data.draw(tensors_of(asked[1]))
    check_law(*asked, words, tensors, tmp_path_factory.getbasetemp(), service)


@pytest.mark.parametrize(("verb", "row"), ASKED, ids=lambda value: getattr(value, "name", value))
def test_every_row_keeps_the_law(verb: str, row: Row, tmp_path: Path, service: Running) -> None:
    words = {p.name: WORDS[p.type] for p in row.requestable if p.default is REQUIRED or p.name == "dim"}
    here = {"year": "0", WORDS[Type.EXPRESSION]: "exp(x) - mean(x, dim=0)"}
    numbered = {name: here.get(text, text) for name, text in words.items()}
    sample = cells(dtypes.f32, (4, 5), 7, row=row)
    tensors = {"x": sample.data, "x.mask": sample.mask}
    check_law(verb, row, {"op": row.name} | numbered, tensors, tmp_path, service)
