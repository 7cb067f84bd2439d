"""The service's log: one event for each request, and what the server warns of, a line each on stderr."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level
from structlog.types import EventDict, Processor, WrappedLogger

from maskserve.payload.header import shown
from maskserve_api.record import Record

requests = logging.getLogger("maskserve.requests")
FIRST = ("time", "level", "event")
TEXT_LENGTH = 1024
TOLD = "ASGI callable returned without completing response."
"""uvicorn's line where a reply broke off, as for who takes no byte of it: ours has told that, with the request's id."""


def configure(form: str) -> None:
    """Writes what this process logs as "json" or "text"; "off" leaves out requests, and no warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    handler.addFilter(lambda record: record.msg != TOLD)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("maskserve").setLevel(logging.WARNING if form == "off" else logging.INFO)
    requests.disabled = form == "off"


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
