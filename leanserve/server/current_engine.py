"""The engine that is here, or awaited: engines come and go, and what each said of itself.

Knows neither sockets nor requests; `EngineClient` tells it what it hears.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from leanserve.contracts.errors import EngineError, OverloadedError
from leanserve.contracts.messages import EngineInfo, Loading, TokenOutputs
from leanserve.server.restart_budget import WINDOW_S, RestartBudget

__all__ = ["CurrentEngine", "EngineLoad", "EngineState", "first_line"]

EngineState = Literal["loading", "ready", "restarting", "failed"]
"""restarting: an engine has failed, and another one is to take its place. failed: none is."""


@dataclass(frozen=True)
class EngineLoad:
    """What the engine said of itself with its newest step."""

    step: int = 0
    running: int = 0
    waiting: int = 0
    pages_used_per_rank: tuple[int, ...] = ()
    preemptions: int = 0
    pages_cached_per_rank: tuple[int, ...] = ()
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0

    @classmethod
    def told_by(cls, message: TokenOutputs) -> "EngineLoad":
        return cls(
            message.step,
            message.running,
            message.waiting,
            message.pages_used_per_rank,
            message.preemptions,
            message.pages_cached_per_rank,
            message.prefix_queried_tokens,
            message.prefix_hit_tokens,
        )


class CurrentEngine:
    """Belongs to one event loop.

    Args:
        max_restarts: so many engines within ten minutes may take the place of one that failed.
    """

    def __init__(self, max_restarts: int) -> None:
        self.state: EngineState = "loading"
        self.info: EngineInfo | None = None
        """Known once an engine has been ready."""
        self.loading: Loading | None = None
        """The newest progress report, while loading."""
        self.failure: str | None = None
        """Why the engine failed, while it has."""
        self.load = EngineLoad()
        self.attempt = 0
        """Counts the engines that have come."""
        self.is_attached = False
        """One is here."""
        self.is_ending = False
        """It was asked to end: no other one is to come."""
        self.budget = RestartBudget(max_restarts)
        self._configure_at = 0.0
        self._vacant_since = time.monotonic()
        self._last_words: str | None = None
        self._settled = asyncio.Event()
        self._failed = asyncio.Event()

    @property
    def vacant_s(self) -> float:
        """How long no engine has been here."""
        return 0.0 if self.is_attached else time.monotonic() - self._vacant_since

    @property
    def configure_in_s(self) -> float:
        """How long an engine that has come is to wait before it begins to load."""
        return max(self._configure_at - time.monotonic(), 0.0)

    async def wait_ready(self) -> EngineInfo:
        """Wait until the engine is ready.

        Raises:
            EngineError: it failed instead.
        """
        await self._settled.wait()
        if self.state == "failed" or self.info is None:
            raise EngineError(self.failure or "the engine failed")
        return self.info

    async def wait_failed(self) -> str:
        """Wait until the engine fails; returns why."""
        await self._failed.wait()
        return self.failure or "the engine failed"

    def check_ready(self) -> None:
        """Raises: OverloadedError while the engine loads or restarts, EngineError when it is gone."""
        if self.state in ("loading", "restarting"):
            progress = f" ({self.loading.stage}, {self.loading.done} of {self.loading.total})" if self.loading else ""
            what = "the model is still loading" if self.state == "loading" else "the engine is being restarted"
            raise OverloadedError(f"{what}{progress}; try again soon", retry_after_s=2)
        if self.state == "failed":
            raise EngineError(f"the engine is not running: {first_line(self.failure)}")

    def attach(self) -> None:
        """An engine is here; the one that was here, if there is one, goes on."""
        if self.is_attached:
            return
        self.is_attached = True
        self.attempt += 1
        if self.state == "failed":
            self.state, self.failure = "loading", None
            self._settled.clear()
            self._failed.clear()

    def note_ready(self, info: EngineInfo) -> None:
        """It serves."""
        self.state, self.info, self.loading, self.failure = "ready", info, None, None
        self.budget.note_ready()
        self._settled.set()

    def note_last_words(self, message: str) -> None:
        """It, or one of its ranks, said why it ends. What is said first counts, and nothing after it is gone."""
        if self.is_attached:
            self._last_words = self._last_words or message

    def lose(self, message: str, gone_ranks: list[str]) -> float | None:
        """It is gone. Returns after how many seconds another one may load; None: there is to be none, it has failed.

        Args:
            message: why, where it had no last words.
            gone_ranks: those whose processes have ended.
        """
        self.is_attached = False
        self.load = EngineLoad()
        message, self._last_words = self._last_words or message, None
        if gone_ranks:
            message = f"{', '.join(gone_ranks)} gone; {message}"
        now = time.monotonic()
        delay_s = None if self.is_ending else self.budget.spend(now)
        if delay_s is None:
            allowed = self.budget.max_restarts
            if allowed and not self.is_ending:
                times = f"{allowed + 1} times within {WINDOW_S / 60:.0f} minutes"
                message += f"; it failed {times}, and --max-restarts is {allowed}"
            self.fail(message)
            return None
        self.state, self.failure, self.loading = "restarting", message, None
        self._configure_at = now + delay_s
        self._vacant_since = now
        return delay_s

    def fail(self, message: str) -> None:
        """It is gone for good. The first reason stands."""
        if self.state != "failed":
            self.state, self.failure, self.load = "failed", message, EngineLoad()
        self._settled.set()
        self._failed.set()


def first_line(message: str | None) -> str:
    """What a client may know of a failure; the log has the rest."""
    return (message or "no reason given").partition("\n")[0]
