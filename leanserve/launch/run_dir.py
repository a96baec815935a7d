"""Where the sockets of one server lie."""

import os
import tempfile
from pathlib import Path

from leanserve.contracts.errors import ConfigError

__all__ = ["RUN_DIR_VARIABLE", "engine_address", "make_run_dir", "pulse_address", "takes_sockets"]

RUN_DIR_VARIABLE = "LEANSERVE_RUN_DIR"
"""The directory, for processes that are started: readable by its user alone."""

_LONGEST_NAME = "/leanserve-12345678/steps-1023"
_MAX_PATH_BYTES = 103
"""Of a Unix socket (macOS; Linux allows four more)."""


def engine_address(run_dir: Path) -> str:
    """The socket between the front end, which binds it, and rank 0."""
    return f"ipc://{run_dir}/engine"


def pulse_address(run_dir: Path) -> str:
    """The socket where every rank of this machine tells the front end of itself."""
    return f"ipc://{run_dir}/pulse"


def takes_sockets(directory: Path) -> bool:
    """Whether a run directory in here has a path that is short enough."""
    return len(os.fsencode(directory)) + len(_LONGEST_NAME) <= _MAX_PATH_BYTES


def make_run_dir() -> Path:
    """A directory for the sockets of one server, readable by this user alone: in TMPDIR, or, where that is too long a
    path, in /tmp.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        parent = Path(tempfile.gettempdir())
        return Path(tempfile.mkdtemp(prefix="leanserve-", dir=parent if takes_sockets(parent) else "/tmp"))
    except OSError as error:
        raise ConfigError(
            f"there is no place for this server's sockets ({error}); set TMPDIR to a directory that can be written"
        ) from error
