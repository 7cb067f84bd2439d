"""Jobs of a service that is killed, told to end, loses its disk or whose clock jumps: what was acknowledged is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import httpx
import numpy as np
import pytest

from maskserve.errors import SettingsError
from maskserve_api.jobs.clock import Clock, Mark
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.job import Status
from tests import jobs_faults
from tests.http_service import JSON, SAFETENSORS, check_problem, jobs_in, lane_blocked, payload, running, wait_until
from tests.jobs_process import left, served, spawned
from tests.test_jobs import LARGE, MEAN, QUESTION, ended, submitted

SOFTMAX = "/v1/softmax?op=softmax&dim=0"
LONG, LONG_BODY = (
    "/v1/scan?op=rank&dim=1",
    payload(data=np.random.default_rng(0).normal(size=(4096, 2048)).astype(np.float32)),
)
"""A job of seconds, in many blocks."""
CLOCK, READ_ONLY = (Path(__file__).parent / name for name in ("jumping.c", "readonly.c"))
COMPILER = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to make a clock that jumps")


def compiled(source: Path, folder: Path) -> str:
    """A library that is loaded before all others."""
    library = folder / f"{source.stem}.so"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return str(library)


def quiet(line: str) -> None:
    """Nobody listens."""


# -- the end of the process -------------------------------------------------------------------------------------------


def test_a_service_that_is_killed_again_and_again_loses_no_job_and_does_none_twice(tmp_path: Path) -> None:
    found = jobs_faults.killed_at_random(tmp_path, n=60, kills=2, seed=5, tell=quiet)
    assert found["jobs"] == 60


def test_sigterm_leaves_running_jobs_for_the_next_start_and_counts_no_attempt(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    with served(folder, tmp_path / "1.log", "--jobs-running", "1") as process:
        key = {"idempotency_key": "same"}
        first = process.submit(LONG, LONG_BODY, **key).headers["location"]
        paths = [process.submit(MEAN, QUESTION).headers["location"] for _ in range(5)]
        wait_until(lambda: process.http.get(first).json()["status"] == "running")
        start_s = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - start_s < 6
    assert rows(folder, "SELECT status, attempts FROM jobs") == [("queued", 0)] * 6
    assert left(folder) == [f"bodies/{first[-32:]}"]
    with served(folder, tmp_path / "2.log", "--jobs-running", "1") as process:
        assert f"maskserve: jobs live in {folder}: 6 came back to be done, 0 are kept\n" in process.said()
        assert process.submit(LONG, LONG_BODY, **key).headers["location"] == first
        check_problem(process.submit(MEAN, LONG_BODY, **key), 422, "idempotency_mismatch")
        told = [process.ended(path) for path in (first, *paths)]
        assert {job["status"] for job in told} == {"succeeded"}
        answer = process.http.post(LONG, content=LONG_BODY)
        assert process.http.get(f"{first}/result").content == answer.content
        assert process.end(signal.SIGINT) == 0
    assert rows(folder, "SELECT DISTINCT attempts FROM jobs") == [(1,)]
    assert left(folder) == []


def rows(folder: Path, query: str) -> list[tuple[object, ...]]:
    db = sqlite3.connect(folder / "jobs.sqlite3")
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def changed(folder: Path, text: str) -> None:
    """The store as a process that died would have left it."""
    db = sqlite3.connect(folder / "jobs.sqlite3")
    db.execute(text)
    db.commit()
    db.close()


def test_a_result_that_was_published_before_the_death_is_adopted_and_not_computed_again(tmp_path: Path) -> None:
    with running(jobs=jobs_in(tmp_path)) as service:
        path = submitted(service, SOFTMAX, LARGE)
        before = ended(service, path)
    changed(tmp_path, "UPDATE jobs SET status = 'running', ended_s = NULL, ended_age_s = NULL, n_done = 0, "
            "result_bytes = NULL, result_sha256 = NULL, result_type = NULL")  # fmt: skip
    jobs = jobs_in(tmp_path)
    assert (jobs.n_adopted, jobs.n_by_status[Status.SUCCEEDED]) == (1, 1)
    with running(jobs=jobs) as service:
        after = service.http.get(path).json()
        assert {**after, "ended": 0, "expires": 0} == {**before, "ended": 0, "expires": 0}
        assert service.http.get(f"{path}/result").content == service.post(SOFTMAX, LARGE).content
        assert jobs.n_started == 0


def test_a_job_that_kills_its_service_three_times_is_tried_no_more(tmp_path: Path) -> None:
    with running(jobs=jobs_in(tmp_path, n_running=0)) as service:
        doomed, other = submitted(service, SOFTMAX, LARGE), submitted(service)
    for n, status in ((2, Status.QUEUED), (3, Status.FAILED)):
        changed(tmp_path, f"UPDATE jobs SET status = 'running', attempts = {n} WHERE id = '{doomed[-32:]}'")
        jobs = jobs_in(tmp_path)
        found = jobs.find("", doomed[-32:])
        assert found is not None
        assert found.status is status
        jobs.store.close()
        jobs.spool.close()
    with running(jobs=jobs_in(tmp_path)) as service:
        told = check_problem(service.http.get(f"{doomed}/result"), 500, "worker_lost")
        assert "died 3 times" in told["detail"]
        assert ended(service, other)["status"] == "succeeded"
    assert left(tmp_path) == []


def test_what_a_dead_process_left_behind_is_swept_and_what_is_wanted_stays(tmp_path: Path) -> None:
    with running(jobs=jobs_in(tmp_path)) as service:
        path = submitted(service, SOFTMAX, LARGE)
        ended(service, path)
    for name in ("bodies/.maskserve-00", "results/.maskserve-00", "bodies/" + "0" * 32, "results/" + "0" * 32):
        (tmp_path / name).write_bytes(b"x")
    jobs_in(tmp_path).spool.close()
    assert [p.name for p in (tmp_path / "results").iterdir()] == [path[-32:]]
    assert list((tmp_path / "bodies").iterdir()) == []


def test_a_folder_is_one_services_and_of_one_edition(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path)
    log = tmp_path / "log"
    child = spawned(tmp_path, log)
    assert child.wait(60) == 78
    assert log.read_text().count("\n") == 1
    assert "is in use by another service" in log.read_text()
    jobs.store.close()
    jobs.spool.close()
    changed(tmp_path, "PRAGMA user_version = 99")
    with pytest.raises(SettingsError, match="written by another version of maskserve"):
        jobs_in(tmp_path)


def test_a_folder_that_cannot_be_one_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot hold jobs: Not a directory"):
        jobs_in(tmp_path / "file" / "jobs")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "jobs.sqlite3").write_bytes(b"no store" * 1000)
    with pytest.raises(SettingsError, match="file is not a database"):
        jobs_in(tmp_path / "jobs")


def test_files_that_are_not_of_jobs_are_left_alone_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    ours = tmp_path / "results" / ("0" * 32)
    kept = [tmp_path / "results" / name for name in ("mine.safetensors", "0" * 31, "0" * 33, "A" * 32, ".hidden")]
    for path in kept:
        path.write_text("mine")
    closed(jobs_in(tmp_path))
    ours.write_text("of a process that died")
    closed(jobs_in(tmp_path))
    assert sorted((tmp_path / "results").iterdir()) == sorted(kept)
    other = tmp_path / "other"
    other.mkdir()
    (other / "elsewhere").mkdir()
    (other / "elsewhere" / ("1" * 32)).write_text("mine")
    (other / "bodies").symlink_to("elsewhere")
    with pytest.raises(SettingsError, match=r"bodies is a symbolic link, .*remove it, or give another --jobs-folder"):
        jobs_in(other)
    (other / "bodies").unlink()
    (other / "bodies").write_text("mine")
    with pytest.raises(SettingsError, match="bodies is no folder"):
        jobs_in(other)
    assert (other / "elsewhere" / ("1" * 32)).read_text() == "mine"


def closed(jobs: Jobs) -> None:
    jobs.store.close()
    jobs.spool.close()


@pytest.mark.parametrize("name", ["0" * 32, ".maskserve-00"])
def test_files_of_jobs_without_the_store_that_knows_them_are_kept_and_told_of(tmp_path: Path, name: str) -> None:
    path = tmp_path / "results" / name
    path.parent.mkdir()
    path.write_text("a result")
    for _ in range(2):  # the first leaves nothing that lets the second in
        with pytest.raises(
            SettingsError, match=r"results has files of jobs, and there is no jobs\.sqlite3 that knows them"
        ):
            jobs_in(tmp_path)
    assert path.read_text() == "a result"


@pytest.mark.parametrize(
    "text",
    [
        "UPDATE clock SET mark = 'no JSON'",
        "UPDATE clock SET mark = '{}'",
        "UPDATE clock SET mark = '[1]'",
        "UPDATE clock SET mark = json_set(mark, '$.age_s', 'old')",
        "UPDATE jobs SET status = 'lost'",
        "UPDATE jobs SET request = 'no JSON'",
        "UPDATE jobs SET request = '[]'",
        "UPDATE jobs SET status = 'failed', problem = '{}'",
        "UPDATE jobs SET status = 'queued', question = 'a letter'",
        "UPDATE jobs SET id = '../../' || substr(id, 7)",
        "DROP TABLE bodies",
        "DROP TABLE results",
        "DROP TABLE clock",
        "DROP TABLE jobs",
    ],
)
def test_a_store_that_somebody_has_edited_is_a_line_at_the_start(tmp_path: Path, text: str) -> None:
    with running(jobs=jobs_in(tmp_path)) as service:
        ended(service, submitted(service))
    changed(tmp_path, text)
    for _ in range(2):  # the first gives the folder back
        with pytest.raises(
            SettingsError, match=rf"{tmp_path}/jobs\.sqlite3 cannot be taken up: .*give another --jobs-folder"
        ) as found:
            jobs_in(tmp_path)
        assert "\n" not in str(found.value)


def test_an_edited_store_ends_the_command_as_a_setting_does(tmp_path: Path) -> None:
    closed(jobs_in(tmp_path / "jobs"))
    changed(tmp_path / "jobs", "UPDATE clock SET mark = 'no JSON'")
    assert spawned(tmp_path / "jobs", tmp_path / "log").wait(60) == 78
    assert (tmp_path / "log").read_text().count("\n") == 1


@pytest.mark.parametrize("how", ["removed", "made again", "another store"])
def test_a_folder_that_is_taken_away_takes_no_job_and_says_so(tmp_path: Path, how: str) -> None:
    folder, away = tmp_path / "jobs", tmp_path / "away"
    with running(jobs=jobs_in(folder)) as service:
        ended(service, submitted(service))
        folder.rename(away)
        if how != "removed":
            for name in ("bodies", "results"):
                (folder / name).mkdir(parents=True)
        if how == "another store":
            shutil.copy(away / "jobs.sqlite3", folder)
            (folder / "lock").touch()
        for _ in range(2):
            for response in (service.http.get("/readyz"), service.post(MEAN, QUESTION, prefer="respond-async")):
                told = check_problem(response, 503, "spool_failed")
                assert "the folder of jobs is gone or was replaced" in told["detail"]
        assert service.post(MEAN, QUESTION).status_code == 200
        shutil.rmtree(folder, ignore_errors=True)
        away.rename(folder)
        assert ended(service, submitted(service))["status"] == "succeeded"


@pytest.mark.parametrize("how", ["shorter", "longer", "a link", "a pipe", "gone"])
def test_a_result_whose_file_is_not_as_it_was_left_is_refused_before_its_first_byte(tmp_path: Path, how: str) -> None:
    with running(jobs=jobs_in(tmp_path)) as service:
        path = submitted(service, SOFTMAX, LARGE)
        ended(service, path)
        spoil(tmp_path / "results" / path[-32:], how)
        check_problem(service.http.get(f"{path}/result"), 503, "spool_failed")
        assert service.http.head(f"{path}/result").status_code == 503


def spoil(path: Path, how: str) -> None:
    """The file, as somebody else has left it."""
    held = path.read_bytes()
    path.unlink()
    match how:
        case "shorter":
            path.write_bytes(held[:-1])
        case "longer":
            path.write_bytes(held + b"x")
        case "a link":
            path.with_suffix(".kept").write_bytes(held)
            path.symlink_to(path.with_suffix(".kept"))
        case "a pipe":
            os.mkfifo(path)


@pytest.mark.parametrize("how", ["a link", "a pipe"])
def test_what_is_no_file_of_ours_is_no_result_to_adopt(tmp_path: Path, how: str) -> None:
    with running(jobs=jobs_in(tmp_path)) as service:
        path = submitted(service, SOFTMAX, LARGE)
        ended(service, path)
        spoil(tmp_path / "results" / path[-32:], how)
    changed(tmp_path, "UPDATE jobs SET status = 'running', ended_s = NULL, ended_age_s = NULL, n_done = 0, "
            "result_bytes = NULL, result_sha256 = NULL, result_type = NULL")  # fmt: skip
    jobs = jobs_in(tmp_path)
    assert (jobs.n_adopted, jobs.n_by_status[Status.QUEUED]) == (0, 1)
    closed(jobs)


@pytest.mark.parametrize("form", [SAFETENSORS, JSON])
@pytest.mark.parametrize("how", ["shorter", "longer", "a link", "a pipe", "gone"])
def test_a_body_whose_file_is_not_as_it_came_is_the_disks_fault(tmp_path: Path, how: str, form: str) -> None:
    body = LARGE if form == SAFETENSORS else json.dumps({"value": [0.125] * (1 << 14)}).encode()
    with running(jobs=jobs_in(tmp_path)) as service:
        with lane_blocked(service):
            path = submitted(service, "/v1/softmax?op=softmax&dim=0", body, content_type=form)
            spoil(tmp_path / "bodies" / path[-32:], how)
        told = ended(service, path)
        assert (told["status"], told["problem"]["code"]) == ("failed", "spool_failed")


def test_bodies_and_results_are_on_disk_before_what_names_them(tmp_path: Path) -> None:
    """write, fsync of the file, rename, fsync of the folder, and only then the store's write-ahead log."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    folder, trace = tmp_path / "jobs", tmp_path / "trace"
    with served(folder, tmp_path / "log") as process:
        calls = "trace=fsync,fdatasync,rename,renameat,renameat2"
        command = [strace, "-f", "-y", "-e", calls, "-o", str(trace), "-p", str(process.child.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            path = process.submit(SOFTMAX, LARGE).headers["location"]
            process.ended(path)
            tracer.send_signal(signal.SIGINT)
        if b"attached" not in line:
            pytest.skip(f"strace is not permitted here: {line.decode().strip()}")
    told = " ".join(re.findall(r"(?:fsync|fdatasync|rename\w*)\(.*", trace.read_text()))
    for kind in ("bodies", "results"):
        synced = rf"f(?:data)?sync\(\d+<[^>]*/{kind}/\.maskserve-\w+>"
        named = rf"rename\w*\([^)]*/{kind}/{path[-32:]}\""
        in_folder = rf"fsync\(\d+<[^>]*/{kind}>\)"
        row = r"f(?:data)?sync\(\d+<[^>]*jobs\.sqlite3-wal>"
        assert re.search(f"{synced}.*{named}.*{in_folder}.*{row}", told), told


# -- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture(name="small_disk")
def small_disk_fixture(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remounted(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def test_a_full_disk_refuses_and_fails_jobs_and_the_service_recovers(tmp_path: Path, small_disk: Path) -> None:
    with running(jobs=jobs_in(small_disk)) as service:
        fits = submitted(service)
        ended(service, fits)
        with lane_blocked(service):
            doomed = submitted(service, SOFTMAX, LARGE)
            wait_until(lambda: service.http.get(doomed).json()["status"] == "running")  # what has not begun would wait
            filler = small_disk / "filler"
            fill(filler)
            for body in (QUESTION, LARGE):
                refused = service.post(MEAN, body, prefer="respond-async")
                check_problem(refused, 507, "no_space")
                assert int(refused.headers["retry-after"]) > 0
        time.sleep(1.5)
        assert service.http.get("/livez").status_code == 200
        assert service.post(MEAN, QUESTION).status_code == 200
        assert service.http.get(f"{fits}/result").status_code == 200
        filler.unlink()
        told = ended(service, doomed)
        assert (told["status"], told["problem"]["code"]) == ("failed", "no_space")
        check_problem(service.http.get(f"{doomed}/result"), 507, "no_space")
        assert ended(service, submitted(service, SOFTMAX, LARGE))["status"] == "succeeded"
    assert left(small_disk) == []
    assert rows(small_disk, "PRAGMA integrity_check") == [("ok",)]


def fill(path: Path) -> None:
    """Takes all that is free."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_service_does_not_start_on_a_read_only_folder(tmp_path: Path, small_disk: Path) -> None:
    remounted(small_disk, "ro")
    child = spawned(small_disk, tmp_path / "log")
    assert child.wait(60) == 78
    assert (tmp_path / "log").read_text().count("\n") == 1
    assert f"{small_disk} cannot hold jobs: Read-only file system" in (tmp_path / "log").read_text()


@needs_compiler
def test_a_folder_that_turns_read_only_makes_the_service_unready_and_says_why(tmp_path: Path) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "jobs"
    env = {"LD_PRELOAD": compiled(READ_ONLY, tmp_path), "READ_ONLY_WHILE": str(flag), "READ_ONLY_PATH": str(folder)}
    with served(folder, tmp_path / "log", env=env) as process:
        path = process.submit(MEAN, QUESTION).headers["location"]
        process.ended(path)
        running_on = process.submit(LONG, LONG_BODY).headers["location"]
        wait_until(lambda: process.http.get(running_on).json()["status"] == "running")
        flag.touch()
        told = check_problem(process.http.get("/readyz"), 503, "spool_failed")
        assert "the folder of jobs is read-only" in told["detail"]
        assert process.http.get("/livez").status_code == 200
        for body in (QUESTION, LARGE):
            check_problem(process.submit(MEAN, body), 503, "spool_failed")
        check_problem(process.http.delete(path), 503, "spool_failed")
        assert process.http.get(f"{path}/result").status_code == 200
        wait_until(lambda: "cannot be recorded" in process.said())
        flag.unlink()
        wait_until(lambda: process.http.get("/readyz").status_code == 200)
        told = process.ended(running_on)
        assert (told["status"], told["problem"]["code"]) == ("failed", "spool_failed")  # type: ignore[index]  # an object
        assert process.ended(process.submit(MEAN, QUESTION).headers["location"])["status"] == "succeeded"
        assert process.end() == 0
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)]
    assert left(folder) == []


# -- the clock --------------------------------------------------------------------------------------------------------


def test_age_goes_on_where_the_wall_clock_jumps_and_never_back() -> None:
    now = Clock(None).mark()
    day_s = 86400.0
    same_boot = Mark(age_s=5, running_s=now.running_s - 10, boot_id=now.boot_id, wall_s=now.wall_s + day_s)
    assert 15 <= Clock(same_boot).age_s() < 16
    rebooted = Mark(age_s=5, running_s=now.running_s + 1e6, boot_id="another", wall_s=now.wall_s - 60)
    assert 65 <= Clock(rebooted).age_s() < 66
    set_back = Mark(age_s=5, running_s=0, boot_id="another", wall_s=now.wall_s + day_s)
    assert 5 <= Clock(set_back).age_s() < 6


@needs_compiler
@pytest.mark.slow
def test_a_clock_that_jumps_by_a_day_ends_nothing_early_and_keeps_nothing_for_ever(tmp_path: Path) -> None:
    offset = tmp_path / "offset"
    offset.write_text("0")
    env = {"LD_PRELOAD": compiled(CLOCK, tmp_path), "CLOCK_OFFSET": str(offset)}
    folder, ttl_s = tmp_path / "jobs", 8.0
    with served(folder, tmp_path / "1.log", "--result-ttl", f"{ttl_s:g}", env=env) as process:
        start_s = time.monotonic()
        early = process.submit(SOFTMAX, LARGE).headers["location"]
        created = datetime.fromisoformat(str(process.ended(early)["created"]))
        offset.write_text("86400")
        late = process.submit(MEAN, QUESTION).headers["location"]
        told = process.ended(late)
        jumped = datetime.fromisoformat(str(told["created"])) - created
        assert 86000 < jumped.total_seconds() < 87000, "the clock has jumped"
        offset.write_text("-86400")
        time.sleep(2.5)  # the keeper looks twice
        for path in (early, late):
            assert process.http.get(path).json()["status"] == "succeeded"
        assert time.monotonic() - start_s < ttl_s, "else nothing was shown"
        wait_until(lambda: process.http.get(early).json().get("status") == "expired")
        assert time.monotonic() - start_s > ttl_s - 0.5
        wait_until(lambda: process.http.get(late).status_code == 404)


# -- what came together -----------------------------------------------------------------------------------------------


def test_submissions_that_come_together_share_a_transaction(tmp_path: Path) -> None:
    """A hundred at once cost far less than a hundred fsyncs."""
    with running(jobs=jobs_in(tmp_path)) as service, lane_blocked(service):
        jobs = service.service.jobs
        assert jobs is not None
        n_commits = 0
        commit = jobs.store._commit

        def counted(together: list[object]) -> None:
            nonlocal n_commits
            n_commits += 1
            commit(together)  # type: ignore[arg-type]  # as it was

        jobs.store._commit = counted  # type: ignore[method-assign,assignment]  # to count, and nothing else

        def submit(_: int) -> int:
            return httpx.post(
                f"http://{service.netloc}{MEAN}", content=QUESTION, headers={"prefer": "respond-async"}, timeout=30
            ).status_code

        jobs.store.write(lambda db: time.sleep(1.0))  # as a slow disk would
        with ThreadPoolExecutor(30) as threads:
            assert set(threads.map(submit, range(30))) == {202}
        assert n_commits < 25
