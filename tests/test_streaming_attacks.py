"""What once broke the promise that reading in parts gives the bits of the whole, within the memory that is allowed."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor

import maskserve
from maskserve import answers, crews, engine, execution, partials, region_states, regions, requests, sources, states
from maskserve.errors import InputChangedError, MaskserveError, ParameterError, StateError, TooLargeError
from maskserve.joining import question
from maskserve.opening import open_any
from maskserve.pages import KeptPages
from maskserve.partials import LIMITS
from maskserve.payload.format import DEFAULT_LIMITS, BytesPayload, FilePayload, Payload, to_bytes
from maskserve.payload.shelf import Shelf
from maskserve.payload.tensors import load_tensor, output
from maskserve.shards import Shard
from maskserve.sources import Folded, Held, Masked, Window
from maskserve_cli import inputs


def bytes_of(metadata: dict[str, str] | None = None, **tensors: Tensor) -> bytes:
    return to_bytes([output(name, tensor) for name, tensor in tensors.items()], metadata or {})


def in_parts(payload: BytesPayload, verb: str, memory: int, **words: Any) -> Tensor:
    """The first result under a bound of memory."""
    (made, *_) = answers.run(requests.build(verb, words), payload, memory=memory).results
    return (made.in_memory() if isinstance(made, answers.Streamed) else made).data


@pytest.mark.parametrize("means", [(None, "missing"), ("missing", None), ("missing", "missing")], ids=str)
def test_joined_masks_may_mean_valid_in_one_file_and_missing_in_another(
    means: tuple[str | None, ...], tmp_path: Path
) -> None:
    paths = []
    for i, own in enumerate(means):
        paths.append(str(tmp_path / f"{i}.safetensors"))
        valid = torch.tensor([True, True, True, False])
        said = {"maskserve.mask_means": own} if own else {}
        Path(paths[-1]).write_bytes(bytes_of(said, rain=torch.ones(4), **{"rain.mask": ~valid if own else valid}))
    request = requests.build("reduce", {"op": "sum"})
    with question(request, paths, open_any) as asked:
        assert answers.run(request, asked.payload).held[0].data.item() == 6


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_that_memory_has_whole_are_normalized_whole(op: str, dim: int) -> None:
    cells = torch.randn((70, 33), dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3
    payload = BytesPayload(bytes_of(rain=cells))
    whole = answers.run(requests.build("softmax", {"op": op, "dim": dim}), payload).held[0].data
    for memory in (1, 100, 1000):
        assert torch.equal(in_parts(payload, "softmax", memory, op=op, dim=dim), whole)


def test_selections_of_empty_slices_need_no_memory() -> None:
    payload = BytesPayload(bytes_of(rain=torch.ones(3, 0)))
    for dim in (0, 1):
        assert in_parts(payload, "reduce", 1, op="median", dim=dim).numel() == (3 if dim else 0)


class Measured(Held):
    """Cells that remember the largest window that was asked of them."""

    most = 0

    def window(self, where: Window) -> Masked:
        data, mask = super().window(where)
        self.most = max(self.most, data.numel())
        return data, mask


@pytest.mark.parametrize("shape", [(2, 1001), (3, 7, 101), (2, 3, 5, 67), (1, 2001), (2, 0, 5)], ids=str)
def test_a_window_across_rows_reads_little_more_than_itself(shape: tuple[int, ...]) -> None:
    cells = torch.arange(torch.Size(shape).numel()).view(shape)
    of = Measured(cells, cells % 3 == 0)
    flat, n = Folded(of, (1, cells.numel(), 1)), cells.numel()
    for start in range(0, n, 64):
        where = slice(start, min(start + 64, n))
        data, mask = flat.window((slice(0, 1), where, slice(0, 1)))
        assert mask is not None
        assert torch.equal(data.view(-1), cells.view(-1)[where])
        assert torch.equal(mask.view(-1), of.mask.view(-1)[where])  # type: ignore[union-attr]
    assert of.most <= 128


def test_few_runs_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_RUNS", 3)
    where = (slice(0, 4), slice(1, 3), slice(2, 4))
    told = [*sources.runs((4, 3, 5), where)]
    assert [n for n, _ in told] == [2, 2, 2]
    assert [len(starts) for _, starts in told] == [3, 3, 2]
    cells = torch.arange(60.0).view(4, 3, 5)
    payload = BytesPayload(bytes_of(rain=cells, **{"rain.mask": cells % 2 == 0}))
    variable = answers.resolved(requests.build("reduce", {"op": "sum"}), payload, {})["rain"]
    data, mask = sources.stored(payload, variable).window(where)
    assert torch.equal(data, cells[where])
    assert mask is not None
    assert torch.equal(mask, cells[where] % 2 == 0)
    monkeypatch.setattr(engine, "LONG", 1)
    assert torch.equal(
        in_parts(payload, "scan", 200, op="cumsum", dim=0),
        torch.where(cells % 2 == 0, cells, 0).cumsum(0) * (cells % 2 == 0),
    )


def test_blocks_that_are_lifted_are_read_into_the_same_memory_and_windows_into_their_own() -> None:
    cells = torch.arange(600.0).view(30, 20)
    payload = BytesPayload(bytes_of(rain=cells, **{"rain.mask": cells % 2 == 0}))
    variable = answers.resolved(requests.build("reduce", {"op": "sum"}), payload, {})["rain"]
    source, pages = sources.stored(payload, variable), KeptPages()
    where = [(slice(a, a + 10), slice(0, 20)) for a in (0, 10, 20)]
    first, *later = [source.read(window, pages) for window in where]
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(source.read, where[0], pages).result()
    assert first[1] is not None
    assert elsewhere[1] is not None
    assert {data.data_ptr() for data, _ in (first, *later)} == {first[0].data_ptr()}
    assert torch.equal(first[0], cells[20:])  # the last one that was read
    assert torch.equal(first[1], cells[20:] % 2 == 0)
    assert torch.equal(elsewhere[0], cells[:10])
    held = [source.window(window) for window in where]
    assert all(torch.equal(data, cells[window]) for (data, _), window in zip(held, where, strict=True))


@pytest.mark.parametrize("together", [1, 2, 4, 32])
@pytest.mark.parametrize("op", ["sum", "var", "argmax", "logsumexp"])
def test_how_many_blocks_a_task_joins_changes_no_bit(op: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "BLOCK", 1 << 10)
    monkeypatch.setattr(regions.SourceCells, "narrow", 1 << 4)
    monkeypatch.setattr(regions.SourceCells, "together", together)
    monkeypatch.setattr(engine, "SMALL", 1 << 6)
    generator = torch.Generator().manual_seed(9)
    sample = torch.randn((1337, 100), generator=generator), torch.rand((1337, 100), generator=generator) < 0.6
    payload = BytesPayload(bytes_of(rain=sample[0], **{"rain.mask": sample[1]}))
    request = requests.build("reduce", {"op": op, "dim": 0})
    whole = answers.run(request, payload).to_bytes()
    with execution.using(threads=2):
        assert answers.run(request, payload, memory=100_000).to_bytes() == whole


# -- states -------------------------------------------------------------------------------------------------------


def lifted(payload: Payload, shard: Shard, memory: int = 100_000, **words: Any) -> states.State:
    return states.lift(requests.build("reduce", {"op": "mean", "dim": 0, **words}), payload, {}, shard, memory)


def changed(state: states.State, change: Callable[[dict[str, Any]], None], *, keep: str = "") -> bytes:
    """The bytes of a state that says other things of itself."""
    payload = BytesPayload(state.to_bytes())
    said = json.loads(payload.header.metadata[states.KEY])
    change(said)
    tensors = {info.name: load_tensor(payload, info) for info in payload.header.tensors.values()}
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(keep)}
    return bytes_of({states.KEY: json.dumps(said)}, **kept)


def test_missing_shards_of_very_many_are_told_at_once() -> None:
    good = lifted(BytesPayload(bytes_of(rain=torch.ones(300, 3))), Shard(0, 1))
    few = states.from_bytes(changed(good, lambda said: said.update(n=1 << 24, shards=[*range(3000)])))
    begun = process_time()
    with pytest.raises(StateError, match=r"shards 3000, 3001, 3002, .*, … of 16777216 are missing"):
        few.answer()
    assert process_time() - begun < 5


def test_a_state_of_no_cells_may_not_ask_for_terabytes() -> None:
    good = lifted(BytesPayload(bytes_of(rain=torch.ones(0, 3))), Shard(0, 1))
    assert good.answer().held[0].data.shape == (3,)
    for n in (10**8, 10**12):
        huge = changed(good, lambda said, n=n: said["lifted"][0].update(shape=[0, n]))
        for memory in (None, 1000):
            with pytest.raises(TooLargeError, match="the answer would have"):
                states.from_bytes(huge).answer(memory)


def test_the_order_of_a_state_is_of_names() -> None:
    good = lifted(BytesPayload(bytes_of(**{"7": torch.ones(300, 3)})), Shard(0, 1))
    with pytest.raises(StateError, match="its variables are others than it says"):
        states.from_bytes(changed(good, lambda said: said["key"].update(order=[7])))


def test_an_integer_beyond_64_bits_may_stand_for_empty_slices() -> None:
    nothing = maskserve.masked_tensor(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert maskserve.mean(nothing, empty=10**30).get_data().item() == pytest.approx(1e30)


@pytest.mark.parametrize("op", ["mean", "argmax", "var"])
@pytest.mark.parametrize("dim", ["0", "1", "2", "0,2"])
def test_states_that_do_not_fit_are_written_and_merged_in_parts(
    op: str, dim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_states, "MOST_STATES", 16)
    generator = torch.Generator().manual_seed(3)
    rain, mask = torch.randn((150, 7, 9), generator=generator), torch.rand((150, 7, 9), generator=generator) < 0.7
    payload = BytesPayload(bytes_of(rain=rain, **{"rain.mask": mask}))
    whole = answers.run(requests.build("reduce", {"op": op, "dim": dim}), payload).to_bytes()
    read = []
    for i in (2, 0, 1):
        state, path = lifted(payload, Shard(i, 3), 3_000, op=op, dim=dim), tmp_path / str(i)
        with open(path, "wb") as file:
            assert state.write(file.fileno(), str(path), 3_000) == path.stat().st_size
        assert path.read_bytes() == lifted(payload, Shard(i, 3), op=op, dim=dim).to_bytes()
        read.append((str(i), states.read(FilePayload(path, partials.LIMITS))))
    for memory in (None, 3_000, 100_000):
        answer = states.merge(read).answer(memory)
        with open(tmp_path / "out", "wb") as file:
            answer.write(file.fileno(), "out")
        assert (tmp_path / "out").read_bytes() == whole


def test_what_a_shard_keeps_as_it_is_need_not_fit(tmp_path: Path) -> None:
    names = {"maskserve.dims": json.dumps({"rain": ["t", "x"], "still": ["x"], "x": ["x"]})}
    still = torch.arange(3000.0)
    payload = BytesPayload(
        bytes_of(names, rain=torch.ones(2, 3000), still=still, x=torch.arange(3000), **{"still.mask": still % 3 > 0})
    )
    whole = answers.run(requests.build("reduce", {"op": "sum", "dim": "t"}), payload).to_bytes()
    state, path = lifted(payload, Shard(0, 1), 20_000, op="sum", dim="t"), tmp_path / "state"
    with open(path, "wb") as file:
        state.write(file.fileno(), "state", 20_000)
    for memory in (None, 20_000):
        answer = states.read(FilePayload(path, partials.LIMITS)).answer(memory)
        assert answer.is_streamed == (memory is not None)
        with open(tmp_path / "out", "wb") as file:
            answer.write(file.fileno(), "out")
        assert (tmp_path / "out").read_bytes() == whole


def test_a_state_that_counts_too_much_or_changes_is_told_where_it_is_read(tmp_path: Path) -> None:
    good = lifted(BytesPayload(bytes_of(rain=torch.ones(300, 3))), Shard(0, 1))
    (tmp_path / "a").write_bytes(good.to_bytes())
    bad = bytearray(good.to_bytes())
    begin = BytesPayload(bad, partials.LIMITS).header
    (name,) = [name for name in begin.tensors if name.endswith("count")]
    bad[begin.data_start + begin.tensors[name].begin + 3] = 9
    (tmp_path / "b").write_bytes(bad)
    with pytest.raises(StateError, match="b: the state of leaves 0 to 5 counts cells that it cannot have"):
        states.read(FilePayload(tmp_path / "b", partials.LIMITS), "b").answer()
    opened = states.read(FilePayload(tmp_path / "a", partials.LIMITS), "a")
    (tmp_path / "a").write_bytes(good.to_bytes())
    with pytest.raises(InputChangedError, match="changed while it was read"):
        opened.answer()


def test_side_inputs_are_the_same_by_whatever_path_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("rain").write_bytes(bytes_of(rain=torch.arange(6.0).view(3, 2)))
    Path("there/area").write_bytes(bytes_of(area=torch.tensor([1.0, 3.0])))
    os.symlink("there/area", "link")
    spelled = ["there/area", str(tmp_path / "there" / "area"), "link", "there/../there/area"]
    found = []
    for i, word in enumerate(spelled):
        request = requests.build("reduce", {"op": "mean", "weights": word})
        with question(request, ["rain"], open_any) as asked:
            whole = answers.run(request, asked.payload, asked.others).to_bytes()
            made = states.lift(request, asked.payload, asked.others, Shard(i, len(spelled)), 1000)
            found.append((word, states.from_bytes(made.to_bytes())))
    assert states.merge(found).answer().to_bytes() == whole
    Path("other").write_bytes(bytes_of(area=torch.tensor([1.0, 3.0])))
    request = requests.build("reduce", {"op": "mean", "weights": "other"})
    with question(request, ["rain"], open_any) as asked:
        foreign = states.lift(request, asked.payload, asked.others, Shard(3, len(spelled)), 1000)
    with pytest.raises(StateError, match="of other inputs"):
        states.merge([*found[:3], ("other", foreign)])


def every_place(said: object) -> Iterator[tuple[Any, Any]]:
    """Each list and mapping inside, with each of its places."""
    for key in said if isinstance(said, dict) else range(len(said)) if isinstance(said, list) else ():
        yield said, key
        yield from every_place(said[key])  # type: ignore[index]  # one of the two


def test_no_error_repeats_much_of_what_a_state_says() -> None:
    names = {"maskserve.dims": json.dumps({"rain": ["t", "x"], "still": ["x"]})}
    payload = BytesPayload(bytes_of(names, rain=torch.ones(4, 3), still=torch.ones(3)))
    state = states.lift(requests.build("reduce", {"op": "var", "dim": "t"}), payload, {}, Shard(0, 1), 10**6)
    whole = BytesPayload(state.to_bytes(), LIMITS)
    tensors = [output(name, load_tensor(whole, info)) for name, info in whole.header.tensors.items()]
    said = json.loads(state.metadata[states.KEY])
    n_refused = 0
    for holder, key in list(every_place(said)):
        for junk in ("\x1b[31m" + "z" * 30_000, 10**4000, {"\n" + "k" * 30_000: 1}):
            before, holder[key] = holder[key], junk
            raw = to_bytes(tensors, {states.KEY: json.dumps(said)})
            holder[key] = before
            with pytest.raises(MaskserveError) as caught:
                states.merge([("a", state), ("b", states.from_bytes(raw))])
            assert len(caught.value.message) < 600, caught.value.message[:1000]
            assert caught.value.message.isprintable(), caught.value.message[:1000]
            n_refused += 1
    assert n_refused > 90


def test_shards_of_dims_without_cells_are_merged() -> None:
    payload = BytesPayload(bytes_of(rain=torch.ones(9, 2, 5, 0)))
    for op, dim in itertools.product(("all", "sum", "count"), ("1,3,0", "0,3", "3", "0,2,3")):
        whole = answers.run(requests.build("reduce", {"op": op, "dim": dim}), payload).to_bytes()
        for n in (1, 2, 9):
            read = [("", states.from_bytes(lifted(payload, Shard(i, n), op=op, dim=dim).to_bytes())) for i in range(n)]
            assert states.merge(read).answer().to_bytes() == whole


def test_stdin_is_the_same_input_in_memory_and_in_a_file() -> None:
    raw = bytes_of(rain=torch.ones(3000))
    held, spooled = (inputs.read_stream(io.BytesIO(raw), "stdin", DEFAULT_LIMITS, memory) for memory in (10**6, 100))
    assert isinstance(spooled, FilePayload)
    assert [*held.identity()] == [*spooled.identity()]
    parts = [("a", lifted(held, Shard(0, 2))), ("b", lifted(spooled, Shard(1, 2)))]
    assert states.merge(parts).answer().held[0].data.item() == 1


def test_a_stream_among_many_files_is_not_opened_again(tmp_path: Path) -> None:
    raw = bytes_of(rain=torch.ones(3000))
    for i in range(3):
        (tmp_path / str(i)).write_bytes(raw)

    def read(path: str) -> Payload:
        return inputs.read_stream(io.BytesIO(raw), "stdin", DEFAULT_LIMITS, 100) if path == "-" else open_any(path)

    shelf = Shelf(read, most=1)
    opened = [shelf.payload(path) for path in ("-", *(str(tmp_path / str(i)) for i in range(3)))]
    assert bytes(opened[0].read("rain")) == bytes(opened[1].read("rain"))
    opened[0].refuse_changed()


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ParameterError, match="workers is -1; give a number of processes, or 0"):
        crews.reduce("reduce", {"op": "sum"}, ["no"], None, workers=-1, limits=DEFAULT_LIMITS, memory=1, tell=print)
