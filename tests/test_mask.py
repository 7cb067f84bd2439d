"""The verb mask: which cells a test masks, masks that are joined, and where the valid cells lie. Oracle: numpy.ma."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import maskserve as ms
from maskserve import answers, dtypes, engine, requests, runs, variable_steps
from maskserve.dtypes import DType
from maskserve.errors import DataError, DtypeError, MaskserveError, ParameterError, ShapeError, UnknownTensorError
from maskserve.masking import rounded
from maskserve.ops import OPS, default, maskings, verbs
from maskserve.ops.parameters import Parameter, Type
from maskserve.payload.format import BytesPayload
from maskserve.plan import Plan
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    Maskserve,
    folder_fixture,
    maskserve_fixture,
    one_line,
)
from tests.http_service import JSON, Running, check_problem, payload, running
from tests.samples import assert_same_bits, cells, plan_of, poisoned

every_dtype = pytest.mark.parametrize("dtype", sorted(dtypes.NUMERIC, key=lambda d: d.name), ids=lambda d: d.name)
ORDERED = sorted(dtypes.NUMERIC - {dtypes.boolean}, key=lambda d: d.name)
every_ordered_dtype = pytest.mark.parametrize("dtype", ORDERED, ids=lambda d: d.name)
unhurried = settings(deadline=None)  # a busy machine is no failure


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


# -- the tests, by numpy.ma ---------------------------------------------------------------------------------------


ORACLES: dict[str, tuple[dict[str, Any], Any]] = {
    "equal": ({"equal": 1}, lambda a: np.ma.masked_equal(a, 1)),
    "several": ({"equal": (1, 2)}, lambda a: np.ma.masked_equal(np.ma.masked_equal(a, 1), 2)),
    "inside": ({"inside": (-1, 2)}, lambda a: np.ma.masked_inside(a, -1, 2)),
    "outside": ({"outside": (-1, 2)}, lambda a: np.ma.masked_outside(a, -1, 2)),
    "less": ({"less": 1}, lambda a: np.ma.masked_less(a, 1)),
    "greater": ({"greater": 1}, lambda a: np.ma.masked_greater(a, 1)),
}


def numpy_of(data: torch.Tensor, mask: torch.Tensor) -> Any:
    """numpy.ma of the same cells; bfloat16 and fp8, which numpy lacks, as float32, which holds them."""
    plain = data.float() if data.is_floating_point() and data.element_size() < 4 else data
    return np.ma.MaskedArray(plain.numpy(), mask=~mask.numpy())


@every_ordered_dtype
@pytest.mark.parametrize("name", ORACLES)
def test_a_test_masks_what_numpy_masks(name: str, dtype: DType) -> None:
    params, oracle = ORACLES[name]
    if dtype is dtypes.u8:
        params = {k: tuple(max(x, 0) for x in v) if isinstance(v, tuple) else v for k, v in params.items()}
        oracle = {
            "inside": lambda a: np.ma.masked_inside(a, 0, 2),
            "outside": lambda a: np.ma.masked_outside(a, 0, 2),
        }.get(name, oracle)
    sample = cells(dtype, (7, 130), 11)
    if dtype.is_float:
        sample.data[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        sample.data[1] = sample.data[1].double().round().to(sample.data.dtype)
    with np.errstate(all="ignore"):  # numpy's own fill value, 1e20, overflows half precision
        expected = ~np.ma.getmaskarray(oracle(numpy_of(sample.data, sample.mask)))
    got = ms.mask(sample.data, mask=sample.mask, **params)
    assert got.get_mask().numpy().tolist() == expected.tolist()
    assert got.dtype == sample.data.dtype
    assert_same_bits((got.get_data(),), (torch.where(got.get_mask(), sample.data, 0).to(sample.data.dtype),))


@pytest.mark.parametrize("dtype", sorted(dtypes.FLOATING, key=lambda d: d.name), ids=lambda d: d.name)
def test_what_is_no_number_is_masked_as_numpy_masks_it(dtype: DType) -> None:
    sample = cells(dtype, (40,), 3)
    sample.data[::5], sample.data[1::5] = math.nan, math.inf
    data = numpy_of(sample.data, sample.mask)
    invalid = ms.mask(sample.data, mask=sample.mask, is_invalid=True).get_mask().numpy()
    assert (invalid == ~np.ma.getmaskarray(np.ma.masked_invalid(data))).all()
    nan = ms.mask(sample.data, mask=sample.mask, is_nan=True).get_mask()
    inf = ms.mask(sample.data, mask=sample.mask, is_inf=True).get_mask()
    assert (nan & inf).tolist() == invalid.tolist()
    assert nan.tolist() == (sample.mask & ~sample.data.isnan()).tolist()


@every_dtype
def test_what_lies_under_the_mask_changes_no_bit(dtype: DType) -> None:
    sample = cells(dtype, (5, 130), 1)
    tests: dict[str, Any] = {"equal": (0, 1), "is_invalid": True}
    if dtype is not dtypes.boolean:
        tests |= {"inside": (1, 2), "valid_range": (-3, 3), "less": -2, "greater": 2}
    results = [ms.mask(data, mask=sample.mask, **tests) for data in poisoned(sample)]
    for result in results[1:]:
        assert_same_bits((result.get_data(), result.get_mask()), (results[0].get_data(), results[0].get_mask()))


@every_dtype
def test_without_a_test_the_mask_stays_and_hidden_cells_are_0(dtype: DType) -> None:
    sample = cells(dtype, (33,), 5)
    same = ms.MaskedTensor(sample.data, sample.mask).mask()
    assert same.get_mask().tolist() == sample.mask.tolist()
    assert not same.get_data()[~sample.mask].any()
    assert ms.mask(sample.data).get_mask().all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1)])
def test_any_shape_and_any_strides_are_taken(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    assert ms.mask(x, equal=1).get_mask().tolist() == torch.zeros(shape, dtype=torch.bool).tolist()
    odd = torch.arange(24.0).reshape(4, 6).t()[::2]
    assert ms.mask(odd, greater=3).tolist() == ms.mask(odd.contiguous(), greater=3).tolist()
    wide = torch.tensor([[1.0], [2.0]]).expand(2, 3)
    assert ms.mask(wide, equal=2, mask=torch.tensor([[True, False, True]])).tolist() == [[1, None, 1], [None] * 3]


def test_nan_equals_nothing_and_lies_in_no_range() -> None:
    x = torch.tensor([math.nan, 1.0, 9.0])
    assert ms.mask(x, equal=(1, 9)).tolist()[1:] == [None, None]
    kept = {name: not ms.mask(x, **{name: (0, 5)}).get_mask()[0] for name in ("inside", "outside", "valid_range")}
    assert kept == {"inside": False, "outside": False, "valid_range": True}, "a valid range has no NaN in it"
    assert ms.mask(x, less=5).get_mask()[0]
    assert ms.mask(x, greater=5).get_mask()[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_number_is_compared_in_the_dtype_of_the_data(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)
    assert ms.mask(x, equal=0.1).get_mask().tolist() == [False, True, True]
    assert ms.mask(x, inside=(0.2, 0.3)).get_mask().tolist() == [True, False, False]
    assert ms.mask(x, less=0.2, greater=0.2).get_mask().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@unhurried
@given(number=st.floats(allow_nan=False, width=64))
def test_a_number_is_rounded_once_to_the_nearest(dtype: torch.dtype, number: float) -> None:
    got, info = rounded(number, dtype), torch.finfo(dtype)
    assert math.isinf(got) or float(torch.tensor(got, dtype=dtype)) == got
    if math.isfinite(number) and math.isfinite(got):
        code = torch.tensor(got, dtype=dtype).view({2: torch.int16, 4: torch.int32}[info.bits // 8])
        near = [(code + step).view(dtype).item() for step in (-1, 1)]
        apart = abs(Fraction(number) - Fraction(got))
        assert all(apart <= abs(Fraction(number) - Fraction(n)) for n in near if math.isfinite(n))
    elif math.isfinite(number):
        assert abs(number) > info.max


def test_the_largest_float64_is_beyond_every_narrower_float() -> None:
    assert rounded(1.7976931348623157e308, torch.float16) == rounded(1.7976931348623157e308, torch.float32) == math.inf
    assert rounded(-1.7976931348623157e308, torch.bfloat16) == -math.inf


def test_numbers_beyond_the_dtype_are_beyond_every_cell_but_infinity() -> None:
    x = torch.tensor([-math.inf, -65504.0, 65504.0, math.inf], dtype=torch.float16)
    assert ms.mask(x, greater=1e30).tolist() == [-math.inf, -65504.0, 65504.0, None]
    assert ms.mask(x, less=1e30).tolist() == [None, None, None, math.inf]
    assert ms.mask(x, inside=(-1e30, 1e30)).tolist() == [-math.inf, None, None, math.inf]
    assert ms.mask(x, outside=(-math.inf, 1e30)).tolist() == [-math.inf, -65504.0, 65504.0, None]
    assert ms.mask(x, equal=(1e30, -math.inf)).tolist() == [None, -65504.0, 65504.0, math.inf]
    small = torch.tensor([-128, 0, 127], dtype=torch.int8)
    assert ms.mask(small, inside=(-1000, 1000)).get_mask().any().item() is False
    assert ms.mask(small, less=1000.5).get_mask().any().item() is False
    assert ms.mask(small, greater=-math.inf).get_mask().any().item() is False
    assert ms.mask(small, equal=(300, 0.5, -128)).tolist() == [None, 0, 127]
    assert ms.mask(small, greater=-0.5).tolist() == [-128, None, None]


def test_integers_beyond_2_to_53_are_compared_exactly() -> None:
    x = torch.tensor([2**53, 2**53 + 1, 2**62 + 1])
    assert ms.mask(x, equal=2**53 + 1).get_mask().tolist() == [True, False, True]
    assert ms.mask(x, greater=2**62).get_mask().tolist() == [True, True, False]
    file = payload(data=x.numpy())
    assert ms.compute("mask", file, equal=str(2**53 + 1)).results[0].n_masked_before == 0
    assert ms.load(ms.compute("mask", file, equal=str(2**53 + 1)).to_bytes())["data"].tolist()[1] is None


def test_bool_cells_are_equal_to_0_or_1_and_in_no_range() -> None:
    x = torch.tensor([True, False])
    assert ms.mask(x, equal=1).tolist() == [None, False]
    for test in ({"less": 1}, {"inside": (0, 1)}, {"valid_range": (0, 1)}):
        with pytest.raises(DtypeError, match="these cells are bool"):
            ms.mask(x, **test)


@pytest.mark.parametrize(
    "params",
    [{"inside": 5}, {"inside": (9, 1)}, {"inside": (1, 2, 3)}, {"inside": (1, math.nan)}, {"less": "a"}, {"less": True},
     {"equal": math.nan}, {"equal": ()}, {"equal": 10**400}, {"is_nan": 1}, {"greater": (1, 2)}],
)  # fmt: skip
def test_a_wrong_parameter_is_an_error_that_says_what_fits(params: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="it must be"):
        ms.mask(torch.ones(3), **params)


def test_python_takes_a_mask_as_valid_and_has_no_words_for_the_rest() -> None:
    x = ms.masked_tensor([[1.0, None], [3.0, 4.0]])
    assert x.mask(valid=torch.tensor([[True, True], [False, True]])).tolist() == [[1.0, None], [None, 4.0]]
    assert x.mask(valid=torch.tensor([[True, False]])).tolist() == [[1.0, None], [3.0, None]]
    assert x.mask(valid=x > 2).tolist() == [[None, None], [3.0, 4.0]], "a masked condition masks"
    with pytest.raises(MaskserveError, match="valid is int64; a mask is bool"):
        x.mask(valid=torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError):
        ms.mask(x, **{"not": True})


# -- requests ---------------------------------------------------------------------------------------------------------


X = np.array([[1, 2, 3], [4, 5, 6]], "f4")
VALID = np.array([[True, False, True], [True, False, True]])
OTHER = np.array([[True, True, False], [False, True, True]])


def computed(words: dict[str, Any], **tensors: Any) -> Any:
    return ms.load(ms.compute("mask", payload(x=X, x__mask=VALID, **tensors), **words).to_bytes())["x"].tolist()


def test_the_order_is_tests_and_or_not() -> None:
    words = {"equal": 3, "and": "a", "or": "o"}
    a, o = np.array([[True], [False]]), np.array([[False, True, False]])
    assert computed(words, a=a, o=o) == [[1, 2, None], [None, 5, None]], "or comes after and; its cells show their data"
    assert computed({**words, "not": True}, a=a, o=o) == [[None, None, 3], [4, None, 6]], "not comes last"
    assert computed({**words, "equal": 2}, a=a, o=o)[0] == [1, 2, 3], "or comes after the tests"


def test_a_bool_tensor_is_a_mask_and_any_other_stands_for_its_mask() -> None:
    assert computed({"and": "a"}, a=OTHER) == [[1, None, None], [None, None, 6]]
    assert computed({"and": "a"}, a=OTHER, a__mask=np.array([[False, True, True]])) == [[None] * 3, [None, None, 6]]
    assert computed({"and": "a"}, a=X, a__mask=OTHER) == [[1, None, None], [None, None, 6]]
    assert computed({"and": "a"}, a=X, a__mask=np.ones((1, 1), bool)) == [[1, None, 3], [4, None, 6]]
    for word in ("and", "or"):  # a land mask of 0 and 1 would mask nothing, without a word
        with pytest.raises(DataError, match="has none, and is not bool"):
            computed({word: "a"}, a=X)
    assert computed({"or": "a", "mask_means": "missing"}, a=OTHER) == [[None, 2, 3], [4, 5, None]]


def test_a_companion_may_be_named_and_stays_its_tensors_mask() -> None:
    file = payload(x=X, x__mask=VALID, y=X, y__mask=OTHER)
    answer = ms.load(ms.compute("mask", file, **{"and": "y.mask"}).to_bytes())
    assert answer["x"].tolist() == [[1, None, None], [None, None, 6]]
    assert answer["y"].tolist() == [[1, 2, None], [None, 5, 6]]
    alone = payload(x=X, y=X, mask=OTHER)  # beside two variables, and named
    assert ms.load(ms.compute("mask", alone, **{"and": "mask"}).to_bytes())["y"].tolist()[0] == [1, 2, None]
    orphan = payload(x=X, q__mask=OTHER)
    assert ms.load(ms.compute("mask", orphan, **{"and": "q.mask"}).to_bytes())["x"].tolist()[0] == [1, 2, None]


def test_side_inputs_are_laid_over_by_the_names_of_dims() -> None:
    names = {"x": ["time", "lat"], "w": ["lat", "time"], "s": ["time"], "lat": ["lat"], "z": ["lon"]}
    file = payload(
        {"maskserve.dims": json.dumps(names)},
        x=X, w=OTHER.T, s=np.array([True, False]), lat=np.array([1.0, 2, 3]),
        lat__mask=np.ones(3, bool), z=np.ones(3, bool), u=OTHER[:1],
    )  # fmt: skip

    def said(**words: Any) -> Any:
        answer = ms.compute("mask", file, tensor="x", **words)
        assert not {r.name for r in answer.results} & set(words.values()) - {"lat"}, "a side input is not copied"
        return ms.load(answer.to_bytes())["x"].tolist()

    assert said(**{"and": "w"}) == [[1, 2, None], [None, 5, 6]]
    assert said(**{"and": "s"}) == [[1, 2, 3], [None] * 3]
    assert said(**{"and": "u"}) == [[1, 2, None], [4, 5, None]], "without names it is broadcast from the last dim"
    answer = ms.compute("mask", file, tensor="x", **{"and": "lat"})
    assert [r.name for r in answer.results] == ["x", "lat"], "a coordinate that is used is kept"
    with pytest.raises(ShapeError, match="z has the dim lon, and x has time, lat"):
        said(**{"and": "z"})
    with pytest.raises(ShapeError, match="sizes must be equal or 1"):
        ms.compute("mask", payload(x=X, a=OTHER.T.copy()), **{"and": "a"})


def test_another_payload_gives_the_variable_of_the_same_name_or_its_only_one() -> None:
    question = payload(x=X, y=X[0])

    def said(side: bytes, tensor: str = "x") -> Any:
        answer = ms.compute("mask", question, tensor=tensor, sides={"m": side}, **{"and": "m"})
        assert "m" not in {r.name for r in answer.results}
        return ms.load(answer.to_bytes())[tensor].tolist()

    expected = [[1, 2, None], [None, 5, 6]]
    assert said(payload(mask=OTHER)) == expected
    assert said(payload(land=OTHER)) == expected
    assert said(payload(data=X, mask=OTHER)) == expected
    assert said(payload(x=X, x__mask=OTHER, y=X[0])) == expected
    with pytest.raises(UnknownTensorError, match="has no variable x, and 2 others"):
        said(payload(a=X, b=X))
    line = ms.compute("mask", question, tensor="x", sides={"/secret/m": payload(mask=OTHER)}, **{"and": "/secret/m"})
    assert "secret" not in str(line.metadata), "history tells no path"


def test_a_side_input_reaches_the_engine_laid_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever row names a tensor: its dtype goes into the plan, its cells and its mask to the engine."""
    row = dataclasses.replace(OPS["mean"], parameters=(*OPS["sum"].parameters, SIDE))
    request = requests.Request(verb="reduce", row=row, params={"side": "w", "dim": ("lat",)}, common={}, running={})
    seen: dict[str, Any] = {}

    def plan(row: Any, given: Any, shape: Any, dtype: Any, device: str) -> Plan:
        seen["dtype"] = dict(given)["side"]
        return plan_of(OPS["mean"], torch.zeros(shape), dim=1)

    def run(plan: Plan, data: Any, mask: Any, side: Any) -> Any:
        seen["side"] = side
        return engine.run(plan, data, mask)

    monkeypatch.setattr(variable_steps, "plan", plan)
    monkeypatch.setattr(variable_steps, "engine", SimpleNamespace(run_held=run, expanded=engine.expanded))
    dims = {"maskserve.dims": json.dumps({"x": ["time", "lat"], "w": ["lat"]})}
    file = payload(dims, x=X, w=np.array([1, 2, 3], "f8"), w__mask=np.array([True, False, True]))
    answer = answers.run(request, BytesPayload(file))
    assert [r.name for r in answer.results] == ["x"]
    assert seen["dtype"] is dtypes.f64
    weights, mask = seen["side"]
    assert (weights.tolist(), mask.tolist()) == ([[1.0, 2.0, 3.0]], [[True, False, True]])


