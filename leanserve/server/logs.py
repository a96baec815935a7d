"""What goes to the log. Never a prompt, a completion or a token id; what clients choose is escaped and cut."""

import logging
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

import orjson

from leanserve.contracts.errors import ConfigError

__all__ = ["log_access", "log_internal_error", "open_access_log", "printable"]

logger = logging.getLogger("leanserve.server")
access_logger = logging.getLogger("leanserve.access")


def open_access_log(target: str) -> None:
    """Write the access log, one JSON object a line, to the end of a file, or to standard error for `-`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        handler = logging.StreamHandler(sys.stderr) if target == "-" else logging.FileHandler(Path(target))
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


def log_internal_error(error: BaseException) -> None:
    """Log where an unexpected error came from, without its message: that may quote a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s\n%s", type(error).__name__, where)


def printable(value: str, max_chars: int = 200) -> str:
    """A value chosen by a client, on one line."""
    return value[:max_chars].encode("unicode_escape").decode("ascii")
