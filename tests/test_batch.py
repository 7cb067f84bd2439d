"""batch: what a job file says is checked before any work; a run does what is missing, lists what failed, and can be stopped."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load

from maskserve.batch.job import KEYS, REQUIRED, reference
from tests.batch_job import JOB, batch, check_ledger, errors, ledger, make_inputs, outputs, start, summary, temps
from tests.command_line import (  # noqa: F401  # a fixture is found by its name
    COMMAND,
    Maskserve,
    environment,
    folder_fixture,
    maskserve_fixture,
    process,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(name="job")
def job_fixture(folder: Path) -> Path:
    """A job file over rain.safetensors and plain.safetensors."""
    text = JOB.replace('["in/*"]', '["rain.safetensors", "plain.safetensors"]')
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


# -- the job file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (("version = 1", ""), 78, "version is missing: 1, the version of the job file's form"),
        (("version = 1", "version = 2"), 78, "version is 2; it must be 1"),
        (('op = "mean"', 'op = "mean"\nopp = "max"'), 78, "mean has no parameter 'opp'"),
        (('op = "mean"', 'op = "mean"\nopp = "max"'), 78, "did you mean op?"),
        (("version = 1", "version = 1\nworkers = 2"), 78, "'workers' is not a key of a job file; it belongs to [run]"),
        (("[output]", "[outptu]"), 78, "'outptu' is not a key of a job file; did you mean output?"),
        (("workers = 2", "worker = 2"), 78, "'worker' is not a key of [run], which has workers, engine, memory, retries, "
         "max_errors, summary; did you mean workers?"),
        (("workers = 2", "workers = -2"), 78, "run.workers is -2; it must be a whole number, 0 or more"),
        (("workers = 2", 'engine = "spark"'), 78, "run.engine is 'spark'; it must be one of local, ray"),
        (("workers = 2", 'memory = "2 XB"'), 78, "run.memory is '2 XB'; it must be a size of 64MB or more"),
        (('to = "out"', ""), 78, "output.to is missing: the folder for outputs"),
        (('to = "out"', 'to = "out"\nexists = "skip"'), 78, "output.exists is 'skip'; it must be one of resume, replace, error"),
        (('verb = "reduce"', 'verb = "redcue"'), 78, "[request] has the verb 'redcue'; it is one of reduce,"),
        (('verb = "reduce"', ""), 78, "[request] has no verb"),
        (('op = "mean"', 'op = "maen"'), 78, "did you mean mean?"),
        (("dim = 0", "dmi = 0"), 78, "mean has no parameter 'dmi'"),
        (("dim = 0", "dim = [0.5]"), 78, "mean: dim: give a dim's number or name"),
        (('["rain.safetensors", "plain.safetensors"]', "[]"), 78, "[input] says neither paths nor list"),
        (('["rain.safetensors", "plain.safetensors"]', '["none*"]'), 66, "there is no input: none* match nothing in"),
        (('["rain.safetensors", "plain.safetensors"]', '["ftp://bucket/rain/"]'), 78, "there are addresses of s3://"),
        (('["rain.safetensors", "plain.safetensors"]', '["https://host/x?Signature=a"]'), 78, "its addresses are not signed"),
        (('to = "out"', 'to = "https://host/out"'), 78, "outputs go to a folder, or to s3, gs, az"),
        (('to = "out"', 'to = "out"\nname = "same"'), 78, "plain.safetensors and rain.safetensors would both be written to same"),
        (('to = "out"', 'to = "out"\nname = "{stme}"'), 78, "a name is made of text and {stem}, {name}, {path}, {index}"),
        (('to = "out"', 'to = "out"\nname = "{stem}.nc"'), 78, "an answer is written as .safetensors, .json or with no suffix"),
        (('to = "out"', 'to = "out"\nname = "../{stem}"'), 78, "give a path below the output folder"),
        (('to = "out"', 'to = "."'), 78, "would be an input and an output"),
        (("version = 1", "version = "), 78, "job.toml is not TOML"),
    ],
)  # fmt: skip
def test_a_slip_is_found_before_any_work(
    maskserve: Maskserve, job: Path, change: tuple[str, str], code: int, says: str
) -> None:
    assert change[0] in job.read_text()
    job.write_text(job.read_text().replace(*change))
    ran = maskserve("batch", "job.toml")
    assert ran.code == code
    assert says in ran.err
    assert len([line for line in ran.err.splitlines() if "matches nothing" not in line]) == 1
    assert not list((job.parent / "out").rglob("part-*")), "no input is listed as failed"


@pytest.mark.parametrize("word", ["x", "requst.op=max", "=3", "request=3"])
def test_a_slip_in_set_is_found_too(maskserve: Maskserve, job: Path, word: str) -> None:
    assert maskserve("batch", "job.toml", "--set", word).code == 78


def test_the_reference_names_every_key(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "batch.md").read_text()
    assert reference() in page, "stale: put the output of python -m maskserve.batch.job into docs/batch.md"
    assert [key.name for key in KEYS if key.default is REQUIRED] == ["version", "to"]


# -- what a run does ------------------------------------------------------------------------------------------------


def test_each_output_is_what_the_command_line_gives(job: Path) -> None:
    folder = job.parent
    assert batch(folder).code == 0
    for name in ("rain", "plain"):
        alone = process("reduce", "--op", "mean", "--dim", "0", f"{name}.safetensors", "-o", f"{name}.out", cwd=folder)
        assert (alone.code, alone.err.split(":")[0]) == (2, "maskserve")  # .out is no form of an answer
        alone = process("reduce", "--op", "mean", "--dim", "0", f"{name}.safetensors", "-o", "-", cwd=folder)
        assert (folder / "out" / f"{name}.safetensors").read_bytes() == alone.out
    assert summary(folder) == {**summary(folder), "inputs": 2, "done": 2, "skipped": 0, "failed": 0, "exit": 0,
                               "interrupted": False}  # fmt: skip
    assert list(summary(folder)) == [
        "inputs", "done", "skipped", "failed", "bytes_read", "seconds", "exit", "interrupted"
    ]  # fmt: skip
    assert list(ledger(folder)[0]) == [
        "uri", "size", "mtime", "request_sha256", "version", "output", "output_sha256", "attempts", "seconds"
    ]  # fmt: skip
    check_ledger(folder)


def test_words_after_set_go_before_the_file(job: Path) -> None:
    folder = job.parent
    ran = batch(
        folder,
        "--set",
        "request.op=max",
        "--set",
        "output.to=most",
        "--set",
        "output.name={index:03d}-{name}",
        "--json",
    )
    assert ran.code == 0
    assert json.loads(ran.out)["done"] == 2
    assert sorted(outputs(folder, "most")) == ["000-plain.safetensors", "001-rain.safetensors"]
    assert load((folder / "most" / "001-rain.safetensors").read_bytes())["rain"].tolist() == [4, 0, 6]


def test_started_again_only_what_is_missing_is_done(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 8)
    assert batch(tmp_path).code == 0
    (tmp_path / "out" / names[1]).unlink()
    (tmp_path / "in" / names[2]).write_bytes((tmp_path / "in" / names[3]).read_bytes())
    (tmp_path / "in" / "new.safetensors").write_bytes((tmp_path / "in" / names[4]).read_bytes())
    assert batch(tmp_path).code == 0
    assert [summary(tmp_path)[key] for key in ("inputs", "done", "skipped")] == [9, 3, 6]
    again = [os.path.basename(line["uri"]) for line in ledger(tmp_path)[8:]]
    assert sorted(again) == [names[1], names[2], "new.safetensors"]
    assert outputs(tmp_path)[names[2]] == outputs(tmp_path)[names[3]]


def test_where_nothing_is_to_do_no_worker_starts_and_no_torch_is_imported(tmp_path: Path) -> None:
    make_inputs(tmp_path, 3)
    assert batch(tmp_path).code == 0
    code = (
        "import sys, subprocess\nfrom maskserve_cli.app import main\nsubprocess.Popen = None\n"
        "code = main(['batch', 'job.toml'])\nsys.exit(code or ('torch' in sys.modules) * 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr.split(b";")[0]) == (0, b"maskserve: 3 inputs: 0 done, 3 done before")


OPENED = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from maskserve_cli.app import main
code = main(["batch", "job.toml"])
print([path for path in opened if "in/" in path or "out/" in path])
sys.exit(code)
"""