SIDE = Parameter(name="side", type=Type.TENSOR, help="a side input", keyword_only=True)


def test_an_answer_has_the_form_of_its_question() -> None:
    answer = ms.load(ms.compute("mask", payload({"note": "kept"}, data=X, mask=VALID), equal=1).to_bytes())
    assert answer.metadata["note"] == "kept"
    file = payload(x=X, x__lengths=np.array([2, 1]), n=np.arange(3, dtype="i2"))
    names = {out.name for out in ms.compute("mask", file, equal=[1]).outputs()}
    assert names == {"x", "x.mask", "n", "n.mask"}
    assert json.loads(ms.compute("mask", file, equal=[1.0]).metadata["maskserve.history"])["equal"] == [1]


def test_a_verb_named_like_a_row_needs_no_op(maskserve: Maskserve, service: Running) -> None:
    assert [verb for verb in verbs() if default(verb)] == [verb for verb in verbs() if verb in OPS] + ["grad"]
    file = Path("plain.safetensors").read_bytes()
    python = ms.compute("mask", file, equal=0).to_bytes()
    assert python == ms.compute("mask", file, op="mask", equal="0").to_bytes()
    assert maskserve("mask", "--equal", "0", "plain.safetensors", "-o", "-").out == python
    assert service.post("/v1/mask?equal=0", file).content == python


