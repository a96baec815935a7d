"""What a user sees while a test runs: one line, drawn twice a second, since drawing takes time from measuring."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.live import Live as LiveDisplay
from rich.text import Text

from leanserve.loadtest.measures import distribution
from leanserve.loadtest.runner import Live

__all__ = ["Display", "duration", "line_text"]

_INTERVAL_S = 0.5
_RECENT = 1000


class Display:
    """Writes to a terminal; where there is none, stages and the run's end only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._live = LiveDisplay(Text(), console=console, auto_refresh=False, transient=True)
        if console.is_terminal:
            self._live.start()

    def close(self) -> None:
        """Give the terminal back."""
        self._live.stop()

    def stage(self, text: str) -> None:
        """Say what is being done."""
        self._stage = text
        if self._live.is_started:
            self._live.update(Text(text, style="dim"), refresh=True)

    @contextlib.asynccontextmanager
    async def following(self, live: Live, title: str) -> AsyncIterator[None]:
        """Draw a run while entered."""
        started = time.perf_counter()
        task = asyncio.create_task(self._follow(live, title, started), name="progress")
        try:
            yield
        finally:
            task.cancel()
            if not self._live.is_started:
                self._console.print(progress_line(live, title, time.perf_counter() - started), soft_wrap=True)

    async def _follow(self, live: Live, title: str, started: float) -> None:
        while self._live.is_started:
            self._live.update(progress_line(live, title, time.perf_counter() - started), refresh=True)
            await asyncio.sleep(_INTERVAL_S)


def progress_line(live: Live, title: str, elapsed_s: float) -> Text:
    """The state of a run; percentiles are of its latest requests."""
    line = Text.assemble(
        (f"{live.ended}/{live.total}", "bold"),
        f"  running {live.started - live.ended}",
        (f"  errors {live.errors}", "red" if live.errors else ""),
        f"  {live.tokens / max(elapsed_s, 1e-3):,.0f} tokens/s",
    )
    for name, values in (("TTFT", live.ttft_ms), ("end to end", live.e2e_ms)):
        if values:
            recent = distribution(values[-_RECENT:])
            line.append(f"  {name} p50 {duration(recent.p50)} p99 {duration(recent.p99)}")
    line.append(f"  {elapsed_s:.0f} s  {title}", "dim")
    return line


def duration(value_ms: float) -> str:
    """A time with three digits: 0.06 ms, 31.2 ms, 2.41 s."""
    size = abs(value_ms)
    if size >= 1000:
        return f"{value_ms / 1000:.3g} s" if size < 1e6 else f"{value_ms / 1000:,.0f} s"
    return f"{value_ms:.3g} ms" if size >= 1 else f"{value_ms:.2f} ms"


def line_text(at_zero_ms: float, per_1k_tokens_ms: float, unit: str) -> str:
    """A fitted line in words: 401 ms + 1.36 s per 1k prompt tokens. A time below 0 is left out: nothing takes that."""
    if at_zero_ms < 0:
        return f"{duration(per_1k_tokens_ms)} per {unit}"
    sign = "-" if per_1k_tokens_ms < 0 else "+"
    return f"{duration(at_zero_ms)} {sign} {duration(abs(per_1k_tokens_ms))} per {unit}"
