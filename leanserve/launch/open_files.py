"""How many files a server may open: every client takes one, and shells give 1,024, or 256 on macOS."""

import logging
import resource

__all__ = ["allowed_open_files", "raise_open_files"]

logger = logging.getLogger("leanserve.launch")

WANTED = 65536
"""Not the hard limit, which may be a thousand million: some programs that are started walk through all of them."""
_LEAST_OF_MACOS = 10240
"""What its kernel grants where it refuses more (OPEN_MAX), whatever the hard limit says."""


def allowed_open_files() -> int:
    """The limit that a server has here, once it has raised its own."""
    soft, hard = (WANTED if limit == resource.RLIM_INFINITY else limit for limit in _limits())
    return max(soft, min(hard, WANTED))


def raise_open_files() -> None:
    """Raise this process's soft limit as far as the hard one lets it; processes that are started inherit it."""
    soft, hard = _limits()
    for wanted in (allowed_open_files(), min(allowed_open_files(), _LEAST_OF_MACOS)):
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.debug("the limit of open files stays at %d, not %d: %s", soft, wanted, error)
        else:
            extra = {"event": "open_files_raised", "open_files": wanted}
            logger.debug("this process may open %d files; it was %d", wanted, soft, extra=extra)
            return


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)