@pytest.mark.parametrize(
    "words",
    [{"equal": "3,4"}, {"inside": "-1,2.5"}, {"valid_range": "-inf,4"}, {"less": "2", "greater": "1e9"},
     {"is_nan": "true", "and": "ok"}, {"or": "ok"}, {"outside": "0,5", "not": "true"}],
)  # fmt: skip
def test_python_command_line_and_http_give_the_same_bytes(
    maskserve: Maskserve, service: Running, words: dict[str, str]
) -> None:
    file = payload(x=X, x__mask=VALID, y=np.array([np.nan, 5, 6], "f8"), ok=np.array([True, True, False]))
    Path("in.safetensors").write_bytes(file)
    flags = [
        part
        for name, value in words.items()
        for part in [f"--{name.replace('_', '-')}", *([] if value == "true" else [value])]
    ]
    words = {"tensor": "y"} | words
    python = ms.compute("mask", file, **words).to_bytes()
    shell = maskserve("mask", "--tensor", "y", *flags, "in.safetensors", "-o", "-")
    assert (shell.code, shell.out) == (0, python), shell.err
    http = service.post(f"/v1/mask?{urlencode(words)}", file)
    assert (http.status_code, http.content) == (200, python)


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ("--inside 5", 2, "mask: inside: give two numbers, the lower first: 0,100"),
        ("--inside 9,1", 2, "mask: inside: the lower of the two comes first: 1,9"),
        ("--inside 1,nan", 2, "mask: inside: give a number, not 'nan'"),
        ("--equal abc", 2, "mask: equal: give a number, not 'abc'"),
        ("--equal 1e999", 2, "mask: equal: give a number, not '1e999'"),
        ("--equal 1,", 2, "mask: equal: give a number, not ''"),
        ("--less 1,2", 2, "mask: less: give a number, not '1,2'"),
        ("--and nosuch", 2, "rain.safetensors: there is no tensor nosuch; the payload has lat, rain, "),
        ("--and several.safetensors", 2, "rain.safetensors: and: several.safetensors has no variable rain, and 2 others"),
        ("--and orphan.safetensors", 65, "rain.safetensors: and: orphan.safetensors: b.mask belongs to a "),
        ("--and plain.safetensors", 65, "rain.safetensors: and: data has shape (4,), rain (2, 3); sizes must be equal"),
        ("--edges --clumps valid", 2, "--clumps and --edges: give one of them"),
        ("--clumps some", 2, "--clumps 'some': give one of valid, masked"),
        ("--dim 0", 2, "--dim goes with a report: give --clumps or --edges too"),
        ("--edges --dim tiem", 2, "rain.safetensors: no variable has the dim 'tiem'; the payload's dims are time, lat"),
        ("--edges --dim 7", 2, "rain.safetensors: rain: dim 7 is out of range for a tensor with 2 dims; give -2 to 1"),
        ("--edges -o out.json", 2, "rain.safetensors: --edges lists, it writes no payload"),
        ("--backend cpu", 2, "rain.safetensors: back end 'cpu' cannot serve mask: give reference"),
        ("--backend nope", 2, "rain.safetensors: back end 'nope' cannot serve mask: give reference"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(maskserve: Maskserve, argv: str, code: int, line: str) -> None:
    ran = maskserve("mask", *argv.split(), "rain.safetensors")
    assert (ran.code, ran.out) == (code, b"")
    assert one_line(ran).startswith(f"maskserve: {line}")
    bools = maskserve("mask", "--valid-range", "0,1", "several.safetensors")
    assert bools.code == 2
    assert one_line(bools).startswith(
        "maskserve: several.safetensors: b: mask: valid_range compares numbers, and these"
    )


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [("inside=5", 422, "bad_parameter"), ("inside=9,1", 422, "bad_parameter"), ("equal=abc", 422, "bad_parameter"),
     ("and=nosuch", 422, "unknown_tensor"), ("and=%2Fetc%2Fpasswd", 422, "unknown_tensor"),
     ("and=bad", 422, "shape_mismatch"), ("tensor=ok&valid_range=0,1", 422, "dtype_not_accepted"),
     ("equal=" + "9" * 5000, 422, "bad_parameter"), ("less=1&less=2", 422, "bad_parameter"),
     ("equal=" + "1," * 256 + "1", 422, "bad_parameter"), ("clumps=valid", 422, "bad_parameter"),
     ("valid=x", 422, "bad_parameter")],
)  # fmt: skip
def test_a_wrong_request_is_a_problem(service: Running, query: str, status: int, code: str) -> None:
    body = payload(x=X, ok=np.array([True, False, True]), bad=np.ones(4, bool))
    check_problem(service.post(f"/v1/mask?{query}", body), status, code)


