"""SIGTERM, or SIGINT from Ctrl-C, to a rank of a user's own torchrun. It means one of two things, and torchrun does not
say which.

The user stops the job: live requests are to finish first, which the front end sees to. Or a rank of this machine died,
and torchrun clears away the others before it starts all of them again: then the sooner the better.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

__all__ = ["Termination"]

POLL_S = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_TERMINATED = 128 + signal.SIGTERM


class Termination:
    """Handles the signals from a thread, so that a main thread stuck in a collective does not matter.

    Until `may_drain` is called, they end the process.
    """

    def __init__(self) -> None:
        self._group_is_whole: Callable[[], bool] = lambda: False
        self._drain: Callable[[], object] = lambda: None
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._wait, args=(read_fd,), name="termination", daemon=True).start()

    def may_drain(self, group_is_whole: Callable[[], bool], drain: Callable[[], object]) -> None:
        """From now on the first signal calls `drain`; the process ends by itself, or at once when the group breaks."""
        self._group_is_whole, self._drain = group_is_whole, drain

    def _wait(self, read_fd: int) -> None:
        while os.read(read_fd, 1)[0] not in _SIGNALS:
            pass
        if self._group_is_whole():
            self._drain()
            while self._group_is_whole():
                time.sleep(POLL_S)
        os._exit(EXIT_TERMINATED)
