"""diff: where two files differ, in words, in JSON and as an exit code."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import maskserve as ms
from maskserve import dtypes
from maskserve.payload import slices as cells
from maskserve_cli import diff
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    ROOT,
    Maskserve,
    environment,
    folder_fixture,
    maskserve_fixture,
    one_line,
)
from tests.samples import torch_dtype, ulps


def compared(maskserve: Maskserve, *argv: str) -> dict[str, Any]:
    """The JSON of one tensor's difference."""
    ran = maskserve("diff", "a.safetensors", "b.safetensors", "--json", *argv)
    record = json.loads(ran.out)
    assert ran.code == (0 if record["same"] else 1)
    return {one["name"]: one for one in record["tensors"]}


def written(name: str, **tensors: Any) -> None:
    save_file({key.replace("__", "."): np.ascontiguousarray(cells) for key, cells in tensors.items()}, name)


def test_files_that_are_the_same_are_quiet(maskserve: Maskserve) -> None:
    ran = maskserve("diff", "rain.safetensors", "rain.safetensors")
    assert (ran.code, ran.out, ran.err) == (0, b"", "")
    assert json.loads(maskserve("diff", "rain.safetensors", "rain.safetensors", "--json").out)["same"] is True


def test_what_is_masked_in_both_how_it_is_spelled_and_metadata_are_no_difference(maskserve: Maskserve) -> None:
    x = np.arange(6, dtype="f4").reshape(2, 3)
    y = x.copy()
    y[0, 2:], y[1, 1:] = np.nan, 99
    written("a.safetensors", x=x, x__lengths=np.array([2, 1]))
    save_file(
        {"x": y, "x.mask": np.array([[True, True, False], [True, False, False]])}, "b.safetensors", metadata={"a": "b"}
    )
    assert maskserve("diff", "a.safetensors", "b.safetensors").code == 0
    json_file = ms.load("a.safetensors")["x"].tolist()
    Path("c.json").write_text(json.dumps({"x": {"dtype": "F32", "shape": [2, 3], "values": json_file}}))
    assert maskserve("diff", "a.safetensors", "c.json").code == 0


def test_cells_that_differ_are_counted_and_the_largest_is_found(maskserve: Maskserve) -> None:
    x = np.array([[1.0, 2, 3], [4, np.nan, 0]], "f4")
    y = np.array([[1.0, 2.5, np.nextafter(np.float32(3), 4)], [8, np.nan, 1e-3]], "f4")
    written("a.safetensors", x=x)
    written("b.safetensors", x=y)
    found = compared(maskserve)["x"]
    assert (found["values"], found["n_compared"], found["validity"]) == (4, 6, 0)
    assert found["absolute"] == {"value": 4.0, "index": [1, 0]}
    assert found["relative"] == {"value": 1.0, "index": [1, 2]}
    assert found["ulps"]["index"] == [1, 2]
    assert maskserve("diff", "a.safetensors", "b.safetensors").lines == [
        "x: 4 of 6 cells valid in both differ; at most 4 at [1, 0], relative 1 at [1, 2], 981668463 ulps at [1, 2]"
    ]


def test_nan_is_nan_and_differs_from_numbers(maskserve: Maskserve) -> None:
    written("a.safetensors", x=np.array([np.nan, 1, np.inf, np.inf, 5, 0.0]))
    written("b.safetensors", x=np.array([np.nan, np.nan, np.inf, -np.inf, np.inf, -0.0]))
    found = compared(maskserve, "--rtol", "10")["x"]
    assert (found["values"], found["uneven"], found["absolute"]) == (3, 3, None)
    assert maskserve("diff", "a.safetensors", "b.safetensors").lines == [
        "x: 3 of 6 cells valid in both differ; 3 by NaN or infinity"
    ]


def test_validity_is_compared(maskserve: Maskserve) -> None:
    written("a.safetensors", x=np.arange(4.0), x__mask=np.array([True, False, True, False]))
    written("b.safetensors", x=np.arange(4.0), x__mask=np.array([True, True, False, False]))
    found = compared(maskserve)["x"]
    assert (found["validity"], found["first_validity"], found["n_compared"], found["values"]) == (2, [1], 1, 0)
    text = maskserve("diff", "a.safetensors", "b.safetensors").text
    assert text == "x: 2 of 4 cells valid in one alone, the first at [1]\n"