def test_http_takes_and_gives_json(service: Running) -> None:
    plain = service.post("/v1/mask?inside=2,3&equal=9&equal=1", b'{"data": [1, 2.5, null, 4]}', content_type=JSON)
    assert plain.json() == {"data": [None, None, None, 4.0]}


def test_the_summary_says_how_many_are_masked_now_and_before(maskserve: Maskserve) -> None:
    ran = maskserve("mask", "--equal", "3", "rain.safetensors", "-o", "out.safetensors")
    assert one_line(ran).startswith(
        "maskserve: wrote out.safetensors: rain f32 (time 2, lat 3), 3 of 6 masked (2 before), "
    )
    assert load_file("out.safetensors")["rain.mask"].tolist() == [[True, False, False], [True, False, True]]
    table = maskserve("mask", "--equal", "3", "rain.safetensors", "--format", "table")
    assert table.lines[0].endswith("3 of 6 masked (2 before) (true = valid)")


def test_another_file_is_a_mask_on_the_command_line(maskserve: Maskserve) -> None:
    save_file({"land": OTHER}, "land.safetensors")
    assert maskserve("mask", "--and", "land.safetensors", "rain.safetensors").text == "1.0\t--\t--\n--\t--\t6.0\n"
    Path("land.json").write_text('{"land": [[true, true, true]]}')
    assert maskserve("mask", "--or", "land.json", "question.json").text == "1.0\t2.0\t0.0\n4.0\t5.5\t6.0\n"
    Path("lat").write_bytes(Path("land.safetensors").read_bytes())
    first = maskserve("mask", "--and", "lat", "rain.safetensors")
    assert (first.code, "has none, and is not bool" in first.err) == (65, True), "a tensor of the payload comes first"