def test_of_inputs_that_are_done_none_is_opened_and_the_ledger_is_read_once(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 1)
    assert batch(tmp_path).code == 0
    line = ledger(tmp_path)[0]
    lines = []
    for number in range(1000):
        name = f"g{number:05d}.safetensors"
        os.link(tmp_path / "in" / names[0], tmp_path / "in" / name)
        os.link(tmp_path / "out" / names[0], tmp_path / "out" / name)
        lines.append(json.dumps({**line, "uri": f"in/{name}", "output": f"out/{name}"}) + "\n")
    (tmp_path / "out" / "_maskserve" / "part-0of1-20200101T000000.000000Z.jsonl").write_text("".join(lines))
    ran = subprocess.run([sys.executable, "-c", OPENED], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1001 inputs: 0 done, 1001 done before" in ran.stderr
    opened = [path for path in ast.literal_eval(ran.stdout.splitlines()[-1]) if "site-packages" not in path]
    assert [path for path in opened if path.endswith(".safetensors")] == []
    parts = [path for path in opened if "part-" in path]
    assert len(parts) == len(set(parts)) > 1


def test_another_request_or_version_in_the_folder_is_refused_unless_all_is_replaced(tmp_path: Path) -> None:
    make_inputs(tmp_path, 3)
    assert batch(tmp_path).code == 0
    before = outputs(tmp_path)
    ran = batch(tmp_path, "--set", "request.op=max")
    assert ran.code == 78
    assert "out has results of another request, such as out/f0000" in ran.err
    part = next((tmp_path / "out" / "_maskserve").glob("part-*"))
    part.write_text(part.read_text().replace('"version": "', '"version": "0.0.1-'))
    assert "out has results of maskserve 0.0.1-" in batch(tmp_path).err
    assert outputs(tmp_path) == before
    assert batch(tmp_path, "--set", "request.op=max", "--set", "output.exists=replace").code == 0
    assert outputs(tmp_path).keys() == before.keys()
    assert all(before[name] != data for name, data in outputs(tmp_path).items())
    assert "3 done before" in batch(tmp_path, "--set", "request.op=max").err


def test_an_output_that_stands_can_be_an_error(tmp_path: Path) -> None:
    make_inputs(tmp_path, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f00001.safetensors").write_text("mine")
    ran = batch(tmp_path, "--set", "output.exists=error")
    assert ran.code == 73
    assert 'out/f00001.safetensors exists, and output.exists is "error"' in ran.err
    assert outputs(tmp_path) == {"f00001.safetensors": b"mine"}


def test_shards_do_every_input_once(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 7)
    assert batch(tmp_path, "--shard", "0/3").code == 0
    assert batch(tmp_path, "--shard", "auto/3", env={"JOB_COMPLETION_INDEX": "1"}).code == 0
    assert batch(tmp_path, "--shard", "auto/3", env={"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3"}).code == 0
    check_ledger(tmp_path)
    assert sorted(outputs(tmp_path)) == names
    own = sorted(os.listdir(tmp_path / "out" / "_maskserve"))
    assert [name for name in own if name.startswith("summary")] == [f"summary-{i}of3.json" for i in range(3)]
    assert "7 done before" in batch(tmp_path).err
    assert batch(tmp_path, "--shard", "3/3").code == 2


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(tmp_path: Path) -> None:
    make_inputs(tmp_path, 3)
    ran = batch(tmp_path, "--dry-run")
    assert ran.code == 0
    assert "to do    3, 13.1 kB" in ran.out or re.search(r"to do    3, 1\d\.\d kB", ran.out)
    assert "outputs  to out, the first as out/f00000.safetensors" in ran.out
    assert not (tmp_path / "out").exists()
    outlook = json.loads(batch(tmp_path, "--dry-run", "--json", "--workers", "2").out)
    assert (outlook["inputs"], outlook["to_do"], outlook["done"], outlook["workers"]) == (3, 3, 0, 2)


def test_lists_folders_and_patterns_find_each_file_once(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 3)
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / "[1].safetensors").write_bytes((tmp_path / "in" / names[0]).read_bytes())
    (tmp_path / "list.txt").write_text(f"# ours\n{tmp_path}/in/{names[0]}\n\nin/deep/[1].safetensors\n")
    paths = '["in/", "./in/f00001*", "in/**/*.safetensors"]'
    job = JOB.replace('["in/*"]', f'{paths}\nlist = "list.txt"').replace('to = "out"', 'to = "out"\nname = "{path}"')
    (tmp_path / "job.toml").write_text(job)
    assert batch(tmp_path).code == 0
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / "in").rglob("*.safetensors"))
    assert found == ["in/deep/[1].safetensors", *(f"in/{name}" for name in names)]


