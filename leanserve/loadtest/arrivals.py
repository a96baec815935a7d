"""When requests start: an open loop keeps its times whatever the server does, a closed loop waits for answers.

Only an open loop shows what users see when a server falls behind: a closed loop asks less of a slow server.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from leanserve.contracts.errors import ConfigError

__all__ = ["ArrivalKind", "ClosedLoop", "OpenLoop"]

ArrivalKind = Literal["poisson", "constant", "gamma", "ramp"]


@dataclass(frozen=True)
class ClosedLoop:
    """As many requests at once as `concurrency`; the next one starts when one has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency is {self.concurrency}; it must be at least 1")

    def describe(self) -> str:
        return f"closed loop, {self.concurrency} at once"


@dataclass(frozen=True)
class OpenLoop:
    """Requests start at times of their own."""

    rate_rps: float
    kind: ArrivalKind = "poisson"
    burstiness: float = 4.0
    """Gamma only: variance of the gaps over that of Poisson's. 1 is Poisson, more comes in bursts."""
    ramp_to_rps: float | None = None
    """Ramp only: the rate at the last request."""

    def __post_init__(self) -> None:
        if not self.rate_rps > 0:
            raise ConfigError(f"--rate is {self.rate_rps:g}; it must be above 0 requests/s")
        if not self.burstiness > 0:
            raise ConfigError(f"--burstiness is {self.burstiness:g}; it must be above 0")
        if (self.kind == "ramp") != (self.ramp_to_rps is not None):
            raise ConfigError("--arrival ramp and --ramp-to RATE go together; give both or neither")
        if self.ramp_to_rps is not None and not self.ramp_to_rps > 0:
            raise ConfigError(f"--ramp-to is {self.ramp_to_rps:g}; it must be above 0 requests/s")

    def describe(self) -> str:
        to = f" to {self.ramp_to_rps:g}" if self.ramp_to_rps is not None else ""
        return f"open loop, {self.kind}, {self.rate_rps:g}{to} requests/s"

    def starts_s(self, count: int, seed: int) -> list[float]:
        """Start of each of `count` requests, in seconds from the first, which is 0."""
        starts = [0.0]
        gaps = self._gaps_s(count, random.Random(f"arrivals/{seed}"))
        while len(starts) < count:
            starts.append(starts[-1] + next(gaps))
        return starts[:count]

    def _gaps_s(self, count: int, rng: random.Random) -> Iterator[float]:
        for index in range(1, count):
            match self.kind:
                case "constant":
                    yield 1 / self.rate_rps
                case "poisson":
                    yield rng.expovariate(self.rate_rps)
                case "gamma":
                    yield rng.gammavariate(1 / self.burstiness, self.burstiness / self.rate_rps)
                case "ramp":
                    assert self.ramp_to_rps is not None
                    share = (index - 0.5) / (count - 1)
                    yield 1 / (self.rate_rps + share * (self.ramp_to_rps - self.rate_rps))
