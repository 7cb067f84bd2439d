"""Sparse tensors: what they are made of and give, payloads of them, and what hostile ones may not do."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import maskserve as ms
from maskserve.errors import (
    DtypeError,
    MaskError,
    MaskMismatchError,
    MaskserveError,
    NotComputableError,
    PayloadError,
    ShapeError,
    TooLargeError,
    UncoveredFunctionError,
)
from maskserve.payload.format import BytesPayload, Output, encode
from maskserve.payload.tensors import output
from tests.command_line import Maskserve, folder_fixture, maskserve_fixture  # noqa: F401
from tests.http_service import running
from tests.samples import Forged

INDICES = torch.tensor([[0, 1, 1], [2, 0, 2]])


def coo(values: Any, indices: torch.Tensor = INDICES, shape: tuple[int, ...] = (2, 3), **more: Any) -> torch.Tensor:
    made: torch.Tensor = torch.sparse_coo_tensor(
        indices, torch.as_tensor(values), shape, check_invariants=False, **more
    )
    return made


def csr(crow: list[int], columns: list[int], values: Any, shape: tuple[int, ...]) -> torch.Tensor:
    made: torch.Tensor = torch.sparse_csr_tensor(crow, columns, torch.as_tensor(values), shape, check_invariants=False)
    return made


def s1() -> ms.MaskedTensor:
    return ms.masked_tensor(torch.tensor([[0.0, 0, 3], [4, 0, 5]]), torch.tensor([[False, False, True]]).expand(2, 3))


def listed(tensor: Any, digits: int = 4) -> Any:
    def short(cell: Any) -> Any:
        return [short(one) for one in cell] if isinstance(cell, list) else cell if cell is None else round(cell, digits)

    return short(tensor.tolist())


# -- the cases of the specification -------------------------------------------------------------------------------


def test_s1_a_strided_tensor_stores_its_valid_cells() -> None:
    as_coo, as_csr = s1().to_sparse(), s1().to_sparse_csr()
    assert as_coo.layout is torch.sparse_coo
    assert as_csr.layout is torch.sparse_csr
    assert as_coo.get_data().indices().tolist() == [[0, 1], [2, 2]]
    assert as_csr.get_data().crow_indices().tolist() == [0, 1, 2]
    assert as_csr.get_data().col_indices().tolist() == [2, 2]
    for made in (as_coo, as_csr):
        assert made.get_data().values().tolist() == [3, 5]
        assert made.nnz == 2
        assert listed(made.to_dense()) == [[None, None, 3], [None, None, 5]]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["coo", "csr"])
def test_s3_and_s5_sin_and_reductions_of_each_layout(layout: torch.layout) -> None:
    made = s1().to_sparse(layout)
    assert torch.sin(made).layout is layout  # type: ignore[arg-type]  # ours
    assert listed(ms.sin(made)) == [[None, None, 0.1411], [None, None, -0.9589]]
    assert (ms.sum(made).item(), ms.sum(made, 1).tolist(), ms.amin(made).item()) == (8, [3, 5], 3)


def test_s4_two_operands_of_one_pattern() -> None:
    mask = coo([True, False, True])
    v1, v2 = ms.masked_tensor(coo([3.0, 4, 5]), mask), ms.masked_tensor(coo([20.0, 30, 40]), mask)
    assert listed(v2 / v1) == [[None, None, 6.6667], [None, None, 8]]
    assert listed(v1 * v2) == [[None, None, 60], [None, None, 200]]


def test_s7_a_stored_masked_cell_beside_one_that_is_valid() -> None:
    one = ms.masked_tensor(coo([3.0, 4, 5]), coo([True, False, True]))
    other = ms.as_masked_tensor(coo([1.0, 1, 1]))
    added = one + other
    assert (added.nnz, listed(added)) == (3, [[None, None, 4], [None, None, 6]])


def test_s9_a_csr_tensor_with_a_mask() -> None:
    mask = csr([0, 2, 4], [0, 1, 0, 1], [True, False, False, True], (2, 2))
    made = ms.masked_tensor(csr([0, 2, 4], [0, 1, 0, 1], [1.0, 2, 3, 4], (2, 2)), mask)
    assert listed(made) == [[1, None], [None, 4]]
    assert repr(made).endswith("layout=torch.sparse_csr)")


# -- making, looking, copying -------------------------------------------------------------------------------------


def test_a_stored_zero_is_valid_and_what_is_not_stored_is_masked() -> None:
    made = ms.as_masked_tensor(coo([0.0, 4, 5]))
    assert made.tolist() == [[None, None, 0], [4, None, 5]]
    assert ms.amin(made).item() == 0


def test_masks_come_as_sparse_strided_and_bool() -> None:
    data = coo([3.0, 4, 5])
    assert ms.masked_tensor(data, False).tolist() == [[None] * 3] * 2
    strided = torch.tensor([[True, True, True], [False, True, True]])
    assert ms.masked_tensor(data, strided).tolist() == [[None, None, 3], [None, None, 5]]
    assert ms.masked_tensor(data, coo([True], INDICES[:, :1])).tolist() == [[None, None, 3], [None] * 3]
    dense = torch.arange(6.0).reshape(2, 3)
    assert ms.masked_tensor(dense, coo([True, True, False])).tolist() == [[None, None, 2], [3, None, None]]


@pytest.mark.parametrize(
    ("tensor", "error", "says"),
    [
        (lambda: coo([1.0, 2, 3], torch.tensor([[0, 2, 1], [2, 0, 2]])), ShapeError, "dim 0 is outside 0 to 1"),
        (lambda: coo([1.0, 2, 3], torch.tensor([[0, -1, 1], [2, 0, 2]])), ShapeError, "dim 0 is outside"),
        (lambda: coo([1.0, 2, 3], torch.tensor([[0, 0, 1], [2, 2, 2]])), MaskMismatchError, "stores a cell twice"),
        (lambda: csr([0, 1, 3], [2, 0, 3], [1.0, 2, 3], (2, 3)), ShapeError, "column is outside 0 to 2"),
        (lambda: csr([0, 1, 3], [2, 2, 0], [1.0, 2, 3], (2, 3)), ShapeError, "ascend"),
        (lambda: csr([0, 4, 3], [0, 1, 2], [1.0, 2, 3], (2, 3)), ShapeError, "none goes back"),
        (lambda: csr([1, 2, 3], [0, 1, 2], [1.0, 2, 3], (2, 3)), ShapeError, "from 0 up to"),
        (lambda: torch.ones(2, 3).to_sparse_csc(), DtypeError, "give COO or CSR"),
        (lambda: torch.ones(2, 3, 2).to_sparse(2), ShapeError, "dense dims"),
        (lambda: torch.ones(2, 3, 2).to_sparse_csr(), ShapeError, "batch"),
    ],
)  # fmt: skip
def test_torchs_tensors_are_checked_and_refused_in_one_line(tensor: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        ms.as_masked_tensor(tensor())
    assert "\n" not in str(caught.value)


def test_indices_in_any_order_are_sorted() -> None:
    made = ms.as_masked_tensor(coo([5.0, 3, 4], torch.tensor([[1, 0, 1], [2, 2, 0]])))
    assert made.values().tolist() == [3, 4, 5]
    assert made.indices().tolist() == [[0, 1, 1], [2, 0, 2]]


def test_a_mask_valid_where_nothing_is_stored_is_refused() -> None:
    with pytest.raises(MaskMismatchError, match="stores no value"):
        ms.masked_tensor(coo([3.0], INDICES[:, :1]), coo([True, True, True]))


def test_copies_pickles_and_conversions_keep_the_pattern() -> None:
    made = ms.masked_tensor(coo([3.0, 4, 5]), coo([True, False, True]))
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.double(), made.detach()):
        assert other.layout is made.layout
        assert torch.equal(other.indices(), made.indices())
        assert other.tolist() == made.tolist()
    assert made.to_sparse_csr().to_sparse_coo().values().tolist() == [3, None, 5]
    assert made.to_tensor(-1).tolist() == [[-1, -1, 3], [-1, -1, 5]]


INDEXES: tuple[Any, ...] = (
    0, -1, slice(1, 2), slice(None, None, 2), [1, 0, 1], (1, 2), (slice(None), 2), (..., 2), (slice(None), [2, 0]),
)  # fmt: skip


def test_rows_ranges_lists_and_single_cells_are_indexed() -> None:
    dense = s1()
    for made in (dense.to_sparse(), dense.to_sparse_csr()):
        for index in (
            0,
            -1,
            slice(1, 2),
            slice(None, None, 2),
            [1, 0, 1],
            (1, 2),
            (slice(None), 2),
            (..., 2),
            (slice(None), [2, 0]),
        ):
            assert made[index].tolist() == dense[index].tolist(), index
        assert [row.tolist() for row in made] == [row.tolist() for row in dense]
        with pytest.raises(UncoveredFunctionError, match="to_dense"):
            made[0, 2] = 1.0


def test_in_place_operations_change_stored_cells_or_are_refused() -> None:
    made = ms.as_masked_tensor(coo([3.0, 4, 5]))
    made *= 2
    assert made.values().tolist() == [6, 8, 10]
    with pytest.raises(MaskError, match="m = m"):
        made += s1().to_sparse()


def test_a_large_tensor_shows_the_ends_of_what_it_stores() -> None:
    made = ms.as_masked_tensor(coo(torch.arange(9.0), torch.arange(9).repeat(2, 1), (10**6, 10**6)))
    assert "(0, 0): 0.0000" in repr(made)
    assert "nnz=9" in repr(made)
    assert len(repr(made)) < 400


def test_junk_under_stored_masked_cells_changes_no_gradient() -> None:
    gradients = []
    for junk in (0.0, float("nan"), float("inf"), 3e38):
        leaf = ms.masked_tensor(coo([3.0, junk, 5]), coo([True, False, True]), requires_grad=True)
        (ms.softmax(leaf, 1).sum() + (leaf * leaf).sum() + ms.std(leaf, correction=0)).backward()
        gradients.append(leaf.grad.tolist())
    assert all(gradient == gradients[0] for gradient in gradients)
    assert gradients[0][1][0] is None


def test_gradients_reach_a_plain_values_tensor_and_a_strided_operand() -> None:
    values = torch.tensor([3.0, 4, 5], requires_grad=True)
    other = torch.ones(2, 3, requires_grad=True)
    sparse = ms.as_masked_tensor(
        torch.sparse_coo_tensor(INDICES, values, (2, 3), check_invariants=False, is_coalesced=True)
    )
    (sparse * other).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1, 1, 1]
    assert other.grad is not None
    assert other.grad.tolist() == [[0, 0, 3], [4, 0, 5]]


def test_gradcheck_holds_through_a_reduction_and_a_normalization() -> None:
    def function(values: torch.Tensor) -> torch.Tensor:
        made = ms.as_masked_tensor(
            torch.sparse_coo_tensor(INDICES, values, (2, 3), check_invariants=False, is_coalesced=True)
        )
        return (ms.softmax(made, 1) * made).sum(0).to_tensor(0)

    assert torch.autograd.gradcheck(function, torch.tensor([3.0, 4, 5], dtype=torch.float64, requires_grad=True))


def test_tensors_without_cells_give_what_strided_ones_give() -> None:
    empty, narrow, masked = torch.zeros(0, 3), torch.zeros(2, 0), ms.MaskedTensor(torch.ones(2, 3), False)
    for dense in (ms.MaskedTensor(empty), ms.MaskedTensor(narrow), masked):
        for made in (dense.to_sparse(), dense.to_sparse_csr()):
            assert made.nnz == 0
            for dim in (0, 1, None):
                assert ms.sum(made, dim).tolist() == ms.sum(dense, dim).tolist()
                assert ms.count(made, dim).tolist() == ms.count(dense, dim).tolist()
                assert ms.median(made, dim).tolist() == ms.median(dense, dim).tolist()
            assert ms.softmax(made, 1).tolist() == ms.softmax(dense, 1).tolist()
            assert (made + made).tolist() == dense.tolist()
            assert (made @ torch.ones(made.shape[1], 2)).tolist() == (dense @ torch.ones(made.shape[1], 2)).tolist()


# -- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch, maskserve as ms
n = 10_000
places = torch.randint(0, n * n, (n * n // 1000,), generator=torch.Generator().manual_seed(1)).unique()
made = torch.sparse_coo_tensor(torch.stack([places // n, places % n]), torch.ones(len(places)), (n, n), check_invariants=False)
small = ms.masked_tensor(torch.ones(64, 64)).to_sparse_csr()
def ops(m, k):
    for dim in (0, 1, None):
        ms.sum(m, dim), ms.argmax(m, dim), ms.median(m, dim)
    return ms.softmax(m, 1), m * m, m[:5], m.t(), m @ torch.ones(k, 4)
ops(small, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops(ms.as_masked_tensor(made).to_sparse_csr(), n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_tensor_of_a_hundred_million_cells_is_never_spread_out() -> None:
    """With every cell it has 500 MB; 100,000 stored ones have 1.2 MB, and a block of 2**20 cells 5 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6, done.stdout


