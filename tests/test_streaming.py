"""What is read in parts gives the bits of the whole: every row, under budgets of a few kilobytes, from files and from shards."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskserve import answers, dtypes, engine, region_states, regions, requests, room, states, streaming
from maskserve.dtypes import DType
from maskserve.errors import (
    InputChangedError,
    OutOfMemoryError,
)
from maskserve.execution import backend_of
from maskserve.ops import OPS, served
from maskserve.ops.rows import Reduction, Row
from maskserve.payload.format import BytesPayload, Payload, open_payload, to_bytes
from maskserve.payload.tensors import output
from maskserve.plan import Plan, plan
from maskserve.shards import Shard
from maskserve.sources import Held
from tests.samples import MERGEABLE, SLICED, Masked, assert_same_bits, cells, needed, with_junk

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = ((3, 1, 70, 2), (129, 65), (9000,), (2, 5, 4, 3, 2), (70, 9))
BUDGETS = (20_000, 200_000, 20_000_000)
STREAMED = [row for verb in ("reduce", "softmax", "scan", "fill") for row in served(verb)]

every_streamed_row = pytest.mark.parametrize("row", STREAMED, ids=lambda row: row.name)
every_mergeable_row = pytest.mark.parametrize("row", MERGEABLE, ids=lambda row: row.name)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, leaves of states and long slices at sizes that tests can have many of."""
    monkeypatch.setattr(regions, "BLOCK", 1 << 9)
    monkeypatch.setattr(regions, "WIDE", 1 << 4)
    monkeypatch.setattr(regions, "SEEN", 1 << 10)
    monkeypatch.setattr(regions, "LEAST_SEEN", 1 << 4)
    monkeypatch.setattr(region_states, "MOST_STATES", 1 << 6)
    monkeypatch.setattr(engine, "LONG", 1 << 6)
    monkeypatch.setattr(engine, "SMALL", 1 << 6)


def written(answer: answers.Answer) -> bytes:
    """The bytes of an answer that may be streamed."""
    with tempfile.TemporaryFile() as file:
        assert answer.write(file.fileno(), "out") == file.seek(0, 2)
        file.seek(0)
        return file.read()


def dims_of(row: Row, n: int) -> Iterator[Any]:
    """What the row may be asked to work along, of n dims."""
    named = {p.name for p in row.parameters}
    if "dim" not in named:
        yield None
    elif isinstance(row, Reduction):
        yield from (None, *itertools.chain(*(itertools.combinations(range(n), k) for k in range(1, n + 1))))
    else:
        yield from range(n)


def planned(row: Row, dim: Any, sample: Masked) -> Plan:
    said = {**needed(row), **({} if dim is None else {"dim": dim})}
    return plan(row, tuple(said.items()), tuple(sample.data.shape), dtypes.BY_TORCH[str(sample.data.dtype)[6:]], "cpu")  # type: ignore[arg-type]


