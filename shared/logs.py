"""Owns the structlog set-up: a console when a person watches, JSON lines otherwise. Called once per process."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs(process: str, *, level: str = "info", json: bool | None = None) -> None:
    """Set up structlog for this process, writing to stderr.

    `json` None chooses by whether stderr is a terminal. Prompts, images and outputs are never passed to a
    logger: call sites log ids, counts and codes only.
    """
    if json is None:
        json = not sys.stderr.isatty()

    def name_process(
        logger: object, method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:
        event["process"] = process  # not a context variable: those do not reach other threads
        return event

    processors: list[structlog.types.Processor] = [
        name_process,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if json:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors += [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,  # no local variables: they hold prompts
            )
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
