"""The command line: words in, words out, and an exit code that a scheduler can act on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from maskserve import answers, errors
from maskserve.payload import files
from maskserve_cli import exits
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    Maskserve,
    folder_fixture,
    maskserve_fixture,
    one_line,
)

# -- wrong commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        ("reduce --op maen rain.safetensors", 2, "maskserve: op 'maen' is not known to reduce: give one of sum, mean"),
        ("reduce --op mean --dim 5 rain.safetensors", 2,
         "maskserve: rain.safetensors: rain: mean: dim 5 is out of range for a tensor with 2 dims; give -2 to 1"),
        ("reduce --op mean orphan.safetensors", 65,
         "maskserve: orphan.safetensors: b.mask belongs to a variable b, which is not in the payload; rename it or"),
        ("reduce --op mean rain.safetensors -o plain.safetensors", 73,
         "maskserve: plain.safetensors exists; --force replaces it, --exists skip leaves it"),
        ("reduce --op mean none.safetensors", 66,
         "maskserve: none.safetensors cannot be opened: No such file or directory"),
        ("reduce --op mean --dim tiem rain.safetensors", 2,
         "maskserve: rain.safetensors: mean: no variable has the dim 'tiem'; the payload's dims are time, lat; did you"
         " mean time?"),
        ("reduce --opp mean rain.safetensors", 2,
         "maskserve: there is no option --opp; did you mean --op? (maskserve reduce --help)"),
        ("redcue rain.safetensors", 2, "maskserve: 'redcue' is not a command; did you mean reduce? (maskserve --help)"),
        ("reduce --op mean", 2, "maskserve: reduce needs a FILE; - is stdin"),
        ("reduce --op mean rain.safetensors plain.safetensors", 2,
         "maskserve: rain.safetensors has no data, which plain.safetensors has"),
        ("reduce --op mean rain.safetensors -o out.nc", 2,
         "maskserve: -o out.nc: an answer is written as .safetensors, .json or with no suffix; write one of these, then "
         "maskserve convert RESULT.safetensors out.nc"),
        ("reduce --op mean rain.safetensors -o out.json --format safetensors", 2,
         "maskserve: -o out.json and --format safetensors do not fit"),
        ("reduce --op mean rain.safetensors -o out --format table", 2,
         "maskserve: -o out and --format table do not fit"),
        ("reduce --op mean rain.safetensors --json --format text", 2,
         "maskserve: --json and --format text: give one of them"),
        ("reduce --op mean rain.safetensors --format tabel", 2, "maskserve: --format tabel: give one of table, text"),
        ("reduce --op mean rain.safetensors -o x --exists maybe", 2, "maskserve: --exists maybe: give one of error"),
        ("reduce --op mean rain.safetensors -o x --force --exists skip", 2, "maskserve: --force and --exists skip"),
        ("reduce --op mean rain.safetensors -o none/out.safetensors", 73,
         "maskserve: none/out.safetensors cannot be written: there is no folder none; make it first"),
        ("reduce --op mean rain.safetensors -o .", 73, "maskserve: . is not a regular file"),
        ("reduce --op mean rain.safetensors --config none.toml", 78, "maskserve: none.toml cannot be read"),
        ("reduce --op mean rain.safetensors --device tpu", 2, "maskserve: rain.safetensors: device 'tpu' is not known"),
        ("reduce --op mean rain.safetensors --nan maybe", 2, "maskserve: mean: nan: give propagate, omit or raise, not 'maybe'"),
        ("reduce --op mean nan.safetensors --nan raise", 65, "maskserve: nan.safetensors: mean: a valid cell is NaN"),
        ("softmax rain.safetensors", 2, "maskserve: softmax needs dim: the dim to work along, by number"),
        ("info rain.safetensors plain.safetensors", 2,
         "maskserve: info reads one FILE, and 2 are given; run it once for each"),
        ("eval --expr mean(x) --nan omit rain.safetensors", 2,
         "maskserve: there is no option --nan; inside the expression it is said to an op, as in sum(x, nan=omit)"),
        ("eval --expr mean(x) --nam omit rain.safetensors", 2, "maskserve: there is no option --nam (maskserve eval"),
        ("reduce --op median rain.safetensors --workers 2", 2,
         "maskserve: rain.safetensors: median of f32 has no state that can be merged: its slices are needed whole; reduce all at "
         "once, without --workers, --engine ray, --shard and --state"),
        ("head -n x rain.safetensors", 2, "maskserve: Invalid value for '-n' / '--rows'"),
        ("ops maen", 2, "maskserve: op 'maen' is not known: give one of sum"),
        ("serve --port x", 78, "maskserve: --port is 'x'; it must be a port, 0 to 65535"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line_and_its_exit_code(maskserve: Maskserve, argv: str, code: int, line: str) -> None:
    before = sorted(os.listdir())
    ran = maskserve(*argv.split())
    assert (ran.code, ran.out) == (code, b"")
    assert one_line(ran).startswith(line)
    assert sorted(os.listdir()) == before, "something was written"


def test_nulls_are_missing_and_nothing_else(maskserve: Maskserve) -> None:
    """Read the other way round, the 0 that stands for a null would be data."""
    Path("null.json").write_text('{"rain": [1.5, null, 4.0]}')
    ran = maskserve("reduce", "--op", "mean", "--mask-means", "missing", "null.json")
    assert ran.code == 2
    assert "null says itself what is missing" in one_line(ran)


def test_every_error_class_has_an_exit_code() -> None:
    def below(kind: type[errors.MaskserveError]) -> Iterator[type[errors.MaskserveError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    classes = [kind for kind in below(errors.MaskserveError) if kind.__module__ == errors.__name__]
    internal = [kind for kind in classes if exits.code_of(kind("what")) == exits.INTERNAL]
    assert internal == [errors.WorkerLostError]  # an input that killed each worker that had it


def test_an_error_nobody_expected_is_one_line_and_70(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(answers, "run", fail)
    ran = maskserve("reduce", "--op", "sum", "plain.safetensors")
    assert (ran.code, one_line(ran)) == (
        70, "maskserve: internal error: RuntimeError: two lines; MASKSERVE_DEBUG=1 shows where",
    )  # fmt: skip
    monkeypatch.setenv("MASKSERVE_DEBUG", "1")
    assert "Traceback" in maskserve("reduce", "--op", "sum", "plain.safetensors").err


def test_running_out_of_memory_says_try_again(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(answers, "run", fail)
    ran = maskserve("reduce", "--op", "sum", "plain.safetensors")
    assert (ran.code, one_line(ran).startswith("maskserve: out of memory")) == (75, True)


def test_a_file_that_may_not_be_read_is_77() -> None:
    error = errors.InputError("secret cannot be opened: Permission denied")
    error.errno = 13
    assert exits.code_of(error) == exits.NO_PERMISSION


def test_a_message_cannot_reach_the_terminal_s_controls(capfd: pytest.CaptureFixture[str]) -> None:
    exits.say("a\x1b[31mb\nc")
    assert capfd.readouterr().err == "maskserve: a\\x1b[31mb c\n"


# -- output forms -----------------------------------------------------------------------------------------------------


def test_text_is_a_row_a_line_with_tabs_and_dashes(maskserve: Maskserve) -> None:
    ran = maskserve("scan", "--op", "cumsum", "--dim", "time", "rain.safetensors")
    assert (ran.code, ran.text, ran.err) == (0, "1.0\t--\t3.0\n5.0\t--\t9.0\n", "")


def test_text_of_one_dim_is_a_cell_a_line_and_of_none_one_cell(maskserve: Maskserve) -> None:
    assert maskserve("reduce", "--op", "mean", "--dim", "0", "rain.safetensors").text == "2.5\n--\n4.5\n"
    assert maskserve("reduce", "--op", "sum", "rain.safetensors").text == "14.0\n"


def test_text_of_several_variables_names_each(maskserve: Maskserve) -> None:
    assert maskserve("reduce", "--op", "sum", "several.safetensors").text == "# a ()\n3\n# b ()\n1\n"
    assert maskserve("reduce", "--op", "sum", "--tensor", "a", "several.safetensors").text == "3\n"


def test_text_keeps_every_digit(maskserve: Maskserve) -> None:
    save_file({"data": np.array([0.1, 1 / 3])}, "thirds.safetensors")
    texts = maskserve("scan", "--op", "cumsum", "--dim", "0", "thirds.safetensors").lines
    assert [float(text) for text in texts] == [0.1, 0.1 + 1 / 3]


def test_the_table_has_a_header_labels_and_dashes(maskserve: Maskserve) -> None:
    ran = maskserve("scan", "--op", "cumsum", "--dim", "time", "rain.safetensors", "--format", "table")
    assert ran.text == (
        "rain  f32 (time 2, lat 3)  2 of 6 masked (true = valid)\n"
        "  time \\ lat  -10   0  10.5\n"
        "        2001    1  --     3\n"
        "        2002    5  --     9\n"
    )


def test_the_table_of_one_dim_stands_upright(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "mean", "--dim", "time", "rain.safetensors", "--format", "table")
    assert ran.text == (
        "rain  f32 (lat 3)  1 of 3 masked (true = valid)\n   lat\n   -10   2.5\n     0  --\n  10.5   4.5\n"
    )


def test_a_dim_that_was_reduced_and_kept_is_not_labelled_by_its_coordinate(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "sum", "--dim", "time", "--keepdim", "rain.safetensors", "--format", "table")
    assert ran.lines[1:] == ["  time \\ lat  -10   0  10.5", "           0    5  --     9"]


def test_the_table_shows_the_edges_of_what_does_not_fit(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    save_file({"data": np.arange(5 * 60 * 70.0).reshape(5, 60, 70)}, "big.safetensors")
    lines = maskserve("scan", "--op", "cumsum", "--dim", "0", "big.safetensors", "--format", "table").lines
    assert max(map(len, lines)) <= 60
    assert [line for line in lines if "[" in line] == ["  [0, :, :]", "  [1, :, :]", "  [4, :, :]"]
    assert sum("… 2 more" in line for line in lines) == 1
    heads = lines[2].split()
    assert (heads[0], heads[-1], "…" in heads) == ("0", "69", True)


def test_empty_results_are_shown(maskserve: Maskserve) -> None:
    save_file({"data": np.zeros((0, 3), "f4")}, "empty.safetensors")
    assert maskserve("reduce", "--op", "sum", "--dim", "1", "empty.safetensors").text == ""
    ran = maskserve("reduce", "--op", "sum", "--dim", "1", "empty.safetensors", "--format", "table")
    assert ran.lines == ["data  f32 (0)  0 of 0 masked (true = valid)", "  no cells"]


def test_json_has_null_for_a_masked_cell(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "mean", "--dim", "0", "rain.safetensors", "--json")
    assert json.loads(ran.out)["rain"] == {"dtype": "F32", "shape": [3], "dims": ["lat"], "values": [2.5, None, 4.5]}
    plain = maskserve("reduce", "--op", "sum", "--dim", "0", "question.json", "--format", "json")
    assert json.loads(plain.out) == {"data": [5.0, 7.5, 6.0]}


def test_a_json_question_gets_a_json_answer_and_safetensors_safetensors(maskserve: Maskserve) -> None:
    assert json.loads(maskserve("reduce", "--op", "sum", "question.json", "-o", "-").out) == {"data": 18.5}
    tensors = load(maskserve("reduce", "--op", "sum", "plain.safetensors", "-o", "-").out)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"data": 6.0, "mask": True}


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_file_is_written_whole_with_a_line_that_says_so(maskserve: Maskserve, name: str) -> None:
    ran = maskserve("reduce", "--op", "mean", "--dim", "time", "rain.safetensors", "-o", name)
    assert (ran.code, ran.out) == (0, b"")
    assert one_line(ran).startswith(f"maskserve: wrote {name}: rain f32 (lat 3), 1 of 3 masked, ")
    tensors = load_file(name)
    assert tensors["rain"].tolist() == [2.5, 0, 4.5]
    assert tensors["rain.mask"].tolist() == [True, False, True]
    assert tensors["lat"].tolist() == [-10, 0, 10.5]
    assert "time" not in tensors


def test_what_stands_is_kept_skipped_or_replaced(maskserve: Maskserve) -> None:
    argv = ("reduce", "--op", "sum", "plain.safetensors", "-o", "out.json")
    assert maskserve(*argv).code == 0
    Path("out.json").write_text("mine")
    assert maskserve(*argv).code == 73
    ran = maskserve(*argv, "--exists", "skip")
    assert (ran.code, one_line(ran)) == (0, "maskserve: out.json exists; skipped")
    assert Path("out.json").read_text() == "mine"
    assert maskserve(*argv, "--force").code == 0
    assert json.loads(Path("out.json").read_text())["data"]["values"] == [6.0]


def test_a_failed_write_leaves_nothing_behind(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir())
    ran = maskserve("reduce", "--op", "sum", "plain.safetensors", "-o", "out.safetensors")
    assert (ran.code, one_line(ran)) == (
        74, "maskserve: out.safetensors cannot be written: No space left on device",
    )  # fmt: skip
    assert sorted(os.listdir()) == before


def test_valid_nan_brings_a_hint_only_where_there_is_one(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "mean", "nan.safetensors")
    assert (ran.text, one_line(ran)) == ("NaN\n", "maskserve: 1 valid NaN; --nan omit treats them as missing")
    assert maskserve("reduce", "--op", "mean", "nan.safetensors", "--nan", "omit").err == ""


def test_a_fill_value_and_a_mask_that_means_missing_are_masks(maskserve: Maskserve) -> None:
    assert maskserve("reduce", "--op", "sum", "plain.safetensors", "--fill-value", "3").text == "3.0\n"
    assert maskserve("reduce", "--op", "count", "rain.safetensors", "--mask-means", "missing").text == "2\n"


@pytest.mark.parametrize(
    "dims", [["--dim", "0,1"], ["--dim", "0", "--dim", "1"], ["--dim", "time,lat"], ["--dim=-1,-2"]]
)
def test_dims_are_repeated_or_separated_by_commas(maskserve: Maskserve, dims: list[str]) -> None:
    assert maskserve("reduce", "--op", "sum", *dims, "rain.safetensors").text == "14.0\n"


def test_a_verb_named_like_a_row_means_that_row(maskserve: Maskserve) -> None:
    default = maskserve("softmax", "--dim", "-1", "plain.safetensors").text
    assert default == maskserve("softmax", "--op", "softmax", "--dim", "-1", "plain.safetensors").text != ""


# -- before it runs ---------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_happen_and_reads_no_cell(
    maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a dry run reads the header alone")

    monkeypatch.setattr(files.FilePayload, "read", read)
    monkeypatch.setattr(files.FilePayload, "read_range", read)
    argv = ("reduce", "--op", "mean", "--dim", "time", "rain.safetensors", "-o", "out.safetensors", "--dry-run")
    ran = maskserve(*argv)
    assert (ran.code, ran.err, Path("out.safetensors").exists()) == (0, "", False)
    assert ran.lines[0] == "reduce --op mean --dim time"
    assert re.split(" {2,}", ran.lines[2])[1:-1] == [
        "rain",
        "f32 (time 2, lat 3)",
        "30 bytes",
        "f32 (lat 3)",
        "15 bytes",
    ]
    assert ran.lines[3] == "would read 30 bytes and write 15 bytes of cells and masks to out.safetensors as safetensors"


def test_a_dry_run_as_json_is_data(maskserve: Maskserve) -> None:
    record = json.loads(maskserve("reduce", "--op", "sum", "rain.safetensors", "--dry-run", "--json").out)
    assert record["request"] == {"verb": "reduce", "op": "sum"}
    assert record["variables"][0]["bytes_read"] == 30


def test_explain_says_who_computes_and_why_nobody_before_does(maskserve: Maskserve) -> None:
    ran = maskserve("reduce", "--op", "sum", "rain.safetensors", "--explain", "--backend", "reference")
    assert (ran.text, ran.err) == ("14.0\n", "maskserve: rain: sum of f32 on cpu by reference\n")
    ran = maskserve("softmax", "--dim", "0", "rain.safetensors", "--explain")
    assert ran.err.startswith("maskserve: rain: softmax of f32 on cpu by ")
