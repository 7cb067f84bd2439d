"""Expressions on payloads: the verbs eval and grad, by Python, the command line and HTTP; what is refused, and when."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import MaskserveError
from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output
from tests.http_service import Running, check_problem, running
from tests.test_doors import doors

nan, inf = math.nan, math.inf


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as found:
        yield found


def payload(path: Path, dims: Mapping[str, list[str]] | None = None, **tensors: Any) -> Path:
    """A file of tensors, masked ones with their masks."""
    outputs = []
    for name, tensor in tensors.items():
        if isinstance(tensor, MaskedTensor):
            outputs += [output(name, tensor.get_data()), output(f"{name}.mask", tensor.get_mask())]
        else:
            outputs.append(output(name, torch.as_tensor(tensor)))
    path.write_bytes(to_bytes(outputs, {"maskserve.dims": json.dumps(dims)} if dims else {}))
    return path


def cells(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> MaskedTensor:
    """Cells with junk under a third of them."""
    generator = torch.Generator().manual_seed(seed)
    data, mask = torch.randn(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator) > 0.3
    return MaskedTensor(torch.where(mask, data, nan), mask)


@pytest.fixture
def question(tmp_path: Path) -> Path:
    """x and y with names of dims, a coordinate, and a whole-numbered n."""
    dims = {"x": ["time", "lat"], "y": ["lat"], "n": ["time"], "lat": ["lat"]}
    n, lat = torch.arange(4, dtype=torch.int32), torch.tensor([-10.0, 0, 10])
    return payload(tmp_path / "question.safetensors", dims, x=cells(4, 3), y=cells(3, seed=1), n=n, lat=lat)


VALUES: Mapping[str, Callable[..., MaskedTensor]] = {
    "(x - mean(x, dim=0, keepdim=True)) / y": lambda x, y, n, lat: (x - x.mean(0, keepdim=True)) / y,
    "x - mean(x, dim=time)": lambda x, y, n, lat: x - x.mean(0),
    "sum(where(x < 0, exp(x), 1))": lambda x, y, n, lat: ms.where(x < 0, x.exp(), 1).sum(),
    "softmax(x * y, dim=lat) + n": lambda x, y, n, lat: (x * y).softmax(1) + n[:, None],
    "mean(x, dim=lat, weights=lat)": lambda x, y, n, lat: ms.mean(x, 1, weights=lat),
    "(x > 0) & ~(y < 0)": lambda x, y, n, lat: (x > 0) & ~(y < 0),
    "quantile(x, q=(0.25, 0.5), dim=time) - y": lambda x, y, n, lat: ms.quantile(x, (0.25, 0.5), 0) - y,
    "cumsum(abs(x) ** 0.5, dim=0) * -2": lambda x, y, n, lat: (x.abs() ** 0.5).cumsum(0) * -2,
    "lat": lambda x, y, n, lat: lat,
    "2 + 3": lambda x, y, n, lat: ms.masked_tensor(torch.tensor(5)),
}


def assert_is(got: MaskedTensor, wanted: MaskedTensor) -> None:
    assert got.dtype is wanted.dtype
    mask = got.get_mask()
    assert torch.equal(mask, wanted.get_mask())
    assert torch.equal(got.get_data()[mask].nan_to_num(9e9), wanted.get_data()[mask].nan_to_num(9e9))


@pytest.mark.parametrize("text", VALUES)
def test_an_expression_has_the_bits_of_the_calls_through_every_door(
    text: str, question: Path, service: Running
) -> None:
    python, terminal, http = doors("eval", {"expr": text}, question, service)
    assert python == terminal == http
    answer = ms.load(python)
    variables = ms.load(question)
    expected = VALUES[text](**variables)
    assert_is(answer["data"], expected)
    assert not answer["data"].get_data()[~answer["data"].get_mask()].any(), "what is masked is written as 0"


@pytest.mark.parametrize("text", [text for text in VALUES if "lat" not in text and "time" not in text])
def test_the_function_of_python_gives_the_same(text: str, question: Path) -> None:
    variables = ms.load(question)
    assert_is(ms.eval(text, **variables), VALUES[text](**variables))


@pytest.mark.parametrize(
    ("text", "wrt", "function"),
    [
        ("sum(x * y)", "x,y", lambda x, y, n, lat: (x * y).sum()),
        ("x / y", "y", lambda x, y, n, lat: x / y),
        ("mean((x - n) ** 2, dim=lat)", "n,x", lambda x, y, n, lat: ((x - n[:, None]) ** 2).mean(1)),
        ("logsumexp(x, dim=1) - max(x, dim=1)", "x", lambda x, y, n, lat: x.logsumexp(1) - x.amax(1)),
        ("var(x * lat, dim=0)", "lat,x", lambda x, y, n, lat: (x * lat).var(0)),
    ],
)
def test_gradients_are_those_of_the_calls_through_every_door(
    text: str, wrt: str, function: Callable[..., MaskedTensor], question: Path, service: Running
) -> None:
    python, terminal, http = doors("grad", {"expr": text, "wrt": wrt}, question, service)
    assert python == terminal == http
    answer, variables, names = ms.load(python), dict(ms.load(question)), wrt.split(",")
    for name in names:
        data = variables[name].get_data()
        wide = data if data.is_floating_point() else data.double()
        variables[name] = ms.masked_tensor(wide, variables[name].get_mask(), requires_grad=True)
    value = function(**variables)
    leaves = [variables[name] for name in names]
    expected = torch.autograd.grad([value], leaves, [torch.ones(value.shape)])
    assert {*answer} == {"value", *(f"{name}.grad" for name in names)}
    assert_is(answer["value"], value.detach())
    for name, gradient in zip(names, expected, strict=True):
        assert_is(answer[f"{name}.grad"], gradient)


# the cases of SEMANTICS and of the numeric facts: what no path reaches is masked
CASES: list[tuple[str, dict[str, Any], list[float | None] | float, dict[str, list[float | None] | float | None]]] = [
    ("sum(where(x < 0, exp(x), 1))", {"x": [-10.0, -5, 0, 5, 10, 50, 60, 70, 80, 90, 100]}, 9.00678,
     {"x": [4.54e-5, 6.7379e-3, *[None] * 9]}),
    ("sum(where(x < 0, exp(x), 1) + x)", {"x": [-1.0, 0, 100, 1000]}, 1102.3679, {"x": [1.3679, 1, 1, 1]}),
    ("where(b, a / 0, c)", {"a": 2.0, "b": False, "c": 1.0}, 1, {"a": None, "c": 1}),
    ("sum(where(x<0,exp(x),1))", {"x": [-1.0, 0, 50, 100, 1000]}, 4.36788, {"x": [0.36788, *[None] * 4]}),
    ("where(x>0,sqrt(x),0)", {"x": [0.0, -1, 4]}, [0, 0, 2], {"x": [None, None, 0.25]}),
    ("where(x>0,log(x),0)", {"x": [0.0, -1, 2]}, [0, 0, 0.69315], {"x": [None, None, 0.5]}),
    ("where(x!=0,sin(x)/x,1)", {"x": [0.0]}, [1], {"x": [None]}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("text", "variables", "value", "gradients"), CASES, ids=[text for text, *_ in CASES])
def test_the_cases_of_the_specification(
    text: str, variables: Any, value: Any, gradients: Any, dtype: torch.dtype, tmp_path: Path, service: Running
) -> None:
    tensors = {
        name: torch.tensor(v, dtype=torch.bool if isinstance(v, bool) else dtype) for name, v in variables.items()
    }
    path = payload(tmp_path / "case.safetensors", **tensors)
    python, terminal, http = doors("grad", {"expr": text, "wrt": ",".join(gradients)}, path, service)
    assert python == terminal == http
    answer = ms.load(python)
    for got, wanted in ((answer["value"], value), *((answer[f"{name}.grad"], g) for name, g in gradients.items())):
        listed, expected = (v if isinstance(v, list) else [v] for v in (got.tolist(), wanted))
        assert [nan if v is None else v for v in listed] == pytest.approx(
            [nan if v is None else v for v in expected], rel=1e-4, nan_ok=True
        )


def test_a_gradient_from_above_may_be_masked(tmp_path: Path, service: Running) -> None:
    above = ms.masked_tensor(torch.tensor([1.0, nan, 3.0]), torch.tensor([True, False, True]))
    path = payload(tmp_path / "a.safetensors", x=torch.tensor([2.0, 3, 4]), grad_output=above)
    python, terminal, http = doors("grad", {"expr": "x * x"}, path, service)
    assert python == terminal == http
    assert ms.load(python)["x.grad"].tolist() == [4, None, 24]
    wrong = payload(tmp_path / "w.safetensors", x=torch.ones(3), grad_output=torch.ones(2))
    with pytest.raises(MaskserveError, match=r"grad_output has shape \(2,\), the result of the expression \(3,\)"):
        ms.compute("grad", wrong, expr="x * x")


def test_names_of_variables(tmp_path: Path, service: Running) -> None:
    one = payload(tmp_path / "one.safetensors", **{"blk.0.w": torch.tensor([1.0, 2])})
    for words in ({"expr": "x * 2"}, {"expr": "w * 2", "let": "w=blk.0.w"}):
        python, terminal, http = doors("eval", words, one, service)
        assert python == terminal == http
        assert ms.load(python)["data"].tolist() == [2, 4]
    answer = ms.load(ms.compute("grad", one, expr="x * w", let="w=blk.0.w", wrt="w").to_bytes())
    assert answer["w.grad"].tolist() == [2, 4], "x and w are one tensor"
    both = payload(tmp_path / "both.safetensors", a=torch.ones(2), b=torch.ones(2))
    for words, says in (
        ({"expr": "x"}, "column 1: x is no variable; there are a, b"),
        ({"expr": "c", "let": "c=d"}, "'?d'? .*|there is no tensor d"),
        ({"expr": "a", "let": "a=b"}, "the payload has a tensor a already"),
        ({"expr": "a", "let": "a"}, "give NAME=TENSOR, such as x=blk.0.w"),
        ({"expr": "a", "let": ["c=a", "c=b"]}, "give each name once"),
    ):
        with pytest.raises(MaskserveError, match=says):
            ms.compute("eval", both, **words)


def test_an_answer_keeps_the_dims_and_their_coordinates(question: Path) -> None:
    answer = ms.load(ms.compute("eval", question, expr="mean(x, dim=time) * 2").to_bytes())
    assert ({*answer}, answer.dims["data"]) == ({"data", "lat"}, ("lat",))
    answer = ms.load(ms.compute("eval", question, expr="mean(x, dim=lat, keepdim=True)").to_bytes())
    assert ({*answer}, answer.dims["data"]) == ({"data"}, ("time", "lat"))
    again = ms.compute("reduce", ms.compute("eval", question, expr="x * 2").to_bytes(), op="mean", dim="lat")
    assert ms.load(again.to_bytes())["data"].shape == (4,), "the answer of one is the question of another"


def test_history_has_one_text_for_one_meaning(question: Path) -> None:
    texts = ("mean( x,dim=( lat ) )+.5", "(mean(x, keepdim=False, dim=lat)) + 0.50")
    one, other = (ms.compute("eval", question, expr=text).to_bytes() for text in texts)
    assert one == other
    (line,) = ms.load(one).metadata["maskserve.history"].splitlines()
    assert json.loads(line)["expr"] == "mean(x, dim=lat) + 0.5"


@pytest.mark.parametrize(
    ("verb", "words", "code", "says"),
    [
        ("eval", {}, "bad_parameter", "eval needs expr: "),
        ("eval", {"expr": "x +"}, "bad_expression", "column 4: "),
        ("eval", {"expr": "().__class__"}, "bad_expression", "column 3: '.__class__' is no word"),
        ("eval", {"expr": "x + yy"}, "bad_expression", "column 5: yy is no variable"),
        ("eval", {"expr": "expand(mean(x), size=(99999999, 2, 3))"}, "bad_expression", "column 1: expand would give"),
        ("eval", {"expr": "x  x"}, "bad_expression", "column 4: an operator or a comma is missing between x and x"),
        ("eval", {"expr": "x + mean(x, dim=lon)"}, "dim_out_of_range", "column 5: mean: there is no dim 'lon'"),
        ("eval", {"expr": "x", "wrt": "x"}, "bad_parameter", "wrt"),
        ("eval", {"expr": "x", "backend": "nope"}, "backend_cannot_serve", "back end 'nope' is not known"),
        ("grad", {}, "unknown_op", "grad needs op or expr: the op is one of sum, "),
        ("grad", {"op": "sum", "expr": "x"}, "bad_parameter", "sum has no parameter 'expr'"),
        ("grad", {"expr": "x > 0"}, "gradient_not_available", "the expression gives bool"),
        ("grad", {"expr": "count(x) / 2"}, "gradient_not_available", "no op with a gradient leads from x to the result"),
        ("grad", {"expr": "x", "wrt": "y"}, "bad_parameter", "y does not stand in the expression; its variables are x"),
        ("grad", {"expr": "x", "wrt": "x,x"}, "bad_parameter", "each once"),
        ("grad", {"expr": "1 + 2"}, "bad_parameter", "no variable of numbers"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_with_its_code_at_every_door(
    verb: str, words: dict[str, str], code: str, says: str, question: Path, service: Running, capsys: Any
) -> None:
    with pytest.raises(MaskserveError) as raised:
        ms.compute(verb, question, **words)
    assert says in raised.value.message
    assert raised.value.code == code
    reply = service.http.post(f"/v1/{verb}", params=words, content=question.read_bytes())
    assert check_problem(reply, 422, code)["detail"] == raised.value.message


def test_a_text_that_is_no_expression_is_refused_before_the_body_is_read(service: Running) -> None:
    reply = service.http.post("/v1/eval", params={"expr": "mena(x)"}, content=b"no payload")
    assert "did you mean mean?" in check_problem(reply, 422, "bad_expression")["detail"]
