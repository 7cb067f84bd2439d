"""What is read in parts gives the bits of the whole: every row, under budgets of a few kilobytes, from files and from shards."""

from __future__ import annotations

import itertools
import json
import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskserve import answers, dtypes, engine, region_states, regions, requests, room, sources, states, streaming
from maskserve.compact import as_bools
from maskserve.dtypes import DType
from maskserve.errors import (
    DimError,
    InputChangedError,
    MaskDtypeError,
    MaskError,
    MaskserveError,
    OutOfMemoryError,
    ParameterError,
    PayloadError,
    ShapeError,
    StateError,
    UnknownTensorError,
)
from maskserve.execution import backend_of
from maskserve.joining import question
from maskserve.opening import open_any
from maskserve.ops import OPS, served
from maskserve.ops.rows import Reduction, Row
from maskserve.partials import LIMITS
from maskserve.payload import joined, slices
from maskserve.payload.format import BytesPayload, Payload, open_payload, to_bytes
from maskserve.payload.tensors import load_mask, output
from maskserve.payload.variables import resolve
from maskserve.plan import Plan, plan
from maskserve.shards import Shard
from maskserve.sources import Held, Laid
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


# -- masks and weights of every form ------------------------------------------------------------------------------


def bytes_of(metadata: dict[str, str] | None = None, **tensors: Tensor) -> bytes:
    return to_bytes([output(name, tensor) for name, tensor in tensors.items()], metadata or {})