def test_a_shape_that_nobody_could_hold_is_reduced_at_once() -> None:
    made = ms.as_masked_tensor(coo([2.0, 3, 5], torch.tensor([[0, 7, 2**40], [1, 2**20, 3]]), (2**41, 2**21)))
    assert ms.sum(made).item() == 10
    assert ms.argmax(made).item() == 2**40 * 2**21 + 3
    assert ms.median(made).item() == 3


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: ms.sum(m, 1),
        lambda m: ms.argmax(m, 1),
        lambda m: m @ torch.ones(4, 1),
        lambda m: m.requires_grad_().sum(1),
    ],
    ids=["sum", "argmax", "product", "followed"],
)
def test_a_result_that_nobody_could_hold_is_refused_in_one_line(ask: Callable[[Any], Any]) -> None:
    """It has a cell for each row, stored or not."""
    made = ms.as_masked_tensor(coo([2.0], torch.tensor([[0], [3]]), (2**45, 4)))
    with pytest.raises(TooLargeError, match=r"of shape \(35184372088832,.* bytes, and they are not there"):
        ask(made)


# -- payloads -----------------------------------------------------------------------------------------------------


def payload(tensors: dict[str, torch.Tensor], shapes: Any = '{"x":[2,3]}') -> bytes:
    metadata = {} if shapes is None else {"maskserve.shapes": shapes if isinstance(shapes, str) else json.dumps(shapes)}
    outputs: list[Output] = [output(name, tensor) for name, tensor in tensors.items()]
    return b"".join(encode(outputs, metadata).chunks)


