"""What goes to the log. Never a prompt, a completion or a token id; what clients choose is escaped and cut."""

import logging
import traceback

__all__ = ["access_logger", "log_internal_error", "printable"]

logger = logging.getLogger("leanserve.server")
access_logger = logging.getLogger("leanserve.access")


def log_internal_error(error: BaseException) -> None:
    """Log where an unexpected error came from, without its message: that may quote a prompt."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s\n%s", type(error).__name__, where)


def printable(value: str, max_chars: int = 200) -> str:
    """A value chosen by a client, on one line."""
    return value[:max_chars].encode("unicode_escape").decode("ascii")