def test_a_dry_run_counts_the_side_inputs(maskserve: Maskserve) -> None:
    save_file({"land": OTHER}, "land.safetensors")
    ran = maskserve("mask", "--and", "land.safetensors", "--is-nan", "--explain", "rain.safetensors", "--dry-run")
    assert ran.lines[0] == "mask --and land.safetensors --is-nan"
    assert ran.lines[3].startswith("would read 36 bytes")
    assert one_line(ran) == "maskserve: rain: a new mask of f32 on cpu by torch"


# -- types of parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "expected"),
    [("0", 0), ("-1.50", -1.5), (" 2.0 ", 2), ("1e3", 1000), ("inf", math.inf), ("-Inf", -math.inf), (2.0, 2), (2**60, 2**60)],
)  # fmt: skip
def test_reals_are_read_from_words_and_numbers(given_: Any, expected: float) -> None:
    got = requests.parse_real(given_)
    assert (got, type(got)) == (expected, type(expected))


@pytest.mark.parametrize(
    "given_", ["", "nan", "NaN", "1_000", "0x10", "1e999", "infinity", "\u0663", True, None, [1], "1,2", math.nan]
)
def test_what_is_no_real_is_refused(given_: Any) -> None:
    with pytest.raises(ValueError, match="give a number"):
        requests.parse_real(given_)


