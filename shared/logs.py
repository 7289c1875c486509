"""Owns what a process writes about itself: structlog, libraries' own loggers, warnings, tracebacks. Called once per process.

A console when a person watches, JSON lines otherwise. Every line passes `shared.redaction`, whoever wrote it.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType

import structlog

from shared.redaction import redact

_MAX_FRAMES = 8
_MAX_TEMPLATE_CHARS = 300

_level = "info"

log = structlog.get_logger(__name__)


def configure_logs(process: str, *, level: str = "info", json: bool | None = None) -> None:
    """Set up everything that this process writes to stderr.

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
        processors=[*processors, _redact_line],
        wrapper_class=_wrapper(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    take_over_libraries()
    _take_over_tracebacks()


def current_level() -> str:
    """The least level that is logged."""
    return _level


def set_level(level: str) -> None:
    """Log from this level on. Loggers that were used keep what they were made with, so they are made anew: nothing is paid a line."""
    structlog.configure(wrapper_class=_wrapper(level))
    lazy = type(structlog.get_logger())
    for module in list(sys.modules.values()):
        logger = getattr(module, "log", None)
        if type(logger) is lazy:
            vars(logger).pop("bind", None)


def _wrapper(level: str) -> type[structlog.typing.FilteringBoundLogger]:
    global _level
    _level = level
    return structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()])


def fault_fields(error: BaseException) -> dict[str, str]:
    """Log fields for an exception: `error`, its type, and `at`, its innermost frames, the raising one first.

    Never its message: that may hold what a user wrote; a file name and a line number cannot.
    """
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)]
    return {"error": type(error).__name__, "at": " < ".join(places)}


def _redact_line(logger: object, method: str, line: object) -> str:
    """The last processor: what has become text by then is all that is written."""
    return redact(str(line))


class LibraryHandler(logging.Handler):
    """Writes a library's record as one line of ours: the logger and the text that the library's author wrote.

    The record's arguments are left out, because they are what strangers sent: header values, addresses, bodies.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        template = record.getMessage() if record.name == "py.warnings" else str(record.msg)
        fields: dict[str, str] = {"logger": record.name, "text": template[:_MAX_TEMPLATE_CHARS]}
        if record.exc_info and record.exc_info[1] is not None:
            fields |= fault_fields(record.exc_info[1])
        method = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(log, method)("library_log", **fields)


def take_over_libraries() -> None:
    """Send every stdlib logger's warnings, and Python's own, through `LibraryHandler` and nowhere else."""
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers[:] = [LibraryHandler()]
    root.setLevel(logging.WARNING)
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def _take_over_tracebacks() -> None:
    """Uncaught exceptions are still shown in full, less the secrets; Python prints no local variables."""

    def show(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.write(redact(text))

    def show_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            show(args.exc_type, args.exc_value, args.exc_traceback)

    def show_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
        show(unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback)

    sys.excepthook = show
    threading.excepthook = show_of_thread
    sys.unraisablehook = show_unraisable
