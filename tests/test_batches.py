"""Masked samples in torch's DataLoader, on their way between processes, and leaves that are copied and written."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

import maskserve as ms
from maskserve import MaskedTensor
from maskserve.errors import GradientError, MaskError

N = 6


def sample(i: int) -> MaskedTensor:
    """Row i of 0..17; one cell of it masked, none of every third."""
    cells = torch.arange(3.0) + 3 * i
    return MaskedTensor(cells, None if i % 3 == 2 else torch.arange(3) != i % 3)


def lists(rows: range) -> list[Any]:
    return [sample(i).tolist() for i in rows]


class Samples(Dataset[Any]):
    """Masked rows, in containers of each kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        made = {"bare": sample(i), "dict": {"x": sample(i), "y": i}, "tuple": (sample(i), i), "list": [[sample(i)], i]}
        return made[self.kind]


def masked_of(kind: str, batch: Any) -> MaskedTensor:
    found: MaskedTensor = {"bare": lambda: batch, "dict": lambda: batch["x"], "tuple": lambda: batch[0],
                           "list": lambda: batch[0][0]}[kind]()  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["bare", "dict", "tuple", "list"])
def test_a_loader_stacks_masked_samples(kind: str) -> None:
    batches = [masked_of(kind, batch) for batch in DataLoader(Samples(kind), batch_size=4)]
    assert [type(batch) for batch in batches] == [MaskedTensor] * 2
    assert [batch.tolist() for batch in batches] == [lists(range(4)), lists(range(4, 6))]


def test_worker_processes_hand_on_data_and_mask() -> None:
    loader = DataLoader(Samples("dict"), batch_size=3, num_workers=2)
    found = [batch["x"] for batch in loader]
    assert [batch.tolist() for batch in found] == [lists(range(3)), lists(range(3, 6))]
    found[0][0] = ms.masked_tensor([None, 1.0, 2.0])
    assert found[0].tolist()[0] == [None, 1, 2]


def test_samples_without_a_mask_stay_without_one() -> None:
    batch = default_collate([sample(2), sample(5)])
    assert batch._mask is None
    assert default_collate([sample(0), torch.zeros(3)]).tolist() == [sample(0).tolist(), [0, 0, 0]]
    assert default_collate([torch.zeros(3), sample(0)]).tolist() == [[0, 0, 0], sample(0).tolist()]


def test_a_dataset_of_a_masked_tensor_yields_its_rows() -> None:
    rows = ms.stack([sample(i) for i in range(N)])
    ((x, y), *_) = DataLoader(TensorDataset(rows, torch.arange(N)), batch_size=N)  # type: ignore[arg-type]  # a plain class
    assert x.tolist() == lists(range(N))
    assert y.tolist() == list(range(N))


def test_collating_costs_no_import() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules); from maskserve.batches import register\n"
        "new = {name for name in set(sys.modules) - before if not name.startswith('maskserve')}; assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- memory -------------------------------------------------------------------------------------------------------


def test_pinning_takes_data_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def pinned(self: Tensor) -> Tensor:
        seen.append(self.dtype)
        return self.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    m = sample(0)
    both = torch.utils.data._utils.pin_memory.pin_memory({"x": m, "y": [sample(2)]})
    assert seen == [torch.float32, torch.bool, torch.float32]
    assert both["x"].tolist() == m.tolist()
    both["x"][0] = 9.0
    assert m.tolist() == sample(0).tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it is possible")
