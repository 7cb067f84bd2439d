"""The image, the manifests and the pages about them say what the command line, the settings and the service know."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from maskserve.settings import BY_NAME, NOT_SETTINGS, load, size
from maskserve_api.app import create_app
from maskserve_api.jobs.routes import MOST_WAIT_S
from maskserve_cli import exits
from maskserve_cli.app import UsageError, built, entries
from tests.manifests import (
    COMPOSE,
    FILES,
    FOLDER,
    ROOT,
    Started,
    commands,
    compose,
    named,
    objects,
    of_kind,
    shown,
    started,
)

DOCKERFILE = ROOT / "Dockerfile"
PAGE = ROOT / "docs" / "containers.md"
KUBERNETES = "1.31"
"""The oldest that takes every field here: preStop.sleep and podFailurePolicy are on by default there."""
HERE_ALONE = {exits.DONE, exits.DIFFERENT, exits.INTERRUPTED, exits.BROKEN_PIPE}
"""Codes that no job of a container ends with: nobody presses Ctrl-C or closes a pipe, and diff is no job."""

every_container = pytest.mark.parametrize("run", started(), ids=str)
every_job = pytest.mark.parametrize("job", of_kind("Job"), ids=lambda job: job["metadata"]["name"])


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line reads in these words; pytest fails where it does not know one of them."""
    name, *rest = words
    assert name in entries(), f"there is no command {name}"
    try:
        given: dict[str, Any] = built(name, entries()[name]).make_context(f"maskserve {name}", rest).params
    except UsageError as error:
        raise AssertionError(f"maskserve {' '.join(words)}: {error.message}") from None  # type: ignore[attr-defined]
    return given


# -- the image --------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "pip install -e '.[test]' brings hadolint"
    ran = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions as words, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def copied() -> list[str]:
    """What is copied out of the checkout, in the order of the Dockerfile."""
    return [w for words in instructions() if words[0] == "COPY" and "--from" not in words[1] for w in words[1:-1]]


def context(folder: Path) -> None:
    """The build's context: what .dockerignore lets through, then only what COPY takes of that."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    for name in copied():
        assert name in let_in, f"COPY {name}: .dockerignore keeps it from the builder"
        assert (ROOT / name).exists()
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"), dirs_exist_ok=True
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    assert let_in == set(copied()), "the builder gets what is copied and nothing else"


def wheel_of(folder: Path, *options: str) -> set[str]:
    """The names in the wheel that pip builds of a folder."""
    words = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", *options)
    ran = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *words, "."],
        env={**os.environ, "SKBUILD_CMAKE_DEFINE": "MASKSERVE_OPTIMIZATION=-O0;MASKSERVE_BASELINE_ONLY=ON"},
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    (wheel,) = (folder / "dist").iterdir()
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_files_that_are_copied_build_a_whole_wheel(tmp_path: Path) -> None:
    """With COMPILE=1 its kernels too: a minute and a half of a core, for what the installation of this checkout has shown."""
    context(tmp_path)
    is_compiled = os.environ.get("COMPILE") == "1"
    names = wheel_of(tmp_path, *(() if is_compiled else ("--config-settings=wheel.cmake=false",)))
    sources = {
        str(path.relative_to(ROOT / above))
        for above, package in (("", "maskserve"), ("cli", "maskserve_cli"), ("api", "maskserve_api"))
        for path in (ROOT / above / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert sources <= names
    assert is_compiled == any(re.fullmatch(r"maskserve/backends/_native.*\.so", name) for name in names)
    assert not {name.split("/")[0] for name in names if not name.startswith("maskserve")}


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_the_files_that_are_copied_have_every_source_of_the_kernels(tmp_path: Path) -> None:
    """CMake looks for the sources that it will compile; what those include lies beside them."""
    context(tmp_path)
    nanobind = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True, check=True
    )
    options = (f"-Dnanobind_DIR={nanobind.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}")
    ran = subprocess.run(["cmake", "-S", ".", "-B", "build", *options], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    sources = list((tmp_path / "native").iterdir())
    included = {name for path in sources for name in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE)}
    assert included
    assert included <= {path.name for path in sources}


def test_what_it_needs_is_installed_before_a_source_is_copied() -> None:
    stages: list[list[str]] = []
    for words in instructions():
        if words[0] == "FROM":
            stages.append([])
        if stages:
            stages[-1].append(" ".join(words))
    dependencies, build, *_, last = stages
    assert [line for line in dependencies if line.startswith("COPY")] == ["COPY pyproject.toml ./"]
    at = [
        next(i for i, line in enumerate(build) if part in line) for part in ("apt-get", "COPY native", "COPY maskserve")
    ]
    assert at == sorted(at)
    assert not [line for line in last if line.startswith("RUN")], "the last stage only takes what others made"


def test_the_image_starts_maskserve_as_pid_1_and_as_no_user_of_the_host() -> None:
    last = {words[0]: " ".join(words[1:]) for words in instructions()}
    assert last["ENTRYPOINT"] == '["maskserve"]'
    assert (last["USER"], last["WORKDIR"], last["STOPSIGNAL"]) == ("65532:65532", "/work", "SIGTERM")
    variables = dict(word.split("=", 1) for word in last["ENV"].split())
    assert variables.pop("PATH").startswith("/opt/maskserve/bin:")
    assert variables.pop("PYTHONDONTWRITEBYTECODE") == "1"
    assert all(value.startswith("/tmp") for value in variables.values()), "caches go to /tmp"


def test_the_image_needs_no_line_of_requirements_of_its_own() -> None:
    """The two scripts that read pyproject.toml in the Dockerfile print what it says."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        said = tomllib.load(file)
    scripts = re.findall(r'python -c "(.*?)"', DOCKERFILE.read_text().replace("\\\n", ""), re.DOTALL)
    printed = [
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "EXTRAS": "arrow,geo"},
                       capture_output=True, text=True, check=True).stdout.splitlines()
        for script in scripts
    ]  # fmt: skip
    extras = said["project"]["optional-dependencies"]
    assert printed[0] == [*said["project"]["dependencies"], *extras["arrow"], *extras["geo"]]
    assert printed[1] == [*said["build-system"]["requires"], "cmake", "ninja"]


