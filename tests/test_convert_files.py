"""Files of other formats as files: archives that lie, damaged bytes, missing libraries, and how a result appears."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskserve as ms
from maskserve.convert import sizes
from maskserve.convert.files import open_foreign
from maskserve.convert.formats import FORMATS, Format
from maskserve.errors import (
    InputError,
    InputNotFoundError,
    MissingExtraError,
    NotComputableError,
    OutputError,
    OutputExistsError,
    ParameterError,
    PayloadError,
    TooLargeError,
)
from tests.command_line import Maskserve, environment, folder_fixture, maskserve_fixture, one_line  # noqa: F401  # fixtures
from tests.convert_cases import payload

FOREIGN = [row for row in FORMATS if not row.is_ours]
WITH_EXTRA = [row for row in FOREIGN if row.extra]
SOURCE = payload({"data": (np.arange(6.0).reshape(2, 3), np.array([[True, False, True], [True] * 3]))})
COLUMNS = payload({"data": (np.arange(6.0), np.arange(6) != 1)})

every_foreign = pytest.mark.parametrize("row", FOREIGN, ids=lambda row: row.name)


def example(folder: Path, row: Format) -> Path:
    """A file of the format."""
    (folder / "in.safetensors").write_bytes(COLUMNS if row.is_table else SOURCE)
    path = folder / f"good{row.suffixes[0]}"
    ms.convert_file(folder / "in.safetensors", path, exists="replace")
    return path


# -- NumPy --------------------------------------------------------------------------------------------------------


def entry(array: Any = None, header: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """The bytes of a .npy file: of an array, or of a header and data that need not fit."""
    file = io.BytesIO()
    if header is None:
        np.save(file, array)
    else:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(data)
    return file.getvalue()


def archive(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def test_numpy_reads_what_is_written_and_we_read_numpys(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(SOURCE)
    ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert sorted(found) == ["data", "data.mask"]
        assert found["data"].tolist() == [[0, 0, 2], [3, 4, 5]]
        assert found["data.mask"].tolist() == [[True, False, True], [True] * 3]
    of = np.ma.array([1, 2, 3], mask=[False, True, False])
    np.savez_compressed(tmp_path / "ma.npz", x=of.data, **{"x.mask": of.mask})
    ms.convert_file(tmp_path / "ma.npz", tmp_path / "ma.safetensors", mask_means="missing")
    assert ms.load(tmp_path / "ma.safetensors")["x"].tolist() == [1, None, 3]


def test_orders_and_endings_of_arrays_do_not_matter(tmp_path: Path) -> None:
    fortran = np.asfortranarray(np.arange(6).reshape(2, 3))
    np.savez(tmp_path / "a.npz", f=fortran, big=np.arange(3, dtype=">i4"), s=np.float32(2.5))
    found = ms.load(tmp_path / "a.npz")
    assert {name: of.tolist() for name, of in found.items()} == {
        "f": [[0, 1, 2], [3, 4, 5]],
        "big": [0, 1, 2],
        "s": 2.5,
    }


def test_a_masked_array_is_written_to_npy_with_a_fill_value(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(SOURCE)
    done = ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.npy", fill_value=-1)
    assert done.notes == ("masked cells are written as a value: data -1.0",)
    assert np.load(tmp_path / "out.npy").tolist() == [[0, -1, 2], [3, 4, 5]]


def test_objects_and_text_are_left_out_and_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(tmp_path / "a.npz", x=np.arange(2), o=np.array([Bomb()], object), t=np.array(["a"]))
    payload_ = open_foreign(tmp_path / "a.npz")
    assert (list(payload_.header.tensors), len(payload_.notes)) == (["x"], 1)
    np.save(tmp_path / "o.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(NotComputableError, match="the array holds no numbers"):
        open_foreign(tmp_path / "o.npy")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, tmp_path / "q.pt")
    for name in ("p.pt", "q.pt"):
        with pytest.raises(PayloadError, match="Python objects, which are never loaded, or is damaged"):
            open_foreign(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_mask_that_cannot_be_read_is_refused_and_not_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"x": np.arange(3), "x.mask": np.array([True, None, False], object)})
    with pytest.raises(PayloadError, match=r"x\.mask is a mask by its name and holds text or objects"):
        open_foreign(tmp_path / "a.npz")


def test_a_number_that_no_payload_holds_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", z=np.ones(2, "c16"))
    with pytest.raises(NotComputableError, match="z is complex128, which no payload holds"):
        open_foreign(tmp_path / "a.npz")


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path) -> None:
    n = 50_000_000
    path = archive(tmp_path / "bomb.npz", ("x.npy", entry(np.zeros(n, "u1"))))
    assert path.stat().st_size < n / 500
    with pytest.raises(
        TooLargeError, match=r"the archive, unpacked, would take 50000128 bytes of memory; at most 1000000"
    ):
        open_foreign(path, memory=10**6)


@pytest.mark.parametrize("shape", [(10**9,), (2**62, 2**62), (3,)])
def test_an_array_must_have_the_bytes_that_its_header_says(tmp_path: Path, shape: tuple[int, ...]) -> None:
    lie = entry(header={"descr": "<f8", "fortran_order": False, "shape": shape}, data=b"\0" * 16)
    (tmp_path / "a.npy").write_bytes(lie)
    for path in (archive(tmp_path / "a.npz", ("x.npy", lie)), tmp_path / "a.npy"):
        with pytest.raises(PayloadError, match="bytes, but 16 follow its header: the file is cut short or lies"):
            open_foreign(path)


def test_an_entry_that_outgrows_its_declared_size_is_stopped(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", ("x.npy", entry(np.zeros(10_000_000))))
    data = bytearray(path.read_bytes())
    small = entry(header={"descr": "<f8", "fortran_order": False, "shape": (10_000_000,)})
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the size in the entry and in the directory
        start = data.index(signature) + at
        data[start : start + 4] = struct.pack("<I", len(small) + 8)
    path.write_bytes(data)
    with pytest.raises(PayloadError, match=r"Bad CRC-32|but 8 follow its header"):
        open_foreign(path, memory=10**6)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([("x.npy", entry(np.ones(2))), ("x.npy", entry(np.ones(2)))], "the archive has the entry x.npy twice"),
        ([("x.txt", b"hello")], "x.txt is no .npy entry"),
        ([("x.npy", b"not an array")], "it cannot be read as npz"),
        ([], "the file has no variable of numbers"),
        ([("a\n.npy", entry(np.ones(2)))], "does not print"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_is_not_numpys_is_refused(tmp_path: Path, entries: list[tuple[str, bytes]], said: str) -> None:
    with pytest.raises(PayloadError, match=said.replace(".", r"\.")):
        open_foreign(archive(tmp_path / "a.npz", *entries))


def test_a_tensor_alone_is_data_and_a_nested_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torch.arange(3), tmp_path / "a.pt")
    assert ms.load(tmp_path / "a.pt")["data"].tolist() == [0, 1, 2]
    for name, bad in (
        ("b", {"x": {"y": torch.ones(1)}}),
        ("c", {"epoch": 3}),
        ("d", [torch.ones(1)]),
        ("e", {1: torch.ones(1)}),
    ):
        torch.save(bad, tmp_path / f"{name}.pt")
        with pytest.raises(PayloadError, match="flat dict of tensors by name"):
            open_foreign(tmp_path / f"{name}.pt")
    torch.save({"x": torch.ones(1).expand(10**12)}, tmp_path / "f.pt")
    with pytest.raises(TooLargeError, match="its tensors would take 4000000000000 bytes"):
        open_foreign(tmp_path / "f.pt")


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(SOURCE)
    ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["data"].tolist() == [[0, 0, 2], [3, 4, 5]]
    assert found["data.mask"].tolist() == [[True, False, True], [True] * 3]


# -- any format ---------------------------------------------------------------------------------------------------


@every_foreign
@pytest.mark.parametrize("damage", ["empty", "cut", "other", "noise"])
def test_damaged_files_are_bad_data_in_one_line(tmp_path: Path, row: Format, damage: str) -> None:
    if row.is_folder:
        path = example(tmp_path, row)
        (path / ".zmetadata").unlink()
        for name in ("data/.zarray", ".zgroup"):
            (path / name).write_bytes({"empty": b"", "cut": b'{"zarr', "other": b"[]", "noise": b"\xff\0"}[damage])
    else:
        path = example(tmp_path, row)
        good = path.read_bytes()
        noise = np.random.default_rng(5).bytes(4096)
        path.write_bytes({"empty": b"", "cut": good[: len(good) // 2], "other": b"MThd" * 64, "noise": noise}[damage])
    if row.name in ("csv", "tsv") and damage == "cut":
        assert list(open_foreign(path).header.tensors) == ["data", "data.mask"]  # half a table of text is one
        return
    with pytest.raises(PayloadError) as caught:
        open_foreign(path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 350


@every_foreign
def test_files_that_are_not_there_or_not_files(tmp_path: Path, row: Format) -> None:
    with pytest.raises(InputNotFoundError, match="cannot be opened: No such file or directory"):
        open_foreign(tmp_path / f"none{row.suffixes[0]}")
    path = tmp_path / f"wrong{row.suffixes[0]}"
    path.write_text("a file") if row.is_folder else path.mkdir()
    with pytest.raises(InputError):
        open_foreign(path)


@pytest.mark.parametrize("row", WITH_EXTRA, ids=lambda row: row.name)
def test_a_missing_library_is_a_line_that_says_what_to_install(
    tmp_path: Path, row: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = example(tmp_path, row)
    monkeypatch.setitem(sys.modules, row.libraries[-1], None)
    said = f"needs {' and '.join(row.libraries)}: pip install 'maskserve[{row.extra}]'"
    with pytest.raises(MissingExtraError) as caught:
        open_foreign(path)
    assert caught.value.message == f"reading {row.suffixes[0]} {said}"
    with pytest.raises(MissingExtraError) as caught:
        ms.convert_file(tmp_path / "in.safetensors", path, exists="replace")
    assert caught.value.message == f"writing {row.suffixes[0]} {said}"


@every_foreign
def test_a_file_that_stands_is_left_skipped_or_replaced(tmp_path: Path, row: Format) -> None:
    path = example(tmp_path, row)
    other = payload(
        {"data": ((np.ones(3) if row.is_table else np.ones((1, 1))), np.ones(3 if row.is_table else (1, 1), bool))}
    )
    (tmp_path / "other.safetensors").write_bytes(other)
    with pytest.raises(OutputExistsError):
        ms.convert_file(tmp_path / "other.safetensors", path)
    assert not ms.convert_file(tmp_path / "other.safetensors", path, exists="skip").written
    assert ms.load(path)["data"].numel() == 6
    assert ms.convert_file(tmp_path / "other.safetensors", path, exists="replace").written
    assert ms.load(path)["data"].numel() in (1, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.safetensors", "other.safetensors", path.name])


@every_foreign
def test_a_writer_that_fails_leaves_what_stood(tmp_path: Path, row: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    path = example(tmp_path, row)
    module = importlib.import_module(f"maskserve.convert.{row.module}")

    def full(dataset: object, target: str, writing: object) -> list[str]:
        Path(target).mkdir() if row.is_folder else Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left on device") as caught:
        ms.convert_file(tmp_path / "in.safetensors", path, exists="replace")
    assert caught.value.errno == 28
    assert ms.load(path)["data"].numel() == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_not_zarrs_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(SOURCE)
    (tmp_path / "home.zarr").mkdir()
    (tmp_path / "home.zarr" / "precious").touch()
    with pytest.raises(OutputError, match="is a folder, but not of zarr; only such a one is replaced"):
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / "home.zarr", exists="replace")
    assert (tmp_path / "home.zarr" / "precious").exists()


def test_a_folder_that_cannot_be_swapped_in_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = example(tmp_path, next(row for row in FORMATS if row.is_folder))
    rename, calls = os.rename, []

    def second_fails(old: str, new: str) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr("maskserve.convert.files.os.rename", second_fails)
    with pytest.raises(OutputError, match="Input/output error"):
        ms.convert_file(tmp_path / "in.safetensors", path, exists="replace")
    monkeypatch.undo()
    assert len(calls) == 3
    assert ms.load(path)["data"].numel() == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_words_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(SOURCE)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("out.xyz", {}, "no format has this suffix; say which it is with to: safetensors, json, npy"),
        ("out.nc", {"to": "zarr"}, "is netcdf by its suffix, and to says zarr"),
        ("out.xyz", {"to": "netcfd"}, "the format netcfd is not known: .* did you mean netcdf"),
        ("out.nc", {"exists": "maybe"}, "exists is maybe; give one of error, replace, skip"),
        (
            "out.nc",
            {"columns": ["a"]},
            r"columns are those of a table \(csv, tsv, parquet, arrow\), not of safetensors",
        ),
    ]
    for name, words, said in cases:
        with pytest.raises(ParameterError, match=said):
            ms.convert_file(tmp_path / "in.safetensors", tmp_path / name, **words)
    assert ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.xyz", to="npz").format == "npz"
    assert ms.convert_file(tmp_path / "in.safetensors", tmp_path / "plain").format == "safetensors"


def test_the_memory_that_a_file_may_take_is_half_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    (tmp_path / "limit").write_text("500000\n")
    (tmp_path / "no_limit").write_text("max\n")
    monkeypatch.setattr(sizes, "MEMINFO", str(tmp_path / "meminfo"))
    monkeypatch.setattr(sizes, "CGROUP_LIMITS", (str(tmp_path / "no_limit"), str(tmp_path / "none")))
    assert sizes.readable_bytes() == 800 * 1024 // 2
    monkeypatch.setattr(sizes, "CGROUP_LIMITS", (str(tmp_path / "limit"),))
    assert sizes.readable_bytes() == 250_000


# -- the command line ---------------------------------------------------------------------------------------------


def test_convert_says_what_it_wrote_and_what_stands_for_masked_cells(maskserve: Maskserve) -> None:
    ran = maskserve("convert", "rain.safetensors", "rain.nc")
    assert (ran.code, ran.out) == (0, b"")
    assert ran.err.splitlines() == [
        "maskserve: rain.nc: masked cells are written as _FillValue: rain 9.969209968386869e+36",
        "maskserve: wrote rain.nc: rain f32 (time 2, lat 3), 2 of 6 masked, netcdf",
    ]
    assert (
        maskserve("reduce", "--op", "mean", "--dim", "time", "rain.nc").text
        == maskserve("reduce", "--op", "mean", "--dim", "time", "rain.safetensors").text
    )


def test_every_command_reads_other_formats_by_their_suffix(maskserve: Maskserve) -> None:
    Path("t.csv").write_text("a,b,name\n1,2.5,x\n,3.5,y\n")
    ran = maskserve("info", "t.csv")
    assert ran.lines[0] == "t.csv: csv, 34 bytes of cells and masks, 2 variables" or ran.lines[0].startswith(
        "t.csv: csv, "
    )
    assert "a     i64   (row 2)" in ran.text
    assert "50 %" in ran.text
    assert one_line(ran) == "maskserve: t.csv: left out, not numbers: name (text)"
    assert maskserve("validate", "t.csv").lines == ["t.csv: ok, 2 variables"]
    assert maskserve("head", "t.csv").text.count("--") == 1
    assert json_counts(maskserve) == {"a": 1, "b": 0}
    ran = maskserve("reduce", "--op", "sum", "t.csv", "-o", "sum.safetensors")
    assert ran.code == 0


def json_counts(maskserve: Maskserve) -> dict[str, int]:
    import json

    record = json.loads(maskserve("info", "--json", "t.csv").out)
    assert record["format"] == "csv"
    return {v["name"]: v["counts"]["masked"] for v in record["variables"]}


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ("convert rain.safetensors", 2, "maskserve: Missing argument 'OUT' (maskserve convert --help)"),
        ("convert rain.safetensors -", 2, "maskserve: convert writes a file: give OUT a name"),
        ("convert rain.safetensors a.xyz", 2, "maskserve: a.xyz: no format has this suffix; say which it is with to"),
        ("convert rain.safetensors a.nc --to npz", 2, "maskserve: a.nc is netcdf by its suffix"),
        ("convert rain.safetensors plain.safetensors", 73, "maskserve: plain.safetensors exists"),
        ("convert rain.safetensors none/a.nc", 73, "maskserve: none/a.nc cannot be written: there is no folder none"),
        ("convert none.nc a.safetensors", 66, "maskserve: none.nc cannot be opened: No such file"),
        ("convert orphan.safetensors a.nc", 65, "maskserve: orphan.safetensors: b.mask belongs to"),
        ("convert rain.safetensors a.nc --fill-value x", 2, "maskserve: --fill-value x is no number"),
        ("convert rain.safetensors a.nc --fill-value 1", 2,
         "maskserve: rain.safetensors: --fill-value 1 is the value of a valid cell of rain"),
        ("convert rain.safetensors a.npz --fill-value 1", 2, "maskserve: fill_value stands for masked cells in formats"),
        ("convert rain.safetensors a.nc --columns a", 2, "maskserve: rain.safetensors: columns are those of a table"),
        ("convert rain.safetensors a.nc --mask-means maybe", 2, "maskserve: --mask-means maybe: give valid or missing"),
        ("convert rain.safetensors a.csv", 65, "maskserve: rain.safetensors: .csv holds columns, and rain has shape"),
        ("convert several.safetensors a.npy", 65, "maskserve: several.safetensors: .npy holds one variable, and there are 2"),
        ("convert t.csv a.nc --columns name", 65, "maskserve: t.csv: line 2, column name: 'x' is no number"),
        ("convert t.csv a.nc --mask a", 2, "maskserve: t.csv: mask: csv says itself what is missing"),
        ("reduce --op sum bad.nc", 65, "maskserve: bad.nc: it cannot be read as netcdf"),
    ],
)  # fmt: skip
def test_a_wrong_conversion_is_one_line_and_its_exit_code(
    maskserve: Maskserve, argv: str, code: int, line: str
) -> None:
    Path("t.csv").write_text("a,b,name\n1,2.5,x\n,3.5,y\n")
    Path("bad.nc").write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 100)
    before = sorted(os.listdir())
    ran = maskserve(*argv.split())
    assert ran.code == code, ran.err
    assert ran.err.splitlines()[-1].startswith(line)
    assert sorted(os.listdir()) == before


def test_a_missing_library_is_exit_78(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "netCDF4", None)
    ran = maskserve("convert", "rain.safetensors", "a.nc")
    assert ran.code == 78
    assert one_line(ran).endswith("writing .nc needs xarray and netCDF4: pip install 'maskserve[netcdf]'")


def test_convert_options_reach_the_files(maskserve: Maskserve) -> None:
    Path("t.csv").write_text("a,b,name\n1,2.5,x\n,3.5,y\n")
    ran = maskserve("convert", "t.csv", "b.dat", "--columns", "a,b", "--to", "parquet", "--tensor", "b")
    assert one_line(ran) == "maskserve: wrote b.dat: b f64 (row 2), 0 of 2 masked, parquet"
    assert "exists; skipped" in maskserve("convert", "t.csv", "b.dat", "--to", "parquet", "--exists", "skip").err
    assert maskserve("convert", "t.csv", "b.dat", "--to", "parquet", "--force", "--columns", "a").code == 0
    text = maskserve("convert", "--help").text
    assert text.startswith("Examples:\n  maskserve convert")


@pytest.mark.parametrize("argv", ["info t.csv", "info rain.nc", "convert t.csv t.parquet", "convert rain.nc rain.npz"])
def test_what_needs_no_torch_imports_none(maskserve: Maskserve, folder: Path, argv: str) -> None:
    Path("t.csv").write_text("a,b\n1,2.5\n")
    assert maskserve("convert", "rain.safetensors", "rain.nc").code == 0
    code = (
        "import sys\nfrom maskserve_cli.app import main\nsys.exit(main(sys.argv[1:]) or ('torch' in sys.modules) * 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()], cwd=folder, env=environment(), timeout=60, check=False
    )
    assert done.returncode == 0


def test_a_torch_file_of_masked_tensors_is_read(tmp_path: Path) -> None:
    table = ms.masked_tensor([[1.0, None]], requires_grad=True)
    torch.save({"table": table, "bias": torch.ones(2)}, tmp_path / "t.pt")
    record = ms.load(tmp_path / "t.pt")
    assert (record["table"].tolist(), record["bias"].tolist()) == ([[1.0, None]], [1.0, 1.0])
    torch.save(table, tmp_path / "one.pt")
    assert ms.load(tmp_path / "one.pt")["data"].tolist() == [[1.0, None]]
    torch.save({"a": table, "a.mask": torch.ones(1, 2).bool()}, tmp_path / "two.pt")
    with pytest.raises(PayloadError, match="give one of them"):
        ms.load(tmp_path / "two.pt")
