"""Prometheus metrics: a registry for each application, written once for each request."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from maskserve.version import version
from maskserve_api.body import Memory
from maskserve_api.jobs.desk import Jobs
from maskserve_api.jobs.job import ENDED, Status
from maskserve_api.lanes import Lanes
from maskserve_api.record import Record

BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60)


class Metrics:
    """What the service counts, and what it reads off the lanes and the memory when it is asked."""

    def __init__(self, lanes: Lanes, memory: Memory, jobs: Jobs | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        Info("maskserve_build", "The version that runs", registry=registry).info({"version": version()})
        self.requests = Counter(
            "maskserve_requests",
            "Requests that have ended, by what they asked for and the status they got",
            ["verb", "op", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "maskserve_request_duration_seconds",
            "Seconds of each stage of a request; stage total is the whole request, not a further stage",
            ["op", "stage"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.requests_of, self.seconds_of = cache(self.requests.labels), cache(self.seconds.labels)  # labels take 5 µs
        self.bytes_in = Counter("maskserve_request_bytes", "Bytes of request bodies that were read", registry=registry)
        self.bytes_out = Counter("maskserve_reply_bytes", "Bytes of reply bodies that were sent", registry=registry)
        self.cells = Counter("maskserve_elements", "Cells of answers, by validity", ["state"], registry=registry)
        self.cells_of = cache(self.cells.labels)
        depth = Gauge(
            "maskserve_queue_depth", "Requests in a device's lane, waiting or computed", ["lane"], registry=registry
        )
        for device, lane in lanes:
            depth.labels(device).set_function(partial(getattr, lane, "n_pending"))
        held = Gauge("maskserve_held_bytes", "Bytes of the bodies in flight and of their answers", registry=registry)
        held.set_function(lambda: memory.held_bytes)
        if jobs is not None:
            registry.register(OfJobs(jobs))

    def count(self, record: Record, seconds: dict[str, float]) -> None:
        """Adds one request that has ended."""
        self.requests_of(record.verb, record.op, str(record.status)).inc()
        for stage, s in seconds.items():
            self.seconds_of(record.op, stage).observe(s)
        self.bytes_in.inc(record.bytes_in)
        self.bytes_out.inc(record.bytes_out)
        n_valid, n_masked = record.cells
        self.cells_of("valid").inc(n_valid)
        self.cells_of("masked").inc(n_masked)

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and the media type they are written in: OpenMetrics for who asks for it."""
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library fails on a version that is no number
            encode, media_type = choose_encoder("")
        return encode(self.registry), media_type


class OfJobs(Collector):
    """What is read off the jobs when it is asked for."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        there = GaugeMetricFamily("maskserve_jobs", "Jobs that are there, by how far they are", labels=["status"])
        for status in Status:
            there.add_metric([status], self.jobs.n_by_status[status])
        yield there
        yield CounterMetricFamily(
            "maskserve_jobs_started", "Attempts to compute a job that have begun", value=self.jobs.n_started
        )
        ended = CounterMetricFamily("maskserve_jobs_ended", "Jobs that have ended, by how", labels=["status"])
        for status in ENDED:
            ended.add_metric([status], self.jobs.n_ended[status])
        yield ended
        yield GaugeMetricFamily(
            "maskserve_jobs_kept_bytes",
            "Bytes that jobs keep on disk, bodies and results",
            value=self.jobs.quota.n_bytes,
        )
