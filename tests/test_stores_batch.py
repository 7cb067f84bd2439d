"""Batch jobs whose inputs, outputs and ledger lie in a store: killed at any time and started again, each output is right."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from maskserve.batch import stored as stored_ledger
from maskserve.batch.job import read_job
from maskserve.batch.ledger import Entry, entries
from maskserve.batch.run import plan
from maskserve.errors import OutputExistsError, SettingsError
from maskserve.shards import WHOLE
from tests.batch_job import JOB, batch, make_inputs, payload, start
from tests.store_server import Fault, Stored, running_fixture, stored_fixture  # noqa: F401

N = 60


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the job writes in a folder, of files."""
    folder = tmp_path_factory.mktemp("expected")
    names = make_inputs(folder, N)
    assert batch(folder, "--workers", "1").code == 0
    return {name: (folder / "out" / name).read_bytes() for name in names}


def make_job(folder: Path, stored: Stored, n: int = N) -> None:
    for number in range(n):
        stored.put(f"in/f{number:05d}.safetensors", payload(number))
    text = JOB.replace('"in/*"', '"s3://bucket/in/*.safetensors"').replace('to = "out"', 'to = "s3://bucket/out"')
    (folder / "job.toml").write_text(text.replace("workers = 2", "workers = 1"))


def test_the_ledger_is_begun_in_a_store_without_writes_of_new_objects(stored: Stored) -> None:
    stored.proxy.faults = [Fault("501", "PUT", times=1)]
    with stored_ledger.StoredPart("s3://bucket/ledger", WHOLE):
        pass
    assert [key for key in stored.keys("ledger") if "/part-" in key]


def lines(stored: Stored) -> list[dict[str, str]]:
    keys = [key for key in stored.keys("out/_maskserve") if "/part-" in key]
    return [json.loads(line) for key in keys for line in stored.get(key).splitlines()]


def outputs(stored: Stored) -> dict[str, bytes]:
    return {key.removeprefix("out/"): stored.get(key) for key in stored.keys("out") if "/_maskserve/" not in key}


