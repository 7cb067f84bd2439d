"""States of shards that nobody vouches for are refused."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from typing import Any

import pytest
import torch

from maskserve import requests, states
from maskserve.errors import (
    MaskserveError,
    ParameterError,
    PayloadError,
    StateError,
)
from maskserve.payload.format import BytesPayload, Payload
from maskserve.shards import Shard
from tests.test_streaming import bytes_of, small_blocks  # noqa: F401  # fixtures are found by name


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
