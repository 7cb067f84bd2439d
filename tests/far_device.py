"""Requests on a device whose memory is not the CPU's: torch refuses to mix the two, as it does with CUDA.

The device is torch's own place for back ends in Python (PrivateUse1): each tensor of it wraps one of the CPU, which no op sees
beside its own. Not collected by itself, since torch keeps the device as long as the process lives: tests/test_devices.py runs
this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import maskserve as ms
from maskserve import answers, requests, states
from maskserve.errors import OutOfMemoryError
from maskserve.payload.format import BytesPayload
from maskserve.shards import Shard
from tests.http_service import payload
from tests.stand_in import LateCopies, StandIn, standing_in

FAR = "far:0"
MOVES = ("copy_", "_to_copy")
SHAPE = (100, 1000)
FREE, ROOM = 700_000, 530_000
"""Bytes of a device that has no room for a variable as a whole, and those that a tensor of it may have then."""


class Far(Tensor):
    """A tensor in the memory of the device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Far:
        made: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # torch has no type for it
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=torch.device(FAR)
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An op on tensors of the device; RuntimeError where one of the CPU with dims is among them."""
    name = func.overloadpacket.__name__
    tensors = [given for given in tree_leaves((args, kwargs)) if isinstance(given, Tensor)]
    if name not in MOVES and any(not isinstance(given, Far) and given.ndim for given in tensors):
        raise RuntimeError(f"{func} was given tensors on {FAR} and on the CPU")
    inner = {key: torch.device("cpu") if key == "device" and value else raw_of(value) for key, value in kwargs.items()}
    made = func(*tree_map(raw_of, args), **inner)
    if name == "_to_copy" and torch.device(kwargs.get("device") or FAR).type == "cpu":
        return made
    known = {id(given.raw): given for given in tensors if isinstance(given, Far)}
    return args[0] if name == "copy_" else tree_map(lambda out: known.get(id(out), far_of(out)), made)


def raw_of(given: Any) -> Any:
    return given.raw if isinstance(given, Far) else given


def far_of(made: Any) -> Any:
    return Far(made) if isinstance(made, Tensor) else made


def factory(op: Any) -> Callable[..., Far]:
    def make(*args: Any, **kwargs: Any) -> Far:
        return Far(op(*args, **{k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}))

    return make


def copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    raw_of(target).copy_(raw_of(source))
    return target


@cache
def registered() -> torch.library.Library:
    """The device, known to torch."""
    _setup_privateuseone_for_python_backend(FAR.partition(":")[0])  # type: ignore[no-untyped-call]
    library = torch.library.Library("aten", "IMPL")
    for name, op in (
        ("empty.memory_format", torch.ops.aten.empty.memory_format),
        ("empty_strided", torch.ops.aten.empty_strided.default),
    ):
        library.impl(name, factory(op), "PrivateUse1")
    library.impl("_copy_from", copied, "PrivateUse1")
    return library


class FarCopies(LateCopies):
    def empty(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return super().empty(sizes, dtype).to(FAR)


class FarAway(StandIn):
    """One device, whose memory is its own."""

    def __init__(self, free: int = 10**12, room: int = 10**12) -> None:
        self.free, self.copies_of = {FAR: free}, {FAR: FarCopies(room)}
        registered()


@cache
def sample_payload() -> bytes:
    """Two variables with junk under their masks, and weights."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=SHAPE)
    x_mask, y_mask = rng.random(SHAPE) < 0.7, rng.random((SHAPE[0], 1)) < 0.8
    x[~x_mask], y[3:5] = np.nan, np.inf
    return payload(x=x, x__mask=x_mask, y=y, y__mask=y_mask, w=rng.random(SHAPE).astype(np.float32))


def answered(verb: str, words: dict[str, Any], device: str, memory: int | None = None) -> bytes:
    request = requests.build(verb, {**words, "device": device, "backend": None if verb == "mask" else "reference"})
    answer = answers.run(request, BytesPayload(sample_payload()), memory=memory)
    if not answer.is_streamed:
        return answer.to_bytes()
    with TemporaryFile() as file:
        answer.write(file.fileno(), "the answer")
        return file.read()


