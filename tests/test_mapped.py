"""Files that are computed on where they lie: the bits of what is read, and no process ends because a file does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskserve import dtypes, engine, regions, sources, streaming
from maskserve.backends.native_maps import mapped_range
from maskserve.errors import InputChangedError, IntegerOverflowError, MaskDtypeError
from maskserve.joining import question
from maskserve.ops import OPS
from maskserve.ops.rows import Reduction
from maskserve.payload.format import FilePayload, Payload, open_payload, to_bytes
from maskserve.payload.tensors import output
from maskserve.payload.variables import resolve
from maskserve.plan import Plan, plan
from maskserve.requests import build
from maskserve.torch_dtypes import dtype_of
from tests.samples import MERGEABLE, assert_same_bits, cells, needed, with_junk

SHAPE = (70, 9, 5)
BUDGET = 1 << 26


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each block, of some hundred cells, was seen where it lies."""
    found: list[bool] = []
    original = sources.Lies.seen

    def noted(self: sources.Lies, start: int, n: int) -> Any:
        block = original(self, start, n)
        found.append(block is not None)
        return block

    monkeypatch.setattr(sources.Lies, "seen", noted)
    monkeypatch.setattr(regions, "BLOCK", 1 << 9)
    monkeypatch.setattr(regions, "SEEN", 1 << 9)
    see_all(monkeypatch)
    return found


def see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every block seen where it lies, however small."""
    monkeypatch.setattr(regions, "LEAST_SEEN", 0)


def written(folder: Path, data: Tensor, mask: Tensor | None) -> Path:
    path = folder / "x.safetensors"
    masks = [] if mask is None else [output("x.mask", mask)]
    path.write_bytes(to_bytes([output("x", data), *masks], {}))
    return path


def stored(payload: Payload, fill: float | None = None, means: str = "valid") -> sources.Stored:
    return sources.stored(payload, resolve(payload.header, mask_means=means)["x"], fill)


def copied(of: sources.Stored) -> sources.Stored:
    return sources.Stored(of.cells, of.valid, of.dtype, of.shape, of.fill)


def planned(row: Reduction, data: Tensor, dim: Any = None) -> Plan:
    said = {**needed(row), **({} if dim is None else {"dim": dim})}
    return plan(row, tuple(said.items()), tuple(data.shape), dtype_of(data), "cpu")


@pytest.mark.filterwarnings("ignore:.*a finite result overflows:RuntimeWarning")
@pytest.mark.parametrize("row", MERGEABLE, ids=lambda row: row.name)
def test_what_is_seen_where_it_lies_has_the_bits_of_what_is_read(
    row: Reduction, tmp_path: Path, seen: list[bool]
) -> None:
    for seed, dtype in enumerate(sorted(row.accepts - dtypes.COMPLEX, key=lambda d: d.name)):
        sample = with_junk(cells(dtype, SHAPE, seed, row=row))
        for is_masked in (True, False):
            path = written(tmp_path, sample.data, sample.mask if is_masked else None)
            with open_payload(path) as payload:
                source = stored(payload)
                for dim in (None, 0, 1, 2, (0, 2)):
                    of = planned(row, sample.data, dim)
                    try:
                        whole = engine.run(of, sample.data, sample.mask if is_masked else None)
                    except IntegerOverflowError:
                        continue
                    assert_same_bits(streaming.run(of, source, None, BUDGET), whole, (dtype, dim, is_masked))
                    assert_same_bits(streaming.run(of, copied(source), None, BUDGET), whole, (dtype, dim, is_masked))
    assert seen.count(True) > 100
    assert all(seen)


@pytest.mark.parametrize("means", ["valid", "missing"])
@pytest.mark.parametrize("fill", [None, 0.5])
def test_masks_that_say_what_is_missing_and_fill_values_mean_the_same(
    means: str, fill: float | None, tmp_path: Path, seen: list[bool]
) -> None:
    data = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 4).round() / 2
    valid = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.6
    mask = valid if means == "valid" else ~valid
    with open_payload(written(tmp_path, data, mask)) as payload:
        of = planned(OPS["sum"], data, 1)  # type: ignore[arg-type]
        counted = valid if fill is None else valid & (data != fill)
        assert_same_bits(streaming.run(of, stored(payload, fill, means), None, BUDGET), engine.run(of, data, counted))
    assert all(seen)


def test_cells_at_odd_addresses_are_read(tmp_path: Path, seen: list[bool]) -> None:
    data = torch.randn(SHAPE)
    path = written(tmp_path, data, None)
    whole = path.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")] + b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + len(header) - 1 :])
    with open_payload(path) as payload:
        of = planned(OPS["var"], data, 0)  # type: ignore[arg-type]
        assert_same_bits(streaming.run(of, stored(payload), None, BUDGET), engine.run(of, data, None))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("along", [0, 1])
def test_joined_files_are_seen_where_a_window_lies_in_one(along: int, tmp_path: Path, seen: list[bool]) -> None:
    parts, paths = [torch.randn(SHAPE) for _ in range(3)], []
    masks = [torch.rand(SHAPE) < 0.7 for _ in parts]
    for i, (data, mask) in enumerate(zip(parts, masks, strict=True)):
        (tmp_path / str(i)).mkdir()
        paths.append(str(written(tmp_path / str(i), data, mask)))
    data, mask = torch.cat(parts, along), torch.cat(masks, along)
    with question(build("reduce", {"op": "mean"}), paths, FilePayload, along) as asked:
        source = stored(asked.payload)
        for dim in (None, 0, 2):
            of = planned(OPS["mean"], data, dim)  # type: ignore[arg-type]
            assert_same_bits(streaming.run(of, source, None, BUDGET), engine.run(of, data, mask))
    assert any(seen) is (along == 0)  # along dim 1 no window lies in one file


def test_a_byte_that_is_no_bool_is_found_in_its_block(tmp_path: Path, seen: list[bool]) -> None:
    path = written(tmp_path, torch.randn(SHAPE), torch.ones(SHAPE, dtype=torch.bool))
    whole = bytearray(path.read_bytes())
    whole[-7] = 2
    path.write_bytes(whole)
    with open_payload(path) as payload, pytest.raises(MaskDtypeError, match="other than 0 and 1"):
        streaming.run(planned(OPS["sum"], torch.empty(SHAPE)), stored(payload), None, BUDGET)  # type: ignore[arg-type]
    assert all(seen)


def unspoilt() -> None:
    raise AssertionError("the file has all its bytes")


# -- files that end -----------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_while_it_is_looked_at_reads_as_0_and_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, torch.ones(1 << 16), None)
    with open_payload(path) as payload:
        told: list[bool] = []
        view = payload.mapped("x", 0, 1 << 18, lambda: told.append(True))
        assert view is not None
        os.truncate(path, 100)
        assert [bytes(view[1 << 17 : (1 << 17) + 8]), bytes(view[-8:])] == [bytes(8)] * 2
        assert not told
        del view
        assert told == [True]
        assert payload.mapped("x", 0, 8, unspoilt) is not None


def test_a_reduction_of_a_file_that_shrinks_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(1 << 18)
    path = written(tmp_path, data, torch.ones(1 << 18, dtype=torch.bool))
    checked = sources.Lies.checked

    def shrinking(self: sources.Lies, *block: Any) -> Any:
        os.truncate(path, 4096)
        return checked(self, *block)

    monkeypatch.setattr(sources.Lies, "checked", shrinking)
    see_all(monkeypatch)
    with open_payload(path) as payload, pytest.raises(InputChangedError, match="changed while it was read"):
        streaming.run(planned(OPS["logsumexp"], data), stored(payload), None, BUDGET)  # type: ignore[arg-type]


def test_more_ranges_than_can_be_guarded_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, torch.arange(1000.0), None)
    with open(path, "rb") as file:
        views = [mapped_range(file.fileno(), 8, 100, unspoilt) for _ in range(400)]
        assert sum(view is None for view in views) >= 100
        assert len({bytes(view) for view in views if view is not None}) == 1
        views.clear()
        assert mapped_range(file.fileno(), 8, 100, unspoilt) is not None


ELSEWHERE = """
import faulthandler, mmap, os, sys
from maskserve.backends.native_maps import mapped_range
path, when = sys.argv[1:]
if when == "before":
    faulthandler.enable()