@unhurried
@given(st.lists(st.floats(allow_nan=False) | st.integers(-(2**80), 2**80), min_size=1, max_size=4))
def test_numbers_as_text_and_as_data_are_the_same(numbers: list[float]) -> None:
    text = ",".join(map(repr, numbers))
    expected = requests.parse_numbers(numbers)
    assert requests.parse_numbers([repr(n) for n in numbers]) == requests.parse_numbers(text)
    assert requests.parse_numbers(text) == (expected if len(numbers) > 1 else expected[0])  # type: ignore[index]


# -- runs and edges -----------------------------------------------------------------------------------------------


masks_1d = st.lists(st.booleans(), min_size=1, max_size=60)


@unhurried
@given(masks_1d)
def test_clumps_and_edges_of_one_dim_are_numpys(valid: list[bool]) -> None:
    mask = torch.tensor(valid, dtype=torch.bool)
    x = ms.MaskedTensor(torch.zeros(len(valid)), mask)
    a = np.ma.MaskedArray(np.zeros(len(valid)), mask=~mask.numpy())
    assert ms.clumps(x).slices() == (np.ma.clump_unmasked(a) or [])
    assert ms.clumps(x, "masked").slices() == (np.ma.clump_masked(a) or [])
    edges = ms.edges(x)
    if any(valid):
        assert [edges.first.item(), edges.last.item()] == list(np.ma.notmasked_edges(a))
        assert ms.clumps(x).slices() == np.ma.flatnotmasked_contiguous(a)
    else:
        assert edges.first.tolist() is edges.last.tolist() is None