def test_a_folder_means_its_files_of_data_with_or_without_a_slash(tmp_path: Path) -> None:
    make_inputs(tmp_path, 2)
    (tmp_path / "in" / "README.txt").write_text("what these are")
    for said in ("in", "in/"):
        (tmp_path / "job.toml").write_text(JOB.replace('["in/*"]', f'["{said}"]'))
        ran = batch(tmp_path, "--dry-run")
        assert "inputs   2," in ran.out
        assert f"{said}: passed over README.txt: no such suffix is read; a pattern, or its name, takes it" in ran.err
    (tmp_path / "job.toml").write_text(JOB)
    assert "inputs   3," in batch(tmp_path, "--dry-run").out, "a pattern takes what it says"


def test_files_are_converted_with_their_masks(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 2)
    (tmp_path / "in" / "bad.safetensors").write_text("no")
    job = JOB.replace('verb = "reduce"\nop = "mean"\ndim = 0', 'verb = "convert"').replace(
        'to = "out"', 'to = "out"\nname = "{stem}.nc"'
    )
    (tmp_path / "job.toml").write_text(job)
    ran = batch(tmp_path)
    assert ran.code == 65, ran.err
    assert sorted(outputs(tmp_path)) == ["f00000.nc", "f00001.nc"]
    check_ledger(tmp_path)
    back = process("convert", "out/f00000.nc", "back.safetensors", cwd=tmp_path)
    assert back.code == 0
    mask = load((tmp_path / "in" / names[0]).read_bytes())["rain.mask"]
    assert (load((tmp_path / "back.safetensors").read_bytes())["rain.mask"] == mask).all()
    assert batch(tmp_path, "--set", 'request.columns="a"').code == 78, "another request"


