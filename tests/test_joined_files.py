"""Many files are one along a dim: the bits of their whole, or a line that names the one that does not fit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskserve import answers, dtypes, requests, states
from maskserve.errors import (
    DimError,
    InputChangedError,
    ShapeError,
    UnknownTensorError,
)
from maskserve.joining import question
from maskserve.opening import open_any
from maskserve.payload import joined
from maskserve.shards import Shard
from tests.samples import cells
from tests.test_streaming import bytes_of, small_blocks, written  # noqa: F401  # fixtures are found by name

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