# -- the manifests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [KUBERNETES, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_manifest_is_one_of_kubernetes(path: Path, version: str) -> None:
    for found in objects(path):
        kubernetes_validate.validate(found, version, strict=True)
        assert found["metadata"]["labels"]["app.kubernetes.io/name"] == "maskserve"


def test_the_kustomization_is_the_service_and_all_start_the_image_of_this_version() -> None:
    (said,) = objects(FOLDER / "kustomization.yaml")
    assert {FOLDER / name for name in said["resources"]} < set(FILES)
    with (ROOT / "pyproject.toml").open("rb") as file:
        image = f"maskserve:{tomllib.load(file)['project']['version']}"
    assert {run.container["image"] for run in started()} == {image}
    assert {service["image"] for service in compose().values()} == {image}
    assert {found["metadata"]["name"] for name in said["resources"] for found in objects(FOLDER / name)} == {
        "maskserve"
    }


@every_container
def test_the_command_of_each_container_is_one_that_the_command_line_reads(run: Started) -> None:
    parsed(run.command)


@every_container
def test_each_container_is_confined(run: Started) -> None:
    of_pod, of_container = run.pod["securityContext"], run.container["securityContext"]
    assert (of_pod["runAsNonRoot"], of_pod["runAsUser"], of_pod["runAsGroup"]) == (True, 65532, 65532)
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert run.pod["enableServiceLinks"] is run.pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} == set(run.container["resources"]["limits"]) == set(run.container["resources"]["requests"])
    assert run.container["resources"]["limits"]["memory"] == run.container["resources"]["requests"]["memory"]
    mounted = {mount["name"]: mount for mount in run.container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in run.pod["volumes"]}
    claimed = {claim["metadata"]["name"] for claim in run.owner["spec"].get("volumeClaimTemplates", [])}
    assert set(mounted) == {*volumes, *claimed}
    assert mounted["tmp"]["mountPath"] == "/tmp"
    assert volumes["tmp"]["emptyDir"]["sizeLimit"]


@every_container
def test_each_variable_that_a_container_sets_is_a_setting(run: Started) -> None:
    names = {variable["name"] for variable in run.container.get("env", []) if variable["name"].startswith("MASKSERVE")}
    assert names <= {*(row.variable for row in BY_NAME.values()), *NOT_SETTINGS}