def companions(seed: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """A mask of each form, by the name of the companion and what it shows."""
    generator = torch.Generator().manual_seed(seed)

    def some(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator) < 0.6

    a, b, c = shape
    return {
        "full": some(a, b, c), "first": some(a, 1, 1), "last": some(1, 1, c), "middle": some(1, b, 1), "alike": some(1, b, c),
        "padding": some(a, b, 1), "one": some(1, 1, 1), "split": some(a, 1, c), "u8": some(a, b, c).to(torch.uint8),
    }  # fmt: skip


@given(seed=SEEDS, data=st.data())
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("few", [0, slices.FEW_BYTES], ids=["large", "small"])
def test_masks_of_every_form_are_read_in_windows(
    seed: int, missing: bool, few: int, data: st.DataObject, tmp_path_factory: Any
) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    rain = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    extra = {
        "lengths": torch.randint(0, shape[1] + 1, shape[:1]),
        "lengths2": torch.randint(0, shape[2] + 1, shape[:2]),
    }
    extra["bits"] = torch.randint(0, 256, (*shape[:2], -(-shape[2] // 8)), dtype=torch.uint8)
    for kind, mask in (companions(seed, shape) | extra).items():
        name = {"lengths": "rain.lengths", "lengths2": "rain.lengths", "bits": "rain.bitmask"}.get(kind, "rain.mask")
        said = {"maskserve.mask_means": "missing"} if missing else {}
        path.write_bytes(bytes_of(said, rain=rain, **{name: mask}))
        with open_payload(path) as payload, pytest.MonkeyPatch.context() as patch:
            patch.setattr(slices, "FEW_BYTES", few)
            variable = resolve(payload.header)["rain"]
            fill = data.draw(st.sampled_from((None, float(rain.reshape(-1)[0]))))
            want = answers.run(requests.build("reduce", {"op": "sum", "fill_value": fill}), payload).results[0]
            source = sources.stored(payload, variable, fill)
            where = tuple(
                data.draw(
                    st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(
                        lambda ab: slice(ab[0], max(ab[0] + 1, ab[1]))
                    )
                )
                for n in shape
            )
            whole, valid = source.whole()
            window, part = source.window(where)
            assert torch.equal(window, rain[where])
            assert torch.equal(whole, rain)
            if valid is None:
                assert part is None
            else:
                assert part is not None
                assert variable.mask is not None
                own = as_bools(load_mask(payload, variable.info, variable.mask)).expand(shape)
                assert torch.equal(valid, own if fill is None else own & (rain != fill)), kind
                assert torch.equal(part, valid[where]), kind
                assert want.data == torch.where(valid, rain.double(), 0).sum().float() or not valid.any(), kind


@pytest.mark.parametrize("few", [0, slices.FEW_BYTES], ids=["large", "small"])
def test_a_length_beyond_its_dim_is_found_where_it_is_read(
    few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "FEW_BYTES", few)
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes_of(rain=torch.ones(900, 7), **{"rain.lengths": torch.arange(900) % 9}))
    told = r"rain\.lengths holds a length outside 0 to 7, the size of dim 1 of rain"
    for memory in (None, 1_000):
        with open_payload(path) as payload, pytest.raises(MaskError, match=told):
            answers.run(requests.build("reduce", {"op": "sum"}), payload, memory=memory)


@pytest.mark.parametrize("mask", ["none", "bool", "one", "bitmask", "lengths"])
def test_a_coordinate_that_does_not_fit_is_copied_while_the_answer_is_written(mask: str, tmp_path: Path) -> None:
    names = {"maskserve.dims": json.dumps({"rain": ["t", "x"], "t": ["t"]})}
    masks = {
        "none": {}, "bool": {"t.mask": torch.arange(9000) % 3 > 0}, "one": {"t.mask": torch.tensor([True])},
        "bitmask": {"t.bitmask": torch.arange(1125).to(torch.uint8)}, "lengths": {"t.lengths": torch.tensor(4567)},
    }  # fmt: skip
    payload = BytesPayload(
        bytes_of(names, rain=torch.ones(9000, 2), t=torch.arange(9000, dtype=torch.float64), **masks[mask])
    )
    request = requests.build("reduce", {"op": "sum", "dim": "x"})
    whole = answers.run(request, payload).to_bytes()
    for memory in (10_000, 400_000):
        answer = answers.run(request, payload, memory=memory)
        assert [result.name for result in answer.held] == [["rain", "t"], []][memory == 10_000]
        assert written(answer) == whole
        path = tmp_path / f"{memory}.state"
        parts = [states.lift(request, payload, {}, Shard(i, 2), memory) for i in range(2)]
        with open(path, "wb") as file:
            parts[0].write(file.fileno(), "a state", memory)
        read = [states.read(open_payload(path, LIMITS)), states.from_bytes(parts[1].to_bytes())]
        assert written(states.merge([("0", read[0]), ("1", read[1])]).answer(memory)) == whole


@given(seed=SEEDS, data=st.data())
def test_weights_are_laid_over_windows(seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 3, 7)
    rain, weights = torch.randn(shape, generator=generator), torch.rand((7, 5), generator=generator)
    laid = Laid(Held(weights, weights < 0.5), (1, 0), (5, 1, 7), shape)
    want = weights.T.reshape(5, 1, 7).expand(shape)
    where = data.draw(
        st.sampled_from([(slice(1, 4), slice(0, 2), slice(2, 7)), (slice(0, 5), slice(2, 3), slice(6, 7))])
    )
    got, mask = laid.window(where)
    assert torch.equal(got, want[where])
    assert mask is not None
    assert torch.equal(mask, (want < 0.5)[where])
    names = {"maskserve.dims": json.dumps({"rain": ["t", "y", "x"], "area": ["x", "t"]})}
    payload = BytesPayload(bytes_of(names, rain=rain, area=weights))
    for op, dim in itertools.product(("sum", "mean"), ("t", "x", "t,x", "y", "t,y,x")):
        request = requests.build("reduce", {"op": op, "dim": dim, "weights": "area"})
        assert answers.run(request, payload, memory=1_000).to_bytes() == answers.run(request, payload).to_bytes()
        parts = [("", states.lift(request, payload, {}, Shard(i, 3), 1_000)) for i in (2, 0, 1)]
        assert states.merge(parts).answer().to_bytes() == answers.run(request, payload).to_bytes()


def test_a_byte_that_is_no_bool_is_found_where_it_is_read(tmp_path: Path) -> None:
    mask = torch.ones(5000, dtype=torch.uint8)
    mask[4321] = 2
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes_of(rain=torch.ones(5000), **{"rain.mask": mask}))
    with open_payload(path) as payload, pytest.raises(MaskDtypeError, match=r"rain\.mask"):
        answers.run(requests.build("reduce", {"op": "sum"}), payload, memory=1_000)


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


# -- many files as one --------------------------------------------------------------------------------------------

NAMES = {"maskserve.dims": json.dumps({"rain": ["t", "y", "x"], "t": ["t"], "y": ["y"], "still": ["y"]})}


def parts_of(
    tmp_path: Path, dim: int, cuts: tuple[int, ...], kinds: tuple[str, ...], *, names: dict[str, str] = NAMES
) -> tuple[list[str], Path]:
    """Files that hold parts of a tensor along a dim, with masks of these kinds in turn, and one that holds it whole."""
    sample = cells(dtypes.f32, (7, 4, 6), 11)
    t, y = torch.arange(7) * 10, torch.arange(4)
    paths, masks, start = [], [], 0
    for i, (n, kind) in enumerate(zip(cuts, itertools.cycle(kinds), strict=False)):
        own = tuple(slice(start, start + n) if d == dim else slice(None) for d in range(3))
        start += n
        data, mask = sample.data[own].contiguous(), sample.mask[own].contiguous()
        if kind == "none":
            mask = torch.ones_like(mask)
        elif kind == "lengths":
            mask = (
                torch.arange(data.shape[1])[:, None].expand(data.shape[1:])
                < mask.sum((1, 2)).clamp(max=data.shape[1])[:, None, None]
            )
        elif kind == "broadcast":
            mask = mask[:, :1].expand(data.shape)
        tensors = {"rain": data, "t": t[own[0]].clone(), "y": y[own[1]].clone(), "still": torch.ones(4)[own[1]].clone()}
        companion = {
            "bool": {"rain.mask": mask}, "none": {}, "broadcast": {"rain.mask": mask[:, :1].contiguous()},
            "lengths": {"rain.lengths": mask.any(2).sum(1)},
            "bits": {"rain.bitmask": torch.from_numpy(__import__("numpy").packbits(mask.numpy(), axis=-1, bitorder="little"))},
        }[kind]  # fmt: skip
        masks.append(mask)
        paths.append(str(tmp_path / f"part-{i}.safetensors"))
        Path(paths[-1]).write_bytes(bytes_of(names, **tensors, **companion))
    whole = tmp_path / "whole.safetensors"
    tensors = {"rain": sample.data, "rain.mask": torch.cat(masks, dim), "t": t, "y": y, "still": torch.ones(4)}
    whole.write_bytes(bytes_of(names, **tensors))
    return paths, whole


@pytest.mark.parametrize(
    "kinds",
    [("bool",), ("none", "bool"), ("bits", "lengths", "none"), ("lengths",), ("broadcast",), ("bits",)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dim", "cuts"), [(0, (2, 4, 1)), (1, (1, 3)), (2, (2, 1, 3)), (2, (2, 0, 4)), (0, (7,)), (0, (1,) * 7)], ids=str
)
@pytest.mark.parametrize("memory", [None, 200])
def test_files_joined_along_a_dim_are_their_whole(
    dim: int, cuts: tuple[int, ...], kinds: tuple[str, ...], memory: int | None, tmp_path: Path
) -> None:
    paths, whole = parts_of(tmp_path, dim, cuts, kinds)
    for words in ({"op": "mean", "dim": "t"}, {"op": "sum", "dim": "t,x"}, {"op": "argmax", "dim": "x"}):
        request = requests.build("reduce", {**words, "tensor": ["rain"]})
        want = answers.run(request, open_any(str(whole))).to_bytes()
        for along in {"tyx"[dim], dim, dim - 3}:
            with question(request, paths, open_any, along) as asked:
                assert written(answers.run(request, asked.payload, memory=memory)) == want
                read = [("", states.lift(request, asked.payload, {}, Shard(i, 2), 200)) for i in (1, 0)]
                assert states.merge(read).answer().to_bytes() == want


MASKS_OF_STILL = {
    "none": {}, "bool": {"still.mask": torch.ones(2, 9, dtype=torch.bool)},
    "broadcast": {"still.mask": torch.ones(2, 1, dtype=torch.bool)}, "lengths": {"still.lengths": torch.full((2,), 9)},
    "bits": {"still.bitmask": torch.full((2, 2), 255, dtype=torch.uint8)},
}  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(MASKS_OF_STILL, 2)], ids=str)
def test_what_lacks_the_joined_dim_may_say_in_any_form_that_all_is_valid(
    first: str, second: str, tmp_path: Path
) -> None:
    names = {"maskserve.dims": json.dumps({"rain": ["t", "y", "x"], "still": ["y", "x"]})}
    still, paths = torch.arange(18.0).view(2, 9), []
    for kind in (first, second):
        paths.append(str(tmp_path / kind))
        Path(paths[-1]).write_bytes(bytes_of(names, rain=torch.ones(3, 2, 9), still=still, **MASKS_OF_STILL[kind]))
    request = requests.build("reduce", {"op": "sum", "dim": "t"})
    with question(request, paths, open_any, "t") as asked:
        found = {result.name: result for result in answers.run(request, asked.payload).held}
        assert torch.equal(found["rain"].data, torch.full((2, 9), 6.0))
        assert torch.equal(found["still"].data, still)
        assert found["still"].mask is not None
        assert found["still"].mask.all()
    Path(paths[1]).write_bytes(
        bytes_of(names, rain=torch.ones(3, 2, 9), still=still, **{"still.mask": torch.arange(2)[:, None] < 1})
    )
    with pytest.raises(ShapeError, match="still differs from"), question(request, paths, open_any, "t"):
        pass


@pytest.mark.parametrize("at", [0, 4, 17])
def test_what_lacks_the_joined_dim_is_compared_in_parts(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "BLOCK_CELLS", 5)
    names = {"maskserve.dims": json.dumps({"rain": ["t"], "still": ["y", "x"]})}
    still, paths = torch.arange(18.0).view(2, 9), []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.safetensors"))
        other = still.clone()
        other.view(-1)[at] += 1
        Path(paths[-1]).write_bytes(bytes_of(names, rain=torch.ones(3), still=other if i else still))
    request = requests.build("reduce", {"op": "sum", "dim": "t"})
    with pytest.raises(ShapeError, match="still differs from"), question(request, paths, open_any, "t"):
        pass
    with question(request, paths[:1] * 2, open_any, "t") as asked:
        assert answers.run(request, asked.payload).held[0].data.item() == 6


def test_thousands_of_files_are_joined_with_few_open(tmp_path: Path) -> None:
    import resource

    n = 600
    for i in range(n):
        (tmp_path / f"{i:04d}.safetensors").write_bytes(bytes_of(rain=torch.full((1, 3), float(i))))
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        request = requests.build("reduce", {"op": "sum", "dim": 0})
        with question(request, paths, open_any) as asked:
            assert "600 files as one (600, 3) along dim 0" in asked.payload.described  # type: ignore[attr-defined]
            assert answers.run(request, asked.payload).results[0].data.tolist() == [n * (n - 1) / 2] * 3  # type: ignore[union-attr]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def failing_to_join(
    tmp_path: Path, *tensors: dict[str, Tensor], along: int | str = 0, names: Any = None, **words: Any
) -> None:
    paths = []
    for i, own in enumerate(tensors):
        named = {name: list("tyxz"[: t.dim()]) if name != "y" else ["y"] for name, t in own.items()} | (names or {})
        paths.append(str(tmp_path / f"{i}.safetensors"))
        Path(paths[-1]).write_bytes(bytes_of({"maskserve.dims": json.dumps(named)}, **own))
    request = requests.build("reduce", {"op": "sum", "dim": 0, **words})
    with question(request, paths, open_any, along, lambda path: Path(path).name) as asked:
        answers.run(request, asked.payload)