X = {"tensor": ["x"]}
IN_PARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("reduce", {"op": "var", "dim": "0", "weights": "w", "correction": 0}),
    ("reduce", {"op": "median", "dim": "1", "nan": "omit"}),
    ("reduce", {"op": "argmax", "dim": "0,1"}),
    ("softmax", {"op": "normalize", "dim": "1", **X}),
    ("scan", {"op": "cumsum", "dim": "1", **X}),
    ("fill", {"op": "ffill", "dim": "1"}),
    ("mask", {"inside": "-1,1", **X}),
    ("eval", {"expr": "(x - mean(x, dim=1, keepdim=True)) / (1 + abs(y))"}),
    ("eval", {"expr": "sum(where(x < y, x, 2), dim=0)"}),
)
AS_A_WHOLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("grad", {"op": "mean", "dim": "1", **X}),
    ("grad", {"expr": "sum(x * exp(where(x < 1, x, 1)))", "wrt": "x"}),
    ("eval", {"expr": "matmul(x, transpose(w, dim0=0, dim1=1))"}),
)


@pytest.mark.parametrize(("verb", "words"), IN_PARTS, ids=[" ".join(map(str, q)) for q in IN_PARTS])
def test_a_device_gives_the_bits_of_the_cpu(verb: str, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole, and in parts where it has no room for that: then nothing larger than its room goes there."""
    expected = answered(verb, words, "cpu")
    with standing_in(monkeypatch, FarAway()):
        assert answered(verb, words, "cuda") == expected
    with standing_in(monkeypatch, FarAway(FREE, ROOM)) as small:
        assert answered(verb, words, "cuda") == expected
        assert small.copies_of[FAR].log.count("copy") > 2
        assert answered(verb, words, "cuda", memory=2 * FREE) == expected


@pytest.mark.parametrize(("verb", "words"), AS_A_WHOLE, ids=[" ".join(map(str, q)) for q in AS_A_WHOLE])
def test_what_needs_all_at_once_is_computed_there_or_refused(
    verb: str, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_in(monkeypatch, FarAway()):
        assert answered(verb, words, "cuda") == answered(verb, words, "cpu")
    with (
        standing_in(monkeypatch, FarAway(FREE)),
        pytest.raises(OutOfMemoryError, match="give device=cpu, or send less"),
    ):
        answered(verb, words, "cuda")


def test_shards_on_a_device_have_the_bits_of_the_whole_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"op": "var", "dim": "0", "tensor": ["x", "y"]}
    with standing_in(monkeypatch, FarAway()) as far:
        request = requests.build("reduce", {**words, "device": "cuda", "backend": "reference"})
        shards = [states.lift(request, BytesPayload(sample_payload()), {}, Shard(i, 3), 10**9) for i in range(3)]
        read = [(f"shard {i}", states.read(BytesPayload(state.to_bytes()))) for i, state in enumerate(shards)]
        assert states.merge(read).answer(10**9).to_bytes() == answered("reduce", words, "cpu")
        assert far.copies_of[FAR].log.count("copy") > 2


def test_in_python_a_device_out_of_memory_computes_an_expression_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    registered()
    data = torch.linspace(-3, 3, 3 << 20).view(3, -1)
    mask, asked = data > -2, list[int]()

    def full(chain: Any, cells: Any) -> Any:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = ms.eval("exp(x) * 2 - x", x=ms.masked_tensor(data, mask))
    monkeypatch.setattr(ms.evaluation, "at_once", full)
    got = ms.eval("exp(x) * 2 - x", x=ms.masked_tensor(data.to(FAR), mask.to(FAR)))
    assert asked == [1]
    assert torch.equal(got.get_data().cpu(), expected.get_data())
    assert torch.equal(got.get_mask().cpu(), expected.get_mask())


def test_the_device_would_tell_of_cells_that_were_left_behind() -> None:
    registered()
    with pytest.raises(RuntimeError, match="on far:0 and on the CPU"):
        torch.ones(3).to(FAR) + torch.ones(3)