def test_headers_are_compared(maskserve: Maskserve) -> None:
    save_file(
        {"x": np.ones((2, 3)), "y": np.ones(3, "f4"), "t": np.arange(2), "a": np.ones(1), "lat": np.arange(3)},
        "a.safetensors", metadata={"maskserve.dims": '{"x": ["t", "lat"], "lat": ["lat"], "t": ["t"]}'},
    )  # fmt: skip
    save_file(
        {"x": np.ones((2, 3)), "y": np.ones(3, "f8"), "t": np.arange(3), "b": np.ones(1), "lat": np.arange(3) + 1},
        "b.safetensors", metadata={"maskserve.dims": '{"x": ["lat", "t"], "lat": ["lat"]}'},
    )  # fmt: skip
    ran = maskserve("diff", "a.safetensors", "b.safetensors")
    assert (ran.code, ran.err) == (1, "")
    assert ran.lines == [
        "a: only in a.safetensors",
        "b: only in b.safetensors",
        "lat: 3 of 3 cells valid in both differ; at most 1 at [0], relative 1 at [0]",
        "t: a coordinate in a.safetensors, a variable in b.safetensors",
        "t: shape (2) and (3); cells not compared",
        "t: dims (t) and without names",
        "x: dims (t, lat) and (lat, t)",
        "y: f32 and f64",
    ]
    assert maskserve("diff", "a.safetensors", "b.safetensors", "--tensor", "y").lines == ["y: f32 and f64"]


@pytest.mark.parametrize(
    ("tolerance", "same"),
    [([], False), (["--atol", "0.25"], True), (["--atol", "0.2"], False), (["--rtol", "0.125"], True),
     (["--rtol", "0.1"], False), (["--rtol", "0.1", "--atol", "0.05"], True)],
)  # fmt: skip
def test_a_tolerance_is_absolute_and_relative_to_the_second(
    maskserve: Maskserve, tolerance: list[str], same: bool
) -> None:
    written("a.safetensors", x=np.array([1.0, 2.25]))
    written("b.safetensors", x=np.array([1.0, 2.0]))
    assert maskserve("diff", "a.safetensors", "b.safetensors", *tolerance).code == (0 if same else 1)


def test_integers_are_compared_with_all_their_bits(maskserve: Maskserve) -> None:
    low, high = -(2**63), 2**63 - 1
    written("a.safetensors", x=np.array([low, 2**62, 5]), u=np.array([0, 2**64 - 1], "u8"), b=np.array([True, False]))
    written(
        "b.safetensors", x=np.array([high, 2**62 + 1, 5]), u=np.array([2**64 - 1] * 2, "u8"), b=np.array([True] * 2)
    )
    found = compared(maskserve)
    assert (found["x"]["values"], found["x"]["absolute"]) == (2, {"value": 2**64 - 1, "index": [0]})
    assert (found["u"]["values"], found["u"]["absolute"]["value"]) == (1, 2**64 - 1)
    assert (found["b"]["values"], found["b"]["absolute"]) == (1, {"value": 1, "index": [1]})
    assert found["x"]["ulps"] is None


@pytest.mark.parametrize("dtype", sorted(dtypes.FLOATING, key=lambda d: d.name), ids=lambda d: d.name)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_neighbours_are_an_ulp_apart(
    maskserve: Maskserve, tmp_path: Path, dtype: dtypes.DType, data: st.DataObject
) -> None:
    number = data.draw(st.floats(-1e4, 1e4, allow_subnormal=False, width=16).filter(lambda x: abs(x) > 1e-3))
    x = torch.tensor([number], dtype=torch_dtype(dtype))
    code = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.n_bytes])
    y = (code + 3).view(x.dtype)
    ms.save({"x": x}, "a.safetensors", exists="replace")
    ms.save({"x": y}, "b.safetensors", exists="replace")
    assert compared(maskserve)["x"]["ulps"] == {"value": 3, "index": [0]}
    assert ulps(y, x, x.dtype) <= 3