@every_streamed_row
@given(shape=st.sampled_from(SHAPES), seed=SEEDS, data=st.data())
def test_a_source_gives_the_bits_of_its_cells(row: Row, shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    dtype: DType = data.draw(st.sampled_from(sorted(row.accepts, key=lambda d: d.name)))  # type: ignore[attr-defined]
    sample = with_junk(cells(dtype, shape, seed, row=row))
    dim = data.draw(st.sampled_from([*dims_of(row, len(shape))]))
    of = planned(row, dim, sample)
    whole = engine.run(of, sample.data, sample.mask)
    for budget in BUDGETS:
        try:
            got = streaming.run(of, Held(sample.data, sample.mask), None, budget)
        except OutOfMemoryError:
            assert not region_states.lifts(of), "a reduction with states needs no slice whole"
            assert budget < BUDGETS[-1]
            continue
        if torchs_own(of):
            assert torch.equal(got[1], whole[1])
            torch.testing.assert_close(got[0], whole[0], equal_nan=True)
        else:
            assert_same_bits(got, whole, (sample, dim, budget))


def torchs_own(of: Plan) -> bool:
    """Whether torch raises e to cells, or takes the modulus of complex ones: its bits depend on where a cell stands."""
    is_exp = backend_of(of).name == "reference" and any(not step.exact_bits for step in of.passes)
    return is_exp or of.stored.kind is dtypes.Kind.COMPLEX


@every_mergeable_row
@given(shape=st.sampled_from(SHAPES), seed=SEEDS, n=st.integers(1, 9), data=st.data())
def test_shards_merged_in_any_order_are_the_whole(
    row: Reduction, shape: tuple[int, ...], seed: int, n: int, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(sorted(row.accepts - dtypes.COMPLEX, key=lambda d: d.name)))
    sample = with_junk(cells(dtype, shape, seed, row=row))
    said = {p.name: v for p, v in zip(row.parameters, [None] * 99, strict=False) if v is not None}
    dim = data.draw(st.sampled_from([d for d in dims_of(row, len(shape)) if d]))
    words = {"op": row.name, "dim": ",".join(map(str, dim)), **said}
    payload = BytesPayload(bytes_of(rain=sample.data, **{"rain.mask": sample.mask}))
    request = requests.build("reduce", words)
    whole = answers.run(request, payload).to_bytes()
    found = [states.lift(request, payload, {}, Shard(i, n), 100_000) for i in range(n)]
    read = [(str(one.shards), states.from_bytes(one.to_bytes())) for one in data.draw(st.permutations(found))]
    assert states.merge(read).answer().to_bytes() == whole
    if n > 2:  # and a merge of merges
        half = [("a", states.merge(read[: n // 2])), ("b", states.merge(read[n // 2 :]))]
        assert states.merge(half).answer().to_bytes() == whole


@pytest.mark.parametrize("special", [1.7e308, float("inf"), float("nan"), -1.7e308])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_a_running_sum_goes_on_from_part_to_part(dtype: torch.dtype, special: float) -> None:
    data = torch.randn(30_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    data[[5_000, 5_001, 20_000]] = torch.tensor([special, -special, special], dtype=torch.float64)
    if dtype is torch.int64:
        data = data.nan_to_num(0, 9, 9).clamp(-9, 9) * 1e15
    sample = Masked(3, data.to(dtype), torch.rand(30_000, generator=torch.Generator().manual_seed(4)) < 0.9)
    of = planned(OPS["cumsum"], 0, sample)
    for budget in (50_000, 200_000):
        got = streaming.run(of, Held(sample.data, sample.mask), None, budget)
        assert_same_bits(got, engine.run(of, sample.data, sample.mask), (dtype, special, budget))


def bytes_of(metadata: dict[str, str] | None = None, **tensors: Tensor) -> bytes:
    return to_bytes([output(name, tensor) for name, tensor in tensors.items()], metadata or {})


# -- answers that are larger than the memory ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("softmax", {"op": "softmax", "dim": 0}), ("softmax", {"op": "log_softmax", "dim": 1}),
        ("softmax", {"op": "standardize", "dim": 1}), ("scan", {"op": "cumsum", "dim": 0}), ("scan", {"op": "rank", "dim": 1}),
        ("fill", {"op": "value", "value": 7}), ("fill", {"op": "bfill", "dim": 0}), ("mask", {"greater": 1, "or": "other"}),
        ("mask", {"inside": "0,1", "and": "other"}), ("reduce", {"op": "quantile", "q": "0.1,0.5", "dim": 0}),
        ("reduce", {"op": "mean", "dim": 1, "keepdim": True}), ("reduce", {"op": "argmax", "dim": 0}),
        ("reduce", {"op": "mean", "dim": "t"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_is_written_as_it_is_computed(verb: str, words: dict[str, Any], tmp_path: Path) -> None:
    sample = with_junk(cells(dtypes.f32, (90, 40), 3))
    other = cells(dtypes.f32, (90, 40), 4)
    names = {"maskserve.dims": json.dumps({"rain": ["t", "x"], "other": ["t", "x"], "t": ["t"], "still": ["x"]})}
    path = tmp_path / "in.safetensors"
    path.write_bytes(
        bytes_of(
            names, rain=sample.data, other=other.data, t=torch.arange(90), still=torch.arange(40.0),
            **{"rain.mask": sample.mask, "other.mask": other.mask},
        )
    )  # fmt: skip
    request = requests.build(verb, {**words, "tensor": ["rain"] if words.get("dim") != "t" else None})
    with open_payload(path) as payload:
        whole = answers.run(request, payload).to_bytes()
        for memory in (9_000, 20_000, 60_000):
            answer = answers.run(request, payload, memory=memory)
            assert written(answer) == whole
    assert answers.run(request, BytesPayload(path.read_bytes()), memory=9_000).is_streamed == (verb != "reduce")


def test_a_file_that_changes_while_an_answer_is_written_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    path.write_bytes(bytes_of(rain=torch.randn(90, 40)))
    with open_payload(path) as payload:
        answer = answers.run(requests.build("scan", {"op": "cumsum", "dim": 0}), payload, memory=9_000)
        with open(path, "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")
        with open(tmp_path / "out", "wb") as out, pytest.raises(InputChangedError, match="changed while it was read"):
            answer.write(out.fileno(), "out")


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    path.write_bytes(bytes_of(rain=torch.randn(90, 40)))
    with open_payload(path) as payload:
        path.write_bytes(path.read_bytes()[:2000])
        for dim in (0, 1):
            with pytest.raises(InputChangedError, match="ends at byte 2000"):
                answers.run(requests.build("reduce", {"op": "sum", "dim": dim}), payload, memory=9_000)


def test_what_needs_its_slices_whole_says_how_much_memory_it_takes() -> None:
    payload = BytesPayload(bytes_of(rain=torch.randn(500_000)))
    with pytest.raises(
        OutOfMemoryError,
        match=r"rain: mode holds each slice whole, 500000 cells: that takes 3 MB, and 0\.9 MB are allowed; give --memory 3MB "
        "or more, or another dim",
    ):
        answers.run(requests.build("reduce", {"op": "mode"}), payload, memory=900_000)


def enough_for(request: requests.Request, payload: Payload, memory: int) -> int:
    """The memory in which a request runs: this one, or what its refusal tells to give."""
    try:
        written(answers.run(request, payload, memory=memory))
    except OutOfMemoryError as error:
        return int(re.findall(r"give --memory (\d+)MB or more", str(error))[0])
    return memory


def assert_told_memory_is_the_least(request: requests.Request, payload: Payload, least: int = 1_000) -> None:
    """A refusal says how much memory would do, and a byte less would not."""
    told = enough_for(request, payload, least)
    assert told == least or (enough_for(request, payload, told), enough_for(request, payload, told - 1)) == (told, told)


@every_streamed_row
def test_the_memory_that_a_refusal_tells_is_enough(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MEGABYTE", 1)
    for verb, dim in itertools.product(("reduce", "softmax", "scan", "fill"), ("0", "1", None)):
        dtype = dtypes.f32 if dtypes.f32 in row.accepts else next(iter(row.accepts))
        sample = cells(dtype, (60, 33), 3, row=row)
        named = {"dim": dim} if any(p.name == "dim" for p in row.parameters) else {}
        if row not in served(verb) or (dim is None and verb != "reduce"):
            continue
        tensors = {"rain": sample.data, "rain.mask": sample.mask, "snow": sample.data}
        request = requests.build(verb, {"op": row.name, **needed(row), **named})
        assert_told_memory_is_the_least(request, BytesPayload(bytes_of(**tensors)))


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("fill", {"op": "ffill", "dim": 0, "limit": 2}), ("scan", {"op": "rank", "dim": 0, "fill_value": 3}),
        ("grad", {"op": "mean"}), ("grad", {"expr": "sum(x * y)"}), ("eval", {"expr": "x"}), ("eval", {"expr": "matmul(x, y)"}),
        ("eval", {"expr": "rank(x + y, dim=0) * 2"}), ("eval", {"expr": "mode(x) + sum(matmul(x * 2, y))"}),
        ("eval", {"expr": "mse_loss(x, y) + x"}), ("eval", {"expr": "layer_norm(x, normalized_shape=60) + cumprod(y, dim=0)"}),
        ("eval", {"expr": "logcumsumexp(x - mean(x), dim=1)"}), ("eval", {"expr": "median(rank(x, dim=0)) + count_distinct(y)"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_holds_all_says_how_much_memory_it_takes(
    verb: str, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MEGABYTE", 1)
    sample = cells(dtypes.f64, (60, 60), 5)
    tensors = {"x": sample.data} if verb == "grad" and "op" in words else {"x": sample.data, "y": sample.data}
    payload = BytesPayload(bytes_of(**tensors, **{"x.mask": sample.mask}))
    request = requests.build(verb, words)
    with pytest.raises(OutOfMemoryError, match=r": that takes .* are allowed; give --memory "):
        answers.run(request, payload, memory=1_000)
    assert_told_memory_is_the_least(request, payload)


def test_every_row_that_is_sliced_is_streamed() -> None:
    assert {row.name for row in SLICED if row.verb} == {row.name for row in STREAMED}
    assert {row.name for row in STREAMED} <= OPS.keys()


# -- expressions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "x - mean(x, dim=t)", "(x - mean(x)) / std(x)", "sum((x - y) ** 2, dim=k)", "mean(x * w, dim=(t, k))", "x * w + 1",
        "softmax(x / 2, dim=t)", "cumsum(x - y, dim=k) * 2", "where(x > 0, x, y)", "median(abs(x - median(x)))",
        "sum(x, weights=w)", "mean(x + y, weights=w, dim=k)", "max(x, dim=t) / 10", "ffill(x, dim=k) - first(x, dim=k)",
        "count(x > mean(x), dim=t)", "rank(x, dim=t) + y", "-x", "2 * w", "(x < y) & (y < 3)", "sqrt(abs(x)) - amin(w * w)",
    ],
)  # fmt: skip
@given(seed=SEEDS)
def test_an_expression_is_streamed(text: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("eval") / "in.safetensors"
    x, y = (with_junk(cells(dtypes.f32, (60, 33), seed + i)) for i in range(2))
    w = torch.rand(33, generator=torch.Generator().manual_seed(seed))
    names = {"maskserve.dims": json.dumps({"x": ["t", "k"], "y": ["t", "k"], "w": ["k"]})}
    path.write_bytes(bytes_of(names, x=x.data, y=y.data, w=w, **{"x.mask": x.mask, "y.mask": y.mask}))
    request = requests.build("eval", {"expr": text})
    with open_payload(path) as payload:
        whole = answers.run(request, payload).to_bytes()
        for memory in (6_000, 15_000):
            assert written(answers.run(request, payload, memory=memory)) == whole, memory


@pytest.mark.parametrize(
    "text", ["mse_loss(x, y) + 0 * x", "matmul(transpose(w * x, dim0=0, dim1=1), y)", "x + sum(flatten(y))"]
)
def test_what_needs_its_operands_whole_holds_them_or_says_so(text: str, tmp_path: Path) -> None:
    path, sample = tmp_path / "in.safetensors", cells(dtypes.f64, (60, 60), 5)
    path.write_bytes(bytes_of(x=sample.data, y=sample.data, w=torch.ones(60), **{"x.mask": sample.mask}))
    request, refused = requests.build("eval", {"expr": text}), 0
    with open_payload(path) as payload:
        whole = answers.run(request, payload).to_bytes()
        for memory in (20_000, 100_000, 200_000, 400_000, 2_000_000):
            try:
                assert written(answers.run(request, payload, memory=memory)) == whole, memory
            except OutOfMemoryError:
                refused += 1
    assert 1 <= refused < 5