with open(path, "r+b") as file:
    assert mapped_range(file.fileno(), 0, 10, print) is not None
    if when == "after":
        faulthandler.enable()
        assert mapped_range(file.fileno(), 0, 10, print) is not None
    other = mmap.mmap(file.fileno(), 1 << 16, prot=mmap.PROT_READ)
    os.truncate(path, 0)
    print(other[1 << 15])
"""


@pytest.mark.parametrize("when", ["never", "before", "after"])
def test_the_signal_goes_on_where_it_is_of_other_memory(when: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(bytes(1 << 16))
    ended = subprocess.run([sys.executable, "-c", ELSEWHERE, path, when], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGBUS
    assert ("Bus error" in ended.stderr) is (when != "never")
    assert not ended.stdout


SENT = """
import os, signal, sys
from maskserve.backends.native_maps import mapped_range
heard = []
signal.signal(signal.SIGBUS, signal.SIG_IGN if sys.argv[2] == "ignored" else lambda *_: heard.append(1))
with open(sys.argv[1], "rb") as file:
    assert mapped_range(file.fileno(), 0, 10, print) is not None
for _ in range(3):
    os.kill(os.getpid(), signal.SIGBUS)
print(len(heard))
"""


@pytest.mark.parametrize(("how", "heard"), [("ignored", "0"), ("handled", "3")])
def test_a_signal_that_is_sent_goes_each_time_where_it_went(how: str, heard: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    ended = subprocess.run([sys.executable, "-c", SENT, path, how], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout.strip()) == (0, heard), ended.stderr
