"""`doctor`: what this installation is and can do, and where each setting comes from."""

from __future__ import annotations

import json
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from maskserve import cgroup
from maskserve.settings import Settings
from maskserve_cli import exits, outputs
from maskserve_cli.command import AsJson, Config, settings_of
from maskserve_cli.table import columns

if TYPE_CHECKING:
    from maskserve.devices import Device

ENOUGH_FILES = 4096
"""A connection is an open file: serve raises the soft limit to the hard one, and below this that is little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendReport:
    """A back end, how many of the ops it serves, and each reason it gives for the others."""

    name: str
    serves: int
    of: int
    refusals: dict[str, list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that doctor knows."""

    maskserve: str
    python: str
    torch: str
    platform: str
    cpus: int
    open_files: int
    devices: list[str]
    triton: str | None
    driver: str | None
    gpus: list[Device]
    """What is told of each CUDA device, its self-test and the speed of its memory among it."""
    backends: list[BackendReport]


def doctor(as_json: AsJson = False, config: Config = None) -> None:
    settings = settings_of(config)
    report = examined()
    if as_json:
        said = {name: {"value": s.value, "source": s.source} for name, s in settings.rows.items()}
        outputs.write_text([json.dumps({**asdict(report), "settings": said}, ensure_ascii=False)])
    else:
        outputs.write_text(lines(report, settings))
    if not all(gpu.is_well for gpu in report.gpus):
        raise typer.Exit(exits.INTERNAL)


def examined() -> Report:
    import torch

    from maskserve import devices
    from maskserve.accelerators import accelerators
    from maskserve.version import version

    gpus = [devices.examined(name) for name in accelerators().names()]
    return Report(
        maskserve=version(),
        python=sys.version.split()[0],
        torch=str(torch.__version__),
        platform=f"{platform.system()} {platform.machine()}",
        cpus=cgroup.cpus(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        devices=["cpu", *(f"{gpu.name} {gpu.model}" for gpu in gpus)],
        triton=devices.triton_version(),
        driver=devices.driver(),
        gpus=gpus,
        backends=backend_reports(),
    )


def backend_reports() -> list[BackendReport]:
    """Every back end, asked about every op that a verb serves, on the dtype that most data has."""
    from maskserve.backends import backends
    from maskserve.dtypes import f32
    from maskserve.ops import OPS
    from maskserve.ops.parameters import REQUIRED, Type
    from maskserve.plan import SlicedRow, plan

    plans = []
    for row in OPS.values():
        if not isinstance(row, SlicedRow):
            continue
        needed = [p for p in row.requestable if p.default is REQUIRED]
        if all(p.type is Type.DIM for p in needed):
            plans.append(plan(row, tuple((p.name, 0) for p in needed), (2, 2), f32, "cpu"))
    reports = []
    for backend in backends():
        refusals: dict[str, list[str]] = {}
        for one in plans:
            reason = backend.why_not(one)
            if reason is not None:
                same_for_all = re.sub(rf"\b{one.row.name}\b", "this op", reason)
                refusals.setdefault(same_for_all, []).append(one.row.name)
        n_refused = sum(map(len, refusals.values()))
        reports.append(
            BackendReport(name=backend.name, serves=len(plans) - n_refused, of=len(plans), refusals=refusals)
        )
    return reports


def lines(report: Report, settings: Settings) -> Iterator[str]:
    """The report for people."""
    yield f"maskserve {report.maskserve}, Python {report.python}, torch {report.torch}, {report.platform}"
    yield f"devices: {', '.join(report.devices)} ({report.cpus} CPUs)"
    if 0 <= report.open_files < ENOUGH_FILES:
        yield f"open files: at most {report.open_files}, so serve takes few connections; raise it: ulimit -Hn {ENOUGH_FILES}"
    yield f"triton: {report.triton or 'not installed'}"
    yield f"NVIDIA driver: {report.driver or 'none'}"
    for gpu in report.gpus:
        yield f"{gpu.name}: {gpu.model}, compute capability {gpu.capability}"
        yield f"{gpu.name}: {gpu.free_bytes} of {gpu.memory_bytes} bytes free"
        yield f"{gpu.name}: self-test {gpu.self_test}"
        yield f"{gpu.name}: copies {gpu.copied_bytes_per_s / 1e9:.0f} GB/s"
    yield ""
    yield "back ends, in order of preference, for f32 on the CPU"
    for backend in report.backends:
        yield f"  {backend.name}: {backend.serves} of {backend.of} ops"
        for reason, names in backend.refusals.items():
            yield f"    not {', '.join(names)}: {reason}"
    yield ""
    yield "settings"
    rows = [["name", "value", "from"], *([s.row.name, str(s), s.source] for s in settings.rows.values())]
    yield from columns(rows, indent="  ")
