"""What a hostile reader found once, and what must not come back."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import maskserve as ms
from maskserve import MaskedTensor, dtypes
from maskserve.backends import backends
from maskserve.errors import (
    DataError,
    DtypeError,
    MaskError,
    MaskserveError,
    NanError,
    ParameterError,
    PayloadError,
    SettingsError,
    ShapeError,
    StateError,
    TooLargeError,
    UncoveredFunctionError,
)
from maskserve.ops import OPS
from maskserve.ops.rows import Reduction
from maskserve.partials import PREFIX, Partial
from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output
from maskserve.plan import plan
from maskserve.sides import same_places

T, F = True, False


def m(cells: Any, mask: Any = None) -> MaskedTensor:
    return ms.masked_tensor(torch.tensor(cells), None if mask is None else torch.tensor(mask))


# -- who owns a mask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x + 1, lambda x: x * x, lambda x: -x, abs, ms.exp, lambda x: x == 0, lambda x: (x == 0) & True,
        lambda x: ms.where(x > 0, 1.0, 2.0), lambda x: torch.ones(3) - x, lambda x: x.sum(0, keepdim=True), lambda x: x.cumsum(0),
    ],
)  # fmt: skip
def test_assigning_into_a_result_leaves_its_operand_as_it_was(op: Callable[[MaskedTensor], MaskedTensor]) -> None:
    x = m([1.0, 666.0, 3.0], [T, F, T])
    result = op(x)
    result[0] = m(0.0, F).to(result.dtype)
    result[-1] = 1
    assert x.tolist() == [1, None, 3]
    x[0] = m(0.0, F)
    full = m([1.0, 2.0, 3.0], [T, T, T])
    op(full)[-1] = m(0.0, F)
    assert full.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "assign",
    [
        lambda x: x[0].__setitem__(1, 7.0), lambda x: x[0:1].__setitem__((0, 1), 7.0),
        lambda x: x.select(0, 0).__setitem__(1, 7.0), lambda x: x.narrow(0, 0, 1).__setitem__((0, 1), 7.0),
        lambda x: next(iter(x)).__setitem__(1, 7.0), lambda x: x.reshape(6).__setitem__(4, 7.0),
        lambda x: x.flatten().__setitem__(4, 7.0), lambda x: x.view(6).__setitem__(4, 7.0),
    ],
)  # fmt: skip
def test_a_write_through_a_view_of_a_broadcast_mask_is_refused(assign: Callable[[MaskedTensor], None]) -> None:
    x = MaskedTensor(torch.arange(6.0).reshape(2, 3), torch.tensor([[T, F, T]]))
    with pytest.raises(MaskError, match="would be lost"):
        assign(x)
    assert x.tolist() == [[0, None, 2], [3, None, 5]]


@pytest.mark.parametrize(
    "view",
    [lambda x: x.detach(), lambda x: __import__("copy").copy(x), lambda x: x[0:2], lambda x: x.reshape(3)],
)
def test_a_masked_write_through_a_view_without_a_mask_is_refused(view: Callable[[MaskedTensor], MaskedTensor]) -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            x = MaskedTensor(torch.arange(3.0))
            with pytest.raises(MaskError, match="would be lost"):
                view(x)[0] = m(99.0, F)
            assert x.tolist() == [0, 1, 2]


def test_what_lies_under_an_assigned_mask_goes_nowhere() -> None:
    x = m([0.0, 1.0])
    alias = ms.as_masked_tensor(x)
    alias[0] = m(99.0, F)
    assert (x.tolist(), alias.tolist()) == ([0, 1], [None, 1])
    with pytest.raises(ShapeError, match="clone"):
        MaskedTensor(torch.arange(3.0).expand(2, 3))[0, 0] = m(99.0, F)


def test_views_with_a_full_mask_still_write_through() -> None:
    x = MaskedTensor(torch.arange(6.0).reshape(2, 3), torch.ones(2, 3, dtype=torch.bool))
    x.t()[2, 0] = m(0.0, F)
    x.reshape(6)[0] = 9.0
    x[1][1] = m(0.0, F)
    assert x.tolist() == [[9, 1, None], [3, None, 5]]
    picked = x[[0, 1]]
    picked[0, 0] = m(0.0, F)
    assert x.tolist()[0][0] == 9


# -- what comes in ------------------------------------------------------------------------------------------------


def test_numpy_ma_keeps_its_mask_wherever_a_tensor_goes() -> None:
    theirs = np.ma.array([1.0, 2.0, 1000.0], mask=[0, 0, 1])
    assert ms.mean(theirs).item() == 1.5
    assert ms.from_lengths(theirs, 3, 0).sum().item() == 3
    assert MaskedTensor(theirs).tolist() == [1, 2, None]  # type: ignore[arg-type]
    assert ms.add(m([1.0, 1.0, 1.0]), theirs).tolist() == [2, 3, None]
    assert (m([1.0, 1.0, 1.0]) + theirs).tolist() == [2, 3, None]


def test_where_as_a_method_takes_torchs_arguments() -> None:
    condition, x, other = torch.tensor([T, F]), m([1.0, 2.0]), torch.tensor([8.0, 9.0])
    assert x.where(condition, other).tolist() == [1, 9]
    assert other.where(condition, x).tolist() == [8, 2]
    assert torch.where(condition, x, other).tolist() == [1, 9]


@pytest.mark.parametrize(
    ("dtype", "cells", "fill", "n_valid"),
    [
        (torch.uint8, [241, 1, 255], "-9999", 3), (torch.uint8, [241, 1, 255], "-1", 3), (torch.int8, [44, 1], "300", 2),
        (torch.int32, [2147483600, 1], "2147483647.0", 2), (torch.int64, [-1000000001, 1], "-1e9", 2),
        (torch.float32, [1, math.inf], "1e300", 2), (torch.int64, [1, 2], "10000000000000000000000000000000", 2),
        (torch.float32, [1e30, 1], "1" + "0" * 30, 1), (torch.float16, [1, 2], "1" + "0" * 30, 2),
        (torch.int16, [-9999, 1], "-9999", 1), (torch.float32, [-9999, 1], "-9999", 1), (torch.int64, [5, 1], "5.0", 1),
    ],
)  # fmt: skip
def test_a_fill_value_is_compared_exactly(dtype: torch.dtype, cells: list[Any], fill: str, n_valid: int) -> None:
    payload = to_bytes([output("x", torch.tensor(cells, dtype=dtype))], {})
    answer = ms.compute("reduce", payload, op="count", fill_value=fill)
    assert answer.results[0].data.item() == n_valid


# -- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: ms.sum(torch.ones(1), min_count=2**63), lambda: ms.sum(torch.ones(1), min_count=10**30),
        lambda: ms.var(torch.ones(3), correction=2**63), lambda: ms.var(torch.ones(3), correction=10**400),
        lambda: ms.amax(torch.ones(0, dtype=torch.uint8), empty=-1), lambda: ms.any(torch.ones(0), empty=2),
        lambda: ms.sum(torch.ones(0, dtype=torch.float16), empty=1e6), lambda: ms.sum(torch.ones(0).long(), empty=math.inf),
        lambda: ms.sum(torch.ones(0).long(), empty=10**30), lambda: ms.var(torch.ones(3), unbiased=False, correction=2),
        lambda: ms.sum(torch.ones(3), 0, axis=0), lambda: ms.compute("reduce", b"", op="sum", min_count="9" * 20),
    ],
)  # fmt: skip
def test_numbers_that_no_count_or_dtype_holds_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(MaskserveError):
        call()


def test_the_first_call_does_not_decide_later_ones() -> None:
    x = torch.ones(2, 3)
    assert ms.sum(x, (1,)).tolist() == [3, 3]
    for dim in ((True,), (1.0,)):
        with pytest.raises(ParameterError):
            ms.sum(x, dim)
    empty = torch.ones(0)
    for value in (-0.0, 0.0):
        assert math.copysign(1, ms.amin(empty, empty=value).item()) == 1


def test_a_float64_overflow_does_not_depend_on_torchs_default_dtype() -> None:
    data = torch.tensor([1.7e308] * 8192 + [-1.7e308] * 8192 + [1.7e308], dtype=torch.float64)
    for backend in ("reference", "cpu"):
        for default in (torch.float32, torch.float16, torch.float64):
            torch.set_default_dtype(default)
            try:
                with ms.using(backend=backend):
                    assert ms.sum(data).item() == 1.7e308
            finally:
                torch.set_default_dtype(torch.float32)


def test_overflow_in_a_cell_that_the_result_masks_is_nobodys_error() -> None:
    assert ms.sum(torch.tensor([[2**63 - 1, 1]]), 1, min_count=5).tolist() == [None]
    assert ms.sum(torch.tensor([6e4, 6e4], dtype=torch.float16), min_count=5).tolist() is None


def test_a_zero_under_the_results_mask_divides_nothing() -> None:
    assert (m([4, 5], [T, F]) // torch.tensor([2, 0])).tolist() == [2, None]
    assert (m([4, 5], [T, F]) % torch.tensor([2, 0])).tolist() == [0, None]
    with pytest.raises(DataError, match="ZeroDivision"):
        m([4, 5], [T, T]) // torch.tensor([2, 0])


# -- errors, never tracebacks of others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: m([1]) + 10**30, lambda: m([1]).to(torch.int8).__setitem__(0, 10**30), lambda: ms.where(m([1.0]), m([1]), 2),
        lambda: torch.where(m([T])), lambda: MaskedTensor(torch.ones(1), "x"), lambda: MaskedTensor(torch.ones(1), [None]),  # type: ignore[arg-type]
        lambda: ms.sum("abc"), lambda: ms.sum(None), lambda: ms.exp(torch.ones(1, dtype=torch.complex128)),
        lambda: ms.from_lengths(torch.ones(2), None, 0), lambda: m([1.0], [F]).to_tensor(1e300 * 10),
        lambda: m([1.0]).to(torch.bfloat16).numpy(), lambda: ms.sum(torch.ones(2, device="meta")),
        lambda: ms.sum(torch.ones(2).to_sparse()), lambda: m([1.0, 2.0]).view(torch.int32), lambda: m([1.0]).reshape(7),
        lambda: ms.save({"mask": m([1.0])}, "x"), lambda: ms.save({"x.lengths": m([1.0])}, "x"),
        lambda: ms.save("x", {"x": m([1.0])}), lambda: ms.save({"x": m([1.0])}, "x.csv"), lambda: ms.compute("mean", b""),
    ],
)  # fmt: skip
def test_bad_values_are_errors_of_our_own(call: Callable[[], Any]) -> None:
    try:
        call()
    except MaskserveError:
        return
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")


def test_a_plain_tensor_with_mask_is_accepted_by_rows_of_one_tensor() -> None:
    x, k = torch.tensor([0.0, 1.0]), torch.tensor([T, F])
    assert ms.exp(x, mask=k).tolist() == [1, None]
    assert ms.reshape(torch.ones(2, 3), 6).shape == (6,)


def test_complex_numbers_and_masked_lists_as_indices() -> None:
    assert (m([1.0, 2.0], [T, F]) * 1j).tolist() == [1j, None]
    assert (m([1.0]).double() * 1j).dtype is torch.complex128
    assert m([5, 6, 7])[m([0, 2])].tolist() == m([5, 6, 7])[[m([0, 2])]].tolist()[0] == [5, 7]
    negative = torch.tensor([1 + 2j]).conj().imag
    for backend in ("reference", "cpu"):
        with ms.using(backend=backend):
            assert ms.sum(negative, mask=torch.tensor([T])).item() == ms.amax(negative).item() == -2


def test_pickles_hold_nothing_hidden_and_no_more_than_they_show() -> None:
    x = m([12345.0, 1.0] * 1000, [F, T] * 1000)
    assert np.float32(12345.0).tobytes() not in pickle.dumps(x)
    assert len(pickle.dumps(x[1])) < 3000


# -- bytes that nobody vouches for --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20_000_000, 0), (2**47, 0)])
def test_a_tiny_file_cannot_ask_for_a_huge_answer(shape: tuple[int, ...]) -> None:
    from maskserve.dtypes import f32
    from maskserve.payload.format import Output

    payload = to_bytes([Output("x", f32, shape, b"")], {})
    with pytest.raises(TooLargeError, match="at most"):
        ms.compute("reduce", payload, op="sum", dim=1)


def state(**changes: Any) -> bytes:
    """The bytes of a state with some of its metadata or tensors changed."""
    whole = plan(OPS["mean"], (), (10_000,), dtypes.f64, "cpu")  # type: ignore[arg-type]
    partial = Partial.lift(whole, torch.ones(1, 10_000, 1, dtype=torch.float64))
    said = {PREFIX + k: json.dumps(v) for k, v in partial.signature().items()}
    tensors = dict(partial.named())
    said |= {PREFIX + k: v for k, v in changes.items() if isinstance(v, str)}
    tensors = changes.get("tensors", lambda t: t)(tensors)
    return to_bytes([output(name, part) for name, part in tensors.items()], said)


def test_an_unchanged_state_is_accepted() -> None:
    assert Partial.from_bytes(state()).finalize()[0].item() == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "{"}, {"op": '"exp"'}, {"op": '"nonsense"'}, {"op": "7" * 5000}, {"shape": "[2, Infinity]"}, {"shape": "[2.7]"},
        {"shape": '{"2": 1}'}, {"shape": "[-1]"}, {"shape": "[" + "1," * 99 + "1]"}, {"params": "[1]"}, {"params": '"x"'},
        {"params": '{"min_count": ' + "9" * 30 + "}"}, {"dtype": "5"}, {"dtype": "null"}, {"backend": "null"}, {"order": "true"},
        {"backend": '"nobody"'}, {"version": '"0.0.0"'}, {"shape": "[1000000]"},
        {"tensors": lambda t: {k.replace("0.1.0.2.", "0.1.0.3."): v for k, v in t.items()}},
        {"tensors": lambda t: {k.replace("0.1.0.2.", "0.1.1.2."): v for k, v in t.items()}},
        {"tensors": lambda t: {k.replace("0.1.0.2.", "0.1.00.2."): v for k, v in t.items()}},
        {"tensors": lambda t: {k.replace("0.1.0.2.", "0.1.0.\uff12."): v for k, v in t.items()}},
        {"tensors": lambda t: {k: v for k, v in t.items() if "count" not in k}},
        {"tensors": lambda t: {k: v - 10**6 if "count" in k else v for k, v in t.items()}},
        {"tensors": lambda t: {k: v + 10**6 if "count" in k else v for k, v in t.items()}},
        {"tensors": lambda t: {k: v.float() if v.is_floating_point() else v for k, v in t.items()}},
        {"tensors": lambda t: t | {"0.1.0.1." + k.rsplit(".")[-1]: v for k, v in t.items()}},
        {"tensors": lambda t: t | {"junk": torch.ones(1)}},
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    try:
        Partial.from_bytes(state(**changes)).finalize()
    except StateError:
        return
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    pytest.fail("accepted")


def test_a_partial_is_lifted_from_cells_of_its_plan_alone() -> None:
    whole = plan(OPS["sum"], (), (64,), dtypes.f64, "cpu")  # type: ignore[arg-type]
    with pytest.raises(StateError, match="f64"):
        Partial.lift(whole, torch.ones(1, 64, 1))
    with pytest.raises(MaskError):
        Partial.lift(whole, torch.ones(1, 64, 1).double(), torch.full((1, 64, 1), 2, dtype=torch.uint8))
    some = Partial.lift(whole, torch.ones(1, 64, 1).double(), torch.ones(1, 1, 1, dtype=torch.bool))
    assert some.finalize()[0].item() == 64


def test_a_reduced_coordinate_of_size_one_does_not_survive_keepdim() -> None:
    tensors = [output("rain", torch.ones(1, 3)), output("time", torch.ones(1)), output("lat", torch.ones(3))]
    named = {"maskserve.dims": '{"rain": ["time", "lat"], "time": ["time"], "lat": ["lat"]}'}
    answer = ms.compute("reduce", to_bytes(tensors, named), op="sum", dim="time", keepdim=True)
    assert [r.name for r in answer.results] == ["rain", "lat"]


# -- what a new user stumbled over --------------------------------------------------------------------------------


def test_what_is_loaded_and_saved_keeps_dims_coordinates_and_metadata(tmp_path: Path) -> None:
    given = Path(__file__).parent.parent / "examples" / "co2.safetensors"
    record = ms.load(given)
    ms.save(record, tmp_path / "again.safetensors")
    again = ms.load(tmp_path / "again.safetensors")
    assert (again.dims, again.metadata["title"]) == (record.dims, record.metadata["title"])
    answers = [
        ms.compute("reduce", path, op="mean", dim="week").results for path in (given, tmp_path / "again.safetensors")
    ]
    assert [r.name for r in answers[0]] == [r.name for r in answers[1]] == ["co2", "year"]
    with pytest.raises(ParameterError, match="has 2 dims"):
        ms.save({"x": torch.ones(2, 2)}, tmp_path / "x", dims={"x": ("a",)})
    with pytest.raises(MaskserveError, match="exists"):
        ms.save(record, tmp_path / "again.safetensors")


def test_save_refuses_what_load_would_and_keeps_the_file_that_is_there(tmp_path: Path) -> None:
    path, x = tmp_path / "x.safetensors", m([[1.0, 2.0]], [[T, F]])
    ms.save({"good": x}, path)
    good = path.read_bytes()
    bad: list[tuple[dict[Any, Any], dict[str, Any] | None, str]] = [
        ({"x": x}, {"x": ("a", "a")}, "dims of x has a name twice"),
        ({"x": x}, {"x": (1, 2)}, "dims of x must be a list of names"),
        ({"x": x}, {"x": ("", "b")}, "dims of x must be a list of names"),
        ({"x": x}, {"x": "ab"}, r"dims of x is 'ab'; give a name for each dim"),
        ({"x": x}, {"x": 2}, r"dims of x is 2; give a name for each dim"),
        ({"x": x}, {"rian": ("a", "b")}, "there is no tensor rian; the payload has x"),
        ({"grad_output": x}, None, "no tensor to compute on"),
        ({"a.coo_values": torch.ones(2)}, None, "a.coo_indices is missing"),
        ({"a.crow_indices": torch.ones(2)}, None, "a.col_indices is missing"),
        ({1: x}, None, "has the name 1, a int; a name is a str"),
        ({"__metadata__": x}, None, "no tensor is called __metadata__"),
    ]
    for tensors, dims, message in bad:
        with pytest.raises(MaskserveError, match=message):
            ms.save(tensors, path, dims=dims, exists="replace")
        assert path.read_bytes() == good


def test_what_reads_one_payload_says_so_of_folders_patterns_and_lists(tmp_path: Path) -> None:
    calls: list[Callable[[Any], Any]] = [ms.load, lambda source: ms.compute("reduce", source, op="sum")]
    for call in calls:
        for source, message in (
            (tmp_path, "is a folder, and one file is read here: name one of it"),
            (tmp_path / "*.safetensors", "a pattern is not read here: name one file"),
            ([tmp_path], "read from a path or from bytes; given a list"),
        ):
            with pytest.raises(MaskserveError, match=message):
                call(source)


def test_the_only_variable_taken_as_the_mask_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"data": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(MaskserveError, match=r"no tensor to compute on.*; data was taken as the mask"):
        ms.compute("reduce", tmp_path / "x.safetensors", op="mean", mask="data")


def test_json_files_load() -> None:
    sales = ms.load(Path(__file__).parent.parent / "examples" / "sales.json")["data"]
    assert sales[2].tolist() == [None] * 4


def test_none_is_a_masked_cell_in_lists_and_assignments() -> None:
    x = ms.masked_tensor([[1.0, None], [None, 4.0]])
    assert x.tolist() == [[1, None], [None, 4]]
    x[1, 1] = None
    x[0, 1] = 5.0
    assert x.tolist() == [[1, 5], [None, None]]


def test_a_name_that_only_requests_have_points_to_the_op() -> None:
    for get in (lambda: ms.value, lambda: m([1.0]).value):
        with pytest.raises(AttributeError, match=r"maskserve\.fill"):
            get()
    assert {"softmax", "amax", "std"} <= set(dir(m([1.0])))
    assert ms.maximum(m([1.0, 5.0]), 3).tolist() == [3, 5]


def test_a_fill_fits_complex_cells() -> None:
    for dtype in (torch.complex64, torch.complex128):
        assert MaskedTensor(torch.ones(2, dtype=dtype), torch.tensor([T, F])).to_tensor(0.5).tolist() == [1, 0.5]


def test_a_pass_that_borrows_a_kernels_name_does_not_get_the_kernel() -> None:
    row = OPS["sum"]
    assert isinstance(row, Reduction)
    borrowed = replace(row, name="other", passes=(replace(row.passes[0], reference="tests.rms_row:Squares"),))
    why_not = backends()[0].why_not(plan(borrowed, (), (3,), dtypes.f32, "cpu"))
    assert why_not is not None
    assert "no kernel" in why_not


def test_a_thread_count_that_is_none_is_an_error_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSERVE_THREADS", "many")
    with pytest.raises(SettingsError, match="MASKSERVE_THREADS"):
        ms.sum(torch.ones(8, 40_000))


def test_an_argument_that_only_torch_takes_is_named() -> None:
    with pytest.raises(UncoveredFunctionError, match=r"torch\.where"):
        torch.where(m([T]))
    with pytest.raises(DtypeError):
        m([1, 2]).view(torch.uint8)


# -- side inputs and functions of a whole tensor ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 0, 2), (0, 4), (3, 0)])
@pytest.mark.parametrize("dim", [0, 1, (0, 1)], ids=str)
def test_a_complex_product_takes_dims_of_size_0(shape: tuple[int, ...], dim: Any) -> None:
    product = ms.prod(ms.masked_tensor(torch.ones(shape, dtype=torch.complex64)), dim)
    assert product.shape == torch.ones(shape).sum(dim).shape
    assert not product.get_mask().any()


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_complex_result_in_a_real_dtype_is_its_real_part_rounded_once() -> None:
    """And a NaN in it is the one NaN of every result."""
    parts = torch.tensor([[1 + 2.0**-8, 3.0], [1 + 3 * 2.0**-8, -5e9], [math.nan, 1.0]], dtype=torch.float64)
    total = ms.cumprod(ms.masked_tensor(torch.view_as_complex(parts).unsqueeze(1)), 1, dtype=torch.bfloat16).get_data()
    assert total.view(torch.int16).flatten().tolist() == [0x3F80, 0x3F82, 0x7FC0]


def test_complex_weights_are_refused_and_not_made_real() -> None:
    with pytest.raises(DtypeError, match="mean: weights are c64; give real ones"):
        ms.mean(m([1.0, 2.0]), weights=torch.tensor([1j, 1.0]))


def test_a_nan_among_the_weights_follows_the_policy() -> None:
    x, weights = m([1.0, 2.0, 5.0]), torch.tensor([1.0, math.nan, 3.0])
    assert math.isnan(ms.mean(x, weights=weights).item())
    assert ms.mean(x, weights=weights, nan="omit").item() == 4.0
    with pytest.raises(NanError, match="nan=raise"):
        ms.mean(x, weights=weights, nan="raise")
    eight = weights.nan_to_num(nan=2.0).to(torch.float8_e5m2)
    assert ms.mean(x, weights=eight, nan="omit").item() == pytest.approx(20 / 6)


@pytest.mark.parametrize("n", [10, 20_000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_that_weighs_nothing_is_one_wherever_it_stands(n: int, value: float) -> None:
    x, weights = torch.ones(n), torch.ones(n)
    x[0], weights[: n // 2] = value, 0.0
    assert math.isnan(ms.mean(x, weights=weights).item())
    assert math.isnan(ms.var(x, weights=weights, correction=0).item())


def test_several_results_by_name_can_be_copied_and_pickled() -> None:
    given = ms.unique(m([3, 1, 3], [T, T, F]), return_counts=True)
    for found in (pickle.loads(pickle.dumps(given)), copy.deepcopy(given), copy.copy(given)):
        assert type(found).__name__ == "unique"
        assert (found.values.tolist(), found.counts.tolist()) == ([1, 3], [1, 1])
    assert repr(given).startswith("unique(values=masked_tensor([1, 3])")


def test_unique_takes_torchs_words() -> None:
    x = m([[3.0, 1.0], [3.0, 2.0]], [[T, T], [T, F]])
    assert torch.unique(x).tolist() == [1.0, 3.0]
    values, inverse, counts = torch.unique(x, sorted=False, return_inverse=True, return_counts=True)
    assert (values.tolist(), inverse.tolist(), counts.tolist()) == ([1.0, 3.0], [[1, 0], [1, None]], [1, 2])
    with pytest.raises(UncoveredFunctionError, match="dim"):
        torch.unique(x, dim=0)


def test_torch_load_takes_a_masked_tensor_without_being_told_to_trust_it(tmp_path: Path) -> None:
    torch.save({"x": m([1.0, 2.0], [T, F])}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["x"].tolist() == [1.0, None]


def test_a_fill_that_bools_cannot_hold_is_told_of_those_they_can() -> None:
    with pytest.raises(DtypeError, match="fill 0 does not fit bool; give False or True"):
        (m([1.0, 2.0], [T, F]) > 1).to_tensor(0)


def test_foreign_arrays_of_every_make_come_in() -> None:
    a = np.ma.masked_array(np.arange(6.0).reshape(2, 3), [[0, 1, 0], [0, 0, 1]])
    assert ms.masked_tensor(a[:, ::-1]).tolist() == [[2, None, 0], [None, 4, 3]]
    assert ms.masked_tensor(np.arange(3).astype(">i2")).tolist() == [0, 1, 2]
    pd, xr = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    assert ms.masked_tensor(pd.Series([1, None, 3], dtype="Int64")).tolist() == [1, None, 3]
    assert ms.masked_tensor(pd.DataFrame({"a": [1.5, None]})).tolist() == [[1.5], [None]]
    big = 2**60 + 1  # which float64 does not hold
    for dtype, cells in (
        ("Int64", [big, None]),
        ("Float32", [0.5, None]),
        ("boolean", [True, None]),
        ("UInt8", [7, None]),
    ):
        array = pd.array(cells, dtype=dtype)
        found = [ms.masked_tensor(array), ms.as_masked_tensor(pd.DataFrame({"a": array, "b": array})[["a"]]).squeeze(1)]
        assert [made.tolist() for made in found] == [cells] * 2
        assert [str(made.dtype) for made in found] == [f"torch.{dtype.lower().replace('boolean', 'bool')}"] * 2
    with pytest.raises(DtypeError, match="convert it to numbers"):
        ms.masked_tensor(pd.Series(["a", "b"]))
    assert ms.masked_tensor(xr.DataArray([1.0, math.nan])).tolist() == [1, None]
    with pytest.raises(DtypeError, match="convert it to numbers"):
        ms.masked_tensor(np.array(["2020-01-01"], "M8[D]"))


def test_weights_on_another_grid_are_refused(tmp_path: Path) -> None:
    def grid(name: str, tensor: torch.Tensor, lat: list[float]) -> Path:
        path = tmp_path / f"{name}.safetensors"
        dims = {name: ("lat",), "lat": ("lat",)}
        ms.save({name: tensor, "lat": torch.tensor(lat)}, path, dims=dims)
        return path

    rain = grid("rain", torch.tensor([1.0, 3.0]), [-30, 30])
    words = {"op": "mean", "dim": "lat", "weights": "w"}
    same = grid("area", torch.tensor([1.0, 3.0]), [-30, 30])
    assert ms.load(ms.compute("reduce", rain, sides={"w": same}, **words).to_bytes())["rain"].item() == 2.5
    turned = grid("other", torch.tensor([3.0, 1.0]), [30, -30])
    with pytest.raises(ShapeError, match="the coordinate lat of w differs"):
        ms.compute("reduce", rain, sides={"w": turned}, **words)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_coordinates_that_differ_by_rounding_alone_are_the_same(at_once: int) -> None:
    def are_same(mine: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> bool:
        cut = [[cells[i : i + at_once] for i in range(0, len(cells), at_once)] for cells in (mine, theirs)]
        return same_places(lambda: iter(cut[0]), lambda: iter(cut[1]))

    lat = np.array([-30.0, 0.1, 30.0])
    assert are_same(lat, lat.astype(np.float32))
    assert are_same(np.array([1.0, math.nan]), np.array([1.0, math.nan]))
    hours = np.array([1_000_000, 1_000_001, 1_000_002])
    assert not are_same(hours, hours + 1)
    assert not are_same(lat, lat[::-1])
    near = np.array([0.0, math.nan, 1e-6, 1.0])  # the least way, and so what is near, may lie between two parts
    assert not are_same(near, near + np.array([0, 0, 1e-7, 0]))


def test_text_where_a_payload_belongs_is_called_text() -> None:
    for text in (b"1.0\t--\t3.0\n4.0\t2.0\n", b"a,b\n1,2\n3,4\n", b"{not json"):
        with pytest.raises(PayloadError, match=r"but text|JSON"):
            ms.load(text)


def test_several_quantiles_come_with_their_coordinate(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ms.save({"x": torch.arange(5.0)}, path, dims={"x": ("time",)})
    answer = ms.load(ms.compute("reduce", path, op="quantile", q="0.25,0.5", dim="time").to_bytes())
    assert answer.dims == {"x": ("quantile",), "quantile": ("quantile",)}
    assert (answer["x"].tolist(), answer["quantile"].tolist()) == ([1, 2], [0.25, 0.5])


def test_many_quantiles_do_not_outgrow_their_question() -> None:
    body = to_bytes([output("x", torch.zeros(200_000, 1))], {})
    with pytest.raises(TooLargeError, match="may have at most"):
        ms.compute("reduce", body, op="quantile", q=",".join(["0.5"] * 256), dim=1)