@unhurried
@given(st.integers(0, 2**32 - 1), st.sampled_from([(3, 4), (2, 3, 5), (1, 1), (4, 0), (0, 4), ()]))
def test_clumps_and_edges_along_a_dim_are_those_of_each_slice(seed: int, shape: tuple[int, ...]) -> None:
    sample = cells(dtypes.f32, shape, seed, share=0.5)
    x = ms.MaskedTensor(sample.data, sample.mask)
    for dim in range(-len(shape), len(shape)):
        rest = tuple(n for i, n in enumerate(shape) if i != dim % len(shape))
        edges, found = ms.edges(x, dim), []
        for at in np.ndindex(*rest):
            line = sample.mask.movedim(dim, -1)[at]
            one = ms.MaskedTensor(torch.zeros(len(line)), line)
            found += [[*at, s.start, s.stop, s.stop - s.start] for s in ms.clumps(one).slices()]
            assert edges.first[at].tolist() == ms.edges(one).first.tolist(), (dim, at)
            assert edges.last[at].tolist() == ms.edges(one).last.tolist(), (dim, at)
        clumps = ms.clumps(x, dim=dim)
        assert clumps.rows(len(found) + 1) == found
        assert (len(clumps), tuple(edges.first.shape)) == (len(found), rest)
        assert len(edges.rows(10**6)) == len(edges)


