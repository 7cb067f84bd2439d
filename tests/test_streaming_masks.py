"""Masks and weights of every form are read in windows of a few kilobytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskserve import answers, requests, sources, states
from maskserve.compact import as_bools
from maskserve.errors import (
    MaskDtypeError,
    MaskError,
)
from maskserve.partials import LIMITS
from maskserve.payload import slices
from maskserve.payload.format import BytesPayload, open_payload
from maskserve.payload.tensors import load_mask
from maskserve.payload.variables import resolve
from maskserve.shards import Shard
from maskserve.sources import Held, Laid
from tests.test_streaming import SEEDS, bytes_of, small_blocks, written  # noqa: F401  # fixtures are found by name


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
