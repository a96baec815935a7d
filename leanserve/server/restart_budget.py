"""How often, and how soon, a failed engine may be started again. Knows times, not processes."""

from collections import deque

__all__ = ["WINDOW_S", "RestartBudget"]

WINDOW_S = 600.0
"""Restarts longer ago are forgiven."""
MAX_DELAY_S = 30.0


class RestartBudget:
    """At most `max_restarts` within ten minutes.

    The first restart after an engine that served comes at once; when that one does not get as far as to serve, the
    next waits a second, then two, then four, up to half a minute.
    """

    def __init__(self, max_restarts: int) -> None:
        self.max_restarts = max_restarts
        self._restarts: deque[float] = deque()
        self._in_vain = 0

    @property
    def used(self) -> int:
        """Restarts within the window, as of the last `spend`."""
        return len(self._restarts)

    def spend(self, now: float) -> float | None:
        """The engine failed. Returns how long the next one is to wait, in seconds; None: there is to be no next one."""
        while self._restarts and now - self._restarts[0] > WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self.max_restarts:
            return None
        self._restarts.append(now)
        self._in_vain += 1
        return 0.0 if self._in_vain == 1 else min(2.0 ** (self._in_vain - 2), MAX_DELAY_S)

    def note_ready(self) -> None:
        """The engine serves."""
        self._in_vain = 0
