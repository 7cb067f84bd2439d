"""What a control group grants, of either version, seen from the host and from a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskserve.cgroup import UNLIMITED, cpus, default_memory, limit_bytes, memory_limit, quota_cpus

NO_LIMIT = "9223372036854771712"


def machine(root: Path, groups: str, files: dict[str, str]) -> str:
    """A root folder with a /proc/self/cgroup and files under /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return str(root)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, UNLIMITED),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "400000 100000"}, 1),
        ("0::/host/path", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/docker/x", {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, UNLIMITED),
        ("", {}, UNLIMITED),
    ],
)  # fmt: skip
def test_a_quota_is_found_in_whole_cpus(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert quota_cpus(machine(tmp_path, groups, files)) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"memory.max": "1000"}, 1000),
        ("0::/a", {"memory.max": "500", "a/memory.max": "max"}, 500),
        ("3:memory:/a/b", {"memory/a/b/memory.limit_in_bytes": NO_LIMIT, "memory/a/memory.limit_in_bytes": "800"}, 800),
        ("3:memory:/a", {"memory/a/memory.limit_in_bytes": NO_LIMIT}, UNLIMITED),
        ("2:memory:/x\n0::/y", {"memory/x/memory.limit_in_bytes": "700", "unified/y/memory.max": "600"}, 600),
    ],
)  # fmt: skip
def test_a_memory_limit_is_found(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    assert limit_bytes(machine(tmp_path, groups, files)) == expected


def test_this_machine_grants_something() -> None:
    assert cpus() >= 1
    assert default_memory() == memory_limit() // 2 > 0