def test_a_tensor_of_no_cells_has_no_runs() -> None:
    assert ms.clumps(torch.ones(0)).slices() == []
    assert ms.edges(torch.ones(0)).first.tolist() is None


def test_wrong_words_for_runs_say_so() -> None:
    with pytest.raises(ParameterError, match="one of valid, masked"):
        ms.clumps(torch.ones(2), "some")
    for dim in (1, -2, True, "a"):
        with pytest.raises(MaskserveError, match="out of range"):
            ms.edges(torch.ones(2), dim)  # type: ignore[arg-type]


def test_reports_list_runs_per_slice(maskserve: Maskserve) -> None:
    ran = maskserve("mask", "--clumps", "valid", "--dim", "lat", "rain.safetensors")
    assert ran.lines == [
        "# rain f32 (time 2, lat 3): 4 valid clumps along lat", "time\tstart\tstop\tlength",
        "0\t0\t1\t1", "0\t2\t3\t1", "1\t0\t1\t1", "1\t2\t3\t1",
    ]  # fmt: skip
    table = maskserve("mask", "--equal", "3", "--edges", "--dim", "time", "rain.safetensors", "--format", "table")
    assert table.lines[1:] == ["  lat  first  last", "    0      0     1", "    1     --    --", "    2      1     1"]
    assert json.loads(maskserve("mask", "--edges", "question.json", "--json").out) == [
        {"name": "data", "along": None, "columns": ["first", "last"], "rows": [[0, 5]], "more": 0}
    ]
    assert maskserve("mask", "--edges", "--dim", "0", "several.safetensors").lines[1:3] == ["first\tlast", "0\t2"]


def test_a_report_is_cut_and_says_how_much_is_left_out(maskserve: Maskserve) -> None:
    alternating = np.arange(100_000) % 2 == 0
    save_file({"x": np.zeros(100_000, "f4"), "x.mask": alternating}, "alternating.safetensors")
    lines = maskserve("mask", "--clumps", "masked", "alternating.safetensors").lines
    assert (len(lines), lines[-1]) == (1003, "… 49000 more")
    (record,) = json.loads(maskserve("mask", "--clumps", "masked", "alternating.safetensors", "--json").out)
    assert (len(record["rows"]), record["more"]) == (1000, 49000)
    assert next(r.choices for r in maskings.ROWS[0].reports if r.choices) == runs.OF