def test_a_service_that_kubernetes_links_to_its_pods_changes_no_setting_and_warns_of_nothing() -> None:
    """With enableServiceLinks left on, each Service named maskserve... puts its address into the pods beside it."""
    service = named("Service", "maskserve")
    (port,) = service["spec"]["ports"]
    linked = {
        f"{prefix}{suffix}": "tcp://10.0.0.1:80"
        for prefix in (service["metadata"]["name"].upper(),)
        for suffix in (
            "_SERVICE_HOST", "_SERVICE_PORT", f"_SERVICE_PORT_{port['name'].upper()}", "_PORT", f"_PORT_{port['port']}_TCP",
            f"_PORT_{port['port']}_TCP_PROTO", f"_PORT_{port['port']}_TCP_PORT", f"_PORT_{port['port']}_TCP_ADDR",
        )
    }  # fmt: skip
    settings = load(None, None, linked)
    assert settings.unknown == ()
    assert {setting.source for setting in settings.rows.values()} == {"default"}


# -- jobs -------------------------------------------------------------------------------------------------------------


def rules(job: dict[str, Any]) -> dict[int, str]:
    """What a job does at each exit code; a code in two rules fails."""
    found: dict[int, str] = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": []})
        assert codes["values"] == sorted(set(codes["values"])), "Kubernetes wants them in order"
        for code in codes["values"]:
            assert code not in found, f"{code} stands in two rules"
            found[code] = rule["action"]
            assert codes["containerName"] in [c["name"] for c in job["spec"]["template"]["spec"]["containers"]]
    return found


@every_job
def test_a_job_knows_what_each_exit_code_means(job: dict[str, Any]) -> None:
    spec, said = job["spec"], rules(job)
    assert set(said) == set(exits.MEANINGS) - HERE_ALONE
    assert {code for code, action in said.items() if action == "Count"} == {
        exits.UNAVAILABLE, exits.IO_ERROR, exits.TRY_AGAIN,
    }  # fmt: skip
    assert {code for code, action in said.items() if action == "Ignore"} == {exits.TERMINATED}
    assert {"FailIndex"} & set(said.values()) == ({"FailIndex"} if "backoffLimitPerIndex" in spec else set())
    first = spec["podFailurePolicy"]["rules"][0]
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy wants it"


def test_no_exit_code_means_one_thing_to_one_job_and_another_to_the_next() -> None:
    kinds = {"FailJob": "for good", "FailIndex": "for good", "Count": "again", "Ignore": "no fault"}
    meanings = [{code: kinds[action] for code, action in rules(job).items()} for job in of_kind("Job")]
    assert meanings[1:] == meanings[:-1]


@every_job
def test_an_indexed_job_has_as_many_pods_as_its_command_has_shards(job: dict[str, Any]) -> None:
    (run,) = [run for run in started() if run.owner is job]
    shards = re.findall(r"--shard[ =]auto/(\d+)", " ".join(run.command))
    completions = job["spec"].get("completions", 1)
    assert shards == ([str(completions)] if job["spec"].get("completionMode") == "Indexed" else [])
    assert job["spec"].get("parallelism", 1) <= completions


def test_the_states_that_are_mapped_are_those_that_are_merged_and_both_may_be_tried_again() -> None:
    of = {run.owner["metadata"]["name"]: " ".join(run.command) for run in started()}
    assert "--state states/$JOB_COMPLETION_INDEX.state --exists replace" in of["maskserve-map"]
    assert of["maskserve-merge"].startswith("merge states/*.state ")
    assert "--exists replace" in of["maskserve-merge"]
    claims = {
        v["persistentVolumeClaim"]["claimName"] for run in started() for v in run.pod["volumes"] if v["name"] == "data"
    }
    assert claims == {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}


