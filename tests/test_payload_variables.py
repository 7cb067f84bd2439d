"""Which tensor is whose mask: names, metadata and requests, and the values that come of it."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskserve.compact import Bits, Lengths
from maskserve.dtypes import BY_CODE
from maskserve.errors import (
    AmbiguousMaskError,
    DtypeError,
    MaskDtypeError,
    MaskError,
    MaskShapeError,
    NotComputableError,
    OrphanMaskError,
    ParameterError,
    PayloadError,
    TooLargeError,
    UnknownTensorError,
)
from maskserve.payload.format import BytesPayload, Limits, Output, to_bytes
from maskserve.payload.header import metadata_bytes
from maskserve.payload.tensors import load, output, tensor_of
from maskserve.payload.variables import MaskKind, Variables, answer_mask_name, answer_metadata, resolve

X = torch.arange(6.0).reshape(2, 3)
VALID = torch.tensor([[True, False, True], [False, True, True]])
unhurried = settings(deadline=None)  # a busy machine is no failure


def payload(metadata: dict[str, Any] | None = None, **tensors: torch.Tensor) -> BytesPayload:
    """A payload of `tensors`; `__` in a name stands for a dot, and metadata that is no text for its JSON."""
    said = {key: text if isinstance(text, str) else json.dumps(text) for key, text in (metadata or {}).items()}
    return BytesPayload(to_bytes([output(n.replace("__", "."), tensor) for n, tensor in tensors.items()], said))


def resolved(
    metadata: dict[str, Any] | None = None, request: dict[str, Any] | None = None, **tensors: torch.Tensor
) -> Variables:
    return resolve(payload(metadata, **tensors).header, **(request or {}))


def masks(variables: Variables) -> dict[str, str | None]:
    return {v.name: v.mask.info.name if v.mask else None for v in variables}


def mask_of(sent: BytesPayload, name: str, **request: Any) -> Any:
    mask = load(sent, resolve(sent.header, **request)[name])[1]
    assert mask is not None
    return mask


# --- who is whose


def test_a_companion_by_suffix_is_the_mask_of_its_variable() -> None:
    assert masks(resolved(x=X, y=X, x__mask=VALID)) == {"x": "x.mask", "y": None}


@pytest.mark.parametrize("name", ["data", "x", "rain"])
def test_a_tensor_called_mask_belongs_to_the_one_variable_beside_it(name: str) -> None:
    assert masks(resolved(**{name: X}, mask=VALID)) == {name: "mask"}


def test_coordinates_and_side_inputs_do_not_stand_beside_a_mask() -> None:
    dims = {"maskserve.dims": {"x": ["time", "lat"], "lat": ["lat"]}}
    variables = resolved(dims, {"side_inputs": ["w"]}, x=X, lat=X[0], w=X, grad_output=X, mask=VALID)
    assert masks(variables) == {"x": "mask"}
    assert list(variables.coordinates) == ["lat"]
    assert variables["lat"].is_coordinate
    assert variables["x"].dims == ("time", "lat")
    assert sorted(variables.side_inputs) == ["grad_output", "w"]


def test_side_inputs_may_have_masks_and_are_not_computed_on() -> None:
    variables = resolved(None, {"side_inputs": ["w"]}, x=X, w=X, w__mask=VALID, grad_output=X, grad_output__mask=VALID)
    assert masks(variables) == {"x": None}
    assert [v.mask.info.name for v in variables.side_inputs.values() if v.mask] == ["grad_output.mask", "w.mask"]


@pytest.mark.parametrize(
    "names",
    [["x", "y", "mask"], ["mask"], ["x", "y.mask"], ["x", "x.mask.mask"], ["x", "x.mask", "x.mask.mask"],
     ["x", "y.lengths"], ["x", "y.bitmask"], ["grad_output", "mask"]],
)  # fmt: skip
def test_a_mask_without_an_owner_is_an_orphan(names: list[str]) -> None:
    with pytest.raises(OrphanMaskError):
        resolved(**dict.fromkeys(names, VALID))


@pytest.mark.parametrize(
    "names", [["x.mask", "mask"], ["x.mask", "x.lengths"], ["x.lengths", "x.bitmask"], ["x.bitmask", "mask"]]
)
def test_two_candidates_are_an_error_and_never_a_guess(names: list[str]) -> None:
    with pytest.raises(AmbiguousMaskError, match=r"x has 2 masks") as caught:
        resolved(x=X, **dict.fromkeys(names, VALID))
    assert all(name in str(caught.value) for name in names)


def test_a_name_like_a_suffix_is_no_companion() -> None:
    assert masks(resolved(**{".mask": X, "amask": X, "lengths": X, "x.values": X})) == dict.fromkeys(
        [".mask", "amask", "lengths", "x.values"]
    )


def test_the_request_comes_before_the_metadata_and_that_before_the_suffix() -> None:
    tensors = {"x": X, "x.mask": VALID, "ok": VALID, "seen": VALID}
    said = {"maskserve.masks": {"x": "ok"}}
    assert masks(resolved(None, {"mask": {"x": "ok"}}, **{k: tensors[k] for k in ("x", "x.mask", "ok")})) == {"x": "ok"}
    assert masks(resolved(said, None, **{k: tensors[k] for k in ("x", "x.mask", "ok")})) == {"x": "ok"}
    assert masks(resolved(said, {"mask": "seen"}, **tensors)) == {"x": "seen"}
    assert masks(resolved(said, {"mask": {"x": "x.mask"}}, **{k: tensors[k] for k in ("x", "x.mask", "ok")})) == {
        "x": "x.mask"
    }


def test_a_named_mask_serves_every_variable_and_settles_what_would_be_ambiguous() -> None:
    assert masks(resolved(None, {"mask": "mask"}, x=X, y=X, mask=VALID)) == {"x": "mask", "y": "mask"}
    assert masks(resolved(None, {"mask": "mask"}, x=X, x__mask=VALID, mask=VALID)) == {"x": "mask"}


def test_picked_tensors_are_computed_on_and_the_others_are_not() -> None:
    assert masks(resolved(None, {"tensors": ["y"], "mask": "ok"}, x=X[0], y=X, ok=VALID)) == {"y": "ok"}
    with pytest.raises(UnknownTensorError, match="did you mean rain"):
        resolved(None, {"tensors": ["rian"]}, rain=X)
    with pytest.raises(UnknownTensorError, match="is not computed on"):
        resolved(None, {"tensors": ["x.mask"]}, x=X, x__mask=VALID)


@pytest.mark.parametrize(
    "request_", [{"mask": "none"}, {"mask": {"x": "none"}}, {"mask": {"y": "x"}}, {"side_inputs": ["w"]}]
)
def test_a_request_that_names_what_is_not_there_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(UnknownTensorError):
        resolved(None, request_, x=X)


def test_no_tensor_is_its_own_mask() -> None:
    with pytest.raises(ParameterError, match="its own mask"):
        resolved(None, {"mask": {"x": "x"}}, x=VALID, y=X)


@pytest.mark.parametrize("tensors", [{}, {"grad_output": X}, {"w": X}, {"time": X[0]}])
def test_nothing_to_compute_on_is_an_error(tensors: dict[str, torch.Tensor]) -> None:
    said = {"maskserve.dims": {"time": ["time"]}} if "time" in tensors else {}
    with pytest.raises(NotComputableError, match="no tensor to compute on"):
        resolved(said, {"side_inputs": [n for n in tensors if n == "w"]}, **tensors)


@pytest.mark.parametrize("name", ["x.coo_indices", "x.coo_values", "x.crow_indices", "x.col_indices"])
def test_a_part_of_a_sparse_tensor_alone_is_refused(name: str) -> None:
    with pytest.raises(PayloadError, match="is missing: a sparse tensor x is"):
        resolved(**{name: X})


# --- metadata


@pytest.mark.parametrize(
    "said",
    [
        *({"maskserve.dims": text} for text in ("[", [], '{"x":["a","b"],"x":["a","b"]}', '{"x":["a","b"]} {}')),
        *({"maskserve.dims": {"x": words}} for words in ("time", ["a"], ["a", "a"], ["a", ""], ["a", 1], ["a", "b\n"])),
        *({"maskserve.masks": {"x": mask}} for mask in ("none", 1, "x")),
        {"maskserve.dims": "[" * 60_000},
        {"maskserve.masks": "null"},
        {"maskserve.mask_means": "hidden"},
    ],
)
def test_metadata_that_does_not_fit_is_malformed(said: dict[str, Any]) -> None:
    with pytest.raises(PayloadError) as caught:
        resolved(said, x=X)
    assert caught.type is PayloadError
    assert caught.value.parameter in said


def test_metadata_about_tensors_that_are_gone_is_passed_over() -> None:
    said = {"maskserve.dims": {"gone": ["a"]}, "maskserve.masks": {"gone": "gone_ok"}}
    assert masks(resolved(said, x=X)) == {"x": None}
    with pytest.raises(OrphanMaskError):
        resolved({"maskserve.masks": {"gone": "ok"}}, x=X, ok=VALID)
    with pytest.raises(OrphanMaskError):
        resolved({"maskserve.masks": {"x.mask": "y"}}, x=X, x__mask=VALID, y=VALID)


# --- shapes and dtypes


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_a_mask_broadcasts_where_its_size_is_1(shape: tuple[int, ...]) -> None:
    sent = payload(x=X, x__mask=torch.ones(shape, dtype=torch.bool))
    assert mask_of(sent, "x").shape == shape


@pytest.mark.parametrize("shape", [(2, 2), (3,), (), (1, 2, 3), (3, 2), (2, 0)])
def test_a_mask_of_another_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(MaskShapeError, match=re.escape(f"x.mask has shape {shape}, x (2, 3); a mask ")):
        resolved(x=X, x__mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", ["float32", "int64", "int8", "float64"])
def test_a_mask_of_another_dtype_is_refused_with_what_to_do(dtype: str) -> None:
    with pytest.raises(MaskDtypeError, match=r"mask\.bool\(\)"):
        resolved(x=X, x__mask=VALID.to(getattr(torch, dtype)))


@pytest.mark.parametrize("shape", [(2, 3), (3,), (1,), (2, 1)])
def test_lengths_have_the_shape_of_the_dims_before(shape: tuple[int, ...]) -> None:
    with pytest.raises(MaskShapeError, match="lengths have the shape"):
        resolved(x=X, x__lengths=torch.ones(shape, dtype=torch.int64))
    with pytest.raises(MaskDtypeError):
        resolved(x=X, x__lengths=torch.ones(2))


def test_a_bitmask_has_its_rows_in_bytes() -> None:
    for shape in [(2, 2), (2, 3), (1, 1), (1,)]:
        with pytest.raises(MaskShapeError, match="packs the last dim"):
            resolved(x=X, x__bitmask=torch.ones(shape, dtype=torch.uint8))
    with pytest.raises(MaskShapeError):
        resolved(x=X[0, 0], x__bitmask=torch.ones((), dtype=torch.uint8))
    with pytest.raises(MaskDtypeError):
        resolved(x=X, x__bitmask=torch.ones((2, 1), dtype=torch.bool))


# --- values


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_missing_means_the_opposite_of_valid(dtype: torch.dtype) -> None:
    sent = payload({"maskserve.mask_means": "missing"}, x=X, mask=VALID.to(dtype))
    assert torch.equal(mask_of(sent, "x"), ~VALID)
    assert torch.equal(mask_of(sent, "x", mask_means="valid"), VALID)
    assert torch.equal(mask_of(payload(x=X, mask=VALID.to(dtype)), "x"), VALID)
    with pytest.raises(ParameterError):
        resolve(sent.header, mask_means="hidden")  # type: ignore[arg-type]


@pytest.mark.parametrize("code", ["BOOL", "U8"])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_mask_of_other_bytes_than_0_and_1_is_refused(code: str, byte: int) -> None:
    mask = Output("x.mask", BY_CODE[code], (2, 3), bytes([1, 0, 1, 1, 0, byte]))
    sent = BytesPayload(to_bytes([output("x", X), mask], {}))
    with pytest.raises(MaskDtypeError, match="other than 0 and 1"):
        mask_of(sent, "x")


def test_a_bool_tensor_of_other_bytes_is_refused() -> None:
    sent = BytesPayload(to_bytes([Output("x", BY_CODE["BOOL"], (2,), b"\1\2")], {}))
    with pytest.raises(PayloadError, match="other than 0 and 1"):
        load(sent, resolve(sent.header)["x"])


@unhurried
@given(st.data())
def test_lengths_are_a_valid_prefix(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    of = st.integers(0, shape[dim])
    n = int(np.prod(shape[:dim], dtype=int))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    lengths = torch.tensor(data.draw(st.lists(of, min_size=n, max_size=n)), dtype=dtype).reshape(shape[:dim])
    sent = payload({"maskserve.mask_means": "missing"}, x=torch.zeros(shape), x__lengths=lengths)
    held = mask_of(sent, "x")
    assert isinstance(held, Lengths)
    mask = held.bools().expand(shape)
    for index in np.ndindex(*shape):
        assert bool(mask[index]) == (index[dim] < int(lengths[index[:dim]]))


@pytest.mark.parametrize("length", [-1, 4, 2**40])
def test_a_length_outside_its_dim_is_refused(length: int) -> None:
    sent = payload(x=X, x__lengths=torch.tensor([0, length]))
    with pytest.raises(MaskError, match="outside 0 to 3") as caught:
        mask_of(sent, "x")
    assert str(length) not in str(caught.value) or length == -1


@unhurried
@given(st.data())
def test_a_bitmask_is_read_lowest_bit_first(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20)))
    valid = np.array(
        data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])), bool
    )
    packed = np.packbits(valid.reshape(shape), axis=-1, bitorder="little")
    junk = np.packbits(np.zeros(shape, bool), axis=-1, bitorder="little") | packed
    if shape[1] % 8 and junk.size:
        junk[:, -1] |= 0xFF << (shape[1] % 8) & 0xFF
    sent = payload(x=torch.zeros(shape), x__bitmask=torch.from_numpy(junk))
    held = mask_of(sent, "x")
    assert isinstance(held, Bits)
    assert np.array_equal(held.bools().numpy(), valid.reshape(shape))


@pytest.mark.parametrize("dtype", BY_CODE.values(), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shift", [0, 1, 8])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_tensor_is_read_from_any_address_without_a_warning(dtype: Any, shift: int, kind: type) -> None:
    cells = bytes(i % 2 for i in range(4 * dtype.n_bytes))
    buffer = memoryview(kind(bytes(shift) + cells))[shift:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = tensor_of(buffer, dtype, (2, 2))
    assert bytes(output("x", tensor).chunks) == cells  # type: ignore[arg-type]
    assert tensor.data_ptr() % dtype.n_bytes == 0
    assert output("x", tensor).dtype is dtype


def test_an_aligned_tensor_is_not_copied() -> None:
    body = bytearray(payload(x=torch.zeros(2**20)).read("x"))
    sent = bytearray(to_bytes([Output("x", BY_CODE["F32"], (2**20,), body)], {}))
    read = BytesPayload(sent)
    tracemalloc.start()
    try:
        data, mask = load(read, resolve(read.header)["x"])
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()
    assert mask is None
    sent[-4:] = np.float32(7).tobytes()
    assert data[-1] == 7


def test_a_tensor_keeps_the_bytes_that_it_reads_alive() -> None:
    body = bytes(range(1, 65))
    holders = sys.getrefcount(body)
    tensor = tensor_of(memoryview(body)[8:], BY_CODE["U8"], (56,))
    assert sys.getrefcount(body) > holders
    part = tensor[1:]
    del tensor
    assert sys.getrefcount(body) > holders
    del part
    assert sys.getrefcount(body) == holders


@pytest.mark.parametrize(
    "tensor", [X.T, X[:, ::2], X[:0], X[0, 0], torch.view_as_complex(torch.ones(2, 2)).conj(), X > 2]
)
def test_any_tensor_is_written_as_its_cells(tensor: torch.Tensor) -> None:
    sent = payload(x=tensor)
    assert torch.equal(load(sent, resolve(sent.header)["x"])[0], tensor.resolve_conj())


def test_a_dtype_that_a_payload_cannot_hold_is_refused() -> None:
    with pytest.raises(DtypeError, match="complex128"):
        output("x", X.to(torch.complex128))


# --- answers


@pytest.mark.parametrize(
    ("names", "answers"),
    [
        (["data", "mask"], {"data": "mask"}),
        (["x", "mask"], {"x": "mask"}),
        (["data"], {"data": "mask"}),
        (["data", "data.mask"], {"data": "mask"}),
        (["x"], {"x": "x.mask"}),
        (["x", "x.mask"], {"x": "x.mask"}),
        (["data", "x"], {"data": "data.mask", "x": "x.mask"}),
        (["data", "grad_output"], {"data": "mask"}),
    ],
)
def test_an_answer_comes_in_the_form_of_its_question(names: list[str], answers: dict[str, str]) -> None:
    variables = resolved(**dict.fromkeys(names, VALID))
    assert {v.name: answer_mask_name(v, variables) for v in variables} == answers


def test_the_answer_to_an_answer_has_the_same_form() -> None:
    for names in (["data", "mask"], ["x", "mask"], ["x"], ["data"], ["x", "y", "y.mask"]):
        first = resolved(**dict.fromkeys(names, VALID))
        answered = {v.name: answer_mask_name(v, first) for v in first}
        again = resolved(**dict.fromkeys([*answered, *answered.values()], VALID))
        assert masks(again) == answered
        assert {v.name: answer_mask_name(v, again) for v in again} == answered


def test_lengths_and_bitmasks_are_answered_with_a_mask() -> None:
    variables = resolved(x=X, x__lengths=torch.tensor([1, 2]))
    assert variables["x"].mask is not None
    assert variables["x"].mask.kind is MaskKind.LENGTHS
    assert answer_mask_name(variables["x"], variables) == "x.mask"


def test_an_answer_keeps_what_is_not_ours_and_says_what_was_done() -> None:
    asked = {
        "units": "mm", "maskserve.masks": "{}", "maskserve.mask_means": "missing", "maskserve.dims": "{}",
        "maskserve.history": '{"op":"sum"}', "maskserve.version": "0",
    }  # fmt: skip
    assert answer_metadata(asked, {"x": ("time",)}, {"op": "mean", "dim": [0]}, "0.1.0") == {
        "units": "mm",
        "maskserve.version": "0.1.0",
        "maskserve.dims": '{"x":["time"]}',
        "maskserve.history": '{"op":"sum"}\n{"dim":[0],"op":"mean"}',
    }


def test_history_loses_its_oldest_lines_before_it_outgrows_the_reader() -> None:
    metadata: dict[str, str] = {"units": "é" * 100}
    limits = Limits(metadata_bytes=2000)
    for i in range(100):
        metadata = answer_metadata(metadata, {}, {"op": "é" * 10, "i": i}, "1", limits)
        assert metadata_bytes(metadata) <= 2000
    lines = [json.loads(line)["i"] for line in metadata["maskserve.history"].split("\n")]
    assert lines == list(range(100 - len(lines), 100))
    assert len(lines) > 20
    assert metadata["units"] == "é" * 100


def test_metadata_that_cannot_be_read_again_is_not_written() -> None:
    with pytest.raises(TooLargeError):
        answer_metadata({"k": "v" * (2**16 - 1)}, {}, {}, "0.1.0")