def test_files_that_cannot_be_joined_are_named(tmp_path: Path) -> None:
    rain, y = torch.ones(2, 3), torch.arange(3)
    with pytest.raises(
        ShapeError, match=r"1\.safetensors: rain has shape \(2, 4\), in 0\.safetensors \(2, 3\).* along t"
    ):
        failing_to_join(tmp_path, {"rain": rain}, {"rain": torch.ones(2, 4)})
    with pytest.raises(ShapeError, match=r"1\.safetensors: rain is f64, in 0\.safetensors f32"):
        failing_to_join(tmp_path, {"rain": rain}, {"rain": rain.double()})
    with pytest.raises(
        ShapeError, match=r"1\.safetensors: rain has the dims t, y, x, in 0\.safetensors the dims t, y; "
    ):
        failing_to_join(tmp_path, {"rain": rain}, {"rain": rain[None]})
    (tmp_path / "unnamed").write_bytes(bytes_of(rain=rain))
    with (
        pytest.raises(
            ShapeError, match=r"rain has no names of dims, in .*0\.safetensors the dims t, y; .*maskserve\.dims"
        ),
        question(
            requests.build("reduce", {"op": "sum"}),
            [str(tmp_path / n) for n in ("0.safetensors", "unnamed")],
            open_any,
            "t",
        ),
    ):
        pass
    with pytest.raises(UnknownTensorError, match=r"0\.safetensors has no snow, which 1\.safetensors has"):
        failing_to_join(tmp_path, {"rain": rain}, {"rain": rain, "snow": rain})
    with pytest.raises(UnknownTensorError, match=r"1\.safetensors has no snow, which 0\.safetensors has"):
        failing_to_join(tmp_path, {"rain": rain, "snow": rain}, {"rain": rain})
    with pytest.raises(ShapeError, match=r"1\.safetensors: y differs from 0\.safetensors's"):
        failing_to_join(tmp_path, {"rain": rain, "y": y}, {"rain": rain, "y": y + 1})
    with pytest.raises(DimError, match=r"along: no variable has the dim 'time'; the payload's dims are t, y"):
        failing_to_join(tmp_path, {"rain": rain}, {"rain": rain}, along="time")
    area = torch.ones(3)
    with pytest.raises(DimError, match=r"along: dim 0 is t of rain, y of y|along: dim 0 is .*give the name of the dim"):
        failing_to_join(
            tmp_path, {"rain": rain, "area": area, "y": y}, {"rain": rain, "area": area, "y": y}, names={"area": ["y"]}
        )
    failing_to_join(
        tmp_path,
        {"rain": rain, "area": area},
        {"rain": rain, "area": area},
        names={"area": ["y"]},
        along="t",
        tensor=["rain"],
    )
    with pytest.raises(DimError, match=r"along: dim 2 is out of range for rain, which has 2 dims"):
        failing_to_join(tmp_path, {"rain": rain}, {"rain": rain}, along=2)