def test_the_job_file_of_the_batch_job_is_one(tmp_path: Path) -> None:
    batch, config = named("Job", "maskserve-batch"), named("ConfigMap", "maskserve-job")
    (run,) = [run for run in started() if run.owner is batch]
    (mount,) = [mount for mount in run.container["volumeMounts"] if mount["name"] == "config"]
    (volume,) = [volume for volume in run.pod["volumes"] if volume["name"] == "config"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    name = run.command[1].removeprefix(f"{mount['mountPath']}/")
    (tmp_path / name).write_text(config["data"][name])
    assert tomllib.loads(config["data"][name])["version"] == 1
    import_module("maskserve.batch.job").read_job(str(tmp_path / name))


# -- the service ------------------------------------------------------------------------------------------------------


def deployed(kind: str = "Deployment") -> Started:
    (run,) = [run for run in started() if run.owner["kind"] == kind]
    return run


every_service = pytest.mark.parametrize("run", [deployed(), deployed("StatefulSet")], ids=str)


@every_service
def test_probes_ask_paths_that_the_service_answers_without_a_key(run: Started) -> None:
    from maskserve_api.edge import OPEN

    served = {route.path for route in create_app().routes}  # type: ignore[attr-defined]
    (port,) = run.container["ports"]
    for name, path in {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}.items():
        assert run.container[name]["httpGet"] == {"path": path, "port": port["name"]}
        assert path in served & OPEN
    assert run.owner["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"] in served & OPEN
    flags = served_settings(run.command)
    assert flags["serve_port"] == port["containerPort"]


def served_settings(words: list[str]) -> dict[str, Any]:
    """The settings that a `serve` of these words has."""
    given = parsed(words)
    flags = {f"serve_{name}": value or None for name, value in given.items() if f"serve_{name}" in BY_NAME}
    flags["memory"] = given["memory"]
    settings = load(flags, None, {})
    return {name: settings[name] for name in settings.rows}


@every_service
def test_the_pod_s_grace_is_longer_than_what_the_service_takes_to_end(run: Started) -> None:
    settings = served_settings(run.command)
    before = run.container.get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})
    takes_s = before["preStop"]["sleep"]["seconds"] + settings["serve_drain_delay"] + settings["serve_grace"]
    assert run.pod["terminationGracePeriodSeconds"] >= takes_s + 5


@every_service
def test_the_keys_come_from_a_secret_that_others_may_not_read(run: Started) -> None:
    (volume,) = [volume for volume in run.pod["volumes"] if volume["name"] == "keys"]
    (mount,) = [mount for mount in run.container["volumeMounts"] if mount["name"] == "keys"]
    assert volume["secret"]["defaultMode"] & 0o007 == 0
    assert run.pod["securityContext"]["fsGroup"] == 65532
    assert served_settings(run.command)["serve_keys_file"] == f"{mount['mountPath']}/keys"
    assert mount["readOnly"]


@every_service
def test_memory_leaves_room_above_the_budget_for_bodies(run: Started) -> None:
    settings = served_settings(run.command)
    limit = size(run.container["resources"]["limits"]["memory"] + "B")
    of_jobs = settings["memory"] if settings["serve_jobs"] else 0
    assert limit >= 4 * settings["serve_max_body"] + of_jobs + 2**30


def test_jobs_live_on_one_replica_with_a_claim_that_holds_them_and_on_no_other() -> None:
    assert served_settings(deployed().command)["serve_jobs"] is False
    assert "--no-jobs" in deployed().command, "said, since a variable could turn them on"
    run = deployed("StatefulSet")
    settings = served_settings(run.command)
    assert settings["serve_jobs"] is True
    assert run.owner["spec"]["replicas"] == 1
    (claim,) = run.owner["spec"]["volumeClaimTemplates"]
    (mount,) = [mount for mount in run.container["volumeMounts"] if mount["name"] == claim["metadata"]["name"]]
    assert Path(settings["serve_jobs_folder"]).is_relative_to(mount["mountPath"])
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert settings["serve_jobs_disk"] < size(claim["spec"]["resources"]["requests"]["storage"] + "B")
    labels = run.owner["spec"]["template"]["metadata"]["labels"]
    assert labels != deployed().owner["spec"]["template"]["metadata"]["labels"], "or its Service would ask it, too"
    service, policy = named("Service", run.owner["spec"]["serviceName"]), named("NetworkPolicy", "maskserve-jobs")
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    assert run.owner["spec"]["selector"]["matchLabels"] == labels