GOOD_COO = {"x.coo_indices": INDICES, "x.coo_values": torch.tensor([3.0, 4, 5])}
GOOD_CSR = {
    "x.crow_indices": torch.tensor([0, 1, 3]), "x.col_indices": torch.tensor([2, 0, 2]), "x.values": torch.tensor([3.0, 4, 5]),
}  # fmt: skip
HUGE = torch.tensor([[0, 2**38], [1, 2**20]])

HOSTILE: dict[str, tuple[dict[str, torch.Tensor], Any]] = {
    "an index out of range": (GOOD_COO | {"x.coo_indices": INDICES + 1}, [2, 3]),
    "a negative index": (GOOD_COO | {"x.coo_indices": INDICES - 1}, [2, 3]),
    "unsorted": (GOOD_COO | {"x.coo_indices": INDICES.flip(1)}, [2, 3]),
    "a cell twice": (GOOD_COO | {"x.coo_indices": torch.tensor([[0, 1, 1], [2, 2, 2]])}, [2, 3]),
    "fewer values than indices": (GOOD_COO | {"x.coo_values": torch.ones(2)}, [2, 3]),
    "values of two dims": (GOOD_COO | {"x.coo_values": torch.ones(3, 1)}, [2, 3]),
    "float indices": (GOOD_COO | {"x.coo_indices": INDICES.double()}, [2, 3]),
    "other dims than the shape": (GOOD_COO, [2, 3, 1]),
    "no shape": (GOOD_COO, None),
    "a shape that is no list": (GOOD_COO, {"x": 6}),
    "a negative size": (GOOD_COO, {"x": [-2, 3]}),
    "an overflow": (GOOD_COO, {"x": [2**40, 2**40]}),
    "an overflow hidden by 0": (GOOD_COO, {"x": [2**62, 0]}),
    "no values": ({"x.coo_indices": INDICES}, [2, 3]),
    "two forms": (GOOD_COO | GOOD_CSR, [2, 3]),
    "x itself": (GOOD_COO | {"x": torch.ones(2, 3)}, [2, 3]),
    "a mask of the whole shape": (GOOD_COO | {"x.mask": torch.ones(2, 3).bool()}, [2, 3]),
    "lengths": (GOOD_COO | {"x.lengths": torch.tensor([1, 2])}, [2, 3]),
    "a column out of range": (GOOD_CSR | {"x.col_indices": torch.tensor([2, 0, 3])}, [2, 3]),
    "columns that do not ascend": (GOOD_CSR | {"x.col_indices": torch.tensor([2, 2, 0])}, [2, 3]),
    "a column twice": (GOOD_CSR | {"x.col_indices": torch.tensor([2, 0, 0])}, [2, 3]),
    "rows that go back": (GOOD_CSR | {"x.crow_indices": torch.tensor([0, 4, 3])}, [2, 3]),
    "rows beyond the values": (GOOD_CSR | {"x.crow_indices": torch.tensor([0, 1, 9])}, [2, 3]),
    "too few rows": (GOOD_CSR | {"x.crow_indices": torch.tensor([0, 3])}, [2, 3]),
    "CSR of three dims": (GOOD_CSR, [2, 3, 1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_is_refused_in_one_line(name: str) -> None:
    tensors, shape = HOSTILE[name]
    body = payload(tensors, shape if shape is None or isinstance(shape, dict) else {"x": shape})
    for ask in (lambda: ms.load(body), lambda: ms.compute("reduce", body, op="sum", dim=1)):
        with pytest.raises(MaskserveError) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_what_would_be_out_of_proportion_is_refused_before_memory_is_spent() -> None:
    body = payload({"x.coo_indices": HUGE, "x.coo_values": torch.ones(2)}, {"x": [2**39, 2**21]})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for verb, words in (
        ("reduce", {"op": "sum", "dim": 1}), ("fill", {"op": "value", "value": 0}), ("eval", {"expr": "sum(x)"}),
        ("mask", {"greater": 1}),
    ):  # fmt: skip
        with pytest.raises((TooLargeError, NotComputableError, PayloadError)):
            ms.compute(verb, body, **words)
    assert ms.load(ms.compute("reduce", body, op="sum").to_bytes())["x"].item() == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100e3


@pytest.mark.parametrize("form", ["coo", "csr"])
def test_a_payload_comes_back_in_the_form_of_its_question(form: str, tmp_path: Path) -> None:
    made = s1().to_sparse() if form == "coo" else s1().to_sparse_csr()
    path = tmp_path / "x.safetensors"
    ms.save({"x": made}, path, dims={"x": ("a", "b")})
    read = ms.load(path)
    assert read.dims == {"x": ("a", "b")}
    assert read["x"].layout is made.layout
    assert read["x"].tolist() == made.tolist()
    answer = ms.compute("softmax", path, op="softmax", dim="b")
    again = ms.load(answer.to_bytes())["x"]
    assert (again.layout, again.tolist()) == (made.layout, [[None, None, 1], [None, None, 1]])
    assert ms.load(ms.compute("reduce", path, op="mean", dim="b").to_bytes())["x"].tolist() == [3, 5]
    assert ms.load(ms.compute("eval", path, expr="x * 2").to_bytes())["data"].tolist() == [
        [None, None, 6],
        [None, None, 10],
    ]
    names = set(BytesPayload(answer.to_bytes()).header.tensors)
    parts = {"coo_indices", "coo_values"} if form == "coo" else {"crow_indices", "col_indices", "values"}
    assert names == {"x.mask", *(f"x.{part}" for part in parts)}


def test_the_command_line_reads_and_writes_sparse_tensors(tmp_path: Path) -> None:
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    ms.save({"x": s1().to_sparse_csr()}, path)

    def said(*words: str) -> str:
        command = [str(Path(sys.executable).parent / "maskserve"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert said("reduce", "--op", "sum", "--dim", "1", str(path)) == "3.0\n5.0\n"
    assert said("softmax", "--dim", "1", str(path)) == "--\t--\t1.0\n--\t--\t1.0\n"
    assert "(2, 3)" in said("info", "--stats", str(path))
    assert "ok" in said("validate", str(path))
    said("softmax", "--dim", "1", str(path), "-o", str(out))
    assert ms.load(out)["x"].layout is torch.sparse_csr
    assert said("eval", "--expr", "x + 1", str(path)) == "--\t--\t4.0\n--\t--\t6.0\n"
    said("convert", str(path), str(tmp_path / "x.npz"))
    assert ms.load(tmp_path / "x.npz")["x"].tolist() == s1().tolist()


def test_the_service_answers_as_the_library_and_refuses_hostile_bodies() -> None:
    good = payload(GOOD_CSR)
    with running() as service:
        for path, verb, words in (
            ("/v1/reduce?op=var&dim=1&correction=0", "reduce", {"op": "var", "dim": 1, "correction": 0}),
            ("/v1/softmax?op=softmax&dim=0", "softmax", {"op": "softmax", "dim": 0}),
        ):
            assert service.post(path, good).content == ms.compute(verb, good, **words).to_bytes()
        shown = service.post("/v1/softmax?op=softmax&dim=1", good, Accept="application/json").json()
        assert shown["x"]["values"] == [None, None, 1.0, 0.26894143, None, 0.7310586]
        for name, (tensors, shape) in HOSTILE.items():
            body = payload(tensors, shape if shape is None or isinstance(shape, dict) else {"x": shape})
            reply = service.post("/v1/reduce?op=sum&dim=1", body)
            assert 400 <= reply.status_code < 500, (name, reply.text)


@pytest.mark.parametrize("equation", ["ui,id->ud", "ij,kj->ik", "ij,j->i", "ji,j->i"])
def test_einsum_of_a_sparse_and_a_strided_tensor_is_that_of_two_strided_ones(equation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    strided = ms.masked_tensor(torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator) < 0.5)
    shape = {"ui,id->ud": (5, 3), "ij,kj->ik": (4, 5), "ij,j->i": (5,), "ji,j->i": (6,)}[equation]
    other = torch.randn(shape, generator=generator)
    found, expected = (torch.einsum(equation, x, other) for x in (strided.to_sparse_csr(), strided))
    assert torch.equal(found.get_mask(), expected.get_mask())
    torch.testing.assert_close(found.to_tensor(0), expected.to_tensor(0))
    torch.testing.assert_close(
        torch.tensordot(strided.to_sparse_csr(), torch.ones(5, 2), 1).to_tensor(0),
        torch.tensordot(strided, torch.ones(5, 2), 1).to_tensor(0),
    )


def test_diff_compares_cells_where_they_are_and_not_as_they_are_stored(tmp_path: Path, maskserve: Maskserve) -> None:
    dense = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    mask = torch.eye(3, dtype=torch.bool)
    moved, fewer = mask.roll(1, 1), mask & (dense < 3)
    cases = {
        "a": ms.masked_tensor(dense, mask).to_sparse(), "csr": ms.masked_tensor(dense, mask).to_sparse_csr(),
        "moved": ms.masked_tensor(dense.roll(1, 1), moved).to_sparse(), "fewer": ms.masked_tensor(dense, fewer).to_sparse(),
        "strided": ms.masked_tensor(dense, mask), "other": ms.masked_tensor(dense * 2, mask).to_sparse(),
        "none": ms.masked_tensor(dense, torch.zeros_like(mask)).to_sparse(),
    }  # fmt: skip
    for name, tensor in cases.items():
        ms.save({"x": tensor}, tmp_path / f"{name}.safetensors")
    for name, says in (("a", ""), ("csr", ""), ("strided", ""), ("moved", "6 of 9 cells valid in one alone"), ("other", "3 of 3"),
                       ("fewer", "1 of 9 cells valid in one alone, the first at [2, 2]"), ("none", "3 of 9 cells")):  # fmt: skip
        for pair in (("a", name), (name, "a")):
            ran = maskserve("diff", *(str(tmp_path / f"{one}.safetensors") for one in pair))
            assert (ran.code, says in ran.text) == (1 if says else 0, True), (pair, ran.out, ran.err)


def test_states_of_a_sparse_tensor_are_refused_before_anything_is_written(tmp_path: Path, maskserve: Maskserve) -> None:
    path = tmp_path / "x.safetensors"
    ms.save({"x": ms.masked_tensor(torch.eye(4), torch.eye(4) > 0).to_sparse()}, path)
    ran = maskserve("reduce", "--op", "sum", "--shard", "0/2", "--state", str(tmp_path / "s.state"), str(path))
    assert (ran.code, "is sparse" in ran.err) == (65, True), ran.err
    assert not (tmp_path / "s.state").exists()


# -- broadcasting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["intersect", "union", "strict"])
@pytest.mark.parametrize("shapes", [((2, 3), (1, 3)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((0, 3), (1, 3))], ids=str)
def test_sparse_operands_broadcast_as_strided_ones(policy: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    for share in (0.0, 0.5):
        x, y = (ms.masked_tensor(torch.ones(one), torch.rand(one, generator=generator) >= share) for one in shapes)
        try:
            wanted = ms.add(x, y, policy=policy).tolist()
        except MaskMismatchError:
            with pytest.raises(MaskMismatchError):
                ms.add(x.to_sparse(), y.to_sparse(), policy=policy)
        else:
            assert ms.add(x.to_sparse(), y.to_sparse(), policy=policy).tolist() == wanted


def test_an_operand_that_broadcasts_is_asked_for_cells_and_not_spread_out() -> None:
    few = ms.as_masked_tensor(coo([3.0, 4, 5], shape=(3, 2**60)))
    one = ms.as_masked_tensor(coo([2.0], torch.tensor([[0], [0]]), (1, 1)))
    assert (few * one).values().tolist() == [6, 8, 10]
    assert (one * few).values().tolist() == [6, 8, 10]
    with pytest.raises(MaskMismatchError):
        ms.add(few, one, policy="strict")
    with pytest.raises(TooLargeError, match=r"to_dense\(\)"):
        ms.add(few, one, policy="union")


@pytest.mark.parametrize(
    "derive",
    [lambda m: m.reshape(-1), lambda m: m.unsqueeze(0), lambda m: m.to_sparse_coo(), lambda m: m[:], lambda m: m[0:2],
     lambda m: m[...], lambda m: m[()], lambda m: m.narrow(0, 0, 2), lambda m: m.unsqueeze(0)[0]],
)  # fmt: skip
def test_a_derived_tensor_is_one_of_its_own_and_keeps_history(derive: Any) -> None:
    source = s1().to_sparse_csr()
    derive(source).requires_grad_()
    assert not source.requires_grad
    source.requires_grad_()
    derive(source).sum().backward()
    assert source.grad.values().tolist() == [1, 1]
    changed = s1().to_sparse_csr()
    view = derive(changed)
    view *= 2
    assert changed.values().tolist() == [6, 10]


@pytest.mark.parametrize(
    "index",
    [None, torch.tensor(1), torch.tensor(-1), np.int64(1), [], (0, []), (None, 0), (slice(None), None, [0, 2]), (..., None),
     (0, None, 1), (None, ..., None), (slice(None), torch.tensor(0)), [True, False], torch.tensor([False, True])],
    ids=str,
)  # fmt: skip
def test_what_indexes_a_strided_tensor_indexes_a_sparse_one(index: Any) -> None:
    made, wanted = s1().to_sparse()[index], s1()[index]
    assert (made.shape, made.tolist()) == (wanted.shape, wanted.tolist())


@pytest.mark.parametrize(
    ("index", "says"),
    [((..., ...), "2 times"), ("a", "is str"), (["a"], "is list"), ([True], "has 1 cells"), (slice("a", None), "a slice"),
     (2, "out of range"), (torch.tensor(2), "out of range"), ((0, 0, 0), "3 indices"), (1.5, "to_dense"), (True, "to_dense")],
    ids=str,
)  # fmt: skip
def test_what_is_no_index_is_refused_in_one_line(index: Any, says: str) -> None:
    with pytest.raises(MaskserveError, match=says) as caught:
        s1().to_sparse()[index]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [[-1], [2], [True, False], [0.5], [[0]]], ids=str)
def test_index_select_takes_what_it_takes_of_a_strided_tensor(index: list[Any]) -> None:
    for tensor in (s1(), s1().to_sparse()):
        with pytest.raises(MaskserveError, match="index_select"):
            torch.index_select(tensor, 0, torch.tensor(index))  # type: ignore[arg-type]  # ours
    assert torch.index_select(s1().to_sparse(), 0, torch.tensor([1, 0])).tolist() == s1()[[1, 0]].tolist()  # type: ignore[arg-type]  # ours


def test_shapes_that_nobody_could_hold_are_joined_and_reshaped() -> None:
    row = ms.as_masked_tensor(coo([3.0], torch.tensor([[7]]), (2**62 - 1,)))
    matrix = ms.as_masked_tensor(coo([3.0], torch.tensor([[1], [2]]), (2**31, 2**31)))
    assert row.unsqueeze(0).shape == (1, 2**62 - 1)
    assert torch.cat([row, row]).indices().tolist() == [[7, 2**62 + 6]]  # type: ignore[list-item]  # ours
    assert torch.stack([row, row], 1).shape == (2**62 - 1, 2)  # type: ignore[list-item]  # ours
    assert matrix.reshape(-1).indices().tolist() == [[2**31 + 2]]
    for join in (torch.cat, torch.stack):
        with pytest.raises(ShapeError, match=r"more than 2\^63 - 1 cells"):
            join([matrix, matrix])  # type: ignore[list-item]  # ours


def test_what_needs_every_cell_is_refused_in_one_line() -> None:
    made = s1().to_sparse()
    huge = ms.as_masked_tensor(coo([3.0], torch.tensor([[7]]), (2**62,)))
    for refused, says in (
        (lambda: torch.nn.functional.dropout(made, 0.5), "dropout takes strided"),  # type: ignore[arg-type]  # ours
        (lambda: made.to("meta"), "meta device takes strided"),
        (lambda: made._data, "this operation takes strided"),
        (huge.to_dense, "keep it sparse"),
        (huge.tolist, "keep it sparse"),
    ):
        with pytest.raises(MaskserveError, match=says) as caught:
            refused()
        assert "\n" not in str(caught.value)


# -- what comes from scipy, and what is said of sparse tensors elsewhere -------------------------------------------------


@pytest.mark.parametrize(
    "name", ["csr_matrix", "csr_array", "coo_matrix", "coo_array", "csc_array", "lil_matrix", "dok_array"]
)
def test_scipys_matrices_come_in_by_what_they_store(name: str) -> None:
    cells = np.array([[0.0, 2, 0], [1, 0, 3]])
    made = ms.masked_tensor(getattr(scipy.sparse, name)(cells))
    assert made.layout is (torch.sparse_csr if name.startswith("csr") else torch.sparse_coo)
    assert listed(made) == [[None, 2, None], [1, None, 3]]
    assert ms.sum(made, 1).tolist() == [2, 4]


def test_cells_of_scipy_that_stand_twice_are_added_and_the_matrix_is_left_as_it_was() -> None:
    twice = scipy.sparse.coo_array((np.array([1.0, 2, 4]), (np.array([0, 0, 1]), np.array([1, 1, 0]))), shape=(2, 2))
    rows = scipy.sparse.csr_array((np.array([4, 1, 2]), np.array([1, 0, 1]), np.array([0, 3, 3])), shape=(2, 2))
    assert listed(ms.masked_tensor(twice)) == [[None, 3], [4, None]]
    assert listed(ms.masked_tensor(rows)) == [[1, 6], [None, None]]
    assert (twice.nnz, rows.nnz) == (3, 3)


def test_what_takes_every_cell_says_which_tensor_is_sparse(maskserve: Maskserve) -> None:
    wide = torch.sparse_coo_tensor(INDICES, torch.ones(3), (5000, 5000), check_invariants=False)
    ms.save({"x": ms.as_masked_tensor(wide)}, "wide.safetensors")
    ran = maskserve("eval", "--expr", "x + 1", "wide.safetensors")
    assert ran.code == 65
    assert (
        "125000000 bytes: x is sparse, and the answer has every cell; to this question it may have at most" in ran.err
    )
    ms.save(
        {"y": ms.as_masked_tensor(torch.ones(3, 3)), "w": ms.as_masked_tensor(torch.eye(3).to_sparse())},
        "two.safetensors",
    )
    ran = maskserve("reduce", "--op", "mean", "--tensor", "y", "--weights", "w", "two.safetensors")
    assert ran.code == 2
    assert "w is sparse, and weights takes a tensor with every cell: to_dense() makes one" in ran.err


@pytest.mark.parametrize("form", ["csr", "coo"])
def test_info_and_head_show_sparse_variables(form: str, maskserve: Maskserve) -> None:
    made = ms.masked_tensor([[None, 1.0, 3.0], [2.0, None, -5.0], [None, None, None]])
    ms.save({"x": made.to_sparse_csr() if form == "csr" else made.to_sparse(), "y": made}, "x.safetensors")
    seen, strided = json.loads(maskserve("head", "-n", "2", "--json", "x.safetensors").out)[::-1]
    assert {**seen, "name": "y"} == strided
    assert seen["values"] == [None, 1.0, 3.0, 2.0, None, -5.0]
    told = {one["name"]: one for one in json.loads(maskserve("info", "--json", "x.safetensors").out)["variables"]}
    assert [(told[name]["layout"], told[name]["n_stored"]) for name in "xy"] == [(form, 4), ("strided", None)]
    assert f"(3, 3), 4 stored ({form.upper()})" in maskserve("info", "x.safetensors").text


def test_the_losses_and_layers_of_the_page_are_those_that_work() -> None:
    x, plain, classes = (
        ms.as_masked_tensor(torch.eye(3).to_sparse()),
        torch.zeros(3, 3),
        torch.zeros(3, dtype=torch.long),
    )
    for loss in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits", "kl_div"):
        assert getattr(ms, loss)(x, plain).item() == pytest.approx(getattr(ms, loss)(x.to_dense(), plain).item())
    assert torch.nn.functional.layer_norm(x, (3,)).layout is torch.sparse_coo  # type: ignore[arg-type]  # ours
    for refused in (lambda: ms.cross_entropy(x, classes), lambda: ms.nll_loss(x, classes)):
        with pytest.raises(UncoveredFunctionError, match="to_dense"):
            refused()


# -- optimizers, expressions, forged pickles ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [ms.optim.SGD, ms.optim.Adam, ms.optim.AdamW, ms.optim.Adagrad], ids=lambda r: r.__name__
)
def test_an_optimizer_moves_stored_cells_as_those_of_the_strided_tensor(rule: Any) -> None:
    dense = ms.masked_tensor([[None, 1.0, 3.0], [2.0, None, -5.0]])
    found = []
    for make in (lambda m: m.to_sparse_csr(), lambda m: m.clone()):
        param = make(dense).requires_grad_()
        moving = rule([param], lr=0.1, weight_decay=0.01)
        for _ in range(3):
            moving.zero_grad()
            (param * param).sum().backward()
            moving.step()
        found.append(param.detach().to_dense())
    assert torch.equal(found[0].get_mask(), dense.get_mask())
    assert torch.equal(found[0].to_tensor(0.0), found[1].to_tensor(0.0))
    assert not torch.equal(found[0].to_tensor(0.0), dense.to_tensor(0.0))


@pytest.mark.parametrize(
    "text",
    [
        "x * 2", "sum(x, dim=0)", "softmax(x + y, dim=1)", "mean(x)", "matmul(x, z)", "where(x > 2, x, 0)", "mse_loss(x, y)",
        "transpose(x, dim0=0, dim1=1)", "x * sum(x * 2 + y, dim=1, keepdim=True)", "x",
    ],
)  # fmt: skip
def test_an_expression_of_sparse_tensors_is_that_of_strided_ones(text: str) -> None:
    dense = ms.masked_tensor([[None, 1.0, 3.0], [2.0, None, -5.0]])
    others = {"y": ms.masked_tensor([[0.5, None, 1.0], [1.0, 1.0, 2.0]]), "z": torch.ones(3, 2)}
    given = {name: other for name, other in others.items() if name in text.split("sum")[-1] or name in text}
    found, expected = (ms.eval(text, x=x, **given) for x in (dense.to_sparse_csr(), dense))
    assert torch.equal(found.to_dense().get_mask(), expected.get_mask())
    assert torch.equal(found.to_dense().to_tensor(0.0), expected.to_tensor(0.0))
    leaf = dense.to_sparse_csr().requires_grad_()
    assert ms.eval(text, x=leaf, **given).requires_grad


def test_what_an_expression_of_sparse_tensors_lacks_is_refused_at_its_column() -> None:
    x = ms.masked_tensor([[None, 1.0]]).to_sparse()
    with pytest.raises(UncoveredFunctionError, match=r"^column 5: .*to_dense\(\)"):
        ms.eval("1 + fill(x, value=0)", x=x)
    with pytest.raises(UncoveredFunctionError, match="a plain table"):
        ms.embedding(torch.tensor([0]), x)


def test_the_layout_of_a_mask_is_that_of_the_stored_cells() -> None:
    x = ms.masked_tensor([[None, 1.0]]).to_sparse()
    assert (x.mask_layout, x.values().mask_layout) == ("bool", "bool")
    assert ms.as_masked_tensor(torch.eye(2).to_sparse()).mask_layout == "none"


def test_a_forged_pickle_of_a_sparse_tensor_is_refused_in_one_line() -> None:
    cells, at = ms.masked_tensor([1.0, 2.0]), torch.tensor([0, 1])
    forged = [
        (True, "ab", at, cells), (True, (2.0, 3), at, cells), (True, (2, 3), [0, 1], cells), (True, (2, 3), at, None),
        (True, (2, 3), at, torch.ones(2)), (True, (2, 3), at.to("meta"), cells), (True, (2, 3), at, cells.to_sparse()),
        (True, (2, 3), at, cells.unsqueeze(1)), (True, (2, 3), at.to_sparse(), cells),
        (True, (2, 3), torch._neg_view(-at), cells),
    ]  # fmt: skip
    for parts in forged:
        with pytest.raises(ShapeError) as refused:
            pickle.loads(pickle.dumps(Forged(ms.sparse._unpickled, *parts)))
        assert "\n" not in str(refused.value)
