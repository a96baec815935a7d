"""What goes to the log. Never a prompt, a completion or a token id; what clients choose is escaped and cut.

Every line is one event: a line for people, or one JSON object, on standard error. A logger's `extra` gives the event's
name and its facts (`extra={"event": "rank_failed", "rank": 1}`), which stand in the JSON beside the message.
"""

import logging
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import orjson

from leanserve.contracts.errors import ConfigError

__all__ = [
    "LogFormat",
    "LogLevel",
    "RefusalLog",
    "SeldomTold",
    "log_access",
    "log_internal_error",
    "open_access_log",
    "open_log",
    "open_log_of_rank",
    "printable",
]

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

logger = logging.getLogger("leanserve.server")
access_logger = logging.getLogger("leanserve.access")

_LEVEL_VARIABLE, _FORMAT_VARIABLE = "LEANSERVE_LOG_LEVEL", "LEANSERVE_LOG_FORMAT"
_SELDOM_S = 10.0
_ALWAYS_THERE = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def open_log(level: LogLevel = "info", log_format: LogFormat = "text", **facts: object) -> None:
    """From now on everything goes to standard error in this form; processes that are started inherit the choice.

    Args:
        facts: of this process, such as its rank; they stand in every JSON line.
    """
    os.environ |= {_LEVEL_VARIABLE: level, _FORMAT_VARIABLE: log_format}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(facts) if log_format == "json" else _TextLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("leanserve").setLevel(level.upper())
    access_logger.setLevel(logging.WARNING)  # nothing, until `open_access_log`


def open_log_of_rank(**facts: object) -> None:
    """`open_log`, as the process that started this one chose."""
    level, log_format = os.environ.get(_LEVEL_VARIABLE, "info"), os.environ.get(_FORMAT_VARIABLE, "text")
    open_log(
        level if level in ("debug", "info", "warning", "error") else "info",
        "json" if log_format == "json" else "text",
        **facts,
    )


class _Lines(logging.Formatter):
    """One event, one line. Of other libraries' events only the first line: what follows may quote anything."""

    def said(self, record: logging.LogRecord) -> str:
        said = record.getMessage()
        return said if record.name.startswith("leanserve") else f"{record.name}: {said.partition(chr(10))[0]}"

    def stack(self, record: logging.LogRecord) -> str | None:
        """Where an exception came from, without its message."""
        if record.exc_info is None or record.exc_info[1] is None:
            return None
        error = record.exc_info[1]
        return "".join([*traceback.format_tb(error.__traceback__), type(error).__name__])


class _TextLines(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).isoformat(sep=" ", timespec="milliseconds")
        stack = self.stack(record) or getattr(record, "stack", None)
        return f"{when} {record.levelname:<7} {self.said(record)}" + (f"\n{stack}" if stack else "")


class _JsonLines(_Lines):
    def __init__(self, facts: dict[str, object]) -> None:
        super().__init__()
        self._facts = facts

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.funcName,
            "message": self.said(record),
            **self._facts,
        }
        line |= {name: value for name, value in vars(record).items() if name not in _ALWAYS_THERE}
        if stack := self.stack(record):
            line["stack"] = stack
        return orjson.dumps(line, default=str).decode()


class SeldomTold:
    """What may come in thousands: the first is told at once, then one line for all of ten seconds."""

    def __init__(self) -> None:
        self._untold = 0
        self._told_at = float("-inf")

    def others(self) -> int | None:
        """Of one more: how many were not told since the last that was; None: this one is not to be told either."""
        now = time.monotonic()
        if now - self._told_at < _SELDOM_S:
            self._untold += 1
            return None
        untold, self._untold, self._told_at = self._untold, 0, now
        return untold


class RefusalLog:
    """Requests that were refused for want of room."""

    def __init__(self) -> None:
        self._refusals = SeldomTold()

    def note(self, request_id: str, why: str) -> None:
        others = self._refusals.others()
        if others is not None:
            logger.warning(
                "request %s was refused with 503%s: %s",
                request_id,
                f" (and {others} others since the last such line)" if others else "",
                why,
                extra={"event": "request_refused", "request_id": request_id, "others": others},
            )


class _AccessFile(logging.FileHandler):
    """A file whose disk may fill up: that is one line in the log, and not a stack for each request."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._failures = SeldomTold()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif (others := self._failures.others()) is not None:
            logger.error(
                "the access log cannot be written, and %d lines are lost: %s",
                others + 1,
                error,
                extra={"event": "access_log_failed", "lines": others + 1},
            )


def open_access_log(target: str) -> None:
    """Write the access log, one JSON object a line, to the end of a file, or to standard error for `-`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        handler = logging.StreamHandler(sys.stderr) if target == "-" else _AccessFile(Path(target))
    except OSError as error:
        raise ConfigError(f"the access log {target} cannot be written: {error}") from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_logger.addHandler(handler)
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False


def log_access(**facts: object) -> None:
    """One line about one request. Costs nothing where nobody asked for the log."""
    if access_logger.isEnabledFor(logging.INFO):
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        access_logger.info(orjson.dumps({"time": now, **facts}).decode())


def log_internal_error(error: BaseException, request_id: str | None = None) -> None:
    """Log where an unexpected error came from, without its message: that may quote a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error(
        "unexpected %s",
        type(error).__name__,
        extra={"event": "internal_error", "stack": where, "request_id": request_id},
    )


def printable(value: str, max_chars: int = 200) -> str:
    """A value chosen by a client, on one line."""
    return value[:max_chars].encode("unicode_escape").decode("ascii")