def test_zeros_of_both_signs_and_what_lies_around_them_are_in_order() -> None:
    around = np.array([-(2.0**-1074), -0.0, 0.0, 2.0**-1074])
    assert diff.ordered(around, dtypes.f64).tolist() == [-1, 0, 0, 1]
    ends = np.array([-math.inf, math.inf])
    assert diff.distance(*diff.ordered(ends, dtypes.f64)[:, None]).tolist() == [2 * 0x7FF0000000000000]


def test_blocks_are_joined_and_indices_are_those_of_the_whole(
    maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "BLOCK_CELLS", 7)
    x = np.zeros((5, 9))
    y = x.copy()
    y[1, 2], y[4, 8], y[3, 0] = 1, 3, 3
    mask = np.ones((5, 9), bool)
    mask[2, 2] = False
    written("a.safetensors", x=x, x__mask=mask)
    written("b.safetensors", x=y)
    found = compared(maskserve)["x"]
    assert (found["values"], found["absolute"], found["first_validity"]) == (3, {"value": 3.0, "index": [3, 0]}, [2, 2])
    assert found["relative"] == {"value": 1.0, "index": [1, 2]}


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1)])
def test_any_shape_is_compared(maskserve: Maskserve, shape: tuple[int, ...]) -> None:
    written("a.safetensors", x=np.ones(shape, "f4"))
    written("b.safetensors", x=np.ones(shape, "f4") * 2)
    assert maskserve("diff", "a.safetensors", "b.safetensors").code == (1 if 0 not in shape else 0)


def test_floats_that_numpy_lacks_and_complex_ones_are_compared(maskserve: Maskserve) -> None:
    for name, by in (("a.safetensors", 0), ("b.safetensors", 1)):
        tensors = {
            "h": (torch.arange(4) + by).to(torch.bfloat16),
            "q": (torch.arange(4.0) + by).to(torch.float8_e4m3fn),
            "c": torch.tensor([1 + 1j, 2j]) + 1j * by,
        }
        ms.save(tensors, name)
    found = compared(maskserve)
    assert [found[name]["absolute"]["value"] for name in "hqc"] == [1, 1, 1]
    assert [found[name]["values"] for name in "hqc"] == [4, 4, 2]


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ("rain.safetensors", 2, "diff compares two files, A and B; 1 given"),
        ("- -", 2, "diff reads stdin once: give one of the two as a file"),
        ("rain.safetensors none", 66, "none cannot be opened: No such file or directory"),
        ("orphan.safetensors rain.safetensors", 65, "orphan.safetensors: b.mask belongs to a variable b"),
        ("rain.safetensors orphan.safetensors", 65, "orphan.safetensors: b.mask belongs to a variable b"),
        ("rain.safetensors rain.safetensors --tensor rian", 2, "neither file has a tensor rian; did you mean rain?"),
        ("rain.safetensors rain.safetensors --rtol -1", 2, "--rtol -1.0: give a number from 0 on"),
        ("rain.safetensors rain.safetensors --atol nan", 2, "--atol nan: give a number from 0 on"),
    ],
)
def test_a_wrong_command_is_one_line(maskserve: Maskserve, argv: str, code: int, line: str) -> None:
    ran = maskserve("diff", *argv.split())
    assert (ran.code, ran.out) == (code, b"")
    assert one_line(ran).startswith(f"maskserve: {line}")


def test_bytes_that_are_no_bools_are_bad_data(maskserve: Maskserve) -> None:
    written("a.safetensors", x=np.zeros(2, "f4"), x__mask=np.array([1, 2], "u1"))
    ran = maskserve("diff", "a.safetensors", "a.safetensors")
    assert (ran.code, one_line(ran).startswith("maskserve: x.mask holds bytes other than 0 and 1")) == (65, True)


def test_diff_imports_no_torch_and_no_models_of_requests(folder: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from maskserve_cli.app import main\n"
        "code = main(['diff', 'rain.safetensors', 'plain.safetensors'])\n"
        "assert 'maskserve.requests' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    assert str(ROOT) in environment()["PYTHONPATH"]