def test_a_file_that_is_replaced_while_it_is_joined_is_told(tmp_path: Path) -> None:
    from maskserve.payload.shelf import Shelf

    for i in range(3):
        (tmp_path / f"{i}.safetensors").write_bytes(bytes_of(rain=torch.ones(1, 3)))
    shelf = Shelf(open_any, 1)
    opened = [shelf.payload(str(tmp_path / f"{i}.safetensors")) for i in range(3)]
    (tmp_path / "new").write_bytes(bytes_of(rain=torch.zeros(1, 3)))
    (tmp_path / "new").replace(tmp_path / "0.safetensors")
    with pytest.raises(InputChangedError, match=r"0\.safetensors changed while it was read"):
        opened[0].read("rain")
    with pytest.raises(InputChangedError, match=r"0\.safetensors changed"):
        opened[0].refuse_changed()


# -- states that nobody vouches for -------------------------------------------------------------------------------


def shard(i: int, n: int, payload: Payload, **words: Any) -> states.State:
    return states.lift(requests.build("reduce", {"op": "mean", "dim": 0, **words}), payload, {}, Shard(i, n), 10_000)


def test_shards_that_do_not_belong_together_are_refused() -> None:
    one, other = (BytesPayload(bytes_of({"title": title}, rain=torch.ones(300, 3))) for title in ("a", "b"))
    states_of = [("a", shard(0, 3, one)), ("b", shard(1, 3, one)), ("c", shard(2, 3, one))]
    assert states.merge(states_of).answer().results[0].data.tolist() == [1, 1, 1]  # type: ignore[union-attr]
    with pytest.raises(StateError, match="shards 1, 2 of 3 are missing"):
        states.merge(states_of[:1]).answer()
    with pytest.raises(StateError, match="shard 0 of 3 is there twice, in a and a"):
        states.merge([*states_of, states_of[0]])
    for foreign, why in (
        (shard(2, 3, other), "it is of other inputs"), (shard(2, 4, one), "it is of 4 shards, the other of 3"),
        (shard(2, 3, one, op="sum"), "its request is"), (shard(2, 3, one, backend="reference"), "another back end"),
    ):  # fmt: skip
        with pytest.raises(StateError, match=f"d does not belong to a: {why}|d does not belong to a: .*{why}"):
            states.merge([*states_of[:2], ("d", foreign)])