def test_pinning_without_a_device_says_what_torch_says() -> None:
    with pytest.raises(RuntimeError) as theirs:
        torch.zeros(1).pin_memory()
    with pytest.raises(RuntimeError) as ours:
        sample(0).pin_memory()
    assert str(ours.value) == str(theirs.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_loader_pins_batches() -> None:
    for batch in DataLoader(Samples("dict"), batch_size=3, pin_memory=True):
        assert batch["x"].is_pinned()
        assert batch["x"].pin_memory() is batch["x"]
        assert batch["x"].to("cuda").cpu().tolist() == batch["x"].tolist()


def fill(tensors: list[MaskedTensor]) -> None:
    """In another process: new cells, and validity where the mask can be written."""
    for tensor in tensors:
        with torch.no_grad():
            tensor[0] = 7.0
    with pytest.raises(MaskError, match="would be lost"):
        tensors[1][1] = None


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_shared_memory_is_data_and_mask(how: str) -> None:
    """The first cell is masked before; what another process writes is seen here."""
    masked, whole, parameter = sample(0), sample(2), ms.masked_tensor([None, 2.0], requires_grad=True)
    tensors = [masked, whole, parameter]
    for tensor in tensors:
        assert not tensor.is_shared()
        assert tensor.share_memory_() is tensor
        assert tensor.is_shared()
    process = torch.multiprocessing.get_context(how).Process(target=fill, args=(tensors,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [tensor.tolist() for tensor in tensors] == [[7, 1, 2], [7, 7, 8], [7, 2]]
    assert parameter.is_leaf


# -- copies and files ---------------------------------------------------------------------------------------------


def parameter() -> MaskedTensor:
    """A leaf with a gradient that is specified at its first cell."""
    m = ms.masked_tensor([1.0, 2.0, math.nan], [True, True, False], requires_grad=True)
    (m * ms.masked_tensor([3.0, None, 4.0])).sum().backward()
    return m


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_deep_copy_of_a_leaf_is_a_leaf_with_its_own_gradient() -> None:
    m = parameter()
    other = copy.deepcopy(m)
    assert other.grad is not None
    assert (other.is_leaf, other.requires_grad, other.grad.tolist()) == (True, True, [3, None, None])
    other.sum().backward()
    assert m.grad is not None
    assert (m.grad.tolist(), other.grad.tolist()) == ([3, None, None], [4, 1, None])
    with torch.no_grad():
        other[0] = 5.0
    assert m.tolist() == [1, 2, None]


def test_what_shares_a_gradient_shares_it_in_the_copy() -> None:
    m = parameter()
    both = copy.deepcopy({"a": m, "b": copy.copy(m)})
    both["a"].sum().backward()
    assert both["b"].grad.tolist() == [4, 1, None]


def test_a_deep_copy_of_what_was_computed_is_refused() -> None:
    with pytest.raises(GradientError, match="detach") as raised:
        copy.deepcopy(parameter() * 2)
    assert "\n" not in str(raised.value)
    assert copy.deepcopy((parameter() * 2).detach()).tolist() == [2, 4, None]


def test_pickles_and_files_keep_requires_grad_as_torchs() -> None:
    m = parameter()
    plain = saved({"leaf": torch.ones(1, requires_grad=True), "other": torch.ones(1, requires_grad=True) * 2})
    assert [(t.is_leaf, t.requires_grad) for t in plain.values()] == [(True, True)] * 2
    for found in (
        saved({"leaf": m, "other": m * 2, "data": m.detach()}),
        pickle.loads(pickle.dumps({"leaf": m, "other": m * 2, "data": m.detach()})),
    ):
        assert [(t.is_leaf, t.requires_grad) for t in found.values()] == [(True, True), (True, True), (True, False)]
        assert [t.tolist() for t in found.values()] == [[1, 2, None], [2, 4, None], [1, 2, None]]
        assert found["leaf"].grad is None
        found["leaf"].sum().backward()
        assert found["leaf"].grad.tolist() == [1, 1, None]


def test_files_of_two_parts_still_load() -> None:
    """What was pickled before gradients were kept."""
    from maskserve.tensor import _unpickled

    assert _unpickled(torch.ones(2), torch.tensor([True, False])).tolist() == [1, None]


def test_a_module_keeps_a_masked_buffer() -> None:
    """In its state_dict, through dtypes, in copies and in files."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", ms.masked_tensor([1.0, None, 3.0]))

    module, other = Scaled(), Scaled()
    other.scale = ms.masked_tensor([None, 5.0, 6.0])
    other.load_state_dict(saved(module.state_dict()))
    for found in (module, other, copy.deepcopy(module), Scaled().double()):
        assert found.scale.tolist() == [1, None, 3]
    assert Scaled().double().scale.dtype is torch.float64


# -- leaves -------------------------------------------------------------------------------------------------------


def test_a_frozen_leaf_keeps_the_gradient_that_it_has() -> None:
    """And where it is specified: the cells that no path reached do not become a specified 0."""
    m = ms.masked_tensor([1.0, 2.0, None], requires_grad=True)
    m[0].backward()
    m.requires_grad_(False)
    assert m.grad is not None
    assert m.grad.tolist() == [1, None, None]
    assert not (m * 2).requires_grad
    frozen_and_not = m * ms.masked_tensor([1.0, 1.0, 1.0], requires_grad=True)
    frozen_and_not.sum().backward()
    assert m.grad.tolist() == [1, None, None]
    m.requires_grad_()
    m[1].backward()
    assert m.grad.tolist() == [1, 1, None]


def test_a_leaf_under_a_further_mask_is_none() -> None:
    m = ms.masked_tensor([1.0, 2.0, 3.0], requires_grad=True)
    narrow = ms.as_masked_tensor(m, torch.tensor([True, False, True]))
    narrow.sum().backward()
    assert (m.is_leaf, narrow.is_leaf) == (True, False)
    assert narrow.grad is None
    assert m.grad is not None
    assert m.grad.tolist() == [1, None, 1]
    with pytest.raises(GradientError, match="the leaf itself"):
        ms.optim.SGD([narrow])
    with pytest.raises(GradientError, match="detach"):
        copy.deepcopy(narrow)