def test_a_job_in_a_store_writes_what_one_in_a_folder_does_and_does_it_once(
    stored: Stored, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    make_job(tmp_path, stored)
    stored.put("in/bad.safetensors", b"no payload")
    ended = batch(tmp_path)
    assert ended.code == 65, ended.err
    assert outputs(stored) == expected
    assert "errors.jsonl" in ended.err
    failed = [json.loads(line) for line in stored.get("out/_maskserve/errors.jsonl").splitlines()]
    assert [(one["uri"], one["code"]) for one in failed] == [("s3://bucket/in/bad.safetensors", "malformed_payload")]
    found = lines(stored)
    assert len(found) == N
    assert all(one["etag"].startswith('"') and "mtime" not in one for one in found)
    assert json.loads(stored.get("out/_maskserve/summary.json"))["done"] == N
    stored.put("in/bad.safetensors", payload(0))
    stored.put("in/f00001.safetensors", payload(2))  # another version: done again
    again = batch(tmp_path, "--json")
    assert again.code == 0, again.err
    summary = json.loads(again.out)
    assert (summary["done"], summary["skipped"]) == (2, N - 1)
    assert outputs(stored)["f00001.safetensors"] == outputs(stored)["f00002.safetensors"]
    with pytest.raises(SettingsError, match="results of another request"):
        plan(read_job(str(tmp_path / "job.toml"), ["request.op=max"]))
    with pytest.raises(OutputExistsError):
        plan(read_job(str(tmp_path / "job.toml"), ["output.exists=error"]))


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again_every_output_is_right_and_nothing_noted_is_done_twice(
    stored: Stored, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    make_job(tmp_path, stored)
    stored.proxy.delay_s = 0.15
    n_kills = 0
    for _ in range(12):
        noted = {one["uri"] for one in lines(stored)}
        stored.proxy.log.clear()
        begun = start(tmp_path, start_new_session=True)
        deadline = time.monotonic() + 30
        while begun.poll() is None and time.monotonic() < deadline and len(lines(stored)) < len(noted) + 12:
            time.sleep(0.05)
        if begun.poll() is None:
            os.killpg(begun.pid, signal.SIGKILL)
            n_kills += 1
        begun.communicate()
        reread = {path for method, path, _ in stored.proxy.log if method == "GET" and "/in/" in path}
        assert not {f"s3:/{path}" for path in reread} & noted
        for name, made in outputs(stored).items():
            assert made == expected[name]
        if begun.returncode == 0:
            break
        if n_kills == 2:
            stored.proxy.delay_s = 0.0
            assert batch(tmp_path).code == 0
            break
    assert n_kills >= 1
    assert outputs(stored) == expected
    uris = [one["uri"] for one in lines(stored)]
    assert len(uris) == len(set(uris)) == N
    assert stored.n_uploads() == 0


def test_a_store_that_fails_now_and_then_costs_tries_and_no_output(
    stored: Stored, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    make_job(tmp_path, stored)
    kinds = ("500", "503", "truncated", "reset", "lost", "short")
    stored.proxy.faults = [
        Fault(kind, method, times=3, after=5 * i) for i, kind in enumerate(kinds) for method in ("GET", "PUT")
    ]
    ended = batch(tmp_path)
    assert ended.code == 0, ended.err
    assert outputs(stored) == expected


def test_an_input_that_may_not_be_read_fails_alone_and_a_store_that_may_not_be_written_ends_the_job(
    stored: Stored, tmp_path: Path
) -> None:
    make_job(tmp_path, stored, 3)
    stored.proxy.faults = [Fault("403", ends="f00001.safetensors", times=-1)]
    assert batch(tmp_path, "--set", "run.retries=0").code == 65
    failed = [json.loads(line) for line in stored.get("out/_maskserve/errors.jsonl").splitlines()]
    assert [one["exit"] for one in failed] == [77]
    assert set(outputs(stored)) == {"f00000.safetensors", "f00002.safetensors"}
    stored.proxy.faults = [Fault("403", "PUT", times=-1)]
    assert batch(tmp_path).code == 77


def test_conversions_and_folders_mix_with_stores(stored: Stored, tmp_path: Path) -> None:
    make_job(tmp_path, stored, 2)
    text = (tmp_path / "job.toml").read_text()
    (tmp_path / "job.toml").write_text(text.replace("s3://bucket/out", "local"))
    assert batch(tmp_path).code == 0
    assert len(list((tmp_path / "local").glob("*.safetensors"))) == 2
    convert = text.replace('verb = "reduce"\nop = "mean"\ndim = 0', 'verb = "convert"')
    (tmp_path / "job.toml").write_text(convert.replace('out"', 'out"\nname = "{path}.json"'))
    ended = batch(tmp_path)
    assert ended.code == 0, ended.err
    assert set(outputs(stored)) == {f"bucket/in/f0000{i}.safetensors.json" for i in range(2)}
    (tmp_path / "job.toml").write_text(convert.replace('out"', 'npz"\nname = "{stem}.npz"'))
    refused = batch(tmp_path)
    assert (refused.code, "output.name: s3://bucket/npz: npz cannot be read from a store" in refused.err) == (78, True)
    assert stored.keys("npz") == []


def entry(number: int) -> Entry:
    return Entry(
        uri=f"s3://bucket/{number:06d}" + "x" * 2000, size=1, etag='"a"', request_sha256="r", version="v", output="o",
        output_sha256="s", attempts=1, seconds=0.1,
    )  # fmt: skip


def test_the_ledger_goes_on_in_numbered_objects_and_is_whole_a_second_later(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_ledger, "SYNC_S", 0.1)
    monkeypatch.setattr(stored_ledger, "FULL_BYTES", 10_000)
    folder = "s3://bucket/out/_maskserve"
    with stored_ledger.StoredPart(folder, WHOLE) as part:
        for number in range(20):
            part.add([entry(number)])
            time.sleep(0.02)
        deadline = time.monotonic() + 5
        while len(entries(folder)) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(entries(folder)) == 20
        n_writes = len([path for method, path, _ in stored.proxy.log if method == "PUT" and "part-" in path])
        assert n_writes < 15
    assert len([key for key in stored.keys("out/_maskserve") if "part-" in key]) > 1
    stored_ledger.forget(folder, WHOLE)
    assert entries(folder) == {}