def test_an_answer_can_be_json_and_an_expression(tmp_path: Path) -> None:
    make_inputs(tmp_path, 2)
    (tmp_path / "job.toml").write_text(
        JOB.replace('verb = "reduce"\nop = "mean"\ndim = 0', 'verb = "eval"\nexpr = "sum(x)"').replace(
            'to = "out"', 'to = "out"\nname = "{stem}.json"'
        )
    )
    assert batch(tmp_path).code == 0
    assert "data" in json.loads(outputs(tmp_path)["f00000.json"])


# -- what fails -----------------------------------------------------------------------------------------------------


def test_what_failed_is_listed_and_tried_again(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 5)
    good = (tmp_path / "in" / names[3]).read_bytes()
    (tmp_path / "in" / names[3]).write_bytes(good[:100])
    ran = batch(tmp_path)
    assert ran.code == 65
    assert "5 inputs: 4 done, 1 failed" in ran.err
    assert "why: out/_maskserve/errors.jsonl" in ran.err
    record = errors(tmp_path)[names[3]]
    assert list(record) == ["uri", "code", "exit", "message", "attempts"]
    assert (record["uri"], record["code"], record["exit"], record["attempts"]) == (
        f"in/{names[3]}",
        "malformed_payload",
        65,
        1,
    )
    assert [summary(tmp_path)[key] for key in ("done", "failed", "exit")] == [4, 1, 65]

    (tmp_path / "in" / names[3]).write_bytes(good)
    assert batch(tmp_path).code == 0
    assert errors(tmp_path) == {}
    check_ledger(tmp_path)