@pytest.mark.parametrize(
    ("kind", "name", "largest", "longest"),
    [
        ("Deployment", "maskserve", "serve_max_body", "serve_request_timeout"),
        ("StatefulSet", "maskserve-jobs", "serve_jobs_max_body", None),
    ],
)
def test_each_service_has_a_host_of_its_own_that_lets_its_bodies_and_its_waiting_through(
    kind: str, name: str, largest: str, longest: str | None
) -> None:
    ingress, settings = named("Ingress", name), served_settings(deployed(kind).command)
    (rule,), (tls,) = ingress["spec"]["rules"], ingress["spec"]["tls"]
    assert [rule["host"]] == tls["hosts"]
    (path,) = rule["http"]["paths"]
    service = path["backend"]["service"]
    assert service["name"] == name
    assert service["port"]["name"] in {port["name"] for port in named("Service", name)["spec"]["ports"]}
    said = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert size(said["proxy-body-size"].upper() + "iB") == settings[largest]
    assert int(said["proxy-read-timeout"]) > (settings[longest] if longest else MOST_WAIT_S)
    hosts = [rule["host"] for found in of_kind("Ingress") for rule in found["spec"]["rules"]]
    assert len(hosts) == len(set(hosts)), "the paths are the same, so the names are not"


def test_everything_that_selects_pods_selects_the_deployment_s() -> None:
    labels = deployed().owner["spec"]["template"]["metadata"]["labels"]
    kinds = ("Service", "PodDisruptionBudget", "NetworkPolicy")
    service, budget, policy = (named(kind, "maskserve") for kind in kinds)
    assert service["spec"]["selector"] == labels
    assert deployed().owner["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert policy["spec"]["ingress"][0]["ports"][0]["port"] == deployed().container["ports"][0]["containerPort"]
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployed().owner["metadata"]["name"]
    assert "replicas" not in deployed().owner["spec"], "the autoscaler says how many"


# -- compose, and what the pages show ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["serve", "batch"])
def test_compose_starts_what_the_command_line_reads_and_confines_it(name: str) -> None:
    service = compose()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    parsed([str(word) for word in service["command"]])


def test_composes_service_is_for_this_machine_and_has_time_to_end() -> None:
    service = compose()["serve"]
    settings = served_settings(service["command"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"]) or not settings["serve_allow_anonymous"]
    assert int(service["stop_grace_period"].rstrip("s")) > settings["serve_drain_delay"] + settings["serve_grace"]
    assert "http://127.0.0.1:8000/readyz" in service["healthcheck"]["test"][-1]
    assert settings["serve_allowed_host"] == ("localhost", "127.0.0.1")
    assert yaml.safe_load(COMPOSE.read_text()).keys() == {"services"}


@pytest.mark.parametrize("page", [ROOT / "README.md", PAGE], ids=lambda page: page.name)
def test_each_command_that_a_page_shows_exists(page: Path) -> None:
    lines = list(shown(page))
    if page == PAGE:
        assert any(line.startswith("docker run") for line in lines)
    all_words = [words for line in lines for words in commands(line) if words]
    assert all_words
    for words in sorted(
        all_words, key=lambda words: words[0] in ("batch", "merge") or "--shard" in words
    ):  # what may not be there last
        parsed(words)


def test_each_file_that_the_page_names_is_there() -> None:
    files = re.findall(r"configs/kubernetes/?[\w.]*", PAGE.read_text())
    assert {ROOT / file for file in files if not file.endswith("/")} >= {
        FOLDER,
        FOLDER / "map.yaml",
        FOLDER / "job.yaml",
    }
    assert all((ROOT / file).exists() for file in files)


def test_the_page_lists_every_exit_code_as_the_jobs_take_it() -> None:
    rows = {
        int(code): action
        for code, action in re.findall(r"^\| (\d+) \|[^|]*\| ([^|]*?) \|$", PAGE.read_text(), re.MULTILINE)
    }
    words = {
        "FailJob": "the job fails",
        "FailIndex": "its part fails",
        "Count": "tried again",
        "Ignore": "started again, no try",
    }
    of_map = rules(named("Job", "maskserve-map"))
    assert {code: text for code, text in rows.items() if code != 0} == {
        code: words[action] for code, action in of_map.items()
    }
