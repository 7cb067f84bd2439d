"""Who runs the blocks of a job: processes of this machine, or the tasks of a Ray cluster. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from maskserve.batch.job import Job
from maskserve.batch.work import Block
from maskserve.errors import DeviceError, SettingsError
from maskserve.executors import LOCAL, Executor
from maskserve.on_ray.cluster import Joining, fixed, joined
from maskserve.processes import Processes

AUTO, CPU = "auto", "cpu"
"""Words for devices that every machine has."""


@contextmanager
def opened(job: Job, device: str, joining: Joining, tell: Callable[[str], None]) -> Iterator[tuple[Executor, Job]]:
    """What runs the job's blocks, and the job with the workers and the memory that there are."""
    if job.engine == LOCAL:
        yield Processes(workers=job.workers, retries=job.retries, split=Block.split, tell=tell), job
        return
    from maskserve.on_ray.executor import Ray

    with joined(joining, workers=job.workers, device=device_of(job, device), tell=tell) as cluster:
        executor = Ray(cluster=cluster, retries=job.retries, split=Block.split, tell=tell)
        yield executor, replace(job, workers=cluster.workers, memory=job.memory or cluster.memory)


def device_of(job: Job, device: str) -> str:
    """Where blocks are computed, unless the request says so; on a cluster the same on every node."""
    said = str(job.words.get("device", device))
    return said if job.engine == LOCAL else fixed(said)


def check_device(job: Job, device: str) -> None:
    """SettingsError where this machine lacks the device; what is computed on a cluster is looked for there."""
    word = str(job.words.get("device", device))
    if job.engine != LOCAL or word in (AUTO, CPU):
        return
    from maskserve.loading import device_of as found  # torch, which the CPU alone is named without

    try:
        found(word)
    except DeviceError as error:
        raise SettingsError(error.message, parameter="device") from None
