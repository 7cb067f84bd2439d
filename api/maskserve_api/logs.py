"""The service's log: one event for each request, and what the server warns of, a line each on stderr."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

import structlog
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level
from structlog.types import EventDict, Processor, WrappedLogger

from maskserve.payload.header import shown
from maskserve_api.jobs.job import Job
from maskserve_api.record import Record

requests = logging.getLogger("maskserve.requests")
FIRST = ("time", "level", "event")
TEXT_LENGTH = 1024
TRACED_FRAMES, TRACED_CHARS = 32, 1024
TOLD = "ASGI callable returned without completing response."
"""uvicorn's line where a reply broke off, as for who takes no byte of it: ours has told that, with the request's id."""
OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
"""What logging itself keeps in a record; the rest are the fields of an event."""


def configure(form: str) -> None:
    """Writes what this process logs as "json" or "text"; "off" leaves out requests, and no warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines() if form == "json" else formatter(form))
    handler.addFilter(lambda record: record.msg != TOLD)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("maskserve").setLevel(logging.WARNING if form == "off" else logging.INFO)
    requests.disabled = form == "off"


class Lines(logging.Formatter):
    """JSON: the event of a request is plain data, and written in a third of the time that structlog takes."""

    def __init__(self) -> None:
        super().__init__()
        self.others = formatter("json")

    def format(self, record: logging.LogRecord) -> str:
        if record.name != requests.name:
            return self.others.format(record)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").removesuffix("+00:00")
        fields = {name: value for name, value in record.__dict__.items() if name not in OWN}
        return json.dumps({"time": f"{time}Z", "level": record.levelname.lower(), "event": record.msg, **fields})


def formatter(form: str) -> ProcessorFormatter:
    as_json: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    as_text: list[Processor] = [
        escaped,
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), timestamp_key="time", sort_keys=False),
    ]
    return ProcessorFormatter(
        foreign_pre_chain=[ExtraAdder(), add_log_level, structlog.processors.TimeStamper(fmt="iso", key="time")],
        processors=[ProcessorFormatter.remove_processors_meta, in_order, *(as_json if form == "json" else as_text)],
    )


def in_order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {**{name: event[name] for name in FIRST}, **event}


def escaped(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Each text on one line and for no terminal to obey, as JSON has it anyway."""
    return {name: shown(value, TEXT_LENGTH) if isinstance(value, str) else value for name, value in event.items()}


def tell(record: Record, fields: dict[str, object]) -> None:
    """Logs a request that has ended."""
    level = logging.WARNING if record.status >= 500 else logging.INFO
    requests.log(level, "request", extra=fields)


def tell_job(job: Job) -> None:
    """Logs a job that has ended."""
    requests.info("job", extra=job.event())


def traced(error: Exception) -> str:
    """Where `error` was raised, and its message, which may hold what a client sent: on one line, escaped and cut."""
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-TRACED_FRAMES))
    return f"{type(error).__name__}: {shown(str(error), TRACED_CHARS)}\n{frames}"