@pytest.mark.parametrize("op", ["median", "mode"])
def test_a_row_without_states_says_so(op: str) -> None:
    with pytest.raises(ParameterError, match=f"{op} of f32 has no state that can be merged"):
        shard(0, 2, BytesPayload(bytes_of(rain=torch.ones(30, 3))), op=op)


def test_bytes_that_are_no_state_are_refused() -> None:
    good = shard(0, 1, BytesPayload(bytes_of(rain=torch.ones(300, 3))))
    said = json.loads(BytesPayload(good.to_bytes()).header.metadata[states.KEY])
    tensors = {f"0.{name}": part for name, part in good.lifted[0].partial.named()}

    def changed(change: Any) -> bytes:
        new, parts = json.loads(json.dumps(said)), dict(tensors)
        change(new, parts)
        return bytes_of({states.KEY: json.dumps(new)}, **parts)

    assert states.from_bytes(changed(lambda s, t: None)).answer().results[0].data.tolist() == [1, 1, 1]  # type: ignore[union-attr]
    named = {"name": "y", "mask_name": "m"}
    changes = [
        lambda s, t: s.update(n=0), lambda s, t: s.update(n=10**12), lambda s, t: s.update(shards=[1]),
        lambda s, t: s.update(shards=[]), lambda s, t: s.update(shards=["0"]), lambda s, t: s.update(shards=[0, 0], n=2),
        lambda s, t: s.update(more=1), lambda s, t: s.pop("key"), lambda s, t: s["key"].pop("inputs"),
        lambda s, t: s["key"].update(order=["rain", "rain"]), lambda s, t: s["key"].update(metadata={"a": 1}),
        lambda s, t: s["lifted"].append({}), lambda s, t: s["lifted"][0].update(name=7), lambda s, t: s.update(lifted=[7]),
        lambda s, t: s["lifted"][0].update(dims=["t"] * 9), lambda s, t: s["lifted"][0].update(op="median"),
        lambda s, t: s["lifted"][0].update(shape=[10**9, 3]), lambda s, t: t.clear(), lambda s, t: t.update(junk=torch.ones(1)),
        lambda s, t: t.update({"7.0.1.0.1.count": torch.ones(1)}), lambda s, t: s.update(kept=[{"name": "y"}]),
        lambda s, t: s.update(kept=[{**named, "is_coordinate": True, "passed_through": False, "has_mask": False}]),
    ]  # fmt: skip
    for i, change in enumerate(changes):
        with pytest.raises(StateError):
            print(f"accepted: change {i}: {states.from_bytes(changed(change)).answer()}")
    for junk in (b"", b"\0" * 40, bytes_of(rain=torch.ones(2))):
        with pytest.raises(PayloadError):
            states.from_bytes(junk)
    source = random.Random(5)
    whole = bytearray(good.to_bytes())
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[source.randrange(8 + 1, len(whole) // 2)] ^= 1 << source.randrange(8)
        with suppress(MaskserveError):  # any other error fails
            states.from_bytes(bytes(flipped)).answer()


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