def test_the_first_failure_can_end_the_job(tmp_path: Path) -> None:
    names = make_inputs(tmp_path, 40)
    for name in (names[0], names[39]):
        (tmp_path / "in" / name).write_text("x")
    ran = batch(tmp_path, "--fail-fast", "--workers", "1")
    assert ran.code == 65
    assert "stopped by run.max_errors (--fail-fast): without it, the same command tries all" in ran.err
    assert list(errors(tmp_path)) == [names[0]]
    assert f"maskserve: in/{names[0]} failed first: {errors(tmp_path)[names[0]]['message']}\n" in ran.err
    assert summary(tmp_path)["done"] < 39
    assert batch(tmp_path, "--set", "run.max_errors=2").code == 65
    assert summary(tmp_path)["failed"] == 2
    assert summary(tmp_path)["done"] + summary(tmp_path)["skipped"] == 38


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_its_code_and_the_next_start_goes_on(tmp_path: Path, number: int, code: int) -> None:
    make_inputs(tmp_path, 1500)
    with start(tmp_path) as running:
        wait_for_outputs(tmp_path)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert "the same command goes on" in err
    first = summary(tmp_path)
    assert (first["interrupted"], first["exit"]) == (True, code)
    assert 0 < first["done"] == len(ledger(tmp_path)) < 1500
    assert temps(tmp_path) == []
    assert batch(tmp_path).code == 0
    assert summary(tmp_path)["skipped"] == first["done"]
    check_ledger(tmp_path)
    assert len(outputs(tmp_path)) == 1500


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    make_inputs(tmp_path, 1500)
    with start(tmp_path) as running:
        wait_for_outputs(tmp_path)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.01)
        start_s = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
        assert time.monotonic() - start_s < 5
    assert running.returncode == 143
    assert summary(tmp_path)["interrupted"] is True
    assert batch(tmp_path).code == 0
    assert temps(tmp_path) == []
    assert len(outputs(tmp_path)) == 1500


def test_the_same_job_twice_at_once_is_refused(tmp_path: Path) -> None:
    make_inputs(tmp_path, 3000)
    with start(tmp_path) as running:
        wait_for_outputs(tmp_path)
        ran = batch(tmp_path)
        assert ran.code == 75
        assert "another run of this job works here: it holds out/_maskserve/part-0of1-" in ran.err
        assert running.wait(timeout=120) == 0
    check_ledger(tmp_path)


def wait_for_outputs(folder: Path) -> None:
    """Until the first lines are in the ledger."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        if ledger(folder):
            return
        time.sleep(0.005)
    raise AssertionError("no output in a minute")


def test_a_device_that_is_not_there_ends_a_job_before_any_work(job: Path) -> None:
    job.write_text(job.read_text().replace('verb = "reduce"', 'verb = "reduce"\ndevice = "cuda:7"'))
    ended = batch(job.parent)
    assert ended.code == 78
    assert ended.err.startswith("maskserve: device cuda:7 is not there: torch sees ")
    assert not list((job.parent / "out").rglob("part-*")), "no input is listed as failed"
