"""Payloads as JSON: what each spelling means, what is refused, and that all that is written is read again."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maskserve.dtypes import ALL, BY_CODE, Kind
from maskserve.errors import NotComputableError, PayloadError, TooLargeError
from maskserve.payload import json as payload_json
from maskserve.payload.format import Limits, Output
from maskserve.payload.tensors import load, output
from maskserve.payload.variables import resolve
from tests.payload_cases import at_most

WRITABLE = [dtype for dtype in ALL if dtype.kind is not Kind.COMPLEX]
unhurried = settings(deadline=None)  # a busy machine is no failure


def read(text: str | bytes, name: str = "x") -> tuple[torch.Tensor, torch.Tensor | None]:
    sent = payload_json.decode(text)
    return load(sent, resolve(sent.header)[name])


def write(form: payload_json.Form = "explicit", metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> str:
    outputs = [output(name.replace("__", "."), tensor) for name, tensor in tensors.items()]
    return b"".join(payload_json.encode(outputs, metadata or {}, form)).decode()


def explicit(dtype: str, values: Any, **fields: Any) -> str:
    return json.dumps({"x": {"dtype": dtype, "values": values, **fields}})


# --- what is read


@pytest.mark.parametrize(
    ("text", "dtype", "values"),
    [
        ("[[1, 2], [3, 4]]", torch.int64, [[1, 2], [3, 4]]),
        ("[1, 2.5]", torch.float64, [1.0, 2.5]),
        ("[true, false]", torch.bool, [True, False]),
        ("[1.0]", torch.float64, [1.0]),
        ("5", torch.int64, 5),
        ("[]", torch.float64, []),
        ("[[], []]", torch.float64, [[], []]),
        ('["Infinity", "-Infinity"]', torch.float64, [math.inf, -math.inf]),
        ('["9007199254740993", 1]', torch.int64, [9007199254740993, 1]),
        ('["-9223372036854775808"]', torch.int64, [-(2**63)]),
        ("[9007199254740993]", torch.int64, [9007199254740993]),
        ("[100000000000000000000, 0.5]", torch.float64, [1e20, 0.5]),
        ("[-0.0, 1e-400]", torch.float64, [-0.0, 0.0]),
    ],
)
def test_the_plain_form_says_its_dtype_by_its_values(text: str, dtype: torch.dtype, values: Any) -> None:
    data, mask = read(f'{{"x": {text}}}')
    assert data.dtype is dtype
    assert data.tolist() == values
    assert mask is None


@pytest.mark.parametrize("text", ["[[1, 2, null]]", "[[1.5, null]]", "[true, null]", "[null]", "null", "[[null], [1]]"])
def test_null_is_masked_and_holds_0(text: str) -> None:
    data, mask = read(f'{{"x": {text}}}')
    expected = np.array(json.loads(text), dtype=object)
    assert mask is not None
    assert np.array_equal(mask.numpy(), expected != None)  # noqa: E711  # cell by cell
    assert data[~mask].count_nonzero() == 0


def test_the_form_of_the_question_is_remembered() -> None:
    assert payload_json.decode('{"x": [1]}').form == "plain"
    assert payload_json.decode(explicit("F32", [1])).form == "explicit"
    assert payload_json.decode('{"y": 1, ' + explicit("F32", [1])[1:]).form == "explicit"


@pytest.mark.parametrize("values", [[[1, 2, None], [4, 5, 6]], [1, 2, None, 4, 5, 6]])
@pytest.mark.parametrize("shape", [{"shape": [2, 3]}, {}])
def test_values_come_nested_or_flat(values: list[Any], shape: dict[str, Any]) -> None:
    data, mask = read(explicit("F32", values, **shape))
    assert data.flatten().tolist() == [1, 2, 0, 4, 5, 6]
    assert mask is not None
    assert mask.flatten().tolist() == [True, True, False, True, True, True]
    assert data.shape == ((2, 3) if shape else np.array(values, dtype=object).shape)


def test_dims_and_masks_and_metadata_come_along() -> None:
    sent = payload_json.decode('{"__metadata__": {"units": "mm"}, ' + explicit("F32", [[1]], dims=["t", "u"])[1:])
    assert resolve(sent.header)["x"].dims == ("t", "u")
    assert sent.header.metadata["units"] == "mm"
    _, mask = read('{"x": [1, 2], "mask": [true, false]}')
    assert mask is not None
    assert mask.tolist() == [True, False]


# --- what is refused

MALFORMED = {
    "ragged": '{"x": [[1, 2], [3]]}',
    "ragged depth": '{"x": [[1, 2], 3]}',
    "deeper later": '{"x": [1, [2]]}',
    "deeper in an empty one": '{"x": [[], [1]]}',
    "bool and number": '{"x": [true, 1]}',
    "bool and float": '{"x": [1.5, false]}',
    "text": '{"x": ["abc"]}',
    "small number as text": '{"x": ["5"]}',
    "float as text": '{"x": ["1.5"]}',
    "nan in another spelling": '{"x": ["nan"]}',
    "bare NaN": '{"x": [NaN]}',
    "bare Infinity": '{"x": [-Infinity]}',
    "object in a list": '{"x": [{}]}',
    "a name twice": '{"x": [1], "x": [2]}',
    "a field twice": '{"x": {"dtype": "F32", "dtype": "F32", "values": [1]}}',
    "beyond I64": '{"x": [9223372036854775808]}',
    "beyond F64": '{"x": [1e400]}',
    "5,000 digits": '{"x": [' + "9" * 5000 + "]}",
    "400 digits": '{"x": [0.5, ' + "9" * 400 + "]}",
    "25 digits as text": '{"x": ["' + "9" * 25 + '"]}',
    "other digits": '{"x": ["' + "\u0669" * 18 + '"]}',
    "list": "[1, 2]",
    "nothing": "",
    "not JSON": "{x: 1}",
    "more after it": '{"x": [1]} {}',
    "byte order mark": "\ufeff{}",
    "100,000 levels": '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "100,000 objects": '{"x":' * 100_000 + "1" + "}" * 100_000,
    "lone surrogate": '{"\\ud800": [1]}',
    "null and a mask": '{"x": [1, null], "mask": [true, true]}',
    "null and its mask": '{"x": [1, null], "x.mask": [true, true]}',
    "metadata of numbers": '{"__metadata__": {"a": 1}, "x": [1]}',
    "unknown field": explicit("F32", [1], vaules=[1]),
    "no dtype": '{"x": {"values": [1]}}',
    "no values": '{"x": {"dtype": "F32"}}',
    "shape and values": explicit("F32", [1, 2], shape=[3]),
    "shape and nesting": explicit("F32", [[1, 2], [3, 4], [5, 6]], shape=[2, 3]),
    "negative shape": explicit("F32", [], shape=[-1]),
    "bool in shape": explicit("F32", [1], shape=[True]),
    "shape overflows": explicit("F32", [], shape=[2**62, 0]),
    "dims and shape": explicit("F32", [1], dims=["a", "b"]),
    "dims are not names": explicit("F32", [1], dims=[1]),
    "dims are a word": explicit("F32", [1], dims="a"),
    "float in ints": explicit("I64", [1.0]),
    "bool in ints": explicit("I64", [True]),
    "bool in floats": explicit("F32", [True]),
    "int in bools": explicit("BOOL", [1]),
    "256 in U8": explicit("U8", [256]),
    "-1 in U64": explicit("U64", [-1]),
    "NaN in ints": explicit("I32", ["NaN"]),
    "beyond F16": explicit("F16", [65520]),
    "beyond F32": explicit("F32", [3.5e38]),
    "beyond BF16": explicit("BF16", [3.4e38]),
    "beyond F8_E4M3": explicit("F8_E4M3", [465]),
    "beyond F8_E5M2": explicit("F8_E5M2", [61440]),
    "infinity in F8_E4M3": explicit("F8_E4M3", ["Infinity"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_gets_one_clear_error(case: str) -> None:
    with at_most(64 * 2**20, seconds=5), pytest.raises(PayloadError) as caught:
        payload_json.decode(MALFORMED[case])
    assert caught.type is PayloadError
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_message_says_what_is_wrong_with_the_values() -> None:
    for case, says in (("bool and number", "mixes true or false"), ("ragged", "level 2"), ("beyond F64", "Infinity")):
        with pytest.raises(PayloadError, match=says):
            payload_json.decode(MALFORMED[case])


def test_bytes_must_be_utf_8() -> None:
    for text in (b'{"\xff": [1]}', '{"x": [1]}'.encode("utf-16")):
        with pytest.raises(PayloadError):
            payload_json.decode(text)


@pytest.mark.parametrize(
    ("text", "must"),
    [
        (explicit("C64", [1]), NotComputableError),
        (explicit("f32", [1]), NotComputableError),
        (explicit("F32", [1], shape=[1] * 33), NotComputableError),
        ('{"x": ' + "[" * 33 + "1" + "]" * 33 + "}", NotComputableError),
        ('{"a\\nb": [1]}', NotComputableError),
        (json.dumps({f"t{i}": 1 for i in range(1025)}), TooLargeError),
        (json.dumps({"a" * 257: 1}), TooLargeError),
        (" " * (2**24 + 1), TooLargeError),
    ],
)
def test_what_is_beyond_a_limit_says_so(text: str, must: type[Exception]) -> None:
    with pytest.raises(must) as caught:
        payload_json.decode(text)
    assert caught.type is must


def test_the_most_costly_json_within_the_cap_is_bounded() -> None:
    text = '{"x": [' + "[]," * 300_000 + "[]]}"
    with at_most(40 * len(text), seconds=10):
        payload_json.decode(text)


@unhurried
@given(st.text(max_size=40) | st.text(alphabet='{}[],:"x1.-ntrue ', max_size=40))
@example("{")
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(PayloadError):
        payload_json.decode(text)


# --- what is written


def test_a_plain_question_gets_a_plain_answer() -> None:
    data, mask = torch.tensor([[1.0, 2.5, 3.0]]), torch.tensor([[True, True, False]])
    assert write("plain", data=data, mask=mask) == '{"data": [[1.0, 2.5, null]]}\n'
    assert write("plain", x=data, x__mask=mask, y=torch.tensor(3)) == '{"x": [[1.0, 2.5, null]], "y": 3}\n'
    assert write("plain", x=torch.zeros(2, 0)) == '{"x": [[], []]}\n'
    assert payload_json.decode(write("plain", data=data, mask=mask)).form == "plain"


def test_the_explicit_form_says_all_that_the_payload_says() -> None:
    said = {"units": "mm", "maskserve.dims": '{"rain":["time"],"time":["time"]}'}
    rain, mask = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    text = write("explicit", said, rain=rain, mask=mask, time=torch.tensor([1, 2]))
    assert json.loads(text) == {
        "__metadata__": {"units": "mm"},
        "rain": {"dtype": "F32", "shape": [2], "dims": ["time"], "values": [1.0, None]},
        "time": {"dtype": "I64", "shape": [2], "dims": ["time"], "values": [1, 2]},
    }


def test_a_mask_that_broadcasts_hides_all_that_it_covers() -> None:
    text = write("plain", x=torch.ones(2, 2, dtype=torch.int64), x__mask=torch.tensor([[True], [False]]))
    assert json.loads(text) == {"x": [[1, 1], [None, None]]}


def test_what_is_hidden_is_not_written() -> None:
    assert "7" not in write(x=torch.tensor([7.0, 1.0]), x__mask=torch.tensor([False, True]))


def test_what_json_has_no_number_for_is_a_string() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf])
    assert json.loads(write("plain", x=values)) == {"x": ["NaN", "Infinity", "-Infinity"]}
    assert json.loads(write("plain", x=torch.tensor([2**53, 2**53 + 1, -(2**53) - 1]))) == {
        "x": [2**53, str(2**53 + 1), str(-(2**53) - 1)]
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_floats_are_the_shortest_text_that_reads_back(dtype: str) -> None:
    cells = torch.tensor([0.3, 3.0, -20.0]).to(getattr(torch, dtype))  # 0.3 is none of their values
    assert json.loads(write("plain", x=cells)) == {"x": [0.3, 3.0, -20.0]}


def test_complex_is_refused() -> None:
    with pytest.raises(NotComputableError, match="complex"):
        write(x=torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_value_of_a_small_float_comes_back_with_its_bits(dtype: str) -> None:
    width = {"bfloat16": torch.int16, "float16": torch.int16}.get(dtype, torch.uint8)
    codes = torch.arange(2**16 if width is torch.int16 else 2**8).to(width).view(getattr(torch, dtype))
    codes = codes[~codes.isnan()]
    assert same_bits(read(write(x=codes))[0], codes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@unhurried
@given(value=st.floats(-60000, 60000) | st.floats(-1e-4, 1e-4))
@example(value=1.00390625)
@example(value=1.01171875)
@example(value=1.0039062500000002)
def test_a_value_is_rounded_once_to_the_nearest(dtype: str, value: float) -> None:
    code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    got = read(explicit(code, [value]))[0].double().item()
    around = torch.tensor([got]).to(getattr(torch, dtype))
    neighbours = [float(n) for n in neighbours_of(around)]
    assert all(abs(got - value) <= abs(n - value) for n in neighbours)


@pytest.mark.parametrize("code", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_a_tie_goes_to_the_even_neighbour(code: str) -> None:
    dtype = getattr(torch, BY_CODE[code].torch)
    codes = torch.arange(0, 2**15 - 1, 97).to(torch.int16) if code == "BF16" else torch.arange(0, 0x7B).to(torch.uint8)
    lower, upper = codes.view(dtype).double(), (codes + 1).view(dtype).double()
    ties = ((lower + upper) / 2)[upper.isfinite()]
    assert same_bits(read(explicit(code, ties.tolist()))[0], ties.float().to(dtype))


def test_what_rounds_to_the_largest_value_still_fits() -> None:
    assert read(explicit("F8_E4M3", [464, -464]))[0].tolist() == [448, -448]
    assert read(explicit("F16", [65519]))[0].tolist() == [65504]


def neighbours_of(cell: torch.Tensor) -> list[torch.Tensor]:
    bits = cell.view(torch.int16 if cell.element_size() == 2 else torch.int32)
    return [n for step in (-1, 1) if (n := (bits + step).view(cell.dtype)[0].double()).isfinite()]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@st.composite
def masked(draw: st.DrawFn) -> tuple[Output, bytes]:
    dtype = draw(st.sampled_from(WRITABLE))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    n = math.prod(shape)
    valid = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    cells = [
        draw(st.binary(min_size=dtype.n_bytes, max_size=dtype.n_bytes)) if v else bytes(dtype.n_bytes) for v in valid
    ]
    if dtype.kind is Kind.BOOL:
        cells = [bytes([cell[0] & 1]) for cell in cells]
    return Output("x", dtype, shape, b"".join(cells)), bytes(valid)


@unhurried
@given(masked())
def test_the_explicit_form_is_read_again_as_it_was(drawn: tuple[Output, bytes]) -> None:
    x, valid = drawn
    mask = Output("x.mask", BY_CODE["BOOL"], x.shape, valid)
    text = b"".join(payload_json.encode([x, mask], {}, "explicit"))
    sent = payload_json.decode(text)
    assert sent.header.tensors["x"].shape == x.shape
    assert sent.header.tensors["x"].dtype is x.dtype
    got, expected = (quiet(bytes(b), x) for b in (sent.read("x"), x.chunks))  # type: ignore[arg-type]
    assert got == expected
    masked_cells = bytes(sent.read("x.mask")) if "x.mask" in sent.header.tensors else b"\1" * len(valid)
    assert masked_cells == valid


def quiet(data: bytes, x: Output) -> list[Any]:
    """The cells, with one NaN for all: JSON has a single one."""
    if not x.dtype.is_float:
        return list(data)
    tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, x.dtype.torch)) if data else torch.zeros(0)
    return ["NaN" if math.isnan(v) else struct.pack("<d", v) for v in tensor.double().tolist()]


@unhurried
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_float32_text_reads_back_and_none_shorter_does(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert same_bits(read(write(x=x))[0], x)
    for text in json.loads(write("plain", x=x), parse_float=str)["x"]:
        digits = len(text.lstrip("-").partition("e")[0].replace(".", "").strip("0"))
        if digits > 1:
            assert np.float32(f"{float(text):.{digits - 2}e}") != np.float32(text)


def test_a_raised_limit_reads_more() -> None:
    deep = '{"x": ' + "[" * 33 + "1" + "]" * 33 + "}"
    assert payload_json.decode(deep, Limits(dims=64)).header.tensors["x"].shape == (1,) * 33
