"""The manifests of configs/ray say what KubeRay, Kubernetes and the command line know."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.manifests import ROOT, named, objects
from tests.test_containers import KUBERNETES, parsed

FOLDER = ROOT / "configs" / "ray"
FIELDS = {
    "RayJob": {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec",
        "activeDeadlineSeconds", "submissionMode", "suspend", "metadata", "runtimeEnvYAML", "clusterSelector",
    },
    "RayCluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template", "serviceType"},
    "workers": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}  # fmt: skip
"""What ray.io/v1 has at each place, of what is used or likely to be."""
FILES = sorted(FOLDER.glob("*.yaml"))


def clusters() -> dict[str, dict[str, Any]]:
    """The cluster that each file describes."""
    found = {}
    for path in FILES:
        for one in objects(path):
            if one["kind"] in ("RayCluster", "RayJob"):
                found[path.name] = one["spec"].get("rayClusterSpec", one["spec"])
    return found


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


every_cluster = pytest.mark.parametrize("cluster", clusters().values(), ids=clusters())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_object_is_one_of_kuberay_or_of_kubernetes(path: Path) -> None:
    for one in objects(path):
        assert one["metadata"]["labels"]["app.kubernetes.io/name"] == "maskserve"
        if one["kind"] in FIELDS:
            assert one["apiVersion"] == "ray.io/v1"
            assert one["spec"].keys() <= FIELDS[one["kind"]]
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


@every_cluster
def test_each_pod_is_one_of_kubernetes_and_confined(cluster: dict[str, Any]) -> None:
    assert cluster.keys() <= FIELDS["RayCluster"]
    assert cluster["headGroupSpec"].keys() <= FIELDS["head"]
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["workers"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(cluster):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "ray start takes words"
        of_pod, (container,) = pod["spec"]["securityContext"], pod["spec"]["containers"]
        assert (of_pod["runAsNonRoot"], of_pod["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"] == container["resources"]["requests"]


@every_cluster
def test_nodes_are_alike_behind_a_token_and_the_head_runs_no_tasks(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    pods = [group["template"]["spec"] for group in groups(cluster)]
    (mounts, *others) = [pod["containers"][0]["volumeMounts"] for pod in pods]
    assert others == [mounts] * len(others), "a task finds its inputs where the command found them"
    assert {"name": "data", "mountPath": "/work"} in mounts
    claims = {v["persistentVolumeClaim"]["claimName"] for pod in pods for v in pod["volumes"] if v["name"] == "data"}
    assert named("PersistentVolumeClaim", claims.pop())
    assert all({"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in pod["containers"][0]["env"] for pod in pods)


def test_versions_are_those_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    (extra,) = project["optional-dependencies"]["ray"]
    for cluster in clusters().values():
        version = cluster["rayVersion"]
        assert extra.startswith(f"ray>={version.removesuffix('.0')},")
        assert f"rayproject/ray:{version}-py311" in (FOLDER / "Dockerfile").read_text()
        for group in groups(cluster):
            assert group["template"]["spec"]["containers"][0]["image"] == f"maskserve-ray:{project['version']}"


def test_the_entry_point_is_a_command_that_the_command_line_reads() -> None:
    (job,) = [one for path in FILES for one in objects(path) if one["kind"] == "RayJob"]
    place, command = job["spec"]["entrypoint"].split(" && exec maskserve ")
    assert place == "cd /work"
    assert parsed(shlex.split(command))["engine"] == "ray"
