"""No orphans: a process that ends when the one it serves is gone, however that one ended."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["is_alive", "is_ours", "is_stopped", "when_gone"]

POLL_S = 0.25


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def is_ours(pid: int) -> bool:
    """Whether a process runs a module of ours, or its id is somebody else's by now. (Linux alone can tell.)"""
    try:
        _, *words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return any(word.startswith(b"leanserve") for word in words)
    except OSError:
        return not Path("/proc/self").exists()


def when_gone(pid: int, act: Callable[[], object]) -> None:
    """Call `act` from a daemon thread once process `pid` no longer exists.

    A parent counts as gone when this process has been handed to another one, even before it is reaped.
    """
    parent = os.getppid()

    def watch() -> None:
        while is_alive(pid) and not (pid == parent and os.getppid() != parent):
            time.sleep(POLL_S)
        act()

    threading.Thread(target=watch, name=f"lifeline-{pid}", daemon=True).start()
