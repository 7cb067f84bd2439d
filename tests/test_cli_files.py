"""Looking at files from the command line, what it reads, and help from the op table."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskserve import errors, folders, requests
from maskserve.ops import OPS, verbs
from maskserve.payload.format import Limits
from maskserve_cli import exits, inputs, words
from tests.command_line import (  # noqa: F401  # fixtures are found by name
    ROOT,
    Maskserve,
    folder_fixture,
    maskserve_fixture,
    one_line,
)

# -- looking at files -------------------------------------------------------------------------------------------------


def test_info_lists_variables_with_dims_and_masks(maskserve: Maskserve) -> None:
    ran = maskserve("info", "rain.safetensors")
    assert ran.lines[0].startswith("rain.safetensors: safetensors, ")
    assert "rain  f32   (time 2, lat 3)  24 bytes  rain.mask (true = valid)" in ran.text
    assert "lat   f64   (lat 3)          24 bytes  coordinate" in ran.text
    assert "valid  masked" not in ran.text


def test_info_counts_what_cells_are(maskserve: Maskserve) -> None:
    ran = maskserve("info", "--stats", "--json", "rain.safetensors")
    counts = {v["name"]: v["counts"] for v in json.loads(ran.out)["variables"]}
    assert counts["rain"] == {"valid": 4, "masked": 2, "nan": 0, "inf": 0}
    assert json.loads(maskserve("info", "--stats", "--json", "nan.safetensors").out)["variables"][0]["counts"] == {
        "valid": 3, "masked": 0, "nan": 1, "inf": 1,
    }  # fmt: skip


def test_info_counts_every_kind_of_mask(maskserve: Maskserve) -> None:
    save_file(
        {
            "a": np.zeros((2, 9), "f4"), "a.lengths": np.array([0, 5]),
            "b": np.zeros((2, 9), "f4"), "b.bitmask": np.array([[255, 1], [1, 0]], "u1"),
            "c": np.zeros((2, 9), "f4"), "c.mask": np.array([[True], [False]]),
        },
        "kinds.safetensors",
    )  # fmt: skip
    counts = {
        v["name"]: v["counts"]["valid"]
        for v in json.loads(maskserve("info", "--stats", "--json", "kinds.safetensors").out)["variables"]
    }
    assert counts == {"a": 5, "b": 10, "c": 9}


def test_info_of_masks_that_do_not_add_up_lists_the_tensors_first(maskserve: Maskserve) -> None:
    ran = maskserve("info", "orphan.safetensors")
    assert ran.code == 65
    assert "b.mask  bool  (1)" in ran.text
    assert one_line(ran).startswith("maskserve: orphan.safetensors: b.mask belongs to")


def test_head_shows_the_first_cells(maskserve: Maskserve) -> None:
    assert maskserve("head", "-n", "1", "rain.safetensors").text == (
        "rain  f32 (time 2, lat 3)  first cells, [:1, :]\n  time \\ lat  -10   0  10.5\n        2001    1  --     3\n"
    )
    assert maskserve("head", "-n", "2", "plain.safetensors").lines[1:] == ["  0  0", "  1  1"]


def test_head_as_json_has_null_for_a_masked_cell(maskserve: Maskserve) -> None:
    assert json.loads(maskserve("head", "-n", "1", "--json", "rain.safetensors").out) == [
        {
            "name": "rain", "dtype": "f32", "shape": [2, 3], "dims": ["time", "lat"],
            "part": [1, 3], "values": [1.0, None, 3.0],
        }
    ]  # fmt: skip


def test_head_shows_as_many_rows_as_asked_for(maskserve: Maskserve) -> None:
    save_file({"data": np.arange(100)}, "long.safetensors")
    assert [line.split()[-1] for line in maskserve("head", "-n", "50", "long.safetensors").lines[1:]] == [
        str(i) for i in range(50)
    ]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1, 1), (3, 4, 5, 200)])
def test_head_takes_any_shape(maskserve: Maskserve, shape: tuple[int, ...]) -> None:
    save_file({"data": np.ones(shape, "f4")}, "shape.safetensors")
    ran = maskserve("head", "shape.safetensors")
    assert (ran.code, ran.err) == (0, "")


def test_validate_says_ok_or_what_is_wrong_a_line_each(maskserve: Maskserve) -> None:
    ran = maskserve("validate", "rain.safetensors", "orphan.safetensors", "question.json", "none")
    assert ran.code == 65
    assert ran.lines == [
        "rain.safetensors: ok, 1 variable",
        "orphan.safetensors: b.mask belongs to a variable b, which is not in the payload; rename it or remove it",
        "question.json: ok, 1 variable",
        "none: cannot be opened: No such file or directory",
    ]
    assert maskserve("validate", "rain.safetensors").code == 0
    assert maskserve("validate", "none").code == 66


def test_validate_looks_into_the_masks(maskserve: Maskserve) -> None:
    save_file({"a": np.zeros(2, "f4"), "a.mask": np.array([1, 2], "u1")}, "two.safetensors")
    save_file({"a": np.zeros((1, 4), "f4"), "a.lengths": np.array([5])}, "long.safetensors")
    ran = maskserve("validate", "two.safetensors", "long.safetensors", "--json")
    assert [json.loads(line)["code"] for line in ran.lines] == ["mask_dtype", "bad_mask"]


def test_ops_lists_every_row_and_one_row_s_parameters(maskserve: Maskserve) -> None:
    text = maskserve("ops").text
    assert all(row.summary in text for row in OPS.values())
    row = requests.rows(verbs()[0])[0]
    text = " ".join(maskserve("ops", row.name).text.split())
    assert all(words.flag(p) in text and p.help in text for p in row.requestable)
    schemas = {record["name"]: record["parameters"] for record in json.loads(maskserve("ops", "--json").out)}
    assert schemas[row.name] == requests.schema(row)
    assert set(schemas) == set(OPS)


def test_doctor_says_what_there_is_and_where_settings_come_from(
    maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKSERVE_THREADS", "3")
    ran = maskserve("doctor")
    assert re.search("\n  threads +3 +MASKSERVE_THREADS\n", ran.text)
    assert "reference: " in ran.text
    record = json.loads(maskserve("doctor", "--json").out)
    assert record["settings"]["threads"] == {"value": 3, "source": "MASKSERVE_THREADS"}


def test_doctor_says_where_few_files_may_be_open(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    for hard, is_low in ((1024, True), (20000, False), (-1, False)):
        monkeypatch.setattr("resource.getrlimit", lambda _, hard=hard: (hard, hard))
        assert ("open files: at most 1024" in maskserve("doctor").text) is is_low


def test_a_variable_that_sets_nothing_is_warned_of(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSERVE_THRAEDS", "3")
    monkeypatch.setenv("MASKSERVE_SERVICE_PORT", "8000")
    ran = maskserve("info", "plain.safetensors")
    assert (ran.code, one_line(ran)) == (
        0, "maskserve: warning: MASKSERVE_THRAEDS is not a setting; did you mean MASKSERVE_THREADS?",
    )  # fmt: skip


def test_serve_hands_its_settings_to_the_service(maskserve: Maskserve, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskserve_api import server

    given: dict[str, Any] = {}
    monkeypatch.setattr(server, "serve", lambda **words: given.update(words) or 0)
    monkeypatch.setenv("MASKSERVE_SERVE_GRACE", "1.5")
    monkeypatch.setenv("MASKSERVE_MAX_TENSORS", "3")
    hosts = ("--allowed-host", "a.example", "--allowed-host", "B.example")
    assert maskserve("serve", "--port", "0", "--max-body", "1MiB", *hosts).code == 0
    assert given == {
        "host": "127.0.0.1", "port": 0, "max_body": 2**20, "request_timeout": 60.0, "grace": 1.5, "queue": 512,
        "header_timeout": 10.0, "keep_alive": 5.0, "drain_delay": 0.0, "keys_file": "", "allow_anonymous": False,
        "allowed_host": ("a.example", "b.example"), "log": "json", "limits": Limits(tensors=3), "memory": 0,
        "stores": (), "jobs": False, "jobs_folder": "", "result_ttl": 86400.0, "jobs_running": 2, "jobs_max_body": 4 * 2**30,
        "jobs_per_key": 1000, "jobs_queue": 10_000, "jobs_disk": 16 * 2**30,
    }  # fmt: skip


# -- help, and the table behind it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", verbs())
def test_a_verb_s_help_shows_examples_first_and_every_parameter(maskserve: Maskserve, verb: str) -> None:
    text = maskserve(verb, "--help").text
    assert text.startswith("Examples:\n  maskserve")
    assert text.index("Examples:") < text.index("Usage:") < text.index("Output:")
    assert all(f"{words.flag(parameter)} " in text for parameter in requests.parameters(verb))


@pytest.mark.parametrize("verb", verbs())
def test_a_verb_s_examples_work(maskserve: Maskserve, verb: str) -> None:
    for line in words.examples(verb).splitlines():
        if "|" not in line:
            ran = maskserve(*shlex.split(line)[1:])
            assert ran.code == 0, (line, ran.err)


def test_help_names_every_command(maskserve: Maskserve) -> None:
    text = maskserve("--help").text
    assert text == maskserve().text
    ours = ("info", "head", "validate", "convert", "diff", "ops", "serve", "doctor")
    assert all(f"\n  {name} " in text for name in (*verbs(), *ours))
    codes = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert set(exits.MEANINGS) == codes
    assert all(f"\n  {code:<5}" in text and meaning in text for code, meaning in exits.MEANINGS.items())


def test_no_op_and_no_parameter_of_an_op_is_named_in_the_command_line() -> None:
    ours = {p.name for verb in verbs() for p in (*requests.COMMON, *requests.RUNNING)}
    ops = {word for row in OPS.values() for word in (row.name, *row.aliases) if row.verb}
    parameters = {p.name for row in OPS.values() if row.verb for p in row.requestable} - ours
    # also the count of NaN and the column of masks in info, the array module's int64, a setting's value
    forbidden = (ops | parameters) - {"nan", "mask", "q", "value"}
    for path in (ROOT / "cli/maskserve_cli").glob("*.py"):
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not strings & forbidden, path.name


def test_a_parameter_does_not_take_the_name_of_an_option_of_ours() -> None:
    from maskserve_cli.verbs import OUTPUT_OPTIONS

    own = {"op", "files", *(option.name for option in OUTPUT_OPTIONS)}
    for verb in verbs():
        assert not own & {parameter.name for parameter in requests.parameters(verb)}


# -- folders and patterns ---------------------------------------------------------------------------------------------


def days(*names: str) -> None:
    """A file of one row for each name, whose cell is its place."""
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": np.array([[number]])}, name)


@pytest.mark.parametrize(
    ("path", "answer"),
    [("days", "0\n1\n2\n"), ("days/", "0\n1\n2\n"), ("days/*.safetensors", "1\n2\n"), ("days/**/[0]*", "0\n")],
)
def test_a_folder_and_a_quoted_pattern_are_one_tensor_in_the_order_of_their_names(
    maskserve: Maskserve, path: str, answer: str
) -> None:
    days("days/0/0.safetensors", "days/1.safetensors", "days/2.safetensors", "days/.hidden.safetensors")
    Path("days/README.txt").write_text("what these are")
    assert maskserve("reduce", "--op", "sum", "--dim", "1", path).text == answer


def test_what_a_folder_has_of_no_known_suffix_is_told_of_and_a_pattern_takes_it(maskserve: Maskserve) -> None:
    days("days/a", "days/b.safetensors", "days/c.old")
    Path("days/README.txt").write_text("what these are")
    ran = maskserve("reduce", "--op", "sum", "--dim", "0", "days")
    assert (ran.code, ran.text) == (0, "1\n")
    assert (
        "maskserve: days: passed over README.txt and 1 more: no such suffix is read; a pattern, or its name, takes"
        in ran.err
    )
    assert maskserve("reduce", "--op", "sum", "--dim", "0", "days/[abc]*").text == "3\n"


def test_a_folder_of_zarr_is_one_input(maskserve: Maskserve) -> None:
    days("a.safetensors")
    Path("days").mkdir()
    for name in ("a", "b"):
        assert maskserve("convert", "a.safetensors", f"days/{name}.zarr").code == 0
    for path, n in (("days", 2), ("days/**/*", 2), ("days/b.zarr", 1), ("days/b.zarr/", 1), ("days/b*", 1)):
        ran = maskserve("reduce", "--op", "count", "--tensor", "x", path)
        assert (ran.code, ran.text) == (0, f"{n}\n"), ran.err


def test_a_folder_of_states_is_merged_whatever_their_suffix(maskserve: Maskserve) -> None:
    days("a.safetensors")
    Path("states").mkdir()
    for part in ("0", "1"):
        words = ("--shard", f"{part}/2", "--state", f"states/of.{part}")
        assert maskserve("reduce", "--op", "sum", "--dim", "1", *words, "a.safetensors").code == 0
    assert maskserve("merge", "states/").text == maskserve("reduce", "--op", "sum", "--dim", "1", "a.safetensors").text


@pytest.mark.parametrize("path", ["empty/", "empty", "no/*.safetensors"])
def test_a_folder_or_pattern_that_means_nothing_is_no_input(maskserve: Maskserve, path: str) -> None:
    Path("empty").mkdir()
    ran = maskserve("reduce", "--op", "sum", path)
    assert ran.code == 66
    assert one_line(ran) == f"maskserve: {path} means no file: none is below it, or like it"


@pytest.mark.parametrize("path", ["days", "days/**/*.safetensors", "days/*/*/*"])
def test_a_link_to_a_folder_above_is_not_followed_round(maskserve: Maskserve, path: str) -> None:
    days("days/a/0/0.safetensors", "days/a/1/1.safetensors")
    Path("days/a/back").symlink_to("../../days")
    assert maskserve("reduce", "--op", "count", path).text == "2\n"


@pytest.mark.parametrize(
    ("path", "named"), [("days", "days/more"), ("days/**/*", "days/more"), ("days/m*/*", "days/more")]
)
def test_a_folder_that_cannot_be_read_is_named(
    maskserve: Maskserve, path: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    days("days/0.safetensors", "days/more/1.safetensors")
    scandir = os.scandir

    def refusing(folder: str) -> Any:
        if "more" in str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    ran = maskserve("reduce", "--op", "sum", path)
    assert (ran.code, one_line(ran)) == (77, f"maskserve: {named} cannot be read: Permission denied")


@pytest.mark.parametrize("path", ["days", "days/*"])
def test_a_pipe_in_a_folder_is_not_waited_for(maskserve: Maskserve, path: str) -> None:
    days("days/0.safetensors")
    os.mkfifo("days/1.safetensors")
    ran = maskserve("reduce", "--op", "sum", path)
    expected = "maskserve: days/1.safetensors is a FIFO; a folder or a pattern means regular files"
    assert (ran.code, one_line(ran)) == (2, expected)
    ran = maskserve("validate", path)
    assert (ran.code, ran.text.splitlines()) == (
        2,
        [
            "days/0.safetensors: ok, 1 variable",
            "days/1.safetensors: is a FIFO; a folder or a pattern means regular files",
        ],
    )


def test_each_file_of_a_folder_is_read_once_whatever_links_there_are(maskserve: Maskserve) -> None:
    """By its own name; two hard links are two files, and a link to a file elsewhere is one."""
    days("days/b.safetensors", "days/deep/c.safetensors", "other.safetensors")
    Path("days/a.safetensors").symlink_to("b.safetensors")
    for name in ("days/o1.safetensors", "days/o2.safetensors"):
        Path(name).symlink_to("../other.safetensors")
    os.link("days/b.safetensors", "days/hard.safetensors")
    for i in range(24):  # 2^24 ways lead through these
        Path(f"days/deep{i}").mkdir()
        for name in ("left", "right"):
            Path(f"days/deep{i}/{name}").symlink_to(f"../deep{(i + 1) % 24}")
    for path in ("days", "days/**/*.safetensors"):
        ran = maskserve("reduce", "--op", "count", path)
        assert ran.text == "4\n", ran.err
        assert "days/a.safetensors and " in ran.err
        assert "more: a link to what is read by its own name" in ran.err


def test_folders_of_any_depth_are_read(maskserve: Maskserve) -> None:
    here = os.getcwd()
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    days("x.safetensors")
    os.chdir(here)
    ran = maskserve("reduce", "--op", "count", "d")
    subprocess.run(["rm", "-r", "d"], check=True)  # shutil, by which pytest would, takes a call a level too
    assert ran.text == "1\n"


def test_a_command_that_reads_one_file_takes_the_only_one_that_a_folder_has(maskserve: Maskserve) -> None:
    days("one/0.safetensors", "days/0.safetensors", "days/1.safetensors")
    Path("days/README.txt").write_text("none of data")
    for command, *more in (("info",), ("head",), ("convert", "out.npz")):
        assert maskserve(command, "one", *more).code == 0
        ran = maskserve(command, "days", *more)
        expected = "maskserve: days means 2 files, and one is read: name it, such as days/0.safetensors"
        assert (ran.code, one_line(ran)) == (2, expected)
        assert (
            one_line(maskserve(command, "days/x*", *more))
            == "maskserve: days/x* means no file: none is below it, or like it"
        )
    ran = maskserve("validate", "days")
    assert ran.lines == [f"days/{n}.safetensors: ok, 1 variable" for n in (0, 1)]
    assert one_line(ran).startswith("maskserve: days: passed over README.txt")


def test_a_folder_is_told_of_once_whoever_reads_it(maskserve: Maskserve) -> None:
    days("days/0.safetensors", "days/1.safetensors")
    Path("days/README.txt").write_text("none of data")
    assert maskserve("reduce", "--op", "sum", "days", "--workers", "2").err.count("README.txt") == 1


def test_a_path_of_nothing_is_shown(maskserve: Maskserve) -> None:
    assert one_line(maskserve("info", "")) == "maskserve: '' cannot be opened: No such file or directory"


def test_names_are_matched_as_a_shell_matches_them(maskserve: Maskserve) -> None:
    days("d/a/b/0", "d/a/1", "d/we[1]rd/2", "d/.h/3", "d/a/.4", "d/b/a/5")
    for pattern, found in (
        ("d/**", "0125"), ("d/**/a/*", "15"), ("d/**/**/b/*", "0"), ("d/[ab]/?", "1"), ("d/we[[]1]rd/*", "2"), ("d/.h/*", "3"),
        ("d/.*/*", "3"), ("d/a/.*", "4"), ("./d/a/*", "1"), ("d/../d/a/[!0]", "1"), ("d/*/b/**/*", "0"), ("d/**/**", "0125"),
    ):  # fmt: skip
        names = (os.path.basename(path).strip(".") for path in folders.matching(pattern))
        assert sorted(names) == sorted(found), pattern


@pytest.mark.parametrize("command", ["info", "head", "validate"])
def test_what_reads_a_file_says_that_a_folder_has_none(maskserve: Maskserve, command: str) -> None:
    Path("days").mkdir()
    ran = maskserve(command, "days")
    assert (ran.code, one_line(ran)) == (66, "maskserve: days means no file: none is below it, or like it")


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b'{"data":', True), (b"  \n{   ", True), (b"[1, 2]  ", True), (b"        ", True), (b"", False),
        ((123).to_bytes(8, "little"), False), ((91).to_bytes(8, "little"), False), (b"PK\x03\x04    ", False),
    ],
)  # fmt: skip
def test_json_is_told_from_a_header_length(first: bytes, answer: bool) -> None:
    assert inputs.is_json(first) is answer


def test_a_header_of_123_bytes_is_not_json(maskserve: Maskserve) -> None:
    start = b'{"data":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}'
    header = start + b" " * (122 - len(start)) + b"}"
    Path("brace").write_bytes((123).to_bytes(8, "little") + header + np.array([2.5]).tobytes())
    assert maskserve("reduce", "--op", "sum", "brace").text == "2.5\n"


def test_a_stream_is_read_as_far_as_its_header_announces(folder: Path) -> None:
    class Endless:
        def __init__(self, start: bytes) -> None:
            self.start, self.n = start, 0

        def read(self, n: int) -> bytes:
            chunk, self.start = self.start[:n], self.start[n:]
            self.n += n
            return chunk + b"\0" * (n - len(chunk))

    whole = (folder / "plain.safetensors").read_bytes()
    stream = Endless(whole)
    with pytest.raises(errors.PayloadError):
        inputs.read_stream(stream, "stdin", Limits())  # type: ignore[arg-type]  # read is all it needs
    assert stream.n == len(whole) + 1
