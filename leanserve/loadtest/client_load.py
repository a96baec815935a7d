"""How busy this client is: a tester that cannot keep up measures itself."""

import asyncio
import time
from types import TracebackType

import msgspec

__all__ = ["ClientLoad", "LoadSampler"]

_INTERVAL_S = 0.01


class ClientLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What a run cost this client."""

    lag_ms: list[float]
    """How late a 10 ms timer fired, each time: what every time stamp may be late by."""
    cpu_share: float
    """CPU seconds of this process per second; it runs on one core."""


class LoadSampler:
    """Samples while it is entered."""

    async def __aenter__(self) -> "LoadSampler":
        self._lag_ms: list[float] = []
        self._started = (time.process_time(), time.perf_counter())
        self._task = asyncio.create_task(self._sample(), name="client lag")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._task.cancel()
        cpu_s = time.process_time() - self._started[0]
        wall_s = time.perf_counter() - self._started[1]
        self.load = ClientLoad(lag_ms=self._lag_ms, cpu_share=cpu_s / wall_s)

    async def _sample(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_INTERVAL_S)
            self._lag_ms.append(max(0.0, time.perf_counter() - before - _INTERVAL_S) * 1000)
