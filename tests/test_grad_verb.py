"""The verb grad: what its answers hold, the cases that must hold, what --explain counts, and every form of question."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save_file
from torch import Tensor

import maskserve as ms
from maskserve.ops import OPS, served
from maskserve.ops.rows import GRAD, Formula, Masking
from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    Maskserve,
    folder_fixture,
    maskserve_fixture,
    one_line,
)
from tests.http_service import JSON, Running, running

T, F = True, False
NAN = math.nan
Cells = list[Any]


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as found:
        yield found


def question(*, metadata: dict[str, str] | None = None, **tensors: Any) -> bytes:
    """A payload; None is a masked cell with NaN under it, and every tensor that has one gets a mask."""
    parts = []
    for name, cells in tensors.items():
        array = np.array(cells, dtype=float)
        parts.append(output(name, torch.tensor(array)))
        if np.isnan(array).any():
            parts.append(output(f"{name}.mask", torch.tensor(~np.isnan(array))))
    return to_bytes(parts, metadata or {})


def through_each_door(
    asked: bytes, words: dict[str, Any], maskserve: Maskserve, service: Running
) -> ms.inout.Variables:
    """The answer, once all three doors gave the same bytes."""
    Path("asked.safetensors").write_bytes(asked)
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    python = ms.compute("grad", asked, **words).to_bytes()
    assert maskserve("grad", *options, "asked.safetensors", "-o", "-").out == python
    assert service.http.post("/v1/grad", params=words, content=asked).content == python
    return ms.load(python)


# -- cases that must hold -----------------------------------------------------------------------------------------

A3 = [[0.0, None, 2, 3], [None] * 4, [None, 9, 10, None]]
O6 = [[0.7036, None, None], [-0.1679, None, -0.4656], [None] * 3]
NUMBERS = [[1.0, 2, None], [3, None, 5], [None, None, None]]
CASES: dict[str, tuple[dict[str, Any], dict[str, Cells], Cells, Cells]] = {
    "sum of A3": ({"op": "sum", "dim": 1}, {"x": A3}, [5, None, 19], [[1, None, 1, 1], [None] * 4, [None, 1, 1, None]]),
    "mean of A3": (
        {"op": "mean", "dim": 1}, {"x": A3, "grad_output": [3, 7, 4]}, [5 / 3, None, 9.5],
        [[1, None, 1, 1], [None] * 4, [None, 2, 2, None]],
    ),
    "softmax of O6": (
        {"op": "softmax", "dim": 0}, {"x": O6, "grad_output": [[1, 1, 1], [0, 0, 1], [0, 0, 0]]},
        [[0.7051, None, None], [0.2949, None, 1], [None] * 3], [[0.2079, None, None], [-0.2079, None, 0], [None] * 3],
    ),
    "var beside a masked row and junk": (
        {"op": "var", "dim": 1}, {"x": NUMBERS}, [0.5, 2, None], [[-1, 1, None], [-2, None, 2], [None] * 3],
    ),
    "std beside a masked row and junk": (
        {"op": "std", "dim": 1}, {"x": NUMBERS}, [0.5**0.5, 2**0.5, None],
        [[-(0.5**0.5), 0.5**0.5, None], [-(0.5**0.5), None, 0.5**0.5], [None] * 3],
    ),
    "ties of amax share": (
        {"op": "amax", "dim": 1}, {"x": [[7.0, 3, 7], [None, 1, 1]]}, [7, 1], [[0.5, 0, 0.5], [None, 0.5, 0.5]],
    ),
    "a masked gradient from above reaches nothing": (
        {"op": "sum", "dim": 1}, {"x": NUMBERS, "grad_output": [None, 2, 5]}, [3, 8, None],
        [[None] * 3, [2, None, 2], [None] * 3],
    ),
    "a running sum reaches what comes before": (
        {"op": "cumsum", "dim": 0}, {"x": [1.0, None, 2, 3], "grad_output": [1, 1, 1, None]}, [1, None, 3, 6],
        [2, None, 1, None],
    ),
    "a fill reaches the cell that it took": (
        {"op": "ffill", "dim": 0}, {"x": [None, 1.0, None, 2]}, [None, 1, 1, 2], [None, 2, None, 1],
    ),
    "a slice that gives a number gives no gradient": (
        {"op": "mean", "dim": 1, "empty": 9}, {"x": NUMBERS}, [1.5, 4, 9], [[0.5, 0.5, None], [0.5, None, 0.5], [None] * 3],
    ),
    "quantiles come along a first dim": (
        {"op": "quantile", "q": "0,1"}, {"x": [3.0, None, 5], "grad_output": [10, 1]}, [3, 5], [10, None, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_case_through_each_door(name: str, maskserve: Maskserve, service: Running) -> None:
    words, tensors, value, gradient = CASES[name]
    answer = through_each_door(question(**tensors), words, maskserve, service)
    assert sorted(answer) == ["value", "x.grad"]
    assert_cells(answer["value"], value)
    assert_cells(answer["x.grad"], gradient)


def assert_cells(got: ms.MaskedTensor, expected: Cells) -> None:
    cells = np.array(expected, dtype=float)
    assert got.get_mask().tolist() == (~np.isnan(cells)).tolist()
    assert np.allclose(got.to_tensor(0).numpy(), np.nan_to_num(cells), atol=5e-5)
    assert not got.get_data()[~got.get_mask()].any(), "hidden cells are 0"


# -- what an answer holds -----------------------------------------------------------------------------------------


def test_value_and_gradient_alone_each_with_its_mask_and_its_dims(maskserve: Maskserve) -> None:
    assert maskserve("grad", "--op", "mean", "--dim", "lat", "rain.safetensors", "-o", "g.safetensors").code == 0
    tensors = load(Path("g.safetensors").read_bytes())
    assert set(tensors) == {"value", "value.mask", "rain.grad", "rain.grad.mask"}
    answer = ms.load("g.safetensors")
    assert answer.dims == {"value": ("time",), "rain.grad": ("time", "lat")}
    assert json.loads(answer.metadata["maskserve.history"]) == {
        "verb": "grad", "op": "mean", "dim": ["lat"], "maskserve": ms.__version__,
    }  # fmt: skip


def test_all_valid_cells_have_a_mask_too_and_data_is_no_exception() -> None:
    tensors = load(ms.compute("grad", question(data=[1, 2, 3]), op="sum").to_bytes())
    assert {name: t.tolist() for name, t in tensors.items()} == {
        "value": 6, "value.mask": True, "data.grad": [1, 1, 1], "data.grad.mask": [True] * 3,
    }  # fmt: skip


def test_an_answer_is_a_question_again(maskserve: Maskserve) -> None:
    maskserve("grad", "--op", "mean", "--dim", "time", "rain.safetensors", "-o", "g.safetensors")
    ran = maskserve("reduce", "--op", "sum", "--tensor", "rain.grad", "g.safetensors")
    assert ran.text == "2.0\n"


def test_tensor_picks_one_of_several_variables_and_coordinates_are_none(maskserve: Maskserve) -> None:
    save_file({"a": np.ones(3), "b": np.ones(2)}, "two.safetensors")
    ran = maskserve("grad", "--op", "sum", "two.safetensors")
    assert (ran.code, "a, b; tensor (--tensor) picks one" in one_line(ran)) == (2, True)
    assert maskserve("grad", "--op", "sum", "--tensor", "b", "two.safetensors").code == 0
    assert maskserve("grad", "--op", "sum", "--tensor", "a", "--tensor", "b", "two.safetensors").code == 2
    assert maskserve("grad", "--op", "sum", "rain.safetensors").code == 0


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64]
)
def test_a_gradient_has_its_input_s_dtype(dtype: torch.dtype) -> None:
    asked = to_bytes([output("x", torch.tensor([1.0, 2.0, 4.0]).to(dtype))], {})
    answer = ms.load(ms.compute("grad", asked, op="mean").to_bytes())
    assert answer["x.grad"].dtype is dtype
    assert answer["value"].dtype is (torch.float32 if dtype is torch.float8_e4m3fn else dtype)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint16, torch.int64, torch.float16, torch.float64, torch.float8_e5m2]
)
def test_a_gradient_from_above_may_be_of_any_real_dtype(dtype: torch.dtype) -> None:
    above = torch.tensor([1.0, 2.0]).to(dtype)
    asked = to_bytes([output("x", torch.ones(2, 2)), output("grad_output", above)], {})
    answer = ms.load(ms.compute("grad", asked, op="sum", dim=1).to_bytes())
    assert answer["x.grad"].tolist() == [[1, 1], [2, 2]]


def test_a_gradient_from_above_is_laid_by_the_names_of_its_dims() -> None:
    dims = {"maskserve.dims": json.dumps({"x": ["time", "lat"], "grad_output": ["lat", "time"]})}
    above = [[1.0, 2], [3, 4], [5, 6]]
    answer = ms.load(
        ms.compute("grad", question(metadata=dims, x=np.ones((2, 3)), grad_output=above), op="cumsum", dim=0).to_bytes()
    )
    assert answer["x.grad"].tolist() == [[3, 7, 11], [2, 4, 6]]
    other = {"maskserve.dims": json.dumps({"x": ["time", "lat"], "grad_output": ["lat", "lon"]})}
    with pytest.raises(
        ms.MaskserveError, match="grad_output has the dims lat, lon, the result of cumsum has time, lat"
    ):
        ms.compute("grad", question(metadata=other, x=np.ones((2, 3)), grad_output=above), op="cumsum", dim=0)


def test_a_dim_called_value_makes_no_coordinate_of_the_value() -> None:
    dims = {"maskserve.dims": json.dumps({"x": ["value", "lat"]})}
    answer = ms.load(ms.compute("grad", question(metadata=dims, x=np.ones((2, 3))), op="sum", dim=1).to_bytes())
    assert answer.dims == {"x.grad": ("value", "lat")}
    assert answer["value"].tolist() == [3, 3]


def test_no_cell_and_no_dim_have_a_gradient_too() -> None:
    answer = ms.load(ms.compute("grad", question(x=np.zeros((0, 3))), op="sum", dim=0).to_bytes())
    assert (answer["value"].tolist(), answer["x.grad"].shape) == ([None] * 3, (0, 3))
    assert ms.load(ms.compute("grad", question(x=4.0), op="sum").to_bytes())["x.grad"].tolist() == 1


def test_cells_left_out_have_no_gradient() -> None:
    asked = question(x=[1.0, 2, -9])
    answer = ms.compute("grad", asked, op="mean", fill_value=-9)
    assert ms.load(answer.to_bytes())["x.grad"].tolist() == [0.5, 0.5, None]
    asked = to_bytes([output("x", torch.tensor([1.0, NAN, 3]))], {})
    assert ms.load(ms.compute("grad", asked, op="mean", nan="omit").to_bytes())["x.grad"].tolist() == [0.5, None, 0.5]


def test_the_payload_is_only_read() -> None:
    asked = bytearray(question(x=[[1.0, None], [3, 4]], grad_output=[1, 2]))
    before = bytes(asked)
    ms.compute("grad", asked, op="var", dim=0)
    assert asked == before


@pytest.mark.parametrize("op", ["logsumexp", "softmax", "log_softmax", "standardize", "std", "logcumsumexp"])
def test_a_gradient_along_one_long_dim_has_the_same_bits_from_one_thread_and_two(op: str) -> None:
    x = torch.randn(100_001, generator=torch.Generator().manual_seed(3))
    above = {"grad_output": x.flip(0)} if OPS[op].verb != "reduce" else {}
    tensors = {"x": x, "x.mask": x > -1, **above}
    asked = to_bytes([output(name, t) for name, t in tensors.items()], {})
    n_threads = torch.get_num_threads()
    answers = []
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            answers.append(ms.compute("grad", asked, op=op, dim=0).to_bytes())
        finally:
            torch.set_num_threads(n_threads)
    assert answers[0] == answers[1]


# -- JSON, text and tables ----------------------------------------------------------------------------------------

PLAIN = '{"data": [[1.5, 2, null], [4, 5, 6]], "grad_output": [3, null]}'


def test_a_plain_question_gets_a_plain_answer(maskserve: Maskserve, service: Running) -> None:
    expected = {"data.grad": [[1.5, 1.5, None], [None, None, None]], "value": [1.75, 5.0]}
    Path("q.json").write_text(PLAIN)
    assert json.loads(maskserve("grad", "--op", "mean", "--dim", "1", "q.json", "--json").out) == expected
    assert service.post("/v1/grad?op=mean&dim=1", PLAIN, content_type=JSON).json() == expected


def test_an_explicit_question_gets_an_explicit_answer(service: Running) -> None:
    explicit = {"rain": {"dtype": "F32", "shape": [2, 2], "dims": ["time", "lat"], "values": [1, 2, 3, None]}}
    answer = service.post("/v1/grad?op=sum&dim=lat", json.dumps(explicit), content_type=JSON).json()
    assert answer["value"] == {"dtype": "F32", "shape": [2], "dims": ["time"], "values": [3.0, 3.0]}
    assert answer["rain.grad"] == {
        "dtype": "F32",
        "shape": [2, 2],
        "dims": ["time", "lat"],
        "values": [1.0, 1.0, 1.0, None],
    }


def test_whole_numbers_count_as_float64(service: Running) -> None:
    """JSON.stringify([1.0, 2.0]) is [1,2]: what a request can do must not hang on its cells."""
    answer = service.post("/v1/grad?op=mean", '{"data": [1, 2, null]}', content_type=JSON)
    assert answer.json() == {"data.grad": [0.5, 0.5, None], "value": 1.5}
    problem = service.post("/v1/grad?op=sum", '{"data": [true, null]}', content_type=JSON)
    assert problem.status_code == 422
    assert "data is bool, and a gradient is by numbers" in problem.json()["detail"]


def test_text_and_table_show_both_by_name(maskserve: Maskserve) -> None:
    Path("q.json").write_text(PLAIN)
    argv = ("grad", "--op", "mean", "--dim", "1", "q.json")
    assert maskserve(*argv).text == "# value (2)\n1.75\n5.0\n# data.grad (2, 3)\n1.5\t1.5\t--\n--\t--\t--\n"
    heads = [line for line in maskserve(*argv, "--format", "table").lines if "masked" in line]
    assert heads == [
        "value  f64 (2)  0 of 2 masked (true = valid)",
        "data.grad  f64 (2, 3)  4 of 6 masked (true = valid)",
    ]
    ran = maskserve(*argv, "-o", "g.safetensors")
    assert one_line(ran).startswith("maskserve: wrote g.safetensors: 2 variables, 4 of 8 masked, ")


def test_a_valid_nan_brings_the_hint(maskserve: Maskserve) -> None:
    ran = maskserve("grad", "--op", "norm", "nan.safetensors")
    assert one_line(ran).endswith("valid NaN; --nan omit treats them as missing")


# -- before and beside --------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_written(maskserve: Maskserve) -> None:
    ran = maskserve("grad", "--op", "mean", "--dim", "time", "rain.safetensors", "--dry-run")
    assert ran.lines[0] == "grad --op mean --dim time"
    assert "f32 (lat 3), f32 (time 2, lat 3)  45 bytes" in ran.lines[2]
    save_file({"data": np.arange(3) > 0}, "truths.safetensors")
    assert maskserve("grad", "--op", "mean", "truths.safetensors", "--dry-run").code == 2
    record = json.loads(maskserve("grad", "--op", "sum", "rain.safetensors", "--dry-run", "--json").out)
    assert record["request"] == {"verb": "grad", "op": "sum"}
    assert (record["variables"][0]["bytes_read"], record["variables"][0]["bytes_written"]) == (30, 35)


def test_explain_counts_the_cells_of_a_gradient(maskserve: Maskserve) -> None:
    asked = question(x=[[7.0, 3, None], [1, 2, None], [5, 6, 4]], grad_output=[1, None, 2])
    Path("q.safetensors").write_bytes(asked)
    ran = maskserve("grad", "--op", "amax", "--dim", "1", "q.safetensors", "--explain")
    first, second = ran.err.splitlines()
    assert first.startswith("maskserve: x: amax of f64 on cpu by ")
    assert first.endswith(", its gradient by cpu")
    assert second == (
        "maskserve: x.grad: 9 cells: 2 not 0, 3 are 0, 2 masked as in the input, 2 masked because no path reached them"
    )
    ran = maskserve("grad", "--op", "amax", "--dim", "1", "q.safetensors", "--explain", "--json")
    record = json.loads(ran.err)
    assert record["gradients"] == {"x.grad": {"nonzero": 2, "zero": 3, "masked": 2, "unreached": 2}}
    assert record["variables"][0]["op"] == "amax"
    ran = maskserve("grad", "--op", "amax", "--dim", "1", "q.safetensors", "--explain", "--json", "--dry-run")
    assert "gradients" not in json.loads(ran.err)


def test_explain_as_json_is_there_for_every_verb(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "sum", "rain.safetensors", "--explain", "--json", "--backend", "reference")
    assert json.loads(ran.err) == {
        "variables": [
            {"name": "rain", "passes_through": False, "op": "sum", "cells": "f32", "device": "cpu", "backend": "reference",
             "refused": {}}
        ]
    }  # fmt: skip


# -- one table ----------------------------------------------------------------------------------------------------


def test_the_verb_serves_exactly_the_rows_with_a_derivative_and_says_why_not_the_others(service: Running) -> None:
    told = {op["name"]: op for op in service.http.get("/v1/ops").json()["ops"] if op["verb"]}
    for row in OPS.values():
        if row.verb is None:
            continue
        has_one = bool(getattr(row, "vjp", "")) or isinstance(row, Formula)
        assert (row in served(GRAD)) == has_one == (GRAD in told[row.name]["verbs"])
        assert has_one or isinstance(row, Masking) or row.steps, f"{row.name} says not why it has none"


def test_ops_shows_who_has_a_gradient(maskserve: Maskserve) -> None:
    lines = {line.split()[0]: line for line in maskserve("ops").lines}
    assert "reduce, grad" in lines["mean"]
    assert "grad" not in lines["count"]
    assert "  maskserve grad --op mean FILE" in maskserve("ops", "mean").lines
    assert "  maskserve grad --op softmax FILE" in maskserve("ops", "softmax").lines


def test_parameters_are_those_of_the_op_one_for_one(service: Running) -> None:
    paths = service.http.get("/openapi.json").json()["paths"]
    asked = {p["name"]: p for p in paths["/v1/grad"]["post"]["parameters"]}
    for verb in ("reduce", "softmax", "scan", "fill"):
        names = {p["name"] for p in paths[f"/v1/{verb}"]["post"]["parameters"]}
        assert names - {"method"} <= set(asked), "method is that of rank, which has no gradient"
    assert not asked["dim"]["required"]
    assert "grad_output" in paths["/v1/grad"]["post"]["description"]


def test_several_dims_may_be_repeated(maskserve: Maskserve, service: Running) -> None:
    ran = maskserve("grad", "--op", "sum", "--dim", "0", "--dim", "1", "rain.safetensors", "-o", "-")
    reply = service.post("/v1/grad?op=sum&dim=0&dim=1", Path("rain.safetensors").read_bytes())
    assert ran.out == reply.content
    assert maskserve("grad", "--op", "cumsum", "--dim", "0", "--dim", "1", "rain.safetensors").code == 2


def gradient_of(function: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_without_a_mask_a_gradient_is_torch_s() -> None:
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for op, function in (("logsumexp", torch.logsumexp), ("var", torch.var), ("prod", torch.prod)):
        got = ms.load(ms.compute("grad", to_bytes([output("x", x)], {}), op=op, dim=1).to_bytes())["x.grad"]
        torch.testing.assert_close(got.to_tensor(), gradient_of(lambda leaf, f=function: f(leaf, 1).sum(), x))


def test_a_gradient_from_above_that_the_result_cannot_hold_is_refused(maskserve: Maskserve) -> None:
    save_file({"x": np.ones(2, np.float16), "grad_output": np.array(1e5, np.float32)}, "half.safetensors")
    ran = maskserve("grad", "--op", "mean", "half.safetensors")
    assert ran.code == 65
    assert "grad_output has finite cells that f16, the result's dtype, cannot hold; dtype=f64" in one_line(ran)
    assert maskserve("grad", "--op", "mean", "--dtype", "f64", "half.safetensors").code == 0
